// Numbers of the three types that inputs and outputs have, eight at a time.
#pragma once
#include "warp.cuh"

namespace qv {

template <int kDtype> struct Element { using type = uint16_t; };
template <> struct Element<kFloat32> { using type = float; };

__device__ __forceinline__ uint16_t round_to_bfloat16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <int kDtype> __device__ __forceinline__ float value_of(typename Element<kDtype>::type element) {
    if constexpr (kDtype == kFloat32) return element;
    else if constexpr (kDtype == kBfloat16) return bits_float(static_cast<uint32_t>(element) << 16);
    else return float16_value(element);
}

template <int kDtype> __device__ __forceinline__ typename Element<kDtype>::type element_of(float value) {
    if constexpr (kDtype == kFloat32) return value;
    else if constexpr (kDtype == kBfloat16) return round_to_bfloat16(value);
    else return round_to_float16(value);
}

// To the type and back, as between two operators.
template <int kDtype> __device__ __forceinline__ float rounded(float value) { return value_of<kDtype>(element_of<kDtype>(value)); }

__device__ __forceinline__ bool aligned(const void* place) { return (reinterpret_cast<uintptr_t>(place) & 15) == 0; }

// Up to eight numbers; those from `count` on are 0.
template <int kDtype> __device__ __forceinline__ void load_eight(const void* base, int64_t place, int count, float (&out)[kChunk]) {
    using type = typename Element<kDtype>::type;
    const type* source = static_cast<const type*>(base) + place;
    type elements[kChunk];
    if (count >= kChunk && aligned(source)) {
        for (int part = 0; part < static_cast<int>(sizeof(elements) / 16); ++part)
            reinterpret_cast<uint4*>(elements)[part] = reinterpret_cast<const uint4*>(source)[part];
    } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) elements[i] = i < count ? source[i] : type(0);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = value_of<kDtype>(elements[i]);
}

template <int kDtype> __device__ __forceinline__ void store_eight(void* base, int64_t place, int count, const float (&values)[kChunk]) {
    using type = typename Element<kDtype>::type;
    type* target = static_cast<type*>(base) + place;
    type elements[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) elements[i] = element_of<kDtype>(values[i]);
    if (count >= kChunk && aligned(target)) {
        for (int part = 0; part < static_cast<int>(sizeof(elements) / 16); ++part)
            reinterpret_cast<uint4*>(target)[part] = reinterpret_cast<const uint4*>(elements)[part];
    } else {
        for (int i = 0; i < kChunk && i < count; ++i) target[i] = elements[i];
    }
}

}  // namespace qv
