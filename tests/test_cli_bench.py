"""``lowrank-ops bench`` and ``tune``: arguments go through, exit codes come back, and a wheel says what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_ops import cli
from lowrank_ops.cli import bench

CHECKOUT = Path(__file__).parents[1]
needs_checkout = pytest.mark.skipif(not (CHECKOUT / "benchmarks").is_dir(), reason="no benchmarks beside the tests")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As where the wheel is installed: neither the package nor the working directory lies in a checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "lowrank_ops" / "cli" / "bench.py"))
    return tmp_path


@needs_checkout
def test_a_suite_gets_its_arguments(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "cpu", "--dry-run", "--only", "features=512"]) == 0
    out = capfd.readouterr().out
    assert "tokens=1024 features=512 dtype=fp32: floor" in out and "features=1024" not in out


@needs_checkout
def test_help_of_a_suite_is_the_suites_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "cpu", "--help"]) == 0
    assert "--seconds" in capfd.readouterr().out


@needs_checkout
def test_the_exit_code_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "cpu", "--no-such-flag"]) == 2
    assert "unrecognized arguments: --no-such-flag" in capfd.readouterr().err


@needs_checkout
def test_tune_can_be_tried_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--dry-run", "--op", "covariance_update"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"covariance_update, planned for sm90: {len(lines) - 1} shapes"


@pytest.mark.parametrize("argv", [["bench", "cpu", "--dry-run"], ["tune"]])
def test_a_wheel_says_where_the_benchmarks_are(
    installed: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "the benchmarks are not part of the installed package; get the sources" in error


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_help_with_an_example_where_nothing_is_installed(
    installed: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"lowrank-ops {command}" in capsys.readouterr().out.split("examples", 1)[1]


def test_the_working_directory_may_be_the_checkout(installed: Path) -> None:
    assert bench._checkout() is None
    (installed / "benchmarks").mkdir()
    (installed / "benchmarks" / "suite.py").touch()
    assert bench._checkout() is None  # somebody else's
    (installed / "lowrank_ops").mkdir()
    assert bench._checkout() == installed


@pytest.mark.parametrize(
    ("argv", "part"),
    [(["bench"], "bench needs a SUITE, one of covariance, "), (["bench", "gpu"], "invalid choice: 'gpu'")],
)
def test_bad_suites(capsys: pytest.CaptureFixture[str], argv: list[str], part: str) -> None:
    assert cli.main(argv) == 2
    assert part in capsys.readouterr().err


def test_other_commands_take_no_unknown_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--fast"]) == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err
