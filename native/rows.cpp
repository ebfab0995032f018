// Row moves, split over threads by runs long enough to be worth a thread.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "threads.h"

namespace kvwise {
namespace {

constexpr int64_t kBytesPerRun = 1 << 17;
constexpr int64_t kRowsAhead = 8;  // rows lie anywhere: ask for them early

char* row_at(const Arena& arena, int64_t slot) {
    if (slot < 0 || slot >= arena.num_slots) {
        throw std::invalid_argument("slot " + std::to_string(slot) + " lies outside the arena of " +
                                    std::to_string(arena.num_slots) + " slots");
    }
    return arena.data + slot * arena.row_bytes;
}

void check_inside(int64_t first, int64_t stop, int64_t width) {
    if (first < 0 || stop > width) {
        throw std::invalid_argument("slots " + std::to_string(first) + " to " + std::to_string(stop) +
                                    " lie outside a row of " + std::to_string(width));
    }
}

// Always inlined: GCC takes a function that only prefetches for one without effect, and drops its calls.
__attribute__((always_inline)) inline void prefetch_row(const Arena& arena, int64_t slot) {
    if (slot < 0 || slot >= arena.num_slots) return;
    const char* row = arena.data + slot * arena.row_bytes;
    for (int64_t i = 0; i < std::min<int64_t>(arena.row_bytes, 1024); i += 64) __builtin_prefetch(row + i);
}

// The pairs' first members lie `step` apart, the second ones `apart` behind them.
inline void turn_pairs(const float* __restrict row, const float* __restrict cos, const float* __restrict sin,
                       int64_t half, int64_t step, int64_t apart, float* __restrict out) {
    for (int64_t j = 0; j < half; ++j) {
        const float x = row[j * step], y = row[j * step + apart];
        out[j * step] = x * cos[j] - y * sin[j];
        out[j * step + apart] = x * sin[j] + y * cos[j];
    }
}

template <class Body>
void for_runs(int64_t n, int64_t bytes_each, int num_threads, Body body) {
    const int64_t step = std::max<int64_t>(1, kBytesPerRun / std::max<int64_t>(1, bytes_each));
    parallel_for((n + step - 1) / step, num_threads,
                 [&](int64_t run, int) { body(run * step, std::min(n, (run + 1) * step)); });
}

}  // namespace

void gather_rows(const Arena& arena, const int64_t* slots, int64_t n, char* out, int num_threads) {
    for_runs(n, arena.row_bytes, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            if (i + kRowsAhead < to) prefetch_row(arena, slots[i + kRowsAhead]);
            std::memcpy(out + i * arena.row_bytes, row_at(arena, slots[i]), arena.row_bytes);
        }
    });
}

void scatter_rows(const char* rows, const Arena& arena, const int64_t* slots, int64_t n, int num_threads) {
    for_runs(n, arena.row_bytes, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            if (i + kRowsAhead < to) prefetch_row(arena, slots[i + kRowsAhead]);
            std::memcpy(row_at(arena, slots[i]), rows + i * arena.row_bytes, arena.row_bytes);
        }
    });
}

void move_rows(const Arena& arena, const int64_t* source, const int64_t* target, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        if (i + kRowsAhead < n) prefetch_row(arena, source[i + kRowsAhead]);
        std::memmove(row_at(arena, target[i]), row_at(arena, source[i]), arena.row_bytes);
    }
}

void copy_rows(const Arena& source, const int64_t* source_rows, const Arena& target, const int64_t* target_rows,
               int64_t n, int num_threads) {
    for_runs(n, source.row_bytes, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            if (i + 1 < to) prefetch_row(source, source_rows[i + 1]);
            std::memmove(row_at(target, target_rows[i]), row_at(source, source_rows[i]), source.row_bytes);
        }
    });
}

void lowest_of_rows(const InstructionSet& set, const RankedRows& rows, float* least, int64_t* where, int num_threads) {
    for_runs(rows.n, rows.width * int64_t(sizeof(float)), num_threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const int64_t first = rows.first[i], stop = rows.stop[i];
            check_inside(first, stop, rows.width);
            set.lowest(rows.numbers + i * rows.width + first, std::max<int64_t>(0, stop - first), least + i, where + i);
            where[i] += first;
        }
    });
}

