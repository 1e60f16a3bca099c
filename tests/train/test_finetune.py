"""Fine-tuning runs: what changes, what keeps its bits, from which step, exactly resumed, and what the monitor says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equipoise.disk.checkpoint import latest_checkpoint, load_checkpoint
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import load
from equipoise.monitor.store import RunStore
from equipoise.routing import BiasBalance, HighThenLow, ReLURouting, SparsityLoss, SwitchLoss, TopK, ZLoss
from equipoise.routing.coefficients import SparsityCoef
from equipoise.train.config import Overrides, TrainConfig
from equipoise.train.finetune.base import adopt
from equipoise.train.finetune.config import FinetuneConfig
from equipoise.train.finetune.groups import groups_of
from equipoise.train.finetune.start import finetune, tuned_model
from equipoise.train.loop import Trainer
from equipoise.train.report import Silent
from equipoise.train.run import open_data, train

LAYERS = ("layers.0.mlp", "layers.1.mlp")


@pytest.fixture(scope="module")
def base(make_config, tmp_path_factory):
    """A run of 150 steps: what is tuned below. Its balancer has a bias."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("base") / "run"
    moe = {"router": TopK(k=2), "balance": (SwitchLoss(coef=0.05), BiasBalance(rate=1e-2)), "capacity": None}
    options = {"micro_batch_size": None, "eval_every": 0, "checkpoint_every": 0, "watch_every": 10, "canary_batches": 8}
    train(
        make_config(steps=150, moe=moe, data={"domains": ("parsing",), "val_fraction": 0.25}, **options), out, Silent()
    )
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Help topics, as a .jsonl of one's own would be."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "my.jsonl"
    rows = [{"text": topic[:1500]} for topic in list(topics.values())[:60]]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tuned(base, text, corpus_file):
    """The configuration of a fine-tuning."""

    def make(change=None, **tune):
        tune = FinetuneConfig(base=str(base), **tune)
        config = finetune(tune, Overrides(corpus=str(text)))
        data = replace(config.data, cache_dir=corpus_file.parent, val_fraction=0.2)
        small = {"steps": 8, "checkpoint_every": 3, "eval_every": 0, "watch_every": 2, "data": data}
        return replace(config, **small | (change or {}))

    return make


def run(config, out, until=None, resume=False):
    opened, data = open_data(config, out if resume else None)
    trainer = Trainer(opened, data, out, Silent(), resume=resume)
    trainer.run(until=until)
    trainer.close("finished")
    return trainer


def tensors_of(out):
    return load_checkpoint(latest_checkpoint(Path(out) / "checkpoints")).tensors["model"]


def changed(base, out):
    """The groups of weights of which any bit differs."""
    model, before, after = load(base).model, tensors_of(base), tensors_of(out)
    groups = groups_of(model)
    return {groups[name] for name in groups if not torch.equal(before[name], after[name])}


# ------------------------------------------------------------------------------------------------- configuration


def test_a_configuration_out_of_the_base(base, text):
    config = finetune(FinetuneConfig(base=str(base), balance=0.001), Overrides(corpus=str(text), steps=7))
    like = TrainConfig.from_json((base / "config.json").read_text())
    assert config.steps == 7
    assert (config.batch_size, config.data.seq_len, config.bf16) == (like.batch_size, like.data.seq_len, like.bf16)
    assert config.optim.lr == pytest.approx(0.1 * like.optim.lr)
    assert config.model.moe.balance == (SwitchLoss(coef=0.001), BiasBalance(rate=1e-2))
    assert replace(config.model, moe=like.model.moe) == like.model
    assert config.finetune.router_starts == 100
    assert TrainConfig.from_json(config.to_json()) == config


def test_a_checkpoint_of_a_run_will_do_too(base, text):
    tune = FinetuneConfig(base=str(latest_checkpoint(base / "checkpoints")))
    config = finetune(tune, Overrides(corpus=str(text)))
    assert config.model == finetune(FinetuneConfig(base=str(base)), Overrides(corpus=str(text))).model
    model = Decoder(config.model)
    assert adopt(model, config.finetune).folder == base
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors_of(base).items())


