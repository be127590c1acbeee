"""Defines ``lowrank_ops::lowrank_linear_grouped``: several low-rank linear layers of one input, such as q, k and v.

Laid out as ``ops/linear``, whose kernels' tiles, backward and choice for single layers it uses. ``reference`` holds the
library GEMMs, ``_triton`` and ``_cuda`` the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from ..linear import gradients_of, run_linear
from . import _cuda, _triton, reference

MAX_MEMBERS = _triton.MAX_MEMBERS  # of a group that kernels take
Tensors = Sequence[Tensor]
Biases = Sequence["Tensor | None"]


class Problem(NamedTuple):
    """Everything the choice of an implementation may depend on."""

    tokens: int
    in_features: int
    ranks: tuple[int, ...]  # of the members
    out_features: tuple[int, ...]
    shared: bool  # one down for all members
    dtype: torch.dtype
    x_stride: int  # elements between rows of x; 0 if x is not a matrix with unit column stride
    contiguous: bool  # all factors and biases, without a negative bit
    aligned: bool  # x, its rows and all factors start on 16 bytes
    biases: tuple[bool, ...]  # which members have one
    device: Device


TABLE: tuple[Impl, ...] = (
    Impl("cuda", Backend.CUDA, _cuda.supports, _cuda.run, _cuda.prefers, _cuda.plan, bind=_cuda.bind),
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
    Impl("members", Backend.REFERENCE, lambda problem: None, lambda problem, *args: reference.products(*args)),
)


def lowrank_linear_grouped(
    x: Tensor,  # (..., in_features)
    down: Tensor | Tensors,  # one (rank, in_features) per member, or one for all
    ups: Tensors,  # (out_features, rank) per member
    biases: Biases | None = None,  # (out_features,) per member
    *,
    backend: str = "auto",
) -> list[Tensor]:  # (..., out_features) per member
    """Apply several low-rank linear layers to one input: ``(x down_i^T) up_i^T + bias_i``.

    For projections that receive the same tensor, as q, k and v of an attention, or gate and up of an MLP. The kernels
    read x once and compute all members in as many launches as one member takes. Differentiable once in all tensors.
    Autocast, rounding and accumulation are those of :func:`lowrank_linear`.

    Args:
        x: (..., in_features), float64, float32, bfloat16 or float16; as for :func:`lowrank_linear`.
        down: a list with one (rank, in_features) per member; ranks may differ. Or one tensor (rank, in_features), which
            all members share. Pass factors that are stacked in one tensor as ``stacked.split(ranks)``.
        ups: (out_features, rank) per member, with the rank of its ``down``.
        biases: (out_features,) or None per member; None if no member has one. All tensors have the dtype of ``x``.
        backend: as for :func:`lowrank_linear`. Where no kernel for groups runs, members are computed one after another
            as :func:`lowrank_linear` would.

    Returns:
        A list of (..., out_features), one per member, in the dtype of ``x``.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, dtype, device or name does not fit, or the numbers of tensors do not; the message names
            the argument.
        BackendUnavailableError: the requested backend cannot run this call.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> x, downs = torch.randn(5, 64), [torch.randn(rank, 64) for rank in (16, 8, 8)]
        >>> ups = [torch.randn(64, 16), torch.randn(32, 8), torch.randn(32, 8)]
        >>> q, k, v = lro.ops.lowrank_linear_grouped(x, downs, ups)
        >>> q.shape, k.shape, v.shape
        (torch.Size([5, 64]), torch.Size([5, 32]), torch.Size([5, 32]))
        >>> torch.allclose(k, lro.ops.lowrank_linear(x, downs[1], ups[1]))
        True
    """
    downs, ups, biases = _members(down, ups, biases)
    members = [*zip(_each(downs, ups), ups, biases, strict=True)]
    if all(can_bypass(x, *member) for member in members):
        run = _decision(x, downs, ups, biases, backend).run
        if not any(needs_grad(x, *member) for member in members):
            return run(x, downs, ups, biases)
        if not any(has_functorch_wrapper(x, *member) for member in members):
            return [*_record(run, len(downs), len(ups), backend, x, *downs, *ups, *biases)]
    if not is_compiling():
        _check_types(x, downs, ups, biases)
    # As for lowrank_linear: nested tensors, transforms, traces of torch.jit and exports do not know the op.
    if x.is_nested is True or in_transform() or is_recorded(backend in FREE):
        return reference.products(x, downs, ups, biases)
    if not is_compiling():
        count_flops(torch.ops.lowrank_ops.lowrank_linear_grouped, _flops)
    # A list that autograd supports holds tensors only.
    present = [up.new_zeros(up.shape[:1]) if bias is None else bias for up, bias in zip(ups, biases, strict=True)]
    given = [] if all(bias is None for bias in biases) else present
    return torch.ops.lowrank_ops.lowrank_linear_grouped(x, downs, ups, given, backend=backend)  # type: ignore[no-any-return]


def may_fuse(x: Tensor) -> bool:
    """Whether ``auto`` may have kernels for groups on the device of ``x``, without a look at the problem."""
    return x.is_cuda


def unobserved(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> bool:
    """Whether no autograd, autocast, compiler, trace, profiler or other mode must see a call with these tensors."""
    return can_bypass(x, down, up, bias) and not needs_grad(x, down, up, bias)


def fused(x: Tensor, downs: Tensors, ups: Tensors, biases: Biases) -> _Decision | None:
    """How it runs, if ``auto`` has kernels that compute all members at once and nothing observes the call, else None.

    None also for arguments that do not fit.
    """
    if not all(unobserved(x, *member) for member in zip(downs, ups, biases, strict=True)):
        return None
    try:
        decision = _decision(x, downs, ups, biases, Backend.AUTO)
    except ValueError:
        return None
    return decision if decision.fused else None


@checked()
def explain(
    x: Tensor,
    down: Tensor | Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    backend: str = "auto",
) -> str:
    """Which implementation runs this ``lowrank_linear_grouped`` call, and why each other one does not."""
    downs, ups, biases = _members(down, ups, biases)
    _check(x, downs, ups, biases)
    return _explain(TABLE, describe(x, downs, ups, biases), backend)


def describe(x: Tensor, downs: Tensors, ups: Tensors, biases: Biases) -> Problem:
    """The problem of a call."""
    in_features, x_stride = x.shape[-1], row_stride(x)
    low_bits = x_stride * x.element_size()
    for tensor in (x, *downs, *ups):
        low_bits |= tensor.data_ptr()
    parts = [*downs, *ups, *(bias for bias in biases if bias is not None)]
    return Problem(
        x.numel() // in_features if in_features else 0,
        in_features,
        tuple(up.shape[1] for up in ups),
        tuple(up.shape[0] for up in ups),
        len(downs) < len(ups),
        x.dtype,
        x_stride,
        all(part.is_contiguous() and not part.is_neg() for part in parts),
        low_bits & 15 == 0,
        tuple(bias is not None for bias in biases),
        device_facts(x.device),
    )


def _members(down: Any, ups: Any, biases: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """The arguments as lists: one ``down`` or one per member, and one ``up`` and bias per member."""
    for name, value in (("ups", ups), ("biases", biases)):
        if not isinstance(value, (list, tuple)) and (name == "ups" or value is not None):
            raise TypeError(f"{name} must be a list with one tensor per member; got {type(value).__name__}.")
    downs = [*down] if isinstance(down, (list, tuple)) else [down]
    if not ups:
        raise ValueError("ups must have at least one member; got an empty list.")
    if isinstance(down, (list, tuple)) and len(down) != len(ups):
        raise ValueError(
            f"down must have as many members as ups, {len(ups)}, or be one tensor that all share; got a list of "
            f"{len(down)}."
        )
    if biases is not None and len(biases) != len(ups):
        raise ValueError(
            f"biases must have as many members as ups, {len(ups)}, with None for those without; got {len(biases)}."
        )
    return downs, [*ups], [None] * len(ups) if biases is None else [*biases]


def _each(downs: Tensors, ups: Tensors) -> list[Tensor]:
    """The ``down`` of each member."""
    return [*downs] if len(downs) == len(ups) else [*downs] * len(ups)


def _named(x: Tensor, downs: Tensors, ups: Tensors, biases: Biases) -> list[tuple[str, Any]]:
    name = "down[{}]" if len(downs) == len(ups) > 1 else "down"
    return [
        ("x", x),
        *((name.format(i), down) for i, down in enumerate(downs)),
        *((f"ups[{i}]", up) for i, up in enumerate(ups)),
        *((f"biases[{i}]", bias) for i, bias in enumerate(biases) if bias is not None),
    ]


def _check_types(x: Tensor, downs: Tensors, ups: Tensors, biases: Biases) -> None:
    for name, tensor in _named(x, downs, ups, biases):
        if not hasattr(type(tensor), "__torch_function__"):  # which proxies of torch.fx have as well
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}.")


def _check(x: Tensor, downs: Tensors, ups: Tensors, biases: Biases) -> None:
    named = _named(x, downs, ups, biases)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., in_features); got a scalar.")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor; got {x.dtype}.")
    for name, tensor in named[1 : 1 + len(downs)]:
        if tensor.dim() != 2 or tensor.shape[1] != x.shape[-1]:
            raise ValueError(
                f"{name} must have shape (rank, {x.shape[-1]}) to take x with {x.shape[-1]} features; "
                f"got {tuple(tensor.shape)}."
            )
    for i, (down, up, bias) in enumerate(zip(_each(downs, ups), ups, biases, strict=True)):
        if up.dim() != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"ups[{i}] must have shape (out_features, {down.shape[0]}), the rank of its down; "
                f"got {tuple(up.shape)}."
            )
        if bias is not None and bias.shape != up.shape[:1]:
            raise ValueError(
                f"biases[{i}] must have shape ({up.shape[0]},), the rows of ups[{i}]; got {tuple(bias.shape)}."
            )
    for name, tensor in named:
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} must have the dtype and device of x, {x.dtype} on {x.device}; "
                f"got {tensor.dtype} on {tensor.device}."
            )


_Bound = Callable[[Tensor, Tensors, Tensors, Biases], list[Tensor]]


class _Decision(NamedTuple):
    run: _Bound
    fused: bool  # by kernels that compute all members
    settled: bool = True  # the first call of a kernel is checked before its decision counts for others


_PRODUCTS = _Decision(reference.products, False)
_decisions = BoundedCache(4096)


def _decision(x: Tensor, downs: Tensors, ups: Tensors, biases: Biases, backend: str) -> _Decision:
    """How a call like this runs. Arguments are checked and an implementation is bound once per key."""
    members = [*zip(_each(downs, ups), ups, biases, strict=True)]
    if not all(all_strided(x, *member) for member in members):  # no strides to describe
        _check(x, downs, ups, biases)
        return _PRODUCTS
    pointers = x.data_ptr()
    for tensor in (*downs, *ups):
        pointers |= tensor.data_ptr()
    # The key must contain everything that a check or a choice depends on: cached decisions are not checked again.
    parts = tuple(
        None if part is None else (part.shape, part.stride(), part.dtype, part.device, part.is_neg())
        for part in (x, *downs, *ups, *biases)
    )
    key = parts, len(downs), len(ups), pointers & 15 == 0, backend
    try:
        found = _decisions.get(key)
    except TypeError:  # no hash
        check_arguments(lowrank_linear_grouped, {"backend": backend})
        raise
    if found is not None:
        return found  # type: ignore[no-any-return]
    _check(x, downs, ups, biases)
    problem = describe(x, downs, ups, biases)
    impl = choose(TABLE, problem, backend)
    if impl.backend is Backend.REFERENCE:
        one_by_one = not problem.shared and backend != Backend.REFERENCE
        decision = _Decision(_one_by_one(backend), False) if one_by_one else _PRODUCTS
    else:
        assert impl.bind is not None
        decision = _Decision(impl.bind(problem), True)
        first = _verify.first_call("lowrank_linear_grouped", impl, problem, backend, _decisions.clear)
        if first is not None:
            return _Decision(_checked(first, decision, key), True, settled=False)
    _decisions[key] = decision
    return decision


def _one_by_one(backend: str) -> _Bound:
    """Each member by the implementation that ``lowrank_linear`` chooses for it."""

    def run(x: Tensor, downs: Tensors, ups: Tensors, biases: Biases) -> list[Tensor]:
        return [run_linear(x, *member, backend=backend) for member in zip(downs, ups, biases, strict=True)]

    return run


def _checked(first: _verify.FirstCall, decision: _Decision, key: Any) -> _Bound:
    """Runs the kernel and compares; the products of the library if it is wrong or cannot be checked now."""

    def run(x: Tensor, downs: Tensors, ups: Tensors, biases: Biases) -> list[Tensor]:
        results: list[list[Tensor]] = []

        def compare() -> tuple[float, float] | None:
            results.append(decision.run(x, downs, ups, biases))
            return reference.errors(results[0], x, downs, ups, biases)

        with torch.no_grad():
            if not first.check(x, compare):
                return reference.products(x, downs, ups, biases)
        if first.passed:
            _decisions[key] = decision
        return results[0]

    return run


_lib = torch.library.Library("lowrank_ops", "FRAGMENT")
_lib.define(
    'lowrank_linear_grouped(Tensor x, Tensor[] downs, Tensor[] ups, Tensor[] biases, *, str backend="auto") -> Tensor[]'
)


def _or_none(biases: Tensors, ups: Tensors) -> Biases:
    return biases or [None] * len(ups)


def _run_group(x: Tensor, downs: Tensors, ups: Tensors, biases: Tensors, *, backend: str = "auto") -> list[Tensor]:
    given = _or_none(biases, ups)
    return [detached_view(y) for y in _decision(x, downs, ups, given, backend).run(x, downs, ups, given)]


def _fake(x: Tensor, downs: Tensors, ups: Tensors, biases: Tensors, *, backend: str = "auto") -> list[Tensor]:
    _check(x, downs, ups, _or_none(biases, ups))
    return [x.new_empty((*x.shape[:-1], up.shape[0])) for up in ups]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, downs, ups, biases = inputs
    ctx.save_for_backward(x, *downs, *ups, *biases)
    ctx.sizes, ctx.backend = (len(downs), len(ups)), keyword_only_inputs["backend"]


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, downs, ups, biases = _unpacked(ctx.saved_tensors, *ctx.sizes)
    needs_x, needs_downs, needs_ups, needs_biases = ctx.needs_input_grad
    needed = needs_x, needs_downs, needs_ups, needs_biases or [False] * len(ups)
    grad_x, *grad_lists = _all_gradients(grads, x, downs, ups, biases or [None] * len(ups), needed, ctx.backend)
    grad_lists[2] = grad_lists[2] if biases else []
    return (grad_x, *grad_lists)


class _Recorded(torch.autograd.Function):
    """The op's autograd without the dispatcher: it saves the same tensors and runs the same backward."""

    @staticmethod
    def forward(ctx: Any, run: _Bound, downs: int, ups: int, backend: str, *tensors: Any) -> Any:  # type: ignore[override]
        ctx.save_for_backward(*tensors)
        ctx.sizes, ctx.backend = (downs, ups), backend
        ctx.set_materialize_grads(False)
        return tuple(detached_view(y) for y in run(*_unpacked(tensors, downs, ups)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        unpacked = _unpacked(ctx.saved_tensors, *ctx.sizes)
        needed = _unpacked(ctx.needs_input_grad[4:], *ctx.sizes)
        grad_x, *grad_lists = _all_gradients(grads, *unpacked, needed, ctx.backend)
        return (None, None, None, None, grad_x, *(grad for part in grad_lists for grad in part))


_record: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Recorded).apply


def _unpacked(values: Sequence[Any], downs: int, ups: int) -> tuple[Any, list[Any], list[Any], list[Any]]:
    """A flat sequence of x, downs, ups and biases as one and three lists."""
    return values[0], [*values[1 : 1 + downs]], [*values[1 + downs : 1 + downs + ups]], [*values[1 + downs + ups :]]


def _all_gradients(
    grads: Sequence[Tensor | None],
    x: Tensor,
    downs: Tensors,
    ups: Tensors,
    biases: Biases,
    needed: tuple[Any, ...],
    backend: str,
) -> tuple[Any, ...]:
    """The gradients of x, downs, ups and biases, member by member; None where not needed or no output had one."""
    needs_x, needs_downs, needs_ups, needs_biases = needed
    grad_x: Tensor | None = None
    grad_downs: list[Tensor | None] = [None] * len(downs)
    grad_ups: list[Tensor | None] = [None] * len(ups)
    grad_biases: list[Tensor | None] = [None] * len(ups)
    for i, (grad, up, bias) in enumerate(zip(grads, ups, biases, strict=True)):
        if grad is None:
            continue
        place = i if len(downs) == len(ups) else 0
        wanted = needs_x, needs_downs[place], needs_ups[i], needs_biases[i]
        of_x, of_down, grad_ups[i], grad_biases[i] = gradients_of(
            grad, x, downs[place], up, bias, wanted, "none", backend
        )
        grad_x, grad_downs[place] = _sum(grad_x, of_x), _sum(grad_downs[place], of_down)
    return grad_x, grad_downs, grad_ups, grad_biases


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total + part


def _decomposed(x: Tensor, downs: Tensors, ups: Tensors, biases: Tensors, *, backend: str = "auto") -> list[Tensor]:
    return reference.products(x, downs, ups, _or_none(biases, ups))


_lib.impl("lowrank_linear_grouped", _run_group, "CompositeExplicitAutograd")
torch.library.register_fake("lowrank_ops::lowrank_linear_grouped", _fake, lib=_lib)
torch.library.register_autograd(
    "lowrank_ops::lowrank_linear_grouped", _backward, setup_context=_setup_context, lib=_lib
)
register_autocast(_lib, "lowrank_linear_grouped", cast=True)
DECOMPOSED[torch.ops.lowrank_ops.lowrank_linear_grouped.default] = _decomposed
register_decomposition(torch.ops.lowrank_ops.lowrank_linear_grouped.default)(_decomposed)


def _flops(x: Tensor, downs: Tensors, ups: Tensors, *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of the GEMMs."""
    return 2 * math.prod(x.shape[:-1]) * sum(math.prod(factor.shape) for factor in (*downs, *ups))
