// Step 3 of the contract: 128 rows times 128 outputs by eight warps, two along the rows and four along the outputs.
//
// A warp has 64 x 32 sums: four times four instructions of 16 x 8. Column c of instruction t takes output
//
//     8 (c / 2) + 2 t + c % 2
//
// of the warp's 32, so that a thread holds eight neighbouring outputs of each row and stores 16 bytes at once. In shared memory
// a row of a stage has 64 bytes in four lines, of which line l lies at l ^ (r / 2 % 4) for row r of the codes and at
// l ^ (n / 8 % 4) for output n of the weight: then the eight rows that a matrix load takes at once lie in different banks.
#pragma once
#include "epilogue.cuh"

namespace qv {

constexpr int kWarpRows = 64, kWarpOutputs = 32, kRowTiles = kWarpRows / 16, kOutputTiles = kWarpOutputs / 8;

__device__ __forceinline__ int place_of_codes(int row, int line) { return row * kTileBytes + ((line ^ (row >> 1 & 3)) << 4); }
__device__ __forceinline__ int place_of_weight(int n, int line) { return n * kTileBytes + ((line ^ (n >> 3 & 3)) << 4); }

// Output of the warp's 32 that column c of instruction t takes.
__device__ __forceinline__ int output_of(int tile, int column) { return (column >> 1) * 8 + tile * 2 + (column & 1); }

struct Block {
    int first_row, first_output;
    int warp_row, warp_output, lane;
};

__device__ __forceinline__ Block this_block(const Multiply& p) {
    const int across = (p.outputs + kTileOutputs - 1) / kTileOutputs, warp = threadIdx.x / 32;
    return {static_cast<int>(blockIdx.x / across) * kTileRows, static_cast<int>(blockIdx.x % across) * kTileOutputs,
            warp / 4 * kWarpRows, warp % 4 * kWarpOutputs, static_cast<int>(threadIdx.x % 32)};
}

// Begin to copy one stage; rows and outputs that are not there become 0.
__device__ __forceinline__ void copy_stage(const Multiply& p, const Block& block, int stage, uint8_t* memory) {
    uint8_t* slot = memory + stage % kStages * kStageBytes;
    const int64_t offset = static_cast<int64_t>(stage) * kTileBytes;
    for (int i = threadIdx.x; i < kTileRows * 4; i += kThreads) {
        const int r = i / 4, line = i % 4, row = block.first_row + r;
        const bool there = row < p.rows;
        copy_line(slot + place_of_codes(r, line), p.codes + static_cast<int64_t>(there ? row : 0) * p.code_stride + offset + line * 16, there);
    }
    slot += kTileRows * kTileBytes;
    for (int i = threadIdx.x; i < kTileOutputs * 4; i += kThreads) {
        const int r = i / 4, line = i % 4, n = block.first_output + r;
        const bool there = n < p.outputs;
        copy_line(slot + place_of_weight(r, line), p.weight + static_cast<int64_t>(there ? n : 0) * p.code_stride + offset + line * 16, there);
    }
}

using Sums = int32_t[kRowTiles][kOutputTiles][4];

// Add the products of 64 columns, half of a stage.
__device__ __forceinline__ void multiply_half(const uint8_t* slot, const Block& block, int half, Sums& sums) {
    uint32_t a[kRowTiles][4], b[kOutputTiles / 2][4];
    const int lane = block.lane;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
        load_matrices(slot + place_of_codes(block.warp_row + t * 16 + lane % 16, half * 2 + lane / 16), a[t]);
#pragma unroll
    for (int t = 0; t < kOutputTiles; t += 2) {
        const int n = block.warp_output + output_of(t + lane / 16, lane % 8);
        load_matrices(slot + kTileRows * kTileBytes + place_of_weight(n, half * 2 + lane / 8 % 2), b[t / 2]);
    }
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int u = 0; u < kOutputTiles; ++u)
            multiply_tile(sums[t][u], a[t], b[u / 2][u % 2 * 2], b[u / 2][u % 2 * 2 + 1]);
}

// Hand the sums of every row of this thread, eight outputs each, to visit(row in 0..7, row, first output, outputs, sums).
template <class Visit> __device__ __forceinline__ void each_row(const Multiply& p, const Block& block, const Sums& sums, const Visit& visit) {
    const int first = block.first_output + block.warp_output + block.lane % 4 * 8;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = block.first_row + block.warp_row + t * 16 + h * 8 + block.lane / 4;
            if (row >= p.rows || first >= p.outputs) continue;
            int32_t found[kChunk];
#pragma unroll
            for (int i = 0; i < kChunk; ++i) found[i] = sums[t][i / 2][h * 2 + i % 2];
            visit(t * 2 + h, row, first, p.outputs - first, found);
        }
}

template <int kDtype, bool kGroups> __device__ __forceinline__ void multiply(const Multiply& p) {
    QV_SHARED_MEMORY(memory);
    const Block block = this_block(p);
    const int stages = p.code_stride / kTileBytes, halves_per_group = p.group / 64;
    Sums sums = {};
    float y[kGroups ? kRowTiles * 2 : 1][kChunk] = {};
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < stages) copy_stage(p, block, stage, memory);
        end_stage();
    }
    for (int stage = 0; stage < stages; ++stage) {
        wait_for_stage();
        __syncthreads();
        if (stage + kStages - 1 < stages) copy_stage(p, block, stage + kStages - 1, memory);
        end_stage();
        for (int half = 0; half < 2; ++half) {
            multiply_half(memory + stage % kStages * kStageBytes, block, half, sums);
            if constexpr (kGroups) {
                const int done = stage * 2 + half + 1, g = done / halves_per_group - 1;
                if (done % halves_per_group || g >= p.groups) continue;
                each_row(p, block, sums, [&](int slot, int row, int first, int count, const int32_t (&found)[kChunk]) {
                    add_group(p, row, first, count, g, found, y[slot]);
                });
#pragma unroll
                for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
                    for (int u = 0; u < kOutputTiles; ++u)
#pragma unroll
                        for (int i = 0; i < 4; ++i) sums[t][u][i] = 0;
            }
        }
    }
    each_row(p, block, sums, [&](int slot, int row, int first, int count, const int32_t (&found)[kChunk]) {
        float* ours = y[kGroups ? slot : 0];
        float out[kChunk];
        if constexpr (kGroups) for (int i = 0; i < kChunk; ++i) out[i] = ours[i];
        else add_group(p, row, first, count, 0, found, out);
        finish<kDtype>(p, row, first, count, out);
    });
}

}  // namespace qv
