// One float32 vector type per instruction set, chosen by the flags this file is compiled with.
//
// Everything lives in an anonymous namespace and nothing here may call a library template: a function emitted with
// AVX-512 code under a name shared with another object could be the copy the linker keeps, and an older CPU would then
// run it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// Storage types: what a page holds. Arithmetic is float32 for all of them.
struct Float32 {
    using Bits = float;
};
struct BFloat16 {
    using Bits = uint16_t;
};
struct Float16 {
    using Bits = uint16_t;
};
// e4m3, read as the float16 with the same exponent and mantissa: 256 times too small.
struct Float8 {
    using Bits = uint8_t;
};

#if defined(__AVX512F__)

struct Vec {
    static constexpr int kLanes = 16;
    __m512 v;
};
struct IVec {
    __m512i v;
};
using Mask = __mmask16;

inline Vec load(const float* p) {
    return {_mm512_loadu_ps(p)};
}
inline void store(float* p, Vec a) {
    _mm512_storeu_ps(p, a.v);
}
inline Vec broadcast(float x) {
    return {_mm512_set1_ps(x)};
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec operator+(Vec a, Vec b) {
    return {_mm512_add_ps(a.v, b.v)};
}
inline Vec operator-(Vec a, Vec b) {
    return {_mm512_sub_ps(a.v, b.v)};
}
inline Vec operator*(Vec a, Vec b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
inline Vec operator/(Vec a, Vec b) {
    return {_mm512_div_ps(a.v, b.v)};
}
inline Vec larger(Vec a, Vec b) {
    return {_mm512_max_ps(a.v, b.v)};
}
inline Vec smaller(Vec a, Vec b) {
    return {_mm512_min_ps(a.v, b.v)};
}
inline float reduce_add(Vec a) {
    return _mm512_reduce_add_ps(a.v);
}
inline float reduce_max(Vec a) {
    return _mm512_reduce_max_ps(a.v);
}
inline Mask equal(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
}
inline bool all(Mask m) {
    return m == 0xFFFF;
}
inline Vec select(Mask m, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(m, no.v, yes.v)};
}

inline IVec load_int(const int32_t* p) {
    return {_mm512_loadu_si512(p)};
}
inline IVec broadcast_int(int32_t x) {
    return {_mm512_set1_epi32(x)};
}
inline IVec iota_int() {
    return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
inline IVec operator+(IVec a, IVec b) {
    return {_mm512_add_epi32(a.v, b.v)};
}
inline IVec operator-(IVec a, IVec b) {
    return {_mm512_sub_epi32(a.v, b.v)};
}
inline Mask less(IVec a, IVec b) {
    return _mm512_cmplt_epi32_mask(a.v, b.v);
}
inline Mask both(Mask a, Mask b) {
    return a & b;
}

// e^x by 2^n * p(r) (Cephes' expf polynomial); exactly 0 for x = -inf, about 1 ulp elsewhere below 0.
inline Vec exponential(Vec x) {
    const __m512 clamped = _mm512_max_ps(x.v, _mm512_set1_ps(-110.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), clamped);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return {_mm512_scalef_ps(p, n)};
}

inline Vec load_as_float(Float32, const float* p) {
    return load(p);
}
inline Vec load_as_float(Float16, const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec widen_bfloat16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec widen_float8(__m128i bytes) {
    const __m256i wide = _mm256_cvtepu8_epi16(bytes);
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7F)), 7);
    return {_mm512_cvtph_ps(_mm256_or_si256(sign, rest))};
}
inline Vec load_as_float(Float8, const uint8_t* p) {
    return widen_float8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load_as_float(BFloat16, const uint16_t* p) {
    return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The first n < kLanes elements, zeros after them; reads nothing behind them.
inline Vec load_tail(Float32, const float* p, int n) {
    return {_mm512_maskz_loadu_ps((1u << n) - 1, p)};
}
inline Vec load_tail(Float16, const uint16_t* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << n) - 1, p))};
}
inline Vec load_tail(Float8, const uint8_t* p, int n) {
    return widen_float8(_mm_maskz_loadu_epi8((1u << n) - 1, p));
}
inline Vec load_tail(BFloat16, const uint16_t* p, int n) {
    return widen_bfloat16(_mm256_maskz_loadu_epi16((1u << n) - 1, p));
}

