// Integer products of the attention where four bytes share a lane: VNNI of AVX-512 or AVX2, and the dot product of 64-bit ARM.
//
// vpdpbusd takes unsigned bytes first. Of the scores these are the keys, 128 added, which a query's sum takes off again; of the sums
// of values they are the codes of probabilities. ARM's sdot takes signed bytes alone: keys stay as they are, and 128 is taken from
// the codes of probabilities, whose sums with a row of zeros are then what is too little in every row.

typedef uint8_t Code;
constexpr int64_t kPack = 4;
constexpr int64_t kGroup = 4;  // queries whose products are computed together

#if defined(QV_NEON)
typedef int8x16_t Lanes;
typedef int32x4_t Sums;
constexpr int32_t kKeyShift = 0;  // what is added to the codes of keys
constexpr int kAtOnce = 4;        // registers of columns beside each other: with kGroup rows 16 of 32 hold sums
static inline Lanes lanes(const Code* x) { return vld1q_s8(reinterpret_cast<const int8_t*>(x)); }
static inline Lanes quad_of(const Code* x) { int32_t four; memcpy(&four, x, 4); return vreinterpretq_s8_s32(vdupq_n_s32(four)); }
static inline Lanes with_sign(Lanes x) { return veorq_s8(x, vdupq_n_s8(-128)); }
static inline Sums start(int32_t x) { return vdupq_n_s32(x); }
static inline void put(int32_t* out, Sums v) { vst1q_s32(out, v); }
static inline Sums add_products(Sums sum, Lanes a, Lanes b) { return dot(sum, a, b); }
#elif defined(QV_MAX512)
typedef __m512i Lanes;
typedef __m512i Sums;
constexpr int32_t kKeyShift = 128;
constexpr int kAtOnce = 4;
static inline Lanes lanes(const Code* x) { return _mm512_loadu_si512(x); }
static inline Lanes quad_of(const Code* x) { int32_t four; memcpy(&four, x, 4); return _mm512_set1_epi32(four); }
static inline Sums start(int32_t x) { return _mm512_set1_epi32(x); }
static inline Lanes with_sign(Lanes x) { return x; }
static inline Sums add_products(Sums sum, Lanes plain, Lanes other) { return _mm512_dpbusd_epi32(sum, plain, other); }
static inline void put(int32_t* out, Sums v) { _mm512_storeu_si512(out, v); }
#else
typedef __m256i Lanes;
typedef __m256i Sums;
constexpr int32_t kKeyShift = 128;
constexpr int kAtOnce = 2;  // with kGroup rows 8 of 16 hold sums
static inline Lanes lanes(const Code* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
static inline Lanes quad_of(const Code* x) { int32_t four; memcpy(&four, x, 4); return _mm256_set1_epi32(four); }
static inline Sums start(int32_t x) { return _mm256_set1_epi32(x); }
static inline Lanes with_sign(Lanes x) { return x; }
static inline Sums add_products(Sums sum, Lanes plain, Lanes other) { return _mm256_dpbusd_avx_epi32(sum, plain, other); }
static inline void put(int32_t* out, Sums v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v); }
#endif
constexpr int64_t kWidth = sizeof(Sums) / sizeof(int32_t);

// kRows rows of a (lda bytes apart) times kParts registers of columns of b, whose quads of rows lie `stride` bytes apart; the columns
// are the unsigned side if kPlainColumns.
template <int kRows, int kParts, bool kPlainColumns>
static inline void product_of(const Code* a, int64_t lda, const Code* b, int64_t stride, int64_t quads, const int32_t* first,
                              int32_t* out, int64_t ldo) {
    Sums sums[kRows][kParts];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kParts; ++c) sums[r][c] = start(first ? first[r] : 0);
    for (int64_t u = 0; u < quads; ++u) {
        Lanes line[kParts];
#pragma GCC unroll 4
        for (int c = 0; c < kParts; ++c) line[c] = lanes(b + u * stride + c * kWidth * kPack);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const Lanes quad = quad_of(a + r * lda + u * kPack), x = kPlainColumns ? quad : with_sign(quad);
#pragma GCC unroll 4
            for (int c = 0; c < kParts; ++c)
                sums[r][c] = kPlainColumns ? add_products(sums[r][c], line[c], x) : add_products(sums[r][c], x, line[c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kParts; ++c) put(out + r * ldo + c * kWidth, sums[r][c]);
}

template <int kRows, bool kPlainColumns>
static void product(const Code* a, int64_t lda, const Code* b, int64_t columns, int64_t quads, const int32_t* first, int32_t* out) {
    constexpr int64_t kStep = kAtOnce * kWidth;
    constexpr int kLeast = 16 / kWidth;  // columns are a multiple of 16
    int64_t c = 0;
    for (; c + kStep <= columns; c += kStep)
        product_of<kRows, kAtOnce, kPlainColumns>(a, lda, b + c * kPack, columns * kPack, quads, first, out + c, columns);
    for (; c < columns; c += 16)
        product_of<kRows, kLeast, kPlainColumns>(a, lda, b + c * kPack, columns * kPack, quads, first, out + c, columns);
}

// Scores of `count` queries: keys are the columns.
static void scores(const Code* q, int64_t ldq, const Code* keys, int64_t units, const int32_t* first, int64_t count, int32_t* out) {
    if (count == kGroup) return product<kGroup, true>(q, ldq, keys, kKeys, units, first, out);
    for (int64_t i = 0; i < count; ++i) product<1, true>(q + i * ldq, ldq, keys, kKeys, units, first + i, out + i * kKeys);
}

// Sums of values: the head's elements are the columns, keys are summed.
static void sums_of_values(const Code* codes, const Code* values, int64_t columns, int64_t count, int32_t* out) {
    constexpr int64_t kQuads = kKeys / kPack;
    if (count == kGroup) product<kGroup, false>(codes, kKeys, values, columns, kQuads, nullptr, out);
    for (int64_t i = 0; i < count && count < kGroup; ++i)
        product<1, false>(codes + i * kKeys, kKeys, values, columns, kQuads, nullptr, out + i * columns);
#if defined(QV_NEON)
    const Code zeros[kKeys] = {};
    int32_t lacking[256];
    product<1, false>(zeros, kKeys, values, columns, kQuads, nullptr, lacking);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < columns; ++c) out[i * columns + c] -= lacking[c];
#endif
}

static void begin_products(const Attention&) {}
static void end_products() {}
