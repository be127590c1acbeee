"""The demo: its data, its measurements, its command."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops import cli
from lowrank_ops.demo import data, run
from lowrank_ops.demo.comparison import METHODS
from lowrank_ops.demo.evaluation import latencies, percent_equal, predict
from lowrank_ops.demo.vit import ViT, load_vit


def options(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def quick(folder: Path, *arguments: object) -> argparse.Namespace:
    return options("--out", folder, "--images", 150, "--calibration-images", 100, "--rounds", 1, *arguments)


# --- data ---


def test_stored_images_are_the_data_set() -> None:
    images, labels = data.load_images("test")
    assert images.shape == (10_000, 1, 28, 28) and images.dtype == torch.float32
    assert labels.bincount().tolist() == [1000] * 10
    images, labels = data.load_images("calibration")
    assert images.shape == (2_000, 1, 28, 28)
    assert labels.bincount().tolist() == [200] * 10
    assert abs(images.mean()) < 0.03 and abs(images.std() - 1) < 0.03


def test_stored_weights_are_as_accurate_as_recorded() -> None:
    record = data.load_training_record()
    assert record["test_accuracy_float16_weights"] >= 89
    images, labels = data.load_images("test")
    model = load_vit()
    assert not model.training and model.head.weight.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    accuracy = percent_equal(predict(model, images[:1000]), labels[:1000])
    assert abs(accuracy - record["test_accuracy_float16_weights"]) < 3  # three standard errors of 1,000 images


def test_data_folder_is_small_and_states_its_licenses() -> None:
    folder = data.data_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    text = (folder / "README.md").read_text()
    assert "Zalando SE" in text and "Permission is hereby granted" in text
    assert f"{data.load_training_record()['test_accuracy_float16_weights']:.2f}%" in text


def test_installed_demo_asks_for_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = data.data_folder()
    package = tmp_path / "site-packages" / "lowrank_ops" / "demo"
    monkeypatch.setattr(data, "__file__", str(package / "data.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 2
    message = capsys.readouterr().err
    assert "Clone the repository" in message and "--data DIR" in message and str(tmp_path / "demo") in message
    assert data.data_folder(folder) == folder
    monkeypatch.chdir(folder.parent)  # as in a clone
    assert data.data_folder() == folder
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.data_folder(tmp_path / "nowhere")


# --- measurements ---


class Fixed(nn.Module):
    """Predicts each image's first pixel as its class."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return nn.functional.one_hot(images.flatten(1)[:, 0].long(), 10).float()


def test_predict_keeps_the_order_over_batches() -> None:
    classes = torch.arange(601) % 10
    images = classes.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    assert torch.equal(predict(Fixed().train(), images), classes)


