// Attention over pages: rotate and store, then answer. Keys lie in tiles of sixteen, a word of each in a 64-byte line, so
// sixteen scores come out as lanes; values lie row by row, and a running softmax goes page by page.
#pragma once

#include <cmath>

#include "kernels.h"
#include "rows.h"

namespace {

using qwenlet::Cache;
using qwenlet::kPage;
using qwenlet::kQueryBlock;
using qwenlet::Pages;

constexpr int kKeyTiles = kPage / 16;

inline int64_t item_bytes(const Pages& p) { return p.kind == Cache::kInt8 ? 1 : p.kind == Cache::kFp32 ? 4 : 2; }

// One head's keys in a page, or its values.
inline int64_t part_bytes(const Pages& p) { return kPage * p.dim * item_bytes(p); }
inline int64_t part_at(const Pages& p, int64_t page, int64_t kv_head) { return page * p.stride + kv_head * part_bytes(p); }

// x [dim] turned by cos, sin [dim / 2]: pairs are (i, i + dim / 2)
inline void turn(float* x, const float* cos, const float* sin, int64_t dim, float scale) {
    const int64_t half = dim / 2;
    const F factor = f_set(scale);
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
        const F a = f_load(x + i), b = f_load(x + half + i), c = f_load(cos + i), s = f_load(sin + i);
        f_store(x + i, f_mul(f_sub(f_mul(a, c), f_mul(b, s)), factor));
        f_store(x + half + i, f_mul(f_add(f_mul(b, c), f_mul(a, s)), factor));
    }
    for (; i < half; ++i) {  // half of a head of 16 or 48
        const float a = x[i], b = x[half + i];
        x[i] = (a * cos[i] - b * sin[i]) * scale;
        x[half + i] = (b * cos[i] + a * sin[i]) * scale;
    }
}

void turn_query(const Pages& p, float* q, const float* cos, const float* sin, float scale, int8_t* codes,
                float* code_scales, int64_t head) {
    turn(q + head * p.dim, cos, sin, p.dim, scale);
    if (p.kind != Cache::kInt8) return;
    // the sum as a float beside the scale: it is below 2^24, so exact
    float* scale_and_sum = code_scales + 2 * head;
    scale_and_sum[1] =
        static_cast<float>(round_group_fine(q + head * p.dim, p.dim, codes + 2 * head * p.dim, scale_and_sum));
}

constexpr int kMostDim = 256;

// Numbers i to i + 15 of a row of floats.
inline void store_floats(Cache kind, uint8_t* row, int64_t i, F values) {
    if (kind == Cache::kFp32) return f_store(reinterpret_cast<float*>(row) + i, values);
    auto* words = reinterpret_cast<uint16_t*>(row) + i;
    if (kind == Cache::kBf16) return f_store_bf16(words, values);
    f_store_half(words, values);
}

void store(const Pages& p, float* k, const float* v, const float* cos, const float* sin, int64_t page, int64_t slot,
           int64_t head) {
    const int64_t dim = p.dim, in_pool = page * p.kv_heads + head, bytes = item_bytes(p);
    turn(k, cos, sin, dim, 1.0f);
    // word w of the key lies in line w of its tile
    uint8_t* tile = p.k + part_at(p, page, head) + slot / 16 * 16 * dim * bytes + slot % 16 * 4;
    uint8_t* row = p.v + part_at(p, page, head) + slot * dim * bytes;
    alignas(64) uint8_t key[kMostDim * 4];
    if (p.kind == Cache::kInt8) {
        round_group(k, dim, reinterpret_cast<int8_t*>(key), p.k_scales + in_pool * kPage + slot, false);
        for (int64_t i = 0; i < dim; ++i) key[i] ^= 0x80;
        round_group(v, dim, reinterpret_cast<int8_t*>(row), p.v_scales + in_pool * kPage + slot, false);
    } else {
        for (int64_t i = 0; i < dim; i += 16) {
            store_floats(p.kind, key, i, f_load(k + i));
            store_floats(p.kind, row, i, f_load(v + i));
        }
    }
    for (int64_t w = 0; w < dim * bytes / 4; ++w) std::memcpy(tile + w * 64, key + w * 4, 4);
}

// The keys and values that are read next, fetched while something else is computed. A processor reads ahead by itself, but
// only to the end of 4 kB, and begins anew behind it: so both halves of both are fetched side by side, a head ahead.
struct Ahead {
    const uint8_t *k, *v;
    int64_t lines;  // of both together
    int64_t next = 0;

    void fetch(int64_t count) {
        for (; count > 0 && next < lines; --count, ++next) {
            const int64_t line = (next & 1) * (lines / 4) + next / 4;
            prefetch((next & 2 ? v : k) + line * 64);
        }
    }
};

