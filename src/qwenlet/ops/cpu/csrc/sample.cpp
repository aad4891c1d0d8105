#include "sample.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace qwenlet {
namespace {

constexpr float kSmallest = FLT_TRUE_MIN;

uint32_t bits_of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return bits;
}

float float_of(uint32_t bits) {
    float weight;
    std::memcpy(&weight, &bits, 4);
    return weight;
}

// Weights in [low, high), which as bits are in order too, in buckets of one width.
class Buckets {
  public:
    static constexpr size_t kCount = 1024;

    Buckets(float low, float high) : first_(bits_of(low)) {
        while (bits_of(std::min(high, 2.0f)) - first_ > kCount << shift_) ++shift_;  // no weight is above 1
    }
    size_t of(float weight) const { return (bits_of(weight) - first_) >> shift_; }
    float least(size_t bucket) const { return float_of(first_ + (static_cast<uint32_t>(bucket) << shift_)); }

  private:
    uint32_t first_;
    int shift_ = 0;
};

using Masses = std::array<double, Buckets::kCount>;

// The bucket, from the heaviest weights on, in which `before` plus their mass reaches `wanted`; `before` grows up to it.
size_t border_of(const Masses& mass, double wanted, double& before) {
    size_t at = mass.size() - 1;
    while (at > 0 && (mass[at] == 0.0 || before + mass[at] < wanted)) before += mass[at--];
    return at;
}

// Weights of at least `high` are kept for sure, those below `low` are not.
struct Range {
    float low, high;
};

// A range in which the mass of the heaviest weights reaches `wanted`: its own mass, and that of what lies above.
struct Band {
    Range range;
    double above, inside;
};

Band band_of(const double* masses, double total, double wanted) {
    Band band{{kSmallest, INFINITY}, 0.0, total};
    for (int b = 0; b < kBands; ++b) {
        band.inside = masses[b] - band.above;
        band.range.low = kBandLeast[b];
        if (masses[b] >= wanted) return band;
        band.above = masses[b];
        band.range.high = kBandLeast[b];
    }
    return {{kSmallest, band.range.high}, band.above, total - band.above};
}

// The part of a band in which `fraction` of its mass is reached, guessed from every 16th weight; all of it where too few
// of them are in it.
Range guess(const float* weights, int64_t count, Range band, double fraction) {
    constexpr int64_t kApart = 16, kLeast = 256;
    const Buckets buckets(band.low, band.high);
    Masses mass{};
    int64_t seen = 0;
    double all = 0.0;
    for (int64_t i = 0; i < count; i += kApart) {
        if (weights[i] < band.low || weights[i] >= band.high) continue;
        mass[buckets.of(weights[i])] += weights[i];
        all += weights[i];
        ++seen;
    }
    if (seen < kLeast) return band;
    const double doubt = 1.5 / std::sqrt(static_cast<double>(seen));  // some three times its standard deviation
    const auto bucket_at = [&](double part) {
        double before = 0.0;
        return border_of(mass, part * all, before);
    };
    Range range = band;
    if (fraction > doubt) range.high = std::min(band.high, buckets.least(bucket_at(fraction - doubt) + 1));
    if (fraction + doubt < 1.0) range.low = buckets.least(bucket_at(fraction + doubt));
    return range;
}

// What is left of a row's weights: those of at least `least`, and their mass block by block.
struct Left {
    float least;
    std::vector<double> masses;
};

// Narrows the border of the smallest set of heaviest weights that reaches `wanted`, until a bucket is left.
class Border {
  public:
    Border(const Kernels& kernels, float* weights, int64_t count, double wanted, Left& left)
        : kernels_(kernels), weights_(weights), count_(count), wanted_(wanted), left_(left) {
        room().resize(static_cast<size_t>(count) + 16);
    }

    // whether the border lies in `range`; if so `range` is the bucket in which it does
    bool narrow(Range& range) {
        split(range);
        const Buckets buckets(range.low, range.high);
        Masses mass{};
        for (int64_t i = 0; i < unsure_; ++i) mass[buckets.of(weight(i))] += weight(i);
        double between = 0.0;
        for (double one : mass) between += one;
        if (before_ >= wanted_ || before_ + between < wanted_) return false;
        const size_t bucket = border_of(mass, wanted_, before_);
        range = {buckets.least(bucket), std::min(range.high, buckets.least(bucket + 1))};
        return true;
    }

