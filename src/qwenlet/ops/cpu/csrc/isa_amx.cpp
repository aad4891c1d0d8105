// AVX-512 with bfloat16 arithmetic, and AMX for products of many rows.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lanes_avx512.h"

#include "attention_amx.h"
#include "back_amx.h"
#include "columns.h"
#include "drop.h"
#include "linear_amx.h"
#include "linear_bf16.h"
#include "rows.h"
#include "rows_avx512_bf16.h"
#include "train_attention.h"

namespace {

bool has_amx() {
    unsigned a, b, c, d;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTiles) && (d & kInt8);
}

// Linux gives a process the registers when it asks (arch_prctl, ARCH_REQ_XCOMP_PERM for XTILEDATA).
bool may_use_amx() {
    static const bool may = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return may;
}

bool supported() { return has_avx512() && __builtin_cpu_supports("avx512bf16") && has_amx() && may_use_amx(); }

}  // namespace

namespace qwenlet {
const Kernels kAmx = {"amx", supported, linear_bf16<Dot>, linear_tiles_amx, columns_of, back_amx, 1, drop, norm, swiglu, peak, weigh, split, round_inputs, turn_query, store, attend<AmxRows>, train_forward, train_backward};
}
