// Linears over float32 weights in tiles. A sum goes on in one chain over a stretch of columns, and stretches are added in
// their order: a rule without rows, tiles or threads in it, so a row is the same bits in any company. Short chains also
// round less than one over all columns. One row streams best as many do, several tiles side by side, whose sums needn't
// wait for each other.
#pragma once

#include "kernels.h"
#include "tile_results.h"

namespace {

using qwenlet::Inputs;

// Columns of a stretch: four tiles of them are half of a 32 KiB cache.
constexpr int64_t kFp32Stretch = 64;

// R rows and C tiles over one stretch, added to `sums` [R, C, 16].
template <int R, int C>
void fp32_block(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t columns, float* sums) {
    F acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = f_set(0.0f);
    for (int64_t k = 0; k < columns; ++k) {
        F line[C];
        for (int c = 0; c < C; ++c) line[c] = f_load(w + c * w_stride + k * kTile);
        for (int r = 0; r < R; ++r) {
            const F value = f_set(x[r * x_stride + k]);
            for (int c = 0; c < C; ++c) acc[r][c] = f_fma(line[c], value, acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float* sum = sums + (r * C + c) * kTile;
            f_store(sum, f_add(f_load(sum), acc[r][c]));
        }
}

// All of `rows`, R at a time, and fewer at the end.
template <int R, int C>
void fp32_rows(int64_t rows, const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t columns,
               float* sums) {
    int64_t row = 0;
    for (; row + R <= rows; row += R)
        fp32_block<R, C>(x + row * x_stride, x_stride, w, w_stride, columns, sums + row * C * kTile);
    if constexpr (R > 1)
        fp32_rows<R - 1, C>(rows - row, x + row * x_stride, x_stride, w, w_stride, columns, sums + row * C * kTile);
}

template <int C>
void fp32_tiles(const TileWeight& w, const Inputs& x, int64_t rows, int64_t tile, float* y, int64_t stride, bool add,
                char* scratch) {
    const int64_t w_stride = w.k * kTile;
    const float* weight = reinterpret_cast<const float*>(w.weight) + tile * w_stride;
    float* sums = reinterpret_cast<float*>(scratch);  // [rows, C, 16]
    for (int64_t i = 0; i < rows * C; ++i) f_store(sums + i * kTile, f_set(0.0f));
    for (int64_t k = 0; k < w.k; k += kFp32Stretch) {
        const int64_t columns = w.k - k < kFp32Stretch ? w.k - k : kFp32Stretch;
        fp32_rows<kFp32Rows, C>(rows, x.fp32 + k, w.k, weight + k * kTile, w_stride, columns, sums);
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < C; ++c) put(w, tile + c, f_load(sums + (r * C + c) * kTile), y + r * stride, add);
}

// C tiles at a time, and fewer at the end.
template <int C>
void fp32_range(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
                bool add, char* scratch) {
    int64_t tile = begin;
    for (; tile + C <= end; tile += C) fp32_tiles<C>(w, x, rows, tile, y, stride, add, scratch);
    if constexpr (C > 1) fp32_range<C / 2>(w, x, rows, tile, end, y, stride, add, scratch);
}

void linear_fp32(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
                 bool add, char* scratch) {
    fp32_range<kFp32Tiles>(w, x, rows, begin, end, y, stride, add, scratch);
}

}  // namespace
