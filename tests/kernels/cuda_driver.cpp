// The kernels of csrc/cuda as functions of a shared library, run by cuda_emulation.h.
#define QV_EMULATE
#include "int4.cu"


#define QV_EMULATED(name)                                                                                              \
    extern "C" void run_quantize_##name(const qv::Quantize* p, unsigned blocks, size_t shared) {                       \
        qv::launch([](const void* a) { qv_quantize_##name(*static_cast<const qv::Quantize*>(a)); }, p, blocks,         \
                   qv::kThreads, shared);                                                                              \
    }                                                                                                                  \
    extern "C" void run_multiply_##name(const qv::Multiply* p, unsigned blocks, size_t shared) {                       \
        qv::launch([](const void* a) { qv_multiply_##name(*static_cast<const qv::Multiply*>(a)); }, p, blocks,         \
                   qv::kThreads, shared);                                                                              \
    }                                                                                                                  \
    extern "C" void run_multiply_groups_##name(const qv::Multiply* p, unsigned blocks, size_t shared) {                \
        qv::launch([](const void* a) { qv_multiply_groups_##name(*static_cast<const qv::Multiply*>(a)); }, p, blocks,  \
                   qv::kThreads, shared);                                                                              \
    }

QV_EMULATED(float32)
QV_EMULATED(bfloat16)
QV_EMULATED(float16)

extern "C" int64_t quantize_size() { return sizeof(qv::Quantize); }
extern "C" int64_t multiply_size() { return sizeof(qv::Multiply); }
