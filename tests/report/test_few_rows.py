"""Fewer calibration rows than features: a warning with the numbers, and a mark in the reports."""

import warnings

import pytest
import torch
from torch import nn

import lowrank_ops as lro


@pytest.mark.parametrize("rows", [1, 47])
def test_fewer_rows_than_features_are_warned_of_and_marked(rows, tmp_path):
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    covariances = lro.calibrate(dense, [torch.randn(rows, 64)])
    with pytest.warns(UserWarning, match=rf"0 \({rows} of 48\), 2 \({rows} of 48\)") as found:
        measured = lro.utilization(dense, covariances)
    assert len(found) == 1 and found[0].filename == __file__
    with pytest.warns(UserWarning, match=rf"0 \({rows} of 48\), 2 \({rows} of 48\)") as found:
        report = lro.compress_(dense, covariances)
    assert len(found) == 1 and found[0].filename == __file__
    mark = "for the calibration rows only"
    assert mark in report.table() and mark in measured.table()
    assert report.to_dict()["few_rows"] == [f"0 ({rows} of 48)", f"2 ({rows} of 48)"]
    for one in (report, measured):
        one.to_html(tmp_path / "report.html")
        assert mark in (tmp_path / "report.html").read_text()


def test_fewer_patches_than_features_are_marked():
    dense = nn.Sequential(nn.Conv2d(8, 64, 3))
    covariances = lro.calibrate(dense, [torch.randn(1, 8, 5, 5)])
    with pytest.warns(UserWarning, match=r"0 \(9 of 64\)"):
        lro.compress_(dense, covariances, 8)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d"])
def test_single_layers_are_warned_of(kind):
    layer = {"linear": nn.Linear(64, 48), "conv2d": nn.Conv2d(4, 48, 4), "conv1d": nn.Conv1d(32, 48, 2)}[kind]
    x = {"linear": torch.randn(5, 64), "conv2d": torch.randn(5, 4, 4, 4), "conv1d": torch.randn(5, 32, 2)}[kind]
    statistics = lro.calibrate(nn.Sequential(layer), [x])["0"]
    make = {
        "linear": lro.LowRankLinear.from_linear,
        "conv2d": lro.LowRankConv2d.from_conv2d,
        "conv1d": lro.layers.LowRankConv1d.from_conv1d,
    }[kind]
    with pytest.warns(UserWarning, match=r"fewer calibration rows than .*: \w+ \(5 of 48\)") as found:
        make(layer, 4, statistics)
    assert len(found) == 1 and found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(layer, 4)
        make(layer, 4, statistics, projection="weight")


def test_few_rows_of_a_reconstruction_are_warned_of():
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    covariances = lro.calibrate(model, [torch.randn(100, 16)])
    settings = lro.SequentialReconstruction([torch.randn(2, 16), torch.randn(3, 16)])
    match = r"fewer rows in the batches of the reconstruction than .*: 0 \(5 of 16\), 2 \(5 of 16\)\..*; pass it more"
    with pytest.warns(UserWarning, match=match):
        lro.compress_(model, covariances, lro.Ranks({"0": 4, "2": 4}), reconstruction=settings)


def test_enough_rows_are_not_marked():
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    covariances = lro.calibrate(dense, [torch.randn(48, 64)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "rows only" not in lro.utilization(dense, covariances).table()
        assert "rows only" not in lro.compress_(dense, covariances).table()
