"""Inputs, activations and error bound of ``lowrank_linear``, for the tests of the op on all kinds of devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ops.ops.linear import reference
from tests.tolerance import assert_close_to_float64

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def linear_inputs(
    *leading: int,
    in_features: int = 24,
    rank: int = 8,
    out_features: int = 16,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x (*leading, in_features), down, up and bias, scaled so that y is of order 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    return (
        normal(*leading, in_features),
        normal(rank, in_features, scale=max(in_features, 1) ** -0.5),
        normal(out_features, rank, scale=max(rank, 1) ** -0.5),
        normal(out_features) if bias else None,
    )


def eight_bit(factor: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An 8-bit factor whose rows have different scales, and the scales."""
    largest = 127.0 if dtype is torch.int8 else 448.0
    scale = (factor.float().abs().amax(1).clamp(min=1e-3) / largest).to(scale_dtype)
    values = (factor.float() / scale.float()[:, None]).clamp(-largest, largest)
    return (values.round() if dtype is torch.int8 else values).to(dtype), scale


def assert_linear(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> None:
    """The error of ``y`` against float64 is at most twice that of two library GEMMs in the dtype of ``x``.

    8-bit factors are exact: their values times their scales are the weights of both.
    """
    exact = [
        factor.double() if scale is None else factor.double() * scale.double()[:, None]
        for factor, scale in ((down, down_scale), (up, up_scale))
    ]
    wide = x.double(), *exact, None if bias is None else bias.double()
    same = x, *(factor.to(x.dtype) for factor in exact), bias
    assert_close_to_float64(y, reference.two_products(*same, activation), reference.two_products(*wide, activation))


def grouped_inputs(
    *leading: int,
    in_features: int = 24,
    ranks: Sequence[int] = (8, 4, 5),
    out_features: Sequence[int] = (16, 7, 9),
    dtype: torch.dtype = torch.float32,
    biases: Sequence[bool] | None = None,
    shared: bool = False,
) -> tuple[Tensor, list[Tensor] | Tensor, list[Tensor], list[Tensor | None]]:
    """x, down, ups and biases of ``lowrank_linear_grouped``; a shared down has the first rank."""
    sizes = [(ranks[0] if shared else rank, out) for rank, out in zip(ranks, out_features, strict=True)]
    members = [
        linear_inputs(
            *leading,
            in_features=in_features,
            rank=rank,
            out_features=out,
            dtype=dtype,
            bias=biases is None or biases[i],
            seed=i,
        )
        for i, (rank, out) in enumerate(sizes)
    ]
    xs, downs, ups, given = map(list, zip(*members, strict=True))
    return xs[0], downs[0] if shared else downs, ups, given


def assert_grouped(
    ys: Sequence[Tensor], x: Tensor, down: Sequence[Tensor] | Tensor, ups: Sequence[Tensor], biases: Sequence[Any]
) -> None:
    """Each member's error is within the bound of ``lowrank_linear``."""
    downs = [down] * len(ups) if isinstance(down, Tensor) else down
    for y, *member in zip(ys, downs, ups, biases, strict=True):
        assert_linear(y, x, *member, "none")
