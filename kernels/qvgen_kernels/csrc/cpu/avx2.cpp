// AVX2 backend: 4 rows x 16 outputs in 8 registers of 16-bit sums, two of weights, one of inputs.
//
// Byte products by maddubs only where two of them can't leave int16 (up to 32767), summed in 16 bits as far as that is safe: 72
// quads of columns at 4 bits. Else 16-bit products, which are half as fast.
#include "qv.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"

QV_TARGET_BEGIN("avx2,fma,f16c")

namespace qv {
namespace avx2 {
namespace {

#define QV_USE_AVX2
#define QV_ROWS 4
#define QV_WIDTH 8
#define QV_UNSIGNED 1

constexpr int64_t kWideQuads = 128;  // of inputs that are widened at a time: 4 rows of them are 4 KiB

// c = or += eight sums.
inline void put(int32_t* c, __m256i sums, bool first) {
    __m256i* place = reinterpret_cast<__m256i*>(c);
    _mm256_storeu_si256(place, first ? sums : _mm256_add_epi32(sums, _mm256_loadu_si256(place)));
}

// 16-bit products of kRows rows, inputs already widened, with one panel: for each quad the products of columns (0,1) and (2,3)
// are summed by pmaddwd, then the pairs are added.
template <int kRows>
void wide(const int16_t* a, int64_t lda, const int8_t* b, int64_t quads, bool first, int32_t* c) {
    __m256i low[kRows][2], high[kRows][2];
    for (int r = 0; r < kRows; ++r) low[r][0] = low[r][1] = high[r][0] = high[r][1] = _mm256_setzero_si256();
    for (int64_t q = 0; q < quads; ++q) {
        for (int v = 0; v < 2; ++v) {
            const __m128i* line = reinterpret_cast<const __m128i*>(b + q * 64 + v * 32);
            const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(line));
            const __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(line + 1));
            for (int r = 0; r < kRows; ++r) {
                int64_t four;
                memcpy(&four, a + r * lda + 4 * q, 8);
                const __m256i x = _mm256_set1_epi64x(four);
                low[r][v] = _mm256_add_epi32(low[r][v], _mm256_madd_epi16(x, w0));
                high[r][v] = _mm256_add_epi32(high[r][v], _mm256_madd_epi16(x, w1));
            }
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v)  // hadd works in halves of 128 bits: outputs 0 1 4 5 | 2 3 6 7
            put(c + r * kBlock + 8 * v, _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[r][v], high[r][v]), 0xd8), first);
}

template <int kRows>
void exact(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int32_t* c) {
    constexpr int kPair = kRows > 1 ? 2 : 1;
    alignas(64) int16_t x[kRows][4 * kWideQuads];
    for (int64_t start = 0; start < quads; start += kWideQuads) {
        const int64_t here = quads - start < kWideQuads ? quads - start : kWideQuads;
        for (int r = 0; r < kRows; ++r)
            for (int64_t k = 0; k < 4 * here; ++k) x[r][k] = a[r * lda + 4 * start + k];
        for (int64_t half = 0; half < 2; ++half)
            for (int r = 0; r < kRows; r += kPair)
                wide<kPair>(x[r], 4 * kWideQuads, b + half * panel + start * 64, here, start == 0,
                            c + r * kBlock + half * kLanes);
    }
}

// At most `safe` quads are summed in 16 bits before they are widened.
template <int kRows>
void narrow(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int64_t safe, int32_t* c) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t half = 0; half < 2; ++half, b += panel, c += kLanes) {
        for (int64_t start = 0; start < quads; start += safe) {
            const int64_t stop = start + safe < quads ? start + safe : quads;
            __m256i part[kRows][2];
            for (int r = 0; r < kRows; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int64_t q = start; q < stop; ++q) {
                const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + q * 64));
                const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + q * 64 + 32));
                for (int r = 0; r < kRows; ++r) {
                    int32_t four;
                    memcpy(&four, a + r * lda + 4 * q, 4);
                    const __m256i x = _mm256_set1_epi32(four);
                    part[r][0] = _mm256_add_epi16(part[r][0], _mm256_maddubs_epi16(x, w0));
                    part[r][1] = _mm256_add_epi16(part[r][1], _mm256_maddubs_epi16(x, w1));
                }
            }
            for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < 2; ++v)
                    put(c + r * kBlock + 8 * v, _mm256_madd_epi16(part[r][v], ones), start == 0);
        }
    }
}

template <int kRows>
void product(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int64_t safe, int32_t* c) {
    if (safe) narrow<kRows>(a, lda, b, panel, quads, safe, c);
    else exact<kRows>(a, lda, b, panel, quads, c);
}

void tile(const Linear& p, const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int64_t rows,
          int32_t* c) {
    // maddubs adds two products of an unsigned and a signed byte.
    const int64_t safe = 32767 / (2 * p.activation_qmax * (p.symmetric ? 2 : 1) * p.weight_bound);
    for (; rows >= 4; rows -= 4, a += 4 * lda, c += 4 * kBlock) product<4>(a, lda, b, panel, quads, safe, c);
    for (; rows > 0; --rows, a += lda, c += kBlock) product<1>(a, lda, b, panel, quads, safe, c);
}

#include "body.inl"
#include "loops.inl"

}  // namespace
}  // namespace avx2

BackendInfo avx2_backend() { return {avx2::run, QV_ROWS, 512 << 10, avx2::exercise}; }

}  // namespace qv

QV_TARGET_END
#endif
