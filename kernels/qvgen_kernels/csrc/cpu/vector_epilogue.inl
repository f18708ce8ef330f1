// The epilogue of 32 bfloat16 or float32 (kWide) outputs in registers; the same in words, for all types and shapes, is
// epilogue.inl. Written once over the registers of avx512.inl and avx2.inl.

template <bool kWide>
static inline Floats load_lanes(const void* x, int64_t place) {
    return kWide ? load_floats(static_cast<const float*>(x) + place) : widen_bfloat16(static_cast<const uint16_t*>(x) + place);
}

template <bool kWide>
static inline Floats round_lanes(Floats y) { return kWide ? y : round_bfloat16(y); }

// One accumulation group's sums, corrected and scaled.
static inline Floats scale_lanes(const Linear& p, const RowBlock& rows, int64_t slot, int64_t n, int64_t g, const int32_t* c) {
    const int64_t Np = p.padded_out, side = slot * p.activation_groups + (p.activation_groups == 1 ? 0 : g);
    const int64_t place = (p.weight_groups == 1 ? 0 : g) * Np + n;
    Ints acc = load_ints(c);
    if (const int32_t offset = rows.offset[side]) acc = sub(acc, mul(all(offset), load_ints(p.column_sum + g * Np + n)));
    const int32_t total = p.weight_shift || p.weight_zero ? rows.row_sum[slot * p.groups + g] : 0;
    if (p.weight_shift) acc = add(acc, mul(all(total), load_ints(p.weight_shift + place)));
    Floats t = to_floats(acc);
    if (p.weight_zero) t = sub(t, mul(all(static_cast<float>(total)), load_floats(p.weight_zero + place)));
    return mul(mul(t, all(rows.scale[side])), load_floats(p.weight_scale + place));
}

// epilogue.inl, add_group
static inline void add_group_lanes(const Linear& p, const RowBlock& rows, int64_t slot, int64_t n, int64_t g, const int32_t* c,
                                   float* y) {
    for (int64_t v = 0; v < kBlock; v += kVector) {
        const Floats t = scale_lanes(p, rows, slot, n + v, g, c + v);
        keep_floats(y + v, g == 0 ? t : add(load_floats(y + v), t));
    }
}

// epilogue.inl, exponential
static inline Floats exponential_lanes(Floats v) {
    v = smaller(larger(v, all(-87.0f)), all(89.0f));
    const Floats shift = all(12582912.0f);
    const Floats n = sub(add(mul(v, all(1.44269504f)), shift), shift);
    const Floats r = add(sub(v, mul(n, all(0.693359375f))), mul(n, all(2.12194440e-4f)));
    Floats e = all(1.38888889e-3f);
    constexpr float kTerms[] = {8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f};
    for (const float term : kTerms) e = add(mul(e, r), all(term));
    return mul(e, power_of_two(to_ints(n)));
}

// epilogue.inl, apply_function
static inline Floats function_lanes(int32_t function, Floats x) {
    Floats v = negative(x);
    if (function == kGeluTanh) {
        const Floats square = mul(mul(all(0.044715f), x), x);
        v = mul(all(-1.59576912f), mul(x, add(all(1.0f), square)));
    }
    return div(x, add(all(1.0f), exponential_lanes(v)));
}

// epilogue.inl, apply_tail, of row m
template <bool kWide>
static inline Floats tail_lanes(const Linear& p, int64_t m, int64_t n, Floats y) {
    y = round_lanes<kWide>(y);
    if (p.function) {
        y = function_lanes(p.function, y);
        if (p.gate || p.residual) y = round_lanes<kWide>(y);
    }
    if (p.gate) {
        const int64_t place = m / p.gate_rows * p.gate_row_stride + n;
        y = mul(y, p.gate_float32 ? load_lanes<true>(p.gate, place) : load_lanes<kWide>(p.gate, place));
        if (p.residual && !p.gate_float32) y = round_lanes<kWide>(y);
    }
    if (p.residual) y = add(y, load_lanes<kWide>(p.residual, m * p.residual_row_stride + n));
    return y;
}

// epilogue.inl, finish_row, of 32 scaled sums; stored past the caches where they fill whole lines.
template <bool kWide>
static inline void finish_lanes(const Linear& p, int64_t m, int64_t n, Floats* y) {
    for (int64_t v = 0; v < kBlock / kVector; ++v) {
        const int64_t place = n + v * kVector;
        if (p.branch) y[v] = add(y[v], load_lanes<kWide>(p.branch, m * p.out_features + place));
        if (p.bias) y[v] = add(y[v], load_floats(p.bias + place));
        if (p.function || p.gate || p.residual) y[v] = tail_lanes<kWide>(p, m, place, y[v]);
    }
    const int64_t place = m * p.y_row_stride + n;
    if (kWide) store_floats(static_cast<float*>(p.y) + place, y);
    else store_bfloat16(static_cast<uint16_t*>(p.y) + place, y);
}

// 32 outputs of row m of a layer without groups, from sums to memory.
template <bool kWide>
static inline void finish_whole_lanes(const Linear& p, const RowBlock& rows, int64_t m, int64_t slot, int64_t n, const int32_t* c) {
    Floats y[kBlock / kVector];
    for (int64_t v = 0; v < kBlock / kVector; ++v) y[v] = scale_lanes(p, rows, slot, n + v * kVector, 0, c + v * kVector);
    finish_lanes<kWide>(p, m, n, y);
}

// The same of sums that add_group_lanes has scaled; false where this type or width is epilogue.inl's.
static inline bool finish_row_lanes(const Linear& p, int64_t m, int64_t n, const float* sums) {
    if (p.out_features - n < kBlock || p.dtype == kFloat16) return false;
    Floats y[kBlock / kVector];
    for (int64_t v = 0; v < kBlock / kVector; ++v) y[v] = load_floats(sums + v * kVector);
    if (p.dtype == kBfloat16) finish_lanes<false>(p, m, n, y);
    else finish_lanes<true>(p, m, n, y);
    return true;
}
