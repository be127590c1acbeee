// y = activation((x down^T) up^T + bias) for few tokens in one cooperative launch (sm_90), of a layer or of each member
// of a group. Work units of down and tiles of up are counted through all members.
//
//   grid           one CTA per SM at most, all co-resident; clusters of 1, 2, 4 or 8
//   CTA            8 warps
//   slab           bulk copies (cp.async.bulk) fetch the CTA's rows of up to shared memory while down is computed;
//                  one mbarrier, one arrival with expect_tx; rows that do not fit are streamed from global memory
//   down           a cluster takes 16, 32 or 64 rows of down and a token tile at a time; its CTAs split the features and
//                  reduce each other's sums through DSMEM, in two alternating buffers; t, rounded, goes to scratch
//   grid barrier   of the cooperative launch: needs no memory, resets itself
//   up             every CTA reads t and multiplies its slab
//   shared memory  mbarrier | warp sums | CTA sums (2 buffers) or t | slab: SmemLayout
//   deterministic  yes: warps, then CTAs of a cluster, summed in order

#include "arguments.h"
#include "decode_layout.h"

#ifdef LRO_KERNELS
#include <cooperative_groups.h>

#include "../arch/mbarrier.cuh"
#include "../arch/smem.cuh"
#include "../arch/tma.cuh"
#include "decode.cuh"
#include "epilogue.cuh"
#endif

#ifdef LRO_LAUNCHERS
#include <array>
#include <iterator>

#include "lowrank_linear.h"
#endif

