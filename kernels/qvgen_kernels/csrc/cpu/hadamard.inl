// Step 1 of the contract: the fast Hadamard transform of a row, in the order of operations that the contract fixes.

// Vectors of the compiler: QV_WIDTH floats.
typedef float Vector __attribute__((vector_size(QV_WIDTH * 4)));
typedef int32_t Signs __attribute__((vector_size(QV_WIDTH * 4)));

typedef float Quad __attribute__((vector_size(16)));

static inline Vector load(const float* p) { Vector v; memcpy(&v, p, sizeof(v)); return v; }
static inline void store(float* p, Vector v) { memcpy(p, &v, sizeof(v)); }

// (a, b) of lanes i and i + stride become (a + b, a - b): lane i is x[i ^ stride] + x[i], or x[i ^ stride] + (-x[i]) where bit
// `stride` of i is set. A negation and the order of two summands change no bit.
template <int kStride>
static inline Vector butterfly(Vector x) {
    Signs flip;
    Vector other;
    for (int i = 0; i < QV_WIDTH; ++i) flip[i] = i & kStride ? INT32_MIN : 0;
#if defined(__clang__)
    for (int i = 0; i < QV_WIDTH; ++i) other[i] = x[i ^ kStride];
#else
    Signs lanes;
    for (int i = 0; i < QV_WIDTH; ++i) lanes[i] = i ^ kStride;
    other = __builtin_shuffle(x, lanes);
#endif
    return other + (Vector)((Signs)x ^ flip);
}

// Elements i and i + stride of each 2 * stride become (a + b, a - b), strides 1 .. n / 2.
static void butterflies(float* row, int64_t columns, int64_t n) {
    int64_t stride = 1;
    if (n >= QV_WIDTH) {
        for (int64_t k = 0; k < columns; k += QV_WIDTH) {
            Vector x = butterfly<2>(butterfly<1>(load(row + k)));
            if (QV_WIDTH > 4) x = butterfly<4>(x);
            if (QV_WIDTH > 8) x = butterfly<8>(x);
            store(row + k, x);
        }
        stride = QV_WIDTH;
    }
    for (; stride < n; stride *= 2)
        for (int64_t start = 0; start < columns; start += 2 * stride) {
            float *first = row + start, *second = first + stride;
            if (stride >= QV_WIDTH) {
                for (int64_t i = 0; i < stride; i += QV_WIDTH) {
                    const Vector a = load(first + i), b = load(second + i);
                    store(first + i, a + b);
                    store(second + i, a - b);
                }
            } else {
                for (int64_t i = 0; i < stride; ++i) {
                    const float a = first[i], b = second[i];
                    first[i] = a + b;
                    second[i] = a - b;
                }
            }
        }
}

// One step of the regular transform for x_0 .. x_3: the products with the rows (1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1) and
// (-1, 1, 1, 1), in the contract's order of additions.
template <typename Number>
static inline void regular_four(Number x0, Number x1, Number x2, Number x3, Number* y) {
    const Number low = x0 + x1, high = x2 - x3, first = x0 - x1, second = x2 + x3;
    y[0] = low + high;
    y[1] = low - high;
    y[2] = second + first;
    y[3] = second - first;
}

// Lanes i, i + s, i + 2 s, i + 3 s of a vector take the part of x_0 .. x_3, s = kStride, for every i without the bits s and 2 s.
template <int kStride>
static inline Vector regular_lanes(Vector x) {
    const Vector sums = butterfly<kStride>(x);  // x_0 + x_1, x_0 - x_1, x_2 + x_3, x_2 - x_3
    Vector left, right;
    Signs flip;
#if defined(__clang__)
    for (int i = 0; i < QV_WIDTH; ++i) {
        const int base = i & ~(3 * kStride), digit = i / kStride & 3;
        left[i] = sums[base + (digit < 2 ? 0 : 2 * kStride)];
        right[i] = sums[base + (digit < 2 ? 3 * kStride : kStride)];
        flip[i] = digit & 1 ? INT32_MIN : 0;
    }
#else
    Signs from_left, from_right;
    for (int i = 0; i < QV_WIDTH; ++i) {
        const int base = i & ~(3 * kStride), digit = i / kStride & 3;
        from_left[i] = base + (digit < 2 ? 0 : 2 * kStride);
        from_right[i] = base + (digit < 2 ? 3 * kStride : kStride);
        flip[i] = digit & 1 ? INT32_MIN : 0;
    }
    left = __builtin_shuffle(sums, from_left);
    right = __builtin_shuffle(sums, from_right);
#endif
    return left + (Vector)((Signs)right ^ flip);
}

// The step for the columns i, stride + i, 2 stride + i and 3 stride + i, as many side by side as a Number holds.
template <typename Number>
static inline void regular_columns(float* x, int64_t stride) {
    Number in[4], out[4];
    for (int64_t j = 0; j < 4; ++j) memcpy(in + j, x + j * stride, sizeof(Number));
    regular_four(in[0], in[1], in[2], in[3], out);
    for (int64_t j = 0; j < 4; ++j) memcpy(x + j * stride, out + j, sizeof(Number));
}

