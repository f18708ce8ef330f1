// The kernels by name; what they do stands in int4.h.
#include "multiply.cuh"
#include "quantize.cuh"

#define QV_KERNELS(name, dtype)                                                                                        \
    extern "C" __global__ void __launch_bounds__(qv::kThreads) qv_quantize_##name(const qv::Quantize p) {              \
        qv::quantize_row<dtype>(p);                                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(qv::kThreads) qv_multiply_##name(const qv::Multiply p) {              \
        qv::multiply<dtype, false>(p);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(qv::kThreads) qv_multiply_groups_##name(const qv::Multiply p) {       \
        qv::multiply<dtype, true>(p);                                                                                  \
    }

QV_KERNELS(bfloat16, qv::kBfloat16)
#if !defined(QV_BFLOAT16_ALONE)  // a test that looks at machine code compiles a third of it
QV_KERNELS(float32, qv::kFloat32)
QV_KERNELS(float16, qv::kFloat16)
#endif
