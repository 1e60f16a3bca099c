"""What defines a training run: frozen, plain, written into the run folder as config.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from equipoise.models.config import DecoderConfig
from equipoise.recovery.policy import PolicyName, policy_of
from equipoise.train.finetune.config import FinetuneConfig
from equipoise.train.flag import Flag


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on.

    corpus: "embedded", "wikitext-2", or a path to .txt, .jsonl, .parquet or a folder of them.
    domains: which of the corpus's domains to take; None means all.
    tokenizer: "bpe" is trained on the corpus with vocab_size tokens; "gpt2" is GPT-2's, from local files;
    "base" is that of the run whose weights are tuned.
    seq_len: tokens per sequence. val_fraction: of the documents' bytes, kept for validation.
    cache_dir: where tokens and tokenizers are kept between runs.
    """

    corpus: str = "embedded"
    domains: tuple[str, ...] | None = None
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    seq_len: int = 128
    val_fraction: float = 0.05
    cache_dir: Path = field(default_factory=lambda: Path.home() / ".cache" / "equipoise" / "tokens")

    def __post_init__(self) -> None:
        if self.tokenizer not in ("bpe", "gpt2", "base"):
            raise ValueError(f"data.tokenizer: expected bpe or gpt2, or base to tune a model, got {self.tokenizer!r}")
        if self.domains is not None and (not self.domains or len(set(self.domains)) < len(self.domains)):
            raise ValueError(f"data.domains: expected names, each once, or None for all, got {self.domains}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay.

    lr: at the top. min_lr_ratio: of lr, at the last step. warmup: steps. clip: of the gradient's global norm.
    weight_decay: on matrices only; not on norms, embeddings and routers.
    """

    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "min_lr_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    steps: optimizer steps. batch_size: sequences per optimizer step. micro_batch_size: sequences per forward; the
    rest is gradient accumulation; None is the whole batch.
    device: "cpu", "cuda", or "auto" for a GPU where there is one.
    bf16: autocast to bfloat16, the router stays fp32. seed: of weights, data order and noise.
    eval_every, checkpoint_every, watch_every: steps; 0 of the first two means only at the end.
    eval_batches: at most so many, spread evenly over the validation text. keep_checkpoints: the newest n.
    recover: apply what the policy proposes when a router is in trouble; without it repairs are only proposed.
    policy: "ladder" (the gentlest repair first) or "round_robin_then_reload". canary_batches: of the validation text,
    by which a repair is judged. keep_known_good: the newest n known-good records, and the best.
    accept_faults: obey `equipoise inject`, for trying all this out.
    co_select: count which experts are chosen together for at most so many tokens of each forward; 0 is none.
    interference_every: steps between measurements of balancing against task gradients; 0 means never.
    specialisation: measure at the end how the routers divide the domains; needs at least two of them.
    finetune: begin with the weights of another run; None with fresh ones.
    """

    name: str
    model: DecoderConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    batch_size: int = 16
    micro_batch_size: int | None = None
    device: str = "auto"
    bf16: bool = True
    seed: int = 0
    eval_every: int = 200
    eval_batches: int = 16
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    watch_every: int = 10
    recover: bool = False
    policy: PolicyName = "ladder"
    canary_batches: int = 2
    keep_known_good: int = 5
    accept_faults: bool = False
    co_select: int = 256
    interference_every: int = 0
    specialisation: bool = False
    finetune: FinetuneConfig | None = None

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "keep_checkpoints",
            "watch_every",
            "eval_batches",
            "canary_batches",
            "keep_known_good",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 (only at the end) or more, got {getattr(self, name)}")
        policy_of(self.policy)
        _check_finetune(self)
        if self.co_select < 0:
            raise ValueError(f"co_select: expected 0 (none) or more tokens of each forward, got {self.co_select}")
        if self.interference_every < 0:
            raise ValueError(f"interference_every: expected 0 (never) or more, got {self.interference_every}")
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise ValueError(
                f"micro_batch_size: expected a divisor of batch_size = {self.batch_size}, got {micro}; gradients of "
                "micro-batches of one size add up to the gradient of the batch"
            )
        if self.model.max_seq_len < self.data.seq_len:
            raise ValueError(
                f"data.seq_len: expected at most model.max_seq_len = {self.model.max_seq_len}, got {self.data.seq_len}"
            )

    @property
    def num_micro_batches(self) -> int:
        """Forwards per optimizer step."""
        return 1 if self.micro_batch_size is None else self.batch_size // self.micro_batch_size

    def to_json(self) -> str:
        """JSON text with everything in it."""
        fields = {key: value for key, value in asdict(self).items() if key != "model"}
        fields["data"]["cache_dir"] = str(self.data.cache_dir)
        return json.dumps(fields | {"model": json.loads(self.model.to_json())}, indent=2)

    @staticmethod
    def from_json(text: str) -> TrainConfig:
        """What `to_json` wrote. Raises ValueError when it is something else."""
        try:
            fields = json.loads(text)
            model = DecoderConfig.from_json(json.dumps(fields.pop("model")))
            data = fields.pop("data")
            domains = None if data.get("domains") is None else tuple(data["domains"])
            data = DataConfig(**data | {"cache_dir": Path(data["cache_dir"]), "domains": domains})
            optim = OptimConfig(**fields.pop("optim"))
            tune = fields.pop("finetune", None)  # runs from before there was any have no such field
            finetune = None if tune is None else FinetuneConfig(**tune)
            return TrainConfig(model=model, data=data, optim=optim, finetune=finetune, **fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"config.json: expected a training run's configuration, got something else ({error}); "
                "start a new run with --out, or restore the file"
            ) from error

    def with_vocab(self, vocab_size: int) -> TrainConfig:
        """The same run with a model for so many token ids."""
        return replace(self, model=replace(self.model, vocab_size=vocab_size))


def _check_finetune(config: TrainConfig) -> None:
    tune, tokenizer = config.finetune, config.data.tokenizer
    if (tokenizer == "base") != (tune is not None):
        expected = "bpe or gpt2 for a run with fresh weights" if tune is None else "base for a model that is tuned"
        raise ValueError(f"data.tokenizer: expected {expected}, got {tokenizer!r}: weights know one tokenizer's ids")
    if tune is not None and not tune.base:
        raise ValueError(
            "finetune.base: expected the run folder whose model is tuned, got nothing; name it with --from"
        )
    if tune is not None and tune.lora and config.recover:
        raise ValueError(
            "recover: expected False with finetune.lora: a repair that changes weights would be undone by the next "
            "step, which adds the factors to the base's anew; leave one of them out"
        )


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What a person may change in a recipe from the command line; None leaves it as it is."""

    corpus: Annotated[str | None, tyro.conf.arg(name="data")] = None
    """embedded, wikitext-2, or the path of a .txt, .jsonl or .parquet file or of a folder of them."""
    domains: tuple[str, ...] | None = None
    """Which domains of the corpus to take; all of them if none is named."""
    tokenizer: str | None = None
    """bpe (trained on the corpus) or gpt2."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int | None = None
    """Sequences per optimizer step."""
    micro_batch_size: int | None = None
    """Sequences per forward; the rest is gradient accumulation."""
    lr: float | None = None
    """Learning rate after warm-up."""
    seed: int | None = None
    """Of weights, data order and noise."""
    device: str | None = None
    """cpu, cuda, or auto for a GPU where there is one."""
    bf16: Flag = None
    """Compute in bfloat16 where it is safe; the router always stays fp32."""
    recover: Flag = None
    """Repair a router in trouble, not only propose to."""
    policy: PolicyName | None = None
    """Which repairs, in which order: ladder (the gentlest first) or round_robin_then_reload."""
    accept_faults: Flag = None
    """Obey `equipoise inject OUT ...` while it runs, for trying out monitor and repairs."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0 writes one at the end only."""
    eval_every: int | None = None
    """Steps between validations; 0 validates at the end only."""
    co_select: int | None = None
    """Tokens of each forward for which it is counted which experts they go to together; 0 is none."""
    interference_every: int | None = None
    """Steps between measurements of how balancing losses pull against the task; each costs about two steps."""
    specialisation: Flag = None
    """Show at the end how the routers divide the domains of the text between the experts."""

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The recipe with the changes. The domains of a recipe are those of its own corpus, and go with it."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        data = {name: given.pop(name) for name in ("corpus", "domains", "tokenizer") if name in given}
        if "corpus" in data:
            data.setdefault("domains", None)
        optim = {name: given.pop(name) for name in ("lr",) if name in given}
        return replace(config, data=replace(config.data, **data), optim=replace(config.optim, **optim), **given)
