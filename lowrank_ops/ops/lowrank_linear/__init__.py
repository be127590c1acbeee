"""``lowrank_ops::lowrank_linear``: a linear layer whose weight is the product of two thin factors.

Schema, validation, fake, autograd, autocast and the table of implementations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autocast import register_autocast
from .._backend import Backend, Device, Impl, choose, device_facts
from .._backend import explain as _explain
from .._eager import undisturbed
from .._layout import row_stride
from . import _cuda, _triton, reference


class Problem(NamedTuple):
    """All that a choice of implementation may depend on."""

    tokens: int
    in_features: int
    rank: int
    out_features: int
    dtype: torch.dtype
    x_stride: int  # elements between rows of x, 0 where x is not a matrix with unit column stride
    down_strides: tuple[int, ...]  # of both its dimensions
    up_strides: tuple[int, ...]
    aligned: bool  # x, down, up and their rows start on 16 bytes
    has_bias: bool
    activation: str
    device: Device


def _dense_costs_less(problem: Problem) -> bool:
    """Forming ``up down`` once and one product with it take fewer operations than two thin products."""
    dense = problem.in_features * problem.out_features
    thin = problem.rank * (problem.in_features + problem.out_features)
    return problem.tokens * (thin - dense) > problem.rank * dense


TABLE: tuple[Impl, ...] = (
    Impl(
        "dense",
        Backend.REFERENCE,
        lambda problem: None,
        lambda problem, *args: reference.dense(*args),
        _dense_costs_less,
    ),
    Impl(
        "triton.decode",
        Backend.TRITON,
        _triton.supports_decode,
        _triton.run_decode,
        _triton.prefers_decode,
    ),
    Impl(
        "triton.prefill",
        Backend.TRITON,
        _triton.supports_prefill,
        _triton.run_prefill,
        _triton.prefers_prefill,
    ),
    Impl(
        "two_products",
        Backend.REFERENCE,
        lambda problem: None,
        lambda problem, *args: reference.two_products(*args),
    ),
    Impl("cuda.decode", Backend.CUDA, _cuda.supports_decode, _cuda.run, _cuda.prefers, _cuda.plan),
    Impl("cuda.prefill", Backend.CUDA, _cuda.supports_prefill, _cuda.run, _cuda.prefers, _cuda.plan),
)


def lowrank_linear(
    x: Tensor,  # (..., in_features)
    down: Tensor,  # (rank, in_features)
    up: Tensor,  # (out_features, rank)
    bias: Tensor | None = None,  # (out_features,)
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:  # (..., out_features)
    """``activation((x down^T) up^T + bias)``.

    Args:
        x: (..., in_features), float64, float32, bfloat16 or float16; any leading shape, also empty.
        down: (rank, in_features), the dtype of ``x``.
        up: (out_features, rank), the dtype of ``x``.
        bias: (out_features,), the dtype of ``x``, or None.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"`` or ``"silu"``.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (..., out_features), the dtype of ``x``. Differentiable once in x, down, up and bias. Under autocast the
        tensors are cast first, as for ``torch.nn.functional.linear``.

    Raises:
        ValueError: a shape, dtype, device or name does not fit; the message names the argument.
        BackendUnavailableError: the requested backend cannot run this call.
    """
    if undisturbed(x, down, up, bias):
        return _run(x, down, up, bias, activation=activation, backend=backend)
    return torch.ops.lowrank_ops.lowrank_linear(x, down, up, bias, activation=activation, backend=backend)


def explain(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, *, activation: str = "none", backend: str = "auto"
) -> str:
    """Which implementation would run this ``lowrank_linear`` and why the others would not."""
    _check(x, down, up, bias, activation)
    return _explain(TABLE, describe(x, down, up, bias, activation), backend)


def describe(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Problem:
    """The problem that a call poses."""
    in_features = x.shape[-1]
    rank, out_features = down.shape[0], up.shape[0]
    x_stride = row_stride(x)
    down_strides, up_strides = down.stride(), up.stride()
    # One test for all: a set low bit anywhere shows in the union of addresses and strides, in bytes.
    low_bits = x.data_ptr() | down.data_ptr() | up.data_ptr()
    low_bits |= (x_stride | max(down_strides) | max(up_strides)) * x.element_size()
    return Problem(
        x.numel() // in_features if in_features else 0,
        in_features,
        rank,
        out_features,
        x.dtype,
        x_stride,
        down_strides,
        up_strides,
        low_bits & 15 == 0,
        bias is not None,
        activation,
        device_facts(x.device),
    )


def _fits(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> bool:
    """Whether the arguments are plainly right: a quick look before ``_check``, which finds out what is wrong."""
    dtype, device = x.dtype, x.device
    if x.dim() == 0 or down.dim() != 2 or up.dim() != 2:
        return False
    rank, in_features = down.shape
    out_features, up_rank = up.shape
    return (
        x.shape[-1] == in_features
        and rank == up_rank
        and down.dtype is dtype
        and up.dtype is dtype
        and down.device == device
        and up.device == device
        and dtype.is_floating_point
        and activation in reference.ACTIVATIONS
        and (bias is None or (bias.shape == (out_features,) and bias.dtype is dtype and bias.device == device))
    )


def _check(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> None:
    if x.dim() == 0:
        raise ValueError("x must have shape (..., in_features); got a scalar.")
    if down.dim() != 2 or down.shape[1] != x.shape[-1]:
        raise ValueError(
            f"down must have shape (rank, {x.shape[-1]}) to take x with {x.shape[-1]} features; "
            f"got {tuple(down.shape)}."
        )
    if up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"up must have shape (out_features, {down.shape[0]}), the rank of down; got {tuple(up.shape)}."
        )
    if bias is not None and bias.shape != up.shape[:1]:
        raise ValueError(f"bias must have shape ({up.shape[0]},), the rows of up; got {tuple(bias.shape)}.")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}; got {activation!r}.")
    for name, tensor in (("down", down), ("up", up), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name} must have the dtype and device of x, {x.dtype} on {x.device}; "
                f"got {tensor.dtype} on {tensor.device}."
            )
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor; got {x.dtype}.")


_lib = torch.library.Library("lowrank_ops", "FRAGMENT")
_lib.define(
    "lowrank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias=None, *, "
    'str activation="none", str backend="auto") -> Tensor'
)


def _run(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    if not _fits(x, down, up, bias, activation):
        _check(x, down, up, bias, activation)
    problem = describe(x, down, up, bias, activation)
    return choose(TABLE, problem, backend).run(problem, x, down, up, bias, activation)


def _fake(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    _check(x, down, up, bias, activation)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, down, up, bias = inputs
    ctx.save_for_backward(x, down, up, bias)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """t = x down^T is recomputed rather than saved: it costs 1/3 of the backward's products and no memory."""
    x, down, up, bias = ctx.saved_tensors
    activation, backend = ctx.options["activation"], ctx.options["backend"]
    if activation != "none":
        preactivation = lowrank_linear(x, down, up, bias, backend=backend)
        grad = reference.activation_backward(grad, preactivation, activation)
    # torch leaves out trailing arguments that have their default: without a bias there are three.
    needs_x, needs_down, needs_up, needs_bias = (*ctx.needs_input_grad[:4], False)[:4]
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    # A gradient may be a broadcast scalar, which a backend named by the user need not take.
    grad_x = lowrank_linear(grad.contiguous(), up.T, down.T, backend=backend) if needs_x else None
    grad_down = (grads @ up).T @ rows if needs_down else None
    grad_up = grads.T @ (rows @ down.T) if needs_up else None
    grad_bias = grads.sum(0) if needs_bias and bias is not None else None
    return grad_x, grad_down, grad_up, grad_bias


_lib.impl("lowrank_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("lowrank_ops::lowrank_linear", _fake, lib=_lib)
torch.library.register_autograd("lowrank_ops::lowrank_linear", _backward, setup_context=_setup_context, lib=_lib)
register_autocast(_lib, "lowrank_linear", cast=True)
