// What the host path computes once: plans, attributes, tensor maps.
#pragma once

#include <cstddef>
#include <map>
#include <type_traits>
#include <utility>

namespace lowrank_ops {

// make()'s value for `key`, kept per thread, so that there is no lock; one memory for each type of `make`. The
// reference holds until the next call.
template <class Key, class Make>
const auto& remember(const Key& key, const Make& make) {
  constexpr size_t kMaxEntries = 1024;
  thread_local std::map<Key, std::invoke_result_t<const Make&>> values;
  const auto found = values.find(key);
  if (found != values.end()) return found->second;
  auto value = make();
  if (values.size() >= kMaxEntries) values.clear();
  return values.emplace(key, std::move(value)).first->second;
}

}  // namespace lowrank_ops
