// XXH3's long-input loop, which copies what it takes in: each byte is loaded once, so what was hashed is what was
// stored, whatever another thread does to the source meanwhile.

namespace {

enum class Copy { kNone, kPlain, kStreaming };

#if defined(__AVX512F__)

// The eight lanes while the loop runs.
struct Lanes {
    __m512i v;
};

inline Lanes load_lanes(const uint64_t* p) {
    return {_mm512_loadu_si512(p)};
}
inline void store_lanes(uint64_t* p, Lanes a) {
    _mm512_storeu_si512(p, a.v);
}
template <Copy copy>
inline Lanes accumulate(Lanes a, const char* source, char* target, const unsigned char* secret) {
    const __m512i data = _mm512_loadu_si512(source);
    if constexpr (copy == Copy::kPlain) _mm512_storeu_si512(target, data);
    if constexpr (copy == Copy::kStreaming) _mm512_stream_si512(reinterpret_cast<__m512i*>(target), data);
    const __m512i keyed = _mm512_xor_si512(data, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    const __m512i swapped = _mm512_shuffle_epi32(data, _MM_PERM_BADC);
    return {_mm512_add_epi64(a.v, _mm512_add_epi64(product, swapped))};
}
inline Lanes scramble(Lanes a, const unsigned char* secret) {
    const __m512i mixed = _mm512_xor_si512(a.v, _mm512_srli_epi64(a.v, 47));
    const __m512i keyed = _mm512_xor_si512(mixed, _mm512_loadu_si512(secret));
    return {_mm512_mullo_epi64(keyed, _mm512_set1_epi64(int64_t(kPrime32_1)))};
}

#elif defined(__AVX2__)

struct Lanes {
    __m256i v[2];
};

inline __m256i load_half(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline Lanes load_lanes(const uint64_t* p) {
    return {{load_half(p), load_half(p + 4)}};
}
inline void store_lanes(uint64_t* p, Lanes a) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 4 * i), a.v[i]);
}
template <Copy copy>
inline Lanes accumulate(Lanes a, const char* source, char* target, const unsigned char* secret) {
    for (int i = 0; i < 2; ++i) {
        const __m256i data = load_half(source + 32 * i);
        __m256i* to = reinterpret_cast<__m256i*>(target + 32 * i);
        if constexpr (copy == Copy::kPlain) _mm256_storeu_si256(to, data);
        if constexpr (copy == Copy::kStreaming) _mm256_stream_si256(to, data);
        const __m256i keyed = _mm256_xor_si256(data, load_half(secret + 32 * i));
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
        a.v[i] = _mm256_add_epi64(a.v[i], _mm256_add_epi64(product, swapped));
    }
    return a;
}
inline Lanes scramble(Lanes a, const unsigned char* secret) {
    const __m256i prime = _mm256_set1_epi64x(int64_t(kPrime32_1));
    for (int i = 0; i < 2; ++i) {
        const __m256i mixed = _mm256_xor_si256(a.v[i], _mm256_srli_epi64(a.v[i], 47));
        const __m256i keyed = _mm256_xor_si256(mixed, load_half(secret + 32 * i));
        const __m256i low = _mm256_mul_epu32(keyed, prime);
        const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
        a.v[i] = _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
    }
    return a;
}

#else

struct Lanes {
    uint64_t v[8];
};

inline Lanes load_lanes(const uint64_t* p) {
    Lanes a;
    memcpy(a.v, p, sizeof a.v);
    return a;
}
inline void store_lanes(uint64_t* p, const Lanes& a) {
    memcpy(p, a.v, sizeof a.v);
}
template <Copy copy>
inline Lanes accumulate(Lanes a, const char* source, char* target, const unsigned char* secret) {
    uint64_t data[8], keys[8];
    memcpy(data, source, sizeof data);
    memcpy(keys, secret, sizeof keys);
    if constexpr (copy != Copy::kNone) memcpy(target, data, sizeof data);
    for (int i = 0; i < 8; ++i) {
        const uint64_t keyed = data[i] ^ keys[i];
        a.v[i] += (keyed & 0xFFFFFFFFu) * (keyed >> 32) + data[i ^ 1];
    }
    return a;
}
inline Lanes scramble(Lanes a, const unsigned char* secret) {
    uint64_t keys[8];
    memcpy(keys, secret, sizeof keys);
    for (int i = 0; i < 8; ++i) a.v[i] = (a.v[i] ^ (a.v[i] >> 47) ^ keys[i]) * kPrime32_1;
    return a;
}

#endif

template <Copy copy>
inline void take_stripes(uint64_t* lanes, const char* source, char* target, int64_t num_stripes, int64_t first) {
    Lanes a = load_lanes(lanes);
    int64_t in_block = first % kBlockStripes;
    while (num_stripes > 0) {
        if (in_block == 0 && num_stripes >= kBlockStripes) {
#pragma GCC unroll 16
            for (int i = 0; i < kBlockStripes; ++i) {
                a = accumulate<copy>(a, source + kStripe * i, target + kStripe * i, kSecret + 8 * i);
            }
            a = scramble(a, kSecret + kSecretBytes - kStripe);
            source += kBlockStripes * kStripe;
            target += kBlockStripes * kStripe;
            num_stripes -= kBlockStripes;
            continue;
        }
        a = accumulate<copy>(a, source, target, kSecret + 8 * in_block);
        if (++in_block == kBlockStripes) {
            a = scramble(a, kSecret + kSecretBytes - kStripe);
            in_block = 0;
        }
        source += kStripe;
        target += kStripe;
        --num_stripes;
    }
    store_lanes(lanes, a);
}

void copy_stripes(uint64_t* lanes, const char* source, char* target, int64_t num_stripes, int64_t first,
                  bool streaming) {
    if (!target) return take_stripes<Copy::kNone>(lanes, source, target, num_stripes, first);
    if (streaming && reinterpret_cast<uintptr_t>(target) % kStripe == 0) {
        return take_stripes<Copy::kStreaming>(lanes, source, target, num_stripes, first);
    }
    take_stripes<Copy::kPlain>(lanes, source, target, num_stripes, first);
}

void last_stripe(uint64_t* lanes, const char* stripe) {
    const Lanes a = load_lanes(lanes);
    store_lanes(lanes, accumulate<Copy::kNone>(a, stripe, nullptr, kSecret + kSecretBytes - kStripe - 7));
}

}  // namespace
