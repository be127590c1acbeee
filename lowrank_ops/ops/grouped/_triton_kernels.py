"""Triton kernels of ``lowrank_linear_grouped``: the tiles of ``lowrank_linear``, of up to three members in one launch.

    kernel          grid                                              a program computes
    grouped_down    (sum of rank / BLOCK_R, slices, tokens / BLOCK_M)  the tile of down_kernel, for one member
    grouped_up      (sum of out_features / BLOCK_N, tokens / BLOCK_M)  the tile of up_kernel, for one member
    grouped_prefill (min(token tiles * members * parts, SM count),)    work items of prefill_kernel, each of one member

    members        the programs of a member follow those of the one before; a missing member has no rows and no program
    t              of all members side by side, (slices, tokens, sum of ranks); sum_kernel of lowrank_linear adds slices
    shared down    grouped_down computes t once; grouped_prefill recomputes it per member
    grouped_prefill  consecutive work items share a token tile, so x is loaded from memory once and then from L2
    rest           pipelines, split-K, programmatic dependent launch and determinism are those of lowrank_linear

Factors are contiguous. Sizes and strides are passed divided by VECTOR.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from ..linear._triton_decode_kernels import down_tile, up_tile
from ..linear._triton_prefill_kernels import prefill_tile
from ..linear._triton_tiles import round_to, store_tile


@triton.jit
def _of(member, of_0, of_1, of_2):
    """The argument of a member."""
    return tl.where(member == 0, of_0, tl.where(member == 1, of_1, of_2))


@triton.jit
def _member_of(tile, size_0, size_1, BLOCK: tl.constexpr):
    """The member that a tile belongs to, and the first tile of that member."""
    end_0 = tl.cdiv(size_0, BLOCK)
    end_1 = end_0 + tl.cdiv(size_1, BLOCK)
    member = (tile >= end_0).to(tl.int32) + (tile >= end_1).to(tl.int32)
    return member, _of(member, 0, end_0, end_1)


@triton.jit(
    do_not_specialize=["tokens", "in_features", "rank_0", "rank_1", "rank_2", "x_stride", "slice_blocks"],
)
def grouped_down_kernel(
    x_ptr,  # (tokens, in_features), row stride x_stride
    down_0_ptr,  # (rank_0, in_features)
    down_1_ptr,
    down_2_ptr,
    partial_ptr,  # (slices, tokens, sum of ranks), float32, or the dtype of x for one slice
    tokens,
    in_features,
    rank_0,
    rank_1,
    rank_2,
    x_stride,
    slice_blocks,  # steps of BLOCK_K features per slice
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        cuda.gdc_launch_dependents()
    in_features = in_features * VECTOR
    rank_0, rank_1, rank_2 = rank_0 * VECTOR, rank_1 * VECTOR, rank_2 * VECTOR
    x_stride = x_stride * VECTOR
    slice_ = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M
    member, first = _member_of(tl.program_id(0), rank_0, rank_1, BLOCK_R)
    r = (tl.program_id(0) - first) * BLOCK_R
    rank, columns = _of(member, rank_0, rank_1, rank_2), rank_0 + rank_1 + rank_2

    accumulator = down_tile(
        x_ptr, _of(member, down_0_ptr, down_1_ptr, down_2_ptr), m, r, slice_, tokens, in_features, rank,
        x_stride, in_features, slice_blocks, True, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    partial_ptr += slice_ * (tokens.to(tl.int64) * columns) + _of(member, 0, rank_0, rank_0 + rank_1)
    partial = round_to(accumulator, partial_ptr.dtype.element_ty)
    store_tile(partial_ptr, partial.T, m, r, tokens, rank, columns, BLOCK_M, BLOCK_R)


@triton.jit(
    do_not_specialize=["tokens", "rank_0", "rank_1", "rank_2", "out_0", "out_1", "out_2", "biases"],
    do_not_specialize_on_alignment=["bias_0_ptr", "bias_1_ptr", "bias_2_ptr"],
)
def grouped_up_kernel(
    t_ptr,  # (SLICES, tokens, sum of ranks), float32, or the dtype of x where SLICES is 1; one rank if SHARED
    up_0_ptr,  # (out_0, rank_0)
    up_1_ptr,
    up_2_ptr,
    bias_0_ptr,  # (out_0,)
    bias_1_ptr,
    bias_2_ptr,
    y_0_ptr,  # (tokens, out_0)
    y_1_ptr,
    y_2_ptr,
    tokens,
    rank_0,
    rank_1,
    rank_2,
    out_0,
    out_1,
    out_2,
    biases,  # bit i: member i has a bias
    VECTOR: tl.constexpr,
    SHARED: tl.constexpr,  # all members read the same t
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    rank_0, rank_1, rank_2 = rank_0 * VECTOR, rank_1 * VECTOR, rank_2 * VECTOR
    out_0, out_1, out_2 = out_0 * VECTOR, out_1 * VECTOR, out_2 * VECTOR
    dtype: tl.constexpr = y_0_ptr.dtype.element_ty
    m = tl.program_id(1) * BLOCK_M
    member, first = _member_of(tl.program_id(0), out_0, out_1, BLOCK_N)
    n = (tl.program_id(0) - first) * BLOCK_N
    rank, out_features = _of(member, rank_0, rank_1, rank_2), _of(member, out_0, out_1, out_2)
    if SHARED:
        t_stride = rank_0
    else:
        t_stride = rank_0 + rank_1 + rank_2
        t_ptr += _of(member, 0, rank_0, rank_0 + rank_1)

    accumulator = up_tile(
        t_ptr, _of(member, up_0_ptr, up_1_ptr, up_2_ptr), m, n, tokens, rank, out_features, t_stride, rank,
        dtype, True, SLICES, BLOCK_M, BLOCK_N, SLAB, BLOCK_R, PDL,
    )  # fmt: skip
    rows = n + tl.arange(0, BLOCK_N)
    has_bias = (biases >> member) & 1
    bias = tl.load(
        _of(member, bias_0_ptr, bias_1_ptr, bias_2_ptr) + rows, mask=rows < out_features * has_bias, other=0.0
    )
    y = round_to(accumulator + bias.to(tl.float32)[:, None], dtype)
    y_ptr = _of(member, y_0_ptr, y_1_ptr, y_2_ptr)
    store_tile(y_ptr, y.T, m, n, tokens, out_features, out_features, BLOCK_M, BLOCK_N)


@triton.jit(
    do_not_specialize=[
        "tokens", "in_features", "rank_0", "rank_1", "rank_2", "out_0", "out_1", "out_2", "x_stride", "parts", "biases",
    ],
    do_not_specialize_on_alignment=["bias_0_ptr", "bias_1_ptr", "bias_2_ptr"],
)  # fmt: skip
def grouped_prefill_kernel(
    x_ptr,  # (tokens, in_features), row stride x_stride
    down_0_ptr,  # (rank_0, in_features)
    down_1_ptr,
    down_2_ptr,
    up_0_ptr,  # (out_0, rank_0)
    up_1_ptr,
    up_2_ptr,
    bias_0_ptr,  # (out_0,)
    bias_1_ptr,
    bias_2_ptr,
    y_0_ptr,  # (tokens, out_0)
    y_1_ptr,
    y_2_ptr,
    tokens,
    in_features,
    rank_0,
    rank_1,
    rank_2,
    out_0,
    out_1,
    out_2,
    x_stride,
    parts,  # splits of each member's out_features
    biases,  # bit i: member i has a bias
    VECTOR: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE_0: tl.constexpr,  # ranks in the first tile
    PIECE_1: tl.constexpr,  # ranks in the second tile, or 0
    STAGES_K: tl.constexpr,
    STAGES_N: tl.constexpr,
):
    in_features, x_stride = in_features * VECTOR, x_stride * VECTOR
    rank_0, rank_1, rank_2 = rank_0 * VECTOR, rank_1 * VECTOR, rank_2 * VECTOR
    out_0, out_1, out_2 = out_0 * VECTOR, out_1 * VECTOR, out_2 * VECTOR
    items = MEMBERS * parts
    for item in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_M) * items, tl.num_programs(0)):
        member = (item % items) // parts
        rank, out_features = _of(member, rank_0, rank_1, rank_2), _of(member, out_0, out_1, out_2)
        prefill_tile(
            x_ptr, _of(member, down_0_ptr, down_1_ptr, down_2_ptr), _of(member, up_0_ptr, up_1_ptr, up_2_ptr),
            _of(member, bias_0_ptr, bias_1_ptr, bias_2_ptr), _of(member, y_0_ptr, y_1_ptr, y_2_ptr),
            (item // items) * BLOCK_M, item % parts, parts, tokens, in_features, rank, out_features,
            out_features * ((biases >> member) & 1), x_stride, in_features, rank, True, True, True, "none",
            BLOCK_M, BLOCK_N, BLOCK_K, PIECE_0, PIECE_1, STAGES_K, STAGES_N,
        )  # fmt: skip
