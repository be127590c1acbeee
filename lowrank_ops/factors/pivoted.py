"""Factors of pivoted layers: pivot rows of the product, the coefficients of its other rows, and their order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..models.running import float64_device
from ..subspaces.pivots import pivoted_rows


class Pivots(NamedTuple):
    """What a :class:`lowrank_ops.layers.PivotedLinear` holds."""

    down: Tensor  # (rank, in_features), the pivot rows
    up: Tensor  # (out_features - rank, rank), the coefficients of the others
    order: Tensor  # (out_features,), int64: the index of each row in the concatenation of pivots and others


def pivots_of(down: Tensor, up: Tensor) -> Pivots:
    """The pivots of ``up @ down``, computed in float64, in their dtype."""
    wide_down, wide_up = (part.to(float64_device(part.device), torch.float64) for part in (down, up))
    pivots, others, coefficients = pivoted_rows(wide_up)
    order = torch.cat([pivots, others]).argsort()
    return Pivots((wide_up[pivots] @ wide_down).to(down), coefficients.to(up), order.to(up.device))


def all_coefficients(up: Tensor, order: Tensor) -> Tensor:
    """The coefficients of the pivots too, (out_features, rank): the second of two factors, of which ``down`` is one."""
    eye = torch.eye(up.shape[1], dtype=up.dtype, device=up.device)
    return torch.cat([eye, up]).index_select(0, order)
