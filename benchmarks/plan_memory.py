"""What `equipoise plan` says a process needs, beside what it used: python -m benchmarks.plan_memory.

Each set-up is a fresh process that does its work twice. What is resident between the two is the baseline, the second
time's peak (VmHWM, which is reset in between) less that is compared with the plan. So it is what the kernel counts,
temporaries and waste included, not a sum of tensors; and not what libraries keep for good, which has its own column:
oneDNN compiles a kernel for each shape of a bf16 product, and keeps a thousand of them. The allocator has one arena and
gives blocks of 64 KiB and more back at once (glibc's tunables below), or what is free would count as used. Linux and
glibc only. It is memory, not time: other work on the machine does not matter.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from equipoise.bench.report import Report, Table, add_output_arguments, announce, emit
from equipoise.layer.moe import reduce_and_update
from equipoise.models.cache import ContiguousCache
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.plan.fit.memory import Memory, memory
from equipoise.plan.fit.model_file import of_values
from equipoise.plan.fit.setup import Serving, Setup, Training
from equipoise.routing import SwitchLoss, TopK
from equipoise.train.config import OptimConfig
from equipoise.train.data import Batch
from equipoise.train.optim import build_optimizer
from equipoise.train.step import gradients, split

MIB = 2**20
STEPS = 2  # in the second, the optimizer has its state
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Case:
    """One set-up. context, batch: of a step, or of the cache."""

    name: str
    model: DecoderConfig
    batch: int
    context: int
    train: bool = True
    bf16: bool = False
    micro_batches: int = 1

    def setup(self) -> Setup:
        """The same for the planner."""
        moe = self.model.moe
        mode = "lean"
        if moe is not None and moe.checkpoint_experts:
            mode = "checkpoint-experts"
        elif moe is not None and moe.backend == "grouped":
            mode = "naive"
        training = Training(optimizer="adamw", activations=mode, micro_batches=self.micro_batches)
        precision = "bf16" if self.bf16 else "fp32"
        serving = Serving(cache=precision, step_tokens=self.batch * self.context)
        return Setup(
            work=training if self.train else serving,
            batch=self.batch // self.micro_batches,
            context=self.context,
            precision=precision,
            device="cpu",
        )

    def tiny(self) -> Case:
        """The same work with next to no memory."""
        moe = self.model.moe
        small = replace(
            self.model,
            vocab_size=64,
            dim=64,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            hidden_dim=32,
            num_layers=2,
            moe=None if moe is None else replace(moe, num_experts=4, hidden_dim=32),
        )
        return replace(self, model=small, batch=2 * self.micro_batches, context=32)


@dataclass(frozen=True)
class Found:
    """Bytes: planned, measured as peak less baseline, and what stays in the process when all is freed."""

    case: Case
    planned: Memory
    measured: int
    stays: int

    @property
    def error(self) -> float:
        """Relative; above 0 where the plan says too much."""
        return self.planned.total / self.measured - 1


def decoder(*, experts: bool = True, **more: object) -> DecoderConfig:
    """Of 8 experts, two per token, or dense with as many operations per token."""
    moe = MoEConfig(num_experts=8, hidden_dim=512, router=TopK(k=2), balance=(SwitchLoss(coef=0.01),))
    sizes: dict[str, object] = {
        "vocab_size": 8192,
        "dim": 512,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 2,
        "hidden_dim": 2048,
        "max_seq_len": 8192,
        "moe": moe if experts else None,
    }
    return DecoderConfig(**(sizes | more))  # type: ignore[arg-type]


def cases() -> tuple[Case, ...]:
    """The set-ups of the table."""
    lean = decoder()
    assert lean.moe is not None
    again = replace(lean, moe=replace(lean.moe, checkpoint_experts=True))
    naive = replace(lean, vocab_size=256, moe=replace(lean.moe, backend="grouped"))
    shared = replace(lean, moe=replace(lean.moe, shared_experts=1), qk_norm=True, tie_embeddings=False)
    return (
        Case("training, dense", decoder(experts=False), 8, 256),
        Case("training, MoE, lean", lean, 8, 256),
        Case("training, MoE, experts computed again", again, 8, 256),
        Case("training, MoE, shared expert, norms of heads, untied", shared, 8, 256),
        Case("training, dense, few words", decoder(experts=False, vocab_size=256), 16, 256),
        Case("training, MoE, few words", replace(lean, vocab_size=256), 16, 256),
        Case("training, MoE, few words, grouped experts", naive, 16, 256),
        Case("training, MoE, few words, experts computed again", replace(again, vocab_size=256), 16, 256),
        Case("training, MoE, few tokens", lean, 1, 64),
        Case("training, MoE, bf16 weights", lean, 8, 256, bf16=True),
        Case("training, MoE, twice the batch", lean, 16, 256),
        Case("training, MoE, 4 micro-batches", lean, 32, 256, micro_batches=4),
        Case("training, MoE, loss in pieces", replace(lean, vocab_size=24576), 8, 256),
        Case("serving, MoE, 8 x 1024 tokens cached", replace(lean, num_kv_heads=8), 8, 1024, train=False),
        Case("serving, MoE, 2 x 8192 tokens cached", replace(lean, num_kv_heads=8), 2, 8192, train=False),
        Case("serving, MoE, bf16, 8 x 1024 tokens cached", lean, 8, 1024, train=False, bf16=True),
    )


# ---------------------------------------------------------------------------------------------- in the process


def train(case: Case) -> None:
    """Some steps as `equipoise train` does them."""
    model = Decoder(case.model)
    if case.bf16:
        model.to(torch.bfloat16)
    optimizer = build_optimizer(model, OptimConfig())
    recorder = Recorder(model) if model.moe_layers else None  # it watches routers
    for step in range(STEPS):
        tokens_BS = torch.randint(case.model.vocab_size, (case.batch, case.context))
        batch = Batch(tokens_BS, tokens_BS.roll(-1, 1), torch.zeros(case.batch, dtype=torch.int64))
        gradients(model, split(batch, case.micro_batches), step, False, recorder)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        reduce_and_update(model.moe_layers.values(), step=step)


@torch.inference_mode()
def serve(case: Case) -> None:
    """A prompt per sequence, all in one step, and a few tokens more."""
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    model = Decoder(case.model).to(dtype).eval()
    more = 4
    cache = ContiguousCache(case.model, case.batch, case.context, dtype=dtype)
    tokens_BS = torch.randint(case.model.vocab_size, (case.batch, case.context - more))
    last_N = torch.arange(1, case.batch + 1) * tokens_BS.shape[1] - 1
    model(tokens_BS, cache=cache, logits_at=last_N)
    for _ in range(more):
        model(tokens_BS[:, :1], cache=cache)


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {what}; this measurement needs Linux")


def measure_here(case: Case) -> tuple[int, int]:
    """(peak less baseline of the second time, what the first has left behind) of this process, which must be fresh."""
    work = train if case.train else serve
    work(case.tiny())
    before = freed()
    for seed in (0, 0):  # the same, so that every product has a shape that was there before
        torch.manual_seed(seed)
        baseline = freed()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM is what is resident, again
        work(case)
    return resident("VmHWM") - baseline, baseline - before


def freed() -> int:
    """Bytes that are resident when all that can be freed is."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def measure(case: Case) -> Found:
    """The case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--case", case.name]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: the process ended with {done.returncode}: {done.stderr[-2000:]}")
    return Found(case, planned(case), *map(int, done.stdout.split()))


def planned(case: Case) -> Memory:
    """What the planner says, from the configuration's JSON."""
    return memory(of_values(json.loads(case.model.to_json()), case.name), case.setup())


