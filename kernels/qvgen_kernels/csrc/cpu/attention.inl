// Quantization, block softmax and running sums of the attention, included once for each kind of processor after its products.

#include "wide.inl"


// The greater of two numbers each, the second where they are equal or one is NaN.
#if defined(QV_MAX512) && !defined(QV_AVX512_EMULATE)
QV_INLINE Wide greater(const Wide& a, const Wide& b) {
    return reinterpret_cast<Wide>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#else
QV_INLINE Wide greater(const Wide& a, const Wide& b) { return a > b ? a : b; }
#endif

// a b + c, rounded once.
#if defined(QV_MAX512) && !defined(QV_AVX512_EMULATE)
QV_INLINE Wide fused(const Wide& a, const Wide& b, const Wide& c) {
    return reinterpret_cast<Wide>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
}
#elif defined(QV_MAX512) || defined(QV_AVX2)
QV_INLINE Wide fused(const Wide& a, const Wide& b, const Wide& c) {
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    memcpy(z, &c, sizeof z);
    x[0] = _mm256_fmadd_ps(x[0], y[0], z[0]);
    x[1] = _mm256_fmadd_ps(x[1], y[1], z[1]);
    Wide v;
    memcpy(&v, x, sizeof v);
    return v;
}
#elif defined(QV_NEON)
QV_INLINE Wide fused(const Wide& a, const Wide& b, const Wide& c) {
    float32x4_t x[4], y[4], z[4];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    memcpy(z, &c, sizeof z);
    for (int i = 0; i < 4; ++i) z[i] = vfmaq_f32(z[i], x[i], y[i]);
    Wide v;
    memcpy(&v, z, sizeof v);
    return v;
}
#else  // a call of the C library where the processor has no such instruction
QV_INLINE Wide fused(const Wide& a, const Wide& b, const Wide& c) {
    Wide v;
    for (int i = 0; i < 16; ++i) v[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return v;
}
#endif

typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));
typedef int32_t HalfMask __attribute__((vector_size(32)));
typedef int32_t QuarterMask __attribute__((vector_size(16)));

#include "attention_sums.inl"

constexpr float kRound = 12582912.0f;

static inline int32_t int_bits(float f) { int32_t i; memcpy(&i, &f, 4); return i; }

static void load_tokens(const void* base, int32_t dtype, int64_t offset, int64_t count, float* out) {
    if (dtype == kFloat32) {
        memcpy(out, static_cast<const float*>(base) + offset, count * sizeof(float));
    } else if (dtype == kBfloat16) {
        const uint16_t* x = static_cast<const uint16_t*>(base) + offset;
        for (int64_t i = 0; i < count; ++i) out[i] = bits_float(static_cast<uint32_t>(x[i]) << 16);
    } else {
        const uint16_t* x = static_cast<const uint16_t*>(base) + offset;
        for (int64_t i = 0; i < count; ++i) out[i] = from_float16(x[i]);
    }
}

static void store_row(void* base, int32_t dtype, int64_t offset, int64_t count, const float* row) {
    if (dtype == kFloat32) {
        memcpy(static_cast<float*>(base) + offset, row, count * sizeof(float));
    } else if (dtype == kBfloat16) {
        uint16_t* y = static_cast<uint16_t*>(base) + offset;
        for (int64_t i = 0; i < count; ++i) y[i] = to_bfloat16(row[i]);
    } else {
        uint16_t* y = static_cast<uint16_t*>(base) + offset;
        for (int64_t i = 0; i < count; ++i) y[i] = to_float16(row[i]);
    }
}

