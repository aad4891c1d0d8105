#include "sample.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace qwenlet {
namespace {

// Buckets by distance from the largest logit, equally wide; what is further away than kFar shares the last one.
constexpr int kBuckets = 4096;
constexpr float kFar = 32.0f;

}  // namespace

int64_t top_p(const float* logits, int64_t count, double p, int64_t* ids) {
    const auto [low, high] = std::minmax_element(logits, logits + count);
    const float largest = *high, range = std::min(largest - *low, kFar);
    const float per_unit = range > 0.0f ? static_cast<float>(kBuckets - 1) / range : 0.0f;
    const auto bucket_of = [=](float distance) {
        return static_cast<int>(std::min(distance * per_unit, static_cast<float>(kBuckets - 1)));
    };
    std::vector<double> mass(kBuckets, 0.0);
    for (int64_t i = 0; i < count; ++i) {
        const float distance = largest - logits[i];
        mass[static_cast<size_t>(bucket_of(distance))] += std::exp(-distance);
    }
    double total = 0.0, before = 0.0;
    for (double part : mass) total += part;
    const double wanted = p * total;
    int last = 0;  // the bucket in which the wanted mass is reached
    while (last < kBuckets - 1 && before + mass[static_cast<size_t>(last)] < wanted)
        before += mass[static_cast<size_t>(last++)];

    std::vector<int64_t> border;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int bucket = bucket_of(largest - logits[i]);
        if (bucket < last) ids[kept++] = i;
        if (bucket == last) border.push_back(i);
    }
    // stable: equal logits stay in the order of their ids
    std::stable_sort(border.begin(), border.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
    size_t taken = 0;
    while (taken < border.size() && (before < wanted || kept + static_cast<int64_t>(taken) == 0))
        before += std::exp(-(largest - logits[border[taken++]]));
    const auto end = border.begin() + static_cast<int64_t>(taken);
    std::sort(border.begin(), end);
    std::copy(border.begin(), end, ids + kept);
    std::inplace_merge(ids, ids + kept, ids + kept + taken);
    return kept + static_cast<int64_t>(taken);
}

}  // namespace qwenlet
