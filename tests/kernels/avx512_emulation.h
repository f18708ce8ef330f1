// The AVX-512 operations that vnni.cpp, amx.cpp and avx512.inl use, in plain C++ as the Intel manual defines them: so these backends
// run, under sanitizers, on processors without AVX-512. Put before every source with -include, with -DQV_AVX512_EMULATE.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace avx512_emulation {

#define EMULATED static inline __attribute__((always_inline))

// Lanes of a register as an array.
template <class T, int kCount>
struct Lanes {
    T at[kCount];
};
template <class T, class Register>
EMULATED Lanes<T, sizeof(Register) / sizeof(T)> lanes(Register r) {
    Lanes<T, sizeof(Register) / sizeof(T)> made;
    memcpy(made.at, &r, sizeof(r));
    return made;
}
template <class Register, class Array>
EMULATED Register join(const Array& array) {
    static_assert(sizeof(Register) == sizeof(array.at), "as many bytes");
    Register r;
    memcpy(&r, array.at, sizeof(r));
    return r;
}
// f(lane of a, lane of b) of every lane.
template <class T, class Register, class Function>
EMULATED Register each(Register a, Register b, Function f) {
    auto x = lanes<T>(a), y = lanes<T>(b);
    for (size_t i = 0; i < sizeof(a) / sizeof(T); ++i) x.at[i] = f(x.at[i], y.at[i]);
    return join<Register>(x);
}
template <class Register, class T>
EMULATED Register all(T value) {
    Lanes<T, sizeof(Register) / sizeof(T)> made;
    for (T& lane : made.at) lane = value;
    return join<Register>(made);
}
// Lanes of another type: f(lane), from the first on.
template <class Register, class From, class To, class Source, class Function>
EMULATED Register convert(Source a, Function f) {
    const auto x = lanes<From>(a);
    Lanes<To, sizeof(Register) / sizeof(To)> made;
    for (size_t i = 0; i < sizeof(Register) / sizeof(To); ++i) made.at[i] = f(x.at[i]);
    return join<Register>(made);
}
template <class Register>
EMULATED Register from(const void* memory) {
    Register r;
    memcpy(&r, memory, sizeof(r));
    return r;
}
// Lanes whose bit of the mask is set; the others are 0 and not touched in memory.
template <class Register, class T>
EMULATED Register masked(uint64_t mask, const void* memory) {
    Lanes<T, sizeof(Register) / sizeof(T)> made{};
    for (size_t i = 0; i < sizeof(Register) / sizeof(T); ++i)
        if (mask >> i & 1) memcpy(&made.at[i], static_cast<const char*>(memory) + i * sizeof(T), sizeof(T));
    return join<Register>(made);
}
template <class T, class Register>
EMULATED Register choose(uint64_t mask, Register otherwise, Register chosen) {
    auto x = lanes<T>(otherwise);
    const auto y = lanes<T>(chosen);
    for (size_t i = 0; i < sizeof(Register) / sizeof(T); ++i)
        if (mask >> i & 1) x.at[i] = y.at[i];
    return join<Register>(x);
}

using U = uint32_t;
using I = int32_t;
using S = int16_t;

#define EMULATE2(name, R, T, expression) \
    EMULATED R name(R a_, R b_) { return each<T>(a_, b_, [](T a, T b) -> T { return expression; }); }
EMULATE2(add_epi32, __m512i, U, a + b)
EMULATE2(sub_epi32, __m512i, U, a - b)
EMULATE2(mullo_epi32, __m512i, U, a * b)
EMULATE2(and_si512, __m512i, U, a & b)
EMULATE2(xor_si512, __m512i, U, a ^ b)
EMULATE2(min_epi16, __m512i, S, a < b ? a : b)
EMULATE2(max_epi16, __m512i, S, a > b ? a : b)
EMULATE2(add_ps, __m512, float, a + b)
EMULATE2(sub_ps, __m512, float, a - b)
EMULATE2(mul_ps, __m512, float, a* b)
EMULATE2(div_ps, __m512, float, a / b)
EMULATE2(max_ps, __m512, float, a > b ? a : b)
EMULATE2(min_ps, __m512, float, a < b ? a : b)
#undef EMULATE2

EMULATED __m512 xor_ps(__m512 a, __m512 b) {
    const __m512i bits = xor_si512(from<__m512i>(&a), from<__m512i>(&b));
    return from<__m512>(&bits);
}
EMULATED __m512i slli_epi32(__m512i a, int by) { return each<U>(a, a, [by](U x, U) { return x << by; }); }
EMULATED __m512i srli_epi32(__m512i a, int by) { return each<U>(a, a, [by](U x, U) { return x >> by; }); }
EMULATED __m512i srai_epi16(__m512i a, int by) { return each<S>(a, a, [by](S x, S) { return static_cast<S>(x >> by); }); }
EMULATED __m512i dpbusd(__m512i sums, __m512i a, __m512i b) {
    auto c = lanes<U>(sums);
    const auto x = lanes<uint8_t>(a);
    const auto y = lanes<int8_t>(b);
    for (int i = 0; i < 64; ++i) c.at[i / 4] += static_cast<U>(x.at[i] * y.at[i]);
    return join<__m512i>(c);
}
EMULATED __m512i ternary(__m512i a, __m512i b, __m512i c, int table) {
    const auto x = lanes<U>(a), y = lanes<U>(b), z = lanes<U>(c);
    Lanes<U, 16> made{};
    for (int i = 0; i < 16; ++i)
        for (int bit = 0; bit < 32; ++bit) {
            const U place = (x.at[i] >> bit & 1) << 2 | (y.at[i] >> bit & 1) << 1 | (z.at[i] >> bit & 1);
            made.at[i] |= (static_cast<U>(table) >> place & 1) << bit;
        }
    return join<__m512i>(made);
}
EMULATED __mmask16 unordered(__m512 a, __m512 b) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(x.at[i] != x.at[i] || y.at[i] != y.at[i]) << i;
    return static_cast<__mmask16>(mask);
}
EMULATED I nearest(float x) { return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<I>(std::nearbyint(x)) : INT32_MIN; }
EMULATED void store_bytes(void* memory, uint64_t mask, __m128i a) {
    const auto x = lanes<uint8_t>(a);
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) static_cast<uint8_t*>(memory)[i] = x.at[i];
}
EMULATED __m512i insert_upper(__m512i a, __m256i b) {
    memcpy(reinterpret_cast<char*>(&a) + 32, &b, 32);
    return a;
}
EMULATED __m512i lower_half(__m256i b) {
    __m512i a{};
    memcpy(&a, &b, 32);
    return a;
}
EMULATED __m256i upper(__m512i a) { return from<__m256i>(reinterpret_cast<const char*>(&a) + 32); }

}  // namespace avx512_emulation

