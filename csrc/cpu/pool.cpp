// How a call runs. The caller publishes a ticket (epoch, parts, next part); whoever increments `next` first owns that
// part: a worker, or the caller once it has finished its own. So the caller never waits for a worker that has not
// started (its core may be busy with somebody else), only for parts already running.

#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace dq {
namespace {

// How long a thread looks for work, or for the end of the work of others, before it sleeps. Long enough for the gap
// between two calls of one decoder layer, short enough to leave the core to whoever else wants it.
constexpr std::chrono::microseconds kSpin{20};
constexpr int kMaxParts = 1024;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True as soon as ready() is, false after kSpin. The clock costs about 25 ns, so it is read every 32 looks.
template <typename Ready>
bool spin_until(const Ready& ready) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return ready();
}

class Pool {
public:
    void run(int parts, void (*work)(void*, int, int), void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock() || stopping_) {  // a second Python thread is faster alone than in a queue
            for (int part = 0; part < parts; ++part) work(context, part, parts);
            return;
        }
        grow(parts - 1);
        work_ = work;
        context_ = context;
        unfinished_.store(parts, std::memory_order_relaxed);
        int wake;
        {
            // Under the mutex, so that a worker between its last look and its sleep cannot miss the ticket.
            std::lock_guard<std::mutex> lock(mutex_);
            const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
            ticket_.store(epoch << 32 | static_cast<uint64_t>(parts) << 16, std::memory_order_release);
            wake = sleeping_ < parts - 1 ? sleeping_ : parts - 1;
        }
        for (int i = 0; i < wake; ++i) work_ready_.notify_one();

        while (take_part()) {
        }
        const auto finished = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
        if (!spin_until(finished)) {
            std::unique_lock<std::mutex> lock(mutex_);
            work_done_.wait(lock, finished);
        }
    }

    void stop() {
        std::lock_guard<std::mutex> turn(turn_);  // after the call that may be running
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        work_ready_.notify_all();
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
    }

private:
    void grow(int wanted) {
        try {
            while (static_cast<int>(workers_.size()) < wanted) workers_.emplace_back([this] { serve(); });
        } catch (const std::system_error&) {
            // The process may start no more threads: those that exist, and the caller, do the work.
        }
    }

    bool has_part() const {
        const uint64_t ticket = ticket_.load(std::memory_order_acquire);
        return (ticket & 0xFFFF) < (ticket >> 16 & 0xFFFF);
    }

    // Claims and runs one part. The epoch in the ticket makes a late worker's claim on a finished call fail, and a call
    // cannot finish while a claimed part of it runs, so work_ and context_ are stable after the claim.
    bool take_part() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        for (;;) {
            const int part = static_cast<int>(ticket & 0xFFFF);
            const int parts = static_cast<int>(ticket >> 16 & 0xFFFF);
            if (part >= parts) return false;
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
            work_(context_, part, parts);
            if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(mutex_);
                work_done_.notify_one();
            }
            return true;
        }
    }

    void serve() {
        for (;;) {
            while (take_part()) {
            }
            if (spin_until([this] { return has_part(); })) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            ++sleeping_;
            work_ready_.wait(lock, [this] { return stopping_ || has_part(); });
            --sleeping_;
            if (stopping_) return;
        }
    }

    std::mutex turn_;  // held by the one caller that uses the pool
    std::vector<std::thread> workers_;

    void (*work_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
    std::atomic<uint64_t> ticket_{0};  // epoch << 32 | parts << 16 | next part
    std::atomic<int> unfinished_{0};

    std::mutex mutex_;  // guards what follows
    std::condition_variable work_ready_, work_done_;
    int sleeping_ = 0;
    bool stopping_ = false;  // written under turn_ and mutex_
};

// Never freed: a daemon thread may still hold the pointer at exit, and a forked child must not touch its parent's.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<bool> shut_down{false};

// A forked child has no workers and maybe a locked mutex: it forgets the pool and builds its own when it needs one.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });

Pool* pool() {
    Pool* existing = the_pool.load();
    if (existing) return existing;
    Pool* fresh = new Pool;
    if (the_pool.compare_exchange_strong(existing, fresh)) return fresh;
    delete fresh;
    return existing;
}

}  // namespace

void run_parts(int parts, void (*work)(void* context, int part, int parts), void* context) {
    if (parts > kMaxParts) parts = kMaxParts;
    if (parts <= 1 || shut_down.load()) {
        for (int part = 0; part < parts; ++part) work(context, part, parts);
        return;
    }
    pool()->run(parts, work, context);
}

void shut_down_pool() {
    shut_down.store(true);
    if (Pool* existing = the_pool.load()) existing->stop();
}

}  // namespace dq
