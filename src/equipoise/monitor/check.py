"""One question of the decision tree with its answer, and the commands that an answer may advise."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "trouble", "past", "unknown"]
NOT_SWITCHED_ON = (
    "A resumed run keeps its configuration, so repairs can't be switched on in this one: start the next one with "
    "--recover, and the recovery ladder acts at once. Without it the ladder only proposes what it would do."
)


@dataclass(frozen=True)
class Check:
    """One question of the tree. "past": it explains trouble that is over. since_step: when the trouble began.

    command: that shows or mends it.
    """

    question: str
    verdict: Verdict
    answer: str
    since_step: int | None = None
    layer: str | None = None
    remedy: str = ""
    command: str = ""


@dataclass(frozen=True)
class Desk:
    """What to type. folder: of the records. server: whether they are a server's. admin_port: None where unknown."""

    folder: str
    server: bool = False
    admin_port: int | None = None

    @property
    def watch(self) -> str:
        """Shows it."""
        return f"equipoise watch {shlex.quote(self.folder)}"

    @property
    def start_again(self) -> str:
        """After its process has ended."""
        return "equipoise serve RUN" if self.server else f"equipoise train --resume --out {shlex.quote(self.folder)}"

    def admin(self, verb: str, body: str = "{}") -> str:
        """Has the server do it; on its machine, where the token is. Nobody but loopback gets the token."""
        token = f'"authorization: Bearer $(cat {shlex.quote(f"{self.folder}/admin_token")})"'
        data = "" if verb == "state" else f" -H 'content-type: application/json' -d '{body}'"
        return f"curl http://127.0.0.1:{self.admin_port or 'ADMIN_PORT'}/admin/{verb} -H {token}{data}"

    def switch_on(self) -> tuple[str, str]:
        """(remedy, command) where repairs are only proposed."""
        if not self.server:
            return NOT_SWITCHED_ON, ""
        return "Without --recover repairs are only proposed; let the ladder act.", self.admin(
            "recovery", '{"act":true}'
        )

    def go_back(self, step: int) -> tuple[str, str]:
        """(remedy, command) where a repair did not hold."""
        tried = "The last repair did not hold, and the model is as it was before it. The ladder's next rung follows by "
        if not self.server:
            return f"{tried}itself; where none does, go back to a checkpoint from before step {step}.", self.watch
        return f"{tried}itself; where none does, take the newest known-good routers.", self.admin("router/rollback")
