// Which kernel runs a problem, and how: the single statement of what the kernels support. No torch, no CUDA.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "problem.h"

namespace lowrank_ops {

enum class Dtype { bfloat16, float16, float32, float64 };

// Accepts torch's names without "torch."; throws std::invalid_argument for any other.
Dtype parse_dtype(const std::string& name);

struct Machine {
  int capability;  // 10 * major + minor
  int sm_count;
  int64_t shared_memory;  // bytes that a CTA may opt in to
  // Clusters of 2, 4 and 8 CTAs, one CTA per SM, that are resident at once, as the runtime counts them; -1: not asked.
  std::array<int64_t, 3> clusters = {-1, -1, -1};
};

// `clusters`: three counts, or none where the runtime was not asked; throws std::invalid_argument for others.
Machine parse_machine(int64_t capability, int64_t sm_count, int64_t shared_memory,
                      const std::vector<int64_t>& clusters);

// The clusters of 1, 2, 4 or 8 CTAs that are resident at once.
int64_t resident_clusters(const Machine& machine, int ctas);

// Why a library built for `archs`, such as "80,90a,100f", has no code for a device; empty where it has.
std::string arch_refusal(const std::string& archs, int capability);

// A tuned table's choice. Refused where the kernel does not support it.
struct Choice {
  std::string kernel;      // empty: the first that can run the problem
  int64_t splits = 0;      // a plan's `splits`, or prefill_sm90's `cluster`; 0: the planner's
  int64_t token_tile = 0;  // prefill_sm90; 0: the planner's
};

// ---- covariance_update_ ----

// Accepts the names of the enumerators; throws std::invalid_argument for any other.
Source parse_source(const std::string& name);

struct CovarianceProblem {
  int64_t tokens;    // rows per group
  int64_t features;  // per group
  int64_t groups;
  Dtype dtype;
  Source source;
  Machine machine;
  bool allow_tf32 = false;  // float32 MMAs in TensorFloat-32
  Choice choice = {};
};

struct CovariancePlan {
  std::string reason;  // why no kernel can run this; empty where one can
  std::string kernel;
  bool tf32 = false;
  int tile = 0;          // rows and columns of the second moment per CTA (covariance_sm90_wide: per cluster)
  int block_tokens = 0;  // tokens per pipeline stage
  int stages = 0;
  int threads = 0;
  int64_t tiles = 0;  // lower tiles per group
  int64_t whole = 0;  // covariance_sm90_wide: the first tiles, which are not split
  int splits = 0;     // split-K: CTAs, or clusters, that share a tile's tokens
  int64_t tokens_per_split = 0;
  int64_t shared_bytes = 0;
  int64_t scratch_floats = 0;  // 0 where no tile is split
};

CovariancePlan plan_covariance(const CovarianceProblem& problem);
std::string describe(const CovariancePlan& plan);

// ---- lowrank_linear ----

struct LowRankProblem {
  int64_t tokens;
  int64_t in_features;
  int64_t rank;          // of the first member
  int64_t out_features;  // likewise
  Dtype dtype;
  bool aligned;  // x, down, up and all their rows start on 16 bytes
  Machine machine;
  Choice choice = {};
  std::vector<std::pair<int64_t, int64_t>> others = {};  // rank and out_features of a group's other members
  bool shared = false;                                   // all members have the first one's down
};

struct LowRankPlan {
  std::string reason;
  std::string kernel;
  int token_tile = 0;  // tokens per CTA, or at a time; 256: a pair of prefill_sm90's CTAs that multicast weights
  int threads = 0;
  int rows_down = 0;  // rows of down per CTA, or at a time
  int rows_up = 0;    // rows of up, likewise
  int splits = 0;     // split-K: CTAs that share in_features of a row of down
  int cluster = 1;    // decode_sm90: the same; prefill_sm90: CTAs that share rank and out_features
  int64_t split_features = 0;
  int64_t scratch_floats = 0;

  // decode_sm80: two kernels
  int64_t shared_bytes_down = 0;
  int64_t shared_bytes_up = 0;
  bool vectorized = false;        // rows start and end on 16 bytes
  bool dependent_launch = false;  // PDL: the second kernel starts while the first one runs

  // decode_sm90, prefill_sm90: one kernel
  int64_t shared_bytes = 0;
  int64_t ctas = 0;            // decode_sm90: all co-resident
  int64_t resident_tiles = 0;  // decode_sm90: 16-row tiles of up that a CTA keeps in shared memory
  int rank_tile = 0;           // prefill_sm90: ranks that the kernel computes, zeros past the last
  int stages = 0;              // prefill_sm90
};

LowRankPlan plan_lowrank_linear(const LowRankProblem& problem);

// From the sizes of all members; throws std::invalid_argument if `ranks` and `out_features` are empty or do not pair.
LowRankProblem group_problem(int64_t tokens, int64_t in_features, const std::vector<int64_t>& ranks,
                             const std::vector<int64_t>& out_features, bool shared, Dtype dtype, bool aligned,
                             const Machine& machine, const Choice& choice);
std::string describe(const LowRankPlan& plan);

}  // namespace lowrank_ops
