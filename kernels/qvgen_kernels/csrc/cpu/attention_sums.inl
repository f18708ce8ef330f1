// Sums of float32 products in a stated order, included once for each kind of processor by attention.inl.
//
// Every sum adds one product after another to each number of a register of its own: registers of any width have the same bits.

#if defined(QV_MAX512)
typedef Wide Column;
#else
typedef Half Column;
#endif
constexpr int kColumns = sizeof(Column) / sizeof(float), kParts = 16 / kColumns, kTileRows = 4;

// c[r] += sum over u of a[r * row + u * unit] * b[u] of kRows rows and 16 columns, one u after another.
template <int kRows>
QV_INLINE void accumulate16(const float* a, int64_t row, int64_t unit, const float* b, int64_t ldb, int64_t units, float* c, int64_t ldc) {
    Column sums[kRows][kParts];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) memcpy(&sums[r][part], c + r * ldc + part * kColumns, sizeof(Column));
    for (int64_t u = 0; u < units; ++u) {
        Column line[kParts];
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) memcpy(&line[part], b + u * ldb + part * kColumns, sizeof(Column));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const float factor = a[r * row + u * unit];
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) sums[r][part] += line[part] * factor;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) memcpy(c + r * ldc + part * kColumns, &sums[r][part], sizeof(Column));
}

// A factor of a product: rows and units (what is summed) by their strides.
struct Factor {
    const float* first;
    int64_t row, unit;
};

// c [rows][columns] += a b; b is [units][columns], rows of b and c lie `ldb` and `ldc` apart, columns are a multiple of 16.
static void accumulate(const Factor& a, int64_t rows, const float* b, int64_t ldb, int64_t units, int64_t columns, float* c, int64_t ldc) {
    for (int64_t column = 0; column < columns; column += 16) {
        int64_t r = 0;
        for (; r + kTileRows <= rows; r += kTileRows)
            accumulate16<kTileRows>(a.first + r * a.row, a.row, a.unit, b + column, ldb, units, c + r * ldc + column, ldc);
        for (; r < rows; ++r)
            accumulate16<1>(a.first + r * a.row, a.row, a.unit, b + column, ldb, units, c + r * ldc + column, ldc);
    }
}