def test_balancing_losses_of_a_tuned_model():
    """Light or none; a z-loss as its schedule ended; a coefficient that adapts as it is."""
    sparse = SparsityLoss(coef=SparsityCoef(initial=1e-3))
    balance = (SwitchLoss(coef=0.1, scope="global"), ZLoss(coef=HighThenLow(0.1, 1e-3, hold=5, anneal=5)), sparse)
    moe = MoEConfig(num_experts=4, hidden_dim=8, router=ReLURouting(k=1), balance=balance)
    model = DecoderConfig(vocab_size=40, dim=16, num_layers=1, num_heads=2, hidden_dim=8, max_seq_len=8, moe=moe)
    made = tuned_model(model, FinetuneConfig(balance=0.002)).moe.balance
    assert (made[0], made[2]) == (SwitchLoss(coef=0.002, scope="global"), sparse)
    assert made[1].coef == pytest.approx(1e-3)
    with pytest.raises(ValueError, match=r"from: expected a model with MoE layers, got a dense one"):
        tuned_model(replace(model, moe=None), FinetuneConfig())


def test_a_folder_that_holds_the_model_alone_will_do(base, text, tmp_path):
    """As upcycle and convert write it: config.json with "model", tokenizer, checkpoint; no text of its own."""
    folder = tmp_path / "converted"
    folder.mkdir()
    shutil.copytree(base / "checkpoints", folder / "checkpoints")
    shutil.copy(base / "byte_pairs.json", folder)
    model = json.loads((base / "config.json").read_text())["model"]
    (folder / "config.json").write_text(json.dumps({"model": model}))
    config = finetune(FinetuneConfig(base=str(folder)), Overrides(corpus=str(text), steps=2))
    assert config.optim.lr == 1e-4
    config = replace(config, data=replace(config.data, cache_dir=tmp_path / "cache", val_fraction=0.3, seq_len=32))
    trainer = run(replace(config, batch_size=8), tmp_path / "run")
    assert set(trainer.tuning.base.baselines) == {"task"}
    assert changed(base, tmp_path / "run") == {"attention", "experts", "rest"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base, text: finetune(FinetuneConfig(), Overrides(corpus=text)), r"from: expected the run folder"),
        (lambda base, text: finetune(FinetuneConfig(base=base), Overrides()), r"data: expected the text to tune on"),
        (
            lambda base, text: finetune(FinetuneConfig(base=base), Overrides(corpus=text, tokenizer="gpt2")),
            r"tokenizer: is the base's",
        ),
        (
            lambda base, text: finetune(FinetuneConfig(base="nowhere"), Overrides(corpus=text)),
            r"nowhere: expected a run folder with config\.json",
        ),
        (
            lambda base, text: finetune(FinetuneConfig(base=base, lora=2), Overrides(corpus=text, recover=True)),
            r"recover: expected False with finetune\.lora",
        ),
    ],
)
def test_mistakes_are_told(make, message, base, text):
    with pytest.raises(ValueError, match=message):
        make(str(base), str(text))


def test_fresh_weights_and_a_base_need_different_tokenizers(tuned, make_config):
    with pytest.raises(ValueError, match=r"tokenizer: expected base for a model that is tuned, got 'bpe'"):
        tuned({"data": make_config().data})
    with pytest.raises(ValueError, match=r"tokenizer: expected bpe or gpt2 for a run with fresh weights, got 'base'"):
        make_config(data={"tokenizer": "base"})


# ------------------------------------------------------------------------------------------------- what changes


