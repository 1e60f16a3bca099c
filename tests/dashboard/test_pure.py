"""What needs no server: finding runs, incidents as stories, health in a word, colours, options of charts."""

from __future__ import annotations

import base64
import itertools
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.dashboard import stores
from tests.dashboard.stores import collapse, page_for, record, window, write_ladder, write_run

from equipoise.dashboard import charts, co_selection_panel, reader
from equipoise.dashboard.health import health, lasted, subject
from equipoise.dashboard.layer_panel import drop_curves
from equipoise.dashboard.page_compare import worst_over_time
from equipoise.dashboard.page_run import even_reading, last_repair
from equipoise.dashboard.page_runs import spark_path
from equipoise.dashboard.palette import DARK, LIGHT, THEMES, css, heat_value
from equipoise.dashboard.records import Evenness, ExpertTimes, Frame, Series, Together
from equipoise.dashboard.runs import check_paths, find_runs, run_ref
from equipoise.dashboard.story import CROWD, MARKS, offsets, story_of
from equipoise.dashboard.timeline import incident_address, summary
from equipoise.dashboard.words import age, number, percent
from equipoise.monitor.incidents import Incident, incidents, repairs
from equipoise.monitor.store import RunStore, StoreError
from equipoise.types import Action, CoSelection

HOSTILE = "<script>alert(1)</script>"


class TestFindingRuns:
    def test_a_run_a_file_and_folders_of_runs(self, tmp_path):
        for place in ("one", "many/b", "many/a", "sweep/cells/c"):
            RunStore(tmp_path / place).close()
        RunStore(tmp_path / "single.sqlite").close()
        (tmp_path / "many" / "notes.txt").write_text("no run")
        paths = [tmp_path / "one", tmp_path / "single.sqlite", tmp_path / "many", tmp_path / "sweep"]
        assert [ref.label for ref in find_runs(paths)] == ["one", "single", "a", "b", "c"]
        assert [ref.label for ref in find_runs([tmp_path / "one", tmp_path / "one"])] == ["one"]

    def test_names_in_addresses_are_plain_stable_and_different(self, tmp_path):
        first, second = run_ref(tmp_path / "x" / HOSTILE.replace("/", "")), run_ref(tmp_path / "y" / "<script>")
        assert set(first.id) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert first.id != run_ref(tmp_path / "z" / HOSTILE.replace("/", "")).id
        assert second == run_ref(tmp_path / "y" / "<script>")

    def test_a_name_that_is_no_text(self, tmp_path):
        folder = os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")
        RunStore(folder).close()
        (ref,) = find_runs([tmp_path])
        assert ref.label == "run-?"

    def test_nothing_to_look_at(self, tmp_path):
        with pytest.raises(ValueError, match="runs: expected at least one run folder"):
            check_paths([])
        with pytest.raises(ValueError, match=r"runs: .*gone does not exist; name a run folder"):
            check_paths([tmp_path / "gone"])
        assert find_runs([tmp_path]) == []  # runs may come


class TestIncidents:
    def test_sentences(self):
        (incident,) = incidents([collapse("a", "firing", 20, since=10)], [])
        assert lasted(incident, 50) == "since step 10, firing for 30 steps"
        assert lasted(replace(incident, resolved=40), 50) == "since step 10, fired at 20, resolved at 40"
        assert subject(incident) == "collapse in a, expert 5"

    def test_the_address_keeps_hostile_keys_apart(self):
        finding = collapse("a", "firing", 20, since=10).finding
        incident = Incident("<a>&since=1#:collapse", 10, 20, None, finding, ())
        address = incident_address(run_ref_of("x"), incident)
        assert address.endswith("/incident?key=%3Ca%3E%26since%3D1%23%3Acollapse&since=10")


