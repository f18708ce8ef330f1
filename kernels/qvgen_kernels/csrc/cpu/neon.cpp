// NEON backend for 64-bit ARM with the dot product (ARMv8.2 and later): 4 rows x 16 outputs in 16 registers of sums.
#include "qv.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "target.h"

QV_TARGET_BEGIN(QV_NEON_TARGET)

namespace qv {
namespace neon {
namespace {

#define QV_ROWS 4
#define QV_WIDTH 4
#define QV_UNSIGNED 0

#include "neon_dot.inl"

template <int kRows>
inline void step(int32x4_t (&sums)[kRows][4], const int8x16_t (&w)[4], const int8_t* const (&x)[kRows], int64_t q) {
    for (int r = 0; r < kRows; ++r) {
        int32_t four;
        memcpy(&four, x[r] + 4 * q, 4);
        const int8x16_t quad = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int v = 0; v < 4; ++v) sums[r][v] = dot(sums[r][v], w[v], quad);
    }
}

template <int kRows>
void product(const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int32_t* c) {
    const int8_t* x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = reinterpret_cast<const int8_t*>(a + r * lda);
    for (int64_t half = 0; half < 2; ++half) {
        int32x4_t sums[kRows][4];
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < 4; ++v) sums[r][v] = vdupq_n_s32(0);
        const int8_t* line = b + half * panel;
        for (int64_t q = 0; q < quads; ++q, line += 64) {
            const int8x16_t w[4] = {vld1q_s8(line), vld1q_s8(line + 16), vld1q_s8(line + 32), vld1q_s8(line + 48)};
            step<kRows>(sums, w, x, q);
        }
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < 4; ++v) vst1q_s32(c + r * kBlock + half * kLanes + 4 * v, sums[r][v]);
    }
}

void tile(const Linear&, const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int64_t rows,
          int32_t* c) {
    if (rows == 4) product<4>(a, lda, b, panel, quads, c);
    else if (rows == 3) product<3>(a, lda, b, panel, quads, c);
    else if (rows == 2) product<2>(a, lda, b, panel, quads, c);
    else product<1>(a, lda, b, panel, quads, c);
}

#include "body.inl"
#include "loops.inl"

}  // namespace
}  // namespace neon

BackendInfo neon_backend() { return {neon::run, QV_ROWS, 512 << 10, neon::exercise}; }

}  // namespace qv

QV_TARGET_END
#endif
