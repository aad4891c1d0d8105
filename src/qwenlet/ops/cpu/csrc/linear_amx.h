// Linears over four-bit and bfloat16 weights by AMX, whose registers hold sixteen rows of 64 bytes. A line of a weight in
// tiles is a row of such a register as it is, so weights need no other order. Whole-number sums within a group are exact
// and groups are added as elsewhere: four-bit results are those of the other kernels, to the bit.
#pragma once

#include "linear_tiles.h"

namespace {

// The compiler's tile instructions don't say that they read and write memory.
inline void memory_is_used() { asm volatile("" ::: "memory"); }

// Shapes of the registers: 0 to 3 are sums, [row block, tile] of 16 x 16; 4 and 5 inputs, a row block each; 6 and 7 weights.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

constexpr int kAmxRows = 32;  // two blocks of 16

// What a thread's registers are shaped for.
class AmxShape {
  public:
    // depth: bytes of a row of inputs, 64 or 32
    explicit AmxShape(int depth) : depth_(depth) {}
    ~AmxShape() { _tile_release(); }
    void fit(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        TileShapes shapes;
        const int first = rows < 16 ? rows : 16, second = rows > 16 ? rows - 16 : 1;
        for (int i = 0; i < 8; ++i) {
            const int block = i < 4 ? i / 2 : i - 4;
            shapes.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? depth_ : 64);
            shapes.rows[i] = static_cast<uint8_t>(i >= 6 ? depth_ / 4 : block == 0 ? first : second);
        }
        memory_is_used();
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }

  private:
    const int depth_;
    int rows_ = 0;
};

// Sums of [row block, tile], sixteen by sixteen.
struct alignas(64) AmxSums {
    int32_t of[4][16][kTile];
};

template <int C>
inline void amx_zero(bool both) {
    _tile_zero(0);
    if (C == 2) _tile_zero(1);
    if (both) {
        _tile_zero(2);
        if (C == 2) _tile_zero(3);
    }
}

template <int C>
inline void amx_store(bool both, AmxSums& sums) {
    _tile_stored(0, sums.of[0], 64);
    if (C == 2) _tile_stored(1, sums.of[1], 64);
    if (both) {
        _tile_stored(2, sums.of[2], 64);
        if (C == 2) _tile_stored(3, sums.of[3], 64);
    }
    memory_is_used();
}

// Inputs of one or both row blocks against C tiles, `apart` bytes from each other.
template <int Bits, int C>
inline void amx_step(const void* x, int64_t x_stride, bool both, const uint8_t* lines, int64_t apart) {
    _tile_loadd(4, x, x_stride);
    _tile_loadd(6, lines, 64);
    if (C == 2) _tile_loadd(7, lines + apart, 64);
    if constexpr (Bits == 16) {
        _tile_dpbf16ps(0, 4, 6);
        if (C == 2) _tile_dpbf16ps(1, 4, 7);
    } else {
        _tile_dpbsud(0, 4, 6);
        if (C == 2) _tile_dpbsud(1, 4, 7);
    }
    if (!both) return;
    _tile_loadd(5, static_cast<const char*>(x) + 16 * x_stride, x_stride);
    if constexpr (Bits == 16) {
        _tile_dpbf16ps(2, 5, 6);
        if (C == 2) _tile_dpbf16ps(3, 5, 7);
    } else {
        _tile_dpbsud(2, 5, 6);
        if (C == 2) _tile_dpbsud(3, 5, 7);
    }
}

// Columns that a register holds of four-bit weights, of groups of 32 only half.
inline int64_t amx_columns(int64_t group) { return group < 64 ? group : 64; }

template <Zero Z, int C>
void amx_group_ends(const TileWeight& w, const Inputs& x, int64_t row, int64_t rows, int64_t tile, int64_t g,
                    const AmxSums& dots, float* sums) {
    const int64_t groups = w.k / w.group;
    for (int c = 0; c < C; ++c) {
        const int64_t group_at = ((tile + c) * groups + g) * kTile;
        const F scale = f_load_half(w.scales + group_at);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t input_at = (row + r) * groups + g;
            const int32_t sum = x.sums[input_at];
            const I dot = i_add(line_load(dots.of[r / 16 * 2 + c][r % 16]),
                                group_start<Z>(w, Z == Zero::kPoints ? w.zeros + group_at : nullptr, sum));
            float* to = sums + ((row + r) * C + c) * kTile;
            f_store(to, group_end<Z>(f_load(to), dot, scale, x.scales[input_at], w.minimums + group_at, sum));
        }
    }
}

