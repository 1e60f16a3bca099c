"""The terminal view: says what the store says, at any width, without colours too, and ends cleanly."""

import dataclasses
import io
import signal
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from equipoise.monitor.alerts import AlertBook
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.store import RunStore, StoreError
from equipoise.monitor.terminal import load_block, load_style, render, short_names, sparkline, view_of, watch_run
from equipoise.types import Action


def record(layer, step, counts_E, num_tokens, dropped):
    counts_E = np.asarray(counts_E, dtype=np.int64)
    return routing_stats(
        layer, step, RoutingSums(num_tokens, counts_E, counts_E / 2.0, 0.0, 0.0, 0.0, 0.0, dropped, {})
    )


def write_run(path, *, num_experts=8, num_layers=3, status="finished", repaired=False):
    """A run of 100 steps whose second layer collapses onto expert 3 for good, unless it is repaired at step 80."""
    num_tokens = 500 * num_experts
    even = np.full(num_experts, 2 * num_tokens // num_experts)
    collapsed = np.full(num_experts, num_tokens // (num_experts - 1))
    collapsed[3] = num_tokens
    collapsed[5] = 0
    book = AlertBook(resolve_after=1)
    with RunStore(path) as store:
        store.set_meta(name="a run", total_steps=400, status=status)
        for step in range(1, 101):
            store.scalars(step, {"loss": 8.0 / step, "tokens_per_s": 5000.0})
        store.scalars(100, {"val_perplexity": 12.34})
        for step in (40, 60, 80, 100):
            counts = [even if layer != 1 or (repaired and step > 80) else collapsed for layer in range(num_layers)]
            window = [
                record(f"blocks.{layer}.moe", step, c, num_tokens, {"capacity": 80}) for layer, c in enumerate(counts)
            ]
            store.routing(window)
            for alert in book.observe(step, CollapseDetector()(window)):
                store.alert(alert)
        if repaired:
            store.action(Action("quantile_bias", "blocks.1.moe", 80, "blocks.1.moe:collapse", {"max_violation": 3.0}))
    return path


def shown(path, width=100, **changes):
    """The view as plain text: what someone without colours sees."""
    with RunStore.open_readonly(path) as store:
        view = dataclasses.replace(view_of(store), **changes)
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render(view))
    return console.file.getvalue()


class TestView:
    def test_it_is_what_the_store_says(self, tmp_path):
        with RunStore.open_readonly(write_run(tmp_path)) as store:
            view = view_of(store)
        assert (view.name, view.status, view.step, view.total_steps) == ("a run", "finished", 100, 400)
        assert (view.loss, view.val_perplexity, view.tokens_per_s) == (0.08, 12.34, 5000.0)
        assert len(view.losses) == 100
        assert view.seconds_left >= 0
        assert [stats.layer for stats in view.routing] == ["blocks.0.moe", "blocks.1.moe", "blocks.2.moe"]
        assert [alert.key for alert in view.firing] == ["blocks.1.moe:collapse"]
        assert (view.resolved, view.repairs) == ((), ())

    def test_a_resolved_alert_is_no_longer_firing(self, tmp_path):
        with RunStore.open_readonly(write_run(tmp_path, repaired=True)) as store:
            view = view_of(store)
        assert view.firing == ()
        assert [alert.key for alert in view.resolved] == ["blocks.1.moe:collapse"]
        assert [action.kind for action in view.repairs] == ["quantile_bias"]

    def test_an_empty_run_has_a_view(self, tmp_path):
        RunStore(tmp_path / "fresh").close()
        text = shown(tmp_path / "fresh")
        assert "fresh" in text
        assert "step 0  loss -" in text
        assert "No routing statistics yet." in text
        assert "No alerts." in text


class TestScreen:
    def test_header(self, tmp_path):
        text = shown(write_run(tmp_path), status="running", seconds_left=3725.0)
        assert "a run  running" in text
        assert "step 100/400  loss 0.0800  val perplexity 12.34  tokens/s 5,000  left 1h02m" in text
        assert "loss █" in text

    def test_a_short_rest_is_in_minutes_and_a_finished_run_has_none(self, tmp_path):
        write_run(tmp_path)
        assert "left 3m05s" in shown(tmp_path, status="running", seconds_left=185.0)
        assert "left" not in shown(tmp_path)

    def test_few_experts_are_numbers(self, tmp_path):
        text = shown(write_run(tmp_path))
        assert "  blocks.0  1.0 1.0 1.0 1.0 1.0 1.0 1.0 1.0" in text
        # seven others share 4000 assignments, 571 each, one of them gets none; fair is 7426 / 8 = 928
        assert "! blocks.1  0.6 0.6 0.6 4.3 0.6 0.0 0.6 0.6" in text
        assert "step 100, load relative to fair: 1.0 is fair" in text

    def test_statistics_of_a_layer(self, tmp_path):
        line = next(line for line in shown(write_run(tmp_path), width=140).splitlines() if "! blocks.1" in line)
        # shares 0.5386, six times 0.0769, and 0: H = 0.5386 * 0.6188 + 6 * 0.0769 * 2.5654 = 1.517;
        # exp(H) = 4.56, H / ln 8 = 0.729; MaxVio 8 * 0.5386 - 1 = 3.31; 80 of 7426 dropped
        assert line.split()[-5:] == ["4.6/8", "3.31", "1", "1.1%", "0.729"]

    def test_many_experts_are_blocks(self, tmp_path):
        text = shown(write_run(tmp_path, num_experts=64), width=140)
        assert f"! blocks.1  ▁▁▁█▁·{'▁' * 58} " in text.replace("▂", "▁")
        assert "· below 0.1  ▁ 0.25" in text

    def test_too_many_experts_are_binned_by_their_busiest(self, tmp_path):
        text = shown(write_run(tmp_path, num_experts=256), width=140)
        line = next(line for line in text.splitlines() if "! blocks.1" in line)
        assert line.split()[2].startswith("█")
        assert len(line.split()[2]) == 64
        assert "one cell is 4 experts, the busiest shown" in " ".join(text.split())

    @pytest.mark.parametrize("width", [60, 80, 140])
    @pytest.mark.parametrize("num_experts", [8, 64, 256])
    def test_nothing_is_wider_than_the_terminal_or_cut_short(self, tmp_path, width, num_experts):
        text = shown(write_run(tmp_path, num_experts=num_experts), width=width)
        assert all(len(line) <= width for line in text.splitlines())
        assert "…" not in text
        assert sum(line.startswith(("! ", "  blocks")) for line in text.splitlines()) == 3

    def test_an_alert_comes_with_its_remedy(self, tmp_path):
        text = " ".join(shown(write_run(tmp_path)).split())
        assert "critical since step 40: blocks.1.moe has collapsed: expert 3 takes 100.0% of the tokens" in text
        assert "-> Rebalance this router with a one-shot quantile bias" in text

    def test_alerts_come_before_the_heat_map(self, tmp_path):
        text = shown(write_run(tmp_path))
        assert text.index("has collapsed") < text.index("load of the experts")

    def test_what_is_over_stays_visible(self, tmp_path):
        text = " ".join(shown(write_run(tmp_path, repaired=True)).split())
        assert "resolved step 100: blocks.1.moe:collapse, since step 40" in text
        assert (
            "applied step 80: quantile_bias on blocks.1.moe because of blocks.1.moe:collapse, max_violation 3" in text
        )

    def test_each_repair_is_a_line_with_its_state_effect_and_note(self, tmp_path):
        """exp(2.3) = 9.974, exp(2.6) = 13.46."""
        key, before = "blocks.1.moe:collapse", {"loss_before": 2.3, "max_violation_before": 3.31}
        begun = Action("quantile_bias", "blocks.1.moe", 80, key, before | {"loss_after": 2.6})
        spill = Action("spill", "blocks.1.moe", 80, key, before)
        with RunStore(write_run(tmp_path)) as store:
            for action in (
                begun,
                dataclasses.replace(begun, state="undone", detail={"steps": 0.0}, note="held-out loss rose"),
                spill,
                dataclasses.replace(spill, step=100, state="kept", detail={"max_violation_after": 0.2, "steps": 20.0}),
                Action("look_at_input", "", 100, "a:collapse", {}, "proposed", "look at what is sent"),
                Action("page", "blocks.1.moe", 100, key, {}, "applied", "tried: all"),
            ):
                store.action(action)
        text = " ".join(shown(tmp_path).split())
        assert (
            "undone step 80, at once: quantile_bias on blocks.1.moe because of blocks.1.moe:collapse, "
            "perplexity 9.974 → 13.46, MaxVio 3.31 before (held-out loss rose) "
            "kept step 80, after 20 steps: spill on blocks.1.moe because of blocks.1.moe:collapse, "
            "perplexity 9.974 before, MaxVio 3.31 → 0.2 "
            "proposed step 100: look_at_input on the whole model because of a:collapse (look at what is sent)"
        ) in text
        assert "tried: all" not in text  # its alert says so

    def test_many_layers_show_the_most_uneven(self, tmp_path):
        text = shown(write_run(tmp_path, num_layers=40))
        assert "! blocks.1 " in text
        assert "16 more even layers not shown" in " ".join(text.split())

    def test_many_alerts_are_counted(self, tmp_path):
        write_run(tmp_path)
        with RunStore.open_readonly(tmp_path) as store:
            firing = view_of(store).firing
        assert "and 6 more alerts" in shown(tmp_path, firing=firing * 10)

    def test_names_are_not_markup(self, tmp_path):
        repair = Action("[red]kind[/]", "[b]l[/]", 1, "[i]why[/]", {"[u]n[/]": 1.0}, "failed", "[s]note[/]")
        text = shown(write_run(tmp_path), name="[red]run[/]", repairs=(repair,))
        for name in ("[red]run[/]", "[red]kind[/]", "[b]l[/]", "[i]why[/]", "[u]n[/]", "[s]note[/]"):
            assert name in text


class TestParts:
    @pytest.mark.parametrize(
        ("load", "block"), [(0, "·"), (0.09, "·"), (0.25, "▁"), (0.5, "▂"), (1, "▄"), (2, "▆"), (4, "█"), (60, "█")]
    )
    def test_load_blocks(self, load, block):
        assert load_block(load) == block

    def test_cold_is_blue_fair_is_grey_hot_is_red(self):
        assert load_style(0) == "rgb(60,110,230)"
        assert load_style(1) == "rgb(150,150,150)"
        assert load_style(64) == "rgb(225,45,45)"
        assert load_style(64, background=True) == "#ffffff on rgb(225,45,45)"

    @pytest.mark.parametrize(
        ("values", "width", "line"),
        [
            ([], 10, ""),
            ([1.0], 10, "▁"),
            ([0.0, 7.0], 10, "▁█"),
            ([0.0, 0.0, 7.0, 7.0], 2, "▁█"),
            ([5.0, 5.0], 2, "▁▁"),
            ([0.0, float("nan"), 7.0], 3, "▁!█"),
            ([float("inf"), float("-inf")], 1, "!"),
        ],
    )
    def test_sparkline(self, values, width, line):
        assert sparkline(values, width) == line

    def test_short_names_drop_what_all_share_at_the_end(self):
        assert short_names(["blocks.0.moe", "blocks.1.moe"]) == ["blocks.0", "blocks.1"]
        assert short_names(["blocks.0.moe"]) == ["blocks.0.moe"]
        assert short_names(["a", "b"]) == ["a", "b"]
        assert short_names(["x.y", "x.y"]) == ["x", "x"]


WATCHER = """
import sys
from rich.console import Console
from equipoise.monitor.terminal import watch_run
watch_run(sys.argv[1], follow=True, interval=0.01, console=Console(force_terminal=True, width=100))
print("ended cleanly")
"""


class TestWatch:
    def test_prints_once_where_there_is_no_terminal(self, tmp_path):
        write_run(tmp_path, status="running")
        console = Console(width=100, file=io.StringIO())
        watch_run(tmp_path, follow=True, console=console)
        assert console.file.getvalue().count("load of the experts") == 1

    def test_prints_once_without_follow(self, tmp_path):
        write_run(tmp_path, status="running")
        console = Console(width=100, file=io.StringIO(), force_terminal=True)
        watch_run(tmp_path, follow=False, console=console)
        assert console.file.getvalue().count("load of the experts") == 1

    @pytest.fixture
    def watcher(self, tmp_path):
        write_run(tmp_path, status="running")
        command = [sys.executable, "-W", "error", "-c", WATCHER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert any("load of the experts" in line for line in process.stdout)  # it has drawn
            yield process
            process.kill()

    def test_follows_until_the_run_ends(self, tmp_path, watcher):
        with RunStore(tmp_path) as store:
            store.scalars(101, {"loss": 0.1234})
            store.set_meta(status="finished")
        rest, errors = watcher.communicate(timeout=60)
        assert "0.1234" in rest
        assert rest.endswith("ended cleanly\n")
        assert (watcher.returncode, errors) == (0, "")

    def test_ctrl_c_ends_it_cleanly(self, watcher):
        watcher.send_signal(signal.SIGINT)
        rest, errors = watcher.communicate(timeout=60)
        assert "No longer watching; the run itself goes on." in rest
        assert rest.endswith("ended cleanly\n")
        assert (watcher.returncode, errors) == (0, "")

    def test_no_run_is_a_clear_error(self, tmp_path):
        with pytest.raises(StoreError, match=r"expected a run folder with run\.sqlite in it, found none"):
            watch_run(tmp_path, follow=False)


def test_a_server_shows_speed_and_load_instead_of_losses(tmp_path):
    path = write_run(tmp_path / "serving", status="running")
    with RunStore(path) as store:
        store.set_meta(kind="server", total_steps=None)
        store.scalars(100, {"queue_depth": 7.0, "requests_per_s": 2.5, "inter_token_ms.p99": 12.4, "running": 64.0})
    text = " ".join(shown(path, width=200).split())
    assert "step 100 tokens/s 5,000 requests/s 2.5 running 64 waiting 7 next p99 ms 12" in text
    assert "tokens/s ▁" in text
    for word in ("loss", "perplexity", "left", "first token"):
        assert word not in text