// The largest magnitude; a NaN counts as more than infinity.
static float largest(const float* row, int64_t count, float before) {
    int32_t most = int_bits(before);
    for (int64_t i = 0; i < count; ++i) {
        const int32_t bits = int_bits(row[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return bits_float(static_cast<uint32_t>(most));
}

static float scale_of(float most) {
    const float scale = most / 127.0f;
    return scale < 1e-8f ? 1e-8f : scale;  // a NaN stays
}

static bool is_finite(float x) { return (float_bits(x) & 0x7f800000) != 0x7f800000; }

static int32_t code_of(float x, float inverse) {
    float v = rne(x * inverse);
    v = v > -127.0f ? v : -127.0f;
    return static_cast<int32_t>(v < 127.0f ? v : 127.0f);
}

// Mean over tokens: sums of 64 tokens one after another, then these sums.
static void token_mean(const void* base, int32_t dtype, int64_t offset, int64_t stride, int64_t tokens, int64_t size, float* mean,
                       float* row, float* part) {
    for (int64_t d = 0; d < size; ++d) mean[d] = 0.0f;
    for (int64_t t = 0; t < tokens; ++t) {
        const bool is_first = t % kKeys == 0;
        load_tokens(base, dtype, offset + t * stride, size, is_first ? part : row);
        if (!is_first)
            for (int64_t d = 0; d < size; ++d) part[d] += row[d];
        if ((t + 1) % kKeys == 0 || t + 1 == tokens)
            for (int64_t d = 0; d < size; ++d) mean[d] += part[d];
    }
    for (int64_t d = 0; d < size; ++d) mean[d] /= static_cast<float>(tokens);
}

static void prepare_keys(const Attention& p, int64_t head, const HeadCodes& out, float* mean, float* row, float* part) {
    constexpr float kLargestKey = 1.2676506002282294e30f;  // 2^100
    float most = 0.0f;
    const int64_t size = p.head_size, offset = head / p.heads * p.k_batch + head % p.heads * p.k_head;
    Code* codes = reinterpret_cast<Code*>(out.keys);
    if (p.smooth_key) token_mean(p.k, p.score_dtype, offset, p.k_row, p.keys, size, mean, row, part);
    for (int64_t t = 0; t < key_blocks(p) * kKeys; ++t) {
        Code* place = codes + t / kKeys * kKeys * size + t % kKeys * kPack;
        const bool is_key = t < p.keys;
        float scale = 0.0f;
        if (is_key) {
            load_tokens(p.k, p.score_dtype, offset + t * p.k_row, size, row);
            if (p.smooth_key)
                for (int64_t d = 0; d < size; ++d) row[d] -= mean[d];
            scale = scale_of(largest(row, size, 0.0f) * (p.key_clip ? p.key_clip[head % p.heads] : 1.0f));
            if (!(scale < kLargestKey)) *out.bad = 1.0f;
            most = scale > most ? scale : most;
        }
        out.key_scale[t] = scale;
        const bool is_coded = is_key && scale < kLargestKey;
        const float inverse = is_coded ? 1.0f / scale : 0.0f;
        for (int64_t d = 0; d < size; ++d)
            place[d / kPack * kKeys * kPack + d % kPack] = static_cast<Code>((is_coded ? code_of(row[d], inverse) : 0) + kKeyShift);
    }
    *out.steepest = 1.0f / most;
}

// Whether every value of a head is below 2^88; what is as large, or a NaN, is not finite.
static bool has_plain_values(const Attention& p, int64_t offset, float* row) {
    float most = 0.0f;
    for (int64_t t = 0; t < p.keys; ++t) {
        load_tokens(p.v, p.value_dtype, offset + t * p.v_row, p.head_size, row);
        most = largest(row, p.head_size, most);
    }
    return most < 3.0948500982134507e26f;
}

static void prepare_values(const Attention& p, int64_t head, const HeadCodes& out, float* mean, float* row, float* part) {
    const int64_t size = p.head_size, columns = padded_head(p);
    const int64_t offset = head / p.heads * p.v_batch + head % p.heads * p.v_head;
    Code* codes = reinterpret_cast<Code*>(out.values);
    if (p.plain) {
        if (!has_plain_values(p, offset, row)) *out.bad = 1.0f;
        for (int64_t d = 0; d < columns; ++d) out.value_scale[d] = 1.0f, out.value_mean[d] = 0.0f;
        return;
    }
    token_mean(p.v, p.value_dtype, offset, p.v_row, p.keys, size, mean, row, part);
    float* most = out.value_scale;
    for (int64_t d = 0; d < columns; ++d) most[d] = out.value_mean[d] = 0.0f;
    for (int64_t t = 0; t < p.keys; ++t) {
        load_tokens(p.v, p.value_dtype, offset + t * p.v_row, size, row);
        for (int64_t d = 0; d < size; ++d) {
            const float v = row[d] - mean[d];
            most[d] = largest(&v, 1, most[d]);
        }
    }
    for (int64_t d = 0; d < size; ++d) {
        out.value_mean[d] = mean[d];
        most[d] = scale_of(most[d]);
        part[d] = is_finite(most[d]) ? 1.0f / most[d] : 0.0f;
        if (!is_finite(most[d])) *out.bad = 1.0f;
    }
    memset(codes, 0, static_cast<size_t>(key_blocks(p) * kKeys * columns) * sizeof(Code));
    if (*out.bad != 0.0f) return;
    for (int64_t t = 0; t < p.keys; ++t) {
        Code* place = codes + t / kPack * columns * kPack + t % kPack;
        load_tokens(p.v, p.value_dtype, offset + t * p.v_row, size, row);
        for (int64_t d = 0; d < size; ++d) place[d * kPack] = static_cast<Code>(code_of(row[d] - mean[d], part[d]));
    }
}

static void prepare(const Attention& p, int64_t head) {
    const HeadCodes out = head_codes(p, head, sizeof(Code));
    float* mean = static_cast<float*>(scratch(kSlotRow, 3 * 256 * sizeof(float)));
    *out.bad = 0.0f;
    prepare_keys(p, head, out, mean, mean + 256, mean + 512);
    prepare_values(p, head, out, mean, mean + 256, mean + 512);
}

// Everything that a block of queries is computed in.
struct Rows {
    Code *codes, *probabilities;   // [64][padded head size], [kGroup][64]
    int32_t *scores, *sums, *first;  // [kGroup][64], [kGroup][padded head size], [64]: the shift of keys, times the sum of a query
    float *total, *weight, *top, *scale, *row;  // [64][padded head size], [64] each, one row
    float *plain, *values, *products;           // of plain values: probabilities [kGroup][64], a block of values [64][padded head
    bool *bad;                                  // size], their sums [kGroup][padded head size]
};

static Rows rows_of(const Attention& p) {
    const int64_t columns = padded_head(p);
    Rows r;
    r.codes = static_cast<Code*>(scratch(kSlotCodes, (kQueryRows * columns + kGroup * kKeys) * sizeof(Code)));
    r.probabilities = r.codes + kQueryRows * columns;
    r.scores = static_cast<int32_t*>(scratch(kSlotTile, (kGroup * (kKeys + columns) + kQueryRows) * 4));
    r.sums = r.scores + kGroup * kKeys;
    r.first = r.sums + kGroup * columns;
    r.total = static_cast<float*>(scratch(kSlotVectors, (kQueryRows * (columns + 4) + columns) * 4));
    r.weight = r.total + kQueryRows * columns;
    r.top = r.weight + kQueryRows;
    r.scale = r.top + kQueryRows;
    r.bad = reinterpret_cast<bool*>(r.scale + kQueryRows);
    r.row = r.scale + 2 * kQueryRows;
    r.plain = r.values = r.products = nullptr;
    if (!p.plain) return r;
    r.plain = static_cast<float*>(scratch(kSlotRow, (kGroup * (kKeys + columns) + kKeys * columns) * sizeof(float)));
    r.values = r.plain + kGroup * kKeys;
    r.products = r.values + kKeys * columns;
    return r;
}

static void quantize_query(const Attention& p, int64_t head, int64_t m, int64_t slot, const HeadCodes& h, const Rows& r) {
    const int64_t size = p.head_size, columns = padded_head(p);
    Code* codes = r.codes + slot * columns;
    load_tokens(p.q, p.score_dtype, head / p.heads * p.q_batch + head % p.heads * p.q_head + m * p.q_row, size, r.row);
    const float scale = scale_of(largest(r.row, size, 0.0f) * (p.query_clip ? p.query_clip[head % p.heads] : 1.0f));
    r.scale[slot] = scale * p.factor;
    r.bad[slot] = !is_finite(r.scale[slot]);
    const float inverse = r.bad[slot] ? 0.0f : 1.0f / scale;
    int32_t sum = 0;
    for (int64_t d = 0; d < columns; ++d) {
        const int32_t code = d < size && !r.bad[slot] ? code_of(r.row[d], inverse) : 0;
        codes[d] = static_cast<Code>(code);
        sum += code;
    }
    if (r.scale[slot] > *h.steepest) r.scale[slot] = *h.steepest;
    if (r.bad[slot]) r.scale[slot] = 0.0f;
    r.first[slot] = -kKeyShift * sum;
    r.top[slot] = bits_float(0xff800000);
    r.weight[slot] = 0.0f;
    for (int64_t d = 0; d < columns; ++d) r.total[slot * columns + d] = 0.0f;
}

QV_INLINE float largest_lane(const Wide& v) {
    Half low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    low = low > high ? low : high;
    Quarter a, b;
    memcpy(&a, &low, sizeof a);
    memcpy(&b, reinterpret_cast<const char*>(&low) + sizeof a, sizeof b);
    a = a > b ? a : b;
    const float even = a[0] > a[2] ? a[0] : a[2], odd = a[1] > a[3] ? a[1] : a[3];
    return even > odd ? even : odd;
}

QV_INLINE int32_t sum_lanes(const WideMask& v) {
    HalfMask low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    low += high;
    QuarterMask a, b;
    memcpy(&a, &low, sizeof a);
    memcpy(&b, reinterpret_cast<const char*>(&low) + sizeof a, sizeof b);
    a += b;
    return (a[0] + a[2]) + (a[1] + a[3]);
}

typedef Code CodeLanes __attribute__((vector_size(16 * sizeof(Code))));
typedef uint32_t WideBits __attribute__((vector_size(64)));

// 2^(g - 1) / g for g in [1, 2]: times 254.5 / 256 by a quadratic, and by a cubic.
QV_INLINE Wide quotient(const Wide& g) {
    return fused(fused(all(0.23233066499233246f), g, all(-0.6901440024375916f)), g, all(1.4485299587249756f));
}

QV_INLINE Wide fine_quotient(const Wide& g) {
    const Wide upper = fused(fused(all(-0.10644568502902985f), g, all(0.7074757218360901f)), g, all(-1.3773075342178345f));
    return fused(upper, g, all(1.775614619255066f));
}

// Numbers with fewer bits: nearest, halves to even, as a float32 number becomes one of bfloat16 or float16 in their normal range.
QV_INLINE WideBits rounded_bits(const WideBits& bits, uint32_t dropped) {
    return (bits + ((1u << dropped >> 1) - 1u) + ((bits >> dropped) & 1u)) & ~((1u << dropped) - 1u);
}

// One query's probabilities for a block of keys: codes, or whole numbers without their last `dropped` bits as float32. Returns their
// sum, and the exponent that they are relative to.
template <bool kPlain>
QV_INLINE int32_t probabilities(const int32_t* scores, const float* key_scale, float scale, const WideMask* hidden, uint32_t dropped,
                                void* out, float* exponent) {
    const float lowest = bits_float(0xff800000);
    Wide z[4];
    for (int c = 0; c < 4; ++c) {
        WideMask whole;
        memcpy(&whole, scores + c * kLane, sizeof whole);
        z[c] = __builtin_convertvector(whole, Wide) * load(key_scale + c * kLane);
        if (hidden) z[c] = hidden[c] ? all(lowest) : z[c];
    }
    const float most = largest_lane(greater(greater(z[0], z[1]), greater(z[2], z[3])));
    *exponent = lowest;
    if (most == lowest) return 0;
    const float x = most * scale, top = ((x + (__builtin_fabsf(x) * 2.384185791015625e-7f + 0.5f)) + kRound) - kRound;
    *exponent = top;
    const Wide slope = all(scale * -0.03125f), start = all(top * 0.03125f + 0.5f);
    WideBits sum = {};
    for (int c = 0; c < 4; ++c) {
        Wide u = fused(z[c], slope, start), v, g;
        u = u < all(1.0f) ? u : all(1.0f);  // 1/2 + d / 32
        WideBits bits;
        memcpy(&bits, &u, sizeof bits);
        bits = (kPlain ? 0x37000000u : 0x33800000u) - (bits << 4);  // 2^n g, with n + g - 1 = 15 - d or 8 - d
        memcpy(&v, &bits, sizeof v);
        bits = (bits & 0x7fffffu) | 0x3f800000u;
        memcpy(&g, &bits, sizeof g);
        v = fused(v, kPlain ? fine_quotient(g) : quotient(g), all(kRound));
        if (kPlain) {
            v = v - all(kRound);
            memcpy(&bits, &v, sizeof bits);
            if (dropped) bits = rounded_bits(bits, dropped);
            if (hidden) bits = hidden[c] ? WideBits{} : bits;
            memcpy(&v, &bits, sizeof v);
            keep(static_cast<float*>(out) + c * kLane, v);
            sum += (WideBits)__builtin_convertvector(v, WideMask);
            continue;
        }
        memcpy(&bits, &v, sizeof bits);
        bits &= 0xffu;
        if (hidden) bits = hidden[c] ? WideBits{} : bits;
        sum += bits;
        const CodeLanes codes = __builtin_convertvector(bits, CodeLanes);
        memcpy(static_cast<Code*>(out) + c * kLane, &codes, sizeof codes);
    }
    return sum_lanes(__builtin_convertvector(sum, WideMask));
}

// 2^z of whole numbers z up to 0, but no less than 2^-64.
static float power(float z) {
    return bits_float(static_cast<uint32_t>(static_cast<int32_t>(z > -64.0f ? z : -64.0f) + 127) << 23);
}

QV_INLINE Wide sums_of(const float* sums) { return load(sums); }
QV_INLINE Wide sums_of(const int32_t* sums) {
    WideMask whole;
    memcpy(&whole, sums, sizeof whole);
    return __builtin_convertvector(whole, Wide);
}

// Add a block's sums of one query to what is there.
template <typename Sum>
static void add_block(const Rows& r, int64_t slot, int64_t columns, const Sum* sums, int32_t weight, float exponent) {
    float* total = r.total + slot * columns;
    const float before = r.top[slot], top = exponent > before ? exponent : before;
    const float factor = power(exponent - top);
    if (top != before) {
        const float shrink = power(before - top), least = 7.888609052210118e-31f;
        for (int64_t d = 0; d < columns; ++d) {
            const float kept = total[d] * shrink;
            total[d] = __builtin_fabsf(kept) < least ? 0.0f : kept;
        }
        const float kept = r.weight[slot] * shrink;
        r.weight[slot] = kept < least ? 0.0f : kept;
    }
    for (int64_t d = 0; d < columns; d += kLane) keep(total + d, load(total + d) + sums_of(sums + d) * factor);
    r.weight[slot] += static_cast<float>(weight) * factor;
    r.top[slot] = top;
}

// Which of a block's keys a query does not see, in lanes of -1 and 0; null where it sees all.
static const WideMask* hidden_keys(const Attention& p, int64_t head, int64_t m, int64_t begin, WideMask* place) {
    if (!p.mask && begin + kKeys <= p.keys) return nullptr;
    const uint8_t* mask = p.mask;
    if (mask) mask += head / p.heads * p.mask_batch + head % p.heads * p.mask_head + m * p.mask_row;
    for (int64_t j = 0; j < kKeys; ++j) {
        const bool is_seen = begin + j < p.keys && (!mask || mask[(begin + j) * p.mask_key]);
        place[j / kLane][j % kLane] = is_seen ? 0 : -1;
    }
    return place;
}

// Bits of float32 that a type of values does not have.
static uint32_t dropped_bits(const Attention& p) { return p.value_dtype == kFloat32 ? 0 : p.value_dtype == kBfloat16 ? 16 : 13; }

template <bool kPlain>
static void code_rows(const Attention& p, int64_t head, int64_t m, int64_t slot, int64_t count, int64_t begin, const HeadCodes& h,
                      const Rows& r, int32_t* weight, float* exponent) {
    const float* key_scale = h.key_scale + begin;
    const uint32_t dropped = dropped_bits(p);
    WideMask place[4];
    for (int64_t i = 0; i < count; ++i) {
        const WideMask* hidden = hidden_keys(p, head, m + i, begin, place);
        const int32_t* row = r.scores + i * kKeys;
        const float scale = r.scale[slot + i];
        void* out = kPlain ? static_cast<void*>(r.plain + i * kKeys) : static_cast<void*>(r.probabilities + i * kKeys);
        weight[i] = hidden ? probabilities<kPlain>(row, key_scale, scale, hidden, dropped, out, exponent + i)
                           : probabilities<kPlain>(row, key_scale, scale, nullptr, dropped, out, exponent + i);
        if (!weight[i]) memset(out, 0, kKeys * (kPlain ? sizeof(float) : sizeof(Code)));
    }
}

// Probabilities of `count` queries from `slot` on for one block of keys; their sums and exponents.
static void code_group(const Attention& p, int64_t head, int64_t m, int64_t slot, int64_t count, int64_t begin, const HeadCodes& h,
                       const Rows& r, int32_t* weight, float* exponent) {
    const Code* keys = reinterpret_cast<const Code*>(h.keys) + begin * p.head_size;
    const int64_t columns = padded_head(p);
    scores(r.codes + slot * columns, columns, keys, p.head_size / kPack, r.first + slot, count, r.scores);
    if (p.plain)
        code_rows<true>(p, head, m, slot, count, begin, h, r, weight, exponent);
    else
        code_rows<false>(p, head, m, slot, count, begin, h, r, weight, exponent);
}

// `count` queries from `slot` on against one block of keys.
static void attend_group(const Attention& p, int64_t head, int64_t m, int64_t slot, int64_t count, int64_t begin, const HeadCodes& h,
                         const Rows& r) {
    const int64_t columns = padded_head(p);
    const Code* values = reinterpret_cast<const Code*>(h.values) + begin * columns;
    int32_t weight[kGroup];
    float exponent[kGroup];
    code_group(p, head, m, slot, count, begin, h, r, weight, exponent);
    if (p.plain) {
        memset(r.products, 0, static_cast<size_t>(count * columns) * sizeof(float));
        accumulate({r.plain, kKeys, 1}, count, r.values, columns, kKeys, columns, r.products, columns);
    } else {
        sums_of_values(r.probabilities, values, columns, count, r.sums);
    }
    for (int64_t i = 0; i < count; ++i) {
        if (!weight[i]) continue;
        if (p.plain)
            add_block(r, slot + i, columns, r.products + i * columns, weight[i], exponent[i]);
        else
            add_block(r, slot + i, columns, r.sums + i * columns, weight[i], exponent[i]);
    }
}

// One block of plain values as float32; tokens and columns that there are not are zeros.
static void load_values(const Attention& p, int64_t head, int64_t begin, const Rows& r) {
    const int64_t columns = padded_head(p), offset = head / p.heads * p.v_batch + head % p.heads * p.v_head;
    memset(r.values, 0, static_cast<size_t>(kKeys * columns) * sizeof(float));
    for (int64_t j = 0; j < kKeys && begin + j < p.keys; ++j)
        load_tokens(p.v, p.value_dtype, offset + (begin + j) * p.v_row, p.head_size, r.values + j * columns);
}

// Running sums of `count` queries from `row` on over all blocks of keys.
static void attend_block(const Attention& p, int64_t head, int64_t row, int64_t count, const HeadCodes& h, const Rows& r) {
    for (int64_t i = 0; i < count; ++i) quantize_query(p, head, row + i, i, h, r);
    for (int64_t begin = 0; begin < p.keys && *h.bad == 0.0f; begin += kKeys) {
        if (p.plain) load_values(p, head, begin, r);
        for (int64_t slot = 0; slot < count; slot += kGroup)
            attend_group(p, head, row + slot, slot, count - slot < kGroup ? count - slot : kGroup, begin, h, r);
    }
}

static void finish(const Attention& p, int64_t head, int64_t m, int64_t slot, const HeadCodes& h, const Rows& r) {
    const float* total = r.total + slot * padded_head(p);
    const bool is_bad = r.bad[slot] || *h.bad != 0.0f, is_lonely = r.weight[slot] == 0.0f;
    const float inverse = 1.0f / (is_lonely ? 1.0f : r.weight[slot]);
    for (int64_t d = 0; d < p.head_size; ++d) {
        const float y = total[d] * inverse * h.value_scale[d] + h.value_mean[d];
        r.row[d] = is_bad ? bits_float(0x7fc00000) : is_lonely ? 0.0f : y;
    }
    store_row(p.y, p.value_dtype, head / p.heads * p.y_batch + head % p.heads * p.y_head + m * p.y_row, p.head_size, r.row);
}

static void attend(const Attention& p, int64_t head, int64_t row) {
    const HeadCodes h = head_codes(p, head, sizeof(Code));
    const Rows r = rows_of(p);
    const int64_t count = p.queries - row < kQueryRows ? p.queries - row : kQueryRows;
    begin_products(p);
    attend_block(p, head, row, count, h, r);
    end_products();
    for (int64_t i = 0; i < count; ++i) finish(p, head, row + i, i, h, r);
}
