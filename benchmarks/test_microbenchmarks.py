"""Single calls, by pytest-benchmark: ``pytest benchmarks``, with ``--benchmark-save`` and ``--benchmark-compare``.

A quick look at the machine at hand, kept and compared by pytest-benchmark in ``.benchmarks``. Figures that are told to
others come from the suites (``bench_*.py``), which take the arms in turn and let the inputs rotate through memory.
Every call is checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import bench_covariance, bench_cpu, bench_lowrank_linear, shapes
from benchmarks.rows import Arm, Case, cannot_run, distance, truth, within

CPU_BACKENDS = (None, "auto")  # an opponent, or ours by what runs there
TINY = shapes.Layer(8, 8, 8)  # nearly all of its time is Python and dispatch


def calls() -> Iterator[Any]:
    """One parameter per arm of every case that a minute allows, on the CPU and where there is one on a GPU."""
    on_cpu = [
        *bench_cpu.cases(shapes.CPU_COVARIANCE_FEATURES[:2], shapes.CPU_LAYERS[:2]),
        bench_lowrank_linear.case(TINY, 1, "fp32"),
    ]
    on_gpu = [
        *(bench_covariance.case(8192, width, "bf16") for width in shapes.COVARIANCE_FEATURES[:4]),
        *bench_lowrank_linear.cases("bf16", shapes.STORED_LAYERS[:4], (1, 64, 2048)),
    ]
    for device, cases in (("cpu", on_cpu), ("cuda", on_gpu if torch.cuda.is_available() else [])):
        for case in cases:
            name = "-".join([device, case.op, *(f"{key}={value}" for key, value in case.shape.items())])
            for arm in case.arms:
                if arm.unavailable(torch.device(device)) is None and (device == "cuda" or arm.backend in CPU_BACKENDS):
                    yield pytest.param(device, name, case, arm, id=f"{name}-{arm.name.replace(' ', '-')}")


@pytest.mark.parametrize("device, name, case, arm", list(calls()))
def test_call(benchmark: Any, device: str, name: str, case: Case, arm: Arm) -> None:
    tensors = case.make(torch.device(device), 0)
    if (reason := cannot_run(case, arm, tensors)) is not None:
        pytest.skip(reason)
    benchmark.group = name
    with torch.inference_mode():
        exact, allowed = truth(case, tensors)
        assert within(distance(case.solve(arm.run, tensors), exact), allowed)
        del exact
        benchmark(finished(arm.run, device), *tensors)


def finished(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``run``, and on a GPU the wait for what it has queued."""
    if device == "cpu":
        return run

    def call(*tensors: Any) -> None:
        run(*tensors)
        torch.cuda.synchronize()

    return call
