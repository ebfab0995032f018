// Rows of numbers into codes, float8 or plain rows of a packed page, bit for bit as kernels/packed.py has it. Included
// by instruction_set.cpp, once per instruction set.

namespace {

constexpr float kLargestHalf = 65504.0f;
constexpr float kLargestFloat8 = 448.0f;
constexpr int kMaxSealDim = kMaxPackedDim + kCodeUnit;

inline const char* row_at(const SealTask& task, int64_t i) {
    return task.rows + task.slots[i] * task.row_bytes;
}

// Row i as float32, `dim` numbers and zeros to whole units.
inline void load_row(const SealTask& task, int64_t i, int32_t dim, float* out) {
    const char* row = row_at(task, i);
    with_storage(task.storage, [&](auto storage) {
        using S = decltype(storage);
        const auto* at = reinterpret_cast<const typename S::Bits*>(row);
        int32_t d = 0;
        for (; d + Vec::kLanes <= dim; d += Vec::kLanes) store(out + d, load_as_float(S{}, at + d));
        if (d < dim) store(out + d, load_tail(S{}, at + d, dim - d)), d += Vec::kLanes;
        for (; d % kCodeUnit; d += Vec::kLanes) store(out + d, zero());
    });
}

// Step, zero and the inverse of the step of a group with these extremes; step and zero are float16 from here on.
struct Affine {
    uint16_t step_bits, zero_bits;
    float step, zero, inverse;
};

inline uint16_t to_half(float x) {
    uint16_t narrowed[Vec::kLanes];
    store_as(Float16{}, narrowed, broadcast(x));
    return narrowed[0];
}

inline Affine affine_of(float low, float high, int32_t levels) {
    Affine a;
    float step = (high - low) / float(levels);
    step = step < kLargestHalf ? step : kLargestHalf;
    low = low < -kLargestHalf ? -kLargestHalf : low > kLargestHalf ? kLargestHalf : low;
    a.step_bits = to_half(step);
    a.zero_bits = to_half(low);
    a.step = half_to_float(a.step_bits);
    a.zero = half_to_float(a.zero_bits);
    a.inverse = a.step == 0.0f ? 0.0f : 1.0f / a.step;
    return a;
}

// The nearest whole number of one between 0 and 255, ties to even, by pushing the fraction out of the mantissa.
inline Vec nearest(Vec x) {
    const Vec magic = broadcast(12582912.0f);
    return (x + magic) - magic;
}

inline Vec clamped(Vec x, float low, float high) {
    return smaller(larger(x, broadcast(low)), broadcast(high));
}

// Codes of 32 numbers as bytes, four to a word, of the upper plane of split codes and of the lower one; others have
// only the first.
struct UnitCodes {
    uint32_t upper[kCodeUnit / 4];
    uint32_t lower[kCodeUnit / 4];
};

inline void store_bytes(uint32_t* quads, Vec whole) {
    float numbers[Vec::kLanes];
    store(numbers, whole);
    for (int i = 0; i < Vec::kLanes; i += 4) {
        uint32_t quad = 0;
        for (int j = 0; j < 4; ++j) quad |= uint32_t(int32_t(numbers[i + j])) << (8 * j);
        quads[i / 4] = quad;
    }
}

inline void round_unit(const PackedPart& part, const float* x, const float* step, const float* zero,
                       const float* inverse, UnitCodes& codes) {
    const float levels = float(part.levels);
    for (int i = 0; i < kCodeUnit; i += Vec::kLanes) {
        const Vec value = load(x + i), factor = load(inverse + i);
        const Vec upper = nearest(clamped((value - load(zero + i)) * factor, 0.0f, levels));
        store_bytes(codes.upper + i / 4, upper);
        if (!part.split) continue;
        const Vec rest = (value - (upper * load(step + i) + load(zero + i))) * factor * broadcast(16.0f);
        store_bytes(codes.lower + i / 4, nearest(clamped(rest, -8.0f, 7.0f)) + broadcast(8.0f));
    }
}

// Words of one lane for one unit of every plane. Of 8 quads with one code a byte, plane p keeps `bits` from `shift` on.
inline void write_words(const PackedPart& part, const UnitCodes& codes, int64_t unit, int32_t lane, char* data) {
    int32_t shift = part.split ? 0 : part.bits;
    for (int32_t p = 0; p < part.num_planes; ++p) {
        const int32_t bits = part.planes[p], per_byte = 8 / bits;
        const uint32_t* quads = part.split && p == 1 ? codes.lower : codes.upper;
        if (!part.split) shift -= bits;
        const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
        char* at = data + (unit * bits * part.padded_lanes + lane) * 4;
        for (int32_t w = 0; w < bits; ++w, at += int64_t(part.padded_lanes) * 4) {
            uint32_t word = 0;
            for (int32_t s = 0; s < per_byte; ++s) word |= ((quads[w * per_byte + s] >> shift) & mask) << (s * bits);
            std::memcpy(at, &word, sizeof(word));
        }
        data += part.plane_bytes(p);
    }
}

inline uint16_t* steps_at(const PackedPart& part, char* data, int32_t group) {
    return reinterpret_cast<uint16_t*>(data + part.steps) + int64_t(group) * 2 * part.padded_inner;
}

// Steps and zeros of one group of tokens, channel by channel, from the extremes of its rows.
struct GroupSteps {
    float step[kMaxSealDim], zero[kMaxSealDim], inverse[kMaxSealDim];
};

void seal_channel_groups(const SealTask& task) {
    const PackedPart& part = *task.part;
    float low[kMaxSealDim], high[kMaxSealDim], row[kMaxSealDim];
    GroupSteps steps;
    for (int32_t group = 0; group < part.num_groups(); ++group) {
        const int64_t first = int64_t(group) * part.group;
        for (int32_t i = 0; i < part.group; ++i) {
            load_row(task, first + i, part.dim, row);
            for (int32_t d = 0; d < part.padded_inner; d += Vec::kLanes) {
                const Vec x = load(row + d);
                store(low + d, i ? smaller(load(low + d), x) : x);
                store(high + d, i ? larger(load(high + d), x) : x);
            }
        }
        uint16_t* halves = steps_at(part, task.target, group);
        for (int32_t d = 0; d < part.padded_inner; ++d) {
            const Affine a = affine_of(low[d], high[d], part.levels);
            halves[d] = a.step_bits;
            halves[part.padded_inner + d] = a.zero_bits;
            steps.step[d] = a.step;
            steps.zero[d] = a.zero;
            steps.inverse[d] = a.inverse;
        }
        for (int32_t i = 0; i < part.group; ++i) {
            load_row(task, first + i, part.dim, row);
            for (int32_t d = 0; d < part.padded_inner; d += kCodeUnit) {
                UnitCodes codes;
                round_unit(part, row + d, steps.step + d, steps.zero + d, steps.inverse + d, codes);
                write_words(part, codes, d / kCodeUnit, int32_t(first) + i, task.target);
            }
        }
    }
    // Lanes behind the last are zeros.
    const UnitCodes none{};
    for (int32_t lane = part.lanes; lane < part.padded_lanes; ++lane) {
        for (int32_t d = 0; d < part.padded_inner; d += kCodeUnit)
            write_words(part, none, d / kCodeUnit, lane, task.target);
    }
}

// Puts code `upper` (and `lower` of split codes) of inner number `at` of lanes [0, n) in place; the others in the same
// bytes stay.
inline void set_codes(const PackedPart& part, const float* upper, const float* lower, int32_t n, int32_t at,
                      char* data) {
    const int32_t unit = at / kCodeUnit, quad = at % kCodeUnit / 4;
    int32_t shift = part.split ? 0 : part.bits;
    for (int32_t p = 0; p < part.num_planes; ++p) {
        const int32_t bits = part.planes[p], per_byte = 8 / bits, mask = (1 << bits) - 1;
        const int32_t place = quad % per_byte * bits;
        const float* codes = part.split && p == 1 ? lower : upper;
        if (!part.split) shift -= bits;
        const int64_t word = int64_t(unit) * bits + quad / per_byte;
        char* bytes = data + word * part.padded_lanes * 4 + at % 4;
        for (int32_t i = 0; i < n; ++i) {
            const int32_t code = (int32_t(codes[i]) >> shift) & mask;
            bytes[4 * i] = char((bytes[4 * i] & ~(mask << place)) | code << place);
        }
        data += part.plane_bytes(p);
    }
}

inline float lowest_of(const float* x, int32_t n, float sign) {
    float lowest = sign * x[0];
    for (int32_t i = 1; i < n; ++i) lowest = sign * x[i] < lowest ? sign * x[i] : lowest;
    return lowest;
}

// Codes of one token's channels, with its own steps.
void token_codes(const SealTask& task, int64_t token, float* upper, float* lower) {
    const PackedPart& part = *task.part;
    float row[kMaxSealDim];
    load_row(task, token, part.dim, row);
    for (int32_t group = 0; group < part.num_groups(); ++group) {
        const int32_t first = group * part.group;
        const Affine a =
            affine_of(lowest_of(row + first, part.group, 1.0f), -lowest_of(row + first, part.group, -1.0f), part.levels);
        uint16_t* halves = steps_at(part, task.target, group) + token;
        halves[0] = a.step_bits;
        halves[part.padded_inner] = a.zero_bits;
        for (int32_t i = 0; i < part.group; i += Vec::kLanes) {
            // Whole vectors may run over the group's end; the next group overwrites what is its own.
            const Vec value = load(row + first + i), factor = broadcast(a.inverse);
            const Vec code = nearest(clamped((value - broadcast(a.zero)) * factor, 0.0f, float(part.levels)));
            store(upper + first + i, code);
            if (!part.split) continue;
            const Vec rest = (value - (code * broadcast(a.step) + broadcast(a.zero))) * factor * broadcast(16.0f);
            store(lower + first + i, nearest(clamped(rest, -8.0f, 7.0f)) + broadcast(8.0f));
        }
    }
}

void seal_token_row(const SealTask& task, int64_t token) {
    const PackedPart& part = *task.part;
    float upper[kMaxSealDim], lower[kMaxSealDim];
    token_codes(task, token, upper, lower);
    set_codes(part, upper, lower, part.lanes, int32_t(token), task.target);
}

// The 32 / bits tokens of one word of a plane, for all lanes: words[i] of lane i.
inline void gather_word(const float* const* codes, int32_t bits, int32_t shift, int32_t lanes, uint32_t* words) {
    const int32_t mask = (1 << bits) - 1;
    for (int32_t i = 0; i < lanes; ++i) words[i] = 0;
    for (int32_t s = 0; s < 8 / bits; ++s) {
        for (int32_t j = 0; j < 4; ++j) {
            const float* code = codes[4 * s + j];
            const int32_t place = 8 * j + s * bits;
            for (int32_t i = 0; i < lanes; ++i)
                words[i] |= uint32_t((int32_t(code[i]) >> shift) & mask) << place;
        }
    }
}

void seal_token_groups(const SealTask& task) {
    const PackedPart& part = *task.part;
    float upper[kCodeUnit][kMaxSealDim], lower[kCodeUnit][kMaxSealDim];
    const float* uppers[kCodeUnit];
    const float* lowers[kCodeUnit];
    for (int32_t at = 0; at < part.padded_inner; at += kCodeUnit) {
        for (int32_t i = 0; i < kCodeUnit; ++i) {
            uppers[i] = upper[i];
            lowers[i] = lower[i];
            if (at + i < part.inner) {
                token_codes(task, at + i, upper[i], lower[i]);
            } else {
                std::memset(upper[i], 0, sizeof(upper[i]));
                std::memset(lower[i], 0, sizeof(lower[i]));
                for (int32_t g = 0; g < part.num_groups(); ++g) {
                    steps_at(part, task.target, g)[at + i] = 0;
                    steps_at(part, task.target, g)[part.padded_inner + at + i] = 0;
                }
            }
            for (int32_t d = part.lanes; d < part.padded_lanes; ++d) upper[i][d] = lower[i][d] = 0.0f;
        }
        char* data = task.target;
        int32_t shift = part.split ? 0 : part.bits;
        for (int32_t p = 0; p < part.num_planes; ++p) {
            const int32_t bits = part.planes[p];
            if (!part.split) shift -= bits;
            const float* const* codes = part.split && p == 1 ? lowers : uppers;
            for (int32_t w = 0; w < bits; ++w) {
                uint32_t words[kMaxSealDim];
                gather_word(codes + w * (32 / bits), bits, shift, part.padded_lanes, words);
                const int64_t word = int64_t(at / kCodeUnit) * bits + w;
                std::memcpy(data + word * part.padded_lanes * 4, words, size_t(part.padded_lanes) * 4);
            }
            data += part.plane_bytes(p);
        }
    }
}

// Nearest e4m3 number, ties to even; |x| is at most 448.
inline uint8_t narrow_float8(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint8_t sign = uint8_t(bits >> 24 & 0x80);
    bits &= 0x7FFFFFFF;
    if (bits < 0x3C800000) {  // below 2**-6: even steps of 2**-9
        float small;
        std::memcpy(&small, &bits, sizeof(bits));
        small += 16384.0f;
        std::memcpy(&bits, &small, sizeof(bits));
        return sign | uint8_t(bits - 0x46800000);
    }
    bits += 0x7FFFF + (bits >> 20 & 1);
    return sign | uint8_t((bits >> 20) - (120 << 3));
}

void seal_float8(const SealTask& task) {
    const int32_t dim = task.part->dim;
    float row[kMaxSealDim], most = 0.0f;
    for (int64_t i = 0; i < task.page_tokens; ++i) {
        load_row(task, i, dim, row);
        for (int32_t d = 0; d < dim; ++d) {
            const float size = row[d] < 0.0f ? -row[d] : row[d];
            most = size > most ? size : most;
        }
    }
    const float scale = most == 0.0f ? 1.0f : most / kLargestFloat8;
    for (int64_t i = 0; i < task.page_tokens; ++i) {
        load_row(task, i, dim, row);
        auto* target = reinterpret_cast<uint8_t*>(task.target) + i * dim;
        for (int32_t d = 0; d < dim; ++d) {
            const float scaled = row[d] / scale;
            target[d] = narrow_float8(scaled > kLargestFloat8    ? kLargestFloat8
                                      : scaled < -kLargestFloat8 ? -kLargestFloat8
                                                                 : scaled);
        }
    }
    std::memcpy(task.target + task.page_tokens * dim, &scale, sizeof(scale));
}

void seal_plain_row(const SealTask& task, int64_t i) {
    const PackedPart& part = *task.part;
    const int64_t row_bytes = part.dim * bytes_of(part.storage);
    char* target = task.target + i * row_bytes;
    if (part.storage == task.storage && !task.channels) {
        std::memcpy(target, row_at(task, i), row_bytes);
        return;
    }
    float row[kMaxSealDim], chosen[kMaxSealDim];
    load_row(task, i, int32_t(task.row_bytes / bytes_of(task.storage)), row);
    for (int32_t d = 0; task.channels && d < part.dim; ++d) chosen[d] = row[task.channels[d]];
    narrow(part.storage, task.channels ? chosen : row, target, part.dim);
}

void seal_row(const SealTask& task, int64_t row) {
    task.part->coded ? seal_token_row(task, row) : seal_plain_row(task, row);
}

void seal(const SealTask& task) {
    const PackedPart& part = *task.part;
    if (part.coded) return part.by_channel ? seal_channel_groups(task) : seal_token_groups(task);
    if (part.storage == Storage::kFloat8) return seal_float8(task);
    for (int64_t i = 0; i < task.page_tokens; ++i) seal_plain_row(task, i);
}

}  // namespace
