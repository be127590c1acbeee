"""NaN and inf in weights, biases and statistics: one error that names the layer, and nothing is changed."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro

KINDS = ["weight", "bias", "activations", "output_gradients", "token_weighted"]


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4 * 4, 24), nn.ReLU(), nn.Linear(24, 24))
    return model, lro.calibrate(model, [torch.randn(64, 3, 6, 6)], sensitivity="output")


def damaged(calibrated, fqn: str, kind: str, value: float):
    model, covariances = copy.deepcopy(calibrated)
    if kind in ("weight", "bias"):
        values = model.get_parameter(f"{fqn}.{kind}").data
    else:
        values = getattr(covariances[fqn], kind).second_moment
    values.view(-1)[5] = value
    return model, covariances


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fqn", ["0", "4"])
def test_no_rank_and_no_factor_is_made(calibrated, fqn, kind, value):
    model, covariances = damaged(calibrated, fqn, kind, value)
    layers = list(model)
    for policy in (lro.Ranks({fqn: 3}), lro.ParameterBudget(0.9), lro.ExplainedVariance(0.9)):
        with pytest.raises(ValueError, match=rf"covariances\['{fqn}'\].*NaN or inf"):
            lro.compress_(model, covariances, policy)
    with pytest.raises(ValueError, match=rf"covariances\['{fqn}'\].*NaN or inf"):
        lro.utilization(model, covariances)
    with pytest.raises(ValueError, match=rf"covariances\['{fqn}'\].*NaN or inf"):
        lro.search_ranks(model, covariances, lambda trial: 1.0, 0.1)
    make = lro.LowRankConv2d.from_conv2d if fqn == "0" else lro.LowRankLinear.from_linear
    with pytest.raises(ValueError, match="NaN or inf"):
        make(model.get_submodule(fqn), 3, covariances[fqn])
    assert list(model) == layers


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("fqn", ["0", "2", "4"])
def test_calibration_names_the_layer(calibrated, fqn, kind):
    model, _ = damaged(calibrated, fqn, kind, float("inf"))
    with pytest.raises(ValueError, match=f"layer '{fqn}': its {kind} holds NaN or inf"):
        lro.calibrate(model, [torch.randn(8, 3, 6, 6)])
    found = (
        lro.calibrate(model, [torch.randn(8, 3, 6, 6)], filter_fn=lambda module, name: name == "0")
        if fqn != "0"
        else {}
    )
    assert set(found) == ({"0"} if fqn != "0" else set())


@pytest.mark.parametrize("name", ["down", "up", "bias"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_factors_of_a_checkpoint_are_finite(calibrated, tmp_path, name, value):
    dense, covariances = copy.deepcopy(calibrated)
    model = copy.deepcopy(dense)
    lro.compress_(model, covariances, lro.Ranks({"4": 8}))
    model[4].get_parameter(name).data.view(-1)[5] = value
    lro.save_pretrained(model, tmp_path)
    with pytest.raises(lro.CheckpointError, match=rf"layer '4' has NaN or inf in '4\.{name}'"):
        lro.load_pretrained(dense, tmp_path)
    assert isinstance(dense[4], nn.Linear)
    assert not lro.load_pretrained(dense, tmp_path, verify=False)[4].get_parameter(name).isfinite().all()
