// Sealing: rows of open pages into packed ones.
#pragma once

#include <cstdint>

#include "tasks.h"

namespace kvwise {

// Open rows: an arena [num_slots, dim] of a storage type.
struct OpenRows {
    const char* data;
    int64_t num_slots;
    int32_t dim;
    Storage storage;
};

// Rows at slots [n, page_tokens] into the keys, or the values, of pages [n]; channels [n, dim of the part] or null.
// Slots, pages or channels outside throw std::invalid_argument before anything is written.
void seal_pages(const InstructionSet& set, const OpenRows& rows, const int64_t* slots, const PackedPages& packed,
                bool keys, const int64_t* pages, const int64_t* channels, int64_t n, int num_threads);

// The row at slots[i] as value packed_slots[i] (page * page_tokens + row), for parts whose rows stand alone.
void seal_value_rows(const InstructionSet& set, const OpenRows& rows, const int64_t* slots, const PackedPages& packed,
                     const int64_t* packed_slots, int64_t n, int num_threads);

// The layout of a part. `bits` 0: rows of `storage`; else codes along an axis. `upper_only` reads split codes by their
// upper plane.
PackedPart packed_part(int64_t first, int64_t page_tokens, int32_t dim, Storage storage, int32_t bits, bool by_channel,
                       int32_t group, bool split, bool upper_only);

}  // namespace kvwise
