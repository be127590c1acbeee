// The decode pair's index arithmetic, and its algorithm lane by lane, against plain sums.
#include "../planner.h"
#include "lowrank.h"

using namespace lowrank_ops;
using namespace lowrank_ops::lowrank_linear;
using namespace lowrank_ops::tests;

namespace {

enum class Fault { none, t_not_rounded, last_split_left_out, rows_of_a_neighbour };

bool equals_plain_sums(int64_t tokens, int64_t in, int64_t rank, int64_t out, const Machine& machine,
                       Fault fault = Fault::none) {
  std::mt19937 random(static_cast<unsigned>(tokens + in * 3 + rank * 5 + out * 7));
  const Matrix x = random_matrix(tokens, in, random), down = random_matrix(rank, in, random),
               up = random_matrix(out, rank, random);
  const LowRankPlan plan = plan_lowrank_linear({tokens, in, rank, out, Dtype::bfloat16, false, machine});
  EXPECT(plan.kernel == "decode_sm80");
  const int tile = plan.token_tile, splits = plan.splits - (fault == Fault::last_split_left_out);
  std::vector<float> scratch(plan.scratch_floats, NAN), y(tokens * out, NAN);
  std::vector<int> written(tokens * out, 0);
  Matrix t{tokens, rank, std::vector<float>(tokens * rank, 0.0f)};

  for (int64_t first_token = 0; first_token < tokens; first_token += tile)
    for (int64_t first_row = 0; first_row < rank; first_row += plan.rows_down)
      for (int split = 0; split < plan.splits; ++split) {
        const int64_t begin = split * plan.split_features, end = least(begin + plan.split_features, in);
        const auto sums =
            multiply(rows_of(down, first_row, end), rows_of(x, first_token, end), begin, end, 1, tile);
        for (int i = 0; i < kRows * tile; ++i) {
          const int64_t r = first_row + i % kRows, token = first_token + i / kRows;
          if (r < rank && token < tokens)
            scratch[partial_index(split, token, r, tokens, rank)] =
                sum_of_warps(sums, i % kRows, i / kRows, kRows, tile);
        }
      }
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t r = 0; r < rank; ++r) {
      float sum = 0;
      for (int split = 0; split < splits; ++split) sum += scratch[partial_index(split, token, r, tokens, rank)];
      t.values[token * rank + r] = fault == Fault::t_not_rounded ? sum : to_bfloat16(sum);
    }

  for (int64_t first_token = 0; first_token < tokens; first_token += tile)
    for (int64_t first_row = 0; first_row < out; first_row += plan.rows_up) {
      const int64_t from = first_row + (fault == Fault::rows_of_a_neighbour ? kRows : 0);
      const auto sums = multiply(rows_of(up, from, rank), rows_of(t, first_token, rank), 0, rank,
                                 plan.rows_up / kRows, tile);
      for (int i = 0; i < plan.rows_up * tile; ++i) {
        const int64_t n = first_row + i % plan.rows_up, token = first_token + i / plan.rows_up;
        if (n >= out || token >= tokens) continue;
        ++written[token * out + n];
        y[token * out + n] = sum_of_warps(sums, i % plan.rows_up, i / plan.rows_up, plan.rows_up, tile);
      }
    }
  for (int count : written) EXPECT(count == 1);
  return same(y, exact(x, down, up));
}

const Machine kA100{80, 108, 166912};

void the_algorithm_gives_plain_sums() {
  for (int64_t tokens : {1, 8, 9, 17, 33, 64})
    for (int64_t rank : {1, 8, 15, 33}) EXPECT(equals_plain_sums(tokens, 70, rank, 50, kA100));
  EXPECT(equals_plain_sums(3, 2048, 24, 40, kA100));                // features split over blocks
  EXPECT(equals_plain_sums(40, 100, 150, 33, {86, 20, 8192}));  // tokens split over blocks: t does not fit
}

void planted_faults_are_found() {
  for (Fault fault : {Fault::t_not_rounded, Fault::last_split_left_out, Fault::rows_of_a_neighbour})
    EXPECT(!equals_plain_sums(3, 2048, 24, 40, kA100, fault));
}

void lanes_cover_a_step_once() {
  std::vector<int> weights(kRows * kFeatures, 0), tokens(8 * kFeatures, 0), sums(16 * 8, 0);
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < kVector; ++e) {
      for (int half = 0; half < 2; ++half)
        ++weights[(lane_row(lane) + half * 8) * kFeatures + lane_feature(lane) + e];
      ++tokens[lane_token(lane) * kFeatures + lane_feature(lane) + e];
    }
    for (int e = 0; e < 4; ++e) ++sums[accumulator_row(lane, e) * 8 + accumulator_token(lane, e)];
  }
  for (int count : weights) EXPECT(count == 1);
  for (int count : tokens) EXPECT(count == 1);
  for (int count : sums) EXPECT(count == 1);
}

void t_is_read_without_bank_conflicts() {
  for (int64_t rank : {8, 134, 163, 215, 512, 746, 1024, 1492})
    for (int phase = 0; phase < 4; ++phase) {
      EXPECT(rank_pitch(rank) % 16 == 0);
      std::vector<int> banks(32, 0);
      for (int lane = phase * 8; lane < phase * 8 + 8; ++lane)
        for (int word = 0; word < 4; ++word)
          ++banks[(lane_token(lane) * rank_pitch(rank) / 4 + lane_feature(lane) / 2 + word) % 32];
      for (int count : banks) EXPECT(count == 1);
    }
}

}  // namespace

int main() {
  the_algorithm_gives_plain_sums();
  planted_faults_are_found();
  lanes_cover_a_step_once();
  t_is_read_without_bank_conflicts();
  return tests::result();
}
