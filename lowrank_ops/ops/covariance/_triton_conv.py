"""The Triton covariance update of a convolution's patches: what it can run, its configurations, and the launch.

Numerics, destinations and the split over tokens are those of ``_triton``; a token is a position of the kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .. import _tuning
from .._specialization import Specialization
from . import _triton
from ._triton import Config, Plan
from .reference import output_size

if TYPE_CHECKING:
    from . import ConvProblem

# Keyed by arch and by whether several channels are loaded at once. If not, each element is gathered with an address
# and a mask of its own, which takes twice the threads to hold.
HEURISTIC: Mapping[tuple[int, str], Config] = {
    **{(arch, "vector"): Config(64, 32, 4, 3) for arch in (80, 90, 100)},
    **{(arch, "scalar"): Config(64, 32, 8, 2) for arch in (80, 90, 100)},
}


class ConvPlan(NamedTuple):
    """All of a launch but its tensors."""

    plan: Plan
    features: int  # per group
    group_channels: int
    kernel_area: int
    channels_last: bool
    geometry: tuple[int, ...]  # conv_covariance_kernel's arguments from tokens to dilation_x


def supports(problem: ConvProblem) -> str | None:
    """None, or why the kernel cannot run ``problem``."""
    reason = _triton.unsupported_device(problem.device) or _triton.unsupported_dtype(problem.dtype)
    if reason is not None:
        return reason
    tokens = _tokens(problem)
    if tokens > _triton.TOKEN_LIMIT:
        return f"x has {tokens} patches, more than {_triton.TOKEN_LIMIT}; split its batch"
    return _triton.unsupported_config(config_for(problem), problem.dtype, problem.device)


def run(problem: ConvProblem, second_moment: Tensor, total: Tensor, x: Tensor, *geometry: object) -> None:
    """``conv_covariance_update_`` for tensors that :func:`supports` accepts."""
    launch(plan(problem), second_moment, total, x)


def launch(conv: ConvPlan, second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    """Run ``conv``; apart from :func:`run` so that tests can choose the configuration."""
    plan, groups = conv.plan, total.shape[0]
    partial = plan.constants["DEST"] == "partial"
    target, target_total = second_moment, total
    if partial:
        target, target_total = _triton.scratch(plan, groups, second_moment)
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
    return tuned or HEURISTIC[_triton.arch_of(problem.device), _kind(table_shape(problem))]


def tuned_entry(problem: ConvProblem) -> dict[str, Any] | None:
    """What was fastest for the nearest problem in the tuned table, by any backend, if one ships."""
    return _tuning.nearest("conv_covariance_update", f"sm{_triton.arch_of(problem.device)}", table_shape(problem))


def table_shape(problem: ConvProblem) -> dict[str, Any]:
    """The keys under which a tuned table lists ``problem``; what was tuned for a way to load speaks for no other."""
    one_by_one = "channels last" if _channels_last(problem) else "channels first"
    return {
        "tokens": _tokens(problem),
        "features": problem.shape[1] // problem.groups * math.prod(problem.kernel_size),
        "groups": problem.groups,
        "loads": one_by_one if _vector(problem) == 1 else "vector",
        "dtype": _triton.DTYPES.get(problem.dtype),
    }


def _kind(shape: Mapping[str, Any]) -> str:
    return "vector" if shape["loads"] == "vector" else "scalar"


def plan(problem: ConvProblem) -> ConvPlan:
    """The launch for ``problem``."""
    return plan_with(problem, config_for(problem))


@functools.lru_cache(maxsize=8192)
def plan_with(problem: ConvProblem, config: Config) -> ConvPlan:
    """The launch for ``problem`` with a configuration of the caller's choice."""
    _, channels, height, width = problem.shape
    group_channels = channels // problem.groups
    kernel_area = math.prod(problem.kernel_size)
    features = group_channels * kernel_area
    image_stride, channel_stride, line_stride, pixel_stride = problem.strides
    vector = _vector(problem)
    tile_rows = -(-features // config.block_d)
    tiles = tile_rows * (tile_rows + 1) // 2
    multiprocessors = problem.device.multiprocessors
    split, chunks, length = _triton.cut_tokens(_tokens(problem), tiles * problem.groups, multiprocessors, config)
    constants: dict[str, Any] = {
        "BLOCK_D": config.block_d,
        "BLOCK_T": config.block_t,
        "GROUP": config.group,
        "DEST": _triton.destination(split, problem.deterministic),
        "PRODUCT": _triton.product(problem.dtype, problem.allow_tf32),
        "CHANNELS_LAST": _channels_last(problem),
        "VECTOR": vector,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
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
    cut = Plan(split, tile_rows, tiles, chunks, length, None, vector, config, constants)
    return ConvPlan(cut, features, group_channels, kernel_area, _channels_last(problem), geometry)


def _channels_last(problem: ConvProblem) -> bool:
    return problem.strides[1] == 1 and problem.strides[3] != 1


def _vector(problem: ConvProblem) -> int:
    """Channels that can be loaded at once; the compiler still asks whether x starts on 16 bytes."""
    vector = 16 // problem.dtype.itemsize
    image_stride, _, line_stride, pixel_stride = problem.strides
    whole = (image_stride, line_stride, pixel_stride, problem.shape[1] // problem.groups)
    return vector if _channels_last(problem) and not any(size % vector for size in whole) else 1


def _tokens(problem: ConvProblem) -> int:
    return problem.shape[0] * math.prod(_output_size(problem))


def _output_size(problem: ConvProblem) -> list[int]:
    geometry = (problem.kernel_size, problem.stride, problem.padding, problem.dilation)
    return output_size(list(problem.shape[2:]), *(list(pair) for pair in geometry))


@functools.cache
def _device_code() -> ModuleType:
    from . import _triton_conv_kernels

    return _triton_conv_kernels


def shipped(arch: int) -> list[Specialization]:
    """Every configuration that ships for ``arch`` (80, 90 or 100), each in its heaviest forms."""
    listed = []
    for kind, config in _shipped_configs(arch):
        if kind == "vector":
            forms = [
                ("bf16", "exact", True, "state", "fp64"),
                ("fp16", "exact", True, "atomic", "fp32"),
                ("fp32", "tf32", True, "partial", "fp32"),
            ]
        else:
            forms = [
                ("bf16", "exact", False, "state", "fp64"),
                ("bf16", "exact", False, "partial", "fp32"),
                ("fp32", "bf16x3", False, "state", "fp64"),
                ("bf16", "exact", True, "state", "fp32"),
            ]
        listed += [_specialization(config, kind, *form) for form in forms]
    return listed + _triton.reductions(_shipped_configs(arch), channels_last=True)


def _shipped_configs(arch: int) -> list[tuple[str, Config]]:
    configs = [(kind, config) for (of, kind), config in HEURISTIC.items() if of == arch]
    for entry in _tuning.load("conv_covariance_update", f"sm{arch}"):
        tuned = _tuning.configured(entry, "triton", Config)
        if tuned is not None:
            configs.append((_kind(entry["shape"]), tuned))
    return list(dict.fromkeys(configs))


def _specialization(
    config: Config, kind: str, dtype: str, product: str, channels_last: bool, dest: str, state: str
) -> Specialization:
    kernel = _device_code().conv_covariance_kernel
    unit = ["state_column_stride", "total_stride", "channel_stride" if channels_last else "pixel_stride"]
    constexprs = {
        **dict.fromkeys(unit, 1),
        "BLOCK_D": config.block_d,
        "BLOCK_T": config.block_t,
        "GROUP": config.group,
        "DEST": dest,
        "PRODUCT": product,
        "CHANNELS_LAST": channels_last,
        "VECTOR": (4 if dtype == "fp32" else 8) if kind == "vector" else 1,
    }
    integers = [name for name in kernel.arg_names[3:] if name not in constexprs]
    aligned = ("x", "state", "total", "length")
    order = "channels-last" if channels_last else "NCHW"
    return Specialization(
        name=f"convolution {dtype} {product} {config.block_d}x{config.block_t} {order} {kind} {dest} {state}",
        kernel=kernel,
        signature={"x": f"*{dtype}", "state": f"*{state}", "total": f"*{state}", **dict.fromkeys(integers, "i32")},
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
