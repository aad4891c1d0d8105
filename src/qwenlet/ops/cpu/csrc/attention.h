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

// What is read next, fetched while something else is computed: a processor's own reading ahead ends with every 4 kB, and
// a head's part of a page is not much longer.
struct Ahead {
    const uint8_t* at;
    int64_t lines;  // left

    void fetch(int64_t count) {
        for (; count > 0 && lines > 0; --count, --lines, at += 64) prefetch_second(at);
    }
};

// scores[r][t] of R rows against the 64 keys of a page, one tile of keys a register. Queries have 15 bits, see kernels.h.
template <int R>
inline void scores_int8(const uint8_t* k, const float* k_scales, const int8_t* codes, const float* code_scales,
                        int64_t q_stride, int64_t scales_stride, int64_t dim, float factor, F (*scores)[kKeyTiles],
                        Ahead& ahead) {
    I high[R][kKeyTiles], low[R][kKeyTiles];
    for (int r = 0; r < R; ++r) {
        // keys are stored 128 higher
        const I start = i_set(-128 * static_cast<int32_t>(code_scales[r * scales_stride + 1]));
        for (int t = 0; t < kKeyTiles; ++t) {
            low[r][t] = start;
            high[r][t] = i_set(0);
        }
    }
    for (int64_t w = 0; w < dim / 4; ++w) {
        ahead.fetch(kKeyTiles);
        for (int t = 0; t < kKeyTiles; ++t) {
            const Line line = line_load(k + t * 16 * dim + w * 64);
            for (int r = 0; r < R; ++r) {
                high[r][t] = dot4<8>(high[r][t], line, codes + r * q_stride + w * 8);
                low[r][t] = dot4<8>(low[r][t], line, codes + r * q_stride + w * 8 + 4);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        const F scale = f_set(code_scales[r * scales_stride] * factor);
        for (int t = 0; t < kKeyTiles; ++t) {
            const F dot = f_from(i_add(low[r][t], i_times128(high[r][t])));
            scores[r][t] = f_mul(f_mul(dot, scale), f_load(k_scales + t * 16));
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
        ahead.fetch(kKeyTiles);
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
        ahead.fetch(Chunks * (Kind == Cache::kInt8 ? 1 : Kind == Cache::kFp32 ? 4 : 2) / 4);
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

void attend(const Pages& p, int64_t head, const float* q, const int8_t* codes, const float* code_scales, int64_t q_stride,
            int64_t code_stride, int64_t rows, int64_t position, const int32_t* table, float* out, int64_t out_stride, char* scratch) {
    const int64_t dim = p.dim, kv_head = head / (p.heads / p.kv_heads), lines = part_bytes(p) / 64;
    float* sums = reinterpret_cast<float*>(scratch);    // [rows, dim]
    float* weights = sums + kQueryBlock * dim;          // [rows, 64]
    float* widened = weights + kQueryBlock * kPage;     // [64, dim]
    float top[kQueryBlock], total[kQueryBlock], fade[kQueryBlock];
    for (int64_t r = 0; r < rows; ++r) {
        top[r] = -INFINITY;
        total[r] = 0.0f;
    }
    for (int64_t i = 0; i < rows * dim; i += 16) f_store(sums + i, f_set(0.0f));
    for (int64_t page = 0; page * kPage < position + rows; ++page) {
        const int64_t first_key = page * kPage, in_pool = table[page] * p.kv_heads + kv_head;
        const uint8_t *k = p.k + part_at(p, table[page], kv_head), *v = p.v + part_at(p, table[page], kv_head);
        Ahead ahead{v, lines};
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
                const float before = top[r], now = max_lanes(highest);
                top[r] = before > now ? before : now;
                fade[r] = 0.0f;
                if (before > -INFINITY) {
                    float lanes[16];
                    f_store(lanes, f_exp(f_set(before - top[r])));
                    fade[r] = lanes[0];
                }
                F sum = f_set(0.0f);
                for (int t = 0; t < kKeyTiles; ++t) {
                    F weight = f_exp(f_sub(scores[i][t], f_set(top[r])));
                    weight = f_first(weight, static_cast<int>(keys - t * 16), 0.0f);
                    sum = f_add(sum, weight);
                    if (p.kind == Cache::kInt8) {  // the value's scale joins its weight; what was never stored is no number
                        weight = f_mul(weight, f_load(p.v_scales + in_pool * kPage + t * 16));
                        weight = f_first(weight, static_cast<int>(keys - t * 16), 0.0f);
                    }
                    f_store(weights + r * kPage + t * 16, weight);
                }
                total[r] = total[r] * fade[r] + sum_lanes(sum);
            }
            r0 += count;
        }
        if (first_key + kPage < position + rows) ahead = {p.k + part_at(p, table[page + 1], kv_head), lines};
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
                mix<Cache::kFp32, 2>(values, dim, keys, weights + r * kPage, fade + r, sums + r * dim, ahead);
            for (; r < rows; ++r) mix<Cache::kFp32, 1>(values, dim, keys, weights + r * kPage, fade + r, sums + r * dim, ahead);
        } else {
            for (int64_t r = from; r < rows; ++r)
                mix_stored<1>(p, v, keys, weights + r * kPage, fade + r, sums + r * dim, ahead);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const F scale = f_set(1.0f / total[r]);
        for (int64_t i = 0; i < dim; i += 16) f_store(out + r * out_stride + i, f_mul(f_load(sums + r * dim + i), scale));
    }
}

}  // namespace
