// The C ABI, the choice of what this CPU can run, threads, and memory of a thread.
#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "pages.h"
#include "qv.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace qv {
namespace {

struct Arena {
    void* memory[kSlots] = {};
    size_t bytes[kSlots] = {};
    ~Arena() {
        for (void* piece : memory) std::free(piece);
    }
};
thread_local Arena arena;

// Shared by the threads of one call. An item is a block of rows times a run of outputs.
struct Call {
    const Linear* linear;
    RunFunction run;
    int64_t row_block, column_block, row_items, column_items;
    PageRange pages;  // of the outputs
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
};

constexpr int64_t kSharedItems = 4;           // items of one thread, where there are rows enough
constexpr int64_t kSharedBytes = 512 << 10;  // of codes in such an item at least

void work(void* data) {
    Call& call = *static_cast<Call*>(data);
    const Linear& p = *call.linear;
    populate_pages(call.pages);
    for (;;) {
        const int64_t item = call.next.fetch_add(1);
        if (item >= call.row_items * call.column_items || call.out_of_memory) return;
        const int64_t m0 = item / call.column_items * call.row_block, n0 = item % call.column_items * call.column_block;
        const int64_t m1 = m0 + call.row_block, n1 = n0 + call.column_block;
        try {
            call.run(p, m0, m1 < p.rows ? m1 : p.rows, n0, n1 < p.out_features ? n1 : p.out_features);
        } catch (const std::bad_alloc&) {
            call.out_of_memory = true;
        }
    }
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

bool backend_of(int32_t id, BackendInfo* info) {
    switch (id) {
        case kPortable: *info = portable_backend(); return true;
#if defined(__x86_64__)
        case kAvx2: *info = avx2_backend(); return true;
        case kAvxVnni: *info = avxvnni_backend(); return true;
        case kVnni: *info = vnni_backend(); return true;
        case kAmx: *info = amx_backend(); return true;
#endif
#if defined(__aarch64__)
        case kNeon: *info = neon_backend(); return true;
#endif
        default: return false;
    }
}

// Rows of one item: as many as their codes may fill of a cache (code_bytes), in whole tiles. On several threads every one gets
// as many items as the others, and some small ones (kSharedBytes of codes) rather than one: a thread that the machine disturbs
// then leaves work to the rest. With fewer rows than that the outputs are divided too, and each part quantizes its rows itself.
void divide(Call& call, const BackendInfo& info) {
    const Linear& p = *call.linear;
    const int64_t tile = info.tile_rows, threads = p.threads;
    int64_t rows = info.code_bytes / p.padded_in / tile * tile;
    if (rows < tile) rows = tile;
    int64_t items = (p.rows + rows - 1) / rows;
    if (threads > 1) {
        const int64_t small = p.rows * p.padded_in / kSharedBytes, wanted = kSharedItems * threads;
        if (items < wanted) items = small < wanted ? (small > items ? small : items) : wanted;
        items = (items + threads - 1) / threads * threads;
    }
    rows = ((p.rows + items - 1) / items + tile - 1) / tile * tile;
    call.row_block = rows;
    call.row_items = (p.rows + rows - 1) / rows;
    const int64_t blocks = (p.out_features + kBlock - 1) / kBlock;
    int64_t parts = call.row_items >= p.threads ? 1 : p.threads / call.row_items;
    if (parts > blocks) parts = blocks;
    call.column_block = (blocks + parts - 1) / parts * kBlock;
    call.column_items = (p.out_features + call.column_block - 1) / call.column_block;
}

}  // namespace

// On torch's own pool where there is one (GOMP_parallel of the library that torch has loaded), else on fresh threads.
void parallel(void (*work)(void*), void* data, int threads) {
    if (threads <= 1) return work(data);
    if (GompParallel pool = gomp_parallel) return pool(work, data, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    try {
        for (int t = 1; t < threads; ++t) others.emplace_back(work, data);
    } catch (const std::system_error&) {
        // No more threads to be had: those that there are do all the work.
    }
    work(data);
    for (std::thread& other : others) other.join();
}

void* scratch(int slot, size_t bytes) {
    if (arena.bytes[slot] < bytes) {
        std::free(arena.memory[slot]);
        arena.memory[slot] = nullptr;
        arena.bytes[slot] = 0;
        constexpr size_t kPage = 2 << 20;
        const size_t unit = bytes >= kPage / 2 ? kPage : 64;
        const size_t size = (bytes + unit - 1) / unit * unit;
        void* piece = nullptr;
        if (posix_memalign(&piece, unit, size) != 0) throw std::bad_alloc();
        if (unit == kPage) advise(piece, size);
        arena.memory[slot] = piece;
        arena.bytes[slot] = size;
    }
    return arena.memory[slot];
}

bool amx_permission() {
#if defined(__linux__) && defined(__x86_64__)
    // ARCH_REQ_XCOMP_PERM for tile data (18): until then a tile instruction raises SIGILL.
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
#else
    return false;
#endif
}

}  // namespace qv

// Changes whenever qv::Linear does: the Python side refuses a library of another size.
QV_API int64_t qv_linear_size() { return sizeof(qv::Linear); }

// 1: this CPU and kernel run the backend; 0: the CPU lacks instructions; -1: not in this build; -2: refused by the kernel.
QV_API int qv_supported(int32_t backend) {
    qv::BackendInfo info;
    if (!qv::backend_of(backend, &info)) return -1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
    unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    const bool amx = (edx >> 24 & 1) && (edx >> 25 & 1);  // amx-tile, amx-int8
    eax = 7, ecx = 1;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    const bool avxvnni = avx2 && (eax >> 4 & 1);
    switch (backend) {
        case qv::kAvx2: return avx2;
        case qv::kAvxVnni: return avxvnni;
#if defined(QV_AVX512_EMULATE)
        case qv::kVnni: return avx2;
#else
        case qv::kVnni: return vnni;
#endif
#if defined(QV_AMX_EMULATE)
        case qv::kAmx: return amx || true;  // the tiles are plain C++
#else
        case qv::kAmx: return !amx || !vnni ? 0 : qv::amx_permission() ? 1 : -2;
#endif
        default: return 1;
    }
#elif defined(__aarch64__) && defined(__linux__)
    return backend != qv::kNeon || (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__aarch64__)
    return 1;  // every 64-bit Apple processor has the dot product
#else
    return 1;
#endif
}

// Address of GOMP_parallel of the OpenMP library that torch uses; null: threads of our own.
QV_API void qv_set_pool(void* function) { qv::gomp_parallel = reinterpret_cast<qv::GompParallel>(function); }

// 0: done; 1: a backend that this build has not; 2: out of memory.
QV_API int qv_linear(const qv::Linear* linear) {
    qv::BackendInfo info;
    if (!qv::backend_of(linear->backend, &info)) return 1;
    if (linear->rows == 0) return 0;
    qv::Call call;
    call.linear = linear;
    call.run = info.run;
    qv::divide(call, info);
    const size_t width = linear->dtype == qv::kFloat32 ? 4 : 2;
    qv::find_pages(call.pages, linear->y, static_cast<size_t>(linear->rows * linear->y_row_stride) * width);
    const int64_t items = call.row_items * call.column_items;
    qv::parallel(qv::work, &call, static_cast<int>(items < linear->threads ? items : linear->threads));
    return call.out_of_memory ? 2 : 0;
}

// Integer operations of `times` tiles of a backend whose operands stay in the first-level cache: what a core can do.
QV_API int64_t qv_exercise(int32_t backend, int64_t times) {
    qv::BackendInfo info;
    return qv::backend_of(backend, &info) ? info.exercise(times) : 0;
}
