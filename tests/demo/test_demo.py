"""The demo: its measurements, its command, its data, its training."""

import argparse
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_ops as lro
from lowrank_ops.demo import data, run, train
from lowrank_ops.demo.comparison import METHODS
from lowrank_ops.demo.evaluation import latencies, percent_equal, predict
from lowrank_ops.demo.vit import ViT, load_vit


def options(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def quick(folder: Path, *arguments: object) -> argparse.Namespace:
    return options("--out", folder, "--images", 300, "--calibration-images", 200, "--rounds", 1, *arguments)


def training_record() -> dict:
    return json.loads((data.ASSETS / "training.json").read_text())


# --- what ships ---


def test_shipped_images_are_the_data_set() -> None:
    images, labels = data.load_images("test")
    assert images.shape == (10_000, 1, 28, 28) and images.dtype == torch.float32
    assert labels.bincount().tolist() == [1000] * 10
    images, labels = data.load_images("calibration")
    assert images.shape == (2_000, 1, 28, 28)
    assert labels.bincount().tolist() == [200] * 10
    assert abs(images.mean()) < 0.03 and abs(images.std() - 1) < 0.03


def test_shipped_weights_are_as_accurate_as_recorded() -> None:
    record = training_record()
    assert record["test_accuracy_float16_weights"] >= 89
    images, labels = data.load_images("test")
    model = load_vit()
    assert not model.training and model.head.weight.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    accuracy = percent_equal(predict(model, images[:1000]), labels[:1000])
    assert abs(accuracy - record["test_accuracy_float16_weights"]) < 3  # three standard errors of 1,000 images


def test_assets_are_small_and_their_licence_is_stated() -> None:
    files = [path for path in data.ASSETS.iterdir() if path.is_file()]
    assert sum(len(path.read_bytes()) for path in files) <= 12e6
    text = (data.ASSETS / "README.md").read_text()
    assert "Zalando SE" in text and "Permission is hereby granted" in text
    assert f"{training_record()['test_accuracy_float16_weights']:.2f}%" in text


# --- measurements ---


class Fixed(nn.Module):
    """Logits that say each image's first pixel is its class."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return nn.functional.one_hot(images.flatten(1)[:, 0].long(), 10).float()


def test_predict_keeps_the_order_over_batches() -> None:
    classes = torch.arange(601) % 10
    images = classes.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    assert torch.equal(predict(Fixed().train(), images), classes)


def test_percent_equal() -> None:
    assert percent_equal(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 75


def test_latencies_take_turns_and_leave_the_first_call_out(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """The whole demo on few images."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
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
    assert report["test_images"] == 300 and report["calibration_images"] == 200
    assert {"torch", "threads", "cpu"} <= set(report["environment"])
    assert report["training"] == training_record()


def test_what_the_demo_promises_holds(tmp_path: Path) -> None:
    assert run.run(options("--out", tmp_path, "--budgets", "--rounds", 1)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["checks"]) == 3 and report["test_images"] == 10_000


def test_reported_numbers_agree_with_one_another(finished: tuple[int, Path]) -> None:
    report = json.loads((finished[1] / "report.json").read_text())
    dense, utilized, *budgets = report["rows"]
    assert dense["agreement"] == 100 and dense["layer_share"] == 100 and dense["compression"] is None
    assert dense["parameters"] == training_record()["parameters"]
    assert dense["accuracy"] > 80
    for row in (utilized, *budgets):
        compression = row["compression"]
        assert row["parameters"] == compression["model_parameters"] < dense["parameters"]
        assert row["layer_parameters"] == sum(layer["parameters"] for layer in compression["layers"])
        assert row["layer_share"] == pytest.approx(100 * row["layer_parameters"] / dense["layer_parameters"])
        assert row["agreement"] <= 100 and row["latency_ms"] > 0
        # Whatever changes a share of the predictions changes no more than that of the accuracy.
        assert abs(row["accuracy"] - dense["accuracy"]) <= 100 - row["agreement"] + 1e-9
        if row["budget"] is not None:
            assert 0.9 * row["budget"] < row["layer_share"] <= row["budget"]
    ranks = {
        row["method"]: [layer["rank"] for layer in row["compression"]["layers"]]
        for row in budgets
        if row["budget"] == 10
    }
    assert ranks["output"] == ranks["utilized"] == ranks["weight SVD"], "not compared at equal ranks"


def test_utilization_is_that_of_the_library(finished: tuple[int, Path]) -> None:
    reported = json.loads((finished[1] / "report.json").read_text())["utilization"]
    model = load_vit()
    covariances = lro.calibrate(model, data.load_images("calibration")[0][:200].split(50))
    expected = lro.utilization(
        model, covariances, 0.99, centered=False, filter_fn=lambda module, fqn: "blocks.3" in fqn
    )
    found = {layer["fqn"]: layer["rank"] for layer in reported["layers"]}
    assert expected.layers and all(found[layer.fqn] == layer.rank for layer in expected.layers)
    mean = sum(layer["utilization"] for layer in reported["layers"]) / len(reported["layers"])
    assert reported["mean_layer_utilization"] == pytest.approx(mean)


def test_picture_is_drawn_or_its_absence_explained(finished: tuple[int, Path]) -> None:
    report = json.loads((finished[1] / "report.json").read_text())
    if report["picture"] is None:
        assert "matplotlib" in report["picture_left_out"] and not (finished[1] / "report.png").exists()
    else:
        assert report["picture_left_out"] is None
        assert (finished[1] / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("explained_variance", "failing"), [(0.3, "points of accuracy lost"), (1, "% of the layer parameters")]
)
def test_exit_code_is_1_where_the_criterion_does_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], explained_variance: float, failing: str
) -> None:
    assert run.run(quick(tmp_path, "--explained-variance", explained_variance, "--budgets", "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["held"] is False
    failed = [check["text"] for check in report["checks"] if not check["held"]]
    assert len(failed) == 1 and failed[0].startswith(failing)


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model in the place of the shipped one, where its accuracy does not matter."""
    monkeypatch.setattr(run, "load_vit", lambda: ViT(dim=32, depth=1, heads=2))


@pytest.mark.usefixtures("small_model")
def test_without_matplotlib_the_demo_says_so_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run.run(quick(tmp_path, "--budgets", 50, "--markdown")) in (0, 1)
    shown = capsys.readouterr()
    assert "pip install 'lowrank_ops[plots]'" in shown.err and not (tmp_path / "report.png").exists()
    assert "matplotlib is missing" in json.loads((tmp_path / "report.json").read_text())["picture_left_out"]
    lines = shown.out.splitlines()
    assert lines[0].startswith("| method") and set(lines[1]) <= set("|-: ") and lines[2].startswith("| dense")
    assert len({len(line) for line in lines[:7]}) == 1 and not lines[7]


@pytest.mark.usefixtures("small_model")
def test_a_budget_that_cannot_be_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.run(quick(tmp_path, "--budgets", 0.5)) == 2
    assert "fraction=0.005 cannot be met" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize(("arguments", "dense"), [([], {"head"}), (["--keep-dense", "blocks.0.fc1"], {"blocks.0.fc1"})])
def test_layers_stay_dense_on_request(tmp_path: Path, arguments: list[str], dense: set[str]) -> None:
    run.run(quick(tmp_path, "--budgets", 80, *arguments))
    report = json.loads((tmp_path / "report.json").read_text())
    for row in report["rows"][1:]:
        ranks = {layer["fqn"]: layer["rank"] for layer in row["compression"]["layers"]}
        assert all(ranks[fqn] is None for fqn in dense) and any(rank is not None for rank in ranks.values())


def test_utilized_rank_counts_variance_about_zero_and_budgets_about_the_mean(finished: tuple[int, Path]) -> None:
    report = json.loads((finished[1] / "report.json").read_text())
    assert report["utilization"]["centered"] is False
    assert [row["compression"]["config"]["centered"] for row in report["rows"][1:]] == [False] + [True] * 9


def test_recorded_accuracy_is_checked_on_the_whole_test_set_only() -> None:
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


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert run.run(quick(tmp_path / "taken")) == 2
    assert "taken" in capsys.readouterr().err


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
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*arguments)
    assert message in capsys.readouterr().err


# --- data and training ---


def write_original(folder: Path, counts: dict[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """IDX files as the data set's, of images whose brightness tells their class."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    made = {}
    for split, count in counts.items():
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 25, (count, 28, 28), dtype=np.uint8) + 25 * labels[:, None, None]
        header = b"".join(number.to_bytes(4, "big") for number in (2051, count, 28, 28))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = b"".join(number.to_bytes(4, "big") for number in (2049, count))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
        made[split] = images, labels
    return made


def test_pack_keeps_the_test_set_and_some_images_of_each_class(tmp_path: Path) -> None:
    made = write_original(tmp_path / "original", {"train": 70, "t10k": 20})
    for found, expected in zip(data.read_original(tmp_path / "original", "train"), made["train"], strict=True):
        assert np.array_equal(found, expected)
    data.pack(tmp_path / "original", tmp_path / "packed.npz", per_class=3)
    with np.load(tmp_path / "packed.npz") as packed:
        assert np.array_equal(packed["calibration_images"], made["train"][0][:30])
        assert np.array_equal(packed["calibration_labels"], made["train"][1][:30])
        assert np.array_equal(packed["test_images"], made["t10k"][0])
        assert np.array_equal(packed["test_labels"], made["t10k"][1])


def test_training_writes_weights_that_load_and_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_original(tmp_path / "original", {"train": 256, "t10k": 50})
    arguments = [
        "train",
        "--data",
        tmp_path / "original",
        "--out",
        tmp_path / "new" / "out",
        "--epochs",
        1,
        "--seed",
        3,
    ]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    train.main()
    out = tmp_path / "new" / "out"
    weights = load_file(out / "vit.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    model = ViT()
    model.load_state_dict(weights)
    images, labels = train._tensors(tmp_path / "original", "t10k")
    record = json.loads((out / "training.json").read_text())
    assert record["test_accuracy_float16_weights"] == percent_equal(predict(model, images), labels)
    assert record["seed"] == 3 and [entry["epoch"] for entry in record["log"]] == [1]
    assert (out / "fashion_mnist.npz").exists()
