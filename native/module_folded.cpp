// kvwise._native: states of tokens that have left.
#include "module_folded.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "folded.h"

namespace nb = nanobind;

namespace kvwise {
namespace {

constexpr size_t kFields = 16;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// In the order of `FoldedStates.native_fields` in kernels/folded.py.
Folded folded_of(const std::vector<int64_t>& f) {
    if (f.size() != kFields)
        throw std::invalid_argument("a folded state has 16 fields, got " + std::to_string(f.size()));
    return {{int32_t(f[0]), int32_t(f[1]), int32_t(f[2])}, f[3], f[4], f[5], f[6], at<float>(f[7]), at<float>(f[8]),
            at<const float>(f[9]), at<const float>(f[10]), at<const float>(f[11]), at<const float>(f[12]),
            at<const float>(f[13]), at<const float>(f[14]), at<const float>(f[15])};
}

}  // namespace

void bind_folded(nb::module_& m) {
    m.def("fold", [](const std::string& set, const std::vector<int64_t>& fields, uintptr_t requests, uintptr_t layers,
                     uintptr_t heads, uintptr_t keys, uintptr_t values, int64_t n, int num_threads) {
        const InstructionSet& functions = set_called(set);
        const Folded folded = folded_of(fields);
        const nb::gil_scoped_release unlocked;
        fold_tokens(functions, folded,
                    {at<const int64_t>(requests), at<const int64_t>(layers), at<const int64_t>(heads),
                     at<const float>(keys), at<const float>(values), n},
                    num_threads);
    });
    m.def("merge_folded", [](const std::string& set, const std::vector<int64_t>& fields, int64_t layer,
                             uintptr_t requests, int64_t num_rows, uintptr_t queries, int64_t row_stride,
                             int64_t head_stride, uintptr_t answers, uintptr_t lse, uintptr_t merged, int num_threads) {
        const InstructionSet& functions = set_called(set);
        const Folded folded = folded_of(fields);
        const nb::gil_scoped_release unlocked;
        merge_answers(functions, folded,
                      {layer, at<const int64_t>(requests), num_rows, at<const float>(queries), row_stride, head_stride,
                       at<const float>(answers), at<const float>(lse), at<float>(merged)},
                      num_threads);
    });
}

}  // namespace kvwise
