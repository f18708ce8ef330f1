// Everything of a backend but the integer product; included once per backend, inside its namespace and target pragma.
//
// The including file defines before:
//   QV_ROWS                 rows of its tile
//   QV_UNSIGNED             1: activations are stored as unsigned bytes (maddubs, VNNI), 0: as signed bytes
//   tile(p, a, lda, b, panel, quads, rows, c)   c[rows][32] = int32 sums over 4 * quads columns; panel = bytes between the two
//                           panels (all but AMX)
// and may define QV_STORE_ROW, QV_CONVERT (own conversions).
//
// A stored byte is q - z + offset, offset per row and group: z itself for unsigned bytes (so the byte is q), 0 for signed
// bytes up to 7 bits (the zero point is subtracted in the operand), z - 128 for signed bytes of 8 bits. The sum of stored
// products is corrected by offset * column_sum in wrapping int32, which is exact whatever it passes through.

struct RowBlock {
    uint8_t* codes;    // [rows][lda]
    int64_t lda;
    float* scale;      // [rows][activation_groups]
    int32_t* offset;   // [rows][activation_groups]
    int32_t* row_sum;  // [rows][G]: sums of q - z
};

static inline float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

// Order-preserving map between float32 bits and int32, its own inverse. NaNs land beyond the infinities.
static inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Round to nearest even while |v| < 2^22.
static inline float rne(float v) { return (v + 12582912.0f) - 12582912.0f; }

