// Straight-through gradients of a group, in one pass over it; the formulas are those of qvgen.quant.ste. Part of fake_quantize.inl.

// Sums of a group in torch's order; see the file's head. Level 0 is kept in registers by whoever adds up.
constexpr int kSums = 3;
struct Sums {
    float level[kLevels][kSums * kRun];
};

static void clear_levels(Sums& s) { memset(s.level[1], 0, sizeof s.level - sizeof s.level[0]); }

static void move_up(Sums& s, int64_t runs) {
    for (int64_t j = 1; j < kLevels; ++j) {
        float *from = s.level[j - 1], *to = s.level[j];
        for (int64_t i = 0; i < kSums * kRun; ++i) to[i] += from[i], from[i] = 0.0f;
        if (runs & ((kLevelRuns - 1) << (4 * j))) break;
    }
}

// `rest`: the products of the `count` columns after the last whole run.
static void finish(Sums& s, int64_t runs, const float (*rest)[kRun], int64_t count, float* totals) {
    float* sum = s.level[0];
    if (runs >= kLevelRuns)
        for (int64_t j = 1; j < kLevels; ++j)
            for (int64_t i = 0; i < kSums * kRun; ++i) sum[i] += s.level[j][i];
    float lanes[kSums][kRegister];
    const int64_t registers = count / kRegister * kRegister;
    for (int64_t t = 0; t < kSums; ++t) {
        const float* own = sum + t * kRun;
        for (int64_t i = 0; i < kRegister; ++i) lanes[t][i] = own[i];
        for (int64_t k = 0; k < registers; k += kRegister)
            for (int64_t i = 0; i < kRegister; ++i) lanes[t][i] += rest[t][k + i];
        for (int64_t j = kRegister; j < kRun; j += kRegister)
            for (int64_t i = 0; i < kRegister; ++i) lanes[t][i] += own[j + i];
    }
    float a = 0.0f, b = 0.0f, c = 0.0f;
    for (int64_t k = registers; k < count; ++k) a += rest[0][k], b += rest[1][k], c += rest[2][k];
    for (int64_t i = 0; i < kRegister; ++i) a += lanes[0][i], b += lanes[1][i], c += lanes[2][i];
    totals[0] = a, totals[1] = b, totals[2] = c;
}

// Gradients of a group before those of its extremes: dx, and of the row's sums what equations (2) and (3) of qvgen.quant.ste need.
struct GroupGradient {
    float codes, inputs, clipped;  // sum g (q - z), sum m g x, sum (m - 1) g
    int64_t at_low, at_high;       // how many columns are equal to the extremes; symmetric: at_high has both
};

// What 16 columns add to the sums and counts.
struct Columns {
    Wide kept, centered;  // dx, q - z
    WideMask at_low, at_high;
};

template <int kMode, bool kDynamicRow, bool kSymmetric>
QV_INLINE Columns columns_of(const FakeQuantize& p, const Group& g, const Wide& x, const Wide& grad) {
    const float qmin = static_cast<float>(p.qmin), qmax = static_cast<float>(p.qmax);
    const Wide u = unclamped<kMode>(x, g);
    Columns c = {};
    c.centered = clamped(u, qmin, qmax) - g.zero;
    c.kept = between(grad, u, qmin - 0.5f, qmax + 0.5f);
    if (kDynamicRow) {
        c.at_high = x == all(g.high);
        if (kSymmetric) c.at_high |= x == all(g.low);
        else c.at_low = x == all(g.low);
    }
    return c;
}

template <int kMode, bool kDynamicRow, bool kSymmetric>
static GroupGradient differentiate(const FakeQuantize& p, const Group& g, const float* x, int64_t at) {
    const float* grad = p.grad + at;
    float* grad_x = p.grad_x + at;
    const bool direct = p.operand && p.operand_dtype == kFloat32;
    Sums sums;
    Wide a[2] = {}, b[2] = {}, c[2] = {};
    WideMask low = {}, high = {};
    const int64_t runs = p.columns / kRun;
    if (runs >= kLevelRuns) clear_levels(sums);
    float made[kRun];
    for (int64_t run = 0; run < runs;) {
        const int64_t k = run * kRun;
        float* to = direct ? static_cast<float*>(p.operand) + at + k : made;
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i) {
            const Wide v = load(x + k + i * kLane), w = load(grad + k + i * kLane);
            const Columns own = columns_of<kMode, kDynamicRow, kSymmetric>(p, g, v, w);
            a[i] += w * own.centered;
            b[i] += own.kept * v;
            if (!kSymmetric) c[i] += own.kept - w;
            low -= own.at_low, high -= own.at_high;
            keep(grad_x + k + i * kLane, own.kept);
            if (p.operand) keep(to + i * kLane, operand_of<kMode>(p, g, own.centered, nullptr));
        }
        if (p.operand && !direct) store_as(p.operand, at + k, kRun, made, p.operand_dtype);
        ++run;
        if (run % kLevelRuns == 0 || run == runs) {
#pragma GCC unroll 2
            for (int64_t i = 0; i < 2; ++i) {
                float* sum = sums.level[0] + i * kLane;
                keep(sum, a[i]), keep(sum + kRun, b[i]), keep(sum + 2 * kRun, c[i]);
                a[i] = b[i] = c[i] = Wide{};
            }
            if (run % kLevelRuns == 0) move_up(sums, run);
        }
    }
    if (runs == 0) memset(sums.level[0], 0, sizeof sums.level[0]);
    // What is left of the row, in a run that is filled up with zeros.
    float rest[kSums][kRun];
    const int64_t k = runs * kRun, count = p.columns - k;
    if (count) {
        float in[kRun] = {}, given[kRun] = {};
        for (int64_t i = 0; i < count; ++i) in[i] = x[k + i], given[i] = grad[k + i];
        for (int64_t i = 0; i < kRun; i += kLane) {
            const Wide v = load(in + i), w = load(given + i);
            const Columns own = columns_of<kMode, kDynamicRow, kSymmetric>(p, g, v, w);
            keep(rest[0] + i, w * own.centered), keep(rest[1] + i, own.kept * v), keep(rest[2] + i, own.kept - w);
            keep(given + i, own.kept), keep(made + i, operand_of<kMode>(p, g, own.centered, nullptr));
            for (int64_t j = 0; j < kLane && i + j < count; ++j) low[j] -= own.at_low[j], high[j] -= own.at_high[j];
        }
        memcpy(grad_x + k, given, static_cast<size_t>(count) * sizeof(float));
        if (p.operand) store_as(p.operand, at + k, count, made, p.operand_dtype);
    }
    GroupGradient found = {};
    if (kDynamicRow)
        for (int64_t i = 0; i < kLane; ++i) found.at_low += low[i], found.at_high += high[i];
    float totals[kSums];
    finish(sums, runs, rest, count, totals);
    found.codes = totals[0], found.inputs = totals[1], found.clipped = totals[2];
    return found;
}

