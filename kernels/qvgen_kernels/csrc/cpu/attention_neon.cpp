// The quantized attention by the dot product of 64-bit ARM: the source of the other processors around its products.
#include "attention.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "target.h"

QV_TARGET_BEGIN(QV_NEON_TARGET)

namespace qv {
namespace dot_attention {
namespace {
#include "neon_dot.inl"
#define QV_NEON
#include "attention_quads.inl"
#include "attention.inl"
#include "attention_gradient.inl"
#undef QV_NEON
}  // namespace
}  // namespace dot_attention

AttentionTarget attention_neon() {
    return {sizeof(dot_attention::Code), dot_attention::prepare, dot_attention::attend, dot_attention::gradient};
}

}  // namespace qv

QV_TARGET_END
#endif
