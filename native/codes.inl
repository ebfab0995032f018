// Integer dot products with codes: the steps of a group of lanes are folded into the other factor, which is then
// rounded to int8 (codes of up to 4 bits) or int16. Included by instruction_set.cpp, once per instruction set.
//
// Keys: score of token t = sum over channels of q[d] * (code * step[d] + zero[d]); values: output of channel d = sum
// over tokens of p[t] * (code * step[t] + zero[t]). Both are lanes times inner numbers, with the same factors for all
// lanes of a group, so one product serves both. What rounding takes from the folded factor is given back for the
// middle code (`offset`), so that only a code's distance from the middle meets the rounding error.

namespace {

#ifdef KVWISE_INTEGER_DOTS

constexpr int kMaxInner = 512;  // inner numbers folded at once
constexpr int kFoldRows = 4;
constexpr int kSplitBits = 9;  // what products with two planes of 4 bits are called

// Factors of a group of lanes for one row: x dot (code * step + zero) = product of codes and weights * scale + offset.
struct Fold {
    float scale;
    float offset;
};

// Factors of R rows at once, which share the steps and hide each other's latency. n is a multiple of 32.
template <class W, int R>
inline void fold_rows(const PackedPart& part, const float* x, int64_t x_stride, const uint16_t* steps,
                      const uint16_t* zeros, int32_t n, W* weights, Fold* folds) {
    constexpr float kLargest = sizeof(W) == 1 ? 127.0f : 16383.0f;
    float folded[R][kMaxInner];
    const float middle = 0.5f * float((1 << part.bits) - 1);
    const Vec factor = broadcast(part.step_factor), centre = broadcast(part.bias + middle);
    Vec largest[R], constant[R], rounded[R];
    for (int r = 0; r < R; ++r) largest[r] = constant[r] = rounded[r] = zero();
    for (int32_t i = 0; i < n; i += Vec::kLanes) {
        const Vec step = load_as_float(Float16{}, steps + i) * factor;
        const Vec of_centre = fma(step, centre, load_as_float(Float16{}, zeros + i));
        for (int r = 0; r < R; ++r) {
            const Vec value = load(x + r * x_stride + i), w = value * step;
            store(folded[r] + i, w);
            largest[r] = larger(largest[r], magnitude(w));
            constant[r] = fma(value, of_centre, constant[r]);
        }
    }
    Vec inverse[R];
    for (int r = 0; r < R; ++r) {
        const float most = reduce_max(largest[r]);
        inverse[r] = broadcast(most > 0.0f ? kLargest / most : 0.0f);
        folds[r].scale = most * (1.0f / kLargest);
    }
    for (int32_t i = 0; i < n; i += Vec::kLanes) {
        for (int r = 0; r < R; ++r) {
            rounded[r] = rounded[r] + store_rounded(weights + r * kMaxInner + i, load(folded[r] + i) * inverse[r]);
        }
    }
    for (int r = 0; r < R; ++r)
        folds[r].offset = reduce_add(constant[r] - rounded[r] * broadcast(middle * folds[r].scale));
}

template <class W>
inline void fold_any(int32_t rows, const PackedPart& part, const float* x, int64_t x_stride, const uint16_t* steps,
                     const uint16_t* zeros, int32_t n, W* weights, Fold* folds) {
    if (rows == kFoldRows) return fold_rows<W, kFoldRows>(part, x, x_stride, steps, zeros, n, weights, folds);
    for (int32_t r = 0; r < rows; ++r)
        fold_rows<W, 1>(part, x + r * x_stride, 0, steps, zeros, n, weights + r * kMaxInner, folds + r);
}

// A walk over lanes [from, to) and inner units [first, first + units) of a coded part; `weights` begin at the first.
struct CodeWalk {
    const char* planes[4];
    int64_t padded_lanes;
    int32_t from, to;
    int32_t first, units;
    const void* weights;  // [rows][kMaxInner] int8 or int16
    float* out;           // [rows][stride], lane `from` first
    int64_t stride;
    int32_t lines;  // to fetch per unit
};

// Quad q (0..7) of a plane of B bits, of which `words` is word 0 of the unit and `step` bytes lie between words.
template <int B>
inline Bytes plane_quad(const char* words, int64_t step, int q) {
    constexpr int per_byte = 8 / B;
    const Bytes word = load_bytes(words + q / per_byte * step);
    return B == 8 ? word : cut_bits(word, q % per_byte * B, (1 << B) - 1);
}

template <int Bits>
inline Bytes quad_codes(const char* const* words, int64_t step, int q) {
    if constexpr (Bits == 1 || Bits == 2 || Bits == 4 || Bits == 8) return plane_quad<Bits>(words[0], step, q);
    if constexpr (Bits == 3)
        return merge(shift_up(plane_quad<2>(words[0], step, q), 1), plane_quad<1>(words[1], step, q));
    if constexpr (Bits == 5)
        return merge(shift_up(plane_quad<4>(words[0], step, q), 1), plane_quad<1>(words[1], step, q));
    if constexpr (Bits == 6)
        return merge(shift_up(plane_quad<4>(words[0], step, q), 2), plane_quad<2>(words[1], step, q));
    if constexpr (Bits == 7) {
        const Bytes low = merge(shift_up(plane_quad<2>(words[1], step, q), 1), plane_quad<1>(words[2], step, q));
        return merge(shift_up(plane_quad<4>(words[0], step, q), 3), low);
    }
    return merge(shift_up(plane_quad<4>(words[0], step, q), 4), plane_quad<4>(words[1], step, q));
}

template <int Bits>
struct Code {
    static constexpr int kPlanes = Bits == 7 ? 3 : Bits == 3 || Bits == 5 || Bits == 6 || Bits == kSplitBits ? 2 : 1;
    static constexpr bool kWide = Bits > 4;
    // Units whose int16 sums cannot overflow: 8 quads each of twice 127 times the largest code.
    static constexpr int kUnits = Bits == 4 ? 1 : Bits == 3 ? 2 : 4;
    static constexpr int plane(int i) {
        if (Bits == kSplitBits) return 4;
        if (i == 0) return Bits >= 8 ? 8 : Bits >= 4 ? 4 : Bits >= 2 ? 2 : 1;
        return i == 1 && (Bits == 6 || Bits == 7) ? 2 : 1;
    }
};

// Vectors of lanes at once: two share the loads of weights where registers allow.
constexpr int kLaneVectors = Bytes::kLanes == 16 ? 1 : 2;

template <int Bits, int R>
inline void add_units(const char* const (*words)[kLaneVectors], int64_t step, const int8_t* weights,
                      Bytes (*totals)[kLaneVectors], int32_t units) {
    Bytes sums[R][kLaneVectors];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kLaneVectors; ++v) sums[r][v] = zero_bytes();
    }
    for (int32_t u = 0; u < units; ++u) {
        const char* at[kLaneVectors][4];
        for (int v = 0; v < kLaneVectors; ++v) {
            for (int p = 0; p < Code<Bits>::kPlanes; ++p) at[v][p] = words[p][v] + u * Code<Bits>::plane(p) * step;
        }
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) {
            Bytes codes[kLaneVectors];
            for (int v = 0; v < kLaneVectors; ++v) codes[v] = quad_codes<Bits>(at[v], step, q);
            for (int r = 0; r < R; ++r) {
                const Bytes weight = broadcast_quad(weights + r * kMaxInner + u * kCodeUnit + 4 * q);
                for (int v = 0; v < kLaneVectors; ++v)
                    sums[r][v] = add_shorts(sums[r][v], pair_products(codes[v], weight));
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kLaneVectors; ++v)
            totals[r][v] = add_ints(totals[r][v], short_products(sums[r][v], one_shorts()));
    }
}

