// States of tokens that have left: what folds into them and what they add to answers.
#pragma once

#include <cstdint>

#include "features.h"
#include "tasks.h"

namespace kvwise {

// All of them, values [requests, L, H, rank, dim] and weights [requests, L, H, rank], and the maps: of queries [L, Hq,
// ...], of keys [L, H, ...].
struct Folded {
    MapShape shape;
    int64_t num_requests;
    int64_t num_layers;
    int64_t num_heads;
    int64_t num_query_heads;
    float* values;
    float* weights;
    const float* query_in;
    const float* query_out;
    const float* key_in;
    const float* key_out;
    const float* scale;
    const float* interaction;
    const float* interaction_scale;
};

struct Leavers {
    const int64_t* requests;  // [n]
    const int64_t* layers;
    const int64_t* heads;
    const float* keys;  // [n, dim]
    const float* values;
    int64_t n;
};

struct Answers {
    int64_t layer;
    const int64_t* requests;  // [B]
    int64_t num_rows;         // B
    const float* queries;     // [B, Hq, dim] by these strides
    int64_t query_row_stride;
    int64_t query_head_stride;
    const float* answers;  // [B, Hq, dim]
    const float* lse;      // [B, Hq]
    float* merged;         // [B, Hq, dim]
};

// Requests, layers and heads outside throw std::invalid_argument before anything is written. Tokens of one state are
// added in their order.
void fold_tokens(const InstructionSet& set, const Folded& folded, const Leavers& leavers, int num_threads);
void merge_answers(const InstructionSet& set, const Folded& folded, const Answers& answers, int num_threads);

}  // namespace kvwise
