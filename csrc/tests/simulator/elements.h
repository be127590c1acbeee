// 16-bit elements, two in a register, the lower one first.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace lowrank_ops::simulator {

template <class Element>
float value_of(uint16_t bits) {
  Element element;
  std::memcpy(static_cast<void*>(&element), &bits, 2);
  return static_cast<float>(element);
}

// The values of all bit patterns.
template <class Element>
const float* value_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values;
    for (uint32_t bits = 0; bits < 1u << 16; ++bits) values.push_back(value_of<Element>(static_cast<uint16_t>(bits)));
    return values;
  }();
  return table.data();
}

template <class Element>
float half_of(uint32_t word, int half) {
  return value_of<Element>(static_cast<uint16_t>(word >> (16 * half)));
}

// The tensor cores add the products of one instruction more exactly than float32, and round once.
struct Sum {
  double value;
  void add(float a, float b) { value += static_cast<double>(a) * b; }
};

}  // namespace lowrank_ops::simulator
