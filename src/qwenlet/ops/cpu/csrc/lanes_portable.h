// Sixteen lanes in an array: plain C++ that any compiler vectorizes as far as it may.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ahead.h"

#include "bf16.h"

namespace {

struct F {
    float v[16];
};
struct I {
    int32_t v[16];
};
struct Line {
    uint8_t v[64];
};

constexpr int kGemmRows = 2, kGemmRowsOfBytes = 2, kGemmTiles = 1, kGemvTiles = 1, kGemvSums = 1, kStreamTiles = 1;
constexpr int kStreamRows = 4, kStreamHalves = 1;
constexpr int64_t kStreamedRows = 8, kStreamedRowsOfOthers = 8;
constexpr int kPageTiles = 1, kPageTilesOfTwo = 1;
constexpr Ahead kCodesAhead{0, 1, true}, kCodesOfRowsAhead = kCodesAhead;
constexpr Ahead kFloatsAhead{2048, 1, true}, kFloatsOfRowsAhead = kFloatsAhead, kPagesAhead{8192, 1, false};
constexpr int kFp32Rows = 1, kFp32Tiles = 2;  // more rows than one keep compilers from using registers

template <class Each>
inline F each(Each value) {
    F out;
    for (int i = 0; i < 16; ++i) out.v[i] = value(i);
    return out;
}

inline float half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    uint32_t out;
    if (rest >= 0x7c00) {
        out = sign | 0x7f800000u | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        out = sign | ((rest << 13) + (112u << 23));
    } else {
        const float small = static_cast<float>(rest) * 5.9604644775390625e-08f;  // 2^-24
        std::memcpy(&out, &small, 4);
        out |= sign;
    }
    float value;
    std::memcpy(&value, &out, 4);
    return value;
}

// Round to nearest, ties to even.
inline uint16_t half_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits
        float small;
        std::memcpy(&small, &bits, 4);
        small += 0.5f;
        std::memcpy(&bits, &small, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)));
}

inline F f_set(float v) { return each([=](int) { return v; }); }
inline F f_load(const float* p) { return each([=](int i) { return p[i]; }); }
inline void f_store(float* p, F v) { std::memcpy(p, v.v, sizeof v.v); }
inline F f_load_half(const uint16_t* p) { return each([=](int i) { return half_to_float(p[i]); }); }
inline F f_load_bf16(const uint16_t* p) { return each([=](int i) { return bf16_to_float(p[i]); }); }
inline F f_add(const F& x, const F& y) { return each([&](int i) { return x.v[i] + y.v[i]; }); }
inline F f_sub(const F& x, const F& y) { return each([&](int i) { return x.v[i] - y.v[i]; }); }
inline F f_mul(const F& x, const F& y) { return each([&](int i) { return x.v[i] * y.v[i]; }); }
inline F f_div(const F& x, const F& y) { return each([&](int i) { return x.v[i] / y.v[i]; }); }
inline F f_fma(const F& x, const F& y, const F& z) { return each([&](int i) { return x.v[i] * y.v[i] + z.v[i]; }); }
inline F f_max(const F& x, const F& y) { return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
inline F f_min(const F& x, const F& y) { return each([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; }); }
// Sixteen lanes added, and the largest of them: halves together again and again, an order that all instruction sets have.
inline float f_sum(F v) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) v.v[i] += v.v[i + half];
    return v.v[0];
}
inline float f_highest(F v) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) v.v[i] = v.v[i] > v.v[i + half] ? v.v[i] : v.v[i + half];
    return v.v[0];
}
inline F f_abs(const F& x) { return each([&](int i) { return std::fabs(x.v[i]); }); }
// of magnitudes: infinity above numbers, what is no number above infinity
inline F f_larger(const F& x, const F& y) {
    return each([&](int i) { return x.v[i] >= y.v[i] || std::isnan(x.v[i]) ? x.v[i] : y.v[i]; });
}
inline float f_largest(const F& x) {  // lanes together as f_larger does
    int32_t lanes[16];
    std::memcpy(lanes, x.v, sizeof(lanes));
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    float top;
    std::memcpy(&top, lanes, sizeof(top));
    return top;
}
inline F f_round(const F& x) { return each([&](int i) { return std::nearbyintf(x.v[i]); }); }
inline F f_pow2(const F& whole) {
    return each([&](int i) {
        const int exponent = static_cast<int>(whole.v[i]) + 127;
        const uint32_t bits = exponent > 0 ? static_cast<uint32_t>(exponent) << 23 : 0;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    });
}
inline F f_from(const I& x) { return each([&](int i) { return static_cast<float>(x.v[i]); }); }
inline F f_first(const F& x, int count, float other) { return each([&](int i) { return i < count ? x.v[i] : other; }); }
inline F f_from_least(F x, F least) { return each([&](int i) { return x.v[i] >= least.v[i] ? x.v[i] : 0.0f; }); }
inline int64_t f_places_between(F x, F low, F high, int32_t first, int32_t* to) {
    int64_t count = 0;
    for (int i = 0; i < 16; ++i) {
        to[count] = first + i;
        count += x.v[i] >= low.v[i] && x.v[i] < high.v[i];
    }
    return count;
}
inline void f_store_bf16(uint16_t* p, const F& x) {
    for (int i = 0; i < 16; ++i) p[i] = bf16_from_float(x.v[i]);
}
inline void f_store_half(uint16_t* p, const F& x) {
    for (int i = 0; i < 16; ++i) p[i] = half_from_float(x.v[i]);
}

