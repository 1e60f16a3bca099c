"""The Triton backend where it belongs: right results, no wait for the host, a decode step in a CUDA graph."""

import pytest
import torch

from equipoise.layer import MoE
from equipoise.routing import BiasBalance, SwitchLoss, TopK

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA GPU can tell")


def layer_with(backend: str) -> MoE:
    torch.manual_seed(0)
    layer = MoE(256, 128, 16, router=TopK(k=4), balance=(BiasBalance(), SwitchLoss()), backend=backend)
    return layer.to("cuda", torch.bfloat16)


def test_it_is_the_grouped_backend_in_output_and_gradients():
    x, results = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16), []
    for backend in ("grouped", "triton"):
        layer, mine = layer_with(backend), x.clone().requires_grad_()
        y = layer(mine)
        y.float().square().sum().backward()
        results.append([y.detach(), mine.grad, *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert float((actual.float() - expected.float()).norm() / expected.float().norm()) < 2e-2


def test_training_never_waits_for_the_host():
    layer = layer_with("triton")
    x = torch.randn(4, 32, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_a_decode_step_in_a_graph_follows_its_input():
    layer = layer_with("triton").eval()
    x = torch.randn(4, 1, 256, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    for _ in range(3):  # other tokens, other experts
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(captured, layer(x))
