// A thread of the simulated device: a stack of its own on one host thread.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <functional>

namespace lowrank_ops::simulator {

class Fiber {
 public:
  explicit Fiber(std::function<void()> body);
  ~Fiber();
  Fiber(const Fiber&) = delete;

  void resume();  // from the scheduler: runs the fiber until it leaves or ends
  void leave();   // from the fiber: back to the scheduler
  bool ended() const { return ended_; }

 private:
  static void enter(unsigned low, unsigned high);

  std::function<void()> body_;
  void *stack_, *known_as_;  // the latter to ThreadSanitizer
  bool started_ = false, ended_ = false;
#ifdef LOWRANK_OPS_RACES
  ucontext_t here_, scheduler_;
  void* scheduler_known_as_;
#else
  ucontext_t first_;
  jmp_buf here_, scheduler_;  // once started: unlike ucontext, these switch without asking the kernel
#endif
};

}  // namespace lowrank_ops::simulator
