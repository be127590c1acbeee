"""Reports: numbers, tables, JSON and pictures."""

import json
import sys

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.report import format_table
from lowrank_ops.subspaces import layer_subspaces


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, groups=2)
        self.fc = nn.Linear(128, 32)
        self.idle = nn.Linear(32, 32)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


def calibrated(**options):
    model = Model()
    x = (torch.randn(200, 3) @ torch.randn(3, 72)).view(200, 2, 6, 6)
    return model, lro.calibrate(model, [x], **options)


# --- utilization ------------------------------------------------------------------------------------------------


def test_utilization_counts_and_averages():
    model, covariances = calibrated()
    report = lro.utilization(model, covariances, 0.999)
    conv, fc = report.layers
    assert (conv.fqn, conv.in_features, conv.out_features, conv.groups, conv.rows) == ("conv", 9, 4, 2, 3200)
    assert (fc.fqn, fc.in_features, fc.out_features, fc.groups, fc.rows) == ("fc", 128, 32, 1, 200)
    assert fc.input_rank == fc.output_rank == fc.rank == 3 and fc.utilization == 3 / 32
    assert conv.rank == min(conv.input_rank, conv.output_rank)
    assert report.mean_layer_utilization == (conv.utilization + fc.utilization) / 2
    assert report.unreached == ("idle",)


def test_utilization_grows_with_the_explained_variance():
    model, covariances = calibrated()
    shares = [0.5, 0.9, 0.99, 0.999, 1]
    found = [lro.utilization(model, covariances, share).mean_layer_utilization for share in shares]
    assert found == sorted(found) and found[0] < found[-1]


@pytest.mark.parametrize("centered", [True, False])
def test_given_subspaces_are_used_only_where_they_fit(centered):
    model, covariances = calibrated()
    layers = {"conv": model.conv, "fc": model.fc}
    expected = lro.utilization(model, covariances, centered=centered)
    assert expected.centered is centered
    for given in (True, False):
        spaces = layer_subspaces(layers, covariances, centered=given)
        assert lro.utilization(model, covariances, centered=centered, subspaces=spaces) == expected


def test_the_table_names_everything():
    model, covariances = calibrated()
    lines = lro.utilization(model, covariances, 0.999).table().splitlines()
    assert lines[0].split() == ["layer", "in", "out", "k_S", "k_T", "rank", "utilization"]
    assert lines[3].split() == ["fc", "128", "32", "3", "3", "3", "9.4%"]
    assert lines[4].startswith("Mean Layer Utilization ") and lines[4].endswith("at explained variance 0.999")
    assert lines[5] == "by kind: mlp 9.4%, conv 100.0%"
    assert lines[6] == "not reached by any batch: idle"


def test_a_streamed_output_has_no_input_rank():
    model, covariances = calibrated(side="output")
    report = lro.utilization(model, covariances)
    assert report.layers[1].input_rank is None and report.layers[1].rank == report.layers[1].output_rank
    assert "not measured" in report.table() and json.loads(report.to_json())["layers"][1]["input_rank"] is None


def test_skipped_modules_are_in_the_report():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match="attention"):
        covariances = lro.calibrate(model, [torch.randn(20, 8)], forward=lambda model, x: model["fc"](x))
    table = lro.utilization(model, covariances).table()
    assert "left as it is: attention: nn.MultiheadAttention applies its projections" in table


def test_json_holds_the_report():
    model, covariances = calibrated()
    report = lro.utilization(model, covariances, 0.9)
    values = json.loads(report.to_json())
    assert values["mean_layer_utilization"] == report.mean_layer_utilization
    assert values["explained_variance"] == 0.9 and values["unreached"] == ["idle"]
    assert [layer["rank"] for layer in values["layers"]] == [layer.rank for layer in report.layers]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot_is_a_picture(tmp_path, ending):
    pytest.importorskip("matplotlib")
    model, covariances = calibrated()
    path = tmp_path / f"utilization.{ending}"
    lro.utilization(model, covariances).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_a_plot_without_matplotlib_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model, covariances = calibrated()
    with pytest.raises(ImportError, match=r"pip install 'lowrank_ops\[plots\]'"):
        lro.utilization(model, covariances).plot(tmp_path / "a.png")


@pytest.mark.parametrize("share", [0, 1.5, float("nan")])
def test_bad_shares(share):
    with pytest.raises(ValueError, match=r"explained_variance must be a number in \(0, 1\]; got"):
        lro.utilization(*calibrated(), share)


def test_nothing_measured_is_an_error():
    model, covariances = calibrated()
    with pytest.raises(ValueError, match="covariances hold none of the model's layers that filter_fn keeps"):
        lro.utilization(model, covariances, filter_fn=lambda module, fqn: fqn == "idle")


# --- compression ------------------------------------------------------------------------------------------------


def test_the_compression_report():
    model, covariances = calibrated()
    config = lro.CompressionConfig(lro.Ranks({"fc": 2}))
    report = lro.compress_(model, covariances, config)
    conv, fc = report.layers
    assert (conv.rank, conv.stored_rank, conv.predicted_error) == (None, None, 0.0)
    assert (fc.rank, fc.stored_rank, fc.rows) == (2, 8, 200)
    assert (fc.dense_parameters, fc.parameters) == (128 * 32 + 32, 8 * (128 + 32) + 32)
    assert 0 < fc.predicted_error < fc.output_variance
    lines = report.table().splitlines()
    assert lines[2].split()[:5] == ["conv", "4", "x", "9", "dense"] and lines[2].endswith("0.000%")
    assert lines[3].split()[:6] == ["fc", "32", "x", "128", "2", "8"]
    assert lines[3].endswith(f"{fc.predicted_error / fc.output_variance:.3%}")
    assert lines[4].startswith("layer parameters 4,208 -> 1,392 (33.1%), model 5,264 -> 2,448 (46.5%)")
    assert lines[5] == "left as it is: idle: no calibration batch reached it"
    values = json.loads(report.to_json())
    assert lro.CompressionConfig.from_dict(values["config"]) == config
    assert values["layer_parameters"] == 1392 and values["layers"][1]["rank"] == 2


def test_an_error_that_is_not_known_is_said_to_be():
    model, covariances = calibrated(side="output")
    report = lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"fc": 2}), "weight"))
    assert "not known" in report.table() and json.loads(report.to_json())["layers"][1]["predicted_error"] is None


def test_columns_are_aligned():
    assert format_table(["a", "bcd"], [["long", "1"], ["b", "22"]]).splitlines() == [
        "a     bcd",
        "----  ---",
        "long    1",
        "b      22",
    ]
