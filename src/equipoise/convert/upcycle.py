"""A dense model becomes an MoE that computes the same (sparse upcycling, arXiv 2212.05055).

Each feed-forward block is copied into experts, whole or cut into shards. With shards the routers of all shard groups
begin alike, so that a token's experts hold one copy of each shard (virtual groups, arXiv 2410.07524 section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from equipoise.convert.fields import ConversionError
from equipoise.convert.read import Progress, new_folder, newest_checkpoint, state_shapes, write_config
from equipoise.disk.checkpoint import CHECKPOINTS, draft, group_file, publish
from equipoise.disk.rows import lay_out, read_rows, shapes, writing
from equipoise.models.block import Block
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import read_config
from equipoise.models.tokenizer import TokenizerError
from equipoise.models.tokenizers import load_tokenizer
from equipoise.ops.activation import is_gated
from equipoise.routing import QuantileBalance, SwitchLoss, TopK


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense model is made sparse. E copies of each block, cut into G shards each, are E G experts."""

    experts: int = 8
    """Copies of each block, E."""
    granularity: int = 1
    """Shards that each copy is cut into, G. With as many experts per token, a token's work stays the dense model's."""
    top_k: int = 2
    """Experts per token, T; a multiple of the granularity, so that a token gets every shard."""
    every: int = 1
    """Of the layers, the last of each so many; 1 is all."""
    weights: Literal["exact", "published"] = "exact"
    """exact: a token's weights sum to G, which keeps the function to rounding. published: softmax, then top-k, inner
    weights times (E G^2 / T)^(1/3) each (arXiv 2410.07524); near the function while the router is undecided."""
    reinit: float = 0.0
    """Share of each expert's inner units to draw anew from the block's own mean and spread; 0.5 in Drop-Upcycling
    (arXiv 2502.19261). The function is not kept then."""
    noise: float = 0.0
    """On the copies, relative to their spread."""
    router_std: float = 0.02
    """Of the routers' rows."""
    balance: float = 0.01
    """Coefficient of the Switch loss that the model is given for its training."""
    seed: int = 0
    """Of all that is drawn."""

    def __post_init__(self) -> None:
        for name in ("experts", "granularity", "top_k", "every"):
            if getattr(self, name) < 1:
                raise ConversionError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.top_k > self.experts * self.granularity or self.top_k % self.granularity:
            raise ConversionError(
                f"top_k: expected a multiple of granularity={self.granularity}, at most the "
                f"{self.experts * self.granularity} experts, got {self.top_k}; with others a token would get a part of "
                "the block"
            )
        if self.top_k == 1 and self.weights == "exact":
            raise ConversionError(
                "top_k: expected 2 or more with weights='exact', got 1: a single renormalised weight is 1, and the "
                "router would learn nothing; take top_k=2, or weights='published'"
            )
        if not 0 <= self.reinit < 1 or self.noise < 0 or not self.router_std > 0:
            raise ConversionError(
                f"expected reinit in [0, 1), noise of 0 or more and router_std above 0, got {self.reinit}, "
                f"{self.noise} and {self.router_std}"
            )

    @property
    def keeps_the_function(self) -> bool:
        """To rounding, before any training."""
        return self.weights == "exact" and not self.reinit and not self.noise


def upcycled_config(dense: DecoderConfig, options: Upcycling) -> DecoderConfig:
    """The configuration of the MoE. Raises ConversionError for a model with experts, or blocks that can't be cut so."""
    if dense.moe is not None:
        raise ConversionError("upcycle: expected a dense model, got one with MoE layers; there is nothing to copy")
    G = options.granularity
    if dense.hidden_dim % G:
        raise ConversionError(f"granularity: expected a divisor of hidden_dim={dense.hidden_dim}, got {G}")
    published = options.weights == "published"
    router = TopK(k=options.top_k, renormalize=not published, scale=1.0 if published else float(G))
    has_choice = options.top_k < options.experts * G
    moe = MoEConfig(
        num_experts=options.experts * G,
        hidden_dim=dense.hidden_dim // G,
        router=router,
        balance=(SwitchLoss(coef=options.balance), QuantileBalance(on_demand=True)) if has_choice else (),
    )
    layers = tuple(layer for layer in range(dense.num_layers) if (layer + 1) % options.every == 0)
    if not layers:
        raise ConversionError(f"every: expected at most num_layers={dense.num_layers}, got {options.every}")
    return replace(dense, moe=moe, moe_layers=None if options.every == 1 else layers)


