// x^T x by wgmma as in covariance_sm90.cu, in squares of 256 x 256: wide_tiles.h says who does what.
//
// Two blocks on two multiprocessors bring the columns of their square to each other, so that a stage is given back when
// both have multiplied it. The accumulators are added to the state where it lies, in memory, and nobody waits for it.

#include "../pipeline_sm90.cuh"
#include "../products_sm90.cuh"
#include "../tensor_map.h"
#include "column_sums.cuh"
#include "covariance.h"
#include "state.cuh"
#include "wide_tiles.h"

namespace lowrank_ops::covariance {
namespace {

using wide::kAccumulators, wide::kBlocks, wide::kConsumers, wide::kSquare, wide::kStages;
using Stages = sm90::Pipeline<kStages, wide::kStageBytes>;

struct Block {
  Tile square;
  wide::Share share;
  Range tokens;
  int rank;  // in the cluster
  int steps;
  __device__ bool diagonal() const { return square.row == square.col; }
  __device__ int64_t first_row() const { return int64_t{square.row} * kSquare + rank * wide::kRows; }
};

__device__ void produce(const CUtensorMap* map, const Block& block, const Stages& pipeline) {
  constexpr uint16_t kBoth = (1 << kBlocks) - 1;
  int step = 0;
  for (; step < block.steps; ++step) {
    sm90::wait(pipeline.empty(step), Stages::parity(step) ^ 1);  // the first round finds its stages empty
    sm90::arrive_expecting(pipeline.full(step), block.diagonal() ? wide::kColumnBytes : wide::kStageBytes);
    const int token = static_cast<int>(block.tokens.begin) + step * wide::kTokens;
    for (int i = 0; i < wide::kColumnBoxes / kBlocks; ++i) {
      const int box = block.rank * (wide::kColumnBoxes / kBlocks) + i;
      sm90::copy_box_to_blocks(pipeline.stage(step) + box * wide::kBoxBytes, map,
                               block.square.col * kSquare + box * wide::kBoxFeatures, token, pipeline.full(step), kBoth);
    }
    for (int box = 0; !block.diagonal() && box < wide::kRowBoxes; ++box)
      sm90::copy_box(pipeline.stage(step) + wide::kColumnBytes + box * wide::kBoxBytes, map,
                     static_cast<int>(block.first_row()) + box * wide::kBoxFeatures, token, pipeline.full(step));
  }
  // A block that has ended must not be told anything: it waits until the other one, too, has read all that it brought.
  for (const int end = step + kStages; step < end; ++step)
    sm90::wait(pipeline.empty(step), Stages::parity(step) ^ 1);
}

// A warp has read a stage: one lane tells each block, which writes to it.
__device__ __forceinline__ void give_back(uint32_t empty, int consumer) {
  if (consumer % 32 < kBlocks) sm90::arrive_in_block(sm90::address_in_block(empty, consumer % 32));
}

// Two neighbours of the state, where they are part of it.
__device__ __forceinline__ void add_pair(const Arguments& args, int64_t row, int64_t col, float first, float second) {
  if (row >= args.features || col > row) return;
  const int64_t at = row * args.state_row_stride + col * args.state_col_stride;
  const auto add = [&](auto* state) {
    sm90::add_in_memory(state + at, first);
    if (col + 1 <= row) sm90::add_in_memory(state + at + args.state_col_stride, second);
  };
  if (args.state_is_double)
    add(static_cast<double*>(args.second_moment));
  else
    add(static_cast<float*>(args.second_moment));
}

// All accumulators, to the state.
__device__ __forceinline__ void add_to_state(const float (&acc)[kAccumulators], const Arguments& args,
                                             const Block& block, int consumer) {
  const int64_t row = block.first_row() + wgmma::accumulator_row(consumer, 0);
  const int64_t col = int64_t{block.square.col} * kSquare + wgmma::accumulator_col(consumer, 0);
  const bool inside = !block.diagonal() && block.first_row() + wide::kRows <= args.features;
  const bool in_pairs = !args.state_is_double && args.state_col_stride == 1 && args.state_row_stride % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(args.second_moment) % 8 == 0;
  if (inside && in_pairs) {  // nothing to ask of any of them
    float* at = static_cast<float*>(args.second_moment) + row * args.state_row_stride + col;
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 2)
      sm90::add_pair_in_memory(at + wgmma::accumulator_row(0, i) * args.state_row_stride + wgmma::accumulator_col(0, i),
                               acc[i], acc[i + 1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kAccumulators; i += 2)
    add_pair(args, row + wgmma::accumulator_row(0, i), col + wgmma::accumulator_col(0, i), acc[i], acc[i + 1]);
}

// To the cluster's own place in scratch.
__device__ __forceinline__ void add_to_partial(const float (&acc)[kAccumulators], const Arguments& args,
                                               const Block& block, int consumer, bool first) {
  float* partial = args.scratch + partial_offset(0, block.share.split, block.share.shared, args.splits,
                                                 args.tiles - args.whole, kSquare);
  float* at = partial + (block.rank * wide::kRows + wgmma::accumulator_row(consumer, 0)) * kSquare +
              wgmma::accumulator_col(consumer, 0);
#pragma unroll
  for (int i = 0; i < kAccumulators; i += 2) {
    float* to = at + wgmma::accumulator_row(0, i) * kSquare + wgmma::accumulator_col(0, i);
    if (first)
      *reinterpret_cast<float2*>(to) = float2{acc[i], acc[i + 1]};
    else
      sm90::add_pair_in_memory(to, acc[i], acc[i + 1]);
  }
}

template <class Element>
__device__ __forceinline__ void consume(const Arguments& args, const Block& block, const Stages& pipeline,
                                        const unsigned char* stages, Sums& sums, int consumer) {
  float acc[kAccumulators];
  for (int chunk = 0; chunk < block.steps; chunk += wide::kChunkSteps) {
    const int end = min(chunk + wide::kChunkSteps, block.steps);
    float sum[2] = {0.0f, 0.0f};
    for (int step = chunk; step < end; ++step) {
      sm90::wait(pipeline.full(step), Stages::parity(step));
      const uint32_t stage = pipeline.stage(step);
      sm90::fence_products();
#pragma unroll
      for (int k = 0; k < wide::kTokens / wide::kStep; ++k)
        sm90::TransposedProduct<Element, kSquare>::add(
            acc, wgmma::descriptor(stage + wide::a_start(block.diagonal(), block.rank, consumer / 128, k)),
            wgmma::descriptor(stage + wgmma::b_start(k)), step > chunk || k > 0);
      sm90::commit_products();
      if (block.diagonal()) {
        add_columns<Element>(sum, stages + step % kStages * wide::kStageBytes, wide::row_offset(block.rank, 0, 0),
                             consumer);
        sm90::fence_before_copies();
        __syncwarp();
      }
      sm90::wait_products<1>();  // this step's may run on, the one before has been read
      if (step > chunk) give_back(pipeline.empty(step - 1), consumer);
    }
    sm90::wait_products<0>();
    give_back(pipeline.empty(end - 1), consumer);
    if (block.share.shared < 0)
      add_to_state(acc, args, block, consumer);
    else
      add_to_partial(acc, args, block, consumer, chunk == 0);
    for (int i = 0; i < 2; ++i)
      sums.values[consumer][i] = chunk == 0 ? sum[i] : sums.values[consumer][i] + sum[i];
  }
}

// All threads of the block.
__device__ void flush_sums(const Sums& sums, const Arguments& args, const Block& block) {
  __syncthreads();
  const int64_t feature = block.first_row() + threadIdx.x;
  if (threadIdx.x >= wide::kRows || feature >= args.features) return;
  const double sum = sums.of_column(threadIdx.x);
  if (block.share.shared < 0)
    add_to_total(args, 0, feature, sum);
  else
    args.scratch[partial_sum_offset(0, block.share.split, feature, 1, args.splits, args.tiles - args.whole,
                                    args.features, kSquare)] = static_cast<float>(sum);
}

template <class Element>
__global__ void __launch_bounds__(wide::kThreads, 1)
    covariance_sm90_wide(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments args) {
  extern __shared__ unsigned char unaligned[];
  __shared__ Sums sums;
  const uint32_t start = sm90::shared_address(unaligned);
  const uint32_t padding = static_cast<uint32_t>(round_up(start, wgmma::kAlignment)) - start;
  const Stages pipeline{start + padding + kStages * wide::kStageBytes, start + padding};

  Block block{};
  block.share = wide::share_of_cluster(blockIdx.x / kBlocks, args.whole, args.splits);
  block.square = tile_at(block.share.square);
  block.tokens = block.share.shared < 0 ? Range{0, args.tokens}
                                        : tokens_of_split(block.share.split, args.tokens_per_split, args.tokens);
  block.rank = sm90::rank_in_cluster();
  block.steps = static_cast<int>(ceil_div(block.tokens.end - block.tokens.begin, wide::kTokens));
  if (threadIdx.x == 0) {
    sm90::prefetch(&map);
    pipeline.init(kBlocks * kConsumers / 32);
    sm90::fence_barrier_init();
  }
  __syncthreads();
  // Nobody may write to a block that has not started.
  sm90::arrive_cluster();
  sm90::wait_cluster();
  if (threadIdx.x < kConsumers) {
    sm90::take_registers<wide::kRegisters>();
    consume<Element>(args, block, pipeline, unaligned + padding, sums, threadIdx.x);
  } else {
    sm90::leave_registers<wide::kProducerRegisters>();
    if (threadIdx.x == kConsumers) produce(&map, block, pipeline);
    __syncwarp();
  }
  if (block.diagonal()) flush_sums(sums, args, block);
}

template <class Element>
void launch_element(const CovariancePlan& plan, const Arguments& args, CUtensorMapDataType type,
                    const Launch& launch) {
  const auto kernel = covariance_sm90_wide<Element>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared_bytes)),
        launch);
  const CUtensorMap map = sm90::matrix_map(type, args.x, args.tokens, args.features, args.x_row_stride, wide::kTokens,
                                           wide::kBoxFeatures, launch);
  const int64_t blocks = kBlocks * wide::clusters(args.tiles, args.whole, args.splits);
  launch_kernel(kernel, {dim3(static_cast<unsigned>(blocks)), wide::kThreads, plan.shared_bytes, kBlocks}, launch, map,
                args);
  if (args.whole < args.tiles) launch_add_partials(args, kSquare, launch);
}

}  // namespace

void launch_sm90_wide(const CovariancePlan& plan, const Arguments& args, Dtype dtype, const Launch& launch) {
  if (dtype == Dtype::bfloat16)
    return launch_element<__nv_bfloat16>(plan, args, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, launch);
  launch_element<__half>(plan, args, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, launch);
}

}  // namespace lowrank_ops::covariance
