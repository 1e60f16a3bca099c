"""The collapse detector: silent on fair routers whatever the sample, loud on real collapse."""

import numpy as np
import pytest

from equipoise.monitor.detectors import CollapseDetector, fair_token_share, layers_without_opinion
from equipoise.monitor.stats import RoutingSums, routing_stats

DETECT = CollapseDetector()


def record(counts_E, num_tokens, layer="blocks.0.moe"):
    counts_E = np.asarray(counts_E, dtype=np.int64)
    probs_sum_E = counts_E * (num_tokens / max(counts_E.sum(), 1))
    return routing_stats(layer, 100, RoutingSums(num_tokens, counts_E, probs_sum_E, 0.0, 0.0, 0.0, 0.0, {}, {}))


def route(rng, weights_E, top_k, num_tokens):
    """Counts of `num_tokens` tokens that each pick `top_k` distinct experts with these odds (Gumbel top-k)."""
    with np.errstate(divide="ignore"):
        keys_TE = np.log(weights_E) + rng.gumbel(size=(num_tokens, len(weights_E)))
    chosen_TK = np.argpartition(-keys_TE, top_k - 1, axis=1)[:, :top_k]
    return np.bincount(chosen_TK.reshape(-1), minlength=len(weights_E))


SHAPES = [(num_experts, top_k) for num_experts in (8, 16, 64, 256) for top_k in (1, 2, 8)]
CAN_COLLAPSE = [(num_experts, top_k) for num_experts, top_k in SHAPES if top_k < num_experts]