def upcycled_experts(
    up_HD: Tensor, down_DF: Tensor, options: Upcycling, generator: torch.Generator, halves: int = 2
) -> tuple[Tensor, Tensor]:
    """(up (E G, H / G, D), down (E G, D, F / G)) of one block; expert g E + e is copy e of shard g.

    up_HD: the inner projection, gates first where halves is 2 (H = 2 F), else H = F. down_DF: the outer one.
    """
    E, G, F = options.experts, options.granularity, down_DF.shape[1]
    up_GhD = up_HD.view(halves, G, F // G, -1).transpose(0, 1).reshape(G, halves * F // G, -1)
    down_GDf = down_DF.view(-1, G, F // G).transpose(0, 1)
    up, down = (each.repeat_interleave(E, dim=0).contiguous() for each in (up_GhD, down_GDf))
    if options.weights == "published":
        factor = (E * G**2 / options.top_k) ** (1 / 3)
        up, down = up * factor, down * factor
    if options.reinit:
        _redraw(up, down, options.reinit, halves, generator)
    if options.noise:
        for each in (up, down):
            each += options.noise * each.std() * torch.randn(each.shape, generator=generator).to(each.dtype)
    return up, down


def upcycled_router(dim: int, options: Upcycling, generator: torch.Generator, center_D: Tensor | None = None) -> Tensor:
    """(E G, D) fp32: rows for the E copies, the same for every shard.

    center_D: the mean of what the router reads. Rows are made orthogonal to it: a trained model's tokens have much in
    common, and the expert whose row happens to point that way would take most of them.
    """
    rows_ED = options.router_std * torch.randn(options.experts, dim, generator=generator)
    if center_D is not None:
        unit_D = torch.nn.functional.normalize(center_D.float(), dim=0)
        rows_ED = rows_ED - torch.outer(rows_ED @ unit_D, unit_D)
    return rows_ED.repeat(options.granularity, 1)


@torch.no_grad()
def block_centers(model: Decoder, tokens_BS: Tensor) -> dict[int, Tensor]:
    """(D,) by layer: the mean over tokens of what each feed-forward block of a dense model reads."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[torch.nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            found[layer] = args[0].float().flatten(0, -2).mean(0)

        return hook

    blocks = [module for module in model.layers if isinstance(module, Block)]
    handles = [block.mlp.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    try:
        model(tokens_BS)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _redraw(up: Tensor, down: Tensor, share: float, halves: int, generator: torch.Generator) -> None:
    """New numbers for some inner units of each expert: their rows in up, gate and all, and their columns in down."""
    f = down.shape[2]
    for expert in range(len(up)):
        units = torch.randperm(f, generator=generator)[: round(share * f)]
        rows = torch.cat([units + half * f for half in range(halves)])
        for target, index in ((up[expert], rows), (down[expert].t(), units)):
            fresh = torch.randn(len(index), target.shape[1], generator=generator)
            target[index] = (fresh * target.float().std() + target.float().mean()).to(target.dtype)


def upcycle_run(
    source: Path,
    out: Path,
    options: Upcycling,
    *,
    centers: Mapping[int, Tensor] | None = None,
    progress: Progress = lambda done, total: None,
) -> DecoderConfig:
    """The newest checkpoint of a dense run folder becomes an MoE's, layer by layer, in a new run folder.

    centers: `block_centers` on text of the kind that it will see; None draws routers without.
    Raises ConversionError, with nothing written, for a model that can't be made sparse so.
    """
    dense = read_config(source)
    config = upcycled_config(dense, options)
    checkpoint = newest_checkpoint(source)
    path, wanted = group_file(checkpoint, "model"), state_shapes(config)
    dtype = read_rows(path, "embed_tokens.weight", [0]).dtype
    described = {
        name: (torch.float32 if ".router." in name or ".balancer." in name else dtype, shape)
        for name, (_, shape) in wanted.items()
    }
    total = sum(torch.Size(shape).numel() for _, shape in described.values())
    generator = torch.Generator().manual_seed(options.seed)
    with new_folder(out) as temporary:
        checkpoints = temporary / CHECKPOINTS
        folder = draft(checkpoints, 0)
        target = group_file(folder, "model")
        lay_out(target, described)
        with writing(target) as put:
            report = _counting(put, total, progress)
            for name in shapes(path):
                if name in described:
                    report(name, read_rows(path, name, None).to(described[name][0]))
            for layer in config.moe_layer_ids:
                router = upcycled_router(config.dim, options, generator, (centers or {}).get(layer))
                report(f"layers.{layer}.mlp.router.weight", router)
                _make_sparse(path, f"layers.{layer}.mlp", config, options, generator, report)
        publish(folder, checkpoints, 0, {"source": source.name, "upcycled": options.experts * options.granularity})
        write_config(temporary, config)
        with suppress(TokenizerError):  # a model without one is converted as well
            load_tokenizer(source).save(temporary)
    return config


def _counting(put: Callable[[str, Tensor, int], None], total: int, progress: Progress) -> Callable[[str, Tensor], None]:
    done = 0

    def whole(name: str, tensor: Tensor) -> None:
        nonlocal done
        put(name, tensor, 0)
        done += tensor.numel()
        progress(done, total)

    return whole


def _make_sparse(
    path: Path,
    prefix: str,
    config: DecoderConfig,
    options: Upcycling,
    generator: torch.Generator,
    put: Callable[[str, Tensor], None],
) -> None:
    inner = "gate_up_proj" if is_gated(config.activation) else "up_proj"
    up, down = (read_rows(path, f"{prefix}.{name}.weight", None) for name in (inner, "down_proj"))
    experts = upcycled_experts(up, down, options, generator, 2 if inner == "gate_up_proj" else 1)
    put(f"{prefix}.experts.{inner}", experts[0])
    put(f"{prefix}.experts.down_proj", experts[1])
