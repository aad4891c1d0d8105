// What every instruction set provides. Each one is a file of its own, compiled with its own flags, its functions in an
// unnamed namespace: otherwise the linker might keep one set's copy of a shared inline function for all of them.
#pragma once

#include <cstdint>

namespace qwenlet {

// Most rows of x the streaming bfloat16 kernel takes at once; beyond it a blocked matrix product is faster.
constexpr int kMaxRows = 8;
// Outputs that lie side by side in a tile, and keys in a tile of a page: one 64-byte line holds a word of each.
constexpr int kTile = 16;
// Tokens of a cache page.
constexpr int kPage = 64;
// Most rows a call of linear_tiles may have, and bytes of scratch a thread needs for it and for attention.
constexpr int64_t kMaxBatch = 1024;
constexpr int64_t kScratch = 1 << 20;  // the largest need: 128 rows' tables and four tiles unpacked, for 8,192 columns
// Weights of a draw, the largest of which is 1: their masses are known from these on, and block by block.
constexpr int kBands = 3;
constexpr float kBandLeast[kBands] = {0x1p-3f, 0x1p-7f, 0x1p-12f};
constexpr int64_t kMassBlock = 1024;
// Rows of one sequence that attention takes together.
constexpr int kQueryBlock = 16;
// The way back through a linear: rows whose sums are in registers, columns of a weight at most, and pairs of its outputs in
// a stretch, whose lines of 64 columns are half of a first cache.
constexpr int kBackRows = 6;
constexpr int64_t kBackColumns = 256, kBackPairs = 96;
// By AMX: pairs in a stretch, and rows that share what was unpacked.
constexpr int64_t kAmxBackPairs = 256, kBackMostRows = 1024;

// Activations as a linear reads them: rows of k numbers, either whole-number codes with a scale per group, or floats.
// For four-bit weights a code is a byte, and of every 8 the even ones come first, as nibbles lie in a byte. For eight-bit
// weights it has 15 bits, 128 a + b: a group's a come first, then its b.
struct Inputs {
    int bits;             // of the weights: 4, 8, 16 for bfloat16, 32 for float32
    int64_t k;
    int64_t group;        // columns of a scale; 0: floats
    int8_t* codes;        // [rows, k], or [rows, 2 k] for eight-bit weights
    float* scales;        // [rows, k / group]
    int32_t* sums;        // [rows, k / group], of the codes
    uint16_t* bf16;       // [rows, k]
    float* fp32;          // [rows, k]
    const int32_t* order; // [k] or null: which number comes first, second, ...
};

// A weight in tiles, see ops/packing.py: bits is 4 or 8, 16 for bfloat16 (lines of 16 outputs x 2 columns) or 32 for
// float32 (16 outputs x 1 column).
struct TileWeight {
    int bits;
    int64_t group, n, k;
    const uint8_t* weight;
    const uint16_t* scales;    // [tiles, k / group, 16] float16
    const uint8_t* zeros;      // the same, or null: 2^(bits - 1)
    const uint16_t* minimums;  // the same in float16, or null
    const float* bias;         // [n] or null
};

enum class Cache : int { kInt8 = 0, kBf16 = 1, kFp16 = 2, kFp32 = 3 };

// Keys and values of one layer, in pages of 64 tokens, as ops/pages.py lays them out: `run` pages of a group of heads side by
// side, the next group `group_stride` bytes away, the next pages `run_stride`.
struct Pages {
    Cache kind;
    int64_t heads, kv_heads, dim;
    int64_t group;  // kv heads
    int64_t run, run_stride, group_stride;
    uint8_t* memory;
};

// Keys and queries of a block of training's attention: a block of keys is at most half of a first cache, queries are a
// multiple of the rows any set's products have.
constexpr int64_t kTrainKeys = 64, kTrainQueries = 48;

// Attention of rows of tokens that lie side by side, and the way back, in bfloat16 (bits 16) or float32 (32).
//   q [tokens, heads, dim], k and v [tokens, kv_heads, dim], a token's numbers `stride` apart; the others side by side:
//   out, grad and of_q like q, of_k like k, of_v like v; sums [heads, tokens], logarithms
struct TrainAttention {
    int bits;
    int64_t tokens, heads, kv_heads, dim, q_stride, k_stride, v_stride;
    const void *q, *k, *v;
    void* out;
    float* sums;
    const void* grad;
    void *of_q, *of_k, *of_v;
};

struct Kernels {
    const char* name;
    bool (*supported)();

    // y[r][n] = sum_k x[r][k] * w[n][k] (+ bias[n]) for n in [begin, end), all bfloat16, summed in float32 in an order that
    // depends on k alone: row r of y is the same bits whatever the other rows are.
    //   x [rows, k], w [*, k], bias [*] or null, y [rows, stride]; rows <= kMaxRows
    void (*linear_bf16)(const uint16_t* x, int rows, const uint16_t* w, int64_t begin, int64_t end, int64_t k,
                        const uint16_t* bias, uint16_t* y, int64_t stride);

    // The same for weights in tiles [begin, end), float32 out (added to what is there if `add`). Eight-bit products are
    // summed exactly within a group and groups in their order, so here too a row depends on itself alone.
    void (*linear_tiles)(const TileWeight& w, const Inputs& x, int64_t rows, int64_t begin, int64_t end, float* y,
                         int64_t stride, bool add, char* scratch);

