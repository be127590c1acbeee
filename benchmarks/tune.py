"""Find the fastest configurations on this GPU: ``python -m benchmarks.tune [--op OP] [--budget SECONDS]``.

Writes ``lowrank_ops/ops/tuned/<op>.<arch>.json``, by which ``auto`` also chooses between backends. From every
implementation's own choice and all that ship, CUDA kernels included, the search goes to the best neighbour, one field
at a time, while that gains; of the CUDA planner's plans it varies kernel, splits and the prefill's tile of tokens. A
candidate that the kernels' own predicates refuse is not launched, and one whose result is wrong is not timed. Progress
is kept in ``results/tuning`` after every shape; the same command goes on from there, and the table is written once
every shape is done: an incomplete one would speak for shapes it never saw. The compile gate (``make test-compile``)
then holds the new configurations to its rules.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lowrank_ops as lro
from lowrank_ops.ops._backend import Device, device_facts

from .measure import Timing, copies_to_rotate, environment, time_arms
from .rows import Case, distance, told, truth, within
from .suite import H200, META, TABLES, UNFINISHED, usable
from .targets import graded
from .tuners import TUNERS, Candidate, Shape, Tuner

PROGRESS = Path(__file__).parent / "results" / "tuning"
GAIN = 0.01  # a neighbour that is not faster by this much is noise


class Tuned(NamedTuple):
    """The outcome for one shape."""

    entry: dict[str, Any] | None  # for the table; None where no candidate runs and is right
    change: str  # for people
    tried: dict[str, str]  # candidates that did not get timed, and why


def tune_shape(tuner: Tuner, shape: Shape, device: torch.device, seconds: float, steps: float = math.inf) -> Tuned:
    """Search the configurations of one shape, at most ``steps`` away from the best to begin from."""
    case = tuner.case(shape)
    tensors = case.make(device, 0)
    assert case.pose is not None
    _, problem = case.pose(tensors)
    exact, allowed = truth(case, tensors)
    rotation = [tensors, *(case.make(device, seed) for seed in range(1, copies_to_rotate(tensors[: case.read_by_all])))]
    failed: dict[str, str] = {}
    arms: dict[Candidate, Callable[..., Any] | None] = {}

    def usable(candidate: Candidate) -> bool:
        """Whether a candidate is legal, runs and is right; each is asked once."""
        if candidate not in arms:
            arms[candidate] = None
            reason = tuner.refuse(candidate, problem)
            if reason is None:
                reason = _wrong(case, tuner.arm(candidate, problem), tensors, exact, allowed)
            if reason is None:
                arms[candidate] = tuner.arm(candidate, problem)
            else:
                failed[str(candidate)] = reason
        return arms[candidate] is not None

    def timed(candidates: Iterable[Candidate], spend: float) -> dict[Candidate, float]:
        listed = {str(candidate): candidate for candidate in candidates if usable(candidate)}
        runs = {name: arms[candidate] for name, candidate in listed.items()}
        results = time_arms(runs, rotation, spend) if runs else {}  # type: ignore[arg-type]
        for name, result in results.items():
            if isinstance(result, str):
                arms[listed[name]], failed[name] = None, result
        return {listed[name]: result.median for name, result in results.items() if isinstance(result, Timing)}

    starts = tuner.starts(problem)
    times = timed(starts, seconds)
    if not times:
        return Tuned(None, "no candidate runs and is right", failed)
    finalists = {min(times, key=times.__getitem__)}
    for impl in {candidate.impl for candidate in times if candidate.config is not None}:
        best = min((candidate for candidate in times if candidate.impl == impl), key=times.__getitem__)
        finalists.add(_descend(tuner, best, timed, seconds, steps))
    current = next((candidate for candidate in starts if usable(candidate)), None)
    final = timed(dict.fromkeys([*([current] if current else []), *finalists]), 2 * seconds)
    best = min(final, key=final.__getitem__)
    if current in final and final[best] > (1 - GAIN) * final[current]:
        best = current
    return Tuned(
        {"shape": shape, **best.to_dict(), "us": round(final[best], 3)}, _change(shape, current, best, final), failed
    )


def _descend(
    tuner: Tuner, best: Candidate, timed: Callable[..., dict[Candidate, float]], seconds: float, steps: float
) -> Candidate:
    """Go to the best neighbour while that gains, never back: where noise leads in circles, there is nothing to gain."""
    visited: set[Candidate] = set()
    while best not in visited and len(visited) < steps:
        visited.add(best)
        times = timed([best, *tuner.neighbours(best)], seconds)
        fastest = min(times, key=times.__getitem__, default=best)
        if best not in times or times[fastest] >= (1 - GAIN) * times[best]:
            break
        best = fastest
    return best


def _wrong(case: Case, arm: Callable[..., Any], tensors: Any, exact: Any, allowed: float) -> str | None:
    """None, or what is wrong with a candidate's result."""
    try:
        error = distance(case.solve(arm, tensors), exact)
    except Exception as failure:  # out of shared memory, or a tile that Triton cannot compile
        return f"{type(failure).__name__}: {failure}"
    return None if within(error, allowed) else f"wrong: error {error:.3g}, allowed {allowed:.3g}"


