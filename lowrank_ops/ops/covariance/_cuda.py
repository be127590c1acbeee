"""Runs the covariance updates with the CUDA C++ kernels of ``csrc/covariance``; their planner states what is legal.

Accumulation is in float32 over at most 2048 tokens (4096 in ``covariance_sm90_wide``), then in the state's dtype, in a
fixed order. Products of bfloat16 and float16 are exact. float32 inputs take three bfloat16 MMAs: relative error about
2^-17 of ``|x_i x_j|``. With ``allow_tf32`` they take one MMA of operands rounded to the nearest TensorFloat-32: within
2^-10, without bias. Column sums are of the inputs themselves, never of rounded values.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _native, _tuning
from . import _triton, _triton_conv
from .reference import output_size

if TYPE_CHECKING:
    from . import ConvProblem, Problem


def supports(problem: Problem) -> str | None:
    """None if a kernel runs ``problem``, else the reason."""
    return _planned(problem)[0] or None


def supports_conv(problem: ConvProblem) -> str | None:
    """None if a kernel runs ``problem``, else the reason."""
    return _planned_conv(problem)[0] or None


def prefers(problem: Problem) -> bool:
    """Only where the tuned table measured it as the fastest."""
    entry = _triton.tuned_entry(problem)
    return entry is not None and entry["impl"] == "cuda"


def prefers_conv(problem: ConvProblem) -> bool:
    """Only where the tuned table measured it as the fastest."""
    entry = _triton_conv.tuned_entry(problem)
    return entry is not None and entry["impl"] == "cuda"


def plan(problem: Problem) -> str:
    """The launch of a supported problem, in one line."""
    return _planned(problem, choice_for(problem))[1]


def plan_conv(problem: ConvProblem) -> str:
    """The launch of a supported problem, in one line."""
    return _planned_conv(problem, conv_choice_for(problem))[1]


def refuse(problem: Problem, choice: _native.Choice) -> str:
    """Why ``choice`` cannot run the problem; empty if it can."""
    return _planned(problem, choice)[0]


def refuse_conv(problem: ConvProblem, choice: _native.Choice) -> str:
    """Why ``choice`` cannot run the problem; empty if it can."""
    return _planned_conv(problem, choice)[0]


@functools.lru_cache(maxsize=8192)
def choice_for(problem: Problem) -> _native.Choice:
    """The tuned choice of the nearest shape if it is legal for the problem, else the planner's default."""
    tuned = _tuning.configured(_triton.tuned_entry(problem), "cuda", _native.Choice)
    return _native.usable_choice(tuned, functools.partial(refuse, problem))


@functools.lru_cache(maxsize=8192)
def conv_choice_for(problem: ConvProblem) -> _native.Choice:
    """The tuned choice of the nearest shape if it is legal for the problem, else the planner's default."""
    tuned = _tuning.configured(_triton_conv.tuned_entry(problem), "cuda", _native.Choice)
    return _native.usable_choice(tuned, functools.partial(refuse_conv, problem))


def _planned(problem: Problem, choice: _native.Choice = _native.DEFAULT_CHOICE) -> tuple[str, str]:
    """``(reason, "")`` if no kernel runs the problem, else ``("", plan)``; both empty if nothing is launched."""
    if (reason := _native.unavailable_on(problem.device.type)) is not None:
        return reason, ""
    if not problem.tokens or not problem.features:
        return "", ""
    source = "aligned_matrix" if problem.aligned else "matrix"
    return _native.plan_covariance(
        problem.tokens,
        problem.features,
        1,
        problem.dtype,
        source,
        problem.allow_tf32,
        _native.machine(problem.device),
        choice,
    )


def _planned_conv(problem: ConvProblem, choice: _native.Choice = _native.DEFAULT_CHOICE) -> tuple[str, str]:
    """:func:`_planned` for patches."""
    if (reason := _native.unavailable_on(problem.device.type)) is not None:
        return reason, ""
    batch, channels, *size = problem.shape
    if not batch or not channels:
        return "", ""
    positions = math.prod(output_size(size, problem.kernel_size, problem.stride, problem.padding, problem.dilation))
    return _native.plan_covariance(
        batch * positions,
        channels // problem.groups * math.prod(problem.kernel_size),
        problem.groups,
        problem.dtype,
        "patches",
        problem.allow_tf32,
        _native.machine(problem.device),
        choice,
    )


def run(
    problem: Problem,
    second_moment: Tensor,  # (features, features)
    total: Tensor,  # (features,)
    x: Tensor,  # (..., features)
    choice: _native.Choice | None = None,  # None: that of the tuned table
) -> None:
    """Launch the planned kernel, and the sum of the partial tiles if the tokens are split."""
    chosen = choice_for(problem) if choice is None else choice
    rows = x.reshape(-1, problem.features)
    torch.ops.lowrank_ops._cuda_covariance_update_(second_moment, total, rows, problem.allow_tf32, *chosen)


def run_conv(
    problem: ConvProblem,
    second_moment: Tensor,  # (groups, d, d)
    total: Tensor,  # (groups, d)
    x: Tensor,  # (batch, channels, height, width)
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    choice: _native.Choice | None = None,  # None: that of the tuned table
) -> None:
    """:func:`run` over patches. The kernel gathers them in its mainloop (implicit im2col)."""
    chosen = conv_choice_for(problem) if choice is None else choice
    geometry = (kernel_size, stride, padding, dilation)
    torch.ops.lowrank_ops._cuda_conv_covariance_update_(second_moment, total, x, *geometry, problem.allow_tf32, *chosen)
