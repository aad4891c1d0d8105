// Choosing among many logits.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace qwenlet {

// One row from which one token is to be drawn.
struct Draw {
    float* logits;  // [count], of this row alone: penalties are in them while it is drawn
    int64_t count;
    const int64_t* ids;    // [seen] different tokens of the prompt and the reply
    const float* replied;  // [seen] how often they stand in the reply
    int64_t seen;
    int64_t top_k;  // 0: all
    float repetition, presence, frequency, temperature;  // temperature 0: the most likely token
    double top_p, min_p;
    uint64_t seed, choice, position;  // what the draw among those that are left depends on
};

// Penalties, temperature, top-k, top-p, min-p, and one draw from what is left. -1 where the largest
// logit is no finite number. One row's token depends on that row alone.
int64_t draw(const Kernels& kernels, const Draw& row);

}  // namespace qwenlet
