"""Fine-tune a trained model on text of your own, with its router left alone at first, and see what became of both.

Run it with `python examples/06_finetune.py`. From a shell it is `equipoise train finetune --from RUN --data my.jsonl`;
`examples/03_train_from_python.py` is about the run that it begins with. It works in a temporary folder.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from equipoise.models.run_files import load
from equipoise.monitor.store import RunStore
from equipoise.train.config import DataConfig, Overrides
from equipoise.train.finetune.config import FinetuneConfig
from equipoise.train.finetune.start import finetune
from equipoise.train.recipes import recipe
from equipoise.train.report import Silent
from equipoise.train.run import train

MODULES = ("argparse", "ast", "datetime", "inspect", "statistics", "subprocess", "threading", "typing")


def write_lines(path: Path, texts: list[str]) -> str:
    """One JSON object per line, with the text of a document."""
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


def history(run: Path, name: str) -> list[float]:
    """One number of a run, step by step."""
    with RunStore.open_readonly(run) as store:
        return [value for _, value, _ in store.scalar_history(name)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = Path(json.__file__).parents[1]
        code = [(library / f"{module}.py").read_text(encoding="utf-8")[:8000] for module in MODULES]
        data = DataConfig(corpus=write_lines(folder / "code.jsonl", code), vocab_size=384, seq_len=64, val_fraction=0.2)
        base = replace(recipe("tiny"), data=replace(data, cache_dir=folder / "cache"), steps=60, eval_every=0)
        train(base, folder / "base", Silent())

        prose = write_lines(folder / "my.jsonl", [text[:2000] for text in list(topics.values())[:40]])
        tune = FinetuneConfig(base=str(folder / "base"), freeze_router=20, compare_every=20)
        config = finetune(tune, Overrides(corpus=prose, steps=60, eval_every=0))
        config = replace(config, data=replace(config.data, cache_dir=folder / "cache", val_fraction=0.2))
        train(config, folder / "tuned", Silent())

        task, own = (history(folder / "tuned", f"perplexity_on_{text}") for text in ("task", "base"))
        print(
            f"perplexity on new text {task[0]:.0f} -> {task[-1]:.0f}, on the base's own {own[0]:.0f} -> {own[-1]:.0f}"
        )
        assert task[-1] < task[0]
        for layer in load(folder / "tuned").model.moe_layers:
            kept = history(folder / "tuned", f"agreement_on_base.{layer}")[-1]
            print(f"{layer}: {kept:.0%} of the base's routing choices on its own text are the same")
            assert kept > 0.5
