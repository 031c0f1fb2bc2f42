// Parallel loops on the threads of the process: a free thread takes the next part, and the caller takes part too.
//
// The caller waits for parts that were started, not for threads that have taken none, which the system may have
// preempted. The result of a part must not depend on the thread that computes it. One caller at a time has the pool; a
// concurrent caller, and a loop inside a part, runs its parts itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "error.h"

// Defined in thread_pool.cpp, which is loaded once for all kernels.
extern "C" void sage_parallel_for(int64_t parts, void (*body)(void* state, int64_t part), void* state);
extern "C" int64_t sage_num_threads();

namespace sage {

constexpr int64_t PARTS_PER_THREAD = 4;  // so that others can take the parts of a thread that is late

// The body of a loop, and the first error that a part throws. The pool is C and other threads run the parts, so that an
// error cannot propagate by itself: it is kept here, and the caller throws it when all parts have ended.
template <class Body>
struct ParallelLoop {
    Body& body;
    std::atomic<bool> has_failed{false};
    Error error{};

    static void run(void* loop, int64_t part) { ((ParallelLoop*)loop)->run(part); }
    void run(int64_t part) {
        try {
            body(part);
        } catch (const Error& thrown) {
            if (!has_failed.exchange(true)) error = thrown;
        }
    }
};

// Calls body(part) for 0 <= part < parts, in any order and on any thread. Throws the Error of a part.
template <class Body>
inline void parallel_for(int64_t parts, Body&& body) {
    if (parts == 1) return body(int64_t{0});
    using Loop = ParallelLoop<std::remove_reference_t<Body>>;
    Loop loop{body};
    sage_parallel_for(parts, Loop::run, &loop);
    if (loop.has_failed) throw loop.error;
}

// The number of parts to split `count` items into, at most `limit`.
inline int64_t num_parts(int64_t count, int64_t limit) {
    const int64_t threads = sage_num_threads();
    if (threads == 1 || count < 2 || limit < 2) return 1;
    const int64_t parts = threads * PARTS_PER_THREAD < limit ? threads * PARTS_PER_THREAD : limit;
    return parts < count ? parts : count;
}

}  // namespace sage
