"""Runs ``covariance_update_`` with Triton kernels: what they support, their configurations and their launches.

The kernels are in ``_triton_kernels``; Triton is imported by the first launch.

float32 inputs take three bfloat16 MMAs (error below 2^-15 of the sum of ``|x_i x_j|``) or, with ``allow_tf32``, one
TensorFloat-32 MMA (below 2^-10). Products of bfloat16 and float16 are exact. Accumulation is in float32 over at most
``CHUNK`` tokens, then in the state's dtype.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton_device, _tuning
from .._backend import Device

if TYPE_CHECKING:
    from . import Problem

CHUNK = 2048  # tokens accumulated in float32; longer sums lose bits when the mean is large
REDUCE_ROWS, REDUCE_WARPS = 16, 8  # tile rows per program of reduce_kernel; some specializations spill with 4 warps
MAX_SPLITS = 64

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MAX_TOKENS = 2**31 - 2**20  # token indices are 32-bit, and the last chunk may end past the last token
_MAX_STRIDE = 2**23  # offsets inside a tile of the state are 32-bit


@dataclass(frozen=True)
class Config:
    """Tiles and compile options of a covariance kernel."""

    block_d: int  # output tile: block_d x block_d
    block_t: int  # contraction tile: tokens per step of the mainloop
    num_warps: int
    num_stages: int
    group: int = 8  # tile rows per L2 swizzle group
    split: int = 0  # split-K over tokens; 0: chosen from the number of SMs

    def shared_bytes(self, itemsize: int) -> int:
        """An upper bound of the bytes of shared memory per CTA."""
        operands = self.num_stages * 2 * self.block_t * self.block_d * itemsize
        epilogue = self.block_d * self.block_d // 4 * 8
        return max(operands, epilogue) + 2048


# By arch and kind of input: 16-bit inputs wide enough for 128 x 128 tiles, narrower 16-bit ones, and float32.
HEURISTIC: Mapping[tuple[int, str], Config] = {
    (80, "wide"): Config(128, 32, 8, 4),
    (80, "narrow"): Config(64, 32, 4, 4),
    (80, "float32"): Config(64, 32, 4, 3),
    (90, "wide"): Config(128, 64, 8, 4),
    (90, "narrow"): Config(64, 64, 4, 4),
    (90, "float32"): Config(64, 32, 4, 3),
    (100, "wide"): Config(128, 64, 8, 4),
    (100, "narrow"): Config(64, 64, 4, 4),
    (100, "float32"): Config(64, 32, 4, 3),
}


class Plan(NamedTuple):
    """A launch without its tensors."""

    split: int
    tile_rows: int
    tiles: int
    chunks: int  # per split
    length: int  # tokens per chunk
    block: tuple[int, int] | None  # of the TMA tensor descriptor; None: pointer loads
    vector: int
    config: Config
    constants: Mapping[str, Any]  # constexprs and compile options


def supports(problem: Problem) -> str | None:
    """None if the kernel runs ``problem``, else the reason."""
    reason = unsupported_input(problem.device, problem.dtype)
    if reason is not None:
        return reason
    if problem.tokens == 0 or problem.features == 0:
        return None
    if problem.tokens > MAX_TOKENS:
        return f"x has {problem.tokens} tokens, more than {MAX_TOKENS}; split it"
    if problem.state_stride >= _MAX_STRIDE:
        return f"second_moment has a row stride of {problem.state_stride} elements; it must be below {_MAX_STRIDE}"
    return unsupported_config(config_for(problem), problem.dtype, problem.device)


def prefers(problem: Any) -> bool:
    """``auto`` prefers the kernel on a GPU. The interpreter is for tests that request it by ``backend="triton"``."""
    return bool(problem.device.type == "cuda")


def run(problem: Problem, second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    """``covariance_update_`` for a supported problem."""
    launch(plan(problem), second_moment, total, x, problem)


def launch(plan: Plan, second_moment: Tensor, total: Tensor, x: Tensor, problem: Problem) -> None:
    """Launch ``plan``. Separate from :func:`run` for callers that choose the configuration."""
    if plan.block is None:
        source = x
    else:
        source = _descriptor()(x, [problem.tokens, problem.features], [problem.row_stride, 1], plan.block)
    partial = plan.constants["DEST"] == "partial"
    target, target_total = scratch(plan, 1, second_moment) if partial else (second_moment, total)
    with on_device(x):
        device_code().covariance_kernel[(plan.tiles, plan.split)](
            source,
            target,
            target_total,
            problem.tokens,
            problem.features // plan.vector,
            problem.row_stride // plan.vector,
            second_moment.stride(0),
            second_moment.stride(1),
            total.stride(0),
            plan.chunks,
            plan.length,
            **plan.constants,
        )
        if partial:
            reduce(plan, target, target_total, second_moment[None], total[None], problem.features)


def scratch(plan: Plan, groups: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialized partial tiles (splits, groups, tiles, block_d, block_d) and sums. The kernel writes all of them."""
    block, rows = plan.config.block_d, plan.split * groups
    tile_elements = rows * plan.tiles * block * block
    both = like.new_empty(tile_elements + rows * plan.tile_rows * block)
    return both, both[tile_elements:]


