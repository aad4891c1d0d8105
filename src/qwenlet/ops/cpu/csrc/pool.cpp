#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

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
        body_ = &body;
        count_ = count;
        chunk_ = chunk;
        helpers_ = threads - 1;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            wake_.notify_all();
        }
        take_chunks();
        for (int looks = 0; busy_.load(std::memory_order_acquire) > 0; ++looks) {
            if (looks < kLooksBeforeYield)
                relax();
            else
                std::this_thread::yield();
        }
    }

  private:
    void take_chunks() {
        for (;;) {
            const int64_t begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
            if (begin >= count_) return;
            (*body_)(begin, begin + chunk_ < count_ ? begin + chunk_ : count_);
        }
    }

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
            if (index < helpers_) take_chunks();
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex turn_;
    std::vector<std::thread> workers_;
    const std::function<void(int64_t, int64_t)>* body_ = nullptr;
    int64_t count_ = 0, chunk_ = 1;
    int helpers_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<int> busy_{0};
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> sleepers_{0};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    bool stopping_ = false;
};

Pool& pool() {
    // never destroyed: at exit the system ends the threads, and joining them from a library's destructor can hang
    static Pool* shared = new Pool;
    return *shared;
}

}  // namespace

void parallel_for(int threads, int64_t count, int64_t chunk, const std::function<void(int64_t, int64_t)>& body) {
    if (threads <= 1 || count <= chunk) {
        if (count > 0) body(0, count);
        return;
    }
    pool().run(threads, count, chunk, body);
}

}  // namespace qwenlet
