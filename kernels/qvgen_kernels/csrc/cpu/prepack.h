// Prepacking: canonical planes of one layer, or of several layers of one input side by side, to the packed weight (qv.h).
#pragma once
#include "qv.h"

namespace qv {

// The rows of one layer, as a checkpoint holds them (kernels/README.md, "Bytes").
struct Planes {
    const uint8_t* low;   // [rows, low_bytes]
    const uint8_t* high;  // [rows, high_bytes]: the second plane of 3 bits; null: there is none
    const uint8_t* zero;  // [rows, zero_groups]: what is subtracted from the codes of a row and group; null: `base` from all
    int64_t rows;
};

// One prepacking. Mirrored field by field in cpu_prepack.py.
struct Prepack {
    int64_t in_features, padded_out;      // K; N' of all sources together
    int64_t group, groups, padded_group;  // as in Linear
    int64_t zero_groups;                  // 1 or G
    int64_t low_bytes, high_bytes;        // of a row of planes
    int64_t sources;
    const Planes* source;                 // [sources], one below the other
    int8_t* packed;                       // [N'/16][K'/4][16][4], every byte is written; padding becomes 0
    int32_t* column_sum;                  // [G, N']: sums of the packed values of a group
    int32_t bits, base, backend, threads;
};

// Sixteen outputs of one panel. Rows from `count` on do not exist.
struct PanelRows {
    const uint8_t* low[kLanes];
    const uint8_t* high[kLanes];
    uint8_t zero[kLanes];  // of the group at hand
    int64_t count;
};

constexpr int64_t kChunk = 64;  // columns unpacked at a time

// `chunks` chunks of all 16 rows from column k on, k a multiple of 8: lines to `out`, sums of the values added to sums[16].
using ChunkFunction = void (*)(const PanelRows& rows, int64_t k, int64_t chunks, int8_t* out, int32_t* sums);

ChunkFunction chunk_avx2(int32_t bits);
ChunkFunction chunk_avx512(int32_t bits);

}  // namespace qv