def _change(shape: Shape, current: Candidate | None, best: Candidate, times: Mapping[Candidate, float]) -> str:
    name = " ".join(f"{key}={value}" for key, value in shape.items())
    if current is None or current not in times:
        return f"{name}: {best} in {times[best]:.2f} us; what would have run cannot"
    if best == current:
        return f"{name}: stays {best}, {times[best]:.2f} us"
    return f"{name}: {current} -> {best}, {times[current]:.2f} -> {times[best]:.2f} us"


def tune(
    tuner: Tuner,
    device: torch.device,
    budget: float,
    seconds: float,
    progress: Path,
    tables: Path,
    commit: str | None = None,
    steps: float = math.inf,
    shapes: Sequence[Shape] | None = None,
) -> int:
    """Tune every shape that ``progress`` does not have yet; write the table when none is left.

    ``shapes``, where given, stand for all of the tuner's. A table without a dtype leaves it to the kernels' own choice.

    A shape for which no candidate runs and is right leaves the table unwritten, which would speak for it by the nearest
    that it has. It is not searched again where all were wrong. Shapes that were begun before, and took their process
    along, or the device, come last.

    Returns:
        The exit code: 0 where the table is written, 3 where shapes are left to search, 1 where some cannot be served.
    """
    facts = environment(device, commit)
    arch = tuner.arch(device_facts(device))
    conditions = {
        "device": facts["device"],
        "triton": facts["triton"],
        "package": lro.__version__,
        "steps": str(steps),
        "options": hashlib.sha256(json.dumps(tuner.options).encode()).hexdigest()[:12],  # what a search may go through
    }
    kept = progress / f"{tuner.op}.{arch}.json"
    done, hopeless, asked = _load_progress(kept, conditions)
    wanted = tuner.shapes() if shapes is None else shapes
    failed = [shape for shape in hopeless if shape in wanted]

    def left() -> list[Shape]:
        tried = [*(entry["shape"] for entry in done), *failed]
        return [shape for shape in wanted if shape not in tried]

    def save() -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")  # a kill in the middle of writing must not cost what is there
        state = {"conditions": conditions, "entries": done, "hopeless": hopeless, "asked": asked}
        partial.write_text(json.dumps(state, indent=1) + "\n")
        partial.replace(kept)

    end = time.perf_counter() + budget
    for shape in sorted(left(), key=lambda shape: asked.index(shape) if shape in asked else -1):
        if time.perf_counter() > end:
            break
        asked = [*(other for other in asked if other != shape), shape]
        save()  # should this shape take the process along, those behind it come first in the next
        try:
            tuned = tune_shape(tuner, shape, device, seconds, steps)
        except Exception as failure:  # such as for want of memory for the inputs
            tuned = Tuned(None, "no candidate was tried", {"all": told(failure)})
        wrong = {candidate: reason for candidate, reason in tuned.tried.items() if reason.startswith("wrong")}
        if tuned.entry is None:
            print(f"{shape}: {tuned.change}: {tuned.tried}", file=sys.stderr)
            failed.append(shape)
            if wrong == tuned.tried:  # an exception may pass: the next run asks again
                hopeless.append(shape)
        else:
            print(tuned.change, flush=True)
            for candidate, reason in wrong.items():
                print(f"  {candidate}: {reason}", file=sys.stderr)
            done.append(tuned.entry)
        save()
        if not usable(device):
            failed += [other for other in left() if other in asked]  # or two such shapes would take turns for ever
            break
    if missing := left():
        print(f"{tuner.op}: {len(wanted) - len(missing)} of {len(wanted)} shapes are done; run again to go on")
        return UNFINISHED
    if failed:
        print(
            f"{tuner.op}: no table is written, as no candidate runs and is right for {len(failed)} shapes, first "
            f"{failed[0]}; mend the kernels and delete {kept} to search anew",
            file=sys.stderr,
        )
        return 1
    print(f"wrote {write_table(tuner.op, arch, facts, done, tables)}; now run make test-compile")
    return 0


