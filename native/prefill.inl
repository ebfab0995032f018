// Attention of many rows over many keys: bound by arithmetic, so all of it is register-blocked matrix products.
// Included by instruction_set.cpp, once per instruction set. Products and sums are float32 for every storage.
//
// Vector lanes run along query rows. Keys and values are then broadcast operands, which need no transposing, and the
// softmax (maximum, sum, rescaling) is lane by lane, without reductions across a vector.

namespace {

constexpr int kVectors = 3;  // vectors of rows in one group: 3 x kColumns sums fill the registers
constexpr int kColumns = Vec::kLanes == 16 ? 8 : 4;
constexpr int kMaxGroupRows = kVectors * Vec::kLanes;

// Rows side by side in lanes, with their queries and sums transposed: [d][lane].
struct RowGroup {
    int32_t first_row;
    int32_t count;    // rows in use
    int32_t vectors;  // vectors that hold them
    int32_t lo, hi;   // slots that some row may see
    float* queries;   // [Dk][lanes], scaled
    float* sums;      // [Dv][lanes]
    float maximum[kMaxGroupRows];
    float sum[kMaxGroupRows];
    int32_t sight_lo[kMaxGroupRows];
    int32_t sight_hi[kMaxGroupRows];
    int32_t position[kMaxGroupRows];

