// csrc/arch/tma.cuh on the simulated device.
#pragma once

#include <cuda.h>

#include "matrices.h"

namespace lowrank_ops::arch {

inline void prefetch_tensormap(const CUtensorMap*) {}

// A TMA tile to one address in shared memory.
inline std::function<void()> tile_copy(uint32_t smem, const CUtensorMap* map, int x, int y) {
  const simulator::TensorMap tensor = simulator::tensor_map(*map);
  unsigned char* start = simulator::shared_bytes(smem, tensor.tile_bytes(), 128);
  const uint32_t offset = smem % simulator::kCtaWindow;
  return [tensor, offset, start, x, y] {
    for (int row = 0; row < tensor.tile_rows; ++row)
      for (int chunk = 0; chunk < tensor.tile_cols / 8; ++chunk) {  // of 16 bytes, which the swizzle keeps together
        const int64_t r = int64_t{y} + row, c = int64_t{x} + chunk * 8;
        const bool row_exists = r >= 0 && r < tensor.rows;
        const unsigned char* from = tensor.base + r * tensor.stride_bytes + c * 2;
        const uint32_t address = offset + static_cast<uint32_t>((row * tensor.tile_cols + chunk * 8) * 2);
        unsigned char* to = start + (simulator::swizzled(address) - offset);
        if (row_exists && c >= 0 && c + 8 <= tensor.cols) {
          std::memcpy(to, from, 16);
          continue;
        }
        uint16_t values[8] = {};
        for (int i = 0; i < 8; ++i)
          if (row_exists && c + i >= 0 && c + i < tensor.cols) std::memcpy(&values[i], from + i * 2, 2);
        std::memcpy(to, values, 16);
      }
  };
}

inline void tma_load_2d(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t mbarrier) {
  const simulator::Unwatched unwatched;
  simulator::tma_later(mbarrier, simulator::tensor_map(*map).tile_bytes(), tile_copy(smem, map, x, y));
}
inline void tma_load_2d_multicast(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t mbarrier,
                                  uint16_t cta_mask) {
  const simulator::Unwatched unwatched;
  for (int rank = 0; cta_mask >> rank; ++rank)
    if (cta_mask >> rank & 1)
      simulator::tma_later(simulator::mapa(mbarrier, rank), simulator::tensor_map(*map).tile_bytes(),
                           tile_copy(simulator::mapa(smem, rank), map, x, y));
}

inline void bulk_load(uint32_t smem, const void* global, int bytes, uint32_t mbarrier) {
  const simulator::Unwatched unwatched;
  simulator::expect(bytes > 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0,
                    "a bulk copy of 16-byte pieces");
  unsigned char* to = simulator::shared_bytes(smem, bytes, 16);
  simulator::tma_later(mbarrier, bytes, [=] { std::memcpy(to, global, static_cast<size_t>(bytes)); });
}

}  // namespace lowrank_ops::arch
