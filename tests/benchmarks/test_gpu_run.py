"""The GPU run without a GPU: it resumes, ends in time, and its exit code says what failed. Parts are stand-ins."""

import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_run

PARTS = list(gpu_run.PARTS)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Calls it with a Python program in the place of each part; gives the exit code and the parts that were run."""
    programs = dict.fromkeys(PARTS, "pass")
    asked = []

    def command(part, options, seconds):
        asked.append(part)
        return [sys.executable, "-c", programs[part]]

    monkeypatch.setattr(gpu_run, "command", command)
    monkeypatch.setattr(gpu_run, "TABLES", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_run.signal, "signal", lambda *_: None)

    def run(*arguments, **changed):
        asked.clear()
        programs.update(changed)
        return gpu_run.main([str(tmp_path / "run"), *arguments]), list(asked)

    return run


def test_parts_that_ended_are_skipped(run):
    assert run("covariance", "model", model="exit(1)") == (1, ["covariance", "model"])
    assert run("covariance", "model") == (1, [])  # it had failed
    assert run(model="pass") == (1, ["tests", "tune", "lowrank_linear", "grouped"])


def test_an_unfinished_part_resumes_in_another_process(run, tmp_path):
    file = tmp_path / "run" / "results.json"
    resumes = f"from pathlib import Path; p = Path({str(file)!r}); n = p.stat().st_size if p.exists() else 0\n"
    resumes += "p.write_text('x' * (n + 1)); exit(3 if n < 2 else 0)"
    assert run("covariance", covariance=resumes) == (0, ["covariance"] * 3)
    crash = "import os; os.kill(os.getpid(), 9)"
    assert run("model", "tests", model=crash) == (1, ["tests", "model"])  # it got nowhere, and so would another


def test_too_little_time_is_exit_code_3(run):
    assert run("covariance", "--seconds", "1") == (gpu_run.UNFINISHED, [])
    assert run("covariance") == (0, ["covariance"])


def test_a_part_that_hangs_is_stopped(run, monkeypatch):
    monkeypatch.setattr(gpu_run, "MIN_SECONDS", 1.0)
    begin = time.monotonic()
    code, asked = run("tests", "--seconds", "2", tests="import time; time.sleep(60)")
    assert code == 1 and asked == ["tests"] and time.monotonic() - begin < 30


def test_a_part_that_stalls_resumes_unless_it_got_nowhere(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "STALLED_QUICK", 0.5)
    file = tmp_path / "run" / "results.model.attempt"
    stalls = f"from pathlib import Path; import time; p = Path({str(file)!r})\n"
    stalls += "if not p.exists(): p.write_text('a kernel'); time.sleep(60)"
    assert run("--quick", "model", model=stalls) == (0, ["model"] * 2)
    assert run("--quick", "grouped", grouped="import time; time.sleep(60)") == (1, ["grouped"])


def test_suites_measure_the_tables_that_were_tuned(run, tmp_path):
    folder = tmp_path / "run" / "tuned"
    write = f"from pathlib import Path; p = Path({str(folder)!r}); p.mkdir(); (p / 'op.sm90.json').write_text('1')"
    assert run("tune", "covariance", tune=write) == (0, ["tune", "covariance"])
    assert (tmp_path / "shipped" / "op.sm90.json").read_text() == "1"


def test_quick_leaves_the_full_run_to_do(run, capsys):
    assert run("--quick") == (0, PARTS) and run("--quick") == (0, [])
    assert "every part passed" in capsys.readouterr().out
    assert run() == (0, PARTS[1:])


def test_needs_a_gpu_and_known_parts(tmp_path, capsys):
    if not torch.cuda.is_available():
        assert gpu_run.main([str(tmp_path / "run")]) == 2 and not (tmp_path / "run").exists()
        assert "needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_run.main([str(tmp_path), "nonsense"])


def test_every_part_understands_its_arguments(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(gpu_run.subprocess, "run", lambda line, **_: started.append(line))
    wheel = tmp_path / "a.whl"
    assert gpu_run.main([str(tmp_path / "run"), "--dry-run", "--quick", "--wheel", str(wheel), "--commit", "abc"]) == 0
    assert f"from_wheel.sh {wheel} 565 {sys.executable}" in capsys.readouterr().out and not (tmp_path / "run").exists()
    for part, (python, _, module, *flags) in zip(PARTS[1:], started, strict=True):
        assert python == sys.executable and part in module
        monkeypatch.setattr(sys, "argv", [module, *flags])
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert (end.value.code == 0 and " would run" in (shown := capsys.readouterr().out)) or "neighbors" in shown


SCRIPT = Path(__file__).parents[1] / "gpu" / "from_wheel.sh"
PYTEST = """#!/bin/bash
case "$*" in
  "-m pytest"*)
    if [[ "$*" =~ ${HANGS:-nothing} ]]; then trap "" INT; sleep 60; fi
    if [[ "$*" =~ ${FAILS:-nothing} ]]; then echo "== 1 failed, 2 passed in 0.1s =="; exit 1; fi
    if [[ "$*" =~ ${SKIPS:-nothing} ]]; then echo "== 3 skipped in 0.1s =="; exit 0; fi
    echo "== 3 passed in 0.1s ==" ;;
esac
"""
SANITIZER = '#!/bin/bash\nshift 4 && exec "$@"\n'  # --tool NAME --error-exitcode 1


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("timeout")), reason="no bash or no timeout")
@pytest.mark.parametrize(
    ("behavior", "failed"),
    [
        ({}, {}),
        ({"FAILS": "k sanitized"}, {"memcheck": "exit code 1", "racecheck": "1 failed, 2 passed"}),
        ({"SKIPS": "k not cuda"}, {"Triton kernels": "exit code 5,  3 skipped"}),
        ({"HANGS": "k cuda and"}, {"CUDA kernels": "no test ended"}),
    ],
    ids=["pass", "fail", "skip", "hang"],
)
def test_gpu_tests_of_a_wheel(tmp_path, behavior, failed):
    """A step that fails, hangs or runs nothing is a failure, and those behind it run."""
    for name, text in {"python3": PYTEST, "compute-sanitizer": SANITIZER}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "a.whl").touch()
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **behavior}
    seconds = 16 if "HANGS" in behavior else 60
    command = ["bash", SCRIPT, tmp_path / "a.whl", str(seconds)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = dict(line.split(": ", 1) for line in ended.stdout.split(f" s of {seconds}:\n")[1].splitlines())
    assert ended.returncode == bool(failed) and len(lines) == 4
    for step, line in lines.items():
        assert failed.get(step, "exit code 0,  3 passed") in line
