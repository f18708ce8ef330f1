// The quantized attention by AMX: the source of the other processors around its tiles.
#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "amx_tiles.h"
#include "target.h"

#if !defined(QV_AMX_EMULATE)
QV_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")
#elif defined(QV_AVX512_EMULATE)
QV_TARGET_BEGIN(QV_AVX512_TARGET)
#endif

namespace qv {
namespace amx {
namespace {
#define QV_MAX512
#include "attention_tiles.inl"
#include "attention.inl"
#include "attention_gradient.inl"
}  // namespace
}  // namespace amx

AttentionTarget attention_amx() { return {sizeof(amx::Code), amx::prepare, amx::attend, amx::gradient}; }

}  // namespace qv

#if !defined(QV_AMX_EMULATE) || defined(QV_AVX512_EMULATE)
QV_TARGET_END
#endif
#endif
