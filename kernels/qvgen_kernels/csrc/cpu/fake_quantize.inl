// Rows of fake quantization, included once for each kind of processor inside its namespace and target pragma.
//
// Columns are worked on in runs of 32, because that is how torch adds a row up on every processor (its cascade_sum,
// registers of 8 numbers): 32 sums side by side, moved up a level after every 16 runs; then registers of 8 that are left over,
// then single numbers, then the sums from the first to the last.

#include "wide.inl"

constexpr int64_t kRun = 2 * kLane;  // columns at a time
constexpr int64_t kLevels = 4, kLevelRuns = 16, kRegister = 8;

// What the grid says of one group.
struct Group {
    float scale, divisor, inverse, zero;  // what codes are multiplied by; what rows are divided by, and 1 over it
    float low, high;                      // extremes
};

// To the grid's precision as torch does it: NaN stays NaN, and an infinity becomes the largest number of a 16-bit type.
static float rounded_scale(float s, int32_t dtype) {
    float least = 1e-8f, most;
    if (dtype == kFloat32) return s;
    if (dtype == kBfloat16) {
        s = bits_float(static_cast<uint32_t>(to_bfloat16(s)) << 16);
        most = bits_float(0x7f7f0000);
    } else {
        s = from_float16(to_float16(s));
        least = 6.103515625e-05f, most = 65504.0f;
    }
    s = s < least ? least : s;
    return s > most ? most : s;
}

static float at_least(float v, float least) { return v < least ? least : v; }  // a NaN stays
static float at_most(float v, float most) { return v > most ? most : v; }

static void choose_dynamic(const FakeQuantize& p, Group& g, float clip_low, float clip_high) {
    const float qmax = static_cast<float>(p.qmax);
    const bool symmetric = p.zero_kind == kNoZero;
    const float low = at_most(g.low, 0.0f) * clip_low, high = (symmetric ? g.high : at_least(g.high, 0.0f)) * clip_high;
    const float span = symmetric ? high : high - low;
    g.zero = 0.0f;
    if (p.arithmetic == kDivision) {
        g.scale = g.divisor = at_least(span, 1e-10f) / qmax;
    } else if (p.arithmetic == kUnrounded) {
        g.divisor = at_least(span * (1.0f / qmax), 1e-8f);
        g.scale = rounded_scale(g.divisor, p.scale_dtype);
    } else {
        g.scale = g.divisor = rounded_scale(at_least(span / qmax, 1e-8f), p.scale_dtype);
    }
    g.inverse = 1.0f / g.divisor;
    if (symmetric) return;
    float zero = -low * g.inverse;
    if (p.zero_kind == kIntegerZero) zero = __builtin_rintf(zero);
    g.zero = at_most(at_least(zero, 0.0f), qmax);
}

static void choose_given(const FakeQuantize& p, Group& g, float scale, float zero) {
    const float qmax = static_cast<float>(p.qmax);
    if (p.kind == kLearned) {
        scale = rounded_scale(at_least(scale, 1e-8f), p.scale_dtype);
        if (p.zero_kind == kIntegerZero) zero = at_most(at_least(__builtin_rintf(zero), 0.0f), qmax);
        else zero = at_most(at_least(zero, -131072.0f), 131072.0f);
    }
    g.scale = g.divisor = scale;
    g.inverse = 1.0f / scale;
    g.zero = p.zero_kind == kNoZero ? 0.0f : zero;
}

// Minimum and maximum of a group, or (symmetric) -max|x| and max|x|; NaN where there is one.
static void find_extremes(const float* x, int64_t columns, bool symmetric, float* low, float* high) {
    const WideMask magnitude = WideMask{} + 0x7fffffff;
    const float first = symmetric ? bits_float(float_bits(x[0]) & 0x7fffffff) : x[0];
    Wide least = all(first), most = all(first);
    WideMask nan = {};
    for (int64_t k = 0; k < columns; k += kLane) {
        Wide v;
        if (k + kLane <= columns) {
            v = load(x + k);
        } else {
            float rest[kLane];
            for (int64_t i = 0; i < kLane; ++i) rest[i] = k + i < columns ? x[k + i] : x[k];
            v = load(rest);
        }
        nan |= v != v;
        if (symmetric) {
            WideMask bits;
            memcpy(&bits, &v, sizeof v);
            bits &= magnitude;
            memcpy(&v, &bits, sizeof v);
        } else {
            least = v < least ? v : least;
        }
        most = v > most ? v : most;
    }
    // By halves, so that a few wide steps do it.
    float a[kLane], b[kLane];
    int32_t any = 0;
    keep(a, least), keep(b, most);
    for (int64_t i = 0; i < kLane; ++i) any |= nan[i];
    for (int64_t half = kLane / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) a[i] = a[i + half] < a[i] ? a[i + half] : a[i], b[i] = b[i + half] > b[i] ? b[i + half] : b[i];
    const float not_a_number = bits_float(0x7fc00000);
    *low = any ? not_a_number : symmetric ? -b[0] : a[0];
    *high = any ? not_a_number : b[0];
}

