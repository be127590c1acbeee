"""Runs ``lowrank_linear`` with Triton kernels: what they support, when ``auto`` prefers them, and their launches.

Tiles are chosen in ``_triton_config``; the kernels are in ``_triton_decode_kernels`` and ``_triton_prefill_kernels``.
Triton is imported by the first launch, so that this module loads where Triton is not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _triton_device
from ._triton_config import (
    MAX_DECODE_TOKENS,
    MAX_PREFILL_RANK,
    DecodeConfig,
    PrefillConfig,
    decode_config,
    prefill_config,
    refusal,
    tuned_implementation,
    vector,
)

if TYPE_CHECKING:
    from .._backend import Device
    from . import Problem

_MAX_STRIDE = 2**22  # offsets inside a tile, of up to 512 rows, are 32-bit
_SUM_BLOCK = 1024

_Launcher = Callable[..., None]  # launches the kernels on (x, down, up, bias, y, down_scale, up_scale)


def supports_decode(problem: Problem, config: DecodeConfig | None = None) -> str | None:
    """None if the decode kernels run ``problem`` (with ``config`` or their own choice), else the reason."""
    reason = _unsupported(problem)
    if reason is None and problem.tokens > MAX_DECODE_TOKENS:
        reason = f"takes at most {MAX_DECODE_TOKENS} rows of x; this x has {problem.tokens}"
    if reason is not None:
        return reason
    config = config or decode_config(problem)
    return unfenced(config, problem.device) or refusal(config, problem)


def supports_prefill(problem: Problem, config: PrefillConfig | None = None) -> str | None:
    """None if the prefill kernel runs ``problem`` (with ``config`` or its own choice), else the reason."""
    reason = _unsupported(problem)
    if reason is None and problem.rank > MAX_PREFILL_RANK:
        reason = f"keeps ranks up to {MAX_PREFILL_RANK} on chip; this rank is {problem.rank}"
    if reason is None and config is not None and config.rank < problem.rank:
        reason = f"this configuration covers ranks up to {config.rank}; this rank is {problem.rank}"
    if reason is not None:
        return reason
    config = config or prefill_config(problem)
    return unfenced(config, problem.device) or refusal(config, problem)


def unfenced(config: DecodeConfig | PrefillConfig | None, device: Device) -> str | None:
    """Why tiles that this Triton loads by cp.async must not be multiplied on ``device``, or None.

    Up to 32 rows of weights Triton multiplies by mma.sync, which needs no fence.
    """
    if isinstance(config, DecodeConfig) and max(config.block_r, config.block_n) < 64:
        return None
    return _triton_device.lacks_proxy_fence(device.type, device.capability)


def prefers_decode(problem: Problem) -> bool:
    """Below the break-even rank: decode is bound by weight bytes, and the factors have fewer than the dense weight."""
    return _preferred("triton.decode", problem)


def prefers_prefill(problem: Problem) -> bool:
    """Below the break-even rank: one kernel that keeps t on chip saves a launch and a round trip of t to memory."""
    return _preferred("triton.prefill", problem)


def plan_decode(problem: Problem) -> str:
    """The name of the kernels for 8-bit factors; for others that of the implementation says all."""
    return _eight_bit("triton.decode", problem)


def plan_prefill(problem: Problem) -> str:
    """The name of the kernel for 8-bit factors; for others that of the implementation says all."""
    return _eight_bit("triton.prefill", problem)


def _eight_bit(name: str, problem: Problem) -> str:
    """``triton.decode.int8.float8_e4m3fn``: a kernel of its own for each pair of formats of down and up."""
    forms = (problem.down_format, problem.up_format)
    formats = [str(form[0] if form else problem.dtype).removeprefix("torch.") for form in forms]
    return ".".join([name, *formats]) if problem.scaled else ""


def run_decode(
    problem: Problem,
    x: Tensor,  # (..., in_features)
    down: Tensor,  # (rank, in_features)
    up: Tensor,  # (out_features, rank)
    bias: Tensor | None,  # (out_features,)
    activation: str,
    config: DecodeConfig | None = None,
    *,
    down_scale: Tensor | None = None,  # (rank,)
    up_scale: Tensor | None = None,  # (out_features,)
) -> Tensor:  # (..., out_features)
    """Run ``problem`` with the decode kernels, with ``config`` or the configuration chosen for it."""
    return _bind(problem, _decode_launcher, config)(x, down, up, bias, down_scale, up_scale)


def run_prefill(
    problem: Problem,
    x: Tensor,  # (..., in_features)
    down: Tensor,  # (rank, in_features)
    up: Tensor,  # (out_features, rank)
    bias: Tensor | None,  # (out_features,)
    activation: str,
    config: PrefillConfig | None = None,
    *,
    down_scale: Tensor | None = None,  # (rank,)
    up_scale: Tensor | None = None,  # (out_features,)
) -> Tensor:  # (..., out_features)
    """Run ``problem`` with the prefill kernel, with ``config`` or the configuration chosen for it."""
    return _bind(problem, _prefill_launcher, config)(x, down, up, bias, down_scale, up_scale)


def bind_decode(problem: Problem) -> Callable[..., Tensor]:
    """:func:`run_decode` for ``problem`` as a function of (x, down, up, bias) and the scales of 8-bit factors."""
    return _bind(problem, _decode_launcher)


def bind_prefill(problem: Problem) -> Callable[..., Tensor]:
    """:func:`run_prefill` for ``problem`` as a function of (x, down, up, bias) and the scales of 8-bit factors."""
    return _bind(problem, _prefill_launcher)


def _bind(problem: Problem, make_launcher: Callable[..., _Launcher], *config: Any) -> Callable[..., Tensor]:
    out_features, device = problem.out_features, problem.device
    if not problem.tokens:
        return lambda x, *others: x.new_empty((*x.shape[:-1], out_features))
    launcher = make_launcher(problem, *config)

    def run(
        x: Tensor,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        down_scale: Tensor | None = None,
        up_scale: Tensor | None = None,
    ) -> Tensor:
        y = x.new_empty((*x.shape[:-1], out_features))
        _on_device(device, launcher, x, down, up, bias, y, down_scale, up_scale)
        return y

    return run


class _Launch:
    """A kernel with its grid and all arguments but the pointers bound.

    Triton's launch specializes on every argument in Python, which takes longer than these kernels run. Sizes are bound
    here. If pointers are known to be aligned, every launch has the same specialization, so that the first one's
    compiled kernel is called directly afterwards. If they may be unaligned, Triton specializes each launch.
    """

    __slots__ = ("_bound", "_grid", "_kernel", "_options", "_reuse_compiled", "_run")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        sizes: tuple[int, ...],
        constants: tuple[Any, ...],
        reuse_compiled: bool,
        **options: Any,
    ) -> None:
        self._kernel, self._grid, self._bound = kernel, grid, (*sizes, *constants)
        self._reuse_compiled, self._options = reuse_compiled, options
        self._run: Callable[..., Any] | None = None

    def __call__(self, *pointers: Any) -> None:
        if self._run is not None:
            self._run(*pointers, *self._bound)
            return
        compiled = self._kernel[self._grid](*pointers, *self._bound, **self._options)
        if self._reuse_compiled and compiled is not None:
            self._run = compiled[self._grid]


@functools.lru_cache(maxsize=4096)
def _decode_launcher(problem: Problem, config: DecodeConfig | None = None) -> _Launcher:
    """The launcher of the decode kernels for ``problem``."""
    from . import _triton_decode_kernels as kernels

    config = config or decode_config(problem)
    unit, pdl = vector(problem), _has_pdl(problem.device)
    options = {"launch_pdl": True} if pdl else {}
    tokens, rank, slices = problem.tokens, problem.rank, config.slices
    in_units, rank_units, out_units = problem.in_features // unit, rank // unit, problem.out_features // unit
    down_k_contiguous, down_stride = _layout(problem.down_strides)
    up_r_contiguous, up_stride = _layout(problem.up_strides)
    token_blocks = -(-tokens // config.block_m)
    slice_blocks = -(-problem.in_features // (config.block_k * slices))
    launch_down = _Launch(
        kernels.down_kernel,
        (-(-rank // config.block_r), slices, token_blocks),
        (tokens, in_units, rank_units, problem.x_stride // unit, down_stride // unit, slice_blocks),
        (unit, down_k_contiguous, problem.down_format is not None, config.block_m, config.block_r, config.block_k, pdl),
        problem.aligned,
        num_warps=config.down_warps,
        num_stages=config.down_stages,
    )
    scaled = problem.up_format is not None
    up_slices = slices if config.fold else 1
    tiles = (config.block_m, config.block_n, config.slab, config.rest, pdl)
    launch_up = _Launch(
        kernels.up_kernel,
        (-(-problem.out_features // config.block_n), token_blocks, 1),
        (tokens, rank_units, out_units, up_stride // unit),
        (unit, up_r_contiguous, scaled, up_slices, problem.has_bias, problem.activation, *tiles),
        problem.aligned,
        num_warps=config.up_warps,
        num_stages=config.up_stages,
        **options,
    )
    if slices == 1 or config.fold:
        partial_dtype = torch.float32 if config.fold else problem.dtype

        def launch_two(
            x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor, *scales: Tensor | None
        ) -> None:
            down_scale, up_scale = scales or (None, None)
            partial = torch.empty((slices, tokens, rank), dtype=partial_dtype, device=x.device)
            launch_down(x, down, _vector_or(x, down_scale), partial)
            launch_up(partial, up, _vector_or(x, up_scale), _vector_or(x, bias), y)

        return launch_two

    launch_sum = _Launch(
        kernels.sum_kernel,
        (-(-tokens * rank // _SUM_BLOCK), 1, 1),
        (tokens * rank // unit,),
        (unit, slices, _SUM_BLOCK, pdl),
        problem.aligned,
        num_warps=4,
        **options,
    )

    def launch_three(
        x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor, *scales: Tensor | None
    ) -> None:
        down_scale, up_scale = scales or (None, None)
        partial = torch.empty((slices, tokens, rank), dtype=torch.float32, device=x.device)
        t = torch.empty((tokens, rank), dtype=x.dtype, device=x.device)
        launch_down(x, down, _vector_or(x, down_scale), partial)
        launch_sum(partial, t)
        launch_up(t, up, _vector_or(x, up_scale), _vector_or(x, bias), y)

    return launch_three


@functools.lru_cache(maxsize=4096)
def _prefill_launcher(problem: Problem, config: PrefillConfig | None = None) -> _Launcher:
    """The launcher of the prefill kernel for ``problem``."""
    from ._triton_prefill_kernels import prefill_kernel

    config = config or prefill_config(problem)
    assert config is not None, "supports_prefill refuses a problem without a configuration"
    unit = vector(problem)
    down_k_contiguous, down_stride = _layout(problem.down_strides)
    up_r_contiguous, up_stride = _layout(problem.up_strides)
    work = -(-problem.tokens // config.block_m) * config.parts
    pieces, stages = (config.piece_0, config.piece_1), (config.stages_k, config.stages_n)
    tiles = (config.block_m, config.block_n, config.block_k, *pieces, *stages)
    scaled = (problem.down_format is not None, problem.up_format is not None)
    sizes = (problem.in_features, problem.rank, problem.out_features, problem.x_stride, down_stride, up_stride)
    launch = _Launch(
        prefill_kernel,
        (min(work, problem.device.sm_count or 1), 1, 1),
        (problem.tokens, *(size // unit for size in sizes), config.parts),
        (unit, down_k_contiguous, up_r_contiguous, *scaled, problem.has_bias, problem.activation, *tiles),
        problem.aligned,
        num_warps=config.warps,
        num_stages=config.stages_k,
    )

    def run(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor, *scales: Tensor | None) -> None:
        down_scale, up_scale = scales or (None, None)
        launch(x, down, _vector_or(x, down_scale), up, _vector_or(x, up_scale), _vector_or(x, bias), y)

    return run


def _vector_or(x: Tensor, vector: Tensor | None) -> Tensor:
    """The contiguous bias or scale, or ``x`` as a pointer that the kernel does not load from."""
    return x if vector is None else vector.resolve_neg().contiguous()


def _on_device(device: Device, launcher: _Launcher, *tensors: Tensor | None) -> None:
    """Launch with ``device`` as the current device: Triton launches there."""
    if device.type != "cuda" or torch.cuda.current_device() == device.ordinal:
        launcher(*tensors)
    else:
        with torch.cuda.device(device.ordinal):
            launcher(*tensors)


def _unsupported(problem: Problem) -> str | None:
    """The requirements that all kernels share."""
    reason = _triton_device.unavailable(problem.device.type, problem.device.capability)
    if reason is not None:
        return reason
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16; this x is {problem.dtype}"
    formats = [form[0] for form in (problem.down_format, problem.up_format) if form is not None]
    before_fp8 = torch.version.hip is not None or problem.device.capability < (8, 9)
    if torch.float8_e4m3fn in formats and problem.device.type == "cuda" and before_fp8:
        return "casts float8_e4m3fn factors on CUDA devices of compute capability 8.9 or newer only; use int8"
    if not (problem.in_features and problem.rank and problem.out_features):
        return "takes no empty factors"
    if problem.x_stride == 0:
        return "takes x with unit column stride whose leading dimensions merge into one"
    if 1 not in problem.down_strides or 1 not in problem.up_strides:
        return f"takes down and up with one stride of 1; theirs are {problem.down_strides} and {problem.up_strides}"
    if max(problem.x_stride, problem.out_features, *problem.down_strides, *problem.up_strides) >= _MAX_STRIDE:
        return f"takes row strides of x, y, down and up below {_MAX_STRIDE} elements"
    return None


def _preferred(name: str, problem: Problem) -> bool:
    if problem.device.type != "cuda" or vector(problem) != 8:
        return False
    fastest = tuned_implementation(problem)
    if fastest is not None:
        return fastest == name
    factors = problem.rank * (problem.in_features + problem.out_features)
    return factors < problem.in_features * problem.out_features


def _has_pdl(device: Device) -> bool:
    """Whether the device supports programmatic dependent launch."""
    return device.type == "cuda" and torch.version.hip is None and device.capability >= (9, 0)


def _layout(strides: tuple[int, ...]) -> tuple[bool, int]:
    """Whether the columns are contiguous, and the stride of the other dimension."""
    return (True, strides[0]) if strides[1] == 1 else (False, strides[1])
