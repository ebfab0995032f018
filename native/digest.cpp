// XXH3-128 by its public specification: the driver, and the inputs too short for the eight lanes.
#include "digest.h"

#include <algorithm>
#include <cstring>

#include "xxh3.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvwise {
namespace {

constexpr int kShort = 240;  // the longest input that is hashed without the lanes

struct Pair {
    uint64_t low, high;
};

uint32_t read32(const void* p) {
    uint32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
uint64_t read64(const void* p) {
    uint64_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
uint64_t secret64(int i) {
    return read64(kSecret + i);
}
uint64_t secret32(int i) {
    return read32(kSecret + i);
}

Pair multiply(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return {uint64_t(product), uint64_t(product >> 64)};
}
uint64_t fold(uint64_t a, uint64_t b) {
    const Pair product = multiply(a, b);
    return product.low ^ product.high;
}
uint64_t avalanche(uint64_t h) {
    h = (h ^ (h >> 37)) * kPrimeMix1;
    return h ^ (h >> 32);
}
uint64_t avalanche64(uint64_t h) {
    h = (h ^ (h >> 33)) * kPrime64_2;
    h = (h ^ (h >> 29)) * kPrime64_3;
    return h ^ (h >> 32);
}

Pair hash_0() {
    return {avalanche64(secret64(64) ^ secret64(72)), avalanche64(secret64(80) ^ secret64(88))};
}

Pair hash_1_to_3(const unsigned char* in, uint32_t n) {
    const uint32_t low = uint32_t(in[0]) << 16 | uint32_t(in[n >> 1]) << 24 | in[n - 1] | n << 8;
    const uint32_t swapped = __builtin_bswap32(low);
    const uint32_t high = swapped << 13 | swapped >> 19;
    return {avalanche64(low ^ (secret32(0) ^ secret32(4))), avalanche64(high ^ (secret32(8) ^ secret32(12)))};
}

Pair hash_4_to_8(const unsigned char* in, uint64_t n) {
    const uint64_t both = read32(in) + (uint64_t(read32(in + n - 4)) << 32);
    Pair m = multiply(both ^ secret64(16) ^ secret64(24), kPrime64_1 + (n << 2));
    m.high += m.low << 1;
    m.low ^= m.high >> 3;
    m.low = (m.low ^ (m.low >> 35)) * kPrimeMix2;
    return {m.low ^ (m.low >> 28), avalanche(m.high)};
}

Pair hash_9_to_16(const unsigned char* in, uint64_t n) {
    const uint64_t low = read64(in), high = read64(in + n - 8);
    Pair m = multiply(low ^ high ^ secret64(32) ^ secret64(40), kPrime64_1);
    m.low += (n - 1) << 54;
    const uint64_t keyed = high ^ secret64(48) ^ secret64(56);
    m.high += keyed + (keyed & 0xFFFFFFFFu) * (kPrime32_2 - 1);
    m.low ^= __builtin_bswap64(m.high);
    Pair h = multiply(m.low, kPrime64_2);
    h.high += m.high * kPrime64_2;
    return {avalanche(h.low), avalanche(h.high)};
}

uint64_t mix16(const unsigned char* in, int secret) {
    return fold(read64(in) ^ secret64(secret), read64(in + 8) ^ secret64(secret + 8));
}
void mix32(Pair& a, const unsigned char* first, const unsigned char* second, int secret) {
    a.low = (a.low + mix16(first, secret)) ^ (read64(second) + read64(second + 8));
    a.high = (a.high + mix16(second, secret + 16)) ^ (read64(first) + read64(first + 8));
}
Pair finish_mixed(Pair a, uint64_t n) {
    return {avalanche(a.low + a.high), 0 - avalanche(a.low * kPrime64_1 + a.high * kPrime64_4 + n * kPrime64_2)};
}

Pair hash_17_to_128(const unsigned char* in, uint64_t n) {
    Pair a{n * kPrime64_1, 0};
    for (int i = int(n - 1) / 32; i >= 0; --i) mix32(a, in + 16 * i, in + n - 16 * (i + 1), 32 * i);
    return finish_mixed(a, n);
}

Pair hash_129_to_240(const unsigned char* in, uint64_t n) {
    Pair a{n * kPrime64_1, 0};
    for (int i = 0; i < 4; ++i) mix32(a, in + 32 * i, in + 32 * i + 16, 32 * i);
    a = {avalanche(a.low), avalanche(a.high)};
    for (int i = 4; i < int(n) / 32; ++i) mix32(a, in + 32 * i, in + 32 * i + 16, 3 + 32 * (i - 4));
    mix32(a, in + n - 16, in + n - 32, 136 - 17 - 16);
    return finish_mixed(a, n);
}

Pair hash_short(const unsigned char* in, uint64_t n) {
    if (n == 0) return hash_0();
    if (n <= 3) return hash_1_to_3(in, uint32_t(n));
    if (n <= 8) return hash_4_to_8(in, n);
    if (n <= 16) return hash_9_to_16(in, n);
    return n <= 128 ? hash_17_to_128(in, n) : hash_129_to_240(in, n);
}

uint64_t merge(const uint64_t* lanes, int secret, uint64_t start) {
    for (int i = 0; i < 4; ++i) {
        start += fold(lanes[2 * i] ^ secret64(secret + 16 * i), lanes[2 * i + 1] ^ secret64(secret + 16 * i + 8));
    }
    return avalanche(start);
}

Digest canonical(Pair h) {
    Digest out;
    const uint64_t words[2] = {__builtin_bswap64(h.high), __builtin_bswap64(h.low)};
    std::memcpy(out.bytes, words, sizeof words);
    return out;
}

// Where the next byte comes from and goes to.
class Cursor {
   public:
    explicit Cursor(const Piece* pieces) : piece_(pieces) {}

    // Bytes left in the piece at hand, which is not empty unless all are taken.
    int64_t left() {
        while (done_ == piece_->num_bytes) {
            ++piece_;
            done_ = 0;
        }
        return piece_->num_bytes - done_;
    }
    const char* source() const { return piece_->source + done_; }
    char* target() const { return piece_->target ? piece_->target + done_ : nullptr; }
    void skip(int64_t n) { done_ += n; }

    // Copies n bytes to their targets and to `buffer`, over the ends of pieces.
    void take(int64_t n, char* buffer) {
        while (n > 0) {
            const int64_t now = std::min(n, left());
            std::memcpy(buffer, source(), size_t(now));
            if (piece_->target) std::memcpy(target(), buffer, size_t(now));
            skip(now);
            buffer += now;
            n -= now;
        }
    }

   private:
    const Piece* piece_;
    int64_t done_ = 0;
};

Pair hash_long(const InstructionSet& set, Cursor cursor, int64_t total, bool streaming) {
    uint64_t lanes[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
    // The last stripe is the last 64 bytes and may overlap the one before, so both pass through one buffer.
    const int64_t num_stripes = (total - 1) / kStripe;
    char end[2 * kStripe];
    for (int64_t done = 0; done < num_stripes;) {
        const int64_t run = std::min(cursor.left() / kStripe, num_stripes - 1 - done);
        if (run > 0) {
            set.copy_stripes(lanes, cursor.source(), cursor.target(), run, done, streaming);
            cursor.skip(run * kStripe);
            done += run;
        } else {
            cursor.take(kStripe, end);
            set.copy_stripes(lanes, end, nullptr, 1, done++, false);
        }
    }
    const int64_t rest = total - num_stripes * kStripe;
    cursor.take(rest, end + kStripe);
    set.last_stripe(lanes, end + rest);
    const uint64_t n = uint64_t(total);
    return {merge(lanes, 11, n * kPrime64_1), merge(lanes, kSecretBytes - kStripe - 11, ~(n * kPrime64_2))};
}

}  // namespace

Digest copy_and_digest(const InstructionSet& set, const Piece* pieces, int64_t num_pieces, bool streaming) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_pieces; ++i) total += pieces[i].num_bytes;
    if (total <= kShort) {
        char all[kShort];
        Cursor(pieces).take(total, all);
        return canonical(hash_short(reinterpret_cast<unsigned char*>(all), uint64_t(total)));
    }
    return canonical(hash_long(set, Cursor(pieces), total, streaming));
}

void finish_streaming() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace kvwise
