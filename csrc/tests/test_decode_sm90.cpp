// The sm_90 decode kernel on the host: its index arithmetic, and its algorithm block by block, with shared memory of
// bytes that start as NaN. An emulation with a fault planted in it has to be found out by the same comparison.
#include "../lowrank_linear/slabs.h"

#include <algorithm>

#include "../planner.h"
#include "lowrank.h"
#include "half.h"

using namespace lowrank_ops;
using namespace lowrank_ops::lowrank_linear;
using namespace lowrank_ops::tests;

namespace {

enum class Fault { none, one_buffer_of_sums, no_streamed_rows, narrow_rows, last_features_left_out, t_not_rounded };

struct Block {
  std::vector<uint8_t> shared;

  template <class T>
  T get(int64_t byte) const {
    EXPECT(byte >= 0 && byte + static_cast<int64_t>(sizeof(T)) <= static_cast<int64_t>(shared.size()));
    T value;
    std::memcpy(&value, shared.data() + byte, sizeof(T));
    return value;
  }
  template <class T>
  void put(int64_t byte, T value) {
    EXPECT(byte >= 0 && byte + static_cast<int64_t>(sizeof(T)) <= static_cast<int64_t>(shared.size()));
    std::memcpy(shared.data() + byte, &value, sizeof(T));
  }
};

// 8 values of a row in shared memory, zeros where there is no row and past the rank.
Load rows_in_shared(const Block& block, int64_t start, int64_t pitch, int64_t rows, int64_t rank) {
  return [&block, start, pitch, rows, rank](int64_t row, int64_t feature) {
    std::array<float, 8> v{};
    for (int e = 0; e < kVector && row < rows && feature < rank; ++e)
      v[e] = from_bfloat16(block.get<uint16_t>(start + row * pitch + (feature + e) * 2));
    return v;
  };
}

struct Case {
  Matrix x, down, up;
  Machine machine;
  int64_t fewer_clusters;  // than the planner counted: what a device may hold
};

// y before bias and activation, as float: the last rounding is the comparison's business.
std::vector<float> emulate(const Case& c, Fault fault) {
  const int64_t tokens = c.x.rows, in = c.x.cols, rank = c.down.rows, out = c.up.rows;
  const LowRankPlan plan = plan_lowrank_linear({tokens, in, rank, out, Dtype::bfloat16, true, c.machine});
  EXPECT(plan.kernel == "decode_sm90");
  const int cluster = plan.cluster, tile = plan.token_tile;
  const int64_t clusters = plan.blocks / cluster - c.fewer_clusters, blocks = clusters * cluster;
  const Layout at = layout(tile, rank, plan.resident_tiles);
  EXPECT(at.bytes == plan.shared_bytes);
  std::vector<Block> grid(blocks, Block{std::vector<uint8_t>(at.bytes, 0xFF)});
  std::vector<float> scratch(plan.scratch_floats * 2, NAN);  // t, rounded

  // The copy engine: rows of up to the slab.
  for (int64_t b = 0; b < blocks; ++b) {
    const Span slab = slab_of_block(b, blocks, out);
    const int64_t resident = least(plan.resident_tiles, slab.end - slab.begin), first = slab.begin * kRows;
    for (int64_t row = 0; row < least(resident * kRows, out - first); ++row)
      for (int64_t r = 0; r < rank; ++r)
        grid[b].put<uint16_t>(at.slab + row * rank_pitch(rank) + r * 2, bfloat16_bits(c.up.at(first + row, r)));
  }

  // Down. Between two barriers of a cluster its first block reads the sums of one round and leaves those of the next
  // before the others have read any.
  const auto sums_at = [&](int round, int i) {
    return at.block_sums + 4 * block_sum_index(fault == Fault::one_buffer_of_sums ? 0 : round, i, tile);
  };
  for (int64_t group = 0; group < clusters; ++group) {
    std::vector<Unit> rounds;
    for (int64_t i = group; i < units(rank, tokens, tile); i += clusters) rounds.push_back(unit_at(i, rank, tile));
    for (int round = 0; round <= static_cast<int>(rounds.size()); ++round)
      for (int b = 0; b < cluster; ++b) {
        if (round > 0) {
          const Unit unit = rounds[round - 1];
          const Span mine = sums_of_block(b, cluster, tile);
          for (int64_t j = mine.begin; j < mine.end; ++j) {
            float sum = 0;
            for (int peer = 0; peer < cluster; ++peer)
              sum += grid[group * cluster + peer].get<float>(sums_at(round - 1, static_cast<int>(j)));
            const int64_t r = unit.first_row + j % kRows, token = unit.first_token + j / kRows;
            if (r < rank && token < tokens)
              scratch[token * rank + r] = fault == Fault::t_not_rounded ? sum : to_bfloat16(sum);
          }
        }
        if (round == static_cast<int>(rounds.size())) continue;
        const Unit unit = rounds[round];
        Span features = features_of_block(b, plan.split_features, in);
        if (fault == Fault::last_features_left_out && b == cluster - 1) features.end -= 1;
        const auto sums = multiply(rows_of(c.down, unit.first_row, features.end),
                                   rows_of(c.x, unit.first_token, features.end), features.begin, features.end, 1, tile);
        for (int j = 0; j < kRows * tile; ++j)
          grid[group * cluster + b].put<float>(sums_at(round, j), sum_of_warps(sums, j % kRows, j / kRows, kRows, tile));
      }
  }

  // Up, behind the grid's barrier.
  std::vector<float> y(tokens * out, NAN);
  std::vector<int> written(tokens * out, 0);
  const int64_t pitch = fault == Fault::narrow_rows ? rank_pitch(rank) - 64 : rank_pitch(rank);
  for (int64_t b = 0; b < blocks; ++b) {
    const Span slab = slab_of_block(b, blocks, out);
    for (int64_t first_token = 0; first_token < tokens; first_token += tile) {
      for (int row = 0; row < tile; ++row)
        for (int64_t r = 0; r < rank; ++r)
          grid[b].put<uint16_t>(at.t + row * rank_pitch(rank) + r * 2,
                                first_token + row < tokens ? bfloat16_bits(scratch[(first_token + row) * rank + r]) : 0);
      for (int64_t up_tile = slab.begin; up_tile < slab.end; ++up_tile) {
        const int64_t place = up_tile - slab.begin, first_row = up_tile * kRows;
        if (place >= plan.resident_tiles && fault == Fault::no_streamed_rows) continue;
        const Load t = fault == Fault::t_not_rounded
                           ? Load([&](int64_t row, int64_t feature) {
                               std::array<float, 8> v{};
                               for (int e = 0; e < 8 && first_token + row < tokens && feature < rank; ++e)
                                 v[e] = scratch[(first_token + row) * rank + feature + e];
                               return v;
                             })
                           : rows_in_shared(grid[b], at.t, rank_pitch(rank), tile, rank);
        const Load weight = place < plan.resident_tiles
                                ? rows_in_shared(grid[b], at.slab + place * kRows * pitch, pitch, out - first_row, rank)
                                : rows_of(c.up, first_row, rank);
        const auto sums = multiply(weight, t, 0, rank, 1, tile);
        for (int i = 0; i < kRows * tile; ++i) {
          const int64_t n = first_row + i % kRows, token = first_token + i / kRows;
          if (n >= out || token >= tokens) continue;
          ++written[token * out + n];
          y[token * out + n] = sum_of_warps(sums, i % kRows, i / kRows, kRows, tile);
        }
      }
    }
  }
  if (fault == Fault::none)
    for (int count : written) EXPECT(count == 1);
  return y;
}

Case random_case(int64_t tokens, int64_t in, int64_t rank, int64_t out, const Machine& machine, int64_t fewer = 0) {
  std::mt19937 random(static_cast<unsigned>(tokens + in * 3 + rank * 5 + out * 7));
  return {random_matrix(tokens, in, random), random_matrix(rank, in, random), random_matrix(out, rank, random),
          machine, fewer};
}

const Machine kH200{90, 132, 232448};
const Machine kNarrow{90, 12, 40000};  // several rounds, part of the slab streamed

void the_algorithm_gives_plain_sums() {
  for (int64_t tokens : {1, 9, 33, 64})
    for (int64_t rank : {8, 40, 136}) {
      const Case wide = random_case(tokens, 304, rank, 50, kH200);
      EXPECT(same(emulate(wide, Fault::none), exact(wide.x, wide.down, wide.up)));
    }
  const Case cases[] = {
      random_case(3, 1104, 72, 777, kNarrow),        // clusters in several rounds, a streamed tail
      random_case(3, 1104, 72, 777, kNarrow, 1),     // fewer clusters than planned
      random_case(40, 72, 264, 333, kNarrow),        // tokens in several tiles
      random_case(1, 40, 8, 3, kH200),               // more blocks than tiles
      random_case(2, 2048, 24, 40, {90, 1, 232448}),  // one block
  };
  for (const Case& c : cases) EXPECT(same(emulate(c, Fault::none), exact(c.x, c.down, c.up)));
}

void planted_faults_are_found() {
  const Case c = random_case(9, 1104, 72, 777, kNarrow, 4);  // clusters of 2, each in rounds
  EXPECT(same(emulate(c, Fault::none), exact(c.x, c.down, c.up)));
  for (Fault fault : {Fault::one_buffer_of_sums, Fault::no_streamed_rows, Fault::narrow_rows,
                      Fault::last_features_left_out, Fault::t_not_rounded})
    EXPECT(!same(emulate(c, fault), exact(c.x, c.down, c.up)));
}

void normal_data_is_as_near_to_float64_as_two_products() {
  std::mt19937 random(3);
  const Case c{normal_matrix(5, 768, 1.0f, random), normal_matrix(136, 768, 1 / 27.7f, random),
               normal_matrix(200, 136, 1 / 11.7f, random), kNarrow, 0};
  expect_as_near_as_two_products(emulate(c, Fault::none), c.x, c.down, c.up);
}

void everything_is_done_once() {
  for (int cluster : {1, 2, 4, 8})
    for (int64_t features = 1; features < 700; ++features) {
      const int64_t split = ceil_div(ceil_div(features, kFeatures), cluster) * kFeatures;
      int64_t next = 0;
      for (int rank = 0; rank < cluster; ++rank) {
        const Span span = features_of_block(rank, split, features);
        EXPECT(span.begin == next && span.end >= span.begin);
        next = span.end;
      }
      EXPECT(next == features);
    }
  for (int tile : {8, 16, 32, 64})
    for (int cluster : {1, 2, 4, 8}) {
      int64_t next = 0;
      for (int rank = 0; rank < cluster; ++rank) {
        EXPECT(sums_of_block(rank, cluster, tile).begin == next);
        next = sums_of_block(rank, cluster, tile).end;
      }
      EXPECT(next == kRows * tile);
    }
  for (int64_t rank = 1; rank < 200; ++rank)
    for (int64_t tokens : {1, 8, 9, 63, 64})
      for (int tile : {8, 64}) {
        std::vector<int> seen(ceil_div(rank, kRows) * ceil_div(tokens, tile), 0);
        EXPECT(units(rank, tokens, tile) == static_cast<int64_t>(seen.size()));
        for (int64_t i = 0; i < units(rank, tokens, tile); ++i) {
          const Unit unit = unit_at(i, rank, tile);
          EXPECT(unit.first_row < rank && unit.first_token < tokens);
          ++seen.at(unit.first_row / kRows + unit.first_token / tile * ceil_div(rank, kRows));
        }
        for (int count : seen) EXPECT(count == 1);
      }
  const auto expect_slabs = [](int64_t blocks, int64_t out) {
    int64_t next = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const Span slab = slab_of_block(b, blocks, out);
      EXPECT(slab.begin == next && slab.end >= slab.begin && slab.begin * kRows < out);
      EXPECT(slab.end - slab.begin <= ceil_div(ceil_div(out, kRows), blocks));
      next = slab.end;
    }
    EXPECT(next == ceil_div(out, kRows));
  };
  for (int64_t blocks = 1; blocks < 140; ++blocks)
    for (int64_t out : {1, 15, 16, 17, 768, 3072, 4096, 11008, 11009}) expect_slabs(blocks, out);
  std::mt19937_64 random(5);
  for (int i = 0; i < 200; ++i)  // and where rows x rank passes 2^31
    expect_slabs(1 + static_cast<int64_t>(random() % 200), (int64_t{1} << 29) + static_cast<int64_t>(random() % (1 << 29)));
}

void regions_of_shared_memory_do_not_meet() {
  for (int tile : {8, 16, 32, 64})
    for (int64_t rank = 8; rank < 1600; rank += 8) {
      const Layout at = layout(tile, rank, 3);
      EXPECT(at.sums >= 8);
      EXPECT(at.block_sums >= at.sums + sum_bytes(kRows, tile));
      EXPECT(at.t >= at.block_sums + 4 * (block_sum_index(1, kRows * tile - 1, tile) + 1));
      EXPECT(at.slab >= at.t + (tile - 1) * rank_pitch(rank) + rank * 2);
      EXPECT(at.bytes >= at.slab + (3 * kRows - 1) * rank_pitch(rank) + rank * 2);
      for (int64_t offset : {at.sums, at.block_sums, at.t, at.slab, rank_pitch(rank)}) EXPECT(offset % 16 == 0);
    }
}

}  // namespace

int main() {
  the_algorithm_gives_plain_sums();
  planted_faults_are_found();
  normal_data_is_as_near_to_float64_as_two_products();
  everything_is_done_once();
  regions_of_shared_memory_do_not_meet();
  return tests::result();
}
