// Linears over four-bit, eight-bit and bfloat16 weights by AMX, whose registers hold sixteen rows of 64 bytes. A line of a
// weight in tiles is a row of such a register as it is, so weights need no other order. Whole-number sums within a group
// are exact and groups are added as elsewhere: their results are those of the other kernels, to the bit.
#pragma once

#include "linear_tiles.h"

namespace {

// Written out, as the compiler's own don't say that they read and write memory.
template <int T>
inline void amx_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void amx_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void amx_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// register S += X W: signed bytes of inputs and unsigned ones of weights, or bfloat16 of both
template <int Bits, int S, int X, int W>
inline void amx_product() {
    if constexpr (Bits == 16)
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(S), "i"(X), "i"(W));
    else
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(S), "i"(X), "i"(W));
}

// Shapes of the registers: 0 to 3 are sums of 16 x 16; 4 and 5 inputs; 6 and 7 weights.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// What a thread's registers are shaped for.
class AmxShape {
  public:
    // depth: bytes of a row of inputs, 64 or 32
    explicit AmxShape(int depth) : depth_(depth) {}
    ~AmxShape() { asm volatile("tilerelease"); }
    // sums of registers 0 and 1 (inputs in 4) have `first` rows, those of 2 and 3 (inputs in 5) `second`
    void fit(int first, int second) {
        if (first == first_ && second == second_) return;
        first_ = first, second_ = second;
        TileShapes shapes;
        for (int i = 0; i < 8; ++i) {
            const int block = i < 4 ? i / 2 : i - 4;
            shapes.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? depth_ : 64);
            shapes.rows[i] = static_cast<uint8_t>(i >= 6 ? depth_ / 4 : block == 0 ? first : second);
        }
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }

  private:
    const int depth_;
    int first_ = 0, second_ = 0;
};

// ------------------------------------------------------------------------------------------- four and eight bits

// Tiles whose sums are in registers at once. Inputs of eight-bit weights have two parts, each with a sum.
template <int Bits>
constexpr int kAmxTiles = Bits == 8 ? 2 : 4;

// Four registers of sums, [register, row, output].
struct alignas(64) AmxSums {
    int32_t of[4][16][kTile];
};

// What a row gives to the sum of a group, [group, row], so that a group's rows lie side by side.
struct RowTables {
    float* scales;
    int32_t* sums;
};

inline void unpack(const uint8_t* packed, int64_t lines, uint8_t* to) {
    for (int64_t l = 0; l < lines; ++l) {
        const Line line = line_load(packed + l * 64);
        prefetch(packed + l * 64 + 1024);
        line_store(to + 2 * l * 64, line_low(line));
        line_store(to + 2 * l * 64 + 64, line_high(line));
    }
}

// The products of one group of C tiles, `apart` bytes from each other, with up to 16 rows. Of eight-bit ones registers 0
// and 2 sum the high parts of inputs, 1 and 3 the low ones; they lie as they are multiplied, so they are fetched ahead
// here, if at all.
template <int Bits, int C>
inline void amx_group(const int8_t* codes, int64_t stride, const uint8_t* lines, int64_t apart, int64_t group, int64_t deep,
                      bool ahead) {
    amx_zero<0>();
    if (C > 1 || Bits == 8) amx_zero<1>();
    if (C > 1) amx_zero<2>(), amx_zero<3>();
    for (int64_t k = 0; k < group; k += deep) {
        amx_load<4>(codes + k, stride);
        if constexpr (Bits == 8) {
            if (ahead)
                for (int c = 0; c < C; ++c)
                    for (int64_t l = 0; l < deep / 4; ++l) prefetch(lines + c * apart + k * 16 + l * 64 + kCodesAhead.bytes);
            amx_load<5>(codes + group + k, stride);
            amx_load<6>(lines + k * 16, 64);
            amx_product<8, 0, 4, 6>();
            amx_product<8, 1, 5, 6>();
            if (C == 1) continue;
            amx_load<7>(lines + k * 16 + apart, 64);
            amx_product<8, 2, 4, 7>();
            amx_product<8, 3, 5, 7>();
            continue;
        }
        amx_load<6>(lines + k * 16, 64);
        amx_product<4, 0, 4, 6>();
        if (C > 1) {
            amx_load<7>(lines + k * 16 + apart, 64);
            amx_product<4, 1, 4, 7>();
            amx_load<6>(lines + k * 16 + 2 * apart, 64);
            amx_product<4, 2, 4, 6>();
            amx_load<7>(lines + k * 16 + 3 * apart, 64);
            amx_product<4, 3, 4, 7>();
        }
    }
}

