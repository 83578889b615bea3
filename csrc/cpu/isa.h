// Instruction sets by function, chosen once at run time: one binary runs on every x86-64 and uses what the CPU has.
//
// A kernel is one always-inlined body of plain loops; HYPERSD_KERNEL wraps it into a function per instruction set, where
// the compiler inlines and vectorises it anew, and a dispatcher of the plain name.
#pragma once

#if defined(_MSC_VER)
#define HYPERSD_INLINE __forceinline
#define HYPERSD_LAMBDA_INLINE
#define HYPERSD_RESTRICT __restrict
#else
#define HYPERSD_INLINE inline __attribute__((always_inline))
#define HYPERSD_LAMBDA_INLINE __attribute__((always_inline))  // after the parameters: a kernel's lambdas are its body too
#define HYPERSD_RESTRICT __restrict__
#endif

namespace hypersd {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };  // amx: avx512 and the tile unit, bfloat16 alone

Isa isa();                 // what kernels use now
int set_isa(int level);    // -2: ask, -1: widest the CPU has, else at most this level; returns the level in use

}  // namespace hypersd

#if defined(__x86_64__) && defined(__GNUC__)
#define HYPERSD_AVX2 __attribute__((target("avx2,fma,f16c")))
#if defined(__clang__)
#define HYPERSD_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#else
#define HYPERSD_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#endif
#define HYPERSD_KERNEL_FOR(NAME, PARAMETERS, ARGUMENTS, BODY16, BODY32, BODY64) \
  static void NAME##_baseline PARAMETERS { BODY16 ARGUMENTS; }          \
  HYPERSD_AVX2 static void NAME##_avx2 PARAMETERS { BODY32 ARGUMENTS; } \
  HYPERSD_AVX512 static void NAME##_avx512 PARAMETERS { BODY64 ARGUMENTS; } \
  static void NAME PARAMETERS {                                         \
    switch (hypersd::isa()) {                                           \
      case hypersd::Isa::amx:                                           \
      case hypersd::Isa::avx512: NAME##_avx512 ARGUMENTS; break;        \
      case hypersd::Isa::avx2: NAME##_avx2 ARGUMENTS; break;            \
      default: NAME##_baseline ARGUMENTS;                               \
    }                                                                   \
  }
#else
#define HYPERSD_KERNEL_FOR(NAME, PARAMETERS, ARGUMENTS, BODY16, BODY32, BODY64) \
  static void NAME PARAMETERS { BODY16 ARGUMENTS; }
#endif
#define HYPERSD_KERNEL(NAME, PARAMETERS, ARGUMENTS) \
  HYPERSD_KERNEL_FOR(NAME, PARAMETERS, ARGUMENTS, NAME##_body, NAME##_body, NAME##_body)
// The body is a template over the bytes of a vector, for loops that name their vectors.
#define HYPERSD_VECTOR_KERNEL(NAME, PARAMETERS, ARGUMENTS) \
  HYPERSD_KERNEL_FOR(NAME, PARAMETERS, ARGUMENTS, NAME##_body<16>, NAME##_body<32>, NAME##_body<64>)