template <int Bits, int R>
inline void add_units(const char* const (*words)[kLaneVectors], int64_t step, const int16_t* weights,
                      Bytes (*totals)[kLaneVectors], int32_t units) {
    for (int32_t u = 0; u < units; ++u) {
        const char* at[kLaneVectors][4];
        for (int v = 0; v < kLaneVectors; ++v) {
            for (int p = 0; p < Code<Bits>::kPlanes; ++p) at[v][p] = words[p][v] + u * Code<Bits>::plane(p) * step;
        }
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) {
            for (int v = 0; v < kLaneVectors; ++v) {
                const Bytes codes = quad_codes<Bits>(at[v], step, q);
                const Bytes even = even_bytes(codes), odd = odd_bytes(codes);
                for (int r = 0; r < R; ++r) {
                    const int16_t* weight = weights + r * kMaxInner + u * kCodeUnit + 4 * q;
                    const Bytes first = short_products(even, broadcast_quad(weight));
                    const Bytes second = short_products(odd, broadcast_quad(weight + 2));
                    totals[r][v] = add_ints(totals[r][v], add_ints(first, second));
                }
            }
        }
    }
}

// out[r][lane] = sum over the walk's inner numbers of code * weight[r].
template <int Bits, int R>
void walk_codes(const CodeWalk& walk, Ahead& ahead) {
    using Weight = std::conditional_t<Code<Bits>::kWide, int16_t, int8_t>;
    constexpr int kStep = kLaneVectors * Bytes::kLanes;
    const int64_t step = walk.padded_lanes * 4;
    float* out = walk.out;
    for (int32_t lane = walk.from; lane < walk.to; lane += kStep, out += kStep) {
        Bytes totals[R][kLaneVectors];
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < kLaneVectors; ++v) totals[r][v] = zero_bytes();
        }
        for (int32_t u = 0; u < walk.units; u += Code<Bits>::kUnits) {
            const int32_t units = walk.units - u < Code<Bits>::kUnits ? walk.units - u : Code<Bits>::kUnits;
            const char* words[Code<Bits>::kPlanes][kLaneVectors];
            for (int p = 0; p < Code<Bits>::kPlanes; ++p) {
                for (int v = 0; v < kLaneVectors; ++v) {
                    words[p][v] = walk.planes[p] + (walk.first + u) * Code<Bits>::plane(p) * step +
                                  (lane + v * Bytes::kLanes) * 4;
                }
            }
            add_units<Bits, R>(words, step, static_cast<const Weight*>(walk.weights) + u * kCodeUnit, totals, units);
            ahead.fetch(walk.lines * units);
        }
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < kLaneVectors; ++v)
                store_ints_as_float(out + r * walk.stride + v * Bytes::kLanes, totals[r][v]);
        }
    }
}

