"""The CPU's share of the suite: ``python -m benchmarks.bench_cpu --out FILE``; with ``--quick`` a look for CI.

Covariances by the block triangle against the full product, low-rank layers against dense ones, and what an op of ours
costs in Python beside ``F.linear``. One thread on its own clock, which leaves out what other processes take from the
core; what they do to its caches stays in, and so results are read as ratios of times that were taken in turn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.ops import linear as _op
from lowrank_ops.ops._dispatcher import can_bypass

from . import bench_covariance, bench_lowrank_linear, shapes
from .measure import Probe, sample, summarize
from .rows import Case, Row, compare
from .suite import finish, line, parser, record, run

CALLS = 200  # per sample of an overhead
QUICK_SECONDS = 0.5  # of timing per case
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "backward": torch.enable_grad}


def cases(
    features: Iterable[int] = shapes.CPU_COVARIANCE_FEATURES, layers: Iterable[shapes.Layer] = shapes.CPU_LAYERS
) -> Iterator[Case]:
    """float32, which is what CPUs calibrate and run in."""
    for width in features:
        yield bench_covariance.case(shapes.CPU_COVARIANCE_TOKENS, width, "fp32")
    yield from bench_lowrank_linear.cases("fp32", layers, shapes.CPU_TOKENS)


@torch.inference_mode(False)  # in which the rest is measured, and whose tensors have no gradients
def overheads(seconds: float) -> tuple[list[Row], dict[str, float]]:
    """Calls so small that nearly all of their time is Python and dispatch.

    Returns:
        Rows for each mode of grad, and the microseconds of the parts of a call of ours.
    """
    x, down, up, bias = (torch.randn(size) for size in ((1, 8), (8, 8), (8, 8), (8,)))
    thin = lro.LowRankLinear(8, 8, 8)
    linears = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    for target, value in ((thin.down, down), (thin.up, up), (linears[0].weight, down), (linears[1].weight, up)):
        target.data.copy_(value)
    for layer in (thin, linears[1]):
        layer.bias.data.copy_(bias)
    factors = thin.down, thin.up, thin.bias
    calls: dict[str, Callable[[], Tensor]] = {
        "F.linear": lambda: F.linear(x, factors[1], factors[2]),
        "two F.linear": lambda: F.linear(F.linear(x, factors[0]), factors[1], factors[2]),
        "lowrank_ops auto": lambda: lro.ops.lowrank_linear(x, *factors),
        "two nn.Linear": lambda: linears(x),
        "lowrank_ops LowRankLinear": lambda: thin(x),
    }
    exact = F.linear(F.linear(x.double(), down.double()), up.double(), bias.double())
    rows = []
    for mode, scope in MODES.items():
        with scope():
            right = {name: bool(torch.allclose(call().double(), exact, atol=1e-5)) for name, call in calls.items()}
            timed = {name: _with_backward(call) for name, call in calls.items()} if mode == "backward" else calls
            times = sample({name: _repeated(call) for name, call in timed.items()}, seconds)
        group = []
        for name, samples in times.items():
            row = Row("overhead", {"mode": mode}, name, correct=right[name] or name == "F.linear")
            row.median_us, row.p90_us, row.eager_us, row.samples = summarize(samples)
            group.append(row)
        rows += compare(group, ["F.linear", "two F.linear", "two nn.Linear"])
    with torch.no_grad():
        parts = {
            "modes": lambda: can_bypass(x, down, up, bias),
            "decision": lambda: _op._decision(x, down, up, bias, "none", "auto"),
        }
        times = sample({name: _repeated(call) for name, call in parts.items()}, seconds)
    return rows, {name: round(summarize(samples).median, 2) for name, samples in times.items()}


def _with_backward(call: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: call().sum().backward()


def _repeated(call: Callable[[], Any]) -> Probe:
    def probe(number: int) -> float:
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        return (time.thread_time() - start) / CALLS

    return probe


def main() -> int:
    """The command line."""
    arguments = parser(__doc__)
    arguments.set_defaults(device="cpu", seconds=2.0)
    arguments.add_argument("--quick", action="store_true", help="the smaller half of the cases, for less time each")
    parsed = arguments.parse_args()
    begin = time.perf_counter(), time.thread_time()
    torch.set_num_threads(1)  # a thread's clock does not see the work of others
    chosen = cases()
    if parsed.quick:
        parsed.seconds = min(parsed.seconds, QUICK_SECONDS)
        chosen = cases(shapes.CPU_COVARIANCE_FEATURES[:2], shapes.CPU_LAYERS[:2])
    with torch.inference_mode():
        suite = run("cpu", chosen, parsed, time.thread_time)
    if suite is None:
        return 0
    suite["complete"] &= not parsed.quick
    rows, suite["overhead_parts_us"] = overheads(parsed.seconds)
    record(suite, rows, {})
    print("\n".join(["", "overhead", *(f"  {row.shape['mode']:16}{line(row)}" for row in rows)]))
    print("  parts of a call:", ", ".join(f"{name} {value} us" for name, value in suite["overhead_parts_us"].items()))
    wall, own = time.perf_counter() - begin[0], time.thread_time() - begin[1]
    suite["seconds"] = round(wall, 1)
    print(f"took {wall:.0f} s, {own:.0f} s of them on the processor")
    return finish(suite, "cpu", parsed.out)


if __name__ == "__main__":
    sys.exit(main())
