"""Computes the covariance updates with library GEMMs on any device and dtype. Kernels are tested against it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 192  # rows of the second moment per GEMM; almost half of the full (d, d) GEMM is skipped for d >> BLOCK
CHUNK_BYTES = 16 << 20  # limit of a chunk of rows converted to the state's dtype; memory that the allocator keeps
MIN_CHUNK_BYTES = 1 << 20  # of rows of few features, whose second moment is smaller
_TINY = 1e-30


def update(second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to the lower triangle of ``second_moment`` and the column sums of ``x`` to ``total``.

    ``x`` is converted to the state's dtype first, so that nothing is rounded before it is accumulated.
    """
    for _, rows in blocks(x, total):
        _update_block_triangle(second_moment, total, rows)


def update_conv(
    second_moment: Tensor,  # (groups, d, d) with d = channels / groups * kernel height * kernel width
    total: Tensor,  # (groups, d)
    x: Tensor,  # (batch, channels, height, width)
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    """:func:`update` over the patches of a convolution's input (im2col)."""
    for group, rows in patches(x, total, kernel_size, stride, padding, dilation):
        _update_block_triangle(second_moment[group], total[group], rows)


def blocks(x: Tensor, total: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of ``x`` (..., features) in the dtype of ``total``, some at a time, as those of group 0."""
    rows = x.reshape(-1, x.shape[-1])
    chunk = max(1, chunk_bytes(total) // max(1, x.shape[-1] * total.element_size()))
    for part in rows.split(chunk):
        yield 0, part.to(total.dtype)


def chunk_bytes(total: Tensor) -> int:
    """Bytes of the rows that are converted to the dtype of ``total`` at a time: not many more than its moment takes."""
    moment = total.numel() * total.shape[-1] * total.element_size()
    return min(CHUNK_BYTES, max(MIN_CHUNK_BYTES, moment))


def patches(
    x: Tensor,  # (batch, channels, height, width)
    total: Tensor,  # (groups, d)
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Iterator[tuple[int, Tensor]]:
    """Groups and their patches (rows, d) in the dtype of ``total``, of a few images or lines of one at a time."""
    groups, features = total.shape
    channels = x.shape[1]
    height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    line_bytes = max(1, groups * features * width * total.element_size())
    lines = max(1, min(height, chunk_bytes(total) // line_bytes))  # of the output
    images = max(1, chunk_bytes(total) // (line_bytes * height))
    vertical, horizontal = padding
    if lines < height and vertical:
        x, vertical = F.pad(x, (0, 0, vertical, vertical)), 0
    reach = dilation[0] * (kernel_size[0] - 1) + 1
    for part in x.split(images):
        for first in range(0, height, lines):
            band = part
            if lines < height:
                last = min(first + lines, height) - 1
                band = part[:, :, first * stride[0] : last * stride[0] + reach]
            band = band.to(total.dtype).reshape(-1, channels // groups, *band.shape[2:])
            columns = F.unfold(band, tuple(kernel_size), tuple(dilation), (vertical, horizontal), tuple(stride))
            columns = columns.view(-1, groups, features, columns.shape[-1])  # images first
            for group in range(groups):
                yield group, columns[:, group].transpose(1, 2).reshape(-1, features)


def errors(
    second_moment: Tensor,  # (groups, features, features)
    total: Tensor,  # (groups, features)
    rows_of: Iterable[tuple[int, Tensor]],  # from blocks or patches, in float64
    bound: float,
) -> tuple[float, float] | None:
    """The error of an update from zero relative to the sum of ``|x_i x_j|``, on at most 64 rows, and ``bound``.

    None if these sums are all zero or not finite in float32, which shows nothing. Sums below 1e-30 count as zero.
    """
    groups, features = total.shape
    # Spread over all tiles, with the first and the last row.
    picked = torch.linspace(0, features - 1, min(features, 64), dtype=torch.float64, device=total.device).long()
    moment = second_moment.new_zeros(groups, len(picked), features + 1, dtype=torch.float64)
    size = torch.zeros_like(moment)
    for group, rows in rows_of:
        rows = F.pad(rows, (0, 1), value=1.0)  # a last column of ones, which yields the sums
        moment[group] += rows[:, picked].T @ rows
        size[group] += rows[:, picked].abs().T @ rows.abs()
    ours = torch.cat([second_moment[:, picked], total[:, picked, None]], -1).double()
    used = picked[:, None] >= torch.arange(features + 1, device=total.device)  # the lower triangle
    used[:, -1] = True
    used = used & (size < torch.finfo(torch.float32).max / 2)
    if not (used & (size > _TINY)).any():
        return None
    return (((ours - moment).abs() - _TINY) / size.clamp_min(_TINY))[used].max().item(), bound


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of a convolution's output."""
    return [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(len(size))
    ]


def _update_block_triangle(second_moment: Tensor, total: Tensor, rows: Tensor) -> None:
    total += rows.sum(0)
    for start in range(0, rows.shape[1], BLOCK):
        stop = min(start + BLOCK, rows.shape[1])
        second_moment[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
