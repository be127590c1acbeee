"""The op library for the simulated device, built once from the sources of this checkout, and the orders of its runs."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from simulated import LIBRARY_NAME, ORDERS, Simulated

ROOT = Path(__file__).parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simulated-library", type=Path, help="instead of one that is built from the sources")
    parser.addoption("--one-order", action="store_true", help="run every case in one random order")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "orders(count): in how many of ORDERS each case of a test runs, by turns")


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1]}")
def order(request: pytest.FixtureRequest) -> tuple[str, int]:
    timing, seed = request.param
    return timing, seed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps a few orders per case, by turns, so that the cases of a test together run in all orders."""
    one_order = config.getoption("--one-order", default=False)
    cases: dict[str, dict[str, int]] = defaultdict(dict)  # of each test, in their order
    kept, dropped = [], []
    for item in items:
        order = getattr(item, "callspec", None) and item.callspec.params.get("order")
        if order is None:
            kept.append(item)
            continue
        marker = item.get_closest_marker("orders")
        count = marker.args[0] if marker else len(ORDERS)
        numbers = cases[item.originalname]
        number = numbers.setdefault(item.callspec.id.replace(f"{order[0]}{order[1]}", ""), len(numbers))
        turn = (ORDERS.index(order) - number * count) % len(ORDERS) < count
        (kept if (order == ORDERS[3] if one_order else turn) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def build(folder: Path, *options: str) -> Path:
    """The library, built incrementally in ``folder``."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if missing or nvcc is None:
        pytest.skip(f"the simulator needs {', '.join([*missing, *([] if nvcc else ['the CUDA toolkit'])])}")
    fixed = ["-DLOWRANK_OPS_CUDA=OFF", "-DLOWRANK_OPS_TESTS=OFF", "-DLOWRANK_OPS_SIMULATOR=ON"]
    commands = [
        ["cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *fixed, *options],
        ["cmake", "--build", folder, "--target", "lowrank_ops_simulated", "--parallel", "2"],
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest -n: one worker builds
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
    """With ThreadSanitizer, whose runtime has to be loaded first."""
    options = ["-DLOWRANK_OPS_SIMULATOR_RACES=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG"]  # each case runs once
    return build(ROOT / "build" / "simulator-races", *options)


@pytest.fixture(scope="session")
def simulated(library: Path) -> Simulated:
    return Simulated(library)
