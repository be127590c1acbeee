#include "planner.h"

#include <limits>
#include <sstream>
#include <stdexcept>

#include "covariance/tiles.h"
#include "covariance/wide_tiles.h"
#include "lowrank_linear/back_to_back.h"
#include "lowrank_linear/slabs.h"

namespace lowrank_ops {
namespace {

constexpr int64_t kMostGrid = 2147483647;  // blocks along x
constexpr int64_t kMostGridYZ = 65535;
constexpr int64_t kSharedPerMultiprocessor = 1024;  // what the system keeps of each block's shared memory
constexpr int64_t kScratchBytes = int64_t{256} << 20;
constexpr int kMostSplits = 64;  // of a tile's tokens

// Whether code for `arch` ("80", "90a", "100f", ...) runs on a device: its own minor version and later ones of the same
// major, an arch-specific one on its own device only. The Tegra devices (8.7, 10.1) run no code but their own.
bool serves(const std::string& arch, int capability) {
  const int built = std::stoi(arch);
  if (arch.back() == 'a' || capability == 87 || capability == 101) return built == capability;
  return built / 10 == capability / 10 && built <= capability;
}

std::string machine_refusal(const Machine& machine) {
  if (machine.capability == 0) return "it needs a CUDA device";
  if (machine.capability < 80)
    return "it needs compute capability 8.0 or newer, the device has " + std::to_string(machine.capability / 10) +
           "." + std::to_string(machine.capability % 10);
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

// Why the splits asked for cannot be had, where `splits` are what comes of them; empty where they can.
std::string splits_refusal(const Choice& choice, int64_t splits, int64_t most) {
  if (choice.splits == 0 || (choice.splits == splits && splits <= most)) return "";
  return "it cannot share its work among " + std::to_string(choice.splits) + " blocks";
}

// Blocks in flight on the whole machine.
int64_t slots(const Machine& machine, int64_t shared_bytes, int blocks_by_registers) {
  int64_t by_shared = (machine.shared_memory + kSharedPerMultiprocessor) / (shared_bytes + kSharedPerMultiprocessor);
  return machine.multiprocessors * greatest(1, least(by_shared, blocks_by_registers));
}

// The number of blocks per tile that finishes first: whole waves of blocks, each of its steps and a fixed part for
// filling the pipeline and leaving the tile, and the second kernel where there is more than one.
int best_splits(int64_t tiles, int edge, int64_t tokens, int block_tokens, int64_t at_once) {
  const int64_t fixed_steps = 512 / block_tokens;
  const int64_t second_kernel_steps = 768 / block_tokens;
  int64_t steps = ceil_div(tokens, block_tokens);
  int best = 1;
  int64_t least_cost = std::numeric_limits<int64_t>::max();
  for (int splits = 1; splits <= least(kMostSplits, greatest(1, steps)); ++splits) {
    if (splits > 1 && covariance::partial_offset(0, splits, 0, splits, tiles, edge) * 4 > kScratchBytes) break;
    int64_t waves = ceil_div(tiles * splits, at_once);
    int64_t cost = waves * (ceil_div(steps, splits) + fixed_steps) + (splits > 1 ? second_kernel_steps + splits : 0);
    if (cost < least_cost) {
      least_cost = cost;
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
  if (problem.groups > kMostGridYZ)
    return refuse("it takes at most 65535 groups, got " + std::to_string(problem.groups));
  int64_t blocks = ceil_div(problem.features, kTile);
  if (problem.features > std::numeric_limits<int32_t>::max() / kTile || triangle(blocks) > kMostGrid)
    return refuse("the second moment has more tiles than a grid has blocks");
  if (problem.source == Source::patches && problem.tokens > std::numeric_limits<int32_t>::max())
    return refuse("it takes at most 2^31 - 1 patches, got " + std::to_string(problem.tokens));
  if (problem.tokens > int64_t{1} << 35)
    return refuse("it takes at most 2^35 tokens, got " + std::to_string(problem.tokens));

  plan.tf32 = problem.allow_tf32 && problem.dtype == Dtype::float32;
  const bool split_in_parts = problem.dtype == Dtype::float32 && !plan.tf32;
  const bool async = problem.source == Source::aligned_matrix && !split_in_parts;
  const bool fits_sm90 = async && !plan.tf32 && problem.machine.capability == 90 && problem.groups == 1 &&
                         problem.tokens <= std::numeric_limits<int32_t>::max() - wgmma::kTokens;
  const bool fits_wide = fits_sm90 && problem.machine.multiprocessors >= wide::kBlocks;
  const std::string& wanted = problem.choice.kernel;
  if (problem.choice.token_tile != 0) return refuse("only prefill_sm90 takes a number of tokens per block");
  if (!wanted.empty() && wanted != "covariance_sm80" && !(wanted == "covariance_sm90" && fits_sm90) &&
      !(wanted == "covariance_sm90_wide" && fits_wide))
    return refuse(wanted + " does not run this problem");
  int64_t static_bytes = kStaticSharedBytes;
  plan.tile = kTile;
  if (wanted == "covariance_sm90_wide") {
    plan.kernel = wanted;
    plan.tile = wide::kSquare;
    plan.block_tokens = wide::kTokens;
    plan.stages = wide::kStages;
    plan.threads = wide::kThreads;
    plan.shared_bytes = wide::kSharedBytes;
    static_bytes = wgmma::kStaticSharedBytes;
  } else if (fits_sm90 && wanted != "covariance_sm80") {
    plan.kernel = "covariance_sm90";
    plan.block_tokens = wgmma::kTokens;
    plan.stages = wgmma::kStages;
    plan.threads = wgmma::kThreads;
    plan.shared_bytes = wgmma::kSharedBytes;
    static_bytes = wgmma::kStaticSharedBytes;
  } else {
    plan.kernel = "covariance_sm80";
    plan.block_tokens = kTokens;
    // Two blocks of four stages need 139 KB per multiprocessor, which 8.0, 9.0 and 10.0 have; 8.6, 8.9 and 12.0 have
    // 100 KB, enough for one block of five. Stages of float32 are twice as large.
    plan.stages = !async || plan.tf32 ? 2 : problem.machine.shared_memory >= (int64_t{139} << 10) ? 4 : 5;
    plan.threads = kThreads;
    plan.shared_bytes =
        plan.stages * 2 * (plan.tf32 ? Layout<4>::kBytes : Layout<2>::kBytes * (split_in_parts ? 2 : 1));
  }
  if (plan.shared_bytes + static_bytes > problem.machine.shared_memory)
    return refuse("it needs " + std::to_string(plan.shared_bytes + static_bytes) +
                  " bytes of shared memory per block, the device has " +
                  std::to_string(problem.machine.shared_memory));
  const bool squares = plan.tile == wide::kSquare;
  plan.tiles = triangle(ceil_div(problem.features, plan.tile));
  const int64_t at_once = squares ? problem.machine.multiprocessors / wide::kBlocks
                                  : slots(problem.machine, plan.shared_bytes + static_bytes,
                                          async && plan.stages != 5 ? 2 : 1);
  int64_t splits = problem.choice.splits;
  if (splits < 0 || splits > kMostSplits) return refuse(splits_refusal(problem.choice, 0, 0));
  // Squares in whole waves of clusters are not shared, only those that are left over.
  int64_t shared = squares ? plan.tiles % at_once : plan.tiles;
  if (splits == 0)
    splits = shared ? best_splits(shared * problem.groups, plan.tile, problem.tokens, plan.block_tokens, at_once) : 1;
  plan.tokens_per_split = round_up(ceil_div(problem.tokens, splits), plan.block_tokens);
  plan.splits = static_cast<int>(ceil_div(problem.tokens, plan.tokens_per_split));
  if (plan.splits == 1 && squares) shared = 0;
  plan.whole = plan.tiles - shared;
  if (plan.splits > 1)
    plan.scratch_floats = partial_sum_offset(problem.groups, 0, 0, problem.groups, plan.splits, shared,
                                             problem.features, plan.tile);
  const int64_t partials = partial_offset(problem.groups, 0, 0, 1, shared, plan.tile) * 4;
  const int64_t most = partials ? greatest(1, least(kMostSplits, kScratchBytes / partials)) : 1;
  plan.reason = splits_refusal(problem.choice, plan.splits, most);
  return plan;
}

std::string describe(const CovariancePlan& plan) {
  if (!plan.reason.empty()) return "cannot run: " + plan.reason;
  std::ostringstream out;
  out << plan.kernel << ": " << (plan.tf32 ? "TensorFloat-32, " : "") << "tile " << plan.tile << "x" << plan.tile
      << ", " << plan.block_tokens << " tokens x "
      << plan.stages << " stages, ";
  if (plan.whole) out << plan.whole << " tiles whole, ";
  if (plan.whole < plan.tiles)
    out << plan.tiles - plan.whole << " tiles x " << plan.splits << " splits of " << plan.tokens_per_split << " tokens, ";
  out << plan.threads << " threads, " << plan.shared_bytes
      << " bytes of shared memory, " << plan.scratch_floats << " floats of scratch";
  return out.str();
}

namespace {

// Two kernels, for any alignment and every machine.
LowRankPlan plan_decode_pair(const LowRankProblem& problem) {
  using namespace lowrank_linear;
  LowRankPlan plan;
  plan.kernel = "decode_sm80";
  // t lies in shared memory for a block's tokens: fewer tokens where the rank is large.
  plan.token_tile = decode_token_tile(problem.tokens);
  const auto up_bytes = [&] {
    int rows = kRows * up_products(plan.token_tile);
    return greatest(plan.token_tile * rank_pitch(problem.rank), sum_bytes(rows, plan.token_tile));
  };
  while (plan.token_tile > 8 && up_bytes() > problem.machine.shared_memory) plan.token_tile /= 2;
  plan.threads = kThreads;
  plan.rows_down = kRows;
  plan.rows_up = kRows * up_products(plan.token_tile);
  plan.shared_bytes_down = sum_bytes(plan.rows_down, plan.token_tile);
  plan.shared_bytes_up = up_bytes();
  if (plan.shared_bytes_up > problem.machine.shared_memory) {
    plan.reason = "rank " + std::to_string(problem.rank) + " needs " + std::to_string(plan.shared_bytes_up) +
                  " bytes of shared memory per block, the device has " + std::to_string(problem.machine.shared_memory);
    return plan;
  }
  // Few rows of down: share its features, but keep a warp's share worth starting and the sums of t cheap to read.
  constexpr int64_t kLeastSteps = 2 * kWarps;
  constexpr int64_t kMostOwnSplits = 8;
  constexpr int64_t kMostAskedSplits = 32;
  int64_t steps = ceil_div(problem.in_features, kFeatures);
  int64_t wanted = problem.machine.multiprocessors / ceil_div(problem.rank, kRows);
  int64_t splits = greatest(1, least(least(wanted, kMostOwnSplits), steps / kLeastSteps));
  if (problem.choice.splits > 0) splits = least(problem.choice.splits, steps);
  plan.split_features = ceil_div(steps, splits) * kFeatures;
  plan.splits = static_cast<int>(ceil_div(problem.in_features, plan.split_features));
  plan.reason = splits_refusal(problem.choice, plan.splits, kMostAskedSplits);
  plan.scratch_floats = plan.splits * problem.tokens * problem.rank;
  plan.dependent_launch = problem.machine.capability >= 90;
  return plan;
}

// One kernel with clusters and bulk copies; a reason where those cannot be.
LowRankPlan plan_decode_persistent(const LowRankProblem& problem) {
  using namespace lowrank_linear;
  LowRankPlan plan;
  plan.kernel = "decode_sm90";
  const Machine& machine = problem.machine;
  if (machine.capability != 90) {
    plan.reason = "it needs compute capability 9.0";
    return plan;
  }
  if (!problem.aligned || problem.in_features % kVector != 0 || problem.rank % kVector != 0) {
    plan.reason = "rows do not start and end on 16 bytes";
    return plan;
  }
  // The whole slab if it fits, and all tokens at once; but at least one tile of up, and fewer tokens if need be.
  const int64_t tile_bytes = kRows * rank_pitch(problem.rank);
  const auto room = [&] { return (machine.shared_memory - layout(plan.token_tile, problem.rank, 0).bytes) / tile_bytes; };
  plan.token_tile = decode_token_tile(problem.tokens);
  while (plan.token_tile > 8 && room() < 1) plan.token_tile /= 2;
  if (room() < 1) {
    plan.reason = "rank " + std::to_string(problem.rank) + " leaves no room for a tile of up in " +
                  std::to_string(machine.shared_memory) + " bytes of shared memory";
    return plan;
  }
  plan.threads = kThreads;
  plan.rows_down = plan.rows_up = kRows;

  // The cluster that finishes down first: rounds of units, each of a warp's steps and a fixed part for adding up.
  constexpr int64_t kFixedSteps = 2;
  const int64_t work = units(problem.rank, problem.tokens, plan.token_tile);
  const int64_t steps = ceil_div(problem.in_features, kFeatures);
  int64_t least_cost = std::numeric_limits<int64_t>::max();
  for (int cluster = 1; cluster <= least(kMostCluster, machine.multiprocessors); cluster *= 2) {
    if (problem.choice.splits != 0 && problem.choice.splits != cluster) continue;
    int64_t rounds = ceil_div(work, machine.multiprocessors / cluster);
    int64_t cost = rounds * (ceil_div(ceil_div(steps, cluster), kWarps) + kFixedSteps);
    if (cost < least_cost) {
      least_cost = cost;
      plan.splits = plan.cluster = cluster;
    }
  }
  if (plan.splits == 0) {
    plan.reason = splits_refusal(problem.choice, 0, 0);
    return plan;
  }
  // The last blocks of a cluster may be left without features; they still add up their part of the sums.
  plan.split_features = ceil_div(steps, plan.splits) * kFeatures;
  const int64_t tiles_up = ceil_div(problem.out_features, kRows);
  const int64_t clusters =
      least(machine.multiprocessors / plan.splits, greatest(work, ceil_div(tiles_up, plan.splits)));
  plan.blocks = clusters * plan.splits;
  plan.resident_tiles = least(room(), ceil_div(tiles_up, plan.blocks));
  plan.shared_bytes = layout(plan.token_tile, problem.rank, plan.resident_tiles).bytes;
  plan.scratch_floats = ceil_div(problem.tokens * problem.rank, 2);
  return plan;
}

// Many tokens: one kernel that keeps t on the chip.
LowRankPlan plan_prefill(const LowRankProblem& problem) {
  using namespace lowrank_linear::prefill;
  LowRankPlan plan;
  plan.kernel = "prefill_sm90";
  const auto refuse = [&](const std::string& reason) {
    plan.reason = "it takes at most " + std::to_string(lowrank_linear::kMostTokens) + " tokens, got " +
                  std::to_string(problem.tokens) + "; for more, " + reason;
    return plan;
  };
  const Machine& machine = problem.machine;
  const Choice& choice = problem.choice;
  if (machine.capability != 90) return refuse("it needs compute capability 9.0");
  if (!problem.aligned) return refuse("rows of x, down and up must start on 16 bytes");
  if (problem.rank > kMostRank) return refuse("the rank must be at most 256, got " + std::to_string(problem.rank));
  // Rows are 32-bit to the copy engine, those past the last token included, up to the end of its tile.
  if (problem.tokens > std::numeric_limits<int32_t>::max() - kMostTileTokens)
    return refuse("it takes at most 2^31 - " + std::to_string(kMostTileTokens + 1));
  plan.rows_up = kOutputs;
  plan.splits = 1;
  plan.split_features = problem.in_features;

  // The cluster that finishes first: waves of clusters; per block the steps over features, each bound by its products
  // or by bringing its operands, and the rows of up. In cycles: a wgmma takes half of its columns, for each warpgroup;
  // 25 bytes a cycle come to a block while all of them read; a tile of up is left in 600, by one warpgroup while the
  // others multiply, a block started in 2000. None of these is measured.
  const auto cycles = [](int64_t products, int64_t bytes) { return greatest(products, bytes / 25); };
  int64_t least_cost = std::numeric_limits<int64_t>::max();
  for (int ranks = rank_tile(problem.rank); ranks <= kMostRank; ranks += kStep)
    for (int cluster = 1; cluster <= least(8, machine.multiprocessors); cluster *= 2)
      for (int kind : {2, 3, 4}) {  // the last: two warpgroups, and a peer
        const int groups = kind == 4 ? 2 : kind, peers = kind == 4 ? kMostPeers : 1, blocks = cluster * peers;
        const Variant v{ranks, cluster, groups, peers};
        const int64_t tiles = ceil_div(problem.tokens, v.tokens() * peers);
        if (!exists(v) || shared_bytes(v) > machine.shared_memory || tiles * blocks > kMostGrid) continue;
        if (choice.splits != 0 && choice.splits != cluster) continue;
        if (choice.token_tile != 0 && choice.token_tile != v.tokens() * peers) continue;
        if (blocks > machine.multiprocessors) continue;
        const int64_t waves = ceil_div(tiles, machine.multiprocessors / blocks);
        const int64_t down = ceil_div(problem.in_features, kBox) *
                             cycles(2 * groups * v.columns(), x_bytes(groups) / cluster + v.columns() * kRowBytes / peers);
        const int64_t up = up_tiles(0, cluster, problem.out_features) *
                           (cycles(2 * groups * ranks, up_step_bytes(ranks) / peers) + 600 / groups);
        const int64_t cost = waves * (down + up + 2000);
        if (cost >= least_cost) continue;
        least_cost = cost;
        plan.token_tile = v.tokens() * peers;
        plan.threads = v.threads();
        plan.rank_tile = ranks;
        plan.cluster = cluster;
        plan.rows_down = v.columns();
        plan.stages = stages(v);
        plan.shared_bytes = shared_bytes(v);
        plan.blocks = tiles * blocks;
      }
  if (plan.rank_tile == 0 && (choice.splits != 0 || choice.token_tile != 0))
    return refuse("there is no kernel for " + std::to_string(choice.token_tile) + " tokens and clusters of " +
                  std::to_string(choice.splits) + " (0: any)");
  if (plan.rank_tile == 0) return refuse("there is too little shared memory: " + std::to_string(machine.shared_memory));
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
  if (problem.tokens < 1 || problem.in_features < 1 || problem.rank < 1 || problem.out_features < 1)
    return refuse("a dimension is empty");
  constexpr int64_t kMostFeatures = int64_t{1} << 30;
  if (problem.in_features > kMostFeatures || problem.out_features > kMostFeatures)
    return refuse("it takes at most 2^30 features");
  const std::string& wanted = problem.choice.kernel;
  const bool decode = wanted == "decode_sm80" || wanted == "decode_sm90";
  const int64_t most = decode ? lowrank_linear::kMostAskedTokens : lowrank_linear::kMostTokens;
  const bool many = problem.tokens > most;
  if (!wanted.empty() && (many ? wanted != "prefill_sm90" : !decode)) return refuse(wanted + " does not run this problem");
  if (many) return plan_prefill(problem);
  if (problem.choice.token_tile != 0) return refuse("only prefill_sm90 takes a number of tokens per block");
  if (wanted != "decode_sm80") {
    const LowRankPlan persistent = plan_decode_persistent(problem);
    if (persistent.reason.empty() || !wanted.empty()) return persistent;
  }
  return plan_decode_pair(problem);
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
    out << plan.blocks << " blocks in clusters of " << plan.cluster << ", " << plan.shared_bytes
        << " bytes of shared memory, ";
  if (plan.kernel == "decode_sm90") out << plan.resident_tiles * plan.rows_up << " rows of up in it, ";
  if (plan.kernel == "prefill_sm90")
    out << "ranks up to " << plan.rank_tile << ", " << plan.stages << " stages, "
        << (plan.token_tile == lowrank_linear::prefill::kMostTileTokens ? "pairs of blocks share weights, " : "");
  out << plan.scratch_floats << " floats of scratch" << (plan.dependent_launch ? ", dependent launch" : "");
  return out.str();
}

}  // namespace lowrank_ops
