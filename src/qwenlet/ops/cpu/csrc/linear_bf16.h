// The loop around a dot product, shared by all instruction sets: `Dot<R>` gives R sums of one weight row at a time.
#pragma once

#include "bf16.h"
#include "kernels.h"

namespace {

template <template <int> class Dot, int R>
void linear_rows(const uint16_t* x, const uint16_t* w, int64_t begin, int64_t end, int64_t k, const uint16_t* bias,
                 uint16_t* y, int64_t stride) {
    for (int64_t n = begin; n < end; ++n) {
        float sums[R];
        Dot<R>::run(x, w + n * k, k, sums);
        for (int r = 0; r < R; ++r) {
            // the bias joins the float32 sum, which is rounded once, as torch does
            const float value = bias ? sums[r] + bf16_to_float(bias[n]) : sums[r];
            y[r * stride + n] = bf16_from_float(value);
        }
    }
}

template <template <int> class Dot>
void linear_bf16(const uint16_t* x, int rows, const uint16_t* w, int64_t begin, int64_t end, int64_t k,
                 const uint16_t* bias, uint16_t* y, int64_t stride) {
    switch (rows) {
        case 1: return linear_rows<Dot, 1>(x, w, begin, end, k, bias, y, stride);
        case 2: return linear_rows<Dot, 2>(x, w, begin, end, k, bias, y, stride);
        case 3: return linear_rows<Dot, 3>(x, w, begin, end, k, bias, y, stride);
        case 4: return linear_rows<Dot, 4>(x, w, begin, end, k, bias, y, stride);
        case 5: return linear_rows<Dot, 5>(x, w, begin, end, k, bias, y, stride);
        case 6: return linear_rows<Dot, 6>(x, w, begin, end, k, bias, y, stride);
        case 7: return linear_rows<Dot, 7>(x, w, begin, end, k, bias, y, stride);
        default: return linear_rows<Dot, 8>(x, w, begin, end, k, bias, y, stride);
    }
}

}  // namespace
