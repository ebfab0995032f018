// Folding and merging, split over threads by heads: one task reads one head's map, and no two tasks add to one state.
#include "folded.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "threads.h"

namespace kvwise {
namespace {

// Products, about 6 us: below, a further thread costs more to wake and wait for than it takes off.
constexpr int64_t kWorkPerThread = 200'000;

void check(const char* what, const int64_t* numbers, int64_t n, int64_t limit) {
    for (int64_t i = 0; i < n; ++i) {
        if (numbers[i] < 0 || numbers[i] >= limit) {
            throw std::invalid_argument(std::string(what) + " " + std::to_string(numbers[i]) + " is not one of the " +
                                        std::to_string(limit) + " there are");
        }
    }
}

int useful_threads(const MapShape& shape, int64_t num_vectors, int num_threads) {
    const int64_t each = int64_t(shape.hidden) * (shape.dim + shape.rank) + 2 * int64_t(shape.rank) * shape.dim;
    return int(std::clamp<int64_t>(num_vectors * each / kWorkPerThread, 1, num_threads));
}

States states_of(const Folded& folded, int64_t kind) {
    const int64_t each = folded.shape.rank, kinds = folded.num_layers * folded.num_heads;
    return {folded.values + kind * each * folded.shape.dim, folded.weights + kind * each,
            kinds * each * folded.shape.dim, kinds * each};
}

FoldTask fold_task(const Folded& folded, const Leavers& leavers, int64_t kind) {
    const MapShape& shape = folded.shape;
    FoldTask task{};
    task.shape = &shape;
    task.states = states_of(folded, kind);
    task.in = folded.key_in + kind * shape.dim * shape.hidden;
    task.out = folded.key_out + kind * shape.hidden * shape.rank;
    task.scale = folded.scale + kind * shape.rank;
    task.interaction = folded.interaction + kind * shape.rank * shape.rank;
    task.interaction_scale = folded.interaction_scale + kind * shape.rank;
    task.requests = leavers.requests;
    task.keys = leavers.keys;
    task.values = leavers.values;
    return task;
}

// Neighbours go to one thread, which asks early for the map behind the one at hand.
template <class Body>
void for_neighbours(int64_t n, int threads, Body body) {
    const int64_t each = (n + threads - 1) / threads;
    parallel_for(threads, threads, [&](int64_t run, int worker) {
        for (int64_t i = run * each; i < std::min(n, (run + 1) * each); ++i) body(i, worker);
    });
}

}  // namespace

void fold_tokens(const InstructionSet& set, const Folded& folded, const Leavers& leavers, int num_threads) {
    check("request", leavers.requests, leavers.n, folded.num_requests);
    check("layer", leavers.layers, leavers.n, folded.num_layers);
    check("head", leavers.heads, leavers.n, folded.num_heads);
    const int64_t num_kinds = folded.num_layers * folded.num_heads;
    std::vector<int64_t> ends(num_kinds + 1), tokens(leavers.n);  // tokens in the order of their (layer, head)
    const auto kind_of = [&](int64_t i) { return leavers.layers[i] * folded.num_heads + leavers.heads[i]; };
    for (int64_t i = 0; i < leavers.n; ++i) ++ends[kind_of(i) + 1];
    for (int64_t kind = 0; kind < num_kinds; ++kind) ends[kind + 1] += ends[kind];
    std::vector<int64_t> next(ends.begin(), ends.end() - 1), kinds;
    for (int64_t i = 0; i < leavers.n; ++i) tokens[next[kind_of(i)]++] = i;
    for (int64_t kind = 0; kind < num_kinds; ++kind) {
        if (ends[kind] < ends[kind + 1]) kinds.push_back(kind);
    }
    const int threads = useful_threads(folded.shape, leavers.n, num_threads);
    const int64_t room = map_scratch(folded.shape);
    std::vector<float> scratch(threads * room);
    for_neighbours(int64_t(kinds.size()), threads, [&](int64_t i, int worker) {
        FoldTask task = fold_task(folded, leavers, kinds[i]);
        task.tokens = tokens.data() + ends[kinds[i]];
        task.num_tokens = ends[kinds[i] + 1] - ends[kinds[i]];
        task.scratch = scratch.data() + worker * room;
        set.fold(task);
    });
}

void merge_answers(const InstructionSet& set, const Folded& folded, const Answers& answers, int num_threads) {
    check("request", answers.requests, answers.num_rows, folded.num_requests);
    check("layer", &answers.layer, 1, folded.num_layers);
    const MapShape& shape = folded.shape;
    const int threads = useful_threads(shape, answers.num_rows * folded.num_query_heads, num_threads);
    const int64_t room = map_scratch(shape);
    std::vector<float> scratch(threads * room);
    for_neighbours(folded.num_query_heads, threads, [&](int64_t head, int worker) {
        const int64_t map = answers.layer * folded.num_query_heads + head;
        const int64_t kv_head = head / (folded.num_query_heads / folded.num_heads);
        MergeTask task{};
        task.shape = &shape;
        task.states = states_of(folded, answers.layer * folded.num_heads + kv_head);
        task.in = folded.query_in + map * shape.dim * shape.hidden;
        task.out = folded.query_out + map * shape.hidden * shape.rank;
        task.requests = answers.requests;
        task.num_rows = answers.num_rows;
        task.queries = answers.queries + head * answers.query_head_stride;
        task.query_stride = answers.query_row_stride;
        task.answers = answers.answers + head * shape.dim;
        task.merged = answers.merged + head * shape.dim;
        task.answer_stride = folded.num_query_heads * shape.dim;
        task.lse = answers.lse + head;
        task.lse_stride = folded.num_query_heads;
        task.scratch = scratch.data() + worker * room;
        set.merge_folded(task);
    });
}

}  // namespace kvwise
