// AVX2 backend. Byte products by maddubs only where two of them can't leave int16 (up to 32767); else 16-bit products.
#include "qv.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"

QV_TARGET_BEGIN("avx2,fma,f16c")

namespace qv {
namespace avx2 {
namespace {

#define QV_ROWS 3
#define QV_WIDTH 8
#define QV_UNSIGNED 1

template <int kRows>
void exact(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int32_t* c) {
    // 16-bit: for each quad the products of columns (0,1) and (2,3) are summed by pmaddwd, then the pairs are added.
    for (int64_t half = 0; half < 4; ++half) {
        const int8_t* line = b + (half >> 1) * panel + (half & 1) * 32;
        __m256i low[kRows], high[kRows];
        for (int r = 0; r < kRows; ++r) low[r] = high[r] = _mm256_setzero_si256();
        for (int64_t q = 0; q < quads; ++q) {
            const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(line + q * 64)));
            const __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(line + q * 64 + 16)));
            for (int r = 0; r < kRows; ++r) {
                int32_t four;
                memcpy(&four, a + r * lda + 4 * q, 4);
                const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
                low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(x, w0));
                high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(x, w1));
            }
        }
        for (int r = 0; r < kRows; ++r) {
            // hadd works in halves of 128 bits: outputs 0 1 4 5 | 2 3 6 7
            const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[r], high[r]), 0xd8);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * kBlock + half * 8), sums);
        }
    }
}

// At most `safe` quads are summed in 16 bits before they are widened.
template <int kRows>
void narrow(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int64_t safe, int32_t* c) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[kRows][4];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 4; ++v) sums[r][v] = _mm256_setzero_si256();
    for (int64_t start = 0; start < quads; start += safe) {
        const int64_t stop = start + safe < quads ? start + safe : quads;
        for (int64_t pair = 0; pair < 2; ++pair) {
            __m256i part[kRows][2];
            for (int r = 0; r < kRows; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
            const int8_t* line = b + pair * panel;
            for (int64_t q = start; q < stop; ++q) {
                const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + q * 64));
                const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + q * 64 + 32));
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
                    sums[r][2 * pair + v] = _mm256_add_epi32(sums[r][2 * pair + v], _mm256_madd_epi16(part[r][v], ones));
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 4; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * kBlock + 8 * v), sums[r][v]);
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
    if (rows == 3) product<3>(a, lda, b, panel, quads, safe, c);
    else if (rows == 2) product<2>(a, lda, b, panel, quads, safe, c);
    else product<1>(a, lda, b, panel, quads, safe, c);
}

#include "body.inl"
#include "loops.inl"

}  // namespace
}  // namespace avx2

BackendInfo avx2_backend() { return {avx2::run, QV_ROWS, 512 << 10, avx2::exercise}; }

}  // namespace qv

QV_TARGET_END
#endif
