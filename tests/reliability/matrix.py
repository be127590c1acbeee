"""Runs the CPU tests under several versions of Python, torch and Triton, and writes what passed to figures.json.

    python -m tests.reliability.matrix /path/of/a/python ... --folder environments

With ``--torch 2.10.0 2.13.0`` it first makes an environment per interpreter and version in the folder, from the package
index; with none it uses each interpreter as it is. Combinations that are not named stay in the table as "not run".
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
from pathlib import Path

from tests.reliability.campaign import FIGURES

ROOT = Path(__file__).parents[2]
OTHERS = ("interpreter", "compile_gate", "simulator", "native", "gpu", "demo", "benchmarks", "test_docs.py")
TESTS = ["tests", *(f"--ignore=tests/{name}" for name in OTHERS)]
PACKAGES = ["pytest", "hypothesis", "psutil", "safetensors", "tqdm", "numpy", "matplotlib"]
HEAD = ["Python", "torch", "Triton", "numpy", "tests", "result", "date"]
SUPPORTED = [
    (f"3.{minor}", torch) for torch in ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15") for minor in range(10, 15)
]
VERSIONS = (
    "import sys, torch, numpy, importlib.metadata as m\n"
    "triton = next((d.version for d in m.distributions() if d.metadata['Name'].lower() == 'triton'), 'none')\n"
    "print('.'.join(map(str, sys.version_info[:2])), torch.__version__, triton, numpy.__version__)"
)


def environment(python: Path, torch: str, folder: Path) -> Path:
    """A virtual environment with that torch, made if it is not there."""
    place = folder / f"{python.parents[1].name}-torch{torch}"
    if not (place / "ready").exists():
        subprocess.run([python, "-m", "venv", place], check=True)
        subprocess.run([place / "bin/python", "-m", "pip", "install", "-q", f"torch=={torch}", *PACKAGES], check=True)
        (place / "ready").touch()
    return place / "bin/python"


def run(python: Path, tests: list[str], timeout: int) -> list[str]:
    """A row of the table."""
    today = datetime.date.today().isoformat()
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    command = [
        python,
        "-m",
        "pytest",
        "-o",
        "addopts=--import-mode=importlib",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    try:
        process = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return [*versions, " ".join(tests), f"not finished after {timeout} s", today]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", process.stdout, re.M)
    print("\n".join(process.stdout.splitlines()[-40:]))
    summary = r"^[=\s]*((?:\d+ (?:passed|failed|skipped|errors?|deselected|warnings?)(?:, )?)+) in"
    counts = re.findall(summary, process.stdout, re.M)
    result = counts[-1] if counts else f"exit code {process.returncode}"
    return [*versions, " ".join(tests), result + "".join(f"; {name}" for name in failed[:5]), today]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", type=Path)
    parser.add_argument("--torch", nargs="*", default=[])
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="what pytest runs (default: the CPU tests)")
    parser.add_argument("--timeout", type=int, default=7200, help="seconds for one combination")
    options = parser.parse_args()
    pythons = [environment(python, torch, options.folder) for python in options.pythons for torch in options.torch]
    ran_now = [run(python, options.tests, options.timeout) for python in pythons or options.pythons]
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    rows = {tuple(row[:5]): row for row in known.get("matrix", [HEAD])[1:] if row[5] != "not run"}
    rows |= {tuple(row[:5]): row for row in ran_now}
    ran = {(row[0], ".".join(row[1].split(".")[:2])) for row in rows.values()}
    left = [[python, torch, "", "", "", "not run", ""] for python, torch in SUPPORTED if (python, torch) not in ran]
    known["matrix"] = [HEAD, *sorted(rows.values()), *left]
    FIGURES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
