#include "planner.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "covariance/tiles.h"
#include "covariance/wide_tiles.h"
#include "lowrank_linear/decode_layout.h"
#include "lowrank_linear/prefill_layout.h"

namespace lowrank_ops {
namespace {

constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridYZ = 65535;
constexpr int64_t kReservedSharedBytes = 1024;  // per CTA, by the system
constexpr int64_t kMaxScratchBytes = int64_t{256} << 20;
constexpr int kMaxSplits = 64;  // of a tile's tokens

// Whether code for `arch` ("80", "90a", "100f", ...) runs on a device: on the same major version from its own minor
// version on; arch-specific code on its own device only. The Tegra devices (8.7, 10.1) run only their own code.
bool serves(const std::string& arch, int capability) {
  const int built = std::stoi(arch);
  if (arch.back() == 'a' || capability == 87 || capability == 101) return built == capability;
  return built / 10 == capability / 10 && built <= capability;
}

std::string machine_refusal(const Machine& machine) {
  if (machine.capability == 0) return "it needs a CUDA device";
  if (machine.capability < 80)
    return "it needs compute capability 8.0 or newer, the device has " + std::to_string(machine.capability / 10) + "." +
           std::to_string(machine.capability % 10);
  return "";
}

const char* name(Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return "bfloat16";
    case Dtype::float16: return "float16";
    case Dtype::float32: return "float32";
    case Dtype::float64: return "float64";
  }
  return "";
}

std::string cannot_split(const Choice& choice) {
  return "it cannot split its work over " + std::to_string(choice.splits) + " CTAs";
}

// Why a choice of splits is refused, where rounding gives `splits`; empty where it is not.
std::string splits_refusal(const Choice& choice, int64_t splits, int64_t max_splits) {
  return choice.splits == 0 || (choice.splits == splits && splits <= max_splits) ? "" : cannot_split(choice);
}

// CTAs of the device that are resident at once.
int64_t resident_ctas(const Machine& machine, int64_t shared_bytes, int ctas_by_registers) {
  int64_t by_shared = (machine.shared_memory + kReservedSharedBytes) / (shared_bytes + kReservedSharedBytes);
  return machine.sm_count * max64(1, min64(by_shared, ctas_by_registers));
}

// The split-K with the lowest cost: whole waves of CTAs, each of its steps and a fixed part for prologue and epilogue,
// and the reduction kernel where there is more than one split.
int best_splits(int64_t tiles, int edge, int64_t tokens, int block_tokens, int64_t resident) {
  const int64_t fixed_steps = 512 / block_tokens;
  const int64_t second_kernel_steps = 768 / block_tokens;
  int64_t steps = ceil_div(tokens, block_tokens);
  int best = 1;
  int64_t min_cost = std::numeric_limits<int64_t>::max();
  for (int splits = 1; splits <= min64(kMaxSplits, max64(1, steps)); ++splits) {
    if (splits > 1 && covariance::partial_offset(0, splits, 0, splits, tiles, edge) * 4 > kMaxScratchBytes) break;
    int64_t waves = ceil_div(tiles * splits, resident);
    int64_t cost = waves * (ceil_div(steps, splits) + fixed_steps) + (splits > 1 ? second_kernel_steps + splits : 0);
    if (cost < min_cost) {
      min_cost = cost;
      best = splits;
    }
  }
  return best;
}

}  // namespace

Dtype parse_dtype(const std::string& name) {
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  throw std::invalid_argument("dtype must be bfloat16, float16, float32 or float64; got " + name);
}

std::string arch_refusal(const std::string& archs, int capability) {
  std::istringstream list(archs);
  for (std::string arch; std::getline(list, arch, ',');)
    if (serves(arch, capability)) return "";
  return "the native library was built for " + archs + " and has no code for sm_" + std::to_string(capability);
}

