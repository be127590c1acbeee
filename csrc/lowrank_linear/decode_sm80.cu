// activation((x down^T) up^T + bias) for few tokens, bound by reading the weights once. Two kernels: sums of
// t = x down^T over ranges of in_features, then t rounded, times up. The second brings its first weights before it
// waits for the first, which on compute capability 9.0 and newer is still running then.

#include "../mma_sm80.cuh"
#include "fragments.h"
#include "lowrank_linear.h"

namespace lowrank_ops::lowrank_linear {
namespace {

constexpr int kAhead = 4;  // steps whose weights a warp has on the way

__device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Vector {
  uint32_t words[4];  // 8 features
};

// 8 features of a row, zeros past its end. kAligned: the row starts on 16 bytes, as `feature` does.
template <class Element, bool kAligned>
__device__ __forceinline__ Vector load_features(const Element* row, int64_t feature, int64_t features, bool exists) {
  Vector v{{0, 0, 0, 0}};
  if (!exists || feature >= features) return v;
  if (kAligned && feature + kVector <= features) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row + feature));
    return {{bits.x, bits.y, bits.z, bits.w}};
  }
  const unsigned short* bits = reinterpret_cast<const unsigned short*>(row + feature);
#pragma unroll
  for (int e = 0; e < kVector; ++e)
    if (feature + e < features) v.words[e / 2] |= static_cast<uint32_t>(__ldg(bits + e)) << (e % 2 * 16);
  return v;
}

// A warp's weights of one step: rows r and r + 8 of each 16-row product.
template <int kProducts>
struct Weights {
  Vector rows[kProducts][2];
};

template <class Element, bool kAligned, int kProducts>
__device__ __forceinline__ void load_weights(Weights<kProducts>& weights, const Element* weight, int64_t stride,
                                             int64_t first_row, int64_t rows, int64_t feature, int64_t features) {
#pragma unroll
  for (int p = 0; p < kProducts; ++p)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + p * kRows + lane_row(threadIdx.x % 32) + half * 8;
      weights.rows[p][half] =
          load_features<Element, kAligned>(weight + row * stride, feature, features, row < rows);
    }
}

template <class Element, int kProducts, int kGroups>
__device__ __forceinline__ void multiply(float (&acc)[kProducts][kGroups][4], const Weights<kProducts>& weights,
                                         const Vector& tokens, int group) {
#pragma unroll
  for (int p = 0; p < kProducts; ++p)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vector &top = weights.rows[p][0], &bottom = weights.rows[p][1];
      const uint32_t a[4] = {top.words[2 * half], bottom.words[2 * half], top.words[2 * half + 1],
                             bottom.words[2 * half + 1]};
      multiply_add<Element>(acc[p][group], a, tokens.words[2 * half], tokens.words[2 * half + 1]);
    }
}

// Leaves every warp's sums in shared memory.
template <int kProducts, int kGroups>
__device__ __forceinline__ void leave_sums(const float (&acc)[kProducts][kGroups][4], float* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int p = 0; p < kProducts; ++p)
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[sum_index(warp, p * kRows + accumulator_row(lane, e), group * 8 + accumulator_token(lane, e),
                       kProducts * kRows, kGroups * 8)] = acc[p][group][e];
  __syncthreads();
}

template <int kProducts, int kGroups>
__device__ __forceinline__ float sum_of_warps(const float* sums, int row, int token) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp)
    sum += sums[sum_index(warp, row, token, kProducts * kRows, kGroups * 8)];
  return sum;
}

// ---- t = x down^T: 16 rows of down, a range of in_features, a tile of tokens per block ----

template <class Element, int kGroups, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) decode_down_sm80(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_dependents_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t first_token = static_cast<int64_t>(blockIdx.z) * kGroups * 8;
  const int64_t begin = blockIdx.y * args.split_features;
  const int64_t end = least(begin + args.split_features, args.in_features);
  const int steps = static_cast<int>(ceil_div(end - begin, kFeatures));
  const Element* x = static_cast<const Element*>(args.x);
  const Element* down = static_cast<const Element*>(args.down);

  float acc[1][kGroups][4] = {};
  for (int i = 0; step_of_warp(warp, i) < steps; i += kAhead) {
    Weights<1> weights[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      load_weights<Element, kAligned>(weights[j], down, args.down_stride, first_row, args.rank,
                                      begin + int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane),
                                      end);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t feature = begin + int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int64_t token = first_token + group * 8 + lane_token(lane);
        multiply<Element>(acc, weights[j],
                          load_features<Element, kAligned>(x + token * args.x_stride, feature, end,
                                                           token < args.tokens),
                          group);
      }
    }
  }
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

__device__ __forceinline__ float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::none: return y;
    case Activation::relu: return y < 0.0f ? 0.0f : y;  // keeps NaN
    case Activation::gelu: return 0.5f * y * (1.0f + erff(y * 0.70710678118654752f));
    case Activation::gelu_tanh:
      return 0.5f * y * (1.0f + tanhf(0.79788456080286536f * (y + 0.044715f * y * y * y)));
    case Activation::silu: return y / (1.0f + expf(-y));
  }
  return y;
}

__device__ __forceinline__ __nv_bfloat16 round_to(float value, __nv_bfloat16) { return __float2bfloat16_rn(value); }
__device__ __forceinline__ __half round_to(float value, __half) { return __float2half_rn(value); }

// The tile's t, summed over the splits in order and rounded; zeros past the last token and the last rank.
template <class Element, int kGroups>
__device__ __forceinline__ void gather_t(const Arguments& args, int64_t first_token, unsigned char* t) {
  const int columns = static_cast<int>(padded_rank(args.rank));
  for (int row = threadIdx.x / 32; row < kGroups * 8; row += kWarps) {
    const int64_t token = first_token + row;
    Element* to = reinterpret_cast<Element*>(t + row * t_pitch(args.rank));
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
            shared + (group * 8 + lane_token(lane)) * t_pitch(args.rank) + feature * 2);
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
void launch_pair(const LowRankPlan& plan, Arguments args, const Launch& launch) {
  const auto down = decode_down_sm80<Element, kGroups, kAligned>;
  const auto up = decode_up_sm80<Element, kGroups, kAligned>;
  const unsigned token_tiles = static_cast<unsigned>(ceil_div(args.tokens, plan.token_tile));
  const auto allow = [&](const void* kernel, int64_t bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), launch);
  };
  allow(reinterpret_cast<const void*>(down), plan.shared_bytes_down);
  allow(reinterpret_cast<const void*>(up), plan.shared_bytes_up);

  down<<<dim3(static_cast<unsigned>(ceil_div(args.rank, plan.rows_down)), plan.splits, token_tiles), kThreads,
         plan.shared_bytes_down, launch.stream>>>(args);
  check(cudaGetLastError(), launch);

  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(args.out_features, plan.rows_up)), 1, token_tiles);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes_up;
  config.stream = launch.stream;
  config.attrs = &dependent;
  config.numAttrs = plan.dependent_launch ? 1 : 0;
  check(cudaLaunchKernelEx(&config, up, args), launch);
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
  if (dtype == Dtype::bfloat16)
    return aligned ? launch_groups<__nv_bfloat16, true>(plan, args, launch)
                   : launch_groups<__nv_bfloat16, false>(plan, args, launch);
  return aligned ? launch_groups<__half, true>(plan, args, launch)
                 : launch_groups<__half, false>(plan, args, launch);
}

}  // namespace lowrank_ops::lowrank_linear
