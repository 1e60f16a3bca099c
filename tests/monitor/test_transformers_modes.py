"""A watched model of transformers in every mode of training, untouched and left as it was; and under its Trainer."""

import math
from collections import OrderedDict

import pytest
import torch
import transformers
from tests.monitor.transformers_models import FAMILIES, E, Witness, batch, blocks, build, entropy, probabilities
from torch import nn

from equipoise.layer import MoE
from equipoise.monitor.adapters.trainer_callback import trainer_callback
from equipoise.monitor.recorder import Recorder, observable_layers
from equipoise.monitor.watch import Watch, watch
from equipoise.types import is_observable

every_family = pytest.mark.parametrize("family", FAMILIES)

# ------------------------------------------------------------------------------------------ once, and in every mode


def checkpoint(model, use_reentrant=False):
    """Under its new name, where transformers has it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_gradient_checkpointing(family, use_reentrant):
    model, (tokens, mask) = build(family), batch(pad="right")
    checkpoint(model.train(), use_reentrant)
    model.enable_input_require_grads()
    witness, recorder = Witness(model), Recorder(model)
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    real = mask.flatten().tolist()
    for stats in recorder.flush(1):
        assert len(witness.ids[stats.layer]) == 2  # it was computed twice
        witness.ids[stats.layer].pop()
        assert stats.num_tokens == sum(real)
        assert stats.counts_E.tolist() == witness.counts(stats.layer, [real])
        assert 0 < stats.token_entropy <= 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["Qwen2Moe", "DeepseekV3"])
def test_bf16_without_gradients(family, context):
    model, (tokens, mask) = build(family).bfloat16(), batch(pad="left")
    witness, recorder = Witness(model), Recorder(model)
    with context():
        model(tokens, attention_mask=mask)
    for stats in recorder.flush(1):
        assert stats.counts_E.tolist() == witness.counts(stats.layer, [mask.flatten().tolist()])
        logits = witness.real(witness.logits[stats.layer], [mask.flatten().tolist()])
        probs = [probabilities(row, FAMILIES[family][2]) for row in logits]
        assert stats.token_entropy == pytest.approx(sum(map(entropy, probs)) / len(probs) / math.log(E), rel=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_way_to_compute_the_experts(implementation):
    model, (tokens, mask) = build(experts_implementation=implementation), batch(pad="left")
    witness, recorder = Witness(model), Recorder(model)
    model(tokens, attention_mask=mask)
    for stats in recorder.flush(1):
        assert stats.counts_E.tolist() == witness.counts(stats.layer, [mask.flatten().tolist()])


@pytest.mark.filterwarnings("default")  # of torch.compile itself
@pytest.mark.parametrize("pad", [None, "left"])
def test_under_compile(pad):
    """One graph without a mask; with one, the graph is broken where real tokens are looked up."""
    model, (tokens, mask) = build(num_hidden_layers=1 if pad else 2), batch(pad=pad)
    arguments = {"attention_mask": mask} if pad else {}
    with Watch(model, every=1) as eye:
        plain = model(tokens, use_cache=False, **arguments).logits
        eye.step(1)
        expected = eye.stats()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=pad is None, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(compiled(tokens, use_cache=False, **arguments).logits, plain)
        eye.step(2)
    for one, two in zip(expected, eye.stats(), strict=True):
        assert two.num_tokens == 2 * one.num_tokens == 2 * int(mask.sum())
        assert two.counts_E.tolist() == (2 * one.counts_E).tolist()
        assert two.token_entropy == pytest.approx(one.token_entropy, rel=1e-5)
    torch._dynamo.reset()


def test_sums_are_reduced_once_per_flush():
    model, (tokens, mask) = build(), batch()
    reduced = []
    with Watch(model, every=2, reduce=lambda tensor: reduced.append(tensor.mul_(2))) as eye:
        for step in (1, 2):
            model(tokens, attention_mask=mask)
            eye.step(step)
        assert len(reduced) == 1  # for both layers and both steps
    assert [stats.num_tokens for stats in eye.stats()] == [2 * 2 * tokens.numel()] * 2


# ------------------------------------------------------------------------------------------------------ it is free

HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith("_hooks") or "hooks_" in name]


def everything(model):
    """All that an observer could leave behind."""
    return [
        (name, set(vars(module)), module.forward.__func__, [OrderedDict(getattr(module, kind) or {}) for kind in HOOKS])
        for name, module in model.named_modules()
    ]


@every_family
def test_outputs_are_bit_identical_and_nothing_is_left(family):
    def run(model):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        loss = model(tokens, attention_mask=mask, labels=tokens)
        loss.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return loss.logits.detach(), grads, torch.get_rng_state()

    model, (tokens, mask) = build(family).train(), batch(pad="left")
    before, state = everything(model), model.state_dict().keys()
    logits, grads, rng = run(model)
    recorder = Recorder(model)
    assert everything(model) != before
    assert len(model.model._forward_pre_hooks) == 1  # the mask is looked at once for all layers
    watched_logits, watched_grads, watched_rng = run(model)
    recorder.detach()
    assert everything(model) == before
    assert model.state_dict().keys() == state
    assert torch.equal(logits, watched_logits)
    assert grads.keys() == watched_grads.keys()
    assert all(torch.equal(grads[name], watched_grads[name]) for name in grads)
    assert torch.equal(rng, watched_rng)
    run(model)
    assert {stats.num_tokens for stats in recorder.flush(1)} == {int(mask.sum())}  # nothing after the detach


def test_two_watchers_each_count_everything():
    model, (tokens, mask) = build(), batch(pad="left")
    first, second = watch(model, every=1), watch(model, every=2)
    for step in (1, 2):
        model(tokens, attention_mask=mask)
        first.step(step)
        second.step(step)
    real = int(mask.sum())
    assert [stats.num_tokens for stats in first.stats()] == [real, real]
    assert [stats.num_tokens for stats in second.stats()] == [2 * real, 2 * real]
    first.detach()
    model(tokens, attention_mask=mask)
    second.flush(3)
    assert [stats.num_tokens for stats in second.stats()] == [real, real]
    second.detach()


def test_beside_layers_of_equipoise():
    model = nn.ModuleDict({"theirs": build(), "ours": MoE(16, 8, 4)})
    with watch(model, every=1) as eye:
        model["theirs"](batch()[0])
        model["ours"](torch.randn(5, 16))
        eye.step(1)
    assert {stats.layer: stats.num_tokens for stats in eye.stats()} == {
        "ours": 5,
        "theirs.model.layers.0.mlp": 21,
        "theirs.model.layers.1.mlp": 21,
    }


def test_layers_are_observable_and_not_hooked_by_looking():
    model = build()
    before = everything(model)
    layers = observable_layers(model)
    assert list(layers) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(is_observable(layer) and layer.num_experts == E for layer in layers.values())
    assert everything(model) == before


# ------------------------------------------------------------------------------------------------------ the Trainer


class Sentences(torch.utils.data.Dataset):
    def __init__(self, number):
        self.tokens, self.mask = batch(B=number)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        row = self.tokens[index]
        return {"input_ids": row, "attention_mask": self.mask[index], "labels": row}


def test_trainer(tmp_path):
    """Three optimizer steps of two micro-batches; evaluations in between are not training and do not count."""
    model, windows, alerts = build(), [], []

    class Notebook:
        def routing(self, window):
            windows.append([(stats.step, stats.num_tokens) for stats in window])

        def alert(self, alert):
            raise AssertionError("an undisturbed model")

    checkpoint(model)
    eye = Watch(model, every=1, sinks=[Notebook()])
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        eval_strategy="steps", eval_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Sentences(32), eval_dataset=Sentences(5),
        callbacks=[trainer_callback(eye, alerts.append)],
    )  # fmt: skip
    trainer.train()
    assert windows == [[(step, 2 * 2 * 7)] * 2 for step in (1, 2, 3)]
    model(batch()[0])
    eye.flush(4)
    assert windows[-1] == [(4, 21)] * 2  # after the training it counts again
    assert alerts == []
    eye.detach()


def test_trainer_callback_tells_of_alerts():
    model, told = build(), []
    with torch.no_grad():
        for block in blocks(model).values():
            block.gate.weight[2:] = block.gate.weight[:1]  # experts 2 ... 7 tie with 0: the same K for all tokens
    with watch(model, every=1) as eye:
        callback, state = trainer_callback(eye, told.append), transformers.TrainerState()
        callback.on_train_begin(None, state, None)
        for state.global_step in (1, 2):
            model(batch(B=16, S=32)[0])  # an evaluation
            callback.on_step_begin(None, state, None)
            model(batch(B=16, S=32)[0])
            callback.on_step_end(None, state, None)
            assert {stats.num_tokens for stats in eye.stats()} == {16 * 32}
        callback.on_train_end(None, state, None)
    assert [alert.state for alert in told] == ["firing"] * len(told)
    assert {alert.step for alert in told} == {2}