// A cluster lies within a GPC, of at most 18 SMs. Where the runtime was not asked: as many GPCs as the SMs need, which
// share them equally. H100 and H200 with 132 SMs in GPCs of 16 and 18 hold no fewer.
int64_t resident_clusters(const Machine& machine, int ctas) {
  constexpr int64_t kMaxGpcSms = 18;
  if (ctas == 1) return machine.sm_count;
  const int64_t counted = machine.clusters[ctas == 2 ? 0 : ctas == 4 ? 1 : 2];
  if (counted >= 0) return counted;
  if (ctas == 2) return machine.sm_count / 2;  // SMs come in pairs
  const int64_t gpcs = max64(1, ceil_div(machine.sm_count, kMaxGpcSms));
  return gpcs * (machine.sm_count / gpcs / ctas);
}

Machine parse_machine(int64_t capability, int64_t sm_count, int64_t shared_memory,
                      const std::vector<int64_t>& clusters) {
  Machine machine{static_cast<int>(capability), static_cast<int>(sm_count), shared_memory};
  if (!clusters.empty() && clusters.size() != machine.clusters.size())
    throw std::invalid_argument("clusters must be none, or the counts of clusters of 2, 4 and 8 CTAs");
  std::copy(clusters.begin(), clusters.end(), machine.clusters.begin());
  return machine;
}

Source parse_source(const std::string& name) {
  if (name == "matrix") return Source::matrix;
  if (name == "aligned_matrix") return Source::aligned_matrix;
  if (name == "patches") return Source::patches;
  throw std::invalid_argument("source must be matrix, aligned_matrix or patches; got " + name);
}

