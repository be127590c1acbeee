// The planner as a Python module, for machines where the op library does not load. (why not, plan): one of them is
// empty.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "planner.h"

namespace lowrank_ops {
namespace {

template <class Plan>
std::pair<std::string, std::string> explain(const Plan& plan) {
  return {plan.reason, plan.reason.empty() ? describe(plan) : ""};
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  using pybind11::arg;
  m.doc() = "Which kernel would run a problem, and how.";
  m.def(
      "plan_covariance",
      [](int64_t tokens, int64_t features, int64_t groups, const std::string& dtype, const std::string& source,
         bool allow_tf32, int64_t capability, int64_t sm_count, int64_t shared_memory,
         const std::vector<int64_t>& clusters, const std::string& kernel, int64_t splits, int64_t token_tile) {
        return explain(plan_covariance({tokens,
                                        features,
                                        groups,
                                        parse_dtype(dtype),
                                        parse_source(source),
                                        parse_machine(capability, sm_count, shared_memory, clusters),
                                        allow_tf32,
                                        {kernel, splits, token_tile}}));
      },
      arg("tokens"), arg("features"), arg("groups"), arg("dtype"), arg("source"), arg("allow_tf32"), arg("capability"),
      arg("sm_count"), arg("shared_memory"), arg("clusters"), arg("kernel") = "", arg("splits") = 0,
      arg("token_tile") = 0);
  m.def(
      "plan_lowrank_linear",
      [](int64_t tokens, int64_t in_features, const std::vector<int64_t>& ranks,
         const std::vector<int64_t>& out_features, bool shared, const std::string& dtype, bool aligned,
         int64_t capability, int64_t sm_count, int64_t shared_memory, const std::vector<int64_t>& clusters,
         const std::string& kernel, int64_t splits, int64_t token_tile) {
        const Machine machine = parse_machine(capability, sm_count, shared_memory, clusters);
        return explain(
            plan_lowrank_linear(group_problem(tokens, in_features, ranks, out_features, shared, parse_dtype(dtype),
                                              aligned, machine, {kernel, splits, token_tile})));
      },
      arg("tokens"), arg("in_features"), arg("ranks"), arg("out_features"), arg("shared"), arg("dtype"), arg("aligned"),
      arg("capability"), arg("sm_count"), arg("shared_memory"), arg("clusters"), arg("kernel") = "", arg("splits") = 0,
      arg("token_tile") = 0);
}

}  // namespace lowrank_ops
