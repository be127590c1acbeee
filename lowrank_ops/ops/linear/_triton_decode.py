"""Few rows of x: every byte of the factors is read once, and the second factor's before the first product is done.

Three kernels with the weights as the rows of each tensor-core product, so that a few tokens waste little of it:

    down_kernel   partial[s] = x[:, s] down[:, s]^T        one block per (rows of down, slice s of in_features)
    sum_kernel    t = sum_s partial[s]                     only where t is too large for up_kernel to sum by itself
    up_kernel     y = activation(t up^T + bias)            one block per rows of up

The slices are added in order: a result does not depend on the order in which blocks run. The partial sums are written
whole before they are read, so scratch needs no zeroing. From sm_90 on the kernels overlap by programmatic dependent
launch: up_kernel has its rows of ``up`` on the way while down_kernel still runs, and waits for it only then.

Sizes and strides reach the kernels divided by VECTOR, which makes the multiples of 8 visible to the compiler: ranks
are multiples of 8 but seldom of 16, which is all that Triton would find out by itself.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from ._triton_tile import activated, load_tile, product, rounded, store_tile


@triton.jit(do_not_specialize=["tokens", "in_features", "rank", "x_stride", "down_stride", "slice_blocks"])
def down_kernel(
    x_ptr,  # (tokens, in_features), rows x_stride apart
    down_ptr,  # (rank, in_features), one of its strides 1, the other down_stride
    partial_ptr,  # (slices, tokens, rank), float32 or the dtype of x
    tokens,
    in_features,
    rank,
    x_stride,
    down_stride,
    slice_blocks,  # of BLOCK_K features, in a slice
    VECTOR: tl.constexpr,
    DOWN_ALONG_K: tl.constexpr,  # the features of a row of down are neighbours
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        cuda.gdc_launch_dependents()
    in_features = in_features * VECTOR
    rank = rank * VECTOR
    x_stride = x_stride * VECTOR
    down_stride = down_stride * VECTOR
    r = tl.program_id(0) * BLOCK_R
    slice_ = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M

    accumulator = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
    first = slice_ * slice_blocks
    last = tl.minimum(first + slice_blocks, tl.cdiv(in_features, BLOCK_K))
    for block in range(first, last):
        k = block * BLOCK_K
        weights = load_tile(down_ptr, r, k, rank, in_features, down_stride, DOWN_ALONG_K, BLOCK_R, BLOCK_K)
        values = load_tile(x_ptr, m, k, tokens, in_features, x_stride, True, BLOCK_M, BLOCK_K)
        accumulator = product(weights, values.T, accumulator)

    partial_ptr += slice_ * (tokens.to(tl.int64) * rank)
    partial = rounded(accumulator, partial_ptr.dtype.element_ty)
    store_tile(partial_ptr, partial.T, m, r, tokens, rank, BLOCK_M, BLOCK_R)


@triton.jit(do_not_specialize=["elements"])
def sum_kernel(
    partial_ptr,  # (SLICES, elements) float32
    t_ptr,  # (elements,), the dtype of x
    elements,
    VECTOR: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    elements = elements * VECTOR
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    total = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    for slice_ in tl.static_range(1, SLICES):
        total += tl.load(partial_ptr + slice_ * elements.to(tl.int64) + offsets, mask=mask, other=0.0)
    tl.store(t_ptr + offsets, rounded(total, t_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_t(
    t_ptr, m, r, tokens, rank, dtype: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The tile of t at (m, r), transposed: (BLOCK_R, BLOCK_M); all slices are added before it is rounded to dtype."""
    if SLICES == 1:
        t = load_tile(t_ptr, m, r, tokens, rank, rank, True, BLOCK_M, BLOCK_R)
    else:
        # As one tile, so that all slices are on their way at once and are added inside a thread.
        i = m + tl.arange(0, BLOCK_M)
        j = r + tl.arange(0, BLOCK_R)
        rows = tl.arange(0, SLICES)[:, None] * tokens + i[None, :]
        mask = (i < tokens)[None, :, None] & (j < rank)[None, None, :]
        t = tl.load(t_ptr + (rows[:, :, None] * rank + j[None, None, :]), mask=mask, other=0.0)
        t = rounded(tl.sum(t, 0), dtype)
    return t.T


@triton.jit(
    do_not_specialize=["tokens", "rank", "out_features", "up_stride"], do_not_specialize_on_alignment=["bias_ptr"]
)
def up_kernel(
    t_ptr,  # (SLICES, tokens, rank), float32 or, where SLICES is 1, the dtype of x
    up_ptr,  # (out_features, rank), one of its strides 1, the other up_stride
    bias_ptr,  # (out_features,)
    y_ptr,  # (tokens, out_features)
    tokens,
    rank,
    out_features,
    up_stride,
    VECTOR: tl.constexpr,
    UP_ALONG_R: tl.constexpr,  # the ranks of a row of up are neighbours
    SLICES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLAB: tl.constexpr,  # ranks fetched before t is there
    BLOCK_R: tl.constexpr,  # ranks at a time after that
    PDL: tl.constexpr,
):
    rank = rank * VECTOR
    out_features = out_features * VECTOR
    up_stride = up_stride * VECTOR
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N
    m = tl.program_id(1) * BLOCK_M

    slab = load_tile(up_ptr, n, 0, out_features, rank, up_stride, UP_ALONG_R, BLOCK_N, SLAB)
    if PDL:
        if UP_ALONG_R:
            # The ranks past the slab: to L2, a line of 64 of them at a time.
            rows = tl.minimum(n + tl.arange(0, BLOCK_N), out_features - 1).to(tl.int64)
            for beyond in range(SLAB, rank, 512):
                lines = tl.minimum(beyond + tl.arange(0, 8) * 64, rank - 1)
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                    "=r,l",
                    [up_ptr + rows[:, None] * up_stride + lines[None, :]],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
        cuda.gdc_wait()

    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    accumulator = product(slab, _load_t(t_ptr, m, 0, tokens, rank, dtype, SLICES, BLOCK_M, SLAB), accumulator)
    for r in range(SLAB, rank, BLOCK_R):
        weights = load_tile(up_ptr, n, r, out_features, rank, up_stride, UP_ALONG_R, BLOCK_N, BLOCK_R)
        t = _load_t(t_ptr, m, r, tokens, rank, dtype, SLICES, BLOCK_M, BLOCK_R)
        accumulator = product(weights, t, accumulator)

    if HAS_BIAS:
        rows = n + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + rows, mask=rows < out_features, other=0.0)
        accumulator += bias.to(tl.float32)[:, None]
    y = rounded(activated(accumulator, ACTIVATION), dtype)
    store_tile(y_ptr, y.T, m, n, tokens, out_features, BLOCK_M, BLOCK_N)
