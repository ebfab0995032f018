// XXH3-128 of bytes that are copied at the same time.
#pragma once

#include <cstdint>

#include "tasks.h"

namespace kvwise {

// Bytes from `source` to `target`; null target: only read them.
struct Piece {
    const char* source;
    char* target;
    int64_t num_bytes;
};

struct Digest {
    unsigned char bytes[16];  // canonical: most significant first
};

// Copies all pieces and gives the digest (seed 0, default secret) of their bytes one after another. Each source byte
// is read once: the digest is of what the targets received. `streaming` stores past the caches where the target is
// aligned to 64 bytes: faster than filling cache lines first, if nobody reads the target soon; call finish_streaming then.
Digest copy_and_digest(const InstructionSet& set, const Piece* pieces, int64_t num_pieces, bool streaming);

// Streamed bytes become visible to other threads in order with what is written after this.
void finish_streaming();

}  // namespace kvwise
