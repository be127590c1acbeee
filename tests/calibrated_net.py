"""A small model with its statistics, for the tests of rank policies and of searches."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    torch.manual_seed(0)
    model = Net().double()
    batches = [torch.randn(64, 8, 4, 4).double() * torch.logspace(0, -1, 8).view(8, 1, 1) for _ in range(6)]
    covariances = lro.calibrate(model, batches, sensitivity="fisher")
    layers = {fqn: module for fqn, module in model.named_modules() if fqn in covariances}
    return Calibrated(model, covariances, layer_subspaces(layers, covariances))
