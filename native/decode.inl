// Attention of a few rows over many keys: bound by reading K and V, so each page is read once and the next is on its
// way. Included by instruction_set.cpp, once per instruction set. Scores, probabilities and sums are float32 for every
// storage.

namespace {

constexpr int64_t kDecodeTileBytes = 32 * 1024;

// A run of neighbouring slots inside one page.
struct Span {
    int64_t slot;
    int32_t count;
};

// Up to kDecodeTile slots in table order, as spans.
struct Tile {
    Span spans[kDecodeTile];
    int32_t num_spans;
    int32_t first;  // index in table order of its first slot
    int32_t count;
};

// Keys of a decode tile: K and V of one tile stay in the first-level cache while the next ones arrive.
inline int32_t decode_tile_keys(const Shape& shape) {
    const int64_t row_bytes = (shape.key_dim + shape.value_dim) * (shape.storage == Storage::kFloat32 ? 4 : 2);
    const int64_t keys = kDecodeTileBytes / row_bytes;
    return keys >= 64 ? 64 : keys >= 32 ? 32 : 16;
}

inline void cut_tile(const SegmentView& segment, int64_t first, int64_t last, int32_t max_keys, Tile& tile) {
    tile.num_spans = 0;
    tile.first = int32_t(first);
    int64_t index = first;
    const int64_t stop = last < first + max_keys ? last : first + max_keys;
    while (index < stop) {
        const int64_t entry = index / segment.block_size, offset = index % segment.block_size;
        const int64_t room = segment.block_size - offset;
        const int32_t count = int32_t(stop - index < room ? stop - index : room);
        const int64_t page = int64_t(segment.table[entry]) * segment.page_stride + segment.page_offset;
        tile.spans[tile.num_spans++] = {page * segment.block_size + offset, count};
        index += count;
    }
    tile.count = int32_t(index - first);
}

// The rows of a tile as cache lines to fetch, a few per row computed: requests to memory overlap with arithmetic and
// never come in bursts. (Pages are 4 KiB or less and far apart, so the hardware's own prefetcher sees no stream.)
class Ahead {
  public:
    Ahead(const void* arena, int64_t row_bytes, const Tile& tile)
        : arena_(static_cast<const char*>(arena)), row_bytes_(row_bytes), tile_(tile) {}

    void fetch(int32_t lines) {
        for (; lines > 0; --lines, at_ += 64) {
            if (at_ >= end_) {
                if (span_ == tile_.num_spans) return;
                at_ = arena_ + tile_.spans[span_].slot * row_bytes_;
                end_ = at_ + tile_.spans[span_].count * row_bytes_;
                ++span_;
            }
            __builtin_prefetch(at_, 0, 3);
        }
    }

    // Lines to fetch per row when the whole tile is to be fetched in `passes` walks over its rows.
    int32_t lines_per_row(int32_t passes) const { return int32_t((row_bytes_ + 64 * passes - 1) / (64 * passes)); }

