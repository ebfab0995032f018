// One record: header, table, segments.
#include "records.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "digest.h"

namespace kvwise {
namespace {

constexpr int64_t kAlignment = 64;
constexpr char kMagic[8] = {'K', 'V', 'W', 'I', 'S', 'E', 0, 1};

struct [[gnu::packed]] Entry {
    uint64_t num_bytes;
    Digest digest;
};

int64_t aligned(int64_t n) {
    return (n + kAlignment - 1) / kAlignment * kAlignment;
}
int64_t table_end(const BlockShape& shape) {
    return int64_t(sizeof(FixedHeader)) + shape.num_layers * int64_t(sizeof(Entry));
}
int64_t header_bytes(const BlockShape& shape) {
    return aligned(table_end(shape) + int64_t(sizeof(Digest)));
}
int64_t segment_bytes(const BlockShape& shape) {
    return shape.key_bytes + shape.value_bytes;
}

bool all_zero(const char* p, int64_t n) {
    return std::all_of(p, p + n, [](char c) { return c == 0; });
}
bool same(const Digest& a, const Digest& b) {
    return std::memcmp(a.bytes, b.bytes, sizeof a.bytes) == 0;
}
Digest digest_of(const InstructionSet& set, const char* bytes, int64_t n) {
    const Piece whole{bytes, nullptr, n};
    return copy_and_digest(set, &whole, 1, false);
}

// `header` is a private copy: what is checked here cannot change before it is used.
bool is_wanted(const InstructionSet& set, const BlockShape& shape, const Wanted& wanted, const char* header) {
    FixedHeader fixed;
    std::memcpy(&fixed, header, sizeof fixed);
    const int64_t end = table_end(shape), size = header_bytes(shape);
    Digest digest;
    std::memcpy(&digest, header + end, sizeof digest);
    const int64_t filled = end + int64_t(sizeof digest);
    return std::memcmp(fixed.magic, kMagic, sizeof kMagic) == 0 && fixed.header_bytes == uint64_t(size) &&
           fixed.num_segments == shape.num_layers && fixed.record_bytes == uint64_t(record_bytes(shape)) &&
           std::memcmp(fixed.key, wanted.key, sizeof fixed.key) == 0 &&
           std::memcmp(fixed.identity, wanted.identity, sizeof fixed.identity) == 0 &&
           std::memcmp(fixed.codec, wanted.codec, sizeof fixed.codec) == 0 &&
           all_zero(header + filled, size - filled) && same(digest, digest_of(set, header, end));
}

}  // namespace

int64_t record_bytes(const BlockShape& shape) {
    return header_bytes(shape) + shape.num_layers * aligned(segment_bytes(shape));
}

void seal_block(const InstructionSet& set, const BlockShape& shape, const FixedHeader& fixed, const char* keys,
                const char* values, char* record, bool streaming) {
    const int64_t end = table_end(shape), size = header_bytes(shape), length = segment_bytes(shape);
    std::vector<char> header(size_t(size), 0);
    std::memcpy(header.data(), &fixed, sizeof fixed);
    char* segment = record + size;
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
        const Piece pieces[2] = {{keys + layer * shape.key_stride, segment, shape.key_bytes},
                                 {values + layer * shape.value_stride, segment + shape.key_bytes, shape.value_bytes}};
        const Entry entry{uint64_t(length), copy_and_digest(set, pieces, 2, streaming)};
        std::memcpy(header.data() + sizeof fixed + size_t(layer) * sizeof entry, &entry, sizeof entry);
        std::memset(segment + length, 0, size_t(aligned(length) - length));
        segment += aligned(length);
    }
    const Digest digest = digest_of(set, header.data(), end);
    std::memcpy(header.data() + end, &digest, sizeof digest);
    std::memcpy(record, header.data(), size_t(size));
    finish_streaming();
}

bool open_block(const InstructionSet& set, const BlockShape& shape, const Wanted& wanted, const char* record,
                int64_t num_bytes, char* keys, char* values, bool streaming) {
    const int64_t size = header_bytes(shape), length = segment_bytes(shape);
    if (num_bytes != record_bytes(shape)) return false;
    const std::vector<char> header(record, record + size);
    if (!is_wanted(set, shape, wanted, header.data())) return false;
    const char* segment = record + size;
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
        Entry entry;
        std::memcpy(&entry, header.data() + sizeof(FixedHeader) + size_t(layer) * sizeof entry, sizeof entry);
        const Piece pieces[2] = {{segment, keys + layer * shape.key_stride, shape.key_bytes},
                                 {segment + shape.key_bytes, values + layer * shape.value_stride, shape.value_bytes}};
        if (entry.num_bytes != uint64_t(length) || !all_zero(segment + length, aligned(length) - length) ||
            !same(entry.digest, copy_and_digest(set, pieces, 2, streaming))) {
            return false;
        }
        segment += aligned(length);
    }
    finish_streaming();
    return true;
}

}  // namespace kvwise
