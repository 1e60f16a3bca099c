"""Models of transformers with experts_implementation="equipoise" against transformers' own loop over experts."""

import pytest
import torch
import transformers
from tests.hf.cases import BF16, FP32, assert_same, error, outcome, pair
from tests.monitor.test_transformers_modes import Sentences, checkpoint
from tests.monitor.transformers_models import FAMILIES, E, Witness, batch, blocks, build, router_of

import equipoise
from equipoise.hf import forward
from equipoise.hf.forward import backend_for, equipoise_experts_forward
from equipoise.ops.custom_experts import ExpertWeights

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def calls(monkeypatch):
    """How often our products are called, by backend: proof that it is they who compute."""
    counted = {}

    def counting(kind, name, function):
        def call(*args):
            counted[f"{kind} {name}"] = counted.get(f"{kind} {name}", 0) + 1
            return function(*args)

        return call

    for kind, table in (("plain", forward.PLAIN), ("custom", forward.CUSTOM)):
        for name, function in list(table.items()):
            monkeypatch.setitem(table, name, counting(kind, name, function))
    return counted


@every_family
def test_training(family, calls):
    theirs, ours = pair(family)
    tokens, mask = batch(pad="left")
    expected = outcome(theirs.train(), tokens, attention_mask=mask)
    assert calls == {}
    assert_same(outcome(ours.train(), tokens, attention_mask=mask), expected, FP32)
    assert calls == {"custom lean" if family == "GptOss" else "plain lean": 2}


@every_family
def test_training_in_bf16(family):
    """Against fp32 with the same numbers: as near to it as transformers' loop in bf16 is, within a factor of two."""
    exact, _ = pair(family)
    theirs, ours = pair(family, torch.bfloat16)
    exact.load_state_dict({name: tensor.float() for name, tensor in theirs.state_dict().items()})
    mine, their, right = (experts_alone(model) for model in (ours, theirs, exact))
    assert all(tensor.dtype == torch.bfloat16 for tensor in mine)
    for one, other, truth in zip(mine, their, right, strict=True):
        assert error(one, truth) < max(2 * error(other, truth), 0.005)
        assert error(one, other) < BF16


def experts_alone(model):
    """Output and gradients of the first experts module, called with what no rounding elsewhere can change."""
    generator = torch.Generator().manual_seed(5)
    experts = next(iter(blocks(model).values())).experts
    dtype = experts.down_proj.dtype
    ids = torch.stack([torch.randperm(E, generator=generator)[:3] for _ in range(40)])
    x, weights = torch.randn(40, 32, generator=generator), torch.rand(40, 3, generator=generator)
    leaves = [leaf.to(torch.bfloat16).to(dtype).requires_grad_() for leaf in (x, weights)]
    y = experts(leaves[0], ids, leaves[1])
    scale = torch.linspace(-1, 1, y.numel()).view(y.shape).to(torch.bfloat16).to(dtype)
    return [y.detach(), *torch.autograd.grad((y * scale).sum(), [*leaves, *experts.parameters()])]


@every_family
def test_generation_token_by_token(family, calls):
    theirs, ours = pair(family)
    tokens, mask = batch(pad="left")
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = theirs.generate(tokens, attention_mask=mask, **options)
    got = ours.generate(tokens, attention_mask=mask, **options)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert max(map(error, got.logits, expected.logits)) < FP32
    assert calls == {"custom lean" if family == "GptOss" else "plain few": 2 * 5}


@every_family
def test_one_token(family):
    theirs, ours = pair(family)
    token = batch(B=1, S=2)[0]  # the second is only a label, and attention among one token has no gradient
    assert_same(outcome(ours.train(), token), outcome(theirs.train(), token), FP32, floor=0.1)
    with torch.no_grad():
        assert error(ours(token[:, :1]).logits, theirs(token[:, :1]).logits) < FP32


