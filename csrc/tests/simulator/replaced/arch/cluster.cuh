// csrc/arch/cluster.cuh on the simulated device.
#pragma once

#include <cstring>

#include "device.h"

namespace lowrank_ops::arch {

inline void cluster_arrive() { simulator::cluster_arrive(); }
inline void cluster_wait() { simulator::cluster_wait(); }
inline int cluster_ctarank() { return simulator::position().cluster_ctarank; }
inline uint32_t mapa(uint32_t address, int cta_rank) { return simulator::mapa(address, cta_rank); }
inline void st_shared_cluster_v4(uint32_t address, const uint32_t (&words)[4]) {
  std::memcpy(simulator::shared_bytes(address, 16, 16), words, 16);
}

}  // namespace lowrank_ops::arch
