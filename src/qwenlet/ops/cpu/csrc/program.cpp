#include "program.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>

#include "pool.h"

namespace qwenlet {
namespace {

// Weights a thread takes at least: less would stream badly.
constexpr int64_t kLeastBytes = 32 * 1024;

// Rows of one sequence that attention takes together.
struct Block {
    int64_t first, rows, position;
    const int32_t* table;
    // more rows than two heads could have together, see Kernels::attend
    bool tall() const { return rows > kQueryBlock / 2; }
};

// Where a token stands.
struct Place {
    int64_t position;
    const int32_t* table;
};

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct FreeScratch {
    void operator()(char* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<char, FreeScratch>;

// All threads wait here for each other.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int looks = 0; round_.load(std::memory_order_acquire) == round; ++looks) wait_a_little(looks);
    }

  private:
    const int threads_;
    std::atomic<int> arrived_{0};
    std::atomic<int> round_{0};
};

class Run {
  public:
    Run(const Program& program, const Kernels& kernels, const Batch& batch)
        : program_(program), kernels_(kernels), batch_(batch), next_(program.steps.size()) {
        places_.reserve(static_cast<size_t>(batch.tokens));
        int64_t first = 0;
        for (int64_t s = 0; s < batch.sequences; ++s) {
            const int32_t* table = batch.tables + batch.table_offsets[s];
            for (int64_t i = 0; i < batch.lengths[s]; ++i) places_.push_back({batch.starts[s] + i, table});
            for (int64_t i = 0; i < batch.lengths[s]; i += kQueryBlock)
                blocks_.push_back(
                    {first + i, std::min<int64_t>(kQueryBlock, batch.lengths[s] - i), batch.starts[s] + i, table});
            first += batch.lengths[s];
        }
        int64_t rows = 0;
        for (int64_t g = 0; g < batch.groups; ++g) rows += batch.adapted[2 * g + 1];
        adapted_ = batch.tokens - rows;
        int64_t row = adapted_, output = 0;
        while (output < batch.outputs && batch.output_rows[output] < row) ++output;
        for (int64_t g = 0; g < batch.groups; ++g) {
            Group group{batch.adapted[2 * g], row, batch.adapted[2 * g + 1], output, 0};
            row += group.rows;
            while (output < batch.outputs && batch.output_rows[output] < row) ++output;
            group.outputs = output - group.first_output;
            groups_.push_back(group);
        }
        // Those that don't take several heads together come first, one sequence's side by side; then, as among these, the
        // longest first, so that none is left for the end.
        std::stable_sort(blocks_.begin(), blocks_.end(), [](const Block& x, const Block& y) {
            if (x.tall() != y.tall()) return x.tall();
            if (x.tall() && x.table != y.table) return x.table < y.table;
            return x.position + x.rows > y.position + y.rows;
        });
        for (const Block& block : blocks_) tall_ += block.tall();
    }

    int64_t count(const Step& step) const {
        const int64_t rows = step.last_rows ? batch_.outputs : batch_.tokens;
        if (step.slot >= 0) {
            if (step.kind == Step::kRound) return rows - first_adapted(step);
            int64_t all = 0;
            for (const Group& group : groups_) all += tiles_of(step, group);
            return all;
        }
        switch (step.kind) {
            case Step::kLinear: return rows ? (program_.weights[step.linear].n + kTile - 1) / kTile : 0;
            case Step::kStore: return batch_.tokens * (of(step).heads + of(step).kv_heads);
            case Step::kAttend: return static_cast<int64_t>(blocks_.size()) * of(step).heads;
            default: return rows;
        }
    }

    // Smallest piece a thread takes.
    int64_t chunk(const Step& step) const {
        const int64_t rows = step.last_rows ? batch_.outputs : batch_.tokens;
        if (step.kind == Step::kLinear) {
            if (rows > kMaxRows) return 4;
            const TileWeight& w = program_.weights[step.slot < 0 ? step.linear : any_weight(step)];
            return std::max<int64_t>(2, kLeastBytes / (w.k * w.bits * 2));
        }
        if (step.kind == Step::kStore) return batch_.tokens == 1 ? 8 : of(step).heads + of(step).kv_heads;
        return 1;
    }

    void work(const Step& step, int64_t begin, int64_t end, char* scratch) const {
        switch (step.kind) {
            case Step::kLinear:
                return step.slot < 0 ? linear(step, begin, end, scratch) : sides(step, begin, end, scratch);
            case Step::kStore:
                for (int64_t i = begin; i < end; ++i) store(step, i);
                return;
            case Step::kAttend:
                while (begin < end) begin = attend(step, begin, end, scratch);
                return;
            default:
                for (int64_t i = begin; i < end; ++i) row(step, i, reinterpret_cast<float*>(scratch));
        }
    }