template <int Bits>
void walk_rows(const CodeWalk& walk, int32_t rows, Ahead& ahead) {
    switch (rows) {
        case 1:
            return walk_codes<Bits, 1>(walk, ahead);
        case 2:
            return walk_codes<Bits, 2>(walk, ahead);
        case 3:
            return walk_codes<Bits, 3>(walk, ahead);
        default:
            return walk_codes<Bits, 4>(walk, ahead);
    }
}

void walk_part(const PackedPart& part, const CodeWalk& walk, int32_t rows, Ahead& ahead) {
    switch (part.split ? kSplitBits : part.bits) {
        case 1:
            return walk_rows<1>(walk, rows, ahead);
        case 2:
            return walk_rows<2>(walk, rows, ahead);
        case 3:
            return walk_rows<3>(walk, rows, ahead);
        case 4:
            return walk_rows<4>(walk, rows, ahead);
        case 5:
            return walk_rows<5>(walk, rows, ahead);
        case 6:
            return walk_rows<6>(walk, rows, ahead);
        case 7:
            return walk_rows<7>(walk, rows, ahead);
        case 8:
            return walk_rows<8>(walk, rows, ahead);
        case kSplitBits:
            return walk_rows<kSplitBits>(walk, rows, ahead);
    }
}

// Whether integer products serve this part: steps must fold, and vectors of lanes must not straddle groups.
inline bool folds(const Shape& shape, const PackedPart& part, bool keys) {
    const bool whole_vectors = part.group % kCodeLanes == 0 || part.num_groups() == 1;
    return part.coded && !shape.exact && part.by_channel == keys && whole_vectors &&
           (keys ? part.padded_inner : part.padded_lanes) <= kMaxInner;
}

// Lanes and inner units of a part that some rows of a page touch, in whole vectors.
struct Reach {
    int32_t from, to;
    int32_t first, units;
};

inline Reach reach_of(const PackedPart& part, const Span& rows) {
    const int32_t row = int32_t(rows.slot), end = row + rows.count;
    if (part.by_channel) {
        const int32_t to = (end + kCodeLanes - 1) / kCodeLanes * kCodeLanes;
        return {row / kCodeLanes * kCodeLanes, to, 0, part.padded_inner / kCodeUnit};
    }
    return {0, part.padded_lanes, row / kCodeUnit, (end + kCodeUnit - 1) / kCodeUnit - row / kCodeUnit};
}

