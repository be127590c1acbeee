"""Defines ``lowrank_ops::lowrank_linear``, a linear layer whose weight is the product of two low-rank factors.

Schema, validation, fake kernel, autograd, autocast and ``TABLE``, the implementations in the order in which ``auto``
considers them. ``reference`` holds the library GEMMs, ``_triton`` and ``_cuda`` the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.compiler import is_compiling

from ...arguments import check_arguments, checked
from .. import _verify
from .._backend import FREE, Backend, Device, Impl, choose, device_facts, row_stride
from .._backend import explain as _explain
from .._decompositions import DECOMPOSED
from .._dispatcher import (
    BoundedCache,
    all_strided,
    can_bypass,
    count_flops,
    detached_view,
    has_functorch_wrapper,
    in_transform,
    is_recorded,
    needs_grad,
    register_autocast,
)
from . import _cuda, _triton, reference
from ._checks import check, check_activation, check_types


class Problem(NamedTuple):
    """Everything the choice of an implementation may depend on."""

    tokens: int
    in_features: int
    rank: int
    out_features: int
    dtype: torch.dtype
    x_stride: int  # elements between rows of x; 0 if x is not a matrix with unit column stride
    down_strides: tuple[int, ...]
    up_strides: tuple[int, ...]
    aligned: bool  # x, down, up and their rows start on 16 bytes
    has_bias: bool
    activation: str
    device: Device
    # The dtypes of an 8-bit factor and of its scale; None for a factor in the dtype of x.
    down_format: tuple[torch.dtype, torch.dtype] | None = None
    up_format: tuple[torch.dtype, torch.dtype] | None = None

    @property
    def scaled(self) -> bool:
        """Whether a factor is 8-bit."""
        return self.down_format is not None or self.up_format is not None


def _dense_costs_less(problem: Problem) -> bool:
    """Forming ``up down`` and one GEMM with it takes fewer MACs than two GEMMs with the factors."""
    dense = problem.in_features * problem.out_features
    factors = problem.rank * (problem.in_features + problem.out_features)
    return problem.tokens * (factors - dense) > problem.rank * dense


TABLE: tuple[Impl, ...] = (
    Impl(
        "dense",
        Backend.REFERENCE,
        lambda problem: None,
        lambda problem, *args, **scales: reference.dense(*args, **scales),
        _dense_costs_less,
        bind=lambda problem: reference.bind(reference.dense, problem.activation, problem.scaled),
    ),
    Impl("cuda.decode", Backend.CUDA, _cuda.supports_decode, _cuda.run, _cuda.prefers_decode, _cuda.plan),
    Impl("cuda.prefill", Backend.CUDA, _cuda.supports_prefill, _cuda.run, _cuda.prefers_prefill, _cuda.plan),
    Impl(
        "triton.decode",
        Backend.TRITON,
        _triton.supports_decode,
        _triton.run_decode,
        _triton.prefers_decode,
        _triton.plan_decode,
        bind=_triton.bind_decode,
    ),
    Impl(
        "triton.prefill",
        Backend.TRITON,
        _triton.supports_prefill,
        _triton.run_prefill,
        _triton.prefers_prefill,
        _triton.plan_prefill,
        bind=_triton.bind_prefill,
    ),
    Impl(
        "two_products",
        Backend.REFERENCE,
        lambda problem: None,
        lambda problem, *args, **scales: reference.two_products(*args, **scales),
        bind=lambda problem: reference.bind(reference.two_products, problem.activation, problem.scaled),
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
    down_scale: Tensor | None = None,  # (rank,)
    up_scale: Tensor | None = None,  # (out_features,)
) -> Tensor:  # (..., out_features)
    """Apply a low-rank linear layer: ``activation((x down^T) up^T + bias)``.

    Differentiable once in ``x``, ``down``, ``up`` and ``bias``. Under autocast the tensors are cast first, as for
    ``torch.nn.functional.linear``. Kernels accumulate in float32 and round ``x down^T`` to the dtype of ``x``, as two
    library GEMMs do.

    Each factor may be 8-bit, with a scale per row: ``down_scale[:, None] * down``. It then has no gradient, and is not
    cast under autocast. Triton's kernels read its bytes and scale the products. Where they do not run, every call
    dequantizes it into a tensor of the dtype of ``x``.

    Args:
        x: (..., in_features), float64, float32, bfloat16 or float16; any leading shape, also empty. Nested tensors
            and calls inside a ``torch.func`` transform or forward-mode differentiation run as two GEMMs, whatever the
            backend.
        down: (rank, in_features), the dtype of ``x``; with ``down_scale`` int8 or float8_e4m3fn.
        up: (out_features, rank), the dtype of ``x``; with ``up_scale`` int8 or float8_e4m3fn.
        bias: (out_features,), the dtype of ``x``, or None.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"`` or ``"silu"``.
        backend: ``"auto"``, ``"unverified"``, which is ``"auto"`` without the check of a kernel's first calls, or by
            name ``"reference"``, ``"triton"`` or ``"cuda"``.
        down_scale, up_scale: (rank,) and (out_features,), float32 or bfloat16: of 8-bit factors, otherwise None.

    Returns:
        (..., out_features), the dtype of ``x``.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, dtype, device or name does not fit; the message names the argument.
        BackendUnavailableError: the requested backend cannot run this call.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> x, down, up = torch.randn(5, 64), torch.randn(8, 64), torch.randn(32, 8)
        >>> y = lro.ops.lowrank_linear(x, down, up, activation="gelu")
        >>> y.shape
        torch.Size([5, 32])
        >>> torch.allclose(y, torch.nn.functional.gelu(x @ down.T @ up.T), atol=1e-4)
        True
    """
    if down_scale is not None or up_scale is not None:
        return _with_scales(x, down, up, bias, activation, backend, down_scale, up_scale)
    if can_bypass(x, down, up, bias):
        run = _decision(x, down, up, bias, activation, backend)
        if not needs_grad(x, down, up, bias):
            return run(x, down, up, bias)
        if not has_functorch_wrapper(x, down, up, bias):
            return _record(run, activation, backend, x, down, up, bias)
    return _dispatched(x, down, up, bias, activation, backend)


def _with_scales(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str,
    down_scale: Tensor | None,
    up_scale: Tensor | None,
) -> Tensor:
    """:func:`lowrank_linear` with an 8-bit factor."""
    scales = down_scale, up_scale
    tensors = [tensor for tensor in (x, down, up, bias, *scales) if tensor is not None]
    if can_bypass(x, down, up, bias) and all(scale is None or can_bypass(scale, x, x, None) for scale in scales):
        run = _decision(x, down, up, bias, activation, backend, *scales)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return run(x, down, up, bias, *scales)
    return _dispatched(x, down, up, bias, activation, backend, *scales)


def _dispatched(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    """The call through PyTorch's dispatcher, or two GEMMs where the op is not supported."""
    if not is_compiling():
        check_types(x=x, down=down, up=up, bias=bias, down_scale=down_scale, up_scale=up_scale)
    # nn.TransformerEncoder passes nested tensors. Compared to True because a torch.fx proxy's is_nested is not a bool.
    if x.is_nested is True or in_transform() or is_recorded(backend in FREE):
        check_activation(activation)
        return reference.two_products(x, down, up, bias, activation, down_scale, up_scale)
    if not is_compiling():
        count_flops(torch.ops.lowrank_ops.lowrank_linear, _flops)
    return torch.ops.lowrank_ops.lowrank_linear(  # type: ignore[no-any-return]
        x, down, up, bias, down_scale, up_scale, activation=activation, backend=backend
    )


