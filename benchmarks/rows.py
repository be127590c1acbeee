"""From timings to rows: what is compared with what, whether it is right, and how far from the floor it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ops.ops._backend import BackendUnavailableError, choose

from .measure import Ceilings, Clock, Tensors, Timing, copies_to_rotate, name_of, time_arms


def anywhere(device: torch.device) -> str | None:
    """An arm that runs on any device."""
    return None


def on_cuda(device: torch.device) -> str | None:
    """An arm that needs a CUDA device."""
    return None if device.type == "cuda" else "needs a CUDA device"


class Arm(NamedTuple):
    """One way to do a case's work."""

    name: str
    run: Callable[..., Any]  # takes the case's tensors
    unavailable: Callable[[torch.device], str | None] = anywhere
    backend: str | None = None  # of lowrank_ops; None for the others, which are opponents


@dataclass(frozen=True)
class Case:
    """One problem, all the ways to solve it, and how to tell that a solution is right."""

    op: str
    shape: Mapping[str, int | str]
    flops: float  # that must be done
    bytes: float  # that must be moved: each input read once, each output written once
    dtype: torch.dtype  # of the inputs
    make: Callable[[torch.device, int], Tensors]  # fresh random tensors from a seed
    arms: tuple[Arm, ...]
    solve: Callable[[Callable[..., Any], Tensors], Tensor]  # what an arm computes, from a clean state
    exact: Callable[[Tensors], Tensor]  # the same in float64
    plain: Callable[..., Any]  # the arm-like function that is torch's own in the same dtype
    pose: Callable[[Tensors], tuple[Sequence[Any], Hashable]] | None  # the op's table and problem, if it is one op
    graph: bool = True  # time replays of a CUDA graph; False: calls as they are
    read_by_all: int | None = None  # how many of the tensors every arm reads; the rest must not count as rotated


@dataclass
class Row:
    """One arm on one case. Microseconds; achieved rates count the work that must be done, whoever does more."""

    op: str
    shape: dict[str, int | str]
    arm: str
    implementation: str | None = None  # that lowrank_ops chose
    median_us: float | None = None
    p90_us: float | None = None
    eager_us: float | None = None
    samples: int = 0
    achieved: float | None = None
    unit: str = ""
    floor_us: float | None = None
    fraction_of_floor: float | None = None
    correct: bool = False
    error: float | None = None
    allowed: float | None = None
    failure: str | None = None  # why there is no time
    peak_mb: float | None = None  # of device memory during a call, with everything that was there before
    speedup: dict[str, float] = field(default_factory=dict)  # over each opponent; empty where either is wrong

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def floor_us(case: Case, ceilings: Ceilings) -> tuple[float, str]:
    """The least time that the case can take, and the unit in which its bound is told."""
    moving = case.bytes / ceilings.copy * 1e6
    computing = _computing(case.flops, name_of(case.dtype), ceilings.matmul) * 1e6
    return (moving, "GB/s") if moving >= computing else (computing, "TFLOP/s")


def _computing(flops: float, dtype: str, rates: Mapping[str, float]) -> float:
    """Seconds at the measured rates, by the fastest way that keeps the inputs' precision."""
    ways = [flops / rates[dtype]] if dtype in rates else []
    if dtype == "float32" and "bfloat16" in rates:
        ways.append(3 * flops / rates["bfloat16"])  # three products of bfloat16 parts
    if not ways:
        ways = [flops / rates["float32"]]  # 16-bit inputs on a machine that multiplies in float32
    return min(ways)


def truth(case: Case, tensors: Tensors) -> tuple[Tensor, float]:
    """The result in float64, and the error that is allowed: twice what torch makes in the same dtype."""
    exact = case.exact(tensors)
    return exact, 2 * distance(case.solve(case.plain, tensors), exact) + 1e-6


