// The driver of attend: everything here is common to all instruction sets.
#include "attend.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace kvwise {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr int64_t kMinSplitKeys = 512;  // a shorter part costs more to merge than it saves
constexpr int kTasksPerThread = 4;      // enough to even out what threads take unequally long for
constexpr int64_t kDecodeCost = 16;     // of one key, in rows of a key's arithmetic in prefill: decode waits for memory

// Work below which a further thread costs more to wake and wait for than it takes off: about 10 us, as task cost times
// dims.
constexpr int64_t kWorkPerThread = 2'000'000;

enum class Kind { kDecode, kDecodePart, kPrefill };

// Work of the first phase: decode of one (sequence, head) or of one part of its keys, or prefill of a block of its
// rows.
struct Task {
    Kind kind;
    int32_t sequence;
    int32_t head;
    int64_t from, to;  // decode: keys; prefill: rows
    int64_t cost;
    int64_t split = 0;  // of a part: index of its split
    int64_t part = 0;   // and its number there
};

// A (sequence, head) whose keys were divided, and what each part found.
struct Split {
    int32_t sequence;
    int32_t head;
    std::vector<DecodeTask> parts;
};

struct MassTask {
    int32_t sequence;
    int32_t head;
    int32_t segment;
    int64_t from, to;
};

class Attend {
  public:
    Attend(Workspace& workspace, const InstructionSet& set, const AttendCall& call,
           const std::vector<Segment>& segments)
        : workspace_(workspace), set_(set), call_(call), segments_(segments), head_locks_(call.num_heads) {}

    void run() {
        check_pages();
        clear_unowned_rows();
        plan();
        lay_out_splits();
        workspace_.prepare(call_.num_threads);
        const int threads = useful_threads();
        parallel_for(int64_t(tasks_.size()), threads, [this](int64_t i, int worker) { run_task(tasks_[i], worker); });
        weigh_rows();
        const int64_t num_splits = int64_t(splits_.size());
        parallel_for(num_splits + int64_t(mass_tasks_.size()), threads, [&](int64_t i, int worker) {
            if (i < num_splits) {
                merge_split(splits_[i], worker);
            } else {
                run_mass(mass_tasks_[i - num_splits], worker);
            }
        });
    }

  private:
    Workspace& workspace_;
    const InstructionSet& set_;
    const AttendCall& call_;
    const std::vector<Segment>& segments_;
    std::vector<std::mutex> head_locks_;  // sequences may share pages of a head; their masses are added one at a time
    std::vector<Task> tasks_;
    std::vector<Split> splits_;
    std::vector<MassTask> mass_tasks_;
    std::vector<float> weighed_;  // lse of rows whose mass does not count once

    int32_t num_queries(int32_t b) const { return call_.query_start[b + 1] - call_.query_start[b]; }

    int32_t length(const Segment& segment, int32_t b, int32_t h) const {
        return segment.lengths[b * segment.length_stride + h * segment.length_head_stride];
    }

    SegmentView view(const Segment& segment, int32_t b, int32_t h) const {
        SegmentView v{};
        v.keys = segment.keys;
        v.values = segment.values;
        v.table = segment.tables + b * segment.table_stride + h * segment.table_head_stride;
        v.page_stride = segment.page_stride;
        v.page_offset = segment.page_offset + h * segment.page_head_step;
        v.positions = segment.positions;
        v.mass = segment.mass;
        v.block_size = segment.block_size;
        v.length = length(segment, b, h);
        v.causal = segment.causal;
        if (segment.queries) v.queries = segment.queries + query_offset(b, h);
        if (segment.mark_bounds) {
            v.marks = true;
            v.mark_bound = segment.mark_bounds[int64_t(b) * call_.num_heads + h];
            v.mark_position = segment.mark_positions[b];
        }
        if (segment.is_sealed) look_into_packed(segment, b, h, v);
        return v;
    }

