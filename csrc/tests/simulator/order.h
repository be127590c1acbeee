// What happens before what, told to ThreadSanitizer where the simulator is built for it (LOWRANK_OPS_RACES): the kernels'
// accesses are then held against the synchronization that they asked for, and not against the order of this run.
#pragma once

#ifdef LOWRANK_OPS_RACES
#include <sanitizer/tsan_interface.h>

extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

namespace lowrank_ops::simulator {

#ifdef LOWRANK_OPS_RACES
inline void happened(const void* event) { __tsan_release(const_cast<void*>(event)); }
inline void after(const void* event) { __tsan_acquire(const_cast<void*>(event)); }

// The simulator's own memory, whose threads take turns.
struct Unwatched {
  Unwatched() { __tsan_ignore_thread_begin(); }
  ~Unwatched() { __tsan_ignore_thread_end(); }
};
// What the kernels ask for, in the midst of that.
struct Watched {
  Watched() { __tsan_ignore_thread_end(); }
  ~Watched() { __tsan_ignore_thread_begin(); }
};
// The copy engine, which knows only of what it is told.
class ByCopyEngine {
 public:
  ByCopyEngine() : before_(__tsan_get_current_fiber()) {
    static void* const engine = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(engine, __tsan_switch_to_fiber_no_sync);
  }
  ~ByCopyEngine() { __tsan_switch_to_fiber(before_, __tsan_switch_to_fiber_no_sync); }

 private:
  void* before_;
};
#else
inline void happened(const void*) {}
inline void after(const void*) {}
struct Unwatched {
  ~Unwatched() {}
};
struct Watched {
  ~Watched() {}
};
struct ByCopyEngine {
  ~ByCopyEngine() {}
};
#endif

}  // namespace lowrank_ops::simulator
