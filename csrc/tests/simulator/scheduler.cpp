#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "order.h"

namespace lowrank_ops::simulator {
namespace {

constexpr int kMostThreads = 2400;  // of blocks that need not run at once

uint3 position_of(int64_t index, const dim3& size) {
  return {static_cast<unsigned>(index % size.x), static_cast<unsigned>(index / size.x % size.y),
          static_cast<unsigned>(index / size.x / size.y)};
}

}  // namespace

Device& device() {
  static Device device;
  return device;
}

void expect_intact(const Block& block, uint32_t barrier) {
  const Unwatched unwatched;
  if (std::memcmp(block.base + barrier, &kBarrierBits, 8) != 0) fail("a barrier has been overwritten");
}

int64_t Rendezvous::arrive(int live) {
  const int64_t phase = phase_;
  happened(&events_[phase % 2]);
  ++arrived_;
  settle(live);
  return phase;
}

void Rendezvous::settle(int live) {
  if (arrived_ == 0 || arrived_ < live) return;
  arrived_ = 0;
  ++phase_;
  device().wake(waiting_);
}

void Rendezvous::wait(int64_t phase, const char* name) {
  while (phase_ == phase) device().block_until_woken(waiting_, name);
  after(&events_[phase % 2]);
}

// ---- starting ----

void Device::start_cluster(Kernel& kernel, int64_t first_block) {
  const GridShape& shape = kernel.shape;
  auto cluster = std::make_unique<Cluster>();
  const int threads = static_cast<int>(shape.threads.x * shape.threads.y * shape.threads.z);
  for (int rank = 0; rank < shape.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->kernel = &kernel;
    block->cluster = cluster.get();
    block->rank = rank;
    const int64_t bytes = kDynamicStart + shape.shared_bytes;
    block->memory.assign(bytes + kCanaryBytes + 1024, kPoison);
    block->base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block->memory.data()) + 1023) / 1024 * 1024);
    for (int i = 0; i < threads; ++i) {
      if (i % kLanes == 0) block->warps.push_back(std::make_unique<Warp>());
      auto thread = std::make_unique<Thread>();
      thread->position = {{static_cast<unsigned>(i), 0, 0}, position_of(first_block + rank, shape.blocks), shape.blocks,
                          i % kLanes, i / kLanes, rank, shape.cluster};
      thread->warp = block->warps.back().get();
      thread->block = block.get();
      thread->fiber = std::make_unique<Fiber>([&kernel] {
        after(&kernel.launched);
        kernel.body();
        happened(&kernel.a_thread_ended);
      });
      make_runnable(thread.get());
      block->threads.push_back(std::move(thread));
    }
    block->live = threads;
    cluster->blocks.push_back(std::move(block));
  }
  happened(&kernel.launched);
  cluster->live = threads * shape.cluster;
  kernel.live += cluster->live;
  kernel.clusters.push_back(std::move(cluster));
}

// As many blocks as fit; false if there is none to start or no room.
bool Device::start_blocks(Kernel& kernel) {
  const int threads = static_cast<int>(kernel.shape.threads.x * kernel.shape.threads.y * kernel.shape.threads.z);
  bool started = false;
  while (!kernel.to_start.empty()) {
    int live = 0;
    for (const auto& other : kernels) live += other->live;
    if (live > 0 && !kernel.shape.all_at_once && live + threads * kernel.shape.cluster > kMostThreads) break;
    const int64_t first = kernel.to_start.back();
    kernel.to_start.pop_back();
    start_cluster(kernel, first);
    started = true;
  }
  return started;
}

// ---- scheduling ----

void Device::make_runnable(Thread* thread) {
  thread->waits_for = nullptr;
  thread->warp->runnable.push_back(thread);
  if (!thread->warp->listed) {
    thread->warp->listed = true;
    warps.push_back(thread->warp);
  }
}

void Device::wake(Queue& queue) {
  const Unwatched unwatched;
  Queue threads;
  threads.swap(queue);
  for (Thread* thread : threads) make_runnable(thread);
}

void Device::block_until_woken(Queue& queue, const char* what) {
  const Unwatched unwatched;
  Thread* thread = self;
  thread->waits_for = what;
  queue.push_back(thread);
  thread->fiber->leave();
}

void Device::resume(Thread* thread) {
  self = thread;
  thread->fiber->resume();
  self = nullptr;
  if (!fault.empty()) give_up(fault);
  if (thread->fiber->ended()) thread_ended(thread);
}

