#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace qwenlet {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// A decode step calls the pool hundreds of times some microseconds apart: sleeping and waking in between would cost more
// than the work. After this many looks a thread goes to sleep; when it must wait for others, it lets them have its core.
constexpr int kLooksBeforeSleep = 4000;
constexpr int kLooksBeforeYield = 2000;

struct Job {
    std::atomic<int64_t> next;
    int64_t count, chunk;
    const std::function<void(int64_t, int64_t)>* body;

    void take_chunks() {
        for (;;) {
            const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
            if (begin >= count) return;
            (*body)(begin, std::min(begin + chunk, count));
        }
    }
};

// torch brings GNU's OpenMP, and its threads look busily for work between operators. A second set of threads would have
// to fight them for the cores (measured: 4.6 tokens/s with both, 6.3 with one), so where that library is in the process,
// its threads do our work too. The entry point is the one compilers call for `#pragma omp parallel`.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel openmp_team() {
#if defined(__linux__)
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

using TeamNumber = int (*)();

TeamNumber team_number(const char* name) {
#if defined(__linux__)
    return reinterpret_cast<TeamNumber>(dlsym(RTLD_DEFAULT, name));
#else
    (void)name;
    return nullptr;
#endif
}

class Pool {
  public:
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            stopping_ = true;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    void run(int threads, int64_t count, int64_t chunk, const std::function<void(int64_t, int64_t)>& body) {
        std::lock_guard<std::mutex> turn(turn_);
        while (static_cast<int>(workers_.size()) < threads - 1) {
            const int index = static_cast<int>(workers_.size());
            workers_.emplace_back([this, index, seen = generation_.load()] { work(index, seen); });
        }
        Job job{{0}, count, chunk, &body};
        job_ = &job;
        helpers_ = threads - 1;
        busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            wake_.notify_all();
        }
        job.take_chunks();
        for (int looks = 0; busy_.load(std::memory_order_acquire) > 0; ++looks) wait_a_little(looks);
    }

  private:
    void work(int index, uint64_t seen) {
        for (;;) {
            int looks = 0;
            while (generation_.load(std::memory_order_acquire) == seen && looks < kLooksBeforeSleep) {
                relax();
                ++looks;
            }
            if (generation_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_mutex_);
                sleepers_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
                sleepers_.fetch_sub(1, std::memory_order_seq_cst);
            }
            ++seen;
            if (stopping_) return;
            if (index < helpers_) job_->take_chunks();
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex turn_;
    std::vector<std::thread> workers_;
    Job* job_ = nullptr;
    int helpers_ = 0;
    std::atomic<int> busy_{0};
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> sleepers_{0};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    bool stopping_ = false;
};

// Never destroyed: at exit the system ends the threads, and joining them from a library's destructor can hang.
std::atomic<Pool*> shared_pool{nullptr};

Pool& pool() {
    static const bool watched = [] {
#if defined(__unix__) || defined(__APPLE__)
        // a forked child has the pool's memory but none of its threads: it starts a pool of its own
        pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr); });
#endif
        return true;
    }();
    (void)watched;
    Pool* current = shared_pool.load();
    if (current == nullptr) {
        Pool* fresh = new Pool;
        if (shared_pool.compare_exchange_strong(current, fresh))
            current = fresh;
        else
            delete fresh;
    }
    return *current;
}

}  // namespace

void wait_a_little(int looks) {
    if (looks < kLooksBeforeYield)
        relax();
    else
        std::this_thread::yield();
}

void parallel_for(int threads, int64_t count, int64_t chunk, const std::function<void(int64_t, int64_t)>& body) {
    if (threads <= 1 || count <= chunk) {
        if (count > 0) body(0, count);
        return;
    }
    if (const GompParallel team = openmp_team()) {
        Job job{{0}, count, chunk, &body};
        team([](void* data) { static_cast<Job*>(data)->take_chunks(); }, &job, static_cast<unsigned>(threads), 0);
        return;
    }
    pool().run(threads, count, chunk, body);
}

bool run_team(int threads, const std::function<void(int, int)>& body) {
    if (threads <= 1) {
        body(0, 1);
        return true;
    }
    const GompParallel team = openmp_team();
    static const TeamNumber size = team_number("omp_get_num_threads"), index = team_number("omp_get_thread_num");
    if (team == nullptr || size == nullptr || index == nullptr) return false;
    struct Call {
        const std::function<void(int, int)>* body;
    } call{&body};
    // the library may give fewer threads than were asked for
    team([](void* data) { (*static_cast<Call*>(data)->body)(index(), size()); }, &call, static_cast<unsigned>(threads), 0);
    return true;
}

}  // namespace qwenlet
