// Feature maps, what they add to states, and what states add to answers. Each row's arithmetic is the same whatever
// rows are mapped with it.

namespace {

inline int64_t whole_vectors(int32_t n) {
    return (n + 15) / 16 * 16;
}

// By Abramowitz and Stegun 7.1.26, as torch's own: erf is off by 1.5e-7 at most.
inline Vec gelu(Vec x) {
    const Vec size = larger(x, zero() - x);
    const Vec one = broadcast(1.0f);
    const Vec t = one / fma(size, broadcast(0.3275911f * 0.70710678f), one);
    Vec p = fma(t, broadcast(1.061405429f), broadcast(-1.453152027f));
    p = fma(p, t, broadcast(1.421413741f));
    p = fma(p, t, broadcast(-0.284496736f));
    p = fma(p, t, broadcast(0.254829592f));
    const Vec erf = one - p * t * exponential(x * x * broadcast(-0.5f));
    return fma(size, erf, x) * broadcast(0.5f);  // |x| erf(|x|) = x erf(x)
}

inline Vec load_some(const float* p, int32_t n) {
    return n >= Vec::kLanes ? load(p) : load_tail(Float32{}, p, n);
}

inline void store_some(float* p, Vec a, int32_t n) {
    if (n >= Vec::kLanes) return store(p, a);
    float all[Vec::kLanes];
    store(all, a);
    std::memcpy(p, all, n * sizeof(float));
}

// kVecs vectors of columns from `column` on of x W, W [depth, width]; the last one may be cut short. Asks early for the
// matrix behind this one, the next head's: between two steps a model's weights have pushed it out of the caches.
template <int kRows, int kVecs>
inline void product_columns(const float* const* x, int32_t depth, const float* weights, int32_t width, int32_t column,
                            Vec (&sums)[kRows][kVecs]) {
    const int32_t left = width - column;
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
    for (int32_t i = 0; i < depth; ++i) {
        const float* w = weights + int64_t(i) * width + column;
        Vec loaded[kVecs];
        for (int v = 0; v < kVecs; ++v) {
            __builtin_prefetch(w + int64_t(depth) * width + v * Vec::kLanes);
            loaded[v] = kVecs > 1 ? load(w + v * Vec::kLanes) : load_some(w, left);
        }
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(broadcast(x[r][i]), loaded[v], sums[r][v]);
    }
}

// gelu(x W) of a few rows, W [depth, width], into out [kRows, whole vectors of width].
template <int kRows>
inline void layer_of(const float* const* x, int32_t depth, const float* weights, int32_t width, float* out) {
    const int64_t stride = whole_vectors(width);
    int32_t column = 0;
    for (; column + 2 * Vec::kLanes <= width; column += 2 * Vec::kLanes) {
        Vec sums[kRows][2];
        product_columns(x, depth, weights, width, column, sums);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < 2; ++v) store(out + r * stride + column + v * Vec::kLanes, gelu(sums[r][v]));
    }
    for (; column < width; column += Vec::kLanes) {
        Vec sums[kRows][1];
        product_columns(x, depth, weights, width, column, sums);
        for (int r = 0; r < kRows; ++r) store(out + r * stride + column, gelu(sums[r][0]));
    }
}

template <int kRows>
inline void features_of(const MapShape& shape, const float* in, const float* out, const float* const* x, float* hidden,
                        float* features) {
    layer_of<kRows>(x, shape.dim, in, shape.hidden, hidden);
    const float* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = hidden + r * whole_vectors(shape.hidden);
    layer_of<kRows>(rows, shape.hidden, out, shape.rank, features);
}

// Calls body(first, count) for all of n in runs of kMapRows, 4, 2 and 1: few rows cost few.
template <class Body>
inline void for_map_rows(int64_t n, Body body) {
    int64_t first = 0;
    for (; first + kMapRows <= n; first += kMapRows) body(first, std::integral_constant<int, kMapRows>());
    if (first + 4 <= n) body(first, std::integral_constant<int, 4>()), first += 4;
    if (first + 2 <= n) body(first, std::integral_constant<int, 2>()), first += 2;
    if (first < n) body(first, std::integral_constant<int, 1>());
}

// psi = |y + (y I) e|, y = |d| times what the map says, in place; `crossed` is scratch.
inline void finish_psi(const FoldTask& task, float* y, float* crossed) {
    const int32_t rank = task.shape->rank;
    for (int32_t j = 0; j < rank; ++j) y[j] *= __builtin_fabsf(task.scale[j]);
    for (int32_t j = 0; j < rank; ++j) crossed[j] = 0.0f;
    for (int32_t i = 0; i < rank; ++i)
        for (int32_t j = 0; j < rank; ++j) crossed[j] += y[i] * task.interaction[i * rank + j];
    for (int32_t j = 0; j < rank; ++j) y[j] = __builtin_fabsf(y[j] + crossed[j] * task.interaction_scale[j]);
}

