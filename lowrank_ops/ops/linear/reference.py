"""The low-rank product by library matrix products, and the activations of its epilogue."""

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

_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "gelu": lambda grad, y: torch.ops.aten.gelu_backward(grad, y),
    "gelu_tanh": lambda grad, y: torch.ops.aten.gelu_backward(grad, y, approximate="tanh"),
    "silu": lambda grad, y: torch.ops.aten.silu_backward(grad, y),
}


def two_products(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation((x down^T) up^T + bias)`` by two library products, the bias in the second."""
    return ACTIVATIONS[activation](F.linear(F.linear(x, down), up, bias))


def dense(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The same by one product with ``up down``: fewer operations past break-even and with many rows."""
    return ACTIVATIONS[activation](F.linear(x, up @ down, bias))


def bind(product: Callable[..., Tensor], activation: str) -> Callable[..., Tensor]:
    """``product``, one of the two above, as a function of the tensors alone."""
    if activation != "none":
        return lambda x, down, up, bias: product(x, down, up, bias, activation)
    # The most frequent call: nothing but the products.
    linear = F.linear
    if product is two_products:
        return lambda x, down, up, bias: linear(linear(x, down), up, bias)
    return lambda x, down, up, bias: linear(x, up @ down, bias)


def activation_backward(grad: Tensor, preactivation: Tensor, activation: str) -> Tensor:
    """The gradient at the input of ``activation``."""
    return _DERIVATIVES[activation](grad, preactivation)
