"""Recorded routing: each format written here, and the counts that come back against a count token by token."""

import base64
import io
import json
import math

import numpy as np
import pytest
import torch

from equipoise.monitor.recorded import diagnose
from equipoise.monitor.recorded_files import Layout, decode_routed_experts

T, L, E, K = 600, 3, 16, 4


def random_ids(num_tokens=T, seed=0, dead=()):
    """Distinct ids in each row; expert 0 is busier than the others, the last ones may be dead."""
    wish = np.random.default_rng(seed).random((num_tokens, L, E))
    wish[..., 0] += 0.3
    wish[..., list(dead)] = -1
    return np.argsort(-wish, axis=-1)[..., :K].astype(np.int32)


def brute_force(ids):
    """counts[layer][expert], one assignment after the other."""
    counts = [[0] * E for _ in range(ids.shape[1])]
    for token in ids:
        for layer, experts in enumerate(token):
            for expert in experts:
                counts[layer][expert] += 1
    return counts


def b64(data):
    return base64.b64encode(data).decode()


def as_npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def as_flat_int32(array):
    return array.astype("<i4").tobytes()


def write_npy(path, ids):
    np.save(path, ids)


def write_npz(path, ids):
    np.savez(path, indices=ids)


def write_under_name(path, save, array):
    """NumPy adds its own ending to a name, but not to an open file."""
    with path.open("wb") as file:
        save(file, array)


def write_npz_compressed(path, ids):
    np.savez_compressed(path, indices=ids.astype(np.uint8))


def write_counts(path, ids):
    np.savez(path, counts=np.array(brute_force(ids)))


def write_counts_with_tokens(path, ids):
    np.savez(path, counts=np.array(brute_force(ids)), num_tokens=len(ids))


def write_vllm(path, ids):
    """Prompt and completion apart, the first as a list, the second as base64 of a .npy file."""
    answer = {
        "prompt_routed_experts": ids[:100].tolist(),
        "choices": [{"routed_experts": b64(as_npy_bytes(ids[100:]))}],
    }
    path.write_text(json.dumps(answer))


def write_sglang(path, ids):
    """A list of answers, base64 of int32 without a shape; one answer has none."""
    answers = [
        {"text": "…", "meta_info": {"routed_experts": b64(as_flat_int32(part))}} for part in (ids[:250], ids[250:])
    ]
    path.write_text(json.dumps([*answers, {"meta_info": {"routed_experts": None}}]))


def write_lines(path, ids):
    answers = [{"sgl_ext": {"routed_experts": b64(as_flat_int32(part))}} for part in np.array_split(ids, 7)]
    path.write_text(
        "\n".join(json.dumps({**answer, "text": "a\u2028b"}, ensure_ascii=False) for answer in answers) + "\n"
    )


def write_tensor(path, ids):
    torch.save(torch.as_tensor(ids), path)


def write_distribution(path, ids):
    """SGLang's recorder in mode stat: a step per row, steps without a pass are zero."""
    steps = [torch.tensor(brute_force(part), dtype=torch.int32) for part in np.array_split(ids, 5)]
    counts = torch.stack([*steps, torch.zeros(L, E, dtype=torch.int32)])
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path)


def write_parquet(path, ids):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    tokens, layers, _ = np.indices(ids.shape)
    order = np.random.default_rng(1).permutation(ids.size)  # rows of a table have no order
    columns = {"token": tokens, "layer": layers, "expert": ids}
    table = {name: column.reshape(-1)[order] for name, column in columns.items()}
    parquet.write_table(arrow.table(table), path)


FORMATS = {
    "npy": ("x.npy", write_npy, {"num_experts": E}),
    "npz": ("x.npz", write_npz, {"num_experts": E, "top_k": K, "num_layers": L}),
    "npz, uint8": ("x.npz", write_npz_compressed, {"num_experts": E}),
    "counts": ("x.npz", write_counts, {"top_k": K}),
    "counts and tokens": ("x.npz", write_counts_with_tokens, {}),
    "vLLM": ("x.json", write_vllm, {"num_experts": E}),
    "SGLang": ("x.json", write_sglang, {"num_experts": E, "top_k": K, "num_layers": L}),
    "a line per answer": ("x.jsonl", write_lines, {"num_experts": E, "top_k": K, "num_layers": L}),
    "tensor": ("x.pt", write_tensor, {"num_experts": E}),
    "SGLang's distribution": ("x.pt", write_distribution, {"top_k": K, "num_experts": E}),
    "parquet": ("x.parquet", write_parquet, {"num_experts": E}),
}


