"""Decides when an eager call may bypass PyTorch's dispatcher, and registers autocast for calls that go through it.

The dispatcher costs more than a small GEMM. A call that needs none of its features runs its implementation directly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_PLAIN = frozenset((Tensor, Parameter))
_STRIDED = torch.strided
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_bypass(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether the dispatcher would only record a gradient and call the op's kernel.

    False under ``torch.compile``, tracing, profiling, autocast, any dispatch or function mode, ``torch.func`` transform
    or forward-mode differentiation, and for all but plain strided tensors on a CPU or CUDA device. Factors and bias may
    have the negative bit set: the caller resolves it before a kernel reads them.
    """
    return not (
        is_compiling()  # first: Dynamo cannot trace the checks below
        or type(x) not in _PLAIN
        or type(down) not in _PLAIN
        or type(up) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or not (x.is_cpu or x.is_cuda)
        or x.layout is not _STRIDED
        or x.is_nested
        or x.is_neg()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _is_tracing()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _profiler_enabled()
        or _is_any_autocast_enabled()
    )


def is_exporting() -> bool:
    """As ``torch.compiler.is_exporting``, which Dynamo of torch 2.10 takes for true in ``torch.compile`` as well."""
    return torch.compiler._is_exporting_flag


def is_recorded(free: bool = True) -> bool:
    """Whether a trace of ``torch.jit`` or ``torch.export`` is to record torch's own ops instead of a custom one.

    Programs are to run where the custom op is not known. An export records the custom op only if a backend was named,
    not if the choice is ``free``.
    """
    return is_exporting() and free if is_compiling() else torch.jit.is_tracing()


def all_plain(*lists: Sequence[Tensor]) -> bool:
    """Whether :func:`can_bypass` finds nothing in these tensors either."""
    return all(
        type(tensor) in _PLAIN and tensor.layout is _STRIDED and not tensor.is_neg()
        for part in lists
        for tensor in part
    )


def needs_grad(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd must record this call."""
    return torch.is_grad_enabled() and (
        x.requires_grad or down.requires_grad or up.requires_grad or (bias is not None and bias.requires_grad)
    )


def has_functorch_wrapper(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether a tensor is the wrapper of a ``torch.func`` transform. Outside of one, that transform has ended."""
    return (
        is_functorch_wrapped_tensor(x)
        or is_functorch_wrapped_tensor(down)
        or is_functorch_wrapped_tensor(up)
        or (bias is not None and is_functorch_wrapped_tensor(bias))
    )


def in_transform() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is active. Custom ops have no rules for them.

    The op would fail in the first with an internal error and silently drop tangents in the second.
    """
    return not is_compiling() and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0)


def all_strided(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether all tensors have strides and a data pointer. Sparse, MKL-DNN and functorch-wrapped tensors have none."""
    tensors = (x, down, up) if bias is None else (x, down, up, bias)
    return all(tensor.layout is _STRIDED for tensor in tensors) and not has_functorch_wrapper(x, down, up, bias)


class BoundedCache(dict[Hashable, Any]):
    """A dict of at most ``max_size`` entries that evicts the oldest. Safe to use from several threads."""

    def __init__(self, max_size: int) -> None:
        super().__init__()
        self.max_size = max_size

    def __setitem__(self, key: Hashable, value: Any) -> None:
        while len(self) >= self.max_size:
            try:
                self.pop(next(iter(self)), None)
            except (RuntimeError, StopIteration):  # another thread changed the dict between the two calls
                continue
        super().__setitem__(key, value)


def detached_view(y: Tensor) -> Tensor:
    """``y``, detached from its base: autograd forbids in-place ops on a view that a Function returns.

    ``F.linear`` returns a view for x of three dimensions.
    """
    return y.data if y._is_view() else y


def count_flops(op: Any, formula: Callable[..., int]) -> None:
    """Give active FlopCounterModes a formula for an op.

    Not registered at import, because ``torch.utils.flop_counter`` imports Triton.
    """
    if "torch.utils.flop_counter" in sys.modules:
        for mode in _get_current_dispatch_mode_stack():
            registry = getattr(getattr(mode, "counter", mode), "flop_registry", None)
            if registry is not None:
                registry.setdefault(op, formula)


def register_autocast(lib: torch.library.Library, name: str, *, cast: bool, first: int | None = None) -> None:
    """Register ``name`` for autocast. The kernel then runs with autocast off.

    Args:
        lib: the library that defines the op.
        name: of the op.
        cast: True casts the inputs to autocast's dtype, as for ``linear``. False leaves them, for ops that accumulate
            in float32 or float64.
        first: cast only so many arguments; those after them are scales, which stay float32.
    """
    for device, key in _AUTOCAST_KEYS.items():
        lib.impl(name, _autocast_kernel(getattr(torch.ops.lowrank_ops, name), device, cast, first), key)


def _autocast_kernel(op: Callable[..., Any], device: str, cast: bool, first: int | None) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        if cast:
            dtype = torch.get_autocast_dtype(device)
            args = (*(_cast(value, dtype) for value in args[:first]), *args[len(args[:first]) :])
        with torch.autocast(device, enabled=False):
            return op(*args, **options)

    return run


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(part, dtype) for part in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in _AUTOCAST_DTYPES else value
