// Registers of 16 numbers, whatever the processor has: the compiler's vectors, every operation on which is one rounding of each
// number. Included by what is compiled once for each kind of processor, inside its namespace and target pragma.

#include "numbers.inl"

typedef float Wide __attribute__((vector_size(64)));
typedef int32_t WideMask __attribute__((vector_size(64)));

constexpr int64_t kLane = 16;  // numbers of a register

#define QV_INLINE static inline __attribute__((always_inline))

QV_INLINE Wide load(const float* x) { Wide v; memcpy(&v, x, sizeof v); return v; }
QV_INLINE void keep(float* x, const Wide& v) { memcpy(x, &v, sizeof v); }
QV_INLINE Wide all(float x) { return Wide{} + x; }
QV_INLINE Wide nearest(const Wide& v) { return (v + 12582912.0f) - 12582912.0f; }

QV_INLINE Wide clamped(Wide u, float qmin, float qmax) {
    const Wide least = all(qmin), most = all(qmax);
    u = u < least ? least : u;  // a NaN stays
    return u > most ? most : u;
}
