"""Triton prefill kernel of ``lowrank_linear``, for many tokens: both GEMMs in one kernel, t stays on chip.

kernel          grid                                    a program computes
prefill_kernel  (min(token tiles * parts, SM count),)   per work item: BLOCK_M tokens x 1/parts of out_features

mainloop       t = x down^T for all ranks, BLOCK_K features per step, STAGES_K pipeline stages
second loop    y = t up^T for BLOCK_N out_features per step, STAGES_N stages; epilogue: bias, activation, store
rank           covered by two tiles of PIECE_0 and PIECE_1 ranks, as tile sizes are powers of two: 134 = 128 + 16
parts          with few token tiles, out_features are split over programs and t is recomputed per part: more FLOPs,
               more SMs busy
8-bit factors  are cast to the dtype of x, which is exact; the scales of their rows multiply the float32 products
deterministic  yes
"""

import triton
import triton.language as tl

from ._triton_tiles import activate, dot, load_scale, load_tile, round_to, store_tile, widened


@triton.jit
def prefill_tile(
    x_ptr,  # (tokens, in_features), row stride x_stride
    down_ptr,  # (rank, in_features), one stride is 1, the other down_stride
    up_ptr,  # (out_features, rank), one stride is 1, the other up_stride
    bias_ptr,  # (bias_features,)
    y_ptr,  # (tokens, out_features)
    m,
    part,
    parts,  # splits of out_features
    tokens,
    in_features,
    rank,
    out_features,
    bias_features,  # out_features, or 0 without a bias
    x_stride,
    down_stride,
    up_stride,
    DOWN_K_CONTIGUOUS: tl.constexpr,
    UP_R_CONTIGUOUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE_0: tl.constexpr,  # ranks in the first tile
    PIECE_1: tl.constexpr,  # ranks in the second tile, or 0
    STAGES_K: tl.constexpr,
    STAGES_N: tl.constexpr,
    DOWN_SCALED: tl.constexpr = False,  # down is 8-bit
    UP_SCALED: tl.constexpr = False,  # up is 8-bit
    down_scale_ptr=None,  # (rank,), if DOWN_SCALED
    up_scale_ptr=None,  # (out_features,), if UP_SCALED
):
    """Compute and store one part of out_features for BLOCK_M tokens at m."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    n_blocks = tl.cdiv(out_features, BLOCK_N)
    part_blocks = tl.cdiv(n_blocks, parts)
    t0 = tl.zeros((BLOCK_M, PIECE_0), dtype=tl.float32)
    if PIECE_1 > 0:
        t1 = tl.zeros((BLOCK_M, PIECE_1), dtype=tl.float32)
    for k in tl.range(0, in_features, BLOCK_K, num_stages=STAGES_K):
        x = load_tile(x_ptr, m, k, tokens, in_features, x_stride, True, BLOCK_M, BLOCK_K)
        down = load_tile(down_ptr, 0, k, rank, in_features, down_stride, DOWN_K_CONTIGUOUS, PIECE_0, BLOCK_K)
        t0 = dot(x, widened(down, dtype).T, t0)
        if PIECE_1 > 0:
            down = load_tile(down_ptr, PIECE_0, k, rank, in_features, down_stride, DOWN_K_CONTIGUOUS, PIECE_1, BLOCK_K)
            t1 = dot(x, widened(down, dtype).T, t1)
    if DOWN_SCALED:
        t0 *= load_scale(down_scale_ptr, 0, rank, PIECE_0)[None, :]
        if PIECE_1 > 0:
            t1 *= load_scale(down_scale_ptr, PIECE_0, rank, PIECE_1)[None, :]
    t0_rounded = round_to(t0, dtype)
    if PIECE_1 > 0:
        t1_rounded = round_to(t1, dtype)

    first = part * part_blocks
    last = tl.minimum(first + part_blocks, n_blocks)
    for n_block in tl.range(first, last, num_stages=STAGES_N):
        n = n_block * BLOCK_N
        y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = load_tile(up_ptr, n, 0, out_features, rank, up_stride, UP_R_CONTIGUOUS, BLOCK_N, PIECE_0)
        y = dot(t0_rounded, widened(up, dtype).T, y)
        if PIECE_1 > 0:
            up = load_tile(up_ptr, n, PIECE_0, out_features, rank, up_stride, UP_R_CONTIGUOUS, BLOCK_N, PIECE_1)
            y = dot(t1_rounded, widened(up, dtype).T, y)
        if UP_SCALED:
            y *= load_scale(up_scale_ptr, n, out_features, BLOCK_N)[None, :]
        if HAS_BIAS:
            columns = n + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + columns, mask=columns < bias_features, other=0.0)
            y += bias.to(tl.float32)[None, :]
        y = round_to(activate(y, ACTIVATION), dtype)
        store_tile(y_ptr, y, m, n, tokens, out_features, out_features, BLOCK_M, BLOCK_N)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "in_features",
        "rank",
        "out_features",
        "x_stride",
        "down_stride",
        "up_stride",
        "parts",
    ],
    do_not_specialize_on_alignment=["down_scale_ptr", "up_scale_ptr", "bias_ptr"],
)
def prefill_kernel(
    x_ptr,  # (tokens, in_features), row stride x_stride
    down_ptr,  # (rank, in_features), one stride is 1, the other down_stride
    down_scale_ptr,  # (rank,), if DOWN_SCALED
    up_ptr,  # (out_features, rank), one stride is 1, the other up_stride
    up_scale_ptr,  # (out_features,), if UP_SCALED
    bias_ptr,  # (out_features,)
    y_ptr,  # (tokens, out_features)
    tokens,
    in_features,
    rank,
    out_features,
    x_stride,
    down_stride,
    up_stride,
    parts,  # splits of out_features
    VECTOR: tl.constexpr,
    DOWN_K_CONTIGUOUS: tl.constexpr,
    UP_R_CONTIGUOUS: tl.constexpr,
    DOWN_SCALED: tl.constexpr,  # down is 8-bit
    UP_SCALED: tl.constexpr,  # up is 8-bit
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE_0: tl.constexpr,  # ranks in the first tile
    PIECE_1: tl.constexpr,  # ranks in the second tile, or 0
    STAGES_K: tl.constexpr,
    STAGES_N: tl.constexpr,
):
    in_features = in_features * VECTOR
    rank = rank * VECTOR
    out_features = out_features * VECTOR
    x_stride = x_stride * VECTOR
    down_stride = down_stride * VECTOR
    up_stride = up_stride * VECTOR

    # Consecutive programs share a token tile: x is loaded from memory once and then from L2.
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_M) * parts, tl.num_programs(0)):
        prefill_tile(
            x_ptr, down_ptr, up_ptr, bias_ptr, y_ptr, (tile // parts) * BLOCK_M, tile % parts, parts,
            tokens, in_features, rank, out_features, out_features, x_stride, down_stride, up_stride,
            DOWN_K_CONTIGUOUS, UP_R_CONTIGUOUS, HAS_BIAS, ACTIVATION,
            BLOCK_M, BLOCK_N, BLOCK_K, PIECE_0, PIECE_1, STAGES_K, STAGES_N,
            DOWN_SCALED, UP_SCALED, down_scale_ptr, up_scale_ptr,
        )  # fmt: skip
