// Integer products of the attention by AMX: 16 queries and 64 keys in four tiles of sums.
//
// The codes of 16 queries are one tile for each 64 elements of a head, and so are their probabilities for 64 keys. Where 64 does not
// divide the head's size, the rest has narrower tiles of its own (6 and 7). Rows of a tile that hold no query are computed and
// left alone.

typedef uint8_t Code;
constexpr int64_t kPack = 4;
constexpr int32_t kKeyShift = 0;  // what is added to the codes of keys: both sides may be signed
constexpr int64_t kGroup = 16;    // queries whose products are computed together

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static void begin_products(const Attention& p) {
    TileConfig config;
    if (const int64_t rest = p.head_size % 64) {
        config.bytes_per_row[6] = static_cast<uint16_t>(rest);
        config.rows[7] = static_cast<uint8_t>(rest / kPack);
    }
    TILE_CONFIGURE(&config);
}

static void end_products() { TILE_RELEASE(); }

#define QV_TILES(a, b)                  \
    TILE_LOAD(a, q + u * kPack, ldq);   \
    TILE_LOAD(b, line, kKeys * kPack);  \
    TILE_MULTIPLY(0, a, b);             \
    TILE_LOAD(b, line + 64, kKeys * kPack);  \
    TILE_MULTIPLY(1, a, b);             \
    TILE_LOAD(b, line + 128, kKeys * kPack); \
    TILE_MULTIPLY(2, a, b);             \
    TILE_LOAD(b, line + 192, kKeys * kPack); \
    TILE_MULTIPLY(3, a, b);

static void scores(const Code* q, int64_t ldq, const Code* keys, int64_t units, const int32_t*, int64_t, int32_t* out) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    int64_t u = 0;
    for (; u + 16 <= units; u += 16) {
        const Code* line = keys + u * kKeys * kPack;
        QV_TILES(4, 5)
    }
    if (u < units) {
        const Code* line = keys + u * kKeys * kPack;
        QV_TILES(6, 7)
    }
    TILE_STORE(0, out, kKeys * 4);
    TILE_STORE(1, out + 16, kKeys * 4);
    TILE_STORE(2, out + 32, kKeys * 4);
    TILE_STORE(3, out + 48, kKeys * 4);
}

static void sums_of_values(const Code* codes, const Code* values, int64_t columns, int64_t, int32_t* out) {
    TILE_LOAD(4, codes, kKeys);
    int64_t c = 0;
    for (; c + 32 <= columns; c += 32) {  // two at a time, so that one's store waits for no product of its own
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_LOAD(5, values + c * kPack, columns * kPack);
        TILE_MULTIPLY_UNSIGNED(0, 4, 5);
        TILE_LOAD(5, values + (c + 16) * kPack, columns * kPack);
        TILE_MULTIPLY_UNSIGNED(1, 4, 5);
        TILE_STORE(0, out + c, columns * 4);
        TILE_STORE(1, out + c + 16, columns * 4);
    }
    for (; c < columns; c += 16) {
        TILE_ZERO(0);
        TILE_LOAD(5, values + c * kPack, columns * kPack);
        TILE_MULTIPLY_UNSIGNED(0, 4, 5);
        TILE_STORE(0, out + c, columns * 4);
    }
}
