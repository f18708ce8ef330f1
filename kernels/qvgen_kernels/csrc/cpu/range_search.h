// Errors of many candidate ranges of each row: which of them is worth an exact look (qvgen.quant.ranges).
#pragma once
#include "qv.h"

namespace qv {

// One call. Mirrored field by field in range_search.py.
struct RangeErrors {
    int64_t rows, columns, candidates;
    const float* x;                          // [rows, columns], dense
    const float *inverse, *scale, *zero;     // [rows, candidates]: 1 / divisor, what codes are multiplied by, zero point
    const int32_t* order;                    // [candidates]: in which candidates are looked at
    float* error;                            // [rows, candidates]
    float qmin, qmax;
    float margin;                            // a sum is given up above the row's least error so far, times this
    int32_t real;                            // 1: the zero point is added before codes are rounded
    int32_t backend, threads;
};

using RangeErrorsFunction = void (*)(const RangeErrors&, int64_t begin, int64_t end);

RangeErrorsFunction range_errors_portable();
RangeErrorsFunction range_errors_avx2();
RangeErrorsFunction range_errors_avx512();

}  // namespace qv
