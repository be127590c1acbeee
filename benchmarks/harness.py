"""Correctness first, then speed: what all suites share.

A case is one problem, and variants that solve it. Every variant is compared with float64 before it is timed: its error
may be at most twice that of torch in the same dtype. Variants are timed in turn, round after round. On a GPU one sample
is a replay of a CUDA graph that goes through copies of the tensors larger than L2, so that every call finds a cold
cache; eager calls, with Python and launch, are timed apart. On a CPU calls are timed one by one.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lowrank_ops as lro

ROTATED_BYTES = 200 << 20  # several times the L2 cache of any GPU
MAX_COPIES = 512
MIN_SAMPLES, MAX_SAMPLES = 5, 300
SETTLED = 0.02  # spread of three samples in a row at which clocks have settled
HEAD_START = 200_000  # GPU cycles, about 0.1 ms, that hide the launch of a graph
META = torch.device("meta")

Tensors = tuple[Tensor, ...]
Probe = Callable[[int], float]  # number of the call -> seconds
Clock = Callable[[], float]


def anywhere(device: torch.device) -> str | None:
    """For a variant that runs on any device."""
    return None


def on_cuda(device: torch.device) -> str | None:
    """For a variant that needs a CUDA device."""
    return None if device.type == "cuda" else "needs a CUDA device"


class Variant(NamedTuple):
    """One way to solve a case."""

    name: str
    run: Callable[..., Any]  # takes the case's tensors
    unavailable: Callable[[torch.device], str | None] = anywhere  # why it cannot run on a device
    backend: str | None = None  # of lowrank_ops; None for a baseline
    checked: bool = True  # False for a baseline that computes less than the case asks


@dataclass(frozen=True)
class Case:
    """One problem, its variants, and what a right result is."""

    op: str
    shape: Mapping[str, int | str]
    flops: float  # that must be done; 0 where there is no roofline
    bytes: float  # that must be moved: every input read once, every output written once
    dtype: torch.dtype  # of the inputs
    make: Callable[[torch.device, int], Tensors]  # random tensors from a seed
    variants: tuple[Variant, ...]
    solve: Callable[[Callable[..., Any], Tensors], Tensor]  # what a variant computes, from a clean state
    exact: Callable[[Tensors], Tensor]  # the same in float64
    plain: Callable[..., Any]  # torch's own in the same dtype; its error sets the tolerance
    explained: Callable[[Tensors, str], str] | None = None  # ``lro.ops.explain`` of the call, by a backend
    cold: bool = True  # rotate tensors, and use CUDA graphs; False: eager calls on the same tensors
    rotated: int | None = None  # number of tensors that all variants read; only they count as rotated
    calls: int = 1  # per sample of an eager call
    context: Callable[[], contextlib.AbstractContextManager[Any]] = torch.inference_mode

    def __str__(self) -> str:
        return " ".join([self.op, *(f"{key}={value}" for key, value in self.shape.items())])


class Timing(NamedTuple):
    """Microseconds of one call."""

    median: float
    p90: float
    eager: float  # with Python and launch; on a CPU the median
    samples: int


class Peak(NamedTuple):
    """The machine's measured peaks, from which rooflines are computed."""

    copy: float  # bytes per second, read and written
    matmul: Mapping[str, float]  # dtype name -> floating-point operations per second


@dataclass
class Row:
    """One variant on one case; times in microseconds."""

    op: str
    shape: dict[str, int | str]
    variant: str
    implementation: str | None = None  # that lowrank_ops chose
    median_us: float | None = None
    p90_us: float | None = None
    eager_us: float | None = None
    samples: int = 0
    achieved: float | None = None  # in ``unit``: of the work that must be done, also by a variant that does more
    unit: str = ""
    roofline_us: float | None = None
    roofline_fraction: float | None = None
    correct: bool = False
    error: float | None = None
    tolerance: float | None = None
    failure: str | None = None
    speedup: dict[str, float] = field(default_factory=dict)  # over each baseline; empty where either is wrong

    def __str__(self) -> str:
        name = self.variant + (f" ({self.implementation})" if self.implementation else "")
        if not self.correct:
            return f"{name:44} {self.trouble()}"
        times = f"{self.median_us:10.1f} us  p90 {self.p90_us:10.1f}  eager {self.eager_us:10.1f}"
        reached = (
            f"{self.achieved:8.4g} {self.unit}  {self.roofline_fraction:4.0%} of roofline"
            if self.roofline_fraction
            else ""
        )
        ratios = "  ".join(f"{factor:.2f}x {other}" for other, factor in self.speedup.items())
        return f"{name:44} {times}  {reached}  {ratios}"

    def trouble(self) -> str:
        """Why a row is wrong or failed."""
        if self.failure:
            return f"FAILED: {self.failure}"
        return f"WRONG: error {self.error:.3g}, tolerance {self.tolerance:.3g}"


def described(failure: Exception) -> str:
    """An exception as a row's failure."""
    return f"{type(failure).__name__}: {failure}"


