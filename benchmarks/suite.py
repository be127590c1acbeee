"""What the ``bench_*`` files share: their command line, the dry run, the loop over cases, and the JSON of results."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lowrank_ops as lro
from lowrank_ops.ops._backend import Device, explain

from .measure import Ceilings, Clock, ceilings, environment
from .rows import Case, Row, floor_us, measure_case, told
from .targets import graded

RESULTS = Path(__file__).parent / "results"
TABLES = Path(lro.__file__).parent / "ops" / "tuned"  # of configurations, as shipped
META = torch.device("meta")
# Under which rows may stand side by side.
CONDITIONS = ("device", "commit", "torch", "triton", "threads", "clock", "tables")
# Of the tables by which a suite's arms may go, where those are not all; their names begin so.
TABLES_OF = {"covariance": ("covariance_update.", "conv_covariance_update."), "lowrank_linear": ("lowrank_linear.",)}
UNFINISHED = 3  # exit code
EVERY_ARM = "every arm"  # of a case that failed as a whole, such as for want of memory for its inputs
LOST = "the process ended while it was measured"
# The dry run plans for one H200 unless told otherwise; what is stated there has to be measured in every real run.
H200 = Device("cuda", 0, (9, 0), 132, 232448)
STATED = Ceilings(4.3e12, {"bfloat16": 790e12, "float16": 790e12})


class Job(NamedTuple):
    """Something to measure that is no :class:`Case`: it checks and times its arms itself."""

    op: str
    shape: Mapping[str, int | str]
    arms: Sequence[str]
    measure: Callable[[], list[Row]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every suite takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--dry-run", action="store_true", help="print rows, plans and floors; measure nothing")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--seconds", type=float, default=1.0, help="of timing per case (default 1)")
    arguments.add_argument("--only", default="", help="run the cases whose label contains this text")
    arguments.add_argument("--graded", action="store_true", help="run the cases that a target speaks of (see grade)")
    arguments.add_argument("--out", type=Path, help="JSON file that gets the suite's rows; others' rows in it stay")
    arguments.add_argument(
        "--resume", action="store_true", help="go on from this suite's rows in --out, then ask again, once, what failed"
    )
    arguments.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no case is begun; exit code 3 then"
    )
    arguments.add_argument("--commit", help="what is measured, where there is no git to ask")
    return arguments


def run(
    name: str,
    cases: Iterable[Case],
    arguments: argparse.Namespace,
    clock: Clock = time.perf_counter,
    jobs: Iterable[Job] = (),
) -> dict[str, Any] | None:
    """Measure ``cases`` and ``jobs``, or print what would be measured.

    ``--resume`` keeps rows that are complete, wrong ones included, measures what has none, and then asks again, once,
    every case in which an arm failed by an exception; all its arms, as speed-ups are of times that were taken in turn.
    Where the budget ends before, the next call goes on behind the last that was asked, so that calls with a budget
    come to an end however much fails each time. A case that fails as a whole, or takes the process along, has one row
    that says so in place of its arms', and is asked again like the others. Where the device takes no more work, the
    rest is left over as if the budget had ended.

    Returns:
        The suite, for :func:`finish`; None after a dry run.
    """
    chosen = [case for case in cases if _asked_for(case, arguments)]
    others = [job for job in jobs if _asked_for(job, arguments)]
    if arguments.dry_run:
        planned = [line for job in others for line in ("", label(job), *(f"  {arm}: would run" for arm in job.arms))]
        print("\n".join([*dry_run(chosen), *planned]))
        return None
    end = time.perf_counter() + arguments.budget
    device = torch.device(arguments.device)
    suite = begin(name, arguments, clock)
    print(ceilings_line(suite["ceilings"]))
    limits = Ceilings(suite["ceilings"]["copy_gb_per_s"] * 1e9, _rates(suite["ceilings"]))
    left = _to_ask(suite, [*others, *chosen])  # jobs are few, and would be what a budget never comes to
    while left and time.perf_counter() < end:
        case = left.pop(0)
        suite["left"] = [label(one) for one in left]
        before = rows_of(suite, case)
        if arguments.out:  # as it has to stand there if this case takes the process along
            lost = [] if before else [_failed_as_a_whole(case, LOST).to_dict()]
            save(arguments.out, name, {**suite, "rows": [*lost, *suite["rows"]]})
        not_run: dict[str, str] = {}
        try:
            if isinstance(case, Job):
                rows = case.measure()
            else:
                rows, not_run = measure_case(case, device, limits, arguments.seconds, clock)
        except Exception as failure:
            rows = [_failed_as_a_whole(case, told(failure))]
        if rows:
            title = label(case) + (", once more" if before else "")
            print("\n".join(["", title, *(f"  {line(row)}" for row in rows)]), flush=True)
        if _better(rows, before):
            record(suite, rows, not_run)
        if arguments.out:
            save(arguments.out, name, suite)
        if not usable(device):
            break
    suite["left"] = [label(case) for case in left]
    whole = not arguments.only and not arguments.graded
    suite["complete"] = whole and all(rows_of(suite, case) for case in left)
    return suite


def _asked_for(case: Case | Job, arguments: argparse.Namespace) -> bool:
    return arguments.only in label(case) and (not arguments.graded or graded(case.op, case.shape))


def _to_ask(suite: dict[str, Any], chosen: Sequence[Case | Job]) -> list[Case | Job]:
    """What has no rows, then what failed; of that only what the call before left over, where it left some."""
    missing = [case for case in chosen if not rows_of(suite, case)]
    failed = [case for case in chosen if _failed(rows_of(suite, case))]
    left_over = [case for case in failed if label(case) in suite.get("left", ())]
    return [*missing, *(left_over or failed)]


def _failed(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an exception kept a case from being measured. A wrong result beside it stays what was found."""
    return any(row["failure"] for row in rows) and not any(map(_wrong, rows))


