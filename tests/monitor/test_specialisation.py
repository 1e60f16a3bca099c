"""What each expert serves: numbers by hand, counts against loops, a router that divides and one that doesn't."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from equipoise.monitor import plot_specialisation as plot
from equipoise.monitor import specialisation_counts as counted
from equipoise.monitor.specialisation import (
    DOMAIN,
    FILE_NAME,
    MAX_BYTES,
    LayerRoles,
    Roles,
    Saturation,
    Served,
    read_roles,
)
from equipoise.monitor.stats_selections import domain_specialisation, router_saturation, vocabulary_specialisation

# --------------------------------------------------------------------------------------------------- groups of tokens


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        (b" the", "word start"), (b"\tif", "word start"), (b"ing", "word continuation"), (b" The", "capitalised"),
        (b"The", "capitalised"), (b" 12", "digit"), (b"7", "digit"), (b",", "punctuation"), (b" (", "punctuation"),
        (b"'s", "punctuation"), (b"_", "code symbol"), (b" ==", "code symbol"), (b"{", "code symbol"),
        (b"  ", "white space"), (b"\t", "white space"), (b"\n", "newline"), (b" \n  ", "newline"), (b"", "control"),
        (b"\x00", "control"), ("é".encode(), "non-ASCII"), (b"\xc3", "non-ASCII"), ("naïve".encode(), "non-ASCII"),
    ],
)  # fmt: skip
def test_the_class_of_a_token(piece, name):
    assert counted.token_class(piece) == name


def test_each_byte_has_a_class():
    found = Counter(counted.token_class(bytes([byte])) for byte in range(256))
    assert set(found) <= set(counted.CLASSES)
    assert found == {
        "word continuation": 26, "capitalised": 26, "digit": 10, "punctuation": 11, "code symbol": 21, "newline": 1,
        "white space": 9, "control": 24, "non-ASCII": 128,
    }  # fmt: skip


def test_positions_double():
    assert counted.position_bucket(np.arange(17)).tolist() == [0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8, 5]
    assert counted.position_names(17) == ("0", "1", "2-3", "4-7", "8-15", "16")
    assert counted.position_names(12) == ("0", "1", "2-3", "4-7", "8-11")
    assert [counted.position_names(n) for n in (1, 2, 3)] == [("0",), ("0", "1"), ("0", "1", "2")]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 63, 64, 65, 128])
def test_each_position_has_a_name(length):
    assert int(counted.position_bucket(np.arange(length)).max()) == len(counted.position_names(length)) - 1


# -------------------------------------------------------------------------------------------------------------- counts


def random_routing(rng, num_tokens, num_experts, k):
    """(2, N) assignments, k different experts for each token; and the same as (T, K)."""
    ids_TK = rng.random((num_tokens, num_experts)).argsort(1)[:, :k]
    return np.stack([np.repeat(np.arange(num_tokens), k), ids_TK.reshape(-1)]), ids_TK


def test_counts_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    groups_T = rng.integers(0, 3, 50)
    assignments, ids_TK = random_routing(rng, 50, 7, 2)
    expected = np.zeros((3, 7), dtype=int)
    for group, ids in zip(groups_T, ids_TK, strict=True):
        for expert in ids:
            expected[group, expert] += 1
    found = counted.split(("a", "b", "c"), groups_T, assignments, 7, [])
    assert found.counts_GE.tolist() == expected.tolist()
    assert found.tokens == tuple(np.bincount(groups_T).tolist())
    np.testing.assert_allclose(found.shares_GE, domain_specialisation(ids_TK, groups_T, 7, 3), rtol=1e-6)


def test_lift_by_hand():
    """Group a has 40 tokens, 30 of them in expert 0; expert 0 has 40 of all 100. 30/40 over 40/100 = 1.875."""
    groups_T = np.array([0] * 40 + [1] * 60)
    experts_T = np.array([0] * 30 + [1] * 10 + [0] * 10 + [1] * 50)
    found = counted.split(("a", "b"), groups_T, np.stack([np.arange(100), experts_T]), 3, [])
    np.testing.assert_allclose(found.lift_GE, [[1.875, 10 / 40 / 0.6, np.nan], [10 / 60 / 0.4, 50 / 60 / 0.6, np.nan]])
    assert found.information.floor == pytest.approx(1 / 200)  # expert 2 got nothing
    joint = np.array([[0.3, 0.1], [0.1, 0.5]])
    nats = (joint * np.log(joint / np.outer([0.4, 0.6], [0.4, 0.6]))).sum()
    assert found.information.nats == pytest.approx(nats)
    assert found.information.maximum == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)))
    assert found.information.p_value == 1.0  # no control, no opinion


def test_the_floor_is_what_chance_gives():
    rng = np.random.default_rng(1)
    nats = []
    for _ in range(200):
        assignments, _ = random_routing(rng, 1000, 8, 1)
        nats.append(counted.mutual_information(counted.counts_of(rng.integers(0, 4, 1000), assignments, 4, 8)))
    assert np.mean(nats) == pytest.approx(3 * 7 / 2000, rel=0.1)


@pytest.mark.parametrize(
    ("groups", "tokens", "experts", "told"),
    [
        ([0, 2], [0, 1], [0, 1], r"groups_T: expected values in \[0, 2\), got 0 to 2"),
        ([0, 1], [0, 2], [0, 1], r"tokens of assignments: expected values in \[0, 2\), got 0 to 2"),
        ([0, 1], [0, 1], [0, -1], r"experts of assignments: expected values in \[0, 4\), got -1 to 0"),
    ],
)
def test_what_is_out_of_range_is_refused(groups, tokens, experts, told):
    with pytest.raises(ValueError, match=told):
        counted.counts_of(np.array(groups), np.array([tokens, experts]), 2, 4)


# ------------------------------------------------------------------------------------------------------------ controls


def documents(rng, num=40):
    """Documents of 50 to 150 tokens of two domains: domain by document, document by token."""
    domains_M = rng.permutation(np.arange(num) % 2)
    return domains_M, np.repeat(np.arange(num), rng.integers(50, 150, num))


def test_a_router_that_serves_a_domain_by_an_expert_is_found():
    rng = np.random.default_rng(2)
    domains_M, documents_T = documents(rng)
    domains_T = domains_M[documents_T]
    experts_T = np.where(rng.random(len(domains_T)) < 0.7, domains_T, rng.integers(0, 8, len(domains_T)))
    controls = counted.documents_swapped(domains_M, documents_T, 199, seed=0)
    found = counted.split(("a", "b"), domains_T, np.stack([np.arange(len(domains_T)), experts_T]), 8, controls)
    assert found.information.p_value == 1 / 200
    assert found.information.beyond_chance > 0.5 * found.information.maximum
    assert found.lift_GE[:, :2].argmax(axis=0).tolist() == [0, 1]


@pytest.mark.parametrize("by_document", [False, True], ids=["random", "each document its expert"])
def test_a_router_that_knows_no_domain_is_not_found(by_document):
    """Chance alone reaches 5 % in a twentieth of the texts. With tokens in place of documents swapped, it would in all
    that have an expert for each document."""
    p_values = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        domains_M, documents_T = documents(rng)
        num_tokens = len(documents_T)
        experts_T = rng.integers(0, 8, len(domains_M))[documents_T] if by_document else rng.integers(0, 8, num_tokens)
        controls = counted.documents_swapped(domains_M, documents_T, 59, seed)
        assignments = np.stack([np.arange(num_tokens), experts_T])
        p_values.append(counted.split(("a", "b"), domains_M[documents_T], assignments, 8, controls).information.p_value)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.15  # 7 of 40 and more: below 1 in 500
    assert 0.3 < np.mean(p_values) < 0.7


def test_swapped_documents_stay_whole():
    domains_M, documents_T = documents(np.random.default_rng(3))
    for labels_T in counted.documents_swapped(domains_M, documents_T, 5, seed=0):
        by_document = [set(labels_T[documents_T == m].tolist()) for m in range(len(domains_M))]
        assert {len(each) for each in by_document} == {1}
        assert sum(next(iter(each)) for each in by_document) == domains_M.sum()


def test_turned_windows_keep_their_labels_and_order():
    labels_T = np.arange(24)
    for turned in counted.windows_turned(labels_T, 6, 5, seed=0):
        for before, after in zip(labels_T.reshape(4, 6), turned.reshape(4, 6), strict=True):
            assert any(after.tolist() == np.roll(before, n).tolist() for n in range(6))
    with pytest.raises(ValueError, match="length: expected a divisor of 24, the number of tokens, got 7"):
        counted.windows_turned(labels_T, 7, 1, seed=0)


@pytest.mark.parametrize("knows", [False, True])
def test_positions_are_found_only_where_a_router_knows_them(knows):
    rng = np.random.default_rng(4)
    labels_T = counted.position_bucket(np.arange(64 * 32) % 32)
    experts_T = np.where((labels_T == 0) & knows, 3, rng.integers(0, 4, len(labels_T)))
    controls = counted.windows_turned(labels_T, 32, 199, seed=0)
    told = counted.information(labels_T, np.stack([np.arange(len(labels_T)), experts_T]), 6, 4, controls)
    assert (told.p_value <= 0.01) == knows


# ---------------------------------------------------------------------------------------------------------- vocabulary


def zipf_text(rng, num_tokens=8192, vocab=200):
    weights = 1 / np.arange(1, vocab + 1)
    return rng.choice(vocab, num_tokens, p=weights / weights.sum())


def test_words_of_an_expert_are_found_and_no_others():
    rng = np.random.default_rng(5)
    tokens_T = zipf_text(rng)
    experts_T = rng.integers(0, 8, len(tokens_T))
    mine_T = np.isin(tokens_T, [3, 17]) & (rng.random(len(tokens_T)) < 0.8)
    experts_T[mine_T] = 5
    assignments = np.stack([np.arange(len(tokens_T)), experts_T])
    found = counted.most_served(tokens_T, assignments, 8, lambda id: f"w{id}", 24)
    assert [word.id for word in found[5]] == [3, 17]
    assert [len(words) for words in found] == [0, 0, 0, 0, 0, 2, 0, 0]
    first = found[5][0]
    assert first.text == "w3"
    assert first.occurs == (tokens_T == 3).sum()
    assert first.served == ((tokens_T == 3) & (experts_T == 5)).sum()
    assert first.lift == pytest.approx(first.served / first.occurs / (experts_T == 5).mean())


def test_a_router_that_knows_no_words_serves_none():
    rng = np.random.default_rng(6)
    false = 0
    for _ in range(20):
        tokens_T = zipf_text(rng, 4096)
        assignments, _ = random_routing(rng, 4096, 8, 2)
        false += sum(map(len, counted.most_served(tokens_T, assignments, 8, str, 24)))
    assert false <= 2  # 0.2 expected: 1 % of a text


def test_shares_of_the_vocabulary_are_olmoes():
    rng = np.random.default_rng(7)
    tokens_T = zipf_text(rng, 2000, 50)
    assignments, ids_TK = random_routing(rng, 2000, 6, 2)
    found = counted.vocabulary(tokens_T, assignments, 6, counted.windows_turned(tokens_T, 20, 19, seed=0))
    expected = vocabulary_specialisation(ids_TK, tokens_T, 6, min_count=counted.MIN_OCCURRENCES)
    top = (np.asarray(expected.share_UE).max(1) * expected.counts_U).sum() / expected.counts_U.sum()
    assert found.entries == len(expected.counts_U)
    assert found.top_share == pytest.approx(float(top))
    assert found.top_share == pytest.approx(found.control_top_share, abs=0.02)  # a random router
    assert found.information.p_value > 0.01


def test_likelihood_ratio_by_hand():
    """8 of 10 where chance is a half: 2 (8 ln 1.6 + 2 ln 0.4). 2 of 10 is the same, the other way."""
    ratio = counted.likelihood_ratio(np.array([[8, 2], [10, 0], [5, 5]]), np.array([10, 10, 10]), np.array([0.5, 0.5]))
    size = 2 * (8 * math.log(1.6) + 2 * math.log(0.4))
    np.testing.assert_allclose(ratio, [[size, -size], [20 * math.log(2), -20 * math.log(2)], [0, 0]], atol=1e-12)
    assert counted.significant_ratio(1) == pytest.approx(2.3263**2, rel=1e-3)


def test_text_without_frequent_words():
    assignments = np.stack([np.arange(6), np.zeros(6, dtype=int)])
    assert counted.most_served(np.arange(6), assignments, 2, str, 5) == ((), ())
    found = counted.vocabulary(np.arange(6), assignments, 2, [])
    assert (found.entries, found.top_share, found.information.nats) == (0, 0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------- saturation


def test_overlap_is_router_saturation():
    rng = np.random.default_rng(8)
    (early, early_TK), (late, late_TK) = (random_routing(rng, 300, 8, 3) for _ in range(2))
    assert counted.overlap(early, late, 8) == pytest.approx(float(router_saturation(early_TK, late_TK)))
    assert counted.overlap(late[:, ::-1], late, 8) == 1.0
    assert counted.overlap_by_chance(early, late, 300, 8) == pytest.approx(3 / 8, abs=0.01)
    assert counted.overlap(early, late, 8) == pytest.approx(counted.overlap_by_chance(early, late, 300, 8), abs=0.06)


def test_overlap_where_tokens_have_different_numbers_of_experts():
    early, late = np.array([[0, 0, 1], [0, 1, 2]]), np.array([[0, 1, 1, 2], [1, 2, 0, 0]])
    assert counted.overlap(early, late, 3) == 0.5
    assert counted.overlap(early, early[:, :0], 3) == 1.0


# --------------------------------------------------------------------------------------------- the record and its file


def make_roles(num_layers=2, num_experts=4, words=("the", " $x_i$", "\\frac{1")):
    rng = np.random.default_rng(9)
    domains_M, documents_T = documents(rng)
    assignments, _ = random_routing(rng, len(documents_T), num_experts, 2)
    found = counted.split(("python", "verse"), domains_M[documents_T], assignments, num_experts, [])
    layers = tuple(
        LayerRoles(
            layer=f"layers.{i}.mlp",
            num_tokens=len(documents_T),
            load=tuple(np.bincount(assignments[1], minlength=num_experts).tolist()),
            splits={DOMAIN: found},
            vocabulary=counted.vocabulary(documents_T, assignments, num_experts, []),
            tokens=tuple(
                tuple(Served(i, word, 40 - 9 * i, 60, 1.5 + i) for i, word in enumerate(words)) if expert else ()
                for expert in range(num_experts)
            ),
        )
        for i in range(num_layers)
    )
    curves = [{layer.layer: (value, last) for layer in layers} for value, last in ((0.6, 1.0), (0.5, 0.5))]
    return Roles(20, "a text", len(documents_T), 40, 32, layers, Saturation((10, 20), *curves), ("a note",))


def test_the_file_gives_back_what_was_written(tmp_path):
    roles = make_roles()
    assert read_roles(tmp_path) is None
    (tmp_path / FILE_NAME).write_bytes(roles.to_json())
    back = read_roles(tmp_path)
    assert back.to_json() == roles.to_json()
    assert (back.layers[0].tokens, back.layers[0].load) == (roles.layers[0].tokens, roles.layers[0].load)
    assert math.isnan(back.layers[0].vocabulary.control_top_share)  # unknown stays unknown


def damaged(change):
    record = json.loads(make_roles().to_json())
    change(record)
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"{", "no record of specialisation"),
        (b"[]", "no record of specialisation"),
        (b"[" * 100_000, "no record of specialisation"),
        (damaged(lambda r: r.update(format="x")), "its format is 'x', expected 'equipoise specialisation 1'"),
        (damaged(lambda r: r.pop("layers")), "layers"),
        (damaged(lambda r: r["layers"][0]["splits"]["domain"]["counts"].pop()), "expected 2 rows of 4 experts"),
        (damaged(lambda r: r["layers"][0]["tokens"].pop()), "tokens of 3 experts, expected 4"),
        (damaged(lambda r: r["saturation"]["steps"].pop()), "expected 1 numbers for each layer"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, data, told):
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(ValueError, match="make it anew with equipoise specialise") as error:
        read_roles(tmp_path)
    assert told in str(error.value)
    assert FILE_NAME in str(error.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / FILE_NAME).open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="more than 67,108,864 bytes"):
        read_roles(tmp_path)


def test_layers_count_together():
    """One layer at p = 0.03 is beyond chance where there is one, and is not among two."""

    def with_p(roles, p):
        found = roles.layers[0].splits[DOMAIN]
        split = replace(found, information=replace(found.information, p_value=p))
        return replace(roles, layers=(replace(roles.layers[0], splits={DOMAIN: split}), *roles.layers[1:]))

    assert with_p(make_roles(num_layers=1), 0.03).found(DOMAIN) == ("layers.0.mlp",)
    assert with_p(make_roles(num_layers=2), 0.03).found(DOMAIN) == ()


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_are_drawn(tmp_path):
    roles = make_roles(num_layers=8, num_experts=40)
    for path in (
        plot.draw_maps(roles, tmp_path / "maps.png"),
        plot.draw_cloud(roles.layers[0], tmp_path / "cloud.png"),
        plot.draw_saturation(roles, tmp_path / "saturation.png"),
    ):
        image = imread(path)[..., :3]
        assert image.std() > 0.02, f"{path} is empty"
    assert [layer.layer for layer in plot.spread(roles.layers, 3)] == ["layers.0.mlp", "layers.4.mlp", "layers.7.mlp"]


def test_words_fit_into_their_card():
    words = [Served(i, "w" * (1 + i % 20), 100 - i, 200, 2.0) for i in range(60)]
    placed = list(plot.flow(words, 200.0, 100.0))
    assert 5 < len(placed) < 60
    for i, (word, x, y, size) in enumerate(placed):
        width = plot.LETTER * size * len(plot.printed(word))
        assert x == 0 or x + width <= 200
        assert y + size <= 100
        for _, x2, y2, _ in placed[i + 1 :]:
            assert y2 >= y + 1.25 * size or x2 >= x + width, "two words lie over each other"
