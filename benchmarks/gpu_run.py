"""Everything that needs a GPU, in calls of ten minutes: ``python -m benchmarks.gpu_run FOLDER [--quick] [PART ...]``.

Parts, in this order: the GPU tests of a wheel, the tuner, and the suites with the tables that it chose. Call it again
with the same FOLDER as long as the exit code is 3: parts that ended are skipped, and the tuner and the suites resume,
without a kernel that ended their process, broke the device for it or hung. ``--quick`` measures representative shapes,
for a GPU that is there for minutes. A FOLDER is for one GPU.

Exit codes: 0 if every part passed, 1 if one failed (see FOLDER/PART.log), 2 without a GPU, 3 if there is more to do.
FOLDER/ended.json holds the exit codes of the parts; to run one again, delete it there.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .suite import ROOT, TABLES, UNFINISHED, load, write

PARTS = ("tests", "tune", "covariance", "lowrank_linear", "grouped", "model")
MIN_SECONDS = 90.0  # with fewer no part is begun
LAST_CASE = 60.0  # kept for the case that is being measured when the budget ends
TESTS_SHARE = 0.4  # of a quick call
STALLED, STALLED_QUICK = 600.0, 60.0  # after so long without a sign of progress the tuner or a suite hangs
SHOWN = 30  # last lines of a log


def command(part: str, options: argparse.Namespace, seconds: float) -> list[str]:
    """What runs a part, so that it ends within ``seconds``."""
    if part == "tests" and options.wheel:
        return ["bash", "tests/gpu/from_wheel.sh", str(options.wheel), str(int(seconds - 5)), sys.executable]
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu"]
    flags = [*(["--quick"] if options.quick else []), *(["--commit", options.commit] if options.commit else [])]
    if options.dry_run:
        flags.append("--dry-run")
    flags += ["--budget", f"{seconds - LAST_CASE:.0f}"]
    if part == "tune":
        flags += ["--steps", str(options.steps), "--progress", str(options.folder / "tuning")]
        return [sys.executable, "-m", "benchmarks.tune", *flags, "--tables", str(options.folder / "tuned")]
    flags += ["--resume", "--out", str(options.folder / "results.json")]
    return [sys.executable, "-m", f"benchmarks.bench_{part}", *flags]


def run(part: str, options: argparse.Namespace, seconds: float) -> int:
    """Run a part and kill it, with the processes that it started, after ``seconds``; gives its exit code."""
    print(f"== {part}, at most {seconds:.0f} s", flush=True)
    log = options.folder / f"{part}.log"
    start = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen(
            command(part, options, seconds), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        try:
            code = wait(process, log, seconds, stalled(part, options))
        except BaseException as interruption:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(interruption, subprocess.TimeoutExpired):
                raise
            code = UNFINISHED if time.monotonic() - start >= seconds else -signal.SIGKILL
    print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]))
    print(f"== {part} ended with exit code {code} after {time.monotonic() - start:.0f} s", flush=True)
    return code


def stalled(part: str, options: argparse.Namespace) -> float:
    """After how many seconds without a sign of progress a part hangs; the tests have a timeout for each."""
    return math.inf if part == "tests" else STALLED_QUICK if options.quick else STALLED


def wait(process: subprocess.Popen[bytes], log: Path, seconds: float, stalled: float) -> int:
    """The exit code; raises ``TimeoutExpired`` after ``seconds``, or ``stalled`` after the last sign of progress."""
    end, seen, changed = time.monotonic() + seconds, None, 0.0
    while True:
        if (now := (log.stat().st_size, progress(log.parent))) != seen:
            seen, changed = now, time.monotonic()
        left = min(end, changed + stalled) - time.monotonic()
        try:
            return process.wait(max(0.0, min(left, 1.0)))
        except subprocess.TimeoutExpired:
            if left <= 1.0:
                raise


def prepare(part: str, options: argparse.Namespace) -> None:
    """Give the checkout the native library of the wheel, and the suites the tables that the tuner chose."""
    if options.wheel and not (ROOT / "lowrank_ops" / "liblowrank_ops.so").exists():
        with zipfile.ZipFile(options.wheel) as wheel:
            for name in wheel.namelist():
                if name == "lowrank_ops/liblowrank_ops.so":
                    wheel.extract(name, ROOT)
    if part != "tune":
        TABLES.mkdir(exist_ok=True)
        for table in (options.folder / "tuned").glob("*.json"):
            shutil.copy(table, TABLES)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; by default all")
    parser.add_argument("--wheel", type=Path, help="to test, and to take the native library from where it is not built")
    parser.add_argument("--quick", action="store_true", help="representative shapes only")
    parser.add_argument("--seconds", type=float, default=570.0, help="of this call (default %(default)s)")
    parser.add_argument("--steps", type=float, default=0, help="of the tuner's search (default: choose what ships)")
    parser.add_argument("--commit", help="what is measured, where git is not there to ask")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, which needs no GPU")
    options = parser.parse_intermixed_args(argv)  # parts behind options, too
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    options.folder, end = options.folder.resolve(), time.monotonic() + options.seconds
    options.wheel = options.wheel and options.wheel.resolve()
    parts = [part for part in PARTS if part in options.parts or not options.parts]
    if options.dry_run:
        for part in parts:
            line = command(part, options, options.seconds)
            print(f"== {part}: {' '.join(line)}", flush=True)
            if part != "tests":
                subprocess.run(line, cwd=ROOT, check=True)
        return 0
    if not torch.cuda.is_available():
        print("gpu_run: needs a CUDA device; --dry-run shows what would be done.", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what runs is ended as well
    return work(parts, options, end)


def work(parts: Sequence[str], options: argparse.Namespace, end: float) -> int:
    """Run the parts that have not ended, until the clock shows ``end``; gives the exit code."""
    path = options.folder / "ended.json"
    ended: dict[str, int] = load(path) if path.exists() else {}
    keys = {part: f"{part} quick" if options.quick and part != "tests" else part for part in parts}
    for part, key in keys.items():
        while key not in ended and (left := end - time.monotonic()) >= MIN_SECONDS:
            if part != "tests":
                prepare(part, options)
            before = progress(options.folder)
            code = run(part, options, left * TESTS_SHARE if options.quick and part == "tests" else left)
            if part == "tests" or (code >= 0 and code != UNFINISHED):
                ended[key] = code
            elif code < 0 and progress(options.folder) == before:  # a crash before the first case would come again
                ended[key] = 1
            write(path, ended)
    if left_over := [part for part, key in keys.items() if key not in ended]:
        print(f"== more to do: {', '.join(left_over)}; call again with the same folder")
        return UNFINISHED
    failed = [part for part, key in keys.items() if ended[key]]
    print(f"== failed: {', '.join(failed)}" if failed else "== every part passed")
    return int(bool(failed))


def progress(folder: Path) -> list[int]:
    """Changes with every case that is begun, and with everything that runs for the first time."""
    files = sorted(file for pattern in ("results.*", "tuning/*") for file in folder.glob(pattern))
    with contextlib.suppress(FileNotFoundError):  # an attempt that ended just now
        return [file.stat().st_mtime_ns for file in files]
    return []


if __name__ == "__main__":
    sys.exit(main())
