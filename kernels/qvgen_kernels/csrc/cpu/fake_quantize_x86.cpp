// Fake quantization by AVX-512 and AVX2: the same source, compiled for their registers.
#include "fake_quantize.h"

#if defined(__x86_64__)
#include "target.h"

QV_TARGET_BEGIN(QV_AVX512_TARGET)

namespace qv {
namespace wide_rows {
namespace {
#include "fake_quantize.inl"
}  // namespace
}  // namespace wide_rows

FakeQuantizeCode fake_quantize_avx512() { return wide_rows::code(); }

}  // namespace qv

QV_TARGET_END
QV_TARGET_BEGIN("avx2,fma")

namespace qv {
namespace narrow_rows {
namespace {
#include "fake_quantize.inl"
}  // namespace
}  // namespace narrow_rows

FakeQuantizeCode fake_quantize_avx2() { return narrow_rows::code(); }

}  // namespace qv

QV_TARGET_END
#endif
