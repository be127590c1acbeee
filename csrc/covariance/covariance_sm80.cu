// second_moment += x^T x by mma.sync, for every dtype, alignment and for patches of images (sm_80 and newer).
//
//   grid           (lower tiles of 128 x 128, splits of the tokens, groups)
//   CTA            8 warps as 2 x 4, each 64 x 32 of the tile; a diagonal tile loads one operand and uses it as both
//   pipeline       aligned rows: 4 or 5 stages of 32 tokens by cp.async (2 with TensorFloat-32)
//                  other rows and patches: 2 stages through registers
//   float32        split into a high and a low bfloat16 part; three of the four MMAs (the fourth is below 2^-17 of a
//                  product). With TensorFloat-32: one MMA, each factor rounded within 2^-11
//   epilogue       every 2048 tokens the accumulators are added to the state, or to the partial tile of a split one,
//                  which add_partials.cu reduces
//   shared memory  stages; static: column sums, patch offsets
//   deterministic  yes

#include <type_traits>

#include "../arch/tf32.h"
#include "arguments.h"
#include "tiles.h"

#ifdef LRO_KERNELS
#include "../arch/cp_async.cuh"
#include "../arch/mma.cuh"
#include "../arch/smem.cuh"
#include "../elements.cuh"
#include "state.cuh"
#endif

#ifdef LRO_LAUNCHERS
#include "covariance.h"
#endif

