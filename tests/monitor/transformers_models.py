"""Tiny models of transformers with random weights, padded batches, and a plain second observer to compare with."""

import inspect
import math

import torch
import transformers

E, K, VOCAB = 8, 3, 64
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
# Family: its own sizes, the name of its number of experts, how it scores. All take num_experts_per_tok.
FAMILIES = {
    "Mixtral": ({"intermediate_size": 16}, "num_local_experts", "softmax"),
    "Olmoe": ({"intermediate_size": 16}, "num_experts", "softmax"),
    "Qwen2Moe": ({"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}, "num_experts", "softmax"),
    "Qwen3Moe": ({"moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}, "num_experts", "softmax"),
    "DeepseekV3": (
        LATENT | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
                  "first_k_dense_replace": 0},
        "n_routed_experts", "sigmoid",
    ),
    "GraniteMoe": ({"intermediate_size": 16}, "num_local_experts", "softmax"),
    "GptOss": ({"intermediate_size": 16, "head_dim": 8, "sliding_window": 4}, "num_local_experts", "softmax"),
}  # fmt: skip
# What the models of the installed release call their cache: renamed in 5.24.
CACHE = next(
    name
    for name in inspect.signature(transformers.OlmoeForCausalLM.forward).parameters
    if name in ("cache", "past_key_values")
)


def build(family="Olmoe", num_experts=E, top_k=K, **sizes):
    own, experts_name, _ = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        **SIZES | own | {experts_name: num_experts, "num_experts_per_tok": top_k} | sizes
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)  # the usual 0.02 leaves routers undecided
    return model


def batch(B=3, S=7, pad=None):
    """Tokens and a mask; rows 0, 1, 2, ... have 0, 2, 4, ... tokens of padding on one side."""
    tokens = torch.randint(3, VOCAB, (B, S), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(B, S, dtype=torch.int64)
    for row in range(B if pad else 0):
        padding = slice(0, 2 * row) if pad == "left" else slice(S - 2 * row, S)
        mask[row, padding] = tokens[row, padding] = 0
    return tokens, mask


def blocks(model):
    """The MoE blocks of a model by name: what has experts."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "experts")}


def router_of(block):
    return block.gate if hasattr(block, "gate") else block.router


class Witness:
    """A second, plain observer: keeps what experts are called with and what routers return, call by call."""

    def __init__(self, model):
        self.inputs = {name: [] for name in blocks(model)}
        self.ids = {name: [] for name in blocks(model)}
        self.logits = {name: [] for name in blocks(model)}
        for name, block in blocks(model).items():
            block.experts.register_forward_pre_hook(self._experts(name), with_kwargs=True)
            router_of(block).register_forward_hook(self._router(name))

    def _experts(self, name):
        def keep(module, args, kwargs):
            hidden, ids, _ = [*args, *kwargs.values()]
            self.inputs[name].append(hidden.detach().clone())
            self.ids[name].append(ids.tolist())

        return keep

    def _router(self, name):
        return lambda module, args, output: self.logits[name].append(output[0].detach().double().tolist())

    def real(self, kept, real_calls):
        """The rows of the real tokens over all calls. real_calls: per call, a flag per token."""
        assert [len(call) for call in kept] == [len(real) for real in real_calls]
        return [
            row for call, real in zip(kept, real_calls, strict=True) for row, r in zip(call, real, strict=True) if r
        ]

    def counts(self, name, real_calls, num_experts=E):
        counted = [0] * num_experts
        for row in self.real(self.ids[name], real_calls):
            for expert in row:
                counted[expert] += 1
        return counted


def probabilities(logits, scores):
    """Of one token, in Python floats."""
    values = [math.exp(z) if scores == "softmax" else 1 / (1 + math.exp(-z)) for z in logits]
    return [value / sum(values) for value in values]


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)
