"""The picture of one layer: it is written, it shows the right numbers, and it touches no global state."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from equipoise.monitor.plot import plot_layer_load, token_shares
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.store import RunStore, StoreError


def record(step, counts_E, num_tokens, layer="blocks.0.moe"):
    counts_E = np.asarray(counts_E, dtype=np.int64)
    return routing_stats(layer, step, RoutingSums(num_tokens, counts_E, counts_E / 2.0, 0.0, 0.0, 0.0, 0.0, {}, {}))


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path / "run") as store:
        for step in (20, 40, 60):
            store.routing([record(step, [100, 100, 100, 100] if step != 40 else [200, 80, 70, 50], 200)])
        yield store


def has_colour(path, hex_colour):
    """Whether some pixel has this colour, but for smoothing."""
    wanted = np.array([int(hex_colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(imread(path)[..., :3] - wanted).max(axis=-1) < 0.02).any())


def test_shares_are_of_tokens_not_of_assignments():
    history = [record(1, [100, 60, 40], 100), record(2, [0, 0, 0], 0)]
    assert token_shares(history).tolist() == [[1.0, 0.6, 0.4], [0.0, 0.0, 0.0]]


def test_the_picture_has_the_hot_expert_and_the_marks(store, tmp_path):
    path = plot_layer_load(store, "blocks.0.moe", tmp_path / "load.png", marks={"injected": 30, "repaired": 50})
    assert path == tmp_path / "load.png"
    height, width, _ = imread(path).shape
    assert (width, height) == (1350, 810)
    assert has_colour(path, "#c8321e")
    assert has_colour(path, "#7a3db8")  # the first mark
    assert has_colour(path, "#b86e00")  # the second


def test_without_marks_none_is_drawn(store, tmp_path):
    path = plot_layer_load(store, "blocks.0.moe", tmp_path / "load.png")
    assert has_colour(path, "#c8321e")
    assert not has_colour(path, "#7a3db8")


@pytest.mark.parametrize(("counts_E", "num_tokens"), [([7], 7), ([3, 4], 7), ([0, 0], 0), (list(range(256)), 9000)])
def test_a_single_window_of_any_size_is_drawn(tmp_path, counts_E, num_tokens):
    with RunStore(tmp_path / "run") as store:
        store.routing([record(10, counts_E, num_tokens)])
        assert has_colour(plot_layer_load(store, "blocks.0.moe", tmp_path / "load.png", marks={"here": 10}), "#c8321e")


def test_an_unknown_layer_is_refused(store, tmp_path):
    with pytest.raises(StoreError, match=r"layer: expected one of the recorded layers \(blocks.0.moe\), got 'moe'"):
        plot_layer_load(store, "moe", tmp_path / "load.png")


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_nothing_of_matplotlib_is_imported_before_it_is_needed():
    code = "import sys, equipoise.monitor.plot; print([name for name in sys.modules if 'matplotlib' in name])"
    assert run_python(code).stdout == "[]\n"


def test_without_matplotlib_the_error_names_the_extra(store):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"  # what Python itself does to make an import fail
        "from equipoise.monitor import plot, store\n"
        f"plot.plot_layer_load(store.RunStore.open_readonly({str(store.path)!r}), 'blocks.0.moe', 'x.png')"
    )
    assert (
        "ImportError: plots need matplotlib, which is not installed; pip install 'equipoise[plot]'"
        in run_python(code).stderr
    )


def test_pyplot_stays_out_of_it(tmp_path, store):
    picture = str(tmp_path / "load.png")
    code = (
        "import sys\nfrom equipoise.monitor import plot, store\n"
        f"plot.plot_layer_load(store.RunStore.open_readonly({str(store.path)!r}), 'blocks.0.moe', {picture!r})\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert run_python(code).stdout == "False\n"