CovariancePlan plan_covariance(const CovarianceProblem& problem) {
  using namespace covariance;
  CovariancePlan plan;
  const auto refuse = [&](const std::string& reason) {
    plan.reason = reason;
    return plan;
  };
  if (std::string reason = machine_refusal(problem.machine); !reason.empty()) return refuse(reason);
  if (problem.dtype == Dtype::float64) return refuse("it takes bfloat16, float16 or float32, not float64");
  if (problem.tokens < 1 || problem.features < 1 || problem.groups < 1) return refuse("there is nothing to add");
  if (problem.groups > kMaxGridYZ)
    return refuse("it takes at most 65535 groups, got " + std::to_string(problem.groups));
  if (problem.features > std::numeric_limits<int32_t>::max() / kTile ||
      triangle(ceil_div(problem.features, kTile)) > kMaxGridX)
    return refuse("the second moment has more tiles than a grid has CTAs");
  if (problem.source == Source::patches && problem.tokens > std::numeric_limits<int32_t>::max())
    return refuse("it takes at most 2^31 - 1 patches, got " + std::to_string(problem.tokens));
  if (problem.tokens > int64_t{1} << 35)
    return refuse("it takes at most 2^35 tokens, got " + std::to_string(problem.tokens));

  plan.tf32 = problem.allow_tf32 && problem.dtype == Dtype::float32;
  const bool split_in_parts = problem.dtype == Dtype::float32 && !plan.tf32;
  const bool async = problem.source == Source::aligned_matrix && !split_in_parts;
  const bool fits_sm90 = async && !plan.tf32 && problem.machine.capability == 90 && problem.groups == 1 &&
                         problem.tokens <= std::numeric_limits<int32_t>::max() - wgmma::kTokens;
  const int64_t clusters = resident_clusters(problem.machine, wide::kClusterCtas);
  const bool fits_wide = fits_sm90 && clusters > 0;
  const std::string& chosen = problem.choice.kernel;
  if (problem.choice.token_tile != 0) return refuse("only prefill_sm90 has a choice of tokens per CTA");
  if (!chosen.empty() && chosen != "covariance_sm80" && !(chosen == "covariance_sm90" && fits_sm90) &&
      !(chosen == "covariance_sm90_wide" && fits_wide))
    return refuse(chosen + " does not run this problem");
  // The wide kernel where its squares, shared or not, fill the clusters, and few of them are half empty.
  constexpr int64_t kMinWideFeatures = 1024;
  const int64_t squares = triangle(ceil_div(problem.features, wide::kTile));
  const int64_t shares = min64(kMaxSplits, ceil_div(problem.tokens, wide::kTokens));
  const bool prefers_wide = fits_wide && problem.features >= kMinWideFeatures && squares * shares >= clusters;
  int64_t static_bytes = kStaticSharedBytes;
  plan.tile = kTile;
  if (chosen == "covariance_sm90_wide" || (chosen.empty() && prefers_wide)) {
    plan.kernel = "covariance_sm90_wide";
    plan.tile = wide::kTile;
    plan.block_tokens = wide::kTokens;
    plan.stages = wide::kStages;
    plan.threads = wide::kThreads;
    plan.shared_bytes = wide::kSharedBytes;
    static_bytes = wgmma::kStaticSharedBytes;
  } else if (fits_sm90 && chosen != "covariance_sm80") {
    plan.kernel = "covariance_sm90";
    plan.block_tokens = wgmma::kTokens;
    plan.stages = wgmma::kStages;
    plan.threads = wgmma::kThreads;
    plan.shared_bytes = wgmma::kSharedBytes;
    static_bytes = wgmma::kStaticSharedBytes;
  } else {
    plan.kernel = "covariance_sm80";
    plan.block_tokens = kTokens;
    // Two CTAs of four stages need 139 KB per SM, which 8.0, 9.0 and 10.0 have; 8.6, 8.9 and 12.0 have 100 KB, enough
    // for one CTA of five stages. Stages of float32 are twice as large.
    plan.stages = !async || plan.tf32 ? 2 : problem.machine.shared_memory >= (int64_t{139} << 10) ? 4 : 5;
    plan.threads = kThreads;
    plan.shared_bytes =
        plan.stages * 2 * (plan.tf32 ? Layout<4>::kBytes : Layout<2>::kBytes * (split_in_parts ? 2 : 1));
  }
  if (plan.shared_bytes + static_bytes > problem.machine.shared_memory)
    return refuse("it needs " + std::to_string(plan.shared_bytes + static_bytes) +
                  " bytes of shared memory per CTA, the device has " + std::to_string(problem.machine.shared_memory));
  const bool is_wide = plan.tile == wide::kTile;
  plan.tiles = triangle(ceil_div(problem.features, plan.tile));
  const int64_t resident =
      is_wide ? clusters
              : resident_ctas(problem.machine, plan.shared_bytes + static_bytes, async && plan.stages != 5 ? 2 : 1);
  int64_t splits = problem.choice.splits;
  if (splits < 0 || splits > kMaxSplits) return refuse(cannot_split(problem.choice));
  // Wide tiles that fill whole waves of clusters are not split, only those of the last, partial wave.
  int64_t split_tiles = is_wide ? plan.tiles % resident : plan.tiles;
  if (splits == 0)
    splits = split_tiles == 0
                 ? 1
                 : best_splits(split_tiles * problem.groups, plan.tile, problem.tokens, plan.block_tokens, resident);
  plan.tokens_per_split = round_up(ceil_div(problem.tokens, splits), plan.block_tokens);
  plan.splits = static_cast<int>(ceil_div(problem.tokens, plan.tokens_per_split));
  if (plan.splits == 1 && is_wide) split_tiles = 0;
  plan.whole = plan.tiles - split_tiles;
  if (plan.splits > 1)
    plan.scratch_floats =
        partial_sum_offset(problem.groups, 0, 0, problem.groups, plan.splits, split_tiles, problem.features, plan.tile);
  const int64_t partials = partial_offset(problem.groups, 0, 0, 1, split_tiles, plan.tile) * 4;
  const int64_t max_splits = partials ? max64(1, min64(kMaxSplits, kMaxScratchBytes / partials)) : 1;
  plan.reason = splits_refusal(problem.choice, plan.splits, max_splits);
  return plan;
}

std::string describe(const CovariancePlan& plan) {
  if (!plan.reason.empty()) return "cannot run: " + plan.reason;
  std::ostringstream out;
  out << plan.kernel << ": " << (plan.tf32 ? "TensorFloat-32, " : "") << "tile " << plan.tile << "x" << plan.tile
      << ", " << plan.block_tokens << " tokens x " << plan.stages << " stages, ";
  if (plan.whole) out << plan.whole << " tiles whole, ";
  if (plan.whole < plan.tiles)
    out << plan.tiles - plan.whole << " tiles x " << plan.splits << " splits of " << plan.tokens_per_split
        << " tokens, ";
  out << plan.threads << " threads, " << plan.shared_bytes << " bytes of shared memory, " << plan.scratch_floats
      << " floats of scratch";
  return out.str();
}

