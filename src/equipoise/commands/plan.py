"""`equipoise plan`: parameters, memory per rank, communication, what would make it fit, and advice with its reasons."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from equipoise.commands.shown import Json, wide_console
from equipoise.plan.fit.setup import Kept, Mesh, Optimizer, Precision, Serving, Setup, Shard, Training

if TYPE_CHECKING:
    from equipoise.plan.fit.architecture import Architecture
    from equipoise.plan.fit.communication import Machine
    from equipoise.plan.fit.plan import Plan
    from equipoise.plan.links import Links

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmM]?)")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How many, how they share the work, and what each has room for."""

    ranks: Annotated[int | None, tyro.conf.arg(aliases=["--gpus"])] = None
    """How many. Experts are spread over as many of them as divide their number; the rest are copies of that."""
    expert: int | None = None
    """Ranks that share the experts of each layer, instead."""
    data: int | None = None
    """Copies of that."""
    shard: Shard = "none"
    """What is not held by each rank: the dense part (FSDP), the optimizer's state (ZeRO-1), or all of it."""
    gpu_memory: float | None = None
    """GiB of a rank. With it the plan says whether it fits, and what would make it."""

    def mesh(self, model: Architecture) -> Mesh:
        """What is asked for, completed."""
        experts = model.routed.num if model.routed else 1
        if self.ranks is None:
            return Mesh(expert=self.expert or 1, data=self.data or 1, shard=self.shard)
        if self.ranks < 1:
            raise ValueError(f"--ranks: expected at least 1, got {self.ranks}")
        if self.expert is None and self.data is None:
            expert = max(n for n in range(1, self.ranks + 1) if self.ranks % n == 0 and experts % n == 0)
        else:
            expert = self.expert or self.ranks // max(self.data or 1, 1)
        data = self.data or self.ranks // expert
        if expert * data != self.ranks:
            raise ValueError(
                f"--ranks: expected expert x data = {expert} x {data} = {expert * data}, got {self.ranks}; leave one "
                "of the three out"
            )
        return Mesh(expert=expert, data=data, shard=self.shard)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the ranks do."""

    train: bool = False
    """Plan an optimizer step instead of serving."""
    batch: int = 1
    """Sequences per rank: of a micro-batch in training, at the same time in serving."""
    context: str = "4k"
    """Tokens of a sequence, such as 4096 or 32k (32,768)."""
    precision: Precision = "bf16"
    """Of the weights. Embedding, head, norms and routers stay in bf16 at the least."""
    expert_precision: Precision | None = None
    """Of the routed experts' weights, where that is another."""
    cache_precision: Precision = "bf16"
    """Of keys and values, in serving."""
    step_tokens: str = "2k"
    """Serving: tokens per rank that are computed together at most; prefill is cut into such pieces."""
    optimizer: Optimizer | None = None
    """Training. Default: adamw for fp32 weights, and for bf16 adamw-master, whose fp32 master and states take 12 bytes
    per parameter."""
    activations: Kept = "lean"
    """Training: what a forward keeps: of the backends lean, or naive as grouped; or with MoE layers, or whole layers,
    computed again in backward."""
    micro_batches: int = 1
    """Training: of a step. With more, gradients are kept in fp32 all the time."""
    imbalance: float | None = None
    """MaxVio of ranks to leave room for, (busiest - mean) / mean, say its 99th percentile in your runs. Default: chance
    (99 %) on top of 0.52."""

    def setup(self, mesh: Mesh) -> Setup:
        """Of these options."""
        work: Training | Serving = Serving(
            cache=self.cache_precision, step_tokens=tokens_of("--step-tokens", self.step_tokens)
        )
        if self.train:
            work = Training(optimizer=self.optimizer, activations=self.activations, micro_batches=self.micro_batches)
        return Setup(
            mesh=mesh,
            work=work,
            batch=self.batch,
            context=tokens_of("--context", self.context),
            precision=self.precision,
            experts=self.expert_precision,
            imbalance=self.imbalance,
        )


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """For communication and time. The defaults are those of 16 H100 over RDMA; docs/planner.md says where from."""

    bandwidth: float = 43.0
    """Of a rank's link, one way, in 1e9 bytes per second."""
    latency: float = 10.0
    """Of an exchange between all ranks, in microseconds."""
    links: Path | None = None
    """Measured links instead, which `equipoise bench links --out` writes."""
    tflops: float = 400.0
    """That products reach."""
    memory_bandwidth: float = 3350.0
    """Of the rank's memory, in 1e9 bytes per second."""
    payload: Literal["bf16", "fp8"] = "bf16"
    """Of what is sent to the experts; what comes back is bf16."""
    target_ms: float | None = None
    """Milliseconds that a step may take: of one token in serving."""

    def machine(self, ranks: int) -> Machine:
        """For expert groups of so many ranks."""
        from equipoise.plan.fit.communication import Machine
        from equipoise.plan.links import Cost

        dispatch = 1.0 if self.payload == "fp8" else 2.0
        made = Machine(
            link=Cost(self.latency * 1e-6, self.bandwidth * 1e9),
            flops=self.tflops * 1e12,
            memory=self.memory_bandwidth * 1e9,
            dispatch=dispatch,
        )
        if self.links is None:
            return made
        found = _links(self.links)
        per_peer = found.all_to_all.start_s / max(found.ranks - 1, 1)
        link = replace(found.all_to_all, start_s=per_peer * max(ranks - 1, 1))
        return replace(made, link=link, flops=found.expert.rate)


