"""LowRankLinear.from_linear: arguments that are errors."""

import pytest
import torch
from torch import nn

import lowrank_ops as lro


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(32, 64)


@pytest.fixture
def covariances(linear):
    return lro.calibrate(linear, [torch.randn(64, 32)])


@pytest.mark.parametrize("calibrated", [False, True])
def test_unknown_projection(calibrated, linear, covariances):
    statistics = covariances[""] if calibrated else None
    with pytest.raises(ValueError, match=r"projection must be one of .*got 'zzz'"):
        lro.LowRankLinear.from_linear(linear, 8, statistics, projection="zzz")


def test_covariances_of_a_model_are_a_type_error(linear, covariances):
    with pytest.raises(TypeError, match=r"covariances\['name'\], or None; got Covariances"):
        lro.LowRankLinear.from_linear(linear, 8, covariances)
