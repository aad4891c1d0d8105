// A few rows against bfloat16 weights row by row: one instruction multiplies and sums 32 pairs.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t kAhead = 1024;  // elements: 2 KiB ahead of the loads, past the end of a page's hardware prefetch

inline __m512bh load(const uint16_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }

inline __m512bh load_tail(const uint16_t* p, __mmask32 mask) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
}

template <int R>
struct Dot {
    static void run(const uint16_t* x, const uint16_t* w, int64_t k, float* sums) {
        __m512 even[R], odd[R];
        for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i + 64 <= k; i += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(w + i + kAhead), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(w + i + kAhead + 32), _MM_HINT_T0);
            const __m512bh w0 = load(w + i), w1 = load(w + i + 32);
            for (int r = 0; r < R; ++r) {
                even[r] = _mm512_dpbf16_ps(even[r], w0, load(x + r * k + i));
                odd[r] = _mm512_dpbf16_ps(odd[r], w1, load(x + r * k + i + 32));
            }
        }
        for (; i < k; i += 32) {
            const __mmask32 mask = k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1;
            const __m512bh last = load_tail(w + i, mask);
            for (int r = 0; r < R; ++r) even[r] = _mm512_dpbf16_ps(even[r], last, load_tail(x + r * k + i, mask));
        }
        for (int r = 0; r < R; ++r) sums[r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
    }
};

}  // namespace
