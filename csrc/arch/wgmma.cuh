// wgmma (sm_90a): m64nNk16, 16-bit operands, float32 accumulators. fragment.h has descriptors and register layouts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lowrank_ops::arch {

// Before the first wgmma and whenever registers it uses were touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The contiguous dimension of the shared-memory operands.
enum class Major { K, MN };

// d = a b + (scale_d ? d : 0), A (64 x 16) and B (16 x kN) in shared memory by descriptors.
template <class Element, int kN, Major kMajor>
struct WgmmaSS;

// The same with A in registers, N = 64, B K-major.
template <class Element>
struct WgmmaRS;

// Operand names in groups of 8 registers; LRO_NAMES_n and LRO_REGS_n are the n / 2 accumulators of N = n.
// clang-format off
#define LRO_N0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LRO_N1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define LRO_N2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define LRO_N3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define LRO_N4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define LRO_N5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define LRO_N6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define LRO_N7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define LRO_N8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define LRO_N9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define LRO_N10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define LRO_N11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define LRO_N12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define LRO_N13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define LRO_N14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define LRO_N15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define LRO_R8(d, i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),   \
      "+f"(d[i + 7])
#define LRO_NAMES_16 LRO_N0
#define LRO_NAMES_32 LRO_NAMES_16 ", " LRO_N1
#define LRO_NAMES_48 LRO_NAMES_32 ", " LRO_N2
#define LRO_NAMES_64 LRO_NAMES_48 ", " LRO_N3
#define LRO_NAMES_80 LRO_NAMES_64 ", " LRO_N4
#define LRO_NAMES_96 LRO_NAMES_80 ", " LRO_N5
#define LRO_NAMES_112 LRO_NAMES_96 ", " LRO_N6
#define LRO_NAMES_128 LRO_NAMES_112 ", " LRO_N7
#define LRO_NAMES_144 LRO_NAMES_128 ", " LRO_N8
#define LRO_NAMES_160 LRO_NAMES_144 ", " LRO_N9
#define LRO_NAMES_176 LRO_NAMES_160 ", " LRO_N10
#define LRO_NAMES_192 LRO_NAMES_176 ", " LRO_N11
#define LRO_NAMES_208 LRO_NAMES_192 ", " LRO_N12
#define LRO_NAMES_224 LRO_NAMES_208 ", " LRO_N13
#define LRO_NAMES_240 LRO_NAMES_224 ", " LRO_N14
#define LRO_NAMES_256 LRO_NAMES_240 ", " LRO_N15
#define LRO_REGS_16(d) LRO_R8(d, 0)
#define LRO_REGS_32(d) LRO_REGS_16(d), LRO_R8(d, 8)
#define LRO_REGS_48(d) LRO_REGS_32(d), LRO_R8(d, 16)
#define LRO_REGS_64(d) LRO_REGS_48(d), LRO_R8(d, 24)
#define LRO_REGS_80(d) LRO_REGS_64(d), LRO_R8(d, 32)
#define LRO_REGS_96(d) LRO_REGS_80(d), LRO_R8(d, 40)
#define LRO_REGS_112(d) LRO_REGS_96(d), LRO_R8(d, 48)
#define LRO_REGS_128(d) LRO_REGS_112(d), LRO_R8(d, 56)
#define LRO_REGS_144(d) LRO_REGS_128(d), LRO_R8(d, 64)
#define LRO_REGS_160(d) LRO_REGS_144(d), LRO_R8(d, 72)
#define LRO_REGS_176(d) LRO_REGS_160(d), LRO_R8(d, 80)
#define LRO_REGS_192(d) LRO_REGS_176(d), LRO_R8(d, 88)
#define LRO_REGS_208(d) LRO_REGS_192(d), LRO_R8(d, 96)
#define LRO_REGS_224(d) LRO_REGS_208(d), LRO_R8(d, 104)
#define LRO_REGS_240(d) LRO_REGS_224(d), LRO_R8(d, 112)
#define LRO_REGS_256(d) LRO_REGS_240(d), LRO_R8(d, 120)

// `a`, `b`, `flag`: the names of the operands behind the accumulators.
#define LRO_WGMMA_SS_OF(Element, type, n, major, transpose, a_name, b_name, flag)                              \
  template <>                                                                                                  \
  struct WgmmaSS<Element, n, Major::major> {                                                                   \
    static __device__ __forceinline__ void mma(float (&d)[n / 2], uint64_t a, uint64_t b, int scale_d) {       \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " flag ", 0;\n"                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                             \
                   " {" LRO_NAMES_##n "}, " a_name ", " b_name ", p, 1, 1, " transpose ";\n}\n"               \
                   : LRO_REGS_##n(d)                                                                           \
                   : "l"(a), "l"(b), "r"(scale_d));                                                            \
    }                                                                                                          \
  };
#define LRO_WGMMA_SS(n, major, transpose, a_name, b_name, flag)                                                \
  LRO_WGMMA_SS_OF(__nv_bfloat16, "bf16", n, major, transpose, a_name, b_name, flag)                            \
  LRO_WGMMA_SS_OF(__half, "f16", n, major, transpose, a_name, b_name, flag)
#define LRO_WGMMA_RS(Element, type)                                                                            \
  template <>                                                                                                  \
  struct WgmmaRS<Element> {                                                                                    \
    static __device__ __forceinline__ void mma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int scale_d) { \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n"                                              \
                   "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" LRO_NAMES_64               \
                   "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                            \
                   : LRO_REGS_64(d)                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d));                        \
    }                                                                                                          \
  };

LRO_WGMMA_SS(32, K, "0, 0", "%16", "%17", "%18")
LRO_WGMMA_SS(64, K, "0, 0", "%32", "%33", "%34")
LRO_WGMMA_SS(80, K, "0, 0", "%40", "%41", "%42")
LRO_WGMMA_SS(96, K, "0, 0", "%48", "%49", "%50")
LRO_WGMMA_SS(112, K, "0, 0", "%56", "%57", "%58")
LRO_WGMMA_SS(128, K, "0, 0", "%64", "%65", "%66")
LRO_WGMMA_SS(144, K, "0, 0", "%72", "%73", "%74")
LRO_WGMMA_SS(160, K, "0, 0", "%80", "%81", "%82")
LRO_WGMMA_SS(176, K, "0, 0", "%88", "%89", "%90")
LRO_WGMMA_SS(192, K, "0, 0", "%96", "%97", "%98")
LRO_WGMMA_SS(128, MN, "1, 1", "%64", "%65", "%66")
LRO_WGMMA_SS(256, MN, "1, 1", "%128", "%129", "%130")
LRO_WGMMA_RS(__nv_bfloat16, "bf16")
LRO_WGMMA_RS(__half, "f16")
// clang-format on

#undef LRO_WGMMA_RS
#undef LRO_WGMMA_SS
#undef LRO_WGMMA_SS_OF
#undef LRO_R8

}  // namespace lowrank_ops::arch
