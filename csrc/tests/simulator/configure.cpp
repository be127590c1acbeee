// The simulated device's settings, as an op beside those of csrc/ops.cpp.
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>
#include <tuple>

#include "device.h"

namespace lowrank_ops {
namespace {

void configure(int64_t capability, int64_t sm_count, int64_t shared_memory, int64_t seed, std::string timing) {
  simulator::Config& config = simulator::config();
  config.capability = static_cast<int>(capability);
  config.sm_count = static_cast<int>(sm_count);
  config.shared_memory = shared_memory;
  config.seed = static_cast<unsigned>(seed);
  const std::map<std::string, simulator::Timing> timings{{"early", simulator::Timing::early},
                                                         {"late", simulator::Timing::late},
                                                         {"copies_first", simulator::Timing::copies_first},
                                                         {"random", simulator::Timing::random}};
  const auto found = timings.find(timing);
  STD_TORCH_CHECK(found != timings.end(), "timing must be early, late, copies_first or random; got ", timing);
  config.timing = found->second;
}

std::tuple<int64_t, int64_t> host_calls() {
  const simulator::HostCalls& calls = simulator::host_calls();
  return {calls.tensor_maps, calls.function_attributes};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_ops_simulated, m) {
  m.def("configure(int capability, int sm_count, int shared_memory, int seed, str timing) -> ()");
  m.def("host_calls() -> (int, int)");
}
STABLE_TORCH_LIBRARY_IMPL(lowrank_ops_simulated, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("host_calls", TORCH_BOX(&host_calls));
}

}  // namespace lowrank_ops
