// Finding memory: 0.35 ms per MB in page faults of 4 KiB and 0.05 in huge pages that come quickly (docs/log.md), which is most of
// prepacking and up to a seventh of a linear's time.
//
// Where the system has no huge page at hand (memory in pieces; a virtual machine that has given its free memory back to the
// host) one may take 10 ms. So each is timed, and after a slow one the next 4 are small; twice as many after each further one
// that is slow, up to 64.
#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <time.h>
#endif

namespace qv {

#if defined(__linux__)
namespace {

constexpr int64_t kHugePage = 2 << 20, kShortest = 4, kLongest = 64;
constexpr int64_t kSlowNanoseconds = 1000000;  // small pages take about 0.8 ms for as much
constexpr int kPopulateWrite = 23;             // MADV_POPULATE_WRITE, since Linux 5.14; older ones fault at the stores
std::atomic<int64_t> pause{0}, next_pause{kShortest};  // of all threads; that they may overtake each other does no harm

int64_t thread_nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

void populate_huge(int8_t* page) {
    if (pause > 0) {
        --pause;
        madvise(page, kHugePage, kPopulateWrite);
        return;
    }
    madvise(page, kHugePage, MADV_HUGEPAGE);
    const int64_t began = thread_nanoseconds();
    madvise(page, kHugePage, kPopulateWrite);
    const bool slow = thread_nanoseconds() - began > kSlowNanoseconds;
    if (slow) pause = next_pause.load();
    next_pause = !slow ? kShortest : next_pause * 2 < kLongest ? next_pause * 2 : kLongest;
}

// The first multiple of a huge page's size at or after an address, and the last at or before it.
int8_t* next_page(void* memory) {
    return reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage);
}
int8_t* last_page(void* memory) {
    return reinterpret_cast<int8_t*>(reinterpret_cast<uintptr_t>(memory) / kHugePage * kHugePage);
}

}  // namespace

void find_pages(PageRange& range, void* memory, size_t bytes) {
    range.begin = next_page(memory);
    range.end = last_page(static_cast<int8_t*>(memory) + bytes);
}

void populate_pages(PageRange& range) {
    const int64_t pages = range.end > range.begin ? (range.end - range.begin) / kHugePage : 0;
    for (int64_t i = range.next.fetch_add(1); i < pages; i = range.next.fetch_add(1))
        populate_huge(range.begin + i * kHugePage);
}

void advise(void* memory, size_t bytes) {
    int8_t *begin = next_page(memory), *end = last_page(static_cast<int8_t*>(memory) + bytes);
    if (end > begin) madvise(begin, static_cast<size_t>(end - begin), MADV_HUGEPAGE);
}
#else
void find_pages(PageRange&, void*, size_t) {}
void populate_pages(PageRange&) {}
void advise(void*, size_t) {}
#endif

}  // namespace qv
