"""CUDA C++ low-rank products: ``csrc/lowrank_linear``. What they can run, the planner says.

Products are summed in float32; ``x down^T`` is rounded to the dtype of ``x`` in between, as two library products do.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _native, _tuning
from ._triton_config import tuned_entry, tuned_implementation

if TYPE_CHECKING:
    from . import Problem


def supports_decode(problem: Problem) -> str | None:
    """Why ``run`` cannot take the problem with a kernel for few tokens, or None; more of them where a table says so."""
    return _unsupported(problem, "decode")


def supports_prefill(problem: Problem) -> str | None:
    """Why ``run`` cannot take the problem with the kernel for many tokens, or None."""
    return _unsupported(problem, "prefill")


def _unsupported(problem: Problem, kind: str) -> str | None:
    choice = choice_for(problem) if problem.device.type == "cuda" else _native.PLANNERS
    return _planned(problem, kind, choice)[0] or None


def plan(problem: Problem) -> str:
    """How ``run`` would take a problem that one of the two supports, in one line."""
    return _planned(problem, "", choice_for(problem))[1]


def refuse(problem: Problem, choice: _native.Choice, kind: str = "") -> str:
    """Why ``run`` cannot take the problem by a choice of the caller's; empty where it can, by a kernel of the kind."""
    return _planned(problem, kind, choice)[0]


@functools.lru_cache(maxsize=8192)
def choice_for(problem: Problem) -> _native.Choice:
    """The tuned one of the nearest shape, or the planner's own.

    The nearest shape may have been on the other side of the most tokens that a decode kernel takes, and its splits mean
    something else there.
    """
    entry = tuned_entry(problem)
    kind = "" if entry is None else entry["impl"].removeprefix("cuda.")
    tuned = _tuning.configured(entry, "cuda", _native.Choice)
    return _native.choice(tuned, lambda choice: _planned(problem, kind, choice)[0])


def prefers_decode(problem: Problem) -> bool:
    """Where the tuned table says that it was fastest; so not before it has been measured."""
    return tuned_implementation(problem) == "cuda.decode"


def prefers_prefill(problem: Problem) -> bool:
    """The same."""
    return tuned_implementation(problem) == "cuda.prefill"


def _planned(problem: Problem, kind: str, choice: _native.Choice = _native.PLANNERS) -> tuple[str, str]:
    """Why not by a kernel whose name starts with ``kind``, or how; neither where nothing will be launched."""
    if problem.device.type != "cuda":
        return "it needs a CUDA device", ""
    if (reason := _native.unavailable()) is not None:
        return reason, ""
    if problem.x_stride == 0:
        return "x is not a matrix with unit column stride; pass x.contiguous()", ""
    if problem.tokens == 0:
        return "", ""
    reason, plan = torch.ops.lowrank_ops._plan_lowrank_linear(
        problem.tokens,
        problem.in_features,
        problem.rank,
        problem.out_features,
        _native.dtype_name(problem.dtype),
        _aligned(problem),
        *_native.machine(problem.device),
        *choice,
    )
    kernel = plan.partition(":")[0]
    if not reason and not kernel.startswith(kind):
        return f"{problem.tokens} tokens are for {kernel}", ""
    return reason, plan


def _aligned(problem: Problem) -> bool:
    """Whether all rows will start on 16 bytes, after ``run`` has copied what is not row-major."""
    values = 16 // problem.dtype.itemsize
    down_fits = problem.down_strides[1] == 1 or problem.in_features % values == 0
    up_fits = problem.up_strides[1] == 1 or problem.rank % values == 0
    return problem.aligned and down_fits and up_fits


def run(
    problem: Problem,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    choice: _native.Choice | None = None,  # by default that of the tuned table
) -> Tensor:  # (..., out_features)
    """One launch on compute capability 9.0 with rows on 16 bytes, else two.

    Factors that are not row-major, such as the backward's, are copied first.
    """
    shape = (*x.shape[:-1], problem.out_features)
    if problem.tokens == 0:
        return x.new_empty(shape)
    down, up = (factor if factor.stride(1) == 1 else factor.contiguous() for factor in (down, up))
    bias = None if bias is None else bias.contiguous()
    rows = x.reshape(problem.tokens, problem.in_features)
    chosen = choice_for(problem) if choice is None else choice
    y = torch.ops.lowrank_ops._cuda_lowrank_linear(rows, down, up, bias, activation, *chosen)
    return y.view(shape)
