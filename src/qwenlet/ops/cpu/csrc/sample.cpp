#include "sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

namespace qwenlet {
namespace {

uint32_t bits_of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return bits;
}

// Weights are not above 1, so the twelve highest bits of one are below this; twelve bits more tell the next places.
constexpr size_t kCoarse = 2048, kFine = 4096;
constexpr int kCoarseShift = 19, kFineShift = 7;

size_t coarse(float weight) { return bits_of(weight) >> kCoarseShift; }
size_t fine(float weight) { return bits_of(weight) >> kFineShift & (kFine - 1); }

// The bucket, from the heaviest weights on, in which `before` plus their mass reaches `wanted`; `before` grows up to it.
template <size_t N>
size_t border_of(const std::array<double, N>& mass, double wanted, double& before) {
    size_t at = N - 1;
    while (at > 0 && before + mass[at] < wanted) before += mass[at--];
    return at;
}

// Zeroes all but the smallest set of heaviest weights that reaches `wanted`, ties by the smaller id.
void keep_heaviest(std::vector<float>& weights, double wanted) {
    // neighbours count in arrays of their own: in one they would wait for each other
    std::array<std::array<double, kCoarse>, 4> parts{};
    for (size_t i = 0; i < weights.size(); i += 4)  // sizes are multiples of 16
        for (size_t j = 0; j < 4; ++j) parts[j][coarse(weights[i + j])] += weights[i + j];
    std::array<double, kCoarse> mass{};
    for (const auto& part : parts)
        for (size_t b = 0; b < kCoarse; ++b) mass[b] += part[b];
    double before = 0.0;
    const size_t border = border_of(mass, wanted, before);
    std::vector<size_t> unsure;
    std::array<double, kFine> finer{};
    for (size_t i = 0; i < weights.size(); ++i) {
        const size_t bucket = coarse(weights[i]);
        if (bucket == border && weights[i] > 0.0f) {
            unsure.push_back(i);
            finer[fine(weights[i])] += weights[i];
        } else if (bucket < border) {
            weights[i] = 0.0f;
        }
    }
    const size_t edge = border_of(finer, wanted, before);
    std::vector<size_t> last;
    for (size_t i : unsure) {
        if (fine(weights[i]) == edge) last.push_back(i);
        if (fine(weights[i]) < edge) weights[i] = 0.0f;
    }
    std::stable_sort(last.begin(), last.end(), [&](size_t a, size_t b) { return weights[a] > weights[b]; });
    for (size_t i : last) {
        if (before >= wanted && before > 0.0)
            weights[i] = 0.0f;
        else
            before += weights[i];
    }
}

double sum_of(const float* weights, size_t count) {
    double parts[8] = {};
    for (size_t i = 0; i < count; i += 8)
        for (size_t j = 0; j < 8; ++j) parts[j] += weights[i + j];
    return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

// The first id up to which the weights sum to more than u of all.
int64_t pick(const std::vector<float>& weights, double u) {
    constexpr size_t kBlock = 1024;
    std::vector<double> blocks;
    double total = 0.0;
    for (size_t i = 0; i < weights.size(); i += kBlock)
        total += blocks.emplace_back(sum_of(weights.data() + i, std::min(kBlock, weights.size() - i)));
    const double wanted = u * total;
    double before = 0.0;
    int64_t latest = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
        if (b + 1 < blocks.size() && before + blocks[b] <= wanted) {
            before += blocks[b];
            continue;
        }
        double sum = before;
        for (size_t i = b * kBlock; i < std::min((b + 1) * kBlock, weights.size()); ++i) {
            if (!(weights[i] > 0.0f)) continue;
            latest = static_cast<int64_t>(i);
            sum += weights[i];
            if (sum > wanted) return latest;
        }
        before += blocks[b];  // roundings kept it from being reached here
    }
    for (size_t i = weights.size(); i-- > 0;)
        if (weights[i] > 0.0f) return static_cast<int64_t>(i);
    return latest;
}

}  // namespace

int64_t draw(const Kernels& kernels, const Draw& row) {
    static thread_local std::vector<float> x, weights;
    const size_t count = static_cast<size_t>(row.count), padded = (count + 15) / 16 * 16;
    x.assign(padded, -INFINITY);
    std::copy(row.logits, row.logits + count, x.begin());
    for (int64_t i = 0; i < row.seen; ++i) {
        float& logit = x[static_cast<size_t>(row.ids[i])];
        if (row.repetition != 1.0f) logit = logit > 0.0f ? logit / row.repetition : logit * row.repetition;
        if (row.replied[i] > 0.0f) logit -= row.presence + row.frequency * row.replied[i];
    }
    const int64_t length = static_cast<int64_t>(padded);
    const float peak = kernels.peak(x.data(), length);
    if (!(peak > -1e30f && peak < INFINITY)) return -1;
    if (row.temperature == 0.0f) return std::find(x.begin(), x.end(), peak) - x.begin();
    weights.resize(padded);
    double total = kernels.weigh(x.data(), peak, row.temperature, length, weights.data());
    if (row.top_k > 0 && row.top_k < row.count) {
        std::vector<float> order(x.begin(), x.begin() + row.count);
        std::nth_element(order.begin(), order.begin() + (row.top_k - 1), order.end(), std::greater<float>());
        const float least = order[static_cast<size_t>(row.top_k - 1)];
        for (size_t i = 0; i < padded; ++i)
            if (x[i] < least) weights[i] = 0.0f;
        total = sum_of(weights.data(), padded);
    }
    if (row.top_p < 1.0) keep_heaviest(weights, row.top_p * total);
    if (row.min_p > 0.0)
        for (float& weight : weights)
            if (weight < row.min_p) weight = 0.0f;
    return pick(weights, row.u);
}

}  // namespace qwenlet
