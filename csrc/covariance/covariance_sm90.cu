// x^T x by wgmma for 16-bit x whose rows start on 16 bytes: one 128 x 128 tile of the lower triangle per block.
//
// One warp has the tensor copy engine bring 64 tokens at a time; two warpgroups multiply 64 rows of the tile each. x
// is taken as it lies: the instruction transposes both operands. As in covariance_sm80.cu the accumulators are added to
// the state every 2048 tokens, and blocks that share a tile leave partial tiles for add_partials.cu.

#include "../pipeline_sm90.cuh"
#include "../products_sm90.cuh"
#include "../tensor_map.h"
#include "column_sums.cuh"
#include "covariance.h"
#include "state.cuh"

namespace lowrank_ops::covariance {
namespace {

namespace w = wgmma;
using w::a_start, w::b_start, w::descriptor;
using w::kAccumulators, w::kAlignment, w::kBoxBytes, w::kBoxes, w::kBoxFeatures, w::kConsumers, w::kOperandBytes;
using w::kStageBytes, w::kStages, w::kStep;

struct Block {
  Tile tile;
  Range tokens;
  int steps;
  __device__ bool diagonal() const { return tile.row == tile.col; }
};

using Stages = sm90::Pipeline<kStages, kStageBytes>;

__device__ void produce(const CUtensorMap* map, const Block& block, const Stages& pipeline) {
  const int operands = block.diagonal() ? 1 : 2;
  for (int step = 0; step < block.steps; ++step) {
    sm90::wait(pipeline.empty(step), Stages::parity(step) ^ 1);  // the first round finds its stages empty
    sm90::arrive_expecting(pipeline.full(step), operands * kOperandBytes);
    const int token = static_cast<int>(block.tokens.begin) + step * w::kTokens;
    for (int operand = 0; operand < operands; ++operand)
      for (int box = 0; box < kBoxes; ++box)
        sm90::copy_box(pipeline.stage(step) + operand * kOperandBytes + box * kBoxBytes, map,
                       (operand == 0 ? block.tile.row : block.tile.col) * kTile + box * kBoxFeatures, token,
                       pipeline.full(step));
  }
}

__device__ __forceinline__ void flush(const float (&acc)[kAccumulators], const Arguments& args, const Block& block,
                                      int consumer, bool first) {
  asm volatile("" : "+r"(consumer));  // or else the compiler keeps addresses in registers from one flush to the next
  const int row = w::accumulator_row(consumer, 0), col = w::accumulator_col(consumer, 0);
  const int64_t tile_row = int64_t{block.tile.row} * kTile, tile_col = int64_t{block.tile.col} * kTile;
  float* partial = args.scratch + partial_offset(blockIdx.z, blockIdx.y, blockIdx.x, args.splits, args.tiles);
  if (args.splits == 1)
    add_strip_to_state(args, blockIdx.z, tile_row + row, tile_col + col, acc);
  else
    add_strip_to_partial(partial, row, col, acc, first);
}

template <class Element>
__device__ void consume(const Arguments& args, const Block& block, const Stages& pipeline,
                        const unsigned char* stages, Sums& sums, int consumer) {
  float acc[kAccumulators];
  for (int chunk = 0; chunk < block.steps; chunk += w::kChunkSteps) {
    const int end = min(chunk + w::kChunkSteps, block.steps);
    float sum[2] = {0.0f, 0.0f};
    for (int step = chunk; step < end; ++step) {
      sm90::wait(pipeline.full(step), Stages::parity(step));
      const uint32_t rows = pipeline.stage(step);
      const uint32_t cols = block.diagonal() ? rows : rows + kOperandBytes;
      sm90::fence_products();
#pragma unroll
      for (int k = 0; k < w::kTokens / kStep; ++k)
        sm90::TransposedProduct<Element, kTile>::add(acc, descriptor(rows + a_start(consumer / 128, k)),
                                                     descriptor(cols + b_start(k)), step > chunk || k > 0);
      sm90::commit_products();
      if (block.diagonal()) {
        add_columns<Element>(sum, stages + step % kStages * kStageBytes, 0, consumer);
        sm90::fence_before_copies();
        __syncwarp();
      }
      sm90::wait_products<1>();  // this step's may run on, the one before has been read
      if (step > chunk && consumer % 32 == 0) sm90::arrive(pipeline.empty(step - 1));
    }
    sm90::wait_products<0>();
    if (consumer % 32 == 0) sm90::arrive(pipeline.empty(end - 1));
    flush(acc, args, block, consumer, chunk == 0);
    for (int i = 0; i < 2; ++i)
      sums.values[consumer][i] = chunk == 0 ? sum[i] : sums.values[consumer][i] + sum[i];
  }
}

// All threads of the block.
__device__ void flush_sums(const Sums& sums, const Arguments& args, const Block& block) {
  __syncthreads();
  const int64_t feature = int64_t{block.tile.row} * kTile + threadIdx.x;
  if (threadIdx.x >= kTile || feature >= args.features) return;
  const double sum = sums.of_column(threadIdx.x);
  if (args.splits == 1)
    add_to_total(args, blockIdx.z, feature, sum);
  else
    args.scratch[partial_sum_offset(blockIdx.z, blockIdx.y, feature, args.groups, args.splits, args.tiles,
                                    args.features)] = static_cast<float>(sum);
}

template <class Element>
__global__ void __launch_bounds__(w::kThreads, 2)
    covariance_sm90(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments args) {
  extern __shared__ unsigned char unaligned[];
  __shared__ Sums sums;
  const uint32_t start = sm90::shared_address(unaligned);
  const uint32_t padding = static_cast<uint32_t>(round_up(start, kAlignment)) - start;
  const Stages pipeline{start + padding + kStages * kStageBytes, start + padding};

  Block block{tile_at(blockIdx.x), tokens_of_split(blockIdx.y, args.tokens_per_split, args.tokens), 0};
  block.steps = static_cast<int>(ceil_div(block.tokens.end - block.tokens.begin, w::kTokens));
  if (threadIdx.x == 0) {
    sm90::prefetch(&map);
    pipeline.init(kConsumers / 32);
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers) {
    consume<Element>(args, block, pipeline, unaligned + padding, sums, threadIdx.x);
  } else {
    if (threadIdx.x == kConsumers) produce(&map, block, pipeline);
    __syncwarp();
  }
  if (block.diagonal()) flush_sums(sums, args, block);
}

CUtensorMap tensor_map(const Arguments& args, CUtensorMapDataType type, const Launch& launch) {
  return sm90::matrix_map(type, args.x, args.tokens, args.features, args.x_row_stride, w::kTokens, kBoxFeatures, launch);
}

template <class Element>
void launch_element(const CovariancePlan& plan, const Arguments& args, CUtensorMapDataType type,
                    const Launch& launch) {
  const auto kernel = covariance_sm90<Element>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared_bytes)),
        launch);
  const dim3 grid(static_cast<unsigned>(args.tiles), static_cast<unsigned>(args.splits),
                  static_cast<unsigned>(args.groups));
  launch_kernel(kernel, {grid, w::kThreads, plan.shared_bytes}, launch, tensor_map(args, type, launch), args);
  if (args.splits > 1) launch_add_partials(args, kTile, launch);
}

}  // namespace

void launch_sm90(const CovariancePlan& plan, const Arguments& args, Dtype dtype, const Launch& launch) {
  if (dtype == Dtype::bfloat16)
    return launch_element<__nv_bfloat16>(plan, args, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, launch);
  launch_element<__half>(plan, args, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, launch);
}

}  // namespace lowrank_ops::covariance
