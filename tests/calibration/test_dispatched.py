"""Calibration of models that accelerate has dispatched: weights that its hooks move, load and drop on each call."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_ops as lro

accelerate = pytest.importorskip("accelerate")
X = [torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def dense() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(convolution, nn.Linear(144, 32), nn.Tanh(), nn.Linear(32, 5)).eval()


def dispatched(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    if kind == "one device":
        return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if kind == "offloaded":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    places = {"0": "cpu", "1": "disk", "2": "cpu", "3": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def with_gradients(model: nn.Module) -> lro.Covariances:
    return lro.calibrate(model, X[:1], sensitivity="fisher")


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("sensitivity", [None, "fisher"])
@pytest.mark.parametrize("kind", ["one device", "offloaded", "disk"])
def test_covariances_are_those_of_the_model_in_memory(kind: str, sensitivity: str | None, side: str, tmp_path: Path):
    model, options = dense(), {"sensitivity": sensitivity, "side": side, "token_weights": False}
    torch.manual_seed(5)
    expected = lro.calibrate(model, X, **options)
    elsewhere = dispatched(copy.deepcopy(model), kind, tmp_path)
    assert elsewhere[1].weight.is_meta == (kind != "one device")
    y = elsewhere(X[0])
    torch.manual_seed(5)
    found = lro.calibrate(elsewhere, X, **options)
    assert list(found) == list(expected) == ["0.0", "1", "3"] and not found.skipped
    for fqn in found:
        for name, moments in expected[fqn].moments().items():
            other = found[fqn].moments()[name]
            assert other.count == moments.count and not other.total.is_meta
            torch.testing.assert_close(other.second_moment, moments.second_moment)
            torch.testing.assert_close(other.total, moments.total)
    torch.testing.assert_close(elsewhere(X[0]), y)
    with pytest.raises(
        ValueError, match=r"which only calibrate supports; to compress, load the model without device_map"
    ):
        lro.compress_(elsewhere, found, 4)
    assert lro.compress_(model, found, 2).layer_parameters > 0


def test_dispatched_calibrations_are_planned_and_resume_unless_offloaded(tmp_path: Path):
    model = dispatched(dense(), "disk", tmp_path / "weights")
    assert [layer.device.type for layer in lro.plan_calibration(model).layers] == ["cpu"] * 3
    with pytest.raises(
        ValueError, match=r"accelerate has offloaded are the same \('1.weight' first\); leave checkpoint"
    ):
        lro.calibrate(model, X, checkpoint=tmp_path / "saved")
    model = dispatched(dense(), "one device", tmp_path)
    whole = lro.calibrate(model, X, checkpoint=tmp_path / "saved")
    again = lro.calibrate(model, X, checkpoint=tmp_path / "saved")
    assert torch.equal(again["1"].activations.second_moment, whole["1"].activations.second_moment)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, folder: lro.measure_latency(model, X[0]),
        lambda model, folder: lro.layers.to_plain_layers(model),
        lambda model, folder: lro.layers.to_dense_layers(model),
        lambda model, folder: lro.layers.convert_attention_(model),
        lambda model, folder: lro.layers.quantize_(model),
        lambda model, folder: lro.layers.group_(model, [("1", "3")]),
        lambda model, folder: lro.finetune_(model, X, teacher=dense()),
        lambda model, folder: lro.save_pretrained(model, folder / "saved"),
    ],
)
def test_what_needs_the_values_names_accelerate_and_the_remedy(use, tmp_path: Path):
    model = dispatched(dense(), "offloaded", tmp_path)
    with pytest.raises(
        ValueError, match=r"0\.0 cannot .* accelerate's hooks.*accelerate\.hooks\.remove_hook_from_module\(model"
    ):
        use(model, tmp_path)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not model[1].weight.is_meta
