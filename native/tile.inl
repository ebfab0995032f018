// Tiles: runs of tokens handled at once, and where their keys and values lie. Included by instruction_set.cpp, once per
// instruction set.

namespace {

constexpr int64_t kDecodeTileBytes = 32 * 1024;

// A run of neighbouring slots inside one page.
struct Span {
    int64_t slot;
    int32_t count;
};

// Up to kDecodeTile tokens in table order. All their keys lie in open pages or all in one packed page; so do values.
struct Tile {
    Span spans[kDecodeTile];  // open slots, if keys or values are open
    int32_t num_spans;
    int32_t first;  // index in table order of its first token
    int32_t count;
    const char* packed_keys;    // the page, null: keys are open
    const char* packed_values;  // likewise
    Span packed_slots;          // page * page_tokens + row
    Span packed_rows;           // row in the page

    // Slots of its keys, which positions and mass go by.
    const Span* key_slots() const { return packed_keys ? &packed_slots : spans; }
    int32_t num_key_slots() const { return packed_keys ? 1 : num_spans; }
};

// Where keys or values of a tile lie as rows of numbers; a number is worth `scale` times what is stored.
struct RowSource {
    const char* base;
    Storage storage;
    int32_t dim;
    const Span* spans;
    int32_t num_spans;
    float scale;

    int64_t row_bytes() const { return dim * bytes_of(storage); }
};

inline RowSource open_keys(const Shape& shape, const SegmentView& segment, const Tile& tile) {
    return {static_cast<const char*>(segment.keys), shape.storage, shape.key_dim, tile.spans, tile.num_spans, 1.0f};
}

inline RowSource open_values(const Shape& shape, const SegmentView& segment, const Tile& tile) {
    return {static_cast<const char*>(segment.values), shape.storage, shape.value_dim, tile.spans, tile.num_spans, 1.0f};
}

// A float8 is read as the float16 of the same bits, 256 times too small.
inline RowSource packed_rows(const PackedPages& pages, const PackedPart& part, const char* page, const Tile& tile) {
    const char* rows = page + part.first;
    float scale = 1.0f;
    if (part.storage == Storage::kFloat8) {
        std::memcpy(&scale, rows + pages.page_tokens * part.dim, sizeof(scale));
        scale *= 256.0f;
    }
    return {rows, part.storage, part.dim, &tile.packed_rows, 1, scale};
}

// Keys of a decode tile: K and V of one tile stay in the first-level cache while the next ones arrive.
inline int32_t decode_tile_keys(const Shape& shape) {
    const int64_t row_bytes = (shape.key_dim + shape.value_dim) * (shape.storage == Storage::kFloat32 ? 4 : 2);
    const int64_t keys = kDecodeTileBytes / row_bytes;
    return keys >= 64 ? 64 : keys >= 32 ? 32 : 16;
}

inline void cut_spans(const SegmentView& segment, int64_t index, int64_t stop, Tile& tile) {
    while (index < stop) {
        const int64_t entry = index / segment.block_size, offset = index % segment.block_size;
        const int64_t room = segment.block_size - offset;
        const int32_t count = int32_t(stop - index < room ? stop - index : room);
        const int64_t page = int64_t(segment.table[entry]) * segment.page_stride + segment.page_offset;
        tile.spans[tile.num_spans++] = {page * segment.block_size + offset, count};
        index += count;
    }
}

// Whether the tile that begins at `first` reads packed pages, and if so, how far it reaches: never over the end of a
// page or the token where keys or values come to be open.
inline int64_t cut_packed(const SegmentView& segment, int64_t first, int64_t stop, Tile& tile) {
    const PackedPages& pages = *segment.packed;
    const int64_t entry = first / pages.page_tokens, row = first % pages.page_tokens;
    const int64_t number = segment.packed_table[entry], room = pages.page_tokens - row;
    stop = stop < first + room ? stop : first + room;
    if (first < segment.key_length) stop = stop < segment.key_length ? stop : segment.key_length;
    if (first < segment.value_length) stop = stop < segment.value_length ? stop : segment.value_length;
    const char* page = pages.page(number);
    if (first < segment.key_length) tile.packed_keys = page;
    if (first < segment.value_length) tile.packed_values = page;
    const int32_t count = int32_t(stop - first);
    tile.packed_slots = {number * pages.page_tokens + row, count};
    tile.packed_rows = {row, count};
    return stop;
}

inline void cut_tile(const SegmentView& segment, int64_t first, int64_t last, int32_t max_keys, Tile& tile) {
    tile.num_spans = 0;
    tile.first = int32_t(first);
    tile.packed_keys = tile.packed_values = nullptr;
    int64_t stop = last < first + max_keys ? last : first + max_keys;
    if (segment.packed && first < stop && first < segment.key_length) stop = cut_packed(segment, first, stop, tile);
    if (!tile.packed_keys || !tile.packed_values)
        cut_spans(segment, first - segment.open_base, stop - segment.open_base, tile);
    tile.count = int32_t(stop > first ? stop - first : 0);
}

// `count` runs of bytes, `stride` bytes from one to the next.
struct Run {
    const char* at;
    int64_t bytes;
    int64_t stride;
    int32_t count;
};

// What a tile will read as cache lines to fetch, a few per row computed: requests to memory overlap with arithmetic and
// never come in bursts. (Pages are 4 KiB or less and far apart, so the hardware's own prefetcher sees no stream.)
class Ahead {
  public:
    // Tiles of rows. The tile behind the last one has none.
    explicit Ahead(const RowSource& rows)
        : base_(rows.base), row_bytes_(rows.row_bytes()), spans_(rows.spans), left_(rows.num_spans) {}