namespace lowrank_ops::lowrank_linear {

template <class Element, int kTokenGroups, int kRowTiles>
__global__ void decode_sm90(const __grid_constant__ Group group);

#ifdef LRO_KERNELS
namespace {

namespace cg = cooperative_groups;

// The 16-row tiles of up of one CTA.
struct Slab {
  Span tiles;
  int64_t resident;  // the first ones, in shared memory
};

// Calls body(member, its tiles in `span`, how many of `span` come before them) for each member that has any.
template <class Body>
__device__ __forceinline__ void each_member(const Group& group, const Span& span, const Body& body) {
  int64_t first = 0;
  for (int i = 0; i < group.count; ++i) {
    const int64_t tiles = ceil_div(group.members[i].out_features, kRows);
    const Span own = part_of_member(span, first, tiles);
    if (own.begin < own.end) body(group.members[i], own, first + own.begin - span.begin);
    first += tiles;
  }
}

// All threads. The mbarrier at the start of shared memory completes once, when the resident rows have arrived.
template <class Element>
__device__ __forceinline__ void load_slab(const Slab& slab, const Group& group, unsigned char* shared,
                                          int64_t slab_offset) {
  const uint32_t mbarrier = arch::cast_smem_ptr_to_uint(shared);
  const Span resident{slab.tiles.begin, slab.tiles.begin + slab.resident};
  const auto rows_of = [](const Arguments& args, const Span& tiles) {
    return static_cast<int>(min64(tiles.end * kRows, args.out_features) - tiles.begin * kRows);
  };
  if (threadIdx.x == 0) {
    int bytes = 0;
    each_member(group, resident, [&](const Arguments& args, const Span& tiles, int64_t) {
      bytes += rows_of(args, tiles) * static_cast<int>(args.rank * 2);
    });
    arch::mbarrier_init(mbarrier, 1);
    arch::fence_mbarrier_init();
    arch::mbarrier_arrive_expect_tx(mbarrier, bytes);
  }
  __syncthreads();
  if (threadIdx.x % 32 != 0) return;  // bulk copies are issued per thread: one of each warp
  each_member(group, resident, [&](const Arguments& args, const Span& tiles, int64_t index) {
    const int rows = rows_of(args, tiles);
    for (int row = threadIdx.x / 32; row < rows; row += kWarps)
      arch::bulk_load(mbarrier + static_cast<uint32_t>(slab_offset + (index * kRows + row) * rank_pitch(group.rank)),
                      static_cast<const Element*>(args.up) + (tiles.begin * kRows + row) * args.up_stride,
                      static_cast<int>(args.rank * 2), mbarrier);
  });
}

// t = x down^T, rounded, to scratch: work units round-robin over the clusters.
template <class Element, int kTokenGroups, int kRowTiles>
__device__ __forceinline__ void compute_down(const Group& group, unsigned char* shared, const SmemLayout& at) {
  constexpr int kTokens = kTokenGroups * 8, kUnitRows = kRowTiles * kRows, kSums = kUnitRows * kTokens;
  const cg::cluster_group cluster = cg::this_cluster();
  const int cluster_rank = static_cast<int>(cluster.block_rank()), ctas = static_cast<int>(cluster.num_blocks());
  const int64_t clusters = gridDim.x / ctas;
  const Arguments& same = group.members[0];  // in tokens and features
  const Span features = features_of_cta(cluster_rank, same.split_features, same.in_features);
  const Span mine = sums_of_cta(cluster_rank, ctas, kSums);
  float* warp_sums = reinterpret_cast<float*>(shared + at.warp_sums);
  float* cta_sums = reinterpret_cast<float*>(shared + at.cta_sums);
  const auto units_of = [&](int member) {
    return work_units(group.members[member].rank, kUnitRows, same.tokens, kTokens);
  };
  int64_t units = 0;
  for (int member = 0; member < group.downs; ++member) units += units_of(member);

  int round = 0;
  for (int64_t i = blockIdx.x / ctas; i < units; i += clusters, ++round) {
    const Place place = place_of(i, group.downs, units_of);
    const Arguments& args = group.members[place.member];
    const WorkUnit unit = work_unit_at(place.index, args.rank, kUnitRows, kTokens);
    float acc[kRowTiles][kTokenGroups][4] = {};
    mma_down<Element, kRowTiles, kTokenGroups, true>(acc, static_cast<const Element*>(args.down), args.down_stride,
                                                     unit.first_row, args.rank, static_cast<const Element*>(args.x),
                                                     args.x_stride, unit.first_token, args.tokens, features.begin,
                                                     features.end);
    store_warp_sums(acc, warp_sums);
    for (int j = threadIdx.x; j < kSums; j += kThreads)
      cta_sums[cta_sum_index(round, j, kSums)] =
          reduce_warp_sums<kRowTiles, kTokenGroups>(warp_sums, j % kUnitRows, j / kUnitRows);
    // All CTAs of the cluster have written this round's sums and read those of the round before the last, whose buffer
    // the next round reuses. It is the CTA's own barrier, too: warp_sums may be overwritten.
    cluster.sync();
    Element* t = reinterpret_cast<Element*>(args.scratch);
    for (int j = static_cast<int>(mine.begin) + threadIdx.x; j < mine.end; j += kThreads) {
      const int64_t r = unit.first_row + j % kUnitRows, token = unit.first_token + j / kUnitRows;
      float sum = 0.0f;
      for (int cta = 0; cta < ctas; ++cta)
        sum += cluster.map_shared_rank(cta_sums, cta)[cta_sum_index(round, j, kSums)];
      if (r < args.rank && token < args.tokens) t[token * args.rank + r] = round_to(sum, Element{});
    }
  }
}

// A warp's MMAs of 16 resident rows of up with t.
template <class Element, int kTokenGroups>
__device__ __forceinline__ void mma_resident(float (&acc)[1][kTokenGroups][4], const unsigned char* tile, int64_t rows,
                                             const unsigned char* t, int64_t rank, int64_t pitch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = static_cast<int>(ceil_div(rank, kFeatures));
#pragma unroll 2
  for (int i = 0; step_of_warp(warp, i) < steps; ++i) {
    const int64_t feature = int64_t{step_of_warp(warp, i)} * kFeatures + lane_feature(lane);
    Weights<1> weights;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row(lane) + half * 8;
      weights.rows[0][half] = load_shared(tile + row * pitch, feature, row < rows && feature < rank);
    }
#pragma unroll
    for (int group = 0; group < kTokenGroups; ++group)
      mma_step<Element>(acc, weights, load_shared(t + (group * 8 + lane_token(lane)) * pitch, feature, feature < rank),
                        group);
  }
}

// The same with rows streamed from global memory.
template <class Element, int kTokenGroups>
__device__ __forceinline__ void mma_streamed(float (&acc)[1][kTokenGroups][4], const Arguments& args, int64_t first_row,
                                             const unsigned char* t, int64_t pitch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = static_cast<int>(ceil_div(args.rank, kFeatures));
  for (int i = 0; step_of_warp(warp, i) < steps; i += kPrefetch) {
    Weights<1> weights[kPrefetch];
#pragma unroll
    for (int j = 0; j < kPrefetch; ++j)
      load_weights<Element, true>(weights[j], static_cast<const Element*>(args.up), args.up_stride, first_row,
                                  args.out_features,
                                  int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane), args.rank);
#pragma unroll
    for (int j = 0; j < kPrefetch; ++j) {
      const int64_t feature = int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane);
#pragma unroll
      for (int group = 0; group < kTokenGroups; ++group)
        mma_step<Element>(acc, weights[j],
                          load_shared(t + (group * 8 + lane_token(lane)) * pitch, feature, feature < args.rank), group);
    }
  }
}

