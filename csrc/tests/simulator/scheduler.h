// The inside of the simulated device: the state of threads, warps, CTAs, clusters and kernels, and the scheduler.
#pragma once

#include <array>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "fiber.h"

namespace lowrank_ops::simulator {

constexpr int kLanes = 32;
// A CTA's shared memory: reserved bytes, static variables, dynamic memory with no more alignment than is guaranteed.
// All of it is below 2^18, the range of a wgmma descriptor.
constexpr int64_t kSystemBytes = 1024, kStaticBytes = 12 << 10, kDynamicStart = kSystemBytes + kStaticBytes + 128;
constexpr int64_t kCanaryBytes = 256;
constexpr unsigned char kPoison = 0xFF;  // NaN in every dtype
// Stands for the mbarrier's bits, which the simulator keeps elsewhere: shows writes over an mbarrier.
constexpr uint64_t kMbarrierBits = 0x5AFEBA221E25C0DEu;

struct Thread;
struct Warp;
struct Cta;
struct Cluster;
struct Kernel;
using Work = std::function<void()>;

// Threads that wait for the same event.
using Queue = std::vector<Thread*>;

struct Thread {
  Position position;
  Warp* warp;
  Cta* cta;
  std::unique_ptr<Fiber> fiber;
  const char* waits_for = nullptr;
  bool in_cluster_barrier = false;
  int64_t cluster_phase = 0;
  std::deque<std::vector<Work>> copies{1};  // groups of cp.async, the last one open
};

struct Warp {
  std::vector<Thread*> runnable;
  bool listed = false;  // among the scheduler's warps
  // convergence
  const char* converging_at = nullptr;
  int arrived = 0;
  std::array<void*, kLanes> arguments{};
  Queue waiting;
  // wgmma
  std::deque<std::vector<Work>> wgmmas{1};
  bool fenced = false;
  uint64_t instructions = 0;  // a hash of them, in their order
};

struct Mbarrier {
  int count, pending;
  int64_t bytes = 0;  // pending tx-count
  int parity = 0;
  const Thread* unfenced = nullptr;  // who initialized it, until the fence
  Queue waiting;
};

// A barrier of all threads of a CTA, a cluster or a grid that have not exited.
class Rendezvous {
 public:
  int64_t arrive(int live);  // the phase to wait for
  void wait(int64_t phase, const char* name);
  void settle(int live);  // also after a thread has exited
  bool was_passed() const { return phase_ > 0; }

 private:
  int arrived_ = 0;
  int64_t phase_ = 0;
  char events_[2];  // the last two phases
  Queue waiting_;
};

struct Cta {
  Kernel* kernel;
  Cluster* cluster;
  int rank;
  std::vector<unsigned char> memory;
  unsigned char* base;  // address 0
  int64_t static_used = kSystemBytes;
  std::map<int, void*> statics;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  int live = 0, tma_in_flight = 0;
  char fenced;  // event: accesses before fence.proxy.async
  Rendezvous barrier;
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  int live = 0;
  Rendezvous barrier;
};

struct Kernel {
  GridShape shape;
  const void* function;
  Work body;
  std::vector<int64_t> to_start;  // first CTA of every cluster that has not started, the next one last
  std::list<std::unique_ptr<Cluster>> clusters;
  int live = 0;
  char launched, a_thread_ended;  // events
  Rendezvous barrier;
  Kernel* before = nullptr;
  Queue dependents;
  bool ended() const { return to_start.empty() && live == 0; }
};

class Device {
 public:
  std::vector<std::unique_ptr<Kernel>> kernels;  // launched and not completed
  std::unordered_map<const void*, int64_t> allowed_bytes;
  Thread* self = nullptr;
  std::string fault;
  std::mt19937 random;
  std::vector<Warp*> warps;  // with runnable threads
  std::vector<Work> tma;     // copies in flight
  std::list<std::unique_ptr<Cluster>> ended;

  void run();
  void wait_until_woken(Queue& queue, const char* what);
  void wake(Queue& queue);
  void make_runnable(Thread* thread);
  bool coin() { return random() & 1; }

 private:
  bool start_ctas(Kernel& kernel);
  void start_cluster(Kernel& kernel, int64_t first_cta);
  void run_warp();
  void resume(Thread* thread);
  void thread_ended(Thread* thread);
  void check_ended(Cta& cta);
  [[noreturn]] void give_up(std::string what);
  std::string hang() const;
};

Device& device();
void expect_intact(const Cta& cta, uint32_t barrier);

}  // namespace lowrank_ops::simulator
