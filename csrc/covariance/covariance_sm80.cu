// x^T x by mma.sync: one 128 x 128 tile of the lower triangle per block, tokens in steps of 32.
//
// Both operands are x itself, so a tile on the diagonal brings its features once. float32 is split in two bfloat16
// parts, high and low, and three of their four products are taken: what is left out is below 2^-17 of a product. Where
// TensorFloat-32 is allowed, float32 is rounded to it on the way from shared memory to the products instead, each
// factor within 2^-11. Accumulators are added to the state every 2048 tokens. Blocks that share a tile write partial
// tiles instead, which add_partials.cu adds in the order of the splits: the same bits every time.

#include <type_traits>

#include "../mma_sm80.cuh"
#include "covariance.h"
#include "state.cuh"
#include "tiles.h"

namespace lowrank_ops::covariance {
namespace {

template <class Element>
struct Math {  // how an element is fed to the tensor cores
  using Input = Element;
  using Operand = Element;
  using Layout = covariance::Layout<2>;
  static constexpr int kParts = 1;
  static constexpr int kStep = 16;  // tokens of one product
};
template <>
struct Math<float> : Math<__nv_bfloat16> {
  using Input = float;
  static constexpr int kParts = 2;
};
template <>
struct Math<Tf32> {
  using Input = float;
  using Operand = Tf32;
  using Layout = covariance::Layout<4>;
  static constexpr int kParts = 1;
  static constexpr int kStep = 8;
};

template <class Element>
using Input = typename Math<Element>::Input;
template <class Element>
using LayoutOf = typename Math<Element>::Layout;
template <class Element>
constexpr int kOperandBytes = Math<Element>::kParts * LayoutOf<Element>::kBytes;
template <class Element>
constexpr int kStageBytes = 2 * kOperandBytes<Element>;

struct Block {
  Tile tile;
  Range tokens;
  int64_t group;
  __device__ bool diagonal() const { return tile.row == tile.col; }
  __device__ int features_from(int operand) const { return (operand == 0 ? tile.row : tile.col) * kTile; }
};

// ---- bringing a stage: Async copies without registers, Staged goes through them ----

template <class Element>
__device__ void copy_stage(const Arguments& args, const Block& block, int64_t first_token, uint32_t stage) {
  using Layout = LayoutOf<Element>;
  const auto* x = static_cast<const Input<Element>*>(args.x) + block.group * args.x_group_stride;
  const int operands = block.diagonal() ? 1 : 2;
  for (int operand = 0; operand < operands; ++operand) {
#pragma unroll
    for (int i = 0; i < Layout::kCopies; ++i) {
      const Copy copy = Layout::copy_along_features(threadIdx.x, i);
      const int64_t token = first_token + copy.token;
      const int64_t feature = block.features_from(operand) + copy.chunk * Layout::kChunk;
      const int valid = token < block.tokens.end ? Layout::valid_features(feature, args.features) : 0;
      const auto* from = valid ? x + token * args.x_row_stride + feature : x;
      copy_async_16(stage + operand * kOperandBytes<Element> + Layout::offset(copy.token, copy.chunk), from,
                    valid * static_cast<int>(sizeof(*from)));
    }
  }
}

template <class Element>
struct Staged {
  Input<Element> values[2][LayoutOf<Element>::kCopies][LayoutOf<Element>::kChunk];
};

template <class Element>
__device__ void fetch_rows(Staged<Element>& staged, const Arguments& args, const Block& block, int64_t first_token) {
  using Layout = LayoutOf<Element>;
  const auto* x = static_cast<const Input<Element>*>(args.x) + block.group * args.x_group_stride;
#pragma unroll
  for (int operand = 0; operand < 2; ++operand) {
    if (operand == 1 && block.diagonal()) break;
#pragma unroll
    for (int i = 0; i < Layout::kCopies; ++i) {
      const Copy copy = Layout::copy_along_features(threadIdx.x, i);
      const int64_t token = first_token + copy.token;
      const int64_t feature = block.features_from(operand) + copy.chunk * Layout::kChunk;
      const int valid = token < block.tokens.end ? Layout::valid_features(feature, args.features) : 0;
      const auto* from = x + token * args.x_row_stride + feature;
#pragma unroll
      for (int e = 0; e < Layout::kChunk; ++e)
        staged.values[operand][i][e] = e < valid ? from[e] : Input<Element>(0.0f);
    }
  }
}

template <class Element>
__device__ void fetch_patches(Staged<Element>& staged, const Arguments& args, const Block& block,
                              int64_t first_token, const PatchFeature* features) {
  using Layout = LayoutOf<Element>;
  const auto* x = static_cast<const Input<Element>*>(args.x) + block.group * args.x_group_stride;
#pragma unroll
  for (int i = 0; i < Layout::kCopies; ++i) {
    const int64_t token = first_token + Layout::copy_along_tokens(threadIdx.x, i).token;
    const bool exists = token < block.tokens.end;
    const PatchToken corner = patch_token(args.patches, exists ? static_cast<uint32_t>(token) : 0);
#pragma unroll
    for (int operand = 0; operand < 2; ++operand) {
      if (operand == 1 && block.diagonal()) break;
      const int first = Layout::copy_along_tokens(threadIdx.x, i).chunk * Layout::kChunk;
      const int valid = Layout::valid_features(block.features_from(operand) + first, args.features);
#pragma unroll
      for (int e = 0; e < Layout::kChunk; ++e) {
        const PatchFeature feature = features[operand * kTile + first + e];
        const bool real = exists && e < valid && inside(args.patches, corner, feature);
        staged.values[operand][i][e] = real ? x[corner.offset + feature.offset] : Input<Element>(0.0f);
      }
    }
  }
}

template <class Element>
__device__ __forceinline__ uint32_t pack(Element low, Element high) {
  return static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(low)) |
         static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(high)) << 16;
}

