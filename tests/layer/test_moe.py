"""The layer's constructor, shapes, dtypes and what it shows of itself."""

import copy

import pytest
import torch

from equipoise.layer import FeedForward, MoE
from equipoise.layer.experts import Experts, backend_for
from equipoise.routing import BiasBalance, ImportanceLoss, LoadLoss, QuantileBalance, SwitchLoss, TopK, ZLoss


def build(**kwargs) -> MoE:
    layer = MoE(8, 16, 4, **kwargs)
    layer.init_weights(0.5, 0.5)
    return layer


class TestShapes:
    def test_takes_sequences_or_plain_tokens(self):
        layer, x = build(), torch.randn(2, 5, 8)
        torch.testing.assert_close(layer(x).view(10, 8), layer(x.view(10, 8)))
        assert layer(x.transpose(0, 1)).shape == (5, 2, 8)  # not contiguous

    @pytest.mark.parametrize(
        ("shape", "kwargs", "message"),
        [
            ((8,), {}, r"x must be \(B, S, D\) or \(T, D\), got \(8,\); flatten leading axes first"),
            ((2, 3, 4, 8), {}, r"x must be \(B, S, D\) or \(T, D\), got \(2, 3, 4, 8\)"),
            (
                (2, 3, 8),
                {"padding_mask": torch.zeros(3, 2, dtype=torch.bool)},
                r"padding_mask must have the shape \(2, 3\) \(x without D\), got \(3, 2\)",
            ),
            ((2, 3, 8), {"token_ids": torch.zeros(6, dtype=torch.int64)}, r"token_ids must have the shape \(2, 3\)"),
            (
                (2, 3, 8),
                {"padding_mask": torch.zeros(2, 3)},
                r"must be bool, True at padding, got torch\.float32.*== 0`",
            ),
        ],
    )
    def test_refuses_shapes_that_do_not_fit(self, shape, kwargs, message):
        with pytest.raises(ValueError, match=message):
            build()(torch.randn(shape), **kwargs)


