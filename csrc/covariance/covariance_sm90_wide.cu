// second_moment += x^T x by wgmma in tiles of 256 x 256 (sm_90). covariance_sm90.cu with half the L2 traffic per MMA.
//
//   grid           clusters of 2 CTAs; one CTA per SM. A cluster takes a whole tile, or a split of a tile of the last,
//                  partial wave (Share)
//   cluster        each CTA 128 rows and all 256 columns; each multicasts half of the columns to both
//   warps          2 consumer warpgroups, 64 rows each; 1 producer warpgroup, of which one thread issues TMA loads
//   registers      setmaxnreg: 240 per consumer, 24 in the producer's warpgroup
//   pipeline       4 stages of 64 tokens; full: producer's expect_tx, empty: one arrival per consumer warp of both CTAs
//   epilogue       every 4096 tokens red.add to the state in global memory, which does not wait, or to the partial
//                  tile of a split one, which add_partials.cu reduces
//   shared memory  stages | mbarriers, from the next 1024 bytes on; static: column sums
//   deterministic  yes: each element of the state or of a partial tile is added to by one thread, in its order

#include <cuda.h>

#include "arguments.h"
#include "wide_tiles.h"

#ifdef LRO_KERNELS
#include "../arch/cluster.cuh"
#include "../arch/pipeline.cuh"
#include "../arch/red.cuh"
#include "../arch/setmaxnreg.cuh"
#include "../arch/smem.cuh"
#include "../arch/tma.cuh"
#include "../arch/wgmma.cuh"
#include "column_sums.cuh"
#include "state.cuh"
#endif

#ifdef LRO_LAUNCHERS
#include "../arch/tensor_map.h"
#include "covariance.h"
#endif

