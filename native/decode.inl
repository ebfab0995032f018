// Attention of a few rows over many keys: bound by reading K and V, so each page is read once and the next is on its
// way. Included by instruction_set.cpp, once per instruction set. Scores, probabilities and sums are float32 for every
// storage; products with codes are integer ones (codes.inl) where they fold, else float32 as well (unpack.inl).

namespace {

// Dot products of R rows with TK = kLanes / R keys at once: lane r * TK + t of one vector is row r, key t.
template <class S, int R>
inline Vec dot_products(const float* queries, int64_t query_stride, const typename S::Bits* const* keys, int32_t dim) {
    constexpr int TK = R == 3 ? Vec::kLanes / 4 : Vec::kLanes / R;
    Vec sums[Vec::kLanes];
    for (int i = 0; i < Vec::kLanes; ++i) sums[i] = zero();
    int32_t d = 0;
    for (; d + Vec::kLanes <= dim; d += Vec::kLanes) {
        for (int t = 0; t < TK; ++t) {
            const Vec key = load_as_float(S{}, keys[t] + d);
            for (int r = 0; r < R; ++r)
                sums[r * TK + t] = fma(key, load(queries + r * query_stride + d), sums[r * TK + t]);
        }
    }
    if (d < dim) {
        for (int t = 0; t < TK; ++t) {
            const Vec key = load_tail(S{}, keys[t] + d, dim - d);
            for (int r = 0; r < R; ++r)
                sums[r * TK + t] = fma(key, load(queries + r * query_stride + d), sums[r * TK + t]);
        }
    }
    return sums_of(sums);
}

// Scores [R, kDecodeTile + slack] of a tile. Stores run over the end of a span; the next span overwrites what is not
// its own.
template <class S, int R>
void tile_scores(const float* queries, int64_t query_stride, const RowSource& source, Ahead& ahead, float* scores,
                 int64_t score_stride) {
    constexpr int TK = R == 3 ? Vec::kLanes / 4 : Vec::kLanes / R;
    const int32_t dim = source.dim, lines = TK * ahead.lines_per_row(1);
    const auto* keys = reinterpret_cast<const typename S::Bits*>(source.base);
    int32_t written = 0;
    for (int32_t s = 0; s < source.num_spans; ++s) {
        const Span& span = source.spans[s];
        const typename S::Bits* rows = keys + span.slot * dim;
        for (int32_t t = 0; t < span.count; t += TK) {
            const typename S::Bits* at[TK];
            for (int i = 0; i < TK; ++i) at[i] = rows + int64_t(t + i < span.count ? t + i : span.count - 1) * dim;
            ahead.fetch(lines);
            float lanes[Vec::kLanes];
            store(lanes, dot_products<S, R>(queries, query_stride, at, dim));
            for (int r = 0; r < R; ++r)
                std::memcpy(scores + r * score_stride + written + t, lanes + r * TK, TK * sizeof(float));
        }
        written += span.count;
    }
}

// out[r, C chunks from d] = out * alpha[r] + sum over the tile of p[r, t] * v[t, d].
template <class S, int R, int C, bool Tail>
inline void add_values(const float* probabilities, int64_t stride, const RowSource& source, int32_t d, Ahead& ahead,
                       int32_t lines, const float* alpha, float* out, int64_t out_stride) {
    const int32_t dim = source.dim;
    const auto* values = reinterpret_cast<const typename S::Bits*>(source.base);
    Vec sums[R][C];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) sums[r][c] = load(out + r * out_stride + d + c * Vec::kLanes) * broadcast(alpha[r]);
    }
    const float* p = probabilities;
    for (int32_t s = 0; s < source.num_spans; ++s) {
        const typename S::Bits* row = values + source.spans[s].slot * dim + d;
        for (int32_t t = 0; t < source.spans[s].count; ++t, row += dim, ++p) {
            ahead.fetch(lines);
            Vec value[C];
            for (int c = 0; c < C; ++c) {
                value[c] = Tail ? load_tail(S{}, row, dim - d) : load_as_float(S{}, row + c * Vec::kLanes);
            }
            for (int r = 0; r < R; ++r) {
                const Vec weight = broadcast(p[r * stride]);
                for (int c = 0; c < C; ++c) sums[r][c] = fma(weight, value[c], sums[r][c]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) store(out + r * out_stride + d + c * Vec::kLanes, sums[r][c]);
    }
}

template <class S, int R>
void tile_values(const float* probabilities, int64_t stride, const RowSource& source, Ahead& ahead, const float* alpha,
                 float* out, int64_t out_stride) {
    constexpr int C = Vec::kLanes == 16 || R <= 2 ? 4 : 2;
    constexpr int W = Vec::kLanes;
    const int32_t dim = source.dim;
    const int32_t lines = ahead.lines_per_row(dim / (C * W) > 0 ? dim / (C * W) : 1);
    int32_t d = 0;
    for (; d + C * W <= dim; d += C * W)
        add_values<S, R, C, false>(probabilities, stride, source, d, ahead, lines, alpha, out, out_stride);
    for (; d + W <= dim; d += W)
        add_values<S, R, 1, false>(probabilities, stride, source, d, ahead, lines, alpha, out, out_stride);
    if (d < dim) add_values<S, R, 1, true>(probabilities, stride, source, d, ahead, lines, alpha, out, out_stride);
}

// Where a key of the tile is invisible to this row its score becomes -inf.
inline void hide_keys(const Shape& shape, const SegmentView& segment, const Tile& tile, const Sight& sight,
                      float* scores) {
    if (tile.first < sight.lo || tile.first + tile.count > sight.hi) {
        for (int32_t t = 0; t < tile.count; ++t) {
            const int32_t index = tile.first + t;
            if (index < sight.lo || index >= sight.hi) scores[t] = kMinusInfinity;
        }
    }
    const int32_t* positions = positions_of(segment, tile);
    if (!by_position(shape, segment)) return;
    int32_t t = 0;
    for (int32_t s = 0; s < tile.num_key_slots(); ++s) {
        const Span& span = tile.key_slots()[s];
        for (int32_t i = 0; i < span.count; ++i, ++t) {
            const int32_t distance = sight.position - (positions ? positions[span.slot + i] : tile.first + t);
            if (distance < 0 || distance >= shape.window) scores[t] = kMinusInfinity;
        }
    }
}

// Scores of one row become probabilities relative to the new running maximum; returns the factor for what was summed
// before.
inline float online_softmax(float softcap, int32_t count, float* scores, float& maximum, float& sum) {
    constexpr int W = Vec::kLanes;
    for (int32_t t = count; t < kDecodeTile && t % W; ++t) scores[t] = kMinusInfinity;
    Vec highest = broadcast(maximum);
    for (int32_t t = 0; t < count; t += W) {
        if (softcap != 0.0f) {
            const Vec raw = load(scores + t);
            store(scores + t, select(equal(raw, broadcast(kMinusInfinity)), raw, soft_capped(raw, softcap)));
        }
        highest = larger(highest, load(scores + t));
    }
    const float new_maximum = reduce_max(highest);
    if (new_maximum == kMinusInfinity) {  // nothing visible yet
        for (int32_t t = 0; t < count; t += W) store(scores + t, zero());
        return 1.0f;
    }
    const Vec shift = broadcast(new_maximum);
    Vec added = zero();
    for (int32_t t = 0; t < count; t += W) {
        const Vec p = exponential(load(scores + t) - shift);
        store(scores + t, p);
        added = added + p;
    }
    float factor = 1.0f;
    if (maximum != new_maximum) {
        float lanes[W];
        store(lanes, exponential(broadcast(maximum - new_maximum)));
        factor = lanes[0];
    }
    maximum = new_maximum;
    sum = sum * factor + reduce_add(added);
    return factor;
}

template <class S, int R>
struct RowBlock {
    static void scores(const float* q, int64_t q_stride, const RowSource& keys, Ahead& ahead, float* scores,
                       int64_t stride, int32_t rows) {
        if (rows >= R) return tile_scores<S, R>(q, q_stride, keys, ahead, scores, stride);
        if constexpr (R > 1) RowBlock<S, R - 1>::scores(q, q_stride, keys, ahead, scores, stride, rows);
    }
    static void values(const float* p, int64_t stride, const RowSource& values_, Ahead& ahead, const float* alpha,
                       float* out, int64_t out_stride, int32_t rows) {
        if (rows >= R) return tile_values<S, R>(p, stride, values_, ahead, alpha, out, out_stride);
        if constexpr (R > 1) RowBlock<S, R - 1>::values(p, stride, values_, ahead, alpha, out, out_stride, rows);
    }
};

constexpr int kRowBlock = 4;

template <class S>
void row_scores(const float* q, int64_t q_stride, const RowSource& keys, Ahead& ahead, float* scores, int64_t stride,
                int32_t rows) {
    for (int32_t r = 0; r < rows; r += kRowBlock) {
        RowBlock<S, kRowBlock>::scores(q + r * q_stride, q_stride, keys, ahead, scores + r * stride, stride, rows - r);
    }
}

template <class S>
void row_values(const float* p, int64_t stride, const RowSource& values, Ahead& ahead, const float* alpha, float* out,
                int64_t out_stride, int32_t rows) {
    for (int32_t r = 0; r < rows; r += kRowBlock) {
        RowBlock<S, kRowBlock>::values(p + r * stride, stride, values, ahead, alpha + r, out + r * out_stride,
                                       out_stride, rows - r);
    }
}

// Calls function(S{}) for the storage type.
template <class Function>
inline void with_storage(Storage storage, Function function) {
    switch (storage) {
        case Storage::kFloat32:
            return function(Float32{});
        case Storage::kBFloat16:
            return function(BFloat16{});
        case Storage::kFloat16:
            return function(Float16{});
        case Storage::kFloat8:
            return function(Float8{});
    }
}

// What the tile will read of its keys, or of its values.
inline Ahead ahead_of(const Shape& shape, const SegmentView& segment, const Tile& tile, bool keys) {
    const char* page = keys ? tile.packed_keys : tile.packed_values;
    if (!page) return Ahead(keys ? open_keys(shape, segment, tile) : open_values(shape, segment, tile));
    const PackedPart& part = keys ? segment.packed->keys : segment.packed->values;
    if (!part.coded) return Ahead(packed_rows(*segment.packed, part, page, tile));
    Ahead ahead;
#ifdef KVWISE_INTEGER_DOTS
    if (folds(shape, part, keys)) {
        fetch_codes(part, page, tile.packed_rows, ahead);
        return ahead;
    }
#endif
    ahead.add({page + part.first, part.steps + int64_t(part.num_groups()) * part.padded_inner * 4, 0, 1});
    return ahead;
}

// The column of a tile's masses is far from its neighbours': ask for it while K and V arrive. (Always inlined: GCC
// takes a function that only prefetches for one without effect, and drops its calls.)
__attribute__((always_inline)) inline void fetch_mass(const SegmentView& segment, const Tile& tile) {
    const float* masses = mass_of(segment, tile);
    for (int32_t s = 0; masses && s < tile.num_key_slots(); ++s) {
        const Span& span = tile.key_slots()[s];
        for (int32_t t = 0; t < span.count; t += 16) __builtin_prefetch(masses + span.slot + t, 1, 3);
    }
}

// A tile, whose it is and what the queries see of that.
struct Place {
    const SegmentView* segment = nullptr;
    Sight sights[kMaxDecodeRows];
    Tile tile;
};

// The tiles of a task that some row can see, over all its segments.
class TileWalk {
  public:
    explicit TileWalk(const DecodeTask& task) : task_(task), open_keys_(decode_tile_keys(*task.shape)) {}

    // False behind the last one: `place` has an empty tile then, of the segment before.
    bool next(Place& place) {
        while (at_ >= to_) {
            if (number_ + 1 >= task_.num_segments) {
                place.segment = segment_ ? segment_ : task_.segments;
                place.tile.count = place.tile.num_spans = 0;
                place.tile.packed_keys = place.tile.packed_values = nullptr;
                return false;
            }
            enter(++number_);
        }
        place.segment = segment_;
        for (int32_t i = 0; i < task_.queries.num_queries; ++i) place.sights[i] = sights_[i];
        // Codes are short: their tiles may be the largest there are.
        cut_tile(*segment_, at_, to_, at_ < segment_->value_length ? kDecodeTile : open_keys_, place.tile);
        at_ += place.tile.count;
        return true;
    }

  private:
    const DecodeTask& task_;
    const int32_t open_keys_;
    const SegmentView* segment_ = nullptr;
    int32_t number_ = -1;
    int64_t joined_ = 0;  // index of the next segment's first slot among all segments
    int64_t at_ = 0, to_ = 0;
    Sight sights_[kMaxDecodeRows];

    void enter(int32_t number) {
        segment_ = &task_.segments[number];
        const int64_t from = task_.from - joined_, to = task_.to - joined_;
        joined_ += segment_->length;
        int64_t lo = segment_->length, hi = 0;
        for (int32_t i = 0; i < task_.queries.num_queries; ++i) {
            sights_[i] = sight_of(*task_.shape, *segment_, task_.queries, i);
            lo = sights_[i].lo < lo ? sights_[i].lo : lo;
            hi = sights_[i].hi > hi ? sights_[i].hi : hi;
        }
        at_ = from > lo ? from : lo;
        to_ = to < hi ? to : hi;
    }
};

// What decode keeps while it walks the tiles.
struct Decoder {
    const DecodeTask& task;
    int32_t rows;
    int64_t key_stride, value_stride;
    int64_t tile_index = 0;
    const SegmentView* chosen_for = nullptr;  // whose channels of the queries are chosen
    const float* scaled_from = nullptr;       // which queries are scaled

    explicit Decoder(const DecodeTask& t)
        : task(t),
          rows(t.queries.num_queries * t.shape->group),
          key_stride(padded_query(t.shape->key_dim)),
          value_stride(padded(t.shape->value_dim)) {
        for (int32_t r = 0; r < rows; ++r) {
            t.result.maximum[r] = kMinusInfinity;
            t.result.sum[r] = 0.0f;
        }
        for (int64_t i = 0; i < rows * value_stride; ++i) t.result.out[i] = 0.0f;
    }

    // The queries that the segment's keys meet.
    void scale_queries(const SegmentView& segment) {
        const float* from = segment.queries ? segment.queries : task.queries.data;
        if (from == scaled_from) return;
        scaled_from = from;
        chosen_for = nullptr;
        const Shape& shape = *task.shape;
        for (int32_t r = 0; r < rows; ++r) {
            const float* query =
                from + (r / shape.group) * task.queries.token_stride + (r % shape.group) * task.queries.head_stride;
            float* scaled = task.scaled_queries + r * key_stride;
            for (int32_t d = 0; d < key_stride; ++d) scaled[d] = d < shape.key_dim ? query[d] * shape.scale : 0.0f;
        }
    }

    // Queries that meet packed keys: the channels that keys kept.
    const float* packed_queries(const SegmentView& segment) {
        if (!segment.key_channels) return task.scaled_queries;
        if (chosen_for == &segment) return task.chosen_queries;
        chosen_for = &segment;
        for (int32_t r = 0; r < rows; ++r) {
            float* chosen = task.chosen_queries + r * key_stride;
            for (int32_t d = 0; d < key_stride; ++d) {
                chosen[d] = d < segment.packed->keys.dim
                                ? task.scaled_queries[r * key_stride + segment.key_channels[d]]
                                : 0.0f;
            }
        }
        return task.chosen_queries;
    }

    void score(const SegmentView& segment, const Tile& tile, Ahead& ahead, float* scores, int64_t stride) {
        const auto of_rows = [&](const float* queries, const RowSource& keys) {
            with_storage(keys.storage, [&](auto storage) {
                row_scores<decltype(storage)>(queries, key_stride, keys, ahead, scores, stride, rows);
            });
            if (keys.scale == 1.0f) return;
            for (int32_t r = 0; r < rows; ++r) scale_row(scores + r * stride, tile.count, keys.scale);
        };
        if (!tile.packed_keys) return of_rows(task.scaled_queries, open_keys(*task.shape, segment, tile));
        const PackedPart& part = segment.packed->keys;
        const float* queries = packed_queries(segment);
        if (!part.coded) return of_rows(queries, packed_rows(*segment.packed, part, tile.packed_keys, tile));
#ifdef KVWISE_INTEGER_DOTS
        if (folds(*task.shape, part, true)) {
            is_wide(part) ? code_scores<int16_t>(part, tile.packed_keys, tile, queries, key_stride, rows, ahead, scores,
                                                 stride)
                          : code_scores<int8_t>(part, tile.packed_keys, tile, queries, key_stride, rows, ahead, scores,
                                                stride);
            return;
        }
#endif
        Span whole;
        of_rows(queries, unpacked_rows(part, tile.packed_keys, tile, task.unpacked, whole));
    }

    // Adds the tile's values; may change `probabilities`.
    void add(const SegmentView& segment, const Tile& tile, Ahead& ahead, float* probabilities, int64_t stride,
             const float* alpha) {
        float* out = task.result.out;
        const auto of_rows = [&](const RowSource& values) {
            if (values.scale != 1.0f) {
                for (int32_t r = 0; r < rows; ++r) scale_row(probabilities + r * stride, tile.count, values.scale);
            }
            with_storage(values.storage, [&](auto storage) {
                row_values<decltype(storage)>(probabilities, stride, values, ahead, alpha, out, value_stride, rows);
            });
        };
        if (!tile.packed_values) return of_rows(open_values(*task.shape, segment, tile));
        const PackedPart& part = segment.packed->values;
        if (!part.coded) return of_rows(packed_rows(*segment.packed, part, tile.packed_values, tile));
#ifdef KVWISE_INTEGER_DOTS
        if (folds(*task.shape, part, false)) {
            is_wide(part) ? code_values<int16_t>(part, tile.packed_values, tile, probabilities, stride, rows, ahead,
                                                 alpha, out, value_stride)
                          : code_values<int8_t>(part, tile.packed_values, tile, probabilities, stride, rows, ahead,
                                                alpha, out, value_stride);
            return;
        }
#endif
        Span whole;
        of_rows(unpacked_rows(part, tile.packed_values, tile, task.unpacked, whole));
    }

    static void scale_row(float* row, int32_t n, float scale) {
        for (int32_t t = 0; t < n; ++t) row[t] *= scale;
    }

    // One tile: scores, softmax, values. `next` is fetched meanwhile.
    void visit(const Place& place, const Place& next) {
        const Shape& shape = *task.shape;
        const SegmentView& segment = *place.segment;
        const Tile& tile = place.tile;
        constexpr int64_t stride = kDecodeTile;
        float* kept = task.probabilities ? task.probabilities + tile_index * rows * stride : nullptr;
        Ahead fetch_values = ahead_of(shape, segment, tile, false);
        Ahead fetch_keys = ahead_of(shape, *next.segment, next.tile, true);
        float alpha[kMaxDecodeRows];
        constexpr int64_t score_stride = kDecodeTile + kDecodeSlack;
        float* scores = task.scratch;
        scale_queries(segment);
        score(segment, tile, fetch_values, scores, score_stride);
        for (int32_t r = 0; r < rows; ++r) {
            hide_keys(shape, segment, tile, place.sights[r / shape.group], scores + r * score_stride);
            alpha[r] = online_softmax(shape.softcap, tile.count, scores + r * score_stride, task.result.maximum[r],
                                      task.result.sum[r]);
        }
        if (kept) {
            for (int32_t r = 0; r < rows; ++r) {
                std::memcpy(kept + r * stride, scores + r * score_stride, stride * sizeof(float));
                task.tile_maximum[tile_index * rows + r] = task.result.maximum[r];
            }
        }
        ++tile_index;
        if (kept) fetch_mass(*next.segment, next.tile);
        add(segment, tile, fetch_keys, scores, score_stride, alpha);
    }
};

// Calls visit(place, next place) for every tile of the task; memory of the next can be asked for meanwhile.
template <class Visit>
void walk_tiles(const DecodeTask& task, Visit visit) {
    TileWalk walk(task);
    Place places[2];
    int current = 0;
    for (bool more = walk.next(places[0]); more; current = 1 - current) {
        more = walk.next(places[1 - current]);
        visit(places[current], places[1 - current]);
    }
}

void decode(const DecodeTask& task) {
    Decoder decoder(task);
    walk_tiles(task, [&](const Place& place, const Place& next) { decoder.visit(place, next); });
}

// n neighbouring keys were given so much: it is added to their column, or the position noted where it is enough.
inline void receive(const SegmentView& segment, const float* given, int32_t n, float* column) {
    constexpr int W = Vec::kLanes;
    int32_t t = 0;
    if (!segment.marks) {
        for (; t + W <= n; t += W) store(column + t, load(column + t) + load(given + t));
        for (; t < n; ++t) column[t] += given[t];
        return;
    }
    const Vec bound = broadcast(segment.mark_bound), position = broadcast(segment.mark_position);
    for (; t + W <= n; t += W) {
        const Vec mass = load(given + t);
        store(column + t, select(equal(larger(mass, bound), mass), position, load(column + t)));
    }
    for (; t < n; ++t) column[t] = given[t] >= segment.mark_bound ? segment.mark_position : column[t];
}

// One walk over the kept probabilities: no key is read again.
void decode_mass(const DecodeMassTask& mass) {
    const DecodeTask& task = *mass.decode;
    const int32_t rows = task.queries.num_queries * task.shape->group;
    int64_t tile_index = 0;
    walk_tiles(task, [&](const Place& place, const Place& next) {
        const Tile& tile = place.tile;
        const float* kept = task.probabilities + tile_index * rows * kDecodeTile;
        const float* maximum = task.tile_maximum + tile_index * rows;
        ++tile_index;
        float* masses = mass_of(*place.segment, tile);
        fetch_mass(*next.segment, next.tile);  // a split's parts are walked long after they were decoded
        if (!masses) return;
        Vec received[kDecodeTile / Vec::kLanes];
        for (Vec& v : received) v = zero();
        for (int32_t r = mass.first_counted_row; r < rows; ++r) {
            if (maximum[r] == kMinusInfinity) continue;
            const Vec weight = exponential(broadcast(maximum[r] - mass.lse[r]));
            for (int i = 0; i < kDecodeTile / Vec::kLanes; ++i) {
                received[i] = fma(load(kept + r * kDecodeTile + i * Vec::kLanes), weight, received[i]);
            }
        }
        float sums[kDecodeTile];
        for (int i = 0; i < kDecodeTile / Vec::kLanes; ++i) store(sums + i * Vec::kLanes, received[i]);
        const float* given = sums;
        for (int32_t s = 0; s < tile.num_key_slots(); given += tile.key_slots()[s++].count)
            receive(*place.segment, given, tile.key_slots()[s].count, masses + tile.key_slots()[s].slot);
    });
}

}  // namespace
