// The low-rank linear kernels' index arithmetic: every row, feature, sum and byte once, without bank conflicts.
#include <random>
#include <vector>

#include "../lowrank_linear/decode_layout.h"
#include "../lowrank_linear/prefill_layout.h"
#include "check.h"

using namespace lowrank_ops;
using namespace lowrank_ops::lowrank_linear;
namespace p = lowrank_ops::lowrank_linear::prefill;

namespace {

// ---- decode ----

void lanes_cover_a_step_once() {
  std::vector<int> weights(kRows * kFeatures, 0), tokens(8 * kFeatures, 0), sums(16 * 8, 0);
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < kVector; ++e) {
      for (int half = 0; half < 2; ++half) ++weights[(lane_row(lane) + half * 8) * kFeatures + lane_feature(lane) + e];
      ++tokens[lane_token(lane) * kFeatures + lane_feature(lane) + e];
    }
    for (int e = 0; e < 4; ++e) ++sums[arch::mma_accumulator_row(lane, e) * 8 + arch::mma_accumulator_col(lane, e)];
  }
  for (int count : weights) EXPECT(count == 1);
  for (int count : tokens) EXPECT(count == 1);
  for (int count : sums) EXPECT(count == 1);
  std::vector<int> steps(kWarps * 5, 0);
  for (int warp = 0; warp < kWarps; ++warp)
    for (int i = 0; i < 5; ++i) ++steps.at(step_of_warp(warp, i));
  for (int count : steps) EXPECT(count == 1);
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

void ctas_of_a_cluster_cover_features_and_sums_once() {
  for (int cluster : {1, 2, 4, 8})
    for (int64_t features = 1; features < 700; ++features) {
      const int64_t split = ceil_div(ceil_div(features, kFeatures), cluster) * kFeatures;
      int64_t next = 0;
      for (int rank = 0; rank < cluster; ++rank) {
        const Span span = features_of_cta(rank, split, features);
        EXPECT(span.begin == next && span.end >= span.begin);
        next = span.end;
      }
      EXPECT(next == features);
    }
  for (const DecodeSm90Variant& v : kDecodeSm90Variants)
    for (int cluster : {1, 2, 4, 8}) {
      const int sums = v.rows() * v.token_tile;
      int64_t next = 0;
      for (int rank = 0; rank < cluster; ++rank) {
        EXPECT(sums_of_cta(rank, cluster, sums).begin == next);
        next = sums_of_cta(rank, cluster, sums).end;
      }
      EXPECT(next == sums);
    }
}

void work_units_cover_rows_and_tokens_once() {
  for (int64_t rank = 1; rank < 200; ++rank)
    for (int64_t tokens : {1, 8, 9, 63, 64})
      for (int tile : {8, 64})
        for (int rows : {16, 32, 64}) {
          std::vector<int> seen(ceil_div(rank, rows) * ceil_div(tokens, tile), 0);
          EXPECT(work_units(rank, rows, tokens, tile) == static_cast<int64_t>(seen.size()));
          for (int64_t i = 0; i < work_units(rank, rows, tokens, tile); ++i) {
            const WorkUnit unit = work_unit_at(i, rank, rows, tile);
            EXPECT(unit.first_row < rank && unit.first_token < tokens);
            ++seen.at(unit.first_row / rows + unit.first_token / tile * ceil_div(rank, rows));
          }
          for (int count : seen) EXPECT(count == 1);
        }
}

void slabs_cover_up_once() {
  const auto expect_slabs = [](int64_t ctas, int64_t out) {
    int64_t next = 0;
    for (int64_t cta = 0; cta < ctas; ++cta) {
      const Span slab = slab_of_cta(cta, ctas, ceil_div(out, kRows));
      EXPECT(slab.begin == next && slab.end >= slab.begin && slab.begin * kRows < out);
      EXPECT(slab.end - slab.begin <= ceil_div(ceil_div(out, kRows), ctas));
      next = slab.end;
    }
    EXPECT(next == ceil_div(out, kRows));
  };
  for (int64_t ctas = 1; ctas < 140; ++ctas)
    for (int64_t out : {1, 15, 16, 17, 768, 3072, 4096, 11008, 11009}) expect_slabs(ctas, out);
  std::mt19937_64 random(5);
  for (int i = 0; i < 200; ++i)  // and where rows x rank passes 2^31
    expect_slabs(1 + static_cast<int64_t>(random() % 200),
                 (int64_t{1} << 29) + static_cast<int64_t>(random() % (1 << 29)));
}

