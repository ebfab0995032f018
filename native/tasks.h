// What the driver hands to the code of one instruction set: plain values only, so that both sides agree on the layout.
//
// Words: a *row* is one (query, query head) pair that reads the KV head at hand; of n queries with G heads each, row r
// is query r / G, head r % G. A *tile* is a run of slots handled at once. T tokens, R rows, Dk/Dv head dims.
#pragma once

#include <cstdint>

#include "features.h"
#include "packed.h"

namespace kvwise {

// One segment as one (sequence, KV head) sees it: page of the i-th table entry = table[i] * page_stride + page_offset.
struct SegmentView {
    const void* keys;
    const void* values;
    const int32_t* table;
    int64_t page_stride;
    int64_t page_offset;
    const int32_t* positions;  // per slot, null: position = index in table order
    float* mass;               // per slot, null: not wanted
    bool marks;                // a mass of at least mark_bound makes its slot mark_position, and nothing is added
    float mark_bound;
    float mark_position;
    int64_t block_size;
    int32_t length;
    bool causal;
    const float* queries;  // that its keys meet: query 0, head 0 of the group; null: the task's
    // Tokens below key_length have their keys in packed pages, those below value_length their values; the others lie at
    // open slot token - open_base of the table above.
    const PackedPages* packed;  // null: every token is open
    const int32_t* packed_table;
    int32_t key_length;
    int32_t value_length;
    int32_t open_base;
    const int32_t* key_channels;      // of the query, for packed keys of fewer; null: all
    const int32_t* packed_positions;  // per packed slot page * page_tokens + row
    float* packed_mass;
};

// What all tasks of one attend share.
struct Shape {
    Storage storage;
    int32_t key_dim;
    int32_t value_dim;
    int32_t group;   // G
    int32_t window;  // 0: none
    float softcap;   // 0: none
    float scale;
    bool exact;      // codes are read as float32 numbers, not by integer products
};

// The queries of one sequence for one KV head.
struct QueryView {
    const float* data;         // query 0, head 0 of the group
    int64_t token_stride;      // elements from one query to the next
    int64_t head_stride;       // elements from one head to the next
    const int32_t* positions;  // of query 0 on, null: length - n + i
    int32_t num_queries;       // n
};

// Softmax so far over some keys: out is unnormalised, relative to `maximum` per row.
struct Partial {
    float* out;      // [R, padded Dv]
    float* maximum;  // [R]
    float* sum;      // [R]
};

// A few rows over the keys [from, to) of the joined segments; reads every key once.
struct DecodeTask {
    const Shape* shape;
    QueryView queries;
    const SegmentView* segments;
    int32_t num_segments;
    int64_t from;
    int64_t to;
    float* scaled_queries;  // scratch [R, padded Dk]
    float* probabilities;   // [tiles, R, kDecodeTile] relative to the maximum of their tile, null: no mass wanted
    float* tile_maximum;    // [tiles, R]
    float* scratch;         // [R, kDecodeTile + slack]
    float* chosen_queries;  // scratch [R, padded Dk], null: nothing is packed
    float* unpacked;        // scratch [kDecodeTile, padded max(Dk, Dv)], likewise
    Partial result;
};

// Adds to the mass of every key of a DecodeTask (or marks it for) what the rows gave it, by their final log-sum-exp.
struct DecodeMassTask {
    const DecodeTask* decode;
    const float* lse;  // [R]
    int32_t first_counted_row;
};

// Rows [first_row, last_row) of many queries over all keys; writes normalised output.
struct PrefillTask {
    const Shape* shape;
    QueryView queries;
    const SegmentView* segments;
    int32_t num_segments;
    int32_t first_row;
    int32_t last_row;
    float* out;  // of query 0, head 0; strides as below
    int64_t out_token_stride;
    int64_t out_head_stride;
    float* lse;  // of query 0, head 0
    int64_t lse_token_stride;
    float* workspace;
};

// The mass that slots [from, to) of one segment receive from rows >= first_row, given each row's final log-sum-exp.
struct PrefillMassTask {
    const Shape* shape;
    QueryView queries;
    SegmentView segment;
    int32_t first_row;
    int64_t from;
    int64_t to;
    const float* lse;  // of query 0, head 0
    int64_t lse_token_stride;
    float* received;  // [to - from], overwritten
    float* workspace;
};

constexpr int kDecodeTile = 64;   // most keys of a tile; fewer where rows are long
constexpr int kDecodeSlack = 16;  // score stores may run this far over a tile
constexpr int kMaxDecodeRows = 16;
constexpr int kPrefillKeys = 64;   // keys of one tile
constexpr int kPrefillRows = 192;  // rows of one task
constexpr int kMassKeys = 1024;    // keys of one mass task
constexpr int kMaxLanes = 16;

inline int64_t padded(int64_t n) {
    return (n + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
}

// Floats of one query of a decode: products with codes read whole units.
inline int64_t padded_query(int64_t n) {
    return (n + kCodeUnit - 1) / kCodeUnit * kCodeUnit;
}

// Number of tiles, all segments together, that a decode over so many keys visits at most. No tile is cut below
// `shortest` keys, 16 or the tokens of a shorter packed page, but where a task, a segment, packed keys or packed values
// end.
inline int64_t decode_tiles(int64_t keys, int32_t num_segments, int64_t shortest) {
    return keys / shortest + 5 * num_segments + 1;
}

inline int64_t prefill_workspace(const Shape& shape) {
    return (padded(shape.key_dim) + padded(shape.value_dim)) * (kPrefillRows + 3 * kMaxLanes + kPrefillKeys) +
           int64_t(kPrefillKeys + 16) * 3 * kMaxLanes + 8 * (kPrefillRows + 3 * kMaxLanes);
}

// A head's slots [first, stop) in table order, their masses and positions in columns [pages, block_size].
struct MassTask {
    const float* mass;
    const int32_t* positions;
    const int32_t* table;
    int64_t block_size;
    int64_t first;
    int64_t stop;
    int32_t newest;  // the last position that may leave
    float* scratch;  // [stop - first]
};

// The functions of one instruction set.
struct InstructionSet {
    const char* name;
    void (*decode)(const DecodeTask&);
    void (*decode_mass)(const DecodeMassTask&);
    void (*prefill)(const PrefillTask&);
    void (*prefill_mass)(const PrefillMassTask&);
    // Pack all rows of a part, or one row (of values whose rows stand alone).
    void (*seal)(const SealTask&);
    void (*seal_row)(const SealTask&, int64_t row);
    void (*fold)(const FoldTask&);
    void (*merge_folded)(const MergeTask&);
    // The least of n numbers (nan: one is none; infinite: there are none) and the first place it is at.
    void (*lowest)(const float* numbers, int64_t n, float* least, int64_t* where);
    // Likewise of masses, infinite for what may not leave; `where` counts from slot `first`.
    void (*lowest_mass)(const MassTask&, float* least, int64_t* where);
    // Round n float32 values to the storage type.
    void (*narrow)(Storage, const float* source, void* target, int64_t n);
    // Read n floats and nothing else: what memory can deliver at most. Returns their sum.
    float (*read)(const float* source, int64_t n);
    // Takes stripes of 64 bytes into the eight lanes of XXH3 and copies them; null target: only takes them in. `first`
    // is the number of the first stripe in its input. `streaming` stores past the caches if the target is aligned.
    void (*copy_stripes)(uint64_t* lanes, const char* source, char* target, int64_t num_stripes, int64_t first,
                         bool streaming);
    // The last 64 bytes of the input, which may overlap the stripe before.
    void (*last_stripe)(uint64_t* lanes, const char* stripe);
};

}  // namespace kvwise
