// activation((x down^T) up^T + bias) for many tokens and ranks up to 256, back to back: t = x down^T never leaves the
// chip. One warp has the tensor copy engine bring 64 features of x and down at a time, then 64 rows of up at a time;
// two or three warpgroups multiply 64 tokens each: rows of up are read once for all of them, and three may fit the
// tokens to the machine in fewer waves. A thread's sums of t, rounded, are its part of the next product's left operand,
// so t stays in registers. Where there are few tiles of tokens, a cluster shares one: each block brings some of x to all,
// sums some of t's columns, hands them to the others through distributed shared memory, and multiplies some of the rows
// of up. Where there are many, two blocks with a tile each bring each other the weights.

#include <utility>

#include "../pipeline_sm90.cuh"
#include "../products_sm90.cuh"
#include "../tensor_map.h"
#include "back_to_back.h"
#include "epilogue.cuh"
#include "lowrank_linear.h"

namespace lowrank_ops::lowrank_linear {
namespace {

namespace p = prefill;

struct Maps {
  CUtensorMap x, down, up;
};

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class Element, int kRanks, int kCluster, int kPeers, int kGroups>
struct Block {
  static constexpr p::Variant kVariant{kRanks, kCluster, kGroups, kPeers};
  static constexpr int kBlocks = kCluster * kPeers;
  static constexpr int kColumns = kVariant.columns();
  static constexpr int kSteps = kVariant.steps();
  static constexpr int kStages = p::stages(kVariant);
  static_assert(p::exists(kVariant) && kStages >= 2);
  using Stages = sm90::Pipeline<kStages, p::stage_bytes(kVariant)>;

  const Arguments& args;
  Stages pipeline;
  int place;        // in the cluster
  int rank;         // among the blocks that share tokens
  int64_t first_token;
  int down_steps;
  int tiles;        // of up

  // One thread.
  __device__ void produce(const Maps& maps) const {
    int step = 0;
    for (; step < down_steps; ++step) {
      sm90::wait(pipeline.empty(step), Stages::parity(step) ^ 1);  // the first round finds its stages empty
      sm90::arrive_expecting(pipeline.full(step), p::down_step_bytes(kVariant));
      bring<kCluster>(pipeline.stage(step), &maps.x, step * p::kBox, static_cast<int>(first_token), p::x_box_rows(kVariant),
                      pipeline.full(step));
      bring<kPeers>(pipeline.stage(step) + p::x_bytes(kGroups), &maps.down, step * p::kBox, rank * kColumns,
                    p::down_box_rows(kVariant), pipeline.full(step));
    }
    for (int n = 0; n < tiles; ++n, ++step) {
      sm90::wait(pipeline.empty(step), Stages::parity(step) ^ 1);
      sm90::arrive_expecting(pipeline.full(step), p::up_step_bytes(kRanks));
      const int row = static_cast<int>(p::up_tile(rank, n, kCluster)) * p::kOutputs;
      for (int box = 0; box < p::up_boxes(kRanks); ++box)
        bring<kPeers>(pipeline.stage(step) + box * p::kUpBoxBytes, &maps.up, box * p::kBox, row, p::up_box_rows(kVariant),
                      pipeline.full(step));
    }
    // A block that has ended must not be told anything: it waits until its peer, too, has read all that it brought.
    for (const int end = step + kStages; kPeers > 1 && step < end; ++step) sm90::wait(pipeline.empty(step), Stages::parity(step) ^ 1);
  }

  // A box; where blocks of the cluster have it in common, this block's rows of it, to all of them.
  template <int kSharers>
  __device__ __forceinline__ void bring(uint32_t to, const CUtensorMap* map, int x, int y, int rows,
                                        uint32_t barrier) const {
    if constexpr (kSharers == 1)
      sm90::copy_box(to, map, x, y, barrier);
    else
      sm90::copy_box_to_blocks(to + place * rows * p::kRowBytes, map, x, y + place * rows, barrier, (1 << kSharers) - 1);
  }

