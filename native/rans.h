// Range coding of small codes (rANS, Duda arXiv 1311.2540): the same stream as kvwise/tiers/codec/rans.py describes.
#pragma once

#include <cstdint>
#include <vector>

namespace kvwise {

// Codes lie in parts: part p holds rows[p] x columns bytes. They are coded part by part, column by column, a column's
// rows in a run, and column c of part p has the distribution number p * columns + c.
struct RansTables {
    const int16_t* ends;  // [parts * columns, width]: where each code's slots end, of 2^14
    int64_t width;        // 16, 32 or 64
    std::vector<int64_t> rows;
    int64_t columns;

    int64_t num_codes() const;
};

// Writes the stream to the end of out[0, capacity) and returns its length. capacity is at least 4 * lanes + 2 * codes.
// lanes is a power of two. A code without slots throws std::invalid_argument.
int64_t rans_encode(const RansTables& tables, int lanes, const uint8_t* codes, uint8_t* out, int64_t capacity);

// Whatever the stream is, only stream[0, length) is read; false if it is none that rans_encode could have written.
bool rans_decode(const RansTables& tables, int lanes, const uint8_t* stream, int64_t length, uint8_t* codes);

}  // namespace kvwise
