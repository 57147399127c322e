// A small pool of threads that outlives calls, and jobs made of phases: a whole decode step is one job.
//
// Waking a worker costs about 10 us and starting one 20-40 us, so a step of 150 phases must do neither per phase. A job
// is a list of phases, run in order; a phase is a number of units, claimed in pieces that shrink towards its end. The
// next phase begins when every unit of this one is done, not when every thread has arrived: a worker whose core was
// taken away before it claimed anything is simply not waited for.
#pragma once

#include <cstdint>

namespace dq {

struct Job {
    int phases;
    // Units of a phase, >= 0. Called once a phase, by one thread, after everything before that phase is done.
    int64_t (*units)(void* context, int phase);
    // Runs units [begin, end) of a phase in thread `thread` (0 is the caller; always < the job's threads). Must not
    // throw. Which thread runs what is not fixed, so the result must not depend on it.
    void (*work)(void* context, int phase, int64_t begin, int64_t end, int thread);
    void* context;
};

// Runs the job in the calling thread and up to threads - 1 workers. threads <= 1, a pool that another thread is using,
// and a pool that was shut down all mean: everything in the calling thread.
void run_job(const Job& job, int threads);

// Threads a job may use at most; what per-thread scratch is sized by.
constexpr int kMaxThreads = 255;

// Joins the workers; later calls run in the calling thread. Called at interpreter exit.
void shut_down_pool();

// body(begin, end) over [0, rows), in pieces.
template <typename Body>
void parallel_rows(int64_t rows, int threads, const Body& body) {
    struct Task {
        const Body& body;
        int64_t rows;
    } task{body, rows};
    run_job({1, [](void* context, int) { return static_cast<Task*>(context)->rows; },
             [](void* context, int, int64_t begin, int64_t end, int) { static_cast<Task*>(context)->body(begin, end); },
             &task},
            threads);
}

}  // namespace dq
