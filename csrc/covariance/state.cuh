// The epilogue of the covariance kernels: accumulators to the state (float or double, any strides, lower triangle only)
// or to partial tiles in scratch.
#pragma once

#include "arguments.h"
#include "tiles.h"

namespace lowrank_ops::covariance {

__device__ __forceinline__ void add_to_state(const Arguments& args, int64_t group, int64_t row, int64_t col,
                                             double value) {
  if (row >= args.features || col > row) return;
  const int64_t at = group * args.state_group_stride + row * args.state_row_stride + col * args.state_col_stride;
  if (args.state_is_double)
    static_cast<double*>(args.second_moment)[at] += value;
  else
    static_cast<float*>(args.second_moment)[at] =
        static_cast<float>(static_cast<float*>(args.second_moment)[at] + value);
}

// The destination of a thread's accumulators of 16 rows of a tile: accumulator i is i / 2 % 2 * 8 rows and
// i / 4 * 8 + i % 2 columns from the first.
template <class Number>
struct Strip {
  Number* rows[2];
  int64_t col_stride;
  int last[2];  // last existing column of the row, counted as above; negative: none
};

template <class Number>
struct alignas(2 * sizeof(Number)) Pair {
  Number first, second;
};

// pairs: contiguous rows, neighbors on the size of two, and all of the strip exists.
enum class StripRows { pairs, contiguous, strided };

// Bytes of the state that a thread loads before it stores. With 64 on sm_120, nvcc 13.3 spills registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kBytesInFlight = 32;
#else
constexpr int kBytesInFlight = 64;
#endif

// Loads many values before it stores any: the compiler must assume that a store aliases the next load, and would wait
// for memory at each. Only in contiguous rows, as addresses take registers. `overwrite`: instead of adding.
template <StripRows kRows, class Number, int kCount>
__device__ __forceinline__ void add_strip(const Strip<Number>& to, const float (&values)[kCount], bool overwrite) {
  constexpr int kBatch = kRows == StripRows::strided ? 1 : kBytesInFlight / static_cast<int>(sizeof(Number));
  static_assert(kCount % kBatch == 0);
  const auto exists = [&](int i) { return i / 4 * 8 + i % 2 <= to.last[i / 2 % 2]; };
  const auto at = [&](int i) {
    const int col = i / 4 * 8 + i % 2;
    return to.rows[i / 2 % 2] + (kRows == StripRows::strided ? col * to.col_stride : col);
  };
#pragma unroll
  for (int begin = 0; begin < kCount; begin += kBatch) {
    if constexpr (kRows == StripRows::pairs) {
      const auto pair_at = [&](int i) { return reinterpret_cast<Pair<Number>*>(at(begin + 2 * i)); };
      Pair<Number> old[kBatch / 2];
#pragma unroll
      for (int i = 0; i < kBatch / 2; ++i) old[i] = overwrite ? Pair<Number>{0, 0} : *pair_at(i);
#pragma unroll
      for (int i = 0; i < kBatch / 2; ++i)
        *pair_at(i) = {old[i].first + static_cast<Number>(values[begin + 2 * i]),
                       old[i].second + static_cast<Number>(values[begin + 2 * i + 1])};
    } else {
      Number old[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) old[i] = exists(begin + i) && !overwrite ? *at(begin + i) : Number(0);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (exists(begin + i)) *at(begin + i) = old[i] + static_cast<Number>(values[begin + i]);
    }
  }
}

// `row` and `col` are those of the first accumulator.
template <class Number, int kCount>
__device__ __forceinline__ void add_strip_to_state(const Arguments& args, int64_t group, int64_t row, int64_t col,
                                                   const float (&values)[kCount]) {
  Strip<Number> to;
  to.col_stride = args.state_col_stride;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + half * 8;
    to.rows[half] = static_cast<Number*>(args.second_moment) + group * args.state_group_stride +
                    r * args.state_row_stride + col * args.state_col_stride;
    to.last[half] = r < args.features ? static_cast<int>(max64(-1, min64(kTile, r - col))) : -1;
  }
  constexpr int kLastCol = (kCount - 1) / 4 * 8 + 1;
  const bool in_pairs = args.state_col_stride == 1 && to.last[0] >= kLastCol && to.last[1] >= kLastCol &&
                        reinterpret_cast<uintptr_t>(to.rows[0]) % sizeof(Pair<Number>) == 0 &&
                        reinterpret_cast<uintptr_t>(to.rows[1]) % sizeof(Pair<Number>) == 0;
  if (in_pairs)
    add_strip<StripRows::pairs>(to, values, false);
  else if (args.state_col_stride == 1)
    add_strip<StripRows::contiguous>(to, values, false);
  else
    add_strip<StripRows::strided>(to, values, false);
}

// A CTA's tile of kTile x kTile: its origin in the state, and its partial tile where the tile is split.
struct TileOutput {
  int64_t group, first_row, first_col;
  float* partial;
};

// Adds a thread's accumulators, the first of which is at (row, col) of the tile, to the state, or to the partial tile;
// `first`: there is nothing to add to there yet.
template <int kCount>
__device__ __forceinline__ void flush_strip(const Arguments& args, const TileOutput& tile, int row, int col,
                                            const float (&values)[kCount], bool first) {
  if (args.splits > 1) {
    float* at = tile.partial + row * kTile + col;
    add_strip<StripRows::pairs>(Strip<float>{{at, at + 8 * kTile}, 1, {kTile, kTile}}, values, first);
  } else if (args.state_is_double) {
    add_strip_to_state<double>(args, tile.group, tile.first_row + row, tile.first_col + col, values);
  } else {
    add_strip_to_state<float>(args, tile.group, tile.first_row + row, tile.first_col + col, values);
  }
}

__device__ __forceinline__ void add_to_total(const Arguments& args, int64_t group, int64_t feature, double value) {
  const int64_t at = group * args.total_group_stride + feature * args.total_stride;
  if (args.state_is_double)
    static_cast<double*>(args.total)[at] += value;
  else
    static_cast<float*>(args.total)[at] = static_cast<float>(static_cast<float*>(args.total)[at] + value);
}

// A diagonal tile's sum of one column: to the total, or to scratch where the tile is split.
__device__ __forceinline__ void flush_column_sum(const Arguments& args, int64_t group, int64_t feature, double sum,
                                                 bool is_split, int64_t split, int edge = kTile) {
  if (is_split)
    args.scratch[partial_sum_offset(group, split, feature, args.groups, args.splits, args.tiles - args.whole,
                                    args.features, edge)] = static_cast<float>(sum);
  else
    add_to_total(args, group, feature, sum);
}

}  // namespace lowrank_ops::covariance
