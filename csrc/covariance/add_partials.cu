// Reduces partial tiles, and on the diagonal partial column sums, into the state in the order of the splits.
//
//   grid           (split tiles, slices of a tile, groups)
//   CTA            256 threads, 4 elements each
//   deterministic  yes

#include "arguments.h"
#include "tiles.h"
#include "wide_tiles.h"

#ifdef LRO_KERNELS
#include "state.cuh"
#endif

#ifdef LRO_LAUNCHERS
#include "covariance.h"
#endif

namespace lowrank_ops::covariance {

template <int kEdge>
__global__ void covariance_add_partials(const __grid_constant__ Arguments args);

#ifdef LRO_KERNELS

template <int kEdge>
__global__ void __launch_bounds__(kThreads, 1) covariance_add_partials(const __grid_constant__ Arguments args) {
  const int64_t tiles = args.tiles - args.whole, group = blockIdx.z;
  const Tile tile = tile_at(args.whole + blockIdx.x);
#pragma unroll
  for (int e = 0; e < kAddElements; ++e) {
    const int element = added_element(blockIdx.y, threadIdx.x, e);
    double sum = 0.0;
    for (int64_t split = 0; split < args.splits; ++split)
      sum += args.scratch[partial_offset(group, split, blockIdx.x, args.splits, tiles, kEdge) + element];
    add_to_state(args, group, int64_t{tile.row} * kEdge + element / kEdge, int64_t{tile.col} * kEdge + element % kEdge,
                 sum);
  }
  const int64_t feature = int64_t{tile.row} * kEdge + threadIdx.x;
  if (blockIdx.y != 0 || tile.row != tile.col || threadIdx.x >= kEdge || feature >= args.features) return;
  double sum = 0.0;
  for (int64_t split = 0; split < args.splits; ++split)
    sum +=
        args.scratch[partial_sum_offset(group, split, feature, args.groups, args.splits, tiles, args.features, kEdge)];
  add_to_total(args, group, feature, sum);
}

#endif  // LRO_KERNELS

#ifdef LRO_LAUNCHERS
namespace {

template <int kEdge>
void launch_edge(const Arguments& args, const Launch& launch) {
  const auto kernel = covariance_add_partials<kEdge>;
  const dim3 grid(static_cast<unsigned>(args.tiles - args.whole), add_ctas(kEdge), static_cast<unsigned>(args.groups));
  launch_kernel(kernel, {grid, kThreads, 0}, launch, args);
}

}  // namespace

void launch_add_partials(const Arguments& args, int edge, const Launch& launch) {
  static_assert(wide::kTile <= kThreads);
  if (edge == kTile) return launch_edge<kTile>(args, launch);
  launch_edge<wide::kTile>(args, launch);
}

#endif  // LRO_LAUNCHERS

}  // namespace lowrank_ops::covariance
