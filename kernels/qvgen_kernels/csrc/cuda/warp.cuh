// What a warp does together and what reaches the memories: matrix instructions, their loads, asynchronous copies.
//
// QV_EMULATE replaces this file by plain C++ with the same functions (tests/kernels/cuda_emulation.h), so that the kernels
// themselves run, thread by thread, on any processor.
#pragma once
#if defined(QV_EMULATE)
#include "cuda_emulation.h"
#else
#include "int4.h"

#define QV_SHARED_MEMORY(name) extern __shared__ __align__(16) uint8_t name[]

namespace qv {

// Four 8 x 8 matrices of 16-bit elements, 16 bytes a row; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(const uint8_t* row, uint32_t (&out)[4]) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
}

#if __CUDA_ARCH__ < 800
__device__ __forceinline__ void multiply_8x8(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b) {
    asm volatile("mma.sync.aligned.m8n8k32.row.col.s32.u4.u4.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(c0), "+r"(c1) : "r"(a), "r"(b));
}
#endif

// c [16, 8] += a [16, 64] b [64, 8], unsigned 4-bit numbers; a register holds eight of one row, the first in the lowest bits.
// Turing has the 8 x 8 x 32 instruction alone, of which this one is made of four.
__device__ __forceinline__ void multiply_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ < 800
    multiply_8x8(c[0], c[1], a[0], b0);
    multiply_8x8(c[0], c[1], a[2], b1);
    multiply_8x8(c[2], c[3], a[1], b0);
    multiply_8x8(c[2], c[3], a[3], b1);
#else
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.u4.u4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// 16 bytes from device memory to shared memory, zeros where they are not there; on sm_80 and later in the background.
__device__ __forceinline__ void copy_line(uint8_t* shared, const uint8_t* source, bool there) {
#if __CUDA_ARCH__ < 800
    *reinterpret_cast<uint4*>(shared) = there ? *reinterpret_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
#else
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int32_t bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(address), "l"(source), "r"(bytes) : "memory");
#endif
}

// End a stage of copies.
__device__ __forceinline__ void end_stage() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Wait until at most kStages - 2 stages of this thread's copies are on their way.
__device__ __forceinline__ void wait_for_stage() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" : : "n"(kStages - 2) : "memory");
#endif
}

__device__ __forceinline__ uint16_t round_to_float16(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float float16_value(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace qv
#endif
