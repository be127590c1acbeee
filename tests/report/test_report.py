"""Reports: figures, tables, JSON and plots."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops import report as room
from lowrank_ops.report import format_table
from lowrank_ops.subspaces.layer import layer_subspaces

# --- utilization ------------------------------------------------------------------------------------------------


def test_utilization_counts_and_averages(small_net):
    report = lro.utilization(*small_net, 0.999)
    conv, fc = report.layers
    assert (conv.fqn, conv.in_features, conv.out_features, conv.groups, conv.rows) == ("conv", 9, 4, 2, 3200)
    assert (fc.fqn, fc.in_features, fc.out_features, fc.groups, fc.rows) == ("fc", 128, 32, 1, 200)
    assert fc.input_rank == fc.output_rank == fc.rank == 3 and fc.utilization == 3 / 32
    assert conv.rank == min(conv.input_rank, conv.output_rank)
    assert report.mean_layer_utilization == (conv.utilization + fc.utilization) / 2
    assert report.unreached == ("idle",)


def test_utilization_grows_with_the_explained_variance(small_net):
    shares = [0.5, 0.9, 0.99, 0.999, 1]
    found = [lro.utilization(*small_net, share).mean_layer_utilization for share in shares]
    assert found == sorted(found) and found[0] < found[-1]


@pytest.mark.parametrize("centered", [True, False])
def test_given_subspaces_are_used_only_where_they_fit(small_net, centered):
    model, covariances = small_net
    layers = {"conv": model.conv, "fc": model.fc}
    expected = lro.utilization(model, covariances, centered=centered)
    assert expected.centered is centered
    for given in (True, False):
        spaces = layer_subspaces(layers, covariances, centered=given)
        assert lro.utilization(model, covariances, centered=centered, subspaces=spaces) == expected


def test_utilization_table_has_layers_mean_and_notes(small_net):
    lines = lro.utilization(*small_net, 0.999).table().splitlines()
    assert lines[0].split() == ["layer", "in", "out", "k_S", "k_T", "rank", "utilization"]
    assert lines[3].split() == ["fc", "128", "32", "3", "3", "3", "9.4%"]
    assert lines[4].startswith("Mean Layer Utilization ") and lines[4].endswith("at explained variance 0.999")
    assert lines[5] == "by kind: mlp 9.4%, conv 100.0%"
    assert lines[6].startswith("from at least 200 rows per layer: variances are within 20.0%")
    assert lines[7] == "not reached by any batch: idle"


def test_recorded_outputs_give_no_input_rank(output_side_net):
    report = lro.utilization(*output_side_net)
    assert report.layers[1].input_rank is None and report.layers[1].rank == report.layers[1].output_rank
    assert "not measured" in report.table() and json.loads(report.to_json())["layers"][1]["input_rank"] is None


def test_skipped_modules_are_in_the_report():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match="attention"):
        covariances = lro.calibrate(model, [torch.randn(20, 8)], forward=lambda model, x: model["fc"](x))
    assert "skipped: attention: nn.MultiheadAttention" in lro.utilization(model, covariances).table()


def test_utilization_json_holds_the_report(small_net):
    report = lro.utilization(*small_net, 0.9)
    values = json.loads(report.to_json())
    assert values["mean_layer_utilization"] == report.mean_layer_utilization
    assert values["explained_variance"] == 0.9 and values["unreached"] == ["idle"]
    assert [layer["rank"] for layer in values["layers"]] == [layer.rank for layer in report.layers]


def test_spectra_rise_from_zero_to_one(net):
    model, covariances = net
    report = lro.utilization(model, covariances, 0.9)
    for layer in report.layers:
        assert len(layer.spectrum) == 33 and layer.spectrum[0] == 0 and layer.spectrum[-1] == pytest.approx(1)
        assert list(layer.spectrum) == sorted(layer.spectrum)
    space = layer_subspaces({"head": model.head}, covariances)["head"]
    head = next(layer for layer in report.layers if layer.fqn == "head")
    assert head.spectrum[16] == pytest.approx(float(space.output.explained(8)), abs=1e-6)


def test_no_layer_is_decomposed_for_the_report_alone():
    model = nn.Sequential(nn.Linear(32, 64))
    covariances = lro.calibrate(model, [torch.randn(200, 32)])
    assert lro.utilization(model, covariances).layers[0].spectrum is not None  # utilization itself needs it
    ranks = lro.CompressionConfig(lro.Ranks({"0": 2}), projection="weight")
    assert lro.compress_(model, covariances, ranks).layers[0].spectrum is None


@pytest.mark.parametrize("share", [0, 1.5, float("nan")])
def test_explained_variance_out_of_range_is_refused(small_net, share):
    with pytest.raises(ValueError, match=r"explained_variance must be a number in \(0, 1\]; got"):
        lro.utilization(*small_net, share)


def test_utilization_without_calibrated_layers_is_refused(small_net):
    with pytest.raises(ValueError, match="covariances has none of the model's layers that filter_fn selects"):
        lro.utilization(*small_net, filter_fn=lambda module, fqn: fqn == "idle")


# --- compression ------------------------------------------------------------------------------------------------


def test_compression_report_has_counts_and_errors(small_net):
    config = lro.CompressionConfig(lro.Ranks({"fc": 2}), "output")
    report = lro.compress_(*small_net, config)
    conv, fc = report.layers
    assert (conv.rank, conv.stored_rank, conv.predicted_error) == (None, None, 0.0)
    assert (fc.rank, fc.stored_rank, fc.rows) == (2, 8, 200)
    assert (fc.dense_parameters, fc.parameters) == (128 * 32 + 32, 8 * (128 + 32) + 32)
    assert 0 < fc.predicted_error < fc.output_variance
    lines = report.table().splitlines()
    assert lines[2].split()[:6] == ["conv", "4", "x", "9", "dense", "-"] and lines[2].endswith("0.000%")
    assert lines[3].split()[:7] == ["fc", "32", "x", "128", "2", "8", "output"]
    assert lines[3].endswith(f"{fc.predicted_error / fc.output_variance:.3%}")
    assert lines[4] == "ranks by layer name; projection output"
    assert lines[5] == "layer parameters 4,208 -> 1,392 (33.1%), model 5,264 -> 2,448 (46.5%)"
    assert lines[6].startswith("from at least 200 rows per layer: variances are within 20.0%, predicted errors within")
    assert lines[7:] == [
        "skipped: idle: no calibration batch reached it",
        "considered 4,208 of the model's 5,264 parameters (79.9%)",
    ]
    values = json.loads(report.to_json())
    assert lro.CompressionConfig.from_dict(values["config"]) == config
    assert values["layer_parameters"] == 1392 and values["layers"][1]["rank"] == 2 and values["allocation"] is None


def test_unknown_errors_are_shown_as_unknown(output_side_net):
    report = lro.compress_(*output_side_net, lro.CompressionConfig(lro.Ranks({"fc": 2}), "weight"))
    assert "unknown" in report.table() and json.loads(report.to_json())["layers"][1]["predicted_error"] is None


def test_report_shows_the_projections_and_allocation_used(net):
    config = lro.CompressionConfig(lro.ParameterBudget(0.5, "loss"), "loss")
    report = lro.compress_(*net, config)
    assert "ranks by ParameterBudget(fraction=0.5), allocation loss; projection loss" in report.table()
    assert report.predicted_loss == pytest.approx(sum(layer.predicted_loss for layer in report.layers))
    assert report.to_dict()["allocation"] == "loss" and not report.fallbacks()

    first, *others = (layer for layer in report.layers if layer.rank is not None)
    n = 1 + len(others)
    mixed = replace(report, layers=(replace(first, projection="output"), *others))
    assert f"projection output (1 of {n} layers) and loss ({n - 1} of {n} layers)" in mixed.table()
    fallback = f"{first.fqn}: projection 'output', because calibration recorded no output gradients for it"
    assert mixed.fallbacks() == [fallback] and fallback in mixed.table()


# --- plots and text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("kind", ["utilization", "compression"])
def test_plots_are_written_in_the_format_asked_for(small_net, tmp_path, kind, ending):
    pytest.importorskip("matplotlib")
    report = (
        lro.utilization(*small_net)
        if kind == "utilization"
        else lro.compress_(*small_net, lro.CompressionConfig(lro.Ranks({"fc": 8})))
    )
    report.plot(tmp_path / f"plot.{ending}")
    start = b"\x89PNG" if ending == "png" else b"<?xml"
    assert (tmp_path / f"plot.{ending}").read_bytes().startswith(start)


def test_plots_without_matplotlib_name_the_extra(small_net, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lowrank_ops\[plots\]'"):
        lro.utilization(*small_net).plot(tmp_path / "a.png")


def test_table_columns_are_aligned():
    assert format_table(["a", "bcd"], [["long", "1"], ["b", "22"]]).splitlines() == [
        "a     bcd",
        "----  ---",
        "long    1",
        "b      22",
    ]


def test_report_modules_do_not_import_in_a_circle():
    folder = Path(room.__file__).parent
    imported = {
        path.stem: {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        }
        for path in folder.glob("*.py")
        if path.stem != "__init__"
    }
    while imported:
        free = {name for name, needed in imported.items() if not needed & set(imported)}
        assert free, f"circle among {sorted(imported)}"
        imported = {name: needed for name, needed in imported.items() if name not in free}
