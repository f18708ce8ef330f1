// AVX-512 VNNI backend: 12 rows x 32 outputs in 24 registers of sums, two of weights, one of inputs.
//
// vpdpbusd adds four products of an unsigned and a signed byte to int32 without saturation. For each quad of columns two lines
// of weights are loaded and 12 quads of inputs broadcast: 14 loads for 24 products, fewer than the load ports give.
#include "qv.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"

QV_TARGET_BEGIN(QV_AVX512_TARGET)

namespace qv {
namespace vnni {
namespace {

#define QV_USE_AVX512
#define QV_ROWS 12
#define QV_WIDTH 16
#define QV_UNSIGNED 1

// sums[r][h] = products of row r with the 16 outputs of panel h, over 4 * quads columns.
template <int kRows>
inline __attribute__((always_inline)) void accumulate(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads,
                                                      __m512i (&sums)[kRows][2]) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; ++q) {
        const __m512i w0 = _mm512_loadu_si512(b + q * 64), w1 = _mm512_loadu_si512(b + panel + q * 64);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            int32_t four;
            memcpy(&four, a + r * lda + 4 * q, 4);
            const __m512i x = _mm512_set1_epi32(four);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], x, w0);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], x, w1);
        }
    }
}

template <int kRows>
void product(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int32_t* c) {
    __m512i sums[kRows][2];
    accumulate(a, lda, b, panel, quads, sums);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_si512(c + r * kBlock, sums[r][0]);
        _mm512_storeu_si512(c + r * kBlock + kLanes, sums[r][1]);
    }
}

void tile(const Linear&, const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int64_t rows,
          int32_t* c) {
    for (; rows >= 12; rows -= 12, a += 12 * lda, c += 12 * kBlock) product<12>(a, lda, b, panel, quads, c);
    for (; rows >= 4; rows -= 4, a += 4 * lda, c += 4 * kBlock) product<4>(a, lda, b, panel, quads, c);
    for (; rows > 0; --rows, a += lda, c += kBlock) product<1>(a, lda, b, panel, quads, c);
}

#include "body.inl"

// Several accumulation groups: kRows x 32 outputs whose scaled sums stay in registers from group to group; as add_group does it.
template <int kRows>
void grouped(const Linear& p, const RowBlock& rows, int64_t slot, int64_t n, float* y) {
    const int64_t Np = p.padded_out, lda = rows.lda, panel = p.padded_in * kLanes, quads = p.padded_group / 4;
    __m512 out[kRows][2];
    for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t gx = p.activation_groups == 1 ? 0 : g, gw = p.weight_groups == 1 ? 0 : g;
        const uint8_t* a = rows.codes + slot * lda + g * p.padded_group;
        const int8_t* b = p.weight + n / kLanes * panel + g * p.padded_group * kLanes;
        __m512i sums[kRows][2];
        accumulate(a, lda, b, panel, quads, sums);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const __m512i offset = _mm512_set1_epi32(rows.offset[(slot + r) * p.activation_groups + gx]);
            const __m512 scale = _mm512_set1_ps(rows.scale[(slot + r) * p.activation_groups + gx]);
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                const int64_t column = n + h * kLanes;
                __m512i acc = sums[r][h];
                acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(offset, _mm512_loadu_si512(p.column_sum + g * Np + column)));
                if (p.weight_shift) {
                    const __m512i total = _mm512_set1_epi32(rows.row_sum[(slot + r) * p.groups + g]);
                    acc = _mm512_add_epi32(
                        acc, _mm512_mullo_epi32(total, _mm512_loadu_si512(p.weight_shift + gw * Np + column)));
                }
                __m512 t = _mm512_cvtepi32_ps(acc);
                if (p.weight_zero) {
                    const __m512 total = _mm512_set1_ps(static_cast<float>(rows.row_sum[(slot + r) * p.groups + g]));
                    t = _mm512_sub_ps(t, _mm512_mul_ps(total, _mm512_loadu_ps(p.weight_zero + gw * Np + column)));
                }
                t = _mm512_mul_ps(_mm512_mul_ps(t, scale), _mm512_loadu_ps(p.weight_scale + gw * Np + column));
                out[r][h] = g == 0 ? t : _mm512_add_ps(out[r][h], t);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(y + r * kBlock, out[r][0]);
        _mm512_storeu_ps(y + r * kBlock + kLanes, out[r][1]);
    }
}

void grouped_rows(const Linear& p, const RowBlock& rows, int64_t slot, int64_t count, int64_t n, float* y) {
    for (; count >= 6; count -= 6, slot += 6, y += 6 * kBlock) grouped<6>(p, rows, slot, n, y);
    for (; count > 0; --count, ++slot, y += kBlock) grouped<1>(p, rows, slot, n, y);
}

#define QV_GROUPED_ROWS
#include "loops.inl"

}  // namespace
}  // namespace vnni

// The codes of an item may lie in the third-level cache: streaming a wide layer's weights less often is worth more (7680 columns:
// 5 % over codes that fill half of the second level).
BackendInfo vnni_backend() { return {vnni::run, QV_ROWS, 2 << 20, vnni::exercise}; }

}  // namespace qv

QV_TARGET_END
#endif
