"""Symmetric matrices stored as their lower triangles, in memory or in a temporary file."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops import covariance_finalize_

ROWS = 64  # of a matrix that are copied at a time


def empty_in_file(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in a file that is mapped into memory, and has no name where the system allows that.

    Raises:
        OSError: the disk is full, or there is no folder for temporary files.
    """
    count, bytes_ = math.prod(shape), math.prod(shape) * dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype)
    try:
        with _temporary_file() as (handle, name):
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash in the mapping
                os.posix_fallocate(handle, 0, bytes_)
            return torch.from_file(name, shared=True, size=count, dtype=dtype).view(*shape)
    except OSError as error:
        where = os.environ.get("TMPDIR") or tempfile.tempdir
        message = f"{error.strerror or error}: no temporary file of {bytes_:,} bytes (TMPDIR={where})"
        remedy = "make room there, or set TMPDIR to another folder before Python starts"
        raise OSError(error.errno, f"{message}; {remedy}") from error


@contextlib.contextmanager
def _temporary_file() -> Iterator[tuple[int, str]]:
    """The descriptor of a file, and a name to open it by inside the block."""
    if os.path.exists("/proc/self/fd"):  # Linux, where the file itself needs no name: a killed process leaves none
        with tempfile.TemporaryFile() as file:
            yield file.fileno(), f"/proc/self/fd/{file.fileno()}"
        return
    handle, name = tempfile.mkstemp(prefix="lowrank_ops_", suffix=".sums")
    try:
        yield handle, name
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(name)


def lower_triangle(matrices: Tensor, out: Tensor | None = None) -> Tensor:
    """The lower triangles of (..., n, n), row by row, (..., n (n + 1) / 2); in ``out`` if that is given."""
    n = matrices.shape[-1]
    if out is None:
        out = matrices.new_empty(*matrices.shape[:-2], n * (n + 1) // 2)
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        rows = [matrices[..., i, : i + 1] for i in range(start, stop)]
        out[..., start * (start + 1) // 2 : stop * (stop + 1) // 2] = torch.cat(rows, -1)
    return out


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