  // A warp has read a stage. Its lanes tell each block that may write to it: all of them, until only weights are left,
  // which blocks that share tokens do not have in common.
  __device__ __forceinline__ void give_back(int step, int consumer, bool x_is_left) const {
    if (consumer % 32 >= kBlocks) return;
    if (kBlocks > 1 && (x_is_left || kPeers > 1))
      sm90::arrive_in_block(sm90::address_in_block(pipeline.empty(step), consumer % 32));
    else
      sm90::arrive(pipeline.empty(step));
  }

  // The consumers' part.
  __device__ __forceinline__ void consume(int consumer) const {
    uint32_t t[kSteps][4];
    {
      float acc[kColumns / 2];
      multiply_down(acc, consumer);
      uint32_t mine[kColumns / p::kStep][4];
#pragma unroll
      for (int step = 0; step < kColumns / p::kStep; ++step)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int i = p::accumulator_of_word(step, w);
          mine[step][w] = pack(acc[i], acc[i + 1], Element{});
        }
      exchange(t, mine, consumer);
    }
    for (int n = 0; n < tiles; ++n) {
      const int step = down_steps + n;
      const int64_t first = p::up_tile(rank, n, kCluster) * p::kOutputs;
      float acc[p::kOutputs / 2];
      // On the way while the products are made. Three warpgroups lack the registers, and hide each other's waiting.
      Element bias[p::kOutputs / 4];
      if constexpr (kGroups == 2) fetch_bias(bias, consumer, first);
      sm90::wait(pipeline.full(step), Stages::parity(step));
      sm90::fence_products();
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        sm90::RegisterProduct<Element>::add(acc, t[k], p::descriptor(pipeline.stage(step) + p::up_start(k)), k > 0);
      sm90::commit_products();
      sm90::wait_products<0>();
      give_back(step, consumer, false);
      if (args.bias) {
#pragma unroll
        for (int i = 0; i < p::kOutputs / 2; ++i)
          acc[i] += kGroups == 2 ? static_cast<float>(bias[p::bias_of_accumulator(i)])
                                 : static_cast<float>(bias_at(consumer, i, first));
      }
      store(acc, consumer, first);
    }
  }

  __device__ __forceinline__ void multiply_down(float (&acc)[kColumns / 2], int consumer) const {
    for (int step = 0; step < down_steps; ++step) {
      sm90::wait(pipeline.full(step), Stages::parity(step));
      sm90::fence_products();
#pragma unroll
      for (int k = 0; k < p::kBox / p::kStep; ++k)
        sm90::Product<Element, kColumns>::add(acc, p::descriptor(pipeline.stage(step) + p::x_start(consumer / 128, k)),
                                              p::descriptor(pipeline.stage(step) + p::down_start(k, kGroups)), step > 0 || k > 0);
      sm90::commit_products();
      sm90::wait_products<1>();  // this step's may run on, the one before has been read
      if (step > 0) give_back(step - 1, consumer, true);
    }
    sm90::wait_products<0>();
    give_back(down_steps - 1, consumer, true);
  }

