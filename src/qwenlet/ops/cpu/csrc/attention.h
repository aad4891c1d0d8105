// Attention over pages. A running softmax goes page by page; of each all heads' scores come first, then their weights, then
// the values: long stretches of memory.
#pragma once

#include <cmath>

#include "pages.h"

namespace {

// Fetches lines ahead of those that are read, in a stretch of memory and on into the next one. Into the second cache: the way
// into the first is taken by what is read.
struct Fetch {
    const uint8_t *stretch, *next;  // `next` may be null
    int64_t bytes;                  // of either
    int64_t at = 0;

    void pass(int64_t lines) {
        const int64_t begin = at + kPagesAhead.bytes;
        at += lines * 64;
        const uint8_t* from = begin < bytes ? stretch + begin : begin < 2 * bytes && next ? next + (begin - bytes) : nullptr;
        if (from)
            for (int64_t i = 0; i < lines; i += kPagesAhead.every) prefetch_far(from + i * 64);
    }
};

// Products of R rows with T tiles, which lie `words` lines apart; whether of signed bytes with codes that aren't negative,
// or of bytes stored 128 higher with signed codes. A code is 128 a + b: its a at codes, its b `low` bytes behind.
template <bool Signed, int R, int T>
inline void products(const uint8_t* tiles, int64_t words, const int8_t* codes, int64_t stride, int64_t low, I (*sums)[T],
                     Fetch& ahead) {
    I above[R][T], below[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) above[r][t] = below[r][t] = i_set(0);
    for (int64_t w = 0; w < words; w += 2) {
        ahead.pass(2 * T);
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

// Products as `products` has them for many rows, at least kLeast, and a multiple of kWords words: sums [count, kTileSums]. This
// one has none.
struct NoMany {
    static constexpr int64_t kLeast = kQueryBlock + 1, kWords = 16;
    template <bool Signed>
    void products(const uint8_t*, int64_t, int64_t, const int8_t*, int64_t, int64_t, int64_t, int32_t*, Fetch&) {}
};

// Sums of a tile and many rows, [2, rows, 16]: of the codes' a, and of their b.
constexpr int64_t kTileSums = 2 * kQueryBlock * 16;
inline I sum_of(const int32_t* sums, int64_t tile, int64_t row) {
    const int32_t* above = sums + tile * kTileSums + row * 16;
    return i_add(i_load(above + kTileSums / 2), i_times128(i_load(above)));
}

// Codes of queries and what stands for them: score = (sum + offset) * scale * the key's.
inline F score_of(I sum, float code_scale, float code_sum, float factor, const float* k_scales) {
    const I offset = i_set(-128 * static_cast<int32_t>(code_sum));  // keys are stored 128 higher
    return f_mul(f_mul(f_from(i_add(sum, offset)), f_set(code_scale * factor)), f_load(k_scales));
}

// scores [R, 64] of R rows against the keys of a page. Queries have 15 bits, see kernels.h.
template <int R>
inline void scores_int8(const uint8_t* k, const float* k_scales, const int8_t* codes, const float* code_scales,
                        int64_t scales_stride, int64_t dim, float factor, float* scores, Fetch& ahead) {
    constexpr int T = R == 1 ? kPageTiles : kPageTilesOfTwo;
    for (int t = 0; t < kKeyTiles; t += T) {
        I sums[R][T];
        products<false, R, T>(k + t * 16 * dim, dim / 4, codes, 2 * dim, dim, sums, ahead);
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < T; ++i) {
                const float* scale = code_scales + r * scales_stride;
                f_store(scores + r * kPage + (t + i) * 16,
                        score_of(sums[r][i], scale[0], scale[1], factor, k_scales + (t + i) * 16));
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
                         Fetch& ahead) {
    constexpr int kEach = Kind == Cache::kFp32 ? 1 : 2;
    F sums[R][kKeyTiles];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < kKeyTiles; ++t) sums[r][t] = f_set(0.0f);
    for (int64_t w = 0; w < dim / kEach; ++w) {
        ahead.pass(kKeyTiles);
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
                      Fetch& ahead) {
    F acc[R][Chunks];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < Chunks; ++c) acc[r][c] = f_mul(f_load(sums + r * dim + at + c * 16), f_set(fade[r]));
    for (int j = 0; j < keys; ++j) {
        ahead.pass(Chunks / (Kind == Cache::kFp32 ? 1 : 2));
        for (int c = 0; c < Chunks; ++c) {
            const F value = value_at<Kind>(v, j * dim + at + c * 16);
            for (int r = 0; r < R; ++r) acc[r][c] = f_fma(f_set(weights[r * kPage + j]), value, acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < Chunks; ++c) f_store(sums + r * dim + at + c * 16, acc[r][c]);
}

template <Cache Kind, int R>
inline void mix(const void* v, int64_t dim, int keys, const float* weights, const float* fade, float* sums, Fetch& ahead) {
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

// sums [16] = sums * fade + found * scale
inline void mix_in(float* sums, I found, float scale, float fade) {
    f_store(sums, f_fma(f_from(found), f_set(scale), f_mul(f_load(sums), f_set(fade))));
}

template <int R, int T>
inline void mix_tiles(const uint8_t* v, int64_t dim, int64_t at, const int8_t* codes, const float* scales, const float* fade,
                      float* sums, Fetch& ahead) {
    I found[R][T];
    products<true, R, T>(v + at * kPage, kPage / 4, codes, 2 * kPage, kPage, found, ahead);
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) mix_in(sums + r * dim + at + t * 16, found[r][t], scales[r], fade[r]);
}

// The same for int8 values, in whole numbers: codes [R, 2, 64] of the weights, and their scales. All keys of the page count:
// those that a row doesn't see have the code 0.
template <int R>
inline void mix_int8(const uint8_t* v, int64_t dim, const int8_t* codes, const float* scales, const float* fade, float* sums,
                     Fetch& ahead) {
    constexpr int T = R == 1 ? kPageTiles : kPageTilesOfTwo;
    int64_t at = 0;
    for (; at + 16 * T <= dim; at += 16 * T) mix_tiles<R, T>(v, dim, at, codes, scales, fade, sums, ahead);
    for (; at < dim; at += 16) mix_tiles<R, 1>(v, dim, at, codes, scales, fade, sums, ahead);
}

// One head's rows of a sequence, and what attention knows of them so far: a running softmax, and the values mixed.
struct Rows {
    int64_t kv_head, rows, from;  // rows before `from` see nothing of the page
    const float* q;               // [rows, q_stride]
    const int8_t* codes;          // [rows, 2, dim]
    const float* code_scales;
    float *scores;             // [rows, 64], then weights
    int8_t* weights;           // [rows, 2, 64], codes of the weights of int8 values
    int32_t* found;            // [4 or dim / 16, kTileSums]
    float *top, *total, *fade, *scale, *sums;  // [rows], and [rows, dim]
};

template <Cache Kind, class Many>
inline void scores_of(const Pages& p, const Rows& x, int64_t q_stride, const uint8_t* k, const float* k_scales, Many& many,
                      Fetch& ahead) {
    const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(p.dim));
    int64_t r = x.from;
    if (Kind == Cache::kInt8 && x.rows - r >= Many::kLeast && p.dim / 4 % Many::kWords == 0) {
        const int64_t rows = x.rows - r;
        many.template products<false>(k, kKeyTiles, p.dim / 4, x.codes + r * 2 * p.dim, 2 * p.dim, p.dim, rows,
                                      x.found, ahead);
        for (int64_t i = 0; i < rows; ++i) {
            const float* scale = x.code_scales + (r + i) * 2 * p.heads;
            for (int64_t t = 0; t < kKeyTiles; ++t)
                f_store(x.scores + (r + i) * kPage + t * 16,
                        score_of(sum_of(x.found, t, i), scale[0], scale[1], factor, k_scales + t * 16));
        }
        return;
    }
    while (r < x.rows) {
        float* scores = x.scores + r * kPage;
        if constexpr (Kind == Cache::kInt8) {
            const int8_t* codes = x.codes + r * 2 * p.dim;
            const float* scales = x.code_scales + r * 2 * p.heads;
            if (x.rows - r >= 2) {
                scores_int8<2>(k, k_scales, codes, scales, 2 * p.heads, p.dim, factor, scores, ahead);
                r += 2;
            } else {
                scores_int8<1>(k, k_scales, codes, scales, 2 * p.heads, p.dim, factor, scores, ahead);
                r += 1;
            }
        } else if (x.rows - r >= 4) {
            scores_float<4, Kind>(k, x.q + r * q_stride, q_stride, p.dim, factor, scores, ahead);
            r += 4;
        } else {
            scores_float<1, Kind>(k, x.q + r * q_stride, q_stride, p.dim, factor, scores, ahead);
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
        const bool all = keys >= kPage;
        for (int t = 0; t < kKeyTiles; ++t) {
            scores[t] = f_load(weights + t * 16);
            if (!all) scores[t] = f_first(scores[t], static_cast<int>(keys - t * 16), -INFINITY);
            highest = f_max(highest, scores[t]);
        }
        const float before = x.top[r], now = f_highest(highest), top = before > now ? before : now;
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
            if (!all) weight = f_first(weight, static_cast<int>(keys - t * 16), 0.0f);
            sum = f_add(sum, weight);
            if (v_scales) {  // the value's scale joins its weight; what was never stored is no number
                weight = f_mul(weight, f_load(v_scales + t * 16));
                if (!all) weight = f_first(weight, static_cast<int>(keys - t * 16), 0.0f);
            }
            f_store(weights + t * 16, weight);
        }
        x.total[r] = x.total[r] * x.fade[r] + f_sum(sum);
        if (v_scales) round_weights(weights, x.weights + r * 2 * kPage, x.scale + r);
    }
}

template <Cache Kind, class Many>
inline void mix_page(const Pages& p, const Rows& x, int64_t position, int64_t first_key, const uint8_t* v, float* widened,
                     Many& many, Fetch& ahead) {
    const int64_t dim = p.dim, most = position + x.rows - first_key;
    const int keys = static_cast<int>(most < kPage ? most : kPage);
    int64_t r = x.from;
    if constexpr (Kind == Cache::kInt8) {
        if (x.rows - r >= Many::kLeast) {
            const int64_t rows = x.rows - r, tiles = dim / 16;
            many.template products<true>(v, tiles, kPage / 4, x.weights + r * 2 * kPage, 2 * kPage, kPage, rows, x.found, ahead);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t t = 0; t < tiles; ++t)
                    mix_in(x.sums + (r + i) * dim + t * 16, sum_of(x.found, t, i), x.scale[r + i], x.fade[r + i]);
            return;
        }
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
template <Cache Kind, class Many>
void attend_pages(const Pages& p, Rows* heads, int64_t count, int64_t q_stride, int64_t position, const int32_t* table,
                  float* widened) {
    Many many;
    const int64_t rows = heads[0].rows, part = part_bytes(p), first = heads[0].kv_head, among = first % p.group;
    const int64_t kv_heads = heads[count - 1].kv_head - first + 1, bytes = kv_heads * part;
    for (int64_t page = 0; page * kPage < position + rows; ++page) {
        const int64_t first_key = page * kPage;
        const bool last = (page + 1) * kPage >= position + rows;
        const GroupPage here = group_page(p, table[page], first), next = group_page(p, table[last ? page : page + 1], first);
        const uint8_t *k = here.k + among * part, *v = here.v + among * part;
        const float* k_scales = Kind == Cache::kInt8 ? here.k_scales + among * kPage : nullptr;
        const float* v_scales = Kind == Cache::kInt8 ? here.v_scales + among * kPage : nullptr;
        if (Kind == Cache::kInt8 && !last)
            for (int64_t i = among * kPage; i < (among + kv_heads) * kPage; i += 16) {
                prefetch_far(next.k_scales + i);
                prefetch_far(next.v_scales + i);
            }
        Fetch keys{k, v, bytes}, values{v, last ? nullptr : next.k + among * part, bytes}, nothing{nullptr, nullptr, 0};
        // heads that share keys need nothing new among themselves
        const auto turns = [&](int64_t h) { return h == 0 || heads[h].kv_head != heads[h - 1].kv_head; };
        for (int64_t h = 0; h < count; ++h) {
            Rows& x = heads[h];
            x.from = first_key > position ? first_key - position : 0;
            const int64_t kv = x.kv_head - first;
            scores_of<Kind>(p, x, q_stride, k + kv * part, k_scales + kv * kPage, many, turns(h) ? keys : nothing);
        }
        for (int64_t h = 0; h < count; ++h)
            weigh_page(heads[h], position, first_key, v_scales ? v_scales + (heads[h].kv_head - first) * kPage : nullptr);
        for (int64_t h = 0; h < count; ++h)
            mix_page<Kind>(p, heads[h], position, first_key, v + (heads[h].kv_head - first) * part, widened, many,
                           turns(h) ? values : nothing);
    }
}

template <class Many>
void attend(const Pages& p, int64_t head, int64_t heads, const float* q, const int8_t* codes, const float* code_scales,
            int64_t q_stride, int64_t code_stride, int64_t rows, int64_t position, const int32_t* table, float* out,
            int64_t out_stride, char* scratch) {
    const int64_t dim = p.dim, all = heads * rows;
    float* sums = reinterpret_cast<float*>(scratch);  // [heads, rows, dim]
    float* scores = sums + kQueryBlock * dim;         // [heads, rows, 64]
    float* widened = scores + kQueryBlock * kPage;    // [64, dim]
    int8_t* weights = reinterpret_cast<int8_t*>(widened + kPage * dim);               // [heads, rows, 2, 64]
    int32_t* found = reinterpret_cast<int32_t*>(weights + kQueryBlock * 2 * kPage);  // [4 or dim / 16, kTileSums]
    int8_t* queries = reinterpret_cast<int8_t*>(found + kTileSums * kMostDim / 16);     // [heads, rows, 2, dim]
    float top[kQueryBlock], total[kQueryBlock], fade[kQueryBlock], scale[kQueryBlock];
    for (int64_t r = 0; r < all; ++r) {
        top[r] = -INFINITY;
        total[r] = 0.0f;
    }
    for (int64_t i = 0; i < all * dim; i += 16) f_store(sums + i, f_set(0.0f));
    Rows of[kQueryBlock];
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = h * rows;
        // side by side: where they come from they may all be 4 kB apart, and then push each other out of the first cache
        for (int64_t r = 0; codes && r < rows; ++r)
            std::memcpy(queries + (at + r) * 2 * dim, codes + r * code_stride + 2 * h * dim, static_cast<size_t>(2 * dim));
        of[h] = {(head + h) / (p.heads / p.kv_heads), rows, 0, q + h * dim, codes ? queries + at * 2 * dim : nullptr,
                 code_scales ? code_scales + 2 * h : nullptr, scores + at * kPage, weights + at * 2 * kPage, found,
                 top + at, total + at, fade + at, scale + at, sums + at * dim};
    }
    if (p.kind == Cache::kInt8)
        attend_pages<Cache::kInt8, Many>(p, of, heads, q_stride, position, table, widened);
    else if (p.kind == Cache::kBf16)
        attend_pages<Cache::kBf16, NoMany>(p, of, heads, q_stride, position, table, widened);
    else if (p.kind == Cache::kFp16)
        attend_pages<Cache::kFp16, NoMany>(p, of, heads, q_stride, position, table, widened);
    else
        attend_pages<Cache::kFp32, NoMany>(p, of, heads, q_stride, position, table, widened);
    for (int64_t r = 0; r < all; ++r) {
        const F inverse = f_set(1.0f / total[r]);
        float* row = out + r / rows * dim + r % rows * out_stride;
        for (int64_t i = 0; i < dim; i += 16) f_store(row + i, f_mul(f_load(sums + r * dim + i), inverse));
    }
}

}  // namespace
