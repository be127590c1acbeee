// Types that the planner and the kernels share.
#pragma once

namespace lowrank_ops {

// Of covariance_update_.
enum class Source {
  matrix,          // rows of any alignment, staged through registers
  aligned_matrix,  // rows on 16 bytes: cp.async or TMA, unless float32 is split in parts
  patches,         // implicit im2col
};

constexpr int kMaxMembers = 3;  // of lowrank_linear_grouped

}  // namespace lowrank_ops
