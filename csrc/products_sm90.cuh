// Warpgroup products (sm_90a), and what the blocks of a cluster have in common.
#pragma once

#include "mma_sm90.cuh"

namespace lowrank_ops::sm90 {

#define LRO_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LRO_NAMES_16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LRO_NAMES_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LRO_NAMES_48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LRO_NAMES_64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define LRO_NAMES_80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LRO_NAMES_96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define LRO_NAMES_112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LRO_HALF_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define LRO_HALF_48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define LRO_HALF_64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define LRO_HALF_80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define LRO_HALF_OF_SUMS(d, i)                                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define LRO_SUMS(d, i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), "+f"(d[i + 12]),      \
      "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define LRO_NAMES_FOR_32 LRO_NAMES_0
#define LRO_SUMS_FOR_32(d) LRO_SUMS(d, 0)
#define LRO_NAMES_FOR_64 LRO_NAMES_0 ", " LRO_NAMES_16
#define LRO_SUMS_FOR_64(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16)
#define LRO_NAMES_FOR_80 LRO_NAMES_0 ", " LRO_NAMES_16 ", " LRO_HALF_32
#define LRO_SUMS_FOR_80(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16), LRO_HALF_OF_SUMS(d, 32)
#define LRO_NAMES_FOR_96 LRO_NAMES_0 ", " LRO_NAMES_16 ", " LRO_NAMES_32
#define LRO_SUMS_FOR_96(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16), LRO_SUMS(d, 32)
#define LRO_NAMES_FOR_112 LRO_NAMES_0 ", " LRO_NAMES_16 ", " LRO_NAMES_32 ", " LRO_HALF_48
#define LRO_SUMS_FOR_112(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16), LRO_SUMS(d, 32), LRO_HALF_OF_SUMS(d, 48)
#define LRO_NAMES_FOR_128 LRO_NAMES_0 ", " LRO_NAMES_16 ", " LRO_NAMES_32 ", " LRO_NAMES_48
#define LRO_SUMS_FOR_128(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16), LRO_SUMS(d, 32), LRO_SUMS(d, 48)
#define LRO_NAMES_FOR_144 LRO_NAMES_0 ", " LRO_NAMES_16 ", " LRO_NAMES_32 ", " LRO_NAMES_48 ", " LRO_HALF_64
#define LRO_SUMS_FOR_144(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16), LRO_SUMS(d, 32), LRO_SUMS(d, 48), LRO_HALF_OF_SUMS(d, 64)
#define LRO_NAMES_FOR_160 LRO_NAMES_0 ", " LRO_NAMES_16 ", " LRO_NAMES_32 ", " LRO_NAMES_48 ", " LRO_NAMES_64
#define LRO_SUMS_FOR_160(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16), LRO_SUMS(d, 32), LRO_SUMS(d, 48), LRO_SUMS(d, 64)
#define LRO_NAMES_FOR_176 LRO_NAMES_0 ", " LRO_NAMES_16 ", " LRO_NAMES_32 ", " LRO_NAMES_48 ", " LRO_NAMES_64 ", " LRO_HALF_80
#define LRO_SUMS_FOR_176(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16), LRO_SUMS(d, 32), LRO_SUMS(d, 48), LRO_SUMS(d, 64), LRO_HALF_OF_SUMS(d, 80)
#define LRO_NAMES_FOR_192 LRO_NAMES_0 ", " LRO_NAMES_16 ", " LRO_NAMES_32 ", " LRO_NAMES_48 ", " LRO_NAMES_64 ", " LRO_NAMES_80
#define LRO_SUMS_FOR_192(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16), LRO_SUMS(d, 32), LRO_SUMS(d, 48), LRO_SUMS(d, 64), LRO_SUMS(d, 80)
#define LRO_NAMES_FOR_256 LRO_NAMES_0 ", " LRO_NAMES_16 ", " LRO_NAMES_32 ", " LRO_NAMES_48 ", " LRO_NAMES_64 ", " LRO_NAMES_80 ", " LRO_NAMES_96 ", " LRO_NAMES_112
#define LRO_SUMS_FOR_256(d) LRO_SUMS(d, 0), LRO_SUMS(d, 16), LRO_SUMS(d, 32), LRO_SUMS(d, 48), LRO_SUMS(d, 64), LRO_SUMS(d, 80), LRO_SUMS(d, 96), LRO_SUMS(d, 112)

// (64 x 16) (16 x columns), both in shared memory, added to d, or replacing it where accumulate is 0. The summed values
// are contiguous, or, transposed, the others.
template <class Element, int kColumns>
struct Product;
template <class Element, int kColumns>
struct TransposedProduct;

// The numbers of the operands behind the sums: left, right, whether to accumulate.
#define LRO_PRODUCT(Name, transposed, Element, type, columns, left, right, flag)                             \
  template <>                                                                                                \
  struct Name<Element, columns> {                                                                            \
    static __device__ __forceinline__ void add(float (&d)[columns / 2], uint64_t a, uint64_t b, int accumulate) { \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " flag ", 0;\n"                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                       \
                   " {" LRO_NAMES_FOR_##columns "}, " left ", " right ", p, 1, 1, " transposed ";\n}\n"         \
                   : LRO_SUMS_FOR_##columns(d)                                                               \
                   : "l"(a), "l"(b), "r"(accumulate));                                                       \
    }                                                                                                        \
  }

#define LRO_PRODUCTS(Name, transposed, columns, left, right, flag)                        \
  LRO_PRODUCT(Name, transposed, __nv_bfloat16, "bf16", columns, left, right, flag);         \
  LRO_PRODUCT(Name, transposed, __half, "f16", columns, left, right, flag)

LRO_PRODUCTS(Product, "0, 0", 32, "%16", "%17", "%18");
LRO_PRODUCTS(Product, "0, 0", 64, "%32", "%33", "%34");
LRO_PRODUCTS(Product, "0, 0", 80, "%40", "%41", "%42");
LRO_PRODUCTS(Product, "0, 0", 96, "%48", "%49", "%50");
LRO_PRODUCTS(Product, "0, 0", 112, "%56", "%57", "%58");
LRO_PRODUCTS(Product, "0, 0", 128, "%64", "%65", "%66");
LRO_PRODUCTS(Product, "0, 0", 144, "%72", "%73", "%74");
LRO_PRODUCTS(Product, "0, 0", 160, "%80", "%81", "%82");
LRO_PRODUCTS(Product, "0, 0", 176, "%88", "%89", "%90");
LRO_PRODUCTS(Product, "0, 0", 192, "%96", "%97", "%98");
LRO_PRODUCTS(Product, "0, 0", 256, "%128", "%129", "%130");
LRO_PRODUCTS(TransposedProduct, "1, 1", 128, "%64", "%65", "%66");
LRO_PRODUCTS(TransposedProduct, "1, 1", 256, "%128", "%129", "%130");

// (64 x 16) (16 x 64), the left one in registers.
template <class Element>
struct RegisterProduct;

#define LRO_REGISTER_PRODUCT(Element, type)                                                                   \
  template <>                                                                                                 \
  struct RegisterProduct<Element> {                                                                           \
    static __device__ __forceinline__ void add(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n"                                             \
                   "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" LRO_NAMES_FOR_64            \
                   "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                           \
                   : LRO_SUMS_FOR_64(d)                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                    \
    }                                                                                                         \
  }

LRO_REGISTER_PRODUCT(__nv_bfloat16, "bf16");
LRO_REGISTER_PRODUCT(__half, "f16");

// ---- clusters ----

// All threads of all blocks of a cluster arrive, then wait; what was written before is then visible to all of them.
__device__ __forceinline__ void arrive_cluster() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void wait_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ int rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// The address that block `rank` of the cluster knows as `address`.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
// Arrives at a barrier of any block of the cluster: what this thread had to read has been read. Nothing written goes with
// it: to the cluster's scope it would be published by a fence for the whole device, which waits for all that the thread
// has stored or added in memory.
__device__ __forceinline__ void arrive_in_block(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Brings the box at (x, y) to all blocks of the cluster that have a bit in `blocks`, to the same place in each; each is
// told by its own barrier in the place of `barrier`.
__device__ __forceinline__ void copy_box_to_blocks(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void store_in_block(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

// 16 bytes of this block's own.
__device__ __forceinline__ void load_shared(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ld.shared::cta.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

#undef LRO_REGISTER_PRODUCT
#undef LRO_PRODUCTS
#undef LRO_PRODUCT

}  // namespace lowrank_ops::sm90
