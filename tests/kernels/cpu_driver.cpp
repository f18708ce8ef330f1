// Runs recorded calls of the CPU library without Python: for sanitizers, and for other processors under an emulator.
//
// stdin: a count of calls, then per call the structure qv::Linear, the bytes of each of its 20 pointers (0: null), and the bytes
// themselves. stdout: per call the bytes of y, accumulators, operands and scales. Every piece is an allocation of exactly
// its size, so that a sanitizer sees a byte too far.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "qv.h"

extern "C" int qv_linear(const qv::Linear*);
extern "C" int qv_supported(int32_t);

static void take(void* memory, size_t bytes) {
    if (bytes && fread(memory, 1, bytes, stdin) != bytes) exit(3);
}

int main() {
    int64_t calls = 0;
    take(&calls, sizeof(calls));
    for (int64_t i = 0; i < calls; ++i) {
        qv::Linear p;
        int64_t bytes[20];
        void* piece[20];
        take(&p, sizeof(p));
        take(bytes, sizeof(bytes));
        for (int f = 0; f < 20; ++f) {
            piece[f] = bytes[f] ? malloc(static_cast<size_t>(bytes[f])) : nullptr;
            take(piece[f], static_cast<size_t>(bytes[f]));
        }
        p.x = piece[0];
        p.y = piece[1];
        p.weight = static_cast<int8_t*>(piece[2]);
        p.weight_scale = static_cast<float*>(piece[3]);
        p.column_sum = static_cast<int32_t*>(piece[4]);
        p.weight_shift = static_cast<int32_t*>(piece[5]);
        p.weight_zero = static_cast<float*>(piece[6]);
        p.bias = static_cast<float*>(piece[7]);
        p.clip_low = static_cast<float*>(piece[8]);
        p.clip_high = static_cast<float*>(piece[9]);
        p.input_scale = static_cast<float*>(piece[10]);
        p.row_scale = static_cast<float*>(piece[11]);
        p.row_zero = static_cast<float*>(piece[12]);
        p.branch = piece[13];
        p.gate = piece[14];
        p.residual = piece[15];
        p.paley_terms = static_cast<uint8_t*>(piece[16]);
        p.accumulators = static_cast<int32_t*>(piece[17]);
        p.operands = static_cast<int16_t*>(piece[18]);
        p.scales = static_cast<float*>(piece[19]);
        if (qv_supported(p.backend) != 1) {
            fprintf(stderr, "backend %d does not run here\n", p.backend);
            return 4;
        }
        if (qv_linear(&p) != 0) return 5;
        // y of an ordinary call: backends have shorter ways where nobody asks for accumulators.
        p.accumulators = nullptr;
        p.operands = nullptr;
        p.scales = nullptr;
        memset(piece[1], 0, static_cast<size_t>(bytes[1]));
        if (qv_linear(&p) != 0) return 5;
        for (int f : {1, 17, 18, 19}) fwrite(piece[f], 1, static_cast<size_t>(bytes[f]), stdout);
        for (void* memory : piece) free(memory);
    }
    return 0;
}
