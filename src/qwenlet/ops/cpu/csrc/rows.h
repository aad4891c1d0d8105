// What happens to one row between linears: norm, gate, rounding. Lengths are multiples of 16 (unless floats are copied).
#pragma once

#include <cstring>
#include <limits>

#include "kernels.h"

namespace {

// e^x for x <= 88, to about 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by its series to r^7.
inline F f_exp(F x) {
    x = f_max(f_set(-87.0f), x);  // below that the result counts for nothing beside 1; in this order a NaN stays one
    const F n = f_round(f_mul(x, f_set(1.44269504088896341f)));
    F r = f_fma(n, f_set(-0.693145751953125f), x);  // ln 2 in two parts, the first exact in few bits
    r = f_fma(n, f_set(-1.42860682030941723e-6f), r);
    constexpr float kSeries[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    F p = f_set(1.0f / 5040);
    for (const float c : kSeries) p = f_fma(p, r, f_set(c));
    return f_mul(p, f_pow2(n));
}

void norm(const float* x, const float* weight, float eps, int64_t count, float* out) {
    F squares = f_set(0.0f);
    for (int64_t i = 0; i < count; i += 16) {
        const F v = f_load(x + i);
        squares = f_fma(v, v, squares);
    }
    const F scale = f_set(1.0f / __builtin_sqrtf(f_sum(squares) / static_cast<float>(count) + eps));
    for (int64_t i = 0; i < count; i += 16) f_store(out + i, f_mul(f_mul(f_load(x + i), scale), f_load(weight + i)));
}

void swiglu(const float* a, const float* b, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += 16) {
        const F gate = f_load(b + i);
        // below -87 the exponential would pass the largest float; the gate is zero there all the same
        const F negative = f_min(f_sub(f_set(0.0f), gate), f_set(87.0f));
        f_store(out + i, f_mul(f_load(a + i), f_div(gate, f_add(f_set(1.0f), f_exp(negative)))));
    }
}

float peak(const float* x, int64_t count) {
    F highest = f_set(-1e30f), check = f_set(0.0f);
    for (int64_t i = 0; i < count; i += 16) {
        const F v = f_max(f_set(-1e30f), f_load(x + i));  // in this order a NaN stays one
        highest = f_max(highest, v);
        check = f_fma(v, f_set(0.0f), check);
    }
    return f_highest(highest) + f_sum(check);
}

double weigh(const float* x, float peak, float temperature, int64_t count, float* out, double* above) {
    constexpr int64_t kPiece = 2048;  // floats are added so far before doubles take over
    const F top = f_set(peak), inverse = f_set(1.0f / temperature);
    double total = 0.0;
    for (int b = 0; b < qwenlet::kBands; ++b) above[b] = 0.0;
    for (int64_t begin = 0; begin < count; begin += kPiece) {
        const int64_t end = begin + kPiece < count ? begin + kPiece : count;
        F sum = f_set(0.0f), sums[qwenlet::kBands];
        for (F& one : sums) one = f_set(0.0f);
        for (int64_t i = begin; i < end; i += 16) {
            F weight = f_exp(f_mul(f_sub(f_load(x + i), top), inverse));
            // e^-87, which f_exp gives for all below it too, becomes nothing; others don't notice
            weight = f_max(f_sub(weight, f_set(1.7e-38f)), f_set(0.0f));
            f_store(out + i, weight);
            sum = f_add(sum, weight);
            for (int b = 0; b < qwenlet::kBands; ++b)
                sums[b] = f_add(sums[b], f_from_least(weight, f_set(qwenlet::kBandLeast[b])));
        }
        total += f_sum(sum);
        for (int b = 0; b < qwenlet::kBands; ++b) above[b] += f_sum(sums[b]);
    }
    return total;
}

int64_t split(const float* weights, float low, float high, int64_t count, double* masses, int32_t* places) {
    const F least = f_set(low), top = f_set(high);
    int32_t* to = places;
    for (int64_t begin = 0; begin < count; begin += qwenlet::kMassBlock) {
        const int64_t end = begin + qwenlet::kMassBlock < count ? begin + qwenlet::kMassBlock : count;
        F sum = f_set(0.0f);
        for (int64_t i = begin; i < end; i += 16) {
            const F weight = f_load(weights + i);
            sum = f_add(sum, f_from_least(weight, top));
            to += f_places_between(weight, least, top, static_cast<int32_t>(i), to);
        }
        *masses++ = f_sum(sum);
    }
    return to - places;
}

// The largest magnitude; not a number where one of them isn't.
inline float largest_of(const float* x, int64_t count) {
    F largest = f_set(0.0f);
    for (int64_t i = 0; i < count; i += 16) largest = f_larger(largest, f_abs(f_load(x + i)));
    return f_largest(largest);
}

// Where the largest magnitude is none that numbers can be measured by, their codes are 0: with a scale of 0, or, for an
// infinity and what is no number, with a scale that makes every result no number. True if so.
inline bool codes_without(float top, int8_t* codes, int64_t bytes, float* scale) {
    const float highest = std::numeric_limits<float>::max();
    if (top > 0.0f && top <= highest) return false;
    *scale = top == 0.0f ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    std::memset(codes, 0, static_cast<size_t>(bytes));
    return true;
}

// Symmetric eight-bit codes of `count` numbers, which share a scale; returns their sum.
inline int32_t round_group(const float* x, int64_t count, int8_t* codes, float* scale, bool pairs) {
    const float top = largest_of(x, count);
    if (codes_without(top, codes, count, scale)) return 0;
    *scale = top * (1.0f / 127.0f);
    const F inverse = f_set(127.0f / top);
    I total = i_set(0);
    for (int64_t i = 0; i < count; i += 16) {
        const I code = i_round(f_mul(f_load(x + i), inverse));
        total = i_add(total, code);
        i_store_i8(codes + i, code, pairs);
    }
    return i_sum(total);
}

// The same in 15 bits, a code as 128 a + b with b from -64 to 63: the a of all, then the b.
inline int32_t round_group_fine(const float* x, int64_t count, int8_t* codes, float* scale) {
    constexpr float kLevels = 127.0f * 128.0f;
    const float top = largest_of(x, count);
    if (codes_without(top, codes, 2 * count, scale)) return 0;
    *scale = top * (1.0f / kLevels);
    const F inverse = f_set(kLevels / top);
    I total = i_set(0);
    for (int64_t i = 0; i < count; i += 16) {
        const I code = i_round(f_mul(f_load(x + i), inverse));
        total = i_add(total, code);
        const I high = i_over128(i_add(code, i_set(64)));
        i_store_i8(codes + i, high, false);
        i_store_i8(codes + count + i, i_add(code, i_mul(high, i_set(-128))), false);
    }
    return i_sum(total);
}

void round_inputs(const float* x, const qwenlet::Inputs& to, int64_t row) {
    if (to.bits == 32) {
        std::memcpy(to.fp32 + row * to.k, x, static_cast<size_t>(to.k) * sizeof(float));
        return;
    }
    float sorted[128];
    const int64_t step = to.group ? to.group : 16;
    for (int64_t i = 0; i < to.k; i += step) {
        const float* from = x + i;
        if (to.order) {
            for (int64_t j = 0; j < step; ++j) sorted[j] = x[to.order[i + j]];
            from = sorted;
        }
        const int64_t at = to.group ? row * (to.k / to.group) + i / to.group : 0;
        if (to.bits == 16)
            f_store_bf16(to.bf16 + row * to.k + i, f_load(from));
        else if (to.bits == 8)
            to.sums[at] = round_group_fine(from, step, to.codes + 2 * (row * to.k + i), to.scales + at);
        else
            to.sums[at] = round_group(from, step, to.codes + row * to.k + i, to.scales + at, true);
    }
}

}  // namespace
