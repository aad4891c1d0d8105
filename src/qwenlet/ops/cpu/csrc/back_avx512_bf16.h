// The way back through a linear of many rows, out = g W, by bfloat16 products whose weights become floats in the first
// cache. Sixteen inputs of the linear stand side by side in a register, with two of its outputs each; a stretch of the
// weight for some such registers is unpacked once and used for all rows, some at a time in registers.
#pragma once

#include "back_lines.h"
#include "kernels.h"

namespace {

using qwenlet::kBackPairs;
using qwenlet::kBackRows;

constexpr int kBackTiles = 4;  // registers of sixteen inputs side by side

// Sums [rows, tiles, 16] go on by `pairs` products of g [pairs, kBackRows] words and lines [pairs, kBackTiles, 64].
inline void back_block(const uint32_t* g, const char* lines, int64_t pairs, float* sums, bool first) {
    __m512 acc[kBackRows][kBackTiles];
#pragma GCC unroll 8
    for (int r = 0; r < kBackRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kBackTiles; ++c)
            acc[r][c] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (r * kBackTiles + c) * kTile);
    for (int64_t p = 0; p < pairs; ++p) {
        __m512i line[kBackTiles];
#pragma GCC unroll 8
        for (int c = 0; c < kBackTiles; ++c) line[c] = _mm512_load_si512(lines + (p * kBackTiles + c) * 64);
#pragma GCC unroll 8
        for (int r = 0; r < kBackRows; ++r) {
            const __m512i word = _mm512_set1_epi32(static_cast<int>(g[p * kBackRows + r]));
#pragma GCC unroll 8
            for (int c = 0; c < kBackTiles; ++c)
                asm("vdpbf16ps %2, %1, %0" : "+v"(acc[r][c]) : "v"(word), "v"(line[c]));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kBackRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kBackTiles; ++c) _mm512_storeu_ps(sums + (r * kBackTiles + c) * kTile, acc[r][c]);
}

// As back_lines_codes, of bfloat16 row by row.
inline void back_lines_rows(const TileWeight& w, int64_t pair, int64_t pairs, int64_t column, char* to, int64_t apart) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(w.weight) + 2 * pair * w.k + column;
    for (int64_t p = 0; p < pairs; ++p, row += 2 * w.k) {
        const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
        const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + w.k)));
        _mm512_store_si512(to + p * apart, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
}

void back(const TileWeight& w, const uint32_t* g, int64_t rows, int64_t begin, int64_t end, int bits, void* out,
          char* scratch) {
    constexpr int64_t kWide = kBackTiles * kTile, kLine = kBackTiles * 64, kPanel = kBackPairs * kLine;
    const int64_t panels = (end - begin + kWide - 1) / kWide, blocks = (rows + kBackRows - 1) / kBackRows;
    const int64_t all = w.n / 2, per_panel = blocks * kBackRows * kWide;
    float* sums = reinterpret_cast<float*>(scratch + panels * kPanel);
    for (int64_t pair = 0; pair < all; pair += kBackPairs) {
        const int64_t pairs = all - pair < kBackPairs ? all - pair : kBackPairs;
        for (int64_t column = begin; column < end; column += kTile) {
            const int64_t tile = (column - begin) / kTile;
            char* to = scratch + tile / kBackTiles * kPanel + tile % kBackTiles * 64;
            if (w.bits == 4)
                back_lines_codes<4>(w, pair, pairs, column, to, kLine);
            else if (w.bits == 8)
                back_lines_codes<8>(w, pair, pairs, column, to, kLine);
            else
                back_lines_rows(w, pair, pairs, column, to, kLine);
        }
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t b = 0; b < blocks; ++b)
                back_block(g + (b * all + pair) * kBackRows, scratch + panel * kPanel, pairs,
                           sums + panel * per_panel + b * kBackRows * kWide, pair == 0);
    }
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = begin; column < end; column += kTile) {
            const __m512 sum = _mm512_loadu_ps(sums + (column - begin) / kWide * per_panel + row * kWide + (column - begin) % kWide);
            const int64_t at = row * w.k + column;
            if (bits == 32)
                _mm512_storeu_ps(static_cast<float*>(out) + at, sum);
            else
                f_store_bf16(static_cast<uint16_t*>(out) + at, sum);
        }
}

}  // namespace
