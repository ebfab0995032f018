// kvwise._native: sealing of packed pages.
#include "module_packed.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "seal.h"

namespace nb = nanobind;

namespace kvwise {
namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

OpenRows open_rows(uintptr_t arena, int64_t num_slots, int dim, int storage) {
    return {at<const char>(arena), num_slots, dim, Storage(storage)};
}

}  // namespace

PackedPages packed_of(const std::vector<int64_t>& f, size_t first, bool upper_only) {
    if (f.size() < first + kPackedFields) throw std::invalid_argument("fields of packed pages are missing");
    const int64_t* x = f.data() + first;
    PackedPages pages{{at<char>(x[0]), at<char>(x[1])}, x[2], x[3], x[4], x[5], x[6], {}, {}};
    const auto part = [&](const int64_t* y) {
        return packed_part(y[0], pages.page_tokens, int32_t(y[1]), Storage(y[2]), int32_t(y[3]), y[4] != 0,
                           int32_t(y[5]), y[6] != 0, upper_only);
    };
    pages.keys = part(x + 7);
    pages.values = part(x + 14);
    return pages;
}

void bind_packed(nb::module_& m) {
    m.def("seal_pages", [](const std::string& set, uintptr_t arena, int64_t num_slots, int dim, int storage,
                           uintptr_t slots, const std::vector<int64_t>& packed, bool keys, uintptr_t pages,
                           uintptr_t channels, int64_t n, int num_threads) {
        const InstructionSet& functions = set_called(set);
        const PackedPages target = packed_of(packed, 0, false);
        const nb::gil_scoped_release unlocked;
        seal_pages(functions, open_rows(arena, num_slots, dim, storage), at<const int64_t>(slots), target, keys,
                   at<const int64_t>(pages), at<const int64_t>(channels), n, num_threads);
    });
    m.def("seal_value_rows", [](const std::string& set, uintptr_t arena, int64_t num_slots, int dim, int storage,
                                uintptr_t slots, const std::vector<int64_t>& packed, uintptr_t packed_slots, int64_t n,
                                int num_threads) {
        const InstructionSet& functions = set_called(set);
        const PackedPages target = packed_of(packed, 0, false);
        const nb::gil_scoped_release unlocked;
        seal_value_rows(functions, open_rows(arena, num_slots, dim, storage), at<const int64_t>(slots), target,
                        at<const int64_t>(packed_slots), n, num_threads);
    });
}

}  // namespace kvwise
