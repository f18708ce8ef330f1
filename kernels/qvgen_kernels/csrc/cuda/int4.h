// The packed linear in 4 bits on sm_75, 80, 86 and 89, whose tensor cores multiply unsigned 4-bit numbers: C structures.
//
// Two kernels. quantize.cuh turns rows into unsigned codes, two in a byte, with their sums; multiply.cuh multiplies codes and
// corrects the sums by the zero points, in int32, which is exact:
//
//     sum (q_x - z_x)(q_w - z_w) = sum q_x q_w  -  z_w sum q_x  -  z_x sum q_w  +  g z_x z_w        g columns
//
// Symmetric codes are stored with 8 added, which is then their zero point. Widths of 2 and 3 bits take 4 here. Columns are
// padded to a multiple of 128 with codes 0 on both sides, which no sum sees. Built without contraction (-fmad=false): every
// float32 operation of the contract (kernels/README.md) is one rounding.
#pragma once
#include <stdint.h>

namespace qv {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Function : int32_t { kIdentity = 0, kGeluTanh = 1, kSilu = 2 };
enum Arithmetic : int32_t { kReciprocal = 0, kDivision = 1, kUnrounded = 2 };

constexpr int kTileRows = 128, kTileOutputs = 128, kTileBytes = 64;  // of one stage: 64 bytes are 128 columns
constexpr int kThreads = 256, kStages = 3, kStageBytes = (kTileRows + kTileOutputs) * kTileBytes;
constexpr int kChunk = 8;  // columns that one thread quantizes at a time, and outputs that it stores at a time

// Rows to codes. Mirrored field by field in int4_driver.py, as Multiply is; pointers that may be null say so.
struct Quantize {
    const void* x;             // [rows, columns]
    const float* input_scale;  // [columns]; null: 1
    const float* clip_low;     // [rows]; null: 1
    const float* clip_high;    // [rows]; null: 1
    const float* row_scale;    // [rows]: static ranges; null: from each row's own extremes
    const float* row_zero;     // [rows], whole numbers in 0..qmax; null: 0
    uint8_t* codes;            // [rows, code_stride]
    float* scale;              // [range_groups, rows]
    int32_t* zero;             // [range_groups, rows]
    int32_t* sums;             // [sum_groups, rows]: of the codes
    int64_t row_stride;        // of x, in elements
    int32_t rows, columns, code_stride, range_groups, sum_groups;
    int32_t qmax, symmetric, scale_dtype, arithmetic;
};

// Codes to outputs.
struct Multiply {
    const uint8_t* codes;         // [rows, code_stride]
    const uint8_t* weight;        // [outputs, code_stride]
    const float* scale;           // [range_groups, rows]
    const int32_t* zero;          // [range_groups, rows]
    const int32_t* sums;          // [groups, rows]
    const float* weight_scale;    // [weight_groups, outputs]
    const int32_t* weight_zero;   // [weight_groups, outputs]; null where they are real
    const float* weight_real;     // [weight_groups, outputs]; null where they are whole
    const int32_t* weight_sums;   // [groups, outputs]
    const float* bias;            // [outputs]; null: none
    const void* branch;           // [rows, outputs] of y's type, added before the bias; null: none
    const void* gate;             // [rows / gate_rows, outputs] of y's type or float32, after the function; null: none
    const void* residual;         // [rows, outputs] of y's type, added last; null: none
    void* y;                      // [rows, outputs]
    int32_t* accumulators;        // [rows, outputs, groups], for tests; null: not wanted
    int64_t gate_row_stride, residual_row_stride;  // in elements
    int32_t rows, outputs, code_stride, group, groups, range_groups, weight_groups;
    int32_t gate_rows, gate_float32, function;
};

}  // namespace qv
