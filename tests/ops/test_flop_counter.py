"""torch's FlopCounterMode counts the op, forward and backward."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_ops as lro


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(32, 64), (2, 5, 64), (64,), (0, 64)])
def test_forward_counts_two_gemms(shape):
    x, down, up = torch.randn(*shape), torch.randn(16, 64), torch.randn(48, 16)
    assert flops(lambda: lro.ops.lowrank_linear(x, down, up)) == 2 * (x.numel() // 64) * 16 * (64 + 48)


def test_backward_counts_its_gemms():
    layer, x = lro.LowRankLinear(64, 48, rank=16), torch.randn(32, 64, requires_grad=True)
    twice = [nn.Linear(64, 16, bias=False), nn.Linear(16, 48)]
    expected = flops(lambda: twice[1](twice[0](x)).sum().backward())
    recomputed = 2 * 32 * 64 * 16  # x down^T is not saved
    assert flops(lambda: layer(x).sum().backward()) == expected + recomputed


def test_a_compressed_model_counts_less_than_the_dense_one():
    model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), torch.randn(200, 64)
    before = flops(lambda: model(x))
    lro.compress_(model, lro.calibrate(model, [x]), 16)
    assert flops(lambda: model(x)) == 2 * 200 * 16 * (64 + 128) * 2 < before