#define E avx512_emulation
#define _mm512_add_epi32 E::add_epi32
#define _mm512_sub_epi32 E::sub_epi32
#define _mm512_mullo_epi32 E::mullo_epi32
#define _mm512_and_si512 E::and_si512
#define _mm512_xor_si512 E::xor_si512
#define _mm512_min_epi16 E::min_epi16
#define _mm512_max_epi16 E::max_epi16
#define _mm512_mask_min_epi16(s, k, a, b) E::choose<int16_t>(k, s, E::min_epi16(a, b))
#define _mm512_mask_max_epi16(s, k, a, b) E::choose<int16_t>(k, s, E::max_epi16(a, b))
#define _mm512_mask_blend_epi32(k, a, b) E::choose<int32_t>(k, a, b)
#define _mm512_add_ps E::add_ps
#define _mm512_sub_ps E::sub_ps
#define _mm512_mul_ps E::mul_ps
#define _mm512_div_ps E::div_ps
#define _mm512_max_ps E::max_ps
#define _mm512_min_ps E::min_ps
#define _mm512_xor_ps E::xor_ps
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 E::slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 E::srli_epi32
#undef _mm512_srai_epi16
#define _mm512_srai_epi16 E::srai_epi16
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 E::dpbusd
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 E::ternary
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, which) E::unordered(a, b)
#define _mm512_set1_ps(x) E::all<__m512>(static_cast<float>(x))
#define _mm512_set1_epi32(x) E::all<__m512i>(static_cast<int32_t>(x))
#define _mm512_set1_epi16(x) E::all<__m512i>(static_cast<int16_t>(x))
#define _mm512_setzero_si512() E::all<__m512i>(0)
#define _mm512_loadu_ps E::from<__m512>
#define _mm512_loadu_si512 E::from<__m512i>
#define _mm512_storeu_ps(p, a) [](float* p_, __m512 a_) { memcpy(p_, &a_, 64); }(p, a)
#define _mm512_storeu_si512(p, a) [](void* p_, __m512i a_) { memcpy(p_, &a_, 64); }(p, a)
#define _mm512_stream_si512(p, a) [](void* p_, __m512i a_) { memcpy(__builtin_assume_aligned(p_, 64), &a_, 64); }(p, a)
#define _mm512_stream_ps(p, a) [](float* p_, __m512 a_) { memcpy(__builtin_assume_aligned(p_, 64), &a_, 64); }(p, a)
#define _mm512_maskz_loadu_ps(k, p) (E::masked<__m512, float>(k, p))
#define _mm512_maskz_loadu_epi16(k, p) (E::masked<__m512i, uint16_t>(k, p))
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16(k, p) (E::masked<__m256i, uint16_t>(k, p))
#undef _mm_mask_storeu_epi8
#define _mm_mask_storeu_epi8(p, k, a) E::store_bytes(p, k, a)
#define _mm512_castps_si512(a) ([](__m512 a_) { return E::from<__m512i>(&a_); }(a))
#define _mm512_castsi512_ps(a) ([](__m512i a_) { return E::from<__m512>(&a_); }(a))
#define _mm512_castsi512_si256(a) ([](__m512i a_) { return E::from<__m256i>(&a_); }(a))
#define _mm512_castsi256_si512(a) E::lower_half(a)
#undef _mm512_inserti64x4
#define _mm512_inserti64x4(a, b, which) E::insert_upper(a, b)
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64(a, which) E::upper(a)
#define _mm512_cvtepi32_ps(a) (E::convert<__m512, int32_t, float>(a, [](int32_t x) { return static_cast<float>(x); }))
#define _mm512_cvtps_epi32(a) (E::convert<__m512i, float, int32_t>(a, [](float x) { return E::nearest(x); }))
#define _mm512_cvtepu16_epi32(a) (E::convert<__m512i, uint16_t, uint32_t>(a, [](uint16_t x) { return static_cast<uint32_t>(x); }))
#define _mm512_cvtepi32_epi16(a) (E::convert<__m256i, uint32_t, uint16_t>(a, [](uint32_t x) { return static_cast<uint16_t>(x); }))
#define _mm512_cvtepi32_epi8(a) (E::convert<__m128i, uint32_t, uint8_t>(a, [](uint32_t x) { return static_cast<uint8_t>(x); }))
#endif
