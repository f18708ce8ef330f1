// Steps 0 and 2 of the contract: a row to its scales, zero points, codes and sums of codes. One block of threads has one row.
#pragma once
#include "numbers.cuh"

namespace qv {

struct Range {
    float scale;   // as the epilogue uses it
    float factor;  // codes are made by multiplying with it, or (division) by dividing by it
    int32_t zero;  // as the codes are stored: symmetric ones have 8
};

__device__ __forceinline__ float round_scale(float scale, int32_t dtype) {
    scale = scale < 1e-8f ? 1e-8f : scale;
    if (dtype == kFloat32 || !(scale < INFINITY)) return scale;
    const float floor = dtype == kFloat16 ? 6.103515625e-05f : 1e-8f;
    const float most = dtype == kFloat16 ? 65504.0f : 3.38953139e38f;
    const float near = dtype == kFloat16 ? rounded<kFloat16>(scale) : rounded<kBfloat16>(scale);
    return near < floor ? floor : near > most ? most : near;
}

__device__ __forceinline__ float whole_between(float value, float low, float high) {
    value = value > low ? value : low;  // this order turns a NaN into a number
    return rintf(value < high ? value : high);
}

__device__ __forceinline__ Range choose_range(const Quantize& p, int row, float low, float high) {
    const float qmax = static_cast<float>(p.qmax);
    if (p.row_scale) {
        const float scale = p.row_scale[row];
        const int32_t zero = p.symmetric ? 8 : p.row_zero ? static_cast<int32_t>(p.row_zero[row]) : 0;
        return {scale, 1.0f / scale, zero};
    }
    const float clip_low = p.clip_low ? p.clip_low[row] : 1.0f, clip_high = p.clip_high ? p.clip_high[row] : 1.0f;
    if (!p.symmetric) {
        low *= clip_low, high *= clip_high;
        const float scale = round_scale((high - low) / qmax, p.scale_dtype), inverse = 1.0f / scale;
        return {scale, inverse, static_cast<int32_t>(whole_between(-low * inverse, 0.0f, qmax))};
    }
    const float span = (-low > high ? -low : high) * clip_high;
    if (p.arithmetic == kDivision) {
        const float scale = (span < 1e-10f ? 1e-10f : span) / qmax;
        return {scale, scale, 8};
    }
    if (p.arithmetic == kUnrounded) {
        const float exact = round_scale(span * (1.0f / qmax), kFloat32);
        return {round_scale(exact, p.scale_dtype), 1.0f / exact, 8};
    }
    const float scale = round_scale(span / qmax, p.scale_dtype);
    return {scale, 1.0f / scale, 8};
}

// Eight columns of the row as they are quantized; columns that are not there are 0.
template <int kDtype> __device__ __forceinline__ void load_columns(const Quantize& p, int row, int chunk, float (&out)[kChunk]) {
    const int first = chunk * kChunk, count = p.columns - first;
    load_eight<kDtype>(p.x, row * p.row_stride + first, count, out);
    if (p.input_scale)
        for (int i = 0; i < kChunk && i < count; ++i) out[i] *= p.input_scale[first + i];
}

// Bring `size` neighbours of every run together in its first element: groups runs of `size` elements in shared memory.
template <class Join> __device__ __forceinline__ void reduce_runs(int groups, int size, const Join& join) {
    for (int left = size; left > 1; left = (left + 1) / 2) {
        const int half = (left + 1) / 2, pairs = left - half;
        for (int i = threadIdx.x; i < groups * pairs; i += blockDim.x) {
            const int place = i / pairs * size + i % pairs;
            join(place, place + half);
        }
        __syncthreads();
    }
}

template <int kDtype> __device__ __forceinline__ void quantize_row(const Quantize& p) {
    QV_SHARED_MEMORY(memory);
    const int row = blockIdx.x, chunks = (p.columns + kChunk - 1) / kChunk, groups = p.range_groups;
    const int per_range = chunks / groups, per_sum = chunks / p.sum_groups;
    float* low = reinterpret_cast<float*>(memory);
    float* high = low + chunks;
    int32_t* sum = reinterpret_cast<int32_t*>(high + chunks);
    float* factor = reinterpret_cast<float*>(sum + chunks);
    int32_t* zero = reinterpret_cast<int32_t*>(factor + groups);
    int32_t* is_bad = zero + groups;
    if (threadIdx.x == 0) *is_bad = 0;
    __syncthreads();
    float v[kChunk];
    for (int chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        load_columns<kDtype>(p, row, chunk, v);
        float least = 0.0f, most = 0.0f;
        for (int i = 0; i < kChunk; ++i) {
            least = v[i] < least ? v[i] : least;
            most = v[i] > most ? v[i] : most;
            if (p.row_scale ? v[i] != v[i] : !(fabsf(v[i]) < INFINITY)) *is_bad = 1;
        }
        low[chunk] = least, high[chunk] = most;
    }
    __syncthreads();
    reduce_runs(groups, per_range, [&](int a, int b) {
        low[a] = low[b] < low[a] ? low[b] : low[a];
        high[a] = high[b] > high[a] ? high[b] : high[a];
    });
    for (int g = threadIdx.x; g < groups; g += blockDim.x) {
        const Range range = choose_range(p, row, low[g * per_range], high[g * per_range]);
        if (!(range.scale < INFINITY)) *is_bad = 1;
        factor[g] = range.factor, zero[g] = range.zero;
        p.scale[static_cast<int64_t>(g) * p.rows + row] = range.scale;
        p.zero[static_cast<int64_t>(g) * p.rows + row] = range.zero;
    }
    __syncthreads();
    if (*is_bad)
        for (int g = threadIdx.x; g < groups; g += blockDim.x)
            p.scale[static_cast<int64_t>(g) * p.rows + row] = bits_float(0x7fc00000u);
    uint32_t* codes = reinterpret_cast<uint32_t*>(p.codes + static_cast<int64_t>(row) * p.code_stride);
    for (int chunk = threadIdx.x; chunk < p.code_stride / 4; chunk += blockDim.x) {
        if (chunk >= chunks) {
            codes[chunk] = 0;
            continue;
        }
        const int g = groups == 1 ? 0 : chunk / per_range, count = p.columns - chunk * kChunk;
        const float least = static_cast<float>(p.symmetric ? -p.qmax : -zero[g]);
        const float most = static_cast<float>(p.symmetric ? p.qmax : p.qmax - zero[g]);
        load_columns<kDtype>(p, row, chunk, v);
        uint32_t word = 0;
        int32_t total = 0;
        for (int i = 0; i < kChunk && i < count; ++i) {
            const float scaled = p.arithmetic == kDivision ? v[i] / factor[g] : v[i] * factor[g];
            const int32_t code = static_cast<int32_t>(whole_between(scaled, least, most)) + zero[g];
            total += code;
            word |= static_cast<uint32_t>(code) << (4 * i);
        }
        codes[chunk] = word, sum[chunk] = total;
    }
    __syncthreads();
    reduce_runs(p.sum_groups, per_sum, [&](int a, int b) { sum[a] += sum[b]; });
    for (int g = threadIdx.x; g < p.sum_groups; g += blockDim.x)
        p.sums[static_cast<int64_t>(g) * p.rows + row] = sum[g * per_sum];
}

}  // namespace qv
