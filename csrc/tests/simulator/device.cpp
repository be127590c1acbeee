#include "device.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "order.h"
#include "scheduler.h"

namespace lowrank_ops::simulator {
namespace {

Thread& self() { return *device().self; }

void run_groups(std::deque<std::vector<Work>>& groups) {
  for (auto& group : groups) {
    for (const Work& work : group) work();
    group.clear();
  }
}

// Closes a group of work; runs all groups at once where the timing says so.
void commit(std::deque<std::vector<Work>>& groups, bool at_once) {
  if (at_once || config().timing == Timing::early || (config().timing == Timing::random && device().coin()))
    run_groups(groups);
  const Unwatched unwatched;
  groups.emplace_back();
}

void wait_for(std::deque<std::vector<Work>>& groups, int pending) {
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Work& work : groups.front()) work();
    const Unwatched unwatched;
    groups.pop_front();
  }
}

// The CTA of an address: this one, or another one of its cluster, which must have started and not exited.
Cta& cta_of(uint32_t address) {
  Cta* cta = self().cta;
  if (address >= kCtaWindow) {
    const uint32_t rank = address / kCtaWindow - 1;
    expect(rank < cta->cluster->ctas.size(), "an address of a CTA of the cluster");
    cta = cta->cluster->ctas[rank].get();
    expect(cta == self().cta || cta->cluster->barrier.was_passed(),
           "a cluster barrier before another CTA's memory is used: it may not have started");
    expect(cta->live > 0, "an address of a CTA that has not exited");
  }
  return *cta;
}

Mbarrier& mbarrier_at(Cta& cta, uint32_t address) {
  const auto found = cta.mbarriers.find(address);
  if (found == cta.mbarriers.end()) fail("an mbarrier is used before its initialization");
  expect_intact(cta, address);
  return found->second;
}

void settle(Mbarrier& barrier) {
  constexpr int64_t kMaxBytes = (1 << 20) - 1;
  if (barrier.bytes > kMaxBytes || barrier.bytes < -kMaxBytes) fail("the tx-count of an mbarrier overflows");
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.parity ^= 1;
  barrier.pending = barrier.count;
  device().wake(barrier.waiting);
}

}  // namespace

Config& config() {
  static Config config;
  return config;
}

// ---- launches ----

void allow_shared_bytes(const void* kernel, int64_t bytes) { device().allowed_bytes[kernel] = bytes; }

void launch(const GridShape& shape, const void* function, Work body) {
  if (!shape.pdl) synchronize();
  const auto allowed = device().allowed_bytes.find(function);
  if (shape.shared_bytes > (allowed == device().allowed_bytes.end() ? int64_t{48} << 10 : allowed->second))
    throw std::runtime_error("simulated device: a kernel launch exceeds its shared-memory opt-in");
  if (shape.shared_bytes > config().shared_memory)
    throw std::runtime_error("simulated device: a kernel launch exceeds the device's shared memory");
  const int64_t ctas = int64_t{shape.ctas.x} * shape.ctas.y * shape.ctas.z;
  const int64_t threads = int64_t{shape.threads.x} * shape.threads.y * shape.threads.z;
  if (ctas < 1 || shape.ctas.y > 65535 || shape.ctas.z > 65535 || threads < 1 || threads > 1024)
    throw std::runtime_error("simulated device: an invalid grid");
  if (shape.cluster < 1 || shape.cluster > 8 || shape.ctas.x % static_cast<unsigned>(shape.cluster) != 0)
    throw std::runtime_error("simulated device: an invalid cluster size");
  if ((shape.has_cluster || shape.pdl) && config().capability < 90)
    throw std::runtime_error("simulated device: a launch that needs compute capability 9.0");
  if (shape.cooperative && ctas > config().sm_count)  // one CTA per SM, as its kernels are planned
    throw std::runtime_error("simulated device: a cooperative grid that does not fit the device");
  auto kernel = std::make_unique<Kernel>();
  kernel->shape = shape;
  kernel->function = function;
  kernel->body = std::move(body);
  for (int64_t first = 0; first < ctas; first += shape.cluster) kernel->to_start.push_back(first);
  device().random.seed(config().seed);
  std::shuffle(kernel->to_start.begin(), kernel->to_start.end(), device().random);
  if (!device().kernels.empty()) kernel->before = device().kernels.back().get();
  device().kernels.push_back(std::move(kernel));
}