void items_of_a_group_belong_to_one_member() {
  for (const std::vector<int64_t>& items : {std::vector<int64_t>{5}, {3, 1}, {1, 4, 2}, {7, 7, 7}}) {
    const int members = static_cast<int>(items.size());
    int64_t all = 0;
    for (int64_t count : items) all += count;
    int64_t index = 0;
    for (int member = 0; member < members; ++member)
      for (int64_t i = 0; i < items[member]; ++i, ++index) {
        const Place place = place_of(index, members, [&](int which) { return items[which]; });
        EXPECT(place.member == member && place.index == i);
      }
    // Every span is the members' parts one after another.
    for (int64_t begin = 0; begin <= all; ++begin)
      for (int64_t end = begin; end <= all; ++end) {
        int64_t first = 0, next = begin;
        for (int64_t count : items) {
          const Span part = part_of_member({begin, end}, first, count);
          if (part.begin < part.end) {
            EXPECT(part.begin >= 0 && part.end <= count && first + part.begin == next);
            next = first + part.end;
          }
          first += count;
        }
        EXPECT(next == end);
      }
  }
}

// A CTA writes the sums of the next round while its cluster still reads those of this one.
void consecutive_rounds_have_their_own_buffers() {
  for (int sums : {kRows * 8, kRows * 64, 4 * kRows * 64})
    for (int round = 0; round < 4; ++round) {
      std::vector<int> seen(2 * sums, 0);
      for (int i = 0; i < sums; ++i)
        for (int next : {0, 1}) ++seen.at(cta_sum_index(round + next, i, sums));
      for (int count : seen) EXPECT(count == 1);
    }
}

void regions_of_shared_memory_do_not_overlap() {
  for (const DecodeSm90Variant& v : kDecodeSm90Variants)
    for (int64_t rank = 8; rank < 1600; rank += 8) {
      const SmemLayout at = smem_layout(v.rows(), v.token_tile, rank, 3);
      EXPECT(at.warp_sums >= 8);
      EXPECT(at.cta_sums >= at.warp_sums + sum_bytes(v.rows(), v.token_tile));
      EXPECT(at.t >= at.warp_sums + sum_bytes(kRows, v.token_tile));
      EXPECT(at.slab >= at.cta_sums + 4 * (cta_sum_index(1, v.rows() * v.token_tile - 1, v.rows() * v.token_tile) + 1));
      EXPECT(at.slab >= at.t + (v.token_tile - 1) * rank_pitch(rank) + rank * 2);
      EXPECT(at.bytes >= at.slab + (3 * kRows - 1) * rank_pitch(rank) + rank * 2);
      for (int64_t offset : {at.warp_sums, at.cta_sums, at.t, at.slab, rank_pitch(rank)}) EXPECT(offset % 16 == 0);
    }
}

// t, the sums of every unit by split, and a counter of each unit.
void scratch_has_everything_once() {
  for (int64_t tokens : {1, 9, 64, 200})
    for (int64_t rank : {1, 16, 17, 136})
      for (int64_t splits : {1, 3})
        for (int tile : {8, 64}) {
          std::vector<int> seen(scratch_floats(tokens, rank, tile, splits), 0);
          for (int64_t i = 0; i < tokens * scratch_columns(rank) / 2; ++i) ++seen.at(i);
          const int64_t units = splits > 1 ? scratch_units(tokens, rank, tile) : 0;
          for (int64_t unit = 0; unit < units; ++unit) {
            ++seen.at(member_floats(tokens, rank, tile, splits) + unit);
            for (int64_t split = 0; split < splits; ++split)
              for (int i = 0; i < kRows * tile; ++i)
                ++seen.at(partials_offset(tokens, rank) + partial_index(unit, split, splits, tile) + i);
          }
          for (int count : seen) EXPECT(count == 1);
          EXPECT(scratch_columns(rank) >= rank && scratch_columns(rank) % kVector == 0);
        }
}

// ---- prefill ----

void variants_are_what_the_kernel_can_hold() {
  const p::Variant* before = nullptr;
  for (const p::Variant& v : p::kVariants) {
    EXPECT(v.rank_tile % p::kMmaK == 0 && v.rank_tile <= p::kMaxRank && v.token_tile() <= p::kMaxTokenTile);
    EXPECT(v.cluster == 1 || v.cluster == 2 || v.cluster == 4 || v.cluster == 8);
    EXPECT(v.peers == 1 || (v.peers == 2 && v.cluster == 1));
    EXPECT(v.warpgroups == 2 || (v.warpgroups == 3 && v.peers == 1));
    EXPECT(v.columns() <= (v.warpgroups == 2 ? 192 : 128));  // accumulator registers
    EXPECT(v.columns() >= (v.warpgroups == 2 ? 32 : 64));
    EXPECT(before == nullptr || before->rank_tile <= v.rank_tile);
    for (const p::Variant& other : p::kVariants)  // a choice names one of each rank
      EXPECT(&other == &v || other.rank_tile != v.rank_tile || other.cluster != v.cluster ||
             other.token_tile() != v.token_tile());
    before = &v;
  }
}

