// QV_TARGET_BEGIN("avx2,fma") ... QV_TARGET_END: every function between is compiled for these instructions and must be called
// only where the CPU has them. Headers of intrinsics are included before.
#pragma once
// The instructions that the AVX-512 backends need; -DQV_AVX512_EMULATE is for tests on CPUs without them.
#if defined(QV_AVX512_EMULATE)
#define QV_AVX512_TARGET "avx2,fma,f16c"
#else
#define QV_AVX512_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#endif
// 64-bit ARM with the dot product, as each compiler spells it.
#if defined(__clang__)
#define QV_NEON_TARGET "dotprod"
#else
#define QV_NEON_TARGET "arch=armv8.2-a+dotprod"
#endif
#define QV_TEXT(x) #x
#if defined(__clang__)
#define QV_TARGET_BEGIN(list) _Pragma(QV_TEXT(clang attribute push(__attribute__((target(list))), apply_to = function)))
#define QV_TARGET_END _Pragma("clang attribute pop")
#else
#define QV_TARGET_BEGIN(list) _Pragma("GCC push_options") _Pragma(QV_TEXT(GCC target(list)))
#define QV_TARGET_END _Pragma("GCC pop_options")
#endif