def run_ref_of(name):
    return run_ref(Path("/nowhere") / name)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """The incidents of the run of `write_ladder`, by (rule, since), and its repairs."""
    path = write_ladder(tmp_path_factory.mktemp("ladder"))
    with reader.reading(path) as db:
        actions = reader.actions(db)
        found = incidents(reader.alerts(db), actions)
    return {(i.finding.rule, i.since): i for i in found}, repairs(actions)


class TestStory:
    def test_a_repair_that_is_undone_and_one_that_is_kept(self, ladder):
        told = [(m.step, m.what, m.kind, m.lines) for m in story_of(ladder[0]["collapse", 60], 400)]
        assert told == [
            (60, "First symptom", "", ("the finding is seen for the first time",)),
            (70, "Alert fires", "critical", ("value 0.98, limit 0.5",)),
            (
                70,
                "Applied: quantile_bias on layers.1.mlp",
                "applied",
                ("perplexity 9.974 → 13.46, MaxVio 6.86 before", "a bias of at most 3.1"),
            ),
            (
                70,
                "Undone at once: quantile_bias on layers.1.mlp",
                "undone",
                ("held-out loss rose from 2.300 to 2.600, more than 0.05",),
            ),
            (
                70,
                "Applied: spill on layers.1.mlp",
                "applied",
                ("perplexity 9.974 → 10.07, MaxVio 6.86 before", "what does not fit goes to the dense path"),
            ),
            (
                90,
                "Kept after 20 steps: spill on layers.1.mlp",
                "kept",
                ("perplexity 9.974 → 9.875, MaxVio 6.86 → 0.21", "the alert is resolved"),
            ),
            (90, "Resolved", "good", ("after 30 steps",)),
        ]

    def test_a_failure_and_the_call_for_a_human(self, ladder):
        told = [(m.step, m.what) for m in story_of(ladder[0]["collapse", 180], 400)]
        assert told[2:] == [
            (190, "Failed: reseed on layers.1.mlp"),
            (190, "Applied: router_rollback on layers.1.mlp"),
            (230, "Undone after 40 steps: router_rollback on layers.1.mlp"),
            (230, "A human is called"),
            (260, "Resolved"),
        ]
        call = next(m for m in story_of(ladder[0]["recovery_exhausted", 190], 400) if m.kind == "page")
        assert (call.step, call.what) == (230, "A human is called")
        assert call.lines == ("layers.1.mlp: no repair is left for collapse; tried: quantile_bias undone",)

    def test_a_proposal_is_one(self, ladder):
        proposed = story_of(ladder[0]["collapse", 200], 400)[2]
        assert (proposed.what, proposed.kind) == ("Proposed: look at the input of layers.0.mlp", "proposed")
        assert proposed.lines[-1] == "nothing was changed"

    def test_a_call_that_only_an_alert_tells_of(self):
        alerts = [collapse("a", "firing", 20, since=10), page_for("a", "firing", 40, since=20)]
        [incident] = [i for i in incidents(alerts, []) if i.finding.rule == "collapse"]
        assert [m.what for m in story_of(incident, 50)] == [
            "First symptom",
            "Alert fires",
            "A human is called",
            "Still firing",
        ]

    def test_every_mark_that_a_story_uses_has_a_form(self, ladder):
        """Colour alone tells nothing: each kind has a rule of its own in the style sheet, and no two are the same."""
        style = (Path(charts.__file__).parent / "static" / "dashboard.css").read_text()
        forms = [re.findall(rf"^\.diamond\.{kind} {{(.*)}}", style, re.MULTILINE) for kind in MARKS if kind != "kept"]
        assert all(len(found) == 1 for found in forms)
        assert len({found[0] for found in forms}) == len(MARKS) - 1
        assert {m.kind for i in ladder[0].values() for m in story_of(i, 400)} <= {*MARKS, "", "critical", "good"}


