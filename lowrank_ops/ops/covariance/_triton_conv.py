"""Runs ``conv_covariance_update_`` with a Triton kernel: what it supports, its configurations and its launch.

Numerics, destinations and split-K are those of ``_triton``. A token is a patch: one output position of one image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .. import _triton_device, _tuning
from . import _triton
from ._triton import Config, Plan
from .reference import output_size

if TYPE_CHECKING:
    from . import ConvProblem

# By arch and load: several channels per load ("vector"), or one element per load ("scalar"). Scalar loads need an
# address and a mask per element, for which 8 warps have enough registers.
HEURISTIC: Mapping[tuple[int, str], Config] = {
    **{(arch, "vector"): Config(64, 32, 4, 3) for arch in (80, 90, 100)},
    **{(arch, "scalar"): Config(64, 32, 8, 2) for arch in (80, 90, 100)},
}


class ConvPlan(NamedTuple):
    """A launch without its tensors."""

    plan: Plan
    features: int  # per group
    group_channels: int
    kernel_area: int
    channels_last: bool
    geometry: tuple[int, ...]  # conv_covariance_kernel's arguments from tokens to dilation_x


def supports(problem: ConvProblem) -> str | None:
    """None if the kernel runs ``problem``, else the reason."""
    reason = _triton.unsupported_input(problem.device, problem.dtype)
    if reason is not None:
        return reason
    tokens = _tokens(problem)
    if tokens > _triton.MAX_TOKENS:
        return f"x has {tokens} patches, more than {_triton.MAX_TOKENS}; split its batch"
    return unfenced(problem) or _triton.unsupported_config(config_for(problem), problem.dtype, problem.device)


def unfenced(problem: ConvProblem) -> str | None:
    """Why vectors of 16-bit elements, which load by cp.async, must not be multiplied by this Triton, or None."""
    if _vector(problem) == 1 or problem.dtype.itemsize != 2:
        return None
    return _triton_device.lacks_proxy_fence(problem.device.type, problem.device.capability)


def run(problem: ConvProblem, second_moment: Tensor, total: Tensor, x: Tensor, *geometry: object) -> None:
    """``conv_covariance_update_`` for a supported problem."""
    launch(plan(problem), second_moment, total, x)


def launch(conv: ConvPlan, second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    """Launch ``conv``. Separate from :func:`run` for callers that choose the configuration."""
    plan, groups = conv.plan, total.shape[0]
    partial = plan.constants["DEST"] == "partial"
    target, target_total = _triton.scratch(plan, groups, second_moment) if partial else (second_moment, total)
    with _triton.on_device(x):
        _device_code().conv_covariance_kernel[(plan.tiles, plan.split, groups)](
            x,
            target,
            target_total,
            *conv.geometry,
            *second_moment.stride(),
            *total.stride(),
            plan.chunks,
            plan.length,
            **plan.constants,
        )
        if partial:
            patch = (conv.kernel_area, conv.group_channels)
            _triton.reduce(plan, target, target_total, second_moment, total, conv.features, patch, conv.channels_last)


@functools.lru_cache(maxsize=8192)
def config_for(problem: ConvProblem) -> Config:
    """The tuned configuration of the nearest shape, or the heuristic one."""
    tuned = _tuning.configured(tuned_entry(problem), "triton", Config)
    return tuned or HEURISTIC[_triton.arch_of(problem.device), "scalar" if _vector(problem) == 1 else "vector"]


def tuned_entry(problem: ConvProblem) -> dict[str, Any] | None:
    """The tuned table's entry for the nearest problem, of any backend, if there is a table."""
    return _tuning.nearest("conv_covariance_update", f"sm{_triton.arch_of(problem.device)}", table_shape(problem))


def table_shape(problem: ConvProblem) -> dict[str, Any]:
    """The shape by which the tuned table is indexed. ``loads`` must match, as configurations depend on it."""
    scalar = "channels last" if _channels_last(problem) else "channels first"
    return {
        "tokens": _tokens(problem),
        "features": problem.shape[1] // problem.groups * math.prod(problem.kernel_size),
        "groups": problem.groups,
        "loads": scalar if _vector(problem) == 1 else "vector",
        "dtype": _triton.DTYPES.get(problem.dtype),
    }


def plan(problem: ConvProblem) -> ConvPlan:
    """The launch for ``problem``."""
    return plan_with(problem, config_for(problem))


@functools.lru_cache(maxsize=8192)
def plan_with(problem: ConvProblem, config: Config) -> ConvPlan:
    """The launch for ``problem`` with ``config``."""
    _, channels, height, width = problem.shape
    group_channels = channels // problem.groups
    kernel_area = math.prod(problem.kernel_size)
    features = group_channels * kernel_area
    image_stride, channel_stride, line_stride, pixel_stride = problem.strides
    channels_last, vector = _channels_last(problem), _vector(problem)
    output = _output_size(problem)
    geometry = (
        _tokens(problem),
        math.prod(output),
        output[1],
        height,
        width,
        image_stride // vector,
        channel_stride,
        line_stride // vector,
        pixel_stride // vector,
        group_channels // vector,
        kernel_area,
        problem.kernel_size[1],
        *problem.stride,
        *problem.padding,
        *problem.dilation,
    )
    options = {"CHANNELS_LAST": channels_last, "VECTOR": vector}
    plan = _triton.make_plan(problem, config, _tokens(problem), features, problem.groups, None, vector, options)
    return ConvPlan(plan, features, group_channels, kernel_area, channels_last, geometry)


def _channels_last(problem: ConvProblem) -> bool:
    return problem.strides[1] == 1 and problem.strides[3] != 1


def _vector(problem: ConvProblem) -> int:
    """Channels per load. Whether x starts on 16 bytes is a specialization of the kernel, not part of the problem."""
    vector = 16 // problem.dtype.itemsize
    image_stride, _, line_stride, pixel_stride = problem.strides
    whole = (image_stride, line_stride, pixel_stride, problem.shape[1] // problem.groups)
    return vector if _channels_last(problem) and not any(size % vector for size in whole) else 1


def _tokens(problem: ConvProblem) -> int:
    return problem.shape[0] * math.prod(_output_size(problem))


def _output_size(problem: ConvProblem) -> list[int]:
    return output_size(problem.shape[2:], problem.kernel_size, problem.stride, problem.padding, problem.dilation)


@functools.cache
def _device_code() -> ModuleType:
    from . import _triton_conv_kernels

    return _triton_conv_kernels