namespace lowrank_ops::covariance {

using arch::Tf32;

template <class Element, Source kSource, int kStages>
__global__ void covariance_sm80(const __grid_constant__ Arguments args);

#ifdef LRO_KERNELS
namespace {

template <class Element>
struct Math {  // how an element becomes an MMA operand
  using Input = Element;
  using Operand = Element;
  using Layout = covariance::Layout<2>;
  static constexpr int kParts = 1;
  static constexpr int kMmaK = 16;  // tokens per MMA
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
  static constexpr int kMmaK = 8;
};

template <class Element>
using Input = typename Math<Element>::Input;
template <class Element>
using LayoutOf = typename Math<Element>::Layout;
template <class Element>
constexpr int kOperandBytes = Math<Element>::kParts * LayoutOf<Element>::kBytes;
template <class Element>
constexpr int kStageBytes = 2 * kOperandBytes<Element>;

struct Cta {
  Tile tile;
  Range tokens;
  int64_t group;
  __device__ bool diagonal() const { return tile.row == tile.col; }
  __device__ int features_from(int operand) const { return (operand == 0 ? tile.row : tile.col) * kTile; }
};

// ---- loading a stage: by cp.async, or staged through registers ----

template <class Element>
__device__ void load_stage_async(const Arguments& args, const Cta& cta, int64_t first_token, uint32_t stage) {
  using Layout = LayoutOf<Element>;
  const auto* x = static_cast<const Input<Element>*>(args.x) + cta.group * args.x_group_stride;
  const int operands = cta.diagonal() ? 1 : 2;
  for (int operand = 0; operand < operands; ++operand) {
#pragma unroll
    for (int i = 0; i < Layout::kCopies; ++i) {
      const Copy copy = Layout::copy_along_features(threadIdx.x, i);
      const int64_t token = first_token + copy.token;
      const int64_t feature = cta.features_from(operand) + copy.chunk * Layout::kChunk;
      const int valid = token < cta.tokens.end ? Layout::valid_features(feature, args.features) : 0;
      const auto* from = valid ? x + token * args.x_row_stride + feature : x;
      arch::cp_async_16(stage + operand * kOperandBytes<Element> + Layout::offset(copy.token, copy.chunk), from,
                        valid * static_cast<int>(sizeof(*from)));
    }
  }
}

template <class Element>
struct Staged {
  Input<Element> values[2][LayoutOf<Element>::kCopies][LayoutOf<Element>::kChunk];
};

template <class Element>
__device__ void fetch_rows(Staged<Element>& staged, const Arguments& args, const Cta& cta, int64_t first_token) {
  using Layout = LayoutOf<Element>;
  const auto* x = static_cast<const Input<Element>*>(args.x) + cta.group * args.x_group_stride;
#pragma unroll
  for (int operand = 0; operand < 2; ++operand) {
    if (operand == 1 && cta.diagonal()) break;
#pragma unroll
    for (int i = 0; i < Layout::kCopies; ++i) {
      const Copy copy = Layout::copy_along_features(threadIdx.x, i);
      const int64_t token = first_token + copy.token;
      const int64_t feature = cta.features_from(operand) + copy.chunk * Layout::kChunk;
      const int valid = token < cta.tokens.end ? Layout::valid_features(feature, args.features) : 0;
      const auto* from = x + token * args.x_row_stride + feature;
#pragma unroll
      for (int e = 0; e < Layout::kChunk; ++e)
        staged.values[operand][i][e] = e < valid ? from[e] : Input<Element>(0.0f);
    }
  }
}

template <class Element>
__device__ void fetch_patches(Staged<Element>& staged, const Arguments& args, const Cta& cta, int64_t first_token,
                              const PatchFeature* features) {
  using Layout = LayoutOf<Element>;
  const auto* x = static_cast<const Input<Element>*>(args.x) + cta.group * args.x_group_stride;
#pragma unroll
  for (int i = 0; i < Layout::kCopies; ++i) {
    const int64_t token = first_token + Layout::copy_along_tokens(threadIdx.x, i).token;
    const bool exists = token < cta.tokens.end;
    const PatchToken corner = patch_token(args.patches, exists ? static_cast<uint32_t>(token) : 0);
#pragma unroll
    for (int operand = 0; operand < 2; ++operand) {
      if (operand == 1 && cta.diagonal()) break;
      const int first = Layout::copy_along_tokens(threadIdx.x, i).chunk * Layout::kChunk;
      const int valid = Layout::valid_features(cta.features_from(operand) + first, args.features);
#pragma unroll
      for (int e = 0; e < Layout::kChunk; ++e) {
        const PatchFeature feature = features[operand * kTile + first + e];
        const bool real = exists && e < valid && inside(args.patches, corner, feature);
        staged.values[operand][i][e] = real ? x[corner.offset + feature.offset] : Input<Element>(0.0f);
      }
    }
  }
}

// The 16 bytes of a chunk; both parts of split float32.
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
        part[1][pair] =
            pack(__float2bfloat16_rn(a - __bfloat162float(high_a)), __float2bfloat16_rn(b - __bfloat162float(high_b)));
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

// ---- mainloop ----

struct Accumulators {
  float tile[kMmaRows][kMmaCols][4];
  float sum[2];  // column sums of up to 2048 tokens; diagonal tiles only
};

// Column sums over all of the CTA's tokens, one pair per thread. In shared memory, because registers are full.
struct ColumnSums {
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
  return arch::cvt_rna_tf32(*reinterpret_cast<const float*>(operand + offset));
}

// A part of the A fragment of one MMA.
template <class Element>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* part, int row, int step) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if constexpr (std::is_same_v<Element, Tf32>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = tf32_at(part, tf32_a_offset(lane, warp, row, step, i));
  } else {
    arch::ldmatrix_x4_trans(a, arch::cast_smem_ptr_to_uint(part) + a_offset(lane, warp, row, step));
  }
}

// A part of the B fragments of two neighboring MMAs.
template <class Element>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const unsigned char* part, int pair, int step) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if constexpr (std::is_same_v<Element, Tf32>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = tf32_at(part, tf32_b_offset(lane, warp, pair * 2 + i / 2, step, i % 2));
  } else {
    arch::ldmatrix_x4_trans(b, arch::cast_smem_ptr_to_uint(part) + b_offset(lane, warp, pair, step));
  }
}

// Two neighboring features of a token, not rounded to TensorFloat-32.
template <class Element>
__device__ __forceinline__ float2 pair_at(const unsigned char* part, int offset) {
  if constexpr (std::is_same_v<Element, Tf32>)
    return *reinterpret_cast<const float2*>(part + offset);
  else
    return unpack<typename Math<Element>::Operand>(*reinterpret_cast<const uint32_t*>(part + offset));
}

