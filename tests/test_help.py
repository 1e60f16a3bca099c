"""Commands that can be typed in: the examples of each one's help, those of the pages, and what a shell completes."""

import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import tyro

from equipoise.cli import COMMANDS
from equipoise.commands.bench import bench


def benches():
    """(words, function) of what stands behind `equipoise bench`."""
    choices, _ = typing.get_args(typing.get_type_hints(bench, include_extras=True)["run"])
    for choice in typing.get_args(choices):
        [found] = [each for each in typing.get_args(choice)[1:] if each.constructor_factory is not None]
        yield f"bench {found.name}", found.constructor_factory()


EVERY = [*((name, COMMANDS[name]) for name in COMMANDS if name != "bench"), *benches()]
EXAMPLE = re.compile(r"^ *[A-Z][^:\n]*: +equipoise (.*)$", re.MULTILINE)


def examples(words, function):
    said = function.__doc__.split("Args:\n")[0]
    return [shlex.split(line)[len(words.split()) :] for line in EXAMPLE.findall(said) if line.startswith(words)]


def accepts(function, line):
    """Whether the parser takes these words; what the function does is left out."""

    @functools.wraps(function)
    def accepted(*args, **kwargs):
        return "accepted"

    try:
        return tyro.cli(accepted, args=line) == "accepted"
    except SystemExit:
        return False


@pytest.mark.parametrize(("words", "function"), EVERY, ids=[words for words, _ in EVERY])
def test_the_examples_are_accepted(words, function):
    shown = examples(words, function)
    assert shown
    for line in shown:
        line = line[: line.index(">")] if ">" in line else line  # what the shell takes
        assert accepts(function, line)


def named(line):
    """(words of the command, its function, the words after it) of a line that begins with a command."""
    found = [(words, function) for words, function in EVERY if f"{line} ".startswith(f"{words} ")]
    assert found, f"no such command: equipoise {line}"
    [(words, function)] = found
    return words, function, shlex.split(line.removeprefix(words))


ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
BLOCKS = re.compile(r"^```(?:sh|text)?\n(.*?)^```$|((?:^ {4}.*\n|^\n)+)", re.MULTILINE | re.DOTALL)
STARTS = re.compile(r"^\s*(?:[A-Z_]+=\S+ |torchrun .*-m |python -m )*equipoise ([a-z].*)", re.MULTILINE)
ENDS = re.compile(r" {2,}(?!-)| # | [>|&]")  # what it is for, a comment, what the shell takes
SPOKEN = re.compile(r"(?<!`)`(?:torchrun [^`]*-m )?equipoise ([a-z][^`]*)`")


def typed(page):
    """Commands in a page's blocks, to be typed in as they stand."""
    blocks = ["".join(found).replace("\\\n", " ") for found in BLOCKS.findall(page.read_text())]
    return [ENDS.split(line)[0] for block in blocks for line in STARTS.findall(block)]


def spoken_of(page):
    """Commands in a page's sentences and tables, some in part. [ ] is what may be left out, | another choice."""
    return [" ".join(re.sub(r"[\[\]]|\\?\|\S+", "", line).split()) for line in SPOKEN.findall(page.read_text())]


@functools.cache
def options(words, choice=""):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        tyro.cli(dict(EVERY)[words], args=[choice, "--help"] if choice else ["--help"])
    return set(re.findall(r"--[a-z][\w.-]*", out.getvalue()))


def test_commands_of_the_pages_are_accepted():
    lines = {(page.name, line) for page in PAGES for line in typed(page)}
    assert len(lines) > 80
    for page, line in sorted(lines):
        _, function, rest = named(line)
        assert accepts(function, rest), f"{page}: equipoise {line}"


def test_options_that_pages_speak_of_exist(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    lines = {(page.name, line) for page in PAGES for line in spoken_of(page) if line != "bench"}
    assert len(lines) > 80
    for page, line in sorted(lines):
        words, _, rest = named(line)
        there = options(words)
        for choice in {"finetune", "collapse"} & set(rest):
            there = there | options(words, choice)
        for option in (word for word in rest if word.startswith("--")):
            found = any(each.startswith(option[:-1]) for each in there) if option.endswith("*") else option in there
            assert found, f"{page}: {option} of equipoise {line}"


# ------------------------------------------------------------------------------------------------ completion

LINES = re.findall(r"`([^`]*--tyro-print-completion[^`]*)`", (ROOT / "README.md").read_text())


def line_for(shell):
    [line] = [each for each in LINES if shell in each]
    return line


def completed(shell, words, folder):
    """What a shell without settings of its own says to these words, after README's line for it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [shell, *words], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


COMPLETE = """
{line}
for words in equipoise "equipoise bench" "equipoise train tiny"; do
  COMP_WORDS=($words "") COMP_TYPE=9 COMP_LINE="$words "
  COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMP_POINT=${{#COMP_LINE}}
  $(complete -p equipoise | sed -E 's/.*-F ([^ ]+).*/\\1/')
  printf '%s\\n' "${{COMPREPLY[@]}}"
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options(tmp_path):
    said = completed("bash", ["-uc", COMPLETE.format(line=line_for("bash"))], tmp_path)
    assert said >= {*COMMANDS, *(words.split()[1] for words, _ in benches()), "--steps"}


# A zsh that somebody types into: the completion is taken from $fpath, as it would be installed.
TYPES_IN_ZSH = r"""
equipoise --tyro-print-completion zsh > _equipoise
zmodload zsh/zpty
zpty terminal zsh -f -i
zpty -w terminal 'PROMPT=; fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -d dump; LISTMAX=1000; print REA""DY'
zpty -r terminal heard '*READY*'
zpty -w -n terminal $'equipoise bench \t\t'
zpty -r terminal heard '*sweep*train*'
print -r -- $heard
zpty -d terminal
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_commands(tmp_path):
    assert line_for("zsh") in TYPES_IN_ZSH
    assert completed("zsh", ["-fc", TYPES_IN_ZSH], tmp_path) >= {words.split()[1] for words, _ in benches()}


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_commands(tmp_path):
    typed_in = f"{line_for('fish')}; complete -C 'equipoise bench '"
    said = completed("fish", ["--no-config", "-c", typed_in], tmp_path)
    assert said >= {words.split()[1] for words, _ in benches()}
