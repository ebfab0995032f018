// The part of the module that copies, checks and seals.
#pragma once

#include <nanobind/nanobind.h>

namespace kvwise {

void bind_records(nanobind::module_& m);

}  // namespace kvwise