void synchronize() {
  if (!device().kernels.empty()) device().run();
}

// ---- the thread that is running ----

const Position& position() { return self().position; }

void fail(const std::string& what) {
  if (device().fault.empty()) device().fault = what;
  if (Thread* thread = device().self) thread->fiber->leave();
  throw std::runtime_error("simulated device: " + what);  // outside of any thread
}

void expect(bool condition, const char* what) {
  if (!condition) fail(std::string("expected ") + what);
}

// ---- memory ----

void* dynamic_shared() { return self().cta->base + kDynamicStart; }

void* static_shared(int place, int64_t bytes) {
  const Unwatched unwatched;
  Cta& cta = *self().cta;
  void*& memory = cta.statics[place];
  if (memory == nullptr) {
    memory = cta.base + cta.static_used;
    cta.static_used += (bytes + 15) / 16 * 16;
    expect(cta.static_used <= kSystemBytes + kStaticBytes, "static shared memory within the simulator's limit");
    expect(cta.static_used - kSystemBytes + cta.kernel->shape.shared_bytes <= config().shared_memory,
           "static and dynamic shared memory that the device has");
  }
  return memory;
}

uint32_t shared_address(const void* pointer) {
  const Cta& cta = *self().cta;
  const int64_t offset = static_cast<const unsigned char*>(pointer) - cta.base;
  expect(offset >= kSystemBytes && offset <= kDynamicStart + cta.kernel->shape.shared_bytes,
         "a pointer to this CTA's shared memory");
  return static_cast<uint32_t>(offset);
}

unsigned char* shared_bytes(uint32_t address, int64_t bytes, int64_t alignment) {
  const Cta& cta = cta_of(address);
  address %= kCtaWindow;
  expect(address % alignment == 0, "an aligned address");
  expect(address >= kSystemBytes && address + bytes <= kDynamicStart + cta.kernel->shape.shared_bytes,
         "an address within the CTA's shared memory");
  return cta.base + address;
}

void* map_shared_rank(const void* pointer, int rank) {
  return shared_bytes(kCtaWindow * (static_cast<uint32_t>(rank) + 1) + shared_address(pointer), 1, 1);
}

// ---- convergence and barriers ----

void converge_warp(const char* name, void* mine, const std::function<void(void* const* lanes)>& body) {
  Warp& warp = *self().warp;
  if (warp.arrived && std::strcmp(warp.converging_at, name) != 0)
    fail(std::string("lanes of a warp diverge: ") + warp.converging_at + " and " + name);
  warp.converging_at = name;
  warp.arguments[static_cast<size_t>(position().lane)] = mine;
  release(&warp);
  if (++warp.arrived < kLanes) {
    device().wait_until_woken(warp.waiting, name);
    return acquire(&warp);
  }
  acquire(&warp);
  warp.arrived = 0;
  body(warp.arguments.data());
  release(&warp);
  device().wake(warp.waiting);
}

void sync_warp() {
  converge_warp("__syncwarp", nullptr, [](void* const*) {});
}

void sync_cta() {
  Cta& cta = *self().cta;
  cta.barrier.wait(cta.barrier.arrive(cta.live), "__syncthreads");
}

void cluster_arrive() {
  Thread& thread = self();
  Cluster& cluster = *thread.cta->cluster;
  expect(!thread.in_cluster_barrier, "a wait between two arrivals at the cluster barrier");
  thread.in_cluster_barrier = true;
  thread.cluster_phase = cluster.barrier.arrive(cluster.live);
}

void cluster_wait() {
  Thread& thread = self();
  expect(thread.in_cluster_barrier, "an arrival before a wait at the cluster barrier");
  thread.cta->cluster->barrier.wait(thread.cluster_phase, "the cluster barrier");
  thread.in_cluster_barrier = false;
}

void sync_grid() {
  Kernel& kernel = *self().cta->kernel;
  expect(kernel.shape.cooperative, "a cooperative launch for a grid barrier");
  kernel.barrier.wait(kernel.barrier.arrive(kernel.live), "the grid barrier");
}

