// Prepacking by AVX-512 and AVX2: 16 rows of codes are spread to bytes, then transposed by fours, in registers.
#include "prepack.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"

QV_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq")

namespace qv {
namespace wide {
namespace {

// Codes of columns [k, k + 64), one in each byte.
template <int kBits>
inline __m512i codes(const uint8_t* low, const uint8_t* high, int64_t k) {
    if (kBits > 4) return _mm512_loadu_si512(low + k);
    if (kBits == 4) {
        const __m512i two = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + k / 2)));
        return _mm512_and_si512(_mm512_or_si512(two, _mm512_slli_epi16(two, 4)), _mm512_set1_epi8(15));
    }
    const __m512i four = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + k / 4)));
    const __m512i pairs = _mm512_or_si512(four, _mm512_slli_epi32(four, 12));
    const __m512i found = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 6)), _mm512_set1_epi8(3));
    if (kBits == 2) return found;
    uint64_t bits;
    memcpy(&bits, high + k / 8, 8);
    return _mm512_mask_add_epi8(found, bits, found, _mm512_set1_epi8(4));
}

// Four columns of a 16 x 16 square of dwords stand in lane L of x[c], x[4 + c], x[8 + c], x[12 + c]: line 4 L + c to out.
inline __m512i store_lines(const __m512i* x, int c, int8_t* out) {
    const __m512i a = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), b = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88), e = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
    const __m512i line[4] = {_mm512_shuffle_i32x4(a, d, 0x88), _mm512_shuffle_i32x4(b, e, 0x88),
                             _mm512_shuffle_i32x4(a, d, 0xdd), _mm512_shuffle_i32x4(b, e, 0xdd)};
    __m512i sum = _mm512_setzero_si512();
    for (int q = 0; q < 4; ++q) {
        // Past the caches: nothing reads the packed weight before the model is called.
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + (4 * q + c) * 64), line[q]);
        sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(_mm512_set1_epi8(1), line[q]));
    }
    return sum;
}

template <int kBits>
void chunk(const PanelRows& rows, int64_t k, int64_t chunks, int8_t* out, int32_t* sums) {
    __m512i total = _mm512_loadu_si512(sums);
    for (int64_t i = 0; i < chunks; ++i, k += kChunk, out += kChunk * kLanes) {
        __m512i x[16];
#pragma GCC unroll 4
        for (int j = 0; j < 16; j += 4) {
            __m512i row[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r)
                row[r] = _mm512_sub_epi8(codes<kBits>(rows.low[j + r], rows.high[j + r], k),
                                         _mm512_set1_epi8(static_cast<char>(rows.zero[j + r])));
            const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpackhi_epi32(row[0], row[1]);
            const __m512i d = _mm512_unpacklo_epi32(row[2], row[3]), e = _mm512_unpackhi_epi32(row[2], row[3]);
            x[j] = _mm512_unpacklo_epi64(a, d);
            x[j + 1] = _mm512_unpackhi_epi64(a, d);
            x[j + 2] = _mm512_unpacklo_epi64(b, e);
            x[j + 3] = _mm512_unpackhi_epi64(b, e);
        }
        // 16 lines of two values each: at most 4096 in magnitude.
        __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) sum = _mm512_add_epi16(sum, store_lines(x, c, out));
        total = _mm512_add_epi32(total, _mm512_madd_epi16(sum, _mm512_set1_epi16(1)));
    }
    _mm512_storeu_si512(sums, total);
    _mm_sfence();
}

}  // namespace
}  // namespace wide

ChunkFunction chunk_avx512(int32_t bits) {
    return bits == 2 ? wide::chunk<2> : bits == 3 ? wide::chunk<3> : bits == 4 ? wide::chunk<4> : wide::chunk<8>;
}

}  // namespace qv

QV_TARGET_END
QV_TARGET_BEGIN("avx2")

namespace qv {
namespace narrow {
namespace {

// Codes of columns [k, k + 32), one in each byte.
template <int kBits>
inline __m256i codes(const uint8_t* low, const uint8_t* high, int64_t k) {
    if (kBits > 4) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + k));
    if (kBits == 4) {
        const __m256i two = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + k / 2)));
        return _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi16(two, 4)), _mm256_set1_epi8(15));
    }
    const __m256i four = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low + k / 4)));
    const __m256i pairs = _mm256_or_si256(four, _mm256_slli_epi32(four, 12));
    const __m256i found = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 6)), _mm256_set1_epi8(3));
    if (kBits == 2) return found;
    int32_t bits;
    memcpy(&bits, high + k / 8, 4);
    // Byte i gets the byte that holds its bit, and keeps that bit alone.
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit);
    return _mm256_or_si256(found, _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8(4)));
}

// Columns [k, k + 32) of rows [first, first + 8): half of each of 8 lines to out; sums of the values in pairs.
template <int kBits>
inline __m256i square(const PanelRows& rows, int first, int64_t k, int8_t* out) {
    __m256i x[8];
#pragma GCC unroll 2
    for (int j = 0; j < 8; j += 4) {
        __m256i row[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
            row[r] = _mm256_sub_epi8(codes<kBits>(rows.low[first + j + r], rows.high[first + j + r], k),
                                     _mm256_set1_epi8(static_cast<char>(rows.zero[first + j + r])));
        const __m256i a = _mm256_unpacklo_epi32(row[0], row[1]), b = _mm256_unpackhi_epi32(row[0], row[1]);
        const __m256i d = _mm256_unpacklo_epi32(row[2], row[3]), e = _mm256_unpackhi_epi32(row[2], row[3]);
        x[j] = _mm256_unpacklo_epi64(a, d);
        x[j + 1] = _mm256_unpackhi_epi64(a, d);
        x[j + 2] = _mm256_unpacklo_epi64(b, e);
        x[j + 3] = _mm256_unpackhi_epi64(b, e);
    }
    __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m256i line = _mm256_permute2x128_si256(x[c], x[4 + c], 0x20);
        const __m256i later = _mm256_permute2x128_si256(x[c], x[4 + c], 0x31);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + c * 64), line);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + (4 + c) * 64), later);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(1), line));
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(1), later));
    }
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

template <int kBits>
void chunk(const PanelRows& rows, int64_t k, int64_t chunks, int8_t* out, int32_t* sums) {
    for (int half = 0; half < 2; ++half) {
        __m256i* place = reinterpret_cast<__m256i*>(sums + 8 * half);
        __m256i total = _mm256_loadu_si256(place);
        for (int64_t i = 0; i < 2 * chunks; ++i)
            total = _mm256_add_epi32(total, square<kBits>(rows, 8 * half, k + 32 * i, out + 32 * i * kLanes + 32 * half));
        _mm256_storeu_si256(place, total);
    }
    _mm_sfence();
}

}  // namespace
}  // namespace narrow

ChunkFunction chunk_avx2(int32_t bits) {
    return bits == 2 ? narrow::chunk<2> : bits == 3 ? narrow::chunk<3> : bits == 4 ? narrow::chunk<4> : narrow::chunk<8>;
}

}  // namespace qv

QV_TARGET_END
#endif
