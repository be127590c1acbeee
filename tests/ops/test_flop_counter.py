"""torch's FlopCounterMode counts the op, forward and backward."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_ops as lro
from lowrank_ops.layers import to_plain_layers


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


class QueryKey(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x) * self.key(x)


@pytest.mark.parametrize(
    ("make", "shape", "config"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU()), (200, 64), {"rank": lro.ByteBudget(0.2)}),
        (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU()), (200, 64), {"rank": lro.ByteBudget(0.4)}),
        (lambda: nn.Sequential(nn.Conv2d(8, 32, 3)), (20, 8, 8, 8), {"rank": 8}),
        (lambda: nn.Sequential(nn.Conv1d(8, 32, 3, groups=2)), (20, 8, 80), {"rank": 4}),
        (QueryKey, (200, 64), {"rank": lro.ParameterBudget(0.5), "group": True}),
    ],
)
def test_every_layer_counts_what_its_plain_copy_counts(make, shape, config):
    model, x = make().eval(), torch.randn(*shape)
    lro.compress_(model, lro.calibrate(model, [x]), lro.CompressionConfig(**config))
    plain = to_plain_layers(model)
    with torch.no_grad():
        assert flops(lambda: model(x)) == flops(lambda: plain(x)) > 0


def test_pivoted_layers_and_profilers():
    model, x = nn.Sequential(nn.Linear(64, 128)), torch.randn(200, 64)
    lro.compress_(model, lro.calibrate(model, [x]), lro.CompressionConfig(16, pivoted=True))
    assert flops(lambda: model(x)) == 2 * 200 * 16 * (64 + 128 - 16)
    model = nn.Sequential(lro.LowRankLinear(64, 128, rank=16, bias=False))
    with torch.profiler.profile(with_flops=True) as profile:
        model(x)
    assert sum(event.flops for event in profile.key_averages()) == flops(lambda: model(x))
