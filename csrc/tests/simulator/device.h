// A CUDA device on the host, for the kernels' sources compiled as C++.
//
// Every CUDA thread is a fiber. A seeded scheduler resumes them in random order, so that missing synchronization
// changes the result with the seed. Asynchronous copies and wgmmas happen as early, as late or as randomly as their
// waits allow. Shared memory starts as NaN, has 32-bit addresses and is checked for writes past its end. A deadlock is
// reported with what every thread waits for.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <functional>
#include <string>

namespace lowrank_ops::simulator {

// When asynchronous work happens. copies_first: copies at once and wgmmas only when they are waited for, which shows
// stages that are overwritten while they are read.
enum class Timing { early, late, copies_first, random };

struct Config {
  int capability = 90;
  int sm_count = 4;
  int64_t shared_memory = 232448;  // bytes per CTA
  unsigned seed = 0;
  Timing timing = Timing::random;
};
Config& config();

// What the launchers have asked of the driver and the runtime so far.
struct HostCalls {
  int64_t tensor_maps = 0, function_attributes = 0;
};
HostCalls& host_calls();

// ---- launches ----

struct GridShape {
  dim3 ctas, threads;
  int64_t shared_bytes;
  int cluster;
  bool has_cluster, cooperative, pdl;
};

// Queues a kernel. Without PDL the kernels before it run first.
void launch(const GridShape& shape, const void* kernel, std::function<void()> thread_body);
void allow_shared_bytes(const void* kernel, int64_t bytes);
// Runs the queued kernels. Throws std::runtime_error with the first fault found.
void synchronize();

// Synchronizes at the end of an op's scope, before scratch, which was declared earlier, is freed.
struct Synchronized {
  ~Synchronized() noexcept(false) { synchronize(); }
};

// ---- the thread that is running ----

struct Position {
  uint3 thread, cta;
  dim3 grid_size;
  int lane, warp;  // warp: of the CTA
  int cluster_ctarank, cluster_nctarank;
};
const Position& position();

// Ends the simulation.
[[noreturn]] void fail(const std::string& what);
void expect(bool condition, const char* what);

// ---- memory ----

constexpr uint32_t kCtaWindow = 1u << 24;  // shared::cluster addresses: (rank + 1) * kCtaWindow + address in the CTA

void* dynamic_shared();
void* static_shared(int place, int64_t bytes);  // one per CTA and source line
uint32_t shared_address(const void* pointer);
// The bytes at an address of this CTA, or of another CTA of its cluster.
unsigned char* shared_bytes(uint32_t address, int64_t bytes, int64_t alignment);
void* map_shared_rank(const void* pointer, int rank);
constexpr uint32_t mapa(uint32_t address, int rank) { return kCtaWindow * (static_cast<uint32_t>(rank) + 1) + address; }

// ---- convergence and barriers ----

// Converges the lanes of the warp: the last one runs `body` with every lane's argument.
void converge_warp(const char* name, void* mine, const std::function<void(void* const* lanes)>& body);
void sync_warp();
void sync_cta();
void cluster_arrive();
void cluster_wait();
void sync_grid();
void griddepcontrol_wait();

// ---- mbarriers ----

void mbarrier_init(uint32_t mbarrier, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t mbarrier, int64_t expected_bytes);
void mbarrier_wait(uint32_t mbarrier, int parity);

// ---- asynchronous work ----

// TMA: `copy` runs some time later and then completes on the mbarrier, of this CTA or of another one of its cluster. It
// is ordered after earlier accesses by threads only by fence_proxy_async.
void fence_proxy_async();
void tma_later(uint32_t mbarrier, int64_t bytes, std::function<void()> copy);

// cp.async (per thread) and wgmma (per warp): groups of work; a wait returns when at most `pending` groups are left.
void add_cp_async(std::function<void()> copy);
void commit_cp_async();
void wait_cp_async(int pending);
// All warps of a warpgroup execute the same wgmma instructions: each is hashed, and the hashes compared at the end.
void note_instruction(uint64_t what);
void wgmma_fence();
void add_wgmma(std::function<void()> work);  // from the body of converge_warp
void wgmma_commit_group();
void wgmma_wait_group(int pending);

}  // namespace lowrank_ops::simulator