    void look_into_packed(const Segment& segment, int32_t b, int32_t h, SegmentView& v) const {
        const int64_t at = b * segment.sealed_stride + h * segment.sealed_head_stride;
        v.packed = &segment.packed;
        v.packed_table =
            segment.packed_tables + b * segment.packed_table_stride + h * segment.packed_table_head_stride;
        v.key_length = std::min(segment.key_lengths[at], v.length);
        v.value_length = std::min(segment.value_lengths[at], v.length);
        v.open_base = segment.open_bases[at];
        if (segment.key_channels)
            v.key_channels = segment.key_channels + (int64_t(b) * call_.num_heads + h) * segment.packed.keys.dim;
        v.packed_positions = segment.packed_positions;
        v.packed_mass = segment.packed_mass;
    }

    std::vector<SegmentView> views(int32_t b, int32_t h) const {
        std::vector<SegmentView> all;
        for (const Segment& segment : segments_) all.push_back(view(segment, b, h));
        return all;
    }

    int64_t query_offset(int32_t b, int32_t h) const {
        return call_.query_start[b] * call_.query_token_stride +
               int64_t(h) * call_.shape.group * call_.query_head_stride;
    }

    QueryView query_view(int32_t b, int32_t h) const {
        const int64_t first = call_.query_start[b];
        return {call_.queries + query_offset(b, h), call_.query_token_stride, call_.query_head_stride,
                call_.query_positions ? call_.query_positions + first : nullptr, num_queries(b)};
    }

    int64_t num_query_heads() const { return int64_t(call_.num_heads) * call_.shape.group; }

    float* out_of(int32_t b, int32_t h) const {
        return call_.out +
               (call_.query_start[b] * num_query_heads() + int64_t(h) * call_.shape.group) * call_.shape.value_dim;
    }

    float* lse_of(int32_t b, int32_t h) const {
        return call_.lse + call_.query_start[b] * num_query_heads() + int64_t(h) * call_.shape.group;
    }

    int32_t counted_queries(int32_t b) const {
        return call_.mass_rows ? std::clamp(call_.mass_rows[b], 0, num_queries(b)) : num_queries(b);
    }

    bool wants_mass(int32_t b) const {
        if (counted_queries(b) == 0) return false;
        return std::any_of(segments_.begin(), segments_.end(),
                           [](const Segment& s) { return s.mass || s.packed_mass; });
    }

    // A wrong page would read foreign memory: looking at every used table entry costs well under 1 % of reading its
    // page.
    void check_pages() const {
        for (const Segment& segment : segments_) {
            const int32_t heads = segment.table_head_stride || segment.length_head_stride ? call_.num_heads : 1;
            for (int32_t b = 0; b < call_.num_sequences; ++b) {
                if (num_queries(b) < 0)
                    throw std::invalid_argument("query_start decreases at sequence " + std::to_string(b));
                if (num_queries(b) == 0) continue;
                for (int32_t h = 0; h < heads; ++h) check_table(segment, b, h);
            }
        }
    }

    void check_table(const Segment& segment, int32_t b, int32_t h) const {
        const int64_t used = segment.is_sealed ? check_packed(segment, b, h) : length(segment, b, h);
        const int64_t entries = (used + segment.block_size - 1) / segment.block_size;
        if (used < 0 || entries > segment.table_width) {
            throw std::invalid_argument("sequence " + std::to_string(b) + " has length " + std::to_string(used) +
                                        ", its table holds 0 to " +
                                        std::to_string(segment.table_width * segment.block_size) + " slots");
        }
        const int32_t* table = segment.tables + b * segment.table_stride + h * segment.table_head_stride;
        int32_t lowest = 0, highest = 0;
        for (int64_t i = 0; i < entries; ++i) {
            lowest = std::min(lowest, table[i]);
            highest = std::max(highest, table[i]);
        }
        const int64_t last_head = segment.page_head_step ? call_.num_heads - 1 : 0;
        const int64_t last_page =
            highest * segment.page_stride + segment.page_offset + last_head * segment.page_head_step;
        if (entries && (lowest < 0 || last_page >= segment.num_pages)) {
            throw std::invalid_argument("sequence " + std::to_string(b) + " has table entries from " +
                                        std::to_string(lowest) + " to " + std::to_string(highest) +
                                        ", whose last page " + std::to_string(last_page) +
                                        " lies outside the arena of " + std::to_string(segment.num_pages) + " pages");
        }
    }

