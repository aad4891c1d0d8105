// Linears over weights in tiles: sixteen outputs a register, so no sum ever crosses lanes. Float32 is in linear_fp32.h.
//
// A few rows stream the weights and unpack them on the way, as many at a time as registers take. Many rows go in blocks: a
// stretch of columns of one or two tiles is unpacked into the first cache and used for all rows. Both sum whole numbers
// exactly within a group and the groups in float32 in their order, so both give a row the same bits.
#pragma once

#include "kernels.h"
#include "linear_fp32.h"
#include "tile_results.h"

namespace {

using qwenlet::Inputs;

// What stands for the weights' zero: 2^(bits - 1), points, or a minimum.
enum class Zero { kConstant, kPoints, kMinimum };

// acc += (dot - zero * sum) * scale (or + minimum * sum): the one place where whole numbers become floats. `at` is the group's
// place in the weight's tables, `sum` that of the codes, which came to `dot`.
template <int Bits, Zero Z>
inline F group_end(F acc, I dot, const TileWeight& w, int64_t at, F scale, float input_scale, int32_t sum) {
    const I codes = i_set(sum);
    if (Z == Zero::kConstant) dot = i_sub(dot, Bits == 8 ? i_times128(codes) : i_times8(codes));
    if (Z == Zero::kPoints) dot = i_sub(dot, i_mul(i_load_u8(w.zeros + at), codes));
    acc = f_fma(f_from(dot), f_mul(scale, f_set(input_scale)), acc);
    if (Z == Zero::kMinimum) acc = f_fma(f_load_half(w.minimums + at), f_set(static_cast<float>(sum) * input_scale), acc);
    return acc;
}

// Codes of a group's columns take so many bytes each.
template <int Bits>
constexpr int64_t kCodeBytes = Bits == 8 ? 2 : 1;

// Codes that meet a line of weights: of four-bit ones 8, of eight-bit ones 4 and as many low parts a group further on.
template <int Bits>
constexpr int64_t kLineCodes = Bits == 8 ? 4 : 8;

// Sums of one group: for 15-bit inputs their high and low parts apart; for four-bit weights U lines, and of each the H
// halves.
template <int Bits, int U, int H = 1>
struct Sums {
    static constexpr int kParts = Bits == 8 ? 2 : U * H;
    I part[kParts];

