// The library's ops: schemas, the checks that memory safety needs, and tensors to launcher arguments.
//
// Internal to lowrank_ops: `lowrank_ops/ops/*/_cuda.py` calls them after the public ops have validated their arguments.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "covariance/covariance.h"
#include "host_device.h"
#include "lowrank_linear/lowrank_linear.h"
#include "remember.h"
#include "tensors.h"
#include "torch_cuda.h"

namespace lowrank_ops {
namespace {

using torch::stable::Tensor;

std::string on_arch(const Machine& machine) { return " on sm_" + std::to_string(machine.capability); }

Tensor scratch_like(const Tensor& tensor, int64_t floats) {
  return torch::stable::new_empty(tensor, {floats}, torch::headeronly::ScalarType::Float);
}

auto key_of(const Machine& machine) {
  return std::tuple{machine.capability, machine.sm_count, machine.shared_memory, machine.clusters};
}
auto key_of(const Choice& choice) { return std::tuple{choice.kernel, choice.splits, choice.token_tile}; }

// ---- covariance_update_ ----

const CovariancePlan& planned(const CovarianceProblem& problem) {
  const auto& [tokens, features, groups, dtype, source, machine, allow_tf32, choice] = problem;
  return remember(std::tuple{tokens, features, groups, dtype, source, key_of(machine), allow_tf32, key_of(choice)},
                  [&] { return plan_covariance(problem); });
}

void add_covariance(const char* op, covariance::Arguments args, Source source, bool allow_tf32, const Choice& choice,
                    const Tensor& second_moment, const Tensor& total, const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  const Machine& machine = machine_of(x.get_device_index());
  const Dtype dtype = dtype_of(x);
  const CovariancePlan& plan =
      planned({args.tokens, args.features, args.groups, dtype, source, machine, allow_tf32, choice});
  const auto what = [&] { return std::string(op) + " of x " + shape_of(x) + on_arch(machine); };
  STD_TORCH_CHECK(plan.reason.empty(), what(), " cannot run: ", plan.reason);
  STD_TORCH_CHECK(second_moment.scalar_type() == total.scalar_type(), what(), ": the state has two dtypes");

  args.x = x.const_data_ptr();
  args.second_moment = second_moment.mutable_data_ptr();
  args.total = total.mutable_data_ptr();
  args.state_is_double = dtype_of(second_moment) == Dtype::float64;
  STD_TORCH_CHECK(args.state_is_double || dtype_of(second_moment) == Dtype::float32, what(),
                  ": the state must be float32 or float64");
  args.tiles = plan.tiles;
  args.whole = plan.whole;
  args.splits = plan.splits;
  args.tokens_per_split = plan.tokens_per_split;
  std::optional<Tensor> scratch;  // freed when the launches are queued: the caching allocator is stream-ordered
  if (plan.scratch_floats) scratch = scratch_like(x, plan.scratch_floats);
  args.scratch = scratch ? static_cast<float*>(scratch->mutable_data_ptr()) : nullptr;
  const Launch launch{current_stream(x.get_device_index()), x.get_device_index(), machine.shared_memory, what};
#ifdef LOWRANK_OPS_SM90
  if (plan.kernel == "covariance_sm90") return covariance::launch_sm90(plan, args, dtype, launch);
  if (plan.kernel == "covariance_sm90_wide") return covariance::launch_sm90_wide(plan, args, dtype, launch);
#endif
  covariance::launch_sm80(plan, args, dtype, source, launch);
}

void covariance_update(Tensor second_moment, Tensor total, Tensor x, bool allow_tf32, std::string kernel,
                       int64_t splits, int64_t token_tile) {
  STD_TORCH_CHECK(x.dim() == 2 && second_moment.dim() == 2 && total.dim() == 1, "x and the state must be matrices");
  const int64_t features = x.size(1);
  STD_TORCH_CHECK(second_moment.size(0) == features && second_moment.size(1) == features && total.size(0) == features &&
                      (features == 1 || x.stride(1) == 1),
                  "the state does not fit x of shape ", shape_of(x));
  covariance::Arguments args{};
  args.tokens = x.size(0);
  args.features = features;
  args.groups = 1;
  args.x_row_stride = x.stride(0);
  args.state_row_stride = second_moment.stride(0);
  args.state_col_stride = second_moment.stride(1);
  args.total_stride = total.stride(0);
  add_covariance("covariance_update_", args, aligned(x) ? Source::aligned_matrix : Source::matrix, allow_tf32,
                 {kernel, splits, token_tile}, second_moment, total, x);
}

void conv_covariance_update(Tensor second_moment, Tensor total, Tensor x, std::vector<int64_t> kernel_size,
                            std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                            bool allow_tf32, std::string kernel, int64_t splits, int64_t token_tile) {
  STD_TORCH_CHECK(x.dim() == 4 && second_moment.dim() == 3 && total.dim() == 2, "x must be an image batch");
  for (const std::vector<int64_t>* geometry : {&kernel_size, &stride, &padding, &dilation})
    STD_TORCH_CHECK(geometry->size() == 2, "kernel_size, stride, padding and dilation are (height, width)");
  const int64_t groups = total.size(0), features = total.size(1);
  const int64_t channels = x.size(1) / groups;
  STD_TORCH_CHECK(channels * groups == x.size(1) && channels * kernel_size[0] * kernel_size[1] == features &&
                      second_moment.size(0) == groups && second_moment.size(1) == features &&
                      second_moment.size(2) == features,
                  "the state does not fit x of shape ", shape_of(x));
  covariance::Patches patches{};
  patches.channels = static_cast<int>(channels);
  patches.height = static_cast<int>(x.size(2));
  patches.width = static_cast<int>(x.size(3));
  patches.kernel_height = static_cast<int>(kernel_size[0]);
  patches.kernel_width = static_cast<int>(kernel_size[1]);
  patches.stride_y = static_cast<int>(stride[0]);
  patches.stride_x = static_cast<int>(stride[1]);
  patches.padding_y = static_cast<int>(padding[0]);
  patches.padding_x = static_cast<int>(padding[1]);
  patches.dilation_y = static_cast<int>(dilation[0]);
  patches.dilation_x = static_cast<int>(dilation[1]);
  patches.out_height = covariance::output_length(patches.height, patches.kernel_height, patches.stride_y,
                                                 patches.padding_y, patches.dilation_y);
  patches.out_width = covariance::output_length(patches.width, patches.kernel_width, patches.stride_x,
                                                patches.padding_x, patches.dilation_x);
  patches.image_stride = x.stride(0);
  patches.channel_stride = x.stride(1);
  patches.row_stride = x.stride(2);
  patches.col_stride = x.stride(3);

  covariance::Arguments args{};
  args.patches = patches;
  args.tokens = x.size(0) * patches.out_height * patches.out_width;
  args.features = features;
  args.groups = groups;
  args.x_group_stride = channels * x.stride(1);
  args.state_group_stride = second_moment.stride(0);
  args.state_row_stride = second_moment.stride(1);
  args.state_col_stride = second_moment.stride(2);
  args.total_group_stride = total.stride(0);
  args.total_stride = total.stride(1);
  add_covariance("conv_covariance_update_", args, Source::patches, allow_tf32, {kernel, splits, token_tile},
                 second_moment, total, x);
}

// (reason for refusal, plan): one of the two is empty. The list of compiled archs is here, not in the planner.
template <class Plan>
std::tuple<std::string, std::string> explain(const Plan& plan, int64_t capability) {
  std::string reason = plan.reason;
  if (reason.empty()) reason = arch_refusal(LOWRANK_OPS_ARCHS, static_cast<int>(capability));
  return {reason, reason.empty() ? describe(plan) : ""};
}

std::tuple<std::string, std::string> explain_covariance(int64_t tokens, int64_t features, int64_t groups,
                                                        std::string dtype, std::string source, bool allow_tf32,
                                                        int64_t capability, int64_t sm_count, int64_t shared_memory,
                                                        std::vector<int64_t> clusters, std::string kernel,
                                                        int64_t splits, int64_t token_tile) {
  const Machine machine = parse_machine(capability, sm_count, shared_memory, clusters);
  return explain(plan_covariance({tokens,
                                  features,
                                  groups,
                                  parse_dtype(dtype),
                                  parse_source(source),
                                  machine,
                                  allow_tf32,
                                  {kernel, splits, token_tile}}),
                 capability);
}

// ---- lowrank_linear ----

lowrank_linear::Activation parse_activation(const std::string& name) {
  using lowrank_linear::Activation;
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  STD_TORCH_CHECK(name == "silu", "activation must be none, relu, gelu, gelu_tanh or silu; got ", name);
  return Activation::silu;
}

const LowRankPlan& planned(const LowRankProblem& problem) {
  const auto& [tokens, in_features, rank, out_features, dtype, aligned, machine, choice, others, shared] = problem;
  return remember(std::tuple{tokens, in_features, rank, out_features, dtype, aligned, key_of(machine), key_of(choice),
                             others, shared},
                  [&] { return plan_lowrank_linear(problem); });
}

void launch_lowrank_linear(const LowRankPlan& plan, const lowrank_linear::Group& group, Dtype dtype,
                           const Launch& launch) {
#ifdef LOWRANK_OPS_SM90
  if (plan.kernel == "decode_sm90") return lowrank_linear::launch_decode_sm90(plan, group, dtype, launch);
  if (plan.kernel == "prefill_sm90") return lowrank_linear::launch_prefill_sm90(plan, group, dtype, launch);
#endif
  lowrank_linear::launch_decode_sm80(plan, group, dtype, launch);
}

// The outputs of all members. `downs` holds one for each of `ups`, or one for all.
std::vector<Tensor> forward(const Tensor& x, const std::vector<Tensor>& downs, const std::vector<Tensor>& ups,
                            const std::vector<std::optional<Tensor>>& biases, const std::string& activation,
                            const Choice& choice) {
  STD_TORCH_CHECK(!ups.empty() && ups.size() <= kMaxMembers && biases.size() == ups.size() &&
                      (downs.size() == ups.size() || downs.size() == 1),
                  "lowrank_linear takes 1 to ", kMaxMembers, " members");
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  const DeviceGuard guard(x.get_device_index());
  const Machine& machine = machine_of(x.get_device_index());
  const auto what = [&] {
    std::string text = "lowrank_linear of x " + shape_of(x);
    for (const Tensor& down : downs) text += ", down " + shape_of(down);
    for (const Tensor& up : ups) text += ", up " + shape_of(up);
    return text + on_arch(machine);
  };
  const auto is_row_major = [](const Tensor& matrix) { return matrix.size(1) == 1 || matrix.stride(1) == 1; };
  STD_TORCH_CHECK(is_row_major(x), what(), ": a matrix is not row-major");
  const bool shared = downs.size() < ups.size();
  bool on_16_bytes = aligned(x);
  std::vector<int64_t> ranks, outs;
  lowrank_linear::Group group{};
  group.count = static_cast<int>(ups.size());
  group.downs = static_cast<int>(downs.size());
  for (size_t i = 0; i < ups.size(); ++i) {
    const Tensor &down = downs[shared ? 0 : i], &up = ups[i];
    const std::optional<Tensor>& bias = biases[i];
    STD_TORCH_CHECK(down.dim() == 2 && up.dim() == 2, "down and up must be matrices");
    lowrank_linear::Arguments& args = group.members[i];
    args.tokens = x.size(0);
    args.in_features = x.size(1);
    args.rank = down.size(0);
    args.out_features = up.size(0);
    STD_TORCH_CHECK(down.size(1) == args.in_features && up.size(1) == args.rank, what(), ": shapes do not fit");
    for (const Tensor* factor : {&down, &up}) {
      STD_TORCH_CHECK(x.scalar_type() == factor->scalar_type(), what(), ": dtypes differ");
      STD_TORCH_CHECK(is_row_major(*factor), what(), ": a matrix is not row-major");
      on_16_bytes = on_16_bytes && aligned(*factor);
    }
    if (bias)
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == args.out_features && bias->is_contiguous() &&
                          bias->scalar_type() == x.scalar_type(),
                      what(), ": bias does not fit");
    args.x = x.const_data_ptr();
    args.down = down.const_data_ptr();
    args.up = up.const_data_ptr();
    args.bias = bias ? bias->const_data_ptr() : nullptr;
    args.x_stride = x.stride(0);
    args.down_stride = down.stride(0);
    args.up_stride = up.stride(0);
    args.activation = parse_activation(activation);
    group.rank = max64(group.rank, args.rank);
    ranks.push_back(args.rank);
    outs.push_back(args.out_features);
  }
  const Dtype dtype = dtype_of(x);
  const LowRankPlan& plan =
      planned(group_problem(x.size(0), x.size(1), ranks, outs, shared, dtype, on_16_bytes, machine, choice));
  STD_TORCH_CHECK(plan.reason.empty(), what(), " cannot run: ", plan.reason);

