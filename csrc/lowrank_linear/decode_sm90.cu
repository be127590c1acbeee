// activation((x down^T) up^T + bias) for few tokens in one launch whose blocks all run at once.
//
// Each block first has the copy engine bring its slab of up to shared memory, and meanwhile multiplies down: the blocks
// of a cluster share the features of 16 rows, and add up each other's sums, in order, through distributed shared memory.
// t, rounded, goes to scratch; behind the grid's barrier every block reads all of it and multiplies its slab. The grid's
// barrier is the one that the driver keeps for cooperative launches: it needs no memory of ours and leaves itself ready.

#include <cooperative_groups.h>

#include <map>
#include <mutex>
#include <tuple>

#include "../mma_sm90.cuh"
#include "decode.cuh"
#include "epilogue.cuh"
#include "lowrank_linear.h"
#include "slabs.h"

namespace lowrank_ops::lowrank_linear {
namespace {

namespace cg = cooperative_groups;

// The tiles of up that one block multiplies.
struct Slab {
  Span tiles;
  int64_t resident;  // the first ones, which lie in shared memory
};

// All threads. The barrier at the start of shared memory completes once, when the resident rows are there.
template <class Element>
__device__ __forceinline__ void fetch(const Slab& slab, const Arguments& args, unsigned char* shared,
                                      int64_t slab_offset) {
  const uint32_t barrier = sm90::shared_address(shared);
  const int64_t first = slab.tiles.begin * kRows;
  const int rows = static_cast<int>(least(slab.resident * kRows, args.out_features - first));
  const int bytes = static_cast<int>(args.rank * 2);
  if (threadIdx.x == 0) {
    sm90::init_barrier(barrier, 1);
    sm90::fence_barrier_init();
    sm90::arrive_expecting(barrier, rows * bytes);
  }
  __syncthreads();
  if (threadIdx.x % 32 != 0) return;  // the copy engine takes one thread of a warp at a time
  for (int row = threadIdx.x / 32; row < rows; row += kWarps)
    sm90::copy_bytes(barrier + static_cast<uint32_t>(slab_offset + row * rank_pitch(args.rank)),
                     static_cast<const Element*>(args.up) + (first + row) * args.up_stride, bytes, barrier);
}

// t = x down^T, rounded, to scratch: units of work in turn, a cluster each.
template <class Element, int kGroups>
__device__ __forceinline__ void multiply_down(const Arguments& args, unsigned char* shared, const Layout& at) {
  constexpr int kTokens = kGroups * 8;
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank()), blocks = static_cast<int>(cluster.num_blocks());
  const int64_t clusters = gridDim.x / blocks;
  const Span features = features_of_block(rank, args.split_features, args.in_features);
  const Span mine = sums_of_block(rank, blocks, kTokens);
  float* sums = reinterpret_cast<float*>(shared + at.sums);
  float* block_sums = reinterpret_cast<float*>(shared + at.block_sums);
  Element* t = reinterpret_cast<Element*>(args.scratch);