inline CodeWalk walk_of(const PackedPart& part, const char* data, const Reach& reach) {
    CodeWalk walk{};
    for (int32_t p = 0; p < part.num_planes; ++p) {
        walk.planes[p] = data;
        data += part.plane_bytes(p);
    }
    walk.padded_lanes = part.padded_lanes;
    walk.first = reach.first;
    walk.units = reach.units;
    return walk;
}

// Steps of the inner numbers a walk reads; zeros outside [skip, skip + count): rows never written hold anything.
struct Steps {
    uint16_t step[kDecodeTile + 2 * kCodeUnit];
    uint16_t zero[kDecodeTile + 2 * kCodeUnit];
};

inline void copy_steps(const uint16_t* steps, int64_t to_zeros, int64_t skip, int32_t count, Steps& copy) {
    std::memset(&copy, 0, sizeof(copy));
    std::memcpy(copy.step + skip, steps + skip, count * sizeof(uint16_t));
    std::memcpy(copy.zero + skip, steps + to_zeros + skip, count * sizeof(uint16_t));
}

// Folds and walks every group of lanes for up to kFoldRows rows: raw [rows][stride] of products from lane `reach.from`
// on, and finish(row, lane, end, fold) for each group of each row. Only inner numbers [skip, skip + count) are
// looked at where count is not 0.
template <class W, class Finish>
inline void walk_groups(const PackedPart& part, const char* data, const Reach& reach, const float* x, int64_t x_stride,
                        int32_t rows, Ahead& ahead, int32_t lines, float* raw, int64_t stride, int64_t skip,
                        int32_t count, Finish finish) {
    W weights[kFoldRows * kMaxInner];
    CodeWalk walk = walk_of(part, data, reach);
    walk.weights = weights;
    walk.stride = stride;
    walk.lines = lines;
    for (int32_t lane = reach.from; lane < reach.to;) {
        const int32_t last = part.num_groups() - 1, group = lane / part.group < last ? lane / part.group : last;
        const int32_t end = group < last && (group + 1) * part.group < reach.to ? (group + 1) * part.group : reach.to;
        const uint16_t* steps = steps_of(part, data, group) + reach.first * kCodeUnit;
        const uint16_t* zeros = steps + part.padded_inner;
        Steps copy;
        if (count) {
            copy_steps(steps, part.padded_inner, skip, count, copy);
            steps = copy.step;
            zeros = copy.zero;
        }
        Fold folds[kFoldRows];
        fold_any(rows, part, x, x_stride, steps, zeros, reach.units * kCodeUnit, weights, folds);
        walk.from = lane;
        walk.to = end;
        walk.out = raw + lane - reach.from;
        walk_part(part, walk, rows, ahead);
        for (int32_t r = 0; r < rows; ++r) finish(r, lane, end, folds[r]);
        lane = end;
    }
}

inline bool is_wide(const PackedPart& part) {
    return part.bits > 4;
}

constexpr int kTileLanes = kDecodeTile + 3 * kCodeLanes;  // lanes that a tile's keys may reach into

// Scores [rows, >= count] of a tile of keys whose lanes are tokens.
template <class W>
void code_scores(const PackedPart& part, const char* page, const Tile& tile, const float* queries, int64_t query_stride,
                 int32_t rows, Ahead& ahead, float* scores, int64_t score_stride) {
    const Reach reach = reach_of(part, tile.packed_rows);
    const int32_t blocks = (rows + kFoldRows - 1) / kFoldRows;
    const int32_t steps = (reach.to - reach.from) / (kLaneVectors * Bytes::kLanes) * reach.units * blocks;
    const int32_t lines = ahead.lines_per_step(tile.count, steps);
    for (int32_t r = 0; r < rows; r += kFoldRows) {
        float raw[kFoldRows][kTileLanes];
        walk_groups<W>(part, page + part.first, reach, queries + r * query_stride, query_stride,
                       rows - r < kFoldRows ? rows - r : kFoldRows, ahead, lines, raw[0], kTileLanes, 0, 0,
                       [&](int32_t i, int32_t lane, int32_t end, const Fold& fold) {
                           const Vec scale = broadcast(fold.scale), offset = broadcast(fold.offset);
                           float* at = raw[i] + lane - reach.from;
                           for (int32_t t = 0; t < end - lane; t += Vec::kLanes)
                               store(at + t, fma(load(at + t), scale, offset));
                       });
        const int64_t skip = tile.packed_rows.slot - reach.from;
        for (int32_t i = 0; i < kFoldRows && r + i < rows; ++i)
            std::memcpy(scores + (r + i) * score_stride, raw[i] + skip, tile.count * sizeof(float));
    }
}

