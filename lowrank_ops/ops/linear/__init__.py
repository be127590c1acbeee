"""``lowrank_ops::lowrank_linear``: a linear layer whose weight is the product of two thin factors.

Schema, validation, fake, autograd, autocast and the table of implementations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autocast import register_autocast
from .._backend import Backend, Device, Impl, choose, device_facts
from .._backend import explain as _explain
from .._eager import Decisions, in_memory, outlived, transformed, undisturbed, wants_gradient
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
        bind=lambda problem: reference.bind(reference.dense, problem.activation),
    ),
    Impl("cuda.decode", Backend.CUDA, _cuda.supports_decode, _cuda.run, _cuda.prefers_decode, _cuda.plan),
    Impl("cuda.prefill", Backend.CUDA, _cuda.supports_prefill, _cuda.run, _cuda.prefers_prefill, _cuda.plan),
    Impl(
        "triton.decode",
        Backend.TRITON,
        _triton.supports_decode,
        _triton.run_decode,
        _triton.prefers_decode,
        bind=_triton.bind_decode,
    ),
    Impl(
        "triton.prefill",
        Backend.TRITON,
        _triton.supports_prefill,
        _triton.run_prefill,
        _triton.prefers_prefill,
        bind=_triton.bind_prefill,
    ),
    Impl(
        "two_products",
        Backend.REFERENCE,
        lambda problem: None,
        lambda problem, *args: reference.two_products(*args),
        bind=lambda problem: reference.bind(reference.two_products, problem.activation),
    ),
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
        x: (..., in_features), float64, float32, bfloat16 or float16; any leading shape, also empty. A nested tensor
            goes through two products, by every backend, and so does any call inside a ``torch.func`` transform or
            forward-mode differentiation.
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
        run = _decision(x, down, up, bias, activation, backend)
        if not wants_gradient(x, down, up, bias):
            return run(x, down, up, bias)
        if not outlived(x, down, up, bias):
            return _record(run, activation, backend, x, down, up, bias)
    # Nested as nn.TransformerEncoder hands over sequences without their padding; of a proxy of torch.fx it is no bool.
    if x.is_nested is True or transformed():
        _check_activation(activation)
        return reference.two_products(x, down, up, bias, activation)
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
    _check_activation(activation)
    for name, tensor in (("down", down), ("up", up), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name} must have the dtype and device of x, {x.dtype} on {x.device}; "
                f"got {tensor.dtype} on {tensor.device}."
            )
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor; got {x.dtype}.")


def _check_activation(activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}; got {activation!r}.")


_Bound = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
_decisions = Decisions(4096)


def _decision(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str, backend: str) -> _Bound:
    """What runs a call like this, found out once: arguments are checked and an implementation is chosen and bound."""
    dtype, device = x.dtype, x.device
    alike = (
        down.dtype is dtype
        and up.dtype is dtype
        and down.device == device
        and up.device == device
        and (bias is None or (bias.dtype is dtype and bias.device == device))
    )
    # Nothing that makes a difference may be missing here: what has been decided is not looked at again.
    kind = x.shape, dtype, device, down.shape, up.shape, None if bias is None else bias.shape, activation, backend
    bound = _decisions.get(kind) if alike else None
    if bound is None:
        _check(x, down, up, bias, activation)
        if not in_memory(x, down, up, bias):  # nothing to describe, and nothing to remember for tensors that are
            return reference.bind(reference.two_products, activation)
        problem = describe(x, down, up, bias, activation)
        bound = _ByLayout(activation, backend) if _layout_matters(problem, backend) else _bind(problem, backend)
        _decisions[kind] = bound
    return bound


def _layout_matters(problem: Problem, backend: str) -> bool:
    """Whether a kernel could run the problem, if only it lay in memory as kernels like it."""
    ideal = problem._replace(
        x_stride=problem.in_features, down_strides=(problem.in_features, 1), up_strides=(problem.rank, 1), aligned=True
    )
    return any(
        impl.backend is not Backend.REFERENCE and backend in ("auto", impl.backend) and impl.supports(ideal) is None
        for impl in TABLE
    )


def _bind(problem: Problem, backend: str) -> _Bound:
    """The chosen implementation with the problem filled in."""
    impl = choose(TABLE, problem, backend)
    if impl.bind is not None:
        return impl.bind(problem)
    return lambda x, down, up, bias: impl.run(problem, x, down, up, bias, problem.activation)


class _ByLayout:
    """The decision on a call that kernels may run, for which strides and addresses count as well."""

    def __init__(self, activation: str, backend: str) -> None:
        self.activation, self.backend = activation, backend
        self.decisions = Decisions(64)

    def __call__(self, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
        if down.is_neg() or up.is_neg() or (bias is not None and bias.is_neg()):
            # Views whose sign is still to be flipped, as torch's own products do and a kernel would not.
            down, up = down.resolve_neg(), up.resolve_neg()
            bias = None if bias is None else bias.resolve_neg()
        aligned = (x.data_ptr() | down.data_ptr() | up.data_ptr()) & 15 == 0
        layout = (x.stride(), down.stride(), up.stride(), aligned)
        bound = self.decisions.get(layout)
        if bound is None:
            bound = _bind(describe(x, down, up, bias, self.activation), self.backend)
            self.decisions[layout] = bound
        return bound(x, down, up, bias)  # type: ignore[no-any-return]


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
    return _no_view(_decision(x, down, up, bias, activation, backend)(x, down, up, bias))


def _no_view(y: Tensor) -> Tensor:
    """``y`` for autograd to record: of a view, as linear makes of a batch of sequences, it forbids changes in place."""
    return y.data if y._is_view() else y


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
    x, down, up, bias = ctx.saved_tensors
    # torch leaves out trailing arguments that have their default: without a bias there are three.
    needed = (*ctx.needs_input_grad[:4], False)[:4]
    return _gradients(grad, x, down, up, bias, needed, **ctx.options)


class _Recorded(torch.autograd.Function):
    """The op's autograd without the dispatcher: the same tensors saved, the same backward, in a third of the time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        run: _Bound,
        activation: str,
        backend: str,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, down, up, bias)
        ctx.options = activation, backend
        return _no_view(run(x, down, up, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, down, up, bias = ctx.saved_tensors
        activation, backend = ctx.options
        gradients = _gradients(grad, x, down, up, bias, ctx.needs_input_grad[3:], activation, backend)
        return (None, None, None, *gradients)


# Without what Function.apply does in Python for transforms, which are ruled out here: half of the time of a small call.
_record: Callable[..., Tensor] = super(torch.autograd.Function, _Recorded).apply


def _gradients(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    needed: tuple[bool, ...],
    activation: str,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Those of x, down, up and bias.

    t = x down^T is recomputed rather than saved: it costs a fifth of the backward's operations and no memory. The
    gradient at t is what those of x and down are both made of; where only x needs one, a fused kernel keeps it inside.
    """
    if activation != "none":
        preactivation = lowrank_linear(x, down, up, bias, backend=backend)
        grad = reference.activation_backward(grad, preactivation, activation)
    needs_x, needs_down, needs_up, needs_bias = needed
    rows, grads = _matrix(x), _matrix(grad)
    # Before the gradient at t is there, which is as large as t.
    grad_up = grads.T @ torch.nn.functional.linear(rows, down) if needs_up else None
    grad_x = grad_down = None
    if needs_down:
        grad_t = grads @ up
        grad_down = grad_t.T @ rows
        grad_x = (grad_t @ down).view(x.shape) if needs_x else None
    elif needs_x:
        # A gradient may be a broadcast scalar, which a backend named by the user need not take.
        grad_x = lowrank_linear(grad.contiguous(), up.T, down.T, backend=backend)
    grad_bias = grads.sum(0) if needs_bias and bias is not None else None
    return grad_x, grad_down, grad_up, grad_bias


def _matrix(x: Tensor) -> Tensor:
    """Leading dimensions made one; their product is given because without features -1 could be anything."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


_lib.impl("lowrank_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("lowrank_ops::lowrank_linear", _fake, lib=_lib)
torch.library.register_autograd("lowrank_ops::lowrank_linear", _backward, setup_context=_setup_context, lib=_lib)
register_autocast(_lib, "lowrank_linear", cast=True)
