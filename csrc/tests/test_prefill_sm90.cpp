// The sm_90 prefill kernel on the host: the tensor copy engine and wgmma as the PTX manual describes them, fed with the
// kernel's own index functions and descriptors. Faults planted in the emulation have to be found by the same comparison.
#include "../lowrank_linear/back_to_back.h"

#include <algorithm>
#include <array>
#include <random>
#include <vector>

#include "../planner.h"
#include "lowrank.h"
#include "half.h"

using namespace lowrank_ops;
using namespace lowrank_ops::tests;
namespace p = lowrank_ops::lowrank_linear::prefill;

namespace {

enum class Fault { none, no_swizzle, wrong_stride, t_not_rounded, own_columns_only, words_not_transposed, last_box_left_out };

using Shared = std::vector<float>;  // an element for every two bytes

// The 128-byte swizzle: address bits 4..6 are flipped by bits 7..9.
int swizzled(int address) { return address ^ ((address >> 7 & 7) << 4); }

// cp.async.bulk.tensor: rows of 64 values, one after another, zeros outside the matrix.
void copy_box(Shared& shared, int to, const Matrix& m, int64_t col, int64_t row, int rows, Fault fault) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < p::kBox; ++j) {
      const bool inside = row + i < m.rows && col + j < m.cols;
      const int address = to + i * p::kRowBytes + j * 2;
      shared.at((fault == Fault::no_swizzle ? address : swizzled(address)) / 2) = inside ? m.at(row + i, col + j) : 0.0f;
    }
}

// Element (row, k) of an operand whose summed values are contiguous, as wgmma finds it by a descriptor.
float operand(const Shared& shared, uint64_t descriptor, int row, int k, Fault fault) {
  const int start = static_cast<int>(descriptor & 0x3FFF) * 16;
  const int stride = static_cast<int>(descriptor >> 32 & 0x3FFF) * (fault == Fault::wrong_stride ? 8 : 16);
  EXPECT(descriptor >> 62 == 1);        // 128-byte swizzle
  EXPECT((descriptor >> 49 & 7) == 0);  // the pattern starts on 1024 bytes,
  EXPECT(start % 1024 < 128);           // and what it describes in its first row
  EXPECT(start % 128 + 2 * p::kStep <= 128);
  return shared.at(swizzled(start + row / 8 * stride + row % 8 * p::kRowBytes + k * 2) / 2);
}

struct Case {
  Matrix x, down, up;
  p::Variant variant;
};

using Registers = std::array<std::array<float, 2>, 4>;  // a step's left operand: four words of two values

