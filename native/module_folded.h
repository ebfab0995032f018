// The binding of states of tokens that have left.
#pragma once

#include <nanobind/nanobind.h>

namespace kvwise {

void bind_folded(nanobind::module_& m);

}  // namespace kvwise
