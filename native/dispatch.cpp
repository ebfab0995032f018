// Asks the CPU once what it can run.
#include "dispatch.h"

#include <stdexcept>

namespace kvwise {

extern const InstructionSet kInstructionSet_generic;
#ifdef KVWISE_HAS_AVX2
extern const InstructionSet kInstructionSet_avx2;
#endif
#ifdef KVWISE_HAS_AVX512
extern const InstructionSet kInstructionSet_avx512;
#endif

const std::vector<const InstructionSet*>& usable_instruction_sets() {
    static const std::vector<const InstructionSet*> sets = [] {
        std::vector<const InstructionSet*> found;
#ifdef KVWISE_HAS_AVX512
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            found.push_back(&kInstructionSet_avx512);
        }
#endif
#ifdef KVWISE_HAS_AVX2
        // Every CPU with AVX2 and FMA has F16C.
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kInstructionSet_avx2);
#endif
        found.push_back(&kInstructionSet_generic);
        return found;
    }();
    return sets;
}

const InstructionSet& set_called(const std::string& name) {
    for (const InstructionSet* set : usable_instruction_sets()) {
        if (name == set->name) return *set;
    }
    throw std::invalid_argument("instruction set '" + name + "' cannot run on this CPU");
}

}  // namespace kvwise
