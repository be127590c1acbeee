// Every plan is legal for its machine, and every refusal says why.
#include "../planner.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "../covariance/wide_tiles.h"
#include "../lowrank_linear/decode_layout.h"
#include "../lowrank_linear/prefill_layout.h"
#include "check.h"

using namespace lowrank_ops;

namespace {

const Machine kMachines[] = {
    {80, 108, 166912}, {86, 84, 101376}, {89, 128, 101376}, {90, 132, 232448}, {100, 148, 232448}, {120, 170, 101376},
};

void expect_legal(const CovarianceProblem& problem) {
  const CovariancePlan plan = plan_covariance(problem);
  EXPECT(plan.reason.empty());
  EXPECT(plan.shared_bytes + covariance::kStaticSharedBytes <= problem.machine.shared_memory);
  const bool wide = plan.kernel == "covariance_sm90_wide";
  EXPECT(plan.tile == (wide ? covariance::wide::kTile : covariance::kTile));
  int64_t rows = ceil_div(problem.features, plan.tile);
  EXPECT(plan.tiles == rows * (rows + 1) / 2);
  EXPECT(plan.whole >= 0 && (wide ? (plan.whole == plan.tiles) == (plan.splits == 1) : plan.whole == 0));
  EXPECT(plan.splits >= 1 && plan.splits <= 65535);
  EXPECT(plan.tokens_per_split % plan.block_tokens == 0);
  EXPECT((plan.splits - 1) * plan.tokens_per_split < problem.tokens);
  EXPECT(plan.splits * plan.tokens_per_split >= problem.tokens);
  EXPECT(plan.tokens_per_split / plan.block_tokens < (int64_t{1} << 31));
  EXPECT((plan.scratch_floats == 0) == (plan.splits == 1));
  EXPECT(plan.scratch_floats * 4 <= (int64_t{300} << 20));
  EXPECT(problem.source == Source::aligned_matrix && problem.dtype != Dtype::float32 ? plan.stages >= 3
                                                                                     : plan.stages == 2);
  EXPECT(plan.tf32 == (problem.allow_tf32 && problem.dtype == Dtype::float32));
  EXPECT((describe(plan).find("TensorFloat-32") != std::string::npos) == plan.tf32);
}

void expect_legal(const LowRankProblem& problem) {
  using namespace lowrank_linear;
  const LowRankPlan plan = plan_lowrank_linear(problem);
  EXPECT(plan.reason.empty());
  EXPECT(plan.token_tile % 8 == 0);
  EXPECT(plan.token_tile <= (plan.kernel == "prefill_sm90" ? prefill::kMaxTokenTile : 64));
  EXPECT(plan.split_features % kFeatures == 0 || plan.kernel == "prefill_sm90");
  EXPECT(plan.splits * plan.split_features >= problem.in_features);
  std::vector<int64_t> ranks{problem.rank};  // of each down
  for (const auto& [rank, out_features] : problem.others)
    if (!problem.shared) ranks.push_back(rank);
  const int64_t largest = *std::max_element(ranks.begin(), ranks.end());
  const bool vectors = problem.aligned && problem.in_features % 8 == 0 &&
                       std::all_of(ranks.begin(), ranks.end(), [](int64_t rank) { return rank % 8 == 0; });
  EXPECT(scratch_columns(largest) * 2 <= rank_pitch(largest));
  if (plan.kernel == "decode_sm90") {
    EXPECT(problem.machine.capability == 90 && vectors);
    EXPECT(std::any_of(std::begin(kDecodeSm90Variants), std::end(kDecodeSm90Variants), [&](const DecodeSm90Variant& v) {
      return v.token_tile == plan.token_tile && v.rows() == plan.rows_down;
    }));
    EXPECT(plan.shared_bytes == smem_layout(plan.rows_down, plan.token_tile, largest, plan.resident_tiles).bytes);
    EXPECT(plan.shared_bytes <= problem.machine.shared_memory && plan.shared_bytes < (1 << 20));  // tx-count
    EXPECT(plan.splits == 1 || plan.splits == 2 || plan.splits == 4 || plan.splits == 8);
    EXPECT(plan.ctas % plan.splits == 0 && plan.ctas >= plan.splits);
    EXPECT(plan.ctas <= resident_clusters(problem.machine, plan.cluster) * plan.cluster);
    EXPECT(plan.resident_tiles >= 1);
    int64_t floats = 0;
    for (int64_t rank : ranks) floats += t_floats(problem.tokens, rank);
    EXPECT(plan.scratch_floats == floats && plan.scratch_floats * 2 >= problem.tokens * problem.rank);
    EXPECT(!plan.dependent_launch);
  } else if (plan.kernel == "prefill_sm90") {
    EXPECT(problem.machine.capability == 90 && problem.aligned && problem.tokens > 64);
    const auto planned = [&](const prefill::Variant& v) {
      return v.rank_tile == plan.rank_tile && v.cluster == plan.cluster && v.token_tile() == plan.token_tile;
    };
    const auto variant = std::find_if(std::begin(prefill::kVariants), std::end(prefill::kVariants), planned);
    EXPECT(variant != std::end(prefill::kVariants));
    EXPECT(plan.rank_tile >= largest && plan.threads == variant->threads());
    EXPECT(plan.rows_down == variant->columns() && plan.rows_down * plan.cluster >= plan.rank_tile);
    EXPECT(plan.stages >= 2 && plan.stages <= prefill::kMaxStages);
    EXPECT(plan.shared_bytes == prefill::shared_bytes(*variant));
    EXPECT(plan.shared_bytes <= problem.machine.shared_memory);
    const int64_t members = 1 + static_cast<int64_t>(problem.others.size());
    EXPECT(plan.ctas == ceil_div(problem.tokens, plan.token_tile) * members * variant->ctas());
    EXPECT(plan.ctas < (int64_t{1} << 31));
    EXPECT(plan.scratch_floats == 0 && !plan.dependent_launch);
  } else {
    EXPECT(plan.kernel == "decode_sm80");
    EXPECT(std::any_of(std::begin(kDecodeSm80Variants), std::end(kDecodeSm80Variants), [&](const DecodeVariant& v) {
      return v.token_tile == plan.token_tile && v.vectorized == plan.vectorized;
    }));
    EXPECT(plan.vectorized == vectors);
    EXPECT(plan.shared_bytes_up <= problem.machine.shared_memory);
    EXPECT(plan.shared_bytes_down <= problem.machine.shared_memory);
    EXPECT((plan.splits - 1) * plan.split_features < problem.in_features);
    int64_t floats = 0;
    for (int64_t rank : ranks) floats += scratch_floats(problem.tokens, rank, plan.token_tile, plan.splits);
    EXPECT(plan.scratch_floats == floats);
    EXPECT(plan.dependent_launch == (problem.machine.capability >= 90));
    EXPECT(plan.token_tile * rank_pitch(largest) <= plan.shared_bytes_up);
  }
}

void every_plan_is_legal() {
  std::mt19937_64 random(7);
  const auto up_to = [&](double bits) {
    return static_cast<int64_t>(std::pow(2.0, std::uniform_real_distribution<>(0, bits)(random)));
  };
  for (const Machine& machine : kMachines)
    for (int i = 0; i < 4000; ++i) {
      Dtype dtype = std::array{Dtype::bfloat16, Dtype::float16, Dtype::float32}[random() % 3];
      Source source = std::array{Source::matrix, Source::aligned_matrix, Source::patches}[random() % 3];
      expect_legal(CovarianceProblem{up_to(source == Source::patches ? 30.9 : 35), up_to(16), 1 + up_to(6), dtype,
                                     source, machine, random() % 2 == 0});
      Dtype half = random() % 2 ? Dtype::bfloat16 : Dtype::float16;
      expect_legal(LowRankProblem{1 + static_cast<int64_t>(random() % 64), up_to(20), up_to(12), up_to(20), half,
                                  random() % 2 == 0, machine});
      expect_legal(LowRankProblem{1 + static_cast<int64_t>(random() % 64), up_to(30), 8 * up_to(9), up_to(30), half,
                                  true, machine});
      LowRankProblem group{
          1 + static_cast<int64_t>(random() % 64), 8 * up_to(17), 8 * up_to(9), up_to(30), half, true, machine};
      group.shared = random() % 2 == 0;
      for (size_t others = 1 + random() % 2; group.others.size() < others;)
        group.others.emplace_back(group.shared ? group.rank : random() % 4 ? 8 * up_to(9) : up_to(12), up_to(30));
      expect_legal(group);
      if (machine.capability == 90) {
        LowRankProblem prefill{64 + up_to(28), up_to(30), 1 + static_cast<int64_t>(random() % 256), up_to(30), half,
                               true,           machine};
        prefill.others = {{1 + static_cast<int64_t>(random() % 256), up_to(30)}};
        expect_legal(prefill);
        expect_legal(LowRankProblem{64 + up_to(30.9), up_to(30), 1 + static_cast<int64_t>(random() % 256), up_to(30),
                                    half, true, machine});
      }
    }
}

// The down of a group fills the SMs as that of one layer with all its ranks does.
void groups_split_as_one_layer() {
  const auto plan = [](const std::vector<int64_t>& ranks, bool shared, const Machine& machine) {
    const std::vector<int64_t> outs(ranks.size(), 1024);
    return plan_lowrank_linear(group_problem(4, 4096, ranks, outs, shared, Dtype::bfloat16, true, machine, {}));
  };
  for (const Machine& machine : kMachines) {
    const LowRankPlan layer = plan({512}, false, machine), group = plan({256, 128, 128}, false, machine);
    EXPECT(layer.kernel == group.kernel && layer.splits == group.splits);
    EXPECT(plan({128, 128, 128}, true, machine).splits == plan({128}, false, machine).splits);
    EXPECT(plan({128, 128, 128}, true, machine).scratch_floats == plan({128}, false, machine).scratch_floats);
  }
  const auto reason = [&](std::vector<int64_t> ranks, bool shared) { return plan(ranks, shared, kMachines[3]).reason; };
  EXPECT(reason({8, 8, 8, 8}, false).find("at most 3 members") != std::string::npos);
  EXPECT(reason({8, 0}, false).find("empty") != std::string::npos);
  EXPECT(reason({8, 16}, true).find("share down differ in rank") != std::string::npos);
}

void hopper_covariances_use_wgmma_where_possible() {
  const Machine h200{90, 132, 232448};
  const auto kernel = [&](int64_t tokens, Dtype dtype, Source source, const Machine& machine) {
    return plan_covariance({tokens, 4096, 1, dtype, source, machine}).kernel;
  };
  EXPECT(kernel(8192, Dtype::bfloat16, Source::aligned_matrix, h200) == "covariance_sm90_wide");
  EXPECT(kernel(8192, Dtype::float16, Source::aligned_matrix, h200) == "covariance_sm90_wide");
  EXPECT(kernel(8192, Dtype::float16, Source::aligned_matrix, {90, 1, 232448}) == "covariance_sm90");
  // Wide where its squares fill the 66 clusters: 6 of 768 features are half of 21 tiles' work on the diagonal, and 10
  // of 1024 need 7 splits.
  const auto of = [&](int64_t tokens, int64_t features) {
    return plan_covariance({tokens, features, 1, Dtype::bfloat16, Source::aligned_matrix, h200}).kernel;
  };
  EXPECT(of(12608, 768) == "covariance_sm90" && of(65536, 1016) == "covariance_sm90");
  EXPECT(of(65536, 1024) == "covariance_sm90_wide" && of(64 * 6 + 1, 1024) == "covariance_sm90_wide");
  EXPECT(of(64 * 6, 1024) == "covariance_sm90" && of(1, 4096) == "covariance_sm90_wide");
  EXPECT(kernel(8192, Dtype::float32, Source::aligned_matrix, h200) == "covariance_sm80");
  EXPECT(kernel(8192, Dtype::bfloat16, Source::matrix, h200) == "covariance_sm80");
  EXPECT(kernel(int64_t{1} << 32, Dtype::bfloat16, Source::aligned_matrix, h200) == "covariance_sm80");
  EXPECT(kernel(8192, Dtype::bfloat16, Source::aligned_matrix, {100, 148, 232448}) == "covariance_sm80");
}

void hopper_decodes_in_one_launch_where_possible() {
  const Machine h200{90, 132, 232448};
  const auto plan = [&](int64_t tokens, int64_t rank, bool aligned, const Machine& machine) {
    return plan_lowrank_linear({tokens, 4096, rank, 4096, Dtype::bfloat16, aligned, machine});
  };
  for (int64_t tokens : {1, 16, 64})
    for (int64_t rank : {8, 136, 512, 1024}) EXPECT(plan(tokens, rank, true, h200).kernel == "decode_sm90");
  EXPECT(plan(1, 134, true, h200).kernel == "decode_sm80");
  EXPECT(plan(1, 136, false, h200).kernel == "decode_sm80");
  // Rows on 16 bytes that do not end there: a view of a wider matrix.
  EXPECT(plan_lowrank_linear({1, 4095, 136, 4096, Dtype::bfloat16, true, h200}).kernel == "decode_sm80");
  EXPECT(plan(1, 136, true, {100, 148, 232448}).kernel == "decode_sm80");
  EXPECT(plan(1, 8192, true, h200).kernel == "decode_sm80");  // no room for a tile of up
  EXPECT(plan(1, 512, true, h200).splits > 1);
  EXPECT(plan(1, 512, true, h200).resident_tiles == 2);  // 256 tiles over 128 CTAs: all of up is resident
  // Rows share x where there is more of it than of the weights, and enough work for all SMs is left.
  EXPECT(plan(16, 512, true, h200).rows_down == 16 && plan(64, 136, true, h200).rows_down == 16);
  EXPECT(plan(64, 512, true, h200).rows_down == 32 && plan(64, 512, true, h200).ctas == 128);
  EXPECT(plan(64, 1024, true, h200).rows_down == 64 && plan(64, 1024, true, h200).ctas == 128);
}

void few_token_tiles_are_shared_by_clusters() {
  const Machine h200{90, 132, 232448};
  const auto plan = [&](int64_t tokens, int64_t rank) {
    return plan_lowrank_linear({tokens, 768, rank, 3072, Dtype::bfloat16, true, h200});
  };
  EXPECT(plan(65, 136).kernel == "prefill_sm90");
  EXPECT(plan(2048, 216).cluster > 2);
  EXPECT(plan(1 << 20, 64).cluster == 1);
  EXPECT(plan(1 << 20, 64).rank_tile == 64);
  EXPECT(plan(1 << 20, 136).rank_tile == 144);
  EXPECT(plan(1 << 20, 65).rank_tile == 128);
  EXPECT(plan(1 << 20, 256).cluster == 2);  // a thread has no registers for 256 columns
  // Without a peer the weights of each tile of 128 tokens would come from L2, more than it gives while all read.
  EXPECT(plan_lowrank_linear({65536, 768, 136, 768, Dtype::bfloat16, true, h200}).token_tile == 256);
  // 12608 tokens by 192 are 66 tiles: with two CTAs each, one wave where tiles of 128 would take two.
  EXPECT(plan(12608, 256).token_tile == 192 && plan(12608, 256).ctas == 132);
}

// A cluster lies within a GPC; what the runtime counts comes before what the planner knows.
void clusters_are_those_that_are_resident() {
  const Machine h200{90, 132, 232448}, pcie{90, 114, 232448}, counted{90, 132, 232448, {60, 30, 14}};
  EXPECT(resident_clusters(h200, 1) == 132 && resident_clusters(h200, 2) == 66);
  EXPECT(resident_clusters(h200, 4) == 32 && resident_clusters(h200, 8) == 16);
  EXPECT(resident_clusters(pcie, 2) == 57 && resident_clusters(pcie, 4) == 28 && resident_clusters(pcie, 8) == 14);
  EXPECT(resident_clusters(counted, 2) == 60 && resident_clusters(counted, 4) == 30);
  EXPECT(resident_clusters(counted, 8) == 14 && resident_clusters(counted, 1) == 132);
  EXPECT(resident_clusters({90, 7, 0}, 8) == 0 && resident_clusters({90, 8, 0}, 8) == 1);
  for (const Machine& machine : {h200, pcie, counted, Machine{90, 132, 232448, {66, 1, 1}}})
    for (int64_t tokens : {4, 64, 2048})
      for (int64_t rank : {64, 136, 256}) expect_legal({tokens, 4096, rank, 4096, Dtype::bfloat16, true, machine});
  const LowRankPlan scarce =
      plan_lowrank_linear({4, 4096, 512, 4096, Dtype::bfloat16, true, {90, 132, 232448, {66, 1, 1}}});
  EXPECT(scarce.cluster <= 2);
}

// No kernel is compiled that no plan picks.
void every_variant_is_the_plan_of_some_problem() {
  using namespace lowrank_linear;
  const Machine h200{90, 132, 232448};
  std::vector<int> prefill_plans(std::size(prefill::kVariants), 0), decode_plans(std::size(kDecodeSm80Variants), 0);
  for (int64_t tokens : {65, 128, 197, 394, 788, 1576, 2048, 4096, 6304, 8192, 12608, 25216, 65536})
    for (int64_t rank = 8; rank <= prefill::kMaxRank; rank += 8)
      for (int64_t features : {768, 1024, 4096}) {
        const LowRankPlan plan = plan_lowrank_linear({tokens, features, rank, 4096, Dtype::bfloat16, true, h200});
        for (size_t i = 0; i < prefill_plans.size(); ++i) {
          const prefill::Variant& v = prefill::kVariants[i];
          prefill_plans[i] +=
              v.rank_tile == plan.rank_tile && v.cluster == plan.cluster && v.token_tile() == plan.token_tile;
        }
      }
  for (int64_t tokens : {1, 9, 17, 33})
    for (bool aligned : {false, true}) {
      const LowRankPlan plan = plan_lowrank_linear({tokens, 768, 128, 768, Dtype::bfloat16, aligned, kMachines[0]});
      for (size_t i = 0; i < decode_plans.size(); ++i)
        decode_plans[i] += kDecodeSm80Variants[i].token_tile == plan.token_tile &&
                           kDecodeSm80Variants[i].vectorized == plan.vectorized;
    }
  std::vector<int> sm90_plans(std::size(kDecodeSm90Variants), 0);
  for (int64_t tokens : {1, 9, 17, 33})
    for (int64_t rank : {8, 136, 512, 1024, 2048}) {
      const LowRankPlan plan = plan_lowrank_linear({tokens, 4096, rank, 4096, Dtype::bfloat16, true, h200});
      for (size_t i = 0; i < sm90_plans.size(); ++i)
        sm90_plans[i] += kDecodeSm90Variants[i].token_tile == plan.token_tile &&
                         kDecodeSm90Variants[i].rows() == plan.rows_down && plan.kernel == "decode_sm90";
    }
  for (int count : sm90_plans) EXPECT(count > 0);
  for (int count : prefill_plans) EXPECT(count > 0);
  for (int count : decode_plans) EXPECT(count > 0);
}

void few_tiles_are_split_to_fill_the_machine() {
  const Machine h200{90, 132, 232448};
  const CovarianceProblem narrow{12608, 768, 1, Dtype::bfloat16, Source::aligned_matrix, h200};
  const CovariancePlan plan = plan_covariance(narrow);
  EXPECT(plan.tiles == 21);
  EXPECT(plan.splits * plan.tiles > 132);
  CovarianceProblem wide = narrow;
  wide.features = 11008;
  wide.choice.kernel = "covariance_sm90";
  EXPECT(plan_covariance(wide).splits == 1);
  EXPECT(plan_covariance(wide).scratch_floats == 0);
}

void wide_tiles_beyond_whole_waves_are_split() {
  const Machine h200{90, 132, 232448};
  const auto plan = [&](int64_t tokens, int64_t features, int64_t splits = 0, int sm_count = 132) {
    return plan_covariance({tokens,
                            features,
                            1,
                            Dtype::bfloat16,
                            Source::aligned_matrix,
                            {90, sm_count, 232448},
                            false,
                            {"covariance_sm90_wide", splits}});
  };
  EXPECT(plan(8192, 4096).tiles == 136 && plan(8192, 4096).whole == 132 && plan(8192, 4096).splits > 8);
  EXPECT(plan(8192, 768).tiles == 6 && plan(8192, 768).whole == 0 && plan(8192, 768).splits > 4);
  EXPECT(plan(64, 4096).whole == 136 && plan(64, 4096).scratch_floats == 0);  // one step cannot be shared
  EXPECT(plan(8192, 4096, 1).whole == 136 && plan(8192, 4096, 5).splits == 5);
  EXPECT(plan(8192, 2560, 2, 110).reason == "it cannot split its work over 2 CTAs");  // 55 squares: one wave
  EXPECT(plan(8192, 2560, 0, 110).whole == 55 && plan(8192, 2560, 1, 110).reason.empty());
  EXPECT(plan(8192, 512, 0, 1).reason == "covariance_sm90_wide does not run this problem");
  for (int64_t features : {8, 256, 264, 1024, 4096, 11008})
    for (int64_t tokens : {1, 64, 4097, 65536}) {
      const CovariancePlan found = plan(tokens, features);
      expect_legal({tokens, features, 1, Dtype::bfloat16, Source::aligned_matrix, h200, false, {found.kernel, 0}});
      // Every cluster has tokens of a square, and every square all of its tokens, once.
      std::vector<int64_t> taken(static_cast<size_t>(found.tiles), 0);
      for (int64_t c = 0; c < covariance::wide::clusters(found.tiles, found.whole, found.splits); ++c) {
        const auto share = covariance::wide::share_of_cluster(c, found.whole, found.splits);
        const auto range = share.split_tile < 0
                               ? covariance::Range{0, tokens}
                               : covariance::tokens_of_split(share.split, found.tokens_per_split, tokens);
        EXPECT(range.begin < range.end && share.tile < found.tiles);
        EXPECT(share.split_tile < 0 ? share.tile < found.whole : share.tile == found.whole + share.split_tile);
        EXPECT(share.split_tile < 0 || range.begin == taken[static_cast<size_t>(share.tile)]);
        taken[static_cast<size_t>(share.tile)] += range.end - range.begin;
      }
      for (int64_t count : taken) EXPECT(count == tokens);
    }
}

// A requested plan is legal and planned as requested, or refused.
void choices_are_kept_or_refused() {
  const Machine h200{90, 132, 232448}, a100 = kMachines[0];
  const CovarianceProblem wide{8192, 768, 1, Dtype::bfloat16, Source::aligned_matrix, h200};
  const auto covariance = [](CovarianceProblem problem, const char* kernel, int64_t splits) {
    problem.choice = {kernel, splits};
    return plan_covariance(problem);
  };
  const auto linear = [](LowRankProblem problem, const char* kernel, int64_t splits) {
    problem.choice = {kernel, splits};
    return plan_lowrank_linear(problem);
  };
  int kept = 0;
  for (const char* kernel : {"", "covariance_sm80", "covariance_sm90", "covariance_sm90_wide"})
    for (int64_t splits = -1; splits <= 66; ++splits) {
      CovarianceProblem problem = wide;
      problem.choice = {kernel, splits};
      const CovariancePlan plan = plan_covariance(problem);
      if (!plan.reason.empty()) continue;
      ++kept;
      EXPECT(splits >= 0 && splits <= 64 && (splits == 0 || plan.splits == splits));
      EXPECT(*kernel == 0 || plan.kernel == kernel);
      expect_legal(problem);
    }
  EXPECT(kept >= 4 * 20);
  EXPECT(covariance(wide, "covariance_sm80", 7).splits == 7);
  EXPECT(covariance(wide, "covariance_sm80", 0).kernel == "covariance_sm80");
  CovarianceProblem elsewhere = wide;
  elsewhere.machine = a100;
  EXPECT(covariance(elsewhere, "covariance_sm90", 0).reason == "covariance_sm90 does not run this problem");
  EXPECT(covariance(wide, "decode_sm80", 0).reason == "decode_sm80 does not run this problem");
  EXPECT(covariance(wide, "", 65).reason == "it cannot split its work over 65 CTAs");
  const int64_t beyond = std::numeric_limits<int64_t>::max();  // must not overflow on the way to being refused
  EXPECT(covariance(wide, "", beyond).reason.find("it cannot split") == 0);
  EXPECT(covariance(wide, "", -beyond).reason.find("it cannot split") == 0);
  CovarianceProblem one_step = wide;
  one_step.tokens = 8;
  EXPECT(covariance(one_step, "", 2).reason == "it cannot split its work over 2 CTAs");
  CovarianceProblem widest = wide;
  widest.features = 65536;  // the partial sums of two splits alone would take 17 GB
  EXPECT(covariance(widest, "covariance_sm90", 1).reason.empty());
  EXPECT(covariance(widest, "covariance_sm90", 2).reason == "it cannot split its work over 2 CTAs");

  const LowRankProblem decode{4, 4096, 512, 4096, Dtype::bfloat16, true, h200};
  kept = 0;
  for (const char* kernel : {"", "decode_sm80", "decode_sm90"})
    for (int64_t splits = -1; splits <= 300; ++splits) {
      LowRankProblem problem = decode;
      problem.choice = {kernel, splits};
      const LowRankPlan plan = plan_lowrank_linear(problem);
      if (!plan.reason.empty()) continue;
      ++kept;
      EXPECT(splits >= 0 && (splits == 0 || plan.splits == splits) && (*kernel == 0 || plan.kernel == kernel));
      expect_legal(problem);
    }
  EXPECT(kept >= 3 * 5);
  EXPECT(linear(decode, "decode_sm90", 3).reason == "it cannot split its work over 3 CTAs");
  EXPECT(linear(decode, "decode_sm90", 8).cluster == 8);
  EXPECT(linear(decode, "", 3).kernel == "decode_sm80");  // the first that can
  EXPECT(linear(decode, "prefill_sm90", 0).reason == "prefill_sm90 does not run this problem");
  EXPECT(linear(decode, "decode_sm80", beyond).reason.find("it cannot split") == 0);
  EXPECT(linear(decode, "decode_sm80", -beyond).reason.find("it cannot split") == 0);
  // Any choice of the planner itself may be requested, also where a CTA of a cluster has no features.
  LowRankProblem narrow{1, 1032, 8, 4096, Dtype::bfloat16, true, h200};
  const LowRankPlan own = plan_lowrank_linear(narrow);
  EXPECT((own.splits - 1) * own.split_features >= narrow.in_features);
  EXPECT(linear(narrow, own.kernel.c_str(), own.splits).reason.empty());
  for (int64_t features = 8; features <= 4096; features += 8) {
    narrow.in_features = features;
    const LowRankPlan chosen = plan_lowrank_linear(narrow);
    EXPECT(describe(linear(narrow, chosen.kernel.c_str(), chosen.splits)) == describe(chosen));
  }
  LowRankProblem prefill = decode;
  prefill.tokens = 2048;
  prefill.rank = 128;
  for (int cluster : {1, 2, 4}) EXPECT(linear(prefill, "prefill_sm90", cluster).cluster == cluster);
  EXPECT(linear(prefill, "", 3).reason.find("clusters of 3") != std::string::npos);
  for (int tile : {128, 192, 256}) {
    LowRankProblem problem = prefill;
    problem.choice.token_tile = tile;
    EXPECT(plan_lowrank_linear(problem).token_tile == tile);
    expect_legal(problem);
  }
  prefill.choice.token_tile = 64;
  EXPECT(plan_lowrank_linear(prefill).reason.find("no kernel for 64 tokens") != std::string::npos);
  LowRankProblem few = decode;
  few.choice.token_tile = 128;
  EXPECT(plan_lowrank_linear(few).reason == "only prefill_sm90 has a choice of tokens per CTA");
  EXPECT(linear(prefill, "decode_sm90", 0).reason == "decode_sm90 does not run this problem");
  // A few tiles of tokens: by the decode kernels if they are requested.
  LowRankProblem some = decode;
  for (int64_t tokens : {65, 200, 256})
    for (const char* kernel : {"decode_sm80", "decode_sm90"})
      for (int64_t splits : {0, 2, 8}) {
        some.tokens = tokens;
        some.choice = {kernel, splits};
        EXPECT(plan_lowrank_linear(some).kernel == kernel && plan_lowrank_linear(some).token_tile == 64);
        expect_legal(some);
      }
  some.choice = {};
  EXPECT(plan_lowrank_linear(some).reason.find("the rank must be at most 256") != std::string::npos);
  some.tokens = 257;
  EXPECT(linear(some, "decode_sm80", 0).reason == "decode_sm80 does not run this problem");
}

void refusals_say_why() {
  const Machine a100 = kMachines[0], none{0, 0, 0}, v100{70, 80, 98304};
  const auto covariance = [](int64_t tokens, int64_t features, Dtype dtype, const Machine& machine) {
    return plan_covariance({tokens, features, 1, dtype, Source::matrix, machine}).reason;
  };
  const auto says = [](const std::string& reason, const char* what) { return reason.find(what) != std::string::npos; };
  EXPECT(says(covariance(8, 8, Dtype::bfloat16, none), "needs a CUDA device"));
  EXPECT(says(covariance(8, 8, Dtype::bfloat16, v100), "has 7.0"));
  EXPECT(says(covariance(8, 8, Dtype::float64, a100), "not float64"));
  EXPECT(says(covariance(0, 8, Dtype::float16, a100), "nothing to add"));
  EXPECT(says(covariance(8, int64_t{1} << 25, Dtype::float16, a100), "more tiles"));
  const auto lowrank = [](int64_t tokens, int64_t rank, Dtype dtype, const Machine& machine) {
    return plan_lowrank_linear({tokens, 768, rank, 768, dtype, true, machine}).reason;
  };
  EXPECT(says(lowrank(65, 8, Dtype::bfloat16, a100), "at most 64 tokens, got 65"));
  EXPECT(says(lowrank(65, 8, Dtype::bfloat16, a100), "needs compute capability 9.0"));
  EXPECT(says(lowrank(65, 257, Dtype::bfloat16, {90, 132, 232448}), "at most 256, got 257"));
  EXPECT(says(lowrank(65, 64, Dtype::bfloat16, {90, 132, 60000}), "no kernel for 60000 bytes"));
  EXPECT(says(plan_lowrank_linear({65, 8, 8, 8, Dtype::float16, false, {90, 132, 232448}}).reason, "on 16 bytes"));
  EXPECT(says(lowrank(1, 8, Dtype::float32, a100), "not float32"));
  EXPECT(says(lowrank(1, 20000, Dtype::float16, a100), "rank 20000 needs"));
  EXPECT(says(lowrank(1, 0, Dtype::float16, a100), "empty"));
  EXPECT(says(lowrank(1, 8, Dtype::float16, none), "needs a CUDA device"));
}

// Rows past the last token have 32-bit numbers too, up to the end of the largest tile that there is.
void as_many_tokens_as_the_largest_tile_allows() {
  using namespace lowrank_linear::prefill;
  const int64_t largest = kMaxTokenTile;
  int64_t largest_tile = 0;
  for (const Variant& v : kVariants) largest_tile = max64(largest_tile, v.token_tile());
  EXPECT(largest_tile == largest);
  const auto reason = [](int64_t tokens) {
    return plan_lowrank_linear({tokens, 768, 64, 768, Dtype::bfloat16, true, {90, 132, 232448}}).reason;
  };
  const int64_t max_tokens = std::numeric_limits<int32_t>::max() - largest;
  EXPECT(reason(max_tokens).empty());
  const std::string bound = "for more, it takes at most 2^31 - " + std::to_string((int64_t{1} << 31) - max_tokens);
  EXPECT(reason(max_tokens + 1).find(bound) != std::string::npos);
}

void names_are_parsed() {
  EXPECT(parse_dtype("bfloat16") == Dtype::bfloat16);
  EXPECT(parse_source("patches") == Source::patches);
  EXPECT(arch_refusal("80,90a", 86).empty());
  EXPECT(arch_refusal("80,90a", 90).empty());
  EXPECT(arch_refusal("80,100f", 103).empty());
  EXPECT(arch_refusal("80,90a,100f", 120).find("no code for sm_120") != std::string::npos);
  EXPECT(!arch_refusal("86", 80).empty());
  EXPECT(!arch_refusal("80,86,100f", 87).empty() && arch_refusal("80,87", 87).empty());
  EXPECT(!arch_refusal("80,100f", 101).empty());
  bool refused = false;
  try {
    parse_dtype("int8");
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  EXPECT(refused);
}

}  // namespace

int main() {
  every_plan_is_legal();
  groups_split_as_one_layer();
  hopper_covariances_use_wgmma_where_possible();
  hopper_decodes_in_one_launch_where_possible();
  few_token_tiles_are_shared_by_clusters();
  clusters_are_those_that_are_resident();
  every_variant_is_the_plan_of_some_problem();
  few_tiles_are_split_to_fill_the_machine();
  wide_tiles_beyond_whole_waves_are_split();
  choices_are_kept_or_refused();
  refusals_say_why();
  as_many_tokens_as_the_largest_tile_allows();
  names_are_parsed();
  return tests::result();
}
