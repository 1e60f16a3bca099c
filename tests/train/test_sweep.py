"""A miniature sweep: paired cells, stopped and gone on with, refused when changed; the report by hand; the picture."""

import io
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from equipoise.models.decoder import Decoder
from equipoise.monitor.store import RunStore
from equipoise.routing import BiasBalance, QuantileBalance, SwitchLoss, ZLoss
from equipoise.train.data import Loader
from equipoise.train.diagnose import DivergenceError
from equipoise.train.grid import Cell, Grid, cell_config
from equipoise.train.recipes import recipe
from equipoise.train.run import open_data
from equipoise.train.sweep import CellResult, SweepResult, read_result, run_cell, run_sweep
from equipoise.train.sweep_report import (
    paired_difference,
    plot_sweep,
    settings,
    student_95,
    sweep_tables,
    write_report,
)

GRID = Grid(coefs=(0.0, 0.1), rates=(0.0,), seeds=(0, 1))
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def base(make_config):
    """A recipe with everything that a sweep takes out: a loss, a balancer, repairs."""
    balance = (SwitchLoss(coef=0.01), ZLoss(coef=0.001), QuantileBalance(on_demand=True))
    config = make_config(moe={"balance": balance, "capacity": None}, steps=8, micro_batch_size=None, recover=True)
    return replace(config, name="mini")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The sweep in one go, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run_sweep(base, GRID, tmp_path_factory.mktemp("finished"), QUIET)
    torch.set_num_threads(before)
    return result


class InterruptAt(io.StringIO):
    """A terminal that sends this process a signal when it is told that so many cells are done."""

    def __init__(self, done):
        super().__init__()
        self.done = done

    def write(self, text):
        if text.startswith(f"{self.done}/"):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def timeless(cell):
    return replace(cell, tokens_per_s=None)


# ------------------------------------------------------------------------------------------------------ the cells


def test_a_cell_changes_the_switch_loss_and_the_balancer_alone(base):
    config = cell_config(base, Grid(scope="global"), Cell(coef=0.1, rate=0.02, seed=3))
    assert config.model.moe.balance == (
        SwitchLoss(coef=0.1, scope="global"),
        ZLoss(coef=0.001),
        BiasBalance(rate=0.02),
    )
    assert not config.recover  # a repair would mend what is to be measured
    assert config.seed == 3
    assert (config.interference_every, config.watch_every) == (1, 1)
    same = replace(config.model, moe=replace(config.model.moe, balance=base.model.moe.balance))
    assert same == base.model
    none = cell_config(base, Grid(), Cell(coef=0.0, rate=0.0, seed=3))
    assert none.model.moe.balance == (SwitchLoss(coef=0.0), ZLoss(coef=0.001))  # still logged, at no weight


def test_a_seed_gives_every_setting_the_same_weights_and_data(base):
    configs = [cell_config(base, Grid(), Cell(coef, rate, 7)) for coef in (0.0, 0.1) for rate in (0.0, 0.01)]
    weights, batches = [], []
    for config in configs:
        opened, data = open_data(config)
        torch.manual_seed(config.seed)
        weights.append({name: p.clone() for name, p in Decoder(opened.model).named_parameters()})
        batches.append(Loader(data.train, config.batch_size, config.data.seq_len, config.seed).next_batch())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())
    assert all(torch.equal(batches[0].tokens_BS, batch.tokens_BS) for batch in batches)


def test_a_model_without_experts_is_refused(base):
    with pytest.raises(ValueError, match="sweep: expected a model with MoE layers, got 'mini' without; choose"):
        cell_config(replace(base, model=replace(base.model, moe=None)), GRID, GRID.cells[0])


