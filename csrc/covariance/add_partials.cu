// Adds partial tiles, and on the diagonal partial sums, to the state in the order of the splits.

#include "covariance.h"
#include "state.cuh"
#include "tiles.h"

namespace lowrank_ops::covariance {
namespace {

__global__ void __launch_bounds__(kThreads, 1) covariance_add_partials(const __grid_constant__ Arguments args) {
  const Tile tile = tile_at(blockIdx.x);
  const int64_t group = blockIdx.z;
#pragma unroll
  for (int e = 0; e < kAddElements; ++e) {
    const int element = added_element(blockIdx.y, threadIdx.x, e);
    double sum = 0.0;
    for (int64_t split = 0; split < args.splits; ++split)
      sum += args.scratch[partial_offset(group, split, blockIdx.x, args.splits, args.tiles) + element];
    add_to_state(args, group, int64_t{tile.row} * kTile + element / kTile,
                 int64_t{tile.col} * kTile + element % kTile, sum);
  }
  const int64_t feature = int64_t{tile.row} * kTile + threadIdx.x;
  if (blockIdx.y != 0 || tile.row != tile.col || threadIdx.x >= kTile || feature >= args.features) return;
  double sum = 0.0;
  for (int64_t split = 0; split < args.splits; ++split)
    sum += args.scratch[partial_sum_offset(group, split, feature, args.groups, args.splits, args.tiles,
                                           args.features)];
  add_to_total(args, group, feature, sum);
}

}  // namespace

void launch_add_partials(const Arguments& args, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(args.tiles), kAddBlocks, static_cast<unsigned>(args.groups));
  launch_kernel(covariance_add_partials, {grid, kThreads, 0}, launch, args);
}

}  // namespace lowrank_ops::covariance
