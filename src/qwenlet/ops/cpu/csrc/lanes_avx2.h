// Sixteen lanes in two AVX2 registers. Needs FMA and F16C too.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "ahead.h"

namespace {

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
using Line = I;

constexpr int kGemmRows = 3, kGemmRowsOfBytes = 2, kGemmTiles = 1, kGemvTiles = 1, kGemvSums = 2, kStreamTiles = 1;
constexpr int kStreamRows = 4, kStreamHalves = 1;
constexpr int64_t kStreamedRows = 8, kStreamedRowsOfOthers = 8;
constexpr int kPageTiles = 2, kPageTilesOfTwo = 1;
constexpr Ahead kCodesAhead{0, 1, true}, kCodesOfRowsAhead{6144, 1, false};
constexpr Ahead kFloatsAhead{2048, 1, true}, kFloatsOfRowsAhead = kFloatsAhead, kPagesAhead{8192, 1, false};
constexpr int kFp32Rows = 6, kFp32Tiles = 1;

inline F f_set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
inline F f_load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline __m256 widen_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline F f_load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F f_sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F f_div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
// Sixteen lanes added, and the largest of them: halves together again and again, an order that all instruction sets have.
inline float f_sum(F v) {
    const __m256 eight = _mm256_add_ps(v.a, v.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float f_highest(F v) {
    const __m256 eight = _mm256_max_ps(v.a, v.b);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline F f_abs(F x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
// of magnitudes, whose bits are in their order: infinity above numbers, what is no number above infinity
inline __m256 larger(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline F f_larger(F x, F y) { return {larger(x.a, y.a), larger(x.b, y.b)}; }
inline float f_largest(F x) {  // lanes together as f_larger does
    const __m256i eight = _mm256_max_epi32(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}
inline F f_round(F x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 pow2(__m256 whole) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_max_epi32(exponent, _mm256_setzero_si256()), 23));
}
inline F f_pow2(F whole) { return {pow2(whole.a), pow2(whole.b)}; }
inline F f_from(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline F f_first(F x, int count, float other) {
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i limit = _mm256_set1_epi32(count), high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    const __m256 fill = _mm256_set1_ps(other);
    return {_mm256_blendv_ps(fill, x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, low))),
            _mm256_blendv_ps(fill, x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, high)))};
}
inline F f_from_least(F x, F least) {
    return {_mm256_and_ps(x.a, _mm256_cmp_ps(x.a, least.a, _CMP_GE_OQ)),
            _mm256_and_ps(x.b, _mm256_cmp_ps(x.b, least.b, _CMP_GE_OQ))};
}
inline int64_t f_places_between(F x, F low, F high, int32_t first, int32_t* to) {
    const auto between = [](__m256 v, __m256 l, __m256 h) {
        return static_cast<unsigned>(
            _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(v, l, _CMP_GE_OQ), _mm256_cmp_ps(v, h, _CMP_LT_OQ))));
    };
    int64_t count = 0;
    for (unsigned mask = between(x.a, low.a, high.a) | between(x.b, low.b, high.b) << 8; mask; mask &= mask - 1)
        to[count++] = first + __builtin_ctz(mask);
    return count;
}
inline __m256i round_bf16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0)), nan));
}
inline void f_store_bf16(uint16_t* p, F v) {
    const __m256i both = _mm256_packus_epi32(round_bf16(v.a), round_bf16(v.b));  // a0-3 b0-3 a4-7 b4-7
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
}
inline void f_store_half(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}

inline I i_set(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline I i_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I i_mul(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline I i_sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I i_times8(I v) { return {_mm256_slli_epi32(v.a, 3), _mm256_slli_epi32(v.b, 3)}; }
inline I i_times128(I v) { return {_mm256_slli_epi32(v.a, 7), _mm256_slli_epi32(v.b, 7)}; }
inline I i_over128(I v) { return {_mm256_srai_epi32(v.a, 7), _mm256_srai_epi32(v.b, 7)}; }  // rounded down
inline I i_load(const int32_t* p) {
    const auto* both = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(both), _mm256_loadu_si256(both + 1)};
}
inline I i_load_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline I i_round(F v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
inline int32_t i_sum(I v) {
    int32_t lanes[8], total = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(v.a, v.b));
    for (int32_t lane : lanes) total += lane;
    return total;
}
inline void i_store_i8(int8_t* p, I v, bool pairs) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (pairs) bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline Line line_load(const void* p) {
    const auto* both = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(both), _mm256_loadu_si256(both + 1)};
}
inline void line_store(void* p, Line v) {
    auto* both = static_cast<__m256i*>(p);
    _mm256_storeu_si256(both, v.a);
    _mm256_storeu_si256(both + 1, v.b);
}
inline Line line_low(Line v) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}
inline Line line_high(Line v) { return line_low({_mm256_srli_epi16(v.a, 4), _mm256_srli_epi16(v.b, 4)}); }

template <int Bits>
inline __m256i dot4_half(__m256i acc, __m256i line, __m256i x) {
    const __m256i ones = _mm256_set1_epi16(1);
    // pairs are summed in 16 bits, which holds 2 x 15 x 127 but not 2 x 255 x 127: eight bits go in two parts
    if constexpr (Bits == 4) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(line, x), ones));
    const __m256i low = _mm256_and_si256(line, _mm256_set1_epi8(0x7f));
    const __m256i top = _mm256_and_si256(_mm256_srli_epi16(line, 7), _mm256_set1_epi8(1));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), _mm256_set1_epi16(128)));
}

template <int Bits>
inline I dot4(I acc, Line line, const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    const __m256i wide = _mm256_set1_epi32(word);
    return {dot4_half<Bits>(acc.a, line.a, wide), dot4_half<Bits>(acc.b, line.b, wide)};
}

inline __m256i dot4_signed_half(__m256i acc, __m256i line, __m256i x) {
    // 2 x 128 x 127 fits in 16 bits
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, line), _mm256_set1_epi16(1)));
}

inline I dot4_signed(I acc, Line line, const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    const __m256i wide = _mm256_set1_epi32(word);
    return {dot4_signed_half(acc.a, line.a, wide), dot4_signed_half(acc.b, line.b, wide)};
}

inline void line_bf16(Line v, F& first, F& second) {
    const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(v.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(v.b, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(v.a, top)), _mm256_castsi256_ps(_mm256_and_si256(v.b, top))};
}

inline F dot2(F acc, Line line, const uint16_t* x) {
    uint32_t word;
    std::memcpy(&word, x, 4);
    const auto wide = [](uint32_t bits) {
        float value;
        std::memcpy(&value, &bits, 4);
        return f_set(value);
    };
    F first, second;
    line_bf16(line, first, second);
    return f_fma(second, wide(word & 0xffff0000u), f_fma(first, wide(word << 16), acc));
}

inline void line_half(Line v, F& first, F& second) {
    uint16_t words[32], even[16], odd[16];
    line_store(words, v);
    for (int i = 0; i < 16; ++i) {
        even[i] = words[2 * i];
        odd[i] = words[2 * i + 1];
    }
    first = f_load_half(even);
    second = f_load_half(odd);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
