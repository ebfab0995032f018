// Packed pages as Python hands them over, and the binding of sealing.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "packed.h"

namespace kvwise {

constexpr size_t kPackedFields = 21;

// From fields[first] on, in the order of `packed_fields` in kernels/cpu_sealed.py.
PackedPages packed_of(const std::vector<int64_t>& fields, size_t first, bool upper_only);

void bind_packed(nanobind::module_& m);

}  // namespace kvwise