// The 16 bytes of a chunk; of float32 that is split, both parts of it.
template <class Element>
__device__ void store_chunk(const Input<Element> (&values)[LayoutOf<Element>::kChunk], unsigned char* to) {
  if constexpr (std::is_same_v<Element, Tf32>) {
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  } else {
    uint32_t part[Math<Element>::kParts][4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const Element a = values[2 * pair], b = values[2 * pair + 1];
      if constexpr (Math<Element>::kParts == 1) {
        part[0][pair] = pack(a, b);
      } else {
        const __nv_bfloat16 high_a = __float2bfloat16_rn(a), high_b = __float2bfloat16_rn(b);
        part[0][pair] = pack(high_a, high_b);
        part[1][pair] = pack(__float2bfloat16_rn(a - __bfloat162float(high_a)),
                             __float2bfloat16_rn(b - __bfloat162float(high_b)));
      }
    }
#pragma unroll
    for (int p = 0; p < Math<Element>::kParts; ++p)
      *reinterpret_cast<uint4*>(to + p * LayoutOf<Element>::kBytes) =
          make_uint4(part[p][0], part[p][1], part[p][2], part[p][3]);
  }
}

template <class Element, bool kPatches>
__device__ void store_stage(const Staged<Element>& staged, bool diagonal, unsigned char* stage) {
  using Layout = LayoutOf<Element>;
#pragma unroll
  for (int operand = 0; operand < 2; ++operand) {
    if (operand == 1 && diagonal) break;
#pragma unroll
    for (int i = 0; i < Layout::kCopies; ++i) {
      const Copy copy =
          kPatches ? Layout::copy_along_tokens(threadIdx.x, i) : Layout::copy_along_features(threadIdx.x, i);
      store_chunk<Element>(staged.values[operand][i],
                           stage + operand * kOperandBytes<Element> + Layout::offset(copy.token, copy.chunk));
    }
  }
}

// ---- computing with a stage ----

struct Accumulators {
  float tile[kMmaRows][kMmaCols][4];
  float sum[2];  // of up to 2048 tokens; diagonal tiles only
};

// Column sums over all of the block's tokens, one pair per thread. In shared memory, because registers are full.
struct Sums {
  double values[kThreads][2];
  int origin[2];  // first row and column of the tile
};

__device__ void clear(Accumulators& acc) {
#pragma unroll
  for (int row = 0; row < kMmaRows; ++row)
#pragma unroll
    for (int col = 0; col < kMmaCols; ++col)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.tile[row][col][e] = 0.0f;
  acc.sum[0] = acc.sum[1] = 0.0f;
}

__device__ __forceinline__ uint32_t tf32_at(const unsigned char* operand, int offset) {
  return round_to_tf32(*reinterpret_cast<const float*>(operand + offset));
}

// A part of the A operand of one product.
template <class Element>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* part, int row, int step) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if constexpr (std::is_same_v<Element, Tf32>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = tf32_at(part, tf32_a_offset(lane, warp, row, step, i));
  } else {
    load_matrices_transposed(a, shared_address(part) + a_offset(lane, warp, row, step));
  }
}

// A part of the B operands of two products side by side.
template <class Element>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const unsigned char* part, int pair, int step) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if constexpr (std::is_same_v<Element, Tf32>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = tf32_at(part, tf32_b_offset(lane, warp, pair * 2 + i / 2, step, i % 2));
  } else {
    load_matrices_transposed(b, shared_address(part) + b_offset(lane, warp, pair, step));
  }
}

