// activation((x down^T) up^T + bias) for few tokens, bound by reading the weights once. Two kernels: sums of
// t = x down^T over ranges of in_features, then t rounded, times up. The second brings its first weights before it
// waits for the first, which on compute capability 9.0 and newer is still running then.

#include "../dependent_launch.cuh"
#include "decode.cuh"
#include "epilogue.cuh"
#include "lowrank_linear.h"

namespace lowrank_ops::lowrank_linear {
namespace {

// ---- t = x down^T: 16 rows of down, a range of in_features, a tile of tokens per block ----

template <class Element, int kGroups, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) decode_down_sm80(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_dependents_start();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t first_token = static_cast<int64_t>(blockIdx.z) * kGroups * 8;
  const int64_t begin = blockIdx.y * args.split_features;
  const int64_t end = least(begin + args.split_features, args.in_features);

  float acc[1][kGroups][4] = {};
  multiply_range<Element, kGroups, kAligned>(acc, static_cast<const Element*>(args.down), args.down_stride, first_row,
                                             args.rank, static_cast<const Element*>(args.x), args.x_stride,
                                             first_token, args.tokens, begin, end);
  float* sums = reinterpret_cast<float*>(shared);
  leave_sums(acc, sums);
  for (int i = threadIdx.x; i < kRows * kGroups * 8; i += kThreads) {
    const int row = i % kRows, group_token = i / kRows;  // neighbouring threads write neighbouring ranks
    const int64_t r = first_row + row, token = first_token + group_token;
    if (r < args.rank && token < args.tokens)
      args.scratch[partial_index(blockIdx.y, token, r, args.tokens, args.rank)] =
          sum_of_warps<1, kGroups>(sums, row, group_token);
  }
}

// ---- y = activation(t up^T + bias): 16 or 32 rows of up, a tile of tokens per block ----

// The tile's t, summed over the splits in order and rounded; zeros past the last token and the last rank.
template <class Element, int kGroups>
__device__ __forceinline__ void gather_t(const Arguments& args, int64_t first_token, unsigned char* t) {
  const int columns = static_cast<int>(padded_rank(args.rank));
  for (int row = threadIdx.x / 32; row < kGroups * 8; row += kWarps) {
    const int64_t token = first_token + row;
    Element* to = reinterpret_cast<Element*>(t + row * rank_pitch(args.rank));
    for (int r = threadIdx.x % 32; r < columns; r += 32) {
      float sum = 0.0f;
      if (token < args.tokens && r < args.rank)
        for (int split = 0; split < args.splits; ++split)
          sum += args.scratch[partial_index(split, token, r, args.tokens, args.rank)];
      to[r] = round_to(sum, Element{});
    }
  }
}

template <class Element, int kGroups, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) decode_up_sm80(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kProducts = up_products(kGroups * 8);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kProducts * kRows;
  const int64_t first_token = static_cast<int64_t>(blockIdx.z) * kGroups * 8;
  const int steps = static_cast<int>(ceil_div(args.rank, kFeatures));
  const Element* up = static_cast<const Element*>(args.up);

  Weights<kProducts> weights[kAhead];
  const auto bring = [&](int i) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      load_weights<Element, kAligned>(weights[j], up, args.up_stride, first_row, args.out_features,
                                      int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane), args.rank);
  };
  bring(0);
  wait_for_predecessor();
  gather_t<Element, kGroups>(args, first_token, shared);
  __syncthreads();

  float acc[kProducts][kGroups][4] = {};
  for (int i = 0; step_of_warp(warp, i) < steps; i += kAhead) {
    if (i > 0) bring(i);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (step_of_warp(warp, i + j) >= steps) break;  // t ends there
      const int feature = step_of_warp(warp, i + j) * kFeatures + lane_feature(lane);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint4 bits = *reinterpret_cast<const uint4*>(
            shared + (group * 8 + lane_token(lane)) * rank_pitch(args.rank) + feature * 2);
        multiply<Element>(acc, weights[j], Vector{{bits.x, bits.y, bits.z, bits.w}}, group);
      }
    }
  }
  __syncthreads();  // t has been read; the sums take its place
  float* sums = reinterpret_cast<float*>(shared);
  leave_sums(acc, sums);
  for (int i = threadIdx.x; i < kProducts * kRows * kGroups * 8; i += kThreads) {
    const int row = i % (kProducts * kRows), group_token = i / (kProducts * kRows);
    const int64_t n = first_row + row, token = first_token + group_token;
    if (n >= args.out_features || token >= args.tokens) continue;
    float y = sum_of_warps<kProducts, kGroups>(sums, row, group_token);
    if (args.bias) y += static_cast<float>(static_cast<const Element*>(args.bias)[n]);
    static_cast<Element*>(args.y)[token * args.out_features + n] = round_to(activate(y, args.activation), Element{});
  }
}

template <class Element, int kGroups, bool kAligned>
void launch_pair(const LowRankPlan& plan, const Arguments& args, const Launch& launch) {
  const auto down = decode_down_sm80<Element, kGroups, kAligned>;
  const auto up = decode_up_sm80<Element, kGroups, kAligned>;
  const unsigned token_tiles = static_cast<unsigned>(ceil_div(args.tokens, plan.token_tile));
  allow_all_shared_memory(reinterpret_cast<const void*>(down), launch);
  allow_all_shared_memory(reinterpret_cast<const void*>(up), launch);

  const dim3 down_blocks(static_cast<unsigned>(ceil_div(args.rank, plan.rows_down)), plan.splits, token_tiles);
  launch_kernel(down, {down_blocks, kThreads, plan.shared_bytes_down}, launch, args);
  const dim3 up_blocks(static_cast<unsigned>(ceil_div(args.out_features, plan.rows_up)), 1, token_tiles);
  launch_kernel(up, {up_blocks, kThreads, plan.shared_bytes_up, 0, false, plan.dependent_launch}, launch, args);
}

template <class Element, bool kAligned>
void launch_groups(const LowRankPlan& plan, const Arguments& args, const Launch& launch) {
  switch (plan.token_tile) {
    case 8: return launch_pair<Element, 1, kAligned>(plan, args, launch);
    case 16: return launch_pair<Element, 2, kAligned>(plan, args, launch);
    case 32: return launch_pair<Element, 4, kAligned>(plan, args, launch);
    default: return launch_pair<Element, 8, kAligned>(plan, args, launch);
  }
}

}  // namespace

void launch_decode_sm80(const LowRankPlan& plan, const Arguments& args, Dtype dtype, bool aligned,
                        const Launch& launch) {
  aligned = aligned && args.in_features % kVector == 0 && args.rank % kVector == 0;  // rows end on 16 bytes, too
  if (dtype == Dtype::bfloat16)
    return aligned ? launch_groups<__nv_bfloat16, true>(plan, args, launch)
                   : launch_groups<__nv_bfloat16, false>(plan, args, launch);
  return aligned ? launch_groups<__half, true>(plan, args, launch)
                 : launch_groups<__half, false>(plan, args, launch);
}

}  // namespace lowrank_ops::lowrank_linear
