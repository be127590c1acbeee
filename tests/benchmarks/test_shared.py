"""The study of shared factors: parameters are at most equal, and one member alone gets the package's own factors."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from benchmarks.accuracy import shared
from lowrank_ops.demo.vit import load_vit
from lowrank_ops.factors import factorize
from lowrank_ops.subspaces import layer_subspaces


def test_the_demo_model_with_three_layers_is_the_same():
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(shared.separate_vit()(images), load_vit()(images))


def test_shared_factors_are_optimal_and_no_larger():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 24), shared.ThreeLayers(nn.Linear(24, 72)), nn.Linear(72, 4))
    covariances = lro.calibrate(model, [torch.randn(200, 30) for _ in range(3)], sensitivity="fisher")
    layers = {fqn: module for fqn, module in model.named_modules() if fqn in covariances}
    spaces = layer_subspaces(layers, covariances)
    own = factorize(spaces["1.q"], 8, "loss")
    (found,), increase = shared.shared_factors([spaces["1.q"]], 8)
    assert increase == pytest.approx(0.5 * float(spaces["1.q"].loss.spectrum[8:].sum()), rel=1e-6)
    torch.testing.assert_close((found.up @ found.down).double(), own.up @ own.down, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.bias.double(), own.bias, atol=1e-4, rtol=1e-3)
    separate = copy.deepcopy(model)
    names = ["1.q", "1.k", "1.v"]
    lro.compress_(separate, covariances, lro.CompressionConfig(lro.Ranks(dict.fromkeys(names, 8))))
    result, saved, ratios = shared.with_shared(model, separate, [names], spaces)
    downs = [result.get_submodule(name).down[:12] for name in names]
    assert torch.equal(downs[0], downs[1]) and torch.equal(downs[0], downs[2])
    assert result.get_submodule("1.k").rank == 12 and saved == 0  # 8 * 3 * 48 = 12 * (24 + 72)
    assert len(ratios) == 1 and ratios[0] > 0
    assert result(torch.randn(5, 30)).shape == (5, 4)


def test_table_has_a_line_per_model_and_budget():
    rows = [
        {"model": "demo ViT", "budget": 50.0, "form": "separate", "accuracy": 89.0},
        {"model": "demo ViT", "budget": 50.0, "form": "shared", "accuracy": 88.0, "loss_ratios": [1.5, 1.25]},
    ]
    assert shared.table(rows).splitlines()[-1] == "| demo ViT | 50% | 89.00% | 88.00% | 1.25 to 1.50 |"