  int round = 0;
  for (int64_t i = blockIdx.x / blocks; i < units(args.rank, args.tokens, kTokens); i += clusters, ++round) {
    const Unit unit = unit_at(i, args.rank, kTokens);
    float acc[1][kGroups][4] = {};
    multiply_range<Element, kGroups, true>(acc, static_cast<const Element*>(args.down), args.down_stride,
                                           unit.first_row, args.rank, static_cast<const Element*>(args.x),
                                           args.x_stride, unit.first_token, args.tokens, features.begin,
                                           features.end);
    leave_sums(acc, sums);
    for (int j = threadIdx.x; j < kRows * kTokens; j += kThreads)
      block_sums[block_sum_index(round, j, kTokens)] = sum_of_warps<1, kGroups>(sums, j % kRows, j / kRows);
    // All blocks of the cluster have left their sums, and have read those of the round before the last, whose place
    // the next round takes. Also the block's own barrier: `sums` may be written again.
    cluster.sync();
    for (int j = static_cast<int>(mine.begin) + threadIdx.x; j < mine.end; j += kThreads) {
      const int64_t r = unit.first_row + j % kRows, token = unit.first_token + j / kRows;
      float sum = 0.0f;
      for (int block = 0; block < blocks; ++block)
        sum += cluster.map_shared_rank(block_sums, block)[block_sum_index(round, j, kTokens)];
      if (r < args.rank && token < args.tokens) t[token * args.rank + r] = round_to(sum, Element{});
    }
  }
}

// A tile's t, zeros past the last token. Past the last rank nothing is written and nothing read.
template <int kTokens>
__device__ __forceinline__ void gather_t(const Arguments& args, int64_t first_token, unsigned char* t) {
  const int vectors = static_cast<int>(args.rank / kVector);
  for (int row = threadIdx.x / 32; row < kTokens; row += kWarps) {
    const int64_t token = first_token + row;
    // Not through the first-level cache, which other blocks' writes do not reach.
    const uint4* from = reinterpret_cast<const uint4*>(args.scratch) + token * vectors;
    uint4* to = reinterpret_cast<uint4*>(t + row * rank_pitch(args.rank));
    for (int v = threadIdx.x % 32; v < vectors; v += 32)
      to[v] = token < args.tokens ? __ldcg(from + v) : uint4{0, 0, 0, 0};
  }
}

__device__ __forceinline__ Vector load_shared(const unsigned char* row, int64_t feature, bool exists) {
  if (!exists) return {{0, 0, 0, 0}};
  const uint4 bits = *reinterpret_cast<const uint4*>(row + feature * 2);
  return {{bits.x, bits.y, bits.z, bits.w}};
}

// A warp's products of 16 resident rows of up with t.
template <class Element, int kGroups>
__device__ __forceinline__ void multiply_resident(float (&acc)[1][kGroups][4], const unsigned char* rows_at,
                                                  int64_t rows, const unsigned char* t, int64_t rank) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = static_cast<int>(ceil_div(rank, kFeatures));
  const int64_t pitch = rank_pitch(rank);
#pragma unroll 2
  for (int i = 0; step_of_warp(warp, i) < steps; ++i) {
    const int64_t feature = int64_t{step_of_warp(warp, i)} * kFeatures + lane_feature(lane);
    Weights<1> weights;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row(lane) + half * 8;
      weights.rows[0][half] = load_shared(rows_at + row * pitch, feature, row < rows && feature < rank);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      multiply<Element>(acc, weights,
                        load_shared(t + (group * 8 + lane_token(lane)) * pitch, feature, feature < rank), group);
  }
}

// The same with rows that are still in global memory.
template <class Element, int kGroups>
__device__ __forceinline__ void multiply_streamed(float (&acc)[1][kGroups][4], const Arguments& args,
                                                  int64_t first_row, const unsigned char* t) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = static_cast<int>(ceil_div(args.rank, kFeatures));
  for (int i = 0; step_of_warp(warp, i) < steps; i += kAhead) {
    Weights<1> weights[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      load_weights<Element, true>(weights[j], static_cast<const Element*>(args.up), args.up_stride, first_row,
                                  args.out_features,
                                  int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane), args.rank);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t feature = int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane);
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        multiply<Element>(
            acc, weights[j],
            load_shared(t + (group * 8 + lane_token(lane)) * rank_pitch(args.rank), feature, feature < args.rank),
            group);
    }
  }
}

