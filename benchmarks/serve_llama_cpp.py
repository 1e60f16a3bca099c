"""A decoder's weights as a GGUF file, and llama.cpp serving it: python -m benchmarks.serve_llama_cpp FILE

llama.cpp comes as the wheel `xllamacpp`, the file is written by `gguf`; neither is needed for anything else here.
It must listen in a process of its own, so that its client does not take turns with it.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise.bench.peers.mixtral import check_maps
from equipoise.models.decoder import Decoder
from equipoise.models.tokenizer import EOT, Tokenizer

ADDRESS = "listening at "


def write_gguf(path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Architecture `llama` with experts. Matrices in the type of the model's weights, norms and routers in fp32."""
    import gguf

    config = model.config
    check_maps(config)
    moe = config.moe
    assert moe is not None
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(moe.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.router.k)
    writer.add_vocab_size(config.vocab_size)
    bf16 = model.embed_tokens.weight.dtype == torch.bfloat16
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if bf16 else gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in _tensors(model):
        if tensor.dtype == torch.bfloat16:
            raw = np.ascontiguousarray(tensor.contiguous().view(torch.int16).numpy()).view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """By llama.cpp's names. Its `llama` turns neighbours (2i, 2i + 1), so rows of queries and keys change places."""
    config = model.config
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    yield "token_embd.weight", state["embed_tokens.weight"]
    yield "output_norm.weight", state["norm.weight"].float()
    if "lm_head.weight" in state:
        yield "output.weight", state["lm_head.weight"]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"blk.{layer}"
        yield f"{theirs}.attn_norm.weight", state[f"{ours}.input_layernorm.weight"].float()
        yield f"{theirs}.ffn_norm.weight", state[f"{ours}.post_attention_layernorm.weight"].float()
        yield f"{theirs}.attn_q.weight", neighbours(state[f"{ours}.self_attn.q_proj.weight"], config.num_heads)
        yield f"{theirs}.attn_k.weight", neighbours(state[f"{ours}.self_attn.k_proj.weight"], config.kv_heads)
        yield f"{theirs}.attn_v.weight", state[f"{ours}.self_attn.v_proj.weight"]
        yield f"{theirs}.attn_output.weight", state[f"{ours}.self_attn.o_proj.weight"]
        yield f"{theirs}.ffn_gate_inp.weight", state[f"{ours}.mlp.router.weight"].float()
        gate, up = state[f"{ours}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        yield f"{theirs}.ffn_gate_exps.weight", gate
        yield f"{theirs}.ffn_up_exps.weight", up
        yield f"{theirs}.ffn_down_exps.weight", state[f"{ours}.mlp.experts.down_proj"]


def neighbours(weight: Tensor, num_heads: int) -> Tensor:
    """Rows (i, i + d/2) of each head, which turn together, become rows (2i, 2i + 1). weight: (heads d, D)."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Enough of one to write answers as text: prompts are sent as ids."""
    import gguf

    letters = _byte_letters()
    tokens = ["".join(letters[byte] for byte in tokenizer.bytes_of(id)) for id in range(tokenizer.eot_id)] + [EOT]
    types = [gguf.TokenType.NORMAL] * tokenizer.eot_id + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{tokens[ord('a')]} {tokens[ord('a')]}"])
    writer.add_bos_token_id(tokenizer.eot_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(False)


def _byte_letters() -> list[str]:
    """GPT-2's: a byte that prints is itself, the others are letters from 256 on, in their order."""
    prints = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256))
    return [chr(byte) if byte in prints else chr(256 + next(others)) for byte in range(256)]


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_llama_cpp", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--parallel", type=int, default=64, help="requests at a time")
    parser.add_argument("--tokens", type=int, default=256, help="of prompt and answer together, each")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(options.file)
    params.n_parallel, params.n_ctx = options.parallel, options.parallel * options.tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.cache_prompt, params.warmup, params.n_gpu_layers = False, True, 0
    params.cache_ram_mib = 0
    bf16 = options.file.stem.endswith("bf16")
    kind = xllamacpp.ggml_type.GGML_TYPE_BF16 if bf16 else xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_k = params.cache_type_v = kind
    server = xllamacpp.Server(params)
    print(f"{ADDRESS}{server.listening_address}/v1", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    os._exit(0)  # its threads are its own


if __name__ == "__main__":
    main()
