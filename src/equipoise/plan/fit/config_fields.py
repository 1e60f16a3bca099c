"""Reading sizes out of a parsed configuration file, so that each mistake names the file, the field and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from equipoise.plan.fit.architecture import MOST


@dataclass(frozen=True, eq=False)
class Fields:
    """An object of a configuration file. source: what errors call it."""

    values: Mapping[str, Any]
    source: str

    def has(self, *names: str) -> bool:
        """Whether one of the names is there, and not null."""
        return any(self.values.get(name) is not None for name in names)

    def size(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The whole number under the first of the names that is there. Without a default one of them must be."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            whole = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            if not whole or value != int(value):
                raise ValueError(f"{self.source}: {name}: expected a whole number, got {value!r}; mend the file")
            if not least <= value <= MOST:
                raise ValueError(f"{self.source}: {name}: expected {least} to {MOST:,}, got {value}; mend the file")
            return int(value)
        if default is None:
            raise ValueError(
                f"{self.source}: expected a field {' or '.join(names)}, found none of it; pass the model's whole "
                "config.json"
            )
        return default

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: {name}: expected true or false, got {value!r}; mend the file")
        return value

    def text(self, name: str, default: str = "") -> str:
        """A word."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ValueError(f"{self.source}: {name}: expected a word, got {value!r}; mend the file")
        return value

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """A list of layer numbers, ascending; None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
            raise ValueError(f"{self.source}: {name}: expected a list of layer numbers, got {value!r}; mend the file")
        return tuple(sorted(set(value)))

    def words(self, name: str) -> tuple[str, ...] | None:
        """A list of words; None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{self.source}: {name}: expected a list of words, got {value!r}; mend the file")
        return tuple(value)

    def part(self, name: str) -> Fields:
        """The object inside it."""
        value = self.values.get(name)
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.source}: {name}: expected an object, got {value!r}; pass the whole config.json")
        return Fields(value, f"{self.source}: {name}")