def distance(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ or something is NaN."""
    if result.shape != exact.shape:
        return float("inf")
    worst = (result.double() - exact).abs().max().item()
    return worst if worst == worst else float("inf")


def within(error: float, allowed: float) -> bool:
    """Whether an error is allowed; none is where torch's own has no bound, as nothing could be told from it."""
    return error <= allowed < float("inf")


def measure_case(
    case: Case, device: torch.device, ceilings: Ceilings, seconds: float, clock: Clock = time.perf_counter
) -> tuple[list[Row], dict[str, str]]:
    """Check, then time, every arm that can run on ``device``.

    Returns:
        The rows, wrong ones first, and for every arm that cannot run the reason.
    """
    tensors = case.make(device, 0)
    reasons = {arm.name: cannot_run(case, arm, tensors) for arm in case.arms}
    arms = [arm for arm in case.arms if reasons[arm.name] is None]
    floor, unit = floor_us(case, ceilings)
    rows = {arm.name: Row(case.op, dict(case.shape), arm.name, unit=unit, floor_us=floor) for arm in arms}
    exact, allowed = truth(case, tensors)
    for arm in arms:
        row = rows[arm.name]
        row.allowed = allowed
        row.implementation = chosen(case, arm, tensors)
        try:
            row.error = distance(case.solve(arm.run, tensors), exact)
            row.correct = within(row.error, allowed)
        except Exception as failure:
            row.failure = told(failure)
    del exact
    runnable = {arm.name: arm.run for arm in arms if rows[arm.name].failure is None}
    timings: Mapping[str, Timing | str]
    try:
        copies = copies_to_rotate(tensors[: case.read_by_all]) if case.graph or device.type == "cpu" else 1
        rotation = [tensors, *(case.make(device, seed) for seed in range(1, copies))]
        if device.type == "cuda":
            for name, run in runnable.items():
                rows[name].peak_mb = _peak_mb(run, tensors)
        timings = time_arms(runnable, rotation, seconds, case.graph, clock)
    except Exception as failure:  # what the check found stays, such as the arm that broke the device
        timings = dict.fromkeys(runnable, told(failure))
    for name, timing in timings.items():
        fill(rows[name], case, timing)
    return compare(list(rows.values()), opponents(case)), {
        name: reason for name, reason in reasons.items() if reason is not None
    }


def told(failure: Exception) -> str:
    """An exception as a row's failure."""
    return f"{type(failure).__name__}: {failure}"


def _peak_mb(run: Callable[..., Any], tensors: Tensors) -> float:
    torch.cuda.reset_peak_memory_stats()
    run(*tensors)
    return torch.cuda.max_memory_allocated() / 1e6


def fill(row: Row, case: Case, timing: Timing | str) -> None:
    """Write a timing, or the failure that came instead, into a row with a floor."""
    if isinstance(timing, str):
        row.failure, row.correct = timing, False
        return
    row.median_us, row.p90_us, row.eager_us, row.samples = timing
    seconds = timing.median / 1e6
    row.achieved = case.bytes / seconds / 1e9 if row.unit == "GB/s" else case.flops / seconds / 1e12
    row.fraction_of_floor = row.floor_us / timing.median if row.floor_us else None


def compare(rows: list[Row], others: Sequence[str]) -> list[Row]:
    """Give every right row its speed-up over every right opponent; wrong rows come first and have none."""
    sound = {row.arm: row.median_us for row in rows if row.correct and row.median_us}
    for row in rows:
        own = sound.get(row.arm)
        row.speedup = (
            {} if own is None else {name: sound[name] / own for name in others if name in sound and name != row.arm}
        )
    return sorted(rows, key=lambda row: row.correct)


def opponents(case: Case) -> list[str]:
    """The arms that are not ours."""
    return [arm.name for arm in case.arms if arm.backend is None]


def chosen(case: Case, arm: Arm, tensors: Tensors) -> str | None:
    """Which implementation of lowrank_ops an arm runs."""
    if arm.backend is None or case.pose is None:
        return None
    return choose(*case.pose(tensors), arm.backend).name


def cannot_run(case: Case, arm: Arm, tensors: Tensors) -> str | None:
    """None, or why an arm cannot run on the device of ``tensors``."""
    reason = arm.unavailable(tensors[0].device)
    if reason is None and arm.backend is not None and case.pose is not None:
        try:
            choose(*case.pose(tensors), arm.backend)
        except BackendUnavailableError as error:
            reason = str(error)
    return reason