  private:
    const char* arena_;
    int64_t row_bytes_;
    const Tile& tile_;
    int32_t span_ = 0;
    const char* at_ = nullptr;
    const char* end_ = nullptr;
};

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
void tile_scores(const float* queries, int64_t query_stride, const typename S::Bits* keys, int32_t dim,
                 const Tile& tile, Ahead& ahead, float* scores, int64_t score_stride) {
    constexpr int TK = R == 3 ? Vec::kLanes / 4 : Vec::kLanes / R;
    int32_t written = 0;
    const int32_t lines = TK * ahead.lines_per_row(1);
    for (int32_t s = 0; s < tile.num_spans; ++s) {
        const Span& span = tile.spans[s];
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
inline void add_values(const float* probabilities, int64_t stride, const typename S::Bits* values, int32_t dim,
                       int32_t d, const Tile& tile, Ahead& ahead, int32_t lines, const float* alpha, float* out,
                       int64_t out_stride) {
    Vec sums[R][C];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) sums[r][c] = load(out + r * out_stride + d + c * Vec::kLanes) * broadcast(alpha[r]);
    }
    const float* p = probabilities;
    for (int32_t s = 0; s < tile.num_spans; ++s) {
        const typename S::Bits* row = values + tile.spans[s].slot * dim + d;
        for (int32_t t = 0; t < tile.spans[s].count; ++t, row += dim, ++p) {
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
void tile_values(const float* probabilities, int64_t stride, const typename S::Bits* values, int32_t dim,
                 const Tile& tile, Ahead& ahead, const float* alpha, float* out, int64_t out_stride) {
    constexpr int C = Vec::kLanes == 16 || R <= 2 ? 4 : 2;
    constexpr int W = Vec::kLanes;
    const int32_t lines = ahead.lines_per_row(dim / (C * W) > 0 ? dim / (C * W) : 1);
    int32_t d = 0;
    for (; d + C * W <= dim; d += C * W) {
        add_values<S, R, C, false>(probabilities, stride, values, dim, d, tile, ahead, lines, alpha, out, out_stride);
    }
    for (; d + W <= dim; d += W) {
        add_values<S, R, 1, false>(probabilities, stride, values, dim, d, tile, ahead, lines, alpha, out, out_stride);
    }
    if (d < dim)
        add_values<S, R, 1, true>(probabilities, stride, values, dim, d, tile, ahead, lines, alpha, out, out_stride);
}

// The slots [lo, hi) a query may see in one segment, before positions are looked at.
struct Sight {
    int32_t lo;
    int32_t hi;
    int32_t position;  // of the query
};

inline Sight sight_of(const Shape& shape, const SegmentView& segment, const QueryView& queries, int32_t query) {
    const int32_t own = segment.length - queries.num_queries + query;
    int32_t hi = segment.causal ? own + 1 : segment.length;
    hi = hi < 0 ? 0 : hi > segment.length ? segment.length : hi;
    int32_t lo = 0;
    const int32_t position = queries.positions ? queries.positions[query] : own;
    if (shape.window && !segment.positions) {
        lo = position - shape.window + 1 > 0 ? position - shape.window + 1 : 0;
        hi = hi < position + 1 ? hi : position + 1 > 0 ? position + 1 : 0;
    }
    return {lo, hi, position};
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
    if (!shape.window || !segment.positions) return;
    int32_t t = 0;
    for (int32_t s = 0; s < tile.num_spans; ++s) {
        for (int32_t i = 0; i < tile.spans[s].count; ++i, ++t) {
            const int32_t distance = sight.position - segment.positions[tile.spans[s].slot + i];
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
    static void scores(const float* q, int64_t q_stride, const typename S::Bits* keys, int32_t dim, const Tile& tile,
                       Ahead& ahead, float* scores, int64_t stride, int32_t rows) {
        if (rows >= R) return tile_scores<S, R>(q, q_stride, keys, dim, tile, ahead, scores, stride);
        if constexpr (R > 1) RowBlock<S, R - 1>::scores(q, q_stride, keys, dim, tile, ahead, scores, stride, rows);
    }
    static void values(const float* p, int64_t stride, const typename S::Bits* values_, int32_t dim, const Tile& tile,
                       Ahead& ahead, const float* alpha, float* out, int64_t out_stride, int32_t rows) {
        if (rows >= R) return tile_values<S, R>(p, stride, values_, dim, tile, ahead, alpha, out, out_stride);
        if constexpr (R > 1)
            RowBlock<S, R - 1>::values(p, stride, values_, dim, tile, ahead, alpha, out, out_stride, rows);
    }
};

constexpr int kRowBlock = 4;

// What decode keeps while it walks the tiles.
template <class S>
struct Decoder {
    const DecodeTask& task;
    int32_t rows;
    int64_t key_stride, value_stride;
    int64_t tile_index = 0;

    explicit Decoder(const DecodeTask& t)
        : task(t),
          rows(t.queries.num_queries * t.shape->group),
          key_stride(padded(t.shape->key_dim)),
          value_stride(padded(t.shape->value_dim)) {
        for (int32_t r = 0; r < rows; ++r) {
            const float* query = t.queries.data + (r / t.shape->group) * t.queries.token_stride +
                                 (r % t.shape->group) * t.queries.head_stride;
            float* scaled = t.scaled_queries + r * key_stride;
            for (int32_t d = 0; d < key_stride; ++d)
                scaled[d] = d < t.shape->key_dim ? query[d] * t.shape->scale : 0.0f;
            t.result.maximum[r] = kMinusInfinity;
            t.result.sum[r] = 0.0f;
        }
        for (int64_t i = 0; i < rows * value_stride; ++i) t.result.out[i] = 0.0f;
    }

    // One tile: scores, softmax, values. `next` is fetched meanwhile.
    void visit(const SegmentView& segment, const Sight* sights, const Tile& tile, const Tile& next) {
        const Shape& shape = *task.shape;
        const auto* keys = static_cast<const typename S::Bits*>(segment.keys);
        const auto* values = static_cast<const typename S::Bits*>(segment.values);
        constexpr int64_t stride = kDecodeTile;
        float* kept = task.probabilities ? task.probabilities + tile_index * rows * stride : nullptr;
        Ahead fetch_values(values, shape.value_dim * int64_t(sizeof(typename S::Bits)), tile);
        Ahead fetch_keys(keys, shape.key_dim * int64_t(sizeof(typename S::Bits)), next);
        float alpha[kMaxDecodeRows];
        constexpr int64_t score_stride = kDecodeTile + kDecodeSlack;
        float* scores = task.scratch;
        for (int32_t r = 0; r < rows; r += kRowBlock) {
            RowBlock<S, kRowBlock>::scores(task.scaled_queries + r * key_stride, key_stride, keys, shape.key_dim, tile,
                                           fetch_values, scores + r * score_stride, score_stride, rows - r);
        }
        for (int32_t r = 0; r < rows; ++r) {
            hide_keys(shape, segment, tile, sights[r / shape.group], scores + r * score_stride);
            alpha[r] = online_softmax(shape.softcap, tile.count, scores + r * score_stride, task.result.maximum[r],
                                      task.result.sum[r]);
        }
        for (int32_t r = 0; r < rows; r += kRowBlock) {
            RowBlock<S, kRowBlock>::values(scores + r * score_stride, score_stride, values, shape.value_dim, tile,
                                           fetch_keys, alpha + r, task.result.out + r * value_stride, value_stride,
                                           rows - r);
        }
        if (kept) {
            for (int32_t r = 0; r < rows; ++r) {
                std::memcpy(kept + r * stride, scores + r * score_stride, stride * sizeof(float));
                task.tile_maximum[tile_index * rows + r] = task.result.maximum[r];
            }
        }
        ++tile_index;
    }
};

// Calls visit(segment, sights, tile, next tile) for every tile of the task that some row can see.
template <class Visit>
void walk_tiles(const DecodeTask& task, Visit visit) {
    int64_t joined = 0;  // index of the segment's first slot among all segments
    for (int32_t s = 0; s < task.num_segments; ++s) {
        const SegmentView& segment = task.segments[s];
        int64_t from = task.from - joined, to = task.to - joined;
        joined += segment.length;
        Sight sights[kMaxDecodeRows];
        int64_t lo = segment.length, hi = 0;
        for (int32_t i = 0; i < task.queries.num_queries; ++i) {
            sights[i] = sight_of(*task.shape, segment, task.queries, i);
            lo = sights[i].lo < lo ? sights[i].lo : lo;
            hi = sights[i].hi > hi ? sights[i].hi : hi;
        }
        from = from > lo ? from : lo;
        to = to < hi ? to : hi;
        if (from >= to) continue;
        Tile tiles[2];
        int current = 0;
        const int32_t max_keys = decode_tile_keys(*task.shape);
        cut_tile(segment, from, to, max_keys, tiles[0]);
        for (int64_t at = from; at < to;) {
            at += tiles[current].count;
            cut_tile(segment, at, to > at ? to : at, max_keys, tiles[1 - current]);
            visit(segment, sights, tiles[current], tiles[1 - current]);
            current = 1 - current;
        }
    }
}

template <class S>
void decode_storage(const DecodeTask& task) {
    Decoder<S> decoder(task);
    walk_tiles(task, [&](const SegmentView& segment, const Sight* sights, const Tile& tile, const Tile& next) {
        decoder.visit(segment, sights, tile, next);
    });
}

void decode(const DecodeTask& task) {
    switch (task.shape->storage) {
        case Storage::kFloat32:
            return decode_storage<Float32>(task);
        case Storage::kBFloat16:
            return decode_storage<BFloat16>(task);
        case Storage::kFloat16:
            return decode_storage<Float16>(task);
    }
}

// One walk over the kept probabilities: no key is read again.
void decode_mass(const DecodeMassTask& mass) {
    const DecodeTask& task = *mass.decode;
    const int32_t rows = task.queries.num_queries * task.shape->group;
    int64_t tile_index = 0;
    walk_tiles(task, [&](const SegmentView& segment, const Sight*, const Tile& tile, const Tile& next) {
        const float* kept = task.probabilities + tile_index * rows * kDecodeTile;
        const float* maximum = task.tile_maximum + tile_index * rows;
        ++tile_index;
        if (!segment.mass) return;
        for (int32_t s = 0; s < next.num_spans; ++s) __builtin_prefetch(segment.mass + next.spans[s].slot, 1, 3);
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
        int32_t t = 0;
        for (int32_t s = 0; s < tile.num_spans; ++s) {
            float* column = segment.mass + tile.spans[s].slot;
            for (int32_t i = 0; i < tile.spans[s].count; ++i) column[i] += sums[t++];
        }
    });
}

}  // namespace
