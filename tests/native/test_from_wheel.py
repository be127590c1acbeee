"""The script of the GPU tests keeps its time budget and reports what did not run; its programs are stand-ins here."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "from_wheel.sh"
STEPS = ("CUDA kernels", "memcheck", "racecheck", "Triton covariance", "Triton linear")

# As pytest it is one test, which may hang or fail.
PYTHON = """#!/bin/bash
case "$*" in
  "-m pytest"*)
    echo "collected 3 items"
    echo "a_test.py::first PASSED [ 33%]"
    if [[ "$*" =~ ${HANGS:-nothing} ]]; then trap "" INT; sleep 60; fi
    if [[ "$*" =~ ${FAILS:-nothing} ]]; then echo "== 1 failed, 2 passed in 0.1s =="; exit 1; fi
    if [[ "$*" =~ ${SKIPS:-nothing} ]]; then echo "== 3 skipped in 0.1s =="; exit 0; fi
    echo "== 3 passed in 0.1s ==" ;;
esac
"""
SANITIZER = """#!/bin/bash
[[ "$1 $3" == "--tool --error-exitcode" ]] && shift 4 && exec "$@"
"""

pytestmark = pytest.mark.skipif(
    shutil.which("timeout") is None or shutil.which("bash") is None, reason="no bash or no timeout"
)


def run(folder: Path, budget: int, sanitizer: bool = True, **behaviour: str) -> tuple[int, dict[str, str], float]:
    """The exit code, the summary line of each step, and the seconds."""
    programs = {"python3": PYTHON, **({"compute-sanitizer": SANITIZER} if sanitizer else {})}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "a.whl").touch()
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    begin = time.monotonic()
    result = subprocess.run(
        ["bash", SCRIPT, folder / "a.whl", str(budget)],
        env={**os.environ, "PATH": path, "CUDA_HOME": str(folder), **behaviour},
        capture_output=True,
        text=True,
        timeout=4 * budget,
    )
    seconds = time.monotonic() - begin
    lines = result.stdout.split(f" s of {budget}:\n")[1].splitlines()
    return result.returncode, {step: line for step in STEPS for line in lines if line.startswith(step)}, seconds


def test_all_steps_pass(tmp_path: Path) -> None:
    code, said, _ = run(tmp_path, 60)
    assert code == 0 and set(said) == set(STEPS)
    assert all("3 passed" in line for line in said.values())


def test_failed_and_skipped_steps_do_not_pass(tmp_path: Path) -> None:
    code, said, _ = run(tmp_path, 60, FAILS="k sanitized", SKIPS="test_covariance_gpu")
    assert code == 1
    assert "3 passed" in said["CUDA kernels"] and "3 passed" in said["Triton linear"]
    assert all("FAILED with exit code 1:  1 failed" in said[check] for check in ("memcheck", "racecheck"))
    assert "NOTHING PASSED:  3 skipped" in said["Triton covariance"]


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="compute-sanitizer is here")
def test_a_missing_sanitizer_is_reported(tmp_path: Path) -> None:
    code, said, _ = run(tmp_path, 60, sanitizer=False)
    assert code == 0
    assert "not run" in said["memcheck"] and "not run" in said["racecheck"]


@pytest.mark.parametrize("hangs", ["cuda and", "pytest"], ids=["one step", "every step"])
def test_a_hang_costs_its_own_step_only(tmp_path: Path, hangs: str) -> None:
    budget = 30  # seconds: a machine that is busy with other things still has some for each step
    code, said, seconds = run(tmp_path, budget, HANGS=hangs)
    assert code == 1 and set(said) == set(STEPS)
    assert seconds < budget + 1
    assert "CUT: of 3 tests 1 ended" in said["CUDA kernels"]
    for step in STEPS[1:]:
        assert ("CUT" if hangs == "pytest" else "3 passed") in said[step]


def test_packages_of_the_virtual_environment_are_found(tmp_path: Path) -> None:
    """torch and pytest come from python3's virtual environment, the wheel before all of it."""
    environment, folder = tmp_path / "environment", tmp_path / "path"
    venv.create(environment, symlinks=True)
    inner = environment / "bin" / "python"
    site = subprocess.check_output([inner, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    for package in ("pytest", "lowrank_ops"):
        (Path(site) / f"{package}.py").touch()
    modules = Path(importlib.util.find_spec("pip").submodule_search_locations[0]).parent
    (Path(site) / "pip.pth").write_text(str(modules))
    folder.mkdir()
    python = folder / "python3"
    python.write_text(f'#!/bin/bash\n[[ "$2" == pytest ]] && echo "1 passed" && exit 0\nexec {inner} "$@"\n')
    python.chmod(0o755)
    wheel = tmp_path / "lowrank_ops-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lowrank_ops/__init__.py", "")
        archive.writestr("lowrank_ops-0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lowrank_ops\nVersion: 0\n")
        archive.writestr(
            "lowrank_ops-0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("lowrank_ops-0.dist-info/RECORD", "")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        ["bash", SCRIPT, wheel, "60"],
        env={**environ, "PATH": path, "CUDA_HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert "1 passed" in result.stdout, result.stderr
    tested = re.search(r"=== testing (.*)", result.stdout)
    assert tested and tested[1].endswith("/site/lowrank_ops/__init__.py")


REFUSED = """
import pytest, torch
torch.cuda.synchronize = lambda: None
def refuse():
    raise RuntimeError("refused")
def test_first():
    torch.cuda.synchronize = refuse
    raise ValueError("illegal access")
def test_second():
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize("several", [True, False])
def test_a_process_that_the_device_refuses_ends(tmp_path: Path, several: bool) -> None:
    if several:
        pytest.importorskip("xdist")
    shutil.copy(SCRIPT.parent / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(REFUSED)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    command = [sys.executable, "-m", "pytest", "-v", *(["-n", "1"] if several else [])]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert result.returncode == 1 and "ValueError: illegal access" in result.stdout, result.stdout + result.stderr
    assert "FAILED test_it.py::test_second" not in result.stdout
    expected = (
        "PASSED test_it.py::test_second" if several else "the device takes no more work from this process: refused"
    )
    assert expected in result.stdout
