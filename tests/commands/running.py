"""One command, run in this process as the command line runs it."""

import pytest

from equipoise.cli import main


def run_command(capsys, *words):
    """(exit code, what it has printed) of the command that these words are."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    return ended.value.code, capsys.readouterr()
