// A call over rows, shared out among threads.
#pragma once
#include "qv.h"

#include <atomic>

namespace qv {

constexpr int64_t kShare = 1 << 15;  // elements that are worth a thread

template <class Call>
struct RowJob {
    const Call* call;
    void (*run)(const Call&, int64_t, int64_t);
    int64_t rows, step;
    std::atomic<int64_t> next{0};
};

template <class Call>
void work_rows(void* data) {
    RowJob<Call>& job = *static_cast<RowJob<Call>*>(data);
    for (int64_t row = job.next.fetch_add(job.step); row < job.rows; row = job.next.fetch_add(job.step))
        job.run(*job.call, row, row + job.step < job.rows ? row + job.step : job.rows);
}

// Rows do not depend on each other: who takes which changes no bit.
template <class Call>
void run_rows(const Call& call, void (*run)(const Call&, int64_t, int64_t), int64_t columns) {
    const int64_t shares = call.rows * columns / kShare + 1;
    const int threads = static_cast<int>(shares < call.threads ? shares : call.threads);
    if (threads <= 1) return run(call, 0, call.rows);
    RowJob<Call> job;
    job.call = &call, job.run = run, job.rows = call.rows;
    job.step = (call.rows + 4 * threads - 1) / (4 * threads);
    parallel(work_rows<Call>, &job, threads);
}

}  // namespace qv
