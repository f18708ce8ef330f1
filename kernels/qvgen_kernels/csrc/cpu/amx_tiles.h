// The five tile operations that the AMX backend uses, and the same in plain C++ (-DQV_AMX_EMULATE) for tests on CPUs without
// them: TDPBSSD as the Intel manual defines it, with tiles of 16 rows of 64 bytes.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(QV_AMX_EMULATE)

namespace qv {
namespace amx {
namespace {

thread_local uint8_t tiles[8][16][64];
thread_local bool configured = false;

inline void tile_load(int t, const void* memory, int64_t stride) {
    for (int r = 0; r < 16; ++r) memcpy(tiles[t][r], static_cast<const uint8_t*>(memory) + r * stride, configured ? 64 : 0);
}
inline void tile_store(int t, void* memory, int64_t stride) {
    for (int r = 0; r < 16; ++r) memcpy(static_cast<uint8_t*>(memory) + r * stride, tiles[t][r], configured ? 64 : 0);
}
inline void tile_multiply(int c, int a, int b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            uint32_t sum;
            memcpy(&sum, &tiles[c][m][4 * n], 4);
            for (int q = 0; q < 16; ++q)
                for (int i = 0; i < 4; ++i)
                    sum += static_cast<uint32_t>(static_cast<int8_t>(tiles[a][m][4 * q + i]) *
                                                 static_cast<int8_t>(tiles[b][q][4 * n + i]));
            memcpy(&tiles[c][m][4 * n], &sum, 4);
        }
}

}  // namespace
}  // namespace amx
}  // namespace qv

#define TILE_CONFIGURE(memory) (void)(memory), configured = true
#define TILE_RELEASE() configured = false
#define TILE_ZERO(t) memset(tiles[t], 0, sizeof(tiles[t]))
#define TILE_LOAD(t, memory, stride) tile_load(t, memory, stride)
#define TILE_STREAM(t, memory, stride) tile_load(t, memory, stride)
#define TILE_STORE(t, memory, stride) tile_store(t, memory, stride)
#define TILE_MULTIPLY(c, a, b) tile_multiply(c, a, b)

#else

#define TILE_CONFIGURE(memory) _tile_loadconfig(memory)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, memory, stride) _tile_loadd(t, memory, stride)
#define TILE_STREAM(t, memory, stride) _tile_stream_loadd(t, memory, stride)
#define TILE_STORE(t, memory, stride) _tile_stored(t, memory, stride)
#define TILE_MULTIPLY(c, a, b) _tile_dpbssd(c, a, b)

#endif