  std::optional<Tensor> scratch;
  if (plan.scratch_floats) scratch = scratch_like(x, plan.scratch_floats);
  std::vector<Tensor> ys;
  for (int i = 0; i < group.count; ++i) {
    lowrank_linear::Arguments& args = group.members[i];
    ys.push_back(torch::stable::new_empty(x, {args.tokens, args.out_features}));
    args.y = ys.back().mutable_data_ptr();
    args.scratch = scratch ? static_cast<float*>(scratch->mutable_data_ptr()) : nullptr;
    args.split_features = plan.split_features;
    args.splits = plan.splits;
    args.resident_tiles = plan.resident_tiles;
  }
  const Launch launch{current_stream(x.get_device_index()), x.get_device_index(), machine.shared_memory, what};
  launch_lowrank_linear(plan, group, dtype, launch);
  return ys;
}

Tensor lowrank_linear_forward(Tensor x, Tensor down, Tensor up, std::optional<Tensor> bias, std::string activation,
                              std::string kernel, int64_t splits, int64_t token_tile) {
  return forward(x, {down}, {up}, {bias}, activation, {kernel, splits, token_tile})[0];
}

std::vector<Tensor> lowrank_linear_grouped_forward(Tensor x, std::vector<Tensor> downs, std::vector<Tensor> ups,
                                                   std::vector<std::optional<Tensor>> biases, std::string kernel,
                                                   int64_t splits, int64_t token_tile) {
  return forward(x, downs, ups, biases, "none", {kernel, splits, token_tile});
}

std::tuple<std::string, std::string> explain_lowrank_linear(
    int64_t tokens, int64_t in_features, std::vector<int64_t> ranks, std::vector<int64_t> out_features, bool shared,
    std::string dtype, bool aligned, int64_t capability, int64_t sm_count, int64_t shared_memory,
    std::vector<int64_t> clusters, std::string kernel, int64_t splits, int64_t token_tile) {
  const Machine machine = parse_machine(capability, sm_count, shared_memory, clusters);
  return explain(plan_lowrank_linear(group_problem(tokens, in_features, ranks, out_features, shared, parse_dtype(dtype),
                                                   aligned, machine, {kernel, splits, token_tile})),
                 capability);
}

// ---- the device and the library ----

// Machine::clusters.
std::tuple<int64_t, int64_t, int64_t> clusters(int64_t device) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  const auto [twos, fours, eights] = machine_of(static_cast<int32_t>(device)).clusters;
  return {twos, fours, eights};
}

