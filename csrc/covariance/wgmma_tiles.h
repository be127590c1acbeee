// Index arithmetic of the sm_90 covariance kernel, where it differs from tiles.h.
//
// A stage holds 64 tokens of an operand as two TMA tiles of 64 features with the 128-byte swizzle: a token's 64
// features in 128 bytes, whose 16-byte chunks are permuted by the token modulo 8.
#pragma once

#include "tiles.h"

namespace lowrank_ops::covariance::wgmma {

constexpr int kTokens = 64;  // per stage
constexpr int kTmaFeatures = 64;
constexpr int kTmaBytes = kTokens * kTmaFeatures * 2;
constexpr int kTmaTiles = kTile / kTmaFeatures;  // per operand
constexpr int kOperandBytes = kTmaTiles * kTmaBytes;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kStages = 3;       // two CTAs per SM: the epilogue of one overlaps the mainloop of the other
constexpr int kConsumers = 256;  // two warpgroups, each 64 rows of the tile
constexpr int kThreads = kConsumers + 32;
constexpr int kMmaK = 16;  // tokens per wgmma
constexpr int kChunkSteps = 2048 / kTokens;
constexpr int kAccumulators = kTile * kTile / kConsumers;

constexpr int kMbarrierBytes = 2 * kStages * 8;
constexpr int kSharedBytes = kStages * kStageBytes + arch::kSwizzleAlignment + kMbarrierBytes;
constexpr int kStaticSharedBytes = 2 * 8 * kConsumers;  // column sums of all consumers

// Byte offset of a feature in an operand of a stage.
LRO_HD constexpr int feature_offset(int token, int feature) {
  int chunk = feature % kTmaFeatures / 8;
  return feature / kTmaFeatures * kTmaBytes + token * 128 + ((chunk ^ (token & 7)) * 16) + feature % 8 * 2;
}

// Offset in its operand of 16 tokens of a warpgroup's rows (A) and of all columns (B). Both are MN-major.
LRO_HD constexpr int a_offset(int warpgroup, int k) { return warpgroup * kTmaBytes + k * kMmaK * 128; }
LRO_HD constexpr int b_offset(int k) { return k * kMmaK * 128; }
LRO_HD constexpr uint64_t descriptor(uint32_t address) { return arch::smem_descriptor(address, kTmaBytes, 8 * 128); }

// Column sums: a consumer adds two neighboring features over 16 of a stage's tokens.
constexpr int kSumGroups = kConsumers / (kTile / 2);
constexpr int kSumTokens = kTokens / kSumGroups;
LRO_HD constexpr int sum_feature(int consumer) { return consumer % (kTile / 2) * 2; }
LRO_HD constexpr int sum_token(int consumer, int i) { return consumer / (kTile / 2) * kSumTokens + i; }
LRO_HD constexpr int sum_consumer(int group, int feature) { return group * (kTile / 2) + feature / 2; }

}  // namespace lowrank_ops::covariance::wgmma
