// Portable backend: plain C++ that any compiler vectorizes as well as it can.
#include "qv.h"

namespace qv {
namespace portable {
namespace {

#define QV_ROWS 4
#define QV_WIDTH 4
#define QV_UNSIGNED 0

void tile(const Linear&, const uint8_t* a, int64_t lda, const int8_t* b, int64_t panel, int64_t quads, int64_t rows,
          int32_t* c) {
    for (int64_t r = 0; r < rows; ++r) {
        const int8_t* codes = reinterpret_cast<const int8_t*>(a + r * lda);
        for (int64_t half = 0; half < 2; ++half) {
            int32_t sums[kLanes] = {0};
            for (int64_t q = 0; q < quads; ++q) {
                const int8_t* line = b + half * panel + q * 64;
                const int16_t a0 = codes[4 * q], a1 = codes[4 * q + 1], a2 = codes[4 * q + 2], a3 = codes[4 * q + 3];
                for (int64_t l = 0; l < kLanes; ++l)
                    sums[l] += a0 * line[4 * l] + a1 * line[4 * l + 1] + a2 * line[4 * l + 2] + a3 * line[4 * l + 3];
            }
            memcpy(c + r * kBlock + half * kLanes, sums, sizeof(sums));
        }
    }
}

#include "body.inl"
#include "loops.inl"

}  // namespace
}  // namespace portable

BackendInfo portable_backend() { return {portable::run, QV_ROWS, 512 << 10, portable::exercise}; }

}  // namespace qv