// y before bias and activation.
std::vector<float> emulate(const Case& c, Fault fault) {
  const int64_t tokens = c.x.rows, in = c.x.cols, out = c.up.rows;
  const p::Variant& v = c.variant;
  const int columns = v.columns(), steps = v.steps();
  std::vector<float> y(tokens * out, NAN);
  std::vector<int> written(tokens * out, 0);
  for (int64_t first_token = 0; first_token < tokens; first_token += v.tokens()) {
    // What each block's consumers receive, by bytes of the exchange.
    std::vector<std::vector<Registers>> exchange(
        v.cluster, std::vector<Registers>(greatest(v.consumers() * steps, 1), Registers{{{NAN, NAN}, {NAN, NAN}, {NAN, NAN}, {NAN, NAN}}}));
    for (int rank = 0; rank < v.cluster; ++rank) {
      std::vector<std::vector<float>> acc(v.consumers(), std::vector<float>(columns / 2, 0.0f));
      const int down_steps = static_cast<int>(ceil_div(in, p::kBox)) - (fault == Fault::last_box_left_out);
      for (int step = 0; step < down_steps; ++step) {
        Shared stage(p::stage_bytes(v) / 2, NAN);
        copy_box(stage, 0, c.x, int64_t{step} * p::kBox, first_token, v.tokens(), fault);
        copy_box(stage, p::x_bytes(v.groups), c.down, int64_t{step} * p::kBox, rank * columns, columns, fault);
        for (int group = 0; group < v.groups; ++group)
          for (int k = 0; k < p::kBox / p::kStep; ++k) {
            const uint64_t a = p::descriptor(p::x_start(group, k)), b = p::descriptor(p::down_start(k, v.groups));
            std::vector<float> left(64 * p::kStep), right(columns * p::kStep);
            for (int e = 0; e < p::kStep; ++e) {
              for (int m = 0; m < 64; ++m) left[m * p::kStep + e] = operand(stage, a, m, e, fault);
              for (int n = 0; n < columns; ++n) right[n * p::kStep + e] = operand(stage, b, n, e, fault);
            }
            for (int thread = 0; thread < 128; ++thread)
              for (int i = 0; i < columns / 2; ++i) {
                // The manual's layout of the accumulator.
                const int m = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, n = i / 4 * 8 + thread % 4 * 2 + i % 2;
                for (int e = 0; e < p::kStep; ++e)
                  acc[group * 128 + thread][i] += left[m * p::kStep + e] * right[n * p::kStep + e];
              }
          }
      }
      for (int consumer = 0; consumer < v.consumers(); ++consumer)
        for (int step = 0; step < columns / p::kStep; ++step) {
          Registers words;
          for (int w = 0; w < 4; ++w)
            for (int half = 0; half < 2; ++half) {
              const float sum = acc[consumer][p::accumulator_of_word(step, w) + half];
              words[w][half] = fault == Fault::t_not_rounded ? sum : to_bfloat16(sum);
            }
          const int at = p::first_step(rank, columns) + step;
          for (int block = 0; block < v.cluster && at < steps; ++block)
            if (fault != Fault::own_columns_only || block == rank)
              exchange[block].at(p::exchange_index(consumer, at, v.ranks) / 16) = words;
        }
    }
    for (int rank = 0; rank < v.cluster; ++rank)
      for (int n = 0; n < p::up_tiles(rank, v.cluster, out); ++n) {
        const int64_t first = p::up_tile(rank, n, v.cluster) * p::kOutputs;
        Shared stage(p::stage_bytes(v) / 2, NAN);
        for (int box = 0; box < p::up_boxes(v.ranks); ++box)
          copy_box(stage, box * p::kUpBoxBytes, c.up, box * p::kBox, first, p::kOutputs, fault);
        std::vector<std::array<float, 32>> acc(v.consumers(), std::array<float, 32>{});
        for (int k = 0; k < steps; ++k) {
          const uint64_t b = p::descriptor(p::up_start(k));
          std::vector<float> right(p::kOutputs * p::kStep);
          for (int e = 0; e < p::kStep; ++e)
            for (int col = 0; col < p::kOutputs; ++col) right[col * p::kStep + e] = operand(stage, b, col, e, fault);
          for (int group = 0; group < v.groups; ++group) {
            // The manual's layout of a left operand in registers: word w of a thread has, of row thread / 4 + 8 * (w % 2)
            // of its warp's 16, values 2 * (thread % 4) + 8 * (w / 2) and the next.
            float left[64][p::kStep];
            for (int thread = 0; thread < 128; ++thread)
              for (int w = 0; w < 4; ++w)
                for (int half = 0; half < 2; ++half)
                  left[thread / 32 * 16 + thread % 32 / 4 + w % 2 * 8][thread % 4 * 2 + w / 2 * 8 + half] =
                      exchange[rank].at(p::exchange_index(group * 128 + thread, k, v.ranks) / 16)[w][half];
            for (int thread = 0; thread < 128; ++thread)
              for (int i = 0; i < 32; ++i) {
                const int m = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, col = i / 4 * 8 + thread % 4 * 2 + i % 2;
                for (int e = 0; e < p::kStep; ++e)
                  acc[group * 128 + thread][i] += left[m][e] * right[col * p::kStep + e];
              }
          }
        }
        const auto put = [&](int64_t token, int64_t col, float value) {
          if (token >= tokens || col >= out) return;
          ++written[token * out + col];
          y[token * out + col] = value;
        };
        if (out % 8 != 0) {
          for (int consumer = 0; consumer < v.consumers(); ++consumer)
            for (int i = 0; i < 32; ++i)
              put(first_token + p::accumulator_token(consumer, i), first + p::accumulator_column(consumer, i),
                  acc[consumer][i]);
          continue;
        }
        for (int quad = 0; quad < v.consumers(); quad += 4)
          for (int half = 0; half < 2; ++half)
            for (int block = 0; block < p::kOutputs; block += 32) {
              std::array<std::array<std::array<float, 2>, 4>, 4> words;  // by lane
              for (int lane = 0; lane < 4; ++lane)
                for (int w = 0; w < 4; ++w)
                  for (int e = 0; e < 2; ++e)
                    words[lane][w][e] = acc[quad + lane][(block / 8 + w) * 4 + half * 2 + e];
              for (int round = 0; round < (fault == Fault::words_not_transposed ? 0 : 2); ++round)
                for (int i = 0; i < 2; ++i) {
                  const auto before = words;  // a shuffle: all lanes at once
                  for (int lane = 0; lane < 4; ++lane) {
                    const int other = lane ^ 1 << round;
                    const int given = p::gives_lower(other, round) ? p::lower_word(round, i) : p::upper_word(round, i);
                    const int taken = p::gives_lower(lane, round) ? p::lower_word(round, i) : p::upper_word(round, i);
                    words[lane][taken] = before[other][given];
                  }
                }
              for (int lane = 0; lane < 4; ++lane)
                for (int w = 0; w < 4; ++w)
                  for (int e = 0; e < 2; ++e)
                    put(first_token + p::accumulator_token(quad + lane, half * 2), first + block + lane * 8 + w * 2 + e,
                        words[lane][w][e]);
            }
      }
  }
  if (fault == Fault::none)
    for (int count : written) EXPECT(count == 1);
  return y;
}