def test_the_default_grid_is_five_decades_and_none():
    grid = Grid()
    assert grid.coefs == (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    assert len(grid.cells) == 6 * 2 * 3
    assert len({cell.name for cell in grid.cells}) == 36
    assert Grid(coefs=(0.1, 0.0)).coefs == (0.0, 0.1)


@pytest.mark.parametrize("field", [{"coefs": ()}, {"rates": (0.1, 0.1)}, {"seeds": (-1,)}])
def test_grids_that_make_no_sense(field):
    [name] = field
    with pytest.raises(ValueError, match=f"{name}: expected one or more numbers of at least 0, each once, got "):
        Grid(**field)


# ----------------------------------------------------------------------------------------------------- running


def test_every_cell_is_run_and_measured(finished):
    assert [cell.cell for cell in finished.cells] == GRID.cells
    assert finished.signal is None
    for cell in finished.cells:
        folder = finished.out / "cells" / cell.cell.name
        assert json.loads((folder / "result.json").read_text())["loss"] == cell.loss
        assert not (folder / "checkpoints").exists()  # a sweep must not fill the disk
        with RunStore.open_readonly(folder) as store:
            assert store.meta()["status"] == "finished"
            windows = [s.max_violation for name in store.layers() for s in store.routing_history(name)[-5:]]
            cosines = [
                value
                for name in store.layers()
                for step, value, _ in store.scalar_history(f"interference_cosine.{name}")
                if step > 4
            ]
        assert len(windows) == 2 * 5
        assert cell.max_violation == pytest.approx(np.mean(windows))
        assert len(cosines) == 2 * 4
        assert cell.cosine == pytest.approx(np.mean(cosines))
        assert 0 < cell.loss < math.log(320)
        assert cell.specialisation is not None
        assert cell.tokens_per_s > 0
    without, with_loss = finished.cells[0], finished.cells[1]
    assert with_loss.ratio > without.ratio > 0  # the z-loss stays in both
    assert with_loss.max_violation < without.max_violation


@pytest.mark.parametrize("done", [1, 3])
def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_numbers(done, base, finished, tmp_path):
    told = InterruptAt(done)
    stopped = run_sweep(base, GRID, tmp_path, Console(file=told, width=200))
    assert stopped.signal == signal.SIGINT
    assert len(stopped.cells) == done
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(results) == done
    told = io.StringIO()
    again = run_sweep(base, GRID, tmp_path, Console(file=told, width=200))
    assert list(map(timeless, again.cells)) == list(map(timeless, finished.cells))
    assert len(told.getvalue().splitlines()) == 4 - done  # the others were not run again
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())


def test_a_cell_stopped_in_the_middle_goes_on_from_its_checkpoint(base, finished, tmp_path):
    cell = GRID.cells[1]
    config, data = open_data(cell_config(base, GRID, cell))
    out = tmp_path / "cells" / cell.name
    seen = []

    def stop(step):
        seen.append(step)
        return step == 3

    assert run_cell(cell, config, data, out, stop) is None
    assert seen == [0, 0, 1, 2, 3]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003"]
    assert read_result(out) is None
    seen.clear()
    assert run_cell(cell, config, data, out, lambda step: bool(seen.append(step))) == read_result(out)
    assert seen == [0, 3, 4, 5, 6, 7]
    assert timeless(read_result(out)) == timeless(finished.cells[1])


def test_a_cell_that_was_killed_before_a_checkpoint_starts_anew(base, finished, tmp_path):
    cell = GRID.cells[1]
    config, data = open_data(cell_config(base, GRID, cell))

    def killed(step):
        if step == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, config, data, tmp_path / "cells" / cell.name, killed)
    result = run_sweep(base, GRID, tmp_path, QUIET)
    assert list(map(timeless, result.cells)) == list(map(timeless, finished.cells))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"coef": 0.1}'])
def test_a_damaged_result_is_no_result(damage, tmp_path):
    (tmp_path / "result.json").write_bytes(damage)
    assert read_result(tmp_path) is None


def test_a_finished_sweep_runs_nothing_and_grows(base, finished):
    told = io.StringIO()
    assert run_sweep(base, GRID, finished.out, Console(file=told, width=200)) == finished
    assert told.getvalue() == ""
    wider = run_sweep(base, replace(GRID, rates=(0.0, 0.01), seeds=(1,)), finished.out, Console(file=told, width=200))
    assert len(told.getvalue().splitlines()) == 2
    assert [cell for cell in wider.cells if cell.rate == 0.0] == list(finished.cells[2:])


def test_another_configuration_in_the_same_folder_is_refused(base, finished):
    folder = r"cells/coef-0_rate-0_seed-0 holds a run of another configuration"
    with pytest.raises(
        ValueError, match=rf"sweep: .*{folder} \(.*steps 8 there, 9 here.*give this sweep another --out"
    ):
        run_sweep(replace(base, steps=9), GRID, finished.out, QUIET)
    with pytest.raises(ValueError, match=rf"{folder} \(model\.moe\.balance\.0\.scope micro there, global here\); give"):
        run_sweep(base, replace(GRID, scope="global"), finished.out, QUIET)
    smaller = replace(base, optim=replace(base.optim, lr=1e-4, beta1=0.8, clip=2.0, warmup=1, weight_decay=0.0))
    with pytest.raises(ValueError, match=r"optim\.beta1 0\.9 there, 0\.8 here, .* and 1 more\); give"):
        run_sweep(smaller, GRID, finished.out, QUIET)


def test_a_diverged_cell_is_named(base, tmp_path):
    wild = replace(base, optim=replace(base.optim, lr=1e25, warmup=0))
    with pytest.raises(DivergenceError, match=r"^cell coef 0, rate 0, seed 0: step [234]: "):
        run_sweep(wild, GRID, tmp_path, QUIET)