void Device::thread_ended(Thread* thread) {
  Block& block = *thread->block;
  Cluster& cluster = *block.cluster;
  Kernel& kernel = *block.kernel;
  after(&kernel.a_thread_ended);
  const char* name = "a thread ended";
  if (thread->in_cluster_barrier) give_up(std::string(name) + " between arriving at the cluster's barrier and waiting");
  for (const auto& group : thread->copies)
    if (!group.empty()) give_up(std::string(name) + " with copies it had not waited for");
  --block.live, --cluster.live, --kernel.live;
  block.barrier.settle(block.live);
  cluster.barrier.settle(cluster.live);
  kernel.barrier.settle(kernel.live);
  if (block.live == 0) check_ended(block);
  if (cluster.live == 0)  // freed when nobody is in the midst of it
    ended.splice(ended.end(), kernel.clusters,
                 std::find_if(kernel.clusters.begin(), kernel.clusters.end(),
                              [&](const auto& other) { return other.get() == &cluster; }));
  if (kernel.ended()) wake(kernel.after);
}

void Device::check_ended(Block& block) {
  if (block.copies_under_way) give_up("a block ended while the copy engine was still to write to it");
  for (const auto& warp : block.warps) {
    if (warp->arrived) give_up(std::string("a warp ended while some of its lanes were at ") + warp->meeting);
    for (const auto& group : warp->products)
      if (!group.empty()) give_up("a warp ended with products it had not waited for");
  }
  for (size_t i = 0; i < block.warps.size(); ++i) {
    const size_t first = i / 4 * 4, last = std::min(first + 4, block.warps.size());
    if (block.warps[i]->instructions != block.warps[first]->instructions ||
        (block.warps[i]->instructions != 0 && last - first != 4))
      give_up("the four warps of a warpgroup have not executed the same wgmma instructions");
  }
  for (const auto& [address, barrier] : block.barriers) expect_intact(block, address);
  const unsigned char* end = block.base + kDynamicStart + block.kernel->shape.shared_bytes;
  for (int64_t i = 0; i < kCanaryBytes; ++i)
    if (end[i] != kPoison) give_up("a block wrote past the end of its shared memory");
}

std::string Device::hang() const {
  std::map<std::string, std::vector<std::string>> waiting;
  for (const auto& kernel : kernels)
    for (const auto& cluster : kernel->clusters)
      for (const auto& block : cluster->blocks)
        for (const auto& thread : block->threads)
          if (!thread->fiber->ended()) {
            const Position& at = thread->position;
            waiting[thread->waits_for ? thread->waits_for : "its turn"].push_back(
                "(" + std::to_string(at.block.x) + ", " + std::to_string(at.thread.x) + ")");
          }
  std::ostringstream text;
  text << "no thread can go on;";
  for (const auto& [what, threads] : waiting) {
    text << " " << threads.size() << " wait for " << what << ", as (block, thread)";
    for (size_t i = 0; i < std::min<size_t>(threads.size(), 3); ++i) text << " " << threads[i];
    text << ";";
  }
  return text.str();
}

void Device::give_up(std::string what) {
  kernels.clear();
  ended.clear();
  engine.clear();
  warps.clear();
  fault.clear();
  self = nullptr;
  throw std::runtime_error("simulated device: " + what);
}

void Device::run() {
  const Unwatched unwatched;
  const Timing timing = config().timing;
  while (true) {
    ended.clear();
    bool started = false;
    for (const auto& kernel : kernels) {  // a later one only when all blocks of the one before have started
      started |= start_blocks(*kernel);
      if (!kernel->to_start.empty()) break;
    }
    if (!engine.empty() && (warps.empty() || (timing == Timing::random && random() % 4 == 0))) {
      const size_t i = random() % engine.size();
      const Work copy = std::move(engine[i]);
      engine.erase(engine.begin() + static_cast<long>(i));
      const Watched watched;
      copy();
    } else if (!warps.empty()) {
      run_warp();
    } else if (!started) {
      for (const auto& kernel : kernels)
        if (!kernel->ended()) give_up(hang());
      kernels.clear();
      return;
    }
  }
}

// Some steps of some lanes of a warp.
void Device::run_warp() {
  const size_t i = random() % warps.size();
  Warp& warp = *warps[i];
  for (int steps = 1 << random() % 9; steps > 0 && !warp.runnable.empty(); --steps) {
    const size_t lane = random() % warp.runnable.size();
    Thread* thread = warp.runnable[lane];
    warp.runnable[lane] = warp.runnable.back();
    warp.runnable.pop_back();
    resume(thread);
  }
  if (!warp.runnable.empty()) return;
  warp.listed = false;
  warps.erase(std::find(warps.begin(), warps.end(), &warp));
}

}  // namespace lowrank_ops::simulator
