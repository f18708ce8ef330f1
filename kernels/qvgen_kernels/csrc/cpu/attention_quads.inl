// Integer products of the attention by VNNI, of AVX-512 or AVX2: four bytes share a lane, one of each product's factors is unsigned.
//
// vpdpbusd takes the unsigned bytes first. Of the scores these are the keys, 128 added, which a query's sum takes off again; of the
// sums of values they are the codes of probabilities.

typedef uint8_t Code;
constexpr int64_t kPack = 4;
constexpr int32_t kKeyShift = 128;
constexpr int64_t kGroup = 4;  // queries whose products are computed together

#if defined(QV_MAX512)
typedef __m512i Lanes;
constexpr int kAtOnce = 4;  // registers of columns beside each other: with kGroup rows 16 of 32 hold sums
static inline Lanes lanes(const Code* x) { return _mm512_loadu_si512(x); }
static inline Lanes quad_of(const Code* x) { int32_t four; memcpy(&four, x, 4); return _mm512_set1_epi32(four); }
static inline Lanes start(int32_t x) { return _mm512_set1_epi32(x); }
static inline Lanes add_products(Lanes sum, Lanes plain, Lanes with_sign) { return _mm512_dpbusd_epi32(sum, plain, with_sign); }
static inline void put(int32_t* out, Lanes v) { _mm512_storeu_si512(out, v); }
#else
typedef __m256i Lanes;
constexpr int kAtOnce = 2;  // with kGroup rows 8 of 16 hold sums
static inline Lanes lanes(const Code* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
static inline Lanes quad_of(const Code* x) { int32_t four; memcpy(&four, x, 4); return _mm256_set1_epi32(four); }
static inline Lanes start(int32_t x) { return _mm256_set1_epi32(x); }
static inline Lanes add_products(Lanes sum, Lanes plain, Lanes with_sign) { return _mm256_dpbusd_avx_epi32(sum, plain, with_sign); }
static inline void put(int32_t* out, Lanes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v); }
#endif
constexpr int64_t kWidth = sizeof(Lanes) / sizeof(int32_t);

// kRows rows of a (lda bytes apart) times kParts registers of columns of b, whose quads of rows lie `stride` bytes apart; the columns
// are the unsigned side if kPlainColumns.
template <int kRows, int kParts, bool kPlainColumns>
static inline void product_of(const Code* a, int64_t lda, const Code* b, int64_t stride, int64_t quads, const int32_t* first,
                              int32_t* out, int64_t ldo) {
    Lanes sums[kRows][kParts];
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
            const Lanes x = quad_of(a + r * lda + u * kPack);
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
    if (count == kGroup) return product<kGroup, false>(codes, kKeys, values, columns, kQuads, nullptr, out);
    for (int64_t i = 0; i < count; ++i) product<1, false>(codes + i * kKeys, kKeys, values, columns, kQuads, nullptr, out + i * columns);
}

static void begin_products(const Attention&) {}
static void end_products() {}
