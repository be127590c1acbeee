"""The command line: what every command prints and which arguments it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_ops as lro
from lowrank_ops import cli, ops
from lowrank_ops.checkpoint import load_pretrained
from lowrank_ops.cli import compress, doctor, inputs, verify
from lowrank_ops.latencies import LatencyCurve, LayerLatencies

PROJECT = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    print("building the model")
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()

def batches():
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(5, 16, generator=generator)
    for _ in range(3):
        yield torch.randn(32, 5, generator=generator) @ basis

ready = build()
number = 3
tensor = lambda: torch.zeros(4, 16)
nan = lambda: [torch.full((4, 16), float("nan"))]
wordy = lambda: ["a text"]
empty = lambda: []

def broken():
    raise RuntimeError("the disk\\nis gone")

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, attention_mask):
        return self.layer(x)

def masked_batches():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    return [{"x": torch.randn(2, 3, 8), "attention_mask": mask}]
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the user's modules."""
    (tmp_path / "cli_project.py").write_text(PROJECT)
    (tmp_path / "cli_broken.py").write_text("raise OSError('no weights')")
    (tmp_path / "cli_needs.py").write_text("import a_package_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield tmp_path
    torch.set_num_threads(threads)
    for name in ("cli_project", "cli_broken", "cli_needs"):
        sys.modules.pop(name, None)


def build() -> torch.nn.Module:
    """The project's model, as the command builds it."""
    return inputs.import_callable("cli_project:build", "MODEL")()


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """The line that a command prints when it fails with ``code``."""
    assert cli.main(list(argv)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("lowrank-ops: error: ")
    assert "Traceback" not in captured.err
    return line


ANALYZE = ("analyze", "cli_project:build", "--calibration", "cli_project:batches")
COMPRESS = ("compress", "cli_project:build", "--calibration", "cli_project:batches", "--out", "out")


class TestAnalyze:
    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*ANALYZE, "--explained-variance", "1"]) == 0
        captured = capsys.readouterr()
        first = next(line.split() for line in captured.out.splitlines() if line.startswith("0 "))
        assert first == ["0", "16", "32", "5", "5", "5", "31.2%"]  # the inputs span 5 directions
        assert "Mean Layer Utilization" in captured.out
        assert "building the model" not in captured.out and "building the model" in captured.err
        assert "calibrating" in captured.err

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*ANALYZE, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["command"], document["model"]) == ("analyze", "cli_project:build")
        rows = {row["fqn"]: row for row in document["utilization"]["layers"]}
        assert (rows["0"]["rank"], rows["0"]["rows"]) == (5, 96)
        assert document["utilization"]["explained_variance"] == 0.99

    def test_saved_covariances_give_the_same_result(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*ANALYZE, "--json", "--save-covariances", "c.safetensors"]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert set(lro.Covariances.load(project / "c.safetensors")) == {"0", "2"}
        assert cli.main(["analyze", "cli_project:build", "--covariances", "c.safetensors", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == measured

    def test_checkpoint_is_loaded(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        weights = {name: torch.zeros_like(tensor) for name, tensor in build().state_dict().items()}
        save_file(weights, project / "zero.safetensors")
        capsys.readouterr()  # what building printed
        assert cli.main([*ANALYZE, "--checkpoint", "zero.safetensors", "--json"]) == 0
        layers = json.loads(capsys.readouterr().out)["utilization"]["layers"]
        assert [layer["output_rank"] for layer in layers] == [0, 0]

    def test_model_instance_and_device_are_accepted(self, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["analyze", "cli_project:ready", "--calibration", "cli_project:batches", "--device", "cpu"]
        assert cli.main([*argv, "--side", "output"]) == 0
        assert "not measured" in capsys.readouterr().out

    def test_mask(self, capsys: pytest.CaptureFixture[str]) -> None:
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

    def test_plot(self, project: Path) -> None:
        pytest.importorskip("matplotlib")
        assert cli.main([*ANALYZE, "--plot", "picture.png"]) == 0
        assert (project / "picture.png").read_bytes().startswith(b"\x89PNG")

    def test_html(self, project: Path) -> None:
        assert cli.main([*ANALYZE, "--html", "page.html"]) == 0
        assert "<title>Layer utilization</title>" in (project / "page.html").read_text()

    def test_plot_without_matplotlib(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install 'lowrank_ops[plots]'" in refused(capsys, 2, *ANALYZE, "--plot", "picture.png")


class TestCompress:
    def test_budget_is_kept_and_the_folder_loads(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
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

    def test_flop_budget_is_kept(self, capsys: pytest.CaptureFixture[str]) -> None:
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

    def test_byte_budget_is_kept(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*COMPRESS, "--bytes", "0.5", "--eight-bit", "fp8", "--json"]) == 0
        compression = json.loads(capsys.readouterr().out)["compression"]
        policy = compression["config"]["rank"]
        assert (policy["policy"], policy["fraction"], policy["form"]) == ("byte_budget", 0.5, "fp8")
        assert 0 < compression["layer_bytes"] <= 0.5 * compression["layer_bytes_before"]
        loaded = load_pretrained(build(), project / "out")
        assert loaded.get_submodule("0").formats == ("fp8",)

    def test_latency_budget_reads_stored_times(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        self, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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

    def test_latency_budget_with_real_timing(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        self, project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
    ) -> None:
        (project / "ranks.json").write_text('{"0": 4}')
        line = refused(capsys, 2, *COMPRESS, *arguments)
        assert reason in line and not (project / "out").exists()

    def test_latency_without_batches_needs_times(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (project / "c.safetensors").touch()
        argv = ("compress", "cli_project:build", "--covariances", "c.safetensors", "--out", "out", "--latency", "0.5")
        assert "with --covariances it needs --latencies" in refused(capsys, 2, *argv)

    def test_text_shows_how_to_load_the_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*COMPRESS, "--budget", "0.8", "--projection", "utilized"]) == 0
        out = capsys.readouterr().out
        assert "layer parameters" in out and "load_pretrained(dense_model, 'out')" in out

    def test_html(self, project: Path) -> None:
        assert cli.main([*COMPRESS, "--budget", "0.8", "--html", "page.html"]) == 0
        assert "<title>Compression report</title>" in (project / "page.html").read_text()

    def test_half_of_the_parameters_is_the_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "fraction=0.5 cannot be met" in refused(capsys, 2, *COMPRESS)  # by layers of 16 and 32 features

    def test_explained_variance_chooses_the_ranks(self, capsys: pytest.CaptureFixture[str]) -> None:
        ranks = []
        for share in ("0.99", "0.5"):
            assert cli.main([*COMPRESS, "--json", "--explained-variance", share]) == 0
            compression = json.loads(capsys.readouterr().out)["compression"]
            assert compression["config"]["rank"] == {"policy": "explained_variance", "threshold": float(share)}
            ranks.append(compression["layers"][0]["rank"])
        assert ranks[1] < ranks[0]

    def test_ranks_by_hand_and_layers_left_dense(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (project / "ranks.json").write_text('{"re:.*": 4}')
        assert cli.main([*COMPRESS, "--ranks", "ranks.json", "--keep-dense", "2", "--json"]) == 0
        layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
        assert [layer["rank"] for layer in layers] == [4, None]
        assert "2.weight" in load_file(project / "out" / "model.safetensors")

    def test_covariances_from_a_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*COMPRESS, "--budget", "0.8", "--save-covariances", "c.safetensors", "--json"]) == 0
        first = json.loads(capsys.readouterr().out)
        argv = ["compress", "cli_project:build", "--covariances", "c.safetensors", "--budget", "0.8", "--out", "out"]
        argv += ["--max-memory", "1GB"]
        assert cli.main([*argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == first

    def test_loss_allocation_needs_output_gradients(self, capsys: pytest.CaptureFixture[str]) -> None:
        by_loss = ["--budget", "0.8", "--allocation", "loss", "--projection", "loss", "--json"]
        assert "needs output gradients" in refused(capsys, 2, *COMPRESS, *by_loss)
        assert cli.main([*COMPRESS, *by_loss, "--sensitivity", "fisher"]) == 0
        layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
        assert all(layer["projection"] in ("loss", None) and layer["predicted_loss"] is not None for layer in layers)

    def test_output_gradients_make_loss_the_default(self, capsys: pytest.CaptureFixture[str]) -> None:
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

    def test_reconstruct(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*COMPRESS, "--budget", "0.8", "--reconstruct", "sequential", "--json"]) == 0
        layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
        assert all(layer["reconstructed"] for layer in layers if layer["rank"] is not None)

    def test_recalibrate_changes_the_predicted_loss(self, capsys: pytest.CaptureFixture[str]) -> None:
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
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
    ) -> None:
        assert reason in refused(capsys, 2, *COMPRESS, "--recalibrate", *arguments)

    def test_damping_changes_the_factors(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = [*COMPRESS, "--sensitivity", "fisher", "--json", "--budget", "0.8"]
        predicted = []
        for more in ([], ["--damping", "0.1"]):
            assert cli.main([*argv, *more]) == 0
            layers = json.loads(capsys.readouterr().out)["compression"]["layers"]
            predicted.append([layer["predicted_loss"] for layer in layers])
        assert predicted[0] != predicted[1]
        line = refused(capsys, 1, *COMPRESS, "--side", "output", "--budget", "0.8", "--damping", "0.1")
        assert "--damping failed: calibration recorded only the outputs of these layers" in line

    def test_correct_changes_the_predicted_loss(self, capsys: pytest.CaptureFixture[str]) -> None:
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

    def test_measure_gives_the_ranks(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_channels_are_dropped(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    def test_modes_that_run_the_model_need_batches(self, capsys: pytest.CaptureFixture[str], flag: list[str]) -> None:
        argv = ("compress", "cli_project:build", "--covariances", "c.safetensors", "--out", "out")
        line = refused(capsys, 2, *argv, *flag)
        assert f"{flag[0]} runs the model on --calibration; it cannot be combined with --covariances" in line

    def test_nothing_is_written_if_every_layer_stays_dense(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "every layer stays dense" in refused(capsys, 1, *COMPRESS, "--budget", "1")
        assert not (project / "out").exists()


class TestDoctor:
    def test_json_covers_every_op_and_every_implementation(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["doctor", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["environment"]["torch"] == torch.__version__ and document["held"] is True
        assert document["devices"][0]["device"] == "cpu"
        calls = {call["op"]: call for call in document["calls"] if call["device"] == "cpu"}
        assert set(calls) == set(ops._EXPLAIN)
        table = {impl.name for impl in ops._linear.TABLE}
        assert {row["implementation"] for row in calls["lowrank_linear"]["implementations"]} == table
        for call in document["calls"]:
            assert sum(row["chosen"] for row in call["implementations"]) == 1
            assert all((row["reason"] is None) is row["can_run"] for row in call["implementations"])

    def test_text_has_the_reason(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert f"torch        {torch.__version__}" in out and "Every op can run" in out
        blocks = [block for block in out.split("\n\n") if " on cpu\n" in block]
        assert len(blocks) == 7 and all("runs" in block for block in blocks)
        assert "triton" in out and "cannot run: " in out

    def test_kernel_is_shown_with_its_tiles(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = "reference: runs\ncuda: can run, by covariance_sm90: tile 128x128, 3 stages\ntriton: cannot run: no"
        monkeypatch.setattr(ops, "explain", lambda op, *tensors, **options: lines)
        assert cli.main(["doctor"]) == 0
        assert "  cuda       can run, by covariance_sm90: tile 128x128, 3 stages\n" in capsys.readouterr().out
        assert cli.main(["doctor", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["calls"][0]["implementations"]
        assert [row["plan"] for row in rows] == [None, "covariance_sm90: tile 128x128, 3 stages", None]
        assert rows[1]["can_run"] and not rows[1]["chosen"]

    @pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["text", "json"])
    def test_op_without_implementation_is_exit_code_1(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, json_flag: list[str]
    ) -> None:
        monkeypatch.setattr(ops, "explain", lambda op, *tensors, **options: "reference: cannot run: out of luck")
        assert cli.main(["doctor", *json_flag]) == 1
        out = capsys.readouterr().out
        assert "out of luck" in out
        assert ("No implementation can run" in out) is (not json_flag)

    def test_plans_are_printed_for_an_arch(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            doctor._native, "plan", lambda op, arch, dtype, **shape: f"{op} {arch} {shape['tokens']} planned"
        )
        assert cli.main(["doctor", "--plan", "sm_90"]) == 0
        assert "lowrank_linear sm_90 64 planned" in capsys.readouterr().out
        assert cli.main(["doctor", "--plan", "sm_90", "--json"]) == 0
        plans = json.loads(capsys.readouterr().out)["plans"]
        ops = {"covariance_update_", "conv_covariance_update_", "lowrank_linear", "lowrank_linear_grouped"}
        assert {plan["op"] for plan in plans} == ops

    def test_plans_are_refused_with_a_reason(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "'sm_90'" in refused(capsys, 2, "doctor", "--plan", "h100")

        def missing(*arguments: object, **options: object) -> str:
            raise RuntimeError("No plan without the native library")

        monkeypatch.setattr(doctor._native, "plan", missing)
        assert "No plan without" in refused(capsys, 1, "doctor", "--plan", "sm_90")

    def test_verify_needs_a_gpu(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "torch finds none here" in refused(capsys, 1, "doctor", "--verify")
        refused(capsys, 2, "doctor", "--verify", "--plan", "sm_90")
        for sizes in ("TOKENS", "LAYERS", "MATRICES"):
            monkeypatch.setattr(verify, sizes, getattr(verify, sizes)[-1:])
        with pytest.raises(verify.Failure, match="No kernel can run on a CPU"):
            verify.verify(torch.device("cpu"), "a CPU")

    def test_a_gpu_is_described(self, monkeypatch: pytest.MonkeyPatch) -> None:
        facts = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
        assert doctor._gpu(1) == {
            "device": "cuda:1", "name": "A GPU", "capability": "9.0", "sm_count": 132, "memory_gib": 80.0,
        }  # fmt: skip

    def test_broken_package_is_reported(self, project: Path) -> None:
        sys.path.insert(0, str(project))
        assert doctor._version_of("cli_broken") == "cannot be imported: no weights"
        assert doctor._version_of("a_package_that_is_not_there") == "not installed"


class TestDemo:
    def test_options_and_exit_code_are_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lowrank_ops.demo import run

        seen = []
        monkeypatch.setattr(run, "run", lambda options: seen.append(options) or 1)
        assert cli.main(["demo", "--json", "--out", "here"]) == 1
        assert seen[0].json and str(seen[0].out) == "here"


class TestRefusals:
    """User errors give one line and the exit code, no traceback."""

    @pytest.mark.parametrize(
        ("argv", "part"),
        [
            ([], "required: command"),
            (["squeeze"], "invalid choice: 'squeeze'"),
            (
                ["analyze", "cli_project:build"],
                "--calibration/--batches --covariances is required (see lowrank-ops analyze --help)",
            ),
            ([*ANALYZE, "--covariances", "c"], "not allowed with argument"),
            ([*ANALYZE, "--explained-variance", "99"], "must be a number in (0, 1]; got '99'"),
            ([*COMPRESS, "--budget", "half"], "must be a number in (0, 1]; got 'half'"),
            ([*COMPRESS, "--budget", "0.5", "--ranks", "r"], "not allowed with argument"),
            (
                [*COMPRESS, "--allocation", "variance"],
                "--allocation needs a budget: --budget, --flops, --bytes or --latency",
            ),
            ([*COMPRESS, "--budget", "0.5", "--eight-bit", "int8"], "--eight-bit needs --bytes"),
            ([*COMPRESS, "--group", "--bytes", "0.5"], "--group cannot be combined with --bytes"),
            ([*COMPRESS, "--group", "--pivoted"], "--pivoted cannot be combined with --group"),
            ([*COMPRESS, "--channels", "--bytes", "0.5"], "--channels cannot be combined with --bytes"),
            (
                [*COMPRESS, "--channels", "--explained-variance", "0.9"],
                "--channels cannot be combined with --explained",
            ),
            (
                [*COMPRESS, "--channels", "--reconstruct", "sequential"],
                "--channels cannot be combined with --reconstruct sequential",
            ),
            (
                [*COMPRESS, "--channels", "--projection", "weight"],
                "--channels cannot be combined with --projection weight",
            ),
            ([*COMPRESS, "--projection", "svd"], "invalid choice: 'svd'"),
            ([*COMPRESS[:-2]], "required: --out"),
            ([*COMPRESS[:-1], "cli_project.py"], "--out must be a folder; 'cli_project.py' is a file"),
            ([*ANALYZE, "--save-covariances", "none/c"], "--save-covariances: no such folder"),
            ([*ANALYZE, "--plot", "none/p.png"], "--plot: no such folder"),
            ([*ANALYZE, "--html", "none/p.html"], "--html: no such folder"),
            ([*COMPRESS, "--html", "none/p.html"], "--html: no such folder"),
            ([*ANALYZE, "--html", "."], "--html: '.' is a folder; pass a file"),
            (["analyze", "m:b", "--covariances", "c", "--mask", "x"], "cannot be combined with --covariances"),
            (
                ["analyze", "m:b", "--covariances", "c", "--sensitivity", "fisher"],
                "cannot be combined with --covariances",
            ),
            ([*COMPRESS, "--budget", "0.001"], "cannot be met"),
            ([*COMPRESS, "--keep-dense", "nowhere"], "overrides: 'nowhere' matches none"),
        ],
    )
    def test_bad_arguments(self, capsys: pytest.CaptureFixture[str], argv: list[str], part: str) -> None:
        assert part in refused(capsys, 2, *argv)

    @pytest.mark.parametrize(
        ("model", "code", "part"),
        [
            ("cli_project", 2, "MODEL must be hf:DIR, timm:NAME or module:function; got 'cli_project'"),
            ("", 2, "MODEL must be hf:DIR, timm:NAME or module:function; got ''"),
            ("nowhere:build", 2, "no module 'nowhere' in this folder"),
            ("cli_needs:build", 2, "no module 'a_package_that_is_not_there'"),
            ("cli_project:bild", 2, "'cli_project' has no 'bild'"),
            ("cli_project:number", 2, "must be callable; got int"),
            ("cli_project:tensor", 2, "must return a torch.nn.Module; it returned a Tensor"),
            ("cli_project:broken", 1, "MODEL cli_project:broken failed: RuntimeError: the disk is gone (--traceback"),
            ("cli_broken:build", 1, "importing cli_broken failed: OSError: no weights"),
        ],
    )
    def test_bad_models(self, capsys: pytest.CaptureFixture[str], model: str, code: int, part: str) -> None:
        assert part in refused(capsys, code, "analyze", model, "--calibration", "cli_project:batches")

    @pytest.mark.parametrize(
        ("batches", "code", "part"),
        [
            ("cli_project:tensor", 2, "must return an iterable of batches, such as a list or a DataLoader"),
            ("cli_project:build", 1, "calibration failed"),
            ("cli_project:broken", 1, "--calibration cli_project:broken failed: RuntimeError: the disk is gone"),
            ("cli_project:empty", 1, "calibration failed: batches was empty"),
            ("cli_project:nan", 1, "layer '0': its input holds NaN or inf"),
            ("cli_project:wordy", 1, "calibration failed: TypeError: "),
        ],
    )
    def test_bad_batches(self, capsys: pytest.CaptureFixture[str], batches: str, code: int, part: str) -> None:
        assert part in refused(capsys, code, "analyze", "cli_project:build", "--calibration", batches)

    def test_bad_checkpoints(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--checkpoint: no such file: 'none'" in refused(capsys, 2, *ANALYZE, "--checkpoint", "none")
        (project / "text").write_text("not safetensors")
        line = refused(capsys, 2, *ANALYZE, "--checkpoint", "text")
        assert "--checkpoint: 'text' does not fit cli_project:build" in line
        save_file({"0.weight": torch.zeros(32, 16)}, project / "part.safetensors")
        line = refused(capsys, 2, *ANALYZE, "--checkpoint", "part.safetensors")
        assert 'Missing key(s) in state_dict: "0.bias", "2.bias", "2.weight"' in line

    def test_empty_paths(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for argv in ((*COMPRESS[:-2], "--out"), (*ANALYZE, "--html"), (*ANALYZE[:2], "--covariances")):
            assert f"{argv[-1]}: must be a path; got an empty one" in refused(capsys, 2, *argv, "")
        assert not (project / "config.json").exists()

    def test_bad_covariances(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ("analyze", "cli_project:build", "--covariances")
        assert "none" in refused(capsys, 2, *argv, "none")
        (project / "text").write_text("not safetensors")
        assert "'text' is not a whole file written by Covariances.save" in refused(capsys, 2, *argv, "text")

    def test_bad_ranks(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "none.json" in refused(capsys, 2, *COMPRESS, "--ranks", "none.json")
        for text, part in [("{", "is not JSON"), ("[1]", "must hold a JSON object"), ('{"0": 1.5}', "got 1.5")]:
            (project / "ranks.json").write_text(text)
            assert part in refused(capsys, 2, *COMPRESS, "--ranks", "ranks.json")

    def test_bad_device(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--device toaster: " in refused(capsys, 2, *ANALYZE, "--device", "toaster")

    def test_traceback_on_request(self) -> None:
        argv = ["analyze", "cli_project:broken", "--calibration", "cli_project:batches", "--traceback"]
        with pytest.raises(Exception, match="the disk is gone") as caught:
            cli.main(argv)
        assert isinstance(caught.value.__cause__, RuntimeError)

    def test_interruption(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*args: object, **options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(inputs, "calibrate", interrupt)
        assert cli.main([*ANALYZE]) == 130
        assert "interrupted" in capsys.readouterr().err


def test_help_lists_the_commands_without_importing_the_demo() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(lro.__file__).parents[1])}
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lowrank_ops.cli", "--help"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert all(f"  {command} " in process.stdout for command in ("demo", "analyze", "compress", "doctor"))
    assert "my_project:build_model" in process.stdout
    assert "lowrank_ops.compress" in process.stderr and "lowrank_ops.demo" not in process.stderr


@pytest.mark.parametrize("command", ["demo", "analyze", "compress", "doctor"])
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "--json" in out
    assert "example" in out and f"lowrank-ops {command}" in out.split("example", 1)[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lowrank_ops {lro.__version__}\n"


def test_closed_pipe_is_no_error() -> None:
    code = "from lowrank_ops.cli import main; raise SystemExit(main(['doctor']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| true` does
    assert process.stderr.read() == b"" and process.wait() == 0