// The sums of R rows of a group become floats and go onto acc [16 rows, 16]; of eight-bit weights those of low parts follow
// 16 rows behind.
template <int Bits, Zero Z, int R>
inline void amx_group_ends(const TileWeight& w, int64_t at, const float* scales, const int32_t* sums,
                           const int32_t (*dots)[kTile], float* acc) {
    const F scale = f_load_half(w.scales + at);
    const I points = Z == Zero::kPoints ? i_load_u8(w.zeros + at) : i_set(0);
    for (int r = 0; r < R; ++r) {
        I dot = line_load(dots[r]);
        if (Bits == 8) dot = i_add(i_times128(dot), line_load(dots[16 + r]));
        if (Z == Zero::kConstant) dot = i_add(dot, i_set(sums[r]));
        if (Z == Zero::kPoints) dot = i_add(dot, i_mul(points, i_set(sums[r])));
        F sum = f_fma(f_from(dot), f_mul(scale, f_set(scales[r])), f_load(acc + r * kTile));
        if (Z == Zero::kMinimum)
            sum = f_fma(f_load_half(w.minimums + at), f_set(static_cast<float>(sums[r]) * scales[r]), sum);
        f_store(acc + r * kTile, sum);
    }
}

// C tiles and up to R rows.
template <int Bits, Zero Z, int R, int C>
void amx_quant_tile(const TileWeight& w, const int8_t* codes, const RowTables& tables, int64_t rows, int64_t tile, float* y,
                    int64_t stride, bool add, uint8_t* unpacked, bool fresh, bool ring) {
    const int64_t groups = w.k / w.group, deep = w.group < 64 ? w.group : 64, lines = w.group / 8;
    const int64_t size = w.group * 16, apart = Bits == 4 && ring ? 2 * size : w.k * 16;
    const uint8_t* packed = w.weight + tile * w.k * 2 * Bits;
    alignas(64) float acc[C][16 * kTile];
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < 16; ++r) f_store(acc[c] + r * kTile, f_set(0.0f));
    AmxSums dots[2];
    const auto place = [&](int64_t g) { return unpacked + (ring ? g % 2 : g) * size; };
    if (Bits == 4 && fresh)
        for (int c = 0; c < C; ++c) unpack(packed + c * w.k * 8, lines, place(0) + c * apart);
    for (int64_t g = 0; g <= groups; ++g) {
        if (g < groups)
            amx_group<Bits, C>(codes + g * w.group * kCodeBytes<Bits>, w.k * kCodeBytes<Bits>,
                               Bits == 8 ? packed + g * size : place(g), apart, w.group, deep, fresh);
        for (int c = 0; c < C; ++c) {
            if (Bits == 4 && fresh && g + 1 < groups)
                unpack(packed + c * w.k * 8 + (g + 1) * lines * 64, lines, place(g + 1) + c * apart);
            if (g)
                amx_group_ends<Bits, Z, R>(w, ((tile + c) * groups + g - 1) * kTile, tables.scales + (g - 1) * 16,
                                           tables.sums + (g - 1) * 16, dots[(g - 1) % 2].of[c * kCodeBytes<Bits>], acc[c]);
        }
        if (g < groups) {
            auto& to = dots[g % 2].of;
            amx_store<0>(to[0], 64);
            if (C > 1 || Bits == 8) amx_store<1>(to[1], 64);
            if (C > 1) amx_store<2>(to[2], 64), amx_store<3>(to[3], 64);
        }
    }
    for (int c = 0; c < C; ++c)
        for (int64_t r = 0; r < rows; ++r) put(w, tile + c, f_load(acc[c] + r * kTile), y + r * stride, add);
}

