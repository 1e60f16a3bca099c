"""`train` as a command calls it: result, signals, errors, and what a person is shown."""

import io
import signal

import pytest
from rich.console import Console

from equipoise.disk.checkpoint import latest_checkpoint
from equipoise.host.interrupt import interruptible
from equipoise.monitor.store import RunStore
from equipoise.train.loop import load_config
from equipoise.train.report import ConsoleReporter, Silent
from equipoise.train.run import open_data, train
from equipoise.train.sources import DataError


class SignalAt(Silent):
    """A reporter that sends this process signals when the store has reached a step."""

    def __init__(self, step, *numbers):
        self.updates, self.step, self.numbers = 0, step, numbers

    def update(self):
        self.updates += 1
        if self.updates == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


def status(out):
    with RunStore.open_readonly(out) as store:
        return store.meta()["status"]


def test_a_finished_run(make_config, tmp_path):
    result = train(make_config(), tmp_path / "run", Silent())
    assert (result.out, result.step, result.signal) == (tmp_path / "run", 12, None)
    assert 1.0 < result.evaluation.perplexity < 320
    assert result.evaluation.by_domain.keys() == {"text", "parsing"}
    assert result.sample.startswith("In the beginning")
    with RunStore.open_readonly(tmp_path / "run") as store:
        perplexities = [(step, value) for step, value, _ in store.scalar_history("val_perplexity")]
    assert [step for step, _ in perplexities] == [6, 12]
    assert perplexities[-1][1] == result.evaluation.perplexity
    assert status(tmp_path / "run") == "finished"


def test_a_finished_run_can_be_resumed_and_gives_the_same_result(make_config, history, tmp_path):
    first = train(make_config(), tmp_path / "run", Silent())
    before = history(tmp_path / "run")
    again = train(None, tmp_path / "run", Silent(), resume=True)
    assert again == first
    assert history(tmp_path / "run") == before


def test_config_comes_from_the_folder(make_config, tmp_path):
    """Also the vocabulary: the tokenizer decides its size, not the model's configuration."""
    train(make_config(steps=2, data={"vocab_size": 300}), tmp_path / "run", Silent())
    assert load_config(tmp_path / "run").model.vocab_size == 300
    assert train(None, tmp_path / "run", Silent(), resume=True).step == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(number, make_config, tmp_path):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    result = train(make_config(), tmp_path / "run", SignalAt(3, number))
    assert (result.step, result.signal, result.evaluation, result.sample) == (3, number, None, None)
    assert latest_checkpoint(tmp_path / "run/checkpoints").name == "step-000003"
    assert status(tmp_path / "run") == "interrupted"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_ends_the_run_at_once(make_config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(make_config(), tmp_path / "run", SignalAt(3, signal.SIGTERM, signal.SIGINT))
    assert latest_checkpoint(tmp_path / "run/checkpoints") is None  # it did not wait for one
    assert status(tmp_path / "run") == "failed"
    assert train(None, tmp_path / "run", Silent(), resume=True).step == 12


SECOND_SIGNAL = """
import signal, sys
from pathlib import Path
from equipoise.host.interrupt import interruptible

with interruptible() as interrupted:
    signal.raise_signal(signal.SIGTERM)
    print(interrupted(), flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("still here")
"""


def test_a_second_sigterm_kills_the_process(child, tmp_path):
    with child(tmp_path, script=SECOND_SIGNAL) as process:
        output, _ = process.communicate()
    assert output.split() == [str(int(signal.SIGTERM))]
    assert process.returncode == -signal.SIGTERM


def test_interruptible_without_a_signal():
    with interruptible() as interrupted:
        assert interrupted() is None


def test_an_error_closes_the_run_as_failed(make_config, tmp_path):
    class Broken(Silent):
        def update(self):
            raise RuntimeError("no more paper")

    with pytest.raises(RuntimeError, match="no more paper"):
        train(make_config(), tmp_path / "run", Broken())
    assert status(tmp_path / "run") == "failed"


def test_resume_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"out: .*nothing holds no run to resume \(no config\.json\)"):
        train(None, tmp_path / "nothing", Silent(), resume=True)


def test_an_existing_run(make_config, tmp_path):
    train(make_config(steps=1), tmp_path / "run", Silent())
    with pytest.raises(ValueError, match=r"run already holds a run; go on with --resume, or choose another --out"):
        train(make_config(steps=1), tmp_path / "run", Silent())


def test_a_corpus_that_is_not_there(make_config, tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        train(make_config(data={"corpus": str(tmp_path / "gone.jsonl")}), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_open_data_gives_the_model_the_tokenizers_vocabulary(make_config):
    config, data = open_data(make_config(data={"vocab_size": 300}))
    assert config.model.vocab_size == data.tokenizer.vocab_size == 300


def test_domains_are_those_of_the_configuration(make_config, tmp_path):
    result = train(make_config(steps=1, data={"domains": ("parsing",)}), tmp_path / "run", Silent())
    assert result.evaluation.by_domain.keys() == {"parsing"}
    with pytest.raises(DataError, match=r"corpus 'stdlib' has no domains \['verse'\]; choose from text, parsing\."):
        open_data(make_config(data={"domains": ("text", "verse")}))


def test_specialisation_at_the_end(make_config, tmp_path):
    result = train(make_config(specialisation=True), tmp_path / "run", Silent())
    assert [layer.layer for layer in result.specialisation] == ["layers.0.mlp", "layers.1.mlp"]
    with RunStore.open_readonly(tmp_path / "run") as store:
        for layer in result.specialisation:
            [(step, value, _)] = store.scalar_history(f"specialisation.{layer.layer}")
            assert (step, value) == (12, layer.mutual_information)
    assert result.fields()["specialisation"][0]["layer"] == "layers.0.mlp"
    plain = train(make_config(), tmp_path / "plain", Silent())
    assert plain.specialisation == ()
    assert plain.evaluation == result.evaluation


def test_specialisation_needs_two_domains_before_the_first_step(make_config, tmp_path):
    config = make_config(specialisation=True, data={"domains": ("parsing",)})
    with pytest.raises(DataError, match=r"validation text of two domains or more, got 1 of parsing\. Train on"):
        train(config, tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_what_a_person_is_shown_without_a_terminal(make_config, tmp_path):
    text = io.StringIO()
    with ConsoleReporter(Console(file=text, width=200), interval=0.0) as reporter:
        train(make_config(), tmp_path / "run", reporter)
    lines = text.getvalue().splitlines()
    progress = [line for line in lines if line.startswith("step ") and "loss" in line]
    assert progress[0].startswith("step 1/12, loss ")
    assert any("MaxVio" in line for line in progress)
    assert sum("validation perplexity" in line for line in lines) == 2  # at 6, and at the end