    // Slots that a sealed segment uses of its open pages; throws if what it says of packed pages cannot be.
    int64_t check_packed(const Segment& segment, int32_t b, int32_t h) const {
        const SegmentView v = view(segment, b, h);
        const int64_t tokens = segment.packed.page_tokens, entries = (v.key_length + tokens - 1) / tokens;
        const std::string whose = "sequence " + std::to_string(b) + ", head " + std::to_string(h);
        if (v.length < 0 || v.open_base < 0 || v.open_base > v.value_length || v.value_length > v.key_length) {
            throw std::invalid_argument(whose + ": open base " + std::to_string(v.open_base) + ", packed values " +
                                        std::to_string(v.value_length) + " and packed keys " +
                                        std::to_string(v.key_length) + " must be in this order and not below 0");
        }
        if (entries > segment.packed_table_width) {
            throw std::invalid_argument(whose + " has " + std::to_string(v.key_length) +
                                        " packed keys, its table holds 0 to " +
                                        std::to_string(segment.packed_table_width * tokens));
        }
        for (int64_t i = 0; i < entries; ++i) {
            if (v.packed_table[i] < 0 || v.packed_table[i] >= segment.packed.num_pages) {
                throw std::invalid_argument(whose + " has packed page " + std::to_string(v.packed_table[i]) +
                                            " outside the arena of " + std::to_string(segment.packed.num_pages) +
                                            " pages");
            }
        }
        for (int32_t d = 0; v.key_channels && d < segment.packed.keys.dim; ++d) {
            if (v.key_channels[d] < 0 || v.key_channels[d] >= call_.shape.key_dim) {
                throw std::invalid_argument(whose + " keeps channel " + std::to_string(v.key_channels[d]) + " of " +
                                            std::to_string(call_.shape.key_dim));
            }
        }
        return v.length > v.value_length ? v.length - v.open_base : 0;
    }

    // Rows that no sequence owns: out 0, lse -inf.
    void clear_unowned_rows() const {
        const auto clear = [&](int64_t first, int64_t last) {
            if (first >= last) return;
            const int64_t row = num_query_heads();
            std::fill(call_.out + first * row * call_.shape.value_dim, call_.out + last * row * call_.shape.value_dim,
                      0.0f);
            std::fill(call_.lse + first * row, call_.lse + last * row, kNothing);
        };
        clear(0, call_.query_start[0]);
        clear(call_.query_start[call_.num_sequences], call_.num_tokens);
        if (call_.query_start[0] < 0 || call_.query_start[call_.num_sequences] > call_.num_tokens) {
            throw std::invalid_argument("query_start leaves the " + std::to_string(call_.num_tokens) + " query rows");
        }
    }

    int64_t joined_length(int32_t b, int32_t h) const {
        int64_t keys = 0;
        for (const Segment& segment : segments_) keys += length(segment, b, h);
        return keys;
    }

    bool is_decode(int32_t b) const { return int64_t(num_queries(b)) * call_.shape.group <= kMaxDecodeRows; }

    void plan() {
        int64_t decode_keys = 0, prefill_rows = 0;
        for (int32_t b = 0; b < call_.num_sequences; ++b) {
            if (num_queries(b) == 0) continue;
            if (!is_decode(b)) prefill_rows += int64_t(num_queries(b)) * call_.shape.group * call_.num_heads;
            for (int32_t h = 0; is_decode(b) && h < call_.num_heads; ++h) decode_keys += joined_length(b, h);
        }
        const int64_t wanted = int64_t(kTasksPerThread) * call_.num_threads;
        const int64_t part = std::max(kMinSplitKeys, (decode_keys / wanted + kDecodeTile) / kDecodeTile * kDecodeTile);
        int64_t rows = kPrefillRows;
        while (rows > kPrefillRows / 4 && prefill_rows < rows * wanted) rows /= 2;
        for (int32_t b = 0; b < call_.num_sequences; ++b) {
            if (num_queries(b) == 0) continue;
            for (int32_t h = 0; h < call_.num_heads; ++h)
                is_decode(b) ? plan_decode(b, h, part) : plan_prefill(b, h, rows);
        }
        // Long tasks first: what is left at the end evens out the threads.
        std::stable_sort(tasks_.begin(), tasks_.end(), [](const Task& x, const Task& y) { return x.cost > y.cost; });
    }

