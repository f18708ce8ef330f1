// Prepacking: memory, plain C++ for every processor and for the ends of rows, and the division among threads.
#include "prepack.h"

#include <atomic>

#include "pages.h"

namespace qv {
namespace {

// Eight codes from column k on, a multiple of 8, one in each byte (the first in the lowest).
uint64_t eight_codes(int32_t bits, const uint8_t* low, const uint8_t* high, int64_t k) {
    uint64_t found = 0;
    if (bits == 4) {
        for (int64_t j = 0; j < 4; ++j) found |= static_cast<uint64_t>(low[k / 2 + j]) << (8 * j);
        found = (found | found << 16) & 0x0000ffff0000ffff;
        found = (found | found << 8) & 0x00ff00ff00ff00ff;
        return (found | found << 4) & 0x0f0f0f0f0f0f0f0f;
    }
    found = low[k / 4] | static_cast<uint64_t>(low[k / 4 + 1]) << 8;
    found = (found | found << 24) & 0x000000ff000000ff;
    found = (found | found << 12) & 0x000f000f000f000f;
    found = (found | found << 6) & 0x0303030303030303;
    if (bits == 3) {
        uint64_t top = high[k / 8];
        top = (top | top << 28) & 0x0000000f0000000f;
        top = (top | top << 14) & 0x0003000300030003;
        found |= ((top | top << 7) & 0x0101010101010101) << 2;
    }
    return found;
}

uint8_t one_code(int32_t bits, const uint8_t* low, const uint8_t* high, int64_t k) {
    if (bits > 4) return low[k];
    if (bits == 4) return low[k / 2] >> (k % 2 * 4) & 15;
    const int two = low[k / 4] >> (k % 4 * 2) & 3;
    return static_cast<uint8_t>(bits == 3 ? two | (high[k / 8] >> (k % 8) & 1) << 2 : two);
}

// Codes of columns [k, k + columns) of a row.
void unpack(int32_t bits, const uint8_t* low, const uint8_t* high, int64_t k, int64_t columns, uint8_t* out) {
    int64_t done = 0;
    if (bits > 4) {
        memcpy(out, low + k, static_cast<size_t>(columns));
        return;
    }
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (k % 8 == 0) {
        for (; done + 8 <= columns; done += 8) {
            const uint64_t eight = eight_codes(bits, low, high, k + done);
            memcpy(out + done, &eight, 8);
        }
    }
#endif
    for (; done < columns; ++done) out[done] = one_code(bits, low, high, k + done);
}

// At most kChunk columns from k on, and zeros up to 4 * lines: any count of columns (0 too) and of rows.
void plain(int32_t bits, const PanelRows& rows, int64_t k, int64_t columns, int64_t lines, int8_t* out, int32_t* sums) {
    uint8_t value[kLanes][kChunk] = {};
    for (int64_t r = 0; columns > 0 && r < rows.count; ++r) {
        unpack(bits, rows.low[r], rows.high[r], k, columns, value[r]);
        int32_t sum = 0;
        for (int64_t c = 0; c < columns; ++c) {
            value[r][c] = static_cast<uint8_t>(value[r][c] - rows.zero[r]);
            sum += static_cast<int8_t>(value[r][c]);
        }
        sums[r] += sum;
    }
    for (int64_t q = 0; q < lines; ++q)
        for (int64_t r = 0; r < kLanes; ++r) memcpy(out + q * 64 + r * 4, &value[r][4 * q], 4);
}

struct Job {
    const Prepack* prepack;
    ChunkFunction chunks;     // null: plain alone
    PageRange pages;          // of the packed weight
    std::atomic<int64_t> next{0};
};

// Rows [16 * index, + 16) of the sources; `zero` points to the first group's zero points of each row.
void find_rows(const Prepack& p, int64_t index, PanelRows* rows, const uint8_t** zero) {
    *rows = {};
    int64_t first = index * kLanes;
    for (int64_t s = 0; s < p.sources && rows->count < kLanes; ++s) {
        const Planes& source = p.source[s];
        for (; first < source.rows && rows->count < kLanes; ++first) {
            const int64_t r = rows->count++;
            rows->low[r] = source.low + first * p.low_bytes;
            rows->high[r] = source.high ? source.high + first * p.high_bytes : nullptr;
            zero[r] = source.zero ? source.zero + first * p.zero_groups : nullptr;
        }
        first = first > source.rows ? first - source.rows : 0;
    }
}

void pack_panel(const Prepack& p, int64_t index, ChunkFunction chunks) {
    PanelRows rows;
    const uint8_t* zero[kLanes] = {};
    find_rows(p, index, &rows, zero);
    for (int64_t g = 0; g < p.groups; ++g) {
        for (int64_t r = 0; r < kLanes; ++r)
            rows.zero[r] = zero[r] ? zero[r][p.zero_groups == 1 ? 0 : g] : static_cast<uint8_t>(p.base);
        int8_t* out = p.packed + (index * p.groups + g) * p.padded_group * kLanes;
        int32_t sums[kLanes] = {};
        const int64_t k = g * p.group;
        int64_t done = 0;
        if (chunks && rows.count == kLanes && k % 8 == 0) {
            chunks(rows, k, p.group / kChunk, out, sums);
            done = p.group / kChunk * kChunk;
        }
        for (; done < p.padded_group; done += kChunk) {
            const int64_t columns = p.group - done < kChunk ? p.group - done : kChunk;
            const int64_t left = p.padded_group - done < kChunk ? p.padded_group - done : kChunk;
            plain(p.bits, rows, k + done, columns, left / 4, out + done * kLanes, sums);
        }
        memcpy(p.column_sum + g * p.padded_out + index * kLanes, sums, sizeof(sums));
    }
}

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    const int64_t panels = job.prepack->padded_out / kLanes;
    populate_pages(job.pages);
    for (int64_t i = job.next.fetch_add(1); i < panels; i = job.next.fetch_add(1)) pack_panel(*job.prepack, i, job.chunks);
}

ChunkFunction chunk_function(int32_t backend, int32_t bits) {
#if defined(__x86_64__)
    // Asked of the processor too: tests emulate these backends where it has no AVX-512.
    const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    if ((backend == kVnni || backend == kAmx) && avx512) return chunk_avx512(bits);
    if (backend == kAvx2 || backend == kAvxVnni) return chunk_avx2(bits);
#endif
    (void)backend, (void)bits;
    return nullptr;
}

}  // namespace
}  // namespace qv

// Changes whenever qv::Prepack or qv::Planes does.
QV_API int64_t qv_prepack_size() { return sizeof(qv::Prepack) + sizeof(qv::Planes); }

// `backend` must run here (qv_supported); every backend writes the same bytes, with any number of threads.
QV_API void qv_prepack(const qv::Prepack* prepack) {
    qv::Job job;
    job.prepack = prepack;
    // The lines of a packed weight are stored whole, which needs them aligned.
    const bool aligned = reinterpret_cast<uintptr_t>(prepack->packed) % 64 == 0;
    job.chunks = aligned ? qv::chunk_function(prepack->backend, prepack->bits) : nullptr;
    const int64_t panels = prepack->padded_out / qv::kLanes;
    const int64_t bytes = prepack->padded_out * prepack->groups * prepack->padded_group;
    qv::find_pages(job.pages, prepack->packed, static_cast<size_t>(bytes));
    qv::parallel(qv::work, &job, static_cast<int>(panels < prepack->threads ? panels : prepack->threads));
}
