// Many rows against a page by AMX. Lines of keys, and of values, are rows of its registers as they are.
#pragma once

#include "attention.h"
#include "linear_amx.h"

namespace {

// register S += X W: bytes from 0 to 127 of X and signed ones of W
template <int S, int X, int W>
inline void amx_product_signed() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(S), "i"(X), "i"(W));
}

class AmxRows {
  public:
    static constexpr int64_t kLeast = 4, kWords = 16;

    template <bool Signed>
    void products(const uint8_t* tiles, int64_t count, int64_t words, const int8_t* codes, int64_t stride, int64_t low,
                  int64_t rows, int32_t* sums, Fetch& ahead) {
        shape_.fit(static_cast<int>(rows), static_cast<int>(rows));
        for (int64_t t = 0; t < count; t += 2) {
            const uint8_t* tile = tiles + t * words * 64;
            amx_zero<0>(), amx_zero<1>(), amx_zero<2>(), amx_zero<3>();
            for (int64_t w = 0; w < words; w += kWords) {
                ahead.pass(2 * kWords);
                amx_load<4>(codes + w * 4, stride);
                amx_load<5>(codes + low + w * 4, stride);
                amx_load<6>(tile + w * 64, 64);
                if constexpr (Signed)
                    amx_product_signed<0, 4, 6>(), amx_product_signed<1, 5, 6>();
                else
                    amx_product<8, 0, 4, 6>(), amx_product<8, 1, 5, 6>();
                if (t + 1 == count) continue;
                amx_load<7>(tile + (words + w) * 64, 64);
                if constexpr (Signed)
                    amx_product_signed<2, 4, 7>(), amx_product_signed<3, 5, 7>();
                else
                    amx_product<8, 2, 4, 7>(), amx_product<8, 3, 5, 7>();
            }
            int32_t* to = sums + t * kTileSums;
            amx_store<0>(to, 64), amx_store<1>(to + kTileSums / 2, 64);
            if (t + 1 == count) continue;
            amx_store<2>(to + kTileSums, 64), amx_store<3>(to + kTileSums * 3 / 2, 64);
        }
    }

  private:
    AmxShape shape_{64};
};

}  // namespace
