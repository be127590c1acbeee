"""The Triton implementations of the low-rank product: what they can run, when they should, and how they are launched.

Triton itself is imported by the first launch, so that this module is there, and says why not, where Triton is not.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._specialization import Specialization
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

_MAX_STRIDE = 2**22  # offsets inside a tile, of up to 512 rows, are 32 bits wide
_SUM_BLOCK = 1024


def supports_decode(problem: Problem, config: DecodeConfig | None = None) -> str | None:
    """Why the kernels for few rows cannot run ``problem`` (with ``config``, or the one they would take), or None."""
    reason = _refusal(problem)
    if reason is None and problem.tokens > MAX_DECODE_TOKENS:
        reason = f"takes at most {MAX_DECODE_TOKENS} rows of x; this x has {problem.tokens}"
    return reason or refusal(config or decode_config(problem), problem)


def supports_prefill(problem: Problem, config: PrefillConfig | None = None) -> str | None:
    """Why the kernel for many rows cannot run ``problem`` (with ``config``, or the one it would take), or None."""
    reason = _refusal(problem)
    if reason is None and problem.rank > MAX_PREFILL_RANK:
        reason = f"keeps ranks up to {MAX_PREFILL_RANK} on chip; this rank is {problem.rank}"
    if reason is None and config is not None and config.rank < problem.rank:
        reason = f"this configuration covers ranks up to {config.rank}; this rank is {problem.rank}"
    return reason or refusal(config or prefill_config(problem), problem)


def prefers_decode(problem: Problem) -> bool:
    """Below break-even the thin factors are fewer bytes than the dense weight, and bytes are what decoding costs."""
    return _worth_it("triton.decode", problem)


def prefers_prefill(problem: Problem) -> bool:
    """Up to the ranks whose t stays on chip one kernel saves a launch and the way of t through memory."""
    return _worth_it("triton.prefill", problem)


def run_decode(
    problem: Problem,
    x: Tensor,  # (..., in_features)
    down: Tensor,  # (rank, in_features)
    up: Tensor,  # (out_features, rank)
    bias: Tensor | None,  # (out_features,)
    activation: str,
    config: DecodeConfig | None = None,
) -> Tensor:  # (..., out_features)
    """``lowrank_linear`` for few rows of x, described by ``problem``, by ``config`` or the one chosen for it."""
    y = x.new_empty((*x.shape[:-1], problem.out_features))
    if problem.tokens:
        _on_device(problem.device, _decode_plan(problem, config), x, down, up, bias, y)
    return y


def run_prefill(
    problem: Problem,
    x: Tensor,  # (..., in_features)
    down: Tensor,  # (rank, in_features)
    up: Tensor,  # (out_features, rank)
    bias: Tensor | None,  # (out_features,)
    activation: str,
    config: PrefillConfig | None = None,
) -> Tensor:  # (..., out_features)
    """``lowrank_linear`` for many rows of x, described by ``problem``, by ``config`` or the one chosen for it."""
    y = x.new_empty((*x.shape[:-1], problem.out_features))
    if problem.tokens:
        _on_device(problem.device, _prefill_plan(problem, config), x, down, up, bias, y)
    return y


def bind_decode(problem: Problem) -> Callable[..., Tensor]:
    """``run_decode`` with all that ``problem`` decides done, a function of (x, down, up, bias)."""
    return _bound(problem, _decode_plan)


def bind_prefill(problem: Problem) -> Callable[..., Tensor]:
    """``run_prefill`` likewise."""
    return _bound(problem, _prefill_plan)


def _bound(problem: Problem, make_plan: Callable[[Problem], Callable[..., None]]) -> Callable[..., Tensor]:
    out_features, device = problem.out_features, problem.device
    if not problem.tokens:
        return lambda x, down, up, bias: x.new_empty((*x.shape[:-1], out_features))
    plan = make_plan(problem)

    def run(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty((*x.shape[:-1], out_features))
        _on_device(device, plan, x, down, up, bias, y)
        return y

    return run


class _Launch:
    """A kernel with its grid and everything but the pointers bound.

    Triton's own launch looks at every argument to find the compiled form, which costs more time than these kernels
    run. Sizes are bound here and pointers known to start on 16 bytes, so that after the first launch the compiled form
    is known too. Where pointers may be unaligned, Triton looks each time.
    """

    __slots__ = ("_bound", "_grid", "_kernel", "_options", "_run", "_same_form")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        sizes: tuple[int, ...],
        constants: tuple[Any, ...],
        same_form: bool,
        **options: Any,
    ) -> None:
        self._kernel, self._grid, self._bound = kernel, grid, (*sizes, *constants)
        self._same_form, self._options = same_form, options
        self._run: Callable[..., Any] | None = None

    def __call__(self, *pointers: Any) -> None:
        if self._run is not None:
            self._run(*pointers, *self._bound)
            return
        compiled = self._kernel[self._grid](*pointers, *self._bound, **self._options)
        if self._same_form and compiled is not None:
            self._run = compiled[self._grid]


@functools.lru_cache(maxsize=4096)
def _decode_plan(problem: Problem, config: DecodeConfig | None = None) -> Callable[..., None]:
    """A function of (x, down, up, bias, y) that launches the decode kernels for ``problem``."""
    from . import _triton_decode as kernels

    config = config or decode_config(problem)
    unit, pdl = vector(problem), _overlaps(problem.device)
    overlap = {"launch_pdl": True} if pdl else {}
    tokens, rank, slices = problem.tokens, problem.rank, config.slices
    columns, ranks, rows = problem.in_features // unit, rank // unit, problem.out_features // unit
    down_along_k, down_stride = _layout(problem.down_strides)
    up_along_r, up_stride = _layout(problem.up_strides)
    token_blocks = -(-tokens // config.block_m)
    slice_blocks = -(-problem.in_features // (config.block_k * slices))
    launch_down = _Launch(
        kernels.down_kernel,
        (-(-rank // config.block_r), slices, token_blocks),
        (tokens, columns, ranks, problem.x_stride // unit, down_stride // unit, slice_blocks),
        (unit, down_along_k, config.block_m, config.block_r, config.block_k, pdl),
        problem.aligned,
        num_warps=config.down_warps,
        num_stages=config.down_stages,
    )
    tiles = (config.block_m, config.block_n, config.slab, config.rest, pdl)
    launch_up = _Launch(
        kernels.up_kernel,
        (-(-problem.out_features // config.block_n), token_blocks, 1),
        (tokens, ranks, rows, up_stride // unit),
        (unit, up_along_r, slices if config.fold else 1, problem.has_bias, problem.activation, *tiles),
        problem.aligned,
        num_warps=config.up_warps,
        num_stages=config.up_stages,
        **overlap,
    )
    if slices == 1 or config.fold:
        partial_dtype = torch.float32 if config.fold else problem.dtype

        def run_pair(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor) -> None:
            partial = torch.empty((slices, tokens, rank), dtype=partial_dtype, device=x.device)
            launch_down(x, down, partial)
            launch_up(partial, up, _or_else(bias, x), y)

        return run_pair

    launch_sum = _Launch(
        kernels.sum_kernel,
        (-(-tokens * rank // _SUM_BLOCK), 1, 1),
        (tokens * rank // unit,),
        (unit, slices, _SUM_BLOCK, pdl),
        problem.aligned,
        num_warps=4,
        **overlap,
    )

    def run_triple(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor) -> None:
        partial = torch.empty((slices, tokens, rank), dtype=torch.float32, device=x.device)
        t = torch.empty((tokens, rank), dtype=x.dtype, device=x.device)
        launch_down(x, down, partial)
        launch_sum(partial, t)
        launch_up(t, up, _or_else(bias, x), y)

    return run_triple


@functools.lru_cache(maxsize=4096)
def _prefill_plan(problem: Problem, config: PrefillConfig | None = None) -> Callable[..., None]:
    """A function of (x, down, up, bias, y) that launches the prefill kernel for ``problem``."""
    from ._triton_prefill import prefill_kernel

    config = config or prefill_config(problem)
    assert config is not None, "supports_prefill refuses a problem without a configuration"
    unit = vector(problem)
    down_along_k, down_stride = _layout(problem.down_strides)
    up_along_r, up_stride = _layout(problem.up_strides)
    programs = -(-problem.tokens // config.block_m) * config.parts
    pieces, stages = (config.piece_0, config.piece_1), (config.stages_k, config.stages_n)
    tiles = (config.block_m, config.block_n, config.block_k, *pieces, *stages)
    sizes = (problem.in_features, problem.rank, problem.out_features, problem.x_stride, down_stride, up_stride)
    launch = _Launch(
        prefill_kernel,
        (min(programs, problem.device.multiprocessors or 1), 1, 1),
        (problem.tokens, *(size // unit for size in sizes), config.parts),
        (unit, down_along_k, up_along_r, problem.has_bias, problem.activation, *tiles),
        problem.aligned,
        num_warps=config.warps,
        num_stages=config.stages_k,
    )

    def run(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, y: Tensor) -> None:
        launch(x, down, up, _or_else(bias, x), y)

    return run


def _or_else(bias: Tensor | None, x: Tensor) -> Tensor:
    """The bias as the kernels read it, or a pointer that they will not."""
    return x if bias is None else bias.contiguous()


def _on_device(device: Device, plan: Callable[..., None], *tensors: Tensor | None) -> None:
    """Run ``plan`` with ``device`` as the current one, which is where Triton launches."""
    if device.type != "cuda" or torch.cuda.current_device() == device.ordinal:
        plan(*tensors)
    else:
        with torch.cuda.device(device.ordinal):
            plan(*tensors)


def _refusal(problem: Problem) -> str | None:
    """What both kernels ask of a problem."""
    reason = _unavailable(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16; this x is {problem.dtype}"
    if not (problem.in_features and problem.rank and problem.out_features):
        return "takes no empty factors"
    if problem.x_stride == 0:
        return "takes x whose leading dimensions merge into one and whose features are neighbours in memory"
    if 1 not in problem.down_strides or 1 not in problem.up_strides:
        return f"takes down and up with one stride of 1; theirs are {problem.down_strides} and {problem.up_strides}"
    if max(problem.x_stride, problem.out_features, *problem.down_strides, *problem.up_strides) >= _MAX_STRIDE:
        return f"takes rows, of x, y, down and up, less than {_MAX_STRIDE} elements apart"
    return None


@functools.cache
def _unavailable(device: Device) -> str | None:
    """Why no Triton kernel can run on ``device``, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cuda" and (torch.version.hip or device.capability >= (8, 0)):
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET"):
        import triton

        if triton.knobs.runtime.interpret:
            return None
    where = f"has {device.capability[0]}.{device.capability[1]}" if device.type == "cuda" else f"is on {device.type}"
    return f"needs a CUDA device of compute capability 8.0 or newer; this tensor {where}"


def _worth_it(name: str, problem: Problem) -> bool:
    if problem.device.type != "cuda" or vector(problem) != 8:
        return False
    fastest = tuned_implementation(problem)
    if fastest is not None:
        return fastest == name
    thin = problem.rank * (problem.in_features + problem.out_features)
    return thin < problem.in_features * problem.out_features


def _overlaps(device: Device) -> bool:
    """Whether kernels can be launched before the one in front of them is done."""
    return device.type == "cuda" and torch.version.hip is None and device.capability >= (9, 0)


def _layout(strides: tuple[int, ...]) -> tuple[bool, int]:
    """Whether the columns are neighbours, and the stride of the other dimension."""
    return (True, strides[0]) if strides[1] == 1 else (False, strides[1])


def shipped(arch: int) -> list[Specialization]:
    """Every compiled form that ``auto`` may take on ``arch`` (80, 90 or 100), for offline compilation.

    Of forms that differ in the dtype, the activation or a bias only the most expensive one. Not among them are those
    for operands off 16 bytes: they load element by element and may spill, so that only ``backend="triton"`` takes them.
    """
    from ._triton_shipped import specializations

    return specializations(arch)
