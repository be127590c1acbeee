// Index arithmetic that kernels, planner and host tests share carries LRO_HD.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LRO_HD __host__ __device__ __forceinline__
#else
#define LRO_HD inline
#endif

// A .cu file contains kernels and their launchers. nvcc compiles both at once. Without nvcc (csrc/nvrtc.py), NVRTC compiles
// the kernels, and the host compiler the launchers, with LOWRANK_OPS_NVRTC defined.
#ifndef LOWRANK_OPS_NVRTC
#define LRO_KERNELS
#endif
#ifndef __CUDACC_RTC__
#define LRO_LAUNCHERS
#endif

namespace lowrank_ops {

LRO_HD constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
LRO_HD constexpr int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }
LRO_HD constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LRO_HD constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace lowrank_ops
