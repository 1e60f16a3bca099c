"""Every experts class of transformers that uses its experts interface, found in its source, against its own loop."""

import importlib
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tests.hf.cases import FP32, error
from tests.monitor.transformers_models import build

from equipoise.hf import explain, register
from equipoise.hf.layout import layout_of

MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation(?:\(.*\))?\nclass (\w+)", re.MULTILINE)
FOUND = sorted(
    (path.parent.name, name)
    for path in MODELS.glob("*/modeling_*.py")
    for name in DECORATED.findall(path.read_text(encoding="utf-8"))
)
E, D, F, T, K = 5, 32, 16, 9, 2
SIZES = {
    "hidden_size": D, "intermediate_size": F, "moe_intermediate_size": F, "moe_hidden_size": D, "moe_latent_size": None,
    "num_experts": E, "num_local_experts": E, "n_routed_experts": E, "moe_num_experts": E,
    "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2",
    "swiglu_limit": 0.7, "swiglu_alpha": 1.702, "mlp_gate_softcap": 0.7, "mlp_up_softcap": 0.7, "post_norm_eps": 1e-6,
}  # fmt: skip
# What is not SwiGLU without biases, gate first. A new class that isn't either fails here, and has to be looked at.
CUSTOM = {
    "AriaExperts": "transposed weights",
    "BeamExperts": "an activation of its own",
    "DeepseekV4Experts": "an activation of its own",
    "DiffusionGemmaTextExperts": "an activation of its own",
    "Gemma4TextExperts": "an activation of its own",
    "Glm5NextTextExperts": "an activation of its own",
    "GptOssExperts": "biases, transposed weights, gate and up interleaved",
    "HYV4Experts": "an activation of its own",
    "HYV4VLExperts": "an activation of its own",
    "Inkling2Experts": "an activation of its own",
    "Inkling2LoopExperts": "an activation of its own",
    "MiniMaxM3VLExperts": "an activation of its own",
    "NemotronHExperts": "no gate",
    "OpenAIPrivacyFilterExperts": "biases, transposed weights",
}
BY_TRANSFORMERS = {"MuseSparkExperts": "it has a norm after each expert, before the combine weight"}