template <class Element>
__device__ void mma_stage(Accumulators& acc, const unsigned char* stage, bool diagonal) {
  using Operand = typename Math<Element>::Operand;
  using Layout = LayoutOf<Element>;
  constexpr int kParts = Math<Element>::kParts;
  const unsigned char* columns = diagonal ? stage : stage + kOperandBytes<Element>;
#pragma unroll(Math<Element>::kMmaK / 8)  // TensorFloat-32 unrolled further would spill
  for (int step = 0; step < kTokens / Math<Element>::kMmaK; ++step) {
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
        for (int q = 0; q + p < kParts; ++q)  // without low times low
#pragma unroll
          for (int col = 0; col < kMmaCols; ++col)
            arch::mma_m16n8<Operand>(acc.tile[row][col], a, b[q][col / 2][col % 2 * 2], b[q][col / 2][col % 2 * 2 + 1]);
      }
    }
  }
  if (!diagonal) return;
  const int feature = sum_feature(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kSumTokens; ++i)
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const float2 pair =
          pair_at<Element>(stage + p * Layout::kBytes, Layout::feature_offset(sum_token(threadIdx.x, i), feature));
      acc.sum[0] += pair.x;
      acc.sum[1] += pair.y;
    }
}

// ---- epilogue ----

__device__ void flush(Accumulators& acc, ColumnSums& sums, const Arguments& args, const Cta& cta, bool first) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Reloaded every time, or the compiler keeps 64 addresses in registers from one flush to the next.
  const int64_t first_row = static_cast<volatile int&>(sums.origin[0]);
  const int64_t first_col = static_cast<volatile int&>(sums.origin[1]);
  const TileOutput output{cta.group, first_row, first_col,
                          args.scratch + partial_offset(cta.group, blockIdx.y, blockIdx.x, args.splits, args.tiles)};
#pragma unroll
  for (int row = 0; row < kMmaRows; ++row) {
    float values[kMmaCols * 4];
#pragma unroll
    for (int i = 0; i < kMmaCols * 4; ++i) values[i] = acc.tile[row][i / 4][i % 4];
    flush_strip(args, output, accumulator_row(lane, warp, row, 0), accumulator_col(lane, warp, 0, 0), values, first);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    sums.values[threadIdx.x][i] = first ? acc.sum[i] : sums.values[threadIdx.x][i] + acc.sum[i];
  clear(acc);
}

// All threads of the CTA.
__device__ void flush_column_sums(const ColumnSums& sums, const Arguments& args, const Cta& cta) {
  __syncthreads();
  const int64_t feature = int64_t{cta.tile.row} * kTile + threadIdx.x;
  if (threadIdx.x >= kTile || feature >= args.features) return;
  double sum = 0.0;
  for (int group = 0; group < kSumGroups; ++group) sum += sums.values[sum_thread(group, threadIdx.x)][threadIdx.x % 2];
  flush_column_sum(args, cta.group, feature, sum, args.splits > 1, blockIdx.y);
}

// ---- kernels ----

static_assert(sizeof(PatchFeature) * 2 * kTile + sizeof(ColumnSums) <= kStaticSharedBytes);

template <class Element, int kStages>
__device__ void run_async(Accumulators& acc, ColumnSums& sums, const Arguments& args, const Cta& cta,
                          unsigned char* shared) {
  const int steps = static_cast<int>(ceil_div(cta.tokens.end - cta.tokens.begin, kTokens));
  const auto load = [&](int step) {
    if (step < steps)
      load_stage_async<Element>(args, cta, cta.tokens.begin + static_cast<int64_t>(step) * kTokens,
                                arch::cast_smem_ptr_to_uint(shared) + step % kStages * kStageBytes<Element>);
    arch::cp_async_commit_group();  // also an empty group, so that groups count steps
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    arch::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // all threads' copies of this step have arrived, and the previous stage has been read
    load(step + kStages - 1);
    mma_stage<Element>(acc, shared + step % kStages * kStageBytes<Element>, cta.diagonal());
    if ((step + 1) % kChunkSteps == 0 || step + 1 == steps) flush(acc, sums, args, cta, step < kChunkSteps);
  }
}

