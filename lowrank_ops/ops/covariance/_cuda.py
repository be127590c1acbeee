"""CUDA C++ covariance updates: ``csrc/covariance``. What they can run, the planner says.

Sums are taken in float32 over at most 2048 tokens (4096 by ``covariance_sm90_wide``), then in the state's dtype, in an
order that does not change between runs. float32 inputs are multiplied as three bfloat16 products: relative error about
2^-17 of ``|x_i x_j|``; with ``allow_tf32`` as one product of factors that are rounded to the nearest TensorFloat-32:
within 2^-10, and leaning to neither side. bfloat16 and float16 products are exact. Sums of rows are of what was given,
never of TensorFloat-32.
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
    """Why ``run`` cannot take the problem, or None."""
    return _planned(problem)[0] or None


def plan(problem: Problem) -> str:
    """How ``run`` would, in one line."""
    return _planned(problem, choice_for(problem))[1]


def refuse(problem: Problem, choice: _native.Choice) -> str:
    """Why ``run`` cannot take the problem by a choice of the caller's; empty where it can."""
    return _planned(problem, choice)[0]


@functools.lru_cache(maxsize=8192)
def choice_for(problem: Problem) -> _native.Choice:
    """The tuned one of the nearest shape, or the planner's own."""
    tuned = _tuning.configured(_triton.tuned_entry(problem), "cuda", _native.Choice)
    return _native.choice(tuned, functools.partial(refuse, problem))


def supports_conv(problem: ConvProblem) -> str | None:
    """Why ``run_conv`` cannot take the problem, or None."""
    return _planned_conv(problem)[0] or None


def plan_conv(problem: ConvProblem) -> str:
    """How ``run_conv`` would, in one line."""
    return _planned_conv(problem, conv_choice_for(problem))[1]


def refuse_conv(problem: ConvProblem, choice: _native.Choice) -> str:
    """The same of ``run_conv``."""
    return _planned_conv(problem, choice)[0]


@functools.lru_cache(maxsize=8192)
def conv_choice_for(problem: ConvProblem) -> _native.Choice:
    """The same."""
    tuned = _tuning.configured(_triton_conv.tuned_entry(problem), "cuda", _native.Choice)
    return _native.choice(tuned, functools.partial(refuse_conv, problem))


def _planned(problem: Problem, choice: _native.Choice = _native.PLANNERS) -> tuple[str, str]:
    """Why not, or how; neither where nothing will be launched."""
    if problem.device.type != "cuda":
        return "it needs a CUDA device", ""
    if (reason := _native.unavailable()) is not None:
        return reason, ""
    if not problem.tokens or not problem.features:
        return "", ""
    source = "aligned_matrix" if problem.aligned else "matrix"
    return torch.ops.lowrank_ops._plan_covariance(  # type: ignore[no-any-return]
        problem.tokens,
        problem.features,
        1,
        _native.dtype_name(problem.dtype),
        source,
        problem.allow_tf32,
        *_native.machine(problem.device),
        *choice,
    )


def _planned_conv(problem: ConvProblem, choice: _native.Choice = _native.PLANNERS) -> tuple[str, str]:
    if problem.device.type != "cuda":
        return "it needs a CUDA device", ""
    if (reason := _native.unavailable()) is not None:
        return reason, ""
    batch, channels, *size = problem.shape
    if not batch or not channels:
        return "", ""
    positions = math.prod(output_size(size, problem.kernel_size, problem.stride, problem.padding, problem.dilation))
    return torch.ops.lowrank_ops._plan_covariance(  # type: ignore[no-any-return]
        batch * positions,
        channels // problem.groups * math.prod(problem.kernel_size),
        problem.groups,
        _native.dtype_name(problem.dtype),
        "patches",
        problem.allow_tf32,
        *_native.machine(problem.device),
        *choice,
    )


def prefers(problem: Problem) -> bool:
    """Where the tuned table says that it was fastest; so not before it has been measured."""
    entry = _triton.tuned_entry(problem)
    return entry is not None and entry["impl"] == "cuda"


def prefers_conv(problem: ConvProblem) -> bool:
    """The same."""
    entry = _triton_conv.tuned_entry(problem)
    return entry is not None and entry["impl"] == "cuda"


def run(
    problem: Problem, second_moment: Tensor, total: Tensor, x: Tensor, choice: _native.Choice | None = None
) -> None:
    """One launch, or two where the tokens are split; by default as the tuned table has it."""
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
    choice: _native.Choice | None = None,
) -> None:
    """The same over patches, which are gathered while they are multiplied."""
    chosen = conv_choice_for(problem) if choice is None else choice
    torch.ops.lowrank_ops._cuda_conv_covariance_update_(
        second_moment,
        total,
        x,
        kernel_size,
        stride,
        padding,
        dilation,
        problem.allow_tf32,
        *chosen,
    )
