// Fake quantization: the calls, their division among threads, and the code for every processor.
#include "fake_quantize.h"
#include "share_rows.h"

namespace qv {
namespace {

#include "fake_quantize.inl"

FakeQuantizeCode code_of(int32_t backend) {
#if defined(__x86_64__)
    if (backend == kVnni || backend == kAmx) return fake_quantize_avx512();
    if (backend == kAvx2 || backend == kAvxVnni) return fake_quantize_avx2();
#endif
    (void)backend;
    return fake_quantize_portable();
}

}  // namespace

FakeQuantizeCode fake_quantize_portable() { return code(); }

}  // namespace qv

// Changes whenever one of the three structures does.
QV_API int64_t qv_fake_quantize_size() {
    return sizeof(qv::FakeQuantize) + sizeof(qv::ScaleOutput) + sizeof(qv::ScaleGradient);
}

// `backend` must run here (qv_supported); every backend computes the same bits, with any number of threads.
QV_API void qv_fake_quantize(const qv::FakeQuantize* call) {
    qv::run_rows(*call, qv::code_of(call->backend).quantize, call->groups * call->columns);
}

QV_API void qv_scale_output(const qv::ScaleOutput* call) {
    qv::run_rows(*call, qv::code_of(call->backend).scale_output, call->columns);
}

QV_API void qv_scale_gradient(const qv::ScaleGradient* call) {
    qv::run_rows(*call, qv::code_of(call->backend).scale_gradient, call->columns);
}
