// Attention over pages: rotate and store, then answer. Keys lie in tiles of sixteen, a word of each in a 64-byte line, so
// sixteen scores come out as lanes. Int8 values lie so too, a word for four tokens, and others row by row. A running softmax
// goes page by page; of each all heads' scores come first, then their weights, then the values: long stretches of memory.
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
    uint8_t* values = p.v + part_at(p, page, head);
    alignas(64) uint8_t key[kMostDim * 4];
    if (p.kind == Cache::kInt8) {
        round_group(k, dim, reinterpret_cast<int8_t*>(key), p.k_scales + in_pool * kPage + slot, false);
        for (int64_t i = 0; i < dim; ++i) key[i] ^= 0x80;
        int8_t value[kMostDim];
        round_group(v, dim, value, p.v_scales + in_pool * kPage + slot, false);
        uint8_t* byte = values + slot / 4 * 64 + slot % 4;
        for (int64_t i = 0; i < dim; ++i) byte[i / 16 * 16 * kPage + i % 16 * 4] = static_cast<uint8_t>(value[i]);
    } else {
        for (int64_t i = 0; i < dim; i += 16) {
            store_floats(p.kind, key, i, f_load(k + i));
            store_floats(p.kind, values + slot * dim * bytes, i, f_load(v + i));
        }
    }
    for (int64_t w = 0; w < dim * bytes / 4; ++w) std::memcpy(tile + w * 64, key + w * 4, 4);
}

// Fetches lines some way ahead of those that are read, in a stretch of memory and on into the next one. A processor reads
// ahead by itself, but only to the end of 4 kB. Into the second cache: the way into the first is taken by what is read.
struct Ahead {
    static constexpr int64_t kBytes = 8192;
    const uint8_t *stretch, *next;  // `next` may be null
    int64_t bytes;                  // of either
    int64_t at = 0;

    void fetch(int64_t lines) {
        const int64_t begin = at + kBytes;
        at += lines * 64;
        const uint8_t* from = begin < bytes ? stretch + begin : begin < 2 * bytes && next ? next + (begin - bytes) : nullptr;
        if (from)
            for (int64_t i = 0; i < lines; ++i) prefetch_far(from + i * 64);
    }
};