    Ahead() = default;

    void add(const Run& run) {
        runs_[left_++] = run;
        run_lines_ += int32_t((run.bytes + 63) / 64) * run.count;
    }

    void fetch(int32_t lines) {
        for (; lines > 0; --lines, at_ += 64) {
            if (at_ >= end_ && !next()) return;
            __builtin_prefetch(at_, 0, 3);
        }
    }

    // Lines to fetch per row when the whole tile is to be fetched in `passes` walks over its rows.
    int32_t lines_per_row(int32_t passes) const {
        return int32_t(((spans_ ? row_bytes_ : run_lines_) + 64 * passes - 1) / (64 * passes));
    }

    // Lines to fetch in each of so many steps of a walk over `rows` rows.
    int32_t lines_per_step(int32_t rows, int32_t steps) const {
        const int64_t lines = spans_ ? (row_bytes_ * rows + 63) / 64 : run_lines_;
        return int32_t((lines + steps - 1) / steps);
    }

  private:
    const char* base_ = nullptr;
    int64_t row_bytes_ = 0;
    const Span* spans_ = nullptr;
    Run runs_[4];
    int32_t left_ = 0;
    int32_t taken_ = 0;
    int32_t repeat_ = 0;
    int32_t run_lines_ = 0;
    const char* at_ = nullptr;
    const char* end_ = nullptr;

    bool next() {
        if (taken_ == left_) return false;
        if (spans_) {
            at_ = base_ + spans_[taken_].slot * row_bytes_;
            end_ = at_ + spans_[taken_++].count * row_bytes_;
            return true;
        }
        const Run& run = runs_[taken_];
        at_ = run.at + repeat_ * run.stride;
        end_ = at_ + run.bytes;
        if (++repeat_ == run.count) {
            repeat_ = 0;
            ++taken_;
        }
        return true;
    }
};

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
    if (shape.window && !segment.positions && !segment.packed_positions) {
        lo = position - shape.window + 1 > 0 ? position - shape.window + 1 : 0;
        hi = hi < position + 1 ? hi : position + 1 > 0 ? position + 1 : 0;
    }
    return {lo, hi, position};
}

// Whether visibility is asked of the position of each key.
inline bool by_position(const Shape& shape, const SegmentView& segment) {
    return shape.window && (segment.positions || segment.packed_positions);
}

// Positions of a tile's keys by slot; null: their index in table order.
inline const int32_t* positions_of(const SegmentView& segment, const Tile& tile) {
    return tile.packed_keys ? segment.packed_positions : segment.positions;
}

// Where a tile's keys receive mass, by slot; null: not wanted.
inline float* mass_of(const SegmentView& segment, const Tile& tile) {
    return tile.packed_keys ? segment.packed_mass : segment.mass;
}

}  // namespace
