"""From a configuration to a finished run: data, trainer, signals. What `equipoise train` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from equipoise.host.interrupt import interruptible
from equipoise.monitor.sinks.options import NOWHERE, Alerts, delivering
from equipoise.parallel import Ranks
from equipoise.train.config import TrainConfig
from equipoise.train.corpus import corpus
from equipoise.train.data import TokenData, prepare
from equipoise.train.evaluate import Evaluation, sample_text
from equipoise.train.finetune.base import tokenizer_of
from equipoise.train.loop import Trainer, load_config
from equipoise.train.report import Reporter
from equipoise.train.sources import DataError
from equipoise.train.specialisation import Specialisation
from equipoise.train.tokenizer import corpus_bpe, gpt2
from equipoise.types import Sink

PROMPT = "In the beginning"


@dataclass(frozen=True)
class RunResult:
    """How a run ended. signal: the number of the one that interrupted it, or None when it finished.

    specialisation: a record per layer when the configuration asks for it, else empty.
    """

    out: Path
    step: int
    signal: int | None
    evaluation: Evaluation | None
    sample: str | None
    specialisation: tuple[Specialisation, ...] = ()

    def fields(self) -> dict[str, object]:
        """For --json."""
        layers = [layer.fields() for layer in self.specialisation]
        return asdict(self) | {"out": str(self.out), "specialisation": layers}


def open_data(config: TrainConfig, out: Path | None = None) -> tuple[TrainConfig, TokenData]:
    """Tokens for the run, from the cache when they are there; and the config with the tokenizer's vocabulary.

    out: the run folder, for the copy that a fine-tuning keeps there of its base's tokenizer. Raises DataError for a
    corpus that is missing, empty or too small.
    """
    text = corpus(config.data.corpus, config.data.domains)
    cache = config.data.cache_dir.expanduser()
    if config.finetune is not None:
        tokenizer = tokenizer_of(config.finetune, out)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise DataError(
                f"from: the tokenizer has {tokenizer.vocab_size} ids, the model knows {config.model.vocab_size}; the "
                "folder's files are not of one model, restore them"
            )
        return config, prepare(text, tokenizer, cache, val_fraction=config.data.val_fraction, seed=config.seed)
    tokenizer = gpt2() if config.data.tokenizer == "gpt2" else corpus_bpe(text, config.data.vocab_size, cache)
    data = prepare(text, tokenizer, cache, val_fraction=config.data.val_fraction, seed=config.seed)
    return config.with_vocab(tokenizer.vocab_size), data


def train(
    config: TrainConfig | None,
    out: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    alerts: Alerts = NOWHERE,
    ranks: Ranks | None = None,
) -> RunResult:
    """Run to the end, or to the first SIGINT or SIGTERM, which writes a checkpoint and returns.

    config: None takes the one in `out`, as --resume does. alerts: where they go beside the run folder. ranks: the
    processes that it is spread over; the main one writes and reports. A second signal ends the process at once.
    """
    config = load_config(out) if config is None else config
    is_main = ranks is None or ranks.is_main
    with delivering(alerts if is_main else NOWHERE, out, reporter.say) as sinks:
        opened, data = open_data(config, out if resume else None) if ranks is None else _open_together(config, ranks)
        return _train(opened, data, out, reporter, resume, sinks, ranks)


def _open_together(config: TrainConfig, ranks: Ranks) -> tuple[TrainConfig, TokenData]:
    """One process makes the tokens, the others find them in the cache."""
    if ranks.is_main:
        opened = open_data(config)
        ranks.barrier()
        return opened
    ranks.barrier()
    return open_data(config)


def _train(
    config: TrainConfig,
    data: TokenData,
    out: Path,
    reporter: Reporter,
    resume: bool,
    sinks: Sequence[Sink],
    ranks: Ranks | None,
) -> RunResult:
    trainer = Trainer(config, data, out, reporter, resume, sinks, ranks)
    status = "failed"
    try:
        with interruptible() as interrupted:
            finished = trainer.run(stop=lambda: interrupted() is not None)
            status = "finished" if finished else "interrupted"
            if not finished:
                return RunResult(out, trainer.step_number, interrupted(), None, None)
            evaluation = trainer.evaluate()
            layers = trainer.specialisation() if config.specialisation else []
            sample = sample_text(trainer.model, data, PROMPT)
            return RunResult(out, trainer.step_number, None, evaluation, sample, tuple(layers))
    finally:
        trainer.close(status)