@pytest.mark.parametrize(
    ("tune", "groups"),
    [
        ({"freeze_router": 0}, {"router", "experts", "attention", "rest"}),
        ({}, {"experts", "attention", "rest"}),  # 8 steps: the router waits for step 101
        ({"freeze_experts": True}, {"attention", "rest"}),
        ({"train": "router"}, {"router"}),
        ({"train": "non-moe"}, {"attention", "rest"}),
        ({"train": "experts"}, {"experts"}),
        ({"train": "task-experts"}, {"experts"}),
        ({"lora": 2}, {"attention", "experts"}),
        ({"lora": 2, "train": "non-moe"}, {"attention"}),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) or "all" if isinstance(value, dict) else "",
)
def test_what_is_frozen_keeps_its_bits(tune, groups, tuned, base, tmp_path):
    """Under weight decay, which would move what has no gradient; the bias of the balancers stays too."""
    config = tuned(**tune)
    trainer = run(replace(config, optim=replace(config.optim, weight_decay=0.5)), tmp_path / "run")
    assert changed(base, tmp_path / "run") == groups
    before, after = tensors_of(base), tensors_of(tmp_path / "run")
    for layer in LAYERS:
        assert before[f"{layer}.balancer.bias_E"].abs().sum() > 0
        assert torch.equal(before[f"{layer}.balancer.bias_E"], after[f"{layer}.balancer.bias_E"])
    for layer in trainer.tuning.choice:
        for name in ("gate_up_proj", "down_proj"):
            moved = (
                (before[f"{layer.layer}.experts.{name}"] != after[f"{layer.layer}.experts.{name}"]).flatten(1).any(1)
            )
            assert tuple(moved.nonzero()[:, 0].tolist()) == layer.chosen
    held = {id(parameter) for parameter in trainer.tuning.parameters()}
    assert {id(parameter) for parameter in trainer.optimizer.state} <= held  # no moments of what is frozen


def test_a_bias_may_go_on_adapting_and_counts_go_on_either_way(tuned, base, tmp_path):
    run(tuned(move_bias=True), tmp_path / "moving")
    run(tuned(), tmp_path / "still")
    before = tensors_of(base)["layers.1.mlp.balancer.bias_E"]
    assert not torch.equal(tensors_of(tmp_path / "moving")["layers.1.mlp.balancer.bias_E"], before)
    for name in ("moving", "still"):
        with RunStore.open_readonly(tmp_path / name) as store:
            counted = [int(stats.counts_E.sum()) for stats in store.routing_history("layers.1.mlp")]
        assert counted == [2 * 2 * 8 * 32] * 4  # steps of a flush, k, sequences, tokens


@pytest.fixture(scope="module")
def straight(tuned, tmp_path_factory):
    """(configuration, folder, the router after steps 4, 5 and 6) of a run whose routers start at step 6."""
    config, out, routers = tuned(freeze_router=5), tmp_path_factory.mktemp("straight") / "run", []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = Trainer(*open_data(config), out, Silent())
    for until in (4, 5, 6):
        trainer.run(until=until)
        routers.append(trainer.model.moe_layers["layers.1.mlp"].router.weight.detach().clone())
    trainer.run()
    trainer.close("finished")
    torch.set_num_threads(threads)
    return config, out, routers


def test_the_router_starts_at_its_step(straight, base):
    before = tensors_of(base)["layers.1.mlp.router.weight"]
    assert [torch.equal(router, before) for router in straight[2]] == [True, True, False]


@pytest.mark.parametrize("stop_at", [3, 5], ids=["before", "at"])
def test_and_also_across_a_resume(stop_at, straight, history, tmp_path):
    """Stopped at step 5 it goes on from the checkpoint of step 3."""
    config, out, _ = straight
    run(config, tmp_path / "run", until=stop_at)
    trainer = run(config, tmp_path / "run", resume=True)
    assert trainer.step_number == 8
    assert tensors_bits(tmp_path / "run") == tensors_bits(out)
    assert history(tmp_path / "run") == history(out)
    assert {group["lr_scale"] for group in trainer.optimizer.param_groups} == {0.1, 1.0}


@pytest.mark.parametrize("tune", [{"train": "task-experts"}, {"lora": 2}], ids=["task-experts", "lora"])
def test_what_stands_for_weights_is_resumed_exactly(tune, tuned, base, history, tmp_path):
    """Also when the base is gone by then."""
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    config = tuned(**tune)
    config = replace(config, finetune=replace(config.finetune, base=str(moved)))
    run(config, tmp_path / "straight")
    run(config, tmp_path / "resumed", until=4)
    shutil.rmtree(moved)
    run(config, tmp_path / "resumed", resume=True)
    assert tensors_bits(tmp_path / "straight") == tensors_bits(tmp_path / "resumed")
    assert history(tmp_path / "straight") == history(tmp_path / "resumed")


