"""Train a small language model from Python: your recipe, your text, a stop in the middle, the same bits after.

Run it with `python examples/03_train_from_python.py`. Its text is the source of Python's own library, so it needs no
network; it works in a temporary folder, and checks what it prints.
"""

import tempfile
from pathlib import Path

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.monitor.store import RunStore
from equipoise.routing import SwitchLoss, TopK, ZLoss
from equipoise.train.config import DataConfig, OptimConfig, TrainConfig
from equipoise.train.loop import Trainer
from equipoise.train.report import Silent
from equipoise.train.run import open_data

MODULES = ("argparse", "ast", "calendar", "datetime", "inspect", "statistics", "subprocess", "threading", "typing")


def your_recipe(text: Path, cache: Path) -> TrainConfig:
    """Two layers of eight experts, two for each token. Any folder of .txt, .jsonl or .parquet files will do."""
    experts = MoEConfig(num_experts=8, hidden_dim=64, router=TopK(k=2), balance=(SwitchLoss(0.01), ZLoss(0.001)))
    return TrainConfig(
        name="yours",
        model=DecoderConfig(
            vocab_size=384, dim=64, num_layers=2, num_heads=4, hidden_dim=128, max_seq_len=64, moe=experts
        ),
        data=DataConfig(corpus=str(text), vocab_size=384, seq_len=64, cache_dir=cache),
        optim=OptimConfig(lr=5e-3, warmup=5),
        steps=40,
        batch_size=8,
        bf16=False,
        eval_every=0,
        checkpoint_every=0,
    )


def write_texts(folder: Path) -> Path:
    """One .txt per module; each file becomes a domain."""
    folder.mkdir()
    library = Path(tempfile.__file__).parent
    for name in MODULES:
        (folder / f"{name}.txt").write_text((library / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def losses(run: Path) -> list[float]:
    """The training loss at each step, from the run folder."""
    with RunStore.open_readonly(run) as store:
        return [value for _, value, _ in store.scalar_history("loss")]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, data = open_data(your_recipe(write_texts(folder / "text"), folder / "cache"))

        whole = Trainer(config, data, folder / "whole", Silent())
        whole.run()
        result = whole.evaluate()
        whole.close("finished")

        first = Trainer(config, data, folder / "parts", Silent())
        first.run(until=15)
        first.save()
        first.close("interrupted")
        second = Trainer(config, data, folder / "parts", Silent(), resume=True)
        second.run()
        second.close("finished")

        curve = losses(folder / "whole")
        print(f"loss {curve[0]:.2f} -> {curve[-1]:.2f}, validation {result.bits_per_byte:.2f} bits per byte")
        assert curve[-1] < curve[0] - 0.5
        assert losses(folder / "parts") == curve  # bit for bit
        for stats in second.watch.stats():
            print(f"{stats.layer}: {stats.effective_experts:.1f} of {stats.num_experts} experts effective")
