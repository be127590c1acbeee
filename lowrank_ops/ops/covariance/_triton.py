"""Triton covariance updates: what they can run, with which configuration, and the launches.

Importing this module does not import Triton; the device code is in ``_triton_kernels`` and ``_triton_conv_kernels``.

float32 inputs are multiplied as three bfloat16 products (error below 2^-15 of the sum of ``|x_i x_j|``) or, with
``allow_tf32``, as one TensorFloat-32 product (below 2^-10). bfloat16 and float16 products are exact. Sums are taken in
float32 over at most ``CHUNK`` tokens, then in the state's dtype.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _tuning
from .._backend import Device
from .._specialization import Specialization

if TYPE_CHECKING:
    from . import Problem

CHUNK = 2048  # tokens summed in float32: longer chains lose bits of a large mean
REDUCE_ROWS, REDUCE_WARPS = 16, 8  # rows of a tile per program of the reduction, and its warps: with 4 some forms spill
MOST_SPLITS = 64

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TOKEN_LIMIT = 2**31 - 2**20  # token indices are 32-bit, and the last chunk may run past the end
_STRIDE_LIMIT = 2**23  # offsets inside a tile of the state are 32-bit


@dataclass(frozen=True)
class Config:
    """How one kernel is cut and compiled."""

    block_d: int  # the tile is block_d x block_d
    block_t: int  # tokens per step of the product
    num_warps: int
    num_stages: int
    group: int = 8  # tile rows that are walked together
    split: int = 0  # ways in which the tokens are split; 0: from the number of multiprocessors

    def shared_bytes(self, itemsize: int) -> int:
        """An upper bound of the shared memory per block."""
        operands = self.num_stages * 2 * self.block_t * self.block_d * itemsize
        epilogue = self.block_d * self.block_d // 4 * 8
        return max(operands, epilogue) + 2048


# Keyed by arch and kind of input: 16-bit inputs wide enough for 128 x 128 tiles, narrower ones, and float32.
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
    """All of a launch but its tensors."""

    split: int
    tile_rows: int
    tiles: int
    chunks: int  # per split
    length: int  # tokens per chunk
    block: tuple[int, int] | None  # of the tensor descriptor; None: loads through pointers
    vector: int
    config: Config
    constants: Mapping[str, Any]  # constexprs and compile options of the launch


@functools.cache
def interpreted() -> bool:
    """Whether Triton's CPU interpreter is on, which is decided when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def supports(problem: Problem) -> str | None:
    """None, or why the kernel cannot run ``problem``."""
    reason = unsupported_device(problem.device) or unsupported_dtype(problem.dtype)
    if reason is not None:
        return reason
    if problem.tokens == 0 or problem.features == 0:
        return None
    if problem.tokens > TOKEN_LIMIT:
        return f"x has {problem.tokens} tokens, more than {TOKEN_LIMIT}; split it"
    if problem.state_stride >= _STRIDE_LIMIT:
        return f"second_moment has rows {problem.state_stride} elements apart, not below {_STRIDE_LIMIT}"
    return unsupported_config(config_for(problem), problem.dtype, problem.device)


def prefers(problem: Any) -> bool:
    """``auto`` takes the kernel on a GPU only: the interpreter is for tests that ask for it."""
    return bool(problem.device.type == "cuda")