// Codes of 16 numbers before the clamp. kMode: an Arithmetic's division, a real zero point, or neither.
enum Mode { kPlain, kDivide, kReal };

template <int kMode>
QV_INLINE Wide unclamped(const Wide& x, const Group& g) {
    if (kMode == kDivide) return nearest(x / g.divisor) + g.zero;
    if (kMode == kReal) return nearest(x * g.inverse + g.zero) + 0.0f;
    return nearest(x * g.inverse) + g.zero;
}

// v where low < x < high, 0 elsewhere and where x is NaN.
QV_INLINE Wide between(const Wide& v, const Wide& x, float low, float high) {
    return (x > all(low)) & (x < all(high)) ? v : Wide{};
}
static float between(float v, float x, float low, float high) { return x > low && x < high ? v : 0.0f; }

static void store_as(void* out, int64_t k, int64_t count, const float* from, int32_t dtype) {
    if (dtype == kFloat32) {
        memcpy(static_cast<float*>(out) + k, from, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    if (dtype == kInt8) {
        for (int64_t i = 0; i < count; ++i) static_cast<int8_t*>(out)[k + i] = static_cast<int8_t>(from[i] == from[i] ? from[i] : 0.0f);
        return;
    }
    uint16_t* half = static_cast<uint16_t*>(out) + k;
    if (dtype == kBfloat16) for (int64_t i = 0; i < count; ++i) half[i] = to_bfloat16(from[i]);
    else for (int64_t i = 0; i < count; ++i) half[i] = to_float16(from[i]);
}

static void load_as(float* to, const void* from, int64_t k, int64_t count, int32_t dtype) {
    if (dtype == kFloat32) {
        memcpy(to, static_cast<const float*>(from) + k, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    const uint16_t* half = static_cast<const uint16_t*>(from) + k;
    if (dtype == kBfloat16) for (int64_t i = 0; i < count; ++i) to[i] = bits_float(static_cast<uint32_t>(half[i]) << 16);
    else for (int64_t i = 0; i < count; ++i) to[i] = from_float16(half[i]);
}

// The operand of 16 numbers, from clamped codes minus the zero point.
template <int kMode>
QV_INLINE Wide operand_of(const FakeQuantize& p, const Group& g, Wide centered, const float* helper) {
    if (!p.factored) centered = centered * g.scale;
    else if (kMode == kReal && p.raw) centered = nearest(centered + g.zero);
    if (helper) centered = centered + (p.factored ? load(helper) / g.scale : load(helper));
    return centered;
}

// One group forward: operands from column `at` of the call's row on; x is the group's. Returns whether an operand is NaN.
template <int kMode>
static bool quantize_group(const FakeQuantize& p, const Group& g, const float* x, int64_t at, float* sum) {
    const float qmin = static_cast<float>(p.qmin), qmax = static_cast<float>(p.qmax);
    const bool direct = p.operand_dtype == kFloat32;
    Wide total = {};
    WideMask missing = {};
    for (int64_t k = 0; k < p.columns; k += kRun) {
        const int64_t count = p.columns - k < kRun ? p.columns - k : kRun;
        float in[kRun], help[kRun], out[kRun];
        const float *from = x + k, *helper = p.helper ? p.helper + at + k : nullptr;
        const bool whole = count == kRun;
        if (!whole) {
            for (int64_t i = 0; i < kRun; ++i) in[i] = i < count ? from[i] : 0.0f, help[i] = helper && i < count ? helper[i] : 0.0f;
            from = in;
            helper = helper ? help : nullptr;
        }
        float* to = whole && direct ? static_cast<float*>(p.operand) + at + k : out;
#pragma GCC unroll 2
        for (int64_t i = 0; i < kRun; i += kLane) {
            const Wide c = clamped(unclamped<kMode>(load(from + i), g), qmin, qmax) - g.zero;
            if (p.row_sum) {
                Wide counted = c;
                if (!whole) for (int64_t j = 0; j < kLane; ++j) counted[j] = i + j < count ? c[j] : 0.0f;
                total += counted;
            }
            missing |= c != c;
            keep(to + i, operand_of<kMode>(p, g, c, helper ? helper + i : nullptr));
        }
        if (to == out) store_as(p.operand, at + k, count, out, p.operand_dtype);
    }
    int32_t any = 0;
    for (int64_t i = 0; i < kLane; ++i) *sum += total[i], any |= missing[i];  // whole numbers: exact in any order
    return any != 0;
}

#include "fake_gradient.inl"

static void quantize_rows(const FakeQuantize& p, int64_t begin, int64_t end) {
    const int64_t width = p.groups * p.columns;
    const bool symmetric = p.zero_kind == kNoZero;
    const int mode = p.zero_kind == kRealZero ? kReal : p.arithmetic == kDivision ? kDivide : kPlain;
    float* converted = nullptr;
    if (p.x && p.x_dtype != kFloat32) converted = static_cast<float*>(scratch(kSlotRow, static_cast<size_t>(width) * sizeof(float)));
    for (int64_t m = begin; m < end; ++m) {
        const float* row = nullptr;
        if (p.x && p.x_dtype == kFloat32) {
            row = static_cast<const float*>(p.x) + m * p.x_row_stride;
        } else if (p.x) {
            load_as(converted, static_cast<const uint16_t*>(p.x) + m * p.x_row_stride, 0, width, p.x_dtype);
            row = converted;
        }
        float row_sum = 0.0f;
        for (int64_t j = 0; j < p.groups; ++j) {
            const int64_t index = m * p.groups + j, at = m * width + j * p.columns;
            const int64_t given = p.params == 1 ? m : index;
            const float* params[2] = {p.first + given, p.second ? p.second + given : nullptr};
            const float* x = row ? row + j * p.columns : nullptr;
            Group g = {};
            if (p.kind == kDynamic) {
                if (p.known) {
                    g.low = p.low[index], g.high = p.high[index];
                } else {
                    find_extremes(x, p.columns, symmetric, &g.low, &g.high);
                    p.low[index] = g.low, p.high[index] = g.high;
                }
                choose_dynamic(p, g, *params[0], *params[1]);
            } else {
                choose_given(p, g, *params[0], params[1] ? *params[1] : 0.0f);
            }
            if (p.scale) p.scale[index] = g.scale;
            if (p.zero) p.zero[index] = g.zero;
            if (p.grad) {
                if (mode == kReal) differentiate_group<kReal, false>(p, g, x, at, index, params);
                else if (mode == kDivide) differentiate_group<kDivide, true>(p, g, x, at, index, params);
                else if (symmetric) differentiate_group<kPlain, true>(p, g, x, at, index, params);
                else differentiate_group<kPlain, false>(p, g, x, at, index, params);
            } else if (p.operand) {
                const bool missing = mode == kReal     ? quantize_group<kReal>(p, g, x, at, &row_sum)
                                     : mode == kDivide ? quantize_group<kDivide>(p, g, x, at, &row_sum)
                                                       : quantize_group<kPlain>(p, g, x, at, &row_sum);
                // An integer can't be NaN: the scale is, and so is everything that it is multiplied with.
                if (missing && p.operand_dtype == kInt8) p.scale[index] = bits_float(0x7fc00000);
            }
        }
        if (p.row_sum) p.row_sum[m] = row_sum;
    }
}

static void scale_output_rows(const ScaleOutput& p, int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 256;
    for (int64_t m = begin; m < end; ++m) {
        for (int64_t n = 0; n < p.columns; n += kPiece) {
            const int64_t count = p.columns - n < kPiece ? p.columns - n : kPiece, at = m * p.columns + n;
            float y[kPiece], other[kPiece];
            load_as(y, p.y, at, count, p.dtype);
            if (p.column_zero) for (int64_t i = 0; i < count; ++i) y[i] = y[i] - p.row_sum[m] * p.column_zero[n + i];
            if (p.row_scale) for (int64_t i = 0; i < count; ++i) y[i] = (y[i] * p.row_scale[m]) * p.column_scale[n + i];
            if (p.branch) {
                load_as(other, p.branch, at, count, p.dtype);
                for (int64_t i = 0; i < count; ++i) y[i] = y[i] + other[i];
            }
            if (p.bias) for (int64_t i = 0; i < count; ++i) y[i] = y[i] + p.bias[n + i];
            store_as(p.y, at, count, y, p.dtype);
        }
    }
}

static void scale_gradient_rows(const ScaleGradient& p, int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 256;
    for (int64_t m = begin; m < end; ++m) {
        const float scale = p.row_scale[m];
        for (int64_t n = 0; n < p.columns; n += kPiece) {
            const int64_t count = p.columns - n < kPiece ? p.columns - n : kPiece, at = m * p.columns + n;
            const float* grad = p.grad + at;
            float row[kPiece], column[kPiece];
            for (int64_t i = 0; i < count; ++i) row[i] = grad[i] * p.column_scale[n + i], column[i] = grad[i] * scale;
            store_as(p.by_row, at, count, row, p.dtype);
            store_as(p.by_column, at, count, column, p.dtype);
        }
    }
}

static FakeQuantizeCode code() { return {quantize_rows, scale_output_rows, scale_gradient_rows}; }

#undef QV_INLINE
