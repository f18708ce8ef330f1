// Memory that is written for the first time: outputs and packed weights.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace qv {

// The whole huge pages inside a piece of memory, shared out among the threads that write to it.
struct PageRange {
    int8_t *begin = nullptr, *end = nullptr;
    std::atomic<int64_t> next{0};
};

void find_pages(PageRange& range, void* memory, size_t bytes);

// Have the system find memory for the range's pages; what is there already stays as it is. Returns when none is left to take.
void populate_pages(PageRange& range);

// Ask for huge pages for what lies in this range; it may be refused, then pages are small.
void advise(void* memory, size_t bytes);

}  // namespace qv