@pytest.mark.parametrize("name", FORMATS)
class TestFormats:
    def test_counts_are_exact(self, name, tmp_path):
        file, write, options = FORMATS[name]
        ids = random_ids()
        write(tmp_path / file, ids)
        found = diagnose(tmp_path / file, **options)
        assert [stats.layer for stats in found.stats] == ["layers.0", "layers.1", "layers.2"]
        assert [stats.counts_E.tolist() for stats in found.stats] == brute_force(ids)
        assert all(stats.counts_E.dtype == np.int64 for stats in found.stats)
        assert [stats.num_tokens for stats in found.stats] == [T] * L
        for stats, counts in zip(found.stats, brute_force(ids), strict=True):
            assert stats.max_token_share == pytest.approx(max(counts) / T)
            assert stats.max_violation == pytest.approx(max(counts) / (T * K / E) - 1)
            for unknown in ("logit_mean", "logit_std", "logit_logsumexp", "token_entropy", "mutual_information"):
                assert math.isnan(getattr(stats, unknown)), unknown
        assert (found.findings, found.without_opinion) == ((), frozenset())
        assert (found.num_ignored, found.num_repeated, found.skipped_layers) == ({}, 0, ())

    def test_the_detectors_see_trailing_dead_experts(self, name, tmp_path):
        file, write, options = FORMATS[name]
        write(tmp_path / file, random_ids(dead=(14, 15)))
        found = diagnose(tmp_path / file, **options)
        assert [finding.rule for finding in found.findings] == ["dead_experts"] * L
        assert found.stats[0].dead_experts == (14, 15)
        assert found.stats[0].min_load == 0.0

    def test_the_detectors_see_a_collapse(self, name, tmp_path):
        file, write, options = FORMATS[name]
        ids = random_ids()
        ids[:, 1] = np.arange(K)
        write(tmp_path / file, ids)
        found = diagnose(tmp_path / file, **options)
        assert [(f.rule, f.layer) for f in found.findings if f.rule == "collapse"] == [("collapse", "layers.1")]


def test_a_few_tokens_are_no_opinion(tmp_path):
    write_npy(tmp_path / "x.npy", random_ids(10, dead=(15,)))
    found = diagnose(tmp_path / "x.npy", num_experts=E)
    assert (found.findings, found.without_opinion) == ((), {"layers.0", "layers.1", "layers.2"})


def test_one_layer_needs_no_axis_and_other_detectors_may_judge(tmp_path):
    ids = random_ids()[:, 0]
    np.savez(tmp_path / "x.npz", indices=ids)
    seen = []
    found = diagnose(tmp_path / "x.npz", num_experts=E, detectors=[lambda window: seen.extend(window) or []])
    assert found.stats[0].counts_E.tolist() == brute_force(ids[:, None])[0]
    assert seen == list(found.stats)
    np.savez(tmp_path / "y.npz", counts=found.stats[0].counts_E)
    assert diagnose(tmp_path / "y.npz", top_k=K).stats[0].num_tokens == T


def test_masked_tokens_do_not_count(tmp_path):
    ids, mask = random_ids(), np.random.default_rng(2).random(T) < 0.6
    padded = np.where(mask[:, None, None], ids, 255)
    np.savez(tmp_path / "x.npz", indices=padded, mask=mask)
    found = diagnose(tmp_path / "x.npz", num_experts=E)
    assert [stats.counts_E.tolist() for stats in found.stats] == brute_force(ids[mask])
    assert found.stats[0].num_tokens == mask.sum()
    assert found.num_ignored == {}