inline void store_as(Float32, float* p, Vec a) {
    store(p, a);
}
inline void store_as(Float16, uint16_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// The sums of 16 vectors, sum i in lane i. Each step halves the vectors and keeps one half of the lanes of each.
inline __m512 fold_halves(__m512 a, __m512 b) {  // 256-bit halves: a's sums low, b's high
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
}
inline __m512 fold_quarters(__m512 a, __m512 b) {  // 128-bit lanes within each half
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
inline __m512 fold_pairs(__m512 a, __m512 b) {
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    return _mm512_add_ps(low, high);
}
inline __m512 fold_singles(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}
inline Vec sums_of(const Vec* a) {
    __m512 four[4];
    for (int i = 0; i < 4; ++i) {  // lanes 4q..4q+3 of four[i] hold quarter q of vectors 4i..4i+3
        const __m512 even = fold_pairs(a[4 * i].v, a[4 * i + 1].v);
        const __m512 odd = fold_pairs(a[4 * i + 2].v, a[4 * i + 3].v);
        four[i] = fold_singles(even, odd);
    }
    return {fold_quarters(fold_halves(four[0], four[1]), fold_halves(four[2], four[3]))};
}

#elif defined(__AVX2__)

struct Vec {
    static constexpr int kLanes = 8;
    __m256 v;
};
struct IVec {
    __m256i v;
};
struct Mask {
    __m256 v;
};

inline Vec load(const float* p) {
    return {_mm256_loadu_ps(p)};
}
inline void store(float* p, Vec a) {
    _mm256_storeu_ps(p, a.v);
}
inline Vec broadcast(float x) {
    return {_mm256_set1_ps(x)};
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec operator+(Vec a, Vec b) {
    return {_mm256_add_ps(a.v, b.v)};
}
inline Vec operator-(Vec a, Vec b) {
    return {_mm256_sub_ps(a.v, b.v)};
}
inline Vec operator*(Vec a, Vec b) {
    return {_mm256_mul_ps(a.v, b.v)};
}
inline Vec operator/(Vec a, Vec b) {
    return {_mm256_div_ps(a.v, b.v)};
}
inline Vec larger(Vec a, Vec b) {
    return {_mm256_max_ps(a.v, b.v)};
}
inline Vec smaller(Vec a, Vec b) {
    return {_mm256_min_ps(a.v, b.v)};
}
inline float reduce_add(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline Mask equal(Vec a, Vec b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)};
}
inline bool all(Mask m) {
    return _mm256_movemask_ps(m.v) == 0xFF;
}
inline Vec select(Mask m, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, m.v)};
}

inline IVec load_int(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline IVec broadcast_int(int32_t x) {
    return {_mm256_set1_epi32(x)};
}
inline IVec iota_int() {
    return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)};
}
inline IVec operator+(IVec a, IVec b) {
    return {_mm256_add_epi32(a.v, b.v)};
}
inline IVec operator-(IVec a, IVec b) {
    return {_mm256_sub_epi32(a.v, b.v)};
}
inline Mask less(IVec a, IVec b) {
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))};
}
inline Mask both(Mask a, Mask b) {
    return {_mm256_and_ps(a.v, b.v)};
}

// e^x by 2^n * p(r) (Cephes' expf polynomial); exactly 0 below the smallest normal number.
inline Vec exponential(Vec x) {
    const __m256 lowest = _mm256_set1_ps(-87.33f);
    const __m256 clamped = _mm256_max_ps(x.v, lowest);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(clamped, _mm256_set1_ps(1.44269504088896341f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), clamped);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const __m256 kept = _mm256_cmp_ps(x.v, lowest, _CMP_GE_OQ);
    return {_mm256_and_ps(kept, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)))};
}

inline Vec load_as_float(Float32, const float* p) {
    return load(p);
}
inline Vec load_as_float(Float16, const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec load_as_float(BFloat16, const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec load_as_float(Float8, const uint8_t* p) {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    const __m128i rest = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7F)), 7);
    return {_mm256_cvtph_ps(_mm_or_si128(sign, rest))};
}
// The first n < kLanes elements, zeros after them; reads nothing behind them.
template <class S>
inline Vec load_tail(S storage, const typename S::Bits* p, int n) {
    typename S::Bits padded[Vec::kLanes] = {};
    std::memcpy(padded, p, n * sizeof(padded[0]));
    return load_as_float(storage, padded);
}

inline void store_as(Float32, float* p, Vec a) {
    store(p, a);
}
inline void store_as(Float16, uint16_t* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// The sums of 8 vectors, sum i in lane i.
inline Vec sums_of(const Vec* a) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
    return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
}

#else

// Any CPU: the compiler's own vectors, four lanes (SSE2, NEON, or plain code).
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
    static constexpr int kLanes = 4;
    Float4 v;
};
struct IVec {
    Int4 v;
};
struct Mask {
    Int4 v;
};

inline Vec load(const float* p) {
    Vec a;
    std::memcpy(&a.v, p, sizeof(a.v));
    return a;
}
inline void store(float* p, Vec a) {
    std::memcpy(p, &a.v, sizeof(a.v));
}
inline Vec broadcast(float x) {
    return {Float4{x, x, x, x}};
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return {a.v * b.v + c.v};
}
inline Vec operator+(Vec a, Vec b) {
    return {a.v + b.v};
}
inline Vec operator-(Vec a, Vec b) {
    return {a.v - b.v};
}
inline Vec operator*(Vec a, Vec b) {
    return {a.v * b.v};
}
inline Vec operator/(Vec a, Vec b) {
    return {a.v / b.v};
}
inline Vec larger(Vec a, Vec b) {
    return {a.v > b.v ? a.v : b.v};
}
inline Vec smaller(Vec a, Vec b) {
    return {a.v < b.v ? a.v : b.v};
}
inline float reduce_add(Vec a) {
    return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
}
inline float reduce_max(Vec a) {
    const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1];
    const float y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
    return x > y ? x : y;
}
inline Mask equal(Vec a, Vec b) {
    return {a.v == b.v};
}
inline bool all(Mask m) {
    return (m.v[0] & m.v[1] & m.v[2] & m.v[3]) != 0;
}
inline Vec select(Mask m, Vec yes, Vec no) {
    return {m.v ? yes.v : no.v};
}

