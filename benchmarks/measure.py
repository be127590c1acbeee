"""Timing on a GPU or a CPU: caches cold, variants interleaved, clocks settled, medians and 90th percentiles.

On a GPU a variant is captured in a CUDA graph that goes once through copies of its tensors which together exceed the
L2 cache, so that no call finds its operands there; a replay's time over the number of copies is one sample. The eager
latency of a call, with Python and the launch in it, is taken apart from that. On a CPU calls are timed one by one.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROTATED_BYTES = 200 << 20  # several times the L2 cache of any GPU, and more than most CPUs' last level
MOST_COPIES = 512
SETTLED = 0.02  # spread of three samples in a row at which clocks are taken to have settled
LEAST_SAMPLES, MOST_SAMPLES = 5, 300
HEAD_START = 200_000  # cycles, about 0.1 ms, in which a GPU is kept from what is being launched
QUIET = 0.5  # load average below which nobody else was computing

Tensors = tuple[Tensor, ...]
Probe = Callable[[int], float]  # takes the number of the call, gives seconds
Clock = Callable[[], float]


class Timing(NamedTuple):
    """Microseconds of one call."""

    median: float
    p90: float
    eager: float  # with Python and the launch; on a CPU the same as the median
    samples: int


class Ceilings(NamedTuple):
    """What this machine reaches, against which floors are computed."""

    copy: float  # bytes per second, read and written
    matmul: Mapping[str, float]  # dtype name -> floating-point operations per second


def copies_to_rotate(tensors: Tensors) -> int:
    """How many copies of ``tensors`` take more than ``ROTATED_BYTES``."""
    size = max(1, sum(tensor.nbytes for tensor in tensors))
    return min(MOST_COPIES, ROTATED_BYTES // size + 1)


def time_arms(
    arms: Mapping[str, Callable[..., Any]],
    rotation: Sequence[Tensors],
    seconds: float,
    graph: bool = True,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing | str]:
    """Time every arm on the tensors of ``rotation`` in turn.

    Args:
        arms: name -> function of the tensors of one element of ``rotation``.
        rotation: copies of the tensors, on one device.
        seconds: time to spend, roughly; every arm gets at least ``LEAST_SAMPLES`` samples all the same.
        graph: on a GPU, time replays of a CUDA graph beside eager calls.
        clock: of eager calls. ``time.thread_time`` leaves out what other processes take, and is right for calls that
            keep to one thread of a CPU.

    Returns:
        The timing of each arm, or the error with which it failed.
    """
    graph = graph and rotation[0][0].is_cuda
    results: dict[str, Timing | str] = {}
    steady: dict[str, Probe] = {}
    eager: dict[str, Probe] = {}
    for name, arm in arms.items():
        try:
            eager[name] = call_probe(arm, rotation, clock)
            steady[name] = _graph_probe(arm, rotation) if graph else eager[name]
        except Exception as error:  # an arm that cannot run must not take the others with it
            results[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            steady.pop(name, None)
            eager.pop(name, None)
    if not steady:
        return results
    settle(next(iter(steady.values())), at_most=min(2.0, seconds))
    replayed = sample(steady, seconds)
    called = sample(eager, seconds / 4) if graph else replayed
    for name, times in replayed.items():
        results[name] = summarize(times, called[name])
    return results


def sample(
    probes: Mapping[str, Probe], seconds: float, least: int = LEAST_SAMPLES, most: int = MOST_SAMPLES
) -> dict[str, list[float]]:
    """Call all probes once a round, another one first in each, until the time is up.

    Probes get the running number of their call, so that those which rotate tensors do not find what the one before
    them has just brought into the caches.
    """
    names = list(probes)
    calls = itertools.count()
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(probes[name](next(calls)))
    return times


def summarize(times: Sequence[float], eager: Sequence[float] | None = None) -> Timing:
    """Median and 90th percentile of samples in seconds."""
    ordered = sorted(times)
    p90 = ordered[math.ceil(0.9 * len(ordered)) - 1]
    median = statistics.median(times)
    return Timing(median * 1e6, p90 * 1e6, (statistics.median(eager) if eager else median) * 1e6, len(times))


def settle(probe: Probe, at_most: float) -> None:
    """Run ``probe`` until three samples in a row agree, as they do once clocks and caches have settled."""
    recent: list[float] = []
    end = time.perf_counter() + at_most
    while time.perf_counter() < end:
        recent = [*recent[-2:], probe(len(recent))]
        if len(recent) == 3 and max(recent) <= (1 + SETTLED) * min(recent):
            break


def call_probe(call: Callable[..., Any], rotation: Sequence[Tensors], clock: Clock = time.perf_counter) -> Probe:
    """Times one call by a clock of the host, until the device is done."""
    wait = torch.cuda.synchronize if rotation[0] and rotation[0][0].is_cuda else _nothing

    def probe(number: int) -> float:
        tensors = rotation[number % len(rotation)]
        wait()
        start = clock()
        call(*tensors)
        wait()
        return clock() - start

    probe(0)  # the first call compiles and allocates
    return probe


def compile_every_shape() -> None:
    """Let ``torch.compile`` go on where it would give up, and silently run the rest eagerly.

    Its limit is 8 compilations of one function; here each shape takes one, and models share the code of their class.
    """
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _graph_probe(call: Callable[..., Any], rotation: Sequence[Tensors]) -> Probe:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries and compilers choose and allocate outside of the capture
            call(*rotation[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensors in rotation:
            call(*tensors)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def probe(number: int) -> float:
        torch.cuda._sleep(HEAD_START)  # or the time from the first event to the launch would count as the graph's
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / len(rotation)

    probe(0)
    return probe


def _nothing() -> None:
    pass


def ceilings(device: torch.device, seconds: float = 1.0, clock: Clock = time.perf_counter) -> Ceilings:
    """Measure the rates of a large copy and of a large matrix product of random data in each dtype."""
    gpu = device.type == "cuda"
    source = torch.empty((1 << 30) if gpu else (1 << 27), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    rotation = [(source, target)]
    copied = _fastest(lambda x, y: y.copy_(x), rotation, seconds, clock)
    size = 8192 if gpu else 1536
    rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if gpu else (torch.float32,):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[name_of(dtype)] = 2 * size**3 / _fastest(torch.mm, [(a, b)], seconds, clock)
    return Ceilings(2 * source.nbytes / copied, rates)


def _fastest(call: Callable[..., Any], rotation: Sequence[Tensors], seconds: float, clock: Clock) -> float:
    """A ceiling is what the machine can do: the least time, where timings of variants are medians."""
    probe = _graph_probe(call, rotation) if rotation[0][0].is_cuda else call_probe(call, rotation, clock)
    settle(probe, seconds)
    return min(sample({"": probe}, seconds)[""])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What a figure depends on besides the code: machine, versions, commit, date and the load at the start.

    Args:
        device: what is measured.
        commit: of the sources; None asks git.
    """
    load = os.getloadavg()[0]
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(load, 2),
        "quiet": load < QUIET,
    }
    if device.type == "cuda":
        facts |= {
            "cuda": torch.version.cuda,
            "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        }
    return facts


def _commit() -> str:
    """The checkout's commit, with "+changes" where files that are tracked differ from it."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        results = ":(exclude)benchmarks/results"  # being written
        return commit + ("+changes" if _git(here.parent, "status", "--porcelain", "-uno", "--", ".", results) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
