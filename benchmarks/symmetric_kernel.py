"""``x^T x`` by a Triton kernel in the style published for the Muon optimizer: a baseline, not part of lowrank_ops.

One program per tile of the lower triangle runs over all tokens and writes its tile and the tile's mirror image. There
is no split over tokens, no accumulation in place and no column sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D, BLOCK_T, WARPS, STAGES = 128, 64, 8, 4


def tokens_per_step(itemsize: int) -> int:
    """``BLOCK_T`` for 16-bit inputs; half of it for float32, which would not fit in shared memory."""
    return BLOCK_T * 2 // itemsize


@triton.jit
def symmetric_kernel(
    x_ptr,  # (tokens, features)
    out_ptr,  # (features, features)
    tokens,
    features,
    x_stride,
    out_stride,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies bfloat16 wrongly
):
    # Tile t of the lower triangle: the largest row r with r (r + 1) / 2 <= t.
    tile = tl.program_id(0)
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    column = tile - row * (row + 1) // 2

    rows = row * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = column * BLOCK_D + tl.arange(0, BLOCK_D)
    steps = tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        line = (start + steps).to(tl.int64) * x_stride
        live = start + steps < tokens
        left = tl.load(
            x_ptr + line[None, :] + rows[:, None], mask=(rows < features)[:, None] & live[None, :], other=0.0
        )
        right = tl.load(
            x_ptr + line[:, None] + columns[None, :], mask=live[:, None] & (columns < features)[None, :], other=0.0
        )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc)
    inside = (rows < features)[:, None] & (columns < features)[None, :]
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], acc, mask=inside)
    if row != column:
        tl.store(out_ptr + rows[:, None] + columns[None, :] * out_stride, acc, mask=inside)


def symmetric_product(x: Tensor, block_d: int = BLOCK_D, block_t: int | None = None) -> Tensor:
    """``x^T x`` (features, features) in float32 for ``x`` (tokens, features)."""
    tokens, features = x.shape
    out = torch.empty(features, features, device=x.device)
    tile_rows = triton.cdiv(features, block_d)
    symmetric_kernel[(tile_rows * (tile_rows + 1) // 2,)](
        x,
        out,
        tokens,
        features,
        x.stride(0),
        out.stride(0),
        BLOCK_D=block_d,
        BLOCK_T=block_t or tokens_per_step(x.element_size()),
        UPCAST=not x.is_cuda,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out
