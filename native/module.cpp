// kvwise._native: tensors come as integer addresses with shapes and strides (in elements); torch is not linked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "attend.h"
#include "dispatch.h"
#include "module_folded.h"
#include "module_packed.h"
#include "module_records.h"
#include "rans.h"
#include "rows.h"
#include "threads.h"

namespace nb = nanobind;

namespace kvwise {
namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet* set : usable_instruction_sets()) names.emplace_back(set->name);
    return names;
}

constexpr size_t kSegmentFields = 24, kSealedFields = kPackedFields + 13;

// Fields of a segment in the order of `_Fields` in kernels/cpu.py and, behind them, of its packed pages in that of
// `sealed_fields` in kernels/cpu_sealed.py; one flat list is the cheapest thing to pass.
Segment segment_of(const std::vector<int64_t>& f) {
    if (f.size() != kSegmentFields && f.size() != kSegmentFields + kSealedFields)
        throw std::invalid_argument("a segment has 24 fields or, sealed, 58; got " + std::to_string(f.size()));
    Segment s{};
    s.keys = at<const void>(f[0]);
    s.values = at<const void>(f[1]);
    s.tables = at<const int32_t>(f[2]);
    s.table_stride = f[3];
    s.table_head_stride = f[4];
    s.table_width = f[5];
    s.lengths = at<const int32_t>(f[6]);
    s.length_stride = f[7];
    s.length_head_stride = f[8];
    s.page_stride = f[9];
    s.page_offset = f[10];
    s.page_head_step = f[11];
    s.num_pages = f[12];
    s.block_size = f[13];
    s.causal = f[14] != 0;
    s.positions = at<const int32_t>(f[15]);
    s.mass = at<float>(f[16]);
    s.queries = at<const float>(f[17]);
    s.mark_bounds = at<const float>(f[18]);
    s.mark_positions = at<const float>(f[19]);
    s.is_sealed = f.size() > kSegmentFields;
    if (!s.is_sealed) return s;
    const int64_t* sealed = f.data() + kSegmentFields + kPackedFields;
    s.packed = packed_of(f, kSegmentFields, sealed[0] != 0);
    s.packed_tables = at<const int32_t>(sealed[1]);
    s.packed_table_stride = sealed[2];
    s.packed_table_head_stride = sealed[3];
    s.packed_table_width = sealed[4];
    s.key_lengths = at<const int32_t>(sealed[5]);
    s.value_lengths = at<const int32_t>(sealed[6]);
    s.open_bases = at<const int32_t>(sealed[7]);
    s.sealed_stride = sealed[8];
    s.sealed_head_stride = sealed[9];
    s.key_channels = at<const int32_t>(sealed[10]);
    s.packed_positions = at<const int32_t>(sealed[11]);
    s.packed_mass = at<float>(sealed[12]);
    return s;
}

// The fields may be those of a stack: f[20] segments that differ in tables, lengths and queries.
void add_segments(const std::vector<int64_t>& f, std::vector<Segment>& all) {
    const Segment first = segment_of(f);
    for (int64_t i = 0; i < f[20]; ++i) {
        all.push_back(first);
        all.back().tables += i * f[21];
        all.back().lengths += i * f[22];
        if (first.queries) all.back().queries += i * f[23];
    }
}

