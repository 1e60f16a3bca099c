"""The layer by itself: what it decides, what comes out, and three ways to keep it in balance.

Run it with `python examples/01_moe_layer.py`. It needs no data, and checks what it prints.
"""

import torch
from torch.nn import functional

import equipoise as eq
from equipoise.layer import reduce_and_update
from equipoise.types import Routed

B, S, D, F, E, K = 8, 64, 32, 64, 8, 2  # sequences, tokens in each, model dim, expert dim, experts, experts per token


def look_inside() -> None:
    """One forward: a token's output is the weighted sum of its K experts, and padding takes part in nothing."""
    layer = eq.MoE(D, F, E, router=eq.TopK(k=K)).eval()
    x = torch.randn(B, S, D)
    padding_mask = torch.zeros(B, S, dtype=torch.bool)
    padding_mask[:, 48:] = True

    seen: list[Routed] = []
    hook = layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed))
    y = layer(x, padding_mask=padding_mask)
    hook.remove()

    decision, counts_E = seen[0].decision, seen[0].plan.counts_e
    print(f"{decision.num_tokens} real tokens: {counts_E.tolist()} assignments per expert")
    assert counts_E.sum() == K * (~padding_mask).sum()
    assert (y[padding_mask] == 0).all()

    ids_K, weights_K = decision.expert_ids_N[:K], decision.weights_N[:K]  # of the first token
    by_hand = torch.zeros(D)
    for expert, weight in zip(ids_K.tolist(), weights_K, strict=True):
        gate, up = (layer.experts.up[expert] @ x[0, 0]).chunk(2)
        by_hand += weight * (layer.experts.down_proj[expert] @ (functional.silu(gate) * up))
    torch.testing.assert_close(y[0, 0], by_hand)
    print(f"token 0: experts {ids_K.tolist()}, weights {[round(w, 3) for w in weights_K.tolist()]}, equal by hand")


def train_with(balance: tuple) -> tuple[float, float]:
    """MaxVio before and after 40 steps of a layer whose router begins with strong preferences."""
    torch.manual_seed(0)
    layer = eq.MoE(D, F, E, router=eq.TopK(k=K, init_std=0.2), balance=balance)
    x, target = torch.randn(B, S, D) + 2.0, torch.randn(B, S, D)  # + 2: a direction that all tokens share
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    violations = []
    layer.tap.register_forward_hook(lambda module, args, routed: violations.append(max_violation(routed)))
    for _ in range(40):
        functional.mse_loss(layer(x), target).backward()  # a balancing loss comes along, attached to the output
        optimizer.step()
        optimizer.zero_grad()
        reduce_and_update([layer])  # a balancer moves once per step, without gradients
    return violations[0], violations[-1]


def max_violation(routed: Routed) -> float:
    """How far the busiest expert is above the fair load: 0 is even, E / K - 1 means that every token goes there."""
    counts_E = routed.plan.counts_e
    return float(counts_E.max() * E / counts_E.sum()) - 1


if __name__ == "__main__":
    torch.manual_seed(0)
    look_inside()
    unaided = train_with(())[1]
    for balance in (eq.SwitchLoss(coef=0.1), eq.BiasBalance(rate=0.05, rule="smooth"), eq.QuantileBalance()):
        before, after = train_with((balance,))
        print(f"{type(balance).__name__:16} MaxVio {before:.2f} -> {after:.2f} (unaided {unaided:.2f})")
        assert after < 0.75 * unaided