def test_text_of_one_domain_has_no_specialisation(base, tmp_path):
    one = replace(base, steps=2, data=replace(base.data, domains=("parsing",)))
    result = run_sweep(one, Grid(coefs=(0.1,), rates=(0.0,), seeds=(0,)), tmp_path, QUIET)
    [cell] = result.cells
    assert cell.specialisation is None
    [setting] = settings(result)
    assert "specialisation" not in setting.mean
    assert write_report(result)["cells"][0]["specialisation"] is None
    assert " - " in rendered(result)


# --------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)]
)
def test_student_95(degrees, t):
    """Tabulated values. One degree is Cauchy's distribution: tan(0.95 pi / 2) = 12.7062."""
    assert student_95(degrees) == pytest.approx(t, abs=1e-4)


def test_a_paired_difference_by_hand():
    # differences 1, 2, 3: mean 2, standard deviation 1, half width 4.3027 / sqrt(3) = 2.4841
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, -0.4841, 4.4841), abs=1e-4)
    assert not found.is_clear
    assert paired_difference([11.0, 22.1, 33.0], [10.0, 21.0, 32.1]).is_clear
    one = paired_difference([3.0], [1.0])
    assert (one.mean, one.low, one.high) == (2.0, -math.inf, math.inf)


def made(coefs=(0.0, 0.01), rates=(0.0,), seeds=(0, 1, 2), value=lambda coef, rate, seed: 3.0 + seed - coef):
    """Results whose loss is `value`."""
    grid = Grid(coefs=coefs, rates=rates, seeds=seeds)
    cells = tuple(
        CellResult(c.coef, c.rate, c.seed, value(c.coef, c.rate, c.seed), 0.5, 0.02, -0.1, c.coef, 0.75, 1000.0)
        for c in grid.cells
    )
    return grid, cells


def result_of(out, **kwargs):
    grid, cells = made(**kwargs)
    return SweepResult(out, "tiny", 20, grid, cells)


def rendered(result):
    text = io.StringIO()
    Console(file=text, width=140).print(sweep_tables(result))
    return text.getvalue()


def test_pairing_takes_out_what_the_seed_does(tmp_path):
    """Between seeds the loss differs by 1, between coefficients by 0.01: seed by seed that is plain to see."""
    low, high = settings(result_of(tmp_path))
    assert low.mean["loss"] == 4.0
    assert low.spread["loss"] == 1.0
    assert low.to_baseline == {}
    difference = high.to_baseline["loss"]
    assert (difference.mean, difference.low, difference.high) == pytest.approx((-0.01, -0.01, -0.01))
    assert difference.is_clear


def test_only_seeds_that_both_have_are_compared(tmp_path):
    result = result_of(tmp_path)
    missing = replace(result, cells=tuple(cell for cell in result.cells if cell.cell != Cell(0.0, 0.0, 1)))
    high = settings(missing)[1]
    assert high.seeds == (0, 1, 2)
    assert high.to_baseline["loss"].mean == pytest.approx(-0.01)


def test_tables(tmp_path):
    text = rendered(result_of(tmp_path, rates=(0.0, 0.01), value=lambda coef, rate, seed: 3.0 + seed - 10 * coef))
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "0", "4.000", "±", "1.000", "0.50", "±", "0.00"] in [line[:8] for line in lines]
    assert any(line[:3] == ["0.01", "0.01", "-0.100"] for line in lines)
    assert "[-0.100, -0.100]*" in text
    no_loss, with_loss = [line for line in text.splitlines() if "1,000" in line][:2]
    assert "75%" not in no_loss  # no balancing gradient: no angle to speak of
    assert "75% ± 0%" in with_loss


def test_one_seed_has_no_interval(tmp_path):
    result = result_of(tmp_path, seeds=(4,))
    assert "-0.010 (one seed)" in rendered(result)
    fields = json.loads(json.dumps([setting.fields() for setting in settings(result)], allow_nan=False))
    assert fields[1]["to_baseline"]["loss"] == {"mean": pytest.approx(-0.01), "interval_95": None}


def test_files_of_the_report(finished):
    report = write_report(finished)
    assert json.loads((finished.out / "sweep.json").read_text()) == json.loads(json.dumps(report))
    assert report["grid"] == {"coefs": (0.0, 0.1), "rates": (0.0,), "seeds": (0, 1), "scope": "micro"}
    assert [cell["seed"] for cell in report["cells"]] == [0, 0, 1, 1]
    assert (finished.out / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "grid",
    [
        {},
        {"coefs": (0.0,)},
        {"coefs": (0.003,), "seeds": (0,)},
        {"coefs": (1e-3, 1e-2), "rates": (0.0, 1e-3, 1e-2)},
    ],
)
def test_pictures_of_other_grids(grid, tmp_path):
    path = plot_sweep(result_of(tmp_path, **grid), tmp_path / "sweep.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_recipe_can_be_swept():
    """What `equipoise bench sweep` does by default, but for running it."""
    for cell in Grid().cells:
        cell_config(recipe("tiny"), Grid(), cell)