template <int Bits, Zero Z, int C>
void amx_quant_rows(const TileWeight& w, const int8_t* codes, const RowTables& tables, int64_t rows, int64_t tile, float* y,
                    int64_t stride, bool add, uint8_t* unpacked, bool fresh, bool ring) {
    if (rows <= 4) return amx_quant_tile<Bits, Z, 4, C>(w, codes, tables, rows, tile, y, stride, add, unpacked, fresh, ring);
    if (rows <= 8) return amx_quant_tile<Bits, Z, 8, C>(w, codes, tables, rows, tile, y, stride, add, unpacked, fresh, ring);
    if (rows <= 12) return amx_quant_tile<Bits, Z, 12, C>(w, codes, tables, rows, tile, y, stride, add, unpacked, fresh, ring);
    amx_quant_tile<Bits, Z, 16, C>(w, codes, tables, rows, tile, y, stride, add, unpacked, fresh, ring);
}

// Rows `first` to `first` + `rows`, as many as scratch has tables for.
template <int Bits, Zero Z>
void amx_quant_pass(const TileWeight& w, const Inputs& x, int64_t first, int64_t rows, int64_t begin, int64_t end, float* y,
                    int64_t stride, bool add, char* scratch, AmxShape& shape) {
    constexpr int kTiles = kAmxTiles<Bits>;
    const int64_t groups = w.k / w.group, numbers = (rows + 15) / 16 * groups * 16;
    const RowTables tables{reinterpret_cast<float*>(scratch), reinterpret_cast<int32_t*>(scratch) + numbers};
    uint8_t* unpacked = reinterpret_cast<uint8_t*>(tables.sums + numbers);
    for (int64_t i = 0; i < numbers; ++i) {
        const int64_t r = i / (groups * 16) * 16 + i % 16, at = (first + r) * groups + i / 16 % groups;
        tables.scales[i] = r < rows ? x.scales[at] : 0.0f;
        const int32_t sum = r < rows ? x.sums[at] : 0;
        tables.sums[i] = Z == Zero::kConstant ? -(1 << (Bits - 1)) * sum : Z == Zero::kPoints ? -sum : sum;
    }
    // more rows than a register's find their lines unpacked, where these fit
    const bool ring = rows <= 16 || numbers * 8 + kTiles * w.k * 16 > qwenlet::kScratch;
    for (int64_t tile = begin; tile < end; tile += tile + kTiles <= end ? kTiles : 1)
        for (int64_t row = 0; row < rows; row += 16) {
            const int64_t some = rows - row < 16 ? rows - row : 16;
            shape.fit(static_cast<int>(some), static_cast<int>(some));
            const RowTables own{tables.scales + row * groups, tables.sums + row * groups};
            const int8_t* codes = x.codes + (first + row) * w.k * kCodeBytes<Bits>;
            float* to = y + (first + row) * stride;
            const bool fresh = row == 0 || (Bits == 4 && ring);
            if (tile + kTiles <= end)
                amx_quant_rows<Bits, Z, kTiles>(w, codes, own, some, tile, to, stride, add, unpacked, fresh, ring);
            else
                amx_quant_rows<Bits, Z, 1>(w, codes, own, some, tile, to, stride, add, unpacked, fresh, ring);
        }
}

// Rows that a pass takes at most: as many as scratch has tables for, beside two groups of four tiles unpacked; 0 where a
// weight is so wide that these of one register's rows don't fit.
inline int64_t amx_pass(const TileWeight& w) {
    const int64_t left = qwenlet::kScratch - 2 * kAmxTiles<4> * w.group * 16, a_row = w.k / w.group * 8;
    const int64_t fitting = left / a_row / 16 * 16;
    return fitting < 128 ? fitting : 128;
}

