"""The model that a fine-tuning begins with: its weights, its tokenizer, and how it routes held-out text.

How the base routes is measured once, before the first step, and kept in the run folder; the base isn't needed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from equipoise.disk.atomic import atomic_write
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.models.in_eval import in_eval
from equipoise.models.run_files import Loaded, folder_of, load
from equipoise.models.tokenizers import AnyTokenizer, has_tokenizer, load_tokenizer
from equipoise.monitor.baseline import Baseline, baselines_of, from_json, to_json
from equipoise.monitor.domain_shift import Shift, load_distance, shift_of
from equipoise.monitor.recorder import Recorder
from equipoise.train.finetune.config import FinetuneConfig
from equipoise.train.step import autocast
from equipoise.types import Routed

FILE = "base_routing.safetensors"


def tokenizer_of(config: FinetuneConfig, out: Path | None) -> AnyTokenizer:
    """The base's, from the run's own folder once that holds a copy."""
    return load_tokenizer(out if out is not None and has_tokenizer(out) else folder_of(Path(config.base)))


def adopt(model: Decoder, config: FinetuneConfig) -> Loaded:
    """Give the model the weights and balancers of the base, in fp32, and return what was loaded.

    Raises ValueError for a folder that is no run, has no whole checkpoint, or holds a model of another shape.
    """
    loaded = load(config.base, dtype=torch.float32)
    try:
        model.load_state_dict(loaded.model.state_dict())
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"from: the weights in {loaded.checkpoint} do not fit the run's model: {told} Begin a new run from them"
        ) from error
    return loaded


@dataclass(frozen=True, eq=False)
class BaseRouting:
    """How the base routes, by text: "task" is held-out text of the new data, "base" its own, where it kept any.

    tokens_BS: int64, by text; the last of each row is a target only. choices_N: int64, by text and layer, token * E +
    expert, ascending. baselines: by text and layer.
    """

    tokens_BS: Mapping[str, Tensor]
    choices_N: Mapping[str, Mapping[str, np.ndarray]]
    baselines: Mapping[str, Mapping[str, Baseline]]

    def compare(self, model: Decoder, batch_size: int, bf16: bool) -> tuple[list[Shift], dict[str, float]]:
        """(routing of the model now on the same tokens against the base's, mean nats per token by text).

        Observers see the tokens too, unless they are paused.
        """
        experts = {name: layer.num_experts for name, layer in model.moe_layers.items()}
        shifts, nats = [], {}
        for text, tokens_BS in self.tokens_BS.items():
            now, nats[text] = route(model, tokens_BS, batch_size, bf16)
            num_tokens = tokens_BS[:, 1:].numel()
            for layer, base_N in self.choices_N[text].items():
                shifts.append(shift_of(layer, text, (now[layer], base_N), experts[layer], num_tokens))
        return shifts, nats

    def domains_apart(self) -> dict[str, float]:
        """By layer, the distance of the base's load on the task's text from that on its own, before any tuning.

        Empty where the base kept no text.
        """
        if "base" not in self.baselines:
            return {}
        task, own = ({n: np.array(b.counts_E) for n, b in self.baselines[text].items()} for text in ("task", "base"))
        return {layer: load_distance(counts_E, own[layer]) for layer, counts_E in task.items()}

    def save(self, out: Path) -> None:
        """Into the run folder."""
        tensors = {f"{text}/tokens": tokens_BS.to(torch.int32) for text, tokens_BS in self.tokens_BS.items()}
        for text, layers in self.choices_N.items():
            tensors |= {f"{text}/choices/{layer}": torch.from_numpy(each_N) for layer, each_N in layers.items()}
        about = {text: json.dumps(to_json(baselines)) for text, baselines in self.baselines.items()}
        with atomic_write(out / FILE) as file:
            file.write(save(tensors, metadata=about))

    @staticmethod
    def load(out: Path) -> BaseRouting:
        """What `save` kept. Raises ValueError where it is missing or damaged."""
        path = out / FILE
        try:
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                about = file.metadata()
            baselines = {text: from_json(json.loads(records)) for text, records in about.items()}
            choices: dict[str, dict[str, np.ndarray]] = {text: {} for text in about}
            for name, tensor in tensors.items():
                text, kind, *layer = name.split("/")
                if kind == "choices":
                    choices[text][layer[0]] = tensor.numpy()
            return BaseRouting({text: tensors[f"{text}/tokens"].long() for text in about}, choices, baselines)
        except (OSError, SafetensorError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: expected how the base model routes, got {error!r}; restore it, or start a new run with "
                "another --out"
            ) from error


def measure_base(model: Decoder, texts: Mapping[str, Tensor], batch_size: int, bf16: bool) -> BaseRouting:
    """Of a model that is the base still. texts: int64 (B, S + 1) each."""
    choices: dict[str, Mapping[str, np.ndarray]] = {}
    baselines: dict[str, Mapping[str, Baseline]] = {}
    for text, tokens_BS in texts.items():
        recorder = Recorder(model)
        try:
            choices[text], _ = route(model, tokens_BS, batch_size, bf16)
            baselines[text] = baselines_of(recorder.flush(0))
        finally:
            recorder.detach()
    return BaseRouting(dict(texts), choices, baselines)


@torch.no_grad()
def route(model: Decoder, tokens_BS: Tensor, batch_size: int, bf16: bool) -> tuple[dict[str, np.ndarray], float]:
    """(by layer, who goes where: int64 (N,), token * E + expert, ascending; mean nats per token).

    tokens_BS: (B, S + 1). In eval; the model's mode is put back.
    """
    device = next(model.parameters()).device
    nats = 0.0
    with in_eval(model), _choices(model) as seen, autocast(bf16, device):
        for rows_BS in torch.split(tokens_BS.to(device), batch_size):
            total, _ = cross_entropy_sum(model(rows_BS[:, :-1]), rows_BS[:, 1:])
            nats += float(total)
    choices = {layer: np.sort(each.all()) for layer, each in seen.items()}
    return choices, nats / max(tokens_BS[:, 1:].numel(), 1)


class _Choices:
    """Of one layer, over forwards."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._num_tokens = 0

    def add(self, module: nn.Module, args: object, routed: Routed) -> None:
        decision = routed.decision
        keys_N = (decision.token_ids_N + self._num_tokens) * decision.num_experts + decision.expert_ids_N
        self._parts.append(keys_N.cpu().numpy())
        self._num_tokens += decision.num_tokens

    def all(self) -> np.ndarray:
        return np.concatenate(self._parts) if self._parts else np.empty(0, dtype=np.int64)


@contextmanager
def _choices(model: Decoder) -> Iterator[Mapping[str, _Choices]]:
    seen = {name: _Choices() for name in model.moe_layers}
    handles = [layer.tap.register_forward_hook(seen[name].add) for name, layer in model.moe_layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
