"""Computes ``lowrank_linear`` with library GEMMs on any device: two thin ones, or one dense one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}

_ACTIVATION_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "gelu": lambda grad, y: torch.ops.aten.gelu_backward(grad, y),
    "gelu_tanh": lambda grad, y: torch.ops.aten.gelu_backward(grad, y, approximate="tanh"),
    "silu": lambda grad, y: torch.ops.aten.silu_backward(grad, y),
}


def two_products(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation((x down^T) up^T + bias)`` with two GEMMs; the bias is in the second one's epilogue."""
    return ACTIVATIONS[activation](F.linear(F.linear(x, down), up, bias))


def dense(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The same with ``up down`` formed first: fewer FLOPs above the break-even rank when there are many tokens."""
    return ACTIVATIONS[activation](F.linear(x, up @ down, bias))


def bind(implementation: Callable[..., Tensor], activation: str) -> Callable[..., Tensor]:
    """``two_products`` or ``dense`` as a function of the tensors alone."""
    if activation != "none":
        return lambda x, down, up, bias: implementation(x, down, up, bias, activation)
    # The most frequent call, without the lookup of an activation.
    linear = F.linear
    if implementation is two_products:
        return lambda x, down, up, bias: linear(linear(x, down), up, bias)
    return lambda x, down, up, bias: linear(x, up @ down, bias)


def activation_backward(grad: Tensor, preactivation: Tensor, activation: str) -> Tensor:
    """The gradient at the input of ``activation``."""
    return _ACTIVATION_BACKWARD[activation](grad, preactivation)