class TestSimulated:
    @pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
    def test_a_fair_router_never_alarms(self, num_experts, top_k):
        rng = np.random.default_rng(0)
        for expected in (1, 20, 99, 100, 130):
            num_tokens = -(-expected * num_experts // top_k)
            for _ in range(8):
                counts_E = route(rng, np.ones(num_experts), top_k, num_tokens)
                assert DETECT([record(counts_E, num_tokens)]) == []

    @pytest.mark.parametrize("num_experts", [8, 16, 64, 256])
    def test_a_fair_multinomial_never_alarms_in_a_thousand_windows(self, num_experts):
        fair = np.full(num_experts, 1 / num_experts)
        for counts_E in np.random.default_rng(2).multinomial(100 * num_experts, fair, size=1000):
            assert DETECT([record(counts_E, 100 * num_experts)]) == []

    @pytest.mark.parametrize("num_hot", [1, 2])
    @pytest.mark.parametrize(("num_experts", "top_k"), CAN_COLLAPSE)
    def test_collapse_is_always_found(self, num_experts, top_k, num_hot):
        rng = np.random.default_rng(1)
        num_tokens = -(-110 * num_experts // top_k)
        for seed in range(5):
            weights_E = np.full(num_experts, 1e-5)  # the rest shares the leftover slots evenly
            hot = (seed * 3 + np.arange(num_hot)) % num_experts
            weights_E[hot] = 1.0
            first, *rest = DETECT([record(route(rng, weights_E, top_k, num_tokens), num_tokens)])
            assert (first.rule, first.severity) == ("collapse", "critical")
            assert first.expert in hot
            assert all(finding.rule == "dead_experts" for finding in rest)

    @pytest.mark.parametrize(("num_experts", "top_k"), CAN_COLLAPSE)
    def test_a_partial_collapse_is_found(self, num_experts, top_k):
        """Three quarters of what an expert could take beyond its fair share go to it."""
        num_tokens, fair = 200 * num_experts, top_k / num_experts
        hot = int((fair + 0.75 * (1 - fair)) * num_tokens)
        counts_E = np.full(num_experts, (num_tokens * top_k - hot) // (num_experts - 1))
        counts_E[3] = hot
        assert [(f.rule, f.expert) for f in DETECT([record(counts_E, num_tokens)])] == [("collapse", 3)]


def test_k_equal_to_e_never_alarms():
    assert DETECT([record(np.full(8, 10_000), 10_000)]) == []


def test_k_close_to_e_never_alarms_for_its_busiest_expert():
    # K = 7 of 8: expert 0 in every token is 8/7 of its share, which is no collapse
    assert DETECT([record([7000] + [6000] * 7, 7000)]) == []


def test_too_few_tokens_give_no_opinion():
    few = record([792, 0, 0, 0, 0, 0, 0, 0], 792)  # 99 expected each
    enough = record([800, 0, 0, 0, 0, 0, 0, 0], 800)
    assert DETECT([few]) == []
    assert [finding.rule for finding in DETECT([enough])] == ["collapse", "dead_experts"]
    assert layers_without_opinion([few]) == {"blocks.0.moe"}
    assert layers_without_opinion([enough]) == set()


def test_an_empty_window_gives_no_opinion():
    assert DETECT([]) == []
    assert DETECT([record(np.zeros(8), 0)]) == []
    assert fair_token_share(record(np.zeros(8), 0)) == 0.0


def test_the_finding_says_who_takes_what():
    (finding, _) = DETECT([record([10, 10, 10, 1920, 10, 10, 10, 20], 2000)])
    assert finding.expert == 3
    assert (finding.value, finding.layer) == (0.96, "blocks.0.moe")
    # fair is 1/8; halfway to 1 is 0.5625; plus 1/8 * sqrt(2 ln 8 / 250) * sqrt(7/8) = 0.0151
    assert finding.threshold == pytest.approx(0.5776, abs=1e-4)
    assert finding.message == (
        "blocks.0.moe has collapsed: expert 3 takes 96.0% of the tokens, fair is 12.5%; 1.3 effective experts of 8"
    )
    assert "quantile bias" in finding.remedy


def test_half_of_the_experts_without_a_hot_one_is_collapse():
    (finding, dead) = DETECT([record([500, 500, 500, 0, 0, 0, 0, 0], 1500)])
    assert (finding.rule, finding.value, finding.threshold) == ("collapse", pytest.approx(3 / 8), 0.5)
    assert "5 of 8 experts" in dead.message


def test_dead_experts_are_named():
    (finding,) = DETECT([record([0, 300, 300, 300, 3, 300, 300, 300], 1803)])
    assert (finding.rule, finding.severity, finding.expert, finding.value) == ("dead_experts", "warning", None, 2.0)
    assert finding.message.endswith("2 of 8 experts get less than a tenth of their fair load: 0, 4")


def test_many_dead_experts_are_counted_not_listed():
    counts_E = np.full(64, 400)
    counts_E[:20] = 0
    (finding,) = DETECT([record(counts_E, 44 * 400)])
    assert finding.message.endswith("20 of 64 experts get less than a tenth of their fair load: "
                                    "0, 1, 2, 3, 4, 5, 6, 7 and 12 more")  # fmt: skip


def test_collapsed_layers_come_before_dead_experts():
    window = [
        record([0, 300, 300, 300, 300, 300, 300, 300], 2100, "a"),
        record([2100, 0, 0, 0, 0, 0, 0, 0], 2100, "b"),
        record([300] * 8, 2400, "c"),
    ]
    assert [(f.rule, f.layer) for f in DETECT(window)] == [
        ("collapse", "b"),
        ("dead_experts", "a"),
        ("dead_experts", "b"),
    ]


@pytest.mark.parametrize(
    ("name", "value"), [("min_expected", 0), ("effective_ratio", 1.0), ("hot_excess", -0.1), ("hot_load", 1.0)]
)
def test_thresholds_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected a number between .* got {value}"):
        CollapseDetector(**{name: value})


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(
        ValueError, match=rf"false_alarms: expected a probability per window between 0 and 1, got {rate}"
    ):
        CollapseDetector(false_alarms=rate)


def test_fewer_assignments_take_a_clearer_collapse():
    """Eight experts are nine opinions, ln(9 / 1e-6) = 16.0 nats; those of sixteen layers need ln(144 / 1e-6) = 18.8."""
    detect = CollapseDetector(min_expected=1.0)
    few = record([9, 0, 1, 0, 0, 0, 1, 0], 11)  # 11 (0.818 ln 6.545 + 0.182 ln 0.208) = 13.8 nats
    clear = record([11, 0, 1, 0, 0, 0, 1, 0], 13)  # 13 (0.846 ln 6.769 + 0.154 ln 0.176) = 17.6 nats
    assert detect([few]) == []
    assert [finding.rule for finding in detect([clear])] == ["collapse"]
    assert detect([clear] * 16) == []
    assert len(detect([clear] * 2)) == 2  # ln(18 / 1e-6) = 16.7


def test_a_load_on_few_experts_must_be_more_than_chance_too():
    """Half of E experts with one assignment each are what chance does with few; with many it is a collapse."""
    detect = CollapseDetector(min_expected=0.1)
    few, many = [1] * 30 + [0] * 34, [10] * 30 + [0] * 34
    assert detect([record(few, 30)]) == []
    assert [finding.rule for finding in detect([record(many, 300)])] == ["collapse"]
