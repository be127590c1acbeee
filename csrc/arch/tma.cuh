// TMA loads and bulk copies into shared memory (sm_90); they complete on an mbarrier. tensor_map.h encodes the maps.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace lowrank_ops::arch {

__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The tile at (x, y), innermost dimension first. Elements outside the tensor read as zero.
__device__ __forceinline__ void tma_load_2d(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(mbarrier)
      : "memory");
}
// The same tile to all CTAs of the cluster in `cta_mask`, at the same offsets; completes on each CTA's own mbarrier.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t smem, const CUtensorMap* map, int x, int y,
                                                      uint32_t mbarrier, uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(mbarrier), "h"(cta_mask)
      : "memory");
}

// `bytes` and both addresses are multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t smem, const void* global, int bytes, uint32_t mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(mbarrier)
               : "memory");
}

}  // namespace lowrank_ops::arch
