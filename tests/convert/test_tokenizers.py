"""Tokenizers in and out: the same ids for every text, and text that can't become a control token."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers

from equipoise.models.hub_tokenizer import HubTokenizer
from equipoise.models.tokenizer import EOT, TokenizerError
from equipoise.models.tokenizers import copy_tokenizer, load_tokenizer, publish_tokenizer
from equipoise.train.tokenizer import train_bpe

TEXT = "def f(x):\n    return x + 1  # it's the year 2026, naïve café — 你好 🙂\n\n\tend  "


@pytest.fixture(scope="module")
def ours():
    return train_bpe([TEXT * 3, "the quick brown fox jumps over the lazy dog, again and again. " * 20], 400)


@pytest.fixture(scope="module")
def published(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    publish_tokenizer(ours, folder)
    return folder


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_published_gives_the_same_ids(ours, published, text):
    theirs = HubTokenizer.load(published)
    ids = ours.encode(text).tolist()
    assert theirs.encode(text).tolist() == ids
    assert theirs.decode(ids) == ours.decode(ids) == text
    assert [theirs.bytes_of(id) for id in ids] == [ours.bytes_of(id) for id in ids]


def test_transformers_reads_it(ours, published):
    theirs = transformers.AutoTokenizer.from_pretrained(published)
    assert theirs.encode(TEXT, add_special_tokens=False) == ours.encode(TEXT).tolist()
    assert theirs.eos_token_id == ours.eot_id
    assert theirs.decode(ours.encode(TEXT)) == TEXT


def test_a_control_token_is_not_made_from_text(ours, published):
    theirs = HubTokenizer.load(published)
    ids = theirs.encode(f"a{EOT}b").tolist()
    assert theirs.eot_id not in ids
    assert theirs.decode(ids) == f"a{EOT}b"
    assert theirs.bytes_of(theirs.eot_id) == b""
    assert (theirs.vocab_size, theirs.dtype, theirs.eot_id) == (ours.vocab_size, ours.dtype, ours.eot_id)


def test_saving_takes_its_files_along(published, tmp_path):
    HubTokenizer.load(published).save(tmp_path)
    assert HubTokenizer.load(tmp_path).fingerprint == HubTokenizer.load(published).fingerprint
    assert isinstance(load_tokenizer(tmp_path), HubTokenizer)
    (tmp_path / "copy").mkdir()
    assert copy_tokenizer(tmp_path, tmp_path / "copy")
    assert not copy_tokenizer(tmp_path / "nowhere", tmp_path / "copy")


def test_sentence_pieces_and_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<unk>": 0, "</s>": 1, "▁the": 2, "<0x0A>": 3, "▁": 4, "e": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = HubTokenizer.load(tmp_path)
    assert (read.bytes_of(2), read.bytes_of(3), read.eot_id) == (b" the", b"\n", 1)


def test_a_text_is_begun_as_the_model_expects_it(published, tmp_path):
    """As transformers does by default."""
    from tokenizers import Tokenizer, processors

    assert HubTokenizer.load(published).opening == ()
    copy_tokenizer(published, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    id = tokenizer.token_to_id(EOT)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOT} $A", special_tokens=[(EOT, id)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = HubTokenizer.load(tmp_path)
    assert [*read.opening, *read.encode(TEXT)] == transformers.AutoTokenizer.from_pretrained(tmp_path).encode(TEXT)
    assert (read.opening, read.encode("").tolist()) == ((id,), [])


class TestBad:
    def test_none(self, tmp_path):
        with pytest.raises(TokenizerError, match=r"expected byte_pairs.json or tokenizer.json, found neither"):
            load_tokenizer(tmp_path)

    def test_damaged(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(TokenizerError, match="is damaged"):
            load_tokenizer(tmp_path)

    def test_without_an_end(self, published, tmp_path):
        record = json.loads((published / "tokenizer.json").read_text())
        record["added_tokens"] = []
        (tmp_path / "tokenizer.json").write_text(json.dumps(record))
        with pytest.raises(TokenizerError, match="expected an end-of-sequence token"):
            load_tokenizer(tmp_path)

    def test_an_id_out_of_range(self, published):
        with pytest.raises(TokenizerError, match=r"token id 999999 is not in \[0, "):
            HubTokenizer.load(published).bytes_of(999999)
