"""Chat messages to a prompt, by a Jinja2 template in a sandbox.

Control tokens are what the template itself writes: `eos_token`, `bos_token`, and texts such as <|im_start|> that the
tokenizer says are one. Nothing that a message says can be one of them: the template is given random texts in their
place, and the prompt is cut there.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
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
class Control:
    """A control token, by its text."""

    text: str


BEGIN, END = Control("bos_token"), Control("eos_token")  # whatever the tokenizer has for them


@dataclass(frozen=True)
class ChatTemplate:
    """source: Jinja2, as transformers write it: messages, bos_token, eos_token, add_generation_prompt, raise_exception.
    stops: texts that end an answer, besides those of the request. controls: texts in the source that are one token."""

    source: str
    stops: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    @cached_property
    def _marks(self) -> dict[str, Control]:
        """Random texts, each for a control token that stands literally in the source."""
        return {f"<{secrets.token_hex(16)}>": Control(text) for text in self.controls if text in self.source}

    @cached_property
    def _compiled(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        source = self.source
        for mark, control in sorted(self._marks.items(), key=lambda item: -len(item[1].text)):
            source = source.replace(control.text, mark)
        return environment.from_string(source)

    def check(self) -> None:
        """Raise ValueError for a template that is not Jinja2."""
        try:
            _ = self._compiled
        except TemplateSyntaxError as error:
            raise ValueError(f"chat template: expected Jinja2, got line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[str | Control]:
        """The prompt after which the model answers, in order.

        messages: role and content. Raises TemplateRefusedError for those that the template does not take.
        """
        begin, end = (f"<{secrets.token_hex(16)}>" for _ in range(2))
        try:
            text = self._compiled.render(
                messages=messages, bos_token=begin, eos_token=end, add_generation_prompt=True, tools=None
            )
        except Exception as error:  # templates come with models; whatever one raises is about these messages
            raise TemplateRefusedError(f"the chat template does not take them: {error}") from error
        marks = self._marks | {begin: BEGIN, end: END}
        pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
        return [marks.get(piece, piece) for piece in pieces if piece]


BUILT_IN = ChatTemplate(_PLAIN, stops=("\nUser:", "\nSystem:", "\nAssistant:"))


def read_template(folder: Path, controls: Iterable[str] = ()) -> ChatTemplate:
    """That of a run folder, or the built-in one for models that only continue text. Raises ValueError for a bad one.

    controls: texts that the tokenizer has as control tokens.
    """
    path = folder / FILE_NAME
    template = BUILT_IN
    if path.is_file():
        template = ChatTemplate(path.read_text(encoding="utf-8"), controls=tuple(controls))
    template.check()
    return template


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
