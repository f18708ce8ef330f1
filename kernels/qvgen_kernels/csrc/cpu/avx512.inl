// AVX-512 forms of what body.inl has in plain C++; same results bit for bit. Included by the VNNI and AMX backends.
#define QV_AVX512 1

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

static inline __m128i encode16(__m512 x, __m512 inverse, __m512 low, __m512 high, __m512i offset) {
    // max and min return their second argument where one is NaN, so a NaN becomes `low`.
    const __m512 v = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(x, inverse), low), high);
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(v), offset));
}

// Codes of a run of columns that are float32 (kWide) or bfloat16.
template <bool kWide>
static void encode_run(const void* x, int64_t columns, const Params& r, uint8_t* out) {
    const float* wide = static_cast<const float*>(x);
    const uint16_t* narrow = static_cast<const uint16_t*>(x);
    const __m512 inverse = _mm512_set1_ps(r.inverse), low = _mm512_set1_ps(r.low), high = _mm512_set1_ps(r.high);
    const __m512i offset = _mm512_set1_epi32(r.offset);
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) {
        const __m512 v = kWide ? _mm512_loadu_ps(wide + k) : widen_bfloat16(narrow + k);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), encode16(v, inverse, low, high, offset));
    }
    if (k < columns) {
        const __mmask16 mask = static_cast<__mmask16>((1u << (columns - k)) - 1);
        const __m512 v = kWide ? _mm512_maskz_loadu_ps(mask, wide + k)
                               : _mm512_castsi512_ps(_mm512_slli_epi32(
                                     _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, narrow + k)), 16));
        _mm_mask_storeu_epi8(out + k, mask, encode16(v, inverse, low, high, offset));
    }
}

static inline __m256i narrow_bfloat16(__m512 y) {
    const __m512i u = _mm512_castps_si512(y);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0)));
}

// One accumulation group's epilogue of 16 outputs in registers (epilogue.inl has the same in words).
static inline __m512 scale_lanes(const Linear& p, const RowBlock& rows, int64_t slot, int64_t n, const int32_t* c) {
    __m512i acc = _mm512_loadu_si512(c);
    if (const int32_t offset = rows.offset[slot])
        acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(_mm512_set1_epi32(offset), _mm512_loadu_si512(p.column_sum + n)));
    if (p.weight_shift)
        acc = _mm512_add_epi32(
            acc, _mm512_mullo_epi32(_mm512_set1_epi32(rows.row_sum[slot]), _mm512_loadu_si512(p.weight_shift + n)));
    __m512 t = _mm512_cvtepi32_ps(acc);
    if (p.weight_zero) {
        const __m512 total = _mm512_set1_ps(static_cast<float>(rows.row_sum[slot]));
        t = _mm512_sub_ps(t, _mm512_mul_ps(total, _mm512_loadu_ps(p.weight_zero + n)));
    }
    return _mm512_mul_ps(_mm512_mul_ps(t, _mm512_set1_ps(rows.scale[slot])), _mm512_loadu_ps(p.weight_scale + n));
}

static inline __m512 round_lanes(__m512 y) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow_bfloat16(y)), 16));
}

// epilogue.inl, exponential
static inline __m512 exponential_lanes(__m512 v) {
    // max and min return their second argument where one is NaN
    v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(89.0f));
    const __m512 shift = _mm512_set1_ps(12582912.0f);
    const __m512 n = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), shift), shift);
    const __m512 r = _mm512_add_ps(_mm512_sub_ps(v, _mm512_mul_ps(n, _mm512_set1_ps(0.693359375f))),
                                   _mm512_mul_ps(n, _mm512_set1_ps(2.12194440e-4f)));
    __m512 e = _mm512_set1_ps(1.38888889e-3f);
    constexpr float kTerms[] = {8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f};
    for (const float term : kTerms)
        e = _mm512_add_ps(_mm512_mul_ps(e, r), _mm512_set1_ps(term));
    const __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(e, _mm512_castsi512_ps(power));
}

// epilogue.inl, apply_function
static inline __m512 function_lanes(int32_t function, __m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 v = _mm512_xor_ps(x, _mm512_set1_ps(-0.0f));
    if (function == kGeluTanh) {
        const __m512 square = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.044715f), x), x);
        v = _mm512_mul_ps(_mm512_set1_ps(-1.59576912f), _mm512_mul_ps(x, _mm512_add_ps(one, square)));
    }
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential_lanes(v)));
}

// epilogue.inl, apply_tail, of 16 bfloat16 outputs of row m
static inline __m512 tail_lanes(const Linear& p, int64_t m, int64_t n, __m512 y) {
    y = round_lanes(y);
    if (p.function) {
        y = function_lanes(p.function, y);
        if (p.gate || p.residual) y = round_lanes(y);
    }
    if (p.gate) {
        const int64_t place = m / p.gate_rows * p.gate_row_stride + n;
        y = _mm512_mul_ps(y, p.gate_float32 ? _mm512_loadu_ps(static_cast<const float*>(p.gate) + place)
                                            : widen_bfloat16(static_cast<const uint16_t*>(p.gate) + place));
        if (p.residual && !p.gate_float32) y = round_lanes(y);
    }
    if (p.residual)
        y = _mm512_add_ps(y, widen_bfloat16(static_cast<const uint16_t*>(p.residual) + m * p.residual_row_stride + n));
    return y;
}

// A whole row of 32 bfloat16 outputs of a layer without groups, from sums to one line of memory, past the caches where the line is
// aligned.
static inline void finish_bfloat16(const Linear& p, const RowBlock& rows, int64_t m, int64_t slot, int64_t n, const int32_t* c) {
    __m512 low = scale_lanes(p, rows, slot, n, c), high = scale_lanes(p, rows, slot, n + kLanes, c + kLanes);
    if (p.branch) {
        const uint16_t* branch = static_cast<const uint16_t*>(p.branch) + m * p.out_features + n;
        low = _mm512_add_ps(low, widen_bfloat16(branch));
        high = _mm512_add_ps(high, widen_bfloat16(branch + kLanes));
    }
    if (p.bias) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(p.bias + n));
        high = _mm512_add_ps(high, _mm512_loadu_ps(p.bias + n + kLanes));
    }
    if (p.function || p.gate || p.residual) {
        low = tail_lanes(p, m, n, low);
        high = tail_lanes(p, m, n + kLanes, high);
    }
    uint16_t* out = static_cast<uint16_t*>(p.y) + m * p.y_row_stride + n;
    const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bfloat16(low)), narrow_bfloat16(high), 1);
    if ((reinterpret_cast<uintptr_t>(out) & 63) == 0)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out), line);
    else
        _mm512_storeu_si512(out, line);
}
