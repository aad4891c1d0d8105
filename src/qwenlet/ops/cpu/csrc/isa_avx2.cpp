// AVX2 and FMA: bfloat16 widened to float32 by a shift.
#include <immintrin.h>

#include "lanes_avx2.h"

#include "attention.h"
#include "columns.h"
#include "drop.h"
#include "linear_bf16.h"
#include "linear_tiles.h"
#include "rows.h"
#include "train_attention.h"

namespace {

constexpr int64_t kAhead = 1024;  // elements: 2 KiB ahead of the loads, past the end of a page's hardware prefetch

inline __m256 widen(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline float add_up(__m256 v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

template <int R>
struct Dot {
    static void run(const uint16_t* x, const uint16_t* w, int64_t k, float* sums) {
        __m256 even[R], odd[R];
        for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm256_setzero_ps();
        int64_t i = 0;
        for (; i + 16 <= k; i += 16) {
            _mm_prefetch(reinterpret_cast<const char*>(w + i + kAhead), _MM_HINT_T0);
            const __m256 w0 = widen(w + i), w1 = widen(w + i + 8);
            for (int r = 0; r < R; ++r) {
                even[r] = _mm256_fmadd_ps(w0, widen(x + r * k + i), even[r]);
                odd[r] = _mm256_fmadd_ps(w1, widen(x + r * k + i + 8), odd[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            sums[r] = add_up(_mm256_add_ps(even[r], odd[r]));
            for (int64_t j = i; j < k; ++j) sums[r] += bf16_to_float(w[j]) * bf16_to_float(x[r * k + j]);
        }
    }
};

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

}  // namespace

namespace qwenlet {
const Kernels kAvx2 = {"avx2", supported, linear_bf16<Dot>, linear_tiles, columns_of, nullptr, 0, drop, norm, swiglu, peak, weigh, split, round_inputs, turn_query, store, attend<NoMany>, train_forward, train_backward};
}
