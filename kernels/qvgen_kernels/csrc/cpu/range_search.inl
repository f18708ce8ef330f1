// Sums of |fake_quantize(x) - x|^2.4 over a row, to a thousandth; included once for each kind of processor.

#include "wide.inl"

constexpr int64_t kLook = 512;  // columns between two looks at the sum

// |e|^2.4 to 3e-4 of itself between 1e-35 and 1e35, as 2^(2.4 log2 |e|): with |e| = (1 + t) 2^k, log2(1 + t) is
// t + t (1 - t) q(t) to 1.2e-4 and 2^f, |f| <= 1/2, a cubic to 7.5e-5 (least squares with weights that even out the error).
QV_INLINE Wide power(const Wide& e) {
    WideMask bits;
    memcpy(&bits, &e, sizeof e);
    bits &= 0x7fffffff;
    const Wide exponent = __builtin_convertvector((bits >> 23) - 127, Wide);
    const WideMask one = (bits & 0x7fffff) | 0x3f800000;
    Wide t;
    memcpy(&t, &one, sizeof t);
    t = t - 1.0f;
    const Wide q = (t * 0.0821302f - 0.2390578f) * t + 0.4387257f;
    Wide power = clamped((exponent + (t + t * (1.0f - t) * q)) * 2.4f, -126.0f, 126.0f);
    const Wide shifted = power + 12582912.0f, f = power - (shifted - 12582912.0f);
    Wide result = ((f * 0.0551716f + 0.2426111f) * f + 0.6932610f) * f + 0.9999281f;
    WideMask whole, made;
    memcpy(&whole, &shifted, sizeof whole);  // its low bits are the whole number
    memcpy(&made, &result, sizeof made);
    made += whole << 23;
    memcpy(&result, &made, sizeof result);
    return result;
}

template <bool kReal>
QV_INLINE Wide range_error(const RangeErrors& p, const Wide& x, float inverse, float scale, float zero) {
    const Wide codes = kReal ? nearest(x * inverse + zero) : nearest(x * inverse) + zero;
    return power((clamped(codes, p.qmin, p.qmax) - zero) * scale - x);
}

static float sum_of(const Wide& v) {
    float total = 0.0f;
    for (int64_t i = 0; i < kLane; ++i) total += v[i];
    return total;
}

// The sum of one candidate, or a part of it that is above the limit.
template <bool kReal>
static float row_error(const RangeErrors& p, const float* x, float inverse, float scale, float zero, float limit) {
    float total = 0.0f;
    for (int64_t begin = 0; begin < p.columns; begin += kLook) {
        const int64_t end = begin + kLook < p.columns ? begin + kLook : p.columns;
        Wide first = {}, second = {};
        int64_t k = begin;
        for (; k + 2 * kLane <= end; k += 2 * kLane) {
            first = first + range_error<kReal>(p, load(x + k), inverse, scale, zero);
            second = second + range_error<kReal>(p, load(x + k + kLane), inverse, scale, zero);
        }
        for (; k < end; k += kLane) {
            const int64_t count = end - k < kLane ? end - k : kLane;
            float in[kLane] = {}, out[kLane];
            memcpy(in, x + k, static_cast<size_t>(count) * sizeof(float));
            keep(out, range_error<kReal>(p, load(in), inverse, scale, zero));
            for (int64_t i = 0; i < count; ++i) total += out[i];
        }
        total += sum_of(first + second);
        if (total > limit) break;
    }
    return total;
}

template <bool kReal>
static void range_errors(const RangeErrors& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * p.candidates;
        float best = bits_float(0x7f800000);
        for (int64_t i = 0; i < p.candidates; ++i) {
            const int64_t c = at + p.order[i];
            const float limit = best * p.margin;
            const float error = row_error<kReal>(p, p.x + row * p.columns, p.inverse[c], p.scale[c], p.zero[c], limit);
            p.error[c] = error;
            best = error < best ? error : best;
        }
    }
}

static void run_range_errors(const RangeErrors& p, int64_t begin, int64_t end) {
    p.real ? range_errors<true>(p, begin, end) : range_errors<false>(p, begin, end);
}
