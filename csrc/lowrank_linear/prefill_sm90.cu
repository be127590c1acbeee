// y = activation((x down^T) up^T + bias) for many tokens and ranks up to 256: two GEMMs back to back, t on the chip
// (sm_90). Of a layer, or of each member of a group.
//
//   grid           one cluster per token tile and member, the members of a tile one after another, so that x comes from
//                  L2 for all but the first; Variant gives its cluster, warpgroups and peers
//   cluster        1 CTA; or 2, 4, 8 CTAs that share a token tile: each loads part of x for all (multicast), sums some
//                  columns of t, exchanges them through DSMEM and multiplies every cluster-th tile of up;
//                  or a pair of peers with a token tile each, which multicast each other half of the weights
//   warps          2 or 3 consumer warpgroups of 64 tokens; one producer warp, of which one thread issues TMA loads
//   registers      with 3 consumer warpgroups setmaxnreg: 160 per consumer, 32 in the producer's warpgroup
//   pipeline       2 to 6 stages of 64 features of x and down, then of 64 rows of up
//                  full: producer's expect_tx; empty: one arrival per consumer warp and CTA that multicasts to the
//                  stage
//   t              accumulators, rounded and packed, are the A fragments of the second GEMM (wgmma with A in registers)
//   shared memory  stages | exchange of t | mbarriers, from the next 1024 bytes on
//   deterministic  yes, and independent of the variant

#include <cuda.h>

#include "arguments.h"
#include "prefill_layout.h"

#ifdef LRO_KERNELS
#include "../arch/cluster.cuh"
#include "../arch/pipeline.cuh"
#include "../arch/setmaxnreg.cuh"
#include "../arch/smem.cuh"
#include "../arch/tma.cuh"
#include "../arch/wgmma.cuh"
#include "epilogue.cuh"
#endif

#ifdef LRO_LAUNCHERS
#include <iterator>

#include "../arch/tensor_map.h"
#include "lowrank_linear.h"
#endif

namespace lowrank_ops::lowrank_linear {

namespace p = prefill;

struct Maps {
  CUtensorMap x, down[kMaxMembers], up[kMaxMembers];
};

template <class Element, int kRankTile, int kCluster, int kPeers, int kWarpgroups>
__global__ void prefill_sm90(const __grid_constant__ Maps maps, const __grid_constant__ Group group);

#ifdef LRO_KERNELS
namespace {

using arch::smem_descriptor_k_major;

template <class Element, int kRankTile, int kCluster, int kPeers, int kWarpgroups>
struct Cta {
  static constexpr p::Variant kVariant{kRankTile, kCluster, kWarpgroups, kPeers};
  static constexpr int kCtas = kVariant.ctas();
  static constexpr int kColumns = kVariant.columns();
  static constexpr int kSteps = kVariant.steps();
  static constexpr int kStages = p::stages(kVariant);
  static constexpr int kAccumulators = p::kTileN / 2;
  static_assert(kStages >= 2);
  using Pipeline = arch::Pipeline<kStages, p::stage_bytes(kVariant), kCtas>;

  const Arguments& args;
  Pipeline pipeline;
  int cluster_rank;
  int tile_rank;  // among the CTAs that share a token tile
  int member;
  int64_t first_token;
  int down_steps;
  int up_tiles;

  // One thread.
  __device__ void produce(const Maps& maps) const {
    int step = 0;
    for (; step < down_steps; ++step) {
      pipeline.producer_acquire(step, p::down_step_bytes(kVariant));
      load<kCluster>(pipeline.stage(step), &maps.x, step * p::kTileK, static_cast<int>(first_token),
                     p::x_tile_rows(kVariant), pipeline.full(step));
      load<kPeers>(pipeline.stage(step) + p::x_bytes(kVariant), &maps.down[member], step * p::kTileK,
                   tile_rank * kColumns, p::down_tile_rows(kVariant), pipeline.full(step));
    }
    for (int n = 0; n < up_tiles; ++n, ++step) {
      pipeline.producer_acquire(step, p::up_step_bytes(kVariant));
      const int row = static_cast<int>(p::up_tile(tile_rank, n, kCluster)) * p::kTileN;
      for (int k = 0; k < p::up_tiles_k(kVariant); ++k)
        load<kPeers>(pipeline.stage(step) + k * p::kUpTileBytes, &maps.up[member], k * p::kTileK, row,
                     p::up_tile_rows(kVariant), pipeline.full(step));
    }
    if (kPeers > 1) pipeline.producer_tail(step);
  }

