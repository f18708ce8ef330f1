// The registers that vector_epilogue.inl computes with, of AVX2: for the AVX2 and AVX-VNNI backends.

// One register of 8 numbers.
constexpr int64_t kVector = 8;
using Floats = __m256;
using Ints = __m256i;

static inline Floats load_floats(const float* x) { return _mm256_loadu_ps(x); }
static inline Ints load_ints(const int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
static inline void keep_floats(float* x, Floats a) { _mm256_storeu_ps(x, a); }
static inline Floats all(float x) { return _mm256_set1_ps(x); }
static inline Ints all(int32_t x) { return _mm256_set1_epi32(x); }
static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
static inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
static inline Floats negative(Floats a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
static inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }   // b where a is NaN
static inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }  // b where a is NaN
static inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
static inline Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
static inline Ints mul(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
static inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
static inline Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }  // to nearest even
static inline Floats power_of_two(Ints n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, all(127)), 23)); }

static inline Floats widen_bfloat16(const uint16_t* x) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Rounded to bfloat16, its bits in the lower half of each number.
static inline __m256i bfloat16_bits(Floats y) {
    const __m256i u = _mm256_castps_si256(y);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}

static inline Floats round_bfloat16(Floats y) { return _mm256_castsi256_ps(_mm256_slli_epi32(bfloat16_bits(y), 16)); }

// 32 numbers, past the caches where they are aligned.
static inline void store_floats(float* out, const Floats* y) {
    const bool aligned = (reinterpret_cast<uintptr_t>(out) & 63) == 0;
    for (int64_t v = 0; v < 4; ++v) {
        if (aligned) _mm256_stream_ps(out + v * kVector, y[v]);
        else _mm256_storeu_ps(out + v * kVector, y[v]);
    }
}

static inline void store_bfloat16(uint16_t* out, const Floats* y) {
    for (int64_t half = 0; half < 2; ++half) {
        // packus works in halves of 128 bits: 0-3 8-11 4-7 12-15
        const __m256i mixed = _mm256_packus_epi32(bfloat16_bits(y[2 * half]), bfloat16_bits(y[2 * half + 1]));
        const __m256i line = _mm256_permute4x64_epi64(mixed, 0xd8);
        __m256i* place = reinterpret_cast<__m256i*>(out + 16 * half);
        if ((reinterpret_cast<uintptr_t>(out) & 63) == 0) _mm256_stream_si256(place, line);
        else _mm256_storeu_si256(place, line);
    }
}
