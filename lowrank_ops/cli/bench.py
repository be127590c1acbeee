"""``lowrank-ops bench`` and ``lowrank-ops tune``: the ``benchmarks`` package, which only a source checkout has."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..version import __version__
from .command import Failure, add_command

SUITES = ("covariance", "lowrank_linear", "model", "cpu")

_BENCH = """\
Measure lowrank_ops beside what one would use instead, each result checked before it is timed. SUITE is one of
covariance, lowrank_linear and model, which are for a GPU, and cpu. Needs a source checkout of lowrank_ops.
What follows SUITE goes to it as it is; lowrank-ops bench SUITE --help lists what it takes."""

_BENCH_EXAMPLE = """\
examples:
  lowrank-ops bench cpu --out cpu.json
  what a GPU would be asked, without one
    lowrank-ops bench lowrank_linear --dry-run"""

_TUNE = """\
Search the fastest configurations of the kernels on this GPU and write them to the tables that ship with the package.
Needs a source checkout of lowrank_ops. The arguments go to python -m benchmarks.tune as they are."""

_TUNE_EXAMPLE = """\
examples:
  lowrank-ops tune --op lowrank_linear --budget 1800
  what would be searched, without a GPU
    lowrank-ops tune --dry-run"""


def add(commands: Any) -> None:
    """Declare both commands."""
    bench = add_command(
        commands, "bench", "measure speed beside the alternatives", _BENCH, _BENCH_EXAMPLE, run_bench, passes_on=True
    )
    bench.add_argument("suite", metavar="SUITE", nargs="?", choices=SUITES, help=f"one of {', '.join(SUITES)}")
    bench.set_defaults(own_help=bench.format_help)
    tune = add_command(
        commands, "tune", "find the fastest kernel configurations", _TUNE, _TUNE_EXAMPLE, run_tune, passes_on=True
    )
    tune.set_defaults(own_help=tune.format_help)


def run_bench(options: argparse.Namespace) -> int:
    """Run one suite; gives its exit code."""
    if options.suite is None:
        if set(options.rest) & {"-h", "--help"}:
            print(options.own_help())
            return 0
        raise Failure(2, f"bench needs a SUITE, one of {', '.join(SUITES)} (see lowrank-ops bench --help)")
    return _run(f"benchmarks.bench_{options.suite}", options.rest)


def run_tune(options: argparse.Namespace) -> int:
    """Run the tuner; gives its exit code."""
    if set(options.rest) & {"-h", "--help"}:
        print(options.own_help())
        if _checkout() is None:
            return 0
    return _run("benchmarks.tune", options.rest)


def _run(module: str, arguments: list[str]) -> int:
    root = _checkout()
    if root is None:
        raise Failure(
            2, "the benchmarks are not part of the installed package; get the sources of lowrank_ops "
            f"{__version__}, and run this command in their folder (or python -m {module})",
        )  # fmt: skip
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode


def _checkout() -> Path | None:
    """The folder that holds our ``benchmarks``: the working directory, or where this package lies."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / "benchmarks" / "suite.py").is_file() and (folder / "lowrank_ops").is_dir():
            return folder
    return None
