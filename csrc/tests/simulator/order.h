// Happens-before edges for ThreadSanitizer (LOWRANK_OPS_RACES): the kernels' accesses are checked against their own
// synchronization, not against the order of this run.
#pragma once

#ifdef LOWRANK_OPS_RACES
#include <sanitizer/tsan_interface.h>

extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

namespace lowrank_ops::simulator {

#ifdef LOWRANK_OPS_RACES
inline void release(const void* event) { __tsan_release(const_cast<void*>(event)); }
inline void acquire(const void* event) { __tsan_acquire(const_cast<void*>(event)); }

// Ignores accesses by the simulator itself, whose fibers take turns.
struct Unwatched {
  Unwatched() { __tsan_ignore_thread_begin(); }
  ~Unwatched() { __tsan_ignore_thread_end(); }
};
// The kernels' accesses within such a scope.
struct Watched {
  Watched() { __tsan_ignore_thread_end(); }
  ~Watched() { __tsan_ignore_thread_begin(); }
};
// The async proxy: a thread of its own, ordered only by fences and mbarriers.
class ByAsyncProxy {
 public:
  ByAsyncProxy() : before_(__tsan_get_current_fiber()) {
    static void* const async_proxy = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(async_proxy, __tsan_switch_to_fiber_no_sync);
  }
  ~ByAsyncProxy() { __tsan_switch_to_fiber(before_, __tsan_switch_to_fiber_no_sync); }

 private:
  void* before_;
};
#else
inline void release(const void*) {}
inline void acquire(const void*) {}
struct Unwatched {
  ~Unwatched() {}
};
struct Watched {
  ~Watched() {}
};
struct ByAsyncProxy {
  ~ByAsyncProxy() {}
};
#endif

}  // namespace lowrank_ops::simulator
