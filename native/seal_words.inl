// Codes into the words of a packed page, lanes side by side. Included by instruction_set.cpp before seal.inl, once per
// instruction set.

namespace {

constexpr int kQuads = kCodeUnit / 4;

// A quad of codes (four inner numbers, a byte each) of kLanes lanes.
typedef uint32_t Quads __attribute__((vector_size(4 * Vec::kLanes)));

// The nearest whole number of one between 0 and 255, ties to even, lies in the lowest byte of its sum with 1.5 * 2**23:
// the sum has no bits left for a fraction.
constexpr float kWhole = 12582912.0f;

// The lowest bytes of 32 numbers from 0 to 255 (or below 0 where a vector has been rounded: they become 0).
inline void store_bytes(uint8_t* p, const Quads (&a)[kCodeUnit / Vec::kLanes]) {
#if defined(__AVX512F__)
    for (int v = 0; v < 2; ++v) {
        const __m512i code = _mm512_max_epi32((__m512i)a[v], _mm512_setzero_si512());
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + v, _mm512_cvtepi32_epi8(code));
    }
#elif defined(__AVX2__)
    const __m256i first = _mm256_packs_epi32((__m256i)a[0], (__m256i)a[1]);
    const __m256i second = _mm256_packs_epi32((__m256i)a[2], (__m256i)a[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works on halves
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
#else
    for (int i = 0; i < kCodeUnit; ++i) p[i] = uint8_t(a[i / Vec::kLanes][i % Vec::kLanes]);
#endif
}

// Codes nearest to 32 numbers up to 255, those below 0 and nans as 0.
inline void store_unit(uint8_t* p, const Vec (&a)[kCodeUnit / Vec::kLanes]) {
    Quads codes[kCodeUnit / Vec::kLanes];
    for (int v = 0; v < kCodeUnit / Vec::kLanes; ++v) {
#if defined(__AVX512F__)
        codes[v] = (Quads)_mm512_cvtps_epi32(a[v].v);
#elif defined(__AVX2__)
        codes[v] = (Quads)_mm256_cvtps_epi32(a[v].v);
#else
        const Vec code = larger(a[v], zero()) + broadcast(kWhole);
        std::memcpy(codes + v, &code, sizeof(code));
#endif
    }
    store_bytes(p, codes);
}

// The same of four inner numbers of kLanes lanes: a quad.
inline Quads quads_from(const Vec (&a)[4]) {
#if defined(__AVX512F__)
    const __m512i first = _mm512_packs_epi32(_mm512_cvtps_epi32(a[0].v), _mm512_cvtps_epi32(a[1].v));
    const __m512i second = _mm512_packs_epi32(_mm512_cvtps_epi32(a[2].v), _mm512_cvtps_epi32(a[3].v));
    const __m512i order = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
    return (Quads)_mm512_shuffle_epi8(_mm512_packus_epi16(first, second), order);
#elif defined(__AVX2__)
    const __m256i first = _mm256_packs_epi32(_mm256_cvtps_epi32(a[0].v), _mm256_cvtps_epi32(a[1].v));
    const __m256i second = _mm256_packs_epi32(_mm256_cvtps_epi32(a[2].v), _mm256_cvtps_epi32(a[3].v));
    const __m256i order = _mm256_setr_epi32(0x0C080400, 0x0D090501, 0x0E0A0602, 0x0F0B0703,  //
                                            0x0C080400, 0x0D090501, 0x0E0A0602, 0x0F0B0703);
    return (Quads)_mm256_shuffle_epi8(_mm256_packus_epi16(first, second), order);
#else
    Quads quads = {};
    for (int j = 0; j < 4; ++j) {
        const Vec code = larger(a[j], zero()) + broadcast(kWhole);
        Quads bits;
        std::memcpy(&bits, &code, sizeof(bits));
        quads |= (bits & 0xFF) << (8 * j);
    }
    return quads;
#endif
}

// Lanes' codes of 32 inner numbers, byte by byte, into the eight quads of kLanes lanes.
inline void quads_of(const uint8_t (*codes)[kCodeUnit], Quads* quads) {
#if defined(__AVX2__)
    // Eight lanes by eight quads at a time.
    constexpr int kHalf = Vec::kLanes / 8;
    const auto turned = [&](int first, __m256i* q) {
        __m256i row[8], pair[8], four[8];
        for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes[first + i]));
        for (int i = 0; i < 8; i += 2) {
            pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
            pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            for (int k = 0; k < 2; ++k) {
                four[i + 2 * k] = _mm256_unpacklo_epi64(pair[i + k], pair[i + k + 2]);
                four[i + 2 * k + 1] = _mm256_unpackhi_epi64(pair[i + k], pair[i + k + 2]);
            }
        }
        for (int i = 0; i < 4; ++i) {
            q[i] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x20);
            q[i + 4] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x31);
        }
    };
    __m256i half[kHalf][kQuads];
    for (int i = 0; i < kHalf; ++i) turned(8 * i, half[i]);
    for (int q = 0; q < kQuads; ++q) {
#if defined(__AVX512F__)
        quads[q] = (Quads)_mm512_inserti64x4(_mm512_castsi256_si512(half[0][q]), half[1][q], 1);
#else
        quads[q] = (Quads)half[0][q];
#endif
    }
