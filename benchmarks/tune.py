"""Find the fastest configurations on this GPU: ``python -m benchmarks.tune [--op OP] [--budget SECONDS]``.

Writes ``lowrank_ops/ops/tuned/<op>.<arch>.json``, by which ``auto`` also chooses between backends. For every shape the
search begins with the configurations that ship, CUDA kernels included, and goes to the best neighbor, one field at a
time, while that gains. What the kernels' own predicates refuse is not launched, and a wrong result is not timed.

Progress is kept after every shape, and the same command resumes, without a kernel that ended the process, or broke the
device for it, when it was first run. The table is written when all shapes are done; not where one has no right
candidate, as the table would choose by the nearest shape there. Exit codes: 0, 1 where a shape failed, 2 without a GPU,
3 where shapes are left. ``make test-compile`` then checks the new configurations.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lowrank_ops as lro
from lowrank_ops.ops._backend import Device, device_facts

from .harness import Case, Timing, copies_to_rotate, described, distance, time_variants, truth, within
from .suite import (
    ENDED,
    RESULTS,
    TABLES,
    UNFINISHED,
    Attempts,
    DeviceLostError,
    environment,
    load,
    usable,
    write,
)
from .tuners import H200, TUNERS, Candidate, Shape, Tuner, on_device

GAIN = 0.01  # what a change has to gain not to be noise


class Search:
    """The search of one shape."""

    def __init__(
        self,
        tuner: Tuner,
        case: Case,
        device: torch.device,
        attempts: Attempts,
        seconds: float,
        steps: float = math.inf,
    ) -> None:
        """At most ``steps`` changes from the best start, and about ``seconds`` of timing for each."""
        self.tuner, self.case, self.seconds, self.steps = tuner, case, seconds, steps
        self.attempts = attempts
        self.tensors = case.make(device, 0)
        self.problem = tuner.problem(self.tensors, case)
        self.exact, self.tolerance = truth(case, self.tensors)
        copies = copies_to_rotate(self.tensors[: case.rotated])
        self.rotation = [self.tensors, *(case.make(device, seed) for seed in range(1, copies))]
        self.runs: dict[Candidate, Callable[..., Any] | None] = {}
        self.failed: dict[str, str] = {}  # candidate -> why it was not timed

    def fastest(self) -> tuple[Candidate, float, Candidate | None, float | None] | None:
        """The fastest candidate and what would run now, each with its microseconds; None where none is right."""
        starts = self.tuner.starts(self.problem)
        times = self._time(starts, self.seconds)
        if not times:
            return None
        finalists = {min(times, key=times.__getitem__)}
        for impl in {candidate.impl for candidate in times if candidate.config is not None}:
            of_impl = (candidate for candidate in times if candidate.impl == impl)
            finalists.add(self._descend(min(of_impl, key=times.__getitem__)))
        current = next((candidate for candidate in starts if self.runs.get(candidate)), None)
        final = self._time(dict.fromkeys([*([current] if current else []), *finalists]), 2 * self.seconds)
        if not final:
            return None
        best = min(final, key=final.__getitem__)
        if current in final and final[best] > (1 - GAIN) * final[current]:
            best = current
        return best, final[best], current, final.get(current) if current else None

    def _descend(self, best: Candidate) -> Candidate:
        """Go to the best neighbor while that gains, never back to where the search was."""
        visited: set[Candidate] = set()
        while best not in visited and len(visited) < self.steps:
            visited.add(best)
            times = self._time([best, *self.tuner.neighbors(best)], self.seconds)
            fastest = min(times, key=times.__getitem__, default=best)
            if best not in times or times[fastest] >= (1 - GAIN) * times[best]:
                break
            best = fastest
        return best

    def _time(self, candidates: Iterable[Candidate], seconds: float) -> dict[Candidate, float]:
        listed = {str(candidate): candidate for candidate in candidates if self._right(candidate)}
        runs = {name: run for name, candidate in listed.items() if (run := self.runs[candidate])}
        times = {}
        for name, result in (time_variants(runs, self.rotation, seconds) if runs else {}).items():
            if isinstance(result, Timing):
                times[listed[name]] = result.median
            else:
                self.runs[listed[name]], self.failed[name] = None, result
        return times

    def _right(self, candidate: Candidate) -> bool:
        """Whether a candidate is legal, runs and is right; each is tried once."""
        if candidate not in self.runs:
            self.runs[candidate] = None
            reason, kernel = self.tuner.refuse(candidate, self.problem), candidate.kernel()
            if reason is None and kernel in self.attempts.ended:
                reason = ENDED
            if reason is None:
                run = self.tuner.runner(candidate, self.problem)
                try:
                    with self.attempts(kernel):
                        error = distance(self.case.solve(run, self.tensors), self.exact)
                    if within(error, self.tolerance):
                        self.runs[candidate] = run
                    else:
                        reason = f"wrong: error {error:.3g}, tolerance {self.tolerance:.3g}"
                except Exception as failure:  # out of shared memory, or a tile that Triton cannot compile
                    reason = described(failure)
            if reason is not None:
                self.failed[str(candidate)] = reason
        return self.runs[candidate] is not None


def tune(
    tuner: Tuner, shapes: Sequence[tuple[Shape, Case]], device: torch.device, options: argparse.Namespace, end: float
) -> int:
    """Search all shapes that have no outcome yet, until the clock shows ``end``, then write the table."""
    arch = tuner.arch(device_facts(device))
    facts = environment(device, options.commit)
    conditions = {
        "device": facts["device"],
        "triton": facts["triton"],
        "package": lro.__version__,
        "steps": str(options.steps),
        "options": hashlib.sha256(json.dumps(tuner.options).encode()).hexdigest()[:12],
    }
    path = options.progress / f"{tuner.op}.{arch}.json"
    state: dict[str, Any] = {"conditions": conditions, "entries": [], "failed": [], "ended": []}
    if path.exists() and load(path)["conditions"] == conditions:
        state = load(path)
    attempts = Attempts(path.with_suffix(".attempt"), state["ended"], device)
    if attempts.resumed:
        state["failed"] = [entry for entry in state["failed"] if entry["reason"] != ENDED]
        write(path, state)
        print(f"{tuner.op}: {state['ended'][-1]} ended the process and is left out", file=sys.stderr)

    def left() -> list[tuple[Shape, Case]]:
        ended = [entry["shape"] for entry in [*state["entries"], *state["failed"]]]
        return [(shape, case) for shape, case in shapes if shape not in ended]

    for shape, case in left():
        if time.perf_counter() > end:
            break
        write(path, {**state, "failed": [*state["failed"], {"shape": shape, "reason": ENDED}]})
        try:
            search = Search(tuner, case, device, attempts, options.seconds, options.steps)
            found, failed = search.fastest(), search.failed
        except DeviceLostError as failure:
            print(f"{case}: {failure}", file=sys.stderr)
            break
        except Exception as failure:  # such as for want of memory for the inputs
            found, failed = None, {"all": described(failure)}
        for candidate, reason in failed.items():
            if found is None or reason.startswith("wrong"):
                print(f"{case}: {candidate}: {reason}", file=sys.stderr)
        if found is None:
            state["failed"].append({"shape": shape, "reason": "no candidate runs and is right"})
        else:
            best, microseconds, current, before = found
            print(f"{case}: {current} {before or math.nan:.2f} us -> {best} {microseconds:.2f} us", flush=True)
            state["entries"].append({"shape": shape, **best.to_dict(), "us": round(microseconds, 3)})
        write(path, state)
        if not usable(device):
            break
    if left():
        print(f"{tuner.op}: {len(shapes) - len(left())} of {len(shapes)} shapes are done; run again to resume")
        return UNFINISHED
    failed_shapes = [entry for entry in state["failed"] if any(entry["shape"] == shape for shape, _ in shapes)]
    for entry in failed_shapes:
        print(f"{tuner.op}: {entry['shape']}: {entry['reason']}", file=sys.stderr)
    if failed_shapes:
        print(f"{tuner.op}: no table is written; to search these again, delete them from {path}", file=sys.stderr)
        return 1
    print(f"wrote {write_table(tuner.op, arch, facts, state['entries'], options.tables)}; now run make test-compile")
    return 0


def write_table(op: str, arch: str, facts: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], to: Path) -> Path:
    """Write a table as ``lowrank_ops.ops`` reads it, one line per entry."""
    to.mkdir(parents=True, exist_ok=True)
    path = to / f"{op}.{arch}.json"
    head = {"op": op, "arch": arch, **{key: facts[key] for key in ("device", "triton", "commit", "date")}}
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "entries": [\n{lines}\n ]\n}}\n')
    return path


def dry_run(tuner: Tuner, shapes: Sequence[tuple[Shape, Case]], device: Device = H200) -> list[str]:
    """Where each search would begin on ``device``, and how many neighbors are legal; nothing is launched."""
    lines = [f"{tuner.op}, planned for {tuner.arch(device)}: {len(shapes)} shapes"]
    for _, case in shapes:
        problem = on_device(tuner, case, device)
        starts = [start for start in tuner.starts(problem) if tuner.refuse(start, problem) is None]
        around = {near for start in starts for near in tuner.neighbors(start) if tuner.refuse(near, problem) is None}
        first = starts[0] if starts else "nothing that can run"
        lines.append(f"  {case}: {len(starts)} starts, {len(around - set(starts))} neighbors; first {first}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=tuple(TUNERS), help="by default all")
    parser.add_argument("--dry-run", action="store_true", help="print what would be searched; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="representative shapes only, a third of the time for each")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds in all (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing per step (default %(default)s)")
    parser.add_argument(
        "--steps",
        type=float,
        default=math.inf,
        help="of a search; 0 chooses among the starts (default: while it gains)",
    )
    parser.add_argument("--progress", type=Path, default=RESULTS / "tuning", help="folder of what was found so far")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the tables; by default the package's")
    parser.add_argument("--commit", help="what is tuned, where git is not there to ask")
    options = parser.parse_args(argv)
    chosen = [(tuner, tuner.shapes(options.quick)) for op, tuner in TUNERS.items() if options.op in (None, op)]
    if options.dry_run:
        print("\n".join(line for tuner, shapes in chosen for line in dry_run(tuner, shapes)))
        return 0
    if not torch.cuda.is_available():
        print("tune: needs a CUDA device; a table is not written from anything else.", file=sys.stderr)
        return 2
    if options.quick:
        options.seconds /= 3
    end, device, codes = time.perf_counter() + options.budget, torch.device("cuda"), []
    with torch.inference_mode():
        for tuner, shapes in chosen:
            codes.append(tune(tuner, shapes, device, options, end))
            if not usable(device):
                return UNFINISHED
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
