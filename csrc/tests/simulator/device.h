// A CUDA device on the host: what the kernels' sources need to run, compiled as C++.
//
// Every CUDA thread is a fiber. A scheduler with a seed resumes them in random order, so that what the kernels do not
// synchronize comes out differently with another seed; asynchronous copies and products happen as early, as late, or as
// randomly as their waits allow. Shared memory starts as NaN, has 32-bit addresses of its own, and is checked for
// writes past its end. What would hang, is reported with what every thread waits for.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <functional>
#include <string>

namespace lowrank_ops::simulator {

// When asynchronous work happens. What overwrites shared memory too soon shows where copies come first, and products
// are done, which read it, when they are waited for.
enum class Timing { early, late, copies_first, random };

struct Config {
  int capability = 90;
  int multiprocessors = 4;
  int64_t shared_memory = 232448;  // bytes that a block may have
  unsigned seed = 0;
  Timing timing = Timing::random;
};
Config& config();

// ---- launches ----

struct GridShape {
  dim3 blocks, threads;
  int64_t shared_bytes;
  int cluster;
  bool in_clusters, all_at_once, may_overlap;
};

// Runs what was launched before, unless the new kernel may overlap it, and keeps the new one for later.
void launch(const GridShape& shape, const void* kernel, std::function<void()> thread_body);
void allow_shared_bytes(const void* kernel, int64_t bytes);
// Runs all that has been launched. Throws std::runtime_error with the first fault that the simulation has found.
void synchronize();

// An op's launches have run when it goes out of scope; before what was declared ahead of it, such as scratch, is freed.
struct Synchronized {
  ~Synchronized() noexcept(false) { synchronize(); }
};

// ---- the thread that is running ----

struct Position {
  uint3 thread, block;
  dim3 grid_size;
  int lane, warp;       // warp: of the block
  int rank_in_cluster, blocks_in_cluster;
};
const Position& position();

// Ends the simulation.
[[noreturn]] void fail(const std::string& what);
void expect(bool condition, const char* what);

// ---- memory ----

constexpr uint32_t kBlockAddress = 1u << 24;  // addresses of a cluster: (rank + 1) * this + address in the block

void* dynamic_shared();
void* static_shared(int place, int64_t bytes);  // one per block and place in the source
uint32_t shared_address(const void* pointer);
// The bytes at an address of this block, or of another one of its cluster.
unsigned char* shared_bytes(uint32_t address, int64_t bytes, int64_t alignment);
void* in_block(const void* pointer, int rank);

// ---- meeting others ----

// All lanes of the warp: the last one to come runs `body` with what each has brought.
void meet_warp(const char* name, void* mine, const std::function<void(void* const* lanes)>& body);
void sync_warp();
void sync_block();
void arrive_cluster();
void wait_cluster();
void sync_grid();
void wait_for_kernel_before();

// ---- barriers in shared memory ----

void init_barrier(uint32_t barrier, int arrivals);
void fence_barrier_init();
void arrive(uint32_t barrier, int64_t expected_bytes);
void wait(uint32_t barrier, int parity);

// ---- asynchronous work ----

// By the copy engine: `copy` runs some time later and then tells the barrier, of this block or of another one of its
// cluster. It is ordered after what threads did to memory only by the fence between the two.
void fence_before_copies();
void copy_later(uint32_t barrier, int64_t bytes, std::function<void()> copy);

// By a thread (cp.async) or a warp (wgmma): work in groups; `wait_groups` returns when at most `pending` are left.
void add_copy(std::function<void()> copy);
void commit_copies();
void wait_copies(int pending);
// All warps of a warpgroup execute the same instructions of wgmma: what this one was is noted, and compared at the end.
void note_instruction(uint64_t what);
void fence_products();
void add_product(std::function<void()> product);  // from the body of meet_warp
void commit_products();
void wait_products(int pending);

}  // namespace lowrank_ops::simulator
