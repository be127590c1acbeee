// y = activation((x down^T) up^T + bias) for few tokens, bound by reading the weights once, of a layer or of each
// member of a group. Two kernels.
//
//                  decode_down_sm80                             decode_up_sm80
//   computes       t = x down^T, rounded                        t up^T, bias, activation
//   grid           (16 rows of down, splits, token tiles)       (16 or 32 rows of up, 1, token tiles)
//                  rows of one member of the group              the same
//   CTA            8 warps, K steps of 32 round-robin           the same
//   pipeline       4 steps of weights per warp in registers     the same; the first 4 are loaded before the PDL wait
//   splits         sums to scratch; the last CTA of a unit to    -
//                  arrive at its counter adds them in order
//   shared memory  warp sums                                    t, then warp sums in its place
//   PDL (sm_90+)   launch_dependents at the start               wait before t is read
//   deterministic  yes: warps, then splits, summed in order     yes

#include "arguments.h"
#include "decode_layout.h"

#ifdef LRO_KERNELS
#include "../arch/atom.cuh"
#include "../arch/pdl.cuh"
#include "decode.cuh"
#include "epilogue.cuh"
#endif

#ifdef LRO_LAUNCHERS
#include <iterator>

#include "lowrank_linear.h"
#endif

namespace lowrank_ops::lowrank_linear {

template <class Element, int kTokenGroups, bool kVectorized>
__global__ void decode_down_sm80(const __grid_constant__ Group group);
template <class Element, int kTokenGroups, bool kVectorized>
__global__ void decode_up_sm80(const __grid_constant__ Group group);

#ifdef LRO_KERNELS

template <class Element, int kTokenGroups, bool kVectorized>
__global__ void __launch_bounds__(kThreads, 1) decode_down_sm80(const __grid_constant__ Group group) {
  extern __shared__ __align__(128) unsigned char shared[];
  arch::griddepcontrol_launch_dependents();
  const Place at =
      place_of(blockIdx.x, group.downs, [&](int member) { return ceil_div(group.members[member].rank, kRows); });
  const Arguments& args = group.members[at.member];
  const int64_t first_row = at.index * kRows;
  constexpr int kTokens = kTokenGroups * 8;
  const int64_t first_token = static_cast<int64_t>(blockIdx.z) * kTokens;
  const int64_t begin = blockIdx.y * args.split_features;
  const int64_t end = min64(begin + args.split_features, args.in_features);

  float acc[1][kTokenGroups][4] = {};
  mma_down<Element, 1, kTokenGroups, kVectorized>(acc, static_cast<const Element*>(args.down), args.down_stride,
                                                  first_row, args.rank, static_cast<const Element*>(args.x),
                                                  args.x_stride, first_token, args.tokens, begin, end);
  float* sums = reinterpret_cast<float*>(shared);
  store_warp_sums(acc, sums);
  const auto each = [&](const auto& body) {  // of the unit's sums: row i % 16, token i / 16
    for (int i = threadIdx.x; i < kRows * kTokens; i += kThreads) body(i);
  };
  const auto store_t = [&](int i, float sum) {
    if (const int64_t token = first_token + i / kRows; token < args.tokens)
      reinterpret_cast<Element*>(args.scratch)[token * scratch_columns(args.rank) + first_row + i % kRows] =
          round_to(sum, Element{});
  };
  if (args.splits == 1)
    return each([&](int i) { store_t(i, reduce_warp_sums<1, kTokenGroups>(sums, i % kRows, i / kRows)); });

  const int64_t unit = blockIdx.z * ceil_div(args.rank, kRows) + at.index;
  float* partials = args.scratch + partials_offset(args.tokens, args.rank);
  const auto partial = [&](int split, int i) {
    return partials + partial_index(unit, split, args.splits, kTokens) + i;
  };
  each([&](int i) { *partial(blockIdx.y, i) = reduce_warp_sums<1, kTokenGroups>(sums, i % kRows, i / kRows); });
  __syncthreads();  // all of this CTA's sums have been written, and those of its warps read
  int& arrived = reinterpret_cast<int&>(*shared);
  if (threadIdx.x == 0) arrived = static_cast<int>(arch::atom_add_acq_rel(args.counters + unit, 1u));
  __syncthreads();
  if (arrived != args.splits - 1) return;
  each([&](int i) {
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < args.splits; ++split) sum += __ldcg(partial(split, i));
    store_t(i, sum);
  });
}