class TestFillers:
    def test_slots_of_shared_experts_are_refused_or_left_out_and_counted(self, tmp_path):
        ids = random_ids()
        filled = np.concatenate([ids, np.full((T, L, 2), 255)], axis=-1)  # two slots of 255 in each row
        write_npy(tmp_path / "x.npy", filled)
        with pytest.raises(
            ValueError, match=r"ids of layer 0: expected values in \[0, 16\), got 255 \(1200 times\); if"
        ):
            diagnose(tmp_path / "x.npy", num_experts=E)
        found = diagnose(tmp_path / "x.npy", num_experts=E, ignore_ids=(255,))
        assert [stats.counts_E.tolist() for stats in found.stats] == brute_force(ids)
        assert found.stats[0].num_tokens == T
        assert found.num_ignored == {255: 2 * T * L}

    def test_a_token_with_fillers_only_is_none(self, tmp_path):
        ids = random_ids()
        ids[:50] = -1
        ids[50:60, 0, 3] = -1  # these have three experts left in layer 0
        write_npz(tmp_path / "x.npz", ids)
        found = diagnose(tmp_path / "x.npz", num_experts=E, ignore_ids=(-1, 255))
        assert found.stats[1].counts_E.tolist() == brute_force(ids[50:])[1]
        assert [stats.num_tokens for stats in found.stats] == [T - 50] * L
        assert [int(stats.counts_E.sum()) for stats in found.stats] == [550 * K - 10, 550 * K, 550 * K]
        assert found.num_ignored == {-1: 50 * K * L + 10}

    def test_a_filler_may_not_hide_an_expert(self, tmp_path):
        write_npy(tmp_path / "x.npy", random_ids())
        with pytest.raises(ValueError, match=r"ignore_ids: 15 would hide real experts, there are 16; cut the slots"):
            diagnose(tmp_path / "x.npy", num_experts=E, ignore_ids=(-1, 15))

    def test_too_small_a_number_of_experts_is_noticed(self, tmp_path):
        write_npy(tmp_path / "x.npy", random_ids())
        with pytest.raises(ValueError, match=r"expected values in \[0, 12\), got .*raise num_experts"):
            diagnose(tmp_path / "x.npy", num_experts=12, ignore_ids=(-1,))

    def test_rows_of_zeros_are_refused_or_left_out_and_counted(self, tmp_path):
        ids = random_ids()
        ids[-7:] = 0
        write_npy(tmp_path / "x.npy", ids)
        with pytest.raises(ValueError, match=r"layer 0: 7 tokens name an expert twice, and so it is in 3 of 3 layers"):
            diagnose(tmp_path / "x.npy", num_experts=E)
        found = diagnose(tmp_path / "x.npy", num_experts=E, drop_repeated=True)
        assert [stats.counts_E.tolist() for stats in found.stats] == brute_force(ids[:-7])
        assert (found.stats[0].num_tokens, found.num_repeated) == (T - 7, 7 * L)

    @pytest.mark.parametrize("filler", [0, -1])
    def test_layers_that_were_not_recorded_are_named_and_can_be_skipped(self, tmp_path, filler):
        ids = random_ids()
        ids[:, (0, 2)] = filler
        write_npy(tmp_path / "x.npy", ids)
        with pytest.raises(ValueError, match=r"layers 0, 2: no token names K different experts, .* with skip_layers"):
            diagnose(tmp_path / "x.npy", num_experts=E, ignore_ids=(-1,))
        found = diagnose(tmp_path / "x.npy", num_experts=E, skip_layers=(0, 2))
        assert [stats.layer for stats in found.stats] == ["layers.1"]
        assert found.stats[0].counts_E.tolist() == brute_force(ids[:, 1:2])[0]
        assert found.skipped_layers == (0, 2)

    def test_layers_of_counts_can_be_skipped_too(self, tmp_path):
        counts = np.array(brute_force(random_ids()))
        counts[0] = 0
        np.savez(tmp_path / "x.npz", counts=counts)
        with pytest.raises(ValueError, match=r"layers 0: no token"):
            diagnose(tmp_path / "x.npz", top_k=K)
        assert len(diagnose(tmp_path / "x.npz", top_k=K, skip_layers=[0]).stats) == 2
        with pytest.raises(ValueError, match=r"skip_layers: the file has layers 0, 1, 2, but not 3"):
            diagnose(tmp_path / "x.npz", top_k=K, skip_layers=[0, 3])
        with pytest.raises(ValueError, match=r"skip_layers: no layer is left"):
            diagnose(tmp_path / "x.npz", top_k=K, skip_layers=[0, 1, 2])

    def test_a_table_has_the_same_fillers(self, tmp_path):
        ids = random_ids()
        ids[:5, 0, 3], ids[9, 1] = -1, 0
        write_parquet(tmp_path / "x.parquet", ids)
        found = diagnose(tmp_path / "x.parquet", num_experts=E, ignore_ids=[-1], drop_repeated=True)
        assert (found.num_ignored, found.num_repeated) == ({-1: 5}, 1)
        assert [stats.num_tokens for stats in found.stats] == [T, T - 1, T]
        assert found.stats[2].counts_E.tolist() == brute_force(ids)[2]


