"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module. Raises ValueError that names the extra to install when it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"this needs the package '{module}', which is not installed. "
            f"Install it with: pip install 'equipoise[{extra}]'"
        ) from error
