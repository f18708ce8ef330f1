// Integer products of the attention by AVX-512 VNNI: four bytes share a lane, one of each product's factors is unsigned.
//
// vpdpbusd takes the unsigned bytes first. Of the scores these are the keys, 128 added, which a query's sum takes off again; of the
// sums of values they are the codes of probabilities.

typedef uint8_t Code;
constexpr int64_t kPack = 4;
constexpr int32_t kKeyShift = 128;
constexpr int64_t kGroup = 4;  // queries whose products are computed together

static inline __m512i quad_of(const Code* x) { int32_t four; memcpy(&four, x, 4); return _mm512_set1_epi32(four); }

template <int kRows>
static inline void scores_of(const Code* q, int64_t ldq, const Code* keys, int64_t units, const int32_t* first, int32_t* out) {
    __m512i sums[kRows][4];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
        sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = _mm512_set1_epi32(first[r]);
    for (int64_t u = 0; u < units; ++u) {
        const Code* line = keys + u * kKeys * kPack;
        const __m512i k0 = _mm512_loadu_si512(line), k1 = _mm512_loadu_si512(line + 64);
        const __m512i k2 = _mm512_loadu_si512(line + 128), k3 = _mm512_loadu_si512(line + 192);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const __m512i x = quad_of(q + r * ldq + u * kPack);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], k0, x);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], k1, x);
            sums[r][2] = _mm512_dpbusd_epi32(sums[r][2], k2, x);
            sums[r][3] = _mm512_dpbusd_epi32(sums[r][3], k3, x);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + r * kKeys + c * 16, sums[r][c]);
}

// kParts registers of the head's elements, for kRows queries.
template <int kRows, int kParts>
static inline void part_of_values(const Code* codes, const Code* values, int64_t columns, int64_t ldo, int32_t* out) {
    __m512i sums[kRows][kParts];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kParts; ++c) sums[r][c] = _mm512_setzero_si512();
    for (int64_t u = 0; u < kKeys / kPack; ++u) {
        __m512i line[kParts];
#pragma GCC unroll 4
        for (int c = 0; c < kParts; ++c) line[c] = _mm512_loadu_si512(values + (u * columns + c * 16) * kPack);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const __m512i x = quad_of(codes + r * kKeys + u * kPack);
#pragma GCC unroll 4
            for (int c = 0; c < kParts; ++c) sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], x, line[c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kParts; ++c) _mm512_storeu_si512(out + r * ldo + c * 16, sums[r][c]);
}

template <int kRows>
static void sums_of(const Code* codes, const Code* values, int64_t columns, int32_t* out) {
    int64_t c = 0;
    for (; c + 64 <= columns; c += 64) part_of_values<kRows, 4>(codes, values + c * kPack, columns, columns, out + c);
    for (; c < columns; c += 16) part_of_values<kRows, 1>(codes, values + c * kPack, columns, columns, out + c);
}

static void scores(const Code* q, int64_t ldq, const Code* keys, int64_t units, const int32_t* first, int64_t count, int32_t* out) {
    if (count == kGroup) return scores_of<kGroup>(q, ldq, keys, units, first, out);
    for (int64_t i = 0; i < count; ++i) scores_of<1>(q + i * ldq, ldq, keys, units, first + i, out + i * kKeys);
}

static void sums_of_values(const Code* codes, const Code* values, int64_t columns, int64_t count, int32_t* out) {
    if (count == kGroup) return sums_of<kGroup>(codes, values, columns, out);
    for (int64_t i = 0; i < count; ++i) sums_of<1>(codes + i * kKeys, values, columns, out + i * columns);
}

static void begin_products(const Attention&) {}
static void end_products() {}
