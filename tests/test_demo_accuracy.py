"""The benchmark of accuracy: rows that are right, added to and not computed twice."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lowrank_ops as lro
from lowrank_ops.demo import accuracy
from lowrank_ops.demo.data import load_images


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"calibration": 60, "test": 50}
    whole = {split: load_images(split) for split in few}
    monkeypatch.setattr(accuracy, "load_images", lambda split: tuple(part[: few[split]] for part in whole[split]))
    train = DataLoader(TensorDataset(*(part[:48] for part in whole["calibration"])), 16, shuffle=True)
    monkeypatch.setattr(accuracy, "training_batches", lambda folder, count: train)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
    accuracy.main()


def test_rows_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--out", str(out), "--budgets", "40", "--allocations", "loss", "--keep-dense", "head"]
    run(monkeypatch, *arguments, "--projections", "loss")
    (row,) = json.loads(out.read_text())
    assert 38 < row["layer_share"] <= 40 and 0 < row["predicted_loss"] < 0.1
    assert row["agreement"] > 90 and row["finetuned"] == "none"

    compressed: list[str] = []
    compress = accuracy.Bench.compress
    monkeypatch.setattr(
        accuracy.Bench, "compress", lambda self, *key: compressed.append(key[1]) or compress(self, *key)
    )
    run(monkeypatch, *arguments, "--projections", "loss", "weight")
    rows = json.loads(out.read_text())
    assert compressed == ["weight"] and rows[0] == row and rows[1]["projection"] == "weight"
    shown = f"| 40% | loss | {row['accuracy']:.2f} ({row['agreement']:.2f}) |"
    assert shown in capsys.readouterr().out


def test_finetuning_trains_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, bool]] = []
    finetune = lro.finetune_

    def recording(student, train, *, teacher, loss, **arguments):  # type: ignore[no-untyped-def]
        calls.append((teacher is not None, loss is not None))
        report = finetune(student, train, teacher=teacher, loss=loss, **arguments)
        assert report.steps == 3 and torch.tensor(report.losses).isfinite().all()
        return report

    monkeypatch.setattr(lro, "finetune_", recording)
    out = tmp_path / "rows.json"
    run(
        monkeypatch,
        "--finetune",
        "--out",
        str(out),
        "--budgets",
        "40",
        "--projections",
        "loss",
        "--allocations",
        "loss",
    )
    assert [row["finetuned"] for row in json.loads(out.read_text())] == ["plain", "distilled"]
    assert calls == [(False, True), (True, False)]
