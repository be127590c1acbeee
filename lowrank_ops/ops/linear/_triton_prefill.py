"""Many rows of x: both products in one kernel, t = x down^T stays on chip.

A block takes a tile of BLOCK_M rows, forms t for all ranks, rounds it, and multiplies it with its share of the rows of
``up``. Triton's tiles are powers of two, so a rank is covered by two pieces, such as 134 by 128 + 16. With few row
tiles the rows of ``up`` are cut into ``parts`` and t is formed once per part: more arithmetic, more multiprocessors.
"""

import triton
import triton.language as tl

from ._triton_tile import activated, load_tile, product, rounded, store_tile


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
    do_not_specialize_on_alignment=["bias_ptr"],
)
def prefill_kernel(
    x_ptr,  # (tokens, in_features), rows x_stride apart
    down_ptr,  # (rank, in_features), one of its strides 1, the other down_stride
    up_ptr,  # (out_features, rank), one of its strides 1, the other up_stride
    bias_ptr,  # (out_features,)
    y_ptr,  # (tokens, out_features)
    tokens,
    in_features,
    rank,
    out_features,
    x_stride,
    down_stride,
    up_stride,
    parts,  # of the rows of up
    VECTOR: tl.constexpr,
    DOWN_ALONG_K: tl.constexpr,
    UP_ALONG_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE_0: tl.constexpr,  # ranks in the first piece
    PIECE_1: tl.constexpr,  # in the second, or 0
    STAGES_K: tl.constexpr,
    STAGES_N: tl.constexpr,
):
    in_features = in_features * VECTOR
    rank = rank * VECTOR
    out_features = out_features * VECTOR
    x_stride = x_stride * VECTOR
    down_stride = down_stride * VECTOR
    up_stride = up_stride * VECTOR
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    n_blocks = tl.cdiv(out_features, BLOCK_N)
    part_blocks = tl.cdiv(n_blocks, parts)

    # Neighbouring blocks share a row tile, so that L2 serves x to all but the first of them.
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_M) * parts, tl.num_programs(0)):
        m = (tile // parts) * BLOCK_M
        t0 = tl.zeros((BLOCK_M, PIECE_0), dtype=tl.float32)
        if PIECE_1 > 0:
            t1 = tl.zeros((BLOCK_M, PIECE_1), dtype=tl.float32)
        for k in tl.range(0, in_features, BLOCK_K, num_stages=STAGES_K):
            x = load_tile(x_ptr, m, k, tokens, in_features, x_stride, True, BLOCK_M, BLOCK_K)
            down = load_tile(down_ptr, 0, k, rank, in_features, down_stride, DOWN_ALONG_K, PIECE_0, BLOCK_K)
            t0 = product(x, down.T, t0)
            if PIECE_1 > 0:
                down = load_tile(down_ptr, PIECE_0, k, rank, in_features, down_stride, DOWN_ALONG_K, PIECE_1, BLOCK_K)
                t1 = product(x, down.T, t1)
        short0 = rounded(t0, dtype)
        if PIECE_1 > 0:
            short1 = rounded(t1, dtype)

        first = (tile % parts) * part_blocks
        last = tl.minimum(first + part_blocks, n_blocks)
        for n_block in tl.range(first, last, num_stages=STAGES_N):
            n = n_block * BLOCK_N
            y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            up = load_tile(up_ptr, n, 0, out_features, rank, up_stride, UP_ALONG_R, BLOCK_N, PIECE_0)
            y = product(short0, up.T, y)
            if PIECE_1 > 0:
                up = load_tile(up_ptr, n, PIECE_0, out_features, rank, up_stride, UP_ALONG_R, BLOCK_N, PIECE_1)
                y = product(short1, up.T, y)
            if HAS_BIAS:
                columns = n + tl.arange(0, BLOCK_N)
                bias = tl.load(bias_ptr + columns, mask=columns < out_features, other=0.0)
                y += bias.to(tl.float32)[None, :]
            y = rounded(activated(y, ACTIVATION), dtype)
            store_tile(y_ptr, y, m, n, tokens, out_features, BLOCK_M, BLOCK_N)
