// Bits of numbers, rounding, and the 16-bit formats, in plain C++; included by body.inl and fake_quantize.inl.

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
