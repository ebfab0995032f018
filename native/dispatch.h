// Which instruction sets were compiled in and can run here.
#pragma once

#include <vector>

#include "tasks.h"

namespace kvwise {

// Fastest first; never empty.
const std::vector<const InstructionSet*>& usable_instruction_sets();

}  // namespace kvwise
