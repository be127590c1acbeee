"""The study of predicted and measured errors: real rows only, and the worst layer is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from benchmarks.accuracy import predicted
from lowrank_ops.report import CompressionReport


class Net(nn.Module):
    """A convolution and a Linear over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 12, 3), nn.Linear(12, 10)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.linear(self.conv(x).flatten(2).transpose(1, 2))  # (batch, positions, 10)


def compressed() -> tuple[Net, Net, Tensor, CompressionReport]:
    torch.manual_seed(0)
    dense = Net().double()
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    student = copy.deepcopy(dense)
    config = lro.CompressionConfig(lro.Ranks({"conv": 3, "linear": 3}))
    return dense, student, x, lro.compress_(student, lro.calibrate(dense, [x]), config)


def test_errors_are_equal_on_the_calibration_data() -> None:
    dense, student, x, report = compressed()
    found = predicted.measured_errors(dense, student, x.split(2), ["conv", "linear"])
    assert found == {layer.fqn: pytest.approx(layer.predicted_error, rel=1e-9) for layer in report.layers}
    assert not any(module._forward_hooks for module in dense.modules())


def test_masked_rows_do_not_count() -> None:
    dense, student, x, _ = compressed()
    mask = torch.zeros(6, 9, dtype=torch.int64)
    mask[:2] = 1
    batch = {"x": x, "mask": mask}
    masked = predicted.measured_errors(dense, student, [batch], ["linear"], "mask")
    alone = predicted.measured_errors(dense, student, [x[:2]], ["linear"])
    assert masked == {"linear": pytest.approx(alone["linear"])}
    assert masked["linear"] != pytest.approx(predicted.measured_errors(dense, student, [x], ["linear"])["linear"])


def test_the_summary_names_the_worst_layer() -> None:
    pairs = {"a": (1.0, 1.1), "b": (0.01, 0.03), "c": (10.0, 9.0), "rounding": (1e-12, 1e-11)}
    rows = [{"layer": layer, "predicted": p, "measured": m, "variance": 1.0} for layer, (p, m) in pairs.items()]
    found = predicted.summary(rows)
    assert found["layers"] == 3 and found["worst_layer"] == "b"
    assert (found["lowest"], found["median"], found["highest"]) == pytest.approx((0.9, 1.1, 3.0))
    assert 0.97 < found["correlation"] < 1


def test_rows_of_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    scales = torch.linspace(3, 0.1, 24)
    layers = [nn.Linear(24, 24) for _ in range(5)]

    def study(calibration: int, held_out: int) -> predicted.Study:
        rows = torch.randn(calibration + held_out, 24) * scales
        parts = rows.split([calibration, held_out])
        return predicted.Study(nn.Sequential(*layers), [parts[0]], [parts[1]], "output")

    monkeypatch.setattr(predicted, "STUDIES", {"rows": study})
    out = tmp_path / "layers.json"
    arguments = ["--models", "rows", "--projections", "output", "loss", "--budgets", "0.75", "--out", str(out)]
    predicted.main([*arguments, "--calibration", "3000", "--held-out", "3000"])
    found = json.loads(out.read_text())
    assert len(found) == 8 and {row["projection"] for row in found} == {"output", "loss"}
    assert all(row["measured"] == pytest.approx(row["predicted"], rel=0.2) for row in found)
    assert predicted.summary(found)["correlation"] > 0.99
    assert "3000 rows" in capsys.readouterr().out.splitlines()[-1]


def test_the_demo_study_is_held_out() -> None:
    study = predicted.images(3, 2)
    (seen,), (unseen,) = study.calibration, study.held_out
    assert len(seen) == 3 and len(unseen) == 2 and seen.shape[1:] == unseen.shape[1:]
    assert (seen[:, None] - unseen).abs().amax((2, 3, 4)).min() > 0