void shared_memory_is_laid_out_for_tma() {
  for (const p::Variant& v : p::kVariants) {
    EXPECT(p::stages(v) >= 2);
    EXPECT(p::shared_bytes(v) <= p::kSharedLimit);
    EXPECT(p::stage_bytes(v) % arch::kSwizzleAlignment == 0 && p::x_bytes(v) % arch::kSwizzleAlignment == 0);
    EXPECT(p::kUpTileBytes % arch::kSwizzleAlignment == 0);
    EXPECT(p::down_step_bytes(v) <= p::stage_bytes(v));
    EXPECT(p::up_step_bytes(v) <= p::stage_bytes(v));
    EXPECT(p::mbarrier_offset(v) % 8 == 0);
    // Rows of a TMA tile: at most 256, whole repetitions of the swizzle, all of a shared operand.
    EXPECT(v.cta_tokens() <= 256 && v.columns() <= 256);
    EXPECT(p::x_tile_rows(v) * v.cluster == v.cta_tokens() && p::x_tile_rows(v) % 8 == 0);
    EXPECT(p::down_tile_rows(v) * v.peers == v.columns() && p::down_tile_rows(v) % 8 == 0);
    EXPECT(p::up_tile_rows(v) * v.peers == p::kTileN && p::up_tile_rows(v) % 8 == 0);
    // The exchange: every consumer's every step has its 16 bytes.
    std::vector<int> seen(v.consumers() * v.steps(), 0);
    for (int consumer = 0; consumer < v.consumers(); ++consumer)
      for (int step = 0; step < v.steps(); ++step) ++seen.at(p::exchange_index(consumer, step, v.rank_tile) / 16);
    for (int count : seen) EXPECT(count == 1);
    EXPECT(v.cluster == 1 || p::exchange_bytes(v) == static_cast<int>(seen.size()) * 16);
  }
}

void descriptors_start_in_the_first_row_of_the_swizzle() {
  for (const p::Variant& v : p::kVariants) {
    std::vector<int> offsets;
    for (int k = 0; k < p::kTileK / p::kMmaK; ++k) {
      for (int group = 0; group < v.warpgroups; ++group) offsets.push_back(p::x_offset(group, k));
      offsets.push_back(p::down_offset(v, k));
    }
    for (int step = 0; step < v.steps(); ++step) offsets.push_back(p::up_offset(step));
    for (int offset : offsets) {
      const uint64_t descriptor = arch::smem_descriptor_k_major(static_cast<uint32_t>(offset));
      EXPECT(descriptor >> 62 == 1 && (descriptor & 0x3FFF) * 16 == static_cast<uint64_t>(offset));
      EXPECT((descriptor >> 32 & 0x3FFF) * 16 == 8 * p::kRowBytes);
      EXPECT(offset % arch::kSwizzleAlignment + 2 * p::kMmaK <= p::kRowBytes);
      EXPECT(offset < p::stage_bytes(v));
    }
  }
}

// The accumulators of the first GEMM are the A fragments of the second one.
void accumulators_become_fragments() {
  for (int thread = 0; thread < 128; ++thread)
    for (int step = 0; step < p::kMaxRank / p::kMmaK; ++step)
      for (int w = 0; w < 4; ++w)
        for (int half = 0; half < 2; ++half) {  // PTX ISA: wgmma, A in registers
          const int i = p::accumulator_of_word(step, w) + half;
          EXPECT(arch::wgmma_accumulator_row(thread, i) == thread / 32 * 16 + thread % 32 / 4 + w % 2 * 8);
          EXPECT(arch::wgmma_accumulator_col(thread, i) == step * 16 + thread % 4 * 2 + w / 2 * 8 + half);
        }
}

void every_row_of_up_is_multiplied_once() {
  for (int cluster : {1, 2, 4, 8})
    for (int64_t out : {1, 63, 64, 65, 511, 768, 11008}) {
      std::vector<int> seen(ceil_div(out, p::kTileN), 0);
      for (int rank = 0; rank < cluster; ++rank)
        for (int n = 0; n < p::up_tiles(rank, cluster, out); ++n) ++seen.at(p::up_tile(rank, n, cluster));
      for (int count : seen) EXPECT(count == 1);
    }
  EXPECT(p::up_tile(7, p::up_tiles(7, 8, int64_t{1} << 30) - 1, 8) == ((int64_t{1} << 30) / p::kTileN) - 1);
}

}  // namespace

int main() {
  lanes_cover_a_step_once();
  t_is_read_without_bank_conflicts();
  ctas_of_a_cluster_cover_features_and_sums_once();
  work_units_cover_rows_and_tokens_once();
  slabs_cover_up_once();
  items_of_a_group_belong_to_one_member();
  consecutive_rounds_have_their_own_buffers();
  regions_of_shared_memory_do_not_overlap();
  scratch_has_everything_once();
  variants_are_what_the_kernel_can_hold();
  shared_memory_is_laid_out_for_tma();
  descriptors_start_in_the_first_row_of_the_swizzle();
  accumulators_become_fragments();
  every_row_of_up_is_multiplied_once();
  return tests::result();
}
