// ARM's dot product of signed bytes, four to a lane; included inside of a namespace and target pragma.

static inline int32x4_t dot(int32x4_t sums, int8x16_t a, int8x16_t b) {
#if defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
    // Older clangs declare the intrinsic only where a compiler flag allows it everywhere.
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(a), "w"(b));
    return sums;
#else
    return vdotq_s32(sums, a, b);
#endif
}
