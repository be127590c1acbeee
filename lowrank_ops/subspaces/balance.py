"""The scale of the two factors of a layer, direction by direction."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import LayerSubspaces

MAX_HIDDEN = 1024.0  # root mean square of an element of x down^T; outliers of 60 times as much fit into float16


def balance(spaces: LayerSubspaces, down: Tensor, up: Tensor, reader: Tensor | None, squares: Tensor | None) -> Tensor:
    """Powers of two (..., rank) to multiply ``down`` by and to divide ``up`` by, which leaves their product unchanged.

    With an orthonormal ``up``, an element of t = x down^T may be as large as the norm of the whole output, and overflow
    float16 although no output does. So the largest elements of both factors are made equal up to a factor of 2, and the
    root mean square of t over the calibration rows is kept well inside the range of float16, also for autocast.
    """
    largest = down.abs().amax(-1), up.abs().amax(-2)
    balanced = (largest[1].log2() - largest[0].log2()) / 2
    if reader is not None and squares is not None:
        square = squares
        if spaces.centered:
            square = square + (reader @ spaces.mean.unsqueeze(-1)).squeeze(-1).square()
        size = square.sqrt()
        limit = torch.where(size > 0, torch.log2(MAX_HIDDEN / size), torch.inf)  # size is NaN without rows
        balanced = torch.minimum(balanced, limit)
    usable = (largest[0] > 0) & (largest[1] > 0) & balanced.isfinite()
    return torch.exp2(torch.where(usable, balanced, 0.0).floor())
