// How packed pages lie in memory; kernels/packed.py says it in words.
#pragma once

#include <cstdint>

namespace kvwise {

// What rows of a page are stored as. float8 (e4m3) only in packed pages.
enum class Storage : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8 = 3 };

inline int64_t bytes_of(Storage storage) {
    return storage == Storage::kFloat32 ? 4 : storage == Storage::kFloat8 ? 1 : 2;
}

constexpr int kCodeLanes = 16;  // lanes are padded to this
constexpr int kCodeUnit = 32;   // and inner numbers to this
constexpr int kMaxPackedDim = 1024;

// The keys or the values of a page: rows [S, dim], or codes in planes with steps shared along lanes.
struct PackedPart {
    int64_t first;  // byte of the page
    int32_t dim;
    Storage storage;  // of rows
    bool coded;
    bool by_channel;   // lanes are tokens and inner numbers channels; else the other way round
    int32_t levels;    // steps between a group's extremes when packing
    int32_t bits;      // of a code as read: 4 for the upper plane of split codes
    bool split;        // read as 16 * upper + lower
    float step_factor; // x = (code + bias) * (step * step_factor) + zero
    float bias;
    int32_t num_planes;
    int32_t planes[4];  // bits of each, highest first
    int32_t lanes, inner, group, padded_lanes, padded_inner;
    int64_t steps;  // byte of the part: float16 [lanes / group][2][padded_inner], steps then zeros

    int64_t plane_bytes(int32_t plane) const { return int64_t(padded_lanes) * padded_inner * planes[plane] / 8; }
    int32_t num_groups() const { return lanes / group; }
};

// Packed pages in the memory of blocks: page p lies in block p / (2 per_half), the first per_half of them in half 0.
struct PackedPages {
    char* halves[2];
    int64_t half_bytes;
    int64_t page_bytes;
    int64_t per_half;
    int64_t num_pages;
    int64_t page_tokens;
    PackedPart keys;
    PackedPart values;

    char* page(int64_t number) const {
        const int64_t block = number / (2 * per_half), within = number % (2 * per_half);
        return halves[within / per_half] + block * half_bytes + within % per_half * page_bytes;
    }
};

// Rows to pack into one part of one page: row i lies at rows + slots[i] * row_bytes.
struct SealTask {
    const PackedPart* part;
    int64_t page_tokens;
    const char* rows;
    Storage storage;  // of the rows
    int64_t row_bytes;
    const int64_t* slots;
    const int64_t* next_slots;  // of the page after this one, to be fetched meanwhile; null: none
    const int64_t* channels;  // of a plain part: which it keeps; null: all
    char* target;             // first byte of the part
    bool streaming;           // full vectors of codes pass the caches
};

}  // namespace kvwise
