// second_moment += x^T x by wgmma, for 16-bit x with rows on 16 bytes (sm_90).
//
//   grid           (lower tiles of 128 x 128, splits of the tokens, groups); two CTAs per SM
//   warps          2 consumer warpgroups, 64 rows of the tile each; 1 producer warp, whose thread 0 issues TMA loads
//   pipeline       3 stages of 64 tokens; full: producer's expect_tx, empty: one arrival per consumer warp
//   operands       both from x as it lies, MN-major; a diagonal tile loads one operand and uses it as both
//   epilogue       every 2048 tokens the accumulators are added to the state, or to the partial tile of a split one,
//                  which add_partials.cu reduces
//   shared memory  stages | mbarriers, from the next 1024 bytes on; static: column sums
//   deterministic  yes

#include <cuda.h>

#include "arguments.h"
#include "wgmma_tiles.h"

#ifdef LRO_KERNELS
#include "../arch/pipeline.cuh"
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

namespace w = wgmma;

template <class Element>
__global__ void covariance_sm90(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments args);

#ifdef LRO_KERNELS
namespace {

using w::kAccumulators, w::kConsumers, w::kOperandBytes, w::kStageBytes, w::kStages, w::kTmaBytes, w::kTmaFeatures;

using Pipeline = arch::Pipeline<kStages, kStageBytes>;

struct Cta {
  Tile tile;
  Range tokens;
  int steps;
  __device__ bool diagonal() const { return tile.row == tile.col; }
};

__device__ void produce(const CUtensorMap* map, const Cta& cta, const Pipeline& pipeline) {
  const int operands = cta.diagonal() ? 1 : 2;
  for (int step = 0; step < cta.steps; ++step) {
    pipeline.producer_acquire(step, operands * kOperandBytes);
    const int token = static_cast<int>(cta.tokens.begin) + step * w::kTokens;
    for (int operand = 0; operand < operands; ++operand)
      for (int i = 0; i < w::kTmaTiles; ++i)
        arch::tma_load_2d(pipeline.stage(step) + operand * kOperandBytes + i * kTmaBytes, map,
                          (operand == 0 ? cta.tile.row : cta.tile.col) * kTile + i * kTmaFeatures, token,
                          pipeline.full(step));
  }
}

__device__ __forceinline__ void flush(const float (&acc)[kAccumulators], const Arguments& args, const Cta& cta,
                                      int consumer, bool first) {
  asm volatile("" : "+r"(consumer));  // or the compiler keeps addresses in registers from one flush to the next
  const TileOutput output{blockIdx.z, int64_t{cta.tile.row} * kTile, int64_t{cta.tile.col} * kTile,
                          args.scratch + partial_offset(blockIdx.z, blockIdx.y, blockIdx.x, args.splits, args.tiles)};
  flush_strip(args, output, arch::wgmma_accumulator_row(consumer, 0), arch::wgmma_accumulator_col(consumer, 0), acc,
              first);
}

template <class Element>
__device__ void consume(const Arguments& args, const Cta& cta, const Pipeline& pipeline, const unsigned char* stages,
                        ColumnSums& sums, int consumer) {
  using Wgmma = arch::WgmmaSS<Element, kTile, arch::Major::MN>;
  float acc[kAccumulators];
  for (int chunk = 0; chunk < cta.steps; chunk += w::kChunkSteps) {
    const int end = min(chunk + w::kChunkSteps, cta.steps);
    float sum[2] = {0.0f, 0.0f};
    for (int step = chunk; step < end; ++step) {
      pipeline.consumer_wait(step);
      const uint32_t rows = pipeline.stage(step);
      const uint32_t cols = cta.diagonal() ? rows : rows + kOperandBytes;
      arch::wgmma_fence();
#pragma unroll
      for (int k = 0; k < w::kTokens / w::kMmaK; ++k)
        Wgmma::mma(acc, w::descriptor(rows + w::a_offset(consumer / 128, k)), w::descriptor(cols + w::b_offset(k)),
                   step > chunk || k > 0);
      arch::wgmma_commit_group();
      if (cta.diagonal()) {
        add_columns<Element>(sum, stages + step % kStages * kStageBytes, 0, consumer);
        arch::fence_proxy_async();
        __syncwarp();
      }
      arch::wgmma_wait_group<1>();  // this step's MMAs may run on; the previous stage has been read
      if (step > chunk) pipeline.consumer_release(step - 1, consumer);
    }
    arch::wgmma_wait_group<0>();
    pipeline.consumer_release(end - 1, consumer);
    flush(acc, args, cta, consumer, chunk == 0);
    for (int i = 0; i < 2; ++i) sums.values[consumer][i] = chunk == 0 ? sum[i] : sums.values[consumer][i] + sum[i];
  }
}

// All threads of the CTA.
__device__ void flush_column_sums(const ColumnSums& sums, const Arguments& args, const Cta& cta) {
  __syncthreads();
  const int64_t feature = int64_t{cta.tile.row} * kTile + threadIdx.x;
  if (threadIdx.x >= kTile || feature >= args.features) return;
  flush_column_sum(args, blockIdx.z, feature, sums.of_column(threadIdx.x), args.splits > 1, blockIdx.y);
}

}  // namespace

template <class Element>
__global__ void __launch_bounds__(w::kThreads, 2)
    covariance_sm90(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments args) {
  extern __shared__ unsigned char unaligned[];
  __shared__ ColumnSums sums;
  const uint32_t start = arch::cast_smem_ptr_to_uint(unaligned);
  const uint32_t padding = static_cast<uint32_t>(round_up(start, arch::kSwizzleAlignment)) - start;
  const Pipeline pipeline{start + padding + kStages * kStageBytes, start + padding};

  Cta cta{tile_at(blockIdx.x), tokens_of_split(blockIdx.y, args.tokens_per_split, args.tokens), 0};
  cta.steps = static_cast<int>(ceil_div(cta.tokens.end - cta.tokens.begin, w::kTokens));
  if (threadIdx.x == 0) {
    arch::prefetch_tensormap(&map);
    pipeline.init(kConsumers / 32);
    arch::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers) {
    consume<Element>(args, cta, pipeline, unaligned + padding, sums, threadIdx.x);
  } else {
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
  const auto kernel = covariance_sm90<Element>;
  opt_in_shared_memory(kernel, plan.shared_bytes, launch);
  const CUtensorMap map = arch::encode_tensor_map_2d<Element>(args.x, args.tokens, args.features, args.x_row_stride,
                                                              w::kTokens, w::kTmaFeatures, launch);
  const dim3 grid(static_cast<unsigned>(args.tiles), static_cast<unsigned>(args.splits),
                  static_cast<unsigned>(args.groups));
  launch_kernel(kernel, {grid, w::kThreads, plan.shared_bytes}, launch, map, args);
  if (args.splits > 1) launch_add_partials(args, kTile, launch);
}

}  // namespace

void launch_sm90(const CovariancePlan& plan, const Arguments& args, Dtype dtype, const Launch& launch) {
  dispatch_16_bit(dtype, [&](auto element) { launch_element<decltype(element)>(plan, args, launch); });
}

#endif  // LRO_LAUNCHERS

}  // namespace lowrank_ops::covariance
