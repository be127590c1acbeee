"""Measured output errors: definition, agreement with predictions, masks, and models left as they were."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.report import CompressionReport


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1, groups=2)
        self.wide = nn.Linear(256, 48)
        self.head = nn.Linear(48, 24)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.wide(self.conv(x).relu().flatten(1)).tanh()))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 24)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.encode(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.fc(x)


def images(count: int) -> Tensor:
    return torch.randn(count, 4, 4, 4, dtype=torch.float64) * torch.logspace(0, -1, 4).view(4, 1, 1) + 0.5


def compressed(centered: bool = True) -> tuple[nn.Module, nn.Module, CompressionReport]:
    torch.manual_seed(0)
    dense = Net().double()
    covariances = lro.calibrate(dense, images(4000).split(500))
    small = copy.deepcopy(dense)
    config = lro.CompressionConfig(lro.Ranks({"conv": 4, "wide": 12, "head": 8}), centered=centered)
    return dense, small, lro.compress_(small, covariances, config)


@pytest.mark.parametrize("centered", [True, False])
@torch.no_grad()
def test_errors_follow_their_definition(centered: bool) -> None:
    dense, small, _ = compressed(centered)
    x = images(64)
    errors = lro.measure_errors(dense.eval(), small, x.split(16), centered=centered)
    hidden = dense.conv(x).relu().flatten(1)
    y = dense.wide(hidden)
    compared = y - y.mean(0) if centered else y - dense.wide.bias
    expected = (y - small.wide(hidden)).square().sum() / compared.square().sum()
    assert errors["wide"] == pytest.approx(float(expected))
    y = dense.conv(x)
    compared = y - y.mean((0, 2, 3), keepdim=True) if centered else y - dense.conv.bias.view(-1, 1, 1)
    expected = (y - small.conv(x)).square().sum() / compared.square().sum()
    assert errors["conv"] == pytest.approx(float(expected))


@pytest.mark.parametrize("centered", [True, False])
def test_prediction_is_exact_on_the_calibration_rows(centered: bool) -> None:
    torch.manual_seed(0)
    dense, small, report = compressed(centered)
    torch.manual_seed(0)
    Net().double()
    errors = lro.measure_errors(dense, small, images(4000).split(500), centered=centered)
    for layer in report.layers:
        assert errors[layer.fqn] == pytest.approx(layer.relative_error, rel=1e-6)


def test_predictions_hold_on_other_data() -> None:
    dense, small, report = compressed()
    report = report.with_measured(lro.measure_errors(dense, small, images(2000).split(500)))
    prediction = report.prediction()
    assert prediction.layers == 3 and prediction.correlation > 0.9
    assert 0.8 < prediction.worst_ratio < 1.25 and 0.8 < prediction.median_ratio < 1.25
    assert prediction.worst_layer in {"conv", "wide", "head"}
    assert "measured error" in report.table() and report.to_dict()["prediction"]["layers"] == 3


def test_models_keep_their_state_and_hooks() -> None:
    dense, small, _ = compressed()
    dense.train()
    dense.conv.eval()
    small.eval()
    lro.measure_errors(dense, small, [images(8)])
    assert dense.training and dense.drop.training and not dense.conv.training and not small.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    with pytest.raises(RuntimeError):
        lro.measure_errors(dense, small, [torch.zeros(2, 3)])
    assert dense.training and not any(module._forward_hooks for module in dense.modules())


def test_masked_rows_are_ignored() -> None:
    dense, x = Masked(), torch.randn(4, 5, 24)
    keep = torch.ones(4, 5, dtype=torch.int64)
    keep[:, 3:] = 0
    small = copy.deepcopy(dense)
    lro.compress_(
        small, lro.calibrate(dense, [{"x": x, "keep": keep}], mask="keep"), lro.CompressionConfig(lro.Ranks({"fc": 8}))
    )
    spoiled = x.clone()
    spoiled[:, 3:] = 1e4
    plain = lro.measure_errors(dense, small, [{"x": x, "keep": keep}], mask="keep")
    assert lro.measure_errors(dense, small, [{"x": spoiled, "keep": keep}], mask="keep") == plain
    assert lro.measure_errors(dense, small, [{"x": x, "keep": keep}]) != plain


def test_layer_outside_the_forward_with_a_mask_is_refused() -> None:
    dense, batch = Masked(), {"x": torch.randn(4, 5, 24), "keep": torch.ones(4, 5)}
    small = copy.deepcopy(dense)
    lro.compress_(small, lro.calibrate(dense, [batch], mask="keep"), lro.CompressionConfig(lro.Ranks({"fc": 8})))

    def encode(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model.encode(batch["x"])

    def after_another(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(**batch)
        encode(model, batch)

    for forward in (encode, after_another):
        with pytest.raises(ValueError, match=r"layer 'fc' .*was called outside the model's own forward"):
            lro.measure_errors(dense, small, [batch], mask="keep", unmasked_rows="error", forward=forward)
        assert lro.measure_errors(dense, small, [batch], forward=forward)


def test_constant_output_has_an_infinite_error(tmp_path) -> None:
    dense, small, report = compressed()
    errors = lro.measure_errors(dense, small, [images(1)])
    assert errors["wide"] == float("inf") and 0 < errors["conv"] < float("inf")
    report = report.with_measured({**errors, "head": 0.5})
    assert report.prediction().layers == 2
    found = json.loads(report.to_json(), parse_constant=pytest.fail)["layers"]
    assert [layer["measured_error"] is None for layer in found] == [False, True, False]
    report.to_html(tmp_path / "page.html")
    assert "inf%" in report.table()


def test_models_that_cannot_be_compared_are_refused() -> None:
    dense, small, report = compressed()
    with pytest.raises(ValueError, match="compressed has no replaced layer"):
        lro.measure_errors(small, dense, [images(2)])
    with pytest.raises(ValueError, match="dense has no dense layer 'conv'; pass a copy"):
        lro.measure_errors(small, small, [images(2)])
    with pytest.raises(ValueError, match="batches was empty"):
        lro.measure_errors(dense, small, [])
    with pytest.raises(ValueError, match="errors has layers that the report does not have: nowhere"):
        report.with_measured({"nowhere": 1.0})
    assert report.prediction() is None


@pytest.mark.parametrize("broken", ["batch", "compressed"])
def test_outputs_that_are_not_finite_are_refused(broken):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    dense, x = copy.deepcopy(model), torch.randn(40, 16)
    lro.compress_(model, lro.calibrate(model, [x]), lro.Ranks({"2": 4}))
    values = {"batch": x, "compressed": model[2].up.data}[broken]
    values[3, 3] = float("nan" if broken == "batch" else "inf")
    with pytest.raises(lro.NonFiniteActivationError, match="layer '2': its output holds NaN or inf"):
        lro.measure_errors(dense, model, [x])