// The regular transform of every n columns, n a power of 4, digit by digit of the column's number to the base 4.
static void regular_transform(float* row, int64_t columns, int64_t n) {
    int64_t stride = 1;
    if (n >= QV_WIDTH) {
        for (int64_t k = 0; k < columns; k += QV_WIDTH) {
            Vector x = regular_lanes<1>(load(row + k));
            if (QV_WIDTH >= 16) x = regular_lanes<QV_WIDTH >= 16 ? 4 : 1>(x);
            store(row + k, x);
        }
        stride = QV_WIDTH >= 16 ? 16 : 4;
    }
    for (; stride < n; stride *= 4)
        for (int64_t start = 0; start < columns; start += 4 * stride) {
            float* x = row + start;
            if (stride >= QV_WIDTH) for (int64_t i = 0; i < stride; i += QV_WIDTH) regular_columns<Vector>(x + i, stride);
            else if (stride == 4) regular_columns<Quad>(x, stride);
            else regular_columns<float>(x, stride);  // a stride of 1
        }
}

// The 16 signed sums of x_0 .. x_3, n apart: (+-x_0 +- x_1) + (+-x_2 +- x_3).
template <int kLanesHere>
static inline void signed_sums(const float* x, int64_t n, float* terms) {
    if (kLanesHere < QV_WIDTH) {
        for (int l = 0; l < kLanesHere; ++l) {
            const float a = x[l], b = x[n + l], c = x[2 * n + l], d = x[3 * n + l];
            const float low[4] = {a + b, a - b, b - a, -(a + b)}, high[4] = {c + d, c - d, d - c, -(c + d)};
            for (int s = 0; s < 16; ++s) terms[s * kLanesHere + l] = low[s >> 2] + high[s & 3];
        }
        return;
    }
    for (int l = 0; l < kLanesHere; l += QV_WIDTH) {
        const Vector a = load(x + l), b = load(x + n + l), c = load(x + 2 * n + l), d = load(x + 3 * n + l);
        const Vector low[4] = {a + b, a - b, b - a, -(a + b)}, high[4] = {c + d, c - d, d - c, -(c + d)};
        for (int s = 0; s < 16; ++s) store(terms + s * kLanesHere + l, low[s >> 2] + high[s & 3]);
    }
}

// result[i] += terms[pattern[i]] + more[next[i]] for i < b, in this order; kFirst: result starts there; kPair: there is a second.
template <int kLanesHere, bool kFirst, bool kPair>
static inline void add_terms(int64_t b, const uint8_t* pattern, const uint8_t* next, const float* terms, const float* more,
                             float* result) {
    constexpr int kStep = kLanesHere < QV_WIDTH ? 1 : QV_WIDTH;
    for (int64_t i = 0; i < b; ++i, result += kLanesHere) {
        const float* first = terms + pattern[i] * kLanesHere;
        const float* second = kPair ? more + next[i] * kLanesHere : nullptr;
        for (int l = 0; l < kLanesHere; l += kStep) {
            if (kStep == 1) {
                const float sum = kFirst ? first[l] : result[l] + first[l];
                result[l] = kPair ? sum + second[l] : sum;
            } else {
                Vector sum = load(first + l);
                if (!kFirst) sum = load(result + l) + sum;
                if (kPair) sum = sum + load(second + l);
                store(result + l, sum);
            }
        }
    }
}

// y_i = sum_j H_b[i][j] x_j over the b runs of n columns of one block, four j at a time as the contract orders it, kLanesHere
// columns at a time. `work` holds 32 signed sums and the b results.
template <int kLanesHere>
static void paley_block(const Linear& p, float* block, int64_t n, float* work) {
    const int64_t b = p.paley;
    float *terms = work, *more = work + 16 * kLanesHere, *result = work + 32 * kLanesHere;
    for (int64_t column = 0; column < n; column += kLanesHere) {
        for (int64_t j = 0; j < b; j += 8) {
            const uint8_t *pattern = p.paley_terms + j / 4 * b, *next = pattern + b;
            const bool pair = j + 4 < b;
            signed_sums<kLanesHere>(block + j * n + column, n, terms);
            if (pair) signed_sums<kLanesHere>(block + (j + 4) * n + column, n, more);
            if (j == 0) add_terms<kLanesHere, true, true>(b, pattern, next, terms, more, result);  // b is 12 at least
            else if (pair) add_terms<kLanesHere, false, true>(b, pattern, next, terms, more, result);
            else add_terms<kLanesHere, false, false>(b, pattern, pattern, terms, more, result);
        }
        for (int64_t i = 0; i < b; ++i) memcpy(block + i * n + column, result + i * kLanesHere, kLanesHere * sizeof(float));
    }
}

static void rotate(const Linear& p, float* row, float* work) {
    const int64_t n = p.paley ? p.rotation / p.paley : p.rotation;
    if (p.paley) butterflies(row, p.in_features, n);
    else regular_transform(row, p.in_features, n);
    if (p.paley > 1)
        for (int64_t start = 0; start < p.in_features; start += p.rotation) {
            float* block = row + start;
            if (n >= 16) paley_block<16>(p, block, n, work);
            else if (n >= 4) paley_block<4>(p, block, n, work);
            else paley_block<1>(p, block, n, work);
        }
    for (int64_t k = 0; k < p.in_features; ++k) row[k] *= p.rotation_scale;
}