// scores[r][t] of R rows against the 64 keys of a page, one tile of keys a register. Queries have 15 bits, see kernels.h.
template <int R>
inline void scores_int8(const uint8_t* k, const float* k_scales, const int8_t* codes, const float* code_scales,
                        int64_t q_stride, int64_t scales_stride, int64_t dim, float factor, F (*scores)[kKeyTiles],
                        Ahead& ahead) {
    for (int t = 0; t < kKeyTiles; ++t) {
        // two sums of each kind, for a product takes some cycles; a tile after the other, as they lie in memory
        I high[R][2], low[R][2];
        for (int r = 0; r < R; ++r) {
            // keys are stored 128 higher
            low[r][0] = i_set(-128 * static_cast<int32_t>(code_scales[r * scales_stride + 1]));
            low[r][1] = high[r][0] = high[r][1] = i_set(0);
        }
        const uint8_t* tile = k + t * 16 * dim;
        for (int64_t w = 0; w < dim / 4; w += 2) {
            ahead.fetch(1);
            for (int i = 0; i < 2; ++i) {
                const Line line = line_load(tile + (w + i) * 64);
                for (int r = 0; r < R; ++r) {
                    const int8_t* word = codes + r * q_stride + (w + i) * 4;
                    high[r][i] = dot4<8>(high[r][i], line, word);
                    low[r][i] = dot4<8>(low[r][i], line, word + dim);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            const F scale = f_set(code_scales[r * scales_stride] * factor);
            const I sum = i_add(i_add(low[r][0], low[r][1]), i_times128(i_add(high[r][0], high[r][1])));
            scores[r][t] = f_mul(f_mul(f_from(sum), scale), f_load(k_scales + t * 16));
        }
    }
}

// The numbers of sixteen keys that a line of floats holds: one of each in float32, else two.
template <Cache Kind>
inline void line_floats(const uint8_t* line, F* numbers) {
    if constexpr (Kind == Cache::kFp32)
        numbers[0] = f_load(reinterpret_cast<const float*>(line));
    else if constexpr (Kind == Cache::kBf16)
        line_bf16(line_load(line), numbers[0], numbers[1]);
    else
        line_half(line_load(line), numbers[0], numbers[1]);
}

template <int R, Cache Kind>
inline void scores_float(const uint8_t* k, const float* q, int64_t q_stride, int64_t dim, float factor,
                         F (*scores)[kKeyTiles], Ahead& ahead) {
    constexpr int kEach = Kind == Cache::kFp32 ? 1 : 2;
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < kKeyTiles; ++t) scores[r][t] = f_set(0.0f);
    for (int64_t w = 0; w < dim / kEach; ++w) {
        ahead.fetch(kKeyTiles / 2);
        for (int t = 0; t < kKeyTiles; ++t) {
            F numbers[kEach];
            line_floats<Kind>(k + (t * dim / kEach + w) * 64, numbers);
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < kEach; ++i)
                    scores[r][t] = f_fma(numbers[i], f_set(q[r * q_stride + kEach * w + i]), scores[r][t]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < kKeyTiles; ++t) scores[r][t] = f_mul(scores[r][t], f_set(factor));
}

template <Cache Kind>
inline F value_at(const void* v, int64_t i) {
    if constexpr (Kind == Cache::kFp32) return f_load(static_cast<const float*>(v) + i);
    if constexpr (Kind == Cache::kInt8) return f_load_i8(static_cast<const int8_t*>(v) + i);
    if constexpr (Kind == Cache::kBf16) return f_load_bf16(static_cast<const uint16_t*>(v) + i);
    return f_load_half(static_cast<const uint16_t*>(v) + i);
}

inline F load_value(const Pages& p, const void* v, int64_t i) {
    if (p.kind == Cache::kInt8) return value_at<Cache::kInt8>(v, i);
    return p.kind == Cache::kBf16 ? value_at<Cache::kBf16>(v, i) : value_at<Cache::kFp16>(v, i);
}

// sums[r][d] = sums[r][d] * fade[r] + sum_j weights[r][j] v[j][d], keys in order
template <Cache Kind, int R, int Chunks>
inline void mix_chunk(const void* v, int64_t dim, int64_t at, int keys, const float* weights, const float* fade, float* sums,
                      Ahead& ahead) {
    F acc[R][Chunks];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < Chunks; ++c) acc[r][c] = f_mul(f_load(sums + r * dim + at + c * 16), f_set(fade[r]));
    for (int j = 0; j < keys; ++j) {
        ahead.fetch(Chunks * (Kind == Cache::kInt8 ? 1 : Kind == Cache::kFp32 ? 4 : 2) * 3 / 8);
        for (int c = 0; c < Chunks; ++c) {
            const F value = value_at<Kind>(v, j * dim + at + c * 16);
            for (int r = 0; r < R; ++r) acc[r][c] = f_fma(f_set(weights[r * kPage + j]), value, acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < Chunks; ++c) f_store(sums + r * dim + at + c * 16, acc[r][c]);
}

template <Cache Kind, int R>
inline void mix(const void* v, int64_t dim, int keys, const float* weights, const float* fade, float* sums, Ahead& ahead) {
    int64_t at = 0;
    for (; at + 128 <= dim; at += 128) mix_chunk<Kind, R, 8>(v, dim, at, keys, weights, fade, sums, ahead);
    for (; at + 64 <= dim; at += 64) mix_chunk<Kind, R, 4>(v, dim, at, keys, weights, fade, sums, ahead);
    for (; at < dim; at += 16) mix_chunk<Kind, R, 1>(v, dim, at, keys, weights, fade, sums, ahead);
}

template <int R>
inline void mix_stored(const Pages& p, const void* v, int keys, const float* weights, const float* fade, float* sums,
                       Ahead& ahead) {
    if (p.kind == Cache::kInt8) return mix<Cache::kInt8, R>(v, p.dim, keys, weights, fade, sums, ahead);
    if (p.kind == Cache::kBf16) return mix<Cache::kBf16, R>(v, p.dim, keys, weights, fade, sums, ahead);
    if (p.kind == Cache::kFp16) return mix<Cache::kFp16, R>(v, p.dim, keys, weights, fade, sums, ahead);
    mix<Cache::kFp32, R>(v, p.dim, keys, weights, fade, sums, ahead);
}

template <int R>
inline void page_scores(const Pages& p, const uint8_t* k, const float* k_scales, const float* q, const int8_t* codes, const float* code_scales,
                        int64_t q_stride, int64_t code_stride, F (*scores)[kKeyTiles], Ahead& ahead) {
    const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(p.dim));
    if (p.kind == Cache::kInt8)
        scores_int8<R>(k, k_scales, codes, code_scales, code_stride, 2 * p.heads, p.dim, factor, scores, ahead);
    else if (p.kind == Cache::kBf16)
        scores_float<R, Cache::kBf16>(k, q, q_stride, p.dim, factor, scores, ahead);
    else if (p.kind == Cache::kFp16)
        scores_float<R, Cache::kFp16>(k, q, q_stride, p.dim, factor, scores, ahead);
    else
        scores_float<R, Cache::kFp32>(k, q, q_stride, p.dim, factor, scores, ahead);
}

// A running softmax of a head's rows: what it has seen, and the values mixed so far.
struct Running {
    float *top, *total, *fade, *sums;  // [rows], [rows], [rows], [rows, dim]
};

// One head's part of a page joins its softmax.
void attend_page(const Pages& p, int64_t kv_head, const float* q, const int8_t* codes, const float* code_scales, int64_t q_stride,
                 int64_t code_stride, int64_t rows, int64_t position, int64_t first_key, int64_t page, Ahead ahead,
                 const Running& run, float* weights, float* widened) {
    const int64_t dim = p.dim, in_pool = page * p.kv_heads + kv_head;
    const uint8_t *k = p.k + part_at(p, page, kv_head), *v = p.v + part_at(p, page, kv_head);
    // rows before the page's first key see nothing of it
    int64_t r0 = first_key > position ? first_key - position : 0;
    const int64_t from = r0;
    while (r0 < rows) {
        F scores[4][kKeyTiles];
        const int64_t block = p.kind == Cache::kInt8 ? 2 : 4, count = rows - r0 >= block ? block : 1;
        const float* scale_at = code_scales ? code_scales + r0 * 2 * p.heads : nullptr;
        const int8_t* codes_at = codes ? codes + r0 * code_stride : nullptr;
        const float* q_at = q + r0 * q_stride;
        if (count == 4)
            page_scores<4>(p, k, p.k_scales + in_pool * kPage, q_at, codes_at, scale_at, q_stride, code_stride, scores, ahead);
        else if (count == 2)
            page_scores<2>(p, k, p.k_scales + in_pool * kPage, q_at, codes_at, scale_at, q_stride, code_stride, scores, ahead);
        else
            page_scores<1>(p, k, p.k_scales + in_pool * kPage, q_at, codes_at, scale_at, q_stride, code_stride, scores, ahead);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t r = r0 + i, keys = position + r - first_key + 1;  // keys of this page that row r sees
            F highest = f_set(-INFINITY);
            for (int t = 0; t < kKeyTiles; ++t) {
                scores[i][t] = f_first(scores[i][t], static_cast<int>(keys - t * 16), -INFINITY);
                highest = f_max(highest, scores[i][t]);
            }
            const float before = run.top[r], now = max_lanes(highest), top = before > now ? before : now;
            run.top[r] = top;
            run.fade[r] = 0.0f;
            if (before > -INFINITY) {
                float lanes[16];
                f_store(lanes, f_exp(f_set(before - top)));
                run.fade[r] = lanes[0];
            }
            F sum = f_set(0.0f);
            for (int t = 0; t < kKeyTiles; ++t) {
                F weight = f_exp(f_sub(scores[i][t], f_set(top)));
                weight = f_first(weight, static_cast<int>(keys - t * 16), 0.0f);
                sum = f_add(sum, weight);
                if (p.kind == Cache::kInt8) {  // the value's scale joins its weight; what was never stored is no number
                    weight = f_mul(weight, f_load(p.v_scales + in_pool * kPage + t * 16));
                    weight = f_first(weight, static_cast<int>(keys - t * 16), 0.0f);
                }
                f_store(weights + r * kPage + t * 16, weight);
            }
            run.total[r] = run.total[r] * run.fade[r] + sum_lanes(sum);
        }
        r0 += count;
    }
    const int64_t most = position + rows - first_key;
    const int keys = static_cast<int>(most < kPage ? most : kPage);
    if (rows - from >= 8) {  // many rows: values as floats once
        const float* values = widened;
        if (p.kind == Cache::kFp32)
            values = reinterpret_cast<const float*>(v);
        else
            for (int64_t i = 0; i < keys * dim; i += 16) f_store(widened + i, load_value(p, v, i));
        int64_t r = from;
        for (; r + 2 <= rows; r += 2)
            mix<Cache::kFp32, 2>(values, dim, keys, weights + r * kPage, run.fade + r, run.sums + r * dim, ahead);
        for (; r < rows; ++r) mix<Cache::kFp32, 1>(values, dim, keys, weights + r * kPage, run.fade + r, run.sums + r * dim, ahead);
    } else {
        for (int64_t r = from; r < rows; ++r)
            mix_stored<1>(p, v, keys, weights + r * kPage, run.fade + r, run.sums + r * dim, ahead);
    }
}

// Page by page, and of each page head by head, as they lie in memory: a processor reads long stretches ahead by itself.
void attend(const Pages& p, int64_t head, int64_t heads, const float* q, const int8_t* codes, const float* code_scales,
            int64_t q_stride, int64_t code_stride, int64_t rows, int64_t position, const int32_t* table, float* out,
            int64_t out_stride, char* scratch) {
    const int64_t dim = p.dim, shared = p.heads / p.kv_heads;
    float* sums = reinterpret_cast<float*>(scratch);  // [heads, rows, dim]
    float* weights = sums + kQueryBlock * dim;        // [rows, 64]
    float* widened = weights + kQueryBlock * kPage;   // [64, dim]
    float top[kQueryBlock], total[kQueryBlock], fade[kQueryBlock];
    for (int64_t r = 0; r < heads * rows; ++r) {
        top[r] = -INFINITY;
        total[r] = 0.0f;
    }
    for (int64_t i = 0; i < heads * rows * dim; i += 16) f_store(sums + i, f_set(0.0f));
    for (int64_t page = 0; page * kPage < position + rows; ++page)
        for (int64_t h = 0; h < heads; ++h) {
            // heads that share keys need nothing new among themselves
            const int64_t kv_head = (head + h) / shared;
            const bool turns = kv_head == (head + heads - 1) / shared, last = turns && (page + 1) * kPage >= position + rows;
            const int64_t after = last ? 0 : part_at(p, table[turns ? page + 1 : page], turns ? head / shared : kv_head + 1);
            const Ahead ahead{p.k + after, p.v + after, last ? 0 : part_bytes(p) / 32};
            const Running run{top + h * rows, total + h * rows, fade + h * rows, sums + h * rows * dim};
            attend_page(p, kv_head, q + h * dim, codes ? codes + 2 * h * dim : nullptr,
                        code_scales ? code_scales + 2 * h : nullptr, q_stride, code_stride, rows, position, page * kPage,
                        table[page], ahead, run, weights, widened);
        }
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r) {
            const F scale = f_set(1.0f / total[h * rows + r]);
            for (int64_t i = 0; i < dim; i += 16)
                f_store(out + h * dim + r * out_stride + i, f_mul(f_load(sums + (h * rows + r) * dim + i), scale));
        }
}

}  // namespace
