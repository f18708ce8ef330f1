// The tile operations that the AMX backends use, and the same in plain C++ (-DQV_AMX_EMULATE) for tests on CPUs without them:
// TDPBSSD and TDPBUSD as the Intel manual defines them, with tiles of at most 16 rows of 64 bytes.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(QV_AMX_EMULATE)

namespace qv {
namespace amx {
namespace {

thread_local uint8_t tiles[8][16][64];
thread_local int tile_rows[8], tile_bytes[8];  // 0: not configured

inline void tile_configure(const void* memory) {
    const uint8_t* config = static_cast<const uint8_t*>(memory);
    for (int t = 0; t < 8; ++t) {
        uint16_t bytes = 0;
        if (config) memcpy(&bytes, config + 16 + 2 * t, 2);
        tile_bytes[t] = bytes;
        tile_rows[t] = config ? config[48 + t] : 0;
    }
    memset(tiles, 0, sizeof tiles);
}
inline void tile_load(int t, const void* memory, int64_t stride) {
    memset(tiles[t], 0, sizeof tiles[t]);
    for (int r = 0; r < tile_rows[t]; ++r)
        memcpy(tiles[t][r], static_cast<const uint8_t*>(memory) + r * stride, static_cast<size_t>(tile_bytes[t]));
}
inline void tile_store(int t, void* memory, int64_t stride) {
    for (int r = 0; r < tile_rows[t]; ++r)
        memcpy(static_cast<uint8_t*>(memory) + r * stride, tiles[t][r], static_cast<size_t>(tile_bytes[t]));
}
inline void tile_multiply(int c, int a, int b, bool is_signed) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            uint32_t sum;
            memcpy(&sum, &tiles[c][m][4 * n], 4);
            for (int q = 0; q < 16; ++q)
                for (int i = 0; i < 4; ++i) {
                    const uint8_t byte = tiles[a][m][4 * q + i];
                    sum += static_cast<uint32_t>((is_signed ? static_cast<int8_t>(byte) : static_cast<int>(byte)) *
                                                 static_cast<int8_t>(tiles[b][q][4 * n + i]));
                }
            memcpy(&tiles[c][m][4 * n], &sum, 4);
        }
}

}  // namespace
}  // namespace amx
}  // namespace qv

#define TILE_CONFIGURE(memory) tile_configure(memory)
#define TILE_RELEASE() tile_configure(nullptr)
#define TILE_ZERO(t) memset(tiles[t], 0, sizeof(tiles[t]))
#define TILE_LOAD(t, memory, stride) tile_load(t, memory, stride)
#define TILE_STREAM(t, memory, stride) tile_load(t, memory, stride)
#define TILE_STORE(t, memory, stride) tile_store(t, memory, stride)
#define TILE_MULTIPLY(c, a, b) tile_multiply(c, a, b, true)
#define TILE_MULTIPLY_UNSIGNED(c, a, b) tile_multiply(c, a, b, false)

#else

#define TILE_CONFIGURE(memory) _tile_loadconfig(memory)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, memory, stride) _tile_loadd(t, memory, stride)
#define TILE_STREAM(t, memory, stride) _tile_stream_loadd(t, memory, stride)
#define TILE_STORE(t, memory, stride) _tile_stored(t, memory, stride)
#define TILE_MULTIPLY(c, a, b) _tile_dpbssd(c, a, b)
#define TILE_MULTIPLY_UNSIGNED(c, a, b) _tile_dpbusd(c, a, b)

#endif