// out[r, d] = out * alpha[r] + sum over the tile of p[r, t] * v[t, d], for values whose lanes are channels.
template <class W>
void code_values(const PackedPart& part, const char* page, const Tile& tile, const float* probabilities, int64_t stride,
                 int32_t rows, Ahead& ahead, const float* alpha, float* out, int64_t out_stride) {
    const Reach reach = reach_of(part, tile.packed_rows);
    const int32_t blocks = (rows + kFoldRows - 1) / kFoldRows;
    const int32_t steps = reach.to / (kLaneVectors * Bytes::kLanes) * reach.units * blocks;
    const int32_t lines = ahead.lines_per_step(tile.count, steps);
    const int64_t skip = tile.packed_rows.slot - reach.first * kCodeUnit;
    const bool whole = skip == 0 && tile.count == reach.units * kCodeUnit;
    for (int32_t r = 0; r < rows; r += kFoldRows) {
        const int32_t n = rows - r < kFoldRows ? rows - r : kFoldRows;
        constexpr int32_t kReach = kDecodeTile + 2 * kCodeUnit;
        float raw[kFoldRows][kMaxInner], padded_x[kFoldRows][kReach];
        for (int32_t i = 0; i < n && !whole; ++i) {
            std::memset(padded_x[i], 0, sizeof(padded_x[i]));
            std::memcpy(padded_x[i] + skip, probabilities + (r + i) * stride, tile.count * sizeof(float));
        }
        const float* x = whole ? probabilities + r * stride : padded_x[0];
        walk_groups<W>(part, page + part.first, reach, x, whole ? stride : int64_t(kReach), n, ahead, lines, raw[0],
                       kMaxInner, skip, whole ? 0 : tile.count,
                       [&](int32_t i, int32_t lane, int32_t end, const Fold& fold) {
                           const Vec scale = broadcast(fold.scale), offset = broadcast(fold.offset);
                           const Vec before = broadcast(alpha[r + i]);
                           float* at = out + (r + i) * out_stride;
                           for (int32_t d = lane; d < end; d += Vec::kLanes)
                               store(at + d, fma(load(at + d), before, fma(load(raw[i] + d), scale, offset)));
                       });
    }
}

// Cache lines that a tile reads of a part.
inline void fetch_codes(const PackedPart& part, const char* page, const Span& rows, Ahead& ahead) {
    const Reach reach = reach_of(part, rows);
    const char* data = page + part.first;
    const int64_t word = int64_t(part.padded_lanes) * 4;
    if (part.by_channel) {
        int32_t words = 0;
        for (int32_t p = 0; p < part.num_planes; ++p) words += reach.units * part.planes[p];
        const bool whole = reach.from == 0 && reach.to == part.padded_lanes;
        ahead.add(whole ? Run{data, word * words, 0, 1}
                        : Run{data + reach.from * 4, (reach.to - reach.from) * 4, word, words});
    } else {
        const char* plane = data;
        for (int32_t p = 0; p < part.num_planes && p < 3; ++p) {
            const int64_t unit = word * part.planes[p];
            ahead.add({plane + reach.first * unit, reach.units * unit, 0, 1});
            plane += part.plane_bytes(p);
        }
    }
    const int32_t first = reach.first * kCodeUnit, n = reach.units * kCodeUnit;
    const int32_t group = part.by_channel ? reach.from / part.group : 0;
    const int32_t to = part.by_channel ? (reach.to - 1) / part.group : part.num_groups() - 1;
    const int32_t last = to < part.num_groups() ? to : part.num_groups() - 1;
    ahead.add({reinterpret_cast<const char*>(steps_of(part, data, group) + first), n * 2, part.padded_inner * 2,
               2 * (last - group + 1)});
}

#else

inline bool folds(const Shape&, const PackedPart&, bool) {
    return false;
}

#endif

}  // namespace
