"""Symmetric matrices stored as their lower triangles, in memory or in a temporary file."""

from __future__ import annotations

import contextlib
import os
import tempfile

import torch
from torch import Tensor

from ..ops import covariance_finalize_


def in_file(tensor: Tensor) -> Tensor:
    """A copy in a file that is mapped into memory, and has no name where the system allows that."""
    if not tensor.numel():
        return tensor
    handle, name = tempfile.mkstemp(prefix="lowrank_ops_", suffix=".sums")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, tensor.nbytes)  # a full disk is an error here, and a crash in the mapping
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        return mapped.copy_(tensor)
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(name)


def lower_triangle(matrices: Tensor) -> Tensor:
    """The lower triangles of (..., n, n), row by row, (..., n (n + 1) / 2)."""
    rows = [matrices[..., i, : i + 1] for i in range(matrices.shape[-1])]
    return torch.cat(rows, -1) if rows else matrices.flatten(-2)


def from_lower_triangle(packed: Tensor, n: int) -> Tensor:
    """The symmetric matrices (..., n, n) of :func:`lower_triangle`.

    Raises:
        ValueError: ``packed`` has another size.
    """
    if packed.dim() == 0 or packed.shape[-1] != n * (n + 1) // 2:
        raise ValueError(
            f"a second_moment has shape {tuple(packed.shape)}, not (..., {n * (n + 1) // 2}), the lower triangle of "
            f"{n} features"
        )
    matrices = packed.new_empty(*packed.shape[:-1], n, n)
    for i, row in enumerate(packed.split(list(range(1, n + 1)), -1)):
        matrices[..., i, : i + 1] = row
    return covariance_finalize_(matrices)
