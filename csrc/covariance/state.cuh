// Adding to the state: float or double, any strides, the lower triangle only.
#pragma once

#include "covariance.h"
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

// Where a thread's accumulators of 16 rows of a tile go: the i-th lies i / 2 % 2 * 8 rows and i / 4 * 8 + i % 2 columns
// from the first one.
template <class Number>
struct Strip {
  Number* rows[2];
  int64_t col_stride;
  int last[2];  // column, counted as above, that exists in the row; negative where there is none
};

// Many are loaded before any of them is stored: for all the compiler knows, a store may go to where the next load comes
// from, so that in turn each would wait for memory on its own. Only in rows without gaps, as addresses take registers.
// `fresh`: there is nothing yet to add to.
template <bool kRowMajor, class Number, int kCount>
__device__ __forceinline__ void add_strip(const Strip<Number>& to, const float (&values)[kCount], bool fresh) {
  constexpr int kTogether = kRowMajor ? 64 / static_cast<int>(sizeof(Number)) : 1;
  static_assert(kCount % kTogether == 0);
  const auto exists = [&](int i) { return i / 4 * 8 + i % 2 <= to.last[i / 2 % 2]; };
  const auto at = [&](int i) {
    return to.rows[i / 2 % 2] + (kRowMajor ? i / 4 * 8 + i % 2 : (i / 4 * 8 + i % 2) * to.col_stride);
  };
#pragma unroll
  for (int begin = 0; begin < kCount; begin += kTogether) {
    Number old[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) old[i] = exists(begin + i) && !fresh ? *at(begin + i) : Number(0);
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (exists(begin + i)) *at(begin + i) = old[i] + static_cast<Number>(values[begin + i]);
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
    to.last[half] = r < args.features ? static_cast<int>(greatest(-1, least(kTile, r - col))) : -1;
  }
  if (args.state_col_stride == 1)
    add_strip<true>(to, values, false);
  else
    add_strip<false>(to, values, false);
}

template <int kCount>
__device__ __forceinline__ void add_strip_to_state(const Arguments& args, int64_t group, int64_t row, int64_t col,
                                                   const float (&values)[kCount]) {
  if (args.state_is_double)
    add_strip_to_state<double>(args, group, row, col, values);
  else
    add_strip_to_state<float>(args, group, row, col, values);
}

// The same to a partial tile.
template <int kCount>
__device__ __forceinline__ void add_strip_to_partial(float* partial, int row, int col, const float (&values)[kCount],
                                                     bool fresh) {
  float* first = partial + row * kTile + col;
  add_strip<true>(Strip<float>{{first, first + 8 * kTile}, 1, {kTile, kTile}}, values, fresh);
}

__device__ __forceinline__ void add_to_total(const Arguments& args, int64_t group, int64_t feature, double value) {
  const int64_t at = group * args.total_group_stride + feature * args.total_stride;
  if (args.state_is_double)
    static_cast<double*>(args.total)[at] += value;
  else
    static_cast<float*>(args.total)[at] = static_cast<float>(static_cast<float*>(args.total)[at] + value);
}

}  // namespace lowrank_ops::covariance
