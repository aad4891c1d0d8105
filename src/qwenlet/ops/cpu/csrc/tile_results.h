// Where the results of a linear over tiles go.
#pragma once

#include "kernels.h"

namespace {

using qwenlet::kTile;
using qwenlet::TileWeight;

// Sixteen sums of a row into their places of y, with the bias, and (`add`) onto what is there.
inline void put(const TileWeight& w, int64_t tile, F value, float* y, bool add) {
    const int64_t n = tile * kTile;
    float* to = y + n;
    if (n + kTile <= w.n) {
        if (w.bias) value = f_add(value, f_load(w.bias + n));
        if (add) value = f_add(value, f_load(to));
        f_store(to, value);
        return;
    }
    float lanes[kTile];
    f_store(lanes, value);
    for (int64_t i = 0; n + i < w.n; ++i) {
        const float with_bias = w.bias ? lanes[i] + w.bias[n + i] : lanes[i];
        to[i] = add ? with_bias + to[i] : with_bias;
    }
}

}  // namespace