namespace {

// The sum of count(rank) over the downs of a group: one that all members share, or one for each member.
template <class Count>
int64_t sum_over_downs(const LowRankProblem& problem, const Count& count) {
  int64_t sum = count(problem.rank);
  for (const auto& [rank, out_features] : problem.others) sum += problem.shared ? 0 : count(rank);
  return sum;
}

int64_t max_rank(const LowRankProblem& problem) {
  int64_t max = problem.rank;
  for (const auto& [rank, out_features] : problem.others) max = max64(max, rank);
  return max;
}

// Whether every row of x, down and up consists of whole vectors of 16 bytes.
bool rows_in_vectors(const LowRankProblem& problem) {
  using lowrank_linear::kVector;
  const auto odd = [](int64_t rank) { return int64_t{rank % kVector != 0}; };
  return problem.aligned && problem.in_features % kVector == 0 && sum_over_downs(problem, odd) == 0;
}

// Two kernels, for any alignment and every machine.
LowRankPlan plan_decode_sm80(const LowRankProblem& problem) {
  using namespace lowrank_linear;
  LowRankPlan plan;
  plan.kernel = "decode_sm80";
  const int64_t largest_rank = max_rank(problem);
  plan.vectorized = rows_in_vectors(problem);
  // A CTA keeps t of its tokens in shared memory: a smaller token tile where the rank is large.
  const auto up_bytes = [&](int token_tile) {
    return max64(token_tile * rank_pitch(largest_rank), sum_bytes(kRows * up_row_tiles(token_tile), token_tile));
  };
  plan.token_tile = kDecodeSm80Variants[0].token_tile;
  for (const DecodeVariant& variant : kDecodeSm80Variants) {
    if (variant.vectorized != plan.vectorized) continue;
    const bool needed = plan.token_tile < problem.tokens;  // the smaller tile does not hold all tokens
    if (needed && up_bytes(variant.token_tile) <= problem.machine.shared_memory) plan.token_tile = variant.token_tile;
  }
  plan.threads = kThreads;
  plan.rows_down = kRows;
  plan.rows_up = kRows * up_row_tiles(plan.token_tile);
  plan.shared_bytes_down = sum_bytes(plan.rows_down, plan.token_tile);
  plan.shared_bytes_up = up_bytes(plan.token_tile);
  if (plan.shared_bytes_up > problem.machine.shared_memory) {
    plan.reason = "rank " + std::to_string(largest_rank) + " needs " + std::to_string(plan.shared_bytes_up) +
                  " bytes of shared memory per CTA, the device has " + std::to_string(problem.machine.shared_memory);
    return plan;
  }
  // Few rows of down: split its features, but keep a warp's share worth starting and the sums of t cheap to read.
  constexpr int64_t kMinSteps = 2 * kWarps;
  constexpr int64_t kMaxOwnSplits = 8;
  constexpr int64_t kMaxChosenSplits = 32;
  int64_t steps = ceil_div(problem.in_features, kFeatures);
  const int64_t units = sum_over_downs(problem, [](int64_t rank) { return ceil_div(rank, kRows); });
  int64_t splits_for_all_sms = problem.machine.sm_count / units;
  int64_t splits = max64(1, min64(min64(splits_for_all_sms, kMaxOwnSplits), steps / kMinSteps));
  if (problem.choice.splits > 0) splits = min64(problem.choice.splits, steps);
  plan.split_features = ceil_div(steps, splits) * kFeatures;
  plan.splits = static_cast<int>(ceil_div(problem.in_features, plan.split_features));
  plan.reason = splits_refusal(problem.choice, plan.splits, kMaxChosenSplits);
  plan.scratch_floats = sum_over_downs(
      problem, [&](int64_t rank) { return scratch_floats(problem.tokens, rank, plan.token_tile, plan.splits); });
  plan.dependent_launch = problem.machine.capability >= 90;
  return plan;
}

// One cooperative kernel with clusters and bulk copies; a reason where it does not run.
LowRankPlan plan_decode_sm90(const LowRankProblem& problem) {
  using namespace lowrank_linear;
  LowRankPlan plan;
  plan.kernel = "decode_sm90";
  const Machine& machine = problem.machine;
  if (machine.capability != 90) {
    plan.reason = "it needs compute capability 9.0";
    return plan;
  }
  if (!rows_in_vectors(problem)) {
    plan.reason = "rows do not start and end on 16 bytes";
    return plan;
  }
  // All tokens at once, but at least one tile of up: a smaller token tile if need be.
  const int64_t largest_rank = max_rank(problem);
  const int64_t tile_bytes = kRows * rank_pitch(largest_rank);
  const auto max_resident_tiles = [&](int rows) {
    return (machine.shared_memory - smem_layout(rows, plan.token_tile, largest_rank, 0).bytes) / tile_bytes;
  };
  plan.token_tile = decode_token_tile(problem.tokens);
  while (plan.token_tile > 8 && max_resident_tiles(kRows) < 1) plan.token_tile /= 2;
  if (max_resident_tiles(kRows) < 1) {
    plan.reason = "rank " + std::to_string(largest_rank) + " leaves no room for a tile of up in " +
                  std::to_string(machine.shared_memory) + " bytes of shared memory";
    return plan;
  }
  plan.threads = kThreads;
  plan.rows_up = kRows;

  // The rows and the cluster with the lowest cost, in 16-byte vectors of a lane: for down waves of work units, each of
  // a warp's steps, which load rows and tokens, and a reduction; for up the tiles that do not fit and are streamed.
  const int64_t steps = ceil_div(problem.in_features, kFeatures);
  int64_t tiles_up = ceil_div(problem.out_features, kRows);
  for (const auto& [rank, out_features] : problem.others) tiles_up += ceil_div(out_features, kRows);
  int64_t min_cost = std::numeric_limits<int64_t>::max();
  for (const DecodeSm90Variant& v : kDecodeSm90Variants) {
    if (v.token_tile != plan.token_tile || max_resident_tiles(v.rows()) < 1) continue;
    const int64_t units =
        sum_over_downs(problem, [&](int64_t rank) { return work_units(rank, v.rows(), problem.tokens, v.token_tile); });
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      if (problem.choice.splits != 0 && problem.choice.splits != cluster) continue;
      const int64_t clusters = min64(resident_clusters(machine, cluster), max64(units, ceil_div(tiles_up, cluster)));
      if (clusters == 0) continue;
      const int64_t tiles = ceil_div(tiles_up, clusters * cluster);
      const int64_t resident_tiles = min64(max_resident_tiles(v.rows()), tiles);
      const int64_t reduction = 24 + v.rows() * v.token_tile / 256;
      const int64_t down = ceil_div(ceil_div(steps, cluster), kWarps) * (v.rows() + v.token_tile) + reduction;
      const int64_t streamed = (tiles - resident_tiles) * kRows * ceil_div(ceil_div(largest_rank, kFeatures), kWarps);
      const int64_t cost = ceil_div(units, clusters) * down + streamed;
      if (cost >= min_cost) continue;
      min_cost = cost;
      plan.splits = plan.cluster = cluster;
      plan.rows_down = v.rows();
      plan.ctas = clusters * cluster;
      plan.resident_tiles = resident_tiles;
    }
  }
  if (plan.splits == 0) {
    plan.reason = cannot_split(problem.choice);
    return plan;
  }
  // The last CTAs of a cluster may have no features; they still reduce their part of the sums.
  plan.split_features = ceil_div(steps, plan.splits) * kFeatures;
  plan.shared_bytes = smem_layout(plan.rows_down, plan.token_tile, largest_rank, plan.resident_tiles).bytes;
  plan.scratch_floats = sum_over_downs(problem, [&](int64_t rank) { return t_floats(problem.tokens, rank); });
  return plan;
}

