"""Triton kernel of ``conv_covariance_update_``: the covariance update over patches, with an implicit im2col.

kernel                  grid                           a program computes
conv_covariance_kernel  (lower tiles, splits, groups)  one BLOCK_D x BLOCK_D tile of a group's second moment

mainloop       per chunk of at most 2048 patches: C_ij += P_i^T P_j in float32, BLOCK_T patches per step; patch
               elements are gathered from the image with masked pointer loads, VECTOR channels per load
epilogue       per chunk: add the accumulator to DEST; diagonal tiles also add the column sums
features       numbered (channel, ky, kx), the state's order, for NCHW: neighboring patches are contiguous;
               (ky, kx, channel) for channels-last: neighboring channels are; the epilogue maps back
split-K        partial tiles are summed by reduce_kernel of ``_triton_kernels``
deterministic  DEST = STATE and PARTIAL; ATOMIC is not
"""

import triton
import triton.language as tl

from ._triton_kernels import PARTIAL, add_sums, add_tile, add_to, halves, lower_tile, mirrored, mma, weight_order

_OUTSIDE = tl.constexpr(-(1 << 29))  # a coordinate outside the image, whatever the padding and dilation


@triton.jit(
    do_not_specialize=[
        "tokens",
        "positions",
        "output_width",
        "height",
        "width",
        "image_stride",
        "line_stride",
        "group_channels",
        "kernel_area",
        "kernel_width",
        "stride_y",
        "stride_x",
        "padding_y",
        "padding_x",
        "dilation_y",
        "dilation_x",
        "chunks",
    ]
)
def conv_covariance_kernel(
    x,  # (batch, channels, height, width), any strides
    state,  # (groups, features, features), or with DEST=PARTIAL scratch (splits, groups, tiles, BLOCK_D, BLOCK_D)
    total,  # (groups, features), or with DEST=PARTIAL scratch (splits, groups, tile rows, BLOCK_D)
    tokens,  # batch * positions
    positions,  # output positions per image
    output_width,
    height,
    width,
    image_stride,  # strides other than channel_stride, and group_channels, are in units of VECTOR
    channel_stride,
    line_stride,
    pixel_stride,
    group_channels,
    kernel_area,
    kernel_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    state_group_stride,
    state_stride,
    state_column_stride,
    total_group_stride,
    total_stride,
    chunks,  # per split
    length,  # tokens per chunk, a multiple of BLOCK_T
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    DEST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,  # channels per load
):
    first = tl.program_id(0) * chunks
    split, group = tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(2)
    image_stride = image_stride.to(tl.int64) * VECTOR
    line_stride = line_stride.to(tl.int64) * VECTOR
    if VECTOR > 1:
        pixel_stride *= VECTOR
        group_channels *= VECTOR
    features = group_channels * kernel_area
    tile_rows = tl.cdiv(features, BLOCK_D)
    x += group.to(tl.int64) * group_channels * channel_stride
    if DEST != PARTIAL:
        state += group.to(tl.int64) * state_group_stride
        total += group.to(tl.int64) * total_group_stride
    for work in range(first, first + chunks):  # recomputes its tile per chunk, as covariance_kernel does
        tile = work // chunks
        i, j = lower_tile(tile, tile_rows, GROUP)
        chunk = work % chunks
        start = (split * chunks + chunk) * length
        stop = tl.minimum(start + length, tokens)
        offset_i, y_i, x_i = patch_features(
            i,
            features,
            group_channels,
            kernel_area,
            kernel_width,
            dilation_y,
            dilation_x,
            channel_stride,
            line_stride,
            pixel_stride,
            BLOCK_D,
            CHANNELS_LAST,
            VECTOR,
        )
        offset_j, y_j, x_j = patch_features(
            j,
            features,
            group_channels,
            kernel_area,
            kernel_width,
            dilation_y,
            dilation_x,
            channel_stride,
            line_stride,
            pixel_stride,
            BLOCK_D,
            CHANNELS_LAST,
            VECTOR,
        )
        acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
        sums = tl.zeros((BLOCK_D,), tl.float32)
        for t in range(start, stop, BLOCK_T):
            token = t + tl.arange(0, BLOCK_T)
            position = token % positions
            y_t = position // output_width * stride_y - padding_y
            x_t = position % output_width * stride_x - padding_x
            offset_t = (token // positions) * image_stride + y_t * line_stride + x_t.to(tl.int64) * pixel_stride
            y_t = tl.where(token < tokens, y_t, _OUTSIDE)
            a = load_patches(x, offset_i, y_i, x_i, offset_t, y_t, x_t, height, width, CHANNELS_LAST)
            b = load_patches(x, offset_j, y_j, x_j, offset_t, y_t, x_t, height, width, CHANNELS_LAST)
            if CHANNELS_LAST:
                acc = mma(a.T, b, acc, INPUT_PRECISION)
                sums += tl.sum(a.to(tl.float32), 0)
            else:
                acc = mma(a, b.T, acc, INPUT_PRECISION)
                sums += tl.sum(a.to(tl.float32), 1)
        scratch = split * groups + group
        scratch_tile = scratch.to(tl.int64) * tl.num_programs(0) + tile
        if CHANNELS_LAST and DEST != PARTIAL:
            add_channels_last(
                state,
                i,
                j,
                acc,
                features,
                state_stride,
                state_column_stride,
                kernel_area,
                group_channels,
                BLOCK_D,
                DEST,
            )
            if i == j:
                feature = i * BLOCK_D + tl.arange(0, BLOCK_D)
                target = total + weight_order(feature, kernel_area, group_channels).to(tl.int64) * total_stride
                add_to(target, sums, feature < features, DEST)
        else:
            add_tile(
                state, scratch_tile, i, j, acc, features, state_stride, state_column_stride, chunk == 0, BLOCK_D, DEST
            )
            if i == j:
                add_sums(total, scratch * tile_rows + i, i, sums, features, total_stride, chunk == 0, BLOCK_D, DEST)


@triton.jit
def patch_features(
    tile,
    features,
    group_channels,
    kernel_area,
    kernel_width,
    dilation_y,
    dilation_x,
    channel_stride,
    line_stride,
    pixel_stride,
    BLOCK_D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """For the features of a tile: offset from the patch's corner, and its vertical and horizontal part."""
    feature = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    if CHANNELS_LAST:
        channel, pixel = feature % group_channels, feature // group_channels
        if VECTOR > 1:  # contiguity that the compiler cannot see through the division
            channel = tl.max_contiguous(tl.multiple_of(channel, VECTOR), VECTOR)
            pixel = tl.max_constancy(pixel, VECTOR)
    else:
        channel, pixel = feature // kernel_area, feature % kernel_area
    y = pixel // kernel_width * dilation_y
    x = pixel % kernel_width * dilation_x
    offset = channel.to(tl.int64) * channel_stride + y * line_stride + x.to(tl.int64) * pixel_stride
    return offset, tl.where(feature < features, y, _OUTSIDE), x


@triton.jit
def load_patches(
    image,
    offset_f,
    y_f,
    x_f,
    offset_t,
    y_t,
    x_t,
    height,
    width,
    CHANNELS_LAST: tl.constexpr,
):
    """A tile of patches, zero in the padding: (BLOCK_T, BLOCK_D) for channels-last, (BLOCK_D, BLOCK_T) for NCHW."""
    if CHANNELS_LAST:
        y, x = y_t[:, None] + y_f[None, :], x_t[:, None] + x_f[None, :]
        source = image + (offset_t[:, None] + offset_f[None, :])
    else:
        y, x = y_f[:, None] + y_t[None, :], x_f[:, None] + x_t[None, :]
        source = image + (offset_f[:, None] + offset_t[None, :])
    return tl.load(source, mask=(y >= 0) & (y < height) & (x >= 0) & (x < width), other=0.0)


@triton.jit
def add_channels_last(
    state,
    i,
    j,
    acc,
    features,
    stride,
    column_stride,
    kernel_area,
    group_channels,
    BLOCK_D: tl.constexpr,
    DEST: tl.constexpr,
):
    """add_tile to the state for features numbered (ky, kx, channel)."""
    left, right = halves(acc, BLOCK_D, BLOCK_D)
    first, second = halves(left, BLOCK_D, BLOCK_D // 2)
    third, fourth = halves(right, BLOCK_D, BLOCK_D // 2)
    QUARTER: tl.constexpr = BLOCK_D // 4
    p = i * BLOCK_D + tl.arange(0, BLOCK_D)
    q = j * BLOCK_D + tl.arange(0, QUARTER)
    add_pairs(state, first, p, q, features, stride, column_stride, kernel_area, group_channels, DEST)
    q += QUARTER
    add_pairs(state, second, p, q, features, stride, column_stride, kernel_area, group_channels, DEST)
    q += QUARTER
    add_pairs(state, third, p, q, features, stride, column_stride, kernel_area, group_channels, DEST)
    q += QUARTER
    add_pairs(state, fourth, p, q, features, stride, column_stride, kernel_area, group_channels, DEST)


@triton.jit
def add_pairs(state, part, p, q, features, stride, column_stride, kernel_area, group_channels, DEST: tl.constexpr):
    mask = (p < features)[:, None] & (q < features)[None, :] & (p[:, None] >= q[None, :])
    add_to(state + mirrored(p, q, kernel_area, group_channels, stride, column_stride), part, mask, DEST)
