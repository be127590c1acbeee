#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "order.h"

namespace lowrank_ops::simulator {
namespace {

constexpr size_t kStackBytes = 128 << 10;

// Stacks are reused: every CTA needs hundreds of them. With each goes what ThreadSanitizer takes for a thread, because
// making one takes longer than what it does; whoever used both before has ended and happened before.
struct Reused {
  void *stack, *known_as;
};
std::vector<Reused>& idle() {
  static std::vector<Reused> idle;
  return idle;
}

Reused take() {
  if (!idle().empty()) {
    const Reused last = idle().back();
    idle().pop_back();
    return last;
  }
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
#ifdef LOWRANK_OPS_RACES
  return {stack, __tsan_create_fiber(0)};
#else
  return {stack, nullptr};
#endif
}

}  // namespace

Fiber::Fiber(std::function<void()> body) : body_(std::move(body)) {
  const Reused reused = take();
  stack_ = reused.stack;
  known_as_ = reused.known_as;
}

Fiber::~Fiber() { idle().push_back({stack_, known_as_}); }

void Fiber::enter(unsigned low, unsigned high) {
  Fiber* fiber = reinterpret_cast<Fiber*>(uintptr_t{high} << 32 | low);
  fiber->body_();
  fiber->ended_ = true;
  fiber->leave();
}

#ifdef LOWRANK_OPS_RACES

void Fiber::resume() {
  if (!started_) {
    started_ = true;
    getcontext(&here_);
    here_.uc_stack.ss_sp = stack_;
    here_.uc_stack.ss_size = kStackBytes;
    here_.uc_link = nullptr;
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(&here_, reinterpret_cast<void (*)()>(&Fiber::enter), 2, static_cast<unsigned>(self),
                static_cast<unsigned>(self >> 32));
  }
  scheduler_known_as_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(known_as_, __tsan_switch_to_fiber_no_sync);
  swapcontext(&scheduler_, &here_);
}

void Fiber::leave() {
  __tsan_switch_to_fiber(scheduler_known_as_, __tsan_switch_to_fiber_no_sync);
  swapcontext(&here_, &scheduler_);
}

#else

void Fiber::resume() {
  if (_setjmp(scheduler_) != 0) return;
  if (started_) _longjmp(here_, 1);
  started_ = true;
  getcontext(&first_);
  first_.uc_stack.ss_sp = stack_;
  first_.uc_stack.ss_size = kStackBytes;
  first_.uc_link = nullptr;
  const uintptr_t self = reinterpret_cast<uintptr_t>(this);
  makecontext(&first_, reinterpret_cast<void (*)()>(&Fiber::enter), 2, static_cast<unsigned>(self),
              static_cast<unsigned>(self >> 32));
  setcontext(&first_);
}

void Fiber::leave() {
  if (_setjmp(here_) == 0) _longjmp(scheduler_, 1);
}

#endif

}  // namespace lowrank_ops::simulator