class TestTimeline:
    def test_the_summary_counts_each_repair_once(self, ladder):
        found, made = ladder
        assert summary(list(found.values()), made, 400) == (
            "5 alerts; repairs: 1 failed, 2 undone, 1 kept, 1 applied, 1 proposed; steps 0 to 400."
        )
        assert summary([], [], 0) == "0 alerts; repairs: none; steps 0 to 0."

    def test_marks_of_one_place_stand_in_a_row(self):
        assert offsets([]) == []
        assert offsets([0.2, 0.5, 0.8]) == [0, 0, 0]
        assert offsets([0.2, 0.2, 0.21, 0.6]) == [0, 1, 2, 0]  # to the right,
        assert offsets([0.2, 0.9, 0.9, 0.91]) == [0, -2, -1, 0]  # and away from the end

    @given(st.lists(st.floats(0, 1), max_size=8).map(sorted))
    def test_marks_keep_their_order(self, shares):
        places = [(share > 0.5, share, moved) for share, moved in zip(shares, offsets(shares), strict=True)]
        for (_, one, moved), (_, other, next_moved) in itertools.pairwise(places):
            assert next_moved == moved + 1 if other - one < CROWD else True

    def test_the_last_repair_in_a_line(self, ladder):
        assert last_repair(ladder[0]["collapse", 330]).startswith("boost on layers.1.mlp at step 340, applied, perpl")
        assert last_repair(ladder[0]["recovery_exhausted", 190]) == ""


class TestHealth:
    @pytest.fixture
    def head(self, tmp_path):
        write_run(tmp_path, status="running")
        with reader.reading(tmp_path) as db:
            return reader.head(db, tmp_path)

    def test_words(self, head):
        firing = tuple(incidents([collapse("a", "firing", 20, since=10)], []))
        mild = replace(firing[0], finding=replace(firing[0].finding, severity="warning"))
        now = head.flush_time
        words = {
            "running": (health(head, now + 10), "good"),
            "silent": (health(head, now + 3600), "warning"),
            "finished": (health(replace(head, status="finished"), now + 3600), "quiet"),
            "interrupted": (health(replace(head, status="interrupted"), now), "warning"),
            "failed": (health(replace(head, status="failed", firing=firing), now), "critical"),
            "1 alert firing": (health(replace(head, firing=firing), now), "critical"),
            "2 alerts firing": (health(replace(head, firing=(mild, mild)), now), "warning"),
            "cannot be read": (health(StoreError("locked"), now), "broken"),
        }
        assert {word: (state.word, state.kind) for word, (state, _) in words.items()} == {
            word: (word, kind) for word, (_, kind) in words.items()
        }


