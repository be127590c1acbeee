#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "order.h"

namespace lowrank_ops::simulator {
namespace {

// Of CTAs that need not be co-resident. Under ThreadSanitizer a thread takes 3 MB; accesses of CTAs that run one after
// the other are as unordered to it as those of CTAs that run together, but for two threads that used the same stack.
#ifdef LOWRANK_OPS_RACES
constexpr int kMaxThreads = 800;
#else
constexpr int kMaxThreads = 2400;
#endif

uint3 position_of(int64_t index, const dim3& size) {
  return {static_cast<unsigned>(index % size.x), static_cast<unsigned>(index / size.x % size.y),
          static_cast<unsigned>(index / size.x / size.y)};
}

}  // namespace

Device& device() {
  static Device device;
  return device;
}

void expect_intact(const Cta& cta, uint32_t barrier) {
  const Unwatched unwatched;
  if (std::memcmp(cta.base + barrier, &kMbarrierBits, 8) != 0) fail("an mbarrier has been overwritten");
}

int64_t Rendezvous::arrive(int live) {
  const int64_t phase = phase_;
  release(&events_[phase % 2]);
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
  while (phase_ == phase) device().wait_until_woken(waiting_, name);
  acquire(&events_[phase % 2]);
}

// ---- starting ----

void Device::start_cluster(Kernel& kernel, int64_t first_cta) {
  const GridShape& shape = kernel.shape;
  auto cluster = std::make_unique<Cluster>();
  const int threads = static_cast<int>(shape.threads.x * shape.threads.y * shape.threads.z);
  for (int rank = 0; rank < shape.cluster; ++rank) {
    auto cta = std::make_unique<Cta>();
    cta->kernel = &kernel;
    cta->cluster = cluster.get();
    cta->rank = rank;
    const int64_t bytes = kDynamicStart + shape.shared_bytes;
    cta->memory.assign(bytes + kCanaryBytes + 1024, kPoison);
    cta->base =
        reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(cta->memory.data()) + 1023) / 1024 * 1024);
    for (int i = 0; i < threads; ++i) {
      if (i % kLanes == 0) cta->warps.push_back(std::make_unique<Warp>());
      auto thread = std::make_unique<Thread>();
      thread->position = {{static_cast<unsigned>(i), 0, 0},
                          position_of(first_cta + rank, shape.ctas),
                          shape.ctas,
                          i % kLanes,
                          i / kLanes,
                          rank,
                          shape.cluster};
      thread->warp = cta->warps.back().get();
      thread->cta = cta.get();
      thread->fiber = std::make_unique<Fiber>([&kernel] {
        acquire(&kernel.launched);
        kernel.body();
        release(&kernel.a_thread_ended);
      });
      make_runnable(thread.get());
      cta->threads.push_back(std::move(thread));
    }
    cta->live = threads;
    cluster->ctas.push_back(std::move(cta));
  }
  release(&kernel.launched);
  cluster->live = threads * shape.cluster;
  kernel.live += cluster->live;
  kernel.clusters.push_back(std::move(cluster));
}

// Starts as many CTAs as fit; false if none started.
bool Device::start_ctas(Kernel& kernel) {
  const int threads = static_cast<int>(kernel.shape.threads.x * kernel.shape.threads.y * kernel.shape.threads.z);
  bool started = false;
  while (!kernel.to_start.empty()) {
    int live = 0;
    for (const auto& other : kernels) live += other->live;
    if (live > 0 && !kernel.shape.cooperative && live + threads * kernel.shape.cluster > kMaxThreads) break;
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

void Device::wait_until_woken(Queue& queue, const char* what) {
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
  Cta& cta = *thread->cta;
  Cluster& cluster = *cta.cluster;
  Kernel& kernel = *cta.kernel;
  const char* name = "a thread exited";
  if (thread->in_cluster_barrier) give_up(std::string(name) + " between arriving at the cluster barrier and waiting");
  for (const auto& group : thread->copies)
    if (!group.empty()) give_up(std::string(name) + " with copies it had not waited for");
  --cta.live, --cluster.live, --kernel.live;
  cta.barrier.settle(cta.live);
  cluster.barrier.settle(cluster.live);
  kernel.barrier.settle(kernel.live);
  if (cta.live == 0) check_ended(cta);
  if (cluster.live == 0)  // freed by the next turn of the scheduler
    ended.splice(ended.end(), kernel.clusters,
                 std::find_if(kernel.clusters.begin(), kernel.clusters.end(),
                              [&](const auto& other) { return other.get() == &cluster; }));
  if (!kernel.ended()) return;
  acquire(&kernel.a_thread_ended);  // not before: a CTA that starts is ordered after no other one
  wake(kernel.dependents);
}

void Device::check_ended(Cta& cta) {
  if (cta.tma_in_flight) give_up("a CTA exited while TMA was still to write to it");
  for (const auto& warp : cta.warps) {
    if (warp->arrived) give_up(std::string("a warp exited while some of its lanes were at ") + warp->converging_at);
    for (const auto& group : warp->wgmmas)
      if (!group.empty()) give_up("a warp exited with wgmmas it had not waited for");
  }
  for (size_t i = 0; i < cta.warps.size(); ++i) {
    const size_t first = i / 4 * 4, last = std::min(first + 4, cta.warps.size());
    if (cta.warps[i]->instructions != cta.warps[first]->instructions ||
        (cta.warps[i]->instructions != 0 && last - first != 4))
      give_up("the four warps of a warpgroup have not executed the same wgmma instructions");
  }
  for (const auto& [address, barrier] : cta.mbarriers) expect_intact(cta, address);
  const unsigned char* end = cta.base + kDynamicStart + cta.kernel->shape.shared_bytes;
  for (int64_t i = 0; i < kCanaryBytes; ++i)
    if (end[i] != kPoison) give_up("a CTA wrote past the end of its shared memory");
}

std::string Device::hang() const {
  std::map<std::string, std::vector<std::string>> waiting;
  for (const auto& kernel : kernels)
    for (const auto& cluster : kernel->clusters)
      for (const auto& cta : cluster->ctas)
        for (const auto& thread : cta->threads)
          if (!thread->fiber->ended()) {
            const Position& at = thread->position;
            waiting[thread->waits_for ? thread->waits_for : "its turn"].push_back(
                "(" + std::to_string(at.cta.x) + ", " + std::to_string(at.thread.x) + ")");
          }
  std::ostringstream text;
  text << "deadlock:";
  for (const auto& [what, threads] : waiting) {
    text << " " << threads.size() << " wait for " << what << ", as (CTA, thread)";
    for (size_t i = 0; i < std::min<size_t>(threads.size(), 3); ++i) text << " " << threads[i];
    text << ";";
  }
  return text.str();
}

void Device::give_up(std::string what) {
  kernels.clear();
  ended.clear();
  tma.clear();
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
    for (const auto& kernel : kernels) {  // a dependent one only when all CTAs of its primary have started
      started |= start_ctas(*kernel);
      if (!kernel->to_start.empty()) break;
    }
    if (!tma.empty() && (warps.empty() || (timing == Timing::random && random() % 4 == 0))) {
      const size_t i = random() % tma.size();
      const Work copy = std::move(tma[i]);
      tma.erase(tma.begin() + static_cast<long>(i));
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