  // All of t from what each block of the cluster has of it.
  __device__ __forceinline__ void exchange(uint32_t (&t)[kSteps][4], const uint32_t (&mine)[kColumns / p::kStep][4],
                                           int consumer) const {
    if constexpr (kCluster == 1) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int w = 0; w < 4; ++w) t[step][w] = mine[step][w];
    } else {
      const uint32_t start = pipeline.stages + p::exchange_offset(kVariant);
      for (int block = 0; block < kCluster; ++block) {
        const uint32_t there = sm90::address_in_block(start, block);
#pragma unroll
        for (int step = 0; step < kColumns / p::kStep; ++step)
          if (const int at = p::first_step(rank, kColumns) + step; at < kSteps)
            sm90::store_in_block(there + p::exchange_index(consumer, at, kRanks), mine[step]);
      }
      sm90::arrive_cluster();
      sm90::wait_cluster();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) sm90::load_shared(t[step], start + p::exchange_index(consumer, step, kRanks));
    }
  }

  // What is added to an accumulator of the 64 columns from `first` on.
  __device__ __forceinline__ Element bias_at(int consumer, int i, int64_t first) const {
    const int lane_first = p::accumulator_column(consumer, 0), column = p::accumulator_column(0, i);
    const int left = static_cast<int>(args.out_features - first) - lane_first;  // at most 2^30 features
    return column < left ? static_cast<const Element*>(args.bias)[first + lane_first + column] : Element(0.0f);
  }

  // The same of all: the accumulators of a thread's two tokens share it.
  __device__ __forceinline__ void fetch_bias(Element (&bias)[p::kOutputs / 4], int consumer, int64_t first) const {
    if (!args.bias) return;
#pragma unroll
    for (int i = 0; i < p::kOutputs / 2; ++i)
      if (i / 2 % 2 == 0) bias[p::bias_of_accumulator(i)] = bias_at(consumer, i, first);
  }

  // 64 columns of y from `first` on.
  __device__ __forceinline__ void store(float (&acc)[p::kOutputs / 2], int consumer, int64_t first) const {
    activate_all(acc, args.activation);
    if (args.out_features % 8 == 0)
      store_vectors(acc, consumer, first);
    else
      store_elements(acc, consumer, first);
  }

  __device__ __forceinline__ void store_elements(const float (&acc)[p::kOutputs / 2], int consumer,
                                                 int64_t first) const {
#pragma unroll
    for (int i = 0; i < p::kOutputs / 2; ++i) {
      const int64_t token = first_token + p::accumulator_token(consumer, i);
      const int64_t n = first + p::accumulator_column(consumer, i);
      if (token < args.tokens && n < args.out_features)
        static_cast<Element*>(args.y)[token * args.out_features + n] = round_to(acc[i], Element{});
    }
  }

  // Rows of y start on 16 bytes: each lane stores 8 columns of a token at a time.
  __device__ __forceinline__ void store_vectors(const float (&acc)[p::kOutputs / 2], int consumer,
                                                int64_t first) const {
    const int quad_lane = consumer % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = first_token + p::accumulator_token(consumer, half * 2);
#pragma unroll
      for (int columns = 0; columns < p::kOutputs; columns += 32) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int i = (columns / 8 + w) * 4 + half * 2;
          words[w] = pack(acc[i], acc[i + 1], Element{});
        }
#pragma unroll
        for (int round = 0; round < 2; ++round)
#pragma unroll
          for (int exchange = 0; exchange < 2; ++exchange) {
            uint32_t &lower = words[p::lower_word(round, exchange)], &upper = words[p::upper_word(round, exchange)];
            const bool gives_lower = p::gives_lower(quad_lane, round);
            const uint32_t got = __shfl_xor_sync(0xFFFFFFFF, gives_lower ? lower : upper, 1 << round);
            lower = gives_lower ? got : lower;
            upper = gives_lower ? upper : got;
          }
        const int64_t n = first + columns + quad_lane * 8;
        if (token < args.tokens && n < args.out_features)
          *reinterpret_cast<uint4*>(static_cast<Element*>(args.y) + token * args.out_features + n) =
              uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
};