Case random_case(int64_t tokens, int64_t in, int64_t rank, int64_t out, p::Variant variant) {
  std::mt19937 random(static_cast<unsigned>(tokens + in * 3 + rank * 5 + out * 7 + variant.cluster));
  return {random_matrix(tokens, in, random), random_matrix(rank, in, random), random_matrix(out, rank, random), variant};
}

template <class F>
void for_every_kernel(F f) {
  for (int ranks = p::kLeastRanks; ranks <= p::kMostRank; ranks += p::kStep)
    for (int cluster = 1; cluster <= 8; ++cluster)
      for (int groups : p::kGroups)
        if (p::exists({ranks, cluster, groups})) f(p::Variant{ranks, cluster, groups});
}

void peers_bring_whole_patterns_of_all_weights() {
  int kernels = 0;
  for (int ranks = p::kLeastRanks; ranks <= p::kMostRank; ranks += p::kStep)
    for (int cluster = 1; cluster <= 8; ++cluster)
      for (int groups : p::kGroups) {
        const p::Variant v{ranks, cluster, groups, p::kMostPeers}, alone{ranks, cluster, groups};
        if (!p::exists(v)) continue;
        ++kernels;
        EXPECT(p::exists(alone) && p::shared_bytes(v) == p::shared_bytes(alone));
        EXPECT(p::down_box_rows(v) * v.peers == v.columns() && p::down_box_rows(v) % 8 == 0);
        EXPECT(p::up_box_rows(v) * v.peers == p::kOutputs && p::up_box_rows(v) % 8 == 0);
      }
  EXPECT(kernels == 3 + 3);
}

void every_kernel_gives_plain_sums() {
  int kernels = 0;
  for_every_kernel([&](p::Variant v) {
    ++kernels;
    const Case c = random_case(v.tokens() - 60 + 20 * v.cluster, 200, v.ranks - 3 * v.cluster,
                               v.cluster % 2 ? 139 : 200, v);
    EXPECT(same(emulate(c, Fault::none), exact(c.x, c.down, c.up)));
  });
  EXPECT(kernels == 16 + 15);
  const Case narrow = random_case(130, 8, 1, 3, {64, 2, 2});  // one block has no rows of up
  EXPECT(same(emulate(narrow, Fault::none), exact(narrow.x, narrow.down, narrow.up)));
}

