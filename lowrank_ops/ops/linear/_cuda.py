"""Runs ``lowrank_linear`` with the CUDA C++ kernels of ``csrc/lowrank_linear``; their planner states what is legal.

Accumulation is in float32. ``x down^T`` is rounded to the dtype of ``x`` between the GEMMs, as with two library GEMMs.
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
    """None if a decode kernel runs the problem, else the reason. A tuned table may raise the planner's token limit."""
    return _unsupported(problem, "decode")


def supports_prefill(problem: Problem) -> str | None:
    """None if the prefill kernel runs the problem, else the reason."""
    return _unsupported(problem, "prefill")


def _unsupported(problem: Problem, kind: str) -> str | None:
    choice = choice_for(problem) if problem.device.type == "cuda" else _native.DEFAULT_CHOICE
    return _planned(problem, kind, choice)[0] or None


def plan(problem: Problem) -> str:
    """The launch of a supported problem, in one line."""
    return _planned(problem, "", choice_for(problem))[1]


def refuse(problem: Problem, choice: _native.Choice, kind: str = "") -> str:
    """Why ``choice`` cannot run the problem with a kernel of ``kind``; empty if it can."""
    return _planned(problem, kind, choice)[0]


@functools.lru_cache(maxsize=8192)
def choice_for(problem: Problem) -> _native.Choice:
    """The tuned choice of the nearest shape if it is legal for the problem, else the planner's default.

    The nearest shape may be on the other side of the decode kernels' token limit, where its splits mean something else.
    """
    entry = tuned_entry(problem)
    kind = "" if entry is None else entry["impl"].removeprefix("cuda.")
    tuned = _tuning.configured(entry, "cuda", _native.Choice)
    return _native.usable_choice(tuned, lambda choice: _planned(problem, kind, choice)[0])


def prefers_decode(problem: Problem) -> bool:
    """Only where the tuned table measured it as the fastest."""
    return tuned_implementation(problem) == "cuda.decode"


def prefers_prefill(problem: Problem) -> bool:
    """Only where the tuned table measured it as the fastest."""
    return tuned_implementation(problem) == "cuda.prefill"


def _planned(problem: Problem, kind: str, choice: _native.Choice = _native.DEFAULT_CHOICE) -> tuple[str, str]:
    """``(reason, "")`` if no kernel whose name starts with ``kind`` runs the problem, else ``("", plan)``."""
    if (reason := _native.unavailable_on(problem.device.type)) is not None:
        return reason, ""
    if problem.scaled:
        return "takes no 8-bit factors; Triton's kernels do", ""
    if problem.x_stride == 0:
        return "x is not a matrix with unit column stride; pass x.contiguous()", ""
    if problem.tokens == 0:
        return "", ""
    reason, plan = _native.plan_lowrank_linear(
        problem.tokens,
        problem.in_features,
        [problem.rank],
        [problem.out_features],
        False,
        problem.dtype,
        _aligned(problem),
        _native.machine(problem.device),
        choice,
    )
    kernel = plan.partition(":")[0]
    if not reason and not kernel.startswith(kind):
        return f"{problem.tokens} tokens are for {kernel}", ""
    return reason, plan


def _aligned(problem: Problem) -> bool:
    """Whether all rows start on 16 bytes once ``run`` has copied what is not row-major."""
    values = 16 // problem.dtype.itemsize
    down_fits = problem.down_strides[1] == 1 or problem.in_features % values == 0
    up_fits = problem.up_strides[1] == 1 or problem.rank % values == 0
    return problem.aligned and down_fits and up_fits


def run(
    problem: Problem,
    x: Tensor,  # (..., in_features)
    down: Tensor,  # (rank, in_features)
    up: Tensor,  # (out_features, rank)
    bias: Tensor | None,  # (out_features,)
    activation: str,
    choice: _native.Choice | None = None,  # None: that of the tuned table
) -> Tensor:  # (..., out_features)
    """Launch the planned kernel: one launch on sm_90 with rows on 16 bytes, otherwise two.

    Factors that are not row-major, such as those of the backward, are copied first.
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
