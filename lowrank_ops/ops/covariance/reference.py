"""Computes the covariance updates with library GEMMs on any device and dtype. Kernels are tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

BLOCK = 192  # rows of the second moment per GEMM; almost half of the full (d, d) GEMM is skipped for d >> BLOCK
CHUNK_BYTES = 16 << 20  # limit of a chunk of rows converted to the state's dtype; memory that the allocator keeps


def update(second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to the lower triangle of ``second_moment`` and the column sums of ``x`` to ``total``.

    ``x`` is converted to the state's dtype first, so that nothing is rounded before it is accumulated.
    """
    features = x.shape[-1]
    rows = x.reshape(-1, features)
    chunk = max(1, CHUNK_BYTES // max(1, features * second_moment.element_size()))
    for part in rows.split(chunk):
        _update_block_triangle(second_moment, total, part.to(second_moment.dtype))


def update_conv(
    second_moment: Tensor,  # (groups, d, d) with d = channels / groups * kernel height * kernel width
    total: Tensor,  # (groups, d)
    x: Tensor,  # (batch, channels, height, width)
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    """:func:`update` over the patches of a convolution's input (im2col), a few images or lines of one at a time."""
    groups, features = total.shape
    channels = x.shape[1]
    height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    line_bytes = max(1, groups * features * width * second_moment.element_size())
    lines = max(1, min(height, CHUNK_BYTES // line_bytes))  # of the output
    images = max(1, CHUNK_BYTES // (line_bytes * height))
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
            band = band.to(second_moment.dtype).reshape(-1, channels // groups, *band.shape[2:])
            patches = F.unfold(band, tuple(kernel_size), tuple(dilation), (vertical, horizontal), tuple(stride))
            patches = patches.view(-1, groups, features, patches.shape[-1])  # images first
            for group in range(groups):
                rows = patches[:, group].transpose(1, 2).reshape(-1, features)
                _update_block_triangle(second_moment[group], total[group], rows)


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
