// Step 4 of the contract: sums to outputs, 32 of one row at a time.

// Add what one group contributes to a row of 32 outputs: the corrected sum, scaled.
static inline void add_group(const Linear& p, const RowBlock& rows, int64_t m0, int64_t slot, int64_t n, int64_t g,
                             const int32_t* c, float* y) {
#if defined(QV_VECTOR_EPILOGUE)
    if (!p.accumulators) return add_group_lanes(p, rows, slot, n, g, c, y);
#endif
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

// What finish_row's callers may ask of the caches before a tile is computed: the lines of row m that its epilogue will read.
static inline void prefetch_row(const Linear& p, int64_t m, int64_t n) {
    const int64_t width = p.dtype == kFloat32 ? 4 : 2;
    if (p.residual) __builtin_prefetch(static_cast<const char*>(p.residual) + (m * p.residual_row_stride + n) * width);
    if (p.branch) __builtin_prefetch(static_cast<const char*>(p.branch) + (m * p.out_features + n) * width);
}

// Up to 32 numbers of a type to float32; what is beyond `width` becomes 0.
static inline void load_block(const void* source, int32_t dtype, int64_t place, int64_t width, float* out) {
    uint16_t half[kBlock] = {};
    if (width < kBlock) memset(out, 0, kBlock * sizeof(float));
    if (dtype == kFloat32) {
        memcpy(out, static_cast<const float*>(source) + place, width * sizeof(float));
        return;
    }
    memcpy(half, static_cast<const uint16_t*>(source) + place, width * sizeof(uint16_t));
    if (dtype == kBfloat16) for (int64_t l = 0; l < kBlock; ++l) out[l] = bits_float(static_cast<uint32_t>(half[l]) << 16);
    else for (int64_t l = 0; l < kBlock; ++l) out[l] = from_float16(half[l]);
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

// To the type of x and back, as between two operators.
static inline void round_block(const Linear& p, float* y) {
    if (p.dtype == kBfloat16) {
        for (int64_t l = 0; l < kBlock; ++l) y[l] = bits_float(static_cast<uint32_t>(to_bfloat16(y[l])) << 16);
    } else if (p.dtype == kFloat16) {
        for (int64_t l = 0; l < kBlock; ++l) y[l] = from_float16(to_float16(y[l]));
    }
}

// e^v: 2^n times a polynomial of the rest, |rest| <= ln(2) / 2; error below 2 units in the last place from -87 on, e^-87 below;
// infinite from 88.4 on. Single operations in a fixed order, so that all backends agree.
static inline float exponential(float v) {
    v = v > -87.0f ? v : -87.0f;
    v = v < 89.0f ? v : 89.0f;
    const float n = rne(v * 1.44269504f);
    const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.38888889e-3f;
    e = e * r + 8.33333333e-3f;
    e = e * r + 4.16666667e-2f;
    e = e * r + 1.66666667e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return e * bits_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): GELU with tanh; or with u = x / 2: SiLU. y comes rounded to x's type and
// leaves in float32.
static inline void apply_function(const Linear& p, float* y) {
    if (p.function == kGeluTanh) {
        for (int64_t l = 0; l < kBlock; ++l) {
            const float x = y[l], u = x * (1.0f + (0.044715f * x) * x);
            y[l] = x / (1.0f + exponential(-1.59576912f * u));
        }
    } else {
        for (int64_t l = 0; l < kBlock; ++l) y[l] = y[l] / (1.0f + exponential(-y[l]));
    }
}

// What follows the linear itself, with the roundings of separate operators: function, gate, residual; the last rounding is the
// store's.
static inline void apply_tail(const Linear& p, int64_t m, int64_t n, float* y) {
    const int64_t width = p.out_features - n < kBlock ? p.out_features - n : kBlock;
    float other[kBlock];
    round_block(p, y);
    if (p.function) {
        apply_function(p, y);
        if (p.gate || p.residual) round_block(p, y);
    }
    if (p.gate) {
        load_block(p.gate, p.gate_float32 ? kFloat32 : p.dtype, m / p.gate_rows * p.gate_row_stride + n, width, other);
        for (int64_t l = 0; l < kBlock; ++l) y[l] *= other[l];
        if (p.residual && !p.gate_float32) round_block(p, y);
    }
    if (p.residual) {
        load_block(p.residual, p.dtype, m * p.residual_row_stride + n, width, other);
        for (int64_t l = 0; l < kBlock; ++l) y[l] += other[l];
    }
}

// Branch, bias, tail, cast and store of 32 outputs of row m.
static inline void finish_row(const Linear& p, int64_t m, int64_t n, float* y) {
#if defined(QV_VECTOR_EPILOGUE)
    if (finish_row_lanes(p, m, n, y)) return;
#endif
    const int64_t width = p.out_features - n < kBlock ? p.out_features - n : kBlock;
    if (p.branch) {
        float branch[kBlock];
        load_block(p.branch, p.dtype, m * p.out_features + n, width, branch);
        for (int64_t l = 0; l < kBlock; ++l) y[l] += branch[l];
    }
    if (p.bias) {
        const float* bias = p.bias + n;
        if (width == kBlock) for (int64_t l = 0; l < kBlock; ++l) y[l] += bias[l];
        else for (int64_t l = 0; l < width; ++l) y[l] += bias[l];
    }
    if (p.function || p.gate || p.residual) apply_tail(p, m, n, y);
    store_row(p, m, n, y);
}

// Row `slot` of the block, 32 outputs from n on, where there is one accumulation group.
static inline void finish_whole(const Linear& p, const RowBlock& rows, int64_t m0, int64_t slot, int64_t n, const int32_t* c) {
#if defined(QV_VECTOR_EPILOGUE)
    if (p.out_features - n >= kBlock && !p.accumulators) {
        if (p.dtype == kBfloat16) return finish_whole_lanes<false>(p, rows, m0 + slot, slot, n, c);
        if (p.dtype == kFloat32) return finish_whole_lanes<true>(p, rows, m0 + slot, slot, n, c);
    }
#endif
    alignas(64) float y[kBlock];
    add_group(p, rows, m0, slot, n, 0, c, y);
    finish_row(p, m0 + slot, n, y);
}

// What a backend does after its last store: lines stored past the caches must be seen by the thread that waits for this one.
static inline void end_stores() {
#if defined(QV_VECTOR_EPILOGUE)
    _mm_sfence();
#endif
}
