// Errors of candidate ranges: the call, its division among threads, and the code for every processor.
#include "range_search.h"
#include "share_rows.h"

namespace qv {
namespace {

#include "range_search.inl"

RangeErrorsFunction function_of(int32_t backend) {
#if defined(__x86_64__)
    if (backend == kVnni || backend == kAmx) return range_errors_avx512();
    if (backend == kAvx2 || backend == kAvxVnni) return range_errors_avx2();
#endif
    (void)backend;
    return range_errors_portable();
}

}  // namespace

RangeErrorsFunction range_errors_portable() { return run_range_errors; }

}  // namespace qv

// Changes whenever the structure does.
QV_API int64_t qv_range_errors_size() { return sizeof(qv::RangeErrors); }

// `backend` must run here (qv_supported).
QV_API void qv_range_errors(const qv::RangeErrors* call) {
    qv::run_rows(*call, qv::function_of(call->backend), call->columns * call->candidates);
}