template <class Each>
inline I each_int(Each value) {
    I out;
    for (int i = 0; i < 16; ++i) out.v[i] = value(i);
    return out;
}
inline I i_set(int32_t v) { return each_int([=](int) { return v; }); }
inline I i_add(const I& x, const I& y) { return each_int([&](int i) { return x.v[i] + y.v[i]; }); }
inline I i_mul(const I& x, const I& y) { return each_int([&](int i) { return x.v[i] * y.v[i]; }); }
inline I i_sub(const I& x, const I& y) { return each_int([&](int i) { return x.v[i] - y.v[i]; }); }
inline I i_times8(const I& x) { return i_mul(x, i_set(8)); }
inline I i_times128(const I& x) { return i_mul(x, i_set(128)); }
inline I i_over128(const I& x) { return each_int([&](int i) { return x.v[i] >> 7; }); }  // rounded down
inline I i_load(const int32_t* p) {
    I out;
    std::memcpy(out.v, p, sizeof(out.v));
    return out;
}
inline I i_load_u8(const uint8_t* p) { return each_int([=](int i) { return static_cast<int32_t>(p[i]); }); }
inline I i_round(const F& x) { return each_int([&](int i) { return static_cast<int32_t>(std::nearbyintf(x.v[i])); }); }
inline int32_t i_sum(const I& x) {
    int32_t total = 0;
    for (int32_t lane : x.v) total += lane;
    return total;
}
inline void i_store_i8(int8_t* p, const I& x, bool pairs) {
    for (int i = 0; i < 16; ++i) {
        const int from = pairs ? (i & 8) | ((i & 3) << 1) | ((i >> 2) & 1) : i;
        p[i] = static_cast<int8_t>(x.v[from]);
    }
}

inline Line line_load(const void* p) {
    Line out;
    std::memcpy(out.v, p, 64);
    return out;
}
inline void line_store(void* p, const Line& x) { std::memcpy(p, x.v, 64); }
inline Line line_low(const Line& x) {
    Line out;
    for (int i = 0; i < 64; ++i) out.v[i] = x.v[i] & 15;
    return out;
}
inline Line line_high(const Line& x) {
    Line out;
    for (int i = 0; i < 64; ++i) out.v[i] = x.v[i] >> 4;
    return out;
}

template <int Bits>
inline I dot4(I acc, const Line& line, const int8_t* x) {
    for (int i = 0; i < 16; ++i)
        acc.v[i] += line.v[4 * i] * x[0] + line.v[4 * i + 1] * x[1] + line.v[4 * i + 2] * x[2] + line.v[4 * i + 3] * x[3];
    return acc;
}

inline I dot4_signed(I acc, const Line& line, const int8_t* x) {
    int8_t bytes[64];
    std::memcpy(bytes, line.v, 64);
    for (int i = 0; i < 16; ++i)
        acc.v[i] += bytes[4 * i] * x[0] + bytes[4 * i + 1] * x[1] + bytes[4 * i + 2] * x[2] + bytes[4 * i + 3] * x[3];
    return acc;
}

template <class Convert>
inline void line_pairs(const Line& line, F& first, F& second, Convert convert) {
    uint16_t words[32];
    std::memcpy(words, line.v, 64);
    for (int i = 0; i < 16; ++i) {
        first.v[i] = convert(words[2 * i]);
        second.v[i] = convert(words[2 * i + 1]);
    }
}
inline void line_bf16(const Line& line, F& first, F& second) { line_pairs(line, first, second, bf16_to_float); }
inline void line_half(const Line& line, F& first, F& second) { line_pairs(line, first, second, half_to_float); }

inline F dot2(F acc, const Line& line, const uint16_t* x) {
    F first, second;
    line_bf16(line, first, second);
    const float x0 = bf16_to_float(x[0]), x1 = bf16_to_float(x[1]);
    for (int i = 0; i < 16; ++i) acc.v[i] = (acc.v[i] + first.v[i] * x0) + second.v[i] * x1;
    return acc;
}

inline void prefetch(const void*) {}
inline void prefetch_far(const void*) {}

}  // namespace
