"""Help that can be typed in: each command shows an example, which is parsed; and what a shell completes."""

import functools
import re
import shlex
import shutil
import subprocess
import sys
import typing

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


@pytest.mark.parametrize(("words", "function"), EVERY, ids=[words for words, _ in EVERY])
def test_the_examples_are_accepted(words, function):
    shown = examples(words, function)
    assert shown

    @functools.wraps(function)
    def accepted(*args, **kwargs):
        return "accepted"

    for line in shown:
        line = line[: line.index(">")] if ">" in line else line  # what the shell takes
        assert tyro.cli(accepted, args=line) == "accepted"


COMPLETE = """
source completion.sh
COMP_WORDS=({words} "") COMP_CWORD={last} COMP_TYPE=9 COMP_LINE="{words} "
COMP_POINT=${{#COMP_LINE}}
command=$(complete -p equipoise | sed -E 's/.*-F ([^ ]+).*/\\1/')
$command
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(words, folder):
    typed = COMPLETE.format(words=words, last=len(words.split()))
    done = subprocess.run(["bash", "-uc", typed], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def printed(shell):
    command = [sys.executable, "-m", "equipoise", "--tyro-print-completion", shell]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def bash_completion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    made = subprocess.run(
        [sys.executable, "-m", "equipoise", "--tyro-print-completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "completion.sh").write_text(made.stdout)
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options(bash_completion):
    assert completed("equipoise", bash_completion) >= set(COMMANDS)
    assert completed("equipoise bench", bash_completion) >= {words.split()[1] for words, _ in benches()}
    assert "--steps" in completed("equipoise train tiny", bash_completion)


# A zsh that somebody types into: the completion is taken from $fpath, as it would be installed.
TYPES_IN_ZSH = r"""
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
    (tmp_path / "_equipoise").write_text(printed("zsh"))
    done = subprocess.run(
        ["zsh", "-fc", TYPES_IN_ZSH], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert {words.split()[1] for words, _ in benches()} <= set(done.stdout.split())


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_commands(tmp_path):
    (tmp_path / "completion.fish").write_text(printed("fish"))
    typed = "source completion.fish; complete -C 'equipoise bench '"
    done = subprocess.run(
        ["fish", "--no-config", "-c", typed], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert {words.split()[1] for words, _ in benches()} <= set(done.stdout.split())
