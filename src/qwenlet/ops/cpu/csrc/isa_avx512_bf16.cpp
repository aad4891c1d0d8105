// AVX-512 with bfloat16 arithmetic.
#include "lanes_avx512.h"

#include "attention.h"
#include "back_avx512_bf16.h"
#include "columns.h"
#include "drop.h"
#include "linear_bf16.h"
#include "linear_tiles.h"
#include "rows.h"
#include "rows_avx512_bf16.h"
#include "train_attention.h"

namespace {

bool supported() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

namespace qwenlet {
const Kernels kAvx512Bf16 = {"avx512_bf16", supported, linear_bf16<Dot>, linear_tiles, columns_of, back, qwenlet::kBackRows, drop, norm, swiglu, peak, weigh, split, round_inputs, turn_query, store, attend<NoMany>, train_forward, train_backward};
}
