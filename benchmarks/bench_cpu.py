"""Benchmarks on a CPU: ``python -m benchmarks.bench_cpu --out FILE``; with ``--quick`` in less than a minute.

Covariances by the block triangle against the full product, low-rank layers against dense ones, and the cost of a call
in Python beside ``F.linear``. One thread on its own clock, which leaves out what other processes take from the core;
they still share its caches, so read the results as ratios of times that were taken in turn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro

from . import bench_covariance, bench_grouped, bench_lowrank_linear, shapes
from .harness import Case, Variant
from .suite import main as run

MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "backward": torch.enable_grad}


def cases(dtype: str = "fp32", quick: bool = False) -> Iterator[Case]:
    """In float32, in which CPUs calibrate and run."""
    half = 2 if quick else None
    for width in shapes.CPU_COVARIANCE_FEATURES[:half]:
        yield bench_covariance.case(shapes.CPU_COVARIANCE_TOKENS, width, dtype)
    for layer in shapes.CPU_LAYERS[:half]:
        for tokens in shapes.CPU_TOKENS:
            yield bench_lowrank_linear.case(layer, tokens, dtype)
    for group in shapes.CPU_GROUPS[:half]:
        for tokens in shapes.CPU_TOKENS:
            yield bench_grouped.case(group, tokens, dtype)
    yield from map(overhead, MODES)


def overhead(mode: str) -> Case:
    """Calls so small that nearly all of their time is Python and dispatch, in one mode of autograd."""
    x, down, up, bias = (torch.randn(size) for size in ((1, 8), (8, 8), (8, 8), (8,)))
    thin = lro.LowRankLinear(8, 8, 8)
    linears = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    pairs = {thin.down: down, thin.up: up, thin.bias: bias}
    pairs |= {linears[0].weight: down, linears[1].weight: up, linears[1].bias: bias}
    for parameter, value in pairs.items():
        parameter.data.copy_(value)
    factors = thin.down, thin.up, thin.bias

    def variant(
        name: str, call: Callable[[Tensor], Tensor], backend: str | None = None, checked: bool = True
    ) -> Variant:
        def forward_backward(x: Tensor) -> Tensor:
            y = call(x)
            y.sum().backward()
            return y

        return Variant(name, forward_backward if mode == "backward" else call, backend=backend, checked=checked)

    return Case(
        op="overhead",
        shape={"mode": mode},
        flops=0.0,
        bytes=0.0,
        dtype=torch.float32,
        make=lambda device, seed: (x.to(device),),
        variants=(
            variant("F.linear", lambda x: F.linear(x, factors[1], factors[2]), checked=False),
            variant("two F.linear", lambda x: F.linear(F.linear(x, factors[0]), factors[1], factors[2])),
            variant("lowrank_ops auto", lambda x: lro.ops.lowrank_linear(x, *factors), "auto"),
            variant("two nn.Linear", lambda x: linears(x)),
            variant("lowrank_ops LowRankLinear", lambda x: thin(x), "auto"),
        ),
        solve=lambda run, tensors: run(*tensors),
        exact=lambda tensors: F.linear(F.linear(x.double(), down.double()), up.double(), bias.double()),
        plain=lambda x: F.linear(F.linear(x, down), up, bias),
        cold=False,
        calls=200,
        context=MODES[mode],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line, on one thread: a thread's clock does not see the work of others."""
    torch.set_num_threads(1)
    return run("cpu", __doc__, cases, "fp32", argv, seconds=2.0, device="cpu", clock=time.thread_time)


if __name__ == "__main__":
    sys.exit(main())