def luminance(colour):
    """Relative luminance of WCAG 2.2, of a colour #rrggbb."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


class TestPalette:
    @pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
    def test_text_and_marks_stand_out(self, theme):
        for ink, ground in itertools.product(
            ("ink", "muted", "accent", "good", "warning", "critical"), ("page", "surface")
        ):
            assert contrast(getattr(theme, ink), getattr(theme, ground)) >= 4.5, (ink, ground)
        assert contrast(theme.muted, theme.raised) >= 4.5
        assert contrast(theme.accent, theme.surface) >= 4.5  # the pressed button: surface on accent
        assert min(contrast(line, theme.surface) for line in theme.lines) >= 3.0

    @pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
    def test_ramps_can_be_told_apart_by_lightness_alone(self, theme):
        """Each arm of the diverging ramp goes one way in lightness, and its ends stand out from the middle."""
        middle = len(theme.heat) // 2
        cold, hot = theme.heat[: middle + 1], theme.heat[middle:]
        for arm in (cold[::-1], hot, theme.unevenness[::-1]):
            steps = np.diff([luminance(colour) for colour in arm])
            assert (steps < 0).all() or (steps > 0).all()
        for colour in (theme.heat[0], theme.heat[-1], theme.unevenness[0]):
            assert contrast(colour, theme.heat[middle]) >= 4.5
        assert int(theme.heat[1][5:], 16) > int(theme.heat[1][1:3], 16)  # cold is more blue than red,
        assert int(theme.heat[-2][1:3], 16) > int(theme.heat[-2][5:], 16)  # hot more red than blue

    def test_variables_of_both_themes(self):
        text = css()
        assert all(f":root[data-theme={name}]" in text for name in THEMES)
        assert text.count("--heat: linear-gradient(90deg, #") == 2

    def test_loads_become_logarithms(self):
        assert [heat_value(load) for load in (0.0, 0.25, 1.0, 4.0, 256.0)] == [-6.0, -2.0, 0.0, 2.0, 8.0]


def keys(options):
    """Every (key, value) of nested options."""
    if isinstance(options, dict):
        for key, value in options.items():
            yield key, value
            yield from keys(value)
    elif isinstance(options, list | tuple):
        for value in options:
            yield from keys(value)


class TestCoSelection:
    def test_the_pair_that_is_most_together(self):
        found = stores.together("a", 30)
        pairs = co_selection_panel.together(found)
        assert pairs.experts == tuple(range(8))
        text = co_selection_panel.reading(found, pairs)
        assert text.startswith("a, 400 tokens sampled up to step 30; strongest: ")
        row, column = np.unravel_index(np.nanargmax(pairs.lift_EE), (8, 8))
        assert f"{row} and {column}, {pairs.lift_EE[row, column]:.1f} times chance" in text

    def test_one_expert_per_token(self):
        assert co_selection_panel.one_each(stores.together("a", 30, k=1))
        assert not co_selection_panel.one_each(stores.together("a", 30))

    def test_too_few_tokens(self):
        found = CoSelection("a", 3, 2, np.full((4, 4), 1))
        assert co_selection_panel.reading(found, co_selection_panel.together(found)).endswith("too few to tell")

    def test_of_many_experts_the_busiest_are_drawn(self):
        counts = np.ones((256, 256), dtype=np.int64)
        np.fill_diagonal(counts, np.arange(256))
        pairs = co_selection_panel.together(CoSelection("a", 3, 300, counts))
        assert pairs.experts == tuple(range(130, 256))
        assert pairs.lift_EE.shape == (126, 126)
        assert pairs.lift_EE.size <= reader.MAX_CELLS

    def test_two_runs_by_hand(self):
        nan = float("nan")
        first = Together((0, 1, 2), np.array([[nan, 2.0, 0.0], [2.0, nan, 1.0], [0.0, 1.0, nan]]))
        second = Together((0, 1, 2), np.array([[nan, 1.0, 0.0], [1.0, nan, 4.0], [0.0, 4.0, nan]]))
        apart = co_selection_panel.against(first, second)
        np.testing.assert_array_equal(apart.lift_EE, [[nan, 0.5, 1.0], [0.5, nan, 4.0], [1.0, 4.0, nan]])
        assert co_selection_panel.most_different(apart) == "most different: 1 and 2, 4 times the first"
        nothing = Together((0,), np.full((1, 1), nan))
        assert co_selection_panel.most_different(nothing) == "too few to tell"

    def test_two_runs_are_shown_with_the_same_experts(self):
        """The busiest of both together, relative to each run's tokens: a long run does not outvote a short one."""
        few, many = np.ones((200, 200), dtype=np.int64), np.ones((200, 200), dtype=np.int64)
        np.fill_diagonal(few, np.where(np.arange(200) < 63, 10, 1))
        np.fill_diagonal(many, np.where(np.arange(200) >= 137, 9000, 900))
        both = [CoSelection("a", 3, 100, few), CoSelection("a", 3, 90_000, many)]
        assert co_selection_panel.busiest(both).tolist() == [*range(63), *range(137, 200)]


