// The quantized attention: the call, its two phases shared out among threads, and the code for every processor.
#include "attention.h"

#include <atomic>

namespace qv {
namespace {

#include "attention_pairs.inl"
#include "attention.inl"
#include "attention_gradient.inl"

AttentionTarget target_of(int32_t backend) {
#if defined(__x86_64__)
    if (backend == kAmx) return attention_amx();
    if (backend == kVnni) return attention_avx512();
    if (backend == kAvxVnni) return attention_avxvnni();
    if (backend == kAvx2) return attention_avx2();
#elif defined(__aarch64__)
    if (backend == kNeon) return attention_neon();
#endif
    (void)backend;
    return attention_portable();
}

struct Job {
    const Attention* call;
    const AttentionGradient* gradient;
    AttentionTarget target;
    int64_t items;
    std::atomic<int64_t> next{0};
};

void prepare_heads(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (int64_t head = job.next++; head < job.items; head = job.next++) job.target.prepare(*job.call, head);
}

void attend_rows(void* data) {
    Job& job = *static_cast<Job*>(data);
    const int64_t blocks = (job.call->queries + kQueryRows - 1) / kQueryRows;
    for (int64_t item = job.next++; item < job.items; item = job.next++)
        job.target.attend(*job.call, item / blocks, item % blocks * kQueryRows);
}

void differentiate_heads(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (int64_t head = job.next++; head < job.items; head = job.next++) job.target.gradient(*job.gradient, head);
}

// Items do not depend on each other: who takes which changes no bit.
void run(const Attention& call, const AttentionGradient* gradient, void (*work)(void*), int64_t items) {
    Job job;
    job.call = &call, job.gradient = gradient, job.target = target_of(call.backend), job.items = items;
    const int threads = static_cast<int>(items < call.threads ? items : call.threads);
    if (threads <= 1) return work(&job);
    parallel(work, &job, threads);
}

}  // namespace

AttentionTarget attention_portable() { return {sizeof(Code), prepare, attend, gradient}; }

}  // namespace qv

// Changes whenever the structures do.
QV_API int64_t qv_attention_size() { return sizeof(qv::AttentionGradient); }

QV_API int64_t qv_attention_work_bytes(const qv::Attention* call) {
    return call->batch * call->heads * qv::head_bytes(*call, qv::target_of(call->backend).code_bytes);
}

// `backend` must run here (qv_supported).
QV_API void qv_attention(const qv::Attention* call) {
    const int64_t heads = call->batch * call->heads;
    qv::run(*call, nullptr, qv::prepare_heads, heads);
    qv::run(*call, nullptr, qv::attend_rows, heads * ((call->queries + qv::kQueryRows - 1) / qv::kQueryRows));
}

// The same of `gradient->call.backend`.
QV_API void qv_attention_gradient(const qv::AttentionGradient* gradient) {
    const qv::Attention& call = gradient->call;
    qv::run(call, nullptr, qv::prepare_heads, call.batch * call.heads);
    qv::run(call, gradient, qv::differentiate_heads, call.batch * call.heads);
}
