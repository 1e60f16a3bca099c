"""The recipe finetune: a run's configuration out of the folder of the model that it begins with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from equipoise.models.config import DecoderConfig
from equipoise.models.run_files import CONFIG, folder_of, read_config
from equipoise.routing.balancers import BalancerConfig
from equipoise.routing.coefficients import AdaptiveCoefConfig
from equipoise.routing.losses import BalanceLoss, ZLoss
from equipoise.routing.schedules import value_at
from equipoise.train.config import DataConfig, OptimConfig, Overrides, TrainConfig
from equipoise.train.finetune.config import FinetuneConfig

RATE, OF_THE_BASE = 1e-4, 0.1
SETTLED = 10**9  # a step after which no schedule moves


def finetune(tune: FinetuneConfig, change: Overrides) -> TrainConfig:
    """300 steps on the text that `change` names, with a small learning rate.

    The model is that of `tune.base`; so are batch size, sequence length and precision where its config.json has them,
    and the learning rate is then a tenth of the base's, else 1e-4. No weight decay: it would pull the weights away
    from the base's. Raises ValueError for a folder that is no run, and without text.
    """
    if not tune.base:
        raise ValueError("from: expected the run folder whose model is tuned; say --from runs/demo")
    if change.corpus is None:
        raise ValueError("data: expected the text to tune on, got none; say --data my.jsonl")
    if change.tokenizer is not None:
        raise ValueError("tokenizer: is the base's, whose ids the model knows; leave it out")
    tune = replace(tune, base=str(Path(tune.base).expanduser().absolute()))
    folder = folder_of(Path(tune.base))
    model, like = tuned_model(read_config(folder), tune), _train_config(folder)
    length = min(128, model.max_seq_len) if like is None else like.data.seq_len
    config = TrainConfig(
        name="finetune",
        model=model,
        data=DataConfig(corpus=change.corpus, tokenizer="base", vocab_size=model.vocab_size, seq_len=length),
        optim=OptimConfig(lr=RATE if like is None else OF_THE_BASE * like.optim.lr, warmup=20, weight_decay=0.0),
        steps=300,
        batch_size=16 if like is None else like.batch_size,
        micro_batch_size=None if like is None else like.micro_batch_size,
        bf16=True if like is None else like.bf16,
        eval_every=50,
        checkpoint_every=100,
        canary_batches=4,
        finetune=tune,
    )
    if change.micro_batch_size is None and change.batch_size is not None:
        config = replace(config, micro_batch_size=None)
    return change.apply(config)


def tuned_model(model: DecoderConfig, tune: FinetuneConfig) -> DecoderConfig:
    """The same model under the balancing losses of a fine-tuning: light ones or none, z-losses as they ended.

    A schedule of the base would begin anew with what an untrained router needs. Adaptive coefficients, which keep a
    router sparse or a capacity from being passed, stay.
    """
    if model.moe is None:
        raise ValueError("from: expected a model with MoE layers, got a dense one; make one of it with upcycle first")
    balance = tuple(
        item if isinstance(item, BalancerConfig) else _lightened(item, tune.balance) for item in model.moe.balance
    )
    return replace(model, moe=replace(model.moe, balance=balance))


def _lightened(loss: BalanceLoss, coef: float) -> BalanceLoss:
    if isinstance(loss.coef, AdaptiveCoefConfig):
        return loss
    kept = value_at(loss.coef, SETTLED) if isinstance(loss, ZLoss) else coef
    return replace(loss, coef=kept)  # type: ignore[type-var]  # the protocol's implementations are dataclasses


def _train_config(folder: Path) -> TrainConfig | None:
    """That of the base, where it was trained here: folders made by conversion hold the model's alone."""
    try:
        return TrainConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        return None
