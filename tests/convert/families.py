"""Small random models of transformers, one of each family, and their folders."""

from pathlib import Path

import torch
import transformers

_BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "head_dim": 8,
}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "v_head_dim": 6, "qk_nope_head_dim": 8}
_DEEPSEEK = _LATENT | {
    "head_dim": None,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 24}

# name: (model type, what differs from the base)
MODELS = {
    "llama": ("llama", {}),
    "smollm": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral, window": ("mixtral", {"num_local_experts": 4, "sliding_window": 7}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": None}),
    "olmoe, renormalised": (
        "olmoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": None, "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe, every second": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
    ),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK | {"first_k_dense_replace": 1}),
    "deepseek_v3, yarn": (
        "deepseek_v3",
        _DEEPSEEK | {"q_lora_rank": None, "first_k_dense_replace": 0,
                     "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "intermediate_size": 64,
            "rope_parameters": _YARN | {"truncate": False},
        },
    ),
}  # fmt: skip


def build(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A model whose every parameter and bias says something."""
    torch.manual_seed(seed)
    kind, differs = MODELS[name]
    fields = {key: value for key, value in (_BASE | differs).items() if value is not None or key == "q_lora_rank"}
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(("norm.weight", "layernorm.weight")):
                tensor.uniform_(0.5, 1.5)
            elif "inv_freq" not in key:
                tensor.normal_(std=0.3 if tensor.dim() > 1 else 0.2)
    return model


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    """Its checkpoint, in several shards."""
    build(name).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