@every_family
def test_experts_without_tokens_get_zero_gradients(family):
    _, ours = pair(family)
    tokens, _ = batch(B=1, S=3)
    witness = Witness(ours)
    _, grads = outcome(ours.train(), tokens)
    for name in blocks(ours):
        chosen = {expert for row in witness.ids[name][0] for expert in row}
        idle = sorted(set(range(E)) - chosen)
        stacked = [grad for key, grad in grads.items() if key.startswith(f"{name}.experts.")]
        assert stacked
        assert all(not grad[idle].any() and grad[sorted(chosen)].any() for grad in stacked)


@every_family
def test_frozen_experts(family, calls):
    """As under an adapter: they get no gradient, everything else gets the same."""
    theirs, ours = pair(family)
    for model in (theirs, ours):
        for block in blocks(model).values():
            block.experts.requires_grad_(False)
    tokens, _ = batch()
    expected, mine = outcome(theirs.train(), tokens), outcome(ours.train(), tokens)
    assert not any(".experts." in name for name in mine[1])
    assert_same(mine, expected, FP32)
    assert calls == {"custom lean": 2}


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_no_tokens_at_all(family):
    """Serving loops and some ranks call experts with an empty batch."""
    theirs, ours = pair(family)
    for model in (theirs, ours):
        experts = next(iter(blocks(model).values())).experts
        x = torch.zeros(0, 32, requires_grad=True)
        y = experts(x, torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
        assert y.shape == (0, 32)
    y.sum().backward()
    assert all(not p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_gradient_checkpointing(family, use_reentrant):
    theirs, ours = pair(family)
    tokens, mask = batch(pad="right")
    expected = outcome(theirs.train(), tokens, attention_mask=mask)
    checkpoint(ours.train(), use_reentrant)
    ours.enable_input_require_grads()
    assert_same(outcome(ours, tokens, attention_mask=mask), expected, FP32)


@pytest.mark.parametrize("family", ["Olmoe", "GptOss"])
def test_autocast(family):
    theirs, ours = pair(family)
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    outputs, grads = [], []
    for model in (theirs, ours):
        experts = next(iter(blocks(model).values())).experts
        leaf = x.clone().requires_grad_()
        ids = torch.arange(90).reshape(30, 3) % E
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = experts(leaf, ids, torch.full((30, 3), 1 / 3))
        y.square().mean().backward()
        outputs.append(y.detach())
        grads.append([leaf.grad, *(p.grad for p in experts.parameters())])
    assert outputs[1].dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in grads[1])
    assert error(outputs[1], outputs[0]) < BF16
    assert max(map(error, grads[1], grads[0])) < BF16


@pytest.mark.parametrize(
    ("plain", "width", "chosen"), [(True, 16, "grouped"), (False, 16, "grouped"), (False, 5, "lean")]
)
def test_off_the_cpu_one_kernel_computes_all_experts(plain, width, chosen):
    """The rule asks for the device alone, so the meta device stands for a GPU."""
    with torch.device("meta"):
        weights = ExpertWeights(torch.empty(E, 2 * width, 32), torch.empty(E, 32, width))
        assert backend_for(plain, torch.empty(10, 32), weights, 30) == chosen


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_grouped_products(family, monkeypatch, calls):
    """What a GPU gets, on the CPU."""
    theirs, ours = pair(family)
    monkeypatch.setattr(forward, "backend_for", lambda *args: "grouped")
    for one, other in zip(experts_alone(ours), experts_alone(theirs), strict=True):
        assert error(one, other) < FP32
    assert calls == {"custom grouped" if family == "GptOss" else "plain grouped": 1}


@pytest.mark.filterwarnings("default")  # of torch.compile itself
@pytest.mark.parametrize("family", ["Olmoe", "GptOss"])
def test_compiled_experts_are_one_graph(family):
    theirs, ours = pair(family, num_hidden_layers=1)
    torch._dynamo.reset()
    experts = next(iter(blocks(ours).values())).experts
    experts.forward = torch.compile(experts.forward, fullgraph=True, backend="aot_eager")
    for one, other in zip(experts_alone(ours), experts_alone(theirs), strict=True):
        assert error(one, other) < FP32
    torch._dynamo.reset()


@pytest.mark.filterwarnings("default")
def test_where_there_is_no_kernel_for_one_graph_it_is_broken():
    """An odd width: the custom loop runs as it is, between two graphs."""
    theirs, ours = pair("GptOss", num_hidden_layers=1, intermediate_size=5)
    torch._dynamo.reset()
    experts = next(iter(blocks(ours).values())).experts
    experts.forward = torch.compile(experts.forward, backend="aot_eager")
    for one, other in zip(experts_alone(ours), experts_alone(theirs), strict=True):
        assert error(one, other) < FP32
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("family", ["Olmoe", "GptOss"])
def test_a_compiled_model_is_one_graph(family, backend):
    theirs, ours = pair(family, num_hidden_layers=1)
    tokens, _ = batch()
    torch._dynamo.reset()
    compiled = torch.compile(ours.train(), fullgraph=True, backend=backend)
    assert_same(outcome(compiled, tokens), _named(outcome(theirs.train(), tokens)), FP32)
    torch._dynamo.reset()


def _named(result):
    """A compiled module's parameters have a prefix."""
    return result[0], {f"_orig_mod.{name}": grad for name, grad in result[1].items()}


@every_family
def test_the_watch_counts_exactly(family):
    _, ours = pair(family)
    tokens, mask = batch(pad="left")
    witness = Witness(ours)
    with equipoise.watch(ours, every=1) as eye:
        outcome(ours.train(), tokens, attention_mask=mask)
        eye.step(1)
    assert [stats.layer for stats in eye.stats()] == list(blocks(ours))
    for stats in eye.stats():
        assert stats.num_tokens == int(mask.sum())
        assert stats.counts_E.tolist() == witness.counts(stats.layer, [mask.flatten().tolist()])


def test_loading_and_saving(tmp_path):
    """Chosen at load, not written to the files."""
    model, (tokens, _) = build("Mixtral", experts_implementation="eager"), batch()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="equipoise")
    fresh = transformers.AutoModelForCausalLM.from_config(model.config, experts_implementation="equipoise")
    assert {loaded.config._experts_implementation, fresh.config._experts_implementation} == {"equipoise"}
    with torch.no_grad():
        assert error(loaded(tokens).logits, model(tokens).logits) < FP32
        assert fresh(tokens).logits.isfinite().all()
    loaded.save_pretrained(tmp_path / "again")
    assert "equipoise" not in (tmp_path / "again" / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config._experts_implementation == "grouped_mm"


def test_what_computes_is_what_was_registered():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert ALL_EXPERTS_FUNCTIONS["equipoise"] is equipoise_experts_forward


def losses_of_a_run(folder, implementation):
    """Four optimizer steps of the Trainer of transformers, on Accelerate as always."""
    model = build("Qwen3Moe", experts_implementation=implementation)
    with torch.no_grad():
        for block in blocks(model).values():
            router_of(block).weight.mul_(3)  # decided routers: rounding can't swap two experts
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True, seed=3,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(4))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(tmp_path, calls):
    ours, theirs = (losses_of_a_run(tmp_path, name) for name in ("equipoise", "eager"))
    assert calls == {"plain lean": 4 * 2}
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]


def test_accelerate():
    """Prepared model and optimizer, one accumulated step in bf16 by Accelerate's own autocast."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    losses = {}
    for model in pair("Olmoe"):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        prepared, optimizer = accelerator.prepare(model.train(), torch.optim.SGD(model.parameters(), lr=0.05))
        tokens, seen = batch()[0], []
        for _ in range(3):
            loss = prepared(tokens, labels=tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(loss.detach()))
        losses[model.config._experts_implementation] = seen
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses["equipoise"] == pytest.approx(losses["eager"], rel=0.02)
    assert losses["equipoise"][-1] < losses["equipoise"][0]