  // A TMA tile; of a tile that kSharers CTAs share, this CTA's rows to all of them.
  template <int kSharers>
  __device__ __forceinline__ void load(uint32_t smem, const CUtensorMap* map, int x, int y, int rows,
                                       uint32_t mbarrier) const {
    if constexpr (kSharers == 1)
      arch::tma_load_2d(smem, map, x, y, mbarrier);
    else
      arch::tma_load_2d_multicast(smem + cluster_rank * rows * p::kRowBytes, map, x, y + cluster_rank * rows, mbarrier,
                                  (1 << kSharers) - 1);
  }

  __device__ __forceinline__ void consume(int consumer) const {
    uint32_t t[kSteps][4];
    {
      float acc[kColumns / 2];
      mma_down(acc, consumer);
      uint32_t mine[kColumns / p::kMmaK][4];
#pragma unroll
      for (int step = 0; step < kColumns / p::kMmaK; ++step)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int i = p::accumulator_of_word(step, w);
          mine[step][w] = pack<Element>(acc[i], acc[i + 1]);
        }
      exchange(t, mine, consumer);
    }
    for (int n = 0; n < up_tiles; ++n) {
      const int step = down_steps + n;
      const int64_t first = p::up_tile(tile_rank, n, kCluster) * p::kTileN;
      float acc[kAccumulators];
      // Loaded ahead of the MMAs. Three warpgroups lack the registers, and hide each other's latency.
      Element bias[p::kTileN / 4];
      if constexpr (kWarpgroups == 2) load_bias(bias, consumer, first);
      pipeline.consumer_wait(step);
      arch::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        arch::WgmmaRS<Element>::mma(acc, t[k], smem_descriptor_k_major(pipeline.stage(step) + p::up_offset(k)), k > 0);
      arch::wgmma_commit_group();
      arch::wgmma_wait_group<0>();
      pipeline.consumer_release(step, consumer, kPeers > 1);  // the CTAs of a token tile share x only, not up
      if (args.bias) {
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i)
          acc[i] += kWarpgroups == 2 ? static_cast<float>(bias[p::bias_of_accumulator(i)])
                                     : static_cast<float>(bias_at(consumer, i, first));
      }
      store(acc, consumer, first);
    }
  }

  __device__ __forceinline__ void mma_down(float (&acc)[kColumns / 2], int consumer) const {
    using Wgmma = arch::WgmmaSS<Element, kColumns, arch::Major::K>;
    for (int step = 0; step < down_steps; ++step) {
      pipeline.consumer_wait(step);
      arch::wgmma_fence();
#pragma unroll
      for (int k = 0; k < p::kTileK / p::kMmaK; ++k)
        Wgmma::mma(acc, smem_descriptor_k_major(pipeline.stage(step) + p::x_offset(consumer / 128, k)),
                   smem_descriptor_k_major(pipeline.stage(step) + p::down_offset(kVariant, k)), step > 0 || k > 0);
      arch::wgmma_commit_group();
      arch::wgmma_wait_group<1>();  // this step's MMAs may run on; the previous stage has been read
      if (step > 0) pipeline.consumer_release(step - 1, consumer);
    }
    arch::wgmma_wait_group<0>();
    pipeline.consumer_release(down_steps - 1, consumer);
  }

