"""Single calls, by pytest-benchmark: ``pytest benchmarks``, with ``--benchmark-save`` and ``--benchmark-compare``.

pytest-benchmark stores and compares them in ``.benchmarks``. Every call is checked against float64 before it is timed.
For figures to publish use the suites (``bench_*.py``), which interleave variants and keep caches cold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import lowrank_ops as lro
from benchmarks import bench_covariance, bench_cpu, bench_lowrank_linear, shapes
from benchmarks.harness import Case, Variant, distance, truth, within

CPU_BACKENDS = (None, "auto")
TINY = shapes.Layer(8, 8, 8)  # nearly all of its time is Python and dispatch


def calls() -> Iterator[Any]:
    """The variants of all cases that a minute allows, on the CPU and, where there is one, on a GPU."""
    on_cpu = [
        *(case for case in bench_cpu.cases(quick=True) if case.op != "overhead"),
        bench_lowrank_linear.case(TINY, 1, "fp32"),
    ]
    on_gpu = [
        *(bench_covariance.case(8192, width, "bf16") for width in shapes.COVARIANCE_FEATURES[:5]),
        *bench_lowrank_linear.cases("bf16", quick=True),
    ]
    for device, cases in (("cpu", on_cpu), ("cuda", on_gpu if torch.cuda.is_available() else [])):
        for case in cases:
            name = f"{device} {case}".replace(" ", "-")
            for variant in case.variants:
                runs = variant.unavailable(torch.device(device)) is None
                if runs and (device == "cuda" or variant.backend in CPU_BACKENDS):
                    yield pytest.param(device, case, variant, id=f"{name}-{variant.name.replace(' ', '-')}")


@pytest.mark.parametrize("device, case, variant", list(calls()))
def test_call(benchmark: Any, device: str, case: Case, variant: Variant) -> None:
    benchmark.group = f"{device} {case}"
    with case.context():
        tensors = case.make(torch.device(device), 0)
        exact, tolerance = truth(case, tensors)
        try:
            error = distance(case.solve(variant.run, tensors), exact)
        except lro.ops.BackendUnavailableError as refusal:
            pytest.skip(str(refusal))
        assert within(error, tolerance)
        del exact
        benchmark(finished(variant.run, device), *tensors)


def finished(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``run``, and on a GPU the wait for what it has queued."""
    if device == "cpu":
        return run

    def call(*tensors: Any) -> None:
        run(*tensors)
        torch.cuda.synchronize()

    return call