class TestCharts:
    def test_a_heat_map_has_the_loads_and_marks_dead_experts(self):
        frame = Frame(10, (record("blocks.0.moe", 10, np.array([400, 200, 200, 0])),))
        options = charts.heat_map(frame, LIGHT)
        cells = options["series"][0]["data"]
        assert [cell["value"] for cell in cells] == [[0, 0, 1.0], [1, 0, 0.0], [2, 0, 0.0], [3, 0, -6.0]]
        assert [cell["label"]["formatter"] for cell in cells] == ["2.0", "1.0", "1.0", "\u00d7"]
        assert (options["visualMap"]["min"], options["visualMap"]["max"]) == (-2.0, 2.0)

    def test_many_experts_are_packed(self):
        layers = (record("a", 10, np.arange(32)), record("b", 10, np.full(30, 7)))
        code = charts.heat_map(Frame(10, layers), DARK)["series"][0][":data"]
        text, columns, scale = re.fullmatch(r'eqp\.cells\("([A-Za-z0-9+/=]*)",(\d+),(\d+)\)', code).groups()
        values = np.frombuffer(base64.b64decode(text), dtype="<i2").reshape(-1, int(columns)) / int(scale)
        assert values.shape == (2, 32)
        assert values[0, 0] == -6.0  # no tokens
        assert values[0, 31] == 1.0  # 31 of a mean of 15.5
        assert values[1].tolist() == [0.0] * 30 + [-327.68] * 2  # two experts fewer: no cells

    def test_the_only_code_in_options_is_ours(self):
        """NiceGUI runs what stands under a key that begins with a colon; a name from a run must never get there."""
        name = ":formatter"
        frame = Frame(10, tuple(window([name, HOSTILE], 10)))
        found = incidents([collapse(name, "firing", 20, since=10)], [Action(name, name, 20, f"{name}:collapse")])
        history = [record(name, step, np.array([5, 5]), {name: 3}) for step in (10, 20)]
        even = Evenness((10, 20), (name, HOSTILE), np.ones((2, 2)))
        all_options = [
            charts.heat_map(frame, LIGHT),
            charts.together_map(co_selection_panel.together(stores.together(name, 10)), LIGHT),
            charts.against_map(co_selection_panel.together(stores.together(name, 10)), LIGHT),
            charts.expert_bars(ExpertTimes((1.0, None), (2.0, None)), LIGHT),
            charts.expert_history(history, LIGHT, found),
            charts.served_map(np.ones((1, 20)), [name], LIGHT),
            charts.evenness_map(even, LIGHT),
            charts.lines([Series(name, ((1, 2.0),)), *drop_curves(history)], LIGHT, marks=found),
        ]
        code = {(key, value) for options in all_options for key, value in keys(options) if key.startswith(":")}
        names = r"eqp\.(number|share|heatTip|historyTip|evenTip|togetherTip|againstTip|servedTip)"
        cells = r'eqp\.cells\("[A-Za-z0-9+/=]*",\d+,\d+\)'
        assert [value for _, value in code if not re.fullmatch(f"{names}|{cells}", value)] == []
        assert len(code) > 5
        assert all(value == "richText" for o in all_options for key, value in keys(o) if key == "renderMode")

    def test_alerts_and_repairs_are_marked_on_curves(self):
        found = incidents(
            [collapse("a", "firing", 20, since=10), collapse("a", "resolved", 40, since=10)],
            [Action("quantile_bias", "a", 20, "a:collapse")],
        )
        (line,) = charts.lines([Series("loss", ((0, 1.0), (50, None)))], LIGHT, marks=found)["series"]
        (area,) = line["markArea"]["data"]
        assert [end["xAxis"] for end in area] == [10, 40]
        assert [mark["xAxis"] for mark in line["markLine"]["data"]] == [20]
        assert line["data"] == [[0, 1.0], [50, None]]

    def test_an_undone_repair_has_another_line_and_a_proposal_none(self, ladder):
        found = [ladder[0]["collapse", 60], ladder[0]["collapse", 200]]
        [line] = charts.lines([Series("loss", ((0, 1.0), (400, None)))], LIGHT, marks=found)["series"]
        drawn = [(mark["xAxis"], mark["lineStyle"]["type"]) for mark in line["markLine"]["data"]]
        assert drawn == [(70, [2, 3]), (70, [5, 3])]  # quantile_bias, undone; spill, kept
        history = [record("a", step, np.array([5, 5])) for step in range(10, 410, 10)]
        [cells] = charts.expert_history(history, LIGHT, found)["series"]
        drawn = [(mark["xAxis"], mark["lineStyle"]["type"]) for mark in cells["markLine"]["data"]]
        assert drawn == [(6, "solid"), (20, "solid"), (6, [2, 3]), (6, [5, 3])]

    def test_marks_on_a_map_stand_at_the_flush(self):
        found = incidents([collapse("a", "firing", 21, since=10)], [])
        history = [record("a", step, np.array([5, 5])) for step in (10, 20, 30)]
        options = charts.expert_history(history, LIGHT, found)
        assert [mark["xAxis"] for mark in options["series"][0]["markLine"]["data"]] == [2]
        assert charts.expert_history([], LIGHT, found)["xAxis"]["data"] == []

    def test_short_names(self):
        assert charts.short_names(["model.layers.0.mlp", "model.layers.1.mlp"]) == ["layers.0", "layers.1"]
        assert charts.short_names(["blocks.0.moe", "blocks.1.moe"]) == ["blocks.0", "blocks.1"]
        assert charts.short_names(["only.one"]) == ["only.one"]
        assert charts.short_names(["encoder.0", "decoder.0"]) == ["encoder", "decoder"]
        assert charts.short_names(["x" * 50]) == ["xxxxxxxx…xxxxxxxxx"]

    def test_an_axis_for_zeros(self):
        options = charts.lines([Series("dropped", ((1, 0.0), (2, 0.0)))], LIGHT, form="share", low=0.0)
        assert options["yAxis"]["max"] == 0.01