#else
    for (int i = 0; i < Vec::kLanes; ++i) {
        for (int q = 0; q < kQuads; ++q) {
            uint32_t quad;
            std::memcpy(&quad, codes[i] + 4 * q, sizeof(quad));
            quads[q][i] = quad;
        }
    }
#endif
}

// Where the words of a part go. `streaming` stores pass the caches: a page is read again only after all others.
struct WordTarget {
    char* data;
    int64_t step;  // bytes from word to word
    bool streaming;
};

inline void store_words(char* at, Quads words, int32_t lanes, bool streaming) {
    if (lanes < Vec::kLanes) return void(std::memcpy(at, &words, lanes * sizeof(uint32_t)));
#if defined(__AVX512F__)
    if (streaming) return _mm512_stream_si512(reinterpret_cast<__m512i*>(at), (__m512i)words);
#elif defined(__AVX2__)
    if (streaming) return _mm256_stream_si256(reinterpret_cast<__m256i*>(at), (__m256i)words);
#else
    (void)streaming;
#endif
    std::memcpy(at, &words, sizeof(words));
}

// Words of a plane of B bits from the bits of codes from `shift` on; `Whole`: the plane takes all bits of the codes.
template <int B, bool Whole>
inline void write_plane(const Quads* quads, int32_t shift, int32_t lanes, const WordTarget& to) {
    constexpr uint32_t mask = 0x01010101u * ((1u << B) - 1);
    for (int w = 0; w < B; ++w) {
        Quads words = {};
#pragma GCC unroll 8
        for (int s = 0; s < 8 / B; ++s) {
            const Quads quad = quads[w * (8 / B) + s];
            words |= (Whole ? quad : (quad >> shift) & mask) << (s * B);
        }
        store_words(to.data + w * to.step, words, lanes, to.streaming);
    }
}

// Calls write(plane, shift, codes, data) for each plane: which codes it cuts bits out of, from which bit on.
template <class Codes, class Write>
inline void for_planes(const PackedPart& part, Codes* upper, Codes* lower, char* data, Write write) {
    int32_t shift = part.split ? 0 : part.bits;
    for (int32_t p = 0; p < part.num_planes; ++p) {
        if (!part.split) shift -= part.planes[p];
        write(part.planes[p], shift, part.split && p == 1 ? lower : upper, data);
        data += part.plane_bytes(p);
    }
}

// Codes of 32 inner numbers of lanes [lane, lane + n), n <= kLanes.
inline void write_unit(const PackedPart& part, const Quads* upper, const Quads* lower, int32_t n, int64_t unit,
                       int64_t lane, char* data, bool streaming) {
    const int64_t step = int64_t(part.padded_lanes) * 4;
    const bool whole = part.split || part.num_planes == 1;
    for_planes(part, upper, lower, data, [&](int32_t bits, int32_t shift, const Quads* codes, char* plane) {
        const WordTarget to{plane + unit * bits * step + lane * 4, step, streaming};
        if (bits == 8) return write_plane<8, true>(codes, 0, n, to);
        if (whole && bits == 4) return write_plane<4, true>(codes, 0, n, to);
        if (whole && bits == 2) return write_plane<2, true>(codes, 0, n, to);
        if (whole && bits == 1) return write_plane<1, true>(codes, 0, n, to);
        if (bits == 4) return write_plane<4, false>(codes, shift, n, to);
        if (bits == 2) return write_plane<2, false>(codes, shift, n, to);
        if (bits == 1) return write_plane<1, false>(codes, shift, n, to);
    });
}

// Whether full vectors of words may be streamed: all of them lie on their own size, and lines fill up soon.
inline bool can_stream(const PackedPart& part, const char* data) {
    return reinterpret_cast<uintptr_t>(data) % 64 == 0 && part.padded_lanes % 16 == 0 && part.lanes % 16 == 0;
}

}  // namespace
