"""compress_: arguments that are errors, and models compressed in inference mode."""

import pytest
import torch
from torch import nn

import lowrank_ops as lro


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.fixture
def batches(model):
    return [torch.randn(64, 32) for _ in range(3)]


def test_parameters_made_in_inference_mode_can_be_trained(model, batches):
    with torch.inference_mode():
        lro.compress_(model, lro.calibrate(model, batches), lro.ParameterBudget(0.8))
    assert any(isinstance(module, lro.LowRankLinear) for module in model)
    model(batches[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_config_of_another_type(model, batches):
    with pytest.raises(TypeError, match=r"config must be a CompressionConfig, .*; got '0.5'"):
        lro.compress_(model, lro.calibrate(model, batches), "0.5")


def test_covariances_of_another_type(model, batches):
    with pytest.raises(TypeError, match=r"must come from calibrate\(model, batches\) .*; got a list of Tensor"):
        lro.compress_(model, batches)


@pytest.mark.parametrize("ranks", [["0"], {0: 3}])
def test_ranks_are_a_mapping_by_name(ranks):
    with pytest.raises(TypeError, match=r"overrides must be a mapping"):
        lro.CompressionConfig(overrides=ranks)
    with pytest.raises(TypeError, match=r"ranks must be a mapping"):
        lro.Ranks(ranks)


def test_a_compressed_model_has_nothing_to_replace(model, batches):
    lro.compress_(model, lro.calibrate(model, batches), lro.Ranks({"0": 8, "2": 8}))
    with pytest.raises(ValueError, match=r"can be replaced and that filter_fn keeps"):
        lro.compress_(model, lro.Covariances())


def test_low_rank_layers_are_reported_as_such(model, batches):
    covariances = lro.calibrate(model, batches)
    lro.compress_(model, covariances, lro.Ranks({"0": 8}))
    report = lro.compress_(model, covariances, lro.Ranks({"2": 8}))
    assert report.skipped == {"0": "it is low-rank already"}
    with pytest.raises(ValueError, match=r"\n  0: it is low-rank already\n  2: it is low-rank already"):
        lro.compress_(model, covariances)


@pytest.mark.parametrize("filter_fn", ["0", ["0", "2"]])
def test_a_filter_is_a_function(model, batches, filter_fn):
    with pytest.raises(TypeError, match=r"filter_fn must be a function filter_fn\(module, fqn\) -> bool"):
        lro.compress_(model, lro.calibrate(model, batches), filter_fn=filter_fn)
    with pytest.raises(TypeError, match=r"filter_fn must be a function filter_fn\(module, fqn\) -> bool"):
        lro.calibrate(model, batches, filter_fn=filter_fn)


def test_a_budget_spent_by_overrides_says_so(model, batches):
    config = lro.CompressionConfig(lro.ParameterBudget(0.5), overrides={"re:.*": None})
    with pytest.raises(ValueError, match=r"-1381 are available \(overrides take 2762 of 1381\)\."):
        lro.compress_(model, lro.calibrate(model, batches), config)
