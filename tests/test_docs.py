"""The site's pages: each is in its navigation, each public name on the page of names. `make docs` checks the links."""

import re
import tomllib
from pathlib import Path

import equipoise

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def menu(entries=None):
    """Name and page of each entry of the site's navigation, at any depth."""
    if entries is None:
        entries = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    for entry in entries:
        for name, target in entry.items():
            yield from menu(target) if isinstance(target, list) else [(name, target)]


def test_each_page_has_its_place():
    nav = [page for _, page in menu()]
    assert sorted(nav) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_each_public_name_is_described():
    named = re.findall(r"^::: equipoise\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(equipoise.__all__)


def test_pictures_are_used():
    """A picture that no page shows is out of date sooner or later."""
    texts = "".join(path.read_text() for path in [ROOT / "README.md", *DOCS.glob("*.md")])
    assert [path.name for path in (DOCS / "img").iterdir() if f"img/{path.name}" not in texts] == []


def test_each_requirement_has_its_licence():
    """What users install: not what only developing needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [needs for name, needs in project["optional-dependencies"].items() if name not in ("dev", "docs", "all")]
    needs = [*project["dependencies"], *(need for each in extras for need in each)]
    wanted = {re.match(r"[\w-]+", need)[0] for need in needs} - {"equipoise"}
    listed = set(re.findall(r"^\| ([\w.-]+) \|", (DOCS / "licences.md").read_text(), re.MULTILINE))
    assert {name.lower() for name in wanted} - listed == set()
