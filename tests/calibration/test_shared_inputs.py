"""Layers that receive one tensor share its covariance, and only those."""

import sys

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from tests.sums import assert_sums


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Attention(nn.Module):
    """Three layers with one input, one with another."""

    def __init__(self, dim=8):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) + self.k(x) * self.v(x))


def test_layers_with_one_input_share_one_covariance(monkeypatch):
    calls = []
    module = sys.modules["lowrank_ops.calibration.recorder"]
    update = module.covariance_update_
    monkeypatch.setattr(module, "covariance_update_", lambda *args: (calls.append(args), update(*args)))
    model = Attention()
    batches = [torch.randn(3, 5, 8) for _ in range(4)]
    covariances = lro.calibrate(model, batches)
    assert covariances["q"] is covariances["k"] is covariances["v"] is not covariances["o"]
    assert covariances["q"].layers == ["q", "k", "v"]
    assert len(covariances.statistics()) == 2 and len(calls) == 2 * len(batches)
    assert_sums(covariances["v"], torch.cat(batches).flatten(0, 1))


def test_sharing_can_be_switched_off():
    x = torch.randn(5, 8)
    covariances = lro.calibrate(Attention(), [x], share_inputs=False)
    assert covariances["q"] is not covariances["k"] and len(covariances.statistics()) == 4
    assert torch.equal(covariances["q"].second_moment, covariances["k"].second_moment)


class Diverging(nn.Module):
    """a and b get one tensor in the first forward, and what ``later`` says afterwards."""

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
def test_sharing_that_diverges_is_an_error_by_name(later):
    batches = [torch.randn(3, 4) for _ in range(2)]
    with pytest.raises(ValueError, match=r"layer 'b' received the tensor of 'a' at first.*share_inputs=False"):
        lro.calibrate(Diverging(later), batches)
    covariances = lro.calibrate(Diverging(later), [batch.clone() for batch in batches], share_inputs=False)
    assert covariances["a"].count == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_changed_in_place_between_two_layers_is_not_shared(mode):
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
    assert_sums(covariances["a"], x)
    assert_sums(covariances["b"], 2 * x)


def test_convolutions_share_only_with_equal_geometry():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x)

    covariances = lro.calibrate(Branches(), [torch.randn(2, 2, 5, 5)])
    assert covariances["a"] is covariances["b"] is not covariances["c"]


def test_tensors_of_inference_mode():
    model = Attention()
    x = torch.randn(3, 8)
    with torch.inference_mode():
        covariances = lro.calibrate(model, [x, x])
    for fqn in ("q", "k", "v"):
        assert_sums(covariances[fqn], torch.cat([x, x]))
    assert not covariances["q"].second_moment.is_inference()
    covariances["q"].second_moment.add_(1)