// Two neighbouring features of a token, as they were before they were rounded to TensorFloat-32.
template <class Element>
__device__ __forceinline__ float2 pair_at(const unsigned char* part, int offset) {
  if constexpr (std::is_same_v<Element, Tf32>)
    return *reinterpret_cast<const float2*>(part + offset);
  else
    return unpack<typename Math<Element>::Operand>(*reinterpret_cast<const uint32_t*>(part + offset));
}

template <class Element>
__device__ void multiply_stage(Accumulators& acc, const unsigned char* stage, bool diagonal) {
  using Operand = typename Math<Element>::Operand;
  using Layout = LayoutOf<Element>;
  constexpr int kParts = Math<Element>::kParts;
  const unsigned char* columns = diagonal ? stage : stage + kOperandBytes<Element>;
#pragma unroll(Math<Element>::kStep / 8)  // TensorFloat-32 unrolled further wants more registers than there are
  for (int step = 0; step < kTokens / Math<Element>::kStep; ++step) {
    uint32_t b[kParts][kMmaCols / 2][4];
#pragma unroll
    for (int p = 0; p < kParts; ++p)
#pragma unroll
      for (int pair = 0; pair < kMmaCols / 2; ++pair)
        load_b<Element>(b[p][pair], columns + p * Layout::kBytes, pair, step);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int row = 0; row < kMmaRows; ++row) {
        uint32_t a[4];
        load_a<Element>(a, stage + p * Layout::kBytes, row, step);
#pragma unroll
        for (int q = 0; q + p < kParts; ++q)  // low times low is left out
#pragma unroll
          for (int col = 0; col < kMmaCols; ++col)
            multiply_add<Operand>(acc.tile[row][col], a, b[q][col / 2][col % 2 * 2], b[q][col / 2][col % 2 * 2 + 1]);
      }
    }
  }
  if (!diagonal) return;
  const int feature = sum_feature(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kSumTokens; ++i)
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const float2 pair = pair_at<Element>(stage + p * Layout::kBytes,
                                           Layout::feature_offset(sum_token(threadIdx.x, i), feature));
      acc.sum[0] += pair.x;
      acc.sum[1] += pair.y;
    }
}

// ---- leaving the accumulators ----

__device__ void flush(Accumulators& acc, Sums& sums, const Arguments& args, const Block& block, bool first) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Read anew every time: or else the compiler keeps 64 addresses in registers from one flush to the next.
  const int64_t first_row = static_cast<volatile int&>(sums.origin[0]);
  const int64_t first_col = static_cast<volatile int&>(sums.origin[1]);
  float* partial = args.scratch + partial_offset(block.group, blockIdx.y, blockIdx.x, args.splits, args.tiles);
#pragma unroll
  for (int row = 0; row < kMmaRows; ++row) {
    float values[kMmaCols * 4];
#pragma unroll
    for (int i = 0; i < kMmaCols * 4; ++i) values[i] = acc.tile[row][i / 4][i % 4];
    const int r = accumulator_row(lane, warp, row, 0), c = accumulator_col(lane, warp, 0, 0);
    if (args.splits == 1)
      add_strip_to_state(args, block.group, first_row + r, first_col + c, values);
    else
      add_strip_to_partial(partial, r, c, values, first);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    sums.values[threadIdx.x][i] = first ? acc.sum[i] : sums.values[threadIdx.x][i] + acc.sum[i];
  clear(acc);
}

__device__ void flush_sums(const Sums& sums, const Arguments& args, const Block& block) {
  __syncthreads();
  const int64_t feature = int64_t{block.tile.row} * kTile + threadIdx.x;
  if (threadIdx.x >= kTile || feature >= args.features) return;
  double sum = 0.0;
  for (int group = 0; group < kSumGroups; ++group) sum += sums.values[sum_thread(group, threadIdx.x)][threadIdx.x % 2];
  if (args.splits == 1)
    add_to_total(args, block.group, feature, sum);
  else
    args.scratch[partial_sum_offset(block.group, blockIdx.y, feature, args.groups, args.splits, args.tiles,
                                    args.features)] = static_cast<float>(sum);
}

// ---- kernels ----

static_assert(sizeof(PatchFeature) * 2 * kTile + sizeof(Sums) <= kStaticSharedBytes);

template <class Element, int kStages>
__device__ void run_async(Accumulators& acc, Sums& sums, const Arguments& args, const Block& block,
                         unsigned char* shared) {
  const int steps = static_cast<int>(ceil_div(block.tokens.end - block.tokens.begin, kTokens));
  const auto bring = [&](int step) {
    if (step < steps)
      copy_stage<Element>(args, block, block.tokens.begin + static_cast<int64_t>(step) * kTokens,
                          shared_address(shared) + step % kStages * kStageBytes<Element>);
    commit_copies();  // an empty group too, so that waiting counts steps
  };
  for (int step = 0; step < kStages - 1; ++step) bring(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // everyone's copies of this step are there, and its predecessor has been read
    bring(step + kStages - 1);
    multiply_stage<Element>(acc, shared + step % kStages * kStageBytes<Element>, block.diagonal());
    if ((step + 1) % kChunkSteps == 0 || step + 1 == steps) flush(acc, sums, args, block, step < kChunkSteps);
  }
}

