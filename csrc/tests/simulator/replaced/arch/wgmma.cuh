// csrc/arch/wgmma.cuh on the simulated device.
#pragma once

#include "matrices.h"

namespace lowrank_ops::arch {

inline void wgmma_fence() { simulator::wgmma_fence(); }
inline void wgmma_commit_group() { simulator::wgmma_commit_group(); }
template <int kPending>
void wgmma_wait_group() {
  simulator::wgmma_wait_group(kPending);
}

enum class Major { K, MN };

template <class Element, int kN, Major kMajor>
struct WgmmaSS {
  static void mma(float (&d)[kN / 2], uint64_t a, uint64_t b, int scale_d) {
    constexpr bool kIsMN = kMajor == Major::MN;
    simulator::wgmma<Element, kN>(kIsMN ? "wgmma MN-major" : "wgmma K-major", d, simulator::OperandA{a, nullptr, kIsMN},
                                  b, kIsMN, scale_d);
  }
};

template <class Element>
struct WgmmaRS {
  static void mma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int scale_d) {
    simulator::wgmma<Element, 64>("wgmma with A in registers", d, simulator::OperandA{0, a, false}, b, false, scale_d);
  }
};

}  // namespace lowrank_ops::arch
