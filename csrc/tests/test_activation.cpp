// gelu of every float16 and bfloat16, and of float32 in between, against float64.
#include "../lowrank_linear/activation.h"

#include <cstdint>
#include <cstring>
#include <limits>

#include "check.h"

using lowrank_ops::lowrank_linear::gelu;

namespace {

double exact(double y) { return y * 0.5 * std::erfc(-y * 0.70710678118654752440); }

void expect_accurate(float y) {
  const double error = std::fabs(static_cast<double>(gelu(y)) - exact(y));
  EXPECT(error <= std::ldexp(std::fabs(exact(y)), -14) + std::ldexp(1.0, -27));
}

float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void every_bfloat16_and_what_lies_between() {
  // The 16 bits of a bfloat16, and three more: every float16 is among them, its 10 bits of fraction being 7 and 3 more.
  for (uint32_t bits = 0; bits < 1u << 19; ++bits)
    if (const float y = of_bits(bits << 13); std::isfinite(y)) expect_accurate(y);
}

void what_is_not_finite_stays_so() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT(gelu(kInfinity) == kInfinity);
  EXPECT(std::fabs(gelu(-kInfinity)) < 1e-8f);
  EXPECT(std::isnan(gelu(std::numeric_limits<float>::quiet_NaN())));
  EXPECT(gelu(0.0f) == 0.0f && gelu(1e30f) == 1e30f);
}

// The other gelu misses it by far.
void the_bound_rejects_other_formulas() {
  const auto tanh_form = [](double y) {
    return 0.5 * y * (1.0 + std::tanh(0.79788456080286536 * (y + 0.044715 * y * y * y)));
  };
  EXPECT(std::fabs(tanh_form(-4.0) - exact(-4.0)) > std::ldexp(-exact(-4.0), -4));
}

}  // namespace

int main() {
  every_bfloat16_and_what_lies_between();
  what_is_not_finite_stays_so();
  the_bound_rejects_other_formulas();
  return lowrank_ops::tests::result();
}
