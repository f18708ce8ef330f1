// Errors of candidate ranges by AVX-512 and AVX2: the same source, compiled for their registers.
#include "range_search.h"

#if defined(__x86_64__)
#include "target.h"

QV_TARGET_BEGIN(QV_AVX512_TARGET)

namespace qv {
namespace wide_ranges {
namespace {
#include "range_search.inl"
}  // namespace
}  // namespace wide_ranges

RangeErrorsFunction range_errors_avx512() { return wide_ranges::run_range_errors; }

}  // namespace qv

QV_TARGET_END
QV_TARGET_BEGIN("avx2,fma")

namespace qv {
namespace narrow_ranges {
namespace {
#include "range_search.inl"
}  // namespace
}  // namespace narrow_ranges

RangeErrorsFunction range_errors_avx2() { return narrow_ranges::run_range_errors; }

}  // namespace qv

QV_TARGET_END
#endif
