"""Which calls need nothing of PyTorch's dispatcher, and what has been decided about calls like them.

Going through the dispatcher costs more than a small product, and so does finding out anew what to do with a call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
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

_PLAIN = frozenset((Tensor, Parameter))
_STRIDED = torch.strided


def undisturbed(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing with this call but record its gradient and hand it to the op's kernel.

    False under ``torch.compile``, tracing, profiling, autocast, any dispatch or function mode, transform or
    forward-mode differentiation, and for all but plain dense tensors on a CPU or CUDA device. Factors whose sign is
    still to be flipped pass: torch's own products flip it, and before a kernel reads them it has to be done.
    """
    return not (
        is_compiling()  # before anything that a trace could not look into
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


def wants_gradient(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd is to record this call."""
    return torch.is_grad_enabled() and (
        x.requires_grad or down.requires_grad or up.requires_grad or (bias is not None and bias.requires_grad)
    )


def outlived(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether one of them was made by a transform that is over; ``torch.autograd.Function.apply`` would unwrap it."""
    return (
        is_functorch_wrapped_tensor(x)
        or is_functorch_wrapped_tensor(down)
        or is_functorch_wrapped_tensor(up)
        or (bias is not None and is_functorch_wrapped_tensor(bias))
    )


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is on, for which custom ops have no rules.

    The op would refuse the former with words about its inside, and would silently drop the latter's tangents.
    """
    return not is_compiling() and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0)


def in_memory(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether all have strides and an address: sparse and MKL-DNN tensors have not, nor what outlived its transform."""
    given = (x, down, up) if bias is None else (x, down, up, bias)
    return all(tensor.layout is _STRIDED for tensor in given) and not outlived(x, down, up, bias)


class Decisions(dict[Hashable, Callable[..., Any]]):
    """What to call for calls of a kind; past ``most`` kinds the oldest is forgotten."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, kind: Hashable, function: Callable[..., Any]) -> None:
        while len(self) >= self.most:
            try:
                self.pop(next(iter(self)), None)
            except (RuntimeError, StopIteration):  # another thread was here between the two
                continue
        super().__setitem__(kind, function)
