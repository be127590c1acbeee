// The part of CUDA's header that the kernels use.
#pragma once

#include "device.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const { return static_cast<unsigned>(lowrank_ops::simulator::position().cluster_ctarank); }
  unsigned num_blocks() const { return static_cast<unsigned>(lowrank_ops::simulator::position().cluster_nctarank); }
  void sync() const {
    lowrank_ops::simulator::cluster_arrive();
    lowrank_ops::simulator::cluster_wait();
  }
  template <class T>
  T* map_shared_rank(T* pointer, int rank) const {
    return static_cast<T*>(lowrank_ops::simulator::map_shared_rank(pointer, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

struct grid_group {
  void sync() const { lowrank_ops::simulator::sync_grid(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
