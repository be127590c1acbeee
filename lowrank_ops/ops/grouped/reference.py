"""Computes ``lowrank_linear_grouped`` with library GEMMs on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..linear import reference


def products(
    x: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """``(x down_i^T) up_i^T + bias_i`` of each member; a shared ``down`` is applied once."""
    between = [F.linear(x, down) for down in downs]
    if len(between) < len(ups):
        between *= len(ups)
    return [F.linear(t, up, bias) for t, up, bias in zip(between, ups, biases, strict=True)]


def errors(
    ys: Sequence[Tensor], x: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[float, float] | None:
    """The error and the allowed error of the worst member, as for ``lowrank_linear``; None if no member shows any."""
    downs = [*downs] * (len(ups) // len(downs))
    each = [
        reference.errors(y, x, down, up, bias, "none") for y, down, up, bias in zip(ys, downs, ups, biases, strict=True)
    ]
    known = [pair for pair in each if pair is not None]
    # NaN is the worst of all: no comparison with it is true.
    return max(known, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"), default=None)