template <class Element, int kTokenGroups, bool kVectorized>
__global__ void __launch_bounds__(kThreads, 1) decode_up_sm80(const __grid_constant__ Group group) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kRowTiles = up_row_tiles(kTokenGroups * 8);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Place at = place_of(blockIdx.x, group.count, [&](int member) {
    return ceil_div(group.members[member].out_features, kRowTiles * kRows);
  });
  const Arguments& args = group.members[at.member];
  const int64_t first_row = at.index * kRowTiles * kRows;
  const int64_t first_token = static_cast<int64_t>(blockIdx.z) * kTokenGroups * 8;
  const int steps = static_cast<int>(ceil_div(args.rank, kFeatures));
  const Element* up = static_cast<const Element*>(args.up);

  Weights<kRowTiles> weights[kPrefetch];
  const auto prefetch = [&](int i) {
#pragma unroll
    for (int j = 0; j < kPrefetch; ++j)
      load_weights<Element, kVectorized>(weights[j], up, args.up_stride, first_row, args.out_features,
                                         int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane),
                                         args.rank);
  };
  prefetch(0);
  arch::griddepcontrol_wait();
  const int columns = static_cast<int>(scratch_columns(args.rank));
  gather_t<kTokenGroups * 8>(reinterpret_cast<const uint4*>(args.scratch) + first_token * (columns / kVector),
                             args.tokens - first_token, columns / kVector, rank_pitch(args.rank), shared);
  __syncthreads();

  float acc[kRowTiles][kTokenGroups][4] = {};
  for (int i = 0; step_of_warp(warp, i) < steps; i += kPrefetch) {
    if (i > 0) prefetch(i);
#pragma unroll
    for (int j = 0; j < kPrefetch; ++j) {
      if (step_of_warp(warp, i + j) >= steps) break;  // past the end of t
      const int feature = step_of_warp(warp, i + j) * kFeatures + lane_feature(lane);
#pragma unroll
      for (int group = 0; group < kTokenGroups; ++group) {
        const unsigned char* row = shared + (group * 8 + lane_token(lane)) * rank_pitch(args.rank);
        mma_step<Element>(acc, weights[j], load_shared(row, feature, feature < columns), group);
      }
    }
  }
  __syncthreads();  // t has been read: the sums overwrite it
  float* sums = reinterpret_cast<float*>(shared);
  store_warp_sums(acc, sums);
  for (int i = threadIdx.x; i < kRowTiles * kRows * kTokenGroups * 8; i += kThreads) {
    const int row = i % (kRowTiles * kRows), tile_token = i / (kRowTiles * kRows);
    const int64_t n = first_row + row, token = first_token + tile_token;
    if (n >= args.out_features || token >= args.tokens) continue;
    store_output<Element>(args, token, n, reduce_warp_sums<kRowTiles, kTokenGroups>(sums, row, tile_token));
  }
}

#endif  // LRO_KERNELS

#ifdef LRO_LAUNCHERS
namespace {

template <class Element, int kTokenGroups, bool kVectorized>
void launch_pair(const LowRankPlan& plan, Group group, const Launch& launch) {
  const auto down = decode_down_sm80<Element, kTokenGroups, kVectorized>;
  const auto up = decode_up_sm80<Element, kTokenGroups, kVectorized>;
  const int64_t tokens = group.members[0].tokens;
  const unsigned token_tiles = static_cast<unsigned>(ceil_div(tokens, plan.token_tile));
  opt_in_shared_memory(down, launch.shared_memory, launch);
  opt_in_shared_memory(up, launch.shared_memory, launch);

  auto* counters = reinterpret_cast<unsigned*>(
      place_scratch(group, [&](int64_t rank) { return member_floats(tokens, rank, plan.token_tile, plan.splits); }));
  unsigned* next = counters;
  int64_t rows_down = 0, rows_up = 0;  // CTAs, along the first axis
  for (int i = 0; i < group.downs; ++i) {
    group.members[i].counters = next;
    next += scratch_units(tokens, group.members[i].rank, plan.token_tile);
    rows_down += ceil_div(group.members[i].rank, plan.rows_down);
  }
  for (int i = 0; i < group.count; ++i) rows_up += ceil_div(group.members[i].out_features, plan.rows_up);

  if (plan.splits > 1) {
    const size_t bytes = static_cast<size_t>(next - counters) * sizeof(unsigned);
    check(cudaMemsetAsync(counters, 0, bytes, launch.stream), launch);
  }
  const dim3 down_grid(static_cast<unsigned>(rows_down), plan.splits, token_tiles);
  launch_kernel(down, {down_grid, kThreads, plan.shared_bytes_down}, launch, group);
  const dim3 up_grid(static_cast<unsigned>(rows_up), 1, token_tiles);
  launch_kernel(up, {up_grid, kThreads, plan.shared_bytes_up, 0, false, plan.dependent_launch}, launch, group);
}

}  // namespace

void launch_decode_sm80(const LowRankPlan& plan, const Group& group, Dtype dtype, const Launch& launch) {
  constexpr auto kAll = std::make_index_sequence<std::size(kDecodeSm80Variants)>{};
  dispatch_variant(dtype, launch, kAll, [&](auto element, auto i) {
    constexpr DecodeVariant v = kDecodeSm80Variants[i];
    if (plan.token_tile != v.token_tile || plan.vectorized != v.vectorized) return false;
    launch_pair<decltype(element), v.token_tile / 8, v.vectorized>(plan, group, launch);
    return true;
  });
}

#endif  // LRO_LAUNCHERS

}  // namespace lowrank_ops::lowrank_linear
