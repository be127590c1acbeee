// A test is a main() that counts failed expectations.
#pragma once

#include <cstdio>

namespace lowrank_ops::tests {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void fail(const char* file, int line, const char* what) {
  if (++failures() <= 20) std::fprintf(stderr, "%s:%d: expected %s\n", file, line, what);
}

inline int result() {
  if (failures()) std::fprintf(stderr, "%d expectations failed\n", failures());
  return failures() ? 1 : 0;
}

}  // namespace lowrank_ops::tests

#define EXPECT(condition)                                                         \
  do {                                                                            \
    if (!(condition)) ::lowrank_ops::tests::fail(__FILE__, __LINE__, #condition); \
  } while (false)