// Add a share to every column that is equal to an extreme, and a zero to the others: torch does, which makes -0 a 0.
template <bool kSymmetric>
static void add_shares(const FakeQuantize& p, const Group& g, const float* x, float* grad_x, float at_low, float at_high) {
    int64_t k = 0;
    for (; k + kLane <= p.columns; k += kLane) {
        const Wide v = load(x + k), kept = load(grad_x + k);
        const Wide high = v == all(g.high) ? all(at_high) : Wide{};
        if (kSymmetric) {
            const Wide sign = v > Wide{} ? all(1.0f) : v < Wide{} ? all(-1.0f) : Wide{};
            keep(grad_x + k, kept + (v == all(g.low) ? all(at_high) : high) * sign);
        } else {
            keep(grad_x + k, (kept + (v == all(g.low) ? all(at_low) : Wide{})) + high);
        }
    }
    for (; k < p.columns; ++k) {
        const float high = x[k] == g.high ? at_high : 0.0f;
        if (kSymmetric) {
            const float sign = x[k] > 0.0f ? 1.0f : x[k] < 0.0f ? -1.0f : 0.0f;
            grad_x[k] = grad_x[k] + (x[k] == g.low ? at_high : high) * sign;
        } else {
            grad_x[k] = (grad_x[k] + (x[k] == g.low ? at_low : 0.0f)) + high;
        }
    }
}

// Where the scale sits on its floor or ceiling it does not depend on the range.
static float where_free(const FakeQuantize& p, float span, float grad) {
    return between(grad, span / static_cast<float>(p.qmax), p.floor, p.ceiling);
}

static void through_extremes(const FakeQuantize& p, const Group& g, const GroupGradient& sums, const float* clips[2], const float* x,
                             int64_t at, int64_t index) {
    const float infinity = bits_float(0x7f800000), qmax = static_cast<float>(p.qmax);
    const float clip_low = *clips[0], clip_high = *clips[1];
    float grad_scale = sums.codes - sums.inputs / g.divisor;
    const float count_low = static_cast<float>(sums.at_low > 1 ? sums.at_low : 1);
    const float count_high = static_cast<float>(sums.at_high > 1 ? sums.at_high : 1);
    if (p.zero_kind == kNoZero) {
        const float grad_high = where_free(p, g.high * clip_high, grad_scale / qmax);
        add_shares<true>(p, g, x, p.grad_x + at, 0.0f, grad_high * clip_high / count_high);
        p.grad_first[index] = 0.0f;
        p.grad_second[index] = grad_high * g.high;
        return;
    }
    const float grad_zero = p.stop_zero ? 0.0f : sums.clipped * g.scale;
    const float bottom = at_most(g.low, 0.0f), top = at_least(g.high, 0.0f);
    const float low = bottom * clip_low, high = top * clip_high;
    grad_scale = grad_scale + grad_zero * low / (g.scale * g.scale);
    const float grad_high = where_free(p, high - low, grad_scale / qmax);
    const float grad_low = -grad_zero / g.scale - grad_high;
    const float at_low = between(grad_low * clip_low, g.low, -infinity, 0.0f);
    const float at_high = between(grad_high * clip_high, g.high, 0.0f, infinity);
    add_shares<false>(p, g, x, p.grad_x + at, at_low / count_low, at_high / count_high);
    p.grad_first[index] = grad_low * bottom;
    p.grad_second[index] = grad_high * top;
}

template <int kMode, bool kSymmetric>
static void differentiate_group(const FakeQuantize& p, const Group& g, const float* x, int64_t at, int64_t index,
                                const float* params[2]) {
    if (p.kind == kDynamic) {
        const GroupGradient sums = differentiate<kMode, true, kSymmetric>(p, g, x, at);
        through_extremes(p, g, sums, params, x, at, index);
        return;
    }
    const GroupGradient sums = differentiate<kMode, false, kSymmetric>(p, g, x, at);
    float grad_scale = sums.codes - sums.inputs / g.divisor, grad_zero = sums.clipped * g.scale;
    if (p.kind == kLearned) grad_scale = grad_scale * p.factor, grad_zero = grad_zero * p.factor;
    p.grad_first[index] = grad_scale;
    p.grad_second[index] = kSymmetric ? 0.0f : grad_zero;
}