    // what is below the border becomes zero as far as it is not below `range`; ties are kept by the smaller id
    void settle(Range range) {
        split(range);
        left_.least = range.low;
        int32_t* places = room().data();
        std::stable_sort(places, places + unsure_, [&](int32_t a, int32_t b) { return weights_[a] > weights_[b]; });
        for (int64_t i = 0; i < unsure_; ++i) {
            if (before_ >= wanted_ && before_ > 0.0) {
                weights_[places[i]] = 0.0f;
            } else {
                before_ += weight(i);
                left_.masses[static_cast<size_t>(places[i] / kMassBlock)] += weight(i);
            }
        }
    }

  private:
    static std::vector<int32_t>& room() {
        static thread_local std::vector<int32_t> places;
        return places;
    }
    float weight(int64_t i) const { return weights_[room()[static_cast<size_t>(i)]]; }
    void split(Range range) {
        unsure_ = kernels_.split(weights_, range.low, range.high, count_, left_.masses.data(), room().data());
        before_ = 0.0;
        for (double mass : left_.masses) before_ += mass;
    }

    const Kernels& kernels_;
    float* weights_;
    const int64_t count_;
    const double wanted_;
    Left& left_;
    int64_t unsure_ = 0;  // weights within a range
    double before_ = 0.0;  // mass above it
};

// Leaves the smallest set of heaviest weights that reaches `wanted`.
void keep_heaviest(const Kernels& kernels, float* weights, int64_t count, const Band& band, double wanted, Left& left) {
    Border border(kernels, weights, count, wanted, left);
    // few weights lie in a light band, however light each of them is
    constexpr double kMany = 8192;
    Range range = band.range;
    if (band.inside / range.low > kMany) range = guess(weights, count, range, (wanted - band.above) / band.inside);
    // the guess may be wrong, and sums in another order differ
    if (!border.narrow(range)) {
        range = band.range;
        if (!border.narrow(range)) {
            range = {kSmallest, INFINITY};
            border.narrow(range);
        }
    }
    border.settle(range);
}

// The first id up to which what is left sums to more than u of all.
int64_t pick(const std::vector<float>& weights, const Left& left, double u) {
    double total = 0.0;
    for (double mass : left.masses) total += mass;
    const double wanted = u * total;
    double before = 0.0;
    int64_t latest = -1;
    for (size_t b = 0; b < left.masses.size(); ++b) {
        const double mass = left.masses[b];
        if (b + 1 < left.masses.size() && before + mass <= wanted) {
            before += mass;
            continue;
        }
        double sum = before;
        const size_t begin = b * kMassBlock;
        for (size_t i = begin; i < std::min(begin + kMassBlock, weights.size()); ++i) {
            if (weights[i] < left.least) continue;
            latest = static_cast<int64_t>(i);
            sum += weights[i];
            if (sum > wanted) return latest;
        }
        before += mass;  // roundings kept it from being reached here
    }
    for (size_t i = weights.size(); i-- > 0;)
        if (weights[i] >= left.least) return static_cast<int64_t>(i);
    return latest;
}

// Rules out all logits but the k largest, and what is as large as the k-th.
void keep_largest(std::vector<float>& x, int64_t count, int64_t k) {
    std::vector<float> order(x.begin(), x.begin() + count);
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
    const float least = order[static_cast<size_t>(k - 1)];
    for (float& logit : x) logit = logit < least ? -INFINITY : logit;
}

