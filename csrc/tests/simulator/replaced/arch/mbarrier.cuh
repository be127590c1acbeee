// csrc/arch/mbarrier.cuh on the simulated device.
#pragma once

#include "device.h"

namespace lowrank_ops::arch {

inline void mbarrier_init(uint32_t mbarrier, int arrivals) { simulator::mbarrier_init(mbarrier, arrivals); }
inline void fence_mbarrier_init() { simulator::fence_mbarrier_init(); }
inline void fence_proxy_async() { simulator::fence_proxy_async(); }
inline void mbarrier_arrive(uint32_t mbarrier) { simulator::mbarrier_arrive(mbarrier, 0); }
inline void mbarrier_arrive_cluster(uint32_t mbarrier) { simulator::mbarrier_arrive(mbarrier, 0); }
inline void mbarrier_arrive_expect_tx(uint32_t mbarrier, int bytes) { simulator::mbarrier_arrive(mbarrier, bytes); }
inline void mbarrier_wait(uint32_t mbarrier, int parity) { simulator::mbarrier_wait(mbarrier, parity); }

}  // namespace lowrank_ops::arch
