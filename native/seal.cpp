// The driver of sealing: checks, threads, and the layout of a part.
#include "seal.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "digest.h"
#include "threads.h"

namespace kvwise {
namespace {

constexpr int64_t kPagesPerRun = 16;  // pages in a row fetch each other's rows

void check_all(const char* what, const int64_t* numbers, int64_t n, int64_t limit) {
    for (int64_t i = 0; i < n; ++i) {
        if (numbers[i] < 0 || numbers[i] >= limit) {
            throw std::invalid_argument(std::string(what) + " " + std::to_string(numbers[i]) +
                                        " lies outside the arena of " + std::to_string(limit));
        }
    }
}

SealTask task_of(const OpenRows& rows, const PackedPages& packed, const PackedPart& part) {
    SealTask task{};
    task.part = &part;
    task.page_tokens = packed.page_tokens;
    task.rows = rows.data;
    task.storage = rows.storage;
    task.row_bytes = rows.dim * bytes_of(rows.storage);
    return task;
}

}  // namespace

void seal_pages(const InstructionSet& set, const OpenRows& rows, const int64_t* slots, const PackedPages& packed,
                bool keys, const int64_t* pages, const int64_t* channels, int64_t n, int num_threads) {
    const PackedPart& part = keys ? packed.keys : packed.values;
    check_all("slot", slots, n * packed.page_tokens, rows.num_slots);
    check_all("packed page", pages, n, packed.num_pages);
    if (channels) check_all("channel", channels, n * part.dim, rows.dim);
    const int64_t run = std::clamp<int64_t>(n / (4 * num_threads), 1, kPagesPerRun);
    parallel_for((n + run - 1) / run, num_threads, [&](int64_t item, int) {
        const int64_t end = std::min(n, (item + 1) * run), last = num_threads == 1 ? n : end;
        for (int64_t i = item * run; i < end; ++i) {
            SealTask task = task_of(rows, packed, part);
            task.slots = slots + i * packed.page_tokens;
            task.next_slots = i + 1 < last ? task.slots + packed.page_tokens : nullptr;
            task.channels = channels ? channels + i * part.dim : nullptr;
            task.target = packed.page(pages[i]) + part.first;
            set.seal(task);
        }
        finish_streaming();
    });
}

void seal_value_rows(const InstructionSet& set, const OpenRows& rows, const int64_t* slots, const PackedPages& packed,
                     const int64_t* packed_slots, int64_t n, int num_threads) {
    const PackedPart& part = packed.values;
    check_all("slot", slots, n, rows.num_slots);
    check_all("packed slot", packed_slots, n, packed.num_pages * packed.page_tokens);
    // Rows of one page share bytes: a page belongs to one worker.
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(num_threads, n / 64));
    parallel_for(workers, int(workers), [&](int64_t worker, int) {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t page = packed_slots[i] / packed.page_tokens, row = packed_slots[i] % packed.page_tokens;
            if (page % workers != worker) continue;
            SealTask task = task_of(rows, packed, part);
            task.slots = slots + i - row;  // of all rows only `row` is looked at
            task.target = packed.page(page) + part.first;
            set.seal_row(task, row);
        }
    });
}

PackedPart packed_part(int64_t first, int64_t page_tokens, int32_t dim, Storage storage, int32_t bits, bool by_channel,
                       int32_t group, bool split, bool upper_only) {
    PackedPart part{};
    part.first = first;
    part.dim = dim;
    part.storage = storage;
    part.coded = bits > 0;
    if (dim > kMaxPackedDim)
        throw std::invalid_argument("packed rows have at most " + std::to_string(kMaxPackedDim) + " channels, got " +
                                    std::to_string(dim));
    if (!part.coded) return part;
    const auto up = [](int64_t n, int64_t to) { return int32_t((n + to - 1) / to * to); };
    part.by_channel = by_channel;
    part.lanes = int32_t(by_channel ? page_tokens : dim);
    part.inner = int32_t(by_channel ? dim : page_tokens);
    part.group = by_channel ? group : std::min(group, dim);
    part.padded_lanes = up(part.lanes, kCodeLanes);
    part.padded_inner = up(part.inner, kCodeUnit);
    for (int32_t plane : {8, 4, 2, 1}) {
        if (!split && (bits & plane)) part.planes[part.num_planes++] = plane;
    }
    if (split) part.planes[0] = part.planes[1] = 4, part.num_planes = 2;
    for (int32_t p = 0; p < part.num_planes; ++p) part.steps += part.plane_bytes(p);
    part.levels = split ? 15 : (1 << bits) - 1;
    part.split = split && !upper_only;
    part.bits = split && upper_only ? 4 : bits;
    part.num_planes = split && upper_only ? 1 : part.num_planes;
    part.step_factor = part.split ? 1.0f / 16 : 1.0f;
    part.bias = part.split ? -8.0f : 0.0f;
    return part;
}

}  // namespace kvwise
