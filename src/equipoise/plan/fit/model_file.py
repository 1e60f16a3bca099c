"""Which model is meant: a name of the table, or a configuration file of one of three kinds."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, NoReturn

from equipoise.plan.fit import decoder_file, hugging_face
from equipoise.plan.fit.architecture import Architecture
from equipoise.plan.fit.config_fields import Fields
from equipoise.plan.fit.known import KNOWN

LARGEST = 4 * 2**20  # bytes; the longest config.json in use has some 100 kB


def find_model(name: str) -> Architecture:
    """The model of that name, or of the configuration file or folder of that path.

    Understood are a Hugging Face config.json, what `DecoderConfig.to_json` writes, and a run folder's config.json.
    Raises ValueError for a name that is not known, and for a file that is missing, too large, no JSON, or that doesn't
    describe a model.
    """
    if name.lower() in KNOWN:
        return KNOWN[name.lower()].model
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        close = difflib.get_close_matches(name.lower(), KNOWN, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"{name}: expected a known model or the path of a config.json, found neither; {hint}known are "
            f"{', '.join(KNOWN)}"
        )
    return read_config(path)


def read_config(path: Path) -> Architecture:
    """The model of one configuration file."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(
            f"{path}: expected a configuration of at most {LARGEST // 2**20} MiB, got {size / 2**20:.0f} MiB; pass "
            "config.json, not the weights"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, but it cannot be read: {error}") from error
    return of_values(values, str(path))


def of_values(values: Any, source: str) -> Architecture:
    """The model of a parsed configuration. source: what errors call it."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a JSON object with a model's configuration, got {type(values).__name__}")
    inner = values.get("model")
    if isinstance(inner, dict) and inner.get("type") == "DecoderConfig":  # of a run
        return decoder_file.architecture(Fields(inner, f"{source}: model"), source)
    if values.get("type") == "DecoderConfig":
        return decoder_file.architecture(Fields(values, source), source)
    if "model_type" not in values and "text_config" not in values:
        raise ValueError(
            f"{source}: expected a field model_type (Hugging Face) or type = DecoderConfig (equipoise), found neither; "
            f"its fields are {', '.join(sorted(map(str, values))[:8]) or 'none'}"
        )
    return hugging_face.architecture(Fields(values, source), source)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")
