"""The reference: a page for each router, loss, balancer and detector, alike in form; snippets print what they say."""

import ast
import re
from pathlib import Path

import pytest
from tests.test_docs import DOCS, ROOT, menu
from tests.test_readme import block, links

from equipoise.routing import BALANCERS, LOSSES, ROUTERS

HEADINGS = ["Formula", "Use", "Cost", "Failure", "Source"]
SNIPPET = re.compile(r"^```python\n((?:(?!^```).)*)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GROUPS = ("routers", "balancers", "detectors")
PAGES = [path for group in GROUPS for path in sorted((DOCS / group).glob("*.md")) if path.name != "index.md"]
IDS = [f"{path.parent.name}/{path.stem}" for path in PAGES]


def detectors(source: str) -> set[str]:
    """The public classes that are called with a window and give findings, but for the protocol."""
    return {
        each.name
        for each in ast.walk(ast.parse(source))
        if isinstance(each, ast.ClassDef)
        and not each.name.startswith("_")
        and "Protocol" not in map(ast.unparse, each.bases)
        for method in each.body
        if isinstance(method, ast.FunctionDef) and method.name == "__call__" and method.returns
        if ast.unparse(method.returns) == "list[Finding]"
    }


def public(group: str) -> set[str]:
    if group == "detectors":
        files = (ROOT / "src" / "equipoise").rglob("*.py")
        return {name for path in files if "list[Finding]" in (text := path.read_text()) for name in detectors(text)}
    return {each.__name__ for each in (ROUTERS if group == "routers" else (*LOSSES, *BALANCERS))}


def title(page: Path) -> str:
    return page.read_text().splitlines()[0].removeprefix("# ")


@pytest.mark.parametrize("group", GROUPS)
def test_each_has_its_page(group):
    assert sorted(title(page) for page in PAGES if page.parent.name == group) == sorted(public(group))


@pytest.mark.parametrize("group", GROUPS)
def test_the_index_leads_to_each(group):
    linked = {link for link in links((DOCS / group / "index.md").read_text()) if "/" not in link}
    assert linked == {page.name for page in PAGES if page.parent.name == group}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_all_have_the_same_headings(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^## (.*)$", prose, re.MULTILINE) == HEADINGS
    assert re.findall(r"^# (.*)$", prose, re.MULTILINE) == [title(page)]
    assert all(part.strip() for part in re.split(r"^## .*$", prose, flags=re.MULTILINE)[2:])


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_each_is_in_the_menu_under_its_name(page):
    assert (title(page), page.relative_to(DOCS).as_posix()) in list(menu())


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_snippets_print_what_stands_below_them(page, capsys):
    text = page.read_text()
    snippets = SNIPPET.findall(text)
    assert snippets
    assert [code for code, _ in snippets] == block("python", text), "a snippet without its output below it"
    run_snippets(page, capsys)


def test_snippets_of_other_pages_print_what_stands_below_them(capsys):
    """Those that say what they print: the others are parts of something larger."""
    pages = [page for page in DOCS.glob("*.md") if SNIPPET.search(page.read_text())]
    assert DOCS / "repair.md" in pages
    for page in pages:
        run_snippets(page, capsys)


def run_snippets(page, capsys):
    for code, expected in SNIPPET.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out == expected


def test_a_detector_is_known_by_what_it_gives():
    source = "class A:\n def __call__(self, window) -> list[Finding]: ...\nclass B:\n def __call__(self) -> int: ...\n"
    assert detectors(source) == {"A"}
    assert detectors(source.replace("A:", "A(Protocol):")) == set()
