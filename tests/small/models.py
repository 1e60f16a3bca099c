"""Small models with a router that has opinions, and what they say."""

import torch

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.generate import generate
from equipoise.routing import TopK

DIM, HIDDEN, EXPERTS, LAYERS, K = 64, 32, 8, 3, 2
PER_EXPERT = 3 * DIM * HIDDEN  # weights, with swiglu


def config(**changes) -> DecoderConfig:
    values = {"vocab_size": 97, "dim": DIM, "num_layers": LAYERS, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 32}
    moe = MoEConfig(num_experts=EXPERTS, hidden_dim=HIDDEN, router=TopK(k=K), shared_experts=1)
    return DecoderConfig(**(values | {"max_seq_len": 48, "moe": moe, "init_std": 0.2} | changes))


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Decoder:
    """In eval. Weights depend on the seed alone."""
    torch.manual_seed(seed)
    made = Decoder(config(**changes)).eval()
    routers = {id(p) for layer in made.moe_layers.values() for p in layer.router.parameters()}
    for parameter in made.parameters():
        if id(parameter) not in routers:
            parameter.data = parameter.data.to(dtype)
    return made


def tokens(rows: int = 2, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(of: Decoder) -> torch.Tensor:
    return of(tokens())


def said(by: Decoder) -> list[list[int]]:
    return generate(by, tokens(1, 6), 24, temperature=0.8, seed=3).tolist()
