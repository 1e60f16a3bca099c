"""What `benchmarks.monitors` watches: random small models of seven families, and models whose routing is known.

In the latter, a token's number modulo C is its class, embeddings are one-hot in the class, and attention and experts
write nothing into the residual. So a router sees the class alone, and its weights are a table of logits by class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

E, K, VOCAB, DIM = 8, 3, 64, 32
SIZES = {
    "vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
# Family of transformers 5: its own sizes, and what it calls its number of experts.
FAMILIES = {
    "Mixtral": ({"intermediate_size": 16}, "num_local_experts"),
    "Olmoe": ({"intermediate_size": 16}, "num_experts"),
    "Qwen2Moe": ({"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}, "num_experts"),
    "Qwen3Moe": ({"moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}, "num_experts"),
    "DeepseekV3": (
        LATENT | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
                  "first_k_dense_replace": 0},
        "n_routed_experts",
    ),
    "GraniteMoe": ({"intermediate_size": 16}, "num_local_experts"),
    "GptOss": ({"intermediate_size": 16, "head_dim": 8}, "num_local_experts"),
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """A model and the token batches (B, S) that are put through it. top_k: experts per token."""

    name: str
    model: nn.Module
    batches: tuple[Tensor, ...]
    top_k: int

    @property
    def num_tokens(self) -> int:
        """In each layer."""
        return sum(batch.numel() for batch in self.batches)

    def routers(self) -> dict[str, nn.Module]:
        """By their path in the model."""
        blocks = [(name, module) for name, module in self.model.named_modules() if hasattr(module, "experts")]
        return {
            f"{name}.{child}": getattr(module, child)
            for name, module in blocks
            for child in ("gate", "router")
            if hasattr(module, child)
        }

    def run(self) -> Iterator[Tensor]:
        """One forward per batch; yields the batch afterwards."""
        for batch in self.batches:
            with torch.no_grad():
                self.model(input_ids=batch)
            yield batch


def build(family: str, top_k: int, **sizes: int) -> nn.Module:
    """A model of the family with random weights; the usual 0.02 would leave its routers undecided."""
    import transformers

    own, experts_name = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        **SIZES | own | {experts_name: E, "num_experts_per_tok": top_k} | sizes
    )
    torch.manual_seed(1)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def random_world(family: str, num_batches: int = 20) -> World:
    """Nothing is wrong with it. Few enough choices per expert for a window of 1000."""
    draw = torch.Generator().manual_seed(2)
    batches = tuple(torch.randint(3, VOCAB, (2, 16), generator=draw) for _ in range(num_batches))
    return World(family, build(family, K), batches, K)


def coded_model(family: str, logits_EC: Tensor, num_layers: int) -> nn.Module:
    """Top-2 routers that give a token of class c the logits of column c, times a positive number."""
    model = build(family, 2, num_hidden_layers=num_layers)
    num_classes = logits_EC.shape[1]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.zero_()
            elif name.endswith("embed_tokens.weight"):
                parameter.zero_()
                parameter[torch.arange(VOCAB), torch.arange(VOCAB) % num_classes] = 1.0
            elif name.endswith("gate.weight"):
                parameter.zero_()
                parameter[:, :num_classes] = logits_EC
    return model


def of_classes(probabilities: list[float], shape: tuple[int, int], num_batches: int) -> tuple[Tensor, ...]:
    """Batches of tokens, drawn by class."""
    draw = torch.Generator().manual_seed(3)
    weights = torch.tensor(probabilities)
    return tuple(
        torch.multinomial(weights, shape[0] * shape[1], True, generator=draw).view(shape) + len(weights)
        for _ in range(num_batches)
    )


def always_second(family: str) -> World:
    """Experts 0 to 6 are first choices in turn; expert 7 is the second choice of every token."""
    logits_EC = torch.eye(E)[:, : E - 1]
    logits_EC[E - 1] = 0.5
    model = coded_model(family, logits_EC, 2)
    return World(f"{family}, expert 7 always second", model, of_classes([1.0] * (E - 1), (2, 16), 30), 2)


def dead_tail(family: str) -> World:
    """Class c goes to experts c and c + 1 of the first six; nobody chooses the last two."""
    logits_EC = torch.eye(E)[:, : E - 2] + 0.5 * torch.eye(E)[:, : E - 2].roll(1, 0)
    logits_EC[E - 2, E - 3], logits_EC[0, E - 3] = 0.0, 0.5
    logits_EC[E - 2 :] = -1.0
    model = coded_model(family, logits_EC, 2)
    return World(f"{family}, experts 6 and 7 dead", model, of_classes([1.0] * (E - 2), (2, 16), 30), 2)


def long_run(family: str, num_batches: int = 9, sequences: int = 8192) -> World:
    """More than a million tokens, nine tenths of one class: 90 % of the tokens go to experts 0 and 1."""
    logits_EC = torch.eye(E) + 0.5 * torch.eye(E).roll(1, 0)
    model = coded_model(family, logits_EC, 1)
    batches = of_classes([0.9, *[0.1 / (E - 1)] * (E - 1)], (sequences, 16), num_batches)
    return World(f"{family}, {num_batches * sequences * 16} tokens", model, batches, 2)


FAILURES = {
    "always second": always_second,
    "dead tail": dead_tail,
    "long run": long_run,
    "short run": partial(long_run, num_batches=10, sequences=128),  # for a quick look
}
