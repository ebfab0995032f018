// Vectors of bytes for integer dot products: one 32-bit lane holds four codes of one lane of a packed part.
// Only where the instruction set multiplies bytes; included by instruction_set.cpp behind simd.h.
#pragma once

#include "simd.h"

#if defined(__AVX2__)
#define KVWISE_INTEGER_DOTS 1

namespace {

#if defined(__AVX512F__)

struct Bytes {
    static constexpr int kLanes = 16;
    __m512i v;
};

inline Bytes load_bytes(const void* p) {
    return {_mm512_loadu_si512(p)};
}
inline Bytes zero_bytes() {
    return {_mm512_setzero_si512()};
}
inline Bytes broadcast_quad(const void* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof(quad));
    return {_mm512_set1_epi32(quad)};
}
// (a >> shift) & mask in every byte; bits that cross a byte must fall to the mask.
inline Bytes cut_bits(Bytes a, int shift, int mask) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, shift), _mm512_set1_epi8(char(mask)))};
}
inline Bytes shift_up(Bytes a, int shift) {
    return {_mm512_slli_epi16(a.v, shift)};
}
inline Bytes merge(Bytes a, Bytes b) {
    return {_mm512_or_si512(a.v, b.v)};
}
// Sums of neighbouring products of unsigned by signed bytes, as int16.
inline Bytes pair_products(Bytes codes, Bytes weights) {
    return {_mm512_maddubs_epi16(codes.v, weights.v)};
}
inline Bytes add_shorts(Bytes a, Bytes b) {
    return {_mm512_add_epi16(a.v, b.v)};
}
inline Bytes add_ints(Bytes a, Bytes b) {
    return {_mm512_add_epi32(a.v, b.v)};
}
// Sums of neighbouring products of int16, as int32.
inline Bytes short_products(Bytes a, Bytes b) {
    return {_mm512_madd_epi16(a.v, b.v)};
}
inline Bytes one_shorts() {
    return {_mm512_set1_epi16(1)};
}
inline Bytes even_bytes(Bytes a) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi16(0xFF))};
}
inline Bytes odd_bytes(Bytes a) {
    return {_mm512_srli_epi16(a.v, 8)};
}
inline void store_ints_as_float(float* p, Bytes a) {
    _mm512_storeu_ps(p, _mm512_cvtepi32_ps(a.v));
}

// Rounds to int8 and returns what it rounded to.
inline Vec store_rounded(int8_t* p, Vec a) {
    const __m512i whole = _mm512_cvtps_epi32(a.v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(whole));
    return {_mm512_cvtepi32_ps(whole)};
}
// Rounds to int16, the second and third of four swapped: even bytes of codes meet the first two, odd ones the others.
inline Vec store_rounded(int16_t* p, Vec a) {
    const __m512i whole = _mm512_cvtps_epi32(a.v);
    const __m256i halves = _mm512_cvtepi32_epi16(whole);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(halves, 0xD8), 0xD8));
    return {_mm512_cvtepi32_ps(whole)};
}
inline Vec magnitude(Vec a) {
    return {_mm512_abs_ps(a.v)};
}

#else

struct Bytes {
    static constexpr int kLanes = 8;
    __m256i v;
};

inline Bytes load_bytes(const void* p) {
    return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
inline Bytes zero_bytes() {
    return {_mm256_setzero_si256()};
}
inline Bytes broadcast_quad(const void* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof(quad));
    return {_mm256_set1_epi32(quad)};
}
// (a >> shift) & mask in every byte; bits that cross a byte must fall to the mask.
inline Bytes cut_bits(Bytes a, int shift, int mask) {
    return {_mm256_and_si256(_mm256_srli_epi16(a.v, shift), _mm256_set1_epi8(char(mask)))};
}
inline Bytes shift_up(Bytes a, int shift) {
    return {_mm256_slli_epi16(a.v, shift)};
}
inline Bytes merge(Bytes a, Bytes b) {
    return {_mm256_or_si256(a.v, b.v)};
}
// Sums of neighbouring products of unsigned by signed bytes, as int16.
inline Bytes pair_products(Bytes codes, Bytes weights) {
    return {_mm256_maddubs_epi16(codes.v, weights.v)};
}
inline Bytes add_shorts(Bytes a, Bytes b) {
    return {_mm256_add_epi16(a.v, b.v)};
}
inline Bytes add_ints(Bytes a, Bytes b) {
    return {_mm256_add_epi32(a.v, b.v)};
}
// Sums of neighbouring products of int16, as int32.
inline Bytes short_products(Bytes a, Bytes b) {
    return {_mm256_madd_epi16(a.v, b.v)};
}
inline Bytes one_shorts() {
    return {_mm256_set1_epi16(1)};
}
inline Bytes even_bytes(Bytes a) {
    return {_mm256_and_si256(a.v, _mm256_set1_epi16(0xFF))};
}
inline Bytes odd_bytes(Bytes a) {
    return {_mm256_srli_epi16(a.v, 8)};
}
inline void store_ints_as_float(float* p, Bytes a) {
    _mm256_storeu_ps(p, _mm256_cvtepi32_ps(a.v));
}

inline __m128i to_shorts(__m256i whole) {
    return _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}
// Rounds to int8 and returns what it rounded to.
inline Vec store_rounded(int8_t* p, Vec a) {
    const __m256i whole = _mm256_cvtps_epi32(a.v);
    const __m128i halves = to_shorts(whole);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
    return {_mm256_cvtepi32_ps(whole)};
}
// Rounds to int16, the second and third of four swapped: even bytes of codes meet the first two, odd ones the others.
inline Vec store_rounded(int16_t* p, Vec a) {
    const __m256i whole = _mm256_cvtps_epi32(a.v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_shufflehi_epi16(_mm_shufflelo_epi16(to_shorts(whole), 0xD8), 0xD8));
    return {_mm256_cvtepi32_ps(whole)};
}
inline Vec magnitude(Vec a) {
    return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}

#endif

}  // namespace

#endif