    int32_t lanes() const { return vectors * Vec::kLanes; }
};

inline const float* row_query(const QueryView& queries, int32_t group, int32_t row) {
    return queries.data + (row / group) * queries.token_stride + (row % group) * queries.head_stride;
}

inline void fill_queries(const Shape& shape, const QueryView& queries, RowGroup& group) {
    const int32_t lanes = group.lanes();
    for (int32_t i = 0; i < lanes; ++i) {
        // Spare lanes repeat the last row; nothing of them is written out.
        const float* query = row_query(queries, shape.group, group.first_row + (i < group.count ? i : group.count - 1));
        for (int32_t d = 0; d < shape.key_dim; ++d) group.queries[int64_t(d) * lanes + i] = query[d] * shape.scale;
    }
}

// The queries that a segment's keys meet.
inline QueryView queries_for(const SegmentView& segment, const QueryView& queries) {
    QueryView met = queries;
    if (segment.queries) met.data = segment.queries;
    return met;
}

inline void start_group(const Shape& shape, const QueryView& queries, int32_t first_row, int32_t last_row,
                        RowGroup& group) {
    group.first_row = first_row;
    group.count = last_row - first_row < kMaxGroupRows ? last_row - first_row : kMaxGroupRows;
    group.vectors = (group.count + Vec::kLanes - 1) / Vec::kLanes;
    for (int32_t i = 0; i < group.lanes(); ++i) {
        group.maximum[i] = kMinusInfinity;
        group.sum[i] = 0.0f;
    }
    fill_queries(shape, queries, group);
}

// What the rows of a group see of a segment.
inline void look_at(const Shape& shape, const SegmentView& segment, const QueryView& queries, RowGroup& group) {
    group.lo = segment.length;
    group.hi = 0;
    for (int32_t i = 0; i < group.lanes(); ++i) {
        const int32_t row = group.first_row + (i < group.count ? i : group.count - 1);
        const Sight sight = sight_of(shape, segment, queries, row / shape.group);
        group.sight_lo[i] = sight.lo;
        group.sight_hi[i] = sight.hi;
        group.position[i] = sight.position;
        group.lo = sight.lo < group.lo ? sight.lo : group.lo;
        group.hi = sight.hi > group.hi ? sight.hi : group.hi;
    }
}

// Rows as float32 [count, dim], side by side.
template <class S>
void widen_rows(const RowSource& rows, float* target) {
    for (int32_t s = 0; s < rows.num_spans; ++s) {
        const auto* source = reinterpret_cast<const typename S::Bits*>(rows.base) + rows.spans[s].slot * rows.dim;
        const int64_t n = int64_t(rows.spans[s].count) * rows.dim;
        const Vec scale = broadcast(rows.scale);
        int64_t i = 0;
        for (; i + Vec::kLanes <= n; i += Vec::kLanes) store(target + i, load_as_float(S{}, source + i) * scale);
        if (i < n) {
            float last[Vec::kLanes];
            store(last, load_tail(S{}, source + i, int(n - i)) * scale);
            std::memcpy(target + i, last, (n - i) * sizeof(float));
        }
        target += n;
    }
}

inline void widen(const RowSource& rows, float* target) {
    with_storage(rows.storage, [&](auto storage) { widen_rows<decltype(storage)>(rows, target); });
}

// Rows of `dim` channels to rows of all of them, in place and backwards; channels that were not kept are 0.
inline void spread_channels(const int32_t* channels, int32_t dim, int32_t key_dim, int32_t count, float* rows) {
    for (int32_t t = count - 1; t >= 0; --t) {
        float kept[kMaxPackedDim];
        std::memcpy(kept, rows + int64_t(t) * dim, dim * sizeof(float));
        float* row = rows + int64_t(t) * key_dim;
        for (int32_t d = 0; d < key_dim; ++d) row[d] = 0.0f;
        for (int32_t d = 0; d < dim; ++d) row[channels[d]] = kept[d];
    }
}

// Keys of a tile as float32 [count, Dk].
void widen_keys(const Shape& shape, const SegmentView& segment, const Tile& tile, float* target) {
    if (!tile.packed_keys) return widen(open_keys(shape, segment, tile), target);
    const PackedPart& part = segment.packed->keys;
    if (part.coded) return unpack_rows(part, tile.packed_keys, tile.packed_rows, target);
    widen(packed_rows(*segment.packed, part, tile.packed_keys, tile), target);
    if (segment.key_channels) spread_channels(segment.key_channels, part.dim, shape.key_dim, tile.count, target);
}

void widen_values(const Shape& shape, const SegmentView& segment, const Tile& tile, float* target) {
    if (!tile.packed_values) return widen(open_values(shape, segment, tile), target);
    const PackedPart& part = segment.packed->values;
    if (part.coded) return unpack_rows(part, tile.packed_values, tile.packed_rows, target);
    widen(packed_rows(*segment.packed, part, tile.packed_values, tile), target);
}

// c[j][lane] = (alpha ? c[j][lane] * alpha[lane] : 0) + sum over k of b[j * b_column + k * b_step] * a[k][lane], for V
// vectors, N columns.
template <int V, int N>
inline void product_block(int32_t steps, const float* a, const float* b, int64_t b_column, int64_t b_step,
                          const float* alpha, float* c) {
    constexpr int W = Vec::kLanes;
    Vec sums[N][V];
    for (int j = 0; j < N; ++j) {
        for (int v = 0; v < V; ++v) {
            sums[j][v] = alpha ? load(c + (j * V + v) * W) * load(alpha + v * W) : zero();
        }
    }
    for (int32_t k = 0; k < steps; ++k, a += V * W, b += b_step) {
        Vec rows[V];
        for (int v = 0; v < V; ++v) rows[v] = load(a + v * W);
        for (int j = 0; j < N; ++j) {
            const Vec factor = broadcast(b[j * b_column]);
            for (int v = 0; v < V; ++v) sums[j][v] = fma(factor, rows[v], sums[j][v]);
        }
    }
    for (int j = 0; j < N; ++j) {
        for (int v = 0; v < V; ++v) store(c + (j * V + v) * W, sums[j][v]);
    }
}

template <int V>
void product(int32_t columns, int32_t steps, const float* a, const float* b, int64_t b_column, int64_t b_step,
             const float* alpha, float* c) {
    int32_t j = 0;
    for (; j + kColumns <= columns; j += kColumns) {
        product_block<V, kColumns>(steps, a, b + j * b_column, b_column, b_step, alpha,
                                   c + int64_t(j) * V * Vec::kLanes);
    }
    for (; j < columns; ++j)
        product_block<V, 1>(steps, a, b + j * b_column, b_column, b_step, alpha, c + int64_t(j) * V * Vec::kLanes);
}

// Invisible keys of a score tile [count][lanes] become -inf.
inline void hide_rows(const Shape& shape, const SegmentView& segment, const RowGroup& group, const Tile& tile,
                      float* scores) {
    constexpr int W = Vec::kLanes;
    const bool positioned = by_position(shape, segment);
    const int32_t* positions = positions_of(segment, tile);
    const Vec hidden = broadcast(kMinusInfinity);
    float* at = scores;
    for (int32_t s = 0, t = 0; s < tile.num_key_slots(); ++s) {
        const Span& span = tile.key_slots()[s];
        for (int32_t i = 0; i < span.count; ++i, ++t) {
            const IVec index = broadcast_int(tile.first + t);
            for (int32_t v = 0; v < group.vectors; ++v, at += W) {
                const IVec below = load_int(group.sight_lo + v * W) - broadcast_int(1);
                Mask seen = both(less(below, index), less(index, load_int(group.sight_hi + v * W)));
                if (positioned) {
                    const int32_t position = positions ? positions[span.slot + i] : tile.first + t;
                    const IVec distance = load_int(group.position + v * W) - broadcast_int(position);
                    seen = both(seen,
                                both(less(broadcast_int(-1), distance), less(distance, broadcast_int(shape.window))));
                }
                store(at, select(seen, load(at), hidden));
            }
        }
    }
}

inline void cap_scores(float softcap, int32_t n, float* scores) {
    for (int32_t i = 0; i < n; i += Vec::kLanes) store(scores + i, soft_capped(load(scores + i), softcap));
}

// Scores [count][lanes] of a group against widened keys, capped and masked.
template <int V>
void group_scores(const Shape& shape, const SegmentView& segment, const RowGroup& group, const Tile& tile,
                  const float* keys, float* scores) {
    product<V>(tile.count, shape.key_dim, group.queries, keys, shape.key_dim, 1, nullptr, scores);
    if (shape.softcap != 0.0f) cap_scores(shape.softcap, tile.count * V * Vec::kLanes, scores);
    bool all_seen = !by_position(shape, segment);
    for (int32_t i = 0; i < group.lanes() && all_seen; ++i) {
        all_seen = group.sight_lo[i] <= tile.first && tile.first + tile.count <= group.sight_hi[i];
    }
    if (!all_seen) hide_rows(shape, segment, group, tile, scores);
}

// Scores become probabilities relative to the new maximum of each lane; alpha rescales what was summed before.
template <int V>
void group_softmax(RowGroup& group, int32_t count, float* scores, float* alpha) {
    constexpr int W = Vec::kLanes;
    for (int v = 0; v < V; ++v) {
        const Vec old_maximum = load(group.maximum + v * W);
        Vec highest = old_maximum;
        for (int32_t t = 0; t < count; ++t) highest = larger(highest, load(scores + (t * V + v) * W));
        // A lane that has seen nothing would subtract -inf from -inf; any finite shift keeps its probabilities 0.
        const Vec shift = select(equal(highest, broadcast(kMinusInfinity)), zero(), highest);
        Vec added = zero();
        for (int32_t t = 0; t < count; ++t) {
            float* at = scores + (t * V + v) * W;
            const Vec p = exponential(load(at) - shift);
            store(at, p);
            added = added + p;
        }
        const Vec factor = exponential(old_maximum - shift);
        store(alpha + v * W, factor);
        store(group.sum + v * W, fma(load(group.sum + v * W), factor, added));
        store(group.maximum + v * W, highest);
    }
}

template <int V>
void visit_group(const Shape& shape, const SegmentView& segment, RowGroup& group, const Tile& tile, const float* keys,
                 const float* values, float* scores) {
    float alpha[kMaxGroupRows];
    group_scores<V>(shape, segment, group, tile, keys, scores);
    group_softmax<V>(group, tile.count, scores, alpha);
    product<V>(shape.value_dim, tile.count, scores, values, 1, shape.value_dim, alpha, group.sums);
}

void finish_group(const PrefillTask& task, const RowGroup& group) {
    const int32_t lanes = group.lanes();
    for (int32_t i = 0; i < group.count; ++i) {
        const int32_t row = group.first_row + i;
        const int64_t query = row / task.shape->group, head = row % task.shape->group;
        float* out = task.out + query * task.out_token_stride + head * task.out_head_stride;
        const float norm = group.sum[i] > 0.0f ? 1.0f / group.sum[i] : 0.0f;
        for (int32_t d = 0; d < task.shape->value_dim; ++d) out[d] = group.sums[int64_t(d) * lanes + i] * norm;
        task.lse[query * task.lse_token_stride + head] =
            group.sum[i] > 0.0f ? group.maximum[i] + __builtin_logf(group.sum[i]) : kMinusInfinity;
    }
}

constexpr int kMaxGroups = (kPrefillRows + kMaxGroupRows - 1) / kMaxGroupRows;

void prefill(const PrefillTask& task) {
    const Shape& shape = *task.shape;
    float* keys = task.workspace;
    float* values = keys + kPrefillKeys * padded(shape.key_dim);
    float* scores = values + kPrefillKeys * padded(shape.value_dim);
    float* next = scores + kPrefillKeys * kMaxGroupRows;
    RowGroup groups[kMaxGroups];
    int32_t num_groups = 0;
    for (int32_t row = task.first_row; row < task.last_row; row += kMaxGroupRows) {
        RowGroup& group = groups[num_groups++];
        group.queries = next;
        group.sums = next + padded(shape.key_dim) * kMaxGroupRows;
        next = group.sums + padded(shape.value_dim) * kMaxGroupRows;
        start_group(shape, task.queries, row, task.last_row, group);
        for (int64_t i = 0; i < int64_t(shape.value_dim) * group.lanes(); ++i) group.sums[i] = 0.0f;
    }
    const float* filled = task.queries.data;
    for (int32_t s = 0; s < task.num_segments; ++s) {
        const SegmentView& segment = task.segments[s];
        if (segment.length == 0) continue;
        const QueryView queries = queries_for(segment, task.queries);
        for (int32_t g = 0; queries.data != filled && g < num_groups; ++g) fill_queries(shape, queries, groups[g]);
        filled = queries.data;
        int32_t lo = segment.length, hi = 0;
        for (int32_t g = 0; g < num_groups; ++g) {
            look_at(shape, segment, task.queries, groups[g]);
            lo = groups[g].lo < lo ? groups[g].lo : lo;
            hi = groups[g].hi > hi ? groups[g].hi : hi;
        }
        Tile tile;
        for (int64_t at = lo; at < hi; at += tile.count) {
            cut_tile(segment, at, hi, kPrefillKeys, tile);
            widen_keys(shape, segment, tile, keys);
            widen_values(shape, segment, tile, values);
            for (int32_t g = 0; g < num_groups; ++g) {
                RowGroup& group = groups[g];
                if (group.hi <= tile.first || group.lo >= tile.first + tile.count) continue;
                if (group.vectors == 3) visit_group<3>(shape, segment, group, tile, keys, values, scores);
                if (group.vectors == 2) visit_group<2>(shape, segment, group, tile, keys, values, scores);
                if (group.vectors == 1) visit_group<1>(shape, segment, group, tile, keys, values, scores);
            }
        }
    }
    for (int32_t g = 0; g < num_groups; ++g) finish_group(task, groups[g]);
}

// received[t][lane] += the probabilities of the group's rows for each key of the tile; lanes are summed up by the
// caller.
template <int V>
void add_received(const Shape& shape, const SegmentView& segment, const RowGroup& group, const float* lse,
                  const Tile& tile, const float* keys, float* scores, float* received) {
    constexpr int W = Vec::kLanes;
    group_scores<V>(shape, segment, group, tile, keys, scores);
    for (int32_t t = 0; t < tile.count; ++t) {
        Vec sum = load(received + t * W);
        for (int v = 0; v < V; ++v) sum = sum + exponential(load(scores + (t * V + v) * W) - load(lse + v * W));
        store(received + t * W, sum);
    }
}

void prefill_mass(const PrefillMassTask& task) {
    const Shape& shape = *task.shape;
    float* keys = task.workspace;
    float* scores = keys + kPrefillKeys * padded(shape.key_dim);
    RowGroup groups[kMaxGroups];
    float lse[kMaxGroups][kMaxGroupRows];
    for (int64_t i = 0; i < task.to - task.from; ++i) task.received[i] = 0.0f;
    const int32_t rows = task.queries.num_queries * shape.group;
    for (int32_t first = task.first_row; first < rows; first += kPrefillRows) {
        const int32_t last = first + kPrefillRows < rows ? first + kPrefillRows : rows;
        float* next = scores + kPrefillKeys * kMaxGroupRows;
        int32_t num_groups = 0, lo = task.segment.length, hi = 0;
        for (int32_t row = first; row < last; row += kMaxGroupRows) {
            RowGroup& group = groups[num_groups];
            group.queries = next;
            next += padded(shape.key_dim) * kMaxGroupRows;
            start_group(shape, queries_for(task.segment, task.queries), row, last, group);
            look_at(shape, task.segment, task.queries, group);
            for (int32_t i = 0; i < group.lanes(); ++i) {
                const int32_t at = row + i;
                // Spare lanes get +inf: their probabilities are 0. So do rows that see nothing, whose lse is -inf.
                const float value = i < group.count
                                        ? task.lse[(at / shape.group) * task.lse_token_stride + at % shape.group]
                                        : kMinusInfinity;
                lse[num_groups][i] = value == kMinusInfinity ? -kMinusInfinity : value;
            }
            lo = group.lo < lo ? group.lo : lo;
            hi = group.hi > hi ? group.hi : hi;
            ++num_groups;
        }
        const int64_t from = task.from > lo ? task.from : lo, to = task.to < hi ? task.to : hi;
        Tile tile;
        for (int64_t at = from; at < to; at += tile.count) {
            cut_tile(task.segment, at, to, kPrefillKeys, tile);
            widen_keys(shape, task.segment, tile, keys);
            float received[kPrefillKeys * Vec::kLanes] = {};
            for (int32_t g = 0; g < num_groups; ++g) {
                const RowGroup& group = groups[g];
                if (group.hi <= tile.first || group.lo >= tile.first + tile.count) continue;
                if (group.vectors == 3)
                    add_received<3>(shape, task.segment, group, lse[g], tile, keys, scores, received);
                if (group.vectors == 2)
                    add_received<2>(shape, task.segment, group, lse[g], tile, keys, scores, received);
                if (group.vectors == 1)
                    add_received<1>(shape, task.segment, group, lse[g], tile, keys, scores, received);
            }
            float* sums = task.received + (at - task.from);
            for (int32_t t = 0; t < tile.count; ++t) sums[t] += reduce_add(load(received + t * Vec::kLanes));
        }
    }
}

void narrow(Storage storage, const float* source, void* target, int64_t n) {
    int64_t i = 0;
    const auto convert = [&](auto s, auto* out) {
        for (; i + Vec::kLanes <= n; i += Vec::kLanes) store_as(s, out + i, load(source + i));
        if (i == n) return;
        float last[Vec::kLanes] = {};
        std::remove_pointer_t<decltype(out)> narrowed[Vec::kLanes];
        std::memcpy(last, source + i, (n - i) * sizeof(float));
        store_as(s, narrowed, load(last));
        std::memcpy(out + i, narrowed, (n - i) * sizeof(narrowed[0]));
    };
    switch (storage) {
        case Storage::kFloat32:
            return convert(Float32{}, static_cast<float*>(target));
        case Storage::kBFloat16:
            return convert(BFloat16{}, static_cast<uint16_t*>(target));
        case Storage::kFloat16:
            return convert(Float16{}, static_cast<uint16_t*>(target));
        case Storage::kFloat8:
            return;  // a page's scale is not known row by row: seal.inl packs them
    }
}

float read_floats(const float* source, int64_t n) {
    Vec sums[8];
    for (Vec& sum : sums) sum = zero();
    int64_t i = 0;
    for (; i + 8 * Vec::kLanes <= n; i += 8 * Vec::kLanes) {
        for (int v = 0; v < 8; ++v) sums[v] = sums[v] + load(source + i + v * Vec::kLanes);
    }
    for (int v = 1; v < 8; ++v) sums[0] = sums[0] + sums[v];
    float sum = reduce_add(sums[0]);
    for (; i < n; ++i) sum += source[i];
    return sum;
}

}  // namespace
