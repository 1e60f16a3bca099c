"""A decoder's weights as a Mixtral of transformers: the same function, in the code that most people compare with.

What maps: RMSNorm, rotary positions in halves, grouped key/value heads, SwiGLU experts, softmax top-k renormalised.
transformers computes the router in the weights' type, equipoise in fp32: in bf16 a few tokens go elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder
from equipoise.routing import TopK

LOGITS_LIMIT = 1e-4  # relative, fp32


def check_maps(config: DecoderConfig) -> None:
    """Raise ValueError for a model that a Mixtral can't be."""
    moe = config.moe
    router = None if moe is None else moe.router
    if (
        config.style != "modern"
        or config.qk_norm
        or moe is None
        or config.moe_layer_ids != tuple(range(config.num_layers))
        or moe.shared_experts
        or moe.capacity is not None
        or moe.first_layers
        or not isinstance(router, TopK)
        or router != TopK(k=router.k)
    ):
        raise ValueError(
            "model: expected modern style, MoE in every layer, plain softmax top-k, neither shared experts nor "
            "capacity; a Mixtral has nothing else"
        )


def state_dict(model: Decoder) -> Mapping[str, Tensor]:
    """By Mixtral's names. Only the MoE's names and the tied head differ from ours."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".mlp." in name and not name.endswith((".router.weight", "gate_up_proj", "down_proj")):
            continue  # a balancer's state, at rest
        tensors[f"model.{name.replace('.mlp.router.', '.mlp.gate.')}"] = tensor
    head = tensors.pop("model.lm_head.weight", None)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] if head is None else head
    return tensors


def mixtral_of(model: Decoder) -> Any:
    """MixtralForCausalLM in the type of the model's weights and on their device, in eval."""
    import transformers

    library: Any = transformers

    config, weight = model.config, model.embed_tokens.weight
    check_maps(config)
    moe = config.moe
    assert moe is not None
    theirs = library.MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=moe.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.router.k,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    mixtral = library.MixtralForCausalLM(theirs).to(weight.device, weight.dtype).eval()
    mixtral.load_state_dict({name: tensor.to(weight.dtype) for name, tensor in state_dict(model).items()})
    mixtral.generation_config = library.GenerationConfig(do_sample=False, pad_token_id=0, use_cache=True)
    return mixtral


def logits_error(model: Decoder, mixtral: Any) -> float:
    """|theirs - ours| / |ours| over a batch of random tokens."""
    generator = torch.Generator().manual_seed(1)
    length = min(32, model.config.max_seq_len)
    tokens_BS = torch.randint(model.config.vocab_size, (4, length), generator=generator).to(mixtral.device)
    with torch.inference_mode():
        ours, theirs = model(tokens_BS).double(), mixtral(tokens_BS).logits.double()
    return float(torch.dist(ours, theirs) / ours.norm())


@torch.inference_mode()
def generate(mixtral: Any, prompts: list[tuple[int, ...]], max_tokens: int) -> list[tuple[int, ...]]:
    """Greedy, as one batch, padded on the left; all rows get as many tokens as the longest needs."""
    longest = max(len(prompt) for prompt in prompts)
    device = mixtral.device
    rows = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    made = mixtral.generate(rows, attention_mask=mask, max_new_tokens=max_tokens)
    return [tuple(row) for row in made[:, longest:].tolist()]
