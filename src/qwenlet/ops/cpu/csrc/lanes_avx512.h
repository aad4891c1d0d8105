// Sixteen lanes in one AVX-512 register. Needs F, BW, VL, VNNI; bfloat16 products use its extension where it is compiled in.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "ahead.h"

namespace {

using F = __m512;
using I = __m512i;
using Line = __m512i;

// rows (of eight-bit weights, which keep two sums) and tiles of a block in registers; tiles streamed side by side for one
// row, and sums of each; rows and tiles of a pass that streams for several, and sums of each; rows up to which passes are
// quicker than blocks, of four-bit weights and of others; tiles of a cache page side by side, for one row and for two.
// Processors with AMX want more streams and leave many rows to it; on a Zen 4 one stream is best, and registers full of
// rows, for which every line is fetched (measured).
constexpr int kGemmRows = 6, kGemmRowsOfBytes = 4, kGemmTiles = 2, kStreamHalves = 2;
#if defined(__AMX_TILE__)
constexpr int kGemvTiles = 4, kGemvSums = 1, kStreamRows = 4, kStreamTiles = 2, kPageTiles = 4;
constexpr int64_t kStreamedRows = 8, kStreamedRowsOfOthers = 8;
constexpr Ahead kCodesAhead{2048, 1, true}, kCodesOfRowsAhead = kCodesAhead;
constexpr Ahead kFloatsAhead{2048, 1, true}, kFloatsOfRowsAhead = kFloatsAhead, kPagesAhead{8192, 1, false};
#else
constexpr int kGemvTiles = 1, kGemvSums = 2, kStreamRows = 8, kStreamTiles = 1, kPageTiles = 1;
constexpr int64_t kStreamedRows = 32, kStreamedRowsOfOthers = 16;
constexpr Ahead kCodesAhead{8192, 2, false}, kCodesOfRowsAhead{6144, 1, false};
constexpr Ahead kFloatsAhead{8192, 4, false}, kFloatsOfRowsAhead{6144, 1, false}, kPagesAhead{6144, 2, false};
#endif
constexpr int kPageTilesOfTwo = 4;
// rows and tiles of a block of float32
constexpr int kFp32Rows = 6, kFp32Tiles = 4;

inline F f_set(float v) { return _mm512_set1_ps(v); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F f_load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F f_load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
inline F f_abs(F a) { return _mm512_abs_ps(a); }
// of magnitudes, whose bits are in their order: infinity above numbers, what is no number above infinity
inline F f_larger(F a, F b) { return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); }
inline float f_largest(F a) {  // lanes together as f_larger does
    const __m256i eight = _mm256_max_epi32(_mm256_castps_si256(_mm512_castps512_ps256(a)),
                                           _mm512_extracti64x4_epi64(_mm512_castps_si512(a), 1));
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}
inline F f_round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F f_pow2(F whole) { return _mm512_scalef_ps(f_set(1.0f), whole); }
inline F f_from(I v) { return _mm512_cvtepi32_ps(v); }
// Sixteen lanes added, and the largest of them: halves together again and again, an order that all instruction sets have.
inline float f_sum(F v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float f_highest(F v) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
// lanes below `count` as they are, the others `other`
inline F f_first(F a, int count, float other) {
    const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
    return _mm512_mask_blend_ps(mask, f_set(other), a);
}
// lanes of at least `least` as they are, the others zero
inline F f_from_least(F a, F least) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, least, _CMP_GE_OQ), a); }
// writes `first` + lane for lanes in [low, high), at most 16 of them, though 16 places are written over; returns how many
inline int64_t f_places_between(F a, F low, F high, int32_t first, int32_t* to) {
    const __mmask16 mask = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(a, low, _CMP_GE_OQ), a, high, _CMP_LT_OQ);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // packed in a register first: straight to memory some processors take a hundred cycles
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
    return __builtin_popcount(mask);
}
inline void f_store_bf16(uint16_t* p, F v) {
    I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline void f_store_half(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline I i_set(int32_t v) { return _mm512_set1_epi32(v); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I i_mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I i_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I i_times8(I v) { return _mm512_slli_epi32(v, 3); }
inline I i_times128(I v) { return _mm512_slli_epi32(v, 7); }
inline I i_over128(I v) { return _mm512_srai_epi32(v, 7); }  // rounded down
inline I i_load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline I i_load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline I i_round(F v) { return _mm512_cvtps_epi32(v); }
inline int32_t i_sum(I v) { return _mm512_reduce_add_epi32(v); }
inline void i_store_i8(int8_t* p, I v, bool pairs) {
    __m128i bytes = _mm512_cvtepi32_epi8(v);
    if (pairs) bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline Line line_load(const void* p) { return _mm512_loadu_si512(p); }
inline void line_store(void* p, Line v) { _mm512_storeu_si512(p, v); }
inline Line line_low(Line v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Line line_high(Line v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }

// acc[lane] += sum over i < 4 of unsigned byte line[4 lane + i] times signed byte x[i]
template <int Bits>
inline I dot4(I acc, Line line, const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    // written out: as an intrinsic the compiler copies the accumulator to a second register and back
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(line), "v"(_mm512_set1_epi32(word)));
    return acc;
}

// The same of signed bytes of the line and x[i] from 0 to 127.
inline I dot4_signed(I acc, Line line, const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    asm("vpdpbusd %1, %2, %0" : "+v"(acc) : "v"(line), "v"(_mm512_set1_epi32(word)));
    return acc;
}

// acc[lane] += line[2 lane] x[0] + line[2 lane + 1] x[1] in bfloat16
inline F dot2(F acc, Line line, const uint16_t* x) {
    uint32_t word;
    std::memcpy(&word, x, 4);
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(line), reinterpret_cast<__m512bh>(_mm512_set1_epi32(word)));
#else
    const F first = _mm512_castsi512_ps(_mm512_slli_epi32(line, 16));
    const F second = _mm512_castsi512_ps(_mm512_and_si512(line, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    acc = _mm512_fmadd_ps(first, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(word << 16))), acc);
    return _mm512_fmadd_ps(second, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(word & 0xffff0000u))), acc);
#endif
}

// The two numbers of each lane of a line of bfloat16 or float16.
inline void line_bf16(Line v, F& first, F& second) {
    first = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void line_half(Line v, F& first, F& second) {
    first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
    second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // into the second cache

inline bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace
