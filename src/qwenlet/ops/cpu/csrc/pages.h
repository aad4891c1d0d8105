// Keys and values on their way into a page: rotated, rounded and laid out. Keys lie in tiles of sixteen, a word of each in a
// 64-byte line, so sixteen scores come out as lanes. Int8 values lie so too, a word for four tokens, and others row by row.
#pragma once

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

// A group's heads in one page: its keys and its values, and their scales, of int8 ones.
struct GroupPage {
    float *k_scales, *v_scales;
    uint8_t *k, *v;
};

inline GroupPage group_page(const Pages& p, int64_t page, int64_t kv_head) {
    const int64_t scales = p.kind == Cache::kInt8 ? p.group * kPage : 0, part = p.group * part_bytes(p);
    const int64_t bytes = 2 * (scales * static_cast<int64_t>(sizeof(float)) + part);
    uint8_t* at = p.memory + page / p.run * p.run_stride + kv_head / p.group * p.group_stride + page % p.run * bytes;
    float* k_scales = reinterpret_cast<float*>(at);
    uint8_t* k = at + bytes - 2 * part;
    return {k_scales, k_scales + scales, k, k + part};
}

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
    const int64_t dim = p.dim, bytes = item_bytes(p), among = head % p.group;
    const GroupPage to = group_page(p, page, head);
    turn(k, cos, sin, dim, 1.0f);
    // word w of the key lies in line w of its tile
    uint8_t* tile = to.k + among * part_bytes(p) + slot / 16 * 16 * dim * bytes + slot % 16 * 4;
    uint8_t* values = to.v + among * part_bytes(p);
    alignas(64) uint8_t key[kMostDim * 4];
    if (p.kind == Cache::kInt8) {
        round_group(k, dim, reinterpret_cast<int8_t*>(key), to.k_scales + among * kPage + slot, false);
        for (int64_t i = 0; i < dim; ++i) key[i] ^= 0x80;
        int8_t value[kMostDim];
        round_group(v, dim, value, to.v_scales + among * kPage + slot, false);
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

}  // namespace
