"""A checkpoint of another family becomes a run folder of ours: `equipoise serve`, `train finetune` and `load` take it.

Tensors go one at a time from their files into the place in ours, so memory stays near the largest of them. The folder
appears at the end, whole, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from equipoise.convert.families import Family, family_of
from equipoise.convert.fields import ConversionError
from equipoise.convert.gguf import open_gguf
from equipoise.convert.layouts import Layout
from equipoise.convert.parts import Part
from equipoise.convert.source import Source, open_folder
from equipoise.disk.checkpoint import CHECKPOINTS, draft, group_file, latest_checkpoint, publish
from equipoise.disk.rows import lay_out, writing
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import CONFIG

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Converted:
    """What an import did. dropped: tensors of the source that were asked to be left out. made: tensors of ours that no
    file has, zeros: the state of balancers. tokenizer: whether the source had one.
    """

    out: Path
    config: DecoderConfig
    family: str
    num_tensors: int
    dropped: tuple[str, ...]
    made: tuple[str, ...]
    tokenizer: bool


def import_checkpoint(
    source: Path, out: Path, *, drop: tuple[str, ...] = (), progress: Progress = lambda done, total: None
) -> Converted:
    """Convert a folder of safetensors with a `config.json` of transformers, or a GGUF file of the Llama family.

    drop: patterns (as of a shell) of tensors to leave out, such as the heads of multi-token prediction. Raises
    ConversionError, with nothing written, when a tensor is missing, unexpected, or of another shape or dtype than the
    configuration says, for files that are damaged, and for what our decoder does not compute.
    """
    folder: Source = open_gguf(source) if source.suffix == ".gguf" else open_folder(source)
    family = family_of(folder.config)
    config, shapes = _checked(family, folder)
    dropped = tuple(name for name in folder.names if any(fnmatchcase(name, each) for each in drop))
    parts = _matched(family, config, folder, set(dropped))
    described, made = _described(folder, parts, shapes)
    with new_folder(out) as temporary:
        checkpoints = temporary / CHECKPOINTS
        checkpoint = draft(checkpoints, 0)
        lay_out(group_file(checkpoint, "model"), described)
        _move(folder, parts, shapes, group_file(checkpoint, "model"), progress)
        publish(checkpoint, checkpoints, 0, {"source": str(source.name), "family": family.name})
        write_config(temporary, config)
        has_tokenizer = folder.save_tokenizer(temporary)
    return Converted(out, config, family.name, len(parts), dropped, made, has_tokenizer)


def newest_checkpoint(run: Path) -> Path:
    """Of a run folder. Raises ConversionError where none is whole."""
    found = latest_checkpoint(run / CHECKPOINTS)
    if found is None:
        raise ConversionError(
            f"{run}: expected a whole checkpoint in {run / CHECKPOINTS}, found none; let the run reach its first one"
        )
    return found


def write_config(folder: Path, config: DecoderConfig) -> None:
    """The configuration of a model that no run has trained here."""
    (folder / CONFIG).write_text(json.dumps({"model": json.loads(config.to_json())}, indent=2))


def state_shapes(config: DecoderConfig) -> Shapes:
    """The tensors of our model by name, without any data."""
    with torch.device("meta"):
        model = Decoder(config)
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when all went well, and is gone when not. Raises ConversionError when it is taken."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out}: expected a new or empty folder, it is there already; name another, or remove it")
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
    except OSError as error:
        raise ConversionError(f"{out}: could not be written ({error}); nothing is left of it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checked(family: Family, folder: Source) -> tuple[DecoderConfig, Shapes]:
    """(the configuration, the tensors of the model that it describes)."""
    try:
        config = family.read(folder.config)
        return config, state_shapes(config)
    except ConversionError:
        raise
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{folder.path / 'config.json'}: describes no {family.name} model: {error}") from error


def _matched(family: Family, config: DecoderConfig, folder: Source, dropped: set[str]) -> list[Part]:
    """The parts of the layout that the files are in. Raises ConversionError unless they are the files' tensors."""
    names = set(folder.names) - dropped
    layouts: tuple[Layout, ...] = ("per_expert", "fused")
    best = min((family.parts(config, each) for each in layouts), key=lambda parts: len(_odd(parts, names)))
    if odd := _odd(best, names):
        if config.tie_embeddings and odd == {"lm_head.weight"}:
            _check_tied(folder)
            return best
        expected = {part.theirs for part in best}
        missing, foreign = sorted(odd & expected), sorted(odd - expected)
        raise ConversionError(
            f"{folder.path}: expected the {len(expected)} tensors that its config.json describes; missing "
            f"{len(missing)}{_such_as(missing)}, not expected {len(foreign)}{_such_as(foreign)}. Add the missing "
            "files, or leave tensors out on purpose by drop"
        )
    return best


def _odd(parts: list[Part], names: set[str]) -> set[str]:
    return {part.theirs for part in parts} ^ names


def _such_as(names: list[str]) -> str:
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""


def _check_tied(folder: Source) -> None:
    if not torch.equal(folder.read("lm_head.weight"), folder.read("model.embed_tokens.weight")):
        raise ConversionError(
            f"{folder.path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; one of the "
            "two is wrong"
        )


def _described(
    folder: Source, parts: list[Part], shapes: Shapes
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], tuple[str, ...]]:
    """(dtype and shape of each tensor of ours, those that no part fills). Checks the shapes of the files on the way."""
    dtypes: dict[str, torch.dtype] = {}
    filled: dict[str, int] = {}
    for part in parts:
        shape, dtype = folder.shape_of(part.theirs)
        region, _ = part.region(shapes[part.ours][1])
        expected = tuple(part.change.to_theirs(torch.empty(region, device="meta")).shape)
        if shape != expected:
            raise ConversionError(
                f"{folder.path}: {part.theirs}: expected shape {expected} by its config.json, got {shape}; the two are "
                "not of one checkpoint"
            )
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConversionError(f"{folder.path}: {part.theirs}: expected fp32, bf16 or fp16 numbers, got {dtype}")
        if dtypes.setdefault(part.ours, dtype) != dtype:
            raise ConversionError(
                f"{folder.path}: {part.theirs} is {dtype}, other tensors that go into {part.ours} are "
                f"{dtypes[part.ours]}; convert the checkpoint to one dtype first"
            )
        filled[part.ours] = filled.get(part.ours, 0) + torch.Size(region).numel()
    made = tuple(name for name in shapes if name not in filled)
    wrong = [name for name, count in filled.items() if count != torch.Size(shapes[name][1]).numel()]
    wrong += [name for name in made if ".balancer." not in name]
    if wrong:
        raise RuntimeError(f"convert: the layout does not fill {wrong[0]} once; a part is missing or twice")
    return {name: (dtypes.get(name, dtype), shape) for name, (dtype, shape) in shapes.items()}, made


def _move(folder: Source, parts: list[Part], shapes: Shapes, path: Path, progress: Progress) -> None:
    by_name = {part.theirs: part for part in parts}
    total, done = folder.num_bytes, 0
    with writing(path) as put:
        for name in folder.names:
            if name in by_name:
                part, tensor = by_name[name], folder.read(name)
                put(part.ours, part.change.to_ours(tensor).contiguous(), part.region(shapes[part.ours][1])[1])
                done += tensor.nbytes
                progress(min(done, total), total)