void lowest_of_slots(const InstructionSet& set, const RankedSlots& slots, float* least, int64_t* where,
                     int num_threads) {
    const int64_t size = slots.block_size, most = slots.width * size;
    for_runs(slots.n, most * int64_t(sizeof(float)), num_threads, [&](int64_t from, int64_t to) {
        std::vector<float> scratch(most);
        for (int64_t i = from; i < to; ++i) {
            const int64_t first = slots.first[i], stop = std::max<int64_t>(first, slots.stop[i]);
            const int32_t* table = slots.tables + i * slots.width;
            check_inside(first, stop, most);
            for (int64_t page = first / size; page * size < stop; ++page) {
                if (table[page] >= 0 && table[page] < slots.num_pages) continue;
                throw std::invalid_argument("page " + std::to_string(table[page]) + " lies outside columns of " +
                                            std::to_string(slots.num_pages) + " pages");
            }
            const MassTask task{slots.mass, slots.positions, table,          size, first,
                                stop,       slots.newest[i], scratch.data()};
            set.lowest_mass(task, least + i, where + i);
            where[i] += first;
        }
    });
}

int64_t angles_of(const int64_t* positions, int64_t n, const double* inv_freq, int64_t half, float* cos, float* sin,
                  int64_t* which) {
    std::unordered_map<int64_t, int64_t> known;
    for (int64_t i = 0; i < n; ++i) {
        if (i > 0 && positions[i] == positions[i - 1]) {
            which[i] = which[i - 1];
            continue;
        }
        const auto [found, is_new] = known.try_emplace(positions[i], int64_t(known.size()));
        which[i] = found->second;
        if (!is_new) continue;
        for (int64_t j = 0; j < half; ++j) {
            const double angle = double(positions[i]) * inv_freq[j];
            cos[which[i] * half + j] = float(std::cos(angle));
            sin[which[i] * half + j] = float(std::sin(angle));
        }
    }
    return int64_t(known.size());
}

void turn_rows(const PlainRows& rows, const Angles& angles, const int64_t* which, int64_t n, float* out,
               int num_threads) {
    const int64_t half = angles.half, dim = rows.dim;
    for_runs(n, 2 * dim * int64_t(sizeof(float)), num_threads, [&](int64_t from, int64_t to) {
        int64_t source = from % rows.num_rows;
        for (int64_t i = from; i < to; ++i, source = source + 1 < rows.num_rows ? source + 1 : 0) {
            if (which[i] < 0 || which[i] >= angles.num_angles) {
                throw std::invalid_argument("row " + std::to_string(i) + " turns by angle " + std::to_string(which[i]) +
                                            ", there are " + std::to_string(angles.num_angles));
            }
            if (i + kRowsAhead < to) {  // written to: a store that misses would wait
                for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(out + (i + kRowsAhead) * dim + d, 1);
            }
            const float* row = rows.data + source * dim;
            const float *cos = angles.cos + which[i] * half, *sin = angles.sin + which[i] * half;
            float* turned = out + i * dim;
            angles.interleaved ? turn_pairs(row, cos, sin, half, 2, 1, turned)
                               : turn_pairs(row, cos, sin, half, 1, half, turned);
            std::memcpy(turned + 2 * half, row + 2 * half, (dim - 2 * half) * sizeof(float));
        }
    });
}

void append_rows(const InstructionSet& set, const NewRows& rows, const Arena& arena, const AppendTarget& target,
                 int num_threads) {
    for_runs(target.num_tokens, target.num_heads * arena.row_bytes, num_threads, [&](int64_t from, int64_t to) {
        for (int64_t t = from; t < to; ++t) {
            for (int64_t h = 0; h < target.num_heads; ++h) {
                int64_t slot = target.slots[target.per_head ? t * target.num_heads + h : t];
                if (!target.per_head) {
                    const int64_t page = slot / target.block_size * target.page_stride + target.page_offset + h;
                    slot = page * target.block_size + slot % target.block_size;
                }
                char* to_row = row_at(arena, slot);
                const char* from_row = rows.data + t * rows.token_bytes + h * rows.head_bytes;
                if (rows.narrow) {
                    set.narrow(rows.storage, reinterpret_cast<const float*>(from_row), to_row, rows.dim);
                } else {
                    std::memcpy(to_row, from_row, arena.row_bytes);
                }
            }
        }
    });
}

}  // namespace kvwise
