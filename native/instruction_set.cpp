// The kernels for one instruction set: compiled once per set, with its flags and -DKVWISE_SET=<name>.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"
#include "simd_bytes.h"
#include "tasks.h"
#include "xxh3.h"

using namespace kvwise;

#include "tile.inl"
#include "unpack.inl"
#include "codes.inl"
#include "decode.inl"
#include "prefill.inl"
#include "seal_words.inl"
#include "seal.inl"
#include "features.inl"
#include "lowest.inl"
#include "xxh3.inl"

#define KVWISE_JOIN_(a, b) a##b
#define KVWISE_JOIN(a, b) KVWISE_JOIN_(a, b)
#define KVWISE_TEXT_(a) #a
#define KVWISE_TEXT(a) KVWISE_TEXT_(a)

namespace kvwise {

extern const InstructionSet KVWISE_JOIN(kInstructionSet_, KVWISE_SET);
const InstructionSet KVWISE_JOIN(kInstructionSet_, KVWISE_SET) = {
    KVWISE_TEXT(KVWISE_SET), ::decode,       ::decode_mass, ::prefill,     ::prefill_mass, ::seal,        ::seal_row,
    ::fold,                  ::merge_folded, ::lowest,      ::lowest_mass, ::narrow,       ::read_floats,
    ::copy_stripes,          ::last_stripe,
};

}  // namespace kvwise