def reduce(
    plan: Plan,
    partial: Tensor,  # (splits, groups, tiles, block_d, block_d)
    partial_total: Tensor,  # (splits, groups, tile rows, block_d)
    second_moment: Tensor,  # (groups, features, features)
    total: Tensor,  # (groups, features)
    features: int,
    patch: tuple[int, int] = (1, 1),  # kernel area and channels per group, for channels-last features
    channels_last: bool = False,
) -> None:
    """Add the partial tiles of all splits to the state."""
    config = plan.config
    device_code().reduce_kernel[(plan.tiles, config.block_d // REDUCE_ROWS, total.shape[0])](
        partial,
        partial_total,
        second_moment,
        total,
        features,
        plan.split,
        *second_moment.stride(),
        *total.stride(),
        *patch,
        BLOCK_D=config.block_d,
        ROWS=REDUCE_ROWS,
        GROUP=config.group,
        CHANNELS_LAST=channels_last,
        num_warps=REDUCE_WARPS,
    )


def plan(problem: Problem) -> Plan:
    """The launch for ``problem``."""
    return plan_with(problem, config_for(problem))


@functools.lru_cache(maxsize=8192)
def config_for(problem: Problem) -> Config:
    """The tuned configuration of the nearest shape, or the heuristic one."""
    tuned = _tuning.configured(tuned_entry(problem), "triton", Config)
    return tuned or HEURISTIC[arch_of(problem.device), _kind(problem.dtype, problem.features)]


def tuned_entry(problem: Problem) -> dict[str, Any] | None:
    """The tuned table's entry for the nearest problem, of any backend, if there is a table."""
    shape = {"tokens": problem.tokens, "features": problem.features, "dtype": DTYPES.get(problem.dtype)}
    return _tuning.nearest("covariance_update", f"sm{arch_of(problem.device)}", shape)


@functools.lru_cache(maxsize=8192)
def plan_with(problem: Problem, config: Config) -> Plan:
    """The launch for ``problem`` with ``config``."""
    tma = has_tma(problem.device) and problem.aligned
    vector = 16 // problem.dtype.itemsize
    if tma or not problem.aligned or problem.features % vector:
        vector = 1
    block = (config.block_t, config.block_d) if tma else None
    options = {"TMA": tma, "VECTOR": vector}
    return make_plan(problem, config, problem.tokens, problem.features, 1, block, vector, options)


def make_plan(
    problem: Any,  # a Problem or ConvProblem
    config: Config,
    tokens: int,
    features: int,  # per group
    groups: int,
    block: tuple[int, int] | None,
    vector: int,
    options: Mapping[str, Any],  # the kernel's own constexprs
) -> Plan:
    """The tiles, splits and constexprs that the update and the convolution kernel share."""
    tile_rows = _ceil(features, config.block_d)
    tiles = tile_rows * (tile_rows + 1) // 2
    split, chunks, length = cut_tokens(tokens, tiles * groups, problem.device.sm_count, config)
    constants = {
        "BLOCK_D": config.block_d,
        "BLOCK_T": config.block_t,
        "GROUP": config.group,
        "DEST": _destination(split, problem.deterministic),
        "INPUT_PRECISION": _input_precision(problem.dtype, problem.allow_tf32),
        **options,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Plan(split, tile_rows, tiles, chunks, length, block, vector, config, constants)


def cut_tokens(tokens: int, tiles: int, sm_count: int, config: Config) -> tuple[int, int, int]:
    """Splits, chunks per split and tokens per chunk."""
    split = config.split or _best_split(tokens, tiles, max(sm_count, 1), config.block_t)
    span = _ceil(tokens, split)
    chunks = _ceil(span, CHUNK)
    length = _ceil(_ceil(span, chunks), config.block_t) * config.block_t
    return split, chunks, length


def _best_split(tokens: int, tiles: int, sm_count: int, block_t: int) -> int:
    # Cost in mainloop steps. Estimates: 8 steps for a program's prologue and epilogue, 6 for the reduction's launch and
    # 0.09 per partial tile for its traffic.
    def cost(split: int) -> float:
        waves = _ceil(tiles * split, sm_count)
        return waves * (_ceil(tokens, split * block_t) + 8) + (6 + 0.09 * tiles * split if split > 1 else 0)

    max_split = min(MAX_SPLITS, max(1, tokens // (4 * block_t)))
    return min(range(1, max_split + 1), key=cost)


def _destination(split: int, deterministic: bool) -> str:
    """The kernels' DEST: where a program adds its accumulator."""
    if split == 1:
        return "state"
    return "partial" if deterministic else "atomic"


def _input_precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """The kernels' INPUT_PRECISION: how operands are passed to the MMA."""
    if dtype != torch.float32:
        return "exact"
    return "tf32" if allow_tf32 and torch.version.hip is None else "bf16x3"


def arch_of(device: Device) -> int:
    """The arch whose configurations a device uses: 80, 90 or 100. The interpreter uses those of sm_90."""
    return _triton_device.arch_of(device.capability) if device.type == "cuda" else 90


def has_tma(device: Device) -> bool:
    return arch_of(device) >= 90


def unsupported_input(device: Device, dtype: torch.dtype) -> str | None:
    """Why no covariance kernel takes inputs of ``dtype`` on ``device``, or None."""
    reason = _triton_device.unavailable(device.type, device.capability)
    if reason is None and dtype not in DTYPES:
        reason = f"x is {dtype}; the Triton kernels take bfloat16, float16 and float32"
    return reason


def unsupported_config(config: Config, dtype: torch.dtype, device: Device) -> str | None:
    """Why ``config`` does not fit ``device``, or None."""
    need = config.shared_bytes(dtype.itemsize)
    if device.type == "cuda" and need > device.shared_memory:
        return f"the kernel needs {need} bytes of shared memory per CTA; this device has {device.shared_memory}"
    return None


@functools.cache
def device_code() -> ModuleType:
    from . import _triton_kernels

    return _triton_kernels


@functools.cache
def _descriptor() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


_NO_SWITCH = contextlib.nullcontext()


def on_device(x: Tensor) -> Any:
    """A context in which the device of ``x`` is the current device: Triton launches there."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return _NO_SWITCH
    return torch.cuda.device(x.device)


def _kind(dtype: torch.dtype, features: int) -> str:
    if dtype == torch.float32:
        return "float32"
    # Below four wide tiles, a last tile that is more than half empty costs more than narrow tiles do.
    return "narrow" if features <= 64 or (features < 512 and 0 < features % 128 <= 64) else "wide"


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