def run(problem: Problem, second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    """``covariance_update_`` for tensors that :func:`supports` accepts."""
    launch(plan(problem), second_moment, total, x, problem)


def launch(plan: Plan, second_moment: Tensor, total: Tensor, x: Tensor, problem: Problem) -> None:
    """Run ``plan``; apart from :func:`run` so that tests can choose the configuration."""
    if plan.block is None:
        source = x
    else:
        source = _descriptor()(x, [problem.tokens, problem.features], [problem.row_stride, 1], plan.block)
    partial = plan.constants["DEST"] == "partial"
    target, target_total = second_moment, total
    if partial:
        target, target_total = scratch(plan, 1, second_moment)
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
    """Room for the splits' tiles (splits, groups, tiles, block_d, block_d) and sums; every element gets written."""
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
    patch: tuple[int, int] = (1, 1),  # kernel area and channels per group, where the features are channels last
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
        second_moment.stride(0),
        second_moment.stride(1),
        second_moment.stride(2),
        total.stride(0),
        total.stride(1),
        patch[0],
        patch[1],
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
    """What was fastest for the nearest problem in the tuned table, by any backend, if one ships."""
    shape = {"tokens": problem.tokens, "features": problem.features, "dtype": DTYPES.get(problem.dtype)}
    return _tuning.nearest("covariance_update", f"sm{arch_of(problem.device)}", shape)


@functools.lru_cache(maxsize=8192)
def plan_with(problem: Problem, config: Config) -> Plan:
    """The launch for ``problem`` with a configuration of the caller's choice."""
    itemsize = problem.dtype.itemsize
    tma = has_tma(problem.device) and problem.aligned
    vector = 16 // itemsize
    if tma or not problem.aligned or problem.features % vector:
        vector = 1
    tile_rows = _ceil(problem.features, config.block_d)
    tiles = tile_rows * (tile_rows + 1) // 2
    split, chunks, length = cut_tokens(problem.tokens, tiles, problem.device.multiprocessors, config)
    constants = {
        "BLOCK_D": config.block_d,
        "BLOCK_T": config.block_t,
        "GROUP": config.group,
        "DEST": destination(split, problem.deterministic),
        "PRODUCT": product(problem.dtype, problem.allow_tf32),
        "TMA": tma,
        "VECTOR": vector,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    block = (config.block_t, config.block_d) if tma else None
    return Plan(split, tile_rows, tiles, chunks, length, block, vector, config, constants)


def cut_tokens(tokens: int, tiles: int, multiprocessors: int, config: Config) -> tuple[int, int, int]:
    """Splits, chunks per split and tokens per chunk."""
    split = config.split or _best_split(tokens, tiles, max(multiprocessors, 1), config.block_t)
    span = _ceil(tokens, split)
    chunks = _ceil(span, CHUNK)
    length = _ceil(_ceil(span, chunks), config.block_t) * config.block_t
    return split, chunks, length


def _best_split(tokens: int, tiles: int, multiprocessors: int, block_t: int) -> int:
    # In units of one step of the product: a program's start and epilogue cost about 8 steps, the reduction a launch
    # (about 6) and the traffic of the partial tiles.
    def cost(split: int) -> float:
        waves = _ceil(tiles * split, multiprocessors)
        return waves * (_ceil(tokens, split * block_t) + 8) + (6 + 0.09 * tiles * split if split > 1 else 0)

    most = min(MOST_SPLITS, max(1, tokens // (4 * block_t)))
    return min(range(1, most + 1), key=cost)


def destination(split: int, deterministic: bool) -> str:
    """Where a program's sums go; the names are those of the kernels' DEST."""
    if split == 1:
        return "state"
    return "partial" if deterministic else "atomic"


def product(dtype: torch.dtype, allow_tf32: bool) -> str:
    """How a pair of elements is multiplied; the names are those of the kernels' PRODUCT."""
    if dtype != torch.float32:
        return "exact"
    return "tf32" if allow_tf32 and torch.version.hip is None else "bf16x3"


def arch_of(device: Device) -> int:
    """The arch whose configurations fit: consumer parts run those of sm_80, as does the interpreter those of sm_90."""
    if device.type != "cuda":
        return 90
    major = device.capability[0]
    return {9: 90, 10: 100}.get(major, 80) if torch.version.hip is None else 80


def has_tma(device: Device) -> bool:
    return arch_of(device) >= 90


def unsupported_device(device: Device) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"needs a CUDA device of compute capability 8.0 or newer; this tensor is on {device.type}"
    if device.type == "cuda" and device.capability < (8, 0):
        major, minor = device.capability
        return f"needs a CUDA device of compute capability 8.0 or newer; this one has {major}.{minor}"
    return _missing_triton()


def unsupported_dtype(dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"x is {dtype}; the Triton kernels take bfloat16, float16 and float32"
    return None


def unsupported_config(config: Config, dtype: torch.dtype, device: Device) -> str | None:
    need = config.shared_bytes(dtype.itemsize)
    if device.type == "cuda" and need > device.shared_memory:
        return f"the kernel needs {need} bytes of shared memory per block; this device has {device.shared_memory}"
    return None


@functools.cache
def _missing_triton() -> str | None:
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"triton is not installed: {error}"
    return None


@functools.cache
def device_code() -> ModuleType:
    from . import _triton_kernels

    return _triton_kernels


@functools.cache
def _descriptor() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


class _Here:
    """A context that does nothing, without contextlib's generator."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


_HERE = _Here()


def on_device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of ``x``."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def _kind(dtype: torch.dtype, features: int) -> str:
    if dtype == torch.float32:
        return "float32"
    # Below four wide tiles a last one that is more than half empty costs more than narrow tiles do.
    return "narrow" if features <= 64 or (features < 512 and 0 < features % 128 <= 64) else "wide"


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def shipped(arch: int) -> list[Specialization]:
    """Every configuration that ships for ``arch`` (80, 90 or 100), each in its heaviest forms.

    Aligned inputs and states ("even") and unaligned ones ("odd"); the destinations and state dtypes that differ in
    what they hold in registers.
    """
    listed = []
    for kind, config in _shipped_configs(arch):
        if kind == "float32":
            forms = [
                ("fp32", "bf16x3", "even", "state", "fp64"),
                ("fp32", "bf16x3", "odd", "partial", "fp32"),
                ("fp32", "tf32", "even", "state", "fp64"),
                ("fp32", "tf32", "odd", "partial", "fp32"),
            ]
        else:
            forms = [
                ("bf16", "exact", "even", "state", "fp64"),
                ("bf16", "exact", "even", "partial", "fp32"),
                ("bf16", "exact", "odd", "state", "fp32"),
            ]
        if kind == "wide":
            forms += [("bf16", "exact", "even", "atomic", "fp32"), ("fp16", "exact", "even", "state", "fp32")]
        listed += [_specialization(arch, config, *form) for form in forms]
    return listed + reductions(_shipped_configs(arch))


def _shipped_configs(arch: int) -> list[tuple[str, Config]]:
    configs = [(kind, config) for (of, kind), config in HEURISTIC.items() if of == arch]
    for entry in _tuning.load("covariance_update", f"sm{arch}"):
        tuned = _tuning.configured(entry, "triton", Config)
        if tuned is not None:
            configs.append(("float32" if entry["shape"]["dtype"] == "fp32" else "tuned", tuned))
    return list(dict.fromkeys(configs))


def reductions(configs: Iterable[tuple[str, Config]], channels_last: bool = False) -> list[Specialization]:
    """The reductions that follow kernels of ``configs``."""
    widths = sorted({config.block_d for _, config in configs})
    return [_reduction(state, block_d, channels_last) for block_d in widths for state in ("fp32", "fp64")]


def _specialization(
    arch: int, config: Config, dtype: str, product: str, alignment: str, dest: str, state: str
) -> Specialization:
    kernel = device_code().covariance_kernel
    even = alignment == "even"
    tma = even and arch >= 90
    aligned = ["state", "total", "state_stride", "length"] + ["x"] * (not tma) if even else ["length"]
    return Specialization(
        name=f"covariance {dtype} {product} {config.block_d}x{config.block_t} {alignment} {dest} {state}",
        kernel=kernel,
        signature={
            "x": f"tensordesc<{dtype}[{config.block_t}, {config.block_d}]>" if tma else f"*{dtype}",
            "state": f"*{state}",
            "total": f"*{state}",
            **dict.fromkeys(("tokens", "features", "row_stride", "state_stride", "chunks", "length"), "i32"),
        },
        constexprs={
            "state_column_stride": 1,
            "total_stride": 1,
            "BLOCK_D": config.block_d,
            "BLOCK_T": config.block_t,
            "GROUP": config.group,
            "DEST": dest,
            "PRODUCT": product,
            "TMA": tma,
            "VECTOR": (4 if dtype == "fp32" else 8) if even and not tma else 1,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tma=tma,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def _reduction(state: str, block_d: int, channels_last: bool = False) -> Specialization:
    kernel = device_code().reduce_kernel
    integers = ["features", "splits", "state_group_stride", "state_stride", "total_group_stride"]
    patch = ("kernel_area", "group_channels")
    if channels_last:
        integers += patch
    return Specialization(
        name=f"covariance reduce {block_d} {state}" + " channels last" * channels_last,
        kernel=kernel,
        signature={
            **dict.fromkeys(("partial", "partial_total", "state", "total"), f"*{state}"),
            **dict.fromkeys(integers, "i32"),
        },
        constexprs={
            "state_column_stride": 1,
            "total_stride": 1,
            **({} if channels_last else dict.fromkeys(patch, 1)),
            "BLOCK_D": block_d,
            "ROWS": REDUCE_ROWS,
            "GROUP": 8,
            "CHANNELS_LAST": channels_last,
        },
        num_warps=REDUCE_WARPS,
        num_stages=3,
        mma=False,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in ("partial", "partial_total")},
    )
