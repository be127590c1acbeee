"""Runs a covariance kernel on a separate state and compares a part of the result with float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._backend import Impl, kernel_of
from . import reference

FEATURES = 2048  # of a first call's trial, which bounds its memory
# Relative to the sum of |x_i x_j|. Tensor cores truncate what they accumulate in float32: 2^-14 over 4096 rows.
BOUND, BOUND_TF32 = 2.0**-14, 2.0**-9


def trial(impl: Impl, problem: Any, x: Tensor, limit: int = FEATURES, **options: Any) -> tuple[float, float] | None:
    """The error of ``impl`` in adding ``x`` (..., features) to zeros, and the allowed one; None if x shows nothing.

    Only the last ``limit`` features take part, unless fewer features have another kernel.

    Args:
        impl: an implementation that supports ``problem``.
        problem: the ``Problem`` of a call.
        x: of that call.
        limit: of the features.
        options: for ``impl.run``.
    """
    part = x[..., max(0, problem.features - limit) // 8 * 8 :]
    posed = problem._replace(features=part.shape[-1], state_stride=part.shape[-1])
    if kernel_of(impl, posed) != kernel_of(impl, problem):
        part, posed = x, problem._replace(state_stride=problem.features)
    second_moment, total = _zeros(problem, x, 1, posed.features)
    impl.run(posed, second_moment[0], total[0], part, **options)
    return reference.errors(second_moment, total, reference.blocks(part, total.double()), _bound(problem))


def trial_conv(
    impl: Impl, problem: Any, x: Tensor, limit: int = FEATURES, **options: Any
) -> tuple[float, float] | None:
    """:func:`trial` for patches: of the channels that have about ``limit`` features, or of two groups."""
    area, channels = math.prod(problem.kernel_size), problem.shape[1] // problem.groups
    groups = min(problem.groups, 2)
    part = x[:, : groups * channels if groups > 1 else max(1, limit // area)]
    posed = problem._replace(shape=tuple(part.shape), groups=groups)
    if kernel_of(impl, posed) != kernel_of(impl, problem):
        part, posed, groups = x, problem, problem.groups
    second_moment, total = _zeros(problem, x, groups, part.shape[1] // groups * area)
    geometry = [list(pair) for pair in (problem.kernel_size, problem.stride, problem.padding, problem.dilation)]
    impl.run(posed, second_moment, total, part, *geometry, **options)
    rows = reference.patches(part, total.double(), *geometry)
    return reference.errors(second_moment, total, rows, _bound(problem))


def _zeros(problem: Any, x: Tensor, groups: int, features: int) -> tuple[Tensor, Tensor]:
    shape = groups, features, features
    return x.new_zeros(shape, dtype=problem.state_dtype), x.new_zeros(shape[:2], dtype=problem.state_dtype)


def _bound(problem: Any) -> float:
    return BOUND_TF32 if problem.allow_tf32 and problem.dtype == torch.float32 else BOUND
