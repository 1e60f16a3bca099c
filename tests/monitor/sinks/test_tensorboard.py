"""TensorBoard's event files, read back with TensorBoard itself."""

import sys

import pytest
from tests.monitor.sinks.cases import BEFORE, alert, repair, stats

from equipoise.monitor.sinks.layer_numbers import NUMBERS, layer_numbers
from equipoise.monitor.sinks.tensorboard import TensorBoard, escape, tag


@pytest.fixture
def events(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read():
        events = accumulator.EventAccumulator(str(tmp_path))
        events.Reload()
        return events

    return read


def texts(events, name):
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f"{name}/text_summary")]


def test_scalars_per_layer_by_step(events, tmp_path):
    board = TensorBoard(tmp_path)
    board.routing([stats(step=50), stats("blocks.4.moe", 50)])
    board.routing([stats(step=100, counts_E=(32, 32, 32, 32))])
    board.close()
    read = events()
    got = read.Scalars("routing/max_violation/blocks.3.moe")
    assert [(event.step, event.value) for event in got] == [(50, 0.875), (100, 0.0)]  # 60/32 - 1, by hand
    names = {name.split("/")[1] for name in read.Tags()["scalars"]}
    assert names == {*NUMBERS, "loss", "dropped"}
    assert [event.value for event in read.Scalars("routing/dropped/capacity/blocks.4.moe")] == [3.0]


def test_alerts_and_repairs_are_text(events, tmp_path):
    board = TensorBoard(tmp_path)
    board.alert(alert())
    board.alert(alert("resolved", step=400))
    board.action(repair(detail=BEFORE | {"experts": 3.0}, note="a *bias*"))
    board.action(repair("kept", step=140, note="the alert is resolved"))
    board.close()
    read = events()
    fired, over = texts(read, "alerts/collapse/blocks.3.moe")
    assert (fired[0], over[0]) == (100, 400)
    assert fired[1].startswith("**firing**, critical, since step 50: blocks\\.3\\.moe has collapsed: expert 5")
    assert "What to do: rebalance the layer's bias" in fired[1]
    assert texts(read, "actions/quantile_bias/blocks.3.moe") == [
        (
            120,
            "**applied**: quantile\\_bias because of blocks\\.3\\.moe:collapse: perplexity 9\\.974 before, "
            "MaxVio 2\\.99 before, experts 3\n\na \\*bias\\*",
        ),
        (
            140,
            "**kept after 20 steps**: quantile\\_bias because of blocks\\.3\\.moe:collapse: "
            "perplexity 9\\.974 → 9\\.875, MaxVio 2\\.99 → 0\\.25, experts 3\n\nthe alert is resolved",
        ),
    ]


def test_names_that_are_no_tags_stay_apart(events, tmp_path):
    names = ["a b", "a:b", "a_b", "a/b", "../a", "é", "x" * 500 + "1", "x" * 500 + "2", "a\nb", ""]
    assert len({tag(name) for name in names}) == len(names)
    assert all(tag(name).replace("_", "").replace("-", "").replace(".", "").isascii() for name in names)
    assert all("/" not in tag(name) and len(tag(name)) <= 200 for name in names)
    board = TensorBoard(tmp_path)
    board.routing([stats(name) for name in names])
    board.close()
    written = [name for name in events().Tags()["scalars"] if name.startswith("routing/max_violation/")]
    assert len(written) == len(names)  # TensorBoard has replaced nothing


def test_text_is_shown_as_it_is():
    assert escape("<script>x</script> [a](b) *c* `d`\n# e") == (
        "&lt;script&gt;x&lt;/script&gt; \\[a\\]\\(b\\) \\*c\\* \\`d\\` \\# e"
    )


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match=r"needs the package tensorboard.*pip install 'equipoise\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_the_numbers_are_those_of_the_record():
    record = stats()
    numbers = layer_numbers(record)
    assert numbers["num_tokens"] == 64
    assert numbers["num_dead_experts"] == len(record.dead_experts)
    assert numbers["loss/switch"] == record.losses["switch"]
    assert (numbers["dropped/capacity"], numbers["dropped/tokens"]) == (3.0, 1.0)
    assert all(numbers[name] == getattr(record, name) for name in NUMBERS if name != "num_dead_experts")
    assert all(type(value) is float for value in numbers.values())
