"""Whether a router sends different domains of text to different experts, and whether that is more than chance.

Mutual information between the domain of a token and its expert, on validation text, with the decisions as the routers
made them, beside a control in which documents swap domains. It does not say why: domains differ in words too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn

from equipoise.models.decoder import Decoder
from equipoise.models.in_eval import in_eval
from equipoise.monitor.specialisation_counts import mutual_information
from equipoise.train.data import TokenStream, eval_batches, eval_windows
from equipoise.train.sources import DataError
from equipoise.train.step import autocast
from equipoise.types import Routed

NUM_SHUFFLES = 499  # the smallest p-value is 1/500: below SIGNIFICANT / layers for up to 25 layers
SIGNIFICANT = 0.05
WEAK = 0.05  # of the maximum
MAX_EXPERTS_SHOWN = 8


@dataclass(frozen=True, eq=False)
class RoutedText:
    """Tokens of a stream, and who went where in each layer.

    positions_T: int64, the place of each token in the stream. assignments: by layer's name, int64 (2, N): the number
    in [0, T) of each assignment's token, and its expert. num_experts: by layer's name.
    """

    stream: TokenStream
    positions_T: np.ndarray
    assignments: Mapping[str, np.ndarray]
    num_experts: Mapping[str, int]

    def counts_DE(self, layer: str, domains_T: np.ndarray) -> np.ndarray:
        """int64 (D, E): assignments by domain and expert, for tokens of these domains."""
        token_ids_N, expert_ids_N = self.assignments[layer]
        D, E = len(self.stream.domains), self.num_experts[layer]
        return np.bincount(domains_T[token_ids_N] * E + expert_ids_N, minlength=D * E).reshape(D, E)


@dataclass(frozen=True)
class Specialisation:
    """How much the expert tells about the domain, in one layer.

    mutual_information: of domain and expert over all assignments, in nats. control_mean, control_95: mean and 95th
    percentile of the same number when documents swap domains. p_value: share of the shuffles, the text as it is
    counted among them, that reach mutual_information. maximum: what a router could reach on this text, the smaller of
    the domains' entropy and ln(E/K). domains, counts: assignments, a row of experts per domain.
    """

    layer: str
    mutual_information: float
    control_mean: float
    control_95: float
    p_value: float
    maximum: float
    domains: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def beyond_chance(self) -> float:
        """mutual_information - control_mean, nats."""
        return self.mutual_information - self.control_mean

    @property
    def shares_DE(self) -> np.ndarray:
        """float64 (D, E): each domain's assignments over the experts. Rows sum to 1; zeros for an absent domain."""
        counts_DE = np.array(self.counts)
        shares: np.ndarray = counts_DE / np.maximum(counts_DE.sum(1, keepdims=True), 1)
        return shares

    def fields(self) -> dict[str, object]:
        """For --json."""
        return asdict(self) | {"beyond_chance": self.beyond_chance, "shares": self.shares_DE.tolist()}

    def scalars(self) -> dict[str, float]:
        """As named numbers for the run store."""
        return {
            f"specialisation.{self.layer}": self.mutual_information,
            f"specialisation_control.{self.layer}": self.control_mean,
        }


def specialisation(text: RoutedText, num_shuffles: int = NUM_SHUFFLES, seed: int = 0) -> list[Specialisation]:
    """One record per layer.

    The control hands the domains out anew among the documents, which stay whole and where they are. So tokens keep
    what ties them together inside a window or a document, and a router that goes by the document alone is no
    specialist. Windows may hold more than one domain. With few documents, or where one domain has longer ones, the
    control is wide, and only large effects show. It is exact where lengths do not depend on the domain.
    """
    domains_T = text.stream.domains_of(text.positions_T)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(text.stream.domains_M)) for _ in range(num_shuffles)]
    streams = [replace(text.stream, domains_M=text.stream.domains_M[order]) for order in orders]
    controls = [stream.domains_of(text.positions_T) for stream in streams]
    return [_of_layer(text, layer, domains_T, controls) for layer in text.assignments]


def _of_layer(text: RoutedText, layer: str, domains_T: np.ndarray, controls: Sequence[np.ndarray]) -> Specialisation:
    counts_DE = text.counts_DE(layer, domains_T)
    measured = mutual_information(counts_DE)
    control = np.array([mutual_information(text.counts_DE(layer, shuffled_T)) for shuffled_T in controls])
    share_D = counts_DE.sum(1) / max(counts_DE.sum(), 1)
    entropy = -float((share_D[share_D > 0] * np.log(share_D[share_D > 0])).sum())
    per_token = max(counts_DE.sum() / len(domains_T), 1.0)
    return Specialisation(
        layer=layer,
        mutual_information=measured,
        control_mean=float(control.mean()),
        control_95=float(np.quantile(control, 0.95)),
        p_value=float((1 + (control >= measured).sum()) / (1 + len(control))),
        maximum=min(entropy, float(np.log(text.num_experts[layer] / per_token))),
        domains=text.stream.domains,
        counts=tuple(tuple(int(count) for count in row) for row in counts_DE),
    )


# ----------------------------------------------------------------------------------------- reading it off a model