    // Takes pieces of one step until there are none. What is read from memory is shared out in large pieces first, which
    // stream best, and in small ones towards the end, so that nobody waits long for the last.
    void share(size_t index, int threads, char* scratch) {
        const Step& step = program_.steps[index];
        const int64_t all = count(step), least = chunk(step);
        int64_t begin = next_[index].load(std::memory_order_relaxed);
        while (begin < all) {
            const int64_t end = std::min(begin + std::max(least, large(step, all - begin, threads)), all);
            if (!next_[index].compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
            work(step, begin, end, scratch);
            begin = next_[index].load(std::memory_order_relaxed);
        }
    }

    // A large piece of what is left.
    int64_t large(const Step& step, int64_t left, int threads) const {
        if (step.kind == Step::kLinear) return left / (2 * threads);
        if (step.kind != Step::kAttend) return 0;
        // for single rows, which only read, a group and no less: what is side by side
        const int64_t least = batch_.tokens == static_cast<int64_t>(blocks_.size()) ? (of(step).heads + threads - 1) / threads : 0;
        return std::max(std::min(left / threads, of(step).heads), least);
    }

    bool idle(const Step& step) const { return step.slot >= 0 && count(step) == 0; }

  private:
    int64_t first_adapted(const Step& step) const {
        if (!step.last_rows) return adapted_;
        return groups_.empty() ? batch_.outputs : groups_.front().first_output;
    }

    const Side& side(const Step& step, const Group& group) const {
        return program_.adapters[static_cast<size_t>(group.adapter)][static_cast<size_t>(step.slot)];
    }

    int64_t tiles_of(const Step& step, const Group& group) const {
        const int weight = side(step, group).weight;
        return weight < 0 || !(step.last_rows ? group.outputs : group.rows) ? 0 : (program_.weights[weight].n + kTile - 1) / kTile;
    }

    int any_weight(const Step& step) const {
        for (const Group& group : groups_)
            if (side(step, group).weight >= 0) return side(step, group).weight;
        return 0;
    }

    // The adapters' own weights, one adapter's tiles after the other's: each on its rows.
    void sides(const Step& step, int64_t begin, int64_t end, char* scratch) const {
        int64_t first = 0;
        for (const Group& group : groups_) {
            const int64_t tiles = tiles_of(step, group), from = std::max(begin - first, int64_t{0}), to = std::min(end - first, tiles);
            first += tiles;
            if (from >= to) continue;
            const Side& its = side(step, group);
            const TileWeight& w = program_.weights[its.weight];
            Inputs x = program_.inputs[its.from < 0 ? step.from : its.from];
            const int64_t row = step.last_rows ? group.first_output : group.first;
            if (x.bf16) x.bf16 += row * x.k;
            if (x.fp32) x.fp32 += row * x.k;
            const int64_t stride = step.y ? step.stride : batch_.output_stride;
            kernels_.linear_tiles(w, x, step.last_rows ? group.outputs : group.rows, from, to,
                                  (step.y ? step.y : batch_.output) + row * stride, stride, step.add, scratch);
        }
    }

    // An adapter's narrow rows, rounded for its second weight.
    void round_side(const Step& step, int64_t row) const {
        for (const Group& group : groups_)
            if (row < (step.last_rows ? group.first_output + group.outputs : group.first + group.rows)) {
                const Side& its = side(step, group);
                if (its.weight >= 0) kernels_.round_inputs(step.a + row * step.stride, program_.inputs[its.from], row);
                return;
            }
    }

    const Pages& of(const Step& step) const { return program_.pages[step.pages]; }

    void linear(const Step& step, int64_t begin, int64_t end, char* scratch) const {
        const TileWeight& w = program_.weights[step.linear];
        kernels_.linear_tiles(w, program_.inputs[step.from], step.last_rows ? batch_.outputs : batch_.tokens, begin, end,
                              step.y ? step.y : batch_.output, step.y ? step.stride : batch_.output_stride, step.add, scratch);
    }

    void row(const Step& step, int64_t i, float* scratch) const {
        if (step.slot >= 0) return round_side(step, first_adapted(step) + i);
        const int64_t from = step.last_rows ? batch_.output_rows[i] : i;
        const float* a = step.a + from * step.stride;
        float* out = step.out ? step.out + i * step.count : scratch;
        if (step.kind == Step::kNorm)
            kernels_.norm(a, step.weight, step.eps, step.count, out);
        else if (step.kind == Step::kSwiglu)
            kernels_.swiglu(a, step.b + from * step.stride, step.count, out);
        for (int target : step.to)
            kernels_.round_inputs(step.kind == Step::kRound ? a : out, program_.inputs[target], i);
        if (from >= adapted_)
            for (int target : step.to_adapted)
                kernels_.round_inputs(step.kind == Step::kRound ? a : out, program_.inputs[target], i);
    }

    void store(const Step& step, int64_t i) const {
        const Pages& p = of(step);
        const int64_t heads = p.heads + p.kv_heads, token = i / heads, head = i % heads;
        float* qkv = step.out + token * step.stride;
        const float *cos = batch_.cos + token * p.dim / 2, *sin = batch_.sin + token * p.dim / 2;
        if (head < p.heads) {
            const float scale = batch_.query_scale ? batch_.query_scale[token] : 1.0f;
            kernels_.turn_query(p, qkv, cos, sin, scale, step.codes + token * 2 * p.heads * p.dim,
                                step.code_scales + token * 2 * p.heads, head);
            return;
        }
        const int64_t kv_head = head - p.heads;
        const Place place = places_[static_cast<size_t>(token)];
        kernels_.store(p, qkv + head * p.dim, qkv + (head + p.kv_heads) * p.dim, cos, sin,
                       place.table[place.position / kPage], place.position % kPage, kv_head);
    }

    // Heads of one block and group, as many from `i` on as are taken together; returns the first that is not among them. Tall blocks go
    // head by head, so that a head's keys and values stay in a cache from one block to the next.
    int64_t attend(const Step& step, int64_t i, int64_t end, char* scratch) const {
        const Pages& p = of(step);
        const bool tall = i < tall_ * p.heads;
        const Block& block = blocks_[static_cast<size_t>(tall ? i % tall_ : i / p.heads)];
        const int64_t head = tall ? i / tall_ : i % p.heads, width = p.heads * p.dim;
        const int64_t group = p.heads / p.kv_heads * p.group;
        const int64_t heads = std::min({end - i, group - head % group, std::max<int64_t>(kQueryBlock / block.rows, 1)});
        // queries lie at the front of qkv, their codes in rows of their own
        const float* q = step.out + block.first * step.stride + head * p.dim;
        float* out = step.y + block.first * width + head * p.dim;
        const bool coded = p.kind == Cache::kInt8;
        const int8_t* codes = coded ? step.codes + 2 * (block.first * width + head * p.dim) : nullptr;
        const float* code_scales = coded ? step.code_scales + 2 * (block.first * p.heads + head) : nullptr;
        kernels_.attend(p, head, heads, q, codes, code_scales, step.stride, 2 * width, block.rows, block.position, block.table,
                        out, width, scratch);
        return i + heads;
    }

    const Program& program_;
    const Kernels& kernels_;
    const Batch& batch_;
    std::vector<std::atomic<int64_t>> next_;
    std::vector<Place> places_;
    std::vector<Block> blocks_;
    std::vector<Group> groups_;
    int64_t adapted_ = 0;  // the first row with an adapter
    int64_t tall_ = 0;     // blocks that are tall
};

// A thread's scratch lives as long as the thread.
char* own_scratch() {
    static thread_local Scratch scratch(static_cast<char*>(std::aligned_alloc(64, kScratch)));
    return scratch.get();
}

}  // namespace

void Program::run(const Kernels& kernels, int threads, const Batch& batch, double* seconds) const {
    Run run(*this, kernels, batch);
    const auto follow = [&](int index, int count, Barrier& barrier) {
        double before = now();
        for (size_t s = 0; s < steps.size(); ++s) {
            if (run.idle(steps[s])) continue;
            run.share(s, count, own_scratch());
            if (count > 1 && (steps[s].wait || seconds)) barrier.wait();
            if (seconds && index == 0) {
                const double after = now();
                seconds[s] = after - before;
                before = after;
            }
        }
    };
    // the team's size is known only inside it
    std::atomic<Barrier*> shared{nullptr};
    const bool done = run_team(threads, [&](int index, int count) {
        Barrier* barrier = shared.load(std::memory_order_acquire);
        if (barrier == nullptr) {
            Barrier* fresh = new Barrier(count);
            if (shared.compare_exchange_strong(barrier, fresh))
                barrier = fresh;
            else
                delete fresh;
        }
        follow(index, count, *barrier);
    });
    delete shared.load();
    if (done) return;
    for (size_t s = 0; s < steps.size(); ++s) {
        const double before = now();
        const Step& step = steps[s];
        parallel_for(threads, run.count(step), run.chunk(step),
                     [&](int64_t begin, int64_t end) { run.work(step, begin, end, own_scratch()); });
        if (seconds) seconds[s] = now() - before;
    }
}

}  // namespace qwenlet