template <class Element, bool kPatches>
__device__ void run_staged(Accumulators& acc, ColumnSums& sums, const Arguments& args, const Cta& cta,
                           unsigned char* shared) {
  __shared__ PatchFeature features[kPatches ? 2 * kTile : 1];
  if constexpr (kPatches) {
    for (int i = threadIdx.x; i < 2 * kTile; i += kThreads)
      features[i] = patch_feature(args.patches, cta.features_from(i / kTile) + i % kTile);
    __syncthreads();
  }
  const int steps = static_cast<int>(ceil_div(cta.tokens.end - cta.tokens.begin, kTokens));
  Staged<Element> staged;
  const auto fetch = [&](int step) {
    const int64_t token = cta.tokens.begin + static_cast<int64_t>(step) * kTokens;
    if constexpr (kPatches)
      fetch_patches<Element>(staged, args, cta, token, features);
    else
      fetch_rows<Element>(staged, args, cta, token);
  };
  const auto stage = [&](int step) { return shared + step % 2 * kStageBytes<Element>; };
  fetch(0);
  store_stage<Element, kPatches>(staged, cta.diagonal(), stage(0));
  for (int step = 0; step < steps; ++step) {
    __syncthreads();  // this step has been stored, and the one before it has been read
    if (step + 1 < steps) fetch(step + 1);
    mma_stage<Element>(acc, stage(step), cta.diagonal());
    if (step + 1 < steps) store_stage<Element, kPatches>(staged, cta.diagonal(), stage(step + 1));
    if ((step + 1) % kChunkSteps == 0 || step + 1 == steps) flush(acc, sums, args, cta, step < kChunkSteps);
  }
}

}  // namespace

template <class Element, Source kSource, int kStages>
__global__ void __launch_bounds__(kThreads, kSource == Source::aligned_matrix && kStages != 5 ? 2 : 1)
    covariance_sm80(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Cta cta{tile_at(blockIdx.x), tokens_of_split(blockIdx.y, args.tokens_per_split, args.tokens), blockIdx.z};
  __shared__ ColumnSums sums;
  Accumulators acc;
  clear(acc);
  if (threadIdx.x < 2) sums.origin[threadIdx.x] = cta.features_from(threadIdx.x);  // synchronized by the first step
  if constexpr (kSource == Source::aligned_matrix)
    run_async<Element, kStages>(acc, sums, args, cta, shared);
  else
    run_staged<Element, kSource == Source::patches>(acc, sums, args, cta, shared);
  if (cta.diagonal()) flush_column_sums(sums, args, cta);
}

#endif  // LRO_KERNELS

#ifdef LRO_LAUNCHERS
namespace {

template <class Element, Source kSource, int kStages>
void launch_variant(const CovariancePlan& plan, const Arguments& args, const Launch& launch) {
  const auto kernel = covariance_sm80<Element, kSource, kStages>;
  opt_in_shared_memory(kernel, plan.shared_bytes, launch);
  const dim3 grid(static_cast<unsigned>(args.tiles), static_cast<unsigned>(args.splits),
                  static_cast<unsigned>(args.groups));
  launch_kernel(kernel, {grid, kThreads, plan.shared_bytes}, launch, args);
  if (args.splits > 1) launch_add_partials(args, kTile, launch);
}

template <class Element>
void launch_element(const CovariancePlan& plan, const Arguments& args, Source source, const Launch& launch) {
  if (source == Source::patches) return launch_variant<Element, Source::patches, 2>(plan, args, launch);
  if (source == Source::aligned_matrix) {
    if constexpr (std::is_same_v<Element, Tf32>) {
      return launch_variant<Element, Source::aligned_matrix, 2>(plan, args, launch);
    } else if constexpr (!std::is_same_v<Element, float>) {
      if (plan.stages == 4) return launch_variant<Element, Source::aligned_matrix, 4>(plan, args, launch);
      return launch_variant<Element, Source::aligned_matrix, 5>(plan, args, launch);
    }
  }
  launch_variant<Element, Source::matrix, 2>(plan, args, launch);
}

}  // namespace

void launch_sm80(const CovariancePlan& plan, const Arguments& arguments, Dtype dtype, Source source,
                 const Launch& launch) {
  if (dtype == Dtype::bfloat16) return launch_element<__nv_bfloat16>(plan, arguments, source, launch);
  if (dtype == Dtype::float16) return launch_element<__half>(plan, arguments, source, launch);
  if (plan.tf32) return launch_element<Tf32>(plan, arguments, source, launch);
  launch_element<float>(plan, arguments, source, launch);
}

#endif  // LRO_LAUNCHERS

}  // namespace lowrank_ops::covariance
