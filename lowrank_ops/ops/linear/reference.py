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


def dequantized(factor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``factor``, or an 8-bit one times its scale per row: computed in float32 or wider, then rounded to ``dtype``."""
    if scale is None:
        return factor
    wide = torch.promote_types(dtype, torch.float32)
    return (factor.to(wide) * scale.to(wide).unsqueeze(1)).to(dtype)


def two_products(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    """``activation((x down^T) up^T + bias)`` with two GEMMs; the bias is in the second one's epilogue.

    8-bit factors are dequantized in every call: that writes and reads both in the dtype of ``x``.
    """
    down, up = dequantized(down, down_scale, x.dtype), dequantized(up, up_scale, x.dtype)
    return ACTIVATIONS[activation](F.linear(F.linear(x, down), up, bias))


def dense(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    """The same with ``up down`` formed first: fewer FLOPs above the break-even rank when there are many tokens."""
    down, up = dequantized(down, down_scale, x.dtype), dequantized(up, up_scale, x.dtype)
    return ACTIVATIONS[activation](F.linear(x, up @ down, bias))


def bind(implementation: Callable[..., Tensor], activation: str, scaled: bool = False) -> Callable[..., Tensor]:
    """``two_products`` or ``dense`` as a function of the tensors alone, with the scales if ``scaled``."""
    if scaled:
        return lambda x, down, up, bias, *scales: implementation(x, down, up, bias, activation, *scales)
    if activation != "none":
        return lambda x, down, up, bias: implementation(x, down, up, bias, activation)
    # The most frequent call, without the lookup of an activation.
    linear = F.linear
    if implementation is two_products:
        return lambda x, down, up, bias: linear(linear(x, down), up, bias)
    return lambda x, down, up, bias: linear(x, up @ down, bias)


def errors(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> tuple[float, float] | None:
    """The error of ``y`` on at most 64 of its rows, against float64, and twice that of :func:`two_products`.

    None if all of these rows of x are zero or no product is finite, which shows nothing.
    """
    tokens, in_features, out_features = y.numel() // max(up.shape[0], 1), down.shape[1], up.shape[0]
    if not tokens * out_features:
        return None
    # Spread over all tiles, with the first and the last row.
    rows = torch.linspace(0, tokens - 1, min(tokens, 64), dtype=torch.float64, device=x.device).long()
    x, y = x.reshape(tokens, in_features)[rows], y.reshape(tokens, out_features)[rows].double()
    same = two_products(x, down, up, bias, activation, down_scale, up_scale).double()
    down, up = (dequantized(*pair, torch.float64).double() for pair in ((down, down_scale), (up, up_scale)))
    wide = two_products(x.double(), down, up, None if bias is None else bias.double(), activation)
    finite = same.isfinite() & wide.isfinite()
    if not x.any() or not finite.any():
        return None
    # Of few values, torch's own may happen to be exact: it errs by at least one rounding of the largest.
    rounding = torch.finfo(x.dtype).eps / 2 * wide[finite].abs().max()
    torch_error = (same - wide)[finite].abs().max()
    return (y - wide)[finite].abs().max().item(), 2 * torch.maximum(torch_error, rounding).item() + 1e-6


def activation_backward(grad: Tensor, preactivation: Tensor, activation: str) -> Tensor:
    """The gradient at the input of ``activation``."""
    return _ACTIVATION_BACKWARD[activation](grad, preactivation)
