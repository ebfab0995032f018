// attend: cuts the work of one call into tasks, runs them on the threads, merges what was split.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "tasks.h"

namespace kvwise {

// One segment of the call, for all sequences and heads; strides in elements. A head stride of 0: shared by all heads.
struct Segment {
    const void* keys;
    const void* values;
    const int32_t* tables;
    int64_t table_stride;
    int64_t table_head_stride;
    int64_t table_width;
    const int32_t* lengths;
    int64_t length_stride;
    int64_t length_head_stride;
    int64_t page_stride;
    int64_t page_offset;
    int64_t page_head_step;  // pages from one head to the next
    int64_t num_pages;
    int64_t block_size;
    bool causal;
    const int32_t* positions;
    float* mass;
    const float* queries;  // that its keys meet, with the strides of the call's; null: the call's
    const float* mark_bounds;     // [B, H], null: mass is added
    const float* mark_positions;  // [B]: what a key whose mass reaches the bound gets into its column of mass instead
    bool is_sealed;  // with packed pages before the open ones; all below is theirs
    PackedPages packed;
    const int32_t* packed_tables;
    int64_t packed_table_stride;
    int64_t packed_table_head_stride;
    int64_t packed_table_width;
    const int32_t* key_lengths;  // these three with strides of [B, H]
    const int32_t* value_lengths;
    const int32_t* open_bases;
    int64_t sealed_stride;
    int64_t sealed_head_stride;
    const int32_t* key_channels;  // [B, H, dim], null: all
    const int32_t* packed_positions;
    float* packed_mass;
};

struct AttendCall {
    Shape shape;
    int32_t num_heads;  // H
    int32_t num_sequences;
    int64_t num_tokens;
    const float* queries;
    int64_t query_token_stride;
    int64_t query_head_stride;
    const int32_t* query_start;
    const int32_t* query_positions;  // null: not given
    const int32_t* mass_rows;        // null: all rows count
    const float* fading;             // [T]: a row counts exp(-fading) times towards the mass; null: once
    float* out;                      // [T, Hq, Dv]
    float* lse;                      // [T, Hq]
    int num_threads;
};

// Scratch memory kept between calls: asking the system for it each time costs more than a short decode.
class Workspace {
  public:
    std::mutex mutex;  // held by the call that uses the memory

    float* of_worker(int worker, int64_t num_floats) { return grown(workers_[worker], num_floats); }
    float* shared(int64_t num_floats) { return grown(shared_, num_floats); }
    void prepare(int num_workers) {
        if (workers_.size() < size_t(num_workers)) workers_.resize(num_workers);
    }

  private:
    struct Buffer {
        std::unique_ptr<float[]> data;
        int64_t size = 0;
    };
    static float* grown(Buffer& buffer, int64_t num_floats) {
        if (buffer.size < num_floats) {
            buffer.data.reset(new float[num_floats + num_floats / 4]);
            buffer.size = num_floats + num_floats / 4;
        }
        return buffer.data.get();
    }
    std::vector<Buffer> workers_;
    Buffer shared_;
};

// Throws std::invalid_argument when a length or page lies outside its table or arena.
void attend(Workspace& workspace, const InstructionSet& set, const AttendCall& call,
            const std::vector<Segment>& segments);

}  // namespace kvwise
