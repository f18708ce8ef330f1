// A block of CUDA threads as fibers of one CPU thread, so that the kernels of csrc/cuda run, and are tested, without a GPU.
//
// A fiber runs until it reaches a barrier of its block or of its warp, where it waits for the others. Matrix loads, matrix
// products and copies are written out in plain C++ from what NVIDIA's PTX documentation says of their registers. A copy arrives
// only when its stage is waited for; until then the shared memory holds a pattern that no test expects. Threads take their turns
// in rising order in one pair of launches and in falling order in the next, so that a missing barrier shows.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdint.h>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define QV_SHARED_MEMORY(name) uint8_t* name = qv::emulated().shared

#include "int4.h"

struct Index { unsigned x; };
struct uint4 { uint32_t x, y, z, w; };
static Index threadIdx, blockIdx, blockDim;

namespace qv {

struct Fiber {
    ucontext_t context;
    std::vector<uint8_t> stack;
    bool is_done;
    long barriers;  // that it has reached: it may go on when all of its block (warp) have reached as many
    long warp_barriers;
};

struct Copy { uint8_t* to; uint8_t bytes[16]; };

struct Emulated {
    uint8_t* shared;
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    unsigned current;
    uint32_t exchange[32][32][6];                 // warp, lane, words of what a warp does together
    const uint8_t* rows[32][32];
    std::vector<std::vector<std::vector<Copy>>> stages;  // thread, stage in flight, copies
    std::vector<std::vector<Copy>> open;                 // thread: copies of the stage that is not ended
    unsigned launches;
    void (*kernel)(const void*);
    const void* argument;
};

static Emulated& emulated() {
    static Emulated state;
    return state;
}

static void yield() {
    Emulated& e = emulated();
    swapcontext(&e.fibers[e.current].context, &e.scheduler);
}

// A barrier counts for those that have not ended, as on a GPU from sm_70 on.
static void wait_for(long Fiber::* counter, unsigned first, unsigned last) {
    Emulated& e = emulated();
    const long mine = ++(e.fibers[e.current].*counter);
    for (;;) {
        bool all = true;
        for (unsigned t = first; t < last; ++t) all = all && (e.fibers[t].is_done || e.fibers[t].*counter >= mine);
        if (all) return;
        yield();
    }
}

static void wait_for_warp() {
    const unsigned warp = emulated().current / 32 * 32;
    wait_for(&Fiber::warp_barriers, warp, warp + 32);
}

inline void load_matrices(const uint8_t* row, uint32_t (&out)[4]) {
    Emulated& e = emulated();
    const unsigned warp = e.current / 32, lane = e.current % 32;
    e.rows[warp][lane] = row;
    wait_for_warp();
    for (unsigned matrix = 0; matrix < 4; ++matrix)
        memcpy(&out[matrix], e.rows[warp][matrix * 8 + lane / 4] + lane % 4 * 4, 4);
    wait_for_warp();
}

static uint32_t nibble(uint32_t word, unsigned i) { return word >> (4 * i) & 15; }

// PTX, "Matrix Fragments for mma.m16n8k64": lane = 4 group + t. a: rows group and group + 8, columns 8 t + i and 32 + 8 t + i;
// b: the same columns of output `group`; c: outputs 2 t and 2 t + 1 of rows group and group + 8.
inline void multiply_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Emulated& e = emulated();
    const unsigned warp = e.current / 32, lane = e.current % 32;
    auto& words = e.exchange[warp];
    for (unsigned i = 0; i < 4; ++i) words[lane][i] = a[i];
    words[lane][4] = b0, words[lane][5] = b1;
    wait_for_warp();
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4, column = lane % 4 * 2 + i % 2, upper = i / 2;
        for (unsigned k = 0; k < 64; ++k) {
            const unsigned half = k / 32, t = k % 32 / 8;
            c[i] += static_cast<int32_t>(nibble(words[row * 4 + t][half * 2 + upper], k % 8) * nibble(words[column * 4 + t][4 + half], k % 8));
        }
    }
    wait_for_warp();
}

inline void copy_line(uint8_t* shared, const uint8_t* source, bool there) {
    Emulated& e = emulated();
    Copy copy{shared, {}};
    if (there) memcpy(copy.bytes, source, 16);
    memset(shared, 0xa5, 16);
    e.open[e.current].push_back(copy);
}

inline void end_stage() {
    Emulated& e = emulated();
    e.stages[e.current].push_back(e.open[e.current]);
    e.open[e.current].clear();
}

inline void wait_for_stage() {
    Emulated& e = emulated();
    auto& stages = e.stages[e.current];
    while (stages.size() > kStages - 2) {
        for (const Copy& copy : stages.front()) memcpy(copy.to, copy.bytes, 16);
        stages.erase(stages.begin());
    }
}

inline uint32_t float_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
inline float bits_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline uint16_t round_to_float16(float value) { const _Float16 half = static_cast<_Float16>(value); uint16_t bits; memcpy(&bits, &half, 2); return bits; }
inline float float16_value(uint16_t bits) { _Float16 half; memcpy(&half, &bits, 2); return static_cast<float>(half); }

static void fiber_main() {
    Emulated& e = emulated();
    e.kernel(e.argument);
    e.fibers[e.current].is_done = true;
    yield();
}

// Run every block of a grid, one after another.
static void launch(void (*kernel)(const void*), const void* argument, unsigned blocks, unsigned threads, size_t shared_bytes) {
    Emulated& e = emulated();
    std::vector<uint8_t> shared(shared_bytes + 16);
    e.shared = shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16;
    e.kernel = kernel, e.argument = argument;
    if (e.fibers.size() != threads) e.fibers = std::vector<Fiber>(threads);
    blockDim.x = threads;
    const bool falls = e.launches++ / 2 % 2;
    for (unsigned block = 0; block < blocks; ++block) {
        memset(e.shared, 0x5a, shared_bytes);  // shared memory holds anything when a block begins
        e.stages.assign(threads, {}), e.open.assign(threads, {});
        for (unsigned t = 0; t < threads; ++t) {
            Fiber& fiber = e.fibers[t];
            fiber.stack.resize(1 << 16);
            fiber.is_done = false, fiber.barriers = fiber.warp_barriers = 0;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, fiber_main, 0);
        }
        blockIdx.x = block;
        for (bool any = true; any;) {
            any = false;
            for (unsigned turn = 0; turn < threads; ++turn) {
                const unsigned t = falls ? threads - 1 - turn : turn;
                if (e.fibers[t].is_done) continue;
                any = true;
                e.current = t, threadIdx.x = t;
                swapcontext(&e.scheduler, &e.fibers[t].context);
            }
        }
    }
}

}  // namespace qv

// A thread that has read threadIdx reads it again after others ran: the scheduler sets it before each turn.
static inline void __syncthreads() { qv::wait_for(&qv::Fiber::barriers, 0, blockDim.x); }
