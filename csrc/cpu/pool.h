// A small pool of threads that outlives calls: waking a worker costs about 10 us, starting one 20-40 us.
#pragma once

#include <cstdint>

namespace dq {

// Runs work(context, part, parts) once for every part in [0, parts); the calling thread joins in. parts <= 1, a pool
// that another thread is using, and a pool that was shut down all mean: everything in the calling thread. The work must
// not throw. Which thread runs a part is not fixed, so the result must not depend on it.
void run_parts(int parts, void (*work)(void* context, int part, int parts), void* context);

// Joins the workers; later calls run in the calling thread. Called at interpreter exit.
void shut_down_pool();

// body(begin, end) over a static split of [0, rows) into `threads` ranges.
template <typename Body>
void parallel_rows(int64_t rows, int threads, const Body& body) {
    struct Task {
        const Body& body;
        int64_t rows;
    } task{body, rows};
    const int parts = threads < rows ? threads : static_cast<int>(rows);
    run_parts(
        parts,
        [](void* context, int part, int parts) {
            const Task& t = *static_cast<Task*>(context);
            const int64_t share = t.rows / parts, extra = t.rows % parts;
            const int64_t begin = part * share + (part < extra ? part : extra);
            t.body(begin, begin + share + (part < extra ? 1 : 0));
        },
        &task);
}

}  // namespace dq