inline IVec load_int(const int32_t* p) {
    IVec a;
    std::memcpy(&a.v, p, sizeof(a.v));
    return a;
}
inline IVec broadcast_int(int32_t x) {
    return {Int4{x, x, x, x}};
}
inline IVec iota_int() {
    return {Int4{0, 1, 2, 3}};
}
inline IVec operator+(IVec a, IVec b) {
    return {a.v + b.v};
}
inline IVec operator-(IVec a, IVec b) {
    return {a.v - b.v};
}
inline Mask less(IVec a, IVec b) {
    return {a.v < b.v};
}
inline Mask both(Mask a, Mask b) {
    return {a.v & b.v};
}

// e^x by 2^n * p(r) (Cephes' expf polynomial); exactly 0 below the smallest normal number.
inline Vec exponential(Vec x) {
    const Vec lowest = broadcast(-87.33f);
    const Vec clamped = larger(x, lowest);
    const Float4 shifted = clamped.v * 1.44269504088896341f - 0.5f;  // <= 0, so truncation rounds to nearest
    const Int4 n = __builtin_convertvector(shifted, Int4);
    const Float4 whole = __builtin_convertvector(n, Float4);
    const Float4 r = (clamped.v - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Float4 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Int4 exponent = (n + 127) << 23;
    Float4 power;
    std::memcpy(&power, &exponent, sizeof(power));
    return {x.v >= lowest.v ? p * power : Float4{0, 0, 0, 0}};
}

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
inline float widen(Float32, float x) {
    return x;
}
inline float widen(BFloat16, uint16_t bits) {
    return from_bits(uint32_t(bits) << 16);
}
// Exponent re-biased by a multiplication, which also gets subnormal numbers right.
inline float widen(Float16, uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16;
    const uint32_t rest = uint32_t(bits & 0x7FFF) << 13;
    if (rest >= (0x7C00u << 13)) return from_bits(sign | 0x7F800000u | rest);  // inf and nan
    return from_bits(sign) + (sign ? -1.0f : 1.0f) * from_bits(rest) * 0x1p112f;
}
inline float widen(Float8, uint8_t bits) {
    return widen(Float16{}, uint16_t((bits & 0x80) << 8 | (bits & 0x7F) << 7));
}
template <class S>
inline Vec load_tail(S storage, const typename S::Bits* p, int n) {
    float wide[Vec::kLanes] = {};
    for (int i = 0; i < n; ++i) wide[i] = widen(storage, p[i]);
    return load(wide);
}
template <class S>
inline Vec load_as_float(S storage, const typename S::Bits* p) {
    return load_tail(storage, p, Vec::kLanes);
}

inline void store_as(Float32, float* p, Vec a) {
    store(p, a);
}
// Round to nearest even by hand; float16 subnormals come from adding a magic number that shifts the mantissa.
inline uint16_t narrow_float16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return sign | 0x7E00;
    if (bits >= 0x477FF000) return sign | 0x7C00;
    if (bits < 0x38800000) {
        const float shifted = from_bits(bits) + 0.5f;
        std::memcpy(&bits, &shifted, sizeof(bits));
        return sign | uint16_t(bits - 0x3F000000);
    }
    bits += 0xC8000FFF + ((bits >> 13) & 1);
    return sign | uint16_t(bits >> 13);
}
inline void store_as(Float16, uint16_t* p, Vec a) {
    for (int i = 0; i < Vec::kLanes; ++i) p[i] = narrow_float16(a.v[i]);
}

inline Vec sums_of(const Vec* a) {
    return {Float4{reduce_add(a[0]), reduce_add(a[1]), reduce_add(a[2]), reduce_add(a[3])}};
}

#endif

// Round to nearest even on the upper half of a float32; a nan stays a nan.
inline uint16_t narrow_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void store_as(BFloat16, uint16_t* p, Vec a) {
    float wide[Vec::kLanes];
    store(wide, a);
    for (int i = 0; i < Vec::kLanes; ++i) p[i] = narrow_bfloat16(wide[i]);
}

inline Vec zero() {
    return broadcast(0.0f);
}

// softcap * tanh(x / softcap), by tanh(y) = 1 - 2 / (e^2y + 1); exact to about 1e-7 of the cap.
inline Vec soft_capped(Vec x, float softcap) {
    const Vec y = smaller(larger(x * broadcast(2.0f / softcap), broadcast(-30.0f)), broadcast(30.0f));
    const Vec tanh = broadcast(1.0f) - broadcast(2.0f) / (exponential(y) + broadcast(1.0f));
    return tanh * broadcast(softcap);
}

}  // namespace