def plan(
    model: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    *,
    ranks: Annotated[Ranks, tyro.conf.OmitArgPrefixes] = Ranks(),
    work: Annotated[Work, tyro.conf.OmitArgPrefixes] = Work(),
    speeds: Annotated[Speeds, tyro.conf.OmitArgPrefixes] = Speeds(),
    picture: Path | None = None,
    json_: Json = False,
) -> int:
    """Does it fit? Parameters, memory of each rank, communication, what would make it fit, and advice with its numbers.

    The model is a name (`equipoise plan` alone lists them) or a configuration: a Hugging Face config.json, its folder,
    or one of equipoise's runs. Nothing is loaded or downloaded; it is arithmetic, checked against published totals,
    against transformers and against memory that was measured (docs/planner.md).

    Serving:   equipoise plan deepseek-v3 --ranks 16 --gpu-memory 80 --precision bf16 --context 32k

    Quantised:   equipoise plan gpt-oss-120b --expert-precision mxfp4 --gpu-memory 80 --batch 16 --context 32k

    Training:   equipoise plan path/to/config.json --train --batch 8 --context 4096 --data 2 --expert 8 --gpu-memory 80

    A run:   equipoise plan runs/demo/config.json --train --precision fp32 --batch 32 --context 128

    Sizes are in GiB (2**30 bytes): an 80 GB card has a little less than 80. The exit code is 1 where it does not fit.

    Args:
        model: Name, or path of a config.json or of its folder.
        ranks: Ranks and their memory.
        work: What they do.
        speeds: Of links and products.
        picture: A PNG of what fills a rank's memory, now and with what would lower it. Needs the extra `plot`.
        json_: Print everything as one JSON object, and nothing else.
    """
    from equipoise.plan.fit.memory import GIB
    from equipoise.plan.fit.model_file import find_model
    from equipoise.plan.fit.plan import make_plan

    if model is None:
        return _list_known(json_)
    if picture is not None:
        from equipoise.host.extras import require

        require("matplotlib", "plot")
    found = find_model(model)
    mesh = ranks.mesh(found)
    limit = None if ranks.gpu_memory is None else round(_above_0("--gpu-memory", ranks.gpu_memory) * GIB)
    target_s = None if speeds.target_ms is None else _above_0("--target-ms", speeds.target_ms) / 1e3
    made = make_plan(found, work.setup(mesh), speeds.machine(mesh.expert), limit, target_s)
    if picture is not None:
        _draw(made, picture)
    if json_:
        print(json.dumps(made.fields()))
    else:
        _print(made, picture)
    return 1 if made.fits is False else 0


def tokens_of(name: str, text: str) -> int:
    """4096, 32k or 1m (1024 times 1024) as a number. Raises ValueError for anything else."""
    found = SIZE.fullmatch(text.strip())
    tokens = float(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[found[2].lower()] if found else 0.0
    if found is None or tokens != int(tokens) or tokens < 1:
        raise ValueError(f"{name}: expected a number of tokens such as 4096, 32k or 1m, got {text!r}")
    return int(tokens)


def _above_0(name: str, value: float) -> float:
    if not 0 < value < 1e9:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return value


def _list_known(json_: bool) -> int:
    from equipoise.plan.fit.known import KNOWN
    from equipoise.plan.fit.parameters import parameters

    if json_:
        listed = {
            name: parameters(known.model).fields()
            | {"published_total": known.total_b * 1e9, "published_active": known.active_b * 1e9, "source": known.source}
            for name, known in KNOWN.items()
        }
        print(json.dumps(listed))
        return 0
    from equipoise.plan.fit.report import known_table

    console = wide_console()
    console.print(known_table())
    console.print("\nequipoise plan NAME, or the path of a config.json; equipoise plan --help")
    return 0


def _draw(made: Plan, path: Path) -> None:
    from equipoise.disk.atomic import atomic_write
    from equipoise.plan.fit.report import picture

    drawn = picture(made)
    with atomic_write(path) as file:
        file.write(drawn)


def _print(made: Plan, path: Path | None) -> None:
    from equipoise.plan.fit.known import KNOWN
    from equipoise.plan.fit.report import tables

    console = wide_console()
    for table in tables(made):
        console.print(table)
        console.print()
    known = KNOWN.get(made.model.name)
    if known is not None:
        said = f"published: {known.total_b:g} B total, {known.active_b:g} B active ({known.source})"
        console.print(f"{said}{'; ' + known.note if known.note else ''}", highlight=False)
        if known.extra is not None:
            extra, counted = known.extra, "counted" if known.extra.counted else "not counted"
            console.print(
                f"not in these tables, {counted} there: {extra.parameters / 1e9:.2f} B, {extra.what}", highlight=False
            )
    if path is not None:
        console.print(f"picture  {path}", highlight=False)


def _links(path: Path) -> Links:
    from equipoise.plan.links import Links

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file; check the path") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, but it cannot be read: {error}") from error
    return Links.from_fields(values, str(path))