@checked()
def explain(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str = "auto",
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> str:
    """Which implementation runs this ``lowrank_linear`` call, and why each other one does not."""
    args = x, down, up, bias, activation, down_scale, up_scale
    check(*args)
    return _explain(TABLE, describe(*args), backend)


def describe(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Problem:
    """The problem of a call."""
    in_features = x.shape[-1]
    rank, out_features = down.shape[0], up.shape[0]
    x_stride = row_stride(x)
    down_strides, up_strides = down.stride(), up.stride()
    # Addresses and strides in bytes are all multiples of 16 if their bitwise or is.
    low_bits = x.data_ptr() | down.data_ptr() | up.data_ptr()
    # Strides in elements: rows of 8-bit factors start on 8 bytes, which is as many elements.
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
        None if down_scale is None else (down.dtype, down_scale.dtype),
        None if up_scale is None else (up.dtype, up_scale.dtype),
    )


_Bound = Callable[..., Tensor]  # of x, down, up and bias, and of both scales if one of them is given
_decisions = BoundedCache(4096)


def _decision(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str,
    *scales: Tensor | None,  # those of down and up, or nothing
) -> _Bound:
    """The function that runs a call like this. Arguments are checked and an implementation is bound once per key."""
    dtype, device = x.dtype, x.device
    alike = not scales and (
        down.dtype is dtype
        and up.dtype is dtype
        and down.device == device
        and up.device == device
        and (bias is None or (bias.dtype is dtype and bias.device == device))
    )
    # The key must contain everything that a check or a choice depends on: cached decisions are not checked again.
    biases = None if bias is None else bias.shape
    key: tuple[Any, ...] = x.shape, dtype, device, down.shape, up.shape, biases, activation, backend
    if scales:
        forms = ((tensor.dtype, tensor.device) for tensor in (down, up, bias, *scales) if tensor is not None)
        key += (*forms, *(None if scale is None else scale.shape for scale in scales))
        alike = True
    try:
        bound = _decisions.get(key) if alike else None
    except TypeError:  # no hash
        check_arguments(lowrank_linear, {"activation": activation, "backend": backend})
        raise
    if bound is None:
        check(x, down, up, bias, activation, *scales)
        # No strides to describe; not cached, as strided tensors share the key.
        if not all_strided(x, down, up, bias) or not all(all_strided(x, x, x, scale) for scale in scales):
            return reference.bind(reference.two_products, activation, bool(scales))
        problem = describe(x, down, up, bias, activation, *scales)
        bound = _ByLayout(activation, backend) if _layout_matters(problem, backend) else _bind(problem, backend)
        _decisions[key] = bound
    return bound


def _layout_matters(problem: Problem, backend: str) -> bool:
    """Whether a kernel could run the problem with contiguous, aligned tensors."""
    ideal = problem._replace(
        x_stride=problem.in_features, down_strides=(problem.in_features, 1), up_strides=(problem.rank, 1), aligned=True
    )
    return any(
        impl.backend is not Backend.REFERENCE and backend in (*FREE, impl.backend) and impl.supports(ideal) is None
        for impl in TABLE
    )


def _bind(problem: Problem, backend: str) -> _Bound:
    """The chosen implementation with the problem bound."""
    impl = choose(TABLE, problem, backend)
    if impl.bind is not None:
        return impl.bind(problem)
    return lambda x, down, up, bias: impl.run(problem, x, down, up, bias, problem.activation)  # never with scales


class _ByLayout:
    """The decision for a call that kernels may run: it also depends on strides and addresses."""

    def __init__(self, activation: str, backend: str) -> None:
        self.activation, self.backend = activation, backend
        self.decisions = BoundedCache(64)

    def __call__(self, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, *scales: Tensor | None) -> Tensor:
        if down.is_neg() or up.is_neg() or (bias is not None and bias.is_neg()):
            # torch's GEMMs resolve the negative bit themselves, kernels do not.
            down, up = down.resolve_neg(), up.resolve_neg()
            bias = None if bias is None else bias.resolve_neg()
        aligned = (x.data_ptr() | down.data_ptr() | up.data_ptr()) & 15 == 0
        layout = (x.stride(), down.stride(), up.stride(), aligned)
        bound = self.decisions.get(layout)
        if bound is None:
            problem = describe(x, down, up, bias, self.activation, *scales)
            bound = _bind(problem, self.backend)
            impl = choose(TABLE, problem, self.backend)
            first = _verify.first_call("lowrank_linear", impl, problem, self.backend, _decisions.clear)
            y = None if first is None else _checked(first, bound, x, down, up, bias, *scales)
            if first is None or first.passed:
                self.decisions[layout] = bound
            if y is not None:
                return y
        return bound(x, down, up, bias, *scales)  # type: ignore[no-any-return]


def _checked(first: _verify.FirstCall, kernel: _Bound, *tensors: Any) -> Tensor:
    """The kernel's result, or that of two GEMMs if the kernel is wrong or cannot be checked now."""
    args = (*tensors[:4], first.problem.activation, *tensors[4:])
    results: list[Tensor] = []

    def run() -> tuple[float, float] | None:
        results.append(kernel(*tensors))
        return reference.errors(results[0], *args)

    with torch.no_grad():
        if first.check(tensors[0], run):
            return results[0]
    return reference.two_products(*args)


_lib = torch.library.Library("lowrank_ops", "FRAGMENT")
_lib.define(
    "lowrank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias=None, "
    # Not by keyword, as in the Python function: torch.library's autograd takes no tensors by keyword.
    "Tensor? down_scale=None, Tensor? up_scale=None, *, "
    'str activation="none", str backend="auto") -> Tensor'
)


def run_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    scales = () if down_scale is None and up_scale is None else (down_scale, up_scale)
    return detached_view(_decision(x, down, up, bias, activation, backend, *scales)(x, down, up, bias, *scales))


def _fake(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    check(x, down, up, bias, activation, down_scale, up_scale)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    # torch omits trailing arguments that have their default: without a bias and scales there are three.
    x, down, up, bias, down_scale, up_scale = (*inputs, None, None, None)[:6]
    needed = (*ctx.needs_input_grad, False, False, False)[:6]
    for place, name, factor, scale in ((1, "down", down, down_scale), (2, "up", up, up_scale)):
        if scale is not None and (needed[place] or needed[place + 3]):
            raise ValueError(
                f"{name} is {factor.dtype} and has no gradient, nor has {name}_scale; call requires_grad_(False) on "
                "both."
            )
    ctx.save_for_backward(x, down, up, bias, down_scale, up_scale)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, bias, *scales = ctx.saved_tensors
    needed = (*ctx.needs_input_grad, False)[:4]
    down, up = (reference.dequantized(*pair, x.dtype) for pair in zip((down, up), scales, strict=True))
    gradients = gradients_of(grad, x, down, up, bias, needed, **ctx.options)
    return (*gradients, None, None)[: len(ctx.needs_input_grad)]


class _Recorded(torch.autograd.Function):
    """The op's autograd without the dispatcher: it saves the same tensors and runs the same backward."""

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
        return detached_view(run(x, down, up, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, down, up, bias = ctx.saved_tensors
        activation, backend = ctx.options
        gradients = gradients_of(grad, x, down, up, bias, ctx.needs_input_grad[3:], activation, backend)
        return (None, None, None, *gradients)


# The C++ apply. Function.apply first handles transforms in Python, which can_bypass has ruled out.
_record: Callable[..., Tensor] = super(torch.autograd.Function, _Recorded).apply


def gradients_of(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    needed: tuple[bool, ...],
    activation: str,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, down, up and bias; None where not needed.

    t = x down^T is recomputed instead of saved: one of the backward's five GEMMs, and no memory. The gradient of t
    serves those of x and down. If only x needs a gradient, ``lowrank_linear`` computes it and a fused kernel keeps the
    gradient of t on chip.
    """
    if activation != "none":
        preactivation = lowrank_linear(x, down, up, bias, backend=backend)
        grad = reference.activation_backward(grad, preactivation, activation)
    needs_x, needs_down, needs_up, needs_bias = needed
    rows, grads = _matrix(x), _matrix(grad)
    # First, so that t is freed before the gradient of t, which is as large, is allocated.
    grad_up = grads.T @ torch.nn.functional.linear(rows, down) if needs_up else None
    grad_x = grad_down = None
    if needs_down:
        grad_t = grads @ up
        grad_down = grad_t.T @ rows
        grad_x = (grad_t @ down).view(x.shape) if needs_x else None
    elif needs_x:
        # The gradient may be an expanded scalar, which not every backend supports.
        grad_x = lowrank_linear(grad.contiguous(), up.T, down.T, backend=backend)
    grad_bias = grads.sum(0) if needs_bias and bias is not None else None
    return grad_x, grad_down, grad_up, grad_bias


def _matrix(x: Tensor) -> Tensor:
    """``x`` with its leading dimensions flattened. Their product is explicit: -1 is ambiguous without features."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _decomposed(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    return reference.two_products(x, down, up, bias, activation, down_scale, up_scale)


_lib.impl("lowrank_linear", run_linear, "CompositeExplicitAutograd")
torch.library.register_fake("lowrank_ops::lowrank_linear", _fake, lib=_lib)
torch.library.register_autograd("lowrank_ops::lowrank_linear", _backward, setup_context=_setup_context, lib=_lib)
register_autocast(_lib, "lowrank_linear", cast=True, first=4)
DECOMPOSED[torch.ops.lowrank_ops.lowrank_linear.default] = _decomposed
# torch.compile does not use this table and keeps one op; torch.onnx.export does.
register_decomposition(torch.ops.lowrank_ops.lowrank_linear.default)(_decomposed)


def _flops(x: Tensor, down: Tensor, up: Tensor, *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of two GEMMs."""
    return 2 * math.prod(x.shape[:-1]) * down.shape[0] * (down.shape[1] + up.shape[0])
