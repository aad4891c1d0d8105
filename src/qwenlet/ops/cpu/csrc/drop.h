// Dropout without its scale, by numbers that depend on a seed and an entry's place alone, so that nothing is kept of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16.h"

namespace {

// All ones where entry i is kept: where its number, of 32 bits, is at least `least`.
inline uint32_t kept(uint32_t i, uint32_t low, uint32_t high, uint32_t least) {
    uint32_t h = (i ^ low) * 0x9e3779b1u;
    h ^= h >> 16;
    h = (h + high) * 0x7feb352du;
    h ^= h >> 15;
    h *= 0x846ca68bu;
    h ^= h >> 16;
    return h >= least ? 0xffffffffu : 0u;
}

constexpr int64_t kDropBlock = 256;

// out = x or zero, or (add) out + x or zero, of entries [begin, end), in bfloat16 (bits 16) or float32 (32).
void drop(const void* x, int bits, int64_t begin, int64_t end, uint64_t seed, uint32_t least, void* out, bool add) {
    const auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int64_t at = begin; at < end; at += kDropBlock) {
        const int64_t count = end - at < kDropBlock ? end - at : kDropBlock;
        uint32_t masks[kDropBlock];
        for (int64_t i = 0; i < count; ++i) masks[i] = kept(static_cast<uint32_t>(at + i), low, high, least);
        if (bits == 16) {
            const uint16_t* from = static_cast<const uint16_t*>(x) + at;
            uint16_t* to = static_cast<uint16_t*>(out) + at;
            if (!add) {
                for (int64_t i = 0; i < count; ++i) to[i] = from[i] & static_cast<uint16_t>(masks[i]);
                continue;
            }
            float sums[kDropBlock];
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t a = static_cast<uint32_t>(from[i]) << 16 & masks[i], b = static_cast<uint32_t>(to[i]) << 16;
                float kept_x, old;
                std::memcpy(&kept_x, &a, 4);
                std::memcpy(&old, &b, 4);
                sums[i] = kept_x + old;
            }
            for (int64_t i = 0; i < count; ++i) to[i] = bf16_from_float(sums[i]);
        } else {
            const uint32_t* from = static_cast<const uint32_t*>(x) + at;
            float* to = static_cast<float*>(out) + at;
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t a = from[i] & masks[i];
                float kept_x;
                std::memcpy(&kept_x, &a, 4);
                to[i] = add ? to[i] + kept_x : kept_x;
            }
        }
    }
}

}  // namespace