def report(found: list[Found]) -> Report:
    """The table."""
    columns = ("set-up", "fullest", "planned [MiB]", "measured [MiB]", "error [%]", "not weights [%]", "stays [MiB]")
    rows = []
    for each in found:
        parts = each.planned.parts
        moving = sum(parts[name] for name in ("activations", "logits", "temporaries", "KV cache"))
        sizes = (each.planned.total / MIB, each.measured / MIB, 100 * each.error)
        rows.append((each.case.name, each.planned.moment, *sizes, 100 * moving / each.planned.total, each.stays / MIB))
    note = "measured: peak resident memory less the baseline. not weights: activations, logits, temporaries, cache."
    table = Table("Planned and measured memory", columns, tuple(rows), note)
    worst = max(abs(each.error) for each in found)
    return Report({"set-ups": len(found), "worst error [%]": round(100 * worst, 1)}, (table,))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_memory", description=__doc__)
    parser.add_argument("--case", help="measure only this set-up, here, and print bytes")
    add_output_arguments(parser)
    options = parser.parse_args()
    known = {case.name: case for case in cases()}
    if options.case:
        print(*measure_here(known[options.case]))
        return
    found = []
    for case in list(known.values())[: 1 if options.smoke else None]:
        announce(case.name)
        found.append(measure(case))
    emit(report(found), options)


if __name__ == "__main__":
    main()
