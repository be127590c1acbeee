"""What the low-rank kernels share: loading a tile, multiplying, rounding to the storage dtype, activations.

Triton's CPU interpreter multiplies bfloat16 wrongly and truncates where the hardware rounds to nearest even; under it
both are done as the hardware does them, so that a result checked there is the result expected on a device.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_tile(
    ptr,  # a (rows, columns) matrix, one of its strides 1, the other `stride`
    row,
    column,
    rows,
    columns,
    stride,
    ALONG_COLUMNS: tl.constexpr,  # the unit stride is that of the columns
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The (ROWS, COLUMNS) tile that starts at (row, column); zeros outside of the matrix.

    Only the corner's offset is 64 bits wide: within a tile 32 suffice, and half the address registers.
    """
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    if ALONG_COLUMNS:
        corner = ptr + (stride.to(tl.int64) * row + column)
        offsets = i[:, None] * stride + j[None, :]
    else:
        corner = ptr + (stride.to(tl.int64) * column + row)
        offsets = j[None, :] * stride + i[:, None]
    return tl.load(corner + offsets, mask=((row + i) < rows)[:, None] & ((column + j) < columns)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, value, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store ``value`` (ROWS, COLUMNS) at (row, column) of a contiguous (rows, columns) matrix."""
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    corner = ptr + (columns.to(tl.int64) * row + column)
    mask = ((row + i) < rows)[:, None] & ((column + j) < columns)[None, :]
    tl.store(corner + (i[:, None] * columns + j[None, :]), value, mask=mask)


@triton.jit
def product(a, b, accumulator):
    """``accumulator + a b``: (m, k) and (k, n) in one 16-bit dtype, summed in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 ``value`` in ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """The activation of float32 ``value``; tanh by way of the sigmoid: tanh(u) = 2 sigmoid(2 u) - 1."""
    if ACTIVATION == "relu":
        # Comparing, not taking the maximum, lets a NaN through as torch does.
        value = tl.where(value < 0.0, 0.0, value)
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    elif ACTIVATION == "silu":
        value = value * tl.sigmoid(value)
    return value