template <class Element, int kTokenGroups>
__device__ __forceinline__ void compute_up(const Slab& slab, const Group& group, unsigned char* shared,
                                           const SmemLayout& at) {
  constexpr int kTokens = kTokenGroups * 8;
  float* sums = reinterpret_cast<float*>(shared + at.warp_sums);
  const int64_t pitch = rank_pitch(group.rank);
  for (int64_t first_token = 0; first_token < group.members[0].tokens; first_token += kTokens)
    each_member(group, slab.tiles, [&](const Arguments& args, const Span& tiles, int64_t first_index) {
      const int vectors = static_cast<int>(args.rank / kVector);  // columns past the last rank are not read
      gather_t<kTokens>(reinterpret_cast<const uint4*>(args.scratch) + first_token * vectors, args.tokens - first_token,
                        vectors, pitch, shared + at.t);
      arch::mbarrier_wait(arch::cast_smem_ptr_to_uint(shared), 0);
      __syncthreads();
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const int64_t index = first_index + tile - tiles.begin, first_row = tile * kRows;
        float acc[1][kTokenGroups][4] = {};
        if (index < slab.resident)
          mma_resident<Element, kTokenGroups>(acc, shared + at.slab + index * kRows * pitch,
                                              args.out_features - first_row, shared + at.t, args.rank, pitch);
        else
          mma_streamed<Element, kTokenGroups>(acc, args, first_row, shared + at.t, pitch);
        store_warp_sums(acc, sums);
        for (int i = threadIdx.x; i < kRows * kTokens; i += kThreads) {
          const int64_t n = first_row + i % kRows, token = first_token + i / kRows;
          if (n >= args.out_features || token >= args.tokens) continue;
          store_output<Element>(args, token, n, reduce_warp_sums<1, kTokenGroups>(sums, i % kRows, i / kRows));
        }
        __syncthreads();  // the sums have been read, and after the last tile t
      }
    });
}

}  // namespace

template <class Element, int kTokenGroups, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 1) decode_sm90(const __grid_constant__ Group group) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int64_t resident_tiles = group.members[0].resident_tiles;
  const SmemLayout at = smem_layout(kRowTiles * kRows, kTokenGroups * 8, group.rank, resident_tiles);
  int64_t tiles = 0;
  for (int i = 0; i < group.count; ++i) tiles += ceil_div(group.members[i].out_features, kRows);
  Slab slab{slab_of_cta(blockIdx.x, gridDim.x, tiles), 0};
  slab.resident = min64(resident_tiles, slab.tiles.end - slab.tiles.begin);
  load_slab<Element>(slab, group, shared, at.slab);
  __syncwarp();
  compute_down<Element, kTokenGroups, kRowTiles>(group, shared, at);
  // t is written, and no CTA reads another one's shared memory any more.
  cg::this_grid().sync();
  compute_up<Element, kTokenGroups>(slab, group, shared, at);
}

#endif  // LRO_KERNELS

#ifdef LRO_LAUNCHERS
namespace {

template <class Element, int kTokenGroups, int kRowTiles>
void launch_variant(const LowRankPlan& plan, Group group, const Launch& launch) {
  const auto kernel = decode_sm90<Element, kTokenGroups, kRowTiles>;
  opt_in_shared_memory(kernel, launch.shared_memory, launch);
  place_scratch(group, [&](int64_t rank) { return t_floats(group.members[0].tokens, rank); });
  const dim3 grid(static_cast<unsigned>(plan.ctas));
  launch_kernel(kernel, {grid, kThreads, plan.shared_bytes, plan.cluster, true}, launch, group);
}

}  // namespace

void launch_decode_sm90(const LowRankPlan& plan, const Group& group, Dtype dtype, const Launch& launch) {
  constexpr auto kAll = std::make_index_sequence<std::size(kDecodeSm90Variants)>{};
  dispatch_variant(dtype, launch, kAll, [&](auto element, auto i) {
    constexpr DecodeSm90Variant v = kDecodeSm90Variants[i];
    if (plan.token_tile != v.token_tile || plan.rows_down != v.rows()) return false;
    launch_variant<decltype(element), v.token_tile / 8, v.row_tiles>(plan, group, launch);
    return true;
  });
}

// Of a kernel that takes all of an SM, as those do that the planner counts clusters for.
std::array<int64_t, 3> count_clusters(const Launch& launch) {
  const auto kernel = decode_sm90<__nv_bfloat16, 1, 1>;
  opt_in_shared_memory(kernel, launch.shared_memory, launch);
  std::array<int64_t, 3> clusters{};
  for (size_t i = 0; i < clusters.size(); ++i) {
    const int ctas = 2 << i;
    const LaunchShape shape{dim3(static_cast<unsigned>(ctas)), kThreads, launch.shared_memory, ctas};
    int count = 0;
    const void* const function = function_of(reinterpret_cast<const void*>(kernel), launch);
    check(cudaOccupancyMaxActiveClusters(&count, function, LaunchConfig(shape, launch).get()), launch);
    clusters[i] = count;
  }
  return clusters;
}

#endif  // LRO_LAUNCHERS

}  // namespace lowrank_ops::lowrank_linear
