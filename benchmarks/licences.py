"""The licences of everything that equipoise may install, as their packages state them: python -m benchmarks.licences

Follows the requirements of all extras through what is installed here, and writes docs/licences.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PAGE = Path("docs/licences.md")
DEVELOPMENT = {"dev", "docs", "all"}  # extras that no user needs


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.licences", description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    options.out.write_text(page(), encoding="utf-8")
    print(options.out)


def page() -> str:
    """Markdown: a row per package, by extra."""
    ours = distribution("equipoise")
    extras = sorted(set(ours.metadata.get_all("Provides-Extra") or ()) - DEVELOPMENT)
    core = set(closure(ours, ""))
    rows = [(name, "") for name in sorted(core)]
    for extra in extras:
        rows += [(name, extra) for name in sorted(set(closure(ours, extra)) - core)]
    named: dict[str, list[str]] = {}
    for name, extra in rows:
        named.setdefault(name, []).append(extra or "always")
    lines = [f"| {name} | {version(name)} | {licence(name)} | {', '.join(by)} |" for name, by in sorted(named.items())]
    return HEAD + "\n".join(lines) + "\n"


HEAD = """# Licences of what is installed along

equipoise is Apache 2.0. What it needs, and what each extra brings, with the licence that the package itself states;
made by `python -m benchmarks.licences` from what is installed where it ran. What was not there has no version.

| package | version | licence, as stated | comes with |
|---|---|---|---|
"""


def closure(package: Distribution, extra: str) -> Iterator[str]:
    """Names of all packages that it requires with an extra, and that those require, as far as they are installed."""
    seen: set[str] = set()
    waiting = [(package, extra)]
    while waiting:
        current, of = waiting.pop()
        for text in current.requires or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": of}):
                continue
            name = requirement.name.lower().replace("_", "-")
            nested = [(found, each) for found in [installed(name)] if found for each in (requirement.extras or {""})]
            if name == "equipoise":
                waiting += nested
            elif name not in seen:
                seen.add(name)
                yield name
                waiting += nested


def installed(name: str) -> Distribution | None:
    """The package, if it is there."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def version(name: str) -> str:
    """Of what is installed."""
    found = installed(name)
    return found.version if found else "-"


def licence(name: str) -> str:
    """The expression, else the classifiers, else the first line of the old field."""
    found = installed(name)
    if found is None:
        return "not installed here"
    if expression := found.metadata.get("License-Expression"):
        return str(expression)
    classifiers = [each for each in found.metadata.get_all("Classifier") or () if each.startswith("License ::")]
    if named := [each.rsplit(" :: ", 1)[1] for each in classifiers if not each.endswith("OSI Approved")]:
        return ", ".join(named)
    lines = (found.metadata.get("License") or "").strip().splitlines()
    return re.sub(r"\s+", " ", lines[0])[:60] if lines else "in its files"


if __name__ == "__main__":
    main()
