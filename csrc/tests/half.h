// bfloat16 and TensorFloat-32 on the host, as the kernels round to them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lowrank_ops::tests {

inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}
inline float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_bfloat16(float value) { return from_bfloat16(bfloat16_bits(value)); }

// Ten bits of the fraction: to nearest, ties away from zero, as cvt.rna.tf32.f32; or cut, as a tensor core does.
inline float to_tf32(float value, bool cut = false) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + (cut ? 0 : 0x1000)) & ~uint32_t{0x1FFF};
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace lowrank_ops::tests
