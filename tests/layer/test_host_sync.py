"""No wait for the host in forward and backward of a training layer. Only a GPU can tell."""

import pytest
import torch

from equipoise.layer import Capacity, MoE
from equipoise.ops.count import accumulate_counts
from equipoise.routing import BiasBalance, QuantileBalance, SwitchLoss, TopK, ZLoss


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisation is observable on a CUDA GPU only")
@pytest.mark.parametrize("capacity", [None, Capacity(1.0, "position"), Capacity(1.0, "probability")], ids=repr)
@pytest.mark.parametrize("balance", [BiasBalance(), QuantileBalance()], ids=repr)
def test_grouped_layer_never_waits_for_the_host(balance, capacity):
    losses = (SwitchLoss(scope="sequence"), SwitchLoss(scope="global"), ZLoss())
    layer = MoE(64, 64, 8, router=TopK(k=2), balance=(balance, *losses), capacity=capacity, backend="grouped")
    layer.to("cuda", torch.bfloat16)
    seen = torch.zeros(8, dtype=torch.int64, device="cuda")
    layer.tap.register_forward_hook(lambda module, args, routed: accumulate_counts(seen, routed.decision.expert_ids_N))
    x = torch.randn(4, 32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()  # the first run may load kernels
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen.sum().item() == 2 * 4 * 32 * 2
