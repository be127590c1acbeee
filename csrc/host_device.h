// What both the kernels and the host tests compile: index arithmetic carries LRO_HD.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LRO_HD __host__ __device__ __forceinline__
#else
#define LRO_HD inline
#endif

namespace lowrank_ops {

LRO_HD constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
LRO_HD constexpr int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }
LRO_HD constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LRO_HD constexpr int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace lowrank_ops
