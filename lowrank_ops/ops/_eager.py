"""Whether a call needs PyTorch's dispatcher at all: going through it costs more than a small product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def undisturbed(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing with this call but hand it to the op's kernel.

    False under ``torch.compile``, tracing, profiling, autocast, any dispatch or function mode, transform or
    forward-mode differentiation, wherever a gradient is wanted, and for all but plain dense tensors on a CPU or CUDA
    device.

    Args:
        x: the op's input, which names the device; the others share it.
        others: the op's other tensors.
    """
    if torch.compiler.is_compiling() or not (x.is_cpu or x.is_cuda) or x.is_nested:
        return False
    wants_gradients = torch.is_grad_enabled()
    for tensor in (x, *others):
        if tensor is not None and (
            type(tensor) not in _PLAIN
            or tensor.layout is not torch.strided
            or tensor.is_neg()  # a view whose sign is still to be flipped
            or (wants_gradients and tensor.requires_grad)
        ):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
    )
