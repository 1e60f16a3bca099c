"""A GGUF file of the Llama family (llama.cpp's format), as the same checkpoint in Hugging Face's names and layout.

The `gguf` library reads and dequantises it: what is read are the fp32 numbers that its blocks stand for. The tokenizer
inside becomes a `tokenizer.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Published
from torch import Tensor

from equipoise.convert.fields import ConversionError, Raw
from equipoise.convert.parts import Halved
from equipoise.models.hub_tokenizer import HUB_FILE

_AROUND = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
           "output.weight": "lm_head.weight"}  # fmt: skip
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_CONTROL = 3  # token type
# How llama.cpp cuts text for the vocabularies that it names so (llama.cpp:src/llama-vocab.cpp, by `pre`). The regular
# expression of GPT-2 is the ByteLevel step's own.
_DIGITS = {"smollm": True, "default": False, "gpt-2": False}


@dataclass(frozen=True)
class Gguf:
    """An open file. tensors: the library's, by their names in Hugging Face's checkpoints."""

    path: Path
    config: Raw
    tensors: Mapping[str, Any]
    vocabulary: Mapping[str, Any]

    @property
    def names(self) -> Sequence[str]:
        """Of its tensors."""
        return list(self.tensors)

    @cached_property
    def num_bytes(self) -> int:
        """Of its tensors, dequantised."""
        return sum(4 * int(each.n_elements) for each in self.tensors.values())

    def shape_of(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """fp32, whatever it is kept as."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape)), torch.float32

    def read(self, name: str) -> Tensor:
        """Dequantised. Rows of queries and keys go back from pairs of neighbours to halves."""
        from gguf import dequantize

        tensor = self.tensors[name]
        shape, _ = self.shape_of(name)
        numbers = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float().view(shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            numbers = Halved(int(self.config["head_dim"])).to_ours(numbers)
        return numbers

    def save_tokenizer(self, folder: Path) -> bool:
        """As `tokenizer.json`, with the chat template and the ids that end an answer."""
        vocabulary = self.vocabulary
        pre = vocabulary.get("pre", "default")
        if vocabulary.get("model") != "gpt2" or pre not in _DIGITS:
            return False
        names, types = vocabulary["tokens"], vocabulary["token_type"]
        merges = [tuple(merge.split(" ", 1)) for merge in vocabulary["merges"]]
        published = Published(models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=merges))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
        published.pre_tokenizer = pre_tokenizers.Sequence([digits, level]) if _DIGITS[pre] else level
        published.decoder = decoders.ByteLevel()
        special = [AddedToken(name, special=True) for name, kind in zip(names, types, strict=True) if kind == _CONTROL]
        published.add_special_tokens(special)
        published.save(str(folder / HUB_FILE))
        end = vocabulary.get("eos_token_id")
        if end is not None:
            begin = int(vocabulary.get("bos_token_id", end))
            ids = {"eos_token_id": int(end), "bos_token_id": begin}
            (folder / "generation_config.json").write_text(json.dumps(ids))
            tokens = {"eos_token": names[int(end)], "bos_token": names[begin]}
            (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
        if "chat_template" in vocabulary:
            (folder / "chat_template.jinja").write_text(vocabulary["chat_template"])
        return True


def open_gguf(path: Path) -> Gguf:
    """Look over a file. Raises ConversionError for what is no GGUF file, damaged, or of another architecture."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConversionError(f"{path}: reading GGUF needs gguf: pip install 'equipoise[gguf]'") from error
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library raises whatever a damaged file leads to
        raise ConversionError(f"{path}: expected a GGUF file, can't read it ({error!r}); download it again") from error
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ConversionError(
            f"{path}: general.architecture: expected llama, got {architecture!r}; "
            "convert the checkpoint's safetensors instead"
        )
    tensors = {_name(path, tensor.name): tensor for tensor in reader.tensors}
    prefix = "tokenizer.ggml."
    vocabulary = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    vocabulary |= {"chat_template": fields["tokenizer.chat_template"]} if "tokenizer.chat_template" in fields else {}
    return Gguf(path, _config(path, fields, tensors), tensors, vocabulary)


def _config(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    def of(name: str) -> Any:
        if (value := fields.get(f"llama.{name}")) is None:
            raise ConversionError(f"{path}: expected the field llama.{name}, found none; the file is not complete")
        return value

    if "model.embed_tokens.weight" not in tensors:
        raise ConversionError(f"{path}: expected a tensor token_embd.weight, found none; the file is not complete")
    heads, dim = of("attention.head_count"), of("embedding_length")
    if fields.get("llama.expert_count") or "llama.rope.scaling.type" in fields:
        raise ConversionError(f"{path}: expected a dense model with plain rotary positions, got experts or a scaling")
    return {
        "model_type": "llama",
        "vocab_size": int(tensors["model.embed_tokens.weight"].shape[1]),
        "hidden_size": dim,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.rope.dimension_count", dim // heads),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(of("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }


def _name(path: Path, name: str) -> str:
    if name in _AROUND:
        return _AROUND[name]
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _IN_LAYER:
        raise ConversionError(f"{path}: tensor {name} is none of a dense Llama's; nothing was written")
    return f"model.layers.{found[1]}.{_IN_LAYER[found[2]]}.weight"
