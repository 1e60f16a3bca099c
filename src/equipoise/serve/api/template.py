"""Chat messages to a prompt, by a Jinja2 template in a sandbox.

The end of a document is what the template writes as `eos_token` or `bos_token`. Nothing that a message says can be that
token: the template is given a random text in its place, and the prompt is cut there.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

FILE_NAME = "chat_template.jinja"
_PLAIN = """\
{%- for message in messages -%}
{{ {"user": "User: ", "assistant": "Assistant: "}.get(message.role, "System: ") }}{{ message.content }}
{% endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""


class TemplateRefusedError(ValueError):
    """The template does not take these messages. The message says what it says."""


@dataclass(frozen=True)
class ChatTemplate:
    """source: Jinja2, as transformers write it: messages, bos_token, eos_token, add_generation_prompt, raise_exception.
    stops: texts that end an answer, besides those of the request."""

    source: str
    stops: tuple[str, ...] = ()

    @cached_property
    def _compiled(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self.source)

    def check(self) -> None:
        """Raise ValueError for a template that is not Jinja2."""
        try:
            _ = self._compiled
        except TemplateSyntaxError as error:
            raise ValueError(f"chat template: expected Jinja2, got line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[str]:
        """The prompt after which the model answers: texts, with an end of a document between each and the next.

        messages: role and content. Raises TemplateRefusedError for those that the template does not take.
        """
        mark = f"<{secrets.token_hex(16)}>"
        try:
            text = self._compiled.render(
                messages=messages, bos_token=mark, eos_token=mark, add_generation_prompt=True, tools=None
            )
        except Exception as error:  # templates come with models; whatever one raises is about these messages
            raise TemplateRefusedError(f"the chat template does not take them: {error}") from error
        parts: list[str] = text.split(mark)
        return parts


BUILT_IN = ChatTemplate(_PLAIN, stops=("\nUser:", "\nSystem:", "\nAssistant:"))


def read_template(folder: Path) -> ChatTemplate:
    """That of a run folder, or the built-in one for models that only continue text. Raises ValueError for a bad one."""
    path = folder / FILE_NAME
    template = ChatTemplate(path.read_text(encoding="utf-8")) if path.is_file() else BUILT_IN
    template.check()
    return template


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