template <int Bits, Zero Z>
void amx_quant_of(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
                  bool add, char* scratch) {
    AmxShape shape(static_cast<int>(w.group < 64 ? w.group : 64));
    const int64_t pass = amx_pass(w);
    for (int64_t first = 0; first < rows; first += pass)
        amx_quant_pass<Bits, Z>(w, x, first, rows - first < pass ? rows - first : pass, begin, end, y, stride, add, scratch,
                                shape);
}

template <int Bits>
void amx_quant(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y, int64_t stride,
               bool add, char* scratch) {
    if (w.minimums) return amx_quant_of<Bits, Zero::kMinimum>(w, x, rows, begin, end, y, stride, add, scratch);
    if (w.zeros) return amx_quant_of<Bits, Zero::kPoints>(w, x, rows, begin, end, y, stride, add, scratch);
    amx_quant_of<Bits, Zero::kConstant>(w, x, rows, begin, end, y, stride, add, scratch);
}

// ------------------------------------------------------------------------------------------------- bfloat16

// Two row blocks of 16 and C tiles. The sum over all columns stays in a register: a chain that depends on nothing but the
// row and the weights.
template <int C>
void amx_bf16_tiles(const TileWeight& w, const Inputs& x, int64_t rows, int64_t tile, float* y, int64_t stride, bool add,
                    AmxShape& shape) {
    const int64_t span = w.k * 32;
    const uint8_t* lines = w.weight + tile * span;
    AmxSums sums;
    for (int64_t row = 0; row < rows; row += 32) {
        const int64_t some = rows - row < 32 ? rows - row : 32;
        const bool both = some > 16;
        shape.fit(static_cast<int>(both ? 16 : some), static_cast<int>(both ? some - 16 : 1));
        amx_zero<0>();
        if (C == 2) amx_zero<1>();
        if (both) amx_zero<2>();
        if (both && C == 2) amx_zero<3>();
        for (int64_t k = 0; k < w.k; k += 32) {
            if (rows <= 16)
                for (int c = 0; c < C; ++c)
                    for (int l = 0; l < 16; ++l) prefetch(lines + c * span + k * 32 + l * 64 + kCodesAhead.bytes);
            const uint16_t* inputs = x.bf16 + row * x.k + k;
            amx_load<4>(inputs, x.k * 2);
            amx_load<6>(lines + k * 32, 64);
            amx_product<16, 0, 4, 6>();
            if (C == 2) {
                amx_load<7>(lines + k * 32 + span, 64);
                amx_product<16, 1, 4, 7>();
            }
            if (!both) continue;
            amx_load<5>(inputs + 16 * x.k, x.k * 2);
            amx_product<16, 2, 5, 6>();
            if (C == 2) amx_product<16, 3, 5, 7>();
        }
        amx_store<0>(sums.of[0], 64);
        if (C == 2) amx_store<1>(sums.of[1], 64);
        if (both) amx_store<2>(sums.of[2], 64);
        if (both && C == 2) amx_store<3>(sums.of[3], 64);
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

// Products of fewer rows are as quick or quicker without.
constexpr int64_t kAmxLeastRows = 5, kAmxLeastRowsOfBytes = 5;

void linear_tiles_amx(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y,
                      int64_t stride, bool add, char* scratch) {
    // for any number of rows, or a row's bits would depend on it
    if (w.bits == 16 && w.k % 32 == 0) return amx_bf16(w, x, rows, begin, end, y, stride, add);
    const int64_t least = w.bits == 8 ? kAmxLeastRowsOfBytes : kAmxLeastRows;
    if ((w.bits != 4 && w.bits != 8) || rows < least || amx_pass(w) == 0)
        return linear_tiles(w, x, rows, begin, end, y, stride, add, scratch);
    if (w.bits == 4) return amx_quant<4>(w, x, rows, begin, end, y, stride, add, scratch);
    amx_quant<8>(w, x, rows, begin, end, y, stride, add, scratch);
}

}  // namespace
