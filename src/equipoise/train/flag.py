"""A switch of the command line with three positions: not named, `--name`, and `--name False`.

tyro makes a plain flag of a bool alone; for a change to a recipe, "not named" has to mean "as the recipe has it".
"""

from __future__ import annotations

from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

_WORDS = {"true": True, "false": False, "none": None}


def _read(words: list[str]) -> bool | None:
    """No word means yes. Raises ValueError, which tyro shows with the option's name."""
    if len(words) > 1 or (words and words[0].lower() not in _WORDS):
        raise ValueError(
            f"expected nothing, True or False after it, got {' '.join(words)}; name what is no value before it"
        )
    return _WORDS[words[0].lower()] if words else True


def _known(value: Any) -> bool:
    return value is None or isinstance(value, bool)


_SPEC: PrimitiveConstructorSpec[bool | None] = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[True|False]",
    instance_from_str=_read,
    is_instance=_known,
    str_from_instance=lambda value: [str(value)],
)
Flag = Annotated[bool | None, _SPEC]
