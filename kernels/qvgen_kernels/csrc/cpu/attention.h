// The quantized attention on CPUs: one call, and what is compiled for each kind of processor. The contract is kernels/attention.md.
#pragma once
#include "qv.h"

namespace qv {

constexpr int64_t kKeys = 64;       // keys of a block, tokens of a partial sum of a mean
constexpr int64_t kQueryRows = 64;  // queries of one item of work, which share the keys that they read

// One call. Mirrored field by field in attention/cpu.py; pointers that may be null say so. Strides are in elements, the last
// dimension of q, k, v and y is contiguous.
struct Attention {
    int64_t batch, heads, queries, keys, head_size;
    const void *q, *k, *v;                              // [batch, heads, tokens, head_size]
    void* y;                                            // [batch, heads, queries, head_size] of v's type
    int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row;
    const uint8_t* mask;                                // bytes, 0: hidden; null: every key is seen
    int64_t mask_batch, mask_head, mask_row, mask_key;  // 0 where all share one
    const float *query_clip, *key_clip;                 // [heads]; null: 1
    uint8_t* work;                                      // qv_attention_work_bytes, 64-byte aligned
    float factor;                                       // of scores: softmax scale times log2(e)
    int32_t score_dtype, value_dtype;                   // of q and k, and of v and y: a Dtype
    int32_t smooth_key, backend, threads;
    int32_t plain;                                      // 1: values are not quantized, and probabilities have their type
};

// The sums of one call's gradient. Mirrored by CAttentionGradient; "padded" are sizes as padded_head and whole blocks of keys give
// them, and what is added there is zeros.
struct AttentionGradient {
    Attention call;                              // without y
    const float *grad, *query;                   // [batch, heads, queries, padded head size]: of y; dequantized queries
    const float *key, *value;                    // [batch, heads, padded keys, padded head size], [.., blocks, padded head size, 64]
    float *grad_query, *grad_key, *grad_value;   // as query, key and key; zeros when the call begins
};

// What one head's keys and values become. Codes lie as the products of the processor want them; there are none of plain values.
struct HeadCodes {
    uint8_t *keys, *values;
    float *key_scale, *value_scale, *value_mean;  // [blocks * 64], [padded head size] twice
    float *steepest, *bad;                        // [1]: most that a query's factor of scores may be; 1 where a number is not finite
};

// How a kind of processor computes.
struct AttentionTarget {
    int64_t code_bytes;
    void (*prepare)(const Attention&, int64_t head);
    void (*attend)(const Attention&, int64_t head, int64_t row);
    void (*gradient)(const AttentionGradient&, int64_t head);
};

AttentionTarget attention_portable();
AttentionTarget attention_avx2();
AttentionTarget attention_avxvnni();
AttentionTarget attention_avx512();
AttentionTarget attention_amx();
AttentionTarget attention_neon();

inline int64_t padded_head(const Attention& p) { return (p.head_size + 15) / 16 * 16; }
inline int64_t key_blocks(const Attention& p) { return (p.keys + kKeys - 1) / kKeys; }

inline int64_t head_bytes(const Attention& p, int64_t code_bytes) {
    const int64_t tokens = key_blocks(p) * kKeys, codes = tokens * (p.head_size + (p.plain ? 0 : padded_head(p))) * code_bytes;
    return (codes + (tokens + 2 * padded_head(p) + 2) * 4 + 127) / 64 * 64;
}

inline HeadCodes head_codes(const Attention& p, int64_t head, int64_t code_bytes) {
    const int64_t tokens = key_blocks(p) * kKeys;
    HeadCodes h;
    h.keys = p.work + head * head_bytes(p, code_bytes);
    h.values = h.keys + tokens * p.head_size * code_bytes;
    h.key_scale = reinterpret_cast<float*>(h.values + (p.plain ? 0 : tokens * padded_head(p) * code_bytes));
    h.value_scale = h.key_scale + tokens;
    h.value_mean = h.value_scale + padded_head(p);
    h.steepest = h.value_mean + padded_head(p);
    h.bad = h.steepest + 1;
    return h;
}

}  // namespace qv
