"""A model with a layer of every kind, and its calibration."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 32, 4)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(32, 96), "proj": nn.Linear(96, 32)})
        self.mlp = nn.ModuleDict({"<b>&": nn.Linear(32, 64)})
        self.idle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn["proj"](self.attn["qkv"](self.embed(x).flatten(2).mT).tanh())
        return self.head(self.mlp["<b>&"](x).relu().mean(1))


class SmallNet(nn.Module):
    """A grouped convolution and a Linear whose inputs span 3 directions, and a Linear that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, groups=2)
        self.fc = nn.Linear(128, 32)
        self.idle = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="package")
def calibrated_net() -> tuple[Net, lro.Covariances]:
    """With output gradients. Tests compress copies only."""
    torch.manual_seed(0)
    model = Net()
    return model, lro.calibrate(model, torch.randn(400, 2, 8, 8).split(100), sensitivity="fisher")


@pytest.fixture
def net(calibrated_net: tuple[Net, lro.Covariances]) -> tuple[Net, lro.Covariances]:
    model, covariances = calibrated_net
    return copy.deepcopy(model), covariances


def calibrated(side: str = "auto") -> tuple[SmallNet, lro.Covariances]:
    model = SmallNet()
    x = (torch.randn(200, 3) @ torch.randn(3, 72)).view(200, 2, 6, 6)
    return model, lro.calibrate(model, [x], side=side)


@pytest.fixture
def small_net() -> tuple[SmallNet, lro.Covariances]:
    return calibrated()


@pytest.fixture
def output_side_net() -> tuple[SmallNet, lro.Covariances]:
    """Calibration recorded the outputs of the layers."""
    return calibrated(side="output")
