// How a job runs. The caller publishes a ticket: (sequence, threads, pieces, next piece). Whoever moves `next` forward
// owns the pieces in between; whoever finishes the last piece of a phase publishes the ticket of the next. A job cannot
// end while a claimed piece of it runs, so job_ and phase_ are stable for whoever holds a claim, and nobody else reads
// them: a late worker finds nothing to claim and never touches a job that is over.

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
// between two phases of a decoder layer, short enough to leave the core to whoever else wants it.
constexpr std::chrono::microseconds kSpin{40};

// The ticket: sequence 24 bits | threads 8 | pieces 16 | next 16. A claim by a thread that was suspended for exactly
// 2^24 phases (minutes) between its look and its compare-and-swap could be mistaken for a new one; nothing less can.
constexpr int64_t kMaxPieces = 0xFFFF;

struct Ticket {
    uint64_t bits;
    int64_t next() const { return static_cast<int64_t>(bits & 0xFFFF); }
    int64_t pieces() const { return static_cast<int64_t>(bits >> 16 & 0xFFFF); }
    int threads() const { return static_cast<int>(bits >> 32 & 0xFF); }
};

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

void run_alone(const Job& job) {
    for (int phase = 0; phase < job.phases; ++phase) {
        const int64_t units = job.units(job.context, phase);
        if (units > 0) job.work(job.context, phase, 0, units, 0);
    }
}

class Pool {
public:
    void run(const Job& job, int threads) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock() || stopping_) return run_alone(job);  // a second Python thread is faster alone than queued
        grow(threads - 1);
        job_ = &job;
        threads_ = threads;
        running_.store(true);
        advance(0);
        while (running_.load(std::memory_order_acquire)) {
            if (take_pieces(0)) continue;
            const auto called = [this] { return !running_.load(std::memory_order_acquire) || has_piece(0); };
            if (!spin_until(called)) sleep_until(called);
        }
    }

    void stop() {
        std::lock_guard<std::mutex> turn(turn_);  // after the job that may be running
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
    }

private:
    void grow(int wanted) {
        try {
            while (static_cast<int>(workers_.size()) < wanted) {
                const int thread = static_cast<int>(workers_.size()) + 1;
                workers_.emplace_back([this, thread] { serve(thread); });
            }
        } catch (const std::system_error&) {
            // The process may start no more threads: those that exist, and the caller, do the work.
        }
    }

    // Opens the next phase that has more than one unit; runs those with one here, where their input is in the cache.
    void advance(int thread) {
        for (; phase_ < job_->phases; ++phase_) {
            units_ = job_->units(job_->context, phase_);
            if (units_ <= 0) continue;
            if (units_ == 1) {
                job_->work(job_->context, phase_, 0, 1, thread);
                continue;
            }
            unfinished_.store(pieces(), std::memory_order_relaxed);
            publish(pieces());
            return;
        }
        phase_ = 0;
        publish(0);
        running_.store(false, std::memory_order_seq_cst);
        wake_sleepers();
    }

    int64_t pieces() const { return units_ < kMaxPieces ? units_ : kMaxPieces; }

    void publish(int64_t pieces) {
        sequence_ = (sequence_ + 1) & 0xFFFFFF;
        ticket_.store(sequence_ << 40 | static_cast<uint64_t>(threads_) << 32 | static_cast<uint64_t>(pieces) << 16,
                      std::memory_order_seq_cst);
        if (pieces) wake_sleepers();
    }

    bool has_piece(int thread) const {
        const Ticket ticket{ticket_.load(std::memory_order_seq_cst)};
        return ticket.next() < ticket.pieces() && thread < ticket.threads();
    }

    // Claims and runs some pieces: half of a fair share of what is left, so that a thread that loses its core late in
    // a phase holds little of it.
    bool take_pieces(int thread) {
        uint64_t bits = ticket_.load(std::memory_order_acquire);
        for (;;) {
            const Ticket ticket{bits};
            const int64_t left = ticket.pieces() - ticket.next();
            if (left <= 0 || thread >= ticket.threads()) return false;
            const int64_t share = left / (2 * ticket.threads());
            const int64_t count = share > 1 ? share : 1;
            if (!ticket_.compare_exchange_weak(bits, bits + static_cast<uint64_t>(count), std::memory_order_acq_rel)) {
                relax();
                continue;
            }
            const int64_t first = ticket.next(), all = ticket.pieces();
            job_->work(job_->context, phase_, units_ * first / all, units_ * (first + count) / all, thread);
            if (unfinished_.fetch_sub(count, std::memory_order_acq_rel) == count) {
                ++phase_;
                advance(thread);
            }
            return true;
        }
    }

    void serve(int thread) {
        const auto called = [this, thread] { return has_piece(thread); };
        for (;;) {
            while (take_pieces(thread)) {
            }
            if (spin_until(called)) continue;
            sleep_until([&] { return stopping_ || called(); });
            if (stopping_) return;
        }
    }

    // A sleeper counts itself before its last look, and a publisher looks at the count after publishing (both
    // sequentially consistent), so one of them sees the other.
    template <typename Ready>
    void sleep_until(const Ready& ready) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, ready);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }

    void wake_sleepers() {
        if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
        { std::lock_guard<std::mutex> lock(mutex_); }  // a sleeper is either waiting by now or will look again
        wake_.notify_all();
    }

    std::mutex turn_;  // held by the one caller that uses the pool
    std::vector<std::thread> workers_;

    // Written by the one thread that opens a phase, read by those that hold a claim on it.
    const Job* job_ = nullptr;
    int phase_ = 0;
    int threads_ = 0;
    int64_t units_ = 0;
    uint64_t sequence_ = 0;

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> unfinished_{0};  // pieces of the open phase
    std::atomic<bool> running_{false};
    std::atomic<int> sleepers_{0};

    std::mutex mutex_;  // of the sleepers
    std::condition_variable wake_;
    std::atomic<bool> stopping_{false};  // written under turn_ and mutex_
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

void run_job(const Job& job, int threads) {
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads <= 1 || shut_down.load()) return run_alone(job);
    pool()->run(job, threads);
}

void shut_down_pool() {
    shut_down.store(true);
    if (Pool* existing = the_pool.load()) existing->stop();
}

}  // namespace dq
