"""`equipoise inject` on a real run in another process: broken, noticed, repaired, taken out; and what it refuses."""

import json
from dataclasses import replace

import pytest
from tests.commands.running import run_command
from tests.train import conftest as training

from equipoise.disk.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from equipoise.monitor.store import RunStore
from equipoise.routing import SwitchLoss, TopK
from equipoise.train.report import Silent
from equipoise.train.run import train

corpus_file, make_config, child = training.corpus_file, training.make_config, training.child
wait_until, step_of = training.wait_until, training.step_of
MOE = {"router": TopK(k=2), "balance": (SwitchLoss(coef=0.1),), "capacity": None}


@pytest.fixture
def config(make_config):
    sizes = {"batch_size": 16, "micro_batch_size": None, "watch_every": 2, "eval_every": 0, "checkpoint_every": 20}
    return make_config(steps=100_000, moe=MOE, recover=True, accept_faults=True, **sizes)


def test_a_running_run_is_broken_and_repairs_itself(config, child, wait_until, step_of, tmp_path, capsys):
    out = tmp_path / "run"
    with child(out, config) as process:
        wait_until(lambda: step_of(out) >= 60, process)
        words = ("collapse", "--layer", "layers.1.mlp", "--expert", 5, "--intensity", 40)
        code, said = run_command(capsys, "inject", out, *words, "--json")
        assert code == 0, said
        answer = json.loads(said.out)
        assert answer["ok"] is True
        assert answer["text"].startswith("fault put in: collapse (layer 'layers.1.mlp', expert 5")
        at = step_of(out)
        wait_until(lambda: step_of(out) >= at + 20, process)
        code, said = run_command(
            capsys, "inject", out, "dead-expert", "--layer", "layers.9.mlp", "--expert", 0, "--intensity", 9
        )
        assert code == 1
        assert "refused" in said.out
        assert "layers.9.mlp" in said.out
        code, said = run_command(capsys, "inject", out, "--remove")
        assert (code, said.out.startswith("taken out: collapse")) == (0, True)
        process.terminate()
        process.communicate()
    with RunStore.open_readonly(out) as store:
        kinds = [(action.kind, action.state) for action in store.actions() if action.layer == "layers.1.mlp"]
    assert ("quantile_bias", "kept") in kinds


def test_a_checkpoint_of_a_run_that_has_ended(config, tmp_path, capsys):
    out = tmp_path / "run"
    train(replace(config, steps=20, accept_faults=False), out, Silent())
    code, said = run_command(capsys, "inject", out, "checkpoint-damage", "--kind", "truncate", "--seed", 1)
    assert code == 0
    assert said.out.startswith("step-000020 is damaged (truncate)")
    with pytest.raises(CheckpointError, match=r"truncated"):
        load_checkpoint(out / "checkpoints" / "step-000020")
    code, said = run_command(capsys, "inject", out, "--remove")
    assert (code, said.out) == (0, "taken out: damage to step-000020\n")
    assert load_checkpoint(latest_checkpoint(out / "checkpoints")).step == 20
    code, said = run_command(capsys, "inject", out, "--remove")
    assert code == 2
    assert "no run takes faults there now; start it with --accept-faults" in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "inject: name a run folder and a fault, or a run folder with --remove"),
        (["RUN"], "inject: name a run folder and a fault"),
        (["RUN", "collapse", "--remove"], "inject: name a run folder and a fault"),
        (["RUN", "--remove", "--expert", "1"], "inject: --remove takes --layer alone, got --expert"),
        (["RUN", "meteor"], "fault: expected one of collapse, drift"),
        (["RUN", "collapse", "--layer", "a"], "collapse: expert is missing; it has layer, expert, intensity, also"),
        (["RUN", "nan-expert", "--layer", "a", "--expert", "1", "--domain", "2"], "nan-expert takes --layer, --expert"),
        (["RUN", "collapse", "--layer", "a", "--expert", "1"], "no run takes faults there now; start it with --accept"),
    ],
)
def test_mistakes(words, message, tmp_path, capsys):
    code, said = run_command(capsys, "inject", *[str(tmp_path) if word == "RUN" else word for word in words])
    assert code == 2
    assert message in said.err


def test_the_list(capsys):
    code, said = run_command(capsys, "inject", "--list", "--json")
    assert code == 0
    faults = {each["fault"]: each["options"] for each in json.loads(said.out)}
    assert faults["collapse"] == ["--layer", "--expert", "--intensity", "--also"]
    assert len(faults) == 12
    code, said = run_command(capsys, "inject", "--list")
    assert "checkpoint-damage" in said.out
