"""The calibrated network, and an evaluation with a known value."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.calibrated_net import Calibrated
from tests.calibrated_net import calibrated as calibrated


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


@pytest.fixture
def model(calibrated: Calibrated) -> nn.Module:
    """A copy, which a test may compress."""
    return copy.deepcopy(calibrated.model)