  // All columns of t from the CTAs that have summed them.
  __device__ __forceinline__ void exchange(uint32_t (&t)[kSteps][4], const uint32_t (&mine)[kColumns / p::kMmaK][4],
                                           int consumer) const {
    if constexpr (kCluster == 1) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int w = 0; w < 4; ++w) t[step][w] = mine[step][w];
    } else {
      const uint32_t start = pipeline.stages + p::exchange_offset(kVariant);
      for (int cta = 0; cta < kCluster; ++cta) {
        const uint32_t mapped = arch::mapa(start, cta);
#pragma unroll
        for (int step = 0; step < kColumns / p::kMmaK; ++step)
          if (const int at = p::first_step(tile_rank, kColumns) + step; at < kSteps)
            arch::st_shared_cluster_v4(mapped + p::exchange_index(consumer, at, kRankTile), mine[step]);
      }
      arch::cluster_arrive();
      arch::cluster_wait();
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        arch::ld_shared_v4(t[step], start + p::exchange_index(consumer, step, kRankTile));
    }
  }

  // The bias of accumulator i of the 64 columns from `first` on.
  __device__ __forceinline__ Element bias_at(int consumer, int i, int64_t first) const {
    const int thread_col = arch::wgmma_accumulator_col(consumer, 0), col = arch::wgmma_accumulator_col(0, i);
    const int left = static_cast<int>(args.out_features - first) - thread_col;  // at most 2^30 features
    return col < left ? static_cast<const Element*>(args.bias)[first + thread_col + col] : Element(0.0f);
  }

  // Of all accumulators; a thread's two tokens share it.
  __device__ __forceinline__ void load_bias(Element (&bias)[p::kTileN / 4], int consumer, int64_t first) const {
    if (!args.bias) return;
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i)
      if (i / 2 % 2 == 0) bias[p::bias_of_accumulator(i)] = bias_at(consumer, i, first);
  }

  // 64 columns of y from `first` on.
  __device__ __forceinline__ void store(float (&acc)[kAccumulators], int consumer, int64_t first) const {
    activate_all(acc, args.activation);
    if (args.out_features % 8 == 0)
      store_vectors(acc, consumer, first);
    else
      store_elements(acc, consumer, first);
  }

  __device__ __forceinline__ void store_elements(const float (&acc)[kAccumulators], int consumer, int64_t first) const {
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) {
      const int64_t token = first_token + arch::wgmma_accumulator_row(consumer, i);
      const int64_t n = first + arch::wgmma_accumulator_col(consumer, i);
      if (token < args.tokens && n < args.out_features)
        static_cast<Element*>(args.y)[token * args.out_features + n] = round_to(acc[i], Element{});
    }
  }

  // Rows of y start on 16 bytes: each lane stores 8 columns of a token at a time.
  __device__ __forceinline__ void store_vectors(const float (&acc)[kAccumulators], int consumer, int64_t first) const {
    const int quad_lane = consumer % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = first_token + arch::wgmma_accumulator_row(consumer, half * 2);
#pragma unroll
      for (int columns = 0; columns < p::kTileN; columns += 32) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int i = (columns / 8 + w) * 4 + half * 2;
          words[w] = pack<Element>(acc[i], acc[i + 1]);
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

}  // namespace

