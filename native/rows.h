// Moving rows of KV: bytes in, bytes out, nothing of attention.
#pragma once

#include <cstdint>

#include "tasks.h"

namespace kvwise {

// A row is row_bytes bytes; an arena is num_slots rows side by side. Slots outside throw std::invalid_argument.
struct Arena {
    char* data;
    int64_t num_slots;
    int64_t row_bytes;
};

void gather_rows(const Arena& arena, const int64_t* slots, int64_t n, char* out, int num_threads);
void scatter_rows(const char* rows, const Arena& arena, const int64_t* slots, int64_t n, int num_threads);

// Strictly in order: a slot may be read after an earlier move wrote it.
void move_rows(const Arena& arena, const int64_t* source, const int64_t* target, int64_t n);

// A "row" of both arenas is a whole page here.
void copy_rows(const Arena& source, const int64_t* source_rows, const Arena& target, const int64_t* target_rows,
               int64_t n, int num_threads);

// Of each of n rows of `width` numbers, the least between first[i] and stop[i] and where in the row it lies first.
struct RankedRows {
    const float* numbers;
    int64_t width;
    const int32_t* first;
    const int32_t* stop;
    int64_t n;
};

void lowest_of_rows(const InstructionSet& set, const RankedRows& rows, float* least, int64_t* where, int num_threads);

// Of each of n heads, the least mass between slots first[i] and stop[i] in table order, columns [pages, block_size] by
// page tables [n, width], among positions up to newest[i].
struct RankedSlots {
    const float* mass;
    const int32_t* positions;
    int64_t num_pages;
    int64_t block_size;
    const int32_t* tables;
    int64_t width;
    const int32_t* first;
    const int32_t* stop;
    const int32_t* newest;
    int64_t n;
};

void lowest_of_slots(const InstructionSet& set, const RankedSlots& slots, float* least, int64_t* where,
                     int num_threads);

// Rows float32 [num_rows, dim] and angles [num_angles, half] by which their first 2 * half dims can turn: halves, or
// interleaved pairs.
struct PlainRows {
    const float* data;
    int64_t num_rows;
    int64_t dim;
};

struct Angles {
    const float* cos;
    const float* sin;
    int64_t num_angles;
    int64_t half;
    bool interleaved;
};

// Of n positions, the cosines and sines [m, half] of the m different ones, in the order in which they first come; whose
// is which [n]. cos and sin have room for n. Returns m.
int64_t angles_of(const int64_t* positions, int64_t n, const double* inv_freq, int64_t half, float* cos, float* sin,
                  int64_t* which);

// Row i of out [n, dim] is row i % num_rows turned by angle which[i].
void turn_rows(const PlainRows& rows, const Angles& angles, const int64_t* which, int64_t n, float* out,
               int num_threads);

// New rows [T, H, dim] of keys or values and where they go.
struct NewRows {
    const char* data;
    int64_t token_bytes;  // from one token to the next
    int64_t head_bytes;
    bool narrow;  // float32 rows for an arena of `storage`; otherwise rows already have its dtype
    Storage storage;
    int64_t dim;
};

struct AppendTarget {
    int64_t num_tokens;
    int64_t num_heads;
    const int64_t* slots;  // [T] of whole blocks, or [T, H] in page space
    bool per_head;
    int64_t block_size;
    int64_t page_stride;
    int64_t page_offset;
};

void append_rows(const InstructionSet& set, const NewRows& rows, const Arena& arena, const AppendTarget& target,
                 int num_threads);

}  // namespace kvwise
