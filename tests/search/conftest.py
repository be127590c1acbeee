"""A small model, its statistics, and an evaluation whose value is known."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces


class Net(nn.Module):
    """A convolution, square and oblong layers, and one that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 3, padding=1)
        self.wide = nn.Linear(32 * 16, 64)
        self.again = nn.Linear(64, 64)
        self.head = nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.conv(x).relu().flatten(1)).tanh()
        for _ in range(3):
            x = x + self.again(x).tanh()
        return self.head(x)


class Calibrated(NamedTuple):
    """A model with its statistics."""

    model: nn.Module
    covariances: lro.Covariances
    spaces: dict[str, LayerSubspaces]


class ParameterAccuracy:
    """An accuracy of 100 that falls by ``slope`` times the share of parameters removed.

    Attributes:
        calls: how often a model was evaluated.
        fails_at: the call that raises RuntimeError.
    """

    def __init__(self, model: nn.Module, slope: float = 10, fails_at: int | None = None) -> None:
        self.full = sum(p.numel() for p in model.parameters())
        self.slope, self.fails_at, self.calls = slope, fails_at, 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        assert not torch.is_grad_enabled()
        if self.calls == self.fails_at:
            raise RuntimeError("power cut")
        return 100 - self.slope * (1 - sum(p.numel() for p in model.parameters()) / self.full)


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    torch.manual_seed(0)
    model = Net().double()
    batches = [torch.randn(64, 8, 4, 4).double() * torch.logspace(0, -1, 8).view(8, 1, 1) for _ in range(6)]
    covariances = lro.calibrate(model, batches, sensitivity="fisher")
    layers = {fqn: module for fqn, module in model.named_modules() if fqn in covariances}
    return Calibrated(model, covariances, layer_subspaces(layers, covariances))


@pytest.fixture
def model(calibrated: Calibrated) -> nn.Module:
    """A copy, which a test may compress."""
    return copy.deepcopy(calibrated.model)