namespace lowrank_ops::covariance {

template <class Element>
__global__ void covariance_sm90_wide(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments args);

#ifdef LRO_KERNELS
namespace {

using wide::kAccumulators, wide::kClusterCtas, wide::kConsumers, wide::kStageBytes, wide::kStages;
using Pipeline = arch::Pipeline<kStages, kStageBytes, kClusterCtas>;

struct Cta {
  wide::Share share;
  Tile tile;
  Range tokens;
  int cluster_rank;
  int steps;
  __device__ bool diagonal() const { return tile.row == tile.col; }
  __device__ bool is_split() const { return share.split_tile >= 0; }
  __device__ int64_t first_row() const { return int64_t{tile.row} * wide::kTile + cluster_rank * wide::kRows; }
};

__device__ void produce(const CUtensorMap* map, const Cta& cta, const Pipeline& pipeline) {
  constexpr uint16_t kBothCtas = (1 << kClusterCtas) - 1;
  int step = 0;
  for (; step < cta.steps; ++step) {
    pipeline.producer_acquire(step, cta.diagonal() ? wide::kColumnBytes : kStageBytes);
    const int token = static_cast<int>(cta.tokens.begin) + step * wide::kTokens;
    for (int j = 0; j < wide::kColumnTmaTiles / kClusterCtas; ++j) {
      const int i = cta.cluster_rank * (wide::kColumnTmaTiles / kClusterCtas) + j;
      arch::tma_load_2d_multicast(pipeline.stage(step) + i * wide::kTmaBytes, map,
                                  cta.tile.col * wide::kTile + i * wide::kTmaFeatures, token, pipeline.full(step),
                                  kBothCtas);
    }
    for (int i = 0; !cta.diagonal() && i < wide::kRowTmaTiles; ++i)
      arch::tma_load_2d(pipeline.stage(step) + wide::kColumnBytes + i * wide::kTmaBytes, map,
                        static_cast<int>(cta.first_row()) + i * wide::kTmaFeatures, token, pipeline.full(step));
  }
  pipeline.producer_tail(step);
}

// Two neighbors of the state, where they exist.
__device__ __forceinline__ void add_pair(const Arguments& args, int64_t row, int64_t col, float first, float second) {
  if (row >= args.features || col > row) return;
  const int64_t at = row * args.state_row_stride + col * args.state_col_stride;
  const auto add = [&](auto* state) {
    arch::red_add(state + at, first);
    if (col + 1 <= row) arch::red_add(state + at + args.state_col_stride, second);
  };
  if (args.state_is_double)
    add(static_cast<double*>(args.second_moment));
  else
    add(static_cast<float*>(args.second_moment));
}

__device__ __forceinline__ void flush_to_state(const float (&acc)[kAccumulators], const Arguments& args, const Cta& cta,
                                               int consumer) {
  const int64_t row = cta.first_row() + arch::wgmma_accumulator_row(consumer, 0);
  const int64_t col = int64_t{cta.tile.col} * wide::kTile + arch::wgmma_accumulator_col(consumer, 0);
  const bool inside = !cta.diagonal() && cta.first_row() + wide::kRows <= args.features;
  const bool in_pairs = !args.state_is_double && args.state_col_stride == 1 && args.state_row_stride % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(args.second_moment) % 8 == 0;
  if (inside && in_pairs) {  // no predicates
    float* at = static_cast<float*>(args.second_moment) + row * args.state_row_stride + col;
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 2)
      arch::red_add_v2(
          at + arch::wgmma_accumulator_row(0, i) * args.state_row_stride + arch::wgmma_accumulator_col(0, i), acc[i],
          acc[i + 1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kAccumulators; i += 2)
    add_pair(args, row + arch::wgmma_accumulator_row(0, i), col + arch::wgmma_accumulator_col(0, i), acc[i],
             acc[i + 1]);
}

__device__ __forceinline__ void flush_to_partial(const float (&acc)[kAccumulators], const Arguments& args,
                                                 const Cta& cta, int consumer, bool first) {
  float* partial = args.scratch + partial_offset(0, cta.share.split, cta.share.split_tile, args.splits,
                                                 args.tiles - args.whole, wide::kTile);
  float* at = partial + (cta.cluster_rank * wide::kRows + arch::wgmma_accumulator_row(consumer, 0)) * wide::kTile +
              arch::wgmma_accumulator_col(consumer, 0);
#pragma unroll
  for (int i = 0; i < kAccumulators; i += 2) {
    float* to = at + arch::wgmma_accumulator_row(0, i) * wide::kTile + arch::wgmma_accumulator_col(0, i);
    if (first)
      *reinterpret_cast<float2*>(to) = float2{acc[i], acc[i + 1]};
    else
      arch::red_add_v2(to, acc[i], acc[i + 1]);
  }
}

template <class Element>
__device__ __forceinline__ void consume(const Arguments& args, const Cta& cta, const Pipeline& pipeline,
                                        const unsigned char* stages, ColumnSums& sums, int consumer) {
  using Wgmma = arch::WgmmaSS<Element, wide::kTile, arch::Major::MN>;
  float acc[kAccumulators];
  for (int chunk = 0; chunk < cta.steps; chunk += wide::kChunkSteps) {
    const int end = min(chunk + wide::kChunkSteps, cta.steps);
    float sum[2] = {0.0f, 0.0f};
    for (int step = chunk; step < end; ++step) {
      pipeline.consumer_wait(step);
      const uint32_t stage = pipeline.stage(step);
      arch::wgmma_fence();
#pragma unroll
      for (int k = 0; k < wide::kTokens / wide::kMmaK; ++k)
        Wgmma::mma(acc, wgmma::descriptor(stage + wide::a_offset(cta.diagonal(), cta.cluster_rank, consumer / 128, k)),
                   wgmma::descriptor(stage + wgmma::b_offset(k)), step > chunk || k > 0);
      arch::wgmma_commit_group();
      if (cta.diagonal()) {
        add_columns<Element>(sum, stages + step % kStages * kStageBytes, wide::row_offset(cta.cluster_rank, 0, 0),
                             consumer);
        arch::fence_proxy_async();
        __syncwarp();
      }
      arch::wgmma_wait_group<1>();  // this step's MMAs may run on; the previous stage has been read
      if (step > chunk) pipeline.consumer_release(step - 1, consumer);
    }
    arch::wgmma_wait_group<0>();
    pipeline.consumer_release(end - 1, consumer);
    if (cta.is_split())
      flush_to_partial(acc, args, cta, consumer, chunk == 0);
    else
      flush_to_state(acc, args, cta, consumer);
    for (int i = 0; i < 2; ++i) sums.values[consumer][i] = chunk == 0 ? sum[i] : sums.values[consumer][i] + sum[i];
  }
}

// All threads of the CTA.
__device__ void flush_column_sums(const ColumnSums& sums, const Arguments& args, const Cta& cta) {
  __syncthreads();
  const int64_t feature = cta.first_row() + threadIdx.x;
  if (threadIdx.x >= wide::kRows || feature >= args.features) return;
  flush_column_sum(args, 0, feature, sums.of_column(threadIdx.x), cta.is_split(), cta.share.split, wide::kTile);
}

}  // namespace

template <class Element>
__global__ void __launch_bounds__(wide::kThreads, 1)
    covariance_sm90_wide(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments args) {
  extern __shared__ unsigned char unaligned[];
  __shared__ ColumnSums sums;
  const uint32_t start = arch::cast_smem_ptr_to_uint(unaligned);
  const uint32_t padding = static_cast<uint32_t>(round_up(start, arch::kSwizzleAlignment)) - start;
  const Pipeline pipeline{start + padding + kStages * kStageBytes, start + padding};

  Cta cta{};
  cta.share = wide::share_of_cluster(blockIdx.x / kClusterCtas, args.whole, args.splits);
  cta.tile = tile_at(cta.share.tile);
  cta.tokens =
      cta.is_split() ? tokens_of_split(cta.share.split, args.tokens_per_split, args.tokens) : Range{0, args.tokens};
  cta.cluster_rank = arch::cluster_ctarank();
  cta.steps = static_cast<int>(ceil_div(cta.tokens.end - cta.tokens.begin, wide::kTokens));
  if (threadIdx.x == 0) {
    arch::prefetch_tensormap(&map);
    pipeline.init(kConsumers / 32);
    arch::fence_mbarrier_init();
  }
  __syncthreads();
  // A CTA must have started before a peer writes to it.
  arch::cluster_arrive();
  arch::cluster_wait();
  if (threadIdx.x < kConsumers) {
    arch::warpgroup_reg_alloc<wide::kConsumerRegisters>();
    consume<Element>(args, cta, pipeline, unaligned + padding, sums, threadIdx.x);
  } else {
    arch::warpgroup_reg_dealloc<wide::kProducerRegisters>();
    if (threadIdx.x == kConsumers) produce(&map, cta, pipeline);
    __syncwarp();
  }
  if (cta.diagonal()) flush_column_sums(sums, args, cta);
}

#endif  // LRO_KERNELS

#ifdef LRO_LAUNCHERS
namespace {

template <class Element>
void launch_element(const CovariancePlan& plan, const Arguments& args, const Launch& launch) {
  const auto kernel = covariance_sm90_wide<Element>;
  opt_in_shared_memory(kernel, plan.shared_bytes, launch);
  const CUtensorMap map = arch::encode_tensor_map_2d<Element>(args.x, args.tokens, args.features, args.x_row_stride,
                                                              wide::kTokens, wide::kTmaFeatures, launch);
  const int64_t ctas = wide::kClusterCtas * wide::clusters(args.tiles, args.whole, args.splits);
  launch_kernel(kernel, {dim3(static_cast<unsigned>(ctas)), wide::kThreads, plan.shared_bytes, wide::kClusterCtas},
                launch, map, args);
  if (args.whole < args.tiles) launch_add_partials(args, wide::kTile, launch);
}

}  // namespace

void launch_sm90_wide(const CovariancePlan& plan, const Arguments& args, Dtype dtype, const Launch& launch) {
  dispatch_16_bit(dtype, [&](auto element) { launch_element<decltype(element)>(plan, args, launch); });
}

#endif  // LRO_LAUNCHERS

}  // namespace lowrank_ops::covariance