// "13.3" from the form of CUDA's macros and functions.
std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// The CUDA toolkit that compiled the library, such as "13.3".
std::string cuda_toolkit() { return dotted(CUDART_VERSION); }

// The newest CUDA that the driver knows; empty where there is none.
std::string cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess && version > 0 ? dotted(version) : "";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_ops, m) {
  m.def("_cuda_toolkit() -> str");
  m.def(
      "_cuda_covariance_update_(Tensor(a!) second_moment, Tensor(b!) total, Tensor x, bool allow_tf32, "
      "str kernel=\"\", int splits=0, int token_tile=0) -> ()");
  m.def(
      "_cuda_conv_covariance_update_(Tensor(a!) second_moment, Tensor(b!) total, Tensor x, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, bool allow_tf32, str kernel=\"\", int splits=0, "
      "int token_tile=0) -> ()");
  m.def(
      "_cuda_lowrank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias, str activation, str kernel=\"\", "
      "int splits=0, int token_tile=0) -> Tensor");
  m.def(
      "_cuda_lowrank_linear_grouped(Tensor x, Tensor[] downs, Tensor[] ups, Tensor?[] biases, str kernel=\"\", "
      "int splits=0, int token_tile=0) -> Tensor[]");
  m.def(
      "_plan_covariance(int tokens, int features, int groups, str dtype, str source, bool allow_tf32, "
      "int capability, int sm_count, int shared_memory, int[] clusters, str kernel=\"\", int splits=0, "
      "int token_tile=0) -> (str, str)");
  m.def(
      "_plan_lowrank_linear(int tokens, int in_features, int[] ranks, int[] out_features, bool shared, str dtype, "
      "bool aligned, int capability, int sm_count, int shared_memory, int[] clusters, str kernel=\"\", int splits=0, "
      "int token_tile=0) -> (str, str)");
  m.def("_clusters(int device) -> (int, int, int)");
  m.def("_cuda_driver() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_ops, CUDA, m) {
  m.impl("_cuda_covariance_update_", TORCH_BOX(&covariance_update));
  m.impl("_cuda_conv_covariance_update_", TORCH_BOX(&conv_covariance_update));
  m.impl("_cuda_lowrank_linear", TORCH_BOX(&lowrank_linear_forward));
  m.impl("_cuda_lowrank_linear_grouped", TORCH_BOX(&lowrank_linear_grouped_forward));
}

// No tensor among the arguments: the only key that such a call reaches.
STABLE_TORCH_LIBRARY_IMPL(lowrank_ops, CompositeExplicitAutograd, m) {
  m.impl("_cuda_toolkit", TORCH_BOX(&cuda_toolkit));
  m.impl("_plan_covariance", TORCH_BOX(&explain_covariance));
  m.impl("_plan_lowrank_linear", TORCH_BOX(&explain_lowrank_linear));
  m.impl("_clusters", TORCH_BOX(&clusters));
  m.impl("_cuda_driver", TORCH_BOX(&cuda_driver));
}

}  // namespace lowrank_ops