// The cost of a prefill kernel in cycles: waves of clusters; per CTA the steps over features, each bound by its MMAs or
// by its loads, and the rows of up. A wgmma takes N / 2 cycles of the tensor cores, and of shared memory, at 128 bytes
// a cycle, its operands: 32 N bytes of B and, unless A is in registers as t is, 2048 of A. A CTA gets 25 bytes a cycle
// from L2 while all read; the epilogue of a tile of up takes 600, by one warpgroup while the others compute; a CTA's
// start 2000. Members of a group count as the largest of them. None of these is measured.
int64_t prefill_cycles(const lowrank_linear::prefill::Variant& v, const LowRankProblem& problem, int64_t tiles,
                       int64_t clusters) {
  using namespace lowrank_linear::prefill;
  const auto step = [&](int64_t mma, int64_t mmas, int64_t bytes) {
    return max64(mma * mmas * v.warpgroups, bytes / 25);
  };
  const int64_t waves = ceil_div(tiles, clusters);
  int64_t out_features = problem.out_features;
  for (const auto& [rank, other] : problem.others) out_features = max64(out_features, other);
  const int64_t load_bytes = x_bytes(v) / v.cluster + v.columns() * kRowBytes / v.peers;
  const int64_t down = ceil_div(problem.in_features, kTileK) *
                       step(max64(v.columns() / 2, (2048 + 32 * v.columns()) / 128), kTileK / kMmaK, load_bytes);
  const int64_t up = up_tiles(0, v.cluster, out_features) *
                     (step(kTileN / 2, v.steps(), up_step_bytes(v) / v.peers) + 600 / v.warpgroups);
  return waves * (down + up + 2000);
}

