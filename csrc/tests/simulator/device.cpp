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

// Groups of work by a thread or a warp: closed, and done at once if so decided.
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

// The block of an address: this one, or another one of its cluster, which must have started and not ended.
Block& block_of(uint32_t address) {
  Block* block = self().block;
  if (address >= kBlockAddress) {
    const uint32_t rank = address / kBlockAddress - 1;
    expect(rank < block->cluster->blocks.size(), "an address of a block of the cluster");
    block = block->cluster->blocks[rank].get();
    expect(block == self().block || block->cluster->barrier.was_passed(),
           "a barrier of the cluster before another block's memory is used: it may not have started");
    expect(block->live > 0, "an address of a block that has not ended");
  }
  return *block;
}

MemoryBarrier& barrier_at(Block& block, uint32_t address) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) fail("a barrier is used that was not initialised");
  expect_intact(block, address);
  return found->second;
}

void settle(MemoryBarrier& barrier) {
  constexpr int64_t kMostBytes = (1 << 20) - 1;
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) fail("a barrier counts more bytes than it can");
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
  if (!shape.may_overlap) synchronize();
  const auto allowed = device().allowed_bytes.find(function);
  if (shape.shared_bytes > (allowed == device().allowed_bytes.end() ? int64_t{48} << 10 : allowed->second))
    throw std::runtime_error("simulated device: a kernel asks for more shared memory than it was allowed");
  if (shape.shared_bytes > config().shared_memory)
    throw std::runtime_error("simulated device: a kernel asks for more shared memory than the device has");
  const int64_t blocks = int64_t{shape.blocks.x} * shape.blocks.y * shape.blocks.z;
  const int64_t threads = int64_t{shape.threads.x} * shape.threads.y * shape.threads.z;
  if (blocks < 1 || shape.blocks.y > 65535 || shape.blocks.z > 65535 || threads < 1 || threads > 1024)
    throw std::runtime_error("simulated device: a grid that no device takes");
  if (shape.cluster < 1 || shape.cluster > 8 || shape.blocks.x % static_cast<unsigned>(shape.cluster) != 0)
    throw std::runtime_error("simulated device: clusters that no device takes");
  if ((shape.in_clusters || shape.may_overlap) && config().capability < 90)
    throw std::runtime_error("simulated device: a launch that needs compute capability 9.0");
  if (shape.all_at_once && blocks > config().multiprocessors)  // one a multiprocessor, as its kernels are planned
    throw std::runtime_error("simulated device: a cooperative grid that does not fit the device");
  auto kernel = std::make_unique<Kernel>();
  kernel->shape = shape;
  kernel->function = function;
  kernel->body = std::move(body);
  for (int64_t first = 0; first < blocks; first += shape.cluster) kernel->to_start.push_back(first);
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

void* dynamic_shared() { return self().block->base + kDynamicStart; }

void* static_shared(int place, int64_t bytes) {
  const Unwatched unwatched;
  Block& block = *self().block;
  void*& memory = block.statics[place];
  if (memory == nullptr) {
    memory = block.base + block.static_used;
    block.static_used += (bytes + 15) / 16 * 16;
    expect(block.static_used <= kSystemBytes + kStaticBytes, "static shared memory within the simulator's limit");
    expect(block.static_used - kSystemBytes + block.kernel->shape.shared_bytes <= config().shared_memory,
           "static and dynamic shared memory that the device has");
  }
  return memory;
}

uint32_t shared_address(const void* pointer) {
  const Block& block = *self().block;
  const int64_t offset = static_cast<const unsigned char*>(pointer) - block.base;
  expect(offset >= kSystemBytes && offset <= kDynamicStart + block.kernel->shape.shared_bytes,
         "a pointer to this block's shared memory");
  return static_cast<uint32_t>(offset);
}

unsigned char* shared_bytes(uint32_t address, int64_t bytes, int64_t alignment) {
  const Block& block = block_of(address);
  address %= kBlockAddress;
  expect(address % alignment == 0, "an aligned address");
  expect(address >= kSystemBytes && address + bytes <= kDynamicStart + block.kernel->shape.shared_bytes,
         "an address within the block's shared memory");
  return block.base + address;
}

void* in_block(const void* pointer, int rank) {
  return shared_bytes(kBlockAddress * (static_cast<uint32_t>(rank) + 1) + shared_address(pointer), 1, 1);
}

// ---- meeting others ----

void meet_warp(const char* name, void* mine, const std::function<void(void* const* lanes)>& body) {
  Warp& warp = *self().warp;
  if (warp.arrived && std::strcmp(warp.meeting, name) != 0)
    fail(std::string("lanes of a warp meet at ") + warp.meeting + " and at " + name);
  warp.meeting = name;
  warp.brought[static_cast<size_t>(position().lane)] = mine;
  happened(&warp);
  if (++warp.arrived < kLanes) {
    device().block_until_woken(warp.waiting, name);
    return after(&warp);
  }
  after(&warp);
  warp.arrived = 0;
  body(warp.brought.data());
  happened(&warp);
  device().wake(warp.waiting);
}

void sync_warp() {
  meet_warp("__syncwarp", nullptr, [](void* const*) {});
}