// H += psi^T v, z += psi.
inline void add_token(const MapShape& shape, const float* psi, const float* value, float* values, float* weights) {
    for (int32_t j = 0; j < shape.rank; ++j) weights[j] += psi[j];
    for (int32_t d = 0; d < shape.dim; d += Vec::kLanes) {
        const int32_t left = shape.dim - d;
        const Vec v = load_some(value + d, left);
        for (int32_t j = 0; j < shape.rank; ++j) {
            float* sum = values + int64_t(j) * shape.dim + d;
            store_some(sum, fma(broadcast(psi[j]), v, load_some(sum, left)), left);
        }
    }
}

// A state lies anywhere: ask for it before the maps are read. Always inlined: see `prefetch_row` in rows.cpp.
__attribute__((always_inline)) inline void ask_for(const MapShape& shape, const States& states, int64_t request) {
    const float* values = states.values + request * states.value_stride;
    for (int64_t i = 0; i < int64_t(shape.rank) * shape.dim; i += 16) __builtin_prefetch(values + i);
}

void fold(const FoldTask& task) {
    const MapShape& shape = *task.shape;
    const int64_t stride = whole_vectors(shape.rank);
    float* features = task.scratch + kMapRows * whole_vectors(shape.hidden);
    float* crossed = features + kMapRows * stride;
    for_map_rows(task.num_tokens, [&](int64_t first, auto count) {
        constexpr int kRows = decltype(count)::value;
        const float* keys[kRows];
        for (int r = 0; r < kRows; ++r) {
            keys[r] = task.keys + task.tokens[first + r] * shape.dim;
            ask_for(shape, task.states, task.requests[task.tokens[first + r]]);
        }
        features_of<kRows>(shape, task.in, task.out, keys, task.scratch, features);
        for (int r = 0; r < kRows; ++r) {
            const int64_t token = task.tokens[first + r], request = task.requests[token];
            finish_psi(task, features + r * stride, crossed);
            add_token(shape, features + r * stride, task.values + token * shape.dim,
                      task.states.values + request * task.states.value_stride,
                      task.states.weights + request * task.states.weight_stride);
        }
    });
}

// What one row answers: its answer where nothing has left, to the bit.
inline void merge_row(const MergeTask& task, int64_t row, const float* phi) {
    const MapShape& shape = *task.shape;
    const float* values = task.states.values + task.requests[row] * task.states.value_stride;
    const float* weights = task.states.weights + task.requests[row] * task.states.weight_stride;
    const float* answer = task.answers + row * task.answer_stride;
    float* merged = task.merged + row * task.answer_stride;
    float weight = 0.0f;
    for (int32_t j = 0; j < shape.rank; ++j) weight += __builtin_fabsf(phi[j]) * weights[j];
    const float share = 1.0f / (1.0f + __builtin_expf(task.lse[row * task.lse_stride] - __builtin_logf(weight)));
    if (!(share > 0.0f)) {
        std::memcpy(merged, answer, shape.dim * sizeof(float));
        return;
    }
    const Vec inverse = broadcast(1.0f / weight), taken = broadcast(share);
    for (int32_t d = 0; d < shape.dim; d += Vec::kLanes) {
        const int32_t left = shape.dim - d;
        Vec sum = zero();
        for (int32_t j = 0; j < shape.rank; ++j) {
            const Vec held = load_some(values + int64_t(j) * shape.dim + d, left);
            sum = fma(broadcast(__builtin_fabsf(phi[j])), held, sum);
        }
        const Vec stays = load_some(answer + d, left);
        store_some(merged + d, fma(taken, sum * inverse - stays, stays), left);
    }
}

void merge_folded(const MergeTask& task) {
    const MapShape& shape = *task.shape;
    float* features = task.scratch + kMapRows * whole_vectors(shape.hidden);
    for_map_rows(task.num_rows, [&](int64_t first, auto count) {
        constexpr int kRows = decltype(count)::value;
        const float* queries[kRows];
        for (int r = 0; r < kRows; ++r) {
            queries[r] = task.queries + (first + r) * task.query_stride;
            ask_for(shape, task.states, task.requests[first + r]);
        }
        features_of<kRows>(shape, task.in, task.out, queries, task.scratch, features);
        for (int r = 0; r < kRows; ++r) merge_row(task, first + r, features + r * whole_vectors(shape.rank));
    });
}

}  // namespace