def experts_of(folder, name, implementation="equipoise"):
    """A random module of the class, with what any of these classes reads from its configuration."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = transformers.PreTrainedConfig(**SIZES)
    config._experts_implementation = implementation
    extra = {"intermediate_size": F} if name == "Ernie4_5_VLMoeMoeExperts" else {}
    experts = getattr(module, name)(config, **extra)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return experts


def call(experts, implementation, ids=None):
    """(output, gradients of everything) for the same tokens; expert 3 gets none of them."""
    generator = torch.Generator().manual_seed(1)
    if ids is None:
        ids = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
        ids[ids == 3] = 4
    x = torch.randn(len(ids), D, generator=generator).requires_grad_()
    weights = torch.rand(ids.shape, generator=generator).requires_grad_()
    experts.config._experts_implementation = implementation
    y = experts(x, ids, weights)
    scale = torch.linspace(-1, 1, y.numel()).view(y.shape)
    grads = torch.autograd.grad((y * scale).sum(), [x, weights, *experts.parameters()], allow_unused=True)
    return y.detach(), grads


def test_they_are_found():
    """The seven families of which whole models are compared, and many more."""
    names = {name for _, name in FOUND}
    assert {"MixtralExperts", "OlmoeExperts", "Qwen2MoeExperts", "Qwen3MoeExperts", "DeepseekV3Experts"} <= names
    assert {"GptOssExperts", "NemotronHExperts"} <= names
    assert len(names) > 25  # 31 in 5.14.0, 65 in 5.23.0


@pytest.mark.parametrize(("folder", "name"), FOUND, ids=[name for _, name in FOUND])
def test_equals_the_eager_loop(folder, name):
    experts = experts_of(folder, name)
    [path] = explain(experts)
    if name in BY_TRANSFORMERS:
        assert (path.computed_by, path.reason) == ("transformers", BY_TRANSFORMERS[name])
    elif name in CUSTOM:
        assert (path.computed_by, path.reason) == ("custom ops", CUSTOM[name])
    else:
        assert path.computed_by in ("ops", "custom ops"), f"{name}: {path.reason}"  # of a later transformers too
    expected, grads = call(experts, "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in BY_TRANSFORMERS else "error")
        got, my_grads = call(experts, "equipoise")
    assert error(got, expected) < FP32
    for mine, theirs in zip(my_grads, grads, strict=True):
        assert error(mine, theirs) < FP32
    if name not in BY_TRANSFORMERS:
        stacked = my_grads[2:]
        assert all(not grad[3].any() for grad in stacked)
        with torch.no_grad():  # as in decoding
            assert error(call_without_gradients(experts), expected) < FP32


def call_without_gradients(experts):
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
    ids[ids == 3] = 4
    x, weights = torch.randn(T, D, generator=generator), torch.rand(T, K, generator=generator)
    return experts(x, ids, weights)


@pytest.mark.parametrize(("folder", "name"), [("mixtral", "MixtralExperts"), ("gpt_oss", "GptOssExperts")])
def test_experts_on_other_ranks(folder, name):
    """transformers' expert parallelism gives their choices the number E; the same as expert 0 with the weight 0."""
    experts, ids = experts_of(folder, name), torch.tensor([[0, E], [E, 2], [E, E], [1, 4]])
    absent, generator = ids == E, torch.Generator().manual_seed(2)
    x, weights = torch.randn(4, D, generator=generator), torch.rand(4, K, generator=generator)
    weights[absent] = 0
    results = {}
    for implementation, chosen in (("equipoise", ids), ("eager", ids.where(~absent, 0))):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        experts._is_expert_parallel = implementation == "equipoise"
        experts.config._experts_implementation = implementation
        y = experts(leaves[0], chosen, leaves[1])
        results[implementation] = [y, *torch.autograd.grad(y.square().sum(), [*leaves, *experts.parameters()])]
    assert not results["equipoise"][2][absent].any()
    results["eager"][2][absent] = 0
    for mine, theirs in zip(results["equipoise"], results["eager"], strict=True):
        assert error(mine.detach(), theirs.detach()) < FP32


@pytest.mark.skipif("MuseSparkExperts" not in dict(map(reversed, FOUND)), reason="this transformers has no such class")
def test_falling_back_is_said():
    experts = experts_of("muse_spark", "MuseSparkExperts")
    with pytest.warns(RuntimeWarning, match="MuseSparkExperts has a norm after each expert.*transformers' grouped_mm"):
        call(experts, "equipoise")


def test_parameters_that_we_do_not_know_are_left_to_transformers():
    """Their gradient would be lost: the custom activation is computed outside of the graph."""
    experts = experts_of("mixtral", "MixtralExperts")
    experts.temperature = torch.nn.Parameter(torch.ones(1))
    assert layout_of(experts).missing == "the parameters temperature"


def test_fp8_experts_are_refused_by_name():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    with pytest.raises(NotImplementedError, match=r'expected floating weights, got Linear in FP8.*"grouped_mm"'):
        ALL_FP8_EXPERTS_FUNCTIONS["equipoise"](torch.nn.Linear(1, 1))


def test_explain_names_layers_and_models_without_experts():
    paths = explain(build("GptOss"))
    assert [path.name for path in paths] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"llama: expected experts modules .* got none; experts_implementation has no"):
        explain(transformers.LlamaForCausalLM(config))


def test_another_module_is_refused():
    with pytest.raises(TypeError, match=r"Linear: expected an experts module .* got one without has_bias"):
        layout_of(torch.nn.Linear(1, 1))


def test_without_transformers_the_extra_is_named(monkeypatch):
    """None in sys.modules is how Python notes that a module can't be imported."""
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ModuleNotFoundError, match=r"expected transformers 5 .* pip install 'equipoise\[hf\]'"):
        register()
