// Fake quantization for training: rows to the operands of a product, and the straight-through gradients, each in one pass.
//
// The arithmetic is that of qvgen's grid (docs/numerics.md), one IEEE float32 operation at a time, and sums of rows are added in
// the order in which torch's own sum adds them, so that a training run has the same bits with and without this.
#pragma once
#include "qv.h"

namespace qv {

// Where a group's scale and zero point come from.
enum ParamsKind : int32_t {
    kDynamic = 0,  // its extremes, times the clip factors `first` and `second`
    kStatic = 1,   // `first` and `second` as they are
    kLearned = 2,  // `first` and `second` brought to the grid: floored, rounded, clamped
};
enum ZeroKind : int32_t { kNoZero = 0, kIntegerZero = 1, kRealZero = 2 };

// One call. Mirrored field by field in fake_quantize_cpu.py. A row is cut into groups that have a scale each.
struct FakeQuantize {
    int64_t rows, groups, columns;    // columns of one group
    const void* x;                    // [rows, groups * columns], columns side by side; null: scales alone are wanted
    int64_t x_row_stride;             // in elements
    int64_t params;                   // of `first` and `second` in a row: 1, or one for each group
    const float *first, *second;      // [rows, params]; see ParamsKind
    float *low, *high;                // [rows, groups]: extremes (symmetric: -max|x|, max|x|), read if they are known, else written
    float *scale, *zero;              // [rows, groups]: what codes are multiplied by, and zero points; null: not wanted
    float* row_sum;                   // [rows]: sums of q - z, whole numbers; null: not wanted
    void* operand;                    // [rows, groups * columns]; null: not wanted
    const float* helper;              // [rows, groups * columns]: added to the operand, divided by the scale if that is outside
    const float* grad;                // [rows, groups * columns]: of the quantized row; null: there is no backward pass
    float* grad_x;                    // where it goes, which may be `grad`
    float *grad_first, *grad_second;  // [rows, groups]
    float floor, ceiling;             // between which a scale depends on its range
    float factor;                     // on grad_first and grad_second of learned parameters
    int32_t x_dtype, operand_dtype, qmin, qmax;
    int32_t kind, zero_kind, arithmetic, scale_dtype;
    int32_t factored;                 // operand: 1: q - z, 0: s (q - z)
    int32_t raw;                      // operand: 1: q in place of q - z, for a real zero point outside of the product
    int32_t known;                    // 1: low and high are given
    int32_t stop_zero;                // 1: a range's zero point is a constant to the gradient
    int32_t backend, threads;
};

// y = (((y - row_sum z_w) s_x) s_w + branch) + bias in place; what is null is left out.
struct ScaleOutput {
    int64_t rows, columns;
    void* y;                           // [rows, columns]
    const float *row_scale, *column_scale, *row_sum, *column_zero;
    const void* branch;                // [rows, columns] of y's type
    const float* bias;                 // [columns]
    int32_t dtype, backend, threads;
};

// by_row = grad s_w and by_column = grad s_x in one pass over grad [rows, columns].
struct ScaleGradient {
    int64_t rows, columns;
    const float *grad, *row_scale, *column_scale;
    void *by_row, *by_column;
    int32_t dtype, backend, threads;
};

struct FakeQuantizeCode {
    void (*quantize)(const FakeQuantize&, int64_t begin, int64_t end);
    void (*scale_output)(const ScaleOutput&, int64_t begin, int64_t end);
    void (*scale_gradient)(const ScaleGradient&, int64_t begin, int64_t end);
};

FakeQuantizeCode fake_quantize_portable();
FakeQuantizeCode fake_quantize_avx2();
FakeQuantizeCode fake_quantize_avx512();

}  // namespace qv