void sync_block() {
  Block& block = *self().block;
  block.barrier.wait(block.barrier.arrive(block.live), "__syncthreads");
}

void arrive_cluster() {
  Thread& thread = self();
  Cluster& cluster = *thread.block->cluster;
  expect(!thread.in_cluster_barrier, "a wait between two arrivals at the cluster's barrier");
  thread.in_cluster_barrier = true;
  thread.cluster_phase = cluster.barrier.arrive(cluster.live);
}

void wait_cluster() {
  Thread& thread = self();
  expect(thread.in_cluster_barrier, "an arrival before a wait at the cluster's barrier");
  thread.block->cluster->barrier.wait(thread.cluster_phase, "the cluster's barrier");
  thread.in_cluster_barrier = false;
}

void sync_grid() {
  Kernel& kernel = *self().block->kernel;
  expect(kernel.shape.all_at_once, "a cooperative launch, where the grid has a barrier");
  kernel.barrier.wait(kernel.barrier.arrive(kernel.live), "the grid's barrier");
}

void wait_for_kernel_before() {
  Kernel* before = self().block->kernel->before;
  while (before != nullptr && !before->ended()) device().block_until_woken(before->after, "the kernel before");
  if (before != nullptr) after(&before->a_thread_ended);
}

// ---- barriers in shared memory ----

void init_barrier(uint32_t address, int arrivals) {
  unsigned char* there = shared_bytes(address, 8, 8);
  expect(arrivals > 0 && arrivals < 1 << 20, "a barrier for 1 to 2^20 - 1 arrivals");
  const Unwatched unwatched;
  Block& block = *self().block;
  expect(block.barriers.count(address) == 0, "a barrier that is initialised once");
  std::memcpy(there, &kBarrierBits, 8);
  block.barriers[address] = MemoryBarrier{arrivals, arrivals, 0, 0, &self(), {}};
}

void fence_barrier_init() {
  for (auto& [address, barrier] : self().block->barriers)
    if (barrier.unfenced == &self()) barrier.unfenced = nullptr;
  fence_before_copies();
}

void arrive(uint32_t address, int64_t expected_bytes) {
  MemoryBarrier& barrier = barrier_at(block_of(address), address % kBlockAddress);
  barrier.bytes += expected_bytes;
  happened(&barrier);
  if (--barrier.pending < 0) fail("more threads arrive at a barrier than it counts");
  settle(barrier);
}

void wait(uint32_t address, int parity) {
  expect(parity == 0 || parity == 1, "a parity of 0 or 1");
  MemoryBarrier& barrier = barrier_at(*self().block, address);
  while (barrier.parity == parity) device().block_until_woken(barrier.waiting, "a barrier in shared memory");
  after(&barrier);
}

// ---- asynchronous work ----

void fence_before_copies() { happened(&self().block->fenced); }

void copy_later(uint32_t address, int64_t bytes, Work copy) {
  Block* block = &block_of(address);
  const Block* fences = self().block;  // of whoever asks for the copy
  MemoryBarrier* barrier = &barrier_at(*block, address % kBlockAddress);
  expect(barrier->unfenced == nullptr, "fence.mbarrier_init and fence.proxy.async before the copy engine uses a barrier");
  ++block->copies_under_way;
  Work work = [block, fences, barrier, address, bytes, copy = std::move(copy)] {
    {
      const ByCopyEngine engine;
      after(&block->kernel->launched);
      after(&block->fenced);
      after(&fences->fenced);
      copy();
      happened(barrier);
    }
    --block->copies_under_way;
    expect_intact(*block, address % kBlockAddress);
    barrier->bytes -= bytes;
    settle(*barrier);
  };
  if (config().timing == Timing::early || config().timing == Timing::copies_first) return work();
  const Unwatched unwatched;
  device().engine.push_back(std::move(work));
}

void add_copy(Work copy) {
  const Unwatched unwatched;
  self().copies.back().push_back(std::move(copy));
}
void commit_copies() { commit(self().copies, config().timing == Timing::copies_first); }
void wait_copies(int pending) { wait_for(self().copies, pending); }

void note_instruction(uint64_t what) {
  uint64_t& all = self().warp->instructions;
  all = (all ^ what) * 0x9E3779B97F4A7C15u + 1;
  all ^= all >> 29;
}
void fence_products() {
  meet_warp("wgmma.fence", nullptr, [](void* const*) {
    self().warp->fenced = true;
    note_instruction(1);
  });
}
void add_product(Work product) {
  expect(self().warp->fenced, "wgmma.fence between what touched the accumulators and the next product");
  const Unwatched unwatched;
  self().warp->products.back().push_back(std::move(product));
}
void commit_products() {
  meet_warp("wgmma.commit_group", nullptr, [](void* const*) {
    commit(self().warp->products, false);
    note_instruction(2);
  });
}
void wait_products(int pending) {
  meet_warp("wgmma.wait_group", nullptr, [pending](void* const*) {
    wait_for(self().warp->products, pending);
    self().warp->fenced = false;
    note_instruction(3 + static_cast<uint64_t>(pending));
  });
}

}  // namespace lowrank_ops::simulator
