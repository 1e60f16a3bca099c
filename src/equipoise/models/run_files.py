"""A run folder as whoever uses its model sees it: configuration, tokenizer, held-out tokens and checkpoints.

It reads what training wrote, and knows nothing of training. Weights come from whole, verified checkpoints only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from equipoise.disk.atomic import atomic_write
from equipoise.disk.checkpoint import CHECKPOINTS, CheckpointError, latest_checkpoint, load_checkpoint
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder
from equipoise.models.tokenizers import AnyTokenizer, load_tokenizer

CONFIG, HELD_OUT = "config.json", "held_out.safetensors"
MODEL = "model"  # the group of tensors in a checkpoint
_TOKENS = "tokens"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that was trained here, in eval, and what belongs to it.

    folder: of the run. checkpoint: the folder that the weights are from. held_out_BS: int64 tokens that the model was
    not trained on, a target more than it needs per row; None where the run kept none.
    """

    model: Decoder
    tokenizer: AnyTokenizer
    held_out_BS: Tensor | None
    folder: Path
    checkpoint: Path


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Loaded:
    """The model of a run folder, from its newest whole checkpoint, or that of a checkpoint in one.

    dtype: of the weights, see `cast`; None keeps them as they are. Raises ValueError for a folder that is no run, that
    has no whole checkpoint, or whose files are damaged.
    """
    folder, config, checkpoint = locate(path)
    tensors = load_checkpoint(checkpoint).tensors
    if MODEL not in tensors:
        raise CheckpointError(f"{checkpoint}: expected a group of tensors called {MODEL}, got {sorted(tensors)}")
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device=device)
    fill(model, tensors[MODEL], checkpoint)
    cast(model, dtype or tensors[MODEL]["embed_tokens.weight"].dtype)
    return loaded(model, folder, checkpoint)


def locate(path: str | Path) -> tuple[Path, DecoderConfig, Path]:
    """(run folder, configuration, checkpoint) of a run folder, its newest whole one, or of a checkpoint in one.

    Raises ValueError for a folder that is no run, or has no whole checkpoint.
    """
    path = Path(path)
    folder = folder_of(path)
    config = read_config(folder)
    checkpoint = path if folder != path else latest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise CheckpointError(
            f"{folder}: expected at least one whole checkpoint in {folder / CHECKPOINTS}, found none; let the run "
            "write one, or restore one from a copy"
        )
    return folder, config, checkpoint


def folder_of(path: Path) -> Path:
    """The run folder, of itself or of a checkpoint in it."""
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def loaded(model: Decoder, folder: Path, checkpoint: Path) -> Loaded:
    """The model with what belongs to it. Raises ValueError for damaged files."""
    return Loaded(model.eval(), load_tokenizer(folder), read_held_out(folder), folder, checkpoint)


def read_config(folder: Path) -> DecoderConfig:
    """The model's configuration in a run folder. Raises ValueError where there is none, or something else."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder}: expected a run folder with {CONFIG} and checkpoints, found none; pass the folder that "
            "`equipoise train` or `equipoise demo` wrote"
        )
    try:
        return DecoderConfig.from_json(json.dumps(json.loads(path.read_bytes())["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a run's configuration, got something else ({error}); restore it") from error


def write_held_out(folder: Path, tokens_BS: Tensor) -> None:
    """Keep held-out tokens with the run. tokens_BS: int64 (B, S + 1), the last of each row being a target only."""
    with atomic_write(folder / HELD_OUT) as file:
        file.write(save({_TOKENS: tokens_BS.to(torch.int32).contiguous()}))


def read_held_out(folder: Path) -> Tensor | None:
    """What `write_held_out` kept, int64; None where nothing was. Raises ValueError for a damaged file."""
    path = folder / HELD_OUT
    if not path.is_file():
        return None
    try:
        tokens_BS = load_file(path)[_TOKENS]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: is damaged ({error!r}); restore it, or remove it to do without") from error
    return tokens_BS.long()


def cast(model: Decoder, dtype: torch.dtype) -> None:
    """Give the weights another floating-point type. Routers and balancers stay fp32: a rounded router is another."""
    routers = {id(p) for layer in model.routed_layers.values() for p in layer.router.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in routers:
            parameter.data = parameter.data.to(dtype)


def fill(model: Decoder, tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Take over parameters and persistent buffers; what balancers gather between steps begins empty."""
    for layer in model.routed_layers.values():
        for state in layer.adaptive:
            state.reset()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint}: its tensors are not those of the run's configuration: {told} Restore {CONFIG}, or use a "
            "checkpoint of this run"
        ) from error
