"""The command line and the results file of the ``bench_*`` suites.

``--out`` names a JSON file that gets every row as it is measured; ``--resume`` skips cases that have rows there. A
variant that ends its process, or breaks the device for it, is left out when the suite resumes; a case that ends its
process in another way keeps one row that says so. Exit codes: 0, 1 where a result of lowrank_ops is wrong or failed, 3
where ``--budget`` ended, or the device failed, before the last case.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import lowrank_ops as lro

from .harness import META, Case, Clock, Peak, Row, described, measure_case, measure_peak, roofline

UNFINISHED = 3  # exit code
ENDED = "the process ended while this was measured"
WHOLE_CASE = "every variant"
ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
TABLES = Path(lro.__file__).parent / "ops" / "tuned"
CONDITIONS = ("device", "commit", "torch", "triton", "threads", "clock", "tables")  # equal for all rows of a suite
STATED = Peak(4.3e12, {"bfloat16": 790e12, "float16": 790e12})  # of an H200, for the dry run; real runs measure


class DeviceLostError(BaseException):
    """The device accepts no more work from this process."""


class Attempts:
    """Records in a file what runs for the first time, so that the next process leaves out what ended this one."""

    def __init__(self, path: Path, ended: list[str], device: torch.device) -> None:
        """``ended`` gets what the previous process did not survive; ``resumed`` says whether there was one."""
        self.path, self.ended, self.device = path, ended, device
        self.resumed = path.exists()
        if self.resumed:
            ended.append(path.read_text())
            path.unlink()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(name)
        try:
            yield
        except Exception as failure:
            if not isinstance(failure, lro.ops.BackendUnavailableError) and not usable(self.device):
                raise DeviceLostError(described(failure)) from failure
            self.path.unlink()
            raise
        self.path.unlink()


def main(
    name: str,
    description: str | None,
    make_cases: Callable[[str, bool], Iterable[Case]],
    dtypes: str,
    argv: Sequence[str] | None = None,
    seconds: float = 1.0,
    device: str | None = None,
    clock: Clock = time.perf_counter,
) -> int:
    """Run one suite.

    Args:
        name: of the suite in the results file.
        make_cases: gives the cases of a dtype, all or the representative ones.
        dtypes: of the inputs, separated by commas, unless others are asked for; so ``seconds`` and ``device``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print cases, variants and rooflines; measure nothing")
    parser.add_argument("--quick", action="store_true", help="representative shapes, a quarter of the time for each")
    parser.add_argument("--only", default="", help="cases whose description contains this text")
    parser.add_argument("--dtypes", default=dtypes, help="bf16, fp16, fp32, separated by commas (default %(default)s)")
    parser.add_argument("--device", default=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--seconds", type=float, default=seconds, help="of timing per case (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file that gets the rows; other suites in it stay")
    parser.add_argument("--resume", action="store_true", help="skip the cases that have rows in --out")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no case is begun")
    parser.add_argument("--commit", help="what is measured, where git is not there to ask")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.seconds /= 4
    cases = [case for dtype in arguments.dtypes.split(",") for case in make_cases(dtype, arguments.quick)]
    cases = [case for case in cases if arguments.only in str(case)]
    if arguments.dry_run:
        print("\n".join(dry_run(cases)))
        return 0
    return run(name, cases, arguments, clock)


def dry_run(cases: Iterable[Case], peak: Peak = STATED) -> list[str]:
    """What would be measured on a GPU; nothing is allocated."""
    rates = ", ".join(f"{rate / 1e12:.4g} TFLOP/s {dtype}" for dtype, rate in peak.matmul.items())
    lines = [f"rooflines from stated peaks: copy {peak.copy / 1e9:.4g} GB/s, matmul {rates}"]
    for case in cases:
        case.make(META, 0)
        limit, unit = roofline(case, peak)
        lines += ["", f"{case}" + (f": roofline {limit:.1f} us, bound by {unit}" if limit else "")]
        for variant in case.variants:
            lines.append(f"  {variant.name}: {variant.unavailable(torch.device('cuda')) or 'would run'}")
    return lines


def run(name: str, cases: Sequence[Case], arguments: argparse.Namespace, clock: Clock) -> int:
    """Measure the cases that have no rows yet, keeping each in ``--out``; gives the exit code."""
    end = time.perf_counter() + arguments.budget
    device = torch.device(arguments.device)
    suite = begin(name, arguments, device, clock)
    stated = suite["peak"]
    peak = Peak(stated["copy_gb_per_s"] * 1e9, {key: rate * 1e12 for key, rate in stated["matmul_tflop_per_s"].items()})
    print(f"measured peaks: {stated}")

    def keep(rows: Sequence[Row]) -> None:
        if arguments.out:
            document = load(arguments.out) if arguments.out.exists() else {"suites": {}}
            listed = sorted([*map(asdict, rows), *suite["rows"]], key=lambda row: row["correct"])
            document["suites"][name] = {**suite, "rows": listed}
            write(arguments.out, document)

    def left() -> list[Case]:
        had = [(row["op"], row["shape"]) for row in suite["rows"]]
        return [case for case in cases if (case.op, case.shape) not in had]

    attempt: Callable[[str], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    ended: list[str] = suite.setdefault("ended", [])
    if arguments.out:
        path = arguments.out.with_suffix(f".{name}.attempt")
        if not arguments.resume:
            path.unlink(missing_ok=True)
        attempt = attempts = Attempts(path, ended, device)
        if attempts.resumed:
            suite["rows"] = [row for row in suite["rows"] if row["failure"] != ENDED]
    for case in left():
        if time.perf_counter() > end:
            break
        keep([_failed(case, ENDED)])
        try:
            whole = replace(case, variants=tuple(one for one in case.variants if one.name not in ended))
            rows, not_run = measure_case(whole, device, peak, arguments.seconds, clock, attempt)
        except DeviceLostError as failure:
            print(f"{case}: {failure}", file=sys.stderr)
            break
        except Exception as failure:  # such as for want of memory for the inputs
            rows, not_run = [_failed(case, described(failure))], {}
        print("\n".join(["", str(case), *(f"  {row}" for row in rows)]), flush=True)
        suite["rows"] += map(asdict, rows)
        suite["not_run"] |= not_run
        if not usable(device):
            break
    suite["not_run"] |= dict.fromkeys(ended, ENDED)
    suite["complete"] = not (left() or arguments.only or arguments.quick)
    suite["environment"]["load_at_end"] = round(os.getloadavg()[0], 2)
    keep([])
    for variant, reason in suite["not_run"].items():
        print(f"not run: {variant}: {reason}")
    wrong = [Row(**row) for row in suite["rows"] if not row["correct"]]
    for row in wrong:
        print(f"{row.op} {row.shape} {row.variant}: {row.trouble()}", file=sys.stderr)
    if left():
        print(f"{len(left())} cases are left, first {left()[0]}; --resume measures them")
        return UNFINISHED
    failed = [*ended, *(row.variant for row in wrong)]
    return int(any(variant.startswith(("lowrank_ops", WHOLE_CASE)) for variant in failed))


def _failed(case: Case, failure: str) -> Row:
    return Row(case.op, dict(case.shape), WHOLE_CASE, failure=failure)


def begin(name: str, arguments: argparse.Namespace, device: torch.device, clock: Clock) -> dict[str, Any]:
    """The suite to add rows to: of ``--out`` with ``--resume``, where it was measured under equal conditions."""
    facts = environment(device, arguments.commit) | {"clock": clock.__name__}
    if arguments.resume and arguments.out and arguments.out.exists():
        kept: dict[str, Any] | None = load(arguments.out)["suites"].get(name)
        changed = [key for key in CONDITIONS if kept and facts.get(key) != kept["environment"].get(key)]
        if kept and not changed:
            return kept
        if kept:
            print(f"{arguments.out}: {', '.join(changed)} changed since {name} was measured: starting again")
    peak = measure_peak(device, clock)
    rates = {dtype: round(rate / 1e12, 4) for dtype, rate in peak.matmul.items()}
    measured = {"copy_gb_per_s": round(peak.copy / 1e9, 1), "matmul_tflop_per_s": rates}
    return {"environment": facts, "peak": measured, "complete": False, "rows": [], "not_run": {}}


def usable(device: torch.device) -> bool:
    """Whether the process can continue: after an illegal access, all further GPU calls of it fail."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the device takes no more work from this process: {described(error)}", file=sys.stderr)
            return False
    return True


def load(path: Path) -> dict[str, Any]:
    """A results file."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def write(path: Path, document: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What a figure depends on besides the code: machine, versions, commit, date, load and tuned tables."""
    gpu = device.type == "cuda"
    tables = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in sorted(TABLES.glob("*.json"))}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or _commit(),
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "tables": tables or None,
    }


def _commit() -> str:
    """Of the checkout, with "+changes" where tracked files differ from it."""
    status = ["git", "status", "--porcelain", "-uno", "--", ".", ":(exclude)benchmarks/results"]
    try:
        commit, changes = (
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
            for command in (["git", "rev-parse", "--short=12", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
