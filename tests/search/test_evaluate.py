"""search_ranks: what evaluate may return, and what it may change."""

import pytest
import torch
from torch import nn

import lowrank_ops as lro


@pytest.mark.parametrize("returned", [float("nan"), None, "good"])
def test_accuracy_must_be_a_finite_number(returned):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).train()
    covariances = lro.calibrate(model, [torch.randn(64, 32)])

    def evaluate(compressed):
        compressed.eval()
        return returned

    modules = list(model)
    with pytest.raises(ValueError, match=r"evaluate must return the model's accuracy as a finite number"):
        lro.search_ranks(model, covariances, evaluate, 0.1, allocation="variance")
    assert list(model) == modules and all(module.training for module in model.modules())
