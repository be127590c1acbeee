// Index arithmetic of the sm_90 covariance kernel, where it differs from tiles.h.
//
// A stage holds 64 tokens of an operand as two boxes of 64 features, each as the tensor copy engine writes it with the
// 128-byte swizzle: a token's 64 features in 128 bytes, whose 16-byte chunks are permuted by the token modulo 8.
#pragma once

#include "tiles.h"

namespace lowrank_ops::covariance::wgmma {

constexpr int kTokens = 64;  // per stage
constexpr int kBoxFeatures = 64;
constexpr int kBoxBytes = kTokens * kBoxFeatures * 2;
constexpr int kBoxes = kTile / kBoxFeatures;
constexpr int kOperandBytes = kBoxes * kBoxBytes;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kStages = 3;  // two blocks a multiprocessor: one adds to the state while the other multiplies
constexpr int kConsumers = 256;  // two warpgroups, each 64 rows of the tile
constexpr int kThreads = kConsumers + 32;
constexpr int kStep = 16;  // tokens of one wgmma
constexpr int kChunkSteps = 2048 / kTokens;
constexpr int kAccumulators = kTile * kTile / kConsumers;

// The swizzle repeats every 1024 bytes, so stages start on 1024.
constexpr int kAlignment = 1024;
constexpr int kBarrierBytes = 2 * kStages * 8;
constexpr int kSharedBytes = kStages * kStageBytes + kAlignment + kBarrierBytes;
constexpr int kStaticSharedBytes = 2 * 8 * kConsumers;  // column sums of all consumers

// Byte offset of a feature in an operand of a stage.
LRO_HD constexpr int feature_offset(int token, int feature) {
  int chunk = feature % kBoxFeatures / 8;
  return feature / kBoxFeatures * kBoxBytes + token * 128 + ((chunk ^ (token & 7)) * 16) + feature % 8 * 2;
}

// Where a 16-token step of a warpgroup's rows (A) and of all columns (B) starts in its operand. Both lie with the
// features contiguous, which the instruction transposes.
LRO_HD constexpr int a_start(int warpgroup, int step) { return warpgroup * kBoxBytes + step * kStep * 128; }
LRO_HD constexpr int b_start(int step) { return step * kStep * 128; }

// A shared memory descriptor for operands with contiguous features and the 128-byte swizzle. Offsets count 16 bytes:
// the leading one from 64 features to the next, the stride one from 8 tokens to the next.
LRO_HD constexpr uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kLeading = uint64_t{kBoxBytes / 16} << 16;
  constexpr uint64_t kStride = uint64_t{8 * 128 / 16} << 32;
  return kSwizzle128 | kStride | kLeading | ((address & 0x3FFFF) >> 4);
}

// Where accumulator i of a consumer lies in the tile.
LRO_HD constexpr int accumulator_row(int consumer, int i) {
  return consumer / 32 * 16 + consumer % 32 / 4 + i / 2 % 2 * 8;
}
LRO_HD constexpr int accumulator_col(int consumer, int i) { return i / 4 * 8 + consumer % 4 * 2 + i % 2; }

// Column sums: a consumer adds two neighbouring features over 16 of a stage's tokens.
constexpr int kSumGroups = kConsumers / (kTile / 2);
constexpr int kSumTokens = kTokens / kSumGroups;
LRO_HD constexpr int sum_feature(int consumer) { return consumer % (kTile / 2) * 2; }
LRO_HD constexpr int sum_token(int consumer, int i) { return consumer / (kTile / 2) * kSumTokens + i; }
LRO_HD constexpr int sum_consumer(int group, int feature) { return group * (kTile / 2) + feature / 2; }

}  // namespace lowrank_ops::covariance::wgmma