static inline uint16_t to_bfloat16(float f) {
    uint32_t u = float_bits(f);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static inline uint16_t to_float16(float f) {
    uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    // Subnormal halves: adding 0.5 leaves the rounded mantissa in the low bits. Normal ones: round the mantissa by hand.
    uint32_t small = float_bits(bits_float(u) + 0.5f) - 0x3f000000;
    uint32_t normal = (u + 0xfff + ((u >> 13) & 1) - 0x38000000) >> 13;
    uint32_t value = u < 0x38800000 ? small : normal;
    value = u >= 0x477ff000 ? 0x7c00 : value;
    value = u > 0x7f800000 ? 0x7e00 : value;
    return static_cast<uint16_t>(sign | value);
}

static inline float from_float16(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    float normal = bits_float((rest << 13) + 0x38000000);
    float small = static_cast<float>(static_cast<int32_t>(rest)) * 5.9604644775390625e-8f;  // 2^-24, exact
    float special = bits_float(0x7f800000 | (rest & 0x3ff) << 13);
    float value = rest < 0x400 ? small : normal;
    value = rest >= 0x7c00 ? special : value;
    return bits_float(float_bits(value) | sign);
}

static void load_row(const Linear& p, int64_t m, float* row) {
    const int64_t K = p.in_features, step = p.x_column_stride;
    if (p.dtype == kFloat32) {
        const float* x = static_cast<const float*>(p.x) + m * p.x_row_stride;
        if (step == 1) memcpy(row, x, K * sizeof(float));
        else for (int64_t k = 0; k < K; ++k) row[k] = x[k * step];
    } else {
        const uint16_t* x = static_cast<const uint16_t*>(p.x) + m * p.x_row_stride;
        if (p.dtype == kBfloat16) {
            if (step == 1) for (int64_t k = 0; k < K; ++k) row[k] = bits_float(static_cast<uint32_t>(x[k]) << 16);
            else for (int64_t k = 0; k < K; ++k) row[k] = bits_float(static_cast<uint32_t>(x[k * step]) << 16);
        } else {
            if (step == 1) for (int64_t k = 0; k < K; ++k) row[k] = from_float16(x[k]);
            else for (int64_t k = 0; k < K; ++k) row[k] = from_float16(x[k * step]);
        }
    }
    if (p.input_scale) for (int64_t k = 0; k < K; ++k) row[k] *= p.input_scale[k];
}

// Elements i and i + stride of each 2 * stride become (a + b, a - b), strides 1 .. n / 2.
static void butterflies(float* row, int64_t columns, int64_t n) {
    for (int64_t stride = 1; stride < n; stride *= 2) {
        if (stride >= 8) {
            for (int64_t start = 0; start < columns; start += 2 * stride)
                for (int64_t i = start; i < start + stride; ++i) {
                    float a = row[i], b = row[i + stride];
                    row[i] = a + b;
                    row[i + stride] = a - b;
                }
        } else {
            for (int64_t start = 0; start < columns; start += 2 * stride)
                for (int64_t i = start; i < start + stride; ++i) {
                    float a = row[i], b = row[i + stride];
                    row[i] = a + b;
                    row[i + stride] = a - b;
                }
        }
    }
}

// y_i = sum_j H_b[i][j] x_j over the b runs of n columns of one block, four j at a time as the contract orders it. `work`
// holds 16 signed sums and the b results of `lanes` columns.
static void paley_block(const Linear& p, float* block, int64_t n, float* work, int64_t lanes) {
    const int64_t b = p.paley;
    float *terms = work, *result = work + 16 * lanes;
    for (int64_t column = 0; column < n; column += lanes) {
        for (int64_t j = 0; j < b; j += 4) {
            const float *x0 = block + j * n + column, *x1 = x0 + n, *x2 = x1 + n, *x3 = x2 + n;
            for (int64_t l = 0; l < lanes; ++l) {
                const float low[4] = {x0[l] + x1[l], x0[l] - x1[l], x1[l] - x0[l], -(x0[l] + x1[l])};
                const float high[4] = {x2[l] + x3[l], x2[l] - x3[l], x3[l] - x2[l], -(x2[l] + x3[l])};
                for (int s = 0; s < 16; ++s) terms[s * lanes + l] = low[s >> 2] + high[s & 3];
            }
            const uint8_t* pattern = p.paley_terms + j / 4 * b;
            for (int64_t i = 0; i < b; ++i) {
                const float* term = terms + pattern[i] * lanes;
                float* out = result + i * lanes;
                if (j == 0) for (int64_t l = 0; l < lanes; ++l) out[l] = term[l];
                else for (int64_t l = 0; l < lanes; ++l) out[l] += term[l];
            }
        }
        for (int64_t i = 0; i < b; ++i) memcpy(block + i * n + column, result + i * lanes, lanes * sizeof(float));
    }
}

static void rotate(const Linear& p, float* row, float* work) {
    const int64_t n = p.rotation / p.paley, lanes = n < kLanes ? n : kLanes;
    butterflies(row, p.in_features, n);
    if (p.paley > 1)
        for (int64_t start = 0; start < p.in_features; start += p.rotation) paley_block(p, row + start, n, work, lanes);
    for (int64_t k = 0; k < p.in_features; ++k) row[k] *= p.rotation_scale;
}

// Round an activation scale to the grid's precision; NaN and infinity give NaN.
static float round_scale(float s, int32_t dtype) {
    s = s < 1e-8f ? 1e-8f : s;
    const bool finite = (float_bits(s) & 0x7f800000) != 0x7f800000;
    if (!finite) return bits_float(0x7fc00000);
    if (dtype == kBfloat16) {
        float r = bits_float(static_cast<uint32_t>(to_bfloat16(s)) << 16);
        const float largest = bits_float(0x7f7f0000);
        r = r < 1e-8f ? 1e-8f : r;
        return r > largest ? largest : r;
    }
    if (dtype == kFloat16) {
        float r = from_float16(to_float16(s));
        r = r < 6.103515625e-05f ? 6.103515625e-05f : r;
        return r > 65504.0f ? 65504.0f : r;
    }
    return s;
}

// What one activation group's range gives: x * inverse is clamped to [low, high], rounded, and stored plus offset.
struct Params {
    float scale, inverse, low, high;
    int32_t offset;
};

static Params choose(const Linear& p, int64_t m, int32_t min_key, int32_t max_key) {
    float low = bits_float(static_cast<uint32_t>(ordered(min_key)));
    float high = bits_float(static_cast<uint32_t>(ordered(max_key)));
    const float qmax = static_cast<float>(p.activation_qmax);
    const bool finite = (float_bits(low) & 0x7f800000) != 0x7f800000 && (float_bits(high) & 0x7f800000) != 0x7f800000;
    const float clip_low = p.clip_low ? p.clip_low[m] : 1.0f, clip_high = p.clip_high ? p.clip_high[m] : 1.0f;
    Params r;
    if (p.symmetric) {
        const float span = (-low > high ? -low : high) * clip_high;
        r.scale = round_scale(span / qmax, p.scale_dtype);
        r.inverse = 1.0f / r.scale;
        r.low = -qmax;
        r.high = qmax;
        r.offset = QV_UNSIGNED ? p.activation_qmax : 0;
    } else {
        low = (low > 0.0f ? 0.0f : low) * clip_low;
        high = (high < 0.0f ? 0.0f : high) * clip_high;
        r.scale = round_scale((high - low) / qmax, p.scale_dtype);
        r.inverse = 1.0f / r.scale;
        float zero = -low * r.inverse;
        zero = zero < 0.0f ? 0.0f : zero;
        zero = zero > qmax ? qmax : zero;
        zero = rne(zero);
        r.low = -zero;
        r.high = qmax - zero;
        r.offset = static_cast<int32_t>(zero);
        if (!QV_UNSIGNED) r.offset = p.activation_bits == 8 ? r.offset - 128 : 0;
    }
    if (!finite || r.scale != r.scale) {
        r.scale = bits_float(0x7fc00000);
        r.inverse = r.low = r.high = 0.0f;
        r.offset = 0;
    }
    return r;
}

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

static void encode(const float* row, int64_t columns, const Params& r, uint8_t* out) {
    const float inverse = r.inverse, low = r.low, high = r.high;
    const int32_t offset = r.offset;
    for (int64_t k = 0; k < columns; ++k) {
        float v = row[k] * inverse;
        v = v > low ? v : low;  // this order turns a NaN into a number
        v = v < high ? v : high;
        out[k] = static_cast<uint8_t>(static_cast<int32_t>(rne(v)) + offset);
    }
}

static int32_t sum_codes(const uint8_t* codes, int64_t columns) {
    int32_t sum = 0;
    for (int64_t k = 0; k < columns; ++k)
        sum += QV_UNSIGNED ? static_cast<int32_t>(codes[k]) : static_cast<int32_t>(static_cast<int8_t>(codes[k]));
    return sum;
}

// Quantize row m into place `slot` of the block. Bytes between groups (padding) become 0; the weight is 0 there too.
static void quantize_row(const Linear& p, int64_t m, int64_t slot, const RowBlock& out, float* row, float* work) {
    load_row(p, m, row);
    if (p.rotation) rotate(p, row, work);
    uint8_t* codes = out.codes + slot * out.lda;
    const int64_t Ga = p.activation_groups, G = p.groups;
    const bool sums = p.weight_zero || p.weight_shift;
    bool finite = true;
    Params r{};
    for (int64_t g = 0; g < G; ++g) {
        if (g < Ga) {
            int32_t low, high;
            range(row + g * p.group, Ga == 1 ? p.in_features : p.group, &low, &high);
            r = choose(p, m, low, high);
            finite = finite && r.scale == r.scale;
            out.scale[slot * Ga + g] = r.scale;
            out.offset[slot * Ga + g] = r.offset;
        }
        uint8_t* place = codes + g * p.padded_group;
        encode(row + g * p.group, p.group, r, place);
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

// Add what one group contributes to a row of 32 outputs: the corrected sum, scaled.
static inline void add_group(const Linear& p, const RowBlock& rows, int64_t m0, int64_t slot, int64_t n, int64_t g,
                             const int32_t* c, float* y) {
    const int64_t Np = p.padded_out;
    const int64_t gx = p.activation_groups == 1 ? 0 : g, gw = p.weight_groups == 1 ? 0 : g;
    const uint32_t offset = static_cast<uint32_t>(rows.offset[slot * p.activation_groups + gx]);
    const float scale_x = rows.scale[slot * p.activation_groups + gx];
    const float* scale_w = p.weight_scale + gw * Np + n;
    int32_t acc[kBlock];
    for (int64_t l = 0; l < kBlock; ++l) acc[l] = c[l];
    if (offset) {
        const int32_t* sums = p.column_sum + g * Np + n;
        for (int64_t l = 0; l < kBlock; ++l)
            acc[l] = static_cast<int32_t>(static_cast<uint32_t>(acc[l]) - offset * static_cast<uint32_t>(sums[l]));
    }
    if (p.weight_shift) {
        const uint32_t total = static_cast<uint32_t>(rows.row_sum[slot * p.groups + g]);
        const int32_t* shift = p.weight_shift + gw * Np + n;
        for (int64_t l = 0; l < kBlock; ++l)
            acc[l] = static_cast<int32_t>(static_cast<uint32_t>(acc[l]) + total * static_cast<uint32_t>(shift[l]));
    }
    if (p.accumulators)
        for (int64_t l = 0; l < kBlock && n + l < p.out_features; ++l)
            p.accumulators[((m0 + slot) * p.out_features + n + l) * p.groups + g] = acc[l];
    float t[kBlock];
    for (int64_t l = 0; l < kBlock; ++l) t[l] = static_cast<float>(acc[l]);
    if (p.weight_zero) {
        const float total = static_cast<float>(rows.row_sum[slot * p.groups + g]);
        const float* zero = p.weight_zero + gw * Np + n;
        for (int64_t l = 0; l < kBlock; ++l) t[l] = t[l] - total * zero[l];
    }
    for (int64_t l = 0; l < kBlock; ++l) t[l] = (t[l] * scale_x) * scale_w[l];
    if (g == 0) for (int64_t l = 0; l < kBlock; ++l) y[l] = t[l];
    else for (int64_t l = 0; l < kBlock; ++l) y[l] += t[l];
}

static inline void store_row(const Linear& p, int64_t m, int64_t n, const float* y) {
    const int64_t width = p.out_features - n < kBlock ? p.out_features - n : kBlock;
    if (p.dtype == kFloat32) {
        memcpy(static_cast<float*>(p.y) + m * p.y_row_stride + n, y, width * sizeof(float));
        return;
    }
    uint16_t half[kBlock];
    if (p.dtype == kBfloat16) for (int64_t l = 0; l < kBlock; ++l) half[l] = to_bfloat16(y[l]);
    else for (int64_t l = 0; l < kBlock; ++l) half[l] = to_float16(y[l]);
    uint16_t* out = static_cast<uint16_t*>(p.y) + m * p.y_row_stride + n;
    if (width == kBlock) memcpy(out, half, sizeof(half));
    else memcpy(out, half, width * sizeof(uint16_t));
}

// Bias, cast and store of 32 outputs of row m.
static inline void finish_row(const Linear& p, int64_t m, int64_t n, float* y) {
    if (p.bias) {
        const float* bias = p.bias + n;
        if (p.out_features - n >= kBlock) for (int64_t l = 0; l < kBlock; ++l) y[l] += bias[l];
        else for (int64_t l = 0; l < p.out_features - n; ++l) y[l] += bias[l];
    }
    store_row(p, m, n, y);
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
    float* row = static_cast<float*>(scratch(kSlotRow, (p.in_features + 64 + (16 + p.paley) * kLanes) * sizeof(float)));
    float* work = row + (p.in_features + 63) / 16 * 16;
    for (int64_t m = m0; m < m1; ++m) quantize_row(p, m, m - m0, block, row, work);
    return block;
}
