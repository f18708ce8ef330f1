// Fake quantization: the calls, their division among threads, and the code for every processor.
#include "fake_quantize.h"

#include <atomic>

namespace qv {
namespace {

#include "fake_quantize.inl"

constexpr int64_t kShare = 1 << 15;  // elements that are worth a thread

template <class Call>
struct Job {
    const Call* call;
    void (*run)(const Call&, int64_t, int64_t);
    int64_t rows, step;
    std::atomic<int64_t> next{0};
};

template <class Call>
void work(void* data) {
    Job<Call>& job = *static_cast<Job<Call>*>(data);
    for (int64_t row = job.next.fetch_add(job.step); row < job.rows; row = job.next.fetch_add(job.step))
        job.run(*job.call, row, row + job.step < job.rows ? row + job.step : job.rows);
}

// Rows do not depend on each other: who takes which changes no bit.
template <class Call>
void run_rows(const Call& call, void (*run)(const Call&, int64_t, int64_t), int64_t columns) {
    const int64_t shares = call.rows * columns / kShare + 1;
    const int threads = static_cast<int>(shares < call.threads ? shares : call.threads);
    if (threads <= 1) return run(call, 0, call.rows);
    Job<Call> job;
    job.call = &call, job.run = run, job.rows = call.rows;
    job.step = (call.rows + 4 * threads - 1) / (4 * threads);
    parallel(work<Call>, &job, threads);
}

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