template <class Element, bool kPatches>
__device__ void run_staged(Accumulators& acc, Sums& sums, const Arguments& args, const Block& block,
                          unsigned char* shared) {
  __shared__ PatchFeature features[kPatches ? 2 * kTile : 1];
  if constexpr (kPatches) {
    for (int i = threadIdx.x; i < 2 * kTile; i += kThreads)
      features[i] = patch_feature(args.patches, block.features_from(i / kTile) + i % kTile);
    __syncthreads();
  }
  const int steps = static_cast<int>(ceil_div(block.tokens.end - block.tokens.begin, kTokens));
  Staged<Element> staged;
  const auto fetch = [&](int step) {
    const int64_t token = block.tokens.begin + static_cast<int64_t>(step) * kTokens;
    if constexpr (kPatches)
      fetch_patches<Element>(staged, args, block, token, features);
    else
      fetch_rows<Element>(staged, args, block, token);
  };
  const auto stage = [&](int step) { return shared + step % 2 * kStageBytes<Element>; };
  fetch(0);
  store_stage<Element, kPatches>(staged, block.diagonal(), stage(0));
  for (int step = 0; step < steps; ++step) {
    __syncthreads();  // this step has been stored, and the one before it has been read
    if (step + 1 < steps) fetch(step + 1);
    multiply_stage<Element>(acc, stage(step), block.diagonal());
    if (step + 1 < steps) store_stage<Element, kPatches>(staged, block.diagonal(), stage(step + 1));
    if ((step + 1) % kChunkSteps == 0 || step + 1 == steps) flush(acc, sums, args, block, step < kChunkSteps);
  }
}

template <class Element, Source kSource, int kStages>
__global__ void __launch_bounds__(kThreads, kSource == Source::aligned_matrix && kStages != 5 ? 2 : 1)
    covariance_sm80(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Block block{tile_at(blockIdx.x), tokens_of_split(blockIdx.y, args.tokens_per_split, args.tokens), blockIdx.z};
  __shared__ Sums sums;
  Accumulators acc;
  clear(acc);
  if (threadIdx.x < 2) sums.origin[threadIdx.x] = block.features_from(threadIdx.x);  // synchronized by the first step
  if constexpr (kSource == Source::aligned_matrix)
    run_async<Element, kStages>(acc, sums, args, block, shared);
  else
    run_staged<Element, kSource == Source::patches>(acc, sums, args, block, shared);
  if (block.diagonal()) flush_sums(sums, args, block);
}

template <class Element, Source kSource, int kStages>
void launch_kernel(const CovariancePlan& plan, const Arguments& args, const Launch& launch) {
  const auto kernel = covariance_sm80<Element, kSource, kStages>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared_bytes)),
        launch);
  const dim3 grid(static_cast<unsigned>(args.tiles), static_cast<unsigned>(args.splits),
                  static_cast<unsigned>(args.groups));
  launch_kernel(kernel, {grid, kThreads, plan.shared_bytes}, launch, args);
  if (args.splits > 1) launch_add_partials(args, kTile, launch);
}

template <class Element>
void launch_element(const CovariancePlan& plan, const Arguments& args, Source source, const Launch& launch) {
  if (source == Source::patches) return launch_kernel<Element, Source::patches, 2>(plan, args, launch);
  if (source == Source::aligned_matrix) {
    if constexpr (std::is_same_v<Element, Tf32>) {
      return launch_kernel<Element, Source::aligned_matrix, 2>(plan, args, launch);
    } else if constexpr (Math<Element>::kParts == 1) {
      if (plan.stages == 4) return launch_kernel<Element, Source::aligned_matrix, 4>(plan, args, launch);
      return launch_kernel<Element, Source::aligned_matrix, 5>(plan, args, launch);
    }
  }
  launch_kernel<Element, Source::matrix, 2>(plan, args, launch);
}

}  // namespace

void launch_sm80(const CovariancePlan& plan, const Arguments& arguments, Dtype dtype, Source source,
                 const Launch& launch) {
  if (dtype == Dtype::bfloat16) return launch_element<__nv_bfloat16>(plan, arguments, source, launch);
  if (dtype == Dtype::float16) return launch_element<__half>(plan, arguments, source, launch);
  if (plan.tf32) return launch_element<Tf32>(plan, arguments, source, launch);
  launch_element<float>(plan, arguments, source, launch);
}

}  // namespace lowrank_ops::covariance
