// AVX-VNNI: AVX2 with the four-byte dot product; exact for all codes. Part of kernel=avx2.
#include "qv.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"

QV_TARGET_BEGIN("avx2,fma,f16c,avxvnni")

namespace qv {
namespace avxvnni {
namespace {

#define QV_USE_AVX2
#define QV_ROWS 3
#define QV_WIDTH 8
#define QV_UNSIGNED 1

template <int kRows>
void product(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int32_t* c) {
    __m256i sums[kRows][4];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 4; ++v) sums[r][v] = _mm256_setzero_si256();
    for (int64_t q = 0; q < quads; ++q) {
        __m256i w[4];
        for (int v = 0; v < 4; ++v)
            w[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + (v >> 1) * panel + q * 64 + (v & 1) * 32));
        for (int r = 0; r < kRows; ++r) {
            int32_t four;
            memcpy(&four, a + r * lda + 4 * q, 4);
            const __m256i x = _mm256_set1_epi32(four);
            for (int v = 0; v < 4; ++v) sums[r][v] = _mm256_dpbusd_avx_epi32(sums[r][v], x, w[v]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 4; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * kBlock + 8 * v), sums[r][v]);
}

void tile(const Linear&, const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int64_t rows,
          int32_t* c) {
    if (rows == 3) product<3>(a, lda, b, panel, quads, c);
    else if (rows == 2) product<2>(a, lda, b, panel, quads, c);
    else product<1>(a, lda, b, panel, quads, c);
}

#include "body.inl"
#include "loops.inl"

}  // namespace
}  // namespace avxvnni

BackendInfo avxvnni_backend() { return {avxvnni::run, QV_ROWS, 512 << 10, avxvnni::exercise}; }

}  // namespace qv

QV_TARGET_END
#endif
