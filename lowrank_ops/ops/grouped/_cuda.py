"""Runs ``lowrank_linear_grouped`` with the CUDA C++ kernels of ``csrc/lowrank_linear``: a layer is a group of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _native, _tuning
from ._triton import tuned_entry

if TYPE_CHECKING:
    from . import Problem

Tensors = Sequence[Tensor]


def supports(problem: Problem) -> str | None:
    """None if a kernel runs the problem, else the reason."""
    choice = choice_for(problem) if problem.device.type == "cuda" else _native.DEFAULT_CHOICE
    return refuse(problem, choice) or None


def prefers(problem: Problem) -> bool:
    """Only where the tuned table measured it as the fastest."""
    entry = tuned_entry(problem)
    return entry is not None and entry["impl"] == "cuda"


@functools.lru_cache(maxsize=8192)
def choice_for(problem: Problem) -> _native.Choice:
    """The tuned choice of the nearest group if it is legal for the problem, else the planner's default."""
    tuned = _tuning.configured(tuned_entry(problem), "cuda", _native.Choice)
    return _native.usable_choice(tuned, lambda choice: refuse(problem, choice))


def refuse(problem: Problem, choice: _native.Choice) -> str:
    """Why ``choice`` cannot run the problem; empty if it can."""
    return _planned(problem, choice)[0]


def plan(problem: Problem) -> str:
    """The launch of a supported problem, in one line."""
    return _planned(problem, choice_for(problem))[1]


def _planned(problem: Problem, choice: _native.Choice) -> tuple[str, str]:
    """``(reason, "")`` if no kernel runs the problem, else ``("", plan)``."""
    if (reason := _native.unavailable_on(problem.device.type)) is not None:
        return reason, ""
    if problem.x_stride == 0:
        return "x is not a matrix with unit column stride; pass x.contiguous()", ""
    if not problem.contiguous:
        return "takes contiguous factors and biases", ""
    if problem.tokens == 0:
        return "", ""
    sizes = problem.tokens, problem.in_features, problem.ranks, problem.out_features, problem.shared
    values = 16 // problem.dtype.itemsize
    aligned = problem.aligned and all(size % values == 0 for size in (problem.in_features, *problem.ranks))
    return _native.plan_lowrank_linear(*sizes, problem.dtype, aligned, _native.machine(problem.device), choice)


def run(
    problem: Problem,
    x: Tensor,  # (..., in_features)
    downs: Tensors,  # (rank, in_features) per member, or one for all
    ups: Tensors,  # (out_features, rank) per member
    biases: Sequence[Tensor | None],  # (out_features,) per member
    choice: _native.Choice | None = None,  # None: that of the tuned table
) -> list[Tensor]:  # (..., out_features) per member
    """Launch the planned kernel: as many launches as a single layer takes."""
    shapes = [(*x.shape[:-1], out) for out in problem.out_features]
    if problem.tokens == 0:
        return [x.new_empty(shape) for shape in shapes]
    rows = x.reshape(problem.tokens, problem.in_features)
    chosen = choice_for(problem) if choice is None else choice
    ys = torch.ops.lowrank_ops._cuda_lowrank_linear_grouped(rows, [*downs], [*ups], [*biases], *chosen)
    return [y.view(shape) for y, shape in zip(ys, shapes, strict=True)]


def bind(problem: Problem) -> Callable[..., list[Tensor]]:
    """:func:`run` for ``problem`` as a function of x, downs, ups and biases."""
    choice = choice_for(problem)
    return lambda x, downs, ups, biases: run(problem, x, downs, ups, biases, choice)