class TestNumbers:
    def test_drops_are_shares_by_reason(self):
        lossy = record("a", 10, np.array([600, 400]), {"capacity": 50, "tokens": 8})
        assert lossy.drop_rate == 0.05  # 50 of 1000 assignments; tokens are counted apart
        curves = {curve.name: curve.points for curve in drop_curves([lossy, record("a", 20, np.array([5, 5]))])}
        assert curves == {
            "capacity lost": ((10, 0.05), (20, 0.0)),
            "tokens lost": ((10, 8 / 4096), (20, 0.0)),
        }
        assert drop_curves([record("a", 20, np.array([5, 5]))]) == [Series("dropped", ((20, 0.0),))]

    def test_the_worst_layer_over_time(self):
        even = Evenness((1, 2, 3), ("a", "b"), np.array([[0.9, 0.5, np.nan], [0.8, 1.0, np.nan]]))
        assert worst_over_time(even, "run") == Series("run", ((1, 0.8), (2, 0.5)))
        assert even_reading(even) == "lowest: 50% in a at step 2"
        assert worst_over_time(Evenness((), (), np.zeros((0, 0))), "run").points == ()

    def test_a_small_curve(self):
        assert spark_path((2.0, 1.0, None, 1.0)).count("M") == 2  # a gap
        assert spark_path((1.0,)) == ""
        assert "nan" not in spark_path((1.0, 1.0))

    def test_texts(self):
        assert [number(None), number(3.14159), number(19623.4, ",.0f")] == ["-", "3.142", "19,623"]
        assert [percent(0.0), percent(0.0123), percent(float("nan"))] == ["0 %", "1.23 %", "-"]
        now = time.time()
        ages = [age(now - seconds) for seconds in (1, 45, 200, 8000, 200_000)]
        assert ages == ["just now", "40 s ago", "3 min ago", "2 h ago", "2 d ago"]
