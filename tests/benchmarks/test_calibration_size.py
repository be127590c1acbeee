"""The study of the calibration size: growing sets, rows computed once, a table of means."""

from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import calibration_size, vision
from benchmarks.accuracy.results import Results
from lowrank_ops.demo.data import load_images
from lowrank_ops.demo.vit import ViT


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = load_images("calibration")

    def small_vit() -> ViT:
        torch.manual_seed(0)
        return ViT(dim=32, depth=1, heads=2).eval()

    monkeypatch.setattr(vision, "load_vit", small_vit)
    monkeypatch.setattr(vision, "load_images", lambda split: (images[:50], labels[:50]))
    monkeypatch.setattr(vision, "training_images", lambda folder: (images[50:150], labels[50:150]))
    monkeypatch.setattr(calibration_size, "BUDGET", 60.0)


def test_rows_of_growing_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    calibrate = vision.Bench.calibrate
    monkeypatch.setattr(
        vision.Bench,
        "calibrate",
        lambda self, images, **how: seen.append(len(images)) or calibrate(self, images, **how),
    )
    out = tmp_path / "rows.json"
    calibration_size.main(["--out", str(out), "--sizes", "5", "40"])
    rows = Results(out).rows
    assert seen == [5, 35] and [row["images"] for row in rows] == [5, 5, 40, 40]
    assert [(row["projection"], row["allocation"]) for row in rows[:2]] == list(calibration_size.VARIANTS)
    assert 0 < rows[0]["mlu_0.9"] < rows[0]["mlu_0.99"] < rows[2]["mlu_0.999"] <= 1

    capsys.readouterr()
    calibration_size.main(["--out", str(out), "--sizes", "40", "60", "--seeds", "0", "1", "--tables"])
    assert seen == [5, 35]
    shown = f"| 40 | 680 | 1 | {rows[2]['mlu_0.9']:.3f} | {rows[2]['mlu_0.99']:.3f} | {rows[2]['mlu_0.999']:.3f} |"
    table = capsys.readouterr().out
    assert shown in table and "| 60 | 1,020 | 0 | not measured |" in table

    calibration_size.main(["--out", str(out), "--sizes", "5", "40", "--no-token-weights"])
    assert Results(out).rows[:4] == rows and [row["token_weights"] for row in Results(out).rows[4:]] == [False, False]
    assert [row["projection"] for row in Results(out).rows[4:]] == ["loss", "loss"]


def test_a_later_run_uses_the_same_images(tmp_path: Path) -> None:
    whole, in_parts = tmp_path / "whole.json", tmp_path / "parts.json"
    calibration_size.main(["--out", str(whole), "--sizes", "5", "40"])
    for size in ("5", "40"):
        calibration_size.main(["--out", str(in_parts), "--sizes", size])
    rows, again = Results(whole).rows, Results(in_parts).rows
    assert [row["mlu_0.99"] for row in rows] == pytest.approx([row["mlu_0.99"] for row in again])


def test_means_are_over_the_draws(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.json")
    for seed, accuracy in ((0, 80.0), (1, 84.0)):
        for case in calibration_size.cases(9, seed, True):
            shares = {f"mlu_{threshold:g}": 0.5 for threshold in calibration_size.THRESHOLDS}
            results.add(case, {"accuracy": accuracy, "agreement": 90.0, **shares})
    line = calibration_size.table(results, [9], [0, 1, 2], True).splitlines()[-1]
    assert line == "| 9 | 153 | 2 | 0.500 | 0.500 | 0.500 | 82.00 (90.00) | 82.00 (90.00) |"