    // Columns [begin, end) of one tile as floats: row `column - first` of out [*, n] gets the tile's sixteen outputs (fewer
    // at the end), in bfloat16 (bits 16) or float32 (32). begin and end lie between words.
    void (*columns)(const TileWeight& w, int64_t tile, int64_t begin, int64_t end, int64_t first, int bits, void* out);

    // Columns [begin, end) of out = g W, at most kBackColumns, for W in tiles of four or eight bits, or (bits 0, not with
    // AMX) bfloat16 row by row: products of bfloat16, summed in float32 in the outputs' order. n, k and begin are multiples
    // of 16, with AMX n of 32. Null where torch's products are as good.
    //   g: [rows / back_rows, n / 2, back_rows] words of two bfloat16, rows beyond the last zero; at most kBackMostRows rows
    //   out [rows, k] in bfloat16 (bits 16) or float32 (32); scratch: back_scratch bytes at an address of whole lines
    void (*back)(const TileWeight& w, const uint32_t* g, int64_t rows, int64_t begin, int64_t end, int bits, void* out,
                 char* scratch);
    int back_rows;  // kBackRows, or 1: rows as they lie

    // Dropout without its scale, see drop.h.
    void (*drop)(const void* x, int bits, int64_t begin, int64_t end, uint64_t seed, uint32_t least, void* out, bool add);

    // out[i] = x[i] / rms(x) * weight[i]; out may be x.
    void (*norm)(const float* x, const float* weight, float eps, int64_t count, float* out);
    // out[i] = a[i] * silu(b[i])
    void (*swiglu)(const float* a, const float* b, int64_t count, float* out);
    // The largest of `count` numbers (a multiple of 16); NaN if one of them is NaN or +infinity, at least -1e30.
    float (*peak)(const float* x, int64_t count);
    // out[i] = e^((x[i] - peak) / temperature), zero for what is 87 or more below; returns their sum, and in above[b] that
    // of those of at least kBandLeast[b]. out may be x.
    double (*weigh)(const float* x, float peak, float temperature, int64_t count, float* out, double* above);
    // Sums weights of at least `high`, kMassBlock of them after the other into `masses`, and writes the places of those in
    // [low, high) to places, in order; returns how many. places has room for 16 more than there are.
    int64_t (*split)(const float* weights, float low, float high, int64_t count, double* masses, int32_t* places);
    // Row `row` of `to`, from floats.
    void (*round_inputs)(const float* x, const Inputs& to, int64_t row);

    // Turns the queries of one token in place ([heads, dim], pairs i and i + dim / 2) and multiplies them by `scale`; for
    // an int8 cache writes their codes of 15 bits (as Inputs has them), scales and sums as well.
    void (*turn_query)(const Pages& p, float* q, const float* cos, const float* sin, float scale, int8_t* codes,
                       float* code_scales, int64_t head);
    // Turns key head `head` of one token and stores it and its value in a slot of a page.
    void (*store)(const Pages& p, float* k, const float* v, const float* cos, const float* sin, int64_t page, int64_t slot,
                  int64_t head);
    // out = softmax(q k^T / sqrt(dim)) v of `heads` heads from `head` on for `rows` tokens of one sequence at positions
    // position, position + 1, ..., each over the keys up to its own; heads * rows <= kQueryBlock. Pages are the block of the
    // running softmax, in their order, so a row does not depend on the rows and heads beside it.
    //   q [rows, q_stride] floats at the first head; for an int8 cache codes [rows, code_stride] and code_scales [rows, heads, 2]
    //   (a scale, and the codes' sum) likewise
    void (*attend)(const Pages& p, int64_t head, int64_t heads, const float* q, const int8_t* codes, const float* code_scales,
                   int64_t q_stride, int64_t code_stride, int64_t rows, int64_t position, const int32_t* table, float* out,
                   int64_t out_stride, char* scratch);

    // out and sums of one row, tokens [first, first + length), and the heads that share kv_head; and the way back from
    // grad, out and sums to of_q, of_k and of_v. dim is a multiple of 16; scratch as train_scratch says.
    void (*train_forward)(const TrainAttention& p, int64_t first, int64_t length, int64_t kv_head, float* scratch);
    void (*train_backward)(const TrainAttention& p, int64_t first, int64_t length, int64_t kv_head, float* scratch);
};

// Floats that training's attention needs for a row.
inline int64_t train_scratch(int64_t length, int64_t dim, bool back) {
    const int64_t padded = (length + kTrainKeys - 1) / kTrainKeys * kTrainKeys;
    if (back) return 8 * padded * dim + 2 * kTrainQueries * kTrainKeys + padded;
    return 2 * padded * dim + 2 * kTrainQueries * dim + kTrainQueries * padded;
}

// What `back` needs for so many rows: a stretch of the weight, and the sums.
inline int64_t back_scratch(int64_t rows) {
    return kBackColumns * kAmxBackPairs * 4 + (rows + kBackRows - 1) / kBackRows * kBackRows * kBackColumns * 4;
}

#if defined(QWENLET_AMX)
extern const Kernels kAmx;
#endif
#if defined(QWENLET_X86)
extern const Kernels kAvx512Bf16;
extern const Kernels kAvx512;
extern const Kernels kAvx2;
#endif
extern const Kernels kPortable;

}  // namespace qwenlet
