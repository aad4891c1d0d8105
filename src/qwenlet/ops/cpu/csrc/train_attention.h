// Causal attention of whole rows and the way back through it, as training needs them: a row's keys lie beside its queries,
// and nothing is kept but the logarithm of each softmax's sum. Everything is float32 in here. Scores of a query against 64
// keys are lanes of four registers, which wants keys turned, [dim, 64]; all other products have the head's numbers as
// lanes and take rows as they are. A block of keys stays in the first cache while a block of queries passes.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "rows.h"

namespace {

using qwenlet::kTrainKeys;
using qwenlet::kTrainQueries;
using qwenlet::TrainAttention;

// c[r][0 .. 16 T) = (or += ) sum over i < count of a[r a_row + i a_step] b[i b_row + 0 .. 16 T)
template <int R, int T>
inline void train_block(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t count,
                        float* c, int64_t c_row, bool add) {
    F acc[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) acc[r][t] = add ? f_load(c + r * c_row + t * 16) : f_set(0.0f);
    for (int64_t i = 0; i < count; ++i) {
        F line[T];
        for (int t = 0; t < T; ++t) line[t] = f_load(b + i * b_row + t * 16);
        for (int r = 0; r < R; ++r) {
            const F value = f_set(a[r * a_row + i * a_step]);
            for (int t = 0; t < T; ++t) acc[r][t] = f_fma(line[t], value, acc[r][t]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) f_store(c + r * c_row + t * 16, acc[r][t]);
}

template <int R, int T>
void train_tiles(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t count, float* c,
                 int64_t c_row, int64_t tiles, bool add) {
    for (; tiles >= T; tiles -= T, b += T * 16, c += T * 16)
        train_block<R, T>(a, a_row, a_step, b, b_row, count, c, c_row, add);
    if constexpr (T > 1) train_tiles<R, T / 2>(a, a_row, a_step, b, b_row, count, c, c_row, tiles, add);
}

// The same for `rows` <= R rows and any number of tiles.
template <int R>
void train_strip(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t count,
                 float* c, int64_t c_row, int64_t tiles, bool add) {
    if (rows == R) return train_tiles<R, kFp32Tiles>(a, a_row, a_step, b, b_row, count, c, c_row, tiles, add);
    if constexpr (R > 1) train_strip<R - 1>(rows, a, a_row, a_step, b, b_row, count, c, c_row, tiles, add);
}

inline F train_load(int bits, const void* from, int64_t at) {
    return bits == 16 ? f_load_bf16(static_cast<const uint16_t*>(from) + at) : f_load(static_cast<const float*>(from) + at);
}

inline void train_store(int bits, void* to, int64_t at, F value) {
    if (bits == 16) return f_store_bf16(static_cast<uint16_t*>(to) + at, value);
    f_store(static_cast<float*>(to) + at, value);
}

// Rows of `dim` numbers, `stride` apart, as floats side by side.
inline void train_rows(int bits, const void* from, int64_t at, int64_t stride, int64_t rows, int64_t dim, float scale,
                       float* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < dim; i += 16)
            f_store(to + r * dim + i, f_mul(train_load(bits, from, at + r * stride + i), f_set(scale)));
}

// Rows [rows, dim] turned in blocks of 64: [blocks, dim, 64], zeros beyond.
inline void train_turned(const float* from, int64_t rows, int64_t dim, float* to) {
    for (int64_t block = 0; block < rows; block += kTrainKeys, to += kTrainKeys * dim)
        for (int64_t i = 0; i < dim; ++i) {
            const int64_t here = std::min(kTrainKeys, rows - block);
            for (int64_t j = 0; j < here; ++j) to[i * kTrainKeys + j] = from[(block + j) * dim + i];
            for (int64_t j = here; j < kTrainKeys; ++j) to[i * kTrainKeys + j] = 0.0f;
        }
}

// Registers of sixteen keys that hold the first `keys` of a block; none for less than one.
inline int64_t train_lanes(int64_t keys) { return keys <= 0 ? 0 : (std::min(keys, kTrainKeys) + 15) / 16; }

// A row's scores become its weights, without their common factor; returns the logarithm of e^score's sum, and the factor.
inline float train_softmax(float* scores, int64_t keys, float* factor) {
    F highest = f_set(-INFINITY);
    int64_t i = 0;
    for (; i + 16 <= keys; i += 16) highest = f_max(highest, f_load(scores + i));
    if (i < keys) highest = f_max(highest, f_first(f_load(scores + i), static_cast<int>(keys - i), -INFINITY));
    const float top = f_highest(highest);
    F sum = f_set(0.0f);
    for (i = 0; i < keys; i += 16) {
        F weight = f_exp(f_sub(f_load(scores + i), f_set(top)));
        if (keys - i < 16) weight = f_first(weight, static_cast<int>(keys - i), 0.0f);
        sum = f_add(sum, weight);
        f_store(scores + i, weight);
    }
    const float total = f_sum(sum);
    *factor = 1.0f / total;
    return top + std::log(total);
}

// One row (tokens [first, first + length)) and the query heads that share a head of keys.
void train_forward(const TrainAttention& p, int64_t first, int64_t length, int64_t kv_head, float* scratch) {
    const int64_t dim = p.dim, shared = p.heads / p.kv_heads, out_stride = p.heads * dim;
    const int64_t padded = (length + kTrainKeys - 1) / kTrainKeys * kTrainKeys;
    float* turned = scratch;                       // [blocks, dim, 64]
    float* values = turned + padded * dim;         // [length, dim]; keys, until they are turned
    float* queries = values + padded * dim;        // [block, dim]
    float* mixed = queries + kTrainQueries * dim;  // [block, dim]
    float* scores = mixed + kTrainQueries * dim;   // [block, padded]
    train_rows(p.bits, p.k, first * p.k_stride + kv_head * dim, p.k_stride, length, dim, 1.0f, values);
    train_turned(values, length, dim, turned);
    train_rows(p.bits, p.v, first * p.v_stride + kv_head * dim, p.v_stride, length, dim, 1.0f, values);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
    for (int64_t h = kv_head * shared; h < (kv_head + 1) * shared; ++h)
        for (int64_t q = 0; q < length; q += kTrainQueries) {
            const int64_t count = std::min(kTrainQueries, length - q);
            train_rows(p.bits, p.q, (first + q) * p.q_stride + h * dim, p.q_stride, count, dim, scale, queries);
            for (int64_t k = 0; k < q + count; k += kTrainKeys)
                for (int64_t r = 0; r < count; r += kFp32Rows) {
                    const int64_t rows = std::min<int64_t>(kFp32Rows, count - r);
                    train_strip<kFp32Rows>(rows, queries + r * dim, dim, 1, turned + k * dim, kTrainKeys, dim,
                                           scores + r * padded + k, padded, train_lanes(q + r + rows - k), false);
                }
            float factors[kTrainQueries];
            for (int64_t r = 0; r < count; ++r)
                p.sums[h * p.tokens + first + q + r] = train_softmax(scores + r * padded, q + r + 1, factors + r);
            for (int64_t k = 0; k < q + count; k += kTrainKeys)
                for (int64_t r = 0; r < count; r += kFp32Rows) {
                    const int64_t rows = std::min<int64_t>(kFp32Rows, count - r), last = q + r + rows;
                    if (last <= k) continue;
                    // what a strip's rows see beyond each other's ends is zero
                    for (int64_t i = 0; i < rows; ++i)
                        for (int64_t j = std::max(q + r + i + 1, k); j < std::min(last, k + kTrainKeys); ++j)
                            scores[(r + i) * padded + j] = 0.0f;
                    train_strip<kFp32Rows>(rows, scores + r * padded + k, padded, 1, values + k * dim, dim,
                                           std::min(last - k, kTrainKeys), mixed + r * dim, dim, dim / 16, k > 0);
                }
            for (int64_t r = 0; r < count; ++r)
                for (int64_t i = 0; i < dim; i += 16)
                    train_store(p.bits, p.out, (first + q + r) * out_stride + h * dim + i,
                                f_mul(f_load(mixed + r * dim + i), f_set(factors[r])));
        }
}

// Weights of a row on a block of keys, in place of its scores, and the scores' gradient in place of the weights'.
inline void train_weights(float* scores, float* grads, int64_t keys, float scale, float log_sum, float mean) {
    for (int64_t i = 0; i < kTrainKeys; i += 16) {
        if (i >= keys) {
            f_store(scores + i, f_set(0.0f));
            f_store(grads + i, f_set(0.0f));
            continue;
        }
        F weight = f_exp(f_fma(f_load(scores + i), f_set(scale), f_set(-log_sum)));
        if (keys - i < 16) weight = f_first(weight, static_cast<int>(keys - i), 0.0f);
        f_store(scores + i, weight);
        f_store(grads + i, f_mul(f_mul(weight, f_set(scale)), f_sub(f_load(grads + i), f_set(mean))));
    }
}

void train_backward(const TrainAttention& p, int64_t first, int64_t length, int64_t kv_head, float* scratch) {
    const int64_t dim = p.dim, shared = p.heads / p.kv_heads, out_stride = p.heads * dim, kv_stride = p.kv_heads * dim;
    const int64_t padded = (length + kTrainKeys - 1) / kTrainKeys * kTrainKeys, room = padded * dim;
    float *keys = scratch, *keys_turned = keys + room, *values_turned = keys_turned + room;  // [length, dim], [blocks, dim, 64] twice
    float *queries = values_turned + room, *grads = queries + room;                          // [length, dim] each, as the next
    float *of_queries = grads + room, *of_keys = of_queries + room, *of_values = of_keys + room;
    float* weights = of_values + room;                            // [block, 64]
    float* of_scores = weights + kTrainQueries * kTrainKeys;      // [block, 64]
    float* means = of_scores + kTrainQueries * kTrainKeys;        // [length]
    train_rows(p.bits, p.v, first * p.v_stride + kv_head * dim, p.v_stride, length, dim, 1.0f, keys);
    train_turned(keys, length, dim, values_turned);
    train_rows(p.bits, p.k, first * p.k_stride + kv_head * dim, p.k_stride, length, dim, 1.0f, keys);
    train_turned(keys, length, dim, keys_turned);
    std::fill(of_keys, of_keys + room, 0.0f);
    std::fill(of_values, of_values + room, 0.0f);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
    for (int64_t h = kv_head * shared; h < (kv_head + 1) * shared; ++h) {
        const int64_t at = first * out_stride + h * dim;
        train_rows(p.bits, p.q, first * p.q_stride + h * dim, p.q_stride, length, dim, 1.0f, queries);
        train_rows(p.bits, p.grad, at, out_stride, length, dim, 1.0f, grads);
        std::fill(of_queries, of_queries + room, 0.0f);
        for (int64_t r = 0; r < length; ++r) {  // what a softmax takes off its weights' gradients
            F sum = f_set(0.0f);
            for (int64_t i = 0; i < dim; i += 16)
                sum = f_fma(f_load(grads + r * dim + i), train_load(p.bits, p.out, at + r * out_stride + i), sum);
            means[r] = f_sum(sum);
        }
        for (int64_t k = 0; k < length; k += kTrainKeys) {
            const int64_t here = std::min(kTrainKeys, length - k);
            for (int64_t q = k / kTrainQueries * kTrainQueries; q < length; q += kTrainQueries) {
                const int64_t count = std::min(kTrainQueries, length - q);
                for (int64_t r = 0; r < count; r += kFp32Rows) {
                    const int64_t rows = std::min<int64_t>(kFp32Rows, count - r), tiles = train_lanes(q + r + rows - k);
                    float *w = weights + r * kTrainKeys, *g = of_scores + r * kTrainKeys;
                    train_strip<kFp32Rows>(rows, queries + (q + r) * dim, dim, 1, keys_turned + k * dim, kTrainKeys, dim, w,
                                           kTrainKeys, tiles, false);
                    train_strip<kFp32Rows>(rows, grads + (q + r) * dim, dim, 1, values_turned + k * dim, kTrainKeys, dim, g,
                                           kTrainKeys, tiles, false);
                    for (int64_t i = 0; i < rows; ++i)
                        train_weights(w + i * kTrainKeys, g + i * kTrainKeys, q + r + i + 1 - k, scale,
                                      p.sums[h * p.tokens + first + q + r + i], means[q + r + i]);
                    if (tiles > 0)
                        train_strip<kFp32Rows>(rows, g, kTrainKeys, 1, keys + k * dim, dim,
                                               std::min(q + r + rows - k, here), of_queries + (q + r) * dim, dim, dim / 16,
                                               true);
                }
                for (int64_t j = 0; j < here; j += kFp32Rows) {
                    const int64_t rows = std::min<int64_t>(kFp32Rows, here - j);
                    const int64_t from = std::max<int64_t>(0, k + j - q);  // no query before it sees key j
                    if (from >= count) break;
                    const int64_t of = from * kTrainKeys + j, b = (q + from) * dim, to = (k + j) * dim;
                    train_strip<kFp32Rows>(rows, weights + of, 1, kTrainKeys, grads + b, dim, count - from, of_values + to,
                                           dim, dim / 16, true);
                    train_strip<kFp32Rows>(rows, of_scores + of, 1, kTrainKeys, queries + b, dim, count - from, of_keys + to,
                                           dim, dim / 16, true);
                }
            }
        }
        for (int64_t r = 0; r < length; ++r)
            for (int64_t i = 0; i < dim; i += 16)
                train_store(p.bits, p.of_q, at + r * out_stride + i, f_load(of_queries + r * dim + i));
    }
    for (int64_t r = 0; r < length; ++r)
        for (int64_t i = 0; i < dim; i += 16) {
            const int64_t to = (first + r) * kv_stride + kv_head * dim + i;
            train_store(p.bits, p.of_k, to, f_load(of_keys + r * dim + i));
            train_store(p.bits, p.of_v, to, f_load(of_values + r * dim + i));
        }
}

}  // namespace