@torch.no_grad()
def route_text(
    model: Decoder,
    stream: TokenStream,
    batch_size: int,
    seq_len: int,
    max_batches: int,
    bf16: bool,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> RoutedText:
    """Run windows spread evenly over the stream through the model, in eval, and note who goes where.

    advance: called with the number of tokens of each batch. Pause the recorder first. The model's mode is put back
    after.
    """
    device = next(model.parameters()).device
    layers = model.moe_layers
    seen: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    handles = [layer.tap.register_forward_hook(_note(seen[name])) for name, layer in layers.items()]
    first_tokens, num_tokens = [], 0
    try:
        with in_eval(model), autocast(bf16, device):
            for batch in eval_batches(stream, batch_size, seq_len, max_batches):
                model(batch.tokens_BS.to(device))
                first_tokens.append(num_tokens)
                num_tokens += batch.tokens_BS.numel()
                advance(batch.tokens_BS.numel())
    finally:
        for handle in handles:
            handle.remove()
    assignments = {
        name: np.concatenate(
            [part + np.array([[first], [0]]) for part, first in zip(parts, first_tokens, strict=True)], axis=1
        )
        for name, parts in seen.items()
    }
    positions_T = _positions(stream, batch_size, seq_len, max_batches)
    return RoutedText(stream, positions_T, assignments, {name: layer.num_experts for name, layer in layers.items()})


def num_domains(stream: TokenStream, batch_size: int, seq_len: int, max_batches: int) -> int:
    """Of how many domains the windows are that `route_text` takes."""
    return len(np.unique(stream.domains_of(_positions(stream, batch_size, seq_len, max_batches))))


def check_domains(stream: TokenStream, batch_size: int, seq_len: int, max_batches: int) -> None:
    """Raise DataError when there is nothing to divide: fewer than two domains."""
    found = num_domains(stream, batch_size, seq_len, max_batches)
    if found < 2:
        raise DataError(
            f"specialisation needs validation text of two domains or more, got {found} of {', '.join(stream.domains)}. "
            "Train on a corpus with more, or raise eval_batches or data.val_fraction, so that more are in that text."
        )


def _positions(stream: TokenStream, batch_size: int, seq_len: int, max_batches: int) -> np.ndarray:
    """int64 (T,): the places in the stream of the tokens of `eval_batches`."""
    windows_W = eval_windows(stream, batch_size, seq_len, max_batches)
    return (windows_W[:, None] * seq_len + np.arange(seq_len)).reshape(-1)


def _note(parts: list[np.ndarray]) -> Callable[[nn.Module, tuple[Routed], Routed], None]:
    def hook(module: nn.Module, args: tuple[Routed], routed: Routed) -> None:
        decision = routed.decision
        parts.append(torch.stack([decision.token_ids_N, decision.expert_ids_N]).cpu().numpy())

    return hook


# ------------------------------------------------------------------------------------------------- for a person


def verdict(layers: Sequence[Specialisation]) -> str:
    """One sentence: whether, where and how far the routers go by the domain.

    A layer counts when its p-value is at most SIGNIFICANT over the number of layers (Bonferroni).
    """
    found = [layer for layer in layers if layer.p_value <= SIGNIFICANT / len(layers)]
    if not found:
        return "no specialisation beyond chance: in no layer does the expert tell more than when documents swap domains"
    best = max(found, key=lambda layer: layer.beyond_chance)
    part = best.beyond_chance / best.maximum
    shares_DE = best.shares_DE
    expert = int(np.ptp(shares_DE, axis=0).argmax())
    low, high = int(shares_DE[:, expert].argmin()), int(shares_DE[:, expert].argmax())
    names = ", ".join(layer.layer for layer in found)
    how = "weakly " if part < WEAK else ""
    return (
        f"the router specialises {how}by domain in {names}: beyond chance the expert tells "
        f"up to {best.beyond_chance:.3f} nats of {best.maximum:.3f} about the domain ({part:.0%}). {best.layer} sends "
        f"{shares_DE[high, expert]:.0%} of {best.domains[high]} and {shares_DE[low, expert]:.0%} of "
        f"{best.domains[low]} to expert {expert}"
    )


def specialisation_tables(layers: Sequence[Specialisation]) -> RenderableType:
    """Mutual information against its control, a row per layer; and where each domain goes."""
    numbers = Table(
        title="Does the expert tell the domain? Mutual information, nats", title_justify="left", box=box.SIMPLE
    )
    numbers.add_column("layer")
    for name in ("measured", "chance", "chance, 95 %", "p-value", "maximum"):
        numbers.add_column(name, justify="right")
    for layer in layers:
        values = (layer.mutual_information, layer.control_mean, layer.control_95, layer.p_value, layer.maximum)
        numbers.add_row(layer.layer, *(f"{value:.4f}" for value in values))
    return Group(numbers, _shares_table(layers))


def _shares_table(layers: Sequence[Specialisation]) -> Table:
    """The experts whose shares differ most between the domains, in their order, when there are too many."""
    num_experts = len(layers[0].counts[0])
    shown = min(num_experts, MAX_EXPERTS_SHOWN)
    title = "Where each domain goes" + ("" if shown == num_experts else ", the experts that differ most")
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("layer")
    table.add_column("domain")
    for number in range(shown):
        table.add_column(f"expert {number}" if shown == num_experts else "expert", justify="right")
    for layer in layers:
        shares_DE = layer.shares_DE
        chosen = sorted(np.argsort(-np.ptp(shares_DE, axis=0), kind="stable")[:shown].tolist())
        for index, domain in enumerate(layer.domains):
            cells = [f"{shares_DE[index, expert]:.0%}" for expert in chosen]
            if shown < num_experts:
                cells = [f"{expert}: {cell}" for expert, cell in zip(chosen, cells, strict=True)]
            table.add_row("" if index else layer.layer, domain, *cells)
    return table
