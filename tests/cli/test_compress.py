"""``lowrank-ops compress``: budgets, options and the folder that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowrank_ops as lro
from lowrank_ops import cli
from lowrank_ops.checkpoint import load_pretrained
from lowrank_ops.cli import compress
from lowrank_ops.latencies import LatencyCurve, LayerLatencies
from tests.cli.commands import COMPRESS, build, refused

pytestmark = pytest.mark.usefixtures("project")


def test_budget_is_kept_and_the_folder_loads(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMPRESS, "--budget", "0.8", "--allocation", "variance", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    compression = document["compression"]
    assert compression["layer_parameters"] <= 0.8 * compression["layer_parameters_before"]
    assert compression["config"]["rank"] == {
        "policy": "parameter_budget",
        "fraction": 0.8,
        "allocation": "variance",
    }
    assert document["out"] == "out"
    loaded = load_pretrained(build(), project / "out")
    ranks = {row["fqn"]: row["rank"] for row in compression["layers"] if row["rank"] is not None}
    assert ranks and {fqn: loaded.get_submodule(fqn).rank for fqn in ranks} == ranks
    config = json.loads((project / "out" / "lowrank_config.json").read_text())
    assert all(entry["calibration_rows"] == 96 for entry in config["layers"].values())


def test_flop_budget_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMPRESS, "--flops", "0.8", "--allocation", "variance", "--json"]) == 0
    compression = json.loads(capsys.readouterr().out)["compression"]
    assert compression["config"]["rank"] == {"policy": "flop_budget", "fraction": 0.8, "allocation": "variance"}
    products = [
        row["in_features"] * row["out_features"]
        if row["rank"] is None
        else -(-row["rank"] // 8) * 8 * (row["in_features"] + row["out_features"])
        for row in compression["layers"]
    ]
    assert 0 < sum(products) <= 0.8 * 2 * 16 * 32


def test_byte_budget_is_kept(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMPRESS, "--bytes", "0.5", "--eight-bit", "fp8", "--json"]) == 0
    compression = json.loads(capsys.readouterr().out)["compression"]
    policy = compression["config"]["rank"]
    assert (policy["policy"], policy["fraction"], policy["form"]) == ("byte_budget", 0.5, "fp8")
    assert 0 < compression["layer_bytes"] <= 0.5 * compression["layer_bytes_before"]
    loaded = load_pretrained(build(), project / "out")
    assert loaded.get_submodule("0").formats == ("fp8",)


def test_latency_budget_reads_stored_times(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = LatencyCurve(dense=1e-3, ranks=(8,), seconds=(4e-4,))
    layers = {"0": {"a layer": 1}, "2": {"a layer": 1}}
    LayerLatencies("cpu", 1, {"a layer": curve}, layers).save(project / "times.json")
    assert cli.main([*COMPRESS, "--latency", "0.75", "--latencies", "times.json", "--json"]) == 0
    compression = json.loads(capsys.readouterr().out)["compression"]
    policy = compression["config"]["rank"]
    assert (policy["policy"], policy["fraction"], policy["allocation"]) == ("latency_budget", 0.75, "uniform")
    assert sorted(str(row["rank"]) for row in compression["layers"]) == ["8", "None"]  # 1.4 of 2 ms
    assert sum(row["seconds"] for row in compression["layers"]) == pytest.approx(1.4e-3)


def test_latency_budget_measures_the_first_batch(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []

    def measure(model: torch.nn.Module, batch: torch.Tensor, progress: bool) -> LayerLatencies:
        assert progress and len(model) == 3
        seen.append(batch.shape)
        curve = LatencyCurve(dense=1e-3, ranks=(8,), seconds=(4e-4,))
        return LayerLatencies("cpu", 1, {"a layer": curve}, {"0": {"a layer": 1}, "2": {"a layer": 1}})

    monkeypatch.setattr(compress, "measure_latency", measure)
    timed = ["--latency", "0.4", "--allocation", "variance", "--json"]
    assert cli.main([*COMPRESS, *timed, "--save-latencies", "times.json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert seen == [(32, 16)] and [row["rank"] for row in first["compression"]["layers"]] == [8, 8]
    assert cli.main([*COMPRESS, *timed, "--latencies", "times.json"]) == 0
    assert json.loads(capsys.readouterr().out) == first and len(seen) == 1


def test_latency_budget_with_real_timing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMPRESS, "--latency", "1", "--save-latencies", "times.json"]) in (0, 1)  # 1: all stay dense
    assert "timing layers" in capsys.readouterr().err
    assert set(LayerLatencies.load(project / "times.json").layers) == {"0", "2"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--budget", "0.5", "--flops", "0.5"], "not allowed with argument"),
        (["--latency", "0.5", "--ranks", "ranks.json"], "not allowed with argument"),
        (["--latency", "0"], "must be a number in (0, 1]"),
        (["--flops", "0.5", "--latencies", "times.json"], "--latencies needs --latency"),
        (["--save-latencies", "times.json"], "--save-latencies needs --latency"),
        (["--latency", "0.5", "--latencies", "none.json"], "none.json"),
        (["--latency", "0.5", "--latencies", "ranks.json"], "'ranks.json' does not hold the latencies of layers"),
        (["--latency", "0.5", "--save-latencies", "no/times.json"], "--save-latencies: no such folder"),
    ],
)
def test_conflicting_budgets_are_refused(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    (project / "ranks.json").write_text('{"0": 4}')
    line = refused(capsys, 2, *COMPRESS, *arguments)
    assert reason in line and not (project / "out").exists()


def test_latency_without_batches_needs_times(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "c.safetensors").touch()
    argv = ("compress", "cli_project:build", "--covariances", "c.safetensors", "--out", "out", "--latency", "0.5")
    assert "with --covariances it needs --latencies" in refused(capsys, 2, *argv)


def test_text_shows_how_to_load_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMPRESS, "--budget", "0.8", "--projection", "utilized"]) == 0
    out = capsys.readouterr().out
    assert "layer parameters" in out and "load_pretrained(dense_model, 'out')" in out


def test_html(project: Path) -> None:
    assert cli.main([*COMPRESS, "--budget", "0.8", "--html", "page.html"]) == 0
    assert "<title>Compression report</title>" in (project / "page.html").read_text()


def test_half_of_the_parameters_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert "fraction=0.5 cannot be met" in refused(capsys, 2, *COMPRESS)  # by layers of 16 and 32 features


def test_explained_variance_chooses_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = []
    for share in ("0.99", "0.5"):
        assert cli.main([*COMPRESS, "--json", "--explained-variance", share]) == 0
        compression = json.loads(capsys.readouterr().out)["compression"]
        assert compression["config"]["rank"] == {"policy": "explained_variance", "threshold": float(share)}
        ranks.append(compression["layers"][0]["rank"])
    assert ranks[1] < ranks[0]


def test_ranks_by_hand_and_layers_left_dense(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "ranks.json").write_text('{"re:.*": 4}')
    assert cli.main([*COMPRESS, "--ranks", "ranks.json", "--keep-dense", "2", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
    assert [layer["rank"] for layer in layers] == [4, None]
    assert "2.weight" in load_file(project / "out" / "model.safetensors")


def test_covariances_from_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMPRESS, "--budget", "0.8", "--save-covariances", "c.safetensors", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    argv = ["compress", "cli_project:build", "--covariances", "c.safetensors", "--budget", "0.8", "--out", "out"]
    argv += ["--max-memory", "1GB"]
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_loss_allocation_needs_output_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    by_loss = ["--budget", "0.8", "--allocation", "loss", "--projection", "loss", "--json"]
    assert "needs output gradients" in refused(capsys, 2, *COMPRESS, *by_loss)
    assert cli.main([*COMPRESS, *by_loss, "--sensitivity", "fisher"]) == 0
    layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
    assert all(layer["projection"] in ("loss", None) and layer["predicted_loss"] is not None for layer in layers)


def test_output_gradients_make_loss_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    for sensitivity, projection, allocation in (
        ([], "output", "uniform"),
        (["--sensitivity", "fisher"], "loss", "loss"),
    ):
        assert cli.main([*COMPRESS, "--budget", "0.8", *sensitivity, "--json"]) == 0
        compression = json.loads(capsys.readouterr().out)["compression"]
        assert {layer["projection"] for layer in compression["layers"]} <= {projection, None}
        assert compression["allocation"] == allocation
    argv = [*COMPRESS, "--sensitivity", "fisher", "--projection", "output", "--json"]
    assert cli.main([*argv, "--budget", "0.8", "--allocation", "uniform"]) == 0
    compression = json.loads(capsys.readouterr().out)["compression"]
    assert {layer["projection"] for layer in compression["layers"]} <= {"output", None}
    assert compression["allocation"] == "uniform"


def test_reconstruct(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMPRESS, "--budget", "0.8", "--reconstruct", "sequential", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
    assert all(layer["reconstructed"] for layer in layers if layer["rank"] is not None)


def test_recalibrate_changes_the_predicted_loss(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*COMPRESS, "--sensitivity", "fisher", "--json", "--budget"]
    predicted = []
    for more in ([], ["--recalibrate"]):
        assert cli.main([*argv, "0.8", *more]) == 0
        layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
        predicted.append([layer["predicted_loss"] for layer in layers])
    assert predicted[0] != predicted[1]
    assert "cannot be met" in refused(capsys, 2, *argv, "0.01", "--recalibrate")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--recalibrate records output gradients again; it needs --sensitivity"),
        (
            ["--sensitivity", "fisher", "--projection", "output"],
            "--recalibrate needs --projection loss, or a budget",
        ),
    ],
)
def test_recalibrate_needs_output_gradients(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert reason in refused(capsys, 2, *COMPRESS, "--recalibrate", *arguments)


def test_damping_changes_the_factors(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*COMPRESS, "--sensitivity", "fisher", "--json", "--budget", "0.8"]
    predicted = []
    for more in ([], ["--damping", "0.1"]):
        assert cli.main([*argv, *more]) == 0
        layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
        predicted.append([layer["predicted_loss"] for layer in layers])
    assert predicted[0] != predicted[1]
    line = refused(capsys, 1, *COMPRESS, "--side", "output", "--budget", "0.8", "--damping", "0.1")
    assert "--damping failed: calibration recorded only the outputs of these layers" in line


def test_correct_changes_the_predicted_loss(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*COMPRESS, "--sensitivity", "fisher", "--json", "--budget", "0.8"]
    predicted = []
    for more in ([], ["--correct"]):
        assert cli.main([*argv, *more]) == 0
        layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
        predicted.append([layer["predicted_loss"] for layer in layers])
    assert predicted[0] != predicted[1]
    assert "--correct records output gradients again; it needs --sensitivity" in refused(
        capsys, 2, *COMPRESS, "--correct"
    )


def test_measure_gives_the_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv, found = [*COMPRESS, "--sensitivity", "fisher", "--json", "--budget", "0.8", "--measure"], []

    def noted(*args: Any, **options: Any) -> lro.Ranks:
        found.append(lro.measured_ranks(*args, **options))
        return found[-1]

    monkeypatch.setattr("lowrank_ops.cli.compress.measured_ranks", noted)
    assert cli.main(argv) == 0
    layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
    assert {layer["fqn"]: layer["rank"] for layer in layers if layer["rank"] is not None} == found[0].ranks
    for more in (["--budget", "0.6", "--allocation", "uniform"], ["--flops", "0.6"]):
        line = refused(capsys, 2, *COMPRESS, "--sensitivity", "fisher", "--measure", *more)
        assert "--measure divides --budget by loss; it needs --budget, and no other --allocation" in line


def test_channels_are_dropped(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        *COMPRESS,
        "--channels",
        "--sensitivity",
        "fisher",
        "--correct",
        "--measure",
        "--budget",
        "0.6",
        "--json",
    ]
    assert cli.main(argv) == 0
    layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
    channels = [layer["channels"] for layer in layers]
    assert channels == [16, 16] and lro.load_pretrained(build(), project / "out")[2].in_features == 16


@pytest.mark.parametrize("flag", [["--reconstruct", "sequential"], ["--recalibrate"], ["--correct"], ["--measure"]])
def test_modes_that_run_the_model_need_batches(capsys: pytest.CaptureFixture[str], flag: list[str]) -> None:
    argv = ("compress", "cli_project:build", "--covariances", "c.safetensors", "--out", "out")
    line = refused(capsys, 2, *argv, *flag)
    assert f"{flag[0]} runs the model on --calibration; it cannot be combined with --covariances" in line


def test_nothing_is_written_if_every_layer_stays_dense(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "every layer stays dense" in refused(capsys, 1, *COMPRESS, "--budget", "1")
    assert not (project / "out").exists()