void bind_attend(nb::module_& m) {
    nb::class_<Workspace>(m, "Workspace").def(nb::init<>());
    m.def("attend", [](Workspace& workspace, const std::string& set, int storage, int num_heads, int group, int key_dim,
                       int value_dim, int64_t num_tokens, int num_sequences, uintptr_t queries, int64_t token_stride,
                       int64_t head_stride, uintptr_t query_start, uintptr_t query_positions, uintptr_t mass_rows,
                       uintptr_t fading,
                       const std::vector<std::vector<int64_t>>& segments, uintptr_t out, uintptr_t lse, float scale,
                       int window, float softcap, bool exact, int num_threads) {
        AttendCall call{};
        call.shape = {Storage(storage), key_dim, value_dim, group, window, softcap, scale, exact};
        call.num_heads = num_heads;
        call.num_sequences = num_sequences;
        call.num_tokens = num_tokens;
        call.queries = at<const float>(queries);
        call.query_token_stride = token_stride;
        call.query_head_stride = head_stride;
        call.query_start = at<const int32_t>(query_start);
        call.query_positions = at<const int32_t>(query_positions);
        call.mass_rows = at<const int32_t>(mass_rows);
        call.fading = at<const float>(fading);
        call.out = at<float>(out);
        call.lse = at<float>(lse);
        call.num_threads = num_threads;
        std::vector<Segment> all;
        for (const auto& fields : segments) add_segments(fields, all);
        const InstructionSet& functions = set_called(set);
        const nb::gil_scoped_release unlocked;
        attend(workspace, functions, call, all);
    });
}

void bind_rows(nb::module_& m) {
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;
    m.def(
        "gather",
        [](uintptr_t arena, int64_t num_slots, int64_t row_bytes, uintptr_t slots, int64_t n, uintptr_t out,
           int num_threads) {
            gather_rows({at<char>(arena), num_slots, row_bytes}, at<const int64_t>(slots), n, at<char>(out),
                        num_threads);
        },
        Unlocked());
    m.def(
        "scatter",
        [](uintptr_t rows, uintptr_t arena, int64_t num_slots, int64_t row_bytes, uintptr_t slots, int64_t n,
           int num_threads) {
            scatter_rows(at<const char>(rows), {at<char>(arena), num_slots, row_bytes}, at<const int64_t>(slots), n,
                         num_threads);
        },
        Unlocked());
    m.def(
        "move_slots",
        [](uintptr_t arena, int64_t num_slots, int64_t row_bytes, uintptr_t source, uintptr_t target, int64_t n) {
            move_rows({at<char>(arena), num_slots, row_bytes}, at<const int64_t>(source), at<const int64_t>(target), n);
        },
        Unlocked());
    m.def(
        "copy_pages",
        [](uintptr_t source, int64_t num_source, uintptr_t source_pages, uintptr_t target, int64_t num_target,
           uintptr_t target_pages, int64_t page_bytes, int64_t n, int num_threads) {
            copy_rows({at<char>(source), num_source, page_bytes}, at<const int64_t>(source_pages),
                      {at<char>(target), num_target, page_bytes}, at<const int64_t>(target_pages), n, num_threads);
        },
        Unlocked());
    m.def("lowest", [](const std::string& set, uintptr_t numbers, int64_t width, uintptr_t first, uintptr_t stop,
                       int64_t n, uintptr_t least, uintptr_t where, int num_threads) {
        const InstructionSet& functions = set_called(set);
        const nb::gil_scoped_release unlocked;
        const RankedRows rows{at<const float>(numbers), width, at<const int32_t>(first), at<const int32_t>(stop), n};
        lowest_of_rows(functions, rows, at<float>(least), at<int64_t>(where), num_threads);
    });
    m.def("lowest_mass", [](const std::string& set, uintptr_t mass, uintptr_t positions, int64_t num_pages,
                            int64_t block_size, uintptr_t tables, int64_t width, uintptr_t first, uintptr_t stop,
                            uintptr_t newest, int64_t n, uintptr_t least, uintptr_t where, int num_threads) {
        const InstructionSet& functions = set_called(set);
        const nb::gil_scoped_release unlocked;
        const RankedSlots slots{at<const float>(mass),     at<const int32_t>(positions), num_pages,
                                block_size,                at<const int32_t>(tables),    width,
                                at<const int32_t>(first),  at<const int32_t>(stop),      at<const int32_t>(newest),
                                n};
        lowest_of_slots(functions, slots, at<float>(least), at<int64_t>(where), num_threads);
    });
    m.def(
        "angles",
        [](uintptr_t positions, int64_t n, uintptr_t inv_freq, int64_t half, uintptr_t cos, uintptr_t sin,
           uintptr_t which) {
            return angles_of(at<const int64_t>(positions), n, at<const double>(inv_freq), half, at<float>(cos),
                             at<float>(sin), at<int64_t>(which));
        },
        Unlocked());
    m.def(
        "turn_rows",
        [](uintptr_t rows, int64_t num_rows, int64_t dim, uintptr_t cos, uintptr_t sin, int64_t num_angles,
           int64_t half, bool interleaved, uintptr_t which, int64_t n, uintptr_t out, int num_threads) {
            turn_rows({at<const float>(rows), num_rows, dim},
                      {at<const float>(cos), at<const float>(sin), num_angles, half, interleaved},
                      at<const int64_t>(which), n, at<float>(out), num_threads);
        },
        Unlocked());
    m.def("append", [](const std::string& set, uintptr_t rows, int64_t token_bytes, int64_t head_bytes, bool narrow,
                       int storage, int64_t dim, uintptr_t arena, int64_t num_slots, int64_t row_bytes,
                       int64_t num_tokens, int64_t num_heads, uintptr_t slots, bool per_head, int64_t block_size,
                       int64_t page_stride, int64_t page_offset, int num_threads) {
        const InstructionSet& functions = set_called(set);
        const nb::gil_scoped_release unlocked;
        append_rows(functions, {at<const char>(rows), token_bytes, head_bytes, narrow, Storage(storage), dim},
                    {at<char>(arena), num_slots, row_bytes},
                    {num_tokens, num_heads, at<const int64_t>(slots), per_head, block_size, page_stride, page_offset},
                    num_threads);
    });
}

