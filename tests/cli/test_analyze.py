"""``lowrank-ops analyze``: tables, JSON and pictures of the utilization."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lowrank_ops as lro
from lowrank_ops import cli
from tests.cli.commands import ANALYZE, build, refused

pytestmark = pytest.mark.usefixtures("project")


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ANALYZE, "--explained-variance", "1"]) == 0
    captured = capsys.readouterr()
    first = next(line.split() for line in captured.out.splitlines() if line.startswith("0 "))
    assert first == ["0", "16", "32", "5", "5", "5", "31.2%"]  # the inputs span 5 directions
    assert "Mean Layer Utilization" in captured.out
    assert "building the model" not in captured.out and "building the model" in captured.err
    assert "calibrating" in captured.err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ANALYZE, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["command"], document["model"]) == ("analyze", "cli_project:build")
    rows = {row["fqn"]: row for row in document["utilization"]["layers"]}
    assert (rows["0"]["rank"], rows["0"]["rows"]) == (5, 96)
    assert document["utilization"]["explained_variance"] == 0.99


def test_saved_covariances_give_the_same_result(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ANALYZE, "--json", "--save-covariances", "c.safetensors"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert set(lro.Covariances.load(project / "c.safetensors")) == {"0", "2"}
    assert cli.main(["analyze", "cli_project:build", "--covariances", "c.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == measured


def test_checkpoint_is_loaded(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {name: torch.zeros_like(tensor) for name, tensor in build().state_dict().items()}
    save_file(weights, project / "zero.safetensors")
    capsys.readouterr()  # what building printed
    assert cli.main([*ANALYZE, "--checkpoint", "zero.safetensors", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["utilization"]["layers"]
    assert [layer["output_rank"] for layer in layers] == [0, 0]


def test_model_instance_and_device_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["analyze", "cli_project:ready", "--calibration", "cli_project:batches", "--device", "cpu"]
    assert cli.main([*argv, "--side", "output"]) == 0
    assert "not measured" in capsys.readouterr().out


def test_mask(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "analyze",
        "cli_project:Masked",
        "--calibration",
        "cli_project:masked_batches",
        "--mask",
        "attention_mask",
    ]
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["utilization"]["layers"][0]["rows"] == 3


def test_plot(project: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main([*ANALYZE, "--plot", "picture.png"]) == 0
    assert (project / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_html(project: Path) -> None:
    assert cli.main([*ANALYZE, "--html", "page.html"]) == 0
    assert "<title>Layer utilization</title>" in (project / "page.html").read_text()


def test_plot_without_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lowrank_ops[plots]'" in refused(capsys, 2, *ANALYZE, "--plot", "picture.png")
