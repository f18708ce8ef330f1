// The order of blocks of every backend that computes a tile's sums in one go (all but AMX).
//
// The rows [m0, m1) of one item are quantized once and stay in the second-level cache. For every 32 outputs the weight's
// two panels are streamed against all of those rows; a tile's sums go through 4 KiB that never leave the first level.

static void run(const Linear& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    const RowBlock rows = quantize_rows(p, m0, m1);
    int32_t* c = static_cast<int32_t*>(scratch(kSlotTile, QV_ROWS * kBlock * 8));
    float* y = reinterpret_cast<float*>(c + QV_ROWS * kBlock);
    const int64_t panel = p.padded_in * kLanes, count = m1 - m0;
    for (int64_t n = n0; n < n1; n += kBlock) {
        const int8_t* b = p.weight + n / kLanes * panel;
        for (int64_t slot = 0; slot < count; slot += QV_ROWS) {
            const int64_t here = count - slot < QV_ROWS ? count - slot : QV_ROWS;
            for (int64_t r = 0; r < here; ++r) prefetch_row(p, m0 + slot + r, n);
            if (p.groups == 1) {
                tile(p, rows.codes + slot * rows.lda, rows.lda, b, panel, p.padded_in / 4, here, c);
                for (int64_t r = 0; r < here; ++r) finish_whole(p, rows, m0, slot + r, n, c + r * kBlock);
                continue;
            }
#if defined(QV_GROUPED_ROWS)
            if (!p.accumulators) {
                grouped_rows(p, rows, slot, here, n, y);
                for (int64_t r = 0; r < here; ++r) finish_row(p, m0 + slot + r, n, y + r * kBlock);
                continue;
            }
#endif
            for (int64_t g = 0; g < p.groups; ++g) {
                const int64_t k = g * p.padded_group;
                tile(p, rows.codes + slot * rows.lda + k, rows.lda, b + k * kLanes, panel, p.padded_group / 4, here, c);
                for (int64_t r = 0; r < here; ++r) add_group(p, rows, m0, slot + r, n, g, c + r * kBlock, y + r * kBlock);
            }
            for (int64_t r = 0; r < here; ++r) finish_row(p, m0 + slot + r, n, y + r * kBlock);
        }
    }
    end_stores();
}

static int64_t exercise(int64_t times) {
    constexpr int64_t kQuads = 120;
    alignas(64) static uint8_t a[QV_ROWS * 4 * kQuads];
    alignas(64) static int8_t b[kBlock * 4 * kQuads];
    alignas(64) int32_t c[QV_ROWS * kBlock];
    Linear p{};
    p.activation_qmax = p.weight_bound = 15;
    int64_t quads = kQuads, rows = QV_ROWS;
    __asm__ volatile("" : "+r"(quads), "+r"(rows));  // compile the tile as the layers have it, not for these sizes
    for (int64_t t = 0; t < times; ++t) {
        tile(p, a, 4 * quads, b, quads * 4 * kLanes, quads, rows, c);
        __asm__ volatile("" : : "r"(a), "r"(b), "r"(c) : "memory");  // or it would be done once
    }
    return times * 2 * QV_ROWS * kBlock * 4 * kQuads;
}
