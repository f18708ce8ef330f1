// Prepacks random layers on every backend that runs here and compares each byte with a definition in plain loops; for sanitizers,
// and for other processors under an emulator. Every plane is an allocation of its exact size. 0: all equal.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "prepack.h"

extern "C" void qv_prepack(const qv::Prepack*);
extern "C" int qv_supported(int32_t);

static std::mt19937 source(0);
static int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(source); }

struct Exact {  // a heap block of exactly so many bytes, random
    uint8_t* data;
    explicit Exact(int64_t bytes, int limit = 256) : data(static_cast<uint8_t*>(malloc(static_cast<size_t>(bytes)))) {
        for (int64_t i = 0; i < bytes; ++i) data[i] = static_cast<uint8_t>(draw(0, limit - 1));
    }
};

static int code(int bits, const uint8_t* low, const uint8_t* high, int64_t k) {
    if (bits > 4) return low[k];
    if (bits == 4) return k % 2 ? low[k / 2] >> 4 : low[k / 2] & 15;
    const int two = (low[k / 4] >> (2 * (k % 4))) & 3;
    return bits == 3 ? two + 4 * ((high[k / 8] >> (k % 8)) & 1) : two;
}

static bool one_case(int number) {
    const int bits = static_cast<int>(draw(2, 8));
    const int64_t columns = draw(0, 2) ? draw(1, 300) : 64 * draw(1, 4);
    int64_t group = columns;
    if (draw(0, 1))
        for (group = draw(1, columns); columns % group;) --group;
    const int64_t unit = draw(0, 1) ? 64 : 4, groups = columns / group, padded_group = (group + unit - 1) / unit * unit;
    const int64_t per_byte = bits > 4 ? 1 : bits == 4 ? 2 : 4;
    qv::Prepack p = {};
    p.in_features = columns, p.group = group, p.groups = groups, p.padded_group = padded_group;
    p.zero_groups = draw(0, 1) ? groups : 1;
    p.low_bytes = (columns + per_byte - 1) / per_byte;
    p.high_bytes = bits == 3 ? (columns + 7) / 8 : p.low_bytes;
    p.bits = bits, p.base = bits == 8 ? 128 : static_cast<int32_t>(draw(0, 1) << (bits - 1));
    std::vector<qv::Planes> planes;
    std::vector<uint8_t*> blocks;
    int64_t outputs = 0;
    const bool own_zero = bits < 8 && draw(0, 1);
    for (int64_t s = draw(1, 3); s > 0; --s) {
        const int64_t rows = draw(0, 1) ? draw(1, 40) : 16 * draw(1, 3);
        blocks.push_back(Exact(rows * p.low_bytes, bits > 4 ? 1 << bits : 256).data);
        const uint8_t* low = blocks.back();
        blocks.push_back(Exact(rows * p.high_bytes).data);
        const uint8_t* high = bits == 3 ? blocks.back() : nullptr;
        blocks.push_back(Exact(rows * p.zero_groups, 1 << bits).data);
        planes.push_back({low, high, own_zero ? blocks.back() : nullptr, rows});
        outputs += rows;
    }
    p.sources = static_cast<int64_t>(planes.size()), p.source = planes.data();
    p.padded_out = (outputs + 31) / 32 * 32;
    const int64_t padded_in = groups * padded_group;
    std::vector<int8_t> packed(static_cast<size_t>(p.padded_out * padded_in), 0);
    std::vector<int32_t> sums(static_cast<size_t>(groups * p.padded_out), 0);
    int64_t n = 0;
    for (const qv::Planes& own : planes)
        for (int64_t r = 0; r < own.rows; ++r, ++n)
            for (int64_t k = 0; k < columns; ++k) {
                const int64_t g = k / group, place = g * padded_group + k % group;
                const int zero = own.zero ? own.zero[r * p.zero_groups + (p.zero_groups == 1 ? 0 : g)] : p.base;
                const uint8_t* high = own.high ? own.high + r * p.high_bytes : nullptr;
                const int value = code(bits, own.low + r * p.low_bytes, high, k) - zero;
                packed[static_cast<size_t>(((n / 16 * (padded_in / 4) + place / 4) * 16 + n % 16) * 4 + place % 4)] =
                    static_cast<int8_t>(value);
                sums[static_cast<size_t>(g * p.padded_out + n)] += value;
            }
    bool equal = true;
    for (int32_t backend = 0; backend <= qv::kNeon; ++backend) {
        if (qv_supported(backend) != 1) continue;
        for (size_t shift : {0, 4}) {  // lines that are aligned, and not
            void* memory = nullptr;
            if (posix_memalign(&memory, 64, packed.size() + shift) != 0) exit(3);
            std::vector<int32_t> found(sums.size(), -1);
            p.packed = static_cast<int8_t*>(memory) + shift, p.column_sum = found.data();
            p.backend = backend, p.threads = static_cast<int32_t>(draw(1, 3));
            qv_prepack(&p);
            equal = equal && memcmp(p.packed, packed.data(), packed.size()) == 0 && found == sums;
            free(memory);
        }
        if (!equal) {
            fprintf(stderr, "case %d: %d bits, %ld columns in groups of %ld, backend %d\n", number, bits,
                    static_cast<long>(columns), static_cast<long>(group), backend);
            break;
        }
    }
    for (uint8_t* block : blocks) free(block);
    return equal;
}

int main() {
    for (int number = 0; number < 300; ++number)
        if (!one_case(number)) return 1;
    return 0;
}
