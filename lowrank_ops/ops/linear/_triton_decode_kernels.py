"""Triton decode kernels of ``lowrank_linear``, for few tokens: bound by the bytes of the factors, each loaded once.

    kernel       grid                                      a program computes
    down_kernel  (rank / BLOCK_R, slices, tokens / BLOCK_M)  BLOCK_R x BLOCK_M of partial[s] = x[:, s] down[:, s]^T
    sum_kernel   (tokens * rank / BLOCK,)                    BLOCK elements of t = sum_s partial[s]
    up_kernel    (out_features / BLOCK_N, tokens / BLOCK_M)  BLOCK_N x BLOCK_M of y = activation(t up^T + bias)

    MMA            weights are the M operand, tokens the N operand, so that few tokens waste little of the tensor core;
                   8-bit weights of 64 rows are the N operand, which wgmma reads from shared memory and not registers
    8-bit factors  are cast to the dtype of x, which is exact; the scales of their rows multiply the float32 products
    loop           down_kernel: BLOCK_K features per step; up_kernel: first SLAB ranks, then BLOCK_R ranks per step
    split-K        down_kernel over `slices` of in_features; up_kernel sums the slices itself (SLICES > 1), or
                   sum_kernel does where t is large
    overlap        programmatic dependent launch from sm_90 on: up_kernel loads its slab of `up` before it waits for t
    deterministic  yes: slices are summed in order; scratch is written before it is read and needs no zeroing

Sizes and strides are passed divided by VECTOR, so that the compiler knows they are multiples of 8. Ranks are multiples
of 8 but rarely of 16, the only divisibility that Triton specializes on by itself.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from ._triton_tiles import activate, dot, load_scale, load_tile, round_to, store_tile, widened


@triton.jit
def _dot(weights, values, accumulator, SWAPPED: tl.constexpr):
    """``accumulator + weights values^T``, or if SWAPPED its transpose."""
    weights = widened(weights, values.dtype)
    return dot(values, weights.T, accumulator) if SWAPPED else dot(weights, values.T, accumulator)


@triton.jit
def down_tile(
    x_ptr,  # (tokens, in_features), row stride x_stride
    down_ptr,  # (rank, in_features), one stride is 1, the other down_stride
    m,
    r,
    slice_,
    tokens,
    in_features,
    rank,
    x_stride,
    down_stride,
    slice_blocks,  # steps of BLOCK_K features per slice
    DOWN_K_CONTIGUOUS: tl.constexpr,  # down has unit column stride
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr = False,
):
    """The sum over one slice of in_features of down x^T, (BLOCK_R, BLOCK_M) at (r, m), or if SWAPPED its transpose."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_R) if SWAPPED else (BLOCK_R, BLOCK_M), dtype=tl.float32)
    first = slice_ * slice_blocks
    last = tl.minimum(first + slice_blocks, tl.cdiv(in_features, BLOCK_K))
    for block in range(first, last):
        k = block * BLOCK_K
        weights = load_tile(down_ptr, r, k, rank, in_features, down_stride, DOWN_K_CONTIGUOUS, BLOCK_R, BLOCK_K)
        values = load_tile(x_ptr, m, k, tokens, in_features, x_stride, True, BLOCK_M, BLOCK_K)
        accumulator = _dot(weights, values, accumulator, SWAPPED)
    return accumulator


