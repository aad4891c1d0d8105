// Weights in codes as the way back through a linear wants them: lines of sixteen inputs with two of its outputs each, in
// bfloat16.
#pragma once

#include "kernels.h"

namespace {

using qwenlet::kTile;
using qwenlet::TileWeight;

// Eight registers, each with 8 words of column i and 8 of column i + 8, to eight with word j of all sixteen.
inline void back_turn(__m512i r[8]) {
    __m512i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_permutex2var_epi64(r[i], low, r[i + 4]);
        t[i + 4] = _mm512_permutex2var_epi64(r[i], high, r[i + 4]);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// One line for each of `pairs` pairs of outputs from `pair` on, of sixteen inputs from `column` on, `apart` bytes from
// line to line. A tile has eight pairs of outputs, so pair and pairs are multiples of eight.
template <int Bits>
void back_lines_codes(const TileWeight& w, int64_t pair, int64_t pairs, int64_t column, char* to, int64_t apart) {
    constexpr int kPerWord = 32 / Bits;
    const int64_t groups = w.k / w.group, group = column / w.group, words = w.k / kPerWord;
    const __m512i mask = _mm512_set1_epi32((1 << Bits) - 1);
    for (int64_t p = 0; p < pairs; p += 8) {
        const int64_t tile = (pair + p) / 8, at = (tile * groups + group) * kTile;
        const uint8_t* lines = w.weight + (tile * words + column / kPerWord) * 64;
        const __m512 scale = f_load_half(w.scales + at);
        const __m512i zero = w.minimums ? i_set(0) : w.zeros ? i_load_u8(w.zeros + at) : i_set(1 << (Bits - 1));
        const __m512 minimum = w.minimums ? f_load_half(w.minimums + at) : f_set(0.0f);
        __m256i values[kTile];
#pragma GCC unroll 4
        for (int l = 0; l < kTile / kPerWord; ++l) {
            const __m512i line = _mm512_loadu_si512(lines + l * 64);
#pragma GCC unroll 8
            for (int j = 0; j < kPerWord; ++j) {
                const __m512i code = _mm512_and_si512(_mm512_srli_epi32(line, static_cast<unsigned>(j * Bits)), mask);
                const __m512 worth = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero)), scale);
                values[l * kPerWord + j] =
                    reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_add_ps(worth, minimum)));
            }
        }
        __m512i r[8];
        for (int i = 0; i < 8; ++i)
            r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(values[i]), values[i + 8], 1);
        back_turn(r);
        for (int i = 0; i < 8; ++i) _mm512_store_si512(to + (p + i) * apart, r[i]);
    }
}

}  // namespace