class Bomb:
    """What a pickle would run."""

    def __reduce__(self):
        return (print, ("this must not run",))


class TestRefusals:
    @pytest.mark.parametrize(
        ("file", "write", "options", "message"),
        [
            (
                "x.npy",
                lambda p: np.save(p, random_ids()),
                {},
                r"num_experts: needed with recorded expert ids, got None",
            ),
            (
                "x.npy",
                lambda p: np.save(p, random_ids()),
                {"num_experts": 0},
                r"num_experts: expected at least 1, got 0",
            ),
            (
                "x.npy",
                lambda p: np.save(p, random_ids()),
                {"num_experts": E, "top_k": 2},
                r"expected top_k = 2, got .*\(600,",
            ),
            (
                "x.npy",
                lambda p: np.save(p, random_ids()),
                {"num_experts": E, "num_layers": 2},
                r"expected num_layers = 2",
            ),
            ("x.npy", lambda p: np.save(p, random_ids() * 1.0), {"num_experts": E}, r"expected integers, got float64"),
            (
                "x.npy",
                lambda p: np.save(p, np.zeros(3, int)),
                {"num_experts": E},
                r"\(tokens, layers, k\) or .* got \(3,\)",
            ),
            ("x.npy", lambda p: p.write_bytes(b"no array"), {"num_experts": E}, r"cannot be read as NumPy arrays"),
            (
                "x.npy",
                lambda p: write_under_name(p, np.savez, 1),
                {"num_experts": E},
                r"one array \(\.npy\), got an archive",
            ),
            (
                "x.npz",
                lambda p: write_under_name(p, np.save, 1),
                {"num_experts": E},
                r"an archive of arrays \(\.npz\), got one",
            ),
            ("x.npz", lambda p: p.write_bytes(b"PK\x03\x04"), {"num_experts": E}, r"cannot be read as NumPy arrays"),
            ("x.npz", lambda p: np.savez(p, a=1, b=2), {"num_experts": E}, r"named indices or counts, got a, b"),
            (
                "x.npz",
                lambda p: np.savez(p, indices=random_ids(), mask=[1, 0]),
                {"num_experts": E},
                r"a mask of 600 zeros",
            ),
            ("x.npz", lambda p: np.savez(p, counts=[[4, 4]]), {}, r"top_k: needed with recorded counts, got None"),
            ("x.npz", lambda p: np.savez(p, counts=[[4, 5]]), {"top_k": 2}, r"got 2, but layer 0 has 9; check top_k"),
            (
                "x.npz",
                lambda p: np.savez(p, counts=[[6, 2]]),
                {"top_k": 2},
                r"expert 0 has 6 assignments, .* only 4 tokens",
            ),
            ("x.npz", lambda p: np.savez(p, counts=[[6, -2]]), {"top_k": 2}, r"\(layers, experts\), none negative"),
            ("x.npz", lambda p: np.savez(p, counts=[[4, 4]]), {"num_experts": 3}, r"the file counts 2 experts, got 3"),
            (
                "x.npz",
                lambda p: np.savez(p, counts=[[4, 4]], num_tokens=[4, 4]),
                {},
                r"for each of 1 layers, got shape \(2",
            ),
            ("x.json", lambda p: p.write_text("{"), {"num_experts": E}, r"this is no JSON"),
            (
                "x.json",
                lambda p: p.write_text("{}"),
                {"num_experts": E},
                r"expected routed_experts or .* found neither; ask",
            ),
            ("x.pt", lambda p: p.write_bytes(b"no tensors"), {"num_experts": E}, r"cannot be read as plain tensors"),
            (
                "x.pt",
                lambda p: torch.save({"records": []}, p),
                {"num_experts": E},
                r"got records; record with --expert-dist",
            ),
            ("x.pt", lambda p: torch.save([1], p), {"num_experts": E}, r"expected a tensor of ids, .* got list"),
            ("x.pt", lambda p: torch.save(torch.ones(4, 2), p), {"num_experts": E}, r"expected integers, got float64"),
            ("x.csv", lambda p: p.write_text(""), {}, r"ends in .npy, .npz, .json, .jsonl, .pt, .parquet, got '.csv'"),
            ("x.npy", lambda p: None, {}, r"x.npy: there is no such file; check the path"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path, file, write, options, message):
        write(tmp_path / file)
        with pytest.raises(ValueError, match=message):
            diagnose(tmp_path / file, **options)

    @pytest.mark.parametrize(
        ("payload", "message"),
        [
            ([[[1], [1, 2]]], r"as many ids for every token and layer, got a ragged list"),
            ({"data": ""}, r"expected a list or base64, got dict"),
            ("not base64!", r"expected a list or base64, got str"),
            (b64(as_flat_int32(random_ids(3))), r"these ids come without a shape; pass num_layers and top_k"),
            (b64(as_npy_bytes(np.array([Bomb()], dtype=object))), r"routed_experts: cannot be read as NumPy arrays"),
        ],
    )
    def test_of_an_answer(self, payload, message, capsys):
        with pytest.raises(ValueError, match=message):
            decode_routed_experts(payload, Layout())
        assert capsys.readouterr().out == ""

    def test_a_wrong_layout_of_an_answer(self):
        payload = b64(as_flat_int32(random_ids(5)))  # 5 * 3 * 4 ids
        with pytest.raises(
            ValueError, match=r"a multiple of 64 bytes, int32 for 4 layers and top_k 4, got 240; check num"
        ):
            decode_routed_experts(payload, Layout(4, 4))
        assert decode_routed_experts(payload, Layout(3, 4)).tolist() == random_ids(5).tolist()

    def test_a_table_without_the_columns(self, tmp_path):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "x.parquet"
        for table, message in (
            ({"token": [1], "expert": [0]}, r"expected columns token, layer, expert, got token, expert"),
            ({"token": [1, 2], "layer": [0, None], "expert": [0, 0]}, r"numbers in column layer, got 1 nulls"),
            ({"token": [1], "layer": [0], "expert": ["a"]}, r"column expert: expected integers, got object"),
        ):
            parquet.write_table(arrow.table(table), path)
            with pytest.raises(ValueError, match=message):
                diagnose(path, num_experts=E)
        path.write_bytes(b"no table")
        with pytest.raises(ValueError, match=r"cannot be read as a table"):
            diagnose(path, num_experts=E)

    @pytest.mark.parametrize(
        ("file", "write"),
        [
            ("x.npy", lambda p: np.save(p, np.array([Bomb()], dtype=object), allow_pickle=True)),
            ("x.npz", lambda p: np.savez(p, indices=np.array([Bomb()], dtype=object))),
            ("x.pt", lambda p: torch.save({"logical_count": Bomb()}, p)),
        ],
    )
    def test_nothing_in_a_file_is_run(self, tmp_path, file, write, capsys):
        write(tmp_path / file)
        with pytest.raises(ValueError, match=r"cannot be read as"):
            diagnose(tmp_path / file, num_experts=E)
        assert capsys.readouterr().out == ""
