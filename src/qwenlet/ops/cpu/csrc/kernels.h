// What every instruction set provides. Each one is a file of its own, compiled with its own flags, its functions in an
// unnamed namespace: otherwise the linker might keep one set's copy of a shared inline function for all of them.
#pragma once

#include <cstdint>

namespace qwenlet {

// Most rows of x the streaming kernels take at once; beyond it a blocked matrix product is faster.
constexpr int kMaxRows = 8;

struct Kernels {
    const char* name;
    bool (*supported)();

    // y[r][n] = sum_k x[r][k] * w[n][k] (+ bias[n]) for n in [begin, end), all bfloat16, summed in float32 in an order that
    // depends on k alone: row r of y is the same bits whatever the other rows are.
    //   x [rows, k], w [*, k], bias [*] or null, y [rows, stride]; rows <= kMaxRows
    void (*linear_bf16)(const uint16_t* x, int rows, const uint16_t* w, int64_t begin, int64_t end, int64_t k,
                        const uint16_t* bias, uint16_t* y, int64_t stride);
};

#if defined(QWENLET_X86)
extern const Kernels kAvx512Bf16;
extern const Kernels kAvx512;
extern const Kernels kAvx2;
#endif
extern const Kernels kPortable;

}  // namespace qwenlet
