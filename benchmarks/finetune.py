"""What each way of fine-tuning buys and costs: python -m benchmarks.finetune

A small model is trained on one domain of the embedded corpus and tuned on another, once per arm, from the same weights.
Perplexities before and after on held-out text of both, how much of the base's routing is left, what the monitor said.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.monitor.store import RunStore
from equipoise.train.config import Overrides, TrainConfig
from equipoise.train.corpus import corpus
from equipoise.train.finetune.config import FinetuneConfig
from equipoise.train.finetune.start import finetune
from equipoise.train.loop import Trainer
from equipoise.train.recipes import recipe
from equipoise.train.report import Silent
from equipoise.train.run import open_data, train

TEXT_BYTES, DOCUMENT = 600_000, 6000
ARMS: Mapping[str, Mapping[str, Any]] = {
    "all, router frozen": {"freeze_router": 10**6},
    "all, router from step 101 at 0.1": {},
    "all, router from step 1 at 1.0": {"freeze_router": 0, "lr_router": 1.0},
    "router only": {"train": "router", "lr_router": 1.0},
    "non-moe": {"train": "non-moe"},
    "experts": {"train": "experts"},
    "task-experts, share 0.1": {"train": "task-experts"},
    "task-experts, share 0.5": {"train": "task-experts", "task_share": 0.5},
    "LoRA, rank 8, rate x 10": {"lora": 8, "lr_attention": 10.0, "lr_experts": 10.0},
    "careless: router at 100": {"freeze_router": 0, "lr_router": 100.0},
}


@dataclass(frozen=True)
class Outcome:
    """weights: how many are trained. task, base: perplexity on held-out text of the new domain and of the base's.

    agreement, distance: of the layer furthest from the base, on the task's text. alerts: the rules that fired.
    """

    weights: int
    task: float
    base: float
    agreement: float
    distance: float
    alerts: tuple[str, ...]


def write_text(domain: str, path: Path) -> None:
    """Some of a domain, cut into documents, as a .jsonl of one's own would be."""
    lines, size = [], 0
    for document in corpus("embedded", (domain,)).documents:
        if size > TEXT_BYTES:
            break
        lines.append(json.dumps({"text": document.text[:DOCUMENT], "domain": domain}))
        size += len(lines[-1])
    path.write_text("\n".join(lines), encoding="utf-8")


def tune(config: TrainConfig, out: Path) -> tuple[Outcome, Mapping[str, float]]:
    """(after, perplexities before)."""
    opened, data = open_data(config)
    trainer = Trainer(opened, data, out, Silent())
    before = trainer.tuning.compare(0, trainer.watch.recorder)
    weights = sum(parameter.numel() for parameter in trainer.tuning.parameters())
    trainer.run()
    trainer.close("finished")
    with RunStore.open_readonly(out) as store:
        names = [name for (name,) in store.rows("SELECT DISTINCT name FROM scalars")]
        last = {name: store.scalar_history(name)[-1][1] for name in names}
        rules = sorted({alert.finding.rule for alert in store.alerts()})
    return Outcome(
        weights=weights,
        task=last["perplexity_on_task"],
        base=last["perplexity_on_base"],
        agreement=min(value for name, value in last.items() if name.startswith("agreement_on_task.")),
        distance=max(value for name, value in last.items() if name.startswith("load_distance_on_task.")),
        alerts=tuple(rules),
    ), before


def table(options: argparse.Namespace, folder: Path) -> Table:
    """Train the base, then every arm."""
    source, target = options.domains
    base = recipe("tiny")
    base = replace(base, data=replace(base.data, domains=(source,)), steps=options.base_steps, canary_batches=4)
    train(base, folder / "base", Silent())
    write_text(target, folder / f"{target}.jsonl")
    rows: list[tuple[Cell, ...]] = []
    change = Overrides(corpus=str(folder / f"{target}.jsonl"), steps=options.steps, lr=options.lr)
    for number, name in enumerate(options.arms):
        config = finetune(FinetuneConfig(base=str(folder / "base"), **ARMS[name]), change)
        if options.smoke:
            config = replace(config, batch_size=4, eval_batches=1, canary_batches=1)
        found, before = tune(config, folder / f"arm-{number}")
        if not rows:
            rows.append(("before", None, before["perplexity_on_task"], before["perplexity_on_base"], 1.0, 0.0, ""))
        shown = (found.weights, found.task, found.base, found.agreement, found.distance, ", ".join(found.alerts))
        rows.append((name, *shown))
    columns = ("tuned", "weights trained", f"ppl {target}", f"ppl {source}", "agreement", "distance", "alerts")
    note = (
        f"tiny, {options.base_steps} steps on {source}, then {options.steps} on {target}, one seed. agreement: share "
        "of the base's choices that are still made, in the layer with the fewest; distance: share of the load that has "
        f"moved, in the layer with the most; both on {target}."
    )
    return Table("fine-tuning", columns, tuple(rows), note)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="default: all")
    parser.add_argument("--domains", nargs=2, default=["python", "scripture"], help="of the base, and to tune on")
    parser.add_argument("--base-steps", type=int, default=600, help="of the base (default 600)")
    parser.add_argument("--steps", type=int, default=300, help="of each arm (default 300)")
    parser.add_argument("--lr", type=float, default=None, help="of the arms; default: a tenth of the base's")
    add_output_arguments(parser)
    options = parser.parse_args()
    if options.smoke:
        torch.set_num_threads(1)
        options.base_steps = options.steps = 4
    announce(f"{len(options.arms)} arms")
    with tempfile.TemporaryDirectory() as folder:
        made = table(options, Path(folder))
    about = {"base_steps": options.base_steps, "steps": options.steps, "domains": " ".join(options.domains)}
    emit(Report(about, (made,)), options)


if __name__ == "__main__":
    main()
