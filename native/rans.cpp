// Several states take turns (lanes), so that the multiply of one hides behind those of the others.
#include "rans.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvwise {
namespace {

constexpr int kBits = 14;
constexpr uint32_t kTotal = 1u << kBits;
constexpr uint32_t kLow = 1u << 16;  // states stay in [kLow, kLow << 16)
constexpr int64_t kRun = 64;         // codes between two looks at how much of the stream is left

// How many of the ends lie at or below the slot; below kWidth whatever the ends are.
template <int kWidth>
int find(const int16_t* ends, uint32_t slot) {
#if defined(__SSE2__)
    const __m128i at = _mm_set1_epi16(int16_t(slot));
    uint64_t above = 1ull << (kWidth - 1);
    for (int j = 0; j < kWidth; j += 16) {
        const auto* part = reinterpret_cast<const __m128i*>(ends + j);
        const __m128i low = _mm_cmpgt_epi16(_mm_loadu_si128(part), at);
        const __m128i high = _mm_cmpgt_epi16(_mm_loadu_si128(part + 1), at);
        above |= uint64_t(uint32_t(_mm_movemask_epi8(_mm_packs_epi16(low, high)))) << j;
    }
    return __builtin_ctzll(above);
#else
    int count = 0;
    for (int j = 0; j < kWidth - 1; ++j) count += uint32_t(ends[j]) <= slot;
    return count;
#endif
}

struct Decoder {
    uint32_t* states;
    uint32_t mask;      // lanes - 1
    const uint8_t* at;  // next word
    const uint8_t* end;
    int64_t index = 0;  // codes so far

    // kGuarded: the stream may end inside this run; false if it does.
    template <int kWidth, bool kGuarded>
    bool run(const int16_t* ends, int64_t count, uint8_t* codes, int64_t stride) {
        const uint8_t* next = at;
        for (int64_t k = 0; k < count; ++k) {
            uint32_t& state = states[uint32_t(index + k) & mask];
            const uint32_t slot = state & (kTotal - 1);
            const int code = find<kWidth>(ends, slot);
            const uint32_t before = uint16_t(ends[code - (code > 0)]);
            const uint32_t start = code > 0 ? before : 0;
            const uint32_t x = (uint32_t(uint16_t(ends[code])) - start) * (state >> kBits) + slot - start;
            const bool refill = x < kLow;
            if (kGuarded && refill && next == end) return false;
            uint16_t word = 0;
            if (!kGuarded || refill) std::memcpy(&word, next, 2);
            state = refill ? x << 16 | word : x;
            next += 2 * int(refill);
            codes[k * stride] = uint8_t(code);
        }
        index += count;
        at = next;
        return true;
    }

    template <int kWidth>
    bool column(const int16_t* ends, int64_t num_rows, uint8_t* codes, int64_t stride) {
        for (int64_t row = 0; row < num_rows; row += kRun) {
            const int64_t count = std::min(kRun, num_rows - row);
            const bool ample = (end - at) / 2 > count;  // a word may be looked at without being taken
            uint8_t* out = codes + row * stride;
            if (!(ample ? run<kWidth, false>(ends, count, out, stride) : run<kWidth, true>(ends, count, out, stride)))
                return false;
        }
        return true;
    }

    template <int kWidth>
    bool all(const RansTables& tables, uint8_t* codes) {
        const int16_t* ends = tables.ends;
        for (const int64_t rows : tables.rows) {
            for (int64_t c = 0; c < tables.columns; ++c, ends += kWidth)
                if (!column<kWidth>(ends, rows, codes + c, tables.columns)) return false;
            codes += rows * tables.columns;
        }
        return true;
    }
};

void check(const RansTables& tables, int lanes) {
    const int64_t width = tables.width;
    if (width != 16 && width != 32 && width != 64)
        throw std::invalid_argument("a distribution has 16, 32 or 64 codes, got " + std::to_string(width));
    if (lanes < 1 || lanes > 64 || (lanes & (lanes - 1)))
        throw std::invalid_argument("lanes must be a power of two up to 64, got " + std::to_string(lanes));
}

}  // namespace

int64_t RansTables::num_codes() const {
    int64_t total = 0;
    for (const int64_t count : rows) total += count * columns;
    return total;
}

int64_t rans_encode(const RansTables& tables, int lanes, const uint8_t* codes, uint8_t* out, int64_t capacity) {
    check(tables, lanes);
    int64_t index = tables.num_codes();
    if (capacity < 4 * lanes + 2 * index) throw std::invalid_argument("the buffer is too small for any codes");
    std::vector<uint32_t> states(lanes, kLow);
    uint8_t* at = out + capacity;
    // Backwards: what the decoder meets first is written last.
    codes += index;
    const int16_t* ends = tables.ends + int64_t(tables.rows.size()) * tables.columns * tables.width;
    for (auto rows = tables.rows.rbegin(); rows != tables.rows.rend(); ++rows) {
        codes -= *rows * tables.columns;
        for (int64_t c = tables.columns - 1; c >= 0; --c) {
            ends -= tables.width;
            for (int64_t row = *rows - 1; row >= 0; --row) {
                const int code = codes[row * tables.columns + c];
                const uint32_t start = code > 0 && code < tables.width ? uint16_t(ends[code - 1]) : 0;
                const uint32_t slots = code < tables.width ? uint16_t(ends[code]) - start : 0;
                if (slots == 0 || slots > kTotal) {
                    throw std::invalid_argument("code " + std::to_string(code) + " has no slots");
                }
                uint32_t& state = states[uint32_t(--index) & uint32_t(lanes - 1)];
                if (state >= uint64_t(slots) << (32 - kBits)) {
                    const uint16_t word = uint16_t(state);
                    at -= 2;
                    std::memcpy(at, &word, 2);
                    state >>= 16;
                }
                state = (state / slots << kBits) + state % slots + start;
            }
        }
    }
    at -= 4 * lanes;
    std::memcpy(at, states.data(), 4 * lanes);
    return out + capacity - at;
}

bool rans_decode(const RansTables& tables, int lanes, const uint8_t* stream, int64_t length, uint8_t* codes) {
    check(tables, lanes);
    if (length < 4 * lanes || length % 2) return false;
    std::vector<uint32_t> states(lanes);
    std::memcpy(states.data(), stream, 4 * lanes);
    Decoder decoder{states.data(), uint32_t(lanes - 1), stream + 4 * lanes, stream + length};
    const bool done = tables.width == 16   ? decoder.all<16>(tables, codes)
                      : tables.width == 32 ? decoder.all<32>(tables, codes)
                                           : decoder.all<64>(tables, codes);
    return done && decoder.at == decoder.end &&
           std::all_of(states.begin(), states.end(), [](uint32_t state) { return state == kLow; });
}

}  // namespace kvwise