def tensors_bits(out):
    manifest = json.loads((latest_checkpoint(out / "checkpoints") / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name != "state.json"}


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_base(straight, tmp_path):
    config, out, _ = straight
    run(config, tmp_path / "run", until=1)
    for path in (tmp_path / "run/checkpoints").iterdir():
        shutil.rmtree(path)
    run(config, tmp_path / "run", resume=True)
    assert tensors_bits(tmp_path / "run") == tensors_bits(out)


def test_every_checkpoint_is_a_model_as_it_is(tuned, tmp_path):
    """A low-rank addition is in the weights already; and the adapter is beside them."""
    trainer = run(tuned(lora=2), tmp_path / "run")
    tokens = torch.randint(300, (2, 16), device=trainer.device)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "run", device=trainer.device).model(tokens), trainer.model.eval()(tokens))
    settings = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 4.0)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_the_base_is_the_first_thing_known_to_be_good(tuned, base, tmp_path):
    trainer = run(tuned(), tmp_path / "run", until=1)
    record = trainer.repairs.known_good.records[0]
    assert (record.step, record.checkpoint) == (0, "step-000000")
    model = load_checkpoint(tmp_path / "run/checkpoints/step-000000").tensors["model"]
    assert all(torch.equal(model[name], tensor) for name, tensor in tensors_of(base).items() if "frozen" not in name)


# ------------------------------------------------------------------------------------------------- what is watched


def scalars(out, name):
    with RunStore.open_readonly(out) as store:
        return [value for _, value, _ in store.scalar_history(name)]


def fired(out):
    with RunStore.open_readonly(out) as store:
        return {alert.finding.rule for alert in store.alerts()}


def test_before_a_step_the_routing_is_the_bases(tuned, tmp_path):
    trainer = run(tuned(), tmp_path / "run", until=0)
    shifts, nats = trainer.tuning.base.compare(trainer.model, 8, False)
    assert {(shift.layer, shift.text) for shift in shifts} == {(n, text) for n in LAYERS for text in ("task", "base")}
    assert all((shift.agreement, shift.distance) == (1.0, 0.0) for shift in shifts)
    assert nats["task"] > nats["base"] > 1.0  # it was trained on other text
    assert scalars(tmp_path / "run", "agreement_on_task.layers.1.mlp") == [1.0]  # of step 0
    apart = trainer.tuning.base.domains_apart()
    assert all(0.0 < distance < 0.5 for distance in apart.values())


def test_a_gentle_tuning_is_silent_and_a_careless_one_is_not(tuned, tmp_path):
    """Careless: one text over and over, and routers that learn a hundred times as fast as the rest."""
    long = {"steps": 60, "checkpoint_every": 0, "eval_every": 0, "watch_every": 10}
    gentle = tuned(long, freeze_router=20, compare_every=20)
    run(gentle, tmp_path / "gentle")
    assert fired(tmp_path / "gentle") == set()
    perplexities = scalars(tmp_path / "gentle", "perplexity_on_task")
    assert perplexities[-1] < perplexities[0]

    one = tmp_path / "one.jsonl"
    rows = [json.dumps({"text": "the same words again and again, " * 80})] * 12
    one.write_text("\n".join(rows), encoding="utf-8")
    careless = tuned(long, freeze_router=0, lr_router=100.0, compare_every=20)
    careless = replace(careless, data=replace(careless.data, corpus=str(one)))
    trainer = run(careless, tmp_path / "careless")
    assert "collapse" in fired(tmp_path / "careless")
    [rule] = trainer.tuning.rules
    assert [finding.layer for finding in rule(trainer.watch.stats())] == list(LAYERS)  # they wait behind the collapse
    name = "agreement_on_base.layers.0.mlp"
    assert scalars(tmp_path / "careless", name)[-1] < 0.5 < scalars(tmp_path / "gentle", name)[-1]