void planted_faults_are_found() {
  for (int groups : p::kGroups) {
    const Case c = random_case(100, 200, 120, 200, {128, 2, groups});
    EXPECT(same(emulate(c, Fault::none), exact(c.x, c.down, c.up)));
    for (Fault fault : {Fault::no_swizzle, Fault::wrong_stride, Fault::t_not_rounded, Fault::own_columns_only,
                        Fault::words_not_transposed, Fault::last_box_left_out})
      EXPECT(!same(emulate(c, fault), exact(c.x, c.down, c.up)));
  }
}

void normal_data_is_as_near_to_float64_as_two_products() {
  std::mt19937 random(3);
  const Case c{normal_matrix(66, 768, 1.0f, random), normal_matrix(136, 768, 1 / 27.7f, random),
               normal_matrix(96, 136, 1 / 11.7f, random), {192, 1, 2}};
  expect_as_near_as_two_products(emulate(c, Fault::none), c.x, c.down, c.up);
}

void shared_memory_is_laid_out_for_the_copy_engine() {
  for_every_kernel([&](p::Variant v) {
    EXPECT(p::stages(v) >= 2);
    EXPECT(p::shared_bytes(v) <= p::kSharedLimit);
    EXPECT(p::stage_bytes(v) % p::kAlignment == 0 && p::x_bytes(v.groups) % p::kAlignment == 0);
    EXPECT(p::kUpBoxBytes % p::kAlignment == 0);
    EXPECT(p::down_step_bytes(v) <= p::stage_bytes(v));
    EXPECT(p::up_step_bytes(v.ranks) <= p::stage_bytes(v));
    EXPECT(p::barrier_offset(v) % 8 == 0);
    EXPECT(v.tokens() <= 256 && v.columns() <= 256);  // rows of a box
    EXPECT(p::x_box_rows(v) * v.cluster == v.tokens() && p::x_box_rows(v) % 8 == 0);
    // The exchange: every consumer's every step has its 16 bytes.
    std::vector<int> seen(v.consumers() * v.ranks / p::kStep, 0);
    for (int consumer = 0; consumer < v.consumers(); ++consumer)
      for (int step = 0; step < v.ranks / p::kStep; ++step) ++seen.at(p::exchange_index(consumer, step, v.ranks) / 16);
    for (int count : seen) EXPECT(count == 1);
    EXPECT(v.cluster == 1 || p::exchange_bytes(v) == static_cast<int>(seen.size()) * 16);
  });
}

void every_row_of_up_is_multiplied_once() {
  for (int cluster : {1, 2, 4, 8})
    for (int64_t out : {int64_t{1}, int64_t{63}, int64_t{64}, int64_t{65}, int64_t{511}, int64_t{768}, int64_t{11008}}) {
      std::vector<int> seen(ceil_div(out, p::kOutputs), 0);
      for (int rank = 0; rank < cluster; ++rank)
        for (int n = 0; n < p::up_tiles(rank, cluster, out); ++n) ++seen.at(p::up_tile(rank, n, cluster));
      for (int count : seen) EXPECT(count == 1);
    }
  EXPECT(p::up_tile(7, p::up_tiles(7, 8, int64_t{1} << 30) - 1, 8) == ((int64_t{1} << 30) / p::kOutputs) - 1);
}

}  // namespace

int main() {
  every_kernel_gives_plain_sums();
  planted_faults_are_found();
  normal_data_is_as_near_to_float64_as_two_products();
  shared_memory_is_laid_out_for_the_copy_engine();
  every_row_of_up_is_multiplied_once();
  peers_bring_whole_patterns_of_all_weights();
  return tests::result();
}
