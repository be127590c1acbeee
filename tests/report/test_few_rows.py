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


def test_enough_rows_are_not_marked():
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    covariances = lro.calibrate(dense, [torch.randn(48, 64)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "rows only" not in lro.utilization(dense, covariances).table()
        assert "rows only" not in lro.compress_(dense, covariances).table()