    void plan_decode(int32_t b, int32_t h, int64_t part) {
        const int64_t keys = joined_length(b, h);
        if (call_.num_threads == 1 || keys < part + part / 2) {
            tasks_.push_back({Kind::kDecode, b, h, 0, keys, keys * kDecodeCost});
            return;
        }
        const int64_t parts = (keys + part - 1) / part;
        const int64_t step = ((keys + parts - 1) / parts + kDecodeTile - 1) / kDecodeTile * kDecodeTile;
        splits_.push_back({b, h, {}});
        for (int64_t from = 0; from < keys; from += step) {
            const int64_t to = std::min(from + step, keys);
            tasks_.push_back(
                {Kind::kDecodePart, b, h, from, to, (to - from) * kDecodeCost, int64_t(splits_.size()) - 1});
        }
    }

    void plan_prefill(int32_t b, int32_t h, int64_t block) {
        const int64_t rows = int64_t(num_queries(b)) * call_.shape.group, keys = joined_length(b, h);
        for (int64_t from = 0; from < rows; from += block) {
            const int64_t to = std::min(from + block, rows);
            // Under causality the last rows see most: start with them.
            const int64_t seen = std::max<int64_t>(1, keys - (rows - to) / call_.shape.group);
            tasks_.push_back({Kind::kPrefill, b, h, from, to, seen * (to - from)});
        }
        if (!wants_mass(b)) return;
        for (int32_t s = 0; s < int32_t(segments_.size()); ++s) {
            if (!segments_[s].mass && !segments_[s].packed_mass) continue;
            const int64_t slots = length(segments_[s], b, h);
            for (int64_t from = 0; from < slots; from += kMassKeys)
                mass_tasks_.push_back({b, h, s, from, std::min<int64_t>(from + kMassKeys, slots)});
        }
    }

    int useful_threads() const {
        int64_t cost = 0;
        for (const Task& task : tasks_) cost += task.cost;
        const int64_t work = cost * (call_.shape.key_dim + call_.shape.value_dim);
        return int(std::min<int64_t>(call_.num_threads, 1 + work / kWorkPerThread));
    }

    int64_t rows_of(int32_t b) const { return int64_t(num_queries(b)) * call_.shape.group; }

    int64_t decode_floats(int32_t b, int64_t keys) const {
        const int64_t rows = rows_of(b);
        const int64_t tiles = wants_mass(b) ? decode_tiles(keys, int32_t(segments_.size()), shortest_tile()) : 0;
        return rows * (padded_query(call_.shape.key_dim) + padded(call_.shape.value_dim) + 2 + kDecodeTile +
                       kDecodeSlack) +
               tiles * rows * (kDecodeTile + 1) + packed_floats(rows);
    }

    bool any_sealed() const {
        return std::any_of(segments_.begin(), segments_.end(), [](const Segment& s) { return s.is_sealed; });
    }

    int64_t unpacked_floats() const {
        return kDecodeTile * padded(std::max(call_.shape.key_dim, call_.shape.value_dim));
    }

    int64_t packed_floats(int64_t rows) const {
        return any_sealed() ? rows * padded_query(call_.shape.key_dim) + unpacked_floats() : 0;
    }

    int64_t shortest_tile() const {
        int64_t shortest = 16;
        for (const Segment& segment : segments_) {
            if (segment.is_sealed) shortest = std::min(shortest, segment.packed.page_tokens);
        }
        return shortest;
    }