template <class Element, int kRankTile, int kCluster, int kPeers, int kWarpgroups>
__global__ void __launch_bounds__(p::Variant{kRankTile, kCluster, kWarpgroups, kPeers}.threads(), 1)
    prefill_sm90(const __grid_constant__ Maps maps, const __grid_constant__ Group group) {
  extern __shared__ unsigned char unaligned[];
  using ThisCta = Cta<Element, kRankTile, kCluster, kPeers, kWarpgroups>;
  constexpr p::Variant kVariant = ThisCta::kVariant;
  constexpr int kConsumers = kVariant.consumers();
  const int cluster_rank = kVariant.ctas() == 1 ? 0 : arch::cluster_ctarank();
  const int tile_rank = kCluster == 1 ? 0 : cluster_rank;
  const unsigned cluster = blockIdx.x / kVariant.ctas(), token_tile = cluster / group.count;
  const int member = static_cast<int>(cluster % group.count);
  const Arguments& args = group.members[member];
  const int64_t cta_tile = int64_t{token_tile} * kPeers + blockIdx.x % kVariant.ctas() / kCluster;
  const uint32_t first_stage =
      static_cast<uint32_t>(round_up(arch::cast_smem_ptr_to_uint(unaligned), arch::kSwizzleAlignment));
  const ThisCta cta{args,
                    {first_stage + p::mbarrier_offset(kVariant), first_stage},
                    cluster_rank,
                    tile_rank,
                    member,
                    cta_tile * kVariant.cta_tokens(),
                    static_cast<int>(ceil_div(args.in_features, p::kTileK)),
                    p::up_tiles(tile_rank, kCluster, args.out_features)};
  if (threadIdx.x == 0) {
    arch::prefetch_tensormap(&maps.x);
    arch::prefetch_tensormap(&maps.down[member]);
    arch::prefetch_tensormap(&maps.up[member]);
    cta.pipeline.init(kConsumers / 32);
    arch::fence_mbarrier_init();
  }
  __syncthreads();
  if constexpr (kVariant.ctas() > 1) {  // a CTA must have started before a peer writes to it
    arch::cluster_arrive();
    arch::cluster_wait();
  }
  if (threadIdx.x < kConsumers) {
    if constexpr (kVariant.moves_registers()) arch::warpgroup_reg_alloc<p::kConsumerRegisters>();
    cta.consume(threadIdx.x);
  } else {
    if constexpr (kVariant.moves_registers()) arch::warpgroup_reg_dealloc<p::kProducerRegisters>();
    // The barrier of the exchange counts all threads. It also keeps a CTA from exiting while peers write to it.
    if constexpr (kCluster > 1) arch::cluster_arrive();
    if (threadIdx.x == kConsumers) cta.produce(maps);
    __syncwarp();
    if constexpr (kCluster > 1) arch::cluster_wait();
  }
}

#endif  // LRO_KERNELS

#ifdef LRO_LAUNCHERS
namespace {

template <class Element, int kRankTile, int kCluster, int kPeers, int kWarpgroups>
void launch_variant(const LowRankPlan& plan, const Group& group, const Launch& launch) {
  constexpr p::Variant kVariant{kRankTile, kCluster, kWarpgroups, kPeers};
  const auto kernel = prefill_sm90<Element, kRankTile, kCluster, kPeers, kWarpgroups>;
  opt_in_shared_memory(kernel, plan.shared_bytes, launch);
  const Arguments& first = group.members[0];
  Maps maps{arch::encode_tensor_map_2d<Element>(first.x, first.tokens, first.in_features, first.x_stride,
                                                p::x_tile_rows(kVariant), p::kTileK, launch),
            {},
            {}};
  for (int i = 0; i < group.count; ++i) {
    const Arguments& args = group.members[i];
    maps.down[i] = arch::tensor_map_of_weight<Element>(args.down, args.rank, args.in_features, args.down_stride,
                                                       p::down_tile_rows(kVariant), p::kTileK, launch);
    maps.up[i] = arch::tensor_map_of_weight<Element>(args.up, args.out_features, args.rank, args.up_stride,
                                                     p::up_tile_rows(kVariant), p::kTileK, launch);
  }
  const dim3 grid(static_cast<unsigned>(plan.ctas));
  launch_kernel(kernel, {grid, kVariant.threads(), plan.shared_bytes, kVariant.ctas()}, launch, maps, group);
}

}  // namespace

void launch_prefill_sm90(const LowRankPlan& plan, const Group& group, Dtype dtype, const Launch& launch) {
  constexpr auto kAll = std::make_index_sequence<std::size(p::kVariants)>{};
  dispatch_variant(dtype, launch, kAll, [&](auto element, auto i) {
    constexpr p::Variant v = p::kVariants[i];
    if (plan.rank_tile != v.rank_tile || plan.cluster != v.cluster || plan.token_tile != v.token_tile()) return false;
    launch_variant<decltype(element), v.rank_tile, v.cluster, v.peers, v.warpgroups>(plan, group, launch);
    return true;
  });
}

#endif  // LRO_LAUNCHERS

}  // namespace lowrank_ops::lowrank_linear
