// The simulated device from the inside: what threads, warps, blocks, clusters and kernels are waiting for, and who is next.
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
// A block's own shared memory: what the system keeps, static variables, then dynamic memory that starts on no more than
// a kernel may ask for. All of it below 2^18, which is what a matrix descriptor can tell.
constexpr int64_t kSystemBytes = 1024, kStaticBytes = 12 << 10, kDynamicStart = kSystemBytes + kStaticBytes + 128;
constexpr int64_t kCanaryBytes = 256;
constexpr unsigned char kPoison = 0xFF;  // NaN in every dtype
// In place of a barrier's own bits, which the simulator keeps elsewhere: what overwrites a barrier shows.
constexpr uint64_t kBarrierBits = 0x5AFEBA221E25C0DEu;

struct Thread;
struct Warp;
struct Block;
struct Cluster;
struct Kernel;
using Work = std::function<void()>;

// Threads that wait for the same thing.
using Queue = std::vector<Thread*>;

struct Thread {
  Position position;
  Warp* warp;
  Block* block;
  std::unique_ptr<Fiber> fiber;
  const char* waits_for = nullptr;
  bool in_cluster_barrier = false;
  int64_t cluster_phase = 0;
  std::deque<std::vector<Work>> copies{1};  // groups of cp.async, the last one open
};

struct Warp {
  std::vector<Thread*> runnable;
  bool listed = false;  // among the scheduler's warps
  // a meeting
  const char* meeting = nullptr;
  int arrived = 0;
  std::array<void*, kLanes> brought{};
  Queue waiting;
  // wgmma
  std::deque<std::vector<Work>> products{1};
  bool fenced = false;
  uint64_t instructions = 0;  // a hash of them, in their order
};

struct MemoryBarrier {
  int count, pending;
  int64_t bytes = 0;  // still expected
  int parity = 0;
  const Thread* unfenced = nullptr;  // who has initialised it, until that is fenced
  Queue waiting;
};

// Where all threads of a block, a cluster or a grid meet that have not ended.
class Rendezvous {
 public:
  int64_t arrive(int live);  // the phase to wait for
  void wait(int64_t phase, const char* name);
  void settle(int live);  // also when a thread has ended
  bool was_passed() const { return phase_ > 0; }

 private:
  int arrived_ = 0;
  int64_t phase_ = 0;
  char events_[2];  // the last two phases
  Queue waiting_;
};

struct Block {
  Kernel* kernel;
  Cluster* cluster;
  int rank;
  std::vector<unsigned char> memory;
  unsigned char* base;  // address 0
  int64_t static_used = kSystemBytes;
  std::map<int, void*> statics;
  std::map<uint32_t, MemoryBarrier> barriers;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  int live = 0, copies_under_way = 0;
  char fenced;  // what threads did before fences for the copy engine
  Rendezvous barrier;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int live = 0;
  Rendezvous barrier;
};

struct Kernel {
  GridShape shape;
  const void* function;
  Work body;
  std::vector<int64_t> to_start;  // first blocks of clusters that have not started, the next one last
  std::list<std::unique_ptr<Cluster>> clusters;
  int live = 0;
  char launched, a_thread_ended;  // events
  Rendezvous barrier;
  Kernel* before = nullptr;
  Queue after;
  bool ended() const { return to_start.empty() && live == 0; }
};

class Device {
 public:
  std::vector<std::unique_ptr<Kernel>> kernels;  // launched and not ended
  std::unordered_map<const void*, int64_t> allowed_bytes;
  Thread* self = nullptr;
  std::string fault;
  std::mt19937 random;
  std::vector<Warp*> warps;  // with runnable threads
  std::vector<Work> engine;  // copies under way
  std::list<std::unique_ptr<Cluster>> ended;

  void run();
  void block_until_woken(Queue& queue, const char* what);
  void wake(Queue& queue);
  void make_runnable(Thread* thread);
  bool coin() { return random() & 1; }

 private:
  bool start_blocks(Kernel& kernel);
  void start_cluster(Kernel& kernel, int64_t first_block);
  void run_warp();
  void resume(Thread* thread);
  void thread_ended(Thread* thread);
  void check_ended(Block& block);
  [[noreturn]] void give_up(std::string what);
  std::string hang() const;
};

Device& device();
void expect_intact(const Block& block, uint32_t barrier);

}  // namespace lowrank_ops::simulator
