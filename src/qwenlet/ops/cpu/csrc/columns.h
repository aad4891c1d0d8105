// Columns of a weight in tiles as floats, for the way back through a linear: one row of n outputs for each column, so that
// the sixteen outputs of a line stay side by side and nothing is turned.
#pragma once

#include <algorithm>

#include "bf16.h"
#include "kernels.h"

namespace {

using qwenlet::kTile;
using qwenlet::TileWeight;

// One column of sixteen outputs; the last tile has fewer.
template <bool Whole>
inline void put_column(const float* values, int64_t rows, uint16_t* out) {
    uint32_t raw[kTile];
    uint16_t words[kTile];
    std::memcpy(raw, values, 64);
    for (int i = 0; i < kTile; ++i) words[i] = static_cast<uint16_t>((raw[i] + 0x7fffu + ((raw[i] >> 16) & 1)) >> 16);
    std::memcpy(out, words, Whole ? 32 : static_cast<size_t>(rows) * 2);  // no NaN among weights
}

template <bool Whole>
inline void put_column(const float* values, int64_t rows, float* out) {
    std::memcpy(out, values, Whole ? 64 : static_cast<size_t>(rows) * 4);
}

template <int Bits, bool Whole, class T>
void columns_of_tile(const TileWeight& w, int64_t tile, int64_t begin, int64_t end, int64_t first, T* out) {
    constexpr int kPerWord = 32 / Bits;
    constexpr bool kCodes = Bits == 4 || Bits == 8;
    const int64_t groups = kCodes ? w.k / w.group : 0, rows = w.n - tile * kTile;
    const uint8_t* lines = w.weight + tile * (w.k / kPerWord) * 64;
    T* to = out + tile * kTile;
    float values[kTile], scale[kTile] = {}, minimum[kTile] = {};
    int32_t zero[kTile] = {};
    int64_t group_end = 0;
    for (int64_t column = begin; column < end; column += kPerWord) {
        uint32_t line[kTile];
        std::memcpy(line, lines + column / kPerWord * 64, 64);
        if (kCodes && column >= group_end) {
            const int64_t group = column / w.group, at = (tile * groups + group) * kTile;
            group_end = (group + 1) * w.group;
            f_store(scale, f_load_half(w.scales + at));
            if (w.minimums) f_store(minimum, f_load_half(w.minimums + at));
            for (int i = 0; i < kTile; ++i) zero[i] = w.minimums ? 0 : w.zeros ? w.zeros[at + i] : 1 << (Bits % 32 - 1);
        }
        for (int j = 0; j < kPerWord; ++j) {
            if constexpr (Bits == 32) {
                std::memcpy(values, line, 64);
            } else if constexpr (Bits == 16) {
                uint32_t wide[kTile];
                for (int i = 0; i < kTile; ++i) wide[i] = j ? line[i] & 0xffff0000u : line[i] << 16;
                std::memcpy(values, wide, 64);
            } else {
                for (int i = 0; i < kTile; ++i) {
                    const int32_t code = static_cast<int32_t>((line[i] >> (j * Bits)) & ((1u << Bits) - 1)) - zero[i];
                    values[i] = static_cast<float>(code) * scale[i] + minimum[i];
                }
            }
            put_column<Whole>(values, rows, to + (column + j - first) * w.n);
        }
    }
}

template <int Bits>
void columns_of_bits(const TileWeight& w, int64_t tile, int64_t begin, int64_t end, int64_t first, int bits, void* out) {
    const bool whole = (tile + 1) * kTile <= w.n;
    const auto put = [&](auto* to) {
        whole ? columns_of_tile<Bits, true>(w, tile, begin, end, first, to)
              : columns_of_tile<Bits, false>(w, tile, begin, end, first, to);
    };
    bits == 32 ? put(static_cast<float*>(out)) : put(static_cast<uint16_t*>(out));
}

// Columns [begin, end) of tile `tile` to rows begin - first, ... of out [*, n], in bfloat16 (bits 16) or float32 (32).
void columns_of(const TileWeight& w, int64_t tile, int64_t begin, int64_t end, int64_t first, int bits, void* out) {
    switch (w.bits) {
        case 4: return columns_of_bits<4>(w, tile, begin, end, first, bits, out);
        case 8: return columns_of_bits<8>(w, tile, begin, end, first, bits, out);
        case 16: return columns_of_bits<16>(w, tile, begin, end, first, bits, out);
        default: return columns_of_bits<32>(w, tile, begin, end, first, bits, out);
    }
}

}  // namespace