// Many tokens: one kernel that keeps t on the chip.
LowRankPlan plan_prefill_sm90(const LowRankProblem& problem) {
  using namespace lowrank_linear::prefill;
  LowRankPlan plan;
  plan.kernel = "prefill_sm90";
  const auto refuse = [&](const std::string& reason) {
    plan.reason = "it takes at most " + std::to_string(lowrank_linear::kMaxTokens) + " tokens, got " +
                  std::to_string(problem.tokens) + "; for more, " + reason;
    return plan;
  };
  const Machine& machine = problem.machine;
  const Choice& choice = problem.choice;
  if (machine.capability != 90) return refuse("it needs compute capability 9.0");
  if (!problem.aligned) return refuse("rows of x, down and up must start on 16 bytes");
  const int64_t largest_rank = max_rank(problem), members = 1 + static_cast<int64_t>(problem.others.size());
  if (largest_rank > kMaxRank) return refuse("the rank must be at most 256, got " + std::to_string(largest_rank));
  // TMA has 32-bit row coordinates, also for rows past the last token, up to the end of its tile.
  if (problem.tokens > std::numeric_limits<int32_t>::max() - kMaxTokenTile)
    return refuse("it takes at most 2^31 - " + std::to_string(kMaxTokenTile + 1));
  plan.rows_up = kTileN;
  plan.splits = 1;
  plan.split_features = problem.in_features;

  int64_t min_cost = std::numeric_limits<int64_t>::max();
  for (const Variant& v : kVariants) {
    const int64_t tiles = ceil_div(problem.tokens, v.token_tile()) * members;
    const int64_t clusters = resident_clusters(machine, v.ctas());
    if (v.rank_tile < largest_rank || shared_bytes(v) > machine.shared_memory || clusters == 0) continue;
    if (tiles * v.ctas() > kMaxGridX) continue;
    if (choice.splits != 0 && choice.splits != v.cluster) continue;
    if (choice.token_tile != 0 && choice.token_tile != v.token_tile()) continue;
    const int64_t cost = prefill_cycles(v, problem, tiles, clusters);
    if (cost >= min_cost) continue;
    min_cost = cost;
    plan.token_tile = v.token_tile();
    plan.threads = v.threads();
    plan.rank_tile = v.rank_tile;
    plan.cluster = v.cluster;
    plan.rows_down = v.columns();
    plan.stages = stages(v);
    plan.shared_bytes = shared_bytes(v);
    plan.ctas = tiles * v.ctas();
  }
  if (plan.rank_tile == 0 && (choice.splits != 0 || choice.token_tile != 0))
    return refuse("there is no kernel for " + std::to_string(choice.token_tile) + " tokens and clusters of " +
                  std::to_string(choice.splits) + " (0: any)");
  if (plan.rank_tile == 0)
    return refuse("there is no kernel for " + std::to_string(machine.shared_memory) + " bytes of shared memory and " +
                  std::to_string(machine.sm_count) + " SMs");
  return plan;
}

}  // namespace