    Sums() {
        for (int i = 0; i < kParts; ++i) part[i] = i_set(0);
    }
    // one line of eight-bit weights, or the two halves of four-bit ones
    void add(int u, Line first, Line second, const int8_t* codes, int64_t group) {
        if constexpr (Bits == 8) {
            part[0] = dot4<8>(part[0], first, codes + group);
            part[1] = dot4<8>(part[1], first, codes);
        } else {
            part[u * H] = dot4<4>(part[u * H], first, codes);
            part[u * H + H - 1] = dot4<4>(part[u * H + H - 1], second, codes + 4);
        }
    }
    I total() const {
        if constexpr (Bits == 8) return i_add(part[0], i_times128(part[1]));
        I all = part[0];
        for (int i = 1; i < kParts; ++i) all = i_add(all, part[i]);
        return all;
    }
};

inline void fetch_ahead(const Ahead& how, const uint8_t* line, int64_t number) {
    if (how.bytes && number % how.every == 0) how.near ? prefetch(line + how.bytes) : prefetch_far(line + how.bytes);
}

// R rows, C tiles, weights streamed. Neighbouring lines go to U sums of their own, so that products needn't wait for each
// other: whole numbers add up the same in any order.
template <int Bits, Zero Z, int R, int C, int U, int H>
void stream_quant(const TileWeight& w, const Inputs& x, int64_t row, int64_t tile, float* y, int64_t stride, bool add) {
    const int64_t groups = w.k / w.group, lines = w.group * Bits / 32, span = w.k * Bits / 32 * 64;
    F acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = f_set(0.0f);
    const uint8_t* at[C];
    for (int c = 0; c < C; ++c) at[c] = w.weight + (tile + c) * span;
    for (int64_t g = 0; g < groups; ++g) {
        const int8_t* codes[R];
        Sums<Bits, U, H> dot[R][C];
        for (int r = 0; r < R; ++r) codes[r] = x.codes + ((row + r) * x.k + g * w.group) * kCodeBytes<Bits>;
        for (int64_t l = 0; l < lines; l += U)
            for (int c = 0; c < C; ++c)
                for (int u = 0; u < U; ++u) {
                    fetch_ahead(R == 1 ? kCodesAhead : kCodesOfRowsAhead, at[c] + (l + u) * 64, l + u);
                    const Line line = line_load(at[c] + (l + u) * 64);
                    const Line first = Bits == 4 ? line_low(line) : line, second = Bits == 4 ? line_high(line) : line;
                    for (int r = 0; r < R; ++r) dot[r][c].add(u, first, second, codes[r] + (l + u) * kLineCodes<Bits>, w.group);
                }
        for (int c = 0; c < C; ++c) {
            const int64_t group_at = ((tile + c) * groups + g) * kTile;
            const F scale = f_load_half(w.scales + group_at);
            for (int r = 0; r < R; ++r) {
                const int64_t input_at = (row + r) * groups + g;
                acc[r][c] = group_end<Bits, Z>(acc[r][c], dot[r][c].total(), w, group_at, scale, x.scales[input_at],
                                               x.sums[input_at]);
            }
            at[c] += lines * 64;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) put(w, tile + c, acc[r][c], y + (row + r) * stride, add);
}

// The same for bfloat16 weights.
template <int R, int C>
void stream_bf16(const TileWeight& w, const Inputs& x, int64_t row, int64_t tile, float* y, int64_t stride, bool add) {
    const int64_t lines = w.k / 2;
    F acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = f_set(0.0f);
    for (int64_t l = 0; l < lines; ++l)
        for (int c = 0; c < C; ++c) {
            const uint8_t* at = w.weight + ((tile + c) * lines + l) * 64;
            fetch_ahead(R == 1 ? kFloatsAhead : kFloatsOfRowsAhead, at, l);
            const Line line = line_load(at);
            for (int r = 0; r < R; ++r) acc[r][c] = dot2(acc[r][c], line, x.bf16 + (row + r) * x.k + 2 * l);
        }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) put(w, tile + c, acc[r][c], y + (row + r) * stride, add);
}

// Rows of a pass, at most R of them.
template <int Bits, Zero Z, int C, int R>
inline void stream(int64_t rows, const TileWeight& w, const Inputs& x, int64_t row, int64_t tile, float* y, int64_t stride,
                   bool add) {
    // few rows have sums of their own for the halves of a byte, so that products needn't wait for each other
    constexpr int kHalves = R == 1 || R > 4 ? 1 : kStreamHalves;
    if constexpr (R > 1)
        if (rows < R) return stream<Bits, Z, C, R - 1>(rows, w, x, row, tile, y, stride, add);
    if constexpr (Bits == 16)
        stream_bf16<R, C>(w, x, row, tile, y, stride, add);
    else
        stream_quant<Bits, Z, R, C, R == 1 && Bits == 4 ? kGemvSums : 1, kHalves>(w, x, row, tile, y, stride, add);
}

// All rows, in passes that are as even as they can be: each unpacks the weights anew, all but the first out of a cache.
template <int Bits, Zero Z, int C>
void stream_rows(const TileWeight& w, const Inputs& x, int64_t rows, int64_t tile, float* y, int64_t stride, bool add) {
    for (int64_t passes = (rows + kStreamRows - 1) / kStreamRows, row = 0; passes > 0; --passes) {
        const int64_t some = (rows - row + passes - 1) / passes;
        stream<Bits, Z, C, kStreamRows>(some, w, x, row, tile, y, stride, add);
        row += some;
    }
}

template <int Bits, Zero Z>
void stream_tiles(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
                  bool add) {
    int64_t tile = begin;
    if (rows == 1)
        for (; tile + kGemvTiles <= end; tile += kGemvTiles)
            stream<Bits, Z, kGemvTiles, 1>(1, w, x, 0, tile, y, stride, add);
    else
        for (; tile + kStreamTiles <= end; tile += kStreamTiles)
            stream_rows<Bits, Z, kStreamTiles>(w, x, rows, tile, y, stride, add);
    for (; tile < end; ++tile) stream_rows<Bits, Z, 1>(w, x, rows, tile, y, stride, add);
}

// ------------------------------------------------------------------------------------------------- many rows

// Columns of a stretch: two tiles of them, unpacked, are half of a 32 KiB cache.
constexpr int64_t kStretch = 512;

// One block of R rows over one stretch of C tiles: `sums` [R, C, 16] go on from the stretch before.
//   lines: [C, columns / 4, 64] unpacked bytes, or for bfloat16 [C, columns / 2, 64]; `apart` bytes from tile to tile
template <int Bits, Zero Z, int R, int C>
void block(const TileWeight& w, const Inputs& x, int64_t row, int64_t tile, int64_t column, int64_t columns,
           const uint8_t* lines, int64_t apart, float* sums) {
    F acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = f_load(sums + (r * C + c) * kTile);
    if constexpr (Bits == 16) {
        for (int64_t l = 0; l < columns / 2; ++l) {
            Line line[C];
            for (int c = 0; c < C; ++c) line[c] = line_load(lines + c * apart + l * 64);
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c)
                    acc[r][c] = dot2(acc[r][c], line[c], x.bf16 + (row + r) * x.k + column + 2 * l);
        }
    } else {
        const int64_t groups = w.k / w.group;
        for (int64_t g = column / w.group; g < (column + columns) / w.group; ++g) {
            Sums<Bits, 1> dot[R][C];
            const int8_t* codes = x.codes + (row * x.k + g * w.group) * kCodeBytes<Bits>;
            const uint8_t* from = lines + (g * w.group - column) * 16;
            // two unpacked lines of four-bit weights, one line of eight-bit ones
            constexpr int64_t kLines = Bits == 4 ? 2 : 1;
            for (int64_t l = 0; l < w.group / kLineCodes<Bits>; ++l) {
                Line first[C], second[C];
                for (int c = 0; c < C; ++c) {
                    first[c] = line_load(from + c * apart + l * kLines * 64);
                    second[c] = line_load(from + c * apart + ((l + 1) * kLines - 1) * 64);
                }
                for (int r = 0; r < R; ++r)
                    for (int c = 0; c < C; ++c)
                        dot[r][c].add(0, first[c], second[c], codes + r * x.k * kCodeBytes<Bits> + l * kLineCodes<Bits>,
                                      w.group);
            }
            for (int c = 0; c < C; ++c) {
                const int64_t group_at = ((tile + c) * groups + g) * kTile;
                const F scale = f_load_half(w.scales + group_at);
                for (int r = 0; r < R; ++r) {
                    const int64_t input_at = (row + r) * groups + g;
                    acc[r][c] = group_end<Bits, Z>(acc[r][c], dot[r][c].total(), w, group_at, scale, x.scales[input_at],
                                                   x.sums[input_at]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) f_store(sums + (r * C + c) * kTile, acc[r][c]);
}

template <int Bits, Zero Z, int R, int C>
void block_rest(int64_t rows, const TileWeight& w, const Inputs& x, int64_t row, int64_t tile, int64_t column,
                int64_t columns, const uint8_t* lines, int64_t apart, float* sums) {
    if (rows == R) return block<Bits, Z, R, C>(w, x, row, tile, column, columns, lines, apart, sums);
    if constexpr (R > 1) block_rest<Bits, Z, R - 1, C>(rows, w, x, row, tile, column, columns, lines, apart, sums);
}

template <int Bits, Zero Z, int C>
void block_tiles(const TileWeight& w, const Inputs& x, int64_t rows, int64_t tile, float* y, int64_t stride, bool add,
                 char* scratch) {
    // [rows, C, 16] sums, then the unpacked stretch
    float* sums = reinterpret_cast<float*>(scratch);
    uint8_t* unpacked = reinterpret_cast<uint8_t*>(sums + rows * C * kTile);
    for (int64_t i = 0; i < rows * C; ++i) f_store(sums + i * kTile, f_set(0.0f));
    const int64_t span = w.k * Bits / 32 * 64;
    const int64_t stretch = Bits == 16 ? kStretch / 2 : kStretch;
    for (int64_t column = 0; column < w.k; column += stretch) {
        const int64_t columns = w.k - column < stretch ? w.k - column : stretch;
        const uint8_t* lines = w.weight + tile * span + column * Bits * 2;
        int64_t apart = span;
        if constexpr (Bits == 4) {
            for (int c = 0; c < C; ++c)
                for (int64_t l = 0; l < columns / 8; ++l) {
                    const Line line = line_load(lines + c * span + l * 64);
                    uint8_t* to = unpacked + (c * columns / 4 + 2 * l) * 64;
                    line_store(to, line_low(line));
                    line_store(to + 64, line_high(line));
                }
            lines = unpacked;
            apart = columns * 16;
        }
        constexpr int kRows = Bits == 8 ? kGemmRowsOfBytes : kGemmRows;
        // the tiles' next stretch comes while this one is multiplied, some lines of it with each block of rows
        const int64_t left = w.k - column - columns, bytes = (left < stretch ? left : stretch) * Bits * 2;
        const int64_t each = (bytes / 64 * kRows + rows - 1) / rows * 64;
        const uint8_t* next = w.weight + tile * span + (column + columns) * Bits * 2;
        int64_t row = 0, fetched = 0;
        const auto fetch = [&] {
            const int64_t end = fetched + each < bytes ? fetched + each : bytes;
            for (int c = 0; c < C; ++c)
                for (int64_t i = fetched; i < end; i += 64) prefetch_far(next + c * span + i);
            fetched = end;
        };
        for (; row + kRows <= rows; row += kRows) {
            fetch();
            block<Bits, Z, kRows, C>(w, x, row, tile, column, columns, lines, apart, sums + row * C * kTile);
        }
        if (row < rows) {
            fetch();
            block_rest<Bits, Z, kRows, C>(rows - row, w, x, row, tile, column, columns, lines, apart,
                                          sums + row * C * kTile);
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < C; ++c) put(w, tile + c, f_load(sums + (r * C + c) * kTile), y + r * stride, add);
}

template <int Bits, Zero Z>
void linear_of(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
               bool add, char* scratch) {
    if (rows <= (Bits == 4 ? kStreamedRows : kStreamedRowsOfOthers))
        return stream_tiles<Bits, Z>(w, x, rows, begin, end, y, stride, add);
    int64_t tile = begin;
    for (; tile + kGemmTiles <= end; tile += kGemmTiles)
        block_tiles<Bits, Z, kGemmTiles>(w, x, rows, tile, y, stride, add, scratch);
    for (; tile < end; ++tile) block_tiles<Bits, Z, 1>(w, x, rows, tile, y, stride, add, scratch);
}

template <int Bits>
void linear_quant(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
                  bool add, char* scratch) {
    if (w.minimums) return linear_of<Bits, Zero::kMinimum>(w, x, rows, begin, end, y, stride, add, scratch);
    if (w.zeros) return linear_of<Bits, Zero::kPoints>(w, x, rows, begin, end, y, stride, add, scratch);
    linear_of<Bits, Zero::kConstant>(w, x, rows, begin, end, y, stride, add, scratch);
}

void linear_tiles(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
                  bool add, char* scratch) {
    if (w.bits == 4) return linear_quant<4>(w, x, rows, begin, end, y, stride, add, scratch);
    if (w.bits == 8) return linear_quant<8>(w, x, rows, begin, end, y, stride, add, scratch);
    if (w.bits == 16) return linear_of<16, Zero::kConstant>(w, x, rows, begin, end, y, stride, add, scratch);
    linear_fp32(w, x, rows, begin, end, y, stride, add, scratch);
}

}  // namespace