    DecodeTask decode_task(int32_t b, int32_t h, int64_t from, int64_t to, float* memory) const {
        const int64_t rows = rows_of(b);
        DecodeTask task{};
        task.shape = &call_.shape;
        task.queries = query_view(b, h);
        task.num_segments = int32_t(segments_.size());
        task.from = from;
        task.to = to;
        const auto take = [&memory](int64_t n) {
            float* taken = memory;
            memory += n;
            return taken;
        };
        task.scaled_queries = take(rows * padded_query(call_.shape.key_dim));
        task.result.out = take(rows * padded(call_.shape.value_dim));
        task.scratch = take(rows * (kDecodeTile + kDecodeSlack));
        task.result.maximum = take(rows);
        task.result.sum = take(rows);
        if (any_sealed()) {
            task.chosen_queries = take(rows * padded_query(call_.shape.key_dim));
            task.unpacked = take(unpacked_floats());
        }
        if (wants_mass(b)) {
            const int64_t tiles = decode_tiles(to - from, task.num_segments, shortest_tile());
            task.tile_maximum = take(tiles * rows);
            task.probabilities = take(tiles * rows * kDecodeTile);
        }
        return task;
    }

    // Memory of split decodes must outlive the first phase: it is shared, not a worker's.
    void lay_out_splits() {
        int64_t total = 0;
        for (const Task& task : tasks_) {
            if (task.kind == Kind::kDecodePart) total += decode_floats(task.sequence, task.to - task.from);
        }
        float* memory = total ? workspace_.shared(total) : nullptr;
        for (Task& task : tasks_) {
            if (task.kind != Kind::kDecodePart) continue;
            std::vector<DecodeTask>& parts = splits_[task.split].parts;
            task.part = int64_t(parts.size());
            parts.push_back(decode_task(task.sequence, task.head, task.from, task.to, memory));
            memory += decode_floats(task.sequence, task.to - task.from);
        }
    }

    void run_task(const Task& task, int worker) {
        const std::vector<SegmentView> segments = views(task.sequence, task.head);
        if (task.kind == Kind::kPrefill) return run_prefill(task, segments, worker);
        if (task.kind == Kind::kDecodePart) {
            DecodeTask part = splits_[task.split].parts[task.part];
            part.segments = segments.data();
            return set_.decode(part);
        }
        float* memory = workspace_.of_worker(worker, decode_floats(task.sequence, task.to) + kMaxDecodeRows);
        float* lse = memory + decode_floats(task.sequence, task.to);
        DecodeTask decode = decode_task(task.sequence, task.head, 0, task.to, memory);
        decode.segments = segments.data();
        set_.decode(decode);
        finish_decode(task.sequence, task.head, &decode, 1, lse);
    }

    void run_prefill(const Task& task, const std::vector<SegmentView>& segments, int worker) {
        PrefillTask prefill{};
        prefill.shape = &call_.shape;
        prefill.queries = query_view(task.sequence, task.head);
        prefill.segments = segments.data();
        prefill.num_segments = int32_t(segments.size());
        prefill.first_row = int32_t(task.from);
        prefill.last_row = int32_t(task.to);
        prefill.out = out_of(task.sequence, task.head);
        prefill.out_token_stride = num_query_heads() * call_.shape.value_dim;
        prefill.out_head_stride = call_.shape.value_dim;
        prefill.lse = lse_of(task.sequence, task.head);
        prefill.lse_token_stride = num_query_heads();
        prefill.workspace = workspace_.of_worker(worker, prefill_workspace(call_.shape));
        set_.prefill(prefill);
    }

    void merge_split(Split& split, int worker) {
        const std::vector<SegmentView> segments = views(split.sequence, split.head);
        for (DecodeTask& part : split.parts) part.segments = segments.data();
        float* lse = workspace_.of_worker(worker, kMaxDecodeRows);
        finish_decode(split.sequence, split.head, split.parts.data(), split.parts.size(), lse);
    }