def test_percent_equal() -> None:
    assert percent_equal(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 75


def test_latencies_are_interleaved_without_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    class Costly(nn.Module):
        def __init__(self, name: str, seconds: list[float]) -> None:
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            clock[0] += self.seconds.pop(0)
            return x

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    models = [Costly("a", [9.0, 0.001, 0.003, 0.002]), Costly("b", [9.0, 0.004, 0.004, 0.9])]
    assert latencies(models, torch.zeros(1), rounds=3) == pytest.approx([2, 4])
    assert calls == ["a", "b"] * 4


# --- the command ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit code and folder of the whole demo on few images."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run.run(quick(folder)), folder


def test_run_reports_every_method_at_every_budget(finished: tuple[int, Path]) -> None:
    code, folder = finished
    report = json.loads((folder / "report.json").read_text())
    assert report["held"] is all(check["held"] for check in report["checks"]) and code == (0 if report["held"] else 1)
    assert [(row["method"], row["budget"]) for row in report["rows"]] == [
        ("dense", None),
        ("utilized", None),
        *((method, budget) for budget in (50, 25, 10) for method in METHODS.values()),
    ]
    assert report["test_images"] == 150 and report["calibration_images"] == 100
    assert {"torch", "threads", "cpu"} <= set(report["environment"])
    assert report["training"] == data.load_training_record()


def test_checks_hold_on_part_of_the_images(tmp_path: Path) -> None:  # `make demo` runs all of them
    arguments = ("--images", 1000, "--calibration-images", 500, "--budgets", "--rounds", 1)
    assert run.run(options("--out", tmp_path, *arguments)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["checks"]) == 2 and report["test_images"] == 1000


def test_reported_figures_are_consistent(finished: tuple[int, Path]) -> None:
    report = json.loads((finished[1] / "report.json").read_text())
    dense, utilized, *budgets = report["rows"]
    assert dense["agreement"] == 100 and dense["layer_share"] == 100 and dense["compression"] is None
    assert dense["parameters"] == data.load_training_record()["parameters"]
    assert dense["accuracy"] > 80
    for row in (utilized, *budgets):
        compression = row["compression"]
        assert row["parameters"] == compression["model_parameters"] < dense["parameters"]
        assert row["layer_parameters"] == sum(layer["parameters"] for layer in compression["layers"])
        assert row["layer_share"] == pytest.approx(100 * row["layer_parameters"] / dense["layer_parameters"])
        assert row["agreement"] <= 100 and row["latency_ms"] > 0
        # Accuracy changes by at most the share of changed predictions.
        assert abs(row["accuracy"] - dense["accuracy"]) <= 100 - row["agreement"] + 1e-9
        if row["budget"] is not None:
            assert 0.9 * row["budget"] < row["layer_share"] <= row["budget"]
    ranks = {
        row["method"]: [layer["rank"] for layer in row["compression"]["layers"]]
        for row in budgets
        if row["budget"] == 10
    }
    assert ranks["output"] == ranks["utilized"] == ranks["weight SVD"], "methods are not compared at equal ranks"


def test_reported_utilization_is_that_of_the_library(finished: tuple[int, Path]) -> None:
    reported = json.loads((finished[1] / "report.json").read_text())["utilization"]
    model = load_vit()
    covariances = lro.calibrate(model, data.load_images("calibration")[0][:100].split(50))
    expected = lro.utilization(
        model, covariances, 0.99, centered=False, filter_fn=lambda module, fqn: "blocks.3" in fqn
    )
    found = {layer["fqn"]: layer["rank"] for layer in reported["layers"]}
    assert expected.layers and all(found[layer.fqn] == layer.rank for layer in expected.layers)
    mean = sum(layer["utilization"] for layer in reported["layers"]) / len(reported["layers"])
    assert reported["mean_layer_utilization"] == pytest.approx(mean)


def test_picture_is_drawn_or_the_report_says_why_not(finished: tuple[int, Path]) -> None:
    report = json.loads((finished[1] / "report.json").read_text())
    if report["picture"] is None:
        assert "matplotlib" in report["picture_left_out"] and not (finished[1] / "report.png").exists()
    else:
        assert report["picture_left_out"] is None
        assert (finished[1] / "report.png").read_bytes().startswith(b"\x89PNG")


def test_failed_check_gives_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--images", 100, "--calibration-images", 100)
    assert run.run(quick(tmp_path, "--explained-variance", 0.3, "--budgets", "--json", *few)) == 1
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["held"] is False
    failed = [check["text"] for check in report["checks"] if not check["held"]]
    assert len(failed) == 1 and failed[0].startswith("points of accuracy lost")


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small untrained model, for tests where accuracy does not matter."""
    monkeypatch.setattr(run, "load_vit", lambda folder: ViT(dim=32, depth=1, heads=2))


@pytest.mark.usefixtures("small_model")
def test_demo_without_matplotlib_leaves_out_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run.run(quick(tmp_path, "--budgets", 50, "--markdown")) in (0, 1)
    shown = capsys.readouterr()
    assert "pip install 'lowrank_ops[plots]'" in shown.err and not (tmp_path / "report.png").exists()
    assert "needs matplotlib" in json.loads((tmp_path / "report.json").read_text())["picture_left_out"]
    lines = shown.out.splitlines()
    assert lines[0].startswith("| method") and set(lines[1]) <= set("|-: ") and lines[2].startswith("| dense")
    assert len({len(line) for line in lines[:7]}) == 1 and not lines[7]


@pytest.mark.usefixtures("small_model")
def test_budget_that_cannot_be_met_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fraction=0\.005 cannot be met"):
        run.run(quick(tmp_path, "--budgets", 0.5))
    assert not (tmp_path / "report.json").exists()


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize(("arguments", "dense"), [([], {"head"}), (["--keep-dense", "blocks.0.fc1"], {"blocks.0.fc1"})])
def test_layers_stay_dense_on_request(tmp_path: Path, arguments: list[str], dense: set[str]) -> None:
    run.run(quick(tmp_path, "--budgets", 80, *arguments))
    report = json.loads((tmp_path / "report.json").read_text())
    for row in report["rows"][1:]:
        ranks = {layer["fqn"]: layer["rank"] for layer in row["compression"]["layers"]}
        assert all(ranks[fqn] is None for fqn in dense) and any(rank is not None for rank in ranks.values())


def test_only_the_budgets_use_centered_variance(finished: tuple[int, Path]) -> None:
    report = json.loads((finished[1] / "report.json").read_text())
    assert report["utilization"]["centered"] is False
    assert [row["compression"]["config"]["centered"] for row in report["rows"][1:]] == [False] + [True] * 9


def test_recorded_accuracy_needs_the_whole_test_set() -> None:
    row = run.Row("dense", "-", None, 100, 100.0, 100, 88.0, 100.0, 1.0, None)
    assert len(run._checks([row, row], None)) == 2
    assert [check.held for check in run._checks([row, row], 88.1)[2:]] == [True]
    assert [check.held for check in run._checks([row, row], 88.2)[2:]] == [False]


def test_limits_are_inclusive() -> None:
    dense = run.Row("dense", "-", None, 100, 100.0, 100, 89.46, 100.0, 1.0, None)
    at_limit = run.Row("utilized", "x", None, 35, 35.0, 35, 88.96, 99.0, 1.0, None)
    below = run.Row("utilized", "x", None, 36, 35.01, 35, 88.95, 99.0, 1.0, None)
    assert [check.held for check in run._checks([dense, at_limit], None)] == [True, True]
    assert [check.held for check in run._checks([dense, below], None)] == [False, False]


def test_file_instead_of_the_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        run.run(quick(tmp_path / "taken"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "an integer above 0 and at most 10000; got '0'"),
        (["--images", "many"], "an integer above 0"),
        (["--explained-variance", "99"], "a number above 0 and at most 1; got '99'"),
        (["--budgets", "nan"], "a number above 0 and at most 100"),
        (["--json", "--markdown"], "not allowed with"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*arguments)
    assert message in capsys.readouterr().err
