// csrc/products_sm90.cuh on the simulated device: each instruction as the PTX manual describes it.
#pragma once

#include "mma_sm90.cuh"

namespace lowrank_ops::sm90 {

template <class Element, int kColumns>
struct Product {
  static void add(float (&d)[kColumns / 2], uint64_t a, uint64_t b, int accumulate) {
    simulator::multiply<Element, kColumns>("wgmma", d, simulator::Left{a, nullptr, false}, b, false, accumulate);
  }
};

template <class Element, int kColumns>
struct TransposedProduct {
  static void add(float (&d)[kColumns / 2], uint64_t a, uint64_t b, int accumulate) {
    simulator::multiply<Element, kColumns>("wgmma transposed", d, simulator::Left{a, nullptr, true}, b, true, accumulate);
  }
};

template <class Element>
struct RegisterProduct {
  static void add(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    simulator::multiply<Element, 64>("wgmma with registers", d, simulator::Left{0, a, false}, b, false, accumulate);
  }
};

// ---- clusters ----

inline void arrive_cluster() { simulator::arrive_cluster(); }
inline void wait_cluster() { simulator::wait_cluster(); }
inline int rank_in_cluster() { return simulator::position().rank_in_cluster; }
inline uint32_t address_in_block(uint32_t address, int rank) {
  return simulator::kBlockAddress * (static_cast<uint32_t>(rank) + 1) + address;
}
inline void arrive_in_block(uint32_t barrier) { simulator::arrive(barrier, 0); }
inline void copy_box_to_blocks(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint16_t blocks) {
  const simulator::Unwatched unwatched;
  for (int rank = 0; blocks >> rank; ++rank)
    if (blocks >> rank & 1)
      simulator::copy_later(address_in_block(barrier, rank), simulator::matrix_map(*map).box_bytes(),
                            box_copy(address_in_block(to, rank), map, x, y));
}
inline void store_in_block(uint32_t address, const uint32_t (&words)[4]) {
  std::memcpy(simulator::shared_bytes(address, 16, 16), words, 16);
}
inline void load_shared(uint32_t (&words)[4], uint32_t address) {
  std::memcpy(words, simulator::shared_bytes(address, 16, 16), 16);
}

}  // namespace lowrank_ops::sm90