    // Merge by log-sum-exp, write out and lse, then the mass, which needs the merged lse.
    void finish_decode(int32_t b, int32_t h, const DecodeTask* parts, size_t num_parts, float* lse) {
        const int32_t group = call_.shape.group, dim = call_.shape.value_dim;
        for (int64_t r = 0; r < rows_of(b); ++r) {
            float maximum = kNothing, sum = 0.0f;
            for (size_t i = 0; i < num_parts; ++i) maximum = std::max(maximum, parts[i].result.maximum[r]);
            float* out = out_of(b, h) + (r / group) * num_query_heads() * dim + (r % group) * dim;
            std::fill(out, out + dim, 0.0f);
            for (size_t i = 0; maximum > kNothing && i < num_parts; ++i) {
                const float weight = std::exp(parts[i].result.maximum[r] - maximum);
                sum += weight * parts[i].result.sum[r];
                const float* part = parts[i].result.out + r * padded(dim);
                for (int32_t d = 0; d < dim; ++d) out[d] += weight * part[d];
            }
            const float norm = sum > 0.0f ? 1.0f / sum : 0.0f;
            for (int32_t d = 0; d < dim; ++d) out[d] *= norm;
            lse[r] = sum > 0.0f ? maximum + std::log(sum) : kNothing;
            lse_of(b, h)[(r / group) * num_query_heads() + r % group] = lse[r];
        }
        if (!wants_mass(b)) return;
        for (int64_t r = 0; call_.fading && r < rows_of(b); ++r) lse[r] += call_.fading[call_.query_start[b] + r / group];
        const std::lock_guard<std::mutex> lock(head_locks_[h]);
        for (size_t i = 0; i < num_parts; ++i)
            set_.decode_mass({&parts[i], lse, (num_queries(b) - counted_queries(b)) * group});
    }

    // A row whose log-sum-exp is taken for larger gives less.
    void weigh_rows() {
        if (!call_.fading || mass_tasks_.empty()) return;
        const int64_t heads = num_query_heads();
        weighed_.assign(call_.lse, call_.lse + call_.num_tokens * heads);
        for (int64_t i = 0; i < int64_t(weighed_.size()); ++i) weighed_[i] += call_.fading[i / heads];
    }

    void run_mass(const MassTask& mass, int worker) {
        const int64_t slots = mass.to - mass.from;
        float* received = workspace_.of_worker(worker, slots + prefill_workspace(call_.shape));
        PrefillMassTask task{};
        task.shape = &call_.shape;
        task.queries = query_view(mass.sequence, mass.head);
        task.segment = view(segments_[mass.segment], mass.sequence, mass.head);
        task.first_row = (num_queries(mass.sequence) - counted_queries(mass.sequence)) * call_.shape.group;
        task.from = mass.from;
        task.to = mass.to;
        task.lse = lse_of(mass.sequence, mass.head);
        if (!weighed_.empty()) task.lse = weighed_.data() + (task.lse - call_.lse);
        task.lse_token_stride = num_query_heads();
        task.received = received;
        task.workspace = received + slots;
        set_.prefill_mass(task);
        const SegmentView& segment = task.segment;
        const std::lock_guard<std::mutex> lock(head_locks_[mass.head]);
        for (int64_t i = 0; i < slots; ++i) {
            float* cell = mass_cell(segment, mass.from + i);
            if (!cell) continue;
            if (!segment.marks) {
                *cell += received[i];
            } else if (received[i] >= segment.mark_bound) {
                *cell = segment.mark_position;
            }
        }
    }

    // Where a token receives mass; null: it has no column.
    static float* mass_cell(const SegmentView& segment, int64_t token) {
        if (token < segment.key_length) {
            const int64_t tokens = segment.packed->page_tokens;
            if (!segment.packed_mass) return nullptr;
            return segment.packed_mass + segment.packed_table[token / tokens] * tokens + token % tokens;
        }
        if (!segment.mass) return nullptr;
        const int64_t index = token - segment.open_base;
        const int64_t page = segment.table[index / segment.block_size] * segment.page_stride + segment.page_offset;
        return segment.mass + page * segment.block_size + index % segment.block_size;
    }
};

}  // namespace

void attend(Workspace& workspace, const InstructionSet& set, const AttendCall& call,
            const std::vector<Segment>& segments) {
    const std::lock_guard<std::mutex> lock(workspace.mutex);
    Attend(workspace, set, call, segments).run();
}

}  // namespace kvwise