template <Zero Z, int C>
void amx_int4_tiles(const TileWeight& w, const Inputs& x, int64_t rows, int64_t tile, float* y, int64_t stride, bool add,
                    char* scratch, AmxShape& shape) {
    float* sums = reinterpret_cast<float*>(scratch);  // [rows, C, 16], then the unpacked stretch
    uint8_t* unpacked = reinterpret_cast<uint8_t*>(sums + rows * C * kTile);
    for (int64_t i = 0; i < rows * C; ++i) f_store(sums + i * kTile, f_set(0.0f));
    const int64_t span = w.k * 8, deep = amx_columns(w.group);
    AmxSums dots[2];
    for (int64_t column = 0; column < w.k; column += kStretch) {
        const int64_t columns = w.k - column < kStretch ? w.k - column : kStretch, apart = columns * 16;
        for (int c = 0; c < C; ++c)
            for (int64_t l = 0; l < columns / 8; ++l) {
                const Line line = line_load(w.weight + (tile + c) * span + column * 8 + l * 64);
                uint8_t* to = unpacked + c * apart + 2 * l * 64;
                line_store(to, line_low(line));
                line_store(to + 64, line_high(line));
            }
        memory_is_used();
        for (int64_t row = 0; row < rows; row += kAmxRows) {
            const int64_t some = rows - row < kAmxRows ? rows - row : kAmxRows;
            const bool both = some > 16;
            shape.fit(static_cast<int>(some));
            const int64_t first = column / w.group, end = (column + columns) / w.group;
            // the products of a group run while the sums of the one before become floats
            for (int64_t g = first; g < end; ++g) {
                amx_zero<C>(both);
                for (int64_t k = g * w.group; k < (g + 1) * w.group; k += deep)
                    amx_step<4, C>(x.codes + row * x.k + k, x.k, both, unpacked + (k - column) * 16, apart);
                if (g > first) amx_group_ends<Z, C>(w, x, row, some, tile, g - 1, dots[(g - 1) % 2], sums);
                amx_store<C>(both, dots[g % 2]);
            }
            amx_group_ends<Z, C>(w, x, row, some, tile, end - 1, dots[(end - 1) % 2], sums);
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < C; ++c) put(w, tile + c, f_load(sums + (r * C + c) * kTile), y + r * stride, add);
}

template <Zero Z>
void amx_int4(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
              bool add, char* scratch) {
    AmxShape shape(static_cast<int>(amx_columns(w.group)));
    int64_t tile = begin;
    for (; tile + 2 <= end; tile += 2) amx_int4_tiles<Z, 2>(w, x, rows, tile, y, stride, add, scratch, shape);
    if (tile < end) amx_int4_tiles<Z, 1>(w, x, rows, tile, y, stride, add, scratch, shape);
}

// The sum over all columns stays in a register: a chain that depends on nothing but the row and the weights.
template <int C>
void amx_bf16_tiles(const TileWeight& w, const Inputs& x, int64_t rows, int64_t tile, float* y, int64_t stride, bool add,
                    AmxShape& shape) {
    const int64_t span = w.k * 32;
    const uint8_t* lines = w.weight + tile * span;
    AmxSums sums;
    for (int64_t row = 0; row < rows; row += kAmxRows) {
        const int64_t some = rows - row < kAmxRows ? rows - row : kAmxRows;
        const bool both = some > 16;
        shape.fit(static_cast<int>(some));
        amx_zero<C>(both);
        for (int64_t k = 0; k < w.k; k += 32) {
            if (rows <= 16)
                for (int c = 0; c < C; ++c)
                    for (int l = 0; l < 16; ++l) prefetch(lines + c * span + k * 32 + l * 64 + kAheadBytes);
            amx_step<16, C>(x.bf16 + row * x.k + k, x.k * 2, both, lines + k * 32, span);
        }
        amx_store<C>(both, sums);
        for (int64_t r = 0; r < some; ++r)
            for (int c = 0; c < C; ++c)
                put(w, tile + c, f_load(reinterpret_cast<const float*>(sums.of[r / 16 * 2 + c][r % 16])),
                    y + (row + r) * stride, add);
    }
}

void amx_bf16(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
              bool add) {
    AmxShape shape(64);
    int64_t tile = begin;
    for (; tile + 2 <= end; tile += 2) amx_bf16_tiles<2>(w, x, rows, tile, y, stride, add, shape);
    if (tile < end) amx_bf16_tiles<1>(w, x, rows, tile, y, stride, add, shape);
}

// Four-bit products of fewer rows are as quick or quicker without: above all in groups of 32, half of a register deep.
constexpr int64_t kAmxLeastRows = kBlockRows, kAmxRowsOfShortGroups = 33;

void linear_tiles_amx(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y,
                      int64_t stride, bool add, char* scratch) {
    // for any number of rows, or a row's bits would depend on it
    if (w.bits == 16 && w.k % 32 == 0) return amx_bf16(w, x, rows, begin, end, y, stride, add);
    if (w.bits != 4 || rows < (w.group < 64 ? kAmxRowsOfShortGroups : kAmxLeastRows))
        return linear_tiles(w, x, rows, begin, end, y, stride, add, scratch);
    if (w.minimums) return amx_int4<Zero::kMinimum>(w, x, rows, begin, end, y, stride, add, scratch);
    if (w.zeros) return amx_int4<Zero::kPoints>(w, x, rows, begin, end, y, stride, add, scratch);
    amx_int4<Zero::kConstant>(w, x, rows, begin, end, y, stride, add, scratch);
}

}  // namespace
