// The sums of the attention's gradient, included once for each kind of processor after attention.inl.
//
// One head is one item of work, its queries 64 at a time and in order, so that each sum has one order whoever computes it.

// What a block of queries has besides Rows.
struct GradientRows {
    float *p, *w, *inverse, *expected;  // [64][64] twice, [64] twice
};

// What belongs to a query alone: 1 / L, and the sum over keys of P dP, which is that over the head's elements of g and its outputs.
static void weigh_queries(const AttentionGradient& g, int64_t head, int64_t row, int64_t count, const HeadCodes& h, const Rows& r,
                          const GradientRows& s) {
    const Attention& p = g.call;
    const int64_t columns = padded_head(p);
    for (int64_t i = 0; i < count; ++i) {
        const float *grad = g.grad + (head * p.queries + row + i) * columns, *total = r.total + i * columns;
        s.inverse[i] = 1.0f / (r.weight[i] == 0.0f ? 1.0f : r.weight[i]);
        float sum = 0.0f;
        for (int64_t d = 0; d < p.head_size; ++d) sum += grad[d] * (total[d] * s.inverse[i] * h.value_scale[d]);
        s.expected[i] = sum;
    }
}

// P of `count` queries for one block of keys, from the probabilities of the forward pass.
static void weigh_keys(const Attention& p, int64_t head, int64_t row, int64_t count, int64_t begin, const HeadCodes& h, const Rows& r,
                       const GradientRows& s) {
    int32_t weight[kGroup];
    float exponent[kGroup];
    for (int64_t slot = 0; slot < count; slot += kGroup) {
        const int64_t group = count - slot < kGroup ? count - slot : kGroup;
        code_group(p, head, row + slot, slot, group, begin, h, r, weight, exponent);
        for (int64_t i = 0; i < group; ++i) {
            const int64_t query = slot + i;
            const float factor = weight[i] && !r.bad[query] ? power(exponent[i] - r.top[query]) * s.inverse[query] : 0.0f;
            float* out = s.p + query * kKeys;
            if (p.plain)
                for (int64_t j = 0; j < kKeys; ++j) out[j] = r.plain[i * kKeys + j] * factor;
            else
                for (int64_t j = 0; j < kKeys; ++j) out[j] = static_cast<float>(r.probabilities[i * kKeys + j]) * factor;
        }
    }
}

static void gradient(const AttentionGradient& g, int64_t head) {
    const Attention& p = g.call;
    const HeadCodes h = head_codes(p, head, sizeof(Code));
    if (*h.bad != 0.0f) return;
    const Rows r = rows_of(p);
    const int64_t columns = padded_head(p), keys = key_blocks(p) * kKeys;
    GradientRows s;
    s.p = static_cast<float*>(scratch(kSlotSums, (2 * kQueryRows * kKeys + 2 * kQueryRows) * sizeof(float)));
    s.w = s.p + kQueryRows * kKeys;
    s.inverse = s.w + kQueryRows * kKeys;
    s.expected = s.inverse + kQueryRows;
    begin_products(p);
    for (int64_t row = 0; row < p.queries; row += kQueryRows) {
        const int64_t count = p.queries - row < kQueryRows ? p.queries - row : kQueryRows, first = (head * p.queries + row) * columns;
        attend_block(p, head, row, count, h, r);
        weigh_queries(g, head, row, count, h, r, s);
        for (int64_t begin = 0; begin < keys; begin += kKeys) {
            const int64_t place = (head * keys + begin) * columns;
            weigh_keys(p, head, row, count, begin, h, r, s);
            memset(s.w, 0, kQueryRows * kKeys * sizeof(float));
            accumulate({g.grad + first, columns, 1}, count, g.value + place, kKeys, p.head_size, kKeys, s.w, kKeys);
            for (int64_t i = 0; i < count; ++i)
                for (int64_t j = 0; j < kKeys; ++j)
                    s.w[i * kKeys + j] = s.p[i * kKeys + j] * (s.w[i * kKeys + j] - s.expected[i]);
            accumulate({s.p, 1, kKeys}, kKeys, g.grad + first, columns, count, columns, g.grad_value + place, columns);
            accumulate({s.w, kKeys, 1}, count, g.key + place, columns, kKeys, columns, g.grad_query + first, columns);
            accumulate({s.w, 1, kKeys}, kKeys, g.query + first, columns, count, columns, g.grad_key + place, columns);
        }
    }
    end_products();
}
