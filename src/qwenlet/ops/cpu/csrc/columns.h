// Columns of a weight in tiles as floats, for the way back through a linear: one row of n outputs for each column, so that
// the sixteen outputs of a line stay side by side and nothing is turned.
#pragma once

#include <algorithm>

#include "bf16.h"
#include "kernels.h"

namespace {

using qwenlet::kTile;
using qwenlet::TileWeight;

// One column of sixteen rows to `out`, of which `rows` are there.
inline void put_column(const float* values, int64_t rows, int bits, void* out, int64_t at) {
    if (bits == 32) {
        std::memcpy(static_cast<float*>(out) + at, values, static_cast<size_t>(rows) * 4);
        return;
    }
    uint16_t words[kTile];
    for (int i = 0; i < kTile; ++i) {
        uint32_t raw;
        std::memcpy(&raw, values + i, 4);
        words[i] = static_cast<uint16_t>((raw + 0x7fffu + ((raw >> 16) & 1)) >> 16);  // weights are finite
    }
    std::memcpy(static_cast<uint16_t*>(out) + at, words, static_cast<size_t>(rows) * 2);
}

// Columns [begin, end) of tile `tile` to rows begin - first, ... of out [*, n], in bfloat16 (bits 16) or float32 (32).
inline void columns_of(const TileWeight& w, int64_t tile, int64_t begin, int64_t end, int64_t first, int bits, void* out) {
    const int64_t per_word = 32 / w.bits, groups = w.group ? w.k / w.group : 0, rows = std::min<int64_t>(kTile, w.n - tile * kTile);
    const uint8_t* lines = w.weight + tile * (w.k / per_word) * 64;
    float values[kTile], scale[kTile] = {}, minimum[kTile] = {};
    int32_t zero[kTile] = {};
    int64_t group = -1;
    for (int64_t word = begin / per_word; word < end / per_word; ++word) {
        uint32_t line[kTile];
        std::memcpy(line, lines + word * 64, 64);
        if (w.group && word * per_word / w.group != group) {
            group = word * per_word / w.group;
            const int64_t at = (tile * groups + group) * kTile;
            f_store(scale, f_load_half(w.scales + at));
            if (w.minimums) f_store(minimum, f_load_half(w.minimums + at));
            for (int i = 0; i < kTile; ++i) zero[i] = w.minimums ? 0 : w.zeros ? w.zeros[at + i] : 1 << (w.bits - 1);
        }
        for (int64_t j = 0; j < per_word; ++j) {
            if (w.bits == 32) {
                std::memcpy(values, line, 64);
            } else if (w.bits == 16) {
                uint32_t wide[kTile];
                for (int i = 0; i < kTile; ++i) wide[i] = j ? line[i] & 0xffff0000u : line[i] << 16;
                std::memcpy(values, wide, 64);
            } else {
                const uint32_t shift = static_cast<uint32_t>(j) * static_cast<uint32_t>(w.bits), mask = (1u << w.bits) - 1;
                for (int i = 0; i < kTile; ++i) {
                    const int32_t code = static_cast<int32_t>((line[i] >> shift) & mask) - zero[i];
                    values[i] = static_cast<float>(code) * scale[i] + minimum[i];
                }
            }
            put_column(values, rows, bits, out, (word * per_word + j - first) * w.n + tile * kTile);
        }
    }
}

}  // namespace
