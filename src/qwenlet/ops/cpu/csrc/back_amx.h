// The way back through a linear in codes by AMX: sixteen lines (sixteen inputs, two outputs of each) are a register of
// weights as they are, and the outputs' gradients are read where they lie. For weights in bfloat16 torch is as quick.
#pragma once

#include "back_lines.h"
#include "linear_amx.h"

namespace {

using qwenlet::kAmxBackPairs;

// Up to 32 rows and C tiles of sixteen inputs: sums [tile, rows, 16] go on by `pairs` products, a multiple of sixteen.
template <int C>
inline void back_amx_tiles(const uint32_t* g, int64_t all, const char* lines, int64_t pairs, float* sums, int64_t apart,
                           bool both, bool first) {
    if (first) {
        amx_zero<0>();
        if (C == 2) amx_zero<1>();
        if (both) amx_zero<2>();
        if (both && C == 2) amx_zero<3>();
    } else {
        amx_load<0>(sums, 64);
        if (C == 2) amx_load<1>(sums + apart, 64);
        if (both) amx_load<2>(sums + 16 * kTile, 64);
        if (both && C == 2) amx_load<3>(sums + apart + 16 * kTile, 64);
    }
    for (int64_t p = 0; p < pairs; p += 16) {
        amx_load<6>(lines + p * 64, 64);
        amx_load<4>(g + p, all * 4);
        amx_product<16, 0, 4, 6>();
        if (C == 2) {
            amx_load<7>(lines + (kAmxBackPairs + p) * 64, 64);
            amx_product<16, 1, 4, 7>();
        }
        if (!both) continue;
        amx_load<5>(g + 16 * all + p, all * 4);
        amx_product<16, 2, 5, 6>();
        if (C == 2) amx_product<16, 3, 5, 7>();
    }
    amx_store<0>(sums, 64);
    if (C == 2) amx_store<1>(sums + apart, 64);
    if (both) amx_store<2>(sums + 16 * kTile, 64);
    if (both && C == 2) amx_store<3>(sums + apart + 16 * kTile, 64);
}

void back_amx(const TileWeight& w, const uint32_t* g, int64_t rows, int64_t begin, int64_t end, int bits, void* out,
              char* scratch) {
    const int64_t tiles = (end - begin) / kTile, all = w.n / 2, apart = rows * kTile;
    float* sums = reinterpret_cast<float*>(scratch + tiles * kAmxBackPairs * 64);
    AmxShape shape(64);
    for (int64_t pair = 0; pair < all; pair += kAmxBackPairs) {
        const int64_t pairs = all - pair < kAmxBackPairs ? all - pair : kAmxBackPairs;
        for (int64_t t = 0; t < tiles; ++t) {
            char* to = scratch + t * kAmxBackPairs * 64;
            if (w.bits == 4)
                back_lines_codes<4>(w, pair, pairs, begin + t * kTile, to, 64);
            else
                back_lines_codes<8>(w, pair, pairs, begin + t * kTile, to, 64);
        }
        for (int64_t row = 0; row < rows; row += 32) {
            const int64_t some = rows - row < 32 ? rows - row : 32;
            const bool both = some > 16;
            shape.fit(static_cast<int>(both ? 16 : some), static_cast<int>(both ? some - 16 : 1));
            const uint32_t* from = g + row * all + pair;
            int64_t t = 0;
            for (; t + 2 <= tiles; t += 2)
                back_amx_tiles<2>(from, all, scratch + t * kAmxBackPairs * 64, pairs, sums + t * apart + row * kTile, apart,
                                  both, pair == 0);
            if (t < tiles)
                back_amx_tiles<1>(from, all, scratch + t * kAmxBackPairs * 64, pairs, sums + t * apart + row * kTile, apart,
                                  both, pair == 0);
        }
    }
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t t = 0; t < tiles; ++t) {
            const __m512 sum = _mm512_loadu_ps(sums + t * apart + row * kTile);
            const int64_t at = row * w.k + begin + t * kTile;
            if (bits == 32)
                _mm512_storeu_ps(static_cast<float*>(out) + at, sum);
            else
                f_store_bf16(static_cast<uint16_t*>(out) + at, sum);
        }
}

}  // namespace
