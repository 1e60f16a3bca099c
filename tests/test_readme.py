"""The documentation is true: the example prints what it says, and every file, link, command and target exists."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]


def block(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def tree_entries(text: str) -> list[str]:
    """The paths in an indented tree: two spaces deeper is inside the last folder that is less deep."""
    entries, folders = [], []
    for line in text.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        entries.append("".join([*folders[:depth], name]))
        folders[depth:] = [name]
    return entries


def links(text: str) -> list[str]:
    """Targets of Markdown links and pictures that are files, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.split("#")[0] for target in targets if not re.match(r"https?:|mailto:|#", target)]


def paths_in_code(text: str) -> list[str]:
    """What stands in backticks and is a path from the top of the repository."""
    found = re.findall(r"`((?:src|tests|examples|docs|benchmarks)/[^`\s]*)`", text)
    return [path.rstrip("/") for path in found]


def test_the_example_prints_what_the_page_says(tmp_path):
    (code,) = block("python")
    expected = block("text")[0]
    assert len(code.splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_everything_in_the_tree_is_there():
    entries = tree_entries(block("text")[-1])
    assert {"src/equipoise/layer/", "src/equipoise/cli.py", "tests/", "Makefile"} <= set(entries)
    missing = [entry for entry in entries if not (ROOT / entry).exists()]
    assert not missing


def test_the_tree_shows_every_part():
    entries = {Path(entry) for entry in tree_entries(block("text")[-1])}
    package = Path("src/equipoise")
    parts = {package / path.name for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {part for part in parts if not part.name.startswith("__pycache__")} <= entries


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    missing = [target for target in links(text) if not (path.parent / target).exists()]
    missing += [target for target in paths_in_code(text) if not (ROOT / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"(?:^ +|`)make ([a-z-]+)", text, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(named) <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


def test_every_command_is_in_the_table():
    from equipoise.cli import COMMANDS

    assert set(re.findall(r"`equipoise ([a-z][a-z-]*)", README)) == set(COMMANDS)


def test_the_table_of_parts_is_the_rule_that_is_enforced():
    allowed = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))["ALLOWED"]
    rows = re.findall(r"^\| `([a-z]+)` \| [^|]* \| ([^|]*) \|$", ARCHITECTURE, flags=re.MULTILINE)
    stated = {part: set() if names == "nothing" else set(names.split(", ")) for part, names in rows}
    assert stated == allowed


def test_planned_parts_are_not_there_yet_and_all_others_are():
    rows = re.findall(r"^\| `([a-z]+)` \| ([^|]*) \| [^|]* \|$", ARCHITECTURE, flags=re.MULTILINE)
    package = ROOT / "src" / "equipoise"
    there = {part for part, _ in rows if (package / part).is_dir() or (package / f"{part}.py").is_file()}
    assert there == {part for part, text in rows if "*(planned)*" not in text}


def test_each_invariant_names_its_test():
    rows = re.findall(r"^\| (\d+) \| .* \| ([^|]*) \|$", ARCHITECTURE, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 14))
    assert all("tests/" in shown_by for _, shown_by in rows)


def test_a_tree_is_read_by_its_indentation():
    assert tree_entries("a/\n  b.py  what\n  c/\n    d.py\n  e.py\nf  last") == [
        "a/", "a/b.py", "a/c/", "a/c/d.py", "a/e.py", "f"
    ]  # fmt: skip