class TestDtypes:
    @pytest.mark.parametrize("backend", ["lean", "grouped", "reference"])
    def test_autocast_computes_experts_in_its_dtype_and_returns_that_of_x(self, backend, routed_by):
        layer, x = build(backend=backend, shared_experts=1, shared_gate=True), torch.randn(2, 6, 8)
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y, routed = routed_by(layer, x)
        y.square().sum().backward()
        assert y.dtype == torch.float32
        assert routed.decision.logits_TE.dtype == torch.float32
        assert routed.decision.weights_N.dtype == torch.float32
        error = (y - exact).abs().max() / exact.abs().max()
        assert 1e-5 < error < 2e-2  # bf16 it is, and no worse than that
        assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}

    def test_bf16_model_keeps_the_bias_in_fp32(self):
        layer = build(balance=(BiasBalance(),))
        layer(torch.randn(2, 6, 8))
        layer.balancer.update()
        before = layer.balancer.bias_E.clone()
        assert before.any()
        layer.bfloat16()
        assert layer.router.weight.dtype == torch.bfloat16
        assert layer.balancer.bias_E.dtype == torch.float32
        assert torch.equal(layer.balancer.bias_E, before)
        y = layer(torch.randn(2, 6, 8, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16

    def test_kept_for_backward_in_bf16_is_little_more_than_x_and_z(self):
        """x is kept once: for the router, the experts and their gather together."""
        T, D, F, E, K = 64, 256, 48, 4, 2
        layer = MoE(D, F, E, router=TopK(k=K)).bfloat16()
        x = torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True)
        saved: dict[int, int] = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        for parameter in layer.parameters():
            saved.pop(parameter.untyped_storage().data_ptr(), None)
        lean = 2 * T * D + 4 * T * K * F
        routing = 4 * T * (E + 4 * K) + 8 * T * 6 * K + 1024  # fp32 scores and weights, int64 ids and orders
        assert y.requires_grad
        assert lean <= sum(saved.values()) <= lean + routing
        assert routing * 0 < 2 * 2 * T * D  # an fp32 copy of x would be 4 T D = 8192 bytes


class TestShared:
    @pytest.mark.parametrize("activation", ["swiglu", "gelu"])
    def test_shared_expert_is_added_and_gated(self, activation):
        plain = build(activation=activation)
        shared = build(activation=activation, shared_experts=2)
        gated = build(activation=activation, shared_experts=2, shared_gate=True)
        shared.load_state_dict({**shared.state_dict(), **plain.state_dict()})
        gated.load_state_dict({**gated.state_dict(), **shared.state_dict()})
        x = torch.randn(5, 8)
        block = shared.shared(x)
        torch.testing.assert_close(shared(x), plain(x) + block)
        gate = (x @ gated.shared_gate.weight.t()).sigmoid()
        torch.testing.assert_close(gated(x), plain(x) + gate * block)
        assert shared.shared.down_proj.weight.shape == (8, 32)  # two experts of 16, as one block

    @pytest.mark.parametrize("activation", ["swiglu", "gelu"])
    def test_dense_block_is_one_expert(self, activation):
        dense, experts = FeedForward(8, 16, activation), Experts(1, 8, 16, activation)
        dense.init_weights(0.5, 0.5)
        layer = MoE(8, 16, 1, router=TopK(k=1), activation=activation)
        up = dense.gate_up_proj if activation == "swiglu" else dense.up_proj
        with torch.no_grad():
            layer.experts.up.copy_(up.weight[None])
            layer.experts.down_proj.copy_(dense.down_proj.weight[None])
        x = torch.randn(5, 8)
        torch.testing.assert_close(layer(x), dense(x))  # one expert has probability 1
        assert {name for name, _ in experts.named_parameters()} == {
            n.removesuffix(".weight") for n in dict(dense.named_parameters())
        }


class TestInitialValues:
    def test_output_projections_have_their_own_std(self):
        layer = MoE(64, 64, 8, shared_experts=1, shared_gate=True)
        layer.init_weights(0.1, 0.01)
        for name, parameter in layer.named_parameters():
            expected = 0.01 if "down_proj" in name else 0.1
            assert parameter.std().item() == pytest.approx(expected, rel=0.25), name


class TestBackends:
    def test_cpu_takes_lean_and_says_why(self):
        assert "backend=lean (fastest in training on a CPU" in repr(build().experts)
        assert "backend=grouped (asked for)" in repr(build(backend="grouped").experts)

    @pytest.mark.parametrize(
        ("dim", "hidden_dim", "shown"),
        [
            (8, 8, r"backend=grouped (one kernel for all experts, no host synchronisation)"),
            (6, 8, r"backend=lean (grouped_mm needs strides of whole 16 bytes, dim = 6 in torch.float32 is not)"),
            (8, 6, r"backend=lean (grouped_mm needs strides of whole 16 bytes, hidden_dim = 6 in"),
        ],
    )
    def test_other_devices_take_grouped_where_it_can_run(self, dim, hidden_dim, shown):
        with torch.device("meta"):
            experts = Experts(4, dim, hidden_dim)
        assert shown in repr(experts)
        x = torch.empty(3, dim, device="meta")
        assert f"backend={backend_for('auto', x, experts.up, experts.down_proj)[0]} " in repr(experts)

    def test_refuses_unknown_names(self):
        with pytest.raises(
            ValueError,
            match=r"backend: expected auto, lean, native, few, native_few, grouped, triton, reference, got 'fast'",
        ):
            build(backend="fast")
        with pytest.raises(ValueError, match=r"activation: expected one of swiglu, gelu, clamped_swiglu, got 'relu'"):
            build(activation="relu")


class TestConfiguration:
    @pytest.mark.parametrize("name", ["dim", "hidden_dim", "num_experts"])
    def test_refuses_sizes_below_one(self, name):
        sizes = {"dim": 8, "hidden_dim": 8, "num_experts": 4, name: 0}
        with pytest.raises(ValueError, match=rf"MoE\.{name}: expected at least 1, got 0"):
            MoE(**sizes)

    def test_refuses_a_gate_without_a_shared_expert(self):
        with pytest.raises(ValueError, match=r"MoE\.shared_gate: there is no shared expert to gate; set shared_exp"):
            build(shared_gate=True)

    def test_refuses_more_experts_per_token_than_there_are(self):
        with pytest.raises(ValueError, match=r"expected at most num_experts = 4, got 5"):
            build(router=TopK(k=5))

    def test_refuses_two_balancers_and_a_loss_twice(self):
        with pytest.raises(ValueError, match=r"at most one balancer, got .*BiasBalance.*QuantileBalance.*would fight"):
            build(balance=(BiasBalance(), QuantileBalance()))
        with pytest.raises(ValueError, match=r"expected each loss once, got \['z', 'z'\]; add up their coefficients"):
            build(balance=(ZLoss(), ZLoss(0.1)))
        build(balance=(SwitchLoss(scope="micro"), SwitchLoss(scope="global")))  # two losses, two names

    @pytest.mark.parametrize("loss", [ImportanceLoss(), LoadLoss()], ids=repr)
    @pytest.mark.parametrize("balancer", [BiasBalance(), QuantileBalance()], ids=repr)
    def test_warns_of_a_balancer_with_a_loss_that_balances_something_else(self, loss, balancer):
        with pytest.warns(
            UserWarning, match=rf"balance: {loss.name} with {type(balancer).__name__}: .* pull apart; use"
        ):
            build(balance=(balancer, loss))

    @pytest.mark.parametrize("balance", [(BiasBalance(), SwitchLoss()), (QuantileBalance(), ZLoss())], ids=repr)
    def test_the_usual_pairs_do_not_warn(self, balance):
        assert build(balance=balance).balancer is not None  # warnings are errors here

    def test_balance_may_be_any_iterable(self):
        assert len(build(balance=(loss for loss in (SwitchLoss(), ZLoss()))).losses) == 2


class TestTap:
    def test_an_observer_changes_no_bit(self, routed_by):
        layer, x = build(balance=(SwitchLoss(),)), torch.randn(2, 5, 8)
        seen, routed = routed_by(layer, x)
        assert torch.equal(seen, layer(x))
        assert (routed.decision.num_tokens, routed.decision.num_experts, routed.decision.top_k) == (10, 4, 2)
        assert routed.plan.counts_e.sum().item() == 20

    def test_a_trained_layer_can_be_copied(self):
        layer, x = build(balance=(BiasBalance(), SwitchLoss())), torch.randn(2, 5, 8)
        layer(x).sum().backward()
        layer.balancer.update()
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x), layer(x))
        assert {name for name in layer.state_dict() if name.startswith("balancer.")} == {
            "balancer.bias_E",
            "balancer.momentum_E",
            "balancer.frozen",
        }
        assert not any("balancer" in name for name, _ in layer.named_parameters())