template <class Element, int kRanks, int kCluster, int kPeers, int kGroups>
__global__ void __launch_bounds__(p::Variant{kRanks, kCluster, kGroups, kPeers}.threads(), 1)
    prefill_sm90(const __grid_constant__ Maps maps, const __grid_constant__ Arguments args) {
  extern __shared__ unsigned char unaligned[];
  using ThisBlock = Block<Element, kRanks, kCluster, kPeers, kGroups>;
  constexpr int kConsumers = ThisBlock::kVariant.consumers();
  constexpr int kBlocks = ThisBlock::kBlocks;
  const int place = kBlocks == 1 ? 0 : sm90::rank_in_cluster(), rank = kCluster == 1 ? 0 : place;
  const uint32_t first_stage = static_cast<uint32_t>(round_up(sm90::shared_address(unaligned), p::kAlignment));
  const ThisBlock block{args,
                        {first_stage + p::barrier_offset(ThisBlock::kVariant), first_stage},
                        place,
                        rank,
                        static_cast<int64_t>(blockIdx.x / kCluster) * ThisBlock::kVariant.tokens(),
                        static_cast<int>(ceil_div(args.in_features, p::kBox)),
                        p::up_tiles(rank, kCluster, args.out_features)};
  if (threadIdx.x == 0) {
    sm90::prefetch(&maps.x);
    sm90::prefetch(&maps.down);
    sm90::prefetch(&maps.up);
    block.pipeline.init(kBlocks * kConsumers / 32);
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if constexpr (kBlocks > 1) {  // nobody may write to a block that has not started
    sm90::arrive_cluster();
    sm90::wait_cluster();
  }
  if (threadIdx.x < kConsumers) {
    if constexpr (kGroups == 3) sm90::take_registers<p::kRegisters>();
    block.consume(threadIdx.x);
  } else {
    if constexpr (kGroups == 3) sm90::leave_registers<p::kProducerRegisters>();
    // The exchange's barrier counts all threads. It also keeps a block from ending while others write to it.
    if constexpr (kCluster > 1) sm90::arrive_cluster();
    if (threadIdx.x == kConsumers) block.produce(maps);
    __syncwarp();
    if constexpr (kCluster > 1) sm90::wait_cluster();
  }
}

template <class Element, int kRanks, int kCluster, int kPeers, int kGroups>
void launch_one(const LowRankPlan& plan, const Arguments& args, CUtensorMapDataType type, const Launch& launch) {
  constexpr p::Variant kVariant{kRanks, kCluster, kGroups, kPeers};
  const auto kernel = prefill_sm90<Element, kRanks, kCluster, kPeers, kGroups>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared_bytes)),
        launch);
  const Maps maps{
      sm90::matrix_map(type, args.x, args.tokens, args.in_features, args.x_stride, p::x_box_rows(kVariant), p::kBox,
                       launch),
      sm90::matrix_map(type, args.down, args.rank, args.in_features, args.down_stride, p::down_box_rows(kVariant),
                       p::kBox, launch),
      sm90::matrix_map(type, args.up, args.out_features, args.rank, args.up_stride, p::up_box_rows(kVariant), p::kBox,
                       launch)};
  launch_kernel(kernel,
                {dim3(static_cast<unsigned>(plan.blocks)), kVariant.threads(), plan.shared_bytes, kCluster * kPeers},
                launch, maps, args);
}

// False where there is no such kernel, or the plan is for another one.
template <class Element, int kRanks, int kCluster, int kPeers, int kGroups>
bool launch_if_planned(const LowRankPlan& plan, const Arguments& args, CUtensorMapDataType type, const Launch& launch) {
  constexpr p::Variant kVariant{kRanks, kCluster, kGroups, kPeers};
  if constexpr (p::exists(kVariant)) {
    if (plan.rank_tile != kRanks || plan.cluster != kCluster || plan.token_tile != kVariant.tokens() * kPeers) return false;
    launch_one<Element, kRanks, kCluster, kPeers, kGroups>(plan, args, type, launch);
    return true;
  }
  return false;
}

// Every number is a rank, a cluster, and two warpgroups, three, or two with a peer.
template <class Element, int... kNumbers>
void launch_element(const LowRankPlan& plan, const Arguments& args, CUtensorMapDataType type, const Launch& launch,
                    std::integer_sequence<int, kNumbers...>) {
  const bool launched =
      (launch_if_planned<Element, p::kLeastRanks + kNumbers / 12 * p::kStep, 1 << kNumbers / 3 % 4,
                         kNumbers % 3 == 2 ? p::kMostPeers : 1, kNumbers % 3 == 1 ? 3 : 2>(plan, args, type, launch) ||
       ...);
  check(launched ? cudaSuccess : cudaErrorInvalidValue, launch);
}

}  // namespace

void launch_prefill_sm90(const LowRankPlan& plan, const Arguments& args, Dtype dtype, const Launch& launch) {
  constexpr auto kAll = std::make_integer_sequence<int, 12 * ((p::kMostRank - p::kLeastRanks) / p::kStep + 1)>{};
  if (dtype == Dtype::bfloat16)
    return launch_element<__nv_bfloat16>(plan, args, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, launch, kAll);
  launch_element<__half>(plan, args, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, launch, kAll);
}

}  // namespace lowrank_ops::lowrank_linear
