// Plain C++ that any compiler vectorizes as far as it may.
#include "lanes_portable.h"

#include "attention.h"
#include "columns.h"
#include "drop.h"
#include "linear_bf16.h"
#include "linear_tiles.h"
#include "rows.h"
#include "train_attention.h"

namespace {

constexpr int kLanes = 16;

template <int R>
struct Dot {
    static void run(const uint16_t* x, const uint16_t* w, int64_t k, float* sums) {
        float lanes[R][kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= k; i += kLanes)
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < kLanes; ++j)
                    lanes[r][j] += bf16_to_float(w[i + j]) * bf16_to_float(x[r * k + i + j]);
        for (int r = 0; r < R; ++r) {
            for (int64_t j = i; j < k; ++j) lanes[r][j - i] += bf16_to_float(w[j]) * bf16_to_float(x[r * k + j]);
            sums[r] = 0.0f;
            for (float lane : lanes[r]) sums[r] += lane;
        }
    }
};

bool supported() { return true; }

}  // namespace

namespace qwenlet {
const Kernels kPortable = {"portable", supported, linear_bf16<Dot>, linear_tiles, columns_of, nullptr, 0, drop, norm, swiglu, peak, weigh, split, round_inputs, turn_query, store, attend<NoMany>, train_forward, train_backward};
}