LowRankPlan plan_lowrank_linear(const LowRankProblem& problem) {
  const auto refuse = [](const std::string& reason) {
    LowRankPlan plan;
    plan.reason = reason;
    return plan;
  };
  if (std::string reason = machine_refusal(problem.machine); !reason.empty()) return refuse(reason);
  if (problem.dtype != Dtype::bfloat16 && problem.dtype != Dtype::float16)
    return refuse(std::string("it takes bfloat16 or float16, not ") + name(problem.dtype));
  if (problem.others.size() >= kMaxMembers)
    return refuse("it takes at most " + std::to_string(kMaxMembers) + " members");
  auto members = problem.others;
  members.emplace_back(problem.rank, problem.out_features);
  constexpr int64_t kMaxFeatures = int64_t{1} << 30;
  for (const auto& [rank, out_features] : members) {
    if (problem.tokens < 1 || problem.in_features < 1 || rank < 1 || out_features < 1)
      return refuse("a dimension is empty");
    if (problem.in_features > kMaxFeatures || out_features > kMaxFeatures)
      return refuse("it takes at most 2^30 features");
    if (problem.shared && rank != problem.rank) return refuse("members that share down differ in rank");
  }
  const std::string& chosen = problem.choice.kernel;
  const bool decode_chosen = chosen == "decode_sm80" || chosen == "decode_sm90";
  const int64_t max_decode = decode_chosen ? lowrank_linear::kMaxChosenTokens : lowrank_linear::kMaxTokens;
  const bool prefill = problem.tokens > max_decode;
  if (!chosen.empty() && (prefill ? chosen != "prefill_sm90" : !decode_chosen))
    return refuse(chosen + " does not run this problem");
  if (prefill) return plan_prefill_sm90(problem);
  if (problem.choice.token_tile != 0) return refuse("only prefill_sm90 has a choice of tokens per CTA");
  if (chosen != "decode_sm80") {
    const LowRankPlan plan = plan_decode_sm90(problem);
    if (plan.reason.empty() || !chosen.empty()) return plan;
  }
  return plan_decode_sm80(problem);
}

LowRankProblem group_problem(int64_t tokens, int64_t in_features, const std::vector<int64_t>& ranks,
                             const std::vector<int64_t>& out_features, bool shared, Dtype dtype, bool aligned,
                             const Machine& machine, const Choice& choice) {
  if (ranks.empty() || ranks.size() != out_features.size())
    throw std::invalid_argument("ranks and out_features must have one value for each member");
  LowRankProblem problem{tokens, in_features, ranks[0], out_features[0], dtype, aligned, machine, choice};
  for (size_t i = 1; i < ranks.size(); ++i) problem.others.emplace_back(ranks[i], out_features[i]);
  problem.shared = shared;
  return problem;
}

std::string describe(const LowRankPlan& plan) {
  if (!plan.reason.empty()) return "cannot run: " + plan.reason;
  std::ostringstream out;
  out << plan.kernel << ": " << plan.token_tile << " tokens, " << plan.rows_down << " rows of down x " << plan.splits
      << " splits of " << plan.split_features << " features, then " << plan.rows_up << " rows of up, " << plan.threads
      << " threads, ";
  if (plan.kernel == "decode_sm80")
    out << plan.shared_bytes_down << " and " << plan.shared_bytes_up << " bytes of shared memory, ";
  else
    out << plan.ctas << " CTAs in clusters of " << plan.cluster << ", " << plan.shared_bytes
        << " bytes of shared memory, ";
  if (plan.kernel == "decode_sm90") out << plan.resident_tiles * plan.rows_up << " rows of up in it, ";
  if (plan.kernel == "prefill_sm90")
    out << "ranks up to " << plan.rank_tile << ", " << plan.stages << " stages, "
        << (plan.token_tile == lowrank_linear::prefill::kMaxTokenTile ? "pairs of CTAs multicast weights, " : "");
  out << plan.scratch_floats << " floats of scratch" << (plan.dependent_launch ? ", dependent launch" : "");
  return out.str();
}

}  // namespace lowrank_ops