# Correctness


def truth(case: Case, tensors: Tensors) -> tuple[Tensor, float]:
    """The result in float64, and the tolerance: twice torch's own error in the same dtype."""
    exact = case.exact(tensors)
    return exact, 2 * distance(case.solve(case.plain, tensors), exact) + 1e-6


def distance(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ or something is NaN."""
    if result.shape != exact.shape:
        return math.inf
    worst = (result.double() - exact).abs().max().item()
    return worst if worst == worst else math.inf


def within(error: float, tolerance: float) -> bool:
    """Whether an error is within the tolerance; none is where torch's own error is infinite."""
    return error <= tolerance < math.inf


# Timing


def copies_to_rotate(tensors: Tensors) -> int:
    """How many copies of ``tensors`` take more than ``ROTATED_BYTES``."""
    return min(MAX_COPIES, ROTATED_BYTES // max(1, sum(tensor.nbytes for tensor in tensors)) + 1)


def time_variants(
    runs: Mapping[str, Callable[..., Any]],
    rotation: Sequence[Tensors],
    seconds: float,
    graph: bool = True,
    clock: Clock = time.perf_counter,
    calls: int = 1,
) -> dict[str, Timing | str]:
    """Time functions of the tensors of ``rotation`` in turn.

    Args:
        runs: name -> function of one element of ``rotation``.
        rotation: copies of the tensors, on one device.
        seconds: to spend, roughly; every function gets at least ``MIN_SAMPLES`` samples.
        graph: on a GPU, replay CUDA graphs, and time eager calls beside them.
        clock: of eager calls.
        calls: per sample of an eager call.

    Returns:
        The timing of each function, or the error with which it failed.
    """
    graph = graph and rotation[0][0].is_cuda
    results: dict[str, Timing | str] = {}
    eager: dict[str, Probe] = {}
    steady: dict[str, Probe] = {}
    for name, run in runs.items():
        try:
            probe = eager_probe(run, rotation, clock, calls)
            steady[name] = graph_probe(run, rotation) if graph else probe
            eager[name] = probe
        except Exception as failure:
            results[name] = described(failure)
    if steady:
        settle(next(iter(steady.values())), min(2.0, seconds))
        replayed = sample(steady, seconds)
        called = sample(eager, seconds / 4) if graph else replayed
        results |= {name: summarize(times, called[name]) for name, times in replayed.items()}
    return results


def sample(probes: Mapping[str, Probe], seconds: float) -> dict[str, list[float]]:
    """Call all probes once a round, beginning with another one each time, until the time is up."""
    names, calls = list(probes), itertools.count()
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for number in range(MAX_SAMPLES):
        if number >= MIN_SAMPLES and time.perf_counter() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(probes[name](next(calls)))
    return times


def summarize(times: Sequence[float], eager: Sequence[float]) -> Timing:
    """Median and 90th percentile of samples in seconds."""
    p90 = sorted(times)[math.ceil(0.9 * len(times)) - 1]
    return Timing(statistics.median(times) * 1e6, p90 * 1e6, statistics.median(eager) * 1e6, len(times))


def settle(probe: Probe, at_most: float) -> None:
    """Run ``probe`` until three samples in a row agree."""
    recent: list[float] = []
    end = time.perf_counter() + at_most
    while time.perf_counter() < end:
        recent = [*recent[-2:], probe(len(recent))]
        if len(recent) == 3 and max(recent) <= (1 + SETTLED) * min(recent):
            break


def eager_probe(run: Callable[..., Any], rotation: Sequence[Tensors], clock: Clock, calls: int = 1) -> Probe:
    """Time ``calls`` calls on the host, until the device is done."""
    wait = torch.cuda.synchronize if rotation[0][0].is_cuda else lambda: None

    def probe(number: int) -> float:
        tensors = rotation[number % len(rotation)]
        wait()
        start = clock()
        for _ in range(calls):
            run(*tensors)
        wait()
        return (clock() - start) / calls

    probe(0)  # the first call compiles and allocates
    return probe


def graph_probe(run: Callable[..., Any], rotation: Sequence[Tensors]) -> Probe:
    """Time the replay of a CUDA graph of one call per element of ``rotation``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries and compilers choose and allocate outside of the capture
            run(*rotation[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensors in rotation:
            run(*tensors)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def probe(number: int) -> float:
        torch.cuda._sleep(HEAD_START)  # or the time from the first event to the launch would count
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / len(rotation)

    probe(0)
    return probe


def compile_every_shape() -> None:
    """Raise ``torch.compile``'s limit of 8 shapes per function, and make it fail instead of falling back to eager."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True


# Roofline


def measure_peak(device: torch.device, clock: Clock, seconds: float = 1.0) -> Peak:
    """The fastest of many large copies, and of many large products of random data in each dtype."""
    gpu = device.type == "cuda"

    def fastest(run: Callable[..., Any], *tensors: Tensor) -> float:
        probe = graph_probe(run, [tensors]) if gpu else eager_probe(run, [tensors], clock)
        settle(probe, seconds)
        return min(sample({"": probe}, seconds)[""])

    source = torch.empty((1 << 30) if gpu else (1 << 27), dtype=torch.uint8, device=device).random_()
    copy = 2 * source.nbytes / fastest(lambda x, y: y.copy_(x), source, torch.empty_like(source))
    size, rates = 8192 if gpu else 1536, {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if gpu else (torch.float32,):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[name_of(dtype)] = 2 * size**3 / fastest(torch.mm, a, b)
    return Peak(copy, rates)


def roofline(case: Case, peak: Peak) -> tuple[float | None, str]:
    """The minimum microseconds of a case, and the unit that bounds it."""
    dtype, rates = name_of(case.dtype), peak.matmul
    ways = [case.flops / rates[dtype]] if dtype in rates else []
    if dtype == "float32" and "bfloat16" in rates:
        ways.append(3 * case.flops / rates["bfloat16"])  # three products of bfloat16 parts
    computing = min(ways or [case.flops / rates["float32"]]) * 1e6  # 16-bit inputs of a CPU are multiplied in float32
    moving = case.bytes / peak.copy * 1e6
    if not computing and not moving:
        return None, ""
    return (moving, "GB/s") if moving >= computing else (computing, "TFLOP/s")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Cases


def measure_case(
    case: Case,
    device: torch.device,
    peak: Peak,
    seconds: float,
    clock: Clock = time.perf_counter,
    attempt: Callable[[str], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> tuple[list[Row], dict[str, str]]:
    """Check, then time, every variant that runs on ``device``. Each is checked within ``attempt(name)``.

    Returns:
        The rows, wrong ones first, and why each of the other variants cannot run.
    """
    with case.context():
        tensors = case.make(device, 0)
        rows, runs, not_run = _check(case, tensors, roofline(case, peak), attempt)
        try:
            copies = copies_to_rotate(tensors[: case.rotated]) if case.cold else 1
            rotation = [tensors, *(case.make(device, seed) for seed in range(1, copies))]
            timings = time_variants(runs, rotation, seconds, case.cold, clock, case.calls)
        except Exception as failure:  # the results of the check stay
            timings = dict.fromkeys(runs, described(failure))
    for name, timing in timings.items():
        _fill(rows[name], case, timing)
    return compare(list(rows.values()), [one.name for one in case.variants if one.backend is None]), not_run


def _check(
    case: Case,
    tensors: Tensors,
    limit: tuple[float | None, str],
    attempt: Callable[[str], contextlib.AbstractContextManager[None]],
) -> tuple[dict[str, Row], dict[str, Callable[..., Any]], dict[str, str]]:
    exact, tolerance = truth(case, tensors)
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[..., Any]] = {}
    not_run: dict[str, str] = {}
    for variant in case.variants:
        if reason := variant.unavailable(tensors[0].device):
            not_run[variant.name] = reason
            continue
        row = Row(case.op, dict(case.shape), variant.name, roofline_us=limit[0], unit=limit[1], tolerance=tolerance)
        try:
            with attempt(variant.name):
                if variant.checked:
                    row.error = distance(case.solve(variant.run, tensors), exact)
                    row.correct = within(row.error, tolerance)
                else:
                    variant.run(*tensors)
                    row.correct, row.tolerance = True, None
            row.implementation = _implementation(case, variant, tensors)
            runs[variant.name] = variant.run
        except lro.ops.BackendUnavailableError as refusal:
            not_run[variant.name] = str(refusal)
            continue
        except Exception as failure:
            row.failure = described(failure)
        rows[variant.name] = row
    return rows, runs, not_run


def _implementation(case: Case, variant: Variant, tensors: Tensors) -> str | None:
    """The implementation of lowrank_ops that a variant runs."""
    if variant.backend is None or case.explained is None:
        return None
    lines = (line.partition(": ") for line in case.explained(tensors, variant.backend).splitlines())
    return next((name for name, _, state in lines if state.startswith("runs")), None)


def _fill(row: Row, case: Case, timing: Timing | str) -> None:
    if isinstance(timing, str):
        row.failure, row.correct = timing, False
        return
    row.median_us, row.p90_us, row.eager_us, row.samples = timing
    if row.roofline_us:
        work = case.bytes / 1e3 if row.unit == "GB/s" else case.flops / 1e6
        row.achieved, row.roofline_fraction = work / timing.median, row.roofline_us / timing.median


def compare(rows: Iterable[Row], baselines: Sequence[str]) -> list[Row]:
    """Give right rows their speedups over right baselines; wrong rows come first and have none."""
    times = {row.variant: row.median_us for row in rows if row.correct and row.median_us}
    for row in rows:
        own = times.get(row.variant)
        others = [name for name in baselines if own and name in times and name != row.variant]
        row.speedup = {name: times[name] / own for name in others if own}
    return sorted(rows, key=lambda row: row.correct)
