"""Device functions that the kernels of ``lowrank_linear`` share: loads, stores, casts, dot, rounding, activations.

Triton's CPU interpreter computes bfloat16 dots wrongly and truncates casts to bfloat16. Under the interpreter, ``dot``
upcasts to float32 and ``round_to`` rounds to nearest even by hand, so that its results are those of the hardware.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_tile(
    ptr,  # (rows, columns) matrix; one of its strides is 1, the other `stride`
    row,
    column,
    rows,
    columns,
    stride,
    COLUMNS_CONTIGUOUS: tl.constexpr,  # the unit stride is that of the columns
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The (ROWS, COLUMNS) tile at (row, column), zero outside the matrix.

    Only the tile's base offset is 64-bit. Offsets inside the tile are 32-bit, which halves the address registers.
    """
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    if COLUMNS_CONTIGUOUS:
        corner = ptr + (stride.to(tl.int64) * row + column)
        offsets = i[:, None] * stride + j[None, :]
    else:
        corner = ptr + (stride.to(tl.int64) * column + row)
        offsets = j[None, :] * stride + i[:, None]
    return tl.load(corner + offsets, mask=((row + i) < rows)[:, None] & ((column + j) < columns)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, value, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store ``value`` (ROWS, COLUMNS) at (row, column) of a (rows, columns) matrix with the row stride ``stride``."""
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    corner = ptr + (stride.to(tl.int64) * row + column)
    mask = ((row + i) < rows)[:, None] & ((column + j) < columns)[None, :]
    tl.store(corner + (i[:, None] * stride + j[None, :]), value, mask=mask)


@triton.jit
def widened(tile, dtype: tl.constexpr):
    """An 8-bit tile in the 16-bit ``dtype``, which holds all of its values; a 16-bit tile as it is."""
    if tile.dtype != dtype:
        tile = tile.to(tl.float32 if INTERPRETED else dtype)
    return tile


@triton.jit
def load_scale(ptr, first, count, COUNT: tl.constexpr):
    """float32 scales of the rows from ``first`` on, zero past the last one."""
    rows = first + tl.arange(0, COUNT)
    return tl.load(ptr + rows, mask=rows < count, other=0.0).to(tl.float32)


@triton.jit
def dot(a, b, accumulator):
    """``accumulator + a b`` for (m, k) and (k, n) tiles of one 16-bit dtype; the accumulator is float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """float32 ``value`` rounded to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """The activation of float32 ``value``. tanh is computed as tanh(u) = 2 sigmoid(2 u) - 1."""
    if ACTIVATION == "relu":
        # A comparison propagates NaN as torch does; a maximum would not.
        value = tl.where(value < 0.0, 0.0, value)
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    elif ACTIVATION == "silu":
        value = value * tl.sigmoid(value)
    return value
