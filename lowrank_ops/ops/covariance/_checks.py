"""Checks of the arguments of the covariance ops: shapes, dtypes, devices, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import reference

_STATE_DTYPES = (torch.float32, torch.float64)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_in_place(second_moment: Tensor, total: Tensor) -> None:
    """Raise ValueError for a state that autograd or a lazy negation keeps from being updated in place."""
    for name, tensor in (("second_moment", second_moment), ("total", total)):
        if is_compiling() or not isinstance(tensor, Tensor):  # a proxy of torch.fx
            continue
        if tensor.is_neg() or (tensor.requires_grad and torch.is_grad_enabled()):
            raise ValueError(
                f"{name} is updated in place, so it must not require a gradient or be a negative view; pass a detached "
                "copy."
            )


def check_pair(name: str, value: Sequence[int]) -> list[int]:
    """``value`` as a list of two integers, (height, width).

    Raises:
        ValueError: it is none, or one of them is too small.
    """
    minimum = 0 if name == "padding" else 1
    pair = list(value) if isinstance(value, Sequence) else []
    if len(pair) != 2 or not all(isinstance(part, (int, torch.SymInt)) and part >= minimum for part in pair):
        raise ValueError(f"{name} must be two integers (height, width) of at least {minimum}; got {pair or value!r}.")
    return pair


def check(second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    """Raise ValueError for the first argument that does not fit the others."""
    if x.dim() == 0:
        raise ValueError("x must have shape (..., features); got a scalar.")
    features = x.shape[-1]
    if second_moment.shape != (features, features):
        raise ValueError(
            f"second_moment must have shape ({features}, {features}) to take x with {features} features; "
            f"got {tuple(second_moment.shape)}."
        )
    if total.shape != (features,):
        raise ValueError(f"total must have shape ({features},); got {tuple(total.shape)}.")
    _check_dtypes(second_moment, total, x)


def _check_dtypes(second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    if second_moment.dtype not in _STATE_DTYPES or total.dtype != second_moment.dtype:
        raise ValueError(
            "second_moment and total must share one dtype, float32 or float64; "
            f"got {second_moment.dtype} and {total.dtype}."
        )
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float64, float32, bfloat16 or float16; got {x.dtype}.")
    if x.dtype == torch.float64 and second_moment.dtype == torch.float32:
        raise ValueError("x is float64 but the state is float32, which would round it; use a float64 state.")
    if not (second_moment.device == total.device == x.device):
        raise ValueError(
            "second_moment, total and x must be on one device; "
            f"got {second_moment.device}, {total.device} and {x.device}."
        )


def check_memory(second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    """Refuse memory that would be written while it is read, or twice; a fake tensor has none."""
    spans = {}
    for name, tensor in (("second_moment", second_moment), ("total", total), ("x", x)):
        state = name != "x"
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor; got {tensor.layout}.")
        sizes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
        if state and any(stride < inner for (stride, _), inner in zip(sizes, _extents(sizes), strict=True)):
            raise ValueError(f"{name} has elements that share memory (strides {tensor.stride()}); pass a clone.")
        if tensor.numel():
            extent = 1 + sum(stride * (size - 1) for stride, size in sizes)
            spans[name] = tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()
    for one, other in (("second_moment", "total"), ("second_moment", "x"), ("total", "x")):
        if (
            one in spans
            and other in spans
            and max(spans[one][0], spans[other][0]) < min(spans[one][1], spans[other][1])
        ):
            raise ValueError(f"{one} and {other} share memory; pass a clone of {other}.")


def _extents(sizes: Sequence[tuple[int, int]]) -> Iterator[int]:
    """By rising stride, the elements that the dimensions before each one span."""
    extent = 1
    for stride, size in sizes:
        yield extent
        extent += stride * (size - 1)


def check_conv(
    second_moment: Tensor, total: Tensor, x: Tensor, kernel_size: Sequence[int], geometry: dict[str, Sequence[int]]
) -> None:
    """:func:`check` for the patches of a convolution."""
    for name, value in {"kernel_size": kernel_size, **geometry}.items():
        check_pair(name, value)
    if x.dim() != 4:
        raise ValueError(f"x must have shape (batch, channels, height, width); got {tuple(x.shape)}.")
    if total.dim() != 2 or second_moment.shape != (*total.shape, total.shape[-1]):
        raise ValueError(
            "second_moment must be (groups, d, d) and total (groups, d); "
            f"got {tuple(second_moment.shape)} and {tuple(total.shape)}."
        )
    groups, features = total.shape
    if groups * features != x.shape[1] * kernel_size[0] * kernel_size[1] or x.shape[1] % max(groups, 1) or not groups:
        raise ValueError(
            f"total with {groups} groups of {features} features does not fit x with {x.shape[1]} channels and a "
            f"kernel of {kernel_size[0]} x {kernel_size[1]}: d must be channels / groups * height * width."
        )
    if min(reference.output_size(x.shape[2:], kernel_size, **geometry)) < 1:
        raise ValueError(
            f"kernel_size {list(kernel_size)} with dilation {list(geometry['dilation'])} is larger than the padded "
            f"input {tuple(x.shape[2:])} + 2 * {list(geometry['padding'])}."
        )
    _check_dtypes(second_moment, total, x)