template <class Element, int kGroups>
__device__ __forceinline__ void multiply_up(const Slab& slab, const Arguments& args, unsigned char* shared,
                                            const Layout& at) {
  constexpr int kTokens = kGroups * 8;
  float* sums = reinterpret_cast<float*>(shared + at.sums);
  sm90::wait(sm90::shared_address(shared), 0);
  for (int64_t first_token = 0; first_token < args.tokens; first_token += kTokens) {
    gather_t<kTokens>(args, first_token, shared + at.t);
    __syncthreads();
    for (int64_t tile = slab.tiles.begin; tile < slab.tiles.end; ++tile) {
      const int64_t place = tile - slab.tiles.begin, first_row = tile * kRows;
      float acc[1][kGroups][4] = {};
      if (place < slab.resident)
        multiply_resident<Element, kGroups>(acc, shared + at.slab + place * kRows * rank_pitch(args.rank),
                                            args.out_features - first_row, shared + at.t, args.rank);
      else
        multiply_streamed<Element, kGroups>(acc, args, first_row, shared + at.t);
      leave_sums(acc, sums);
      for (int i = threadIdx.x; i < kRows * kTokens; i += kThreads) {
        const int64_t n = first_row + i % kRows, token = first_token + i / kRows;
        if (n >= args.out_features || token >= args.tokens) continue;
        float y = sum_of_warps<1, kGroups>(sums, i % kRows, i / kRows);
        if (args.bias) y += static_cast<float>(static_cast<const Element*>(args.bias)[n]);
        static_cast<Element*>(args.y)[token * args.out_features + n] =
            round_to(activate(y, args.activation), Element{});
      }
      __syncthreads();  // the sums have been read, and after the last tile t
    }
  }
}

template <class Element, int kGroups>
__global__ void __launch_bounds__(kThreads, 1) decode_sm90(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Layout at = layout(kGroups * 8, args.rank, args.resident_tiles);
  Slab slab{slab_of_block(blockIdx.x, gridDim.x, args.out_features), 0};
  slab.resident = least(args.resident_tiles, slab.tiles.end - slab.tiles.begin);
  fetch<Element>(slab, args, shared, at.slab);
  __syncwarp();
  multiply_down<Element, kGroups>(args, shared, at);
  // t is written, and nobody reads another block's shared memory any more.
  cg::this_grid().sync();
  multiply_up<Element, kGroups>(slab, args, shared, at);
}

// How many clusters of a kernel the device runs at once: asked once, it does not change. The runtime wants to be told
// the cluster's size even where it is 1.
int clusters_at_once(const void* kernel, const Grid& grid, const Launch& launch) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int64_t>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), launch);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({device, kernel, grid.cluster, grid.shared_bytes}, 0);
  if (is_new) {
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&entry->second, kernel, LaunchConfig(grid, launch).get());
    if (error != cudaSuccess) known.erase(entry);
    check(error, launch);
  }
  return entry->second;
}

template <class Element, int kGroups>
void launch_groups(const LowRankPlan& plan, const Arguments& args, const Launch& launch) {
  const auto kernel = decode_sm90<Element, kGroups>;
  allow_all_shared_memory(reinterpret_cast<const void*>(kernel), launch);
  Grid grid{dim3(static_cast<unsigned>(plan.blocks)), kThreads, plan.shared_bytes, plan.cluster};
  // Any number of clusters does the work. A device may hold fewer than the planner counted, where its processors
  // come in groups that a cluster does not fill.
  const int64_t at_once = clusters_at_once(reinterpret_cast<const void*>(kernel), grid, launch);
  check(at_once > 0 ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge, launch);
  grid.blocks = dim3(static_cast<unsigned>(least(plan.blocks, at_once * plan.cluster)));
  grid.all_at_once = true;
  launch_kernel(kernel, grid, launch, args);
}

template <class Element>
void launch_element(const LowRankPlan& plan, const Arguments& args, const Launch& launch) {
  switch (plan.token_tile) {
    case 8: return launch_groups<Element, 1>(plan, args, launch);
    case 16: return launch_groups<Element, 2>(plan, args, launch);
    case 32: return launch_groups<Element, 4>(plan, args, launch);
    default: return launch_groups<Element, 8>(plan, args, launch);
  }
}

}  // namespace

void launch_decode_sm90(const LowRankPlan& plan, const Arguments& args, Dtype dtype, const Launch& launch) {
  if (dtype == Dtype::bfloat16) return launch_element<__nv_bfloat16>(plan, args, launch);
  launch_element<__half>(plan, args, launch);
}

}  // namespace lowrank_ops::lowrank_linear
