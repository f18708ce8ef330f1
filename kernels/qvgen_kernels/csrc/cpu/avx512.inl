// AVX-512 forms of what body.inl has in plain C++, same results bit for bit, for the VNNI and AMX backends: ranges and codes of
// rows, and the registers that vector_epilogue.inl computes with.

static inline __m512 widen_bfloat16(const uint16_t* x) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline int16_t least_lane(__m512i v) {
    const __m256i half = _mm256_min_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    const __m128i quarter = _mm_min_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(INT16_MIN)));  // unsigned order
    return static_cast<int16_t>(_mm_extract_epi16(least, 0) ^ 0x8000);
}

// Smallest and largest ordered key of a bfloat16 row, in float32 keys. Integer order needs no conversion, and it keeps NaNs, which
// floating-point minima drop. The row `ahead` elements on is fetched meanwhile: the processor's own prefetch ends with the page.
static void range_bfloat16(const uint16_t* x, int64_t columns, int64_t ahead, int32_t* min_key, int32_t* max_key) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i low[2], high[2];
    low[0] = low[1] = magnitude;
    high[0] = high[1] = _mm512_set1_epi16(INT16_MIN);
    for (int64_t k = 0; k < columns; k += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(x + k + ahead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(x + k + ahead + 32), _MM_HINT_T0);
        for (int half = 0; half < 2; ++half) {
            const int64_t rest = columns - k - 32 * half;
            const __mmask32 mask = rest >= 32 ? 0xffffffffu : rest <= 0 ? 0 : (1u << rest) - 1;
            const __m512i v = _mm512_maskz_loadu_epi16(mask, x + k + 32 * half);
            const __m512i key = _mm512_ternarylogic_epi32(v, _mm512_srai_epi16(v, 15), magnitude, 0x78);  // v ^ (sign & 0x7fff)
            low[half] = _mm512_mask_min_epi16(low[half], mask, low[half], key);
            high[half] = _mm512_mask_max_epi16(high[half], mask, high[half], key);
        }
    }
    const __m512i ones = _mm512_set1_epi16(-1);  // ~v reverses the order
    const int16_t least = least_lane(_mm512_min_epi16(low[0], low[1]));
    const int16_t most = static_cast<int16_t>(~least_lane(_mm512_xor_si512(_mm512_max_epi16(high[0], high[1]), ones)));
    // The key of a negative float32 has ones where its bfloat16 has been cut off.
    *min_key = static_cast<int32_t>(static_cast<uint32_t>(least) << 16 | (least < 0 ? 0xffff : 0));
    *max_key = static_cast<int32_t>(static_cast<uint32_t>(most) << 16 | (most < 0 ? 0xffff : 0));
}

// x / factor (kDivide) or x * factor, as codes.
template <bool kDivide>
static inline __m128i encode16(__m512 x, __m512 factor, __m512 low, __m512 high, __m512i offset) {
    const __m512 scaled = kDivide ? _mm512_div_ps(x, factor) : _mm512_mul_ps(x, factor);
    // max and min return their second argument where one is NaN, so a NaN becomes `low`.
    const __m512 v = _mm512_min_ps(_mm512_max_ps(scaled, low), high);
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(v), offset));
}

// Codes of a run of columns that are float32 (kWide) or bfloat16, divided by the scale (kDivide) or times its reciprocal.
template <bool kWide, bool kDivide>
static void encode_run(const void* x, int64_t columns, const Params& r, uint8_t* out) {
    const float* wide = static_cast<const float*>(x);
    const uint16_t* narrow = static_cast<const uint16_t*>(x);
    const __m512 factor = _mm512_set1_ps(kDivide ? r.divisor : r.inverse);
    const __m512 low = _mm512_set1_ps(r.low), high = _mm512_set1_ps(r.high);
    const __m512i offset = _mm512_set1_epi32(r.offset);
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) {
        const __m512 v = kWide ? _mm512_loadu_ps(wide + k) : widen_bfloat16(narrow + k);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), encode16<kDivide>(v, factor, low, high, offset));
    }
    if (k < columns) {
        const __mmask16 mask = static_cast<__mmask16>((1u << (columns - k)) - 1);
        const __m512 v = kWide ? _mm512_maskz_loadu_ps(mask, wide + k)
                               : _mm512_castsi512_ps(_mm512_slli_epi32(
                                     _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, narrow + k)), 16));
        _mm_mask_storeu_epi8(out + k, mask, encode16<kDivide>(v, factor, low, high, offset));
    }
}

// One register of 16 numbers.
constexpr int64_t kVector = 16;
using Floats = __m512;
using Ints = __m512i;

static inline Floats load_floats(const float* x) { return _mm512_loadu_ps(x); }
static inline Ints load_ints(const int32_t* x) { return _mm512_loadu_si512(x); }
static inline void keep_floats(float* x, Floats a) { _mm512_storeu_ps(x, a); }
static inline Floats all(float x) { return _mm512_set1_ps(x); }
static inline Ints all(int32_t x) { return _mm512_set1_epi32(x); }
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
static inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
static inline Floats negative(Floats a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
static inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }   // b where a is NaN
static inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b where a is NaN
static inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
static inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
static inline Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
static inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
static inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }  // to nearest even
static inline Floats power_of_two(Ints n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, all(127)), 23)); }

static inline __m256i narrow_bfloat16(Floats y) {
    const __m512i u = _mm512_castps_si512(y);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0)));
}

static inline Floats round_bfloat16(Floats y) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow_bfloat16(y)), 16));
}

// 32 numbers, past the caches where they are aligned.
static inline void store_floats(float* out, const Floats* y) {
    const bool aligned = (reinterpret_cast<uintptr_t>(out) & 63) == 0;
    for (int64_t v = 0; v < 2; ++v) {
        if (aligned) _mm512_stream_ps(out + v * kVector, y[v]);
        else _mm512_storeu_ps(out + v * kVector, y[v]);
    }
}

static inline void store_bfloat16(uint16_t* out, const Floats* y) {
    const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bfloat16(y[0])), narrow_bfloat16(y[1]), 1);
    if ((reinterpret_cast<uintptr_t>(out) & 63) == 0)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out), line);
    else
        _mm512_storeu_si512(out, line);
}