// A number in [0, 1): the first of Philox 4x64-10 (Salmon et al., SC 2011) at (seed; position, choice), as numpy counts.
double uniform(uint64_t seed, uint64_t choice, uint64_t position) {
    uint64_t c[4] = {position + 1, choice + (position == UINT64_MAX), 0, 0}, key[2] = {seed, 0};
    const auto times = [](uint64_t a, uint64_t b, uint64_t& high) {
        const auto product = static_cast<unsigned __int128>(a) * b;
        high = static_cast<uint64_t>(product >> 64);
        return static_cast<uint64_t>(product);
    };
    for (int round = 0; round < 10; ++round) {
        uint64_t high0, high1;
        const uint64_t low0 = times(0xD2E7470EE14C6C93u, c[0], high0), low1 = times(0xCA5A826395121157u, c[2], high1);
        c[0] = high1 ^ c[1] ^ key[0];
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ key[1];
        c[3] = low0;
        key[0] += 0x9E3779B97F4A7C15u;
        key[1] += 0xBB67AE8584CAA73Bu;
    }
    return static_cast<double>(c[0] >> 11) * 0x1p-53;
}

// The largest logit and the first place of it; NaN or infinity where one of them is NaN or +infinity.
float peak_of(const Kernels& kernels, const float* x, int64_t count, int64_t& place) {
    float highest = -INFINITY, check = 0.0f;
    place = 0;
    for (int64_t begin = 0; begin < count; begin += kMassBlock) {
        const float block = kernels.peak(x + begin, std::min(kMassBlock, count - begin));
        check += block * 0.0f;
        if (block > highest) highest = block, place = begin;
    }
    if (check == 0.0f)
        while (x[place] < highest && place + 1 < count) ++place;
    return highest + check;
}

// A row's logits with its penalties in them, as long as this lives.
class Penalized {
  public:
    explicit Penalized(const Draw& row) : row_(row) {
        before().resize(static_cast<size_t>(row.seen));
        for (int64_t i = 0; i < row.seen; ++i) {
            float& logit = row.logits[row.ids[i]];
            before()[static_cast<size_t>(i)] = logit;
            if (row.repetition != 1.0f) logit = logit > 0.0f ? logit / row.repetition : logit * row.repetition;
            if (row.replied[i] > 0.0f) logit -= row.presence + row.frequency * row.replied[i];
        }
    }
    ~Penalized() {
        for (int64_t i = 0; i < row_.seen; ++i) row_.logits[row_.ids[i]] = before()[static_cast<size_t>(i)];
    }
    Penalized(const Penalized&) = delete;
    Penalized& operator=(const Penalized&) = delete;

  private:
    static std::vector<float>& before() {
        static thread_local std::vector<float> values;
        return values;
    }
    const Draw& row_;
};

}  // namespace

int64_t draw(const Kernels& kernels, const Draw& row) {
    static thread_local std::vector<float> x;  // logits, then weights
    static thread_local Left left;
    const Penalized penalized(row);
    const size_t count = static_cast<size_t>(row.count), padded = (count + 15) / 16 * 16;
    const int64_t length = static_cast<int64_t>(padded);
    const float* logits = row.logits;
    x.resize(padded);
    if (padded != count) {
        std::copy(logits, logits + count, x.begin());
        std::fill(x.begin() + row.count, x.end(), -INFINITY);
        logits = x.data();
    }
    int64_t place;
    const float peak = peak_of(kernels, logits, length, place);
    if (!(peak > -1e30f && peak < INFINITY)) return -1;
    if (row.temperature == 0.0f) return place;
    if (row.top_k > 0 && row.top_k < row.count) {
        if (logits != x.data()) std::copy(logits, logits + count, x.begin());
        logits = x.data();
        keep_largest(x, row.count, row.top_k);
    }
    double above[kBands];
    const double total = kernels.weigh(logits, peak, row.temperature, length, x.data(), above);
    left.masses.resize((padded + kMassBlock - 1) / kMassBlock);
    const double wanted = row.top_p * total;
    if (row.top_p < 1.0) keep_heaviest(kernels, x.data(), length, band_of(above, total, wanted), wanted, left);
    if (row.min_p > 0.0 || row.top_p >= 1.0) {
        const float least = row.top_p < 1.0 ? left.least : kSmallest;
        left.least = std::max(static_cast<float>(row.min_p), least);
        int32_t none[16];
        kernels.split(x.data(), left.least, left.least, length, left.masses.data(), none);
    }
    return pick(x, left, uniform(row.seed, row.choice, row.position));
}

}  // namespace qwenlet
