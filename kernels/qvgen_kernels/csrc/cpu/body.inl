// Everything of a backend but the integer product, in files that are included once per backend, inside its namespace and target
// pragma: this one (numbers, rows, scales), hadamard.inl, quantize.inl, epilogue.inl; on x86 the registers (avx512.inl, avx2.inl)
// and vector_epilogue.inl.
//
// The including file defines before:
//   QV_ROWS                 rows of its tile
//   QV_WIDTH                floats in a register
//   QV_USE_AVX512 or QV_USE_AVX2   where it has these registers
//   QV_UNSIGNED             1: activations are stored as unsigned bytes (maddubs, VNNI), 0: as signed bytes
//   tile(p, a, lda, b, panel, quads, rows, c)   c[rows][32] = int32 sums over 4 * quads columns; panel = bytes between the two
//                           panels (all but AMX)
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

#include "numbers.inl"

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

// What one activation group's range gives: x * inverse, or x / divisor where that is not 0, is clamped to [low, high], rounded,
// and stored plus offset.
struct Params {
    float scale, inverse, divisor, low, high;
    int32_t offset;
};

// Static ranges: the row brings its scale and zero point. An infinity takes the last code, a NaN makes its row NaN.
static Params given(const Linear& p, int64_t m, int32_t min_key, int32_t max_key) {
    const float qmax = static_cast<float>(p.activation_qmax), zero = p.row_zero && !p.symmetric ? p.row_zero[m] : 0.0f;
    Params r;
    r.divisor = 0.0f;
    r.scale = p.row_scale[m];
    r.inverse = 1.0f / r.scale;
    r.low = p.symmetric ? -qmax : -zero;
    r.high = qmax - zero;
    r.offset = static_cast<int32_t>(zero);
    if (p.symmetric) r.offset = QV_UNSIGNED ? p.activation_qmax : 0;
    else if (!QV_UNSIGNED) r.offset = p.activation_bits == 8 ? r.offset - 128 : 0;
    if (max_key > 0x7f800000 || min_key < ordered(static_cast<int32_t>(0xff800000))) r.scale = bits_float(0x7fc00000);
    return r;
}

static Params choose(const Linear& p, int64_t m, int32_t min_key, int32_t max_key) {
    float low = bits_float(static_cast<uint32_t>(ordered(min_key)));
    float high = bits_float(static_cast<uint32_t>(ordered(max_key)));
    const float qmax = static_cast<float>(p.activation_qmax);
    const bool finite = (float_bits(low) & 0x7f800000) != 0x7f800000 && (float_bits(high) & 0x7f800000) != 0x7f800000;
    const float clip_low = p.clip_low ? p.clip_low[m] : 1.0f, clip_high = p.clip_high ? p.clip_high[m] : 1.0f;
    Params r;
    r.divisor = 0.0f;
    if (p.symmetric) {
        const float span = (-low > high ? -low : high) * clip_high;
        if (p.arithmetic == kDivision) {
            r.scale = r.divisor = (span < 1e-10f ? 1e-10f : span) / qmax;
            r.inverse = 0.0f;
        } else if (p.arithmetic == kUnrounded) {
            const float unrounded = round_scale(span * (1.0f / qmax), kFloat32);
            r.scale = round_scale(unrounded, p.scale_dtype);
            r.inverse = 1.0f / unrounded;
        } else {
            r.scale = round_scale(span / qmax, p.scale_dtype);
            r.inverse = 1.0f / r.scale;
        }
        r.low = -qmax;
        r.high = qmax;
        r.offset = QV_UNSIGNED ? p.activation_qmax : 0;
    } else {
        low = (low > 0.0f ? 0.0f : low) * clip_low;
        high = (high < 0.0f ? 0.0f : high) * clip_high;
        r.scale = round_scale((high - low) / qmax, p.scale_dtype);
        r.inverse = 1.0f / r.scale;
        float zero = -low * r.inverse;
        zero = zero > 0.0f ? zero : 0.0f;  // a NaN too
        zero = zero < qmax ? zero : qmax;
        zero = rne(zero);
        r.low = -zero;
        r.high = qmax - zero;
        r.offset = static_cast<int32_t>(zero);
        if (!QV_UNSIGNED) r.offset = p.activation_bits == 8 ? r.offset - 128 : 0;
    }
    if (!finite || r.scale != r.scale) {
        r.scale = bits_float(0x7fc00000);
        r.inverse = r.divisor = r.low = r.high = 0.0f;
        r.offset = 0;
    }
    return r;
}

#if defined(QV_USE_AVX512)
#include "avx512.inl"
#elif defined(QV_USE_AVX2)
#include "avx2.inl"
#endif
#if defined(QV_USE_AVX512) || defined(QV_USE_AVX2)
#define QV_VECTOR_EPILOGUE
#include "vector_epilogue.inl"
#endif
#include "hadamard.inl"
#include "quantize.inl"
#include "epilogue.inl"
