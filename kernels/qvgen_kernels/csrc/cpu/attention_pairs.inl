// Integer products of the attention where two 16-bit numbers share a lane: AVX2's vpmaddwd, and plain C++ for every processor.

typedef int16_t Code;
constexpr int64_t kPack = 2;
constexpr int32_t kKeyShift = 0;  // what is added to the codes of keys
constexpr int64_t kGroup = 4;     // queries whose products are computed together

#if defined(QV_AVX2)
typedef __m256i Lanes;
constexpr int64_t kWidth = 8;

static inline Lanes lanes(const Code* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
static inline Lanes pair_of(const Code* x) { int32_t two; memcpy(&two, x, 4); return _mm256_set1_epi32(two); }
static inline Lanes madd(Lanes sum, Lanes a, Lanes b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
static inline Lanes start(int32_t x) { return _mm256_set1_epi32(x); }
static inline void put(int32_t* out, Lanes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v); }
#else
constexpr int64_t kWidth = 16;
struct Lanes { int32_t n[16]; };
struct PairLanes { int16_t n[32]; };

static inline PairLanes lanes(const Code* x) { PairLanes v; memcpy(v.n, x, sizeof v.n); return v; }
static inline PairLanes pair_of(const Code* x) {
    PairLanes v;
    for (int i = 0; i < 16; ++i) v.n[2 * i] = x[0], v.n[2 * i + 1] = x[1];
    return v;
}
static inline Lanes madd(Lanes sum, const PairLanes& a, const PairLanes& b) {
    for (int i = 0; i < 16; ++i) sum.n[i] += a.n[2 * i] * b.n[2 * i] + a.n[2 * i + 1] * b.n[2 * i + 1];
    return sum;
}
static inline Lanes start(int32_t x) {
    Lanes v;
    for (int i = 0; i < 16; ++i) v.n[i] = x;
    return v;
}
static inline void put(int32_t* out, const Lanes& v) { memcpy(out, v.n, sizeof v.n); }
#endif

// out[r][c] = sum over `units` lanes of a[r] (row stride lda) times b [units][stride / kPack columns], for kRows rows and 16 columns.
template <int kRows>
static inline void product16(const Code* a, int64_t lda, const Code* b, int64_t stride, int64_t units, const int32_t* first,
                             int32_t* out, int64_t ldo) {
    constexpr int kParts = 16 / kWidth;
    Lanes sums[kRows][kParts];
    for (int r = 0; r < kRows; ++r)
        for (int part = 0; part < kParts; ++part) sums[r][part] = start(first ? first[r] : 0);
    for (int64_t u = 0; u < units; ++u)
        for (int part = 0; part < kParts; ++part) {
            const auto columns = lanes(b + u * stride + part * kWidth * kPack);
            for (int r = 0; r < kRows; ++r) sums[r][part] = madd(sums[r][part], columns, pair_of(a + r * lda + u * kPack));
        }
    for (int r = 0; r < kRows; ++r)
        for (int part = 0; part < kParts; ++part) put(out + r * ldo + part * kWidth, sums[r][part]);
}

template <int kRows>
static void product(const Code* a, int64_t lda, const Code* b, int64_t columns, int64_t units, const int32_t* first, int32_t* out) {
    for (int64_t c = 0; c < columns; c += 16)
        product16<kRows>(a, lda, b + c * kPack, columns * kPack, units, first, out + c, columns);
}

// Scores of `count` queries: keys are the columns.
static void scores(const Code* q, int64_t ldq, const Code* keys, int64_t units, const int32_t* first, int64_t count, int32_t* out) {
    if (count == kGroup) return product<kGroup>(q, ldq, keys, kKeys, units, first, out);
    for (int64_t i = 0; i < count; ++i) product<1>(q + i * ldq, ldq, keys, kKeys, units, first + i, out + i * kKeys);
}

// Sums of values: the head's elements are the columns, keys are summed.
static void sums_of_values(const Code* codes, const Code* values, int64_t columns, int64_t count, int32_t* out) {
    constexpr int64_t kUnits = kKeys / kPack;
    if (count == kGroup) return product<kGroup>(codes, kKeys, values, columns, kUnits, nullptr, out);
    for (int64_t i = 0; i < count; ++i) product<1>(codes + i * kKeys, kKeys, values, columns, kUnits, nullptr, out + i * columns);
}

static void begin_products(const Attention&) {}
static void end_products() {}
