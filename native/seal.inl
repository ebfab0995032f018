// Rows of numbers into codes, float8 or plain rows of a packed page, bit for bit as kernels/packed.py has it. Included
// by instruction_set.cpp, once per instruction set.

namespace {

constexpr float kLargestHalf = 65504.0f;
constexpr float kLargestFloat8 = 448.0f;
constexpr int kMaxSealDim = kMaxPackedDim + kCodeUnit;
constexpr int kUnitVectors = kCodeUnit / Vec::kLanes;
constexpr int64_t kSealAhead = 8;  // rows lie anywhere: ask for them early

inline const char* row_at(const SealTask& task, int64_t i) {
    return task.rows + task.slots[i] * task.row_bytes;
}

// Asks for `bytes` of row i from `first` on; rows behind the page's last are the next page's. (Always inlined: GCC
// takes a function that only prefetches for one without effect, and drops its calls.)
__attribute__((always_inline)) inline void fetch_row(const SealTask& task, int64_t i, int64_t first, int64_t bytes) {
    const int64_t* slots = i < task.page_tokens ? task.slots : task.next_slots;
    if (!slots) return;
    const char* row = task.rows + slots[i < task.page_tokens ? i : i - task.page_tokens] * task.row_bytes + first;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

// The same of row i of the next page.
__attribute__((always_inline)) inline void fetch_next(const SealTask& task, int64_t i, int64_t first, int64_t bytes) {
    if (!task.next_slots) return;
    const char* row = task.rows + task.next_slots[i] * task.row_bytes + first;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

// Numbers [d, d + kLanes) of a row of `dim`; zeros behind its end.
template <class S>
inline Vec load_from(const char* row, int32_t d, int32_t dim) {
    const auto* at = reinterpret_cast<const typename S::Bits*>(row) + d;
    if (d + Vec::kLanes <= dim) return load_as_float(S{}, at);
    return d < dim ? load_tail(S{}, at, dim - d) : zero();
}

// The same where the caller knows whether they are all there.
template <class S, bool Full>
inline Vec load_part(const char* row, int32_t d, int32_t dim) {
    if constexpr (Full) return load_as_float(S{}, reinterpret_cast<const typename S::Bits*>(row) + d);
    return load_from<S>(row, d, dim);
}

inline Vec clamped(Vec x, float low, float high) {
    return smaller(larger(x, broadcast(low)), broadcast(high));
}

// Steps, zeros and inverses of the steps of kLanes groups with these extremes; steps and zeros are float16 from here
// on.
struct Affine {
    Vec step, zero, inverse;
};

inline Affine affine_of(Vec low, Vec high, int32_t levels, uint16_t* steps, uint16_t* zeros) {
    const Vec step = smaller((high - low) / broadcast(float(levels)), broadcast(kLargestHalf));
    store_as(Float16{}, steps, step);
    store_as(Float16{}, zeros, clamped(low, -kLargestHalf, kLargestHalf));
    const Vec rounded = load_as_float(Float16{}, steps);
    const Vec inverse = select(equal(rounded, zero()), zero(), broadcast(1.0f) / rounded);
    return {rounded, load_as_float(Float16{}, zeros), inverse};
}

// The code in the lowest byte of each lane.
inline Vec round_code(Vec value, const Affine& affine, Vec levels) {
    return smaller(larger((value - affine.zero) * affine.inverse, zero()), levels) + broadcast(kWhole);
}

// Where a value lies among the codes, up to the highest; what lies below 0 or is a nan will be code 0.
inline Vec place_of(Vec value, const Affine& affine, Vec levels) {
    return smaller(levels, (value - affine.zero) * affine.inverse);
}

// The lower code, plus 8, of what such an upper one leaves.
inline Vec round_rest(Vec value, const Affine& affine, Vec upper) {
    const Vec rest = value - ((upper - broadcast(kWhole)) * affine.step + affine.zero);
    const Vec sixteenths = clamped(rest * affine.inverse * broadcast(16.0f), -8.0f, 7.0f);
    return (sixteenths + broadcast(kWhole)) - broadcast(kWhole - 8.0f);
}

inline uint16_t* steps_at(const PackedPart& part, char* data, int32_t group) {
    return reinterpret_cast<uint16_t*>(data + part.steps) + int64_t(group) * 2 * part.padded_inner;
}

constexpr int kSealTokens = 64;  // codes held at once
using LaneCodes = uint8_t[kSealTokens][kCodeUnit];

// Codes of 32 inner numbers of lanes [lane, lane + n). (Rows behind the last are read, not written.)
inline void write_lanes(const PackedPart& part, const LaneCodes& upper, const LaneCodes& lower, int32_t n, int64_t unit,
                        int64_t lane, char* data, bool streaming) {
    for (int32_t i = 0; i < n; i += Vec::kLanes) {
        Quads high[kQuads], low[kQuads];
        quads_of(upper + i, high);
        if (part.split) quads_of(lower + i, low);
        write_unit(part, high, low, n - i < Vec::kLanes ? n - i : Vec::kLanes, unit, lane + i, data, streaming);
    }
}

// 32 channels of one group of tokens: their steps, then the codes. `Full`: the head has all 32.
template <class S, bool Split, bool Full>
void seal_unit_of_tokens(const SealTask& task, int32_t group, int32_t d) {
    const PackedPart& part = *task.part;
    const int64_t first = int64_t(group) * part.group, end = first + part.group, row_bytes = task.row_bytes;
    const int32_t dim = part.dim;
    const char* rows = task.rows;
    const int64_t* slots = task.slots;
    const auto at = [&](int64_t i, int v) {
        const char* row = rows + slots[i] * row_bytes;
        return load_part<S, Full>(row, d + v * Vec::kLanes, dim);
    };
    Vec low[kUnitVectors], high[kUnitVectors];
    for (int v = 0; v < kUnitVectors; ++v) low[v] = high[v] = at(first, v);
    for (int64_t i = first + 1; i < end; ++i) {
        for (int v = 0; v < kUnitVectors; ++v) {
            const Vec x = at(i, v);
            low[v] = smaller(low[v], x);
            high[v] = larger(high[v], x);
        }
    }
    uint16_t* steps = steps_at(part, task.target, group) + d;
    Affine affine[kUnitVectors];
    for (int v = 0; v < kUnitVectors; ++v) {
        affine[v] = affine_of(low[v], high[v], part.levels, steps + v * Vec::kLanes,
                              steps + part.padded_inner + v * Vec::kLanes);
    }
    const Vec levels = broadcast(float(part.levels));
    constexpr int64_t size = sizeof(typename S::Bits);
    LaneCodes upper, lower;
    for (int64_t from = first; from < end; from += kSealTokens) {
        const int32_t n = int32_t(end - from < kSealTokens ? end - from : kSealTokens);
        for (int32_t i = 0; i < n; ++i) {
            fetch_next(task, from + i, d * size, kCodeUnit * size);
            Vec code[kUnitVectors], rest[kUnitVectors];
            for (int v = 0; v < kUnitVectors; ++v) {
                const Vec x = at(from + i, v);
                code[v] = Split ? round_code(x, affine[v], levels) : place_of(x, affine[v], levels);
                if (Split) rest[v] = round_rest(x, affine[v], code[v]);
                if (Split) code[v] = code[v] - broadcast(kWhole);
            }
            store_unit(upper[i], code);
            if (Split) store_unit(lower[i], rest);
        }
        write_lanes(part, upper, lower, n, d / kCodeUnit, from, task.target, task.streaming);
    }
}

template <class S, bool Split>
void seal_channel_groups(const SealTask& task) {
    const PackedPart& part = *task.part;
    for (int32_t group = 0; group < part.num_groups(); ++group) {
        for (int32_t d = 0; d < part.padded_inner; d += kCodeUnit) {
            d + kCodeUnit <= part.dim ? seal_unit_of_tokens<S, Split, true>(task, group, d)
                                      : seal_unit_of_tokens<S, Split, false>(task, group, d);
        }
    }
    const LaneCodes none = {};
    for (int32_t d = 0; part.lanes < part.padded_lanes && d < part.padded_inner; d += kCodeUnit)
        write_lanes(part, none, none, part.padded_lanes - part.lanes, d / kCodeUnit, part.lanes, task.target, false);
}

// Least and greatest of numbers [from, from + n) of a row.
template <class S>
inline void extremes(const char* row, int32_t from, int32_t n, float* low, float* high) {
    if (n % Vec::kLanes == 0) {
        Vec least = load_part<S, true>(row, from, 0), most = least;
        for (int32_t d = Vec::kLanes; d < n; d += Vec::kLanes) {
            const Vec x = load_part<S, true>(row, from + d, 0);
            least = smaller(least, x);
            most = larger(most, x);
        }
        *low = -reduce_max(zero() - least);
        *high = reduce_max(most);
        return;
    }
    for (int32_t d = 0; d < n; ++d) {
        float x[Vec::kLanes];
        store(x, load_from<S>(row, from + d, from + d + 1));
        *low = d && *low < x[0] ? *low : x[0];
        *high = d && *high > x[0] ? *high : x[0];
    }
}

// Steps and zeros of 32 tokens for one group of channels.
struct TokenSteps {
    float step[kCodeUnit], zero[kCodeUnit], inverse[kCodeUnit];

    Affine of(int32_t i) const { return {broadcast(step[i]), broadcast(zero[i]), broadcast(inverse[i])}; }
};

// Of tokens [at, at + n); those behind get zeros.
template <class S>
void steps_of_tokens(const SealTask& task, int32_t group, int32_t at, int32_t n, TokenSteps& steps) {
    const PackedPart& part = *task.part;
    float low[kCodeUnit] = {}, high[kCodeUnit] = {};
    for (int32_t i = 0; i < n; ++i) {
        extremes<S>(row_at(task, at + i), group * part.group, part.group, low + i, high + i);
    }
    uint16_t* halves = steps_at(part, task.target, group) + at;
    for (int32_t i = 0; i < kCodeUnit; i += Vec::kLanes) {
        const Affine a =
            affine_of(load(low + i), load(high + i), part.levels, halves + i, halves + part.padded_inner + i);
        store(steps.step + i, a.step);
        store(steps.zero + i, a.zero);
        store(steps.inverse + i, a.inverse);
    }
}

inline void store_codes(uint32_t* codes, Vec code) {
    std::memcpy(codes, &code.v, sizeof(code.v));
}

// Of tokens [at, at + n) and kLanes channels from d on; tokens behind get zeros.
template <class S, bool Split, bool Full>
void round_tokens(const SealTask& task, const TokenSteps& steps, int32_t at, int32_t n, int32_t d, Quads* upper,
                  Quads* lower) {
    constexpr int64_t size = sizeof(typename S::Bits);
    const Vec levels = broadcast(float(task.part->levels));
    const int64_t row_bytes = task.row_bytes;
    const int64_t* slots = task.slots + at;
    const char* rows = task.rows;
    const int32_t dim = task.part->dim;
    const bool line = d * size % 64 == 0;
    for (int q = 0; q < kQuads; ++q) {
        Vec code[4], rest[4];
        for (int j = 0; j < 4; ++j) {
            const int32_t i = 4 * q + j;
            code[j] = rest[j] = zero();
            if (i >= n) continue;
            if (line) fetch_next(task, at + i, d * size, Vec::kLanes * size);
            const Vec x = load_part<S, Full>(rows + slots[i] * row_bytes, d, dim);
            code[j] = Split ? round_code(x, steps.of(i), levels) : place_of(x, steps.of(i), levels);
            if (Split) rest[j] = round_rest(x, steps.of(i), code[j]);
            if (Split) code[j] = code[j] - broadcast(kWhole);
        }
        upper[q] = quads_from(code);
        if (Split) lower[q] = quads_from(rest);
    }
}

template <class S, bool Split>
void seal_token_groups(const SealTask& task) {
    const PackedPart& part = *task.part;
    const bool streaming = task.streaming;
    Quads upper[kQuads], lower[kQuads];
    const auto write = [&](int32_t lanes, int32_t unit, int32_t d) {
        write_unit(part, upper, lower, lanes < Vec::kLanes ? lanes : Vec::kLanes, unit, d, task.target, streaming);
    };
    for (int32_t at = 0; at < part.padded_inner; at += kCodeUnit) {
        const int32_t n = part.inner - at < kCodeUnit ? part.inner - at : kCodeUnit, unit = at / kCodeUnit;
        for (int32_t group = 0; group < part.num_groups(); ++group) {
            TokenSteps steps;
            steps_of_tokens<S>(task, group, at, n, steps);
            const int32_t end = (group + 1) * part.group;
            for (int32_t d = group * part.group; d < end; d += Vec::kLanes) {
                d + Vec::kLanes <= part.dim ? round_tokens<S, Split, true>(task, steps, at, n, d, upper, lower)
                                            : round_tokens<S, Split, false>(task, steps, at, n, d, upper, lower);
                write(end - d, unit, d);
            }
        }
    }
    // Lanes behind the last channel are zeros.
    for (int q = 0; q < kQuads; ++q) upper[q] = lower[q] = Quads{};
    for (int32_t d = part.lanes; d < part.padded_lanes; d += Vec::kLanes) {
        for (int32_t unit = 0; unit < part.padded_inner / kCodeUnit; ++unit) write(part.padded_lanes - d, unit, d);
    }
}

// One token of values, among others that stay.
template <class S>
void seal_token_row(const SealTask& task, int64_t token) {
    const PackedPart& part = *task.part;
    const int32_t unit = int32_t(token) / kCodeUnit, quad = int32_t(token) % kCodeUnit / 4, byte = int32_t(token) % 4;
    const char* row = row_at(task, token);
    for (int32_t group = 0; group < part.num_groups(); ++group) {
        float low, high;
        extremes<S>(row, group * part.group, part.group, &low, &high);
        uint16_t step[Vec::kLanes], zero_of[Vec::kLanes];
        const Affine affine = affine_of(broadcast(low), broadcast(high), part.levels, step, zero_of);
        uint16_t* halves = steps_at(part, task.target, group) + token;
        halves[0] = step[0];
        halves[part.padded_inner] = zero_of[0];
        const int32_t end = (group + 1) * part.group;
        for (int32_t d = group * part.group; d < end; d += Vec::kLanes) {
            uint32_t upper[Vec::kLanes], lower[Vec::kLanes];
            const Vec x = load_from<S>(row, d, part.dim), code = round_code(x, affine, broadcast(float(part.levels)));
            store_codes(upper, code);
            store_codes(lower, round_rest(x, affine, code) + broadcast(kWhole));
            const int32_t lanes = end - d < Vec::kLanes ? end - d : Vec::kLanes;
            for_planes(part, upper, lower, task.target,
                       [&](int32_t bits, int32_t shift, const uint32_t* codes, char* plane) {
                           const int64_t word = int64_t(unit) * bits + quad / (8 / bits);
                           char* at = plane + (word * part.padded_lanes + d) * 4;
                           const uint32_t mask = (1u << bits) - 1, place = 8 * byte + quad % (8 / bits) * bits;
                           uint32_t words[Vec::kLanes] = {};
                           std::memcpy(words, at, lanes * sizeof(uint32_t));
                           for (int i = 0; i < Vec::kLanes; ++i)
                               words[i] = (words[i] & ~(mask << place)) | ((codes[i] >> shift) & mask) << place;
                           std::memcpy(at, words, lanes * sizeof(uint32_t));
                       });
        }
    }
}

// Nearest e4m3 numbers, ties to even, of numbers up to 448 in size.
inline Quads narrow_float8(Vec x) {
    Quads bits, small;
    std::memcpy(&bits, &x, sizeof(bits));
    const Quads size = bits & 0x7FFFFFFF;
    // Below 2**-6 steps are even, 2**-9: a sum with 2**14 has no bits for less.
    const Vec sum = larger(x, zero() - x) + broadcast(16384.0f);
    std::memcpy(&small, &sum, sizeof(small));
    const Quads large = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3);
    const Quads is_small = (Quads)(size < 0x3C800000);
    return ((small - 0x46800000) & is_small) | (large & ~is_small) | (bits >> 24 & 0x80);
}

template <class S>
void seal_float8(const SealTask& task) {
    const int32_t dim = task.part->dim;
    Vec largest = zero();
    for (int64_t i = 0; i < task.page_tokens; ++i) {
        fetch_row(task, i + task.page_tokens, 0, task.row_bytes);
        for (int32_t d = 0; d < dim; d += Vec::kLanes) {
            const Vec x = load_from<S>(row_at(task, i), d, dim);
            largest = larger(largest, larger(x, zero() - x));
        }
    }
    const float most = reduce_max(largest) / kLargestFloat8, scale = most == 0.0f ? 1.0f : most;
    const Vec inverse = broadcast(1.0f / scale);
    for (int64_t i = 0; i < task.page_tokens; ++i) {
        auto* out = reinterpret_cast<uint8_t*>(task.target) + i * dim;
        for (int32_t d = 0; d < dim; d += kCodeUnit) {
            Quads codes[kUnitVectors];
            for (int v = 0; v < kUnitVectors; ++v) {
                const Vec x = load_from<S>(row_at(task, i), d + v * Vec::kLanes, dim) * inverse;
                codes[v] = narrow_float8(clamped(x, -kLargestFloat8, kLargestFloat8));
            }
            if (d + kCodeUnit <= dim) {
                store_bytes(out + d, codes);
            } else {
                uint8_t last[kCodeUnit];
                store_bytes(last, codes);
                std::memcpy(out + d, last, dim - d);
            }
        }
    }
    std::memcpy(task.target + task.page_tokens * dim, &scale, sizeof(scale));
}

template <class S>
void seal_plain_row(const SealTask& task, int64_t i) {
    const PackedPart& part = *task.part;
    const auto* row = reinterpret_cast<const typename S::Bits*>(row_at(task, i));
    char* target = task.target + i * part.dim * bytes_of(part.storage);
    if (part.storage == task.storage) {
        if (!task.channels) return void(std::memcpy(target, row, part.dim * sizeof(*row)));
        auto* chosen = reinterpret_cast<typename S::Bits*>(target);
        for (int32_t d = 0; d < part.dim; ++d) chosen[d] = row[task.channels[d]];
        return;
    }
    float wide[kMaxSealDim];
    const int32_t dim = int32_t(task.row_bytes / int64_t(sizeof(*row)));
    for (int32_t d = 0; d < dim; d += Vec::kLanes)
        store(wide + d, load_from<S>(reinterpret_cast<const char*>(row), d, dim));
    float chosen[kMaxSealDim];
    for (int32_t d = 0; task.channels && d < part.dim; ++d) chosen[d] = wide[task.channels[d]];
    narrow(part.storage, task.channels ? chosen : wide, target, part.dim);
}

void seal_row(const SealTask& task, int64_t row) {
    with_storage(task.storage, [&](auto storage) {
        using S = decltype(storage);
        task.part->coded ? seal_token_row<S>(task, row) : seal_plain_row<S>(task, row);
    });
}

void seal(const SealTask& given) {
    SealTask task = given;
    task.streaming = can_stream(*task.part, task.target);
    const PackedPart& part = *task.part;
    for (int64_t at = 0; part.coded && !task.streaming && at < part.steps; at += 64)
        __builtin_prefetch(task.target + at, 1);
    with_storage(task.storage, [&](auto storage) {
        using S = decltype(storage);
        if (part.coded && part.split)
            return part.by_channel ? seal_channel_groups<S, true>(task) : seal_token_groups<S, true>(task);
        if (part.coded)
            return part.by_channel ? seal_channel_groups<S, false>(task) : seal_token_groups<S, false>(task);
        if (part.storage == Storage::kFloat8) return seal_float8<S>(task);
        for (int64_t i = 0; i < task.page_tokens; ++i) {
            fetch_row(task, i + kSealAhead, 0, task.row_bytes);
            seal_plain_row<S>(task, i);
        }
    });
}

}  // namespace
