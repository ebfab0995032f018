// Codes as float32 rows: exact, for any part, any instruction set and any number of query rows. Included by
// instruction_set.cpp, once per instruction set.

namespace {

constexpr int kUnpackLanes = 64;  // channels of one token unpacked at once

// Codes of one inner number for lanes [from, from + n): of every plane, the highest bits first.
inline void read_codes(const PackedPart& part, const char* data, int32_t from, int32_t n, int32_t at, int32_t* codes) {
    const int32_t unit = at / kCodeUnit, quad = at % kCodeUnit / 4, byte = at % 4;
    for (int32_t i = 0; i < n; ++i) codes[i] = 0;
    for (int32_t p = 0; p < part.num_planes; ++p) {
        const int32_t bits = part.planes[p], per_byte = 8 / bits, mask = (1 << bits) - 1;
        const int64_t word = int64_t(unit) * bits + quad / per_byte;
        const char* words = data + (word * part.padded_lanes + from) * 4;
        const int32_t shift = 8 * byte + quad % per_byte * bits;
        for (int32_t i = 0; i < n; ++i) {
            uint32_t quads;
            std::memcpy(&quads, words + 4 * i, sizeof(quads));
            codes[i] = (codes[i] << bits) | (int32_t(quads >> shift) & mask);
        }
        data += part.plane_bytes(p);
    }
}

// Four codes side by side in the inner axis of one lane, as bytes.
inline void read_quad(const PackedPart& part, const char* data, int32_t lane, int32_t at, int32_t* codes) {
    const int32_t unit = at / kCodeUnit, quad = at % kCodeUnit / 4;
    uint32_t joined = 0;
    for (int32_t p = 0; p < part.num_planes; ++p) {
        const int32_t bits = part.planes[p], per_byte = 8 / bits;
        const int64_t word = int64_t(unit) * bits + quad / per_byte;
        uint32_t quads;
        std::memcpy(&quads, data + (word * part.padded_lanes + lane) * 4, sizeof(quads));
        const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
        joined = (joined << bits) | ((quads >> (quad % per_byte * bits)) & mask);
        data += part.plane_bytes(p);
    }
    for (int32_t j = 0; j < 4; ++j) codes[j] = int32_t(joined >> (8 * j)) & 0xFF;
}

inline const uint16_t* steps_of(const PackedPart& part, const char* data, int32_t group) {
    return reinterpret_cast<const uint16_t*>(data + part.steps) + int64_t(group) * 2 * part.padded_inner;
}

inline float half_to_float(uint16_t bits) {
    float wide[Vec::kLanes];
    store(wide, load_tail(Float16{}, &bits, 1));
    return wide[0];
}

// Rows of a part whose lanes are tokens: out [count][dim].
void unpack_channel_groups(const PackedPart& part, const char* data, const Span& rows, float* out) {
    for (int32_t at = 0; at < part.inner; at += kCodeUnit) {
        float step[kCodeUnit], zero[kCodeUnit];
        int32_t group = -1;
        const int32_t n = part.inner - at < kCodeUnit ? part.inner - at : kCodeUnit;
        for (int32_t i = 0; i < rows.count; ++i) {
            const int32_t lane = int32_t(rows.slot) + i;
            if (lane / part.group != group) {
                group = lane / part.group;
                const uint16_t* steps = steps_of(part, data, group) + at;
                for (int32_t d = 0; d < kCodeUnit; d += Vec::kLanes) {
                    store(step + d, load_as_float(Float16{}, steps + d) * broadcast(part.step_factor));
                    store(zero + d, load_as_float(Float16{}, steps + part.padded_inner + d));
                }
            }
            int32_t codes[kCodeUnit];
            for (int32_t d = 0; d < n; d += 4) read_quad(part, data, lane, at + d, codes + d);
            float* row = out + int64_t(i) * part.dim + at;
            for (int32_t d = 0; d < n; ++d) row[d] = (float(codes[d]) + part.bias) * step[d] + zero[d];
        }
    }
}

// Rows of a part whose lanes are channels.
void unpack_token_groups(const PackedPart& part, const char* data, const Span& rows, float* out) {
    for (int32_t i = 0; i < rows.count; ++i) {
        const int32_t at = int32_t(rows.slot) + i;
        for (int32_t lane = 0; lane < part.lanes;) {
            const int32_t group = lane / part.group, end = (group + 1) * part.group;
            const int32_t n = end - lane < kUnpackLanes ? end - lane : kUnpackLanes;
            const uint16_t* steps = steps_of(part, data, group) + at;
            const float step = half_to_float(steps[0]) * part.step_factor;
            const float zero = half_to_float(steps[part.padded_inner]);
            int32_t codes[kUnpackLanes];
            read_codes(part, data, lane, n, at, codes);
            float* row = out + int64_t(i) * part.dim + lane;
            for (int32_t d = 0; d < n; ++d) row[d] = (float(codes[d]) + part.bias) * step + zero;
            lane += n;
        }
    }
}

// Rows of a part in codes as float32 [count][dim].
inline void unpack_rows(const PackedPart& part, const char* page, const Span& rows, float* out) {
    const char* data = page + part.first;
    part.by_channel ? unpack_channel_groups(part, data, rows, out) : unpack_token_groups(part, data, rows, out);
}

// The same as a source of rows, over memory that holds them.
inline RowSource unpacked_rows(const PackedPart& part, const char* page, const Tile& tile, float* memory, Span& whole) {
    unpack_rows(part, page, tile.packed_rows, memory);
    whole = {0, tile.packed_rows.count};
    return {reinterpret_cast<const char*>(memory), Storage::kFloat32, part.dim, &whole, 1, 1.0f};
}

}  // namespace