// Products of R rows with T tiles, which lie `words` lines apart; whether of signed bytes with codes that aren't negative,
// or of bytes stored 128 higher with signed codes. A code is 128 a + b: its a at codes, its b `low` bytes behind.
template <bool Signed, int R, int T>
inline void products(const uint8_t* tiles, int64_t words, const int8_t* codes, int64_t stride, int64_t low, I (*sums)[T],
                     Ahead& ahead) {
    I above[R][T], below[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) above[r][t] = below[r][t] = i_set(0);
    for (int64_t w = 0; w < words; w += 2) {
        ahead.fetch(2 * T);
        for (int64_t i = w; i < w + 2; ++i)
            for (int t = 0; t < T; ++t) {
                const Line line = line_load(tiles + (t * words + i) * 64);
                for (int r = 0; r < R; ++r) {
                    const int8_t* word = codes + r * stride + i * 4;
                    above[r][t] = Signed ? dot4_signed(above[r][t], line, word) : dot4<8>(above[r][t], line, word);
                    below[r][t] = Signed ? dot4_signed(below[r][t], line, word + low) : dot4<8>(below[r][t], line, word + low);
                }
            }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sums[r][t] = i_add(below[r][t], i_times128(above[r][t]));
}

// scores [R, 64] of R rows against the keys of a page. Queries have 15 bits, see kernels.h.
template <int R>
inline void scores_int8(const uint8_t* k, const float* k_scales, const int8_t* codes, const float* code_scales,
                        int64_t q_stride, int64_t scales_stride, int64_t dim, float factor, float* scores, Ahead& ahead) {
    constexpr int T = R == 1 ? kPageTiles : kPageTilesOfTwo;
    for (int t = 0; t < kKeyTiles; t += T) {
        I sums[R][T];
        products<false, R, T>(k + t * 16 * dim, dim / 4, codes, q_stride, dim, sums, ahead);
        for (int r = 0; r < R; ++r) {
            const I offset = i_set(-128 * static_cast<int32_t>(code_scales[r * scales_stride + 1]));
            const F scale = f_set(code_scales[r * scales_stride] * factor);
            for (int i = 0; i < T; ++i)
                f_store(scores + r * kPage + (t + i) * 16,
                        f_mul(f_mul(f_from(i_add(sums[r][i], offset)), scale), f_load(k_scales + (t + i) * 16)));
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
inline void scores_float(const uint8_t* k, const float* q, int64_t q_stride, int64_t dim, float factor, float* scores,
                         Ahead& ahead) {
    constexpr int kEach = Kind == Cache::kFp32 ? 1 : 2;
    F sums[R][kKeyTiles];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < kKeyTiles; ++t) sums[r][t] = f_set(0.0f);
    for (int64_t w = 0; w < dim / kEach; ++w) {
        ahead.fetch(kKeyTiles);
        for (int t = 0; t < kKeyTiles; ++t) {
            F numbers[kEach];
            line_floats<Kind>(k + (t * dim / kEach + w) * 64, numbers);
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < kEach; ++i)
                    sums[r][t] = f_fma(numbers[i], f_set(q[r * q_stride + kEach * w + i]), sums[r][t]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < kKeyTiles; ++t) f_store(scores + r * kPage + t * 16, f_mul(sums[r][t], f_set(factor)));
}

template <Cache Kind>
inline F value_at(const void* v, int64_t i) {
    if constexpr (Kind == Cache::kFp32) return f_load(static_cast<const float*>(v) + i);
    if constexpr (Kind == Cache::kBf16) return f_load_bf16(static_cast<const uint16_t*>(v) + i);
    return f_load_half(static_cast<const uint16_t*>(v) + i);
}

// sums[r][d] = sums[r][d] * fade[r] + sum_j weights[r][j] v[j][d], keys in order
template <Cache Kind, int R, int Chunks>
inline void mix_chunk(const void* v, int64_t dim, int64_t at, int keys, const float* weights, const float* fade, float* sums,
                      Ahead& ahead) {
    F acc[R][Chunks];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < Chunks; ++c) acc[r][c] = f_mul(f_load(sums + r * dim + at + c * 16), f_set(fade[r]));
    for (int j = 0; j < keys; ++j) {
        ahead.fetch(Chunks / (Kind == Cache::kFp32 ? 1 : 2));
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

// Weights of a page's values as codes of 14 bits; the sums they give are times the scale.
inline void round_weights(const float* x, int8_t* codes, float* scale) {
    constexpr float kLevels = 127.0f * 128.0f + 127.0f;
    const float top = largest_of(x, kPage);
    if (codes_without(top, codes, 2 * kPage, scale)) return;
    *scale = top * (1.0f / kLevels);
    const F inverse = f_set(kLevels / top);
    for (int i = 0; i < kPage; i += 16) {
        const I code = i_round(f_mul(f_load(x + i), inverse)), above = i_over128(code);
        i_store_i8(codes + i, above, false);
        i_store_i8(codes + kPage + i, i_add(code, i_mul(above, i_set(-128))), false);
    }
}

template <int R, int T>
inline void mix_tiles(const uint8_t* v, int64_t dim, int64_t at, const int8_t* codes, const float* scales, const float* fade,
                      float* sums, Ahead& ahead) {
    I found[R][T];
    products<true, R, T>(v + at * kPage, kPage / 4, codes, 2 * kPage, kPage, found, ahead);
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) {
            float* sum = sums + r * dim + at + t * 16;
            f_store(sum, f_fma(f_from(found[r][t]), f_set(scales[r]), f_mul(f_load(sum), f_set(fade[r]))));
        }
}

// The same for int8 values, in whole numbers: codes [R, 2, 64] of the weights, and their scales. All keys of the page count:
// those that a row doesn't see have the code 0.
template <int R>
inline void mix_int8(const uint8_t* v, int64_t dim, const int8_t* codes, const float* scales, const float* fade, float* sums,
                     Ahead& ahead) {
    constexpr int T = R == 1 ? kPageTiles : kPageTilesOfTwo;
    int64_t at = 0;
    for (; at + 16 * T <= dim; at += 16 * T) mix_tiles<R, T>(v, dim, at, codes, scales, fade, sums, ahead);
    for (; at < dim; at += 16) mix_tiles<R, 1>(v, dim, at, codes, scales, fade, sums, ahead);
}

// One head's rows of a sequence, and what attention knows of them so far: a running softmax, and the values mixed.
struct Rows {
    int64_t kv_head, rows, from;  // rows before `from` see nothing of the page
    const float* q;               // [rows, q_stride]
    const int8_t* codes;
    const float* code_scales;
    float *scores;             // [rows, 64], then weights
    int8_t* weights;           // [rows, 2, 64], codes of the weights of int8 values
    float *top, *total, *fade, *scale, *sums;  // [rows], and [rows, dim]
};

// What attention of some heads has beside their cache.
struct Strides {
    int64_t q, codes;
};

template <Cache Kind>
inline void scores_of(const Pages& p, const Rows& x, Strides stride, const uint8_t* k, const float* k_scales, Ahead& ahead) {
    const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(p.dim));
    for (int64_t r = x.from; r < x.rows;) {
        float* scores = x.scores + r * kPage;
        if constexpr (Kind == Cache::kInt8) {
            const int8_t* codes = x.codes + r * stride.codes;
            const float* scales = x.code_scales + r * 2 * p.heads;
            if (x.rows - r >= 2) {
                scores_int8<2>(k, k_scales, codes, scales, stride.codes, 2 * p.heads, p.dim, factor, scores, ahead);
                r += 2;
            } else {
                scores_int8<1>(k, k_scales, codes, scales, stride.codes, 2 * p.heads, p.dim, factor, scores, ahead);
                r += 1;
            }
        } else if (x.rows - r >= 4) {
            scores_float<4, Kind>(k, x.q + r * stride.q, stride.q, p.dim, factor, scores, ahead);
            r += 4;
        } else {
            scores_float<1, Kind>(k, x.q + r * stride.q, stride.q, p.dim, factor, scores, ahead);
            r += 1;
        }
    }
}

// Scores become weights, and join the running softmax. Row r sees keys up to `position` + r, the page begins with first_key.
inline void weigh_page(const Rows& x, int64_t position, int64_t first_key, const float* v_scales) {
    for (int64_t r = x.from; r < x.rows; ++r) {
        const int64_t keys = position + r - first_key + 1;
        float* weights = x.scores + r * kPage;
        F scores[kKeyTiles], highest = f_set(-INFINITY);
        for (int t = 0; t < kKeyTiles; ++t) {
            scores[t] = f_first(f_load(weights + t * 16), static_cast<int>(keys - t * 16), -INFINITY);
            highest = f_max(highest, scores[t]);
        }
        const float before = x.top[r], now = max_lanes(highest), top = before > now ? before : now;
        x.top[r] = top;
        x.fade[r] = 0.0f;
        if (before > -INFINITY) {
            float lanes[16];
            f_store(lanes, f_exp(f_set(before - top)));
            x.fade[r] = lanes[0];
        }
        F sum = f_set(0.0f);
        for (int t = 0; t < kKeyTiles; ++t) {
            F weight = f_exp(f_sub(scores[t], f_set(top)));
            weight = f_first(weight, static_cast<int>(keys - t * 16), 0.0f);
            sum = f_add(sum, weight);
            if (v_scales) {  // the value's scale joins its weight; what was never stored is no number
                weight = f_mul(weight, f_load(v_scales + t * 16));
                weight = f_first(weight, static_cast<int>(keys - t * 16), 0.0f);
            }
            f_store(weights + t * 16, weight);
        }
        x.total[r] = x.total[r] * x.fade[r] + sum_lanes(sum);
        if (v_scales) round_weights(weights, x.weights + r * 2 * kPage, x.scale + r);
    }
}

template <Cache Kind>
inline void mix_page(const Pages& p, const Rows& x, int64_t position, int64_t first_key, const uint8_t* v, float* widened,
                     Ahead& ahead) {
    const int64_t dim = p.dim, most = position + x.rows - first_key;
    const int keys = static_cast<int>(most < kPage ? most : kPage);
    int64_t r = x.from;
    if constexpr (Kind == Cache::kInt8) {
        for (; r + 2 <= x.rows; r += 2)
            mix_int8<2>(v, dim, x.weights + r * 2 * kPage, x.scale + r, x.fade + r, x.sums + r * dim, ahead);
        for (; r < x.rows; ++r)
            mix_int8<1>(v, dim, x.weights + r * 2 * kPage, x.scale + r, x.fade + r, x.sums + r * dim, ahead);
    } else if (x.rows - r >= 8) {  // many rows: values as floats once
        const float* values = widened;
        if constexpr (Kind == Cache::kFp32)
            values = reinterpret_cast<const float*>(v);
        else
            for (int64_t i = 0; i < keys * dim; i += 16) f_store(widened + i, value_at<Kind>(v, i));
        for (; r + 2 <= x.rows; r += 2)
            mix<Cache::kFp32, 2>(values, dim, keys, x.scores + r * kPage, x.fade + r, x.sums + r * dim, ahead);
        for (; r < x.rows; ++r)
            mix<Cache::kFp32, 1>(values, dim, keys, x.scores + r * kPage, x.fade + r, x.sums + r * dim, ahead);
    } else {
        for (; r < x.rows; ++r) mix<Kind, 1>(v, dim, keys, x.scores + r * kPage, x.fade + r, x.sums + r * dim, ahead);
    }
}

// Page by page, and of each page head by head, as they lie in memory.
template <Cache Kind>
void attend_pages(const Pages& p, Rows* heads, int64_t count, Strides stride, int64_t position, const int32_t* table,
                  float* widened) {
    const int64_t rows = heads[0].rows, part = part_bytes(p), first = heads[0].kv_head;
    const int64_t bytes = (heads[count - 1].kv_head - first + 1) * part;
    for (int64_t page = 0; page * kPage < position + rows; ++page) {
        const int64_t first_key = page * kPage, at = part_at(p, table[page], first);
        const int64_t scales_at = (table[page] * p.kv_heads + first) * kPage;
        const float* k_scales = Kind == Cache::kInt8 ? p.k_scales + scales_at : nullptr;
        const float* v_scales = Kind == Cache::kInt8 ? p.v_scales + scales_at : nullptr;
        const bool last = (page + 1) * kPage >= position + rows;
        const uint8_t *k = p.k + at, *v = p.v + at, *after = last ? nullptr : p.k + part_at(p, table[page + 1], first);
        if (Kind == Cache::kInt8 && !last) {  // the next scales, in stretches of their own
            const int64_t next = (table[page + 1] * p.kv_heads + first) * kPage;
            for (int64_t i = 0; i < bytes / part * kPage; i += 16) {
                prefetch_far(p.k_scales + next + i);
                prefetch_far(p.v_scales + next + i);
            }
        }
        Ahead keys{k, v, bytes}, values{v, after, bytes}, nothing{nullptr, nullptr, 0};
        // heads that share keys need nothing new among themselves
        const auto turns = [&](int64_t h) { return h == 0 || heads[h].kv_head != heads[h - 1].kv_head; };
        for (int64_t h = 0; h < count; ++h) {
            Rows& x = heads[h];
            x.from = first_key > position ? first_key - position : 0;
            const int64_t kv = x.kv_head - first;
            scores_of<Kind>(p, x, stride, k + kv * part, k_scales + kv * kPage, turns(h) ? keys : nothing);
        }
        for (int64_t h = 0; h < count; ++h)
            weigh_page(heads[h], position, first_key, v_scales ? v_scales + (heads[h].kv_head - first) * kPage : nullptr);
        for (int64_t h = 0; h < count; ++h)
            mix_page<Kind>(p, heads[h], position, first_key, v + (heads[h].kv_head - first) * part, widened,
                           turns(h) ? values : nothing);
    }
}

void attend(const Pages& p, int64_t head, int64_t heads, const float* q, const int8_t* codes, const float* code_scales,
            int64_t q_stride, int64_t code_stride, int64_t rows, int64_t position, const int32_t* table, float* out,
            int64_t out_stride, char* scratch) {
    const int64_t dim = p.dim, all = heads * rows;
    float* sums = reinterpret_cast<float*>(scratch);  // [heads, rows, dim]
    float* scores = sums + kQueryBlock * dim;         // [heads, rows, 64]
    float* widened = scores + kQueryBlock * kPage;    // [64, dim]
    int8_t* weights = reinterpret_cast<int8_t*>(widened + kPage * dim);  // [heads, rows, 2, 64]
    float top[kQueryBlock], total[kQueryBlock], fade[kQueryBlock], scale[kQueryBlock];
    for (int64_t r = 0; r < all; ++r) {
        top[r] = -INFINITY;
        total[r] = 0.0f;
    }
    for (int64_t i = 0; i < all * dim; i += 16) f_store(sums + i, f_set(0.0f));
    Rows of[kQueryBlock];
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = h * rows;
        of[h] = {(head + h) / (p.heads / p.kv_heads), rows, 0, q + h * dim, codes ? codes + 2 * h * dim : nullptr,
                 code_scales ? code_scales + 2 * h : nullptr, scores + at * kPage, weights + at * 2 * kPage,
                 top + at, total + at, fade + at, scale + at, sums + at * dim};
    }
    const Strides stride{q_stride, code_stride};
    if (p.kind == Cache::kInt8)
        attend_pages<Cache::kInt8>(p, of, heads, stride, position, table, widened);
    else if (p.kind == Cache::kBf16)
        attend_pages<Cache::kBf16>(p, of, heads, stride, position, table, widened);
    else if (p.kind == Cache::kFp16)
        attend_pages<Cache::kFp16>(p, of, heads, stride, position, table, widened);
    else
        attend_pages<Cache::kFp32>(p, of, heads, stride, position, table, widened);
    for (int64_t r = 0; r < all; ++r) {
        const F inverse = f_set(1.0f / total[r]);
        float* row = out + r / rows * dim + r % rows * out_stride;
        for (int64_t i = 0; i < dim; i += 16) f_store(row + i, f_mul(f_load(sums + r * dim + i), inverse));
    }
}

}  // namespace
