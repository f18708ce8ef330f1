// The quantized attention by AVX-512 VNNI, AVX-VNNI and AVX2: the same source around their integer products.
#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"

QV_TARGET_BEGIN(QV_AVX512_TARGET)

namespace qv {
namespace wide_attention {
namespace {
#define QV_MAX512
#include "attention_quads.inl"
#include "attention.inl"
#include "attention_gradient.inl"
#undef QV_MAX512
}  // namespace
}  // namespace wide_attention

AttentionTarget attention_avx512() {
    return {sizeof(wide_attention::Code), wide_attention::prepare, wide_attention::attend, wide_attention::gradient};
}

}  // namespace qv

QV_TARGET_END
QV_TARGET_BEGIN("avx2,fma,f16c")

namespace qv {
namespace narrow_attention {
namespace {
#define QV_AVX2
#include "attention_pairs.inl"
#include "attention.inl"
#include "attention_gradient.inl"
}  // namespace
}  // namespace narrow_attention

AttentionTarget attention_avx2() {
    return {sizeof(narrow_attention::Code), narrow_attention::prepare, narrow_attention::attend, narrow_attention::gradient};
}

}  // namespace qv

QV_TARGET_END
QV_TARGET_BEGIN("avx2,fma,f16c,avxvnni")

namespace qv {
namespace quad_attention {
namespace {
#include "attention_quads.inl"
#include "attention.inl"
#include "attention_gradient.inl"
#undef QV_AVX2
}  // namespace
}  // namespace quad_attention

AttentionTarget attention_avxvnni() {
    return {sizeof(quad_attention::Code), quad_attention::prepare, quad_attention::attend, quad_attention::gradient};
}

}  // namespace qv

QV_TARGET_END
#endif
