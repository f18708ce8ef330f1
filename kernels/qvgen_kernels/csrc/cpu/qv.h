// The packed linear on CPUs: C structures, and what the backends share. The contract is kernels/README.md.
//
// One library, no torch headers, a plain C ABI (api.cpp). Each backend is one file that is compiled for its own
// instructions (a target pragma, so that no compiler flag is needed) and includes body.inl, which holds everything that is
// not the integer product itself. Never build with -ffast-math or with contraction (-ffp-contract=off): every float32
// operation of the contract is one rounding.
//
// Packed weight: int8 [N/16][Kp/4][16][4], N padded to 32 and every accumulation group of columns to k_unit (64 for
// tiles, 4 elsewhere) with zeros. One 64-byte line holds 4 columns of 16 outputs: a zmm register of VNNI, a row of an
// AMX tile, two ymm or four NEON registers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(_WIN32)
#define QV_API extern "C" __declspec(dllexport)
#else
#define QV_API extern "C" __attribute__((visibility("default")))
#endif

namespace qv {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };  // int8: operands of fake quantization alone
enum Backend : int32_t { kPortable = 0, kAvx2 = 1, kAvxVnni = 2, kVnni = 3, kAmx = 4, kNeon = 5 };
enum Function : int32_t { kIdentity = 0, kGeluTanh = 1, kSilu = 2 };
enum Arithmetic : int32_t { kReciprocal = 0, kDivision = 1, kUnrounded = 2 };

constexpr int64_t kLanes = 16;   // outputs in one panel of the packed weight
constexpr int64_t kBlock = 32;   // outputs computed at a time: two panels
constexpr int64_t kMaxRows = 32; // rows of the largest tile of any backend

// One call. Mirrored field by field in cpu_library.py; pointers that may be null say so.
struct Linear {
    int64_t rows, in_features, out_features;  // M, K, N
    int64_t padded_in, padded_out;            // Kp, Np of the packed weight
    int64_t group, groups;                    // columns of one accumulator, and how many: G
    int64_t padded_group;                     // group rounded up to k_unit; Kp = G * padded_group
    int64_t weight_groups, activation_groups; // 1 or G each
    int64_t rotation, paley;                  // B and b of the input's Hadamard transform; 0: none; b = 0: the regular kind
    const void* x;                            // [M, K]
    int64_t x_row_stride, x_column_stride;    // in elements
    void* y;                                  // [M, N]
    int64_t y_row_stride;                     // in elements; columns are contiguous
    const int8_t* weight;
    const float* weight_scale;                // [weight_groups, Np]
    const int32_t* column_sum;                // [G, Np]: sums of the packed operands
    const int32_t* weight_shift;              // [weight_groups, Np]: operand = packed + shift; null: packed is the operand
    const float* weight_zero;                 // [weight_groups, Np]: real zero points; null: none
    const float* bias;                        // [N]; null: none
    const float* clip_low;                    // [M]; null: 1
    const float* clip_high;                   // [M]; null: 1
    const float* input_scale;                 // [K]; null: 1
    const float* row_scale;                   // [M]: static ranges; null: from each row's own extremes
    const float* row_zero;                    // [M], whole numbers in 0..qmax; null: 0
    const void* branch;                       // [M, N] of x's type, added before the bias; null: none
    const void* gate;                         // [M / gate_rows, N] of x's type or float32, a factor after the function; null: none
    const void* residual;                     // [M, N] of x's type, added last; null: none
    const uint8_t* paley_terms;               // [b / 4][b]: which of 16 signed sums of four; null: b = 1
    int32_t* accumulators;                    // [M, N, G], for tests; null: not wanted
    int16_t* operands;                        // [M, K] q - z, for tests; null: not wanted
    float* scales;                            // [M, activation_groups], for tests; null: not wanted
    int64_t gate_rows, gate_row_stride, residual_row_stride;  // strides in elements; columns are contiguous
    float rotation_scale;                     // float32(B^-1/2)
    int32_t dtype, activation_qmax, symmetric, activation_bits, scale_dtype;
    int32_t weight_bound;                     // the largest magnitude of a packed weight
    int32_t function;                         // of the output, after the bias: a Function
    int32_t gate_float32;                     // 1: gate and sum are float32; 0: both are rounded to x's type
    int32_t arithmetic;                       // how symmetric codes follow from a row's range: an Arithmetic
    int32_t backend, threads;
};

// A backend runs rows [m0, m1) of outputs [n0, n1), n0 a multiple of kBlock.
using RunFunction = void (*)(const Linear&, int64_t m0, int64_t m1, int64_t n0, int64_t n1);
struct BackendInfo {
    RunFunction run;
    int64_t tile_rows;
    int64_t code_bytes;  // of one item: what its codes may fill of the caches
    int64_t (*exercise)(int64_t times);  // integer operations done by `times` tiles whose operands stay in the first-level cache
};

BackendInfo portable_backend();
BackendInfo avx2_backend();
BackendInfo avxvnni_backend();
BackendInfo vnni_backend();
BackendInfo amx_backend();
BackendInfo neon_backend();

// Memory of this thread that lives as long as the thread: at least `bytes`, 64-byte aligned, contents undefined.
// Each slot is one piece. Returns null where there is no memory.
void* scratch(int slot, size_t bytes);
enum Slot { kSlotCodes, kSlotRow, kSlotVectors, kSlotTile, kSlotSums, kSlots };

// Run work(data) on `threads` threads, the caller among them; returns when all have.
void parallel(void (*work)(void*), void* data, int threads);

bool amx_permission();  // asks the kernel once per process

}  // namespace qv
