"""compress_(subspaces=...): one decomposition for several configurations, of this model's layers only."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro
import lowrank_ops.compress
from lowrank_ops.factors import layer_by_layer
from lowrank_ops.models.layers import find_layers
from lowrank_ops.subspaces import layer_subspaces


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48, bias=False))


@pytest.fixture
def covariances(model):
    return lro.calibrate(model, [torch.randn(128, 32)], sensitivity="fisher")


@pytest.fixture
def subspaces(model, covariances):
    return layer_subspaces(find_layers(model)[0], covariances)


@pytest.fixture
def decompositions(monkeypatch):
    """The shapes that ``torch.linalg.eigh`` was called with."""
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix, **how: calls.append(matrix.shape) or eigh(matrix, **how))
    return calls


CONFIGS = [
    lro.ParameterBudget(0.6),
    lro.ParameterBudget(0.6, "variance"),
    lro.ExplainedVariance(0.9),
    lro.CompressionConfig(8, projection="output"),
    lro.CompressionConfig(8, projection="weight"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_second_call_decomposes_nothing(model, covariances, subspaces, decompositions, config):
    lro.compress_(copy.deepcopy(model), covariances, config, subspaces=subspaces)
    assert decompositions
    decompositions.clear()
    lro.compress_(copy.deepcopy(model), covariances, config, subspaces=subspaces)
    assert not decompositions


@pytest.mark.parametrize("search", [False, True])
def test_held_decompositions_are_bounded(model, covariances, subspaces, monkeypatch, search):
    monkeypatch.setattr(layer_by_layer if search else lowrank_ops.compress, "MAX_HELD_BYTES", 0)
    if search:
        lro.search_ranks(model, covariances, lambda m: 0.0, 0.1, subspaces=subspaces)
    else:
        lro.compress_(model, covariances, lro.ParameterBudget(0.6), subspaces=subspaces)
    assert all(space.loss.subspace.is_decomposed for space in subspaces.values())
    assert not any(space.held_bytes() for space in subspaces.values())


@torch.no_grad()
def change_bias(model):
    model[0].bias.add_(1)


@torch.no_grad()
def change_weight(model):
    model[0].weight.mul_(2)


@pytest.mark.parametrize("change", [change_weight, change_bias, nn.Module.double])
def test_subspaces_of_another_model_are_refused(model, covariances, subspaces, change):
    other = copy.deepcopy(model)
    change(other)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"subspaces\['0'\] was computed from another weight"):
        lro.compress_(other, covariances, 8, subspaces=subspaces)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("wrong", [[1], {"0": 1}])
def test_subspaces_of_another_type(model, covariances, wrong):
    with pytest.raises(TypeError, match=r"subspaces must come from layer_subspaces\(layers, covariances\)"):
        lro.compress_(model, covariances, 8, subspaces=wrong)


def test_layers_without_subspaces_are_not_left_out(model, covariances, subspaces):
    del subspaces["2"]
    report = lro.compress_(model, covariances, lro.ParameterBudget(0.6), subspaces=subspaces)
    assert [layer.fqn for layer in report.layers] == ["0", "2"]
