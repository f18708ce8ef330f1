// Steps 4 and 5 of the contract: int32 sums to outputs, eight of one row at a time.
#pragma once
#include "numbers.cuh"

namespace qv {

// What group g contributes to eight outputs of a row: the corrected sums, scaled.
__device__ __forceinline__ void add_group(const Multiply& p, int row, int first, int count, int g, const int32_t (&sums)[kChunk],
                                          float (&y)[kChunk]) {
    const int gx = p.range_groups == 1 ? 0 : g, gw = p.weight_groups == 1 ? 0 : g;
    const int32_t zero_x = p.zero[static_cast<int64_t>(gx) * p.rows + row];
    const int32_t sum_x = p.sums[static_cast<int64_t>(g) * p.rows + row];
    const float scale_x = p.scale[static_cast<int64_t>(gx) * p.rows + row];
    const int64_t of_sums = static_cast<int64_t>(g) * p.outputs + first, of_scales = static_cast<int64_t>(gw) * p.outputs + first;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
        if (i >= count) continue;
        int32_t total = sums[i] - zero_x * p.weight_sums[of_sums + i];
        const int32_t centered = sum_x - p.group * zero_x;  // the sum of q_x - z_x
        if (!p.weight_real) total -= p.weight_zero[of_scales + i] * centered;
        if (p.accumulators) p.accumulators[(static_cast<int64_t>(row) * p.outputs + first + i) * p.groups + g] = total;
        float t = static_cast<float>(total);
        if (p.weight_real) t = t - static_cast<float>(centered) * p.weight_real[of_scales + i];
        t = (t * scale_x) * p.weight_scale[of_scales + i];
        y[i] = g == 0 ? t : y[i] + t;
    }
}

// e^v as the CPU backends compute it (csrc/cpu/epilogue.inl), operation by operation, so that all backends agree.
__device__ __forceinline__ float exponential(float v) {
    v = v > -87.0f ? v : -87.0f;
    v = v < 89.0f ? v : 89.0f;
    const float n = rintf(v * 1.44269504f);
    const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.38888889e-3f;
    e = e * r + 8.33333333e-3f;
    e = e * r + 4.16666667e-2f;
    e = e * r + 1.66666667e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return e * bits_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

__device__ __forceinline__ float apply_function(float x, int32_t function) {
    const float u = function == kGeluTanh ? 1.59576912f * (x * (1.0f + (0.044715f * x) * x)) : x;
    return x / (1.0f + exponential(-u));
}

// What follows the linear itself, with the roundings of separate operators; the last rounding is the store's.
template <int kDtype>
__device__ __forceinline__ void apply_tail(const Multiply& p, int row, int first, int count, float (&y)[kChunk]) {
    float other[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
        y[i] = rounded<kDtype>(y[i]);
        if (p.function) y[i] = apply_function(y[i], p.function);
        if (p.function && (p.gate || p.residual)) y[i] = rounded<kDtype>(y[i]);
    }
    if (p.gate) {
        const int64_t place = row / p.gate_rows * p.gate_row_stride + first;
        if (p.gate_float32) load_eight<kFloat32>(p.gate, place, count, other);
        else load_eight<kDtype>(p.gate, place, count, other);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            y[i] *= other[i];
            if (p.residual && !p.gate_float32) y[i] = rounded<kDtype>(y[i]);
        }
    }
    if (p.residual) {
        load_eight<kDtype>(p.residual, row * p.residual_row_stride + first, count, other);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) y[i] += other[i];
    }
}

// Branch, bias, tail, cast and store of eight outputs of a row, of which `count` are there.
template <int kDtype>
__device__ __forceinline__ void finish(const Multiply& p, int row, int first, int count, float (&y)[kChunk]) {
    const int64_t place = static_cast<int64_t>(row) * p.outputs + first;
    float other[kChunk];
    if (p.branch) {
        load_eight<kDtype>(p.branch, place, count, other);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) y[i] += other[i];
    }
    if (p.bias) {
        load_eight<kFloat32>(p.bias, first, count, other);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) y[i] += other[i];
    }
    if (p.function || p.gate || p.residual) apply_tail<kDtype>(p, row, first, count, y);
    store_eight<kDtype>(p.y, place, count, y);
}

}  // namespace qv