@triton.jit(
    do_not_specialize=["tokens", "in_features", "rank", "x_stride", "down_stride", "slice_blocks"],
    do_not_specialize_on_alignment=["scale_ptr"],
)
def down_kernel(
    x_ptr,  # (tokens, in_features), row stride x_stride
    down_ptr,  # (rank, in_features), one stride is 1, the other down_stride
    scale_ptr,  # (rank,), if SCALED
    partial_ptr,  # (slices, tokens, rank), float32, or the dtype of x for one slice
    tokens,
    in_features,
    rank,
    x_stride,
    down_stride,
    slice_blocks,  # steps of BLOCK_K features per slice
    VECTOR: tl.constexpr,
    DOWN_K_CONTIGUOUS: tl.constexpr,  # down has unit column stride
    SCALED: tl.constexpr,  # down is 8-bit
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

    SWAPPED: tl.constexpr = SCALED and BLOCK_R >= 64
    accumulator = down_tile(
        x_ptr, down_ptr, m, r, slice_, tokens, in_features, rank, x_stride, down_stride, slice_blocks,
        DOWN_K_CONTIGUOUS, BLOCK_M, BLOCK_R, BLOCK_K, SWAPPED,
    )  # fmt: skip
    if SCALED:
        scale = load_scale(scale_ptr, r, rank, BLOCK_R)
        accumulator *= scale[None, :] if SWAPPED else scale[:, None]
    partial_ptr += slice_ * (tokens.to(tl.int64) * rank)
    partial = round_to(accumulator, partial_ptr.dtype.element_ty)
    store_tile(partial_ptr, partial if SWAPPED else partial.T, m, r, tokens, rank, rank, BLOCK_M, BLOCK_R)


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
    tl.store(t_ptr + offsets, round_to(total, t_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_t(
    t_ptr,  # (SLICES, tokens, rank), row stride t_stride
    m,
    r,
    tokens,
    rank,
    t_stride,
    dtype: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The tile of t at (m, r): (BLOCK_M, BLOCK_R). Slices are summed in float32, then rounded to dtype."""
    if SLICES == 1:
        t = load_tile(t_ptr, m, r, tokens, rank, t_stride, True, BLOCK_M, BLOCK_R)
    else:
        # One 3D tile: the loads of all slices are in flight together and the sum stays inside a thread.
        i = m + tl.arange(0, BLOCK_M)
        j = r + tl.arange(0, BLOCK_R)
        rows = tl.arange(0, SLICES)[:, None] * tokens + i[None, :]
        mask = (i < tokens)[None, :, None] & (j < rank)[None, None, :]
        t = tl.load(t_ptr + (rows[:, :, None] * t_stride + j[None, None, :]), mask=mask, other=0.0)
        t = round_to(tl.sum(t, 0), dtype)
    return t


@triton.jit
def up_tile(
    t_ptr,  # (SLICES, tokens, rank), row stride t_stride
    up_ptr,  # (out_features, rank), one stride is 1, the other up_stride
    m,
    n,
    tokens,
    rank,
    out_features,
    t_stride,
    up_stride,
    dtype: tl.constexpr,
    UP_R_CONTIGUOUS: tl.constexpr,  # up has unit column stride
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLAB: tl.constexpr,  # ranks of up that are loaded before the wait for t
    BLOCK_R: tl.constexpr,  # ranks per step after the slab
    PDL: tl.constexpr,
    SWAPPED: tl.constexpr = False,
):
    """up t^T, (BLOCK_N, BLOCK_M) at (n, m), or if SWAPPED its transpose, with the wait for t."""
    slab = load_tile(up_ptr, n, 0, out_features, rank, up_stride, UP_R_CONTIGUOUS, BLOCK_N, SLAB)
    if PDL:
        if UP_R_CONTIGUOUS:
            # Prefetch the ranks after the slab to L2, one line of 128 bytes at a time.
            LINE: tl.constexpr = 1024 // up_ptr.dtype.element_ty.primitive_bitwidth
            rows = tl.minimum(n + tl.arange(0, BLOCK_N), out_features - 1).to(tl.int64)
            for beyond in range(SLAB, rank, 8 * LINE):
                lines = tl.minimum(beyond + tl.arange(0, 8) * LINE, rank - 1)
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                    "=r,l",
                    [up_ptr + rows[:, None] * up_stride + lines[None, :]],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
        cuda.gdc_wait()

    accumulator = tl.zeros((BLOCK_M, BLOCK_N) if SWAPPED else (BLOCK_N, BLOCK_M), dtype=tl.float32)
    slab_t = _load_t(t_ptr, m, 0, tokens, rank, t_stride, dtype, SLICES, BLOCK_M, SLAB)
    accumulator = _dot(slab, slab_t, accumulator, SWAPPED)
    for r in range(SLAB, rank, BLOCK_R):
        weights = load_tile(up_ptr, n, r, out_features, rank, up_stride, UP_R_CONTIGUOUS, BLOCK_N, BLOCK_R)
        t = _load_t(t_ptr, m, r, tokens, rank, t_stride, dtype, SLICES, BLOCK_M, BLOCK_R)
        accumulator = _dot(weights, t, accumulator, SWAPPED)
    return accumulator


@triton.jit(
    do_not_specialize=["tokens", "rank", "out_features", "up_stride"],
    do_not_specialize_on_alignment=["scale_ptr", "bias_ptr"],
)
def up_kernel(
    t_ptr,  # (SLICES, tokens, rank), float32, or the dtype of x where SLICES is 1
    up_ptr,  # (out_features, rank), one stride is 1, the other up_stride
    scale_ptr,  # (out_features,), if SCALED
    bias_ptr,  # (out_features,)
    y_ptr,  # (tokens, out_features)
    tokens,
    rank,
    out_features,
    up_stride,
    VECTOR: tl.constexpr,
    UP_R_CONTIGUOUS: tl.constexpr,  # up has unit column stride
    SCALED: tl.constexpr,  # up is 8-bit
    SLICES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLAB: tl.constexpr,  # ranks of up that are loaded before the wait for t
    BLOCK_R: tl.constexpr,  # ranks per step after the slab
    PDL: tl.constexpr,
):
    rank = rank * VECTOR
    out_features = out_features * VECTOR
    up_stride = up_stride * VECTOR
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N
    m = tl.program_id(1) * BLOCK_M

    SWAPPED: tl.constexpr = SCALED and BLOCK_N >= 64
    accumulator = up_tile(
        t_ptr, up_ptr, m, n, tokens, rank, out_features, rank, up_stride,
        dtype, UP_R_CONTIGUOUS, SLICES, BLOCK_M, BLOCK_N, SLAB, BLOCK_R, PDL, SWAPPED,
    )  # fmt: skip
    if SCALED:
        scale = load_scale(scale_ptr, n, out_features, BLOCK_N)
        accumulator *= scale[None, :] if SWAPPED else scale[:, None]
    if HAS_BIAS:
        rows = n + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + rows, mask=rows < out_features, other=0.0).to(tl.float32)
        accumulator += bias[None, :] if SWAPPED else bias[:, None]
    y = round_to(activate(accumulator, ACTIVATION), dtype)
    store_tile(y_ptr, y if SWAPPED else y.T, m, n, tokens, out_features, out_features, BLOCK_M, BLOCK_N)
