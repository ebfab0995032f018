// What the driver of folded states hands to the code of one instruction set.
//
// A state stands for tokens that have left: H [rank, dim] and z [rank] of one (request, layer, KV head). A *map* takes
// vectors x [dim] to gelu(gelu(x A) B) [rank], A [dim, hidden], B [hidden, rank]; all is float32. See
// kernels/folded.py.
#pragma once

#include <cstdint>

namespace kvwise {

struct MapShape {
    int32_t dim;
    int32_t hidden;
    int32_t rank;
};

// The states of one layer and KV head: of request r, H at values + r * value_stride and z at weights + r *
// weight_stride.
struct States {
    float* values;
    float* weights;
    int64_t value_stride;
    int64_t weight_stride;
};

// Tokens of one (layer, KV head) join the states of their requests, one after the other.
struct FoldTask {
    const MapShape* shape;
    States states;
    const float* in;   // A
    const float* out;  // B
    const float* scale;              // d [rank]
    const float* interaction;        // I [rank, rank]
    const float* interaction_scale;  // e [rank]
    const int64_t* requests;         // of all tokens there are
    const float* keys;               // likewise [n, dim]
    const float* values;             // [n, dim]
    const int64_t* tokens;           // which of them [num_tokens]
    int64_t num_tokens;
    float* scratch;
};

// One query head's answers from its own keys, merged with those from the states.
struct MergeTask {
    const MapShape* shape;
    States states;
    const float* in;
    const float* out;
    const int64_t* requests;  // [num_rows]
    int64_t num_rows;
    const float* queries;  // of row 0; the next is query_stride further
    int64_t query_stride;
    const float* answers;  // of row 0
    float* merged;         // likewise
    int64_t answer_stride;
    const float* lse;  // of row 0
    int64_t lse_stride;
    float* scratch;
};

constexpr int kMapRows = 8;  // vectors that are mapped together, so that weights are loaded once for them

// Floats of scratch: the hidden layer and twice the features of so many vectors, padded to whole vectors of any set.
inline int64_t map_scratch(const MapShape& shape) {
    const int64_t hidden = (shape.hidden + 15) / 16 * 16, rank = (shape.rank + 15) / 16 * 16;
    return kMapRows * (hidden + 2 * rank);
}

}  // namespace kvwise
