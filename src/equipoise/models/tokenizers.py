"""The tokenizer of a folder, whichever of the two kinds it is: our byte pairs, or a published `tokenizer.json`."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Published

from equipoise.models.hub_tokenizer import COMPANIONS, HUB_FILE, HubTokenizer, byte_of_letter
from equipoise.models.tokenizer import EOT, FILE_NAME, Tokenizer, TokenizerError

AnyTokenizer = Tokenizer | HubTokenizer


def load_tokenizer(folder: Path) -> AnyTokenizer:
    """The folder's tokenizer. Raises TokenizerError when there is none, or it is damaged."""
    if (folder / FILE_NAME).is_file():
        return Tokenizer.load(folder)
    if (folder / HUB_FILE).is_file():
        return HubTokenizer.load(folder)
    raise TokenizerError(
        f"{folder}: expected {FILE_NAME} or {HUB_FILE}, found neither. Copy the tokenizer of the model there."
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` finds one there."""
    return (folder / FILE_NAME).is_file() or (folder / HUB_FILE).is_file()


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Take a published tokenizer and what belongs to it along. False when the source has none."""
    for name in (HUB_FILE, *COMPANIONS):
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
    return (source / HUB_FILE).is_file()


def publish_tokenizer(tokenizer: AnyTokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and what belongs to it, as other libraries read them. Same ids for every text."""
    if isinstance(tokenizer, HubTokenizer):
        tokenizer.save(folder)
        return
    published = Published(models.BPE(vocab=_names(tokenizer), merges=_merges(tokenizer)))
    published.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    published.decoder = decoders.ByteLevel()
    published.add_special_tokens([AddedToken(EOT, special=True)])
    published.save(str(folder / HUB_FILE))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT, "bos_token": EOT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    generation = {"eos_token_id": tokenizer.eot_id, "bos_token_id": tokenizer.eot_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


_LETTERS = {byte: letter for letter, byte in byte_of_letter().items()}


def _names(tokenizer: Tokenizer) -> dict[str, int]:
    return {_name(token): id for id, token in enumerate(tokenizer.tokens)}


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """In order: the two tokens that each longer one is made of, found by applying the merges before it to its bytes."""
    ranks = {token: id for id, token in enumerate(tokenizer.tokens)}
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((_name(parts[0]), _name(parts[1])))
    return merges


def _name(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)
