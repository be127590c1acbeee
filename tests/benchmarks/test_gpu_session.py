"""The script of a GPU session: its parts in order, what is done only once, and that it ends in time. No GPU is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"
PARTS = ["tests", "covariance", "lowrank_linear", "model", "tune", "grade"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a bash script for GPU machines, which run Linux")


def session(folder, *arguments, python=sys.executable):
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": str(ROOT)}
    return subprocess.run([SCRIPT, folder, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture
def python(tmp_path):
    """Stands for a python3 with a GPU: it writes down what it is asked to run and ends as ``codes`` says."""
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/usr/bin/env bash
[ "$1" = -c ] || [ "$1" = - ] && exit 0
echo "$*" >> {tmp_path}/asked
cat {tmp_path}/seconds-$2 2>/dev/null | xargs -r sleep
exit "$(cat {tmp_path}/code-$2 2>/dev/null || echo 0)"
"""
    )
    fake.chmod(0o755)
    return fake


def asked(tmp_path):
    """The modules asked for since the last time."""
    path = tmp_path / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.split()[1].removeprefix("benchmarks.") for line in lines]


def test_parts_go_on_until_all_are_done(tmp_path, python):
    folder = tmp_path / "session"
    (tmp_path / "code-benchmarks.bench_lowrank_linear").write_text("3")
    (tmp_path / "code-benchmarks.bench_model").write_text("1")
    parts = PARTS[1:]
    first = session(folder, *parts, "--commit", "abc", python=python)
    assert first.returncode == 3 and "there is more to do" in first.stdout
    lines = (tmp_path / "asked").read_text().splitlines()
    assert f"--out {folder}/results.json --resume --budget" in lines[0] and "--commit abc" in lines[0]
    assert f"--tables {folder}/tuned" in lines[3] and "--steps 0" in lines[3]
    modules = ["bench_covariance", "bench_lowrank_linear", "bench_model", "tune", "grade"]
    assert asked(tmp_path) == modules
    codes = {path.stem: path.read_text().split() for path in folder.glob("*.code")}
    assert codes == {"2-covariance": ["0"], "4-model": ["1"], "5-tune": ["0"], "6-grade": ["0"]}
    (folder / "1-tests.code").write_text("0")  # so that no wheel is needed
    (tmp_path / "code-benchmarks.bench_lowrank_linear").write_text("0")
    again = session(folder, python=python)  # what failed gets a second chance, and no third
    assert again.returncode == 1 and "failed: model" in again.stdout
    assert asked(tmp_path) == ["bench_lowrank_linear", "bench_model", "grade"]
    third = session(folder, python=python)
    assert third.returncode == 1 and "model: done before, with exit code 1" in third.stdout
    assert asked(tmp_path) == ["grade"]
    session(folder, "covariance", python=python)
    assert asked(tmp_path) == ["bench_covariance"]


def test_a_part_that_passes_at_the_second_try_has_passed(tmp_path, python):
    folder = tmp_path / "session"
    (tmp_path / "code-benchmarks.bench_model").write_text("139")
    assert session(folder, "model", python=python).returncode == 3
    (tmp_path / "code-benchmarks.bench_model").write_text("0")
    assert session(folder, "model", python=python).returncode == 0
    assert (folder / "4-model.code").read_text() == "0\n"


def test_a_part_that_had_passed_gets_its_second_try_as_well(tmp_path, python):
    folder = tmp_path / "session"
    assert session(folder, "model", python=python).returncode == 0
    (tmp_path / "code-benchmarks.bench_model").write_text("1")
    assert session(folder, "model", python=python).returncode == 3
    assert (folder / "4-model.code").read_text() == "1\n"
    assert session(folder, "model", python=python).returncode == 1


def test_missed_targets_are_no_failure_of_the_session(tmp_path, python):
    (tmp_path / "code-benchmarks.grade").write_text("4")
    assert session(tmp_path / "session", "grade", python=python).returncode == 0
    (tmp_path / "code-benchmarks.grade").write_text("1")
    assert session(tmp_path / "session", "grade", python=python).returncode != 0


def test_it_ends_in_time(tmp_path, python):
    folder = tmp_path / "session"
    (tmp_path / "seconds-benchmarks.bench_covariance").write_text("60")
    ended = session(folder, "covariance", "model", "--seconds", "3", python=python)
    assert ended.returncode == 3 and ended.stdout.count("too few to begin") == 2 and asked(tmp_path) == []


def test_a_part_that_hangs_is_stopped(tmp_path, python, monkeypatch):
    text = SCRIPT.read_text()
    impatient = tmp_path / "benchmarks" / "gpu_session.sh"
    impatient.parent.mkdir()
    impatient.write_text(text.replace("limit=$(left)", "limit=1"))
    impatient.chmod(0o755)
    assert impatient.read_text() != text
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", impatient)
    (tmp_path / "seconds-benchmarks.bench_covariance").write_text("60")
    ended = session(tmp_path / "session", "covariance", "model", python=python)
    assert ended.returncode == 3 and "covariance ended with exit code 124" in ended.stdout
    assert asked(tmp_path) == ["bench_covariance", "bench_model"]
    assert [path.stem for path in (tmp_path / "session").glob("*.code")] == ["4-model"]


def test_a_dry_run_needs_no_gpu(tmp_path):
    shown = session(tmp_path / "session", "--dry-run", "tests", "grade")
    assert shown.returncode == 0
    assert "would run" in shown.stdout and "not measured" in shown.stdout
    assert not list((tmp_path / "session").glob("*.code"))


def test_paths_are_the_callers_and_the_gpu_tests_get_the_time_that_is_left(tmp_path):
    script = Path(os.path.relpath(SCRIPT, tmp_path))
    arguments = ["here", "--wheel", "a.whl", "--seconds", "300", "--dry-run", "tests"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0 and (tmp_path / "here").is_dir()
    command, seconds = shown.stdout.partition("would run ")[2].splitlines()[0].rsplit(" ", 1)
    assert command == f"tests/gpu/from_wheel.sh {tmp_path / 'a.whl'}" and 200 < int(seconds) <= 240
    refused = subprocess.run([script, "--what"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "gpu_session.sh FOLDER" in refused.stderr


def test_what_the_script_asks_for_is_understood(tmp_path, python):
    """The stand-in takes any arguments; the programs themselves refuse those that they do not know."""
    session(tmp_path / "session", *PARTS[1:5], python=python)
    for line in (tmp_path / "asked").read_text().splitlines():
        understood = subprocess.run([sys.executable, *line.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
        _, module, *given = line.split()
        missing = [name for name in given if name.startswith("--") and f"{name} " not in f"{understood.stdout} "]
        assert understood.returncode == 0 and not missing, (module, missing)


def test_what_is_not_understood_is_refused(tmp_path):
    for arguments in (["--what"], ["nonsense"], ["--wheel"], ["model", "--seconds"]):
        refused = session(tmp_path, *arguments)
        assert refused.returncode == 2 and "gpu_session.sh FOLDER" in refused.stderr
