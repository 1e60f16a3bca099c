"""The benchmark runs on a small run folder, and its table says what is so."""

from benchmarks.small import WAYS, Work, products, tables

from equipoise.bench.harness import Effort


def test_it_measures_what_these_sizes_allow(run):
    (costs, caches), notes = tables(run, Work(prompt=8, answer=8, effort=Effort(rounds=1, warmup=1)))
    rows = {row[0]: row for row in costs.rows}
    left_out = [way.name for way in WAYS if way.name not in rows]
    assert left_out == ["int4-128", "int4-64"]  # hidden size 32
    assert [note.split(" was")[0] for note in notes] == left_out
    assert rows["float32"][2] == 1.0
    assert rows["int8"][2] > 3.5
    assert rows["float32, a quarter in memory"][2] == 4.0
    assert rows["float32, a quarter in memory"][3:5] == rows["float32, half in memory"][3:5]
    assert rows["int8, a quarter in memory"][3] == rows["int8"][3]
    assert {row[0] for row in caches.rows} == {name for name in rows if "in memory" in name or "ahead" in name}


def test_products_are_timed_for_all_formats():
    table = products(Effort(rounds=1, warmup=1), rows=(1, 2))
    assert len(table.rows) == 7
    assert all(spread.median > 0 for row in table.rows for spread in row[1:])
