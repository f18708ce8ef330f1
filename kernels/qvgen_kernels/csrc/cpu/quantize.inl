// Step 2 of the contract: ranges and codes of a row.

static void range(const float* row, int64_t columns, int32_t* min_key, int32_t* max_key) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t k = 0; k < columns; ++k) {
        int32_t bits;
        memcpy(&bits, row + k, 4);
        const int32_t key = ordered(bits);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    *min_key = low;
    *max_key = high;
}

#if !defined(QV_USE_AVX512)
template <bool kDivide>
static void encode_plain(const float* row, int64_t columns, const Params& r, uint8_t* out) {
    const float factor = kDivide ? r.divisor : r.inverse, low = r.low, high = r.high;
    const int32_t offset = r.offset;
    for (int64_t k = 0; k < columns; ++k) {
        float v = kDivide ? row[k] / factor : row[k] * factor;
        v = v > low ? v : low;  // this order turns a NaN into a number
        v = v < high ? v : high;
        out[k] = static_cast<uint8_t>(static_cast<int32_t>(rne(v)) + offset);
    }
}
#endif

static void encode(const float* row, int64_t columns, const Params& r, uint8_t* out) {
#if defined(QV_USE_AVX512)
    if (r.divisor != 0.0f) encode_run<true, true>(row, columns, r, out);
    else encode_run<true, false>(row, columns, r, out);
#else
    if (r.divisor != 0.0f) encode_plain<true>(row, columns, r, out);
    else encode_plain<false>(row, columns, r, out);
#endif
}

// Row m where it can be quantized as it lies in memory, bfloat16 without rotation or scaling; null: it goes through float32.
static const uint16_t* direct_row(const Linear& p, int64_t m) {
#if defined(QV_USE_AVX512)
    const bool plain = p.dtype == kBfloat16 && p.x_column_stride == 1 && !p.rotation && !p.input_scale;
    return plain ? static_cast<const uint16_t*>(p.x) + m * p.x_row_stride : nullptr;
#else
    (void)p, (void)m;
    return nullptr;
#endif
}

static void range_direct(const Linear& p, const uint16_t* x, int64_t columns, int32_t* low, int32_t* high) {
#if defined(QV_USE_AVX512)
    range_bfloat16(x, columns, 2 * p.x_row_stride, low, high);
#else
    (void)p, (void)x, (void)columns, (void)low, (void)high;
#endif
}

static void encode_direct(const uint16_t* x, int64_t columns, const Params& r, uint8_t* out) {
#if defined(QV_USE_AVX512)
    if (r.divisor != 0.0f) encode_run<false, true>(x, columns, r, out);
    else encode_run<false, false>(x, columns, r, out);
#else
    (void)x, (void)columns, (void)r, (void)out;
#endif
}

static int32_t sum_codes(const uint8_t* codes, int64_t columns) {
    int32_t sum = 0;
    for (int64_t k = 0; k < columns; ++k)
        sum += QV_UNSIGNED ? static_cast<int32_t>(codes[k]) : static_cast<int32_t>(static_cast<int8_t>(codes[k]));
    return sum;
}

// Quantize row m into place `slot` of the block. Bytes between groups (padding) become 0; the weight is 0 there too.
static void quantize_row(const Linear& p, int64_t m, int64_t slot, const RowBlock& out, float* row, float* work) {
    uint8_t* codes = out.codes + slot * out.lda;
    const int64_t Ga = p.activation_groups, G = p.groups;
    const bool sums = p.weight_zero || p.weight_shift;
    bool finite = true;
    const uint16_t* direct = direct_row(p, m);
    if (!direct) {
        load_row(p, m, row);
        if (p.rotation) rotate(p, row, work);
    }
    Params r{};
    for (int64_t g = 0; g < G; ++g) {
        if (g < Ga) {
            int32_t low, high;
            const int64_t columns = Ga == 1 ? p.in_features : p.group;
            if (direct) range_direct(p, direct + g * p.group, columns, &low, &high);
            else range(row + g * p.group, columns, &low, &high);
            r = p.row_scale ? given(p, m, low, high) : choose(p, m, low, high);
            finite = finite && r.scale == r.scale;
            out.scale[slot * Ga + g] = r.scale;
            out.offset[slot * Ga + g] = r.offset;
        }
        uint8_t* place = codes + g * p.padded_group;
        if (direct) encode_direct(direct + g * p.group, p.group, r, place);
        else encode(row + g * p.group, p.group, r, place);
        for (int64_t k = p.group; k < p.padded_group; ++k) place[k] = 0;
        if (sums) out.row_sum[slot * G + g] = sum_codes(place, p.group) - r.offset * static_cast<int32_t>(p.group);
        if (p.operands)
            for (int64_t k = 0; k < p.group; ++k) {
                const int32_t byte = QV_UNSIGNED ? static_cast<int32_t>(place[k]) : static_cast<int8_t>(place[k]);
                p.operands[m * p.in_features + g * p.group + k] = static_cast<int16_t>(byte - r.offset);
            }
    }
    if (!finite) for (int64_t g = 0; g < Ga; ++g) out.scale[slot * Ga + g] = bits_float(0x7fc00000);
    if (p.scales) memcpy(p.scales + m * Ga, out.scale + slot * Ga, Ga * sizeof(float));
}

static RowBlock quantize_rows(const Linear& p, int64_t m0, int64_t m1) {
    const int64_t rows = (m1 - m0 + QV_ROWS - 1) / QV_ROWS * QV_ROWS;
    RowBlock block;
    block.lda = (p.padded_in + 63) / 64 * 64;
    if (block.lda % 1024 == 0) block.lda += 64;  // rows a power of two apart would share cache sets
    block.codes = static_cast<uint8_t*>(scratch(kSlotCodes, rows * block.lda + 64));
    const int64_t scales = rows * p.activation_groups;
    block.scale = static_cast<float*>(scratch(kSlotVectors, (2 * scales + rows * p.groups) * 4));
    block.offset = reinterpret_cast<int32_t*>(block.scale + scales);
    block.row_sum = block.offset + scales;
    float* row = static_cast<float*>(scratch(kSlotRow, (p.in_features + 64 + (32 + p.paley) * kLanes) * sizeof(float)));
    float* work = row + (p.in_features + 63) / 16 * 16;
    for (int64_t m = m0; m < m1; ++m) quantize_row(p, m, m - m0, block, row, work);
    return block;
}
