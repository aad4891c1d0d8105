// AVX-512 without bfloat16 arithmetic: widened to float32 by a shift.
#include <immintrin.h>

#include "lanes_avx512.h"

#include "attention.h"
#include "columns.h"
#include "drop.h"
#include "linear_bf16.h"
#include "linear_tiles.h"
#include "rows.h"
#include "train_attention.h"

namespace {

constexpr int64_t kAhead = 1024;  // elements: 2 KiB ahead of the loads, past the end of a page's hardware prefetch

inline __m512 widen(__m256i raw) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)); }

inline __m512 load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

inline __m512 load_tail(const uint16_t* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }

template <int R>
struct Dot {
    static void run(const uint16_t* x, const uint16_t* w, int64_t k, float* sums) {
        __m512 even[R], odd[R];
        for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i + 32 <= k; i += 32) {
            _mm_prefetch(reinterpret_cast<const char*>(w + i + kAhead), _MM_HINT_T0);
            const __m512 w0 = load(w + i), w1 = load(w + i + 16);
            for (int r = 0; r < R; ++r) {
                even[r] = _mm512_fmadd_ps(w0, load(x + r * k + i), even[r]);
                odd[r] = _mm512_fmadd_ps(w1, load(x + r * k + i + 16), odd[r]);
            }
        }
        for (; i < k; i += 16) {
            const __mmask16 mask = static_cast<__mmask16>(k - i >= 16 ? 0xffff : (1u << (k - i)) - 1);
            const __m512 last = load_tail(w + i, mask);
            for (int r = 0; r < R; ++r) even[r] = _mm512_fmadd_ps(last, load_tail(x + r * k + i, mask), even[r]);
        }
        for (int r = 0; r < R; ++r) sums[r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
    }
};

bool supported() { return has_avx512(); }

}  // namespace

namespace qwenlet {
const Kernels kAvx512 = {"avx512", supported, linear_bf16<Dot>, linear_tiles, columns_of, nullptr, 0, drop, norm, swiglu, peak, weigh, split, round_inputs, turn_query, store, attend<NoMany>, train_forward, train_backward};
}
