// Records of whole blocks, written and opened in one pass over their bytes. The format is that of tiers/record.py.
#pragma once

#include <cstdint>

#include "tasks.h"

namespace kvwise {

// How the bytes of a block lie in an arena, and, layer by layer (keys, then values), in its record.
struct BlockShape {
    int64_t num_layers;
    int64_t key_bytes;     // of one layer
    int64_t value_bytes;   // of one layer
    int64_t key_stride;    // bytes from one layer to the next in the arena
    int64_t value_stride;
};

// The fixed fields at the start of a record; the table of segments follows.
struct [[gnu::packed]] FixedHeader {
    char magic[8];
    uint32_t header_bytes;
    uint16_t num_segments;
    uint16_t num_tokens;
    uint64_t record_bytes;
    char key[32], parent[32], identity[32], codec[64], tenant[16], session[16], probe[32];
    double stored_at, expires_at, idle_s;
    uint32_t depth;
};
static_assert(sizeof(FixedHeader) == 276, "tiers/record.py packs it so");

// What a record must say to be the one that was asked for.
struct Wanted {
    const char* key;       // 32 bytes
    const char* identity;  // 32 bytes
    const char* codec;     // 64 bytes, padded with zeros
};

int64_t record_bytes(const BlockShape& shape);

// Writes one whole record: `fixed` as it is, segments copied from the arena, digests, paddings. `record` has
// record_bytes(shape) bytes, which `fixed` says too.
void seal_block(const InstructionSet& set, const BlockShape& shape, const FixedHeader& fixed, const char* keys,
                const char* values, char* record, bool streaming);

// Copies the segments of a record of `num_bytes` into the arena. False: some byte is not as it was written, or the
// record is another than the one wanted, and the arena may hold rubbish. The record may change meanwhile.
bool open_block(const InstructionSet& set, const BlockShape& shape, const Wanted& wanted, const char* record,
                int64_t num_bytes, char* keys, char* values, bool streaming);

}  // namespace kvwise
