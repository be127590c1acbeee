"""Layers that receive the same tensor share its moments, and only those."""

import sys

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from tests.calibration.comparing import shared_inputs
from tests.sums import assert_sums


class Attention(nn.Module):
    """Three layers with one input, one with another."""

    def __init__(self, dim=8):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) + self.k(x) * self.v(x))


def test_layers_with_one_input_share_its_moments(monkeypatch):
    calls = []
    module = sys.modules["lowrank_ops.calibration.sums"]
    update = module.covariance_update_
    monkeypatch.setattr(module, "covariance_update_", lambda *args: (calls.append(args), update(*args)))
    model = Attention()
    batches = [torch.randn(3, 5, 8) for _ in range(4)]
    covariances = lro.calibrate(model, batches)
    assert shared_inputs(covariances) == [["q", "k", "v"], ["o"]]
    assert len(calls) == 2 * len(batches)
    assert_sums(covariances["v"].activations, torch.cat(batches).flatten(0, 1))


def test_sharing_can_be_switched_off():
    x = torch.randn(5, 8)
    covariances = lro.calibrate(Attention(), [x], share_inputs=False)
    assert shared_inputs(covariances) == [["q"], ["k"], ["v"], ["o"]]
    q, k = (covariances[fqn].activations for fqn in "qk")
    assert torch.equal(q.second_moment, k.second_moment)


class Diverging(nn.Module):
    """a and b receive the same tensor in the first forward, and what ``later`` names afterwards."""

    def __init__(self, later):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.later, self.first = later, True

    def forward(self, x):
        first, self.first = self.first, False
        if first or self.later == "same":
            return self.a(x) + self.b(x)
        if self.later == "other":
            return self.a(x) + self.b(x + 1)
        if self.later == "missed":
            return self.a(x)
        if self.later == "changed in place":
            y = self.a(x)
            return y + self.b(x.add_(1))
        return self.b(x) + self.a(x)


@pytest.mark.parametrize("later", ["other", "missed", "changed in place", "order"])
def test_diverging_inputs_are_an_error(later):
    batches = [torch.randn(3, 4) for _ in range(2)]
    with pytest.raises(ValueError, match=r"layer 'b' received the same tensor as 'a' at first.*share_inputs=False"):
        lro.calibrate(Diverging(later), batches)
    covariances = lro.calibrate(Diverging(later), [batch.clone() for batch in batches], share_inputs=False)
    assert covariances["a"].activations.count == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tensor_changed_in_place_between_layers_is_not_shared(mode):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x * 1
            y = self.a(x)
            return y + self.b(x.mul_(2))

    x = torch.randn(5, 4)
    with mode():
        covariances = lro.calibrate(InPlace(), [x])
    assert_sums(covariances["a"].activations, x)
    assert_sums(covariances["b"].activations, 2 * x)


def test_convolutions_share_only_with_equal_geometry():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x)

    covariances = lro.calibrate(Branches(), [torch.randn(2, 2, 5, 5)])
    assert shared_inputs(covariances) == [["a", "b"], ["c"]]


def test_inference_tensors_give_ordinary_sums():
    model = Attention()
    x = torch.randn(3, 8)
    with torch.inference_mode():
        covariances = lro.calibrate(model, [x, x])
    for fqn in ("q", "k", "v"):
        assert_sums(covariances[fqn].activations, torch.cat([x, x]))
    moment = covariances["q"].activations.second_moment
    assert not moment.is_inference()
    moment.add_(1)
