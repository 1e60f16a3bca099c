"""Tokens on disk and the batches cut from them: every token once, the same again after a resume, clear errors."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.train.corpus import Corpus, Document
from equipoise.train.data import Batch, Loader, eval_batches, prepare
from equipoise.train.sources import DataError
from equipoise.train.tokenizer import train_bpe
from equipoise.train.tokens import TokenStream, split_documents

WORDS = [
    "balance",
    "router",
    "expert",
    "token",
    "gate",
    "load",
    "drop",
    "sparse",
    "dense",
    "learn",
    "weight",
    "mixture",
    "layer",
]


def made_up(num_documents=(40, 30, 20), seed=0):
    """Random words; each document begins with its own number, so that it is the only one of its kind."""
    rng = np.random.default_rng(seed)
    documents = [
        Document(f"{domain}-{i} " + " ".join(rng.choice(WORDS, size=rng.integers(5, 60))), domain, f"{domain}/{i}")
        for domain, count in enumerate(num_documents)
        for i in range(count)
    ]
    return Corpus("made-up", tuple("abc"[: len(num_documents)]), tuple(documents))


@pytest.fixture(scope="module")
def corpus():
    return made_up()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_bpe([d.text for d in corpus.documents], 300)


@pytest.fixture(scope="module")
def data(corpus, tokenizer, tmp_path_factory):
    return prepare(corpus, tokenizer, tmp_path_factory.mktemp("cache"), val_fraction=0.2)


def counting(num_tokens, num_documents=3):
    """A stream whose tokens are 0, 1, 2, ...: a token is its own position."""
    ends_M = np.linspace(0, num_tokens, num_documents + 1).astype(np.int64)[1:]
    domains_M = np.arange(num_documents) % 2
    tokens_N = np.arange(num_tokens, dtype=np.uint32)
    return TokenStream(tokens_N, ends_M, domains_M, ("even", "odd"), np.array([1, 1]), f"counting-{num_tokens}")


def equal(a: Batch, b: Batch) -> bool:
    pairs = ((a.tokens_BS, b.tokens_BS), (a.targets_BS, b.targets_BS), (a.domains_BS, b.domains_BS))
    return all(torch.equal(x, y) for x, y in pairs)


def documents_in(stream, tokenizer):
    starts_M = np.concatenate([[0], stream.ends_M[:-1]])
    return [stream.tokens_N[start : end - 1] for start, end in zip(starts_M, stream.ends_M, strict=True)]


# ------------------------------------------------------------------------------------------------- the split


def test_each_document_is_in_one_split_and_comes_back_whole(corpus, tokenizer, data):
    train, val = ([tokenizer.decode(ids) for ids in documents_in(s, tokenizer)] for s in (data.train, data.val))
    assert sorted(train + val) == sorted(d.text for d in corpus.documents)
    assert not set(train) & set(val)


def test_validation_has_its_share_of_each_domain(corpus, data):
    for domain, size in enumerate(corpus.by_domain().values()):
        share = data.val.num_bytes_D[domain] / size
        assert 0.1 < share <= 0.2


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3).filter(lambda counts: max(counts) > 1),
    st.floats(0.001, 0.999),
    st.integers(0, 1000),
)
def test_split_keeps_every_domain_on_both_sides(counts, val_fraction, seed):
    corpus = made_up(tuple(counts))
    splits = split_documents(corpus, val_fraction, seed)
    assert sorted(splits["train"] + splits["val"], key=corpus.documents.index) == list(corpus.documents)
    for domain, count in enumerate(counts):
        assert any(d.domain == domain for d in splits["train"])
        assert any(d.domain == domain for d in splits["val"]) == (count > 1)


def test_split_follows_the_seed(corpus):
    assert split_documents(corpus, 0.2, 1) == split_documents(corpus, 0.2, 1)
    assert split_documents(corpus, 0.2, 1) != split_documents(corpus, 0.2, 2)


# ------------------------------------------------------------------------------------------------- on disk


def test_documents_end_in_eot_and_know_their_domain(corpus, tokenizer, data):
    domain_of = {d.text: d.domain for d in corpus.documents}
    stream = data.train
    assert (stream.tokens_N[stream.ends_M - 1] == tokenizer.eot_id).all()
    assert (stream.tokens_N == tokenizer.eot_id).sum() == len(stream.ends_M)
    for ids, end, domain in zip(documents_in(stream, tokenizer), stream.ends_M, stream.domains_M, strict=True):
        assert domain == domain_of[tokenizer.decode(ids)]
        positions = np.arange(end - len(ids) - 1, end)
        assert (stream.domains_of(positions) == domain).all()


def test_bytes_and_tokens_per_domain_add_up(corpus, data):
    total_D = data.train.num_bytes_D + data.val.num_bytes_D
    assert total_D.tolist() == list(corpus.by_domain().values())
    assert data.train.num_tokens_D.sum() == data.train.num_tokens
    ratio_D = data.train.bytes_per_token_D
    assert np.allclose(ratio_D * data.train.num_tokens_D, data.train.num_bytes_D)


def test_second_time_opens_what_is_there(corpus, tokenizer, tmp_path):
    first = prepare(corpus, tokenizer, tmp_path, val_fraction=0.2)
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(corpus, tokenizer, tmp_path, val_fraction=0.2)
    assert stamps == {path: path.stat().st_mtime_ns for path in second.folder.iterdir()}
    assert second.train.fingerprint == first.train.fingerprint != first.val.fingerprint
    assert isinstance(second.train.tokens_N, np.memmap)


@pytest.mark.parametrize("change", ["seed", "val_fraction", "tokenizer", "corpus"])
def test_other_inputs_have_another_folder(corpus, tokenizer, tmp_path, change):
    base = prepare(corpus, tokenizer, tmp_path, val_fraction=0.2)
    other_tokenizer = train_bpe(WORDS, 300) if change == "tokenizer" else tokenizer
    other_corpus = made_up(seed=1) if change == "corpus" else corpus
    other_fraction = 0.3 if change == "val_fraction" else 0.2
    seed = 1 if change == "seed" else 0
    other = prepare(other_corpus, other_tokenizer, tmp_path, val_fraction=other_fraction, seed=seed)
    assert other.folder != base.folder


@pytest.mark.parametrize(
    "name", ["train.tokens", "val.tokens", "train.documents.npy", "val.documents.npy", "meta.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "bit"])
def test_damaged_cache_is_made_anew(corpus, tokenizer, tmp_path, name, damage):
    good = prepare(corpus, tokenizer, tmp_path, val_fraction=0.2)
    path = good.folder / name
    content = path.read_bytes()
    fingerprint = good.train.fingerprint
    del good  # nothing may map the file while it is cut
    middle = len(content) // 2
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:middle])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    again = prepare(corpus, tokenizer, tmp_path, val_fraction=0.2)
    assert path.read_bytes() == content
    assert again.train.fingerprint == fingerprint


def test_a_number_changed_in_the_record_is_noticed(corpus, tokenizer, tmp_path):
    good = prepare(corpus, tokenizer, tmp_path, val_fraction=0.2)
    path = good.folder / "meta.json"
    meta = json.loads(path.read_text())
    meta["splits"]["train"]["num_bytes_D"][0] += 1
    path.write_text(json.dumps(meta))
    again = prepare(corpus, tokenizer, tmp_path, val_fraction=0.2)
    assert again.train.num_bytes_D.tolist() == good.train.num_bytes_D.tolist()


FULL_DISK = """
import resource, sys
from pathlib import Path
from equipoise.train.corpus import corpus
from equipoise.train.tokens import prepare
from equipoise.models.tokenizer import Tokenizer
folder = Path(sys.argv[1])
text, tokenizer = corpus(folder / "text.jsonl"), Tokenizer.load(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # any file may grow to 1000 bytes
try:
    prepare(text, tokenizer, folder / "cache")
except ValueError as error:
    print(error)
"""


def test_full_disk_is_a_clear_error_and_leaves_no_file(corpus, tokenizer, tmp_path):
    rows = [json.dumps({"text": d.text, "domain": "abc"[d.domain]}) for d in corpus.documents]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    tokenizer.save(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "could not write" in done.stdout
    assert "train.tokens: File too large" in done.stdout
    assert "Free some space" in done.stdout
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


# ------------------------------------------------------------------------------------------------- batches


def test_targets_are_the_next_tokens_and_domains_are_theirs():
    stream = counting(100)
    batch = Loader(stream, batch_size=3, seq_len=8, seed=0).next_batch()
    for field in (batch.tokens_BS, batch.targets_BS, batch.domains_BS):
        assert field.dtype == torch.int64
        assert field.shape == (3, 8)
        assert field.is_contiguous()
    assert torch.equal(batch.targets_BS, batch.tokens_BS + 1)
    assert torch.equal(batch.domains_BS, torch.from_numpy(stream.domains_of(batch.targets_BS.numpy())))
    assert batch.domains_BS.unique().tolist() == [0, 1]


@settings(deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(0, 400), st.integers(0, 5), st.integers(0, 9)
)
def test_each_token_is_a_target_once_per_epoch_over_all_ranks(batch_size, seq_len, world, spare, seed, skip):
    stream = counting(batch_size * world * seq_len + 1 + spare)
    num_windows = (stream.num_tokens - 1) // seq_len
    loaders = [Loader(stream, batch_size, seq_len, seed, rank, world) for rank in range(world)]
    rows: list[list[int]] = []
    while len(rows) < 2 * num_windows:
        for loader in loaders:
            rows += loader.next_batch().targets_BS.tolist()
    for epoch in range(2):
        targets = sorted(t for row in rows[epoch * num_windows : (epoch + 1) * num_windows] for t in row)
        assert targets == list(range(1, num_windows * seq_len + 1))
    assert loaders[0].epoch == len(rows) // num_windows


def test_epochs_and_seeds_have_their_own_order():
    def targets(seed, num_batches):
        loader = Loader(counting(401), batch_size=10, seq_len=4, seed=seed)
        return [loader.next_batch().targets_BS for _ in range(num_batches)]

    both = targets(0, 20)  # 100 windows are 10 batches
    assert not torch.equal(torch.cat(both[:10]), torch.cat(both[10:]))
    assert not torch.equal(torch.cat(both[:10]), torch.cat(targets(1, 10)))
    firsts = torch.cat(both[:10])[:, 0].tolist()
    assert any(later < earlier for earlier, later in pairwise(firsts))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(1, 40))
def test_resuming_gives_the_same_batches(data, before, after):
    loader = Loader(data.train, batch_size=4, seq_len=16, seed=3)
    for _ in range(before):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = Loader(data.train, batch_size=4, seq_len=16, seed=3)
    resumed.load_state_dict(state)
    assert resumed.epoch == loader.epoch
    for _ in range(after):
        assert equal(loader.next_batch(), resumed.next_batch())
    assert loader.state_dict() == resumed.state_dict()


def test_global_batch_does_not_depend_on_the_number_of_ranks(data):
    alone = Loader(data.train, batch_size=4, seq_len=16, seed=0)
    alone.next_batch()
    ranks = [Loader(data.train, batch_size=2, seq_len=16, seed=0, rank=rank, world=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(alone.state_dict())
    joined = torch.cat([loader.next_batch().tokens_BS for loader in ranks])
    assert torch.equal(joined, alone.next_batch().tokens_BS)


def test_loader_is_an_iterator(data):
    loader, twin = (Loader(data.train, batch_size=2, seq_len=8, seed=0) for _ in range(2))
    for batch, _ in zip(loader, range(3), strict=False):
        assert equal(batch, twin.next_batch())


@pytest.mark.parametrize("change", [{"seed": 1}, {"seq_len": 8}])
def test_state_of_another_run_is_refused(data, change):
    state = Loader(data.train, batch_size=2, seq_len=16, seed=0).state_dict()
    other = Loader(data.train, **({"batch_size": 2, "seq_len": 16, "seed": 0} | change))
    with pytest.raises(DataError, match=r"Resume with the corpus, tokenizer, seq_len and seed"):
        other.load_state_dict(state)


def test_state_of_other_data_or_out_of_range_is_refused(data):
    loader = Loader(data.train, batch_size=1, seq_len=8, seed=0)
    with pytest.raises(DataError, match=r"the loader's state is of"):
        loader.load_state_dict(Loader(data.val, batch_size=1, seq_len=8, seed=0).state_dict())
    with pytest.raises(DataError, match=r"position -1; expected"):
        loader.load_state_dict(loader.state_dict() | {"position": -1})


def test_evaluation_is_in_order_with_a_short_last_batch():
    batches = list(eval_batches(counting(48), batch_size=4, seq_len=8))  # 47 targets: five windows and seven more
    assert [len(b.tokens_BS) for b in batches] == [4, 1]
    assert torch.cat([b.targets_BS for b in batches]).flatten().tolist() == list(range(1, 41))


def test_capped_evaluation_takes_windows_evenly_over_the_stream():
    batches = list(eval_batches(counting(81), batch_size=2, seq_len=8, max_batches=2))
    # ten windows, four taken: 0, 10/4, 20/4, 30/4 rounded down
    assert [row[0] // 8 for b in batches for row in b.tokens_BS.tolist()] == [0, 2, 5, 7]
    assert len(list(eval_batches(counting(81), batch_size=2, seq_len=8, max_batches=99))) == 5


def test_batch_moves_to_a_device(data):
    batch = next(iter(eval_batches(data.val, batch_size=2, seq_len=8)))
    assert batch.to("meta").tokens_BS.device.type == "meta"
    assert equal(batch.to("cpu"), batch)


# ------------------------------------------------------------------------------------------------- errors


def test_too_few_tokens_says_how_many_are_needed():
    with pytest.raises(DataError, match=r"has 64 tokens; 65 are needed for 8 window\(s\) of 8"):
        Loader(counting(64), batch_size=4, seq_len=8, seed=0, world=2)
    Loader(counting(65), batch_size=4, seq_len=8, seed=0, world=2)
    with pytest.raises(DataError, match=r"has 8 tokens; 9 are needed .* larger val_fraction"):
        eval_batches(counting(8), batch_size=4, seq_len=8)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rank": 2, "world": 2}, r"rank is 2 and world is 2"),
        ({"batch_size": 0}, r"batch_size is 0"),
        ({"seq_len": 0}, r"seq_len is 0"),
        ({"seed": -1}, r"seed is -1"),
    ],
)
def test_bad_loader_arguments(arguments, match):
    with pytest.raises(DataError, match=match):
        Loader(counting(100), **({"batch_size": 2, "seq_len": 8, "seed": 0} | arguments))


def test_bad_evaluation_arguments():
    with pytest.raises(DataError, match=r"max_batches is 0"):
        eval_batches(counting(100), batch_size=2, seq_len=8, max_batches=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"val_fraction": 0.0}, r"val_fraction is 0\.0"),
        ({"val_fraction": 1.0}, r"val_fraction"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_prepare_arguments(corpus, tokenizer, tmp_path, arguments, match):
    with pytest.raises(DataError, match=match):
        prepare(corpus, tokenizer, tmp_path, **arguments)


def test_one_document_cannot_be_split(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"has 1 document\(s\) in 1 domain\(s\).*<\|endoftext\|>"):
        prepare(made_up((1,)), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
