// Portable backend: plain C++ in the form that compilers vectorize for any processor.
//
// Sums over products of 16-bit numbers along memory are what they know (pmaddwd in plain x86-64, widening multiply-adds
// elsewhere). So 256 columns at a time are widened to 16 bits, 32 rows of codes and 32 outputs of weights that then lie along
// their columns, 16 KiB each; widening costs 1/32 of the products.
#include "qv.h"

namespace qv {
namespace portable {
namespace {

#define QV_ROWS 32
#define QV_WIDTH 4
#define QV_UNSIGNED 0

constexpr int64_t kDepth = 256;

// 2 rows x 4 outputs: sums[r][n] += a[r] . b[n], over a multiple of 16 columns.
inline void products(const int16_t (*a)[kDepth], const int16_t (*b)[kDepth], int64_t columns, int32_t* c) {
    const int16_t *a0 = a[0], *a1 = a[1], *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
    int32_t s00 = 0, s01 = 0, s02 = 0, s03 = 0, s10 = 0, s11 = 0, s12 = 0, s13 = 0;
    for (int64_t k = 0; k < columns; ++k) {
        s00 += a0[k] * b0[k];
        s01 += a0[k] * b1[k];
        s02 += a0[k] * b2[k];
        s03 += a0[k] * b3[k];
        s10 += a1[k] * b0[k];
        s11 += a1[k] * b1[k];
        s12 += a1[k] * b2[k];
        s13 += a1[k] * b3[k];
    }
    c[0] += s00, c[1] += s01, c[2] += s02, c[3] += s03;
    c += kBlock;
    c[0] += s10, c[1] += s11, c[2] += s12, c[3] += s13;
}

void tile(const Linear&, const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int64_t rows,
          int32_t* c) {
    alignas(64) int16_t x[QV_ROWS][kDepth], w[kBlock][kDepth];
    alignas(64) int32_t sums[QV_ROWS * kBlock] = {};
    if (rows % 2) memset(x[rows], 0, sizeof(x[rows]));
    for (int64_t start = 0; start < quads; start += kDepth / 4) {
        const int64_t here = quads - start < kDepth / 4 ? quads - start : kDepth / 4, padded = (here + 3) / 4 * 16;
        for (int64_t r = 0; r < rows; ++r) {
            const int8_t* codes = reinterpret_cast<const int8_t*>(a + r * lda + 4 * start);
            for (int64_t k = 0; k < 4 * here; ++k) x[r][k] = codes[k];
            for (int64_t k = 4 * here; k < padded; ++k) x[r][k] = 0;
        }
        for (int64_t n = 0; n < kBlock; ++n) {
            const int8_t* line = b + n / kLanes * panel + start * 64 + n % kLanes * 4;
            for (int64_t q = 0; q < here; ++q)
                for (int64_t i = 0; i < 4; ++i) w[n][4 * q + i] = line[q * 64 + i];
            for (int64_t k = 4 * here; k < padded; ++k) w[n][k] = 0;
        }
        for (int64_t r = 0; r < rows; r += 2)
            for (int64_t n = 0; n < kBlock; n += 4) products(x + r, w + n, padded, sums + r * kBlock + n);
    }
    memcpy(c, sums, rows * kBlock * sizeof(int32_t));
}

#include "body.inl"
#include "loops.inl"

}  // namespace
}  // namespace portable

BackendInfo portable_backend() { return {portable::run, QV_ROWS, 512 << 10, portable::exercise}; }

}  // namespace qv
