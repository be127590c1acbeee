"""The op library for a simulated device, built once from the sources of this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from simulated import LIBRARY_NAME, Simulated

ROOT = Path(__file__).parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simulated-library", type=Path, help="instead of one that is built from the sources")


def build(folder: Path, *options: str) -> Path:
    """The library, built in ``folder``, where the next run finds what has not changed."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if missing or nvcc is None:
        pytest.skip(f"the simulator needs {', '.join([*missing, *([] if nvcc else ['the CUDA toolkit'])])}")
    fixed = ["-DLOWRANK_OPS_CUDA=OFF", "-DLOWRANK_OPS_TESTS=OFF", "-DLOWRANK_OPS_SIMULATOR=ON"]
    commands = [
        ["cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *fixed, *options],
        ["cmake", "--build", folder, "--target", "lowrank_ops_simulated", "--parallel", "2"],
    ]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.rglob(LIBRARY_NAME))


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--simulated-library", default=None)
    return given or build(ROOT / "build" / "simulator")


@pytest.fixture(scope="session")
def watched_library() -> Path:
    """With ThreadSanitizer; loads only where its runtime was loaded first."""
    return build(ROOT / "build" / "simulator-races", "-DLOWRANK_OPS_SIMULATOR_RACES=ON")


@pytest.fixture(scope="session")
def simulated(library: Path) -> Simulated:
    return Simulated(library)
