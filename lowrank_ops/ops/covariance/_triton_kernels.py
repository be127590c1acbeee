"""Triton kernels of ``covariance_update_``: the update of one tile per program, and the split-K reduction.

    kernel             grid                                      a program computes
    covariance_kernel  (lower tiles, splits)                     one BLOCK_D x BLOCK_D tile of the second moment
    reduce_kernel      (lower tiles, BLOCK_D / ROWS, groups)     ROWS rows of one tile, summed over the splits

    mainloop       per chunk of at most 2048 tokens: C_ij += X_i^T X_j in float32, BLOCK_T tokens per step
    epilogue       per chunk: add the accumulator to DEST; diagonal tiles also add the column sums of x
    loads          TMA tensor descriptor (sm_90 and newer, rows on 16 bytes), otherwise masked pointer loads
    order          groups of GROUP tile rows are walked column by column, so that concurrent programs share L2 lines
    deterministic  DEST = STATE and PARTIAL; ATOMIC is not

Imported by the first launch: importing the package must not require Triton.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

# DEST, where the epilogue adds a chunk:
STATE = tl.constexpr("state")  # load, add, store; one program owns the tile
PARTIAL = tl.constexpr("partial")  # the split's tile in scratch, which reduce_kernel sums in order
ATOMIC = tl.constexpr("atomic")  # atomic adds to the state, in any order


# Arguments that change between calls are not specialized on. `chunks` must not be: with a constant of 1 the compiler
# removes the outer loop, keeps the tile's addresses in registers and spills (see below).
@triton.jit(do_not_specialize=["tokens", "chunks"])
def covariance_kernel(
    x,  # (tokens, features): tensor descriptor, or pointer
    state,  # (features, features), or with DEST=PARTIAL scratch (splits, tiles, BLOCK_D, BLOCK_D)
    total,  # (features,), or with DEST=PARTIAL scratch (splits, tile rows, BLOCK_D)
    tokens,
    features,  # in units of VECTOR
    row_stride,  # in units of VECTOR
    state_stride,
    state_column_stride,
    total_stride,
    chunks,  # per split
    length,  # tokens per chunk, a multiple of BLOCK_T
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    DEST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    VECTOR: tl.constexpr,  # row stride and width of x are multiples of it
):
    first = tl.program_id(0) * chunks
    split = tl.program_id(1)
    features *= VECTOR  # known to be a multiple: the compiler vectorizes the loads
    row_stride *= VECTOR
    tile_rows = tl.cdiv(features, BLOCK_D)
    # The tile index is recomputed per chunk. If it were loop-invariant, the compiler would keep the addresses and masks
    # of the epilogue in registers across the mainloop, and spill.
    for work in range(first, first + chunks):
        tile = work // chunks
        i, j = lower_tile(tile, tile_rows, GROUP)
        chunk = work % chunks
        start = (split * chunks + chunk) * length
        stop = tl.minimum(start + length, tokens)
        acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
        if i == j:
            columns = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            for t in range(start, stop, BLOCK_T):
                b = load_rows(x, t, j * BLOCK_D, tokens, features, row_stride, BLOCK_T, BLOCK_D, TMA)
                a = b.T if TMA else load_columns(x, t, i * BLOCK_D, tokens, features, row_stride, BLOCK_T, BLOCK_D)
                acc = mma(a, b, acc, INPUT_PRECISION)
                columns += b.to(tl.float32)
            add_sums(
                total, split * tile_rows + i, i, tl.sum(columns, 0), features, total_stride, chunk == 0, BLOCK_D, DEST
            )
        else:
            for t in range(start, stop, BLOCK_T):
                if TMA:
                    a = load_rows(x, t, i * BLOCK_D, tokens, features, row_stride, BLOCK_T, BLOCK_D, TMA).T
                else:
                    a = load_columns(x, t, i * BLOCK_D, tokens, features, row_stride, BLOCK_T, BLOCK_D)
                b = load_rows(x, t, j * BLOCK_D, tokens, features, row_stride, BLOCK_T, BLOCK_D, TMA)
                acc = mma(a, b, acc, INPUT_PRECISION)
        scratch_tile = split * tl.num_programs(0) + tile
        add_tile(state, scratch_tile, i, j, acc, features, state_stride, state_column_stride, chunk == 0, BLOCK_D, DEST)


@triton.jit
def reduce_kernel(
    partial,  # (splits, groups, tiles, BLOCK_D, BLOCK_D)
    partial_total,  # (splits, groups, tile rows, BLOCK_D)
    state,  # (groups, features, features)
    total,  # (groups, features)
    features,
    splits,
    state_group_stride,
    state_stride,
    state_column_stride,
    total_group_stride,
    total_stride,
    kernel_area,
    group_channels,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # features are numbered (ky, kx, channel), as in conv_covariance_kernel
):
    """Add the partial tiles of all splits to the state, in the order of the splits."""
    tile, group = tl.program_id(0), tl.program_id(2)
    tiles, groups = tl.num_programs(0), tl.num_programs(2)
    tile_rows = tl.cdiv(features, BLOCK_D)
    i, j = lower_tile(tile, tile_rows, GROUP)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    source = partial + (group * tiles + tile).to(tl.int64) * (BLOCK_D * BLOCK_D)
    source += rows[:, None] * BLOCK_D + columns[None, :]
    step = (groups * tiles).to(tl.int64) * (BLOCK_D * BLOCK_D)
    acc = tl.load(source)
    for split in range(1, splits):
        acc += tl.load(source + split * step)
    p, q = i * BLOCK_D + rows, j * BLOCK_D + columns
    mask = (p < features)[:, None] & (q < features)[None, :] & (p[:, None] >= q[None, :])
    state += group.to(tl.int64) * state_group_stride
    if CHANNELS_LAST:
        target = state + mirrored(p, q, kernel_area, group_channels, state_stride, state_column_stride)
    else:
        target = state + p.to(tl.int64)[:, None] * state_stride + q.to(tl.int64)[None, :] * state_column_stride
    tl.store(target, tl.load(target, mask=mask, other=0.0) + acc, mask=mask)

    if (i == j) & (tl.program_id(1) == 0):
        source_total = partial_total + (group * tile_rows + i) * BLOCK_D + columns
        sums = tl.load(source_total)
        for split in range(1, splits):
            sums += tl.load(source_total + split * (groups * tile_rows * BLOCK_D))
        inside = q < features
        if CHANNELS_LAST:
            q = weight_order(q, kernel_area, group_channels)
        target_total = total + group.to(tl.int64) * total_group_stride + q * total_stride
        tl.store(target_total, tl.load(target_total, mask=inside, other=0.0) + sums, mask=inside)


@triton.jit
def lower_tile(tile, tile_rows, GROUP: tl.constexpr):
    """Row and column of the ``tile``-th lower tile, in groups of GROUP tile rows that are walked column by column."""
    row, _ = triangle(tile)
    top = row // GROUP * GROUP
    height = tl.minimum(tile_rows - top, GROUP)
    inside = tile - top * (top + 1) // 2
    corner_row, corner_column = triangle(tl.maximum(inside - top * height, 0))
    in_corner = inside >= top * height
    i = tl.where(in_corner, top + corner_row, top + inside % height)
    j = tl.where(in_corner, top + corner_column, inside // height)
    return i, j


@triton.jit
def triangle(index):
    """Row and column of the ``index``-th element of a lower triangle stored row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row -= (row * (row + 1) // 2 > index).to(tl.int32)  # float32 sqrt may be off by one in both directions
    row += ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit
def load_rows(
    x,
    token,
    feature,
    tokens,
    features,
    row_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """A (BLOCK_T, BLOCK_D) tile of x, zero out of bounds."""
    if TMA:
        tile = x.load([token, feature])
    else:
        rows = token + tl.arange(0, BLOCK_T)
        columns = feature + tl.arange(0, BLOCK_D)
        source = x + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
        tile = tl.load(source, mask=(rows < tokens)[:, None] & (columns < features)[None, :], other=0.0)
    return tile


@triton.jit
def load_columns(x, token, feature, tokens, features, row_stride, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """The transposed tile of load_rows, (BLOCK_D, BLOCK_T).

    A transposed pointer load goes to shared memory by cp.async. Transposing a loaded tile would go through registers.
    """
    rows = token + tl.arange(0, BLOCK_T)
    columns = feature + tl.arange(0, BLOCK_D)
    source = x + rows.to(tl.int64)[None, :] * row_stride + columns[:, None]
    return tl.load(source, mask=(rows < tokens)[None, :] & (columns < features)[:, None], other=0.0)


@triton.jit
def mma(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """``acc + a b`` for tiles a (BLOCK_D, BLOCK_T) and b (BLOCK_T, BLOCK_D); the accumulator is float32."""
    if INPUT_PRECISION == "tf32":
        acc = tl.dot(round_to_tf32(a), round_to_tf32(b), acc, input_precision="tf32")
    elif INPUT_PRECISION == "bf16x3":
        # x = high + low to within 2^-17 of x. low * low, at most 2^-16 of the product, is dropped.
        a_high, b_high = round_to_bf16(a), round_to_bf16(b)
        a_low = round_to_bf16(a - a_high.to(tl.float32))
        b_low = round_to_bf16(b - b_high.to(tl.float32))
        acc = tl.dot(a_high, b_high, acc)
        acc = tl.dot(a_high, b_low, acc)
        acc = tl.dot(a_low, b_high, acc)
    elif INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def round_to_bf16(x):
    """float32 ``x`` rounded to bfloat16, to nearest even."""
    if INTERPRET:
        # The interpreter truncates casts to bfloat16 and computes bfloat16 dots wrongly: stay in float32.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        rounded = x.to(tl.bfloat16)
    return rounded


@triton.jit
def round_to_tf32(x):
    """To nearest. The tensor core truncates, which would bias every sum of squares downwards."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def add_tile(
    state,
    scratch_tile,
    i,
    j,
    acc,
    features,
    stride,
    column_stride,
    fresh,  # first chunk of this scratch tile: overwrite
    BLOCK_D: tl.constexpr,
    DEST: tl.constexpr,
):
    """Add an accumulator to DEST; in the state, only on and below the diagonal."""
    if DEST == PARTIAL:
        base = state + scratch_tile.to(tl.int64) * (BLOCK_D * BLOCK_D)
        stride, column_stride = BLOCK_D, 1
        height, width, reach = BLOCK_D, BLOCK_D, BLOCK_D
    else:
        base = state + (i * BLOCK_D).to(tl.int64) * stride + (j * BLOCK_D).to(tl.int64) * column_stride
        height, width, reach = features - i * BLOCK_D, features - j * BLOCK_D, (i - j) * BLOCK_D
    # In quarters: the accumulator and a whole tile of the state do not fit in registers together.
    left, right = halves(acc, BLOCK_D, BLOCK_D)
    first, second = halves(left, BLOCK_D, BLOCK_D // 2)
    third, fourth = halves(right, BLOCK_D, BLOCK_D // 2)
    QUARTER: tl.constexpr = BLOCK_D // 4
    add_columns(base, first, 0, height, width, reach, stride, column_stride, fresh, BLOCK_D, DEST)
    add_columns(base, second, QUARTER, height, width, reach, stride, column_stride, fresh, BLOCK_D, DEST)
    add_columns(base, third, 2 * QUARTER, height, width, reach, stride, column_stride, fresh, BLOCK_D, DEST)
    add_columns(base, fourth, 3 * QUARTER, height, width, reach, stride, column_stride, fresh, BLOCK_D, DEST)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and right half of a (ROWS, COLUMNS) tile."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def add_columns(
    base,
    part,  # (BLOCK_D, BLOCK_D / 4)
    offset,  # of its first column in the tile
    height,  # rows of the tile inside the state
    width,
    reach,  # columns of the tile left of the diagonal's first element
    stride,
    column_stride,
    fresh,
    BLOCK_D: tl.constexpr,
    DEST: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_D)
    columns = offset + tl.arange(0, BLOCK_D // 4)
    target = base + rows[:, None] * stride + columns[None, :] * column_stride
    if DEST == PARTIAL:
        before = tl.load(target, mask=tl.full(target.shape, True, tl.int1) & (fresh == 0), other=0.0)
        tl.store(target, before + part)
    else:
        mask = (rows < height)[:, None] & (columns < width)[None, :] & (rows[:, None] + reach >= columns[None, :])
        add_to(target, part, mask, DEST)


@triton.jit
def add_sums(total, scratch_row, i, sums, features, stride, fresh, BLOCK_D: tl.constexpr, DEST: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    if DEST == PARTIAL:
        target = total + scratch_row * BLOCK_D + columns
        before = tl.load(target, mask=tl.full(target.shape, True, tl.int1) & (fresh == 0), other=0.0)
        tl.store(target, before + sums)
    else:
        columns += i * BLOCK_D
        add_to(total + columns.to(tl.int64) * stride, sums, columns < features, DEST)


@triton.jit
def add_to(target, value, mask, DEST: tl.constexpr):
    """``*target += value``, atomically for DEST = ATOMIC."""
    if DEST == ATOMIC:
        tl.atomic_add(target, value.to(target.dtype.element_ty), mask=mask, sem="relaxed")
    else:
        tl.store(target, tl.load(target, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def weight_order(feature, kernel_area, group_channels):
    """Index in a flattened Conv2d.weight (channel, ky, kx) of a feature numbered (ky, kx, channel)."""
    return feature % group_channels * kernel_area + feature // group_channels


@triton.jit
def mirrored(p, q, kernel_area, group_channels, stride, column_stride):
    """Offsets in the state of feature pairs numbered (ky, kx, channel).

    Renumbering may map a lower element to an upper one: the offset is that of the mirrored lower element.
    """
    p = weight_order(p, kernel_area, group_channels).to(tl.int64)[:, None]
    q = weight_order(q, kernel_area, group_channels).to(tl.int64)[None, :]
    return tl.maximum(p, q) * stride + tl.minimum(p, q) * column_stride