def shapes_of(tuner: Tuner, only_graded: bool) -> list[Shape]:
    """A tuner's shapes, or those among them that a target speaks of."""
    cases = ((shape, tuner.case(shape)) for shape in tuner.shapes())
    return [shape for shape, case in cases if not only_graded or graded(case.op, case.shape)]


def dry_run(tuner: Tuner, device: Device = H200, only_graded: bool = False) -> list[str]:
    """The shapes of a search on ``device``, where each would begin, and how many neighbours the kernels accept.

    Nothing is allocated, launched or timed.
    """
    shapes = shapes_of(tuner, only_graded)
    lines = [f"{tuner.op}, planned for {tuner.arch(device)}: {len(shapes)} shapes"]
    for shape in shapes:
        case = tuner.case(shape)
        assert case.pose is not None
        _, problem = case.pose(case.make(META, 0))
        assumed = problem._replace(device=device)  # type: ignore[attr-defined]
        starts = [start for start in tuner.starts(assumed) if tuner.refuse(start, assumed) is None]
        around = {near for start in starts for near in tuner.neighbours(start) if tuner.refuse(near, assumed) is None}
        name = " ".join(f"{key}={value}" for key, value in shape.items())
        first = starts[0] if starts else "nothing that can run"
        lines.append(f"  {name}: {len(starts)} starts, {len(around - set(starts))} neighbours; first {first}")
    return lines


def _load_progress(path: Path, conditions: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Shape], list[Shape]]:
    """The table's entries so far, the shapes that no candidate serves, and those that were begun, the last one last."""
    if not path.exists():
        return [], [], []
    kept = json.loads(path.read_text())
    if kept["conditions"] != conditions:
        print(f"{path} was made under {kept['conditions']}, now {dict(conditions)}: starting anew")
        return [], [], []
    return kept["entries"], kept.get("hopeless", []), kept.get("asked", [])


def write_table(op: str, arch: str, facts: Mapping[str, Any], entries: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write a table as ``lowrank_ops.ops._tuning`` reads it, one line per entry."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{op}.{arch}.json"
    head = {"op": op, "arch": arch, **{key: facts[key] for key in ("device", "triton", "commit", "date")}}
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "entries": [\n{lines}\n ]\n}}\n')
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 2 where there is no GPU, else the largest exit code of :func:`tune`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=tuple(TUNERS), help="by default all")
    parser.add_argument("--dry-run", action="store_true", help="print what would be searched; needs no GPU")
    parser.add_argument("--graded", action="store_true", help="only shapes that a target speaks of (see grade)")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds in all (default 3600)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing per step of the search (default 0.5)")
    parser.add_argument(
        "--progress", type=Path, default=PROGRESS, help="folder in which the search keeps what it found"
    )
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the tables; by default the package's")
    parser.add_argument("--commit", help="what is tuned, where there is no git to ask")
    parser.add_argument(
        "--steps", type=float, default=math.inf, help="of a search; 0 chooses from what ships (default: while it gains)"
    )
    arguments = parser.parse_args(argv)
    chosen = [TUNERS[op] for op in ([arguments.op] if arguments.op else TUNERS)]
    if arguments.dry_run:
        print("\n".join(line for tuner in chosen for line in dry_run(tuner, only_graded=arguments.graded)))
        return 0
    if not torch.cuda.is_available():
        print("tune: needs a CUDA device; a table is not written from anything else.", file=sys.stderr)
        return 2
    end = time.perf_counter() + arguments.budget
    device = torch.device("cuda")
    step = functools.partial(
        tune,
        device=device,
        seconds=arguments.seconds,
        progress=arguments.progress,
        tables=arguments.tables,
        commit=arguments.commit,
        steps=arguments.steps,
    )
    wanted = [(tuner, shapes) for tuner in chosen if (shapes := shapes_of(tuner, arguments.graded))]
    wanted.sort(key=lambda pair: _lost(arguments.progress / f"{pair[0].op}.{pair[0].arch(device_facts(device))}.json"))
    code = 0
    for tuner, shapes in wanted:
        code = max(code, step(tuner, budget=end - time.perf_counter(), shapes=shapes))
        if tuner is not wanted[-1][0] and not usable(device):
            return UNFINISHED  # another process begins with the other ops
    return code


def _lost(progress: Path) -> int:
    """How many shapes were begun and have no outcome: some of them took the process along, or the device."""
    if not progress.exists():
        return 0
    kept = json.loads(progress.read_text())
    ended = [*(entry["shape"] for entry in kept["entries"]), *kept.get("hopeless", [])]
    return sum(shape not in ended for shape in kept.get("asked", []))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
