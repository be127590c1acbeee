// Index arithmetic of the wide sm_90 covariance kernel, where it differs from wgmma_tiles.h.
//
// A cluster of two blocks owns a square of 256 x 256: each block 128 of its rows and all of its columns, which both of
// them need, so that each brings half of them to both. What a block brings of a token serves twice as many products as
// in a tile of 128 x 128. Squares are few: where the last of them would leave much of the device idle, several clusters
// share each of those.
#pragma once

#include "wgmma_tiles.h"

namespace lowrank_ops::covariance::wide {

using wgmma::kBoxBytes, wgmma::kBoxFeatures, wgmma::kStep, wgmma::kTokens;

constexpr int kSquare = 256;
constexpr int kBlocks = 2;  // of a cluster
constexpr int kRows = kSquare / kBlocks;  // of a block
constexpr int kColumnBoxes = kSquare / kBoxFeatures;
constexpr int kRowBoxes = kRows / kBoxFeatures;
constexpr int kColumnBytes = kColumnBoxes * kBoxBytes;
constexpr int kStageBytes = kColumnBytes + kRowBoxes * kBoxBytes;  // the columns' values, then the rows'
constexpr int kStages = 4;
constexpr int kConsumers = wgmma::kConsumers;  // two warpgroups, each 64 rows
constexpr int kThreads = kConsumers + 128;     // and one of which a thread brings the operands, the rest its registers
constexpr int kRegisters = 240, kProducerRegisters = 24;
constexpr int kAccumulators = kRows * kSquare / kConsumers;
// 4096 tokens, twice as many as elsewhere: with one block a multiprocessor nobody multiplies while it adds to the state.
constexpr int kChunkSteps = 4096 / kTokens;
constexpr int kSharedBytes = kStages * kStageBytes + wgmma::kAlignment + 2 * kStages * 8;

// Where a 16-token step of a warpgroup's rows starts in a stage; on the diagonal rows are columns, and lie there alone.
LRO_HD constexpr int a_start(bool diagonal, int rank, int warpgroup, int step) {
  return ((diagonal ? rank * kRowBoxes : kColumnBoxes) + warpgroup) * kBoxBytes + step * kStep * 128;
}
// Byte offset of one of a block's rows in a stage on the diagonal.
LRO_HD constexpr int row_offset(int rank, int token, int row) {
  return wgmma::feature_offset(token, rank * kRows + row);
}

// What a cluster does: the first `whole` ones a square each with all tokens, those behind them share the other squares,
// `splits` of them each.
struct Share {
  int64_t square;
  int64_t shared;  // the square's number among those that are shared; less than 0: it is not
  int64_t split;
};
LRO_HD constexpr Share share_of_cluster(int64_t cluster, int64_t whole, int64_t splits) {
  if (cluster < whole) return {cluster, -1, 0};
  return {whole + (cluster - whole) / splits, (cluster - whole) / splits, (cluster - whole) % splits};
}
LRO_HD constexpr int64_t clusters(int64_t squares, int64_t whole, int64_t splits) {
  return whole + (squares - whole) * splits;
}

}  // namespace lowrank_ops::covariance::wide