void griddepcontrol_wait() {
  Kernel* before = self().cta->kernel->before;
  while (before != nullptr && !before->ended()) device().wait_until_woken(before->dependents, "the primary kernel");
  if (before != nullptr) acquire(&before->a_thread_ended);
}

// ---- mbarriers ----

void mbarrier_init(uint32_t address, int arrivals) {
  unsigned char* there = shared_bytes(address, 8, 8);
  expect(arrivals > 0 && arrivals < 1 << 20, "an mbarrier for 1 to 2^20 - 1 arrivals");
  const Unwatched unwatched;
  Cta& cta = *self().cta;
  expect(cta.mbarriers.count(address) == 0, "an mbarrier that is initialized once");
  std::memcpy(there, &kMbarrierBits, 8);
  cta.mbarriers[address] = Mbarrier{arrivals, arrivals, 0, 0, &self(), {}};
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : self().cta->mbarriers)
    if (barrier.unfenced == &self()) barrier.unfenced = nullptr;
  fence_proxy_async();
}

void mbarrier_arrive(uint32_t address, int64_t expected_bytes) {
  Mbarrier& barrier = mbarrier_at(cta_of(address), address % kCtaWindow);
  barrier.bytes += expected_bytes;
  release(&barrier);
  if (--barrier.pending < 0) fail("more threads arrive at an mbarrier than it expects");
  settle(barrier);
}

void mbarrier_wait(uint32_t address, int parity) {
  expect(parity == 0 || parity == 1, "a parity of 0 or 1");
  Mbarrier& barrier = mbarrier_at(*self().cta, address);
  while (barrier.parity == parity) device().wait_until_woken(barrier.waiting, "an mbarrier");
  acquire(&barrier);
}

// ---- asynchronous work ----

void fence_proxy_async() { release(&self().cta->fenced); }

void tma_later(uint32_t address, int64_t bytes, Work copy) {
  Cta* cta = &cta_of(address);
  const Cta* issuer = self().cta;
  Mbarrier* barrier = &mbarrier_at(*cta, address % kCtaWindow);
  expect(barrier->unfenced == nullptr, "fence.mbarrier_init and fence.proxy.async before TMA uses an mbarrier");
  ++cta->tma_in_flight;
  Work work = [cta, issuer, barrier, address, bytes, copy = std::move(copy)] {
    {
      const ByAsyncProxy by_async_proxy;
      acquire(&cta->kernel->launched);
      acquire(&cta->fenced);
      acquire(&issuer->fenced);
      copy();
      release(barrier);
    }
    --cta->tma_in_flight;
    expect_intact(*cta, address % kCtaWindow);
    barrier->bytes -= bytes;
    settle(*barrier);
  };
  if (config().timing == Timing::early || config().timing == Timing::copies_first) return work();
  const Unwatched unwatched;
  device().tma.push_back(std::move(work));
}

void add_cp_async(Work copy) {
  const Unwatched unwatched;
  self().copies.back().push_back(std::move(copy));
}
void commit_cp_async() { commit(self().copies, config().timing == Timing::copies_first); }
void wait_cp_async(int pending) { wait_for(self().copies, pending); }

void note_instruction(uint64_t what) {
  uint64_t& all = self().warp->instructions;
  all = (all ^ what) * 0x9E3779B97F4A7C15u + 1;
  all ^= all >> 29;
}
void wgmma_fence() {
  converge_warp("wgmma.fence", nullptr, [](void* const*) {
    self().warp->fenced = true;
    note_instruction(1);
  });
}
void add_wgmma(Work work) {
  expect(self().warp->fenced, "wgmma.fence between what touched the accumulators and the next wgmma");
  const Unwatched unwatched;
  self().warp->wgmmas.back().push_back(std::move(work));
}
void wgmma_commit_group() {
  converge_warp("wgmma.commit_group", nullptr, [](void* const*) {
    commit(self().warp->wgmmas, false);
    note_instruction(2);
  });
}
void wgmma_wait_group(int pending) {
  converge_warp("wgmma.wait_group", nullptr, [pending](void* const*) {
    wait_for(self().warp->wgmmas, pending);
    self().warp->fenced = false;
    note_instruction(3 + static_cast<uint64_t>(pending));
  });
}

}  // namespace lowrank_ops::simulator
