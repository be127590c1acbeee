"""Defines ``lowrank_ops::lowrank_experts``: low-rank linear layers of several experts on rows sorted by expert.

Schema, validation, fake kernel, autograd, autocast and ``TABLE``; ``reference`` computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_compiling

from ...arguments import checked
from .._backend import Backend, Device, Impl, choose, device_facts, row_stride
from .._backend import explain as _explain
from .._decompositions import DECOMPOSED
from .._dispatcher import all_plain, can_bypass, count_flops, in_transform, is_recorded, register_autocast
from . import reference

# Copying the factors of an expert into stacks has to take less time than the launches of its two GEMMs: about 10 us, in
# which an H100 copies this many bytes. An estimate, not measured.
MAX_STACKED_BYTES = 8 * 2**20


class Problem(NamedTuple):
    """Everything the choice of an implementation may depend on."""

    dtype: torch.dtype
    aligned: bool  # x and its rows start on 16 bytes, and so do the rows of each down
    all_factored: bool  # no expert has its weight whole
    stacked_bytes: int  # of the factors of one expert, padded to the largest rank
    device: Device


def _supports_grouped(problem: Problem) -> str | None:
    if problem.device.type != "cuda" or problem.device.capability < (8, 0):
        return "needs a CUDA device of compute capability 8.0 or newer"
    if problem.dtype is not torch.bfloat16:
        return "needs bfloat16"
    if not problem.all_factored:
        return "an expert has its weight whole"
    return None if problem.aligned else "needs x and in_features aligned to 16 bytes"


TABLE: tuple[Impl, ...] = (
    Impl(
        "grouped",
        Backend.REFERENCE,
        _supports_grouped,
        reference.grouped,
        lambda problem: problem.stacked_bytes <= MAX_STACKED_BYTES,
    ),
    Impl(
        "by_expert",
        Backend.REFERENCE,
        lambda problem: None,
        lambda x, ends, *factors: reference.by_expert(x, ends.tolist(), *factors),
    ),
)


def lowrank_experts(
    x: Tensor,  # (rows, in_features)
    ends: Tensor,  # (experts,)
    downs: Sequence[Tensor],  # each (rank, in_features)
    ups: Sequence[Tensor | None],  # each (out_features, rank)
    biases: Sequence[Tensor | None],  # each (out_features,)
) -> Tensor:  # (rows, out_features)
    """Apply the low-rank linear layer of expert ``e`` to the rows ``ends[e - 1]`` to ``ends[e]`` of x.

    One op, whose shapes do not depend on how many rows an expert has. On a CPU it computes one expert after another. On
    a CUDA device in bfloat16 it uses ``torch.nn.functional.grouped_mm`` with stacks of the factors, where copying them
    is cheap; this was not run on a GPU. ``torch.export`` and tracing by ``torch.jit`` record torch's own ops, in which
    all experts compute all rows. Differentiable once in x, factors and biases; autocast as for
    :func:`lowrank_ops.ops.lowrank_linear`.

    Args:
        x: (rows, in_features), float64, float32, bfloat16 or float16, sorted by expert.
        ends: (experts,), int32 or int64, in ascending order: the end of the rows of each expert.
        downs: per expert (rank, in_features), the dtype of x; ranks may differ.
        ups: per expert (out_features, rank); None if its down is a whole weight (out_features, in_features).
        biases: per expert (out_features,), or None.

    Returns:
        (rows, out_features), the dtype of x; rows from ``ends[-1]`` on are zero.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, dtype or device does not fit, or ``ends`` is not in ascending order.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> x, ends = torch.randn(10, 64), torch.tensor([4, 10])  # 4 and 6 rows
        >>> downs, ups = [torch.randn(8, 64), torch.randn(16, 64)], [torch.randn(32, 8), torch.randn(32, 16)]
        >>> y = lro.ops.lowrank_experts(x, ends, downs, ups, [None, None])
        >>> torch.testing.assert_close(y[4:], lro.ops.lowrank_linear(x[4:], downs[1], ups[1]), atol=1e-4, rtol=1e-4)
    """
    factors = _lists(x, ends, downs, ups, biases)
    if is_recorded() or in_transform():
        return reference.masked(x, ends, *factors)
    if can_bypass(x, ends, x, None) and all_plain(*factors):
        grads = torch.is_grad_enabled() and (x.requires_grad or any(f.requires_grad for part in factors for f in part))
        if not grads:
            return _run(x, ends, *factors)
    if not is_compiling():
        count_flops(torch.ops.lowrank_ops.lowrank_experts, _flops)
        count_flops(_gradients, _gradient_flops)
    result: Tensor = torch.ops.lowrank_ops.lowrank_experts(x, ends, *factors)
    return result


@checked()
def explain(
    x: Tensor, ends: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor | None], biases: Sequence[Tensor | None]
) -> str:
    """Which implementation runs this ``lowrank_experts`` call, and why the other one does not."""
    factors = _lists(x, ends, downs, ups, biases)
    _check(x, ends, *factors)
    return _explain(TABLE, _describe(x, *factors))


def _lists(x: Any, ends: Any, *lists: Any) -> tuple[list[Tensor], ...]:
    """Downs, ups and biases as the op takes them: an empty tensor where one is missing."""
    for name, value in (("x", x), ("ends", ends)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}.")
    none = x.new_empty(0)
    for name, parts in zip(("downs", "ups", "biases"), lists, strict=True):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name} must be a list with one tensor per expert; got {type(parts).__name__}.")
        for index, part in enumerate(parts):
            if not isinstance(part, Tensor) and (part is not None or name == "downs"):
                raise TypeError(f"{name}[{index}] must be a tensor; got {type(part).__name__}.")
    return tuple([none if part is None else part for part in parts] for parts in lists)


def _describe(x: Tensor, downs: list[Tensor], ups: list[Tensor], biases: list[Tensor]) -> Problem:
    size, rank = x.element_size(), max(map(len, downs))
    return Problem(
        x.dtype,
        (x.data_ptr() | row_stride(x) * size | x.shape[1] * size) & 15 == 0,
        all(up.dim() == 2 for up in ups),
        rank * (x.shape[1] + reference.out_features(downs, ups)) * size,
        device_facts(x.device),
    )


def _check(x: Tensor, ends: Tensor, downs: list[Tensor], ups: list[Tensor], biases: list[Tensor]) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (rows, in_features); got {x.dtype} {tuple(x.shape)}.")
    if ends.dim() != 1 or ends.dtype not in (torch.int32, torch.int64) or ends.device != x.device:
        raise ValueError(
            f"ends must be int32 or int64 of shape (experts,) on {x.device}; got {ends.dtype} {tuple(ends.shape)} on "
            f"{ends.device}."
        )
    if not downs or not len(ends) == len(downs) == len(ups) == len(biases):
        raise ValueError(
            "ends, downs, ups and biases must have one entry per expert; got "
            f"{len(ends)}, {len(downs)}, {len(ups)} and {len(biases)}."
        )
    if downs[0].dim() != 2:
        raise ValueError(f"downs[0] must have shape (rank, {x.shape[1]}); got {tuple(downs[0].shape)}.")
    features = reference.out_features(downs, ups)
    dtype, device, in_features = x.dtype, x.device, x.shape[1]
    for index, (down, up, bias) in enumerate(zip(downs, ups, biases, strict=True)):
        rank = down.shape[0] if up.dim() == 2 else features
        if down.shape != (rank, in_features) or (up.dim() == 2 and up.shape != (features, rank)):
            whole = "" if up.dim() == 2 else ", a whole weight,"
            raise ValueError(
                f"downs[{index}]{whole} must have shape ({'rank' if up.dim() == 2 else features}, {in_features}), and "
                f"ups[{index}] ({features}, rank); got {tuple(down.shape)} and {tuple(up.shape)}."
            )
        if bias.shape not in ((features,), (0,)):
            raise ValueError(f"biases[{index}] must have shape ({features},) or be None; got {tuple(bias.shape)}.")
        for name, tensor in (("downs", down), ("ups", up), ("biases", bias)):
            if tensor.dtype != dtype or tensor.device != device:
                raise ValueError(
                    f"{name}[{index}] must have the dtype and device of x, {dtype} on {device}; got {tensor.dtype} on "
                    f"{tensor.device}."
                )


_lib = torch.library.Library("lowrank_ops", "FRAGMENT")
_lib.define("lowrank_experts(Tensor x, Tensor ends, Tensor[] downs, Tensor[] ups, Tensor[] biases) -> Tensor")
_lib.define(
    "lowrank_experts_backward(Tensor grad, Tensor x, Tensor ends, Tensor[] downs, Tensor[] ups, Tensor[] biases, "
    "bool[] needed) -> Tensor[]"
)
_gradients = torch.ops.lowrank_ops.lowrank_experts_backward


def _run(x: Tensor, ends: Tensor, downs: list[Tensor], ups: list[Tensor], biases: list[Tensor]) -> Tensor:
    _check(x, ends, downs, ups, biases)
    y: Tensor = choose(TABLE, _describe(x, downs, ups, biases), "auto").run(x, ends, downs, ups, biases)
    return y


def _fake(x: Tensor, ends: Tensor, downs: list[Tensor], ups: list[Tensor], biases: list[Tensor]) -> Tensor:
    _check(x, ends, downs, ups, biases)
    return x.new_empty(x.shape[0], reference.out_features(downs, ups))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ends, *factors = inputs
    ctx.save_for_backward(x, ends, *(tensor for part in factors for tensor in part))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, ends, *flat = ctx.saved_tensors
    needs_x, _, *rest = ctx.needs_input_grad
    needed = [needs_x, *(need for part in rest for need in part)]
    experts = len(flat) // 3
    parts = flat[:experts], flat[experts : 2 * experts], flat[2 * experts :]
    found = iter(_gradients(grad, x, ends, *parts, needed))
    grads = [next(found) if need else None for need in needed]
    return grads[0], None, *(grads[1 + i * experts : 1 + (i + 1) * experts] for i in range(3))


def _run_backward(
    grad: Tensor,
    x: Tensor,
    ends: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    biases: list[Tensor],
    needed: list[bool],
) -> list[Tensor]:
    return reference.backward(grad, x, ends.tolist(), downs, ups, biases, needed)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    ends: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    biases: list[Tensor],
    needed: list[bool],
) -> list[Tensor]:
    inputs = [x, *downs, *ups, *biases]
    return [torch.empty_like(tensor) for tensor, need in zip(inputs, needed, strict=True) if need]


_lib.impl("lowrank_experts", _run, "CompositeExplicitAutograd")
_lib.impl("lowrank_experts_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("lowrank_ops::lowrank_experts", _fake, lib=_lib)
torch.library.register_fake("lowrank_ops::lowrank_experts_backward", _fake_backward, lib=_lib)
torch.library.register_autograd("lowrank_ops::lowrank_experts", _backward, setup_context=_setup_context, lib=_lib)
register_autocast(_lib, "lowrank_experts", cast=True)
DECOMPOSED[torch.ops.lowrank_ops.lowrank_experts.default] = reference.masked


def _flops(x: Tensor, ends: Tensor, downs: list[Tensor], ups: list[Tensor], *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of two GEMMs per expert."""
    sizes = [down.numel() + up.numel() for down, up in zip(downs, ups, strict=True)]
    return 2 * sum(rows * size for rows, size in zip(_rows(x, ends), sizes, strict=True))


def _gradient_flops(
    grad: Tensor,
    x: Tensor,
    ends: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    biases: list[Tensor],
    needed: list[bool],
    **kwargs: Any,
) -> int:
    total, experts = 0, len(downs)
    for index, rows in enumerate(_rows(x, ends)):
        down, up = downs[index].numel(), ups[index].numel()
        needs_down, needs_up = needed[1 + index], needed[1 + experts + index]
        total += 2 * rows * (needs_up * (down + up) + (needed[0] or needs_down) * up + (needed[0] + needs_down) * down)
    return total


def _rows(x: Tensor, ends: Tensor) -> list[int]:
    """The rows of each expert; fake tensors have no values, so their rows are divided evenly."""
    if is_fake(ends):
        return [len(x) // len(ends)] * len(ends)
    return ends.diff(prepend=ends.new_zeros(1)).tolist()  # type: ignore[no-any-return]