def _wrong(row: Mapping[str, Any]) -> bool:
    """Whether a row's result was there, and was not right; it may have failed after that."""
    return not row["correct"] and (not row["failure"] or (row["error"] is not None and row["error"] > row["allowed"]))


def _better(rows: Sequence[Row], before: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows may take the place of those of the same case: not with less that was measured, or told of."""
    new = [row.to_dict() for row in rows]
    worth, earlier = ([sum(not row["failure"] for row in those), len(those)] for those in (new, before))
    return worth >= earlier or any(map(_wrong, new))


def _failed_as_a_whole(case: Case | Job, failure: str) -> Row:
    return Row(case.op, dict(case.shape), EVERY_ARM, failure=failure)


def begin(name: str, arguments: argparse.Namespace, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """The suite to add rows to: with ``--resume`` the file's, where it was measured under like conditions."""
    device = torch.device(arguments.device)
    if not (arguments.resume and arguments.out and arguments.out.exists()):
        return start(device, clock, arguments.commit, name)
    kept = load(arguments.out)["suites"].get(name)
    if kept is None:
        return start(device, clock, arguments.commit, name)
    facts = _facts(device, clock, arguments.commit, name)
    changed = [key for key in CONDITIONS if facts.get(key) != kept["environment"].get(key)]
    if changed:
        print(f"{arguments.out}: {', '.join(changed)} changed since its rows of {name} were measured: starting anew")
        return start(device, clock, arguments.commit, name)
    kept["environment"].setdefault("resumed", []).append(facts["date"])
    return kept  # type: ignore[no-any-return]


def rows_of(suite: dict[str, Any], case: Case | Job) -> list[dict[str, Any]]:
    """The rows that a suite has of a case."""
    return [row for row in suite["rows"] if row["op"] == case.op and row["shape"] == dict(case.shape)]


def start(
    device: torch.device, clock: Clock = time.perf_counter, commit: str | None = None, name: str = ""
) -> dict[str, Any]:
    """An empty suite with the machine's facts and ceilings, measured now."""
    facts = _facts(device, clock, commit, name)
    limits = ceilings(device, clock=clock)
    return {
        "environment": facts,
        "ceilings": {
            "copy_gb_per_s": round(limits.copy / 1e9, 1),
            "matmul_tflop_per_s": {dtype: round(rate / 1e12, 4) for dtype, rate in limits.matmul.items()},
        },
        "complete": False,
        "rows": [],
        "not_run": {},
    }


def _facts(device: torch.device, clock: Clock, commit: str | None, name: str) -> dict[str, Any]:
    tables = {
        path.stem: hashlib.sha256(json.dumps(_choices(path)).encode()).hexdigest()[:12]
        for path in sorted(TABLES.glob("*.json"))
        if path.name.startswith(TABLES_OF.get(name, ""))
    }
    return environment(device, commit) | {"clock": clock.__name__, "tables": tables or None}


def _choices(table: Path) -> list[Any]:
    """What a table says, without when it was written: the tuner writes it anew whenever it is asked."""
    return [[entry.get(key) for key in ("shape", "impl", "config")] for entry in load(table)["entries"]]


def record(suite: dict[str, Any], rows: Sequence[Row], not_run: dict[str, str]) -> None:
    """Add rows, in place of those of the same cases, wrong ones before all others."""
    new = [row.to_dict() for row in rows]
    cases = [(row["op"], row["shape"]) for row in new]
    kept = [row for row in suite["rows"] if (row["op"], row["shape"]) not in cases]
    suite["rows"] = sorted(kept + new, key=lambda row: row["correct"])
    suite["not_run"].update(not_run)


def finish(suite: dict[str, Any], name: str, out: Path | None) -> int:
    """Say what was not run and what is wrong, and write the suite.

    Returns:
        The exit code: 3 where cases are left over, else 1 where a result of lowrank_ops, or a whole case, is wrong or
        failed.
    """
    suite["environment"]["load_at_end"] = round(os.getloadavg()[0], 2)
    for arm, reason in suite["not_run"].items():
        print(f"not run: {arm}: {reason}")
    wrong = [row for row in suite["rows"] if not row["correct"]]
    for row in wrong:
        print(f"{row['op']} {row['shape']} {row['arm']}: {trouble(row)}", file=sys.stderr)
    if out:
        save(out, name, suite)
    if suite.get("left"):
        print(f"{len(suite['left'])} cases are left, first {suite['left'][0]}; --resume goes on with them")
        return UNFINISHED
    return int(any(row["arm"].startswith(("lowrank_ops", EVERY_ARM)) for row in wrong))


def usable(device: torch.device) -> bool:
    """Whether the process can go on: after an access where there is nothing, a GPU refuses it all that follows."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the device takes no more work from this process, which ends here: {told(error)}", file=sys.stderr)
            return False
    return True


def save(path: Path, name: str, suite: dict[str, Any]) -> None:
    """Write one suite into a file of results, beside the other suites in it."""
    document = load(path) if path.exists() else {"suites": {}}
    document["suites"][name] = suite
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(document, indent=1, default=_plain) + "\n")
    partial.replace(path)


def load(path: Path) -> dict[str, Any]:
    """A file of results."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _plain(value: object) -> object:
    raise TypeError(f"{type(value).__name__} has no place in a file of results.")


def _rates(stated: dict[str, Any]) -> dict[str, float]:
    return {dtype: rate * 1e12 for dtype, rate in stated["matmul_tflop_per_s"].items()}


def label(case: Case | Job) -> str:
    """One line that names a case."""
    return f"{case.op} " + " ".join(f"{key}={value}" for key, value in case.shape.items())


def ceilings_line(limits: dict[str, Any]) -> str:
    rates = ", ".join(f"{rate:.4g} TFLOP/s {dtype}" for dtype, rate in limits["matmul_tflop_per_s"].items())
    return f"measured ceilings: copy {limits['copy_gb_per_s']:.4g} GB/s; matmul {rates}"


def line(row: Row) -> str:
    """One row for people; a wrong one shows no speed-up."""
    name = row.arm + (f" ({row.implementation})" if row.implementation else "")
    if not row.correct:
        return f"{name:44} {trouble(row.to_dict())}"
    ratios = "  ".join(f"{factor:.2f}x {other}" for other, factor in row.speedup.items())
    reached = f"{row.achieved:8.4g} {row.unit}  {row.fraction_of_floor:4.0%} of floor" if row.fraction_of_floor else ""
    times = f"{row.median_us:10.1f} us  p90 {row.p90_us:10.1f}  eager {row.eager_us:10.1f}"
    return f"{name:44} {times}  {reached}  {ratios}"


def trouble(row: Mapping[str, Any]) -> str:
    """What is the matter with a row that is not right."""
    if row["failure"]:
        return f"FAILED: {row['failure']}"
    if row["error"] is None:  # found wrong without a distance, such as for not being finite
        return "WRONG"
    return f"WRONG: error {row['error']:.3g}, allowed {row['allowed']:.3g}"


def dry_run(cases: Iterable[Case], device: Device = H200, limits: Ceilings = STATED) -> list[str]:
    """What a run on ``device`` would measure: every row, the implementation that ours would take, and the floor.

    Nothing is allocated and nothing is timed.
    """
    rates = ", ".join(f"{rate / 1e12:.4g} TFLOP/s {dtype}" for dtype, rate in limits.matmul.items())
    lines = [
        f"Planned for compute capability {device.capability[0]}.{device.capability[1]} with {device.sm_count} "
        f"multiprocessors; floors from stated ceilings: copy {limits.copy / 1e9:.4g} GB/s, matmul {rates}."
    ]
    for case in cases:
        tensors = case.make(META, 0)
        floor, unit = floor_us(case, limits)
        lines += ["", f"{label(case)}: floor {floor:.1f} us, bound by {unit}"]
        table, problem = case.pose(tensors) if case.pose else ((), None)
        for arm in case.arms:
            if arm.backend is None or problem is None:
                reason = arm.unavailable(torch.device("cuda"))
                lines.append(f"  {arm.name}: {'would run' if reason is None else reason}")
            else:
                assumed = problem._replace(device=device)  # type: ignore[attr-defined]
                lines += [f"  {arm.name}:", *(f"    {entry}" for entry in _plan(table, assumed, arm.backend))]
    return lines


def _plan(table: Sequence[Any], problem: Any, backend: str) -> list[str]:
    """The plan of one backend; a table has rows for all of them."""
    wanted = tuple(impl for impl in table if backend in ("auto", impl.backend.value))
    return explain(wanted, problem, backend).splitlines() or [f"no {backend} implementation in this installation"]


def main(name: str, make_cases: Callable[[str], Iterable[Case]], description: str | None, default: str) -> int:
    """The command line of a suite whose cases depend on nothing but the dtypes asked for."""
    arguments = parser(description)
    arguments.add_argument("--dtypes", default=default, help=f"of the inputs, separated by commas (default {default})")
    parsed = arguments.parse_args()
    suite = run(name, [case for dtype in parsed.dtypes.split(",") for case in make_cases(dtype)], parsed)
    return 0 if suite is None else finish(suite, name, parsed.out)
