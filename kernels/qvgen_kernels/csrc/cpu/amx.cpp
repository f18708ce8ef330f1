// AMX backend: 32 rows x 32 outputs in four tiles of sums, two tiles of inputs, two of weights.
//
// TDPBSSD multiplies 16 rows of 64 signed bytes with 16 columns of 64: 16 cycles, and a tile load takes 8 from the first-level
// cache but twice that from the second. So K is cut into chunks of at most 15 tiles: the weight's two panels of one chunk (30
// KiB) stay in the first level while all rows of the block pass by. The rows are loaded with TILELOADDT1, which does not
// displace them. Between chunks the sums wait in the second level. The sums of a finished tile are scaled and stored, some rows
// at a time, between the products of the next one: tiles and vectors have different ports.
#include "qv.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "amx_tiles.h"
#include "target.h"

#if !defined(QV_AMX_EMULATE)
QV_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")
#define QV_USE_AVX512
#elif defined(QV_AVX512_EMULATE)
QV_TARGET_BEGIN(QV_AVX512_TARGET)
#define QV_USE_AVX512
#endif

namespace qv {
namespace amx {
namespace {

#define QV_ROWS 32
#define QV_WIDTH 16
#define QV_UNSIGNED 0

#include "body.inl"

constexpr int64_t kDepth = 64;    // columns of one tile
constexpr int64_t kChunk = 15;    // tiles of K whose weights fit the first-level cache with what passes by
constexpr int64_t kTile = QV_ROWS * kBlock;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A tile whose sums wait to be scaled and stored. `row` rows of `rows` are done.
struct Pending {
    const int32_t* c = nullptr;
    int64_t slot = 0, n = 0, row = 0, rows = 0;
};

struct Item {
    const Linear& p;
    RowBlock rows;
    int64_t m0, panel;
    Pending pending;
};

inline void finish(Item& item, int64_t count) {
    Pending& w = item.pending;
    for (; count > 0 && w.row < w.rows; --count, ++w.row)
        finish_whole(item.p, item.rows, item.m0, w.slot + w.row, w.n, w.c + w.row * kBlock);
}

// Multiply `depth` tiles of K into c; `first` starts at zero, else the sums so far are in c. Meanwhile `share` rows of the pending
// tile are finished per step. `wide` is false where only 16 rows are wanted.
inline void multiply(Item& item, const uint8_t* a, const int8_t* b, int64_t depth, bool first, bool wide, int64_t share,
                     int32_t* c) {
    const int64_t lda = item.rows.lda, line = kBlock * 4;
    if (first) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    } else {
        TILE_LOAD(0, c, line);
        TILE_LOAD(1, c + kLanes, line);
        TILE_LOAD(2, c + kLanes * kBlock, line);
        TILE_LOAD(3, c + kLanes * kBlock + kLanes, line);
    }
    for (int64_t k = 0; k < depth; ++k) {
        TILE_STREAM(4, a + k * kDepth, lda);
        TILE_LOAD(6, b + k * kDepth * kLanes, 64);
        TILE_MULTIPLY(0, 4, 6);
        TILE_LOAD(7, b + item.panel + k * kDepth * kLanes, 64);
        TILE_MULTIPLY(1, 4, 7);
        if (wide) {
            TILE_STREAM(5, a + kLanes * lda + k * kDepth, lda);
            TILE_MULTIPLY(2, 5, 6);
            TILE_MULTIPLY(3, 5, 7);
        }
        finish(item, share);
    }
    TILE_STORE(0, c, line);
    TILE_STORE(1, c + kLanes, line);
    TILE_STORE(2, c + kLanes * kBlock, line);
    TILE_STORE(3, c + kLanes * kBlock + kLanes, line);
}

// One accumulation group: chunks of K outside, tiles of rows inside. `sums` holds every tile's sums of this run of outputs where
// there are several chunks; `two` are two tiles that take turns: one is filled while the other is finished.
void run_whole(Item& item, int64_t count, int64_t n, int32_t* sums, int32_t* two) {
    const Linear& p = item.p;
    const int64_t depth = p.padded_in / kDepth, chunks = (depth + kChunk - 1) / kChunk, size = (depth + chunks - 1) / chunks;
    const int8_t* b = p.weight + n / kLanes * item.panel;
    for (int64_t start = 0; start < depth; start += size) {
        const int64_t here = depth - start < size ? depth - start : size;
        const bool last = start + here == depth;
        for (int64_t slot = 0; slot < count; slot += QV_ROWS) {
            const int64_t rows = count - slot < QV_ROWS ? count - slot : QV_ROWS;
            if (last) for (int64_t r = 0; r < rows; ++r) prefetch_row(p, item.m0 + slot + r, n);
            int32_t* c = chunks > 1 ? sums + slot * kBlock : two + (slot / QV_ROWS & 1) * kTile;
            const int64_t share = (item.pending.rows - item.pending.row + here - 1) / here;
            multiply(item, item.rows.codes + slot * item.rows.lda + start * kDepth, b + start * kDepth * kLanes, here, start == 0,
                     rows > kLanes, share, c);
            if (last) {
                finish(item, QV_ROWS);
                item.pending = {c, slot, n, 0, rows};
            }
        }
    }
    // The next run of outputs overwrites the sums.
    finish(item, QV_ROWS);
}

// Several accumulation groups: one tile at a time, its scaled sums added up in y.
void run_groups(Item& item, int64_t count, int64_t n, int32_t* c, float* y) {
    const Linear& p = item.p;
    for (int64_t slot = 0; slot < count; slot += QV_ROWS) {
        const int64_t rows = count - slot < QV_ROWS ? count - slot : QV_ROWS;
        for (int64_t r = 0; r < rows; ++r) prefetch_row(p, item.m0 + slot + r, n);
        for (int64_t g = 0; g < p.groups; ++g) {
            const int64_t k = g * p.padded_group;
            multiply(item, item.rows.codes + slot * item.rows.lda + k, p.weight + n / kLanes * item.panel + k * kLanes,
                     p.padded_group / kDepth, true, rows > kLanes, 0, c);
            for (int64_t r = 0; r < rows; ++r)
                add_group(p, item.rows, item.m0, slot + r, n, g, c + r * kBlock, y + r * kBlock);
        }
        for (int64_t r = 0; r < rows; ++r) finish_row(p, item.m0 + slot + r, n, y + r * kBlock);
    }
}

void run(const Linear& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    const int64_t count = m1 - m0, padded = (count + QV_ROWS - 1) / QV_ROWS * QV_ROWS;
    Item item{p, quantize_rows(p, m0, m1), m0, p.padded_in * kLanes, {}};
    int32_t* two = static_cast<int32_t*>(scratch(kSlotTile, 2 * kTile * 4));
    int32_t* sums = static_cast<int32_t*>(scratch(kSlotSums, static_cast<size_t>(padded * kBlock) * 4));
    const TileConfig config;
    TILE_CONFIGURE(&config);
    for (int64_t n = n0; n < n1; n += kBlock) {
        if (p.groups == 1) run_whole(item, count, n, sums, two);
        else run_groups(item, count, n, two, reinterpret_cast<float*>(two + kTile));
    }
    TILE_RELEASE();
    end_stores();
}

int64_t exercise(int64_t times) {
    constexpr int64_t kColumns = 8 * kDepth;
    alignas(64) static uint8_t a[QV_ROWS * kColumns];
    alignas(64) static int8_t b[kBlock * kColumns];
    alignas(64) int32_t c[kTile];
    const Linear p{};
    RowBlock rows{};
    rows.lda = kColumns;
    Item item{p, rows, 0, kColumns * kLanes, {}};
    const TileConfig config;
    TILE_CONFIGURE(&config);
    for (int64_t t = 0; t < times; ++t) {
        multiply(item, a, b, kColumns / kDepth, true, true, 0, c);
        __asm__ volatile("" : : "r"(a), "r"(b), "r"(c) : "memory");  // or it would be done once
    }
    TILE_RELEASE();
    return times * 2 * kTile * kColumns;
}

}  // namespace
}  // namespace amx

BackendInfo amx_backend() { return {amx::run, QV_ROWS, 1 << 20, amx::exercise}; }

}  // namespace qv

#if defined(QV_USE_AVX512)
QV_TARGET_END
#endif
#endif