void bind_rans(nb::module_& m) {
    m.def("rans_encode", [](uintptr_t ends, int64_t width, const std::vector<int64_t>& rows, int64_t columns, int lanes,
                            uintptr_t codes, uintptr_t out, int64_t capacity) {
        const RansTables tables{at<const int16_t>(ends), width, rows, columns};
        const nb::gil_scoped_release unlocked;
        return rans_encode(tables, lanes, at<const uint8_t>(codes), at<uint8_t>(out), capacity);
    });
    m.def("rans_decode", [](uintptr_t ends, int64_t width, const std::vector<int64_t>& rows, int64_t columns, int lanes,
                            uintptr_t stream, int64_t length, uintptr_t codes) {
        const RansTables tables{at<const int16_t>(ends), width, rows, columns};
        const nb::gil_scoped_release unlocked;
        return rans_decode(tables, lanes, at<const uint8_t>(stream), length, at<uint8_t>(codes));
    });
}

// Reads num_floats floats once, in large runs over the threads; the time it takes is the machine's read bandwidth.
float read_memory(const std::string& set, uintptr_t address, int64_t num_floats, int num_threads) {
    const InstructionSet& functions = set_called(set);
    const nb::gil_scoped_release unlocked;
    std::atomic<float> total{0.0f};
    const int64_t run = (num_floats + 4 * num_threads - 1) / (4 * num_threads);
    parallel_for(4 * num_threads, num_threads, [&](int64_t i, int) {
        const int64_t from = std::min(num_floats, i * run), to = std::min(num_floats, from + run);
        const float sum = functions.read(at<const float>(address) + from, to - from);
        for (float old = total.load(); !total.compare_exchange_weak(old, old + sum);) {
        }
    });
    return total.load();
}

}  // namespace
}  // namespace kvwise

NB_MODULE(_native, m) {
    m.doc() = "Native CPU kernels of kvwise; use kvwise.kernels, not this module.";
    nb::set_leak_warnings(false);  // what a process holds when it ends is no leak: a server that is killed holds all
    m.def("instruction_sets", &kvwise::instruction_sets);
    m.def("read_memory", &kvwise::read_memory);
    kvwise::bind_attend(m);
    kvwise::bind_rows(m);
    kvwise::bind_packed(m);
    kvwise::bind_folded(m);
    kvwise::bind_rans(m);
    kvwise::bind_records(m);
}
