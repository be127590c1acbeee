"""What all commands share: refusals in one line, help, exit codes; and the options of the demo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lowrank_ops as lro
from lowrank_ops import cli
from lowrank_ops.cli import inputs
from tests.cli.commands import ANALYZE, COMPRESS, refused

pytestmark = pytest.mark.usefixtures("project")


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
            assert f"{argv[-1]}: must be a path; got an empty string" in refused(capsys, 2, *argv, "")
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
