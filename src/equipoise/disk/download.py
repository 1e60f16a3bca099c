"""Packages of public registries as files: fetched into a folder, never installed, and nothing in them is run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PIP = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
_TIMEOUT_S = 900.0  # the largest that anybody asks for has 98 MB


class DownloadError(RuntimeError):
    """A package can't be had. The message has the command and the last line of what it said."""


def download_wheel(package: str, folder: Path) -> Path:
    """The wheel of a Python package, by pip, in the folder. Raises DownloadError."""
    download([sys.executable, *_PIP, package], folder)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise DownloadError(f"'pip download {package}' left no wheel in {folder}")
    return wheel


def download(command: Sequence[str], folder: Path) -> None:
    """Run what downloads, in the folder. Raises DownloadError when it fails, or takes more than a quarter of an hour.

    command: the program and its arguments.
    """
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (subprocess.SubprocessError, OSError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1:]
        raise DownloadError(f"'{' '.join(command)}' failed: {' '.join(said)}") from error
