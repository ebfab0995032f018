// The least number of a run and where it lies first.

namespace {

inline void keep_lower(Vec x, Vec at, Vec& least, Vec& where) {
    const Vec lower = smaller(least, x);
    where = select(equal(lower, least), where, at);
    least = lower;
}

// Nothing is infinite, at 0; if any is no number, so is the least.
void lowest(const float* numbers, int64_t n, float* least, int64_t* where) {
    float lanes[Vec::kLanes];
    for (int i = 0; i < Vec::kLanes; ++i) lanes[i] = float(i);
    Vec at = load(lanes), best = broadcast(__builtin_inff()), place = zero();  // indices as floats: exact below 2^24
    Mask sound = equal(place, place);
    int64_t i = 0;
    for (; i + Vec::kLanes <= n; i += Vec::kLanes, at = at + broadcast(float(Vec::kLanes))) {
        const Vec x = load(numbers + i);
        sound = both(sound, equal(x, x));
        keep_lower(x, at, best, place);
    }
    float bests[Vec::kLanes], places[Vec::kLanes];
    store(bests, best);
    store(places, place);
    *least = __builtin_inff();
    *where = 0;
    for (int lane = 0; lane < Vec::kLanes; ++lane) {
        const bool earlier = bests[lane] == *least && places[lane] < float(*where);
        if (bests[lane] < *least || earlier) *least = bests[lane], *where = int64_t(places[lane]);
    }
    bool number = all(sound);
    for (; i < n; ++i) {
        number &= numbers[i] == numbers[i];
        if (numbers[i] < *least) *least = numbers[i], *where = i;
    }
    if (!number) *least = __builtin_nanf("");
}

constexpr int64_t kPagesAhead = 8;

void lowest_mass(const MassTask& task, float* least, int64_t* where) {
    const int64_t size = task.block_size;
    for (int64_t slot = task.first; slot < task.stop;) {
        if (const int64_t ahead = slot + kPagesAhead * size; ahead < task.stop) {  // pages lie anywhere
            __builtin_prefetch(task.mass + task.table[ahead / size] * size);
            __builtin_prefetch(task.positions + task.table[ahead / size] * size);
        }
        const int64_t in_page = slot % size, left = task.stop - slot;
        const int64_t count = size - in_page < left ? size - in_page : left;
        const int64_t start = task.table[slot / size] * size + in_page;
        const float* __restrict mass = task.mass + start;
        const int32_t* __restrict positions = task.positions + start;
        float* __restrict worth = task.scratch + (slot - task.first);
        for (int64_t i = 0; i < count; ++i) worth[i] = positions[i] <= task.newest ? mass[i] : __builtin_inff();
        slot += count;
    }
    lowest(task.scratch, task.stop - task.first, least, where);
}

}  // namespace
