"""The low-rank ops as torch's own matrix products, for exported programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DECOMPOSED: dict[Any, Callable[..., Any]] = {}  # each op adds its own


def decompositions() -> dict[Any, Callable[..., Any]]:
    """torch.export's default decompositions and those of the low-rank ops into matrix products.

    For exported programs that hold an op because it was called with a named backend; others hold products already.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x, down, up):
        ...         return lro.ops.lowrank_linear(x, down, up, backend="reference")
        >>> tensors = torch.randn(4, 64), torch.randn(8, 64), torch.randn(32, 8)
        >>> exported = torch.export.export(Model(), tensors).run_decompositions(lro.ops.decompositions())
        >>> "lowrank" in exported.graph_module.code
        False
    """
    table: dict[Any, Callable[..., Any]] = torch.export.default_decompositions()
    table.update(DECOMPOSED)
    return table
