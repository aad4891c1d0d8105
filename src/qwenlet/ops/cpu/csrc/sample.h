// Choosing among many logits.
#pragma once

#include <cstdint>

namespace qwenlet {

// The smallest set of most likely of `count` > 0 finite logits whose probabilities reach `p`, ties by the smaller id: their
// ids in ascending order into `ids` [count]. Returns how many. Exact, without sorting more than a two-thousandth or so.
int64_t top_p(const float* logits, int64_t count, double p, int64_t* ids);

}  // namespace qwenlet
