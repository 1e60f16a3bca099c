"""`equipoise bench links`: what the links between ranks cost, and which way to send tokens is faster over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.commands.shown import Json, wide_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from equipoise.parallel.links import Effort, Progress
    from equipoise.plan.links import Links

LAUNCHER = "torch.distributed.run"


def links(
    *,
    ranks: int = 4,
    tokens: int = 256,
    top_k: int = 2,
    dim: int = 512,
    hidden_dim: int = 1024,
    quick: bool = False,
    out: Path | None = None,
    json_: Json = False,
) -> int:
    """What the ranks of a cluster pay to talk: latency and bandwidth of each collective, and of an expert's products.

    Under torchrun it measures the ranks that are there: NCCL where each has a GPU, gloo otherwise. Without, it starts
    --ranks processes on this machine, one thread each, and measures its loopback. Takes about half a minute. The file
    of --out is what `equipoise simulate --links` is calibrated with.

    For example: equipoise bench links --ranks 2 --quick --out links.json

    Args:
        ranks: Processes to start, where torchrun has not started any.
        tokens: Of each rank, to say which dispatcher is faster for them.
        top_k: Experts per token, for the same.
        dim: Of a token: of the expert that is timed, and of what is dispatched.
        hidden_dim: Of the expert that is timed.
        quick: Small sizes and few repeats: does it run? Seconds.
        out: Write the measured links here, as JSON.
        json_: Print the measured links as one JSON object, and nothing else.
    """
    from equipoise.parallel.links import Effort

    for name, value in {"--tokens": tokens, "--top-k": top_k}.items():
        if value < 1:
            raise ValueError(f"bench links: expected {name} of at least 1, got {value}")
    few = {"sizes": (1024, 16384, 262144), "rows": (1, 16), "seconds": 0.02, "least": 3} if quick else {}
    effort = Effort(dim=dim, hidden_dim=hidden_dim, **few)  # type: ignore[arg-type]
    if "RANK" in os.environ:
        found = _of_this_group(effort)
    else:
        if ranks < 2:
            raise ValueError(f"bench links: expected --ranks of at least 2, got {ranks}; one rank has no links")
        sizes = ["--dim", str(dim), "--hidden-dim", str(hidden_dim), *["--quick"] * quick]
        found = _of_own_ranks(ranks, sizes)
    if int(os.environ.get("RANK", 0)) == 0:
        _tell(found, tokens, top_k, out, json_)
    return 0


def _tell(found: Links, tokens: int, top_k: int, out: Path | None, json_: bool) -> None:
    if out:
        out.write_text(json.dumps(found.fields(), indent=1) + "\n", encoding="utf-8")
    if json_:
        print(json.dumps(found.fields()))
        return
    console = wide_console()
    console.print(links_table(found))
    console.print(cost_table(found))
    console.print(verdict(found, tokens, top_k), highlight=False)
    if out:
        console.print(f"links  {out}", highlight=False)


def links_table(found: Links) -> Table:
    """Every size of every operation: median, and the rate it comes to."""
    from rich.table import Table

    table = Table(title=f"{found.ranks} ranks, {found.backend}, {found.device}", title_justify="left", box=None)
    for column in ("operation", "amount", "median", "10 % to 90 %", "rate"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for t in sorted(found.timings, key=lambda t: (t.operation == "expert", t.operation, t.amount)):
        unit = "FLOP" if t.operation == "expert" else "B"
        spread = f"{_time(t.low)} to {_time(t.high)}"
        rate = f"{_scaled(t.rate)}{unit}/s" if t.amount else ""
        amount = f"{_scaled(t.amount)}{unit}" if t.amount else ""
        table.add_row(t.operation, amount, _time(t.seconds), spread, rate)
    return table


def cost_table(found: Links) -> Table:
    """The fitted line of each operation."""
    from rich.table import Table

    title = "fitted: start + amount / rate; the error is the median over the sizes"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("operation", "start", "rate", "error"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for name in ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "expert"):
        cost = getattr(found, name)
        unit = "FLOP/s" if name == "expert" else "B/s"
        table.add_row(name, _time(cost.start_s), f"{_scaled(cost.rate)}{unit}", f"{cost.error:.0%}")
    return table


def verdict(found: Links, tokens: int, top_k: int) -> str:
    """Which dispatcher is faster for so many tokens per rank in fp32, with both times."""
    from equipoise.parallel.links import dispatch_seconds, faster_dispatcher

    asked = (found, tokens, found.dim, 4, top_k, found.ranks)
    seconds, faster = dispatch_seconds(*asked), faster_dispatcher(*asked)
    times = ", ".join(f"{name} {_time(value)}" for name, value in seconds.items())
    return (
        f"for {tokens} tokens per rank of dim {found.dim} in fp32, top-{top_k}: {faster} is faster ({times} per layer)"
    )


# ---------------------------------------------------------------------------------------------- where it runs


def _of_this_group(effort: Effort) -> Links:
    """Measured between the ranks that torchrun has started, this being one of them."""
    from equipoise.parallel.links import measure
    from equipoise.parallel.mesh import process_group

    with process_group(), _progress(int(os.environ["RANK"]) == 0) as progress:
        return measure(effort, progress)


def _of_own_ranks(ranks: int, options: list[str]) -> Links:
    """The same command, run by as many processes as torchrun would start on this machine's loopback."""
    from equipoise.plan.links import Links

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "links.json"
        command = [sys.executable, "-m", LAUNCHER, "--nproc-per-node", str(ranks), "--standalone"]
        command += ["-m", "equipoise", "bench", "links", *options, "--json", "--out", str(result)]
        environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | os.environ
        launcher = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            code = launcher.wait()
        finally:
            launcher.terminate()  # it ends its ranks; nothing happens where it has ended
            launcher.wait()
        if code:
            raise RuntimeError(f"bench links: the ranks ended with exit code {code}; their errors are above")
        return Links.from_fields(json.loads(result.read_text(encoding="utf-8")), str(result))


@contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    """A bar on stderr, on one rank, where somebody sees it."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console: Console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("unreachable")


def _scaled(amount: float) -> str:
    """With a decimal prefix, three digits: 1.5e9 is "1.50 G"."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= factor:
            return f"{amount / factor:.3g} {prefix}"
    return f"{amount:.3g} "
