// Which instruction sets were compiled in and can run here.
#pragma once

#include <string>
#include <vector>

#include "tasks.h"

namespace kvwise {

// Fastest first; never empty.
const std::vector<const InstructionSet*>& usable_instruction_sets();

// Throws std::invalid_argument if it was not compiled in or this CPU cannot run it.
const InstructionSet& set_called(const std::string& name);

}  // namespace kvwise
