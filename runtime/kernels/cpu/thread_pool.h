// Parallel loops on the threads of the process: a free thread takes the next part, and the caller takes part too.
//
// The caller waits for parts that were started, not for threads that have taken none, which the system may have preempted.
// The result of a part must not depend on the thread that computes it. One caller at a time has the pool; a concurrent
// caller, and a loop inside a part, runs its parts itself.
#pragma once

#include <cstdint>
#include <type_traits>

// Defined in thread_pool.cpp, which is loaded once for all kernels.
extern "C" void sage_parallel_for(int64_t parts, void (*body)(void* state, int64_t part), void* state);
extern "C" int64_t sage_num_threads();

namespace sage {

constexpr int64_t PARTS_PER_THREAD = 4;  // so that others can take the parts of a thread that is late

// Calls body(part) for 0 <= part < parts, in any order and on any thread.
template <class Body>
inline void parallel_for(int64_t parts, Body&& body) {
    if (parts == 1) return body(int64_t{0});
    using State = std::remove_reference_t<Body>;
    sage_parallel_for(parts, [](void* state, int64_t part) { (*(State*)state)(part); }, (void*)&body);
}

// The number of parts to split `count` items into, at most `limit`.
inline int64_t num_parts(int64_t count, int64_t limit) {
    const int64_t threads = sage_num_threads();
    if (threads == 1 || count < 2 || limit < 2) return 1;
    const int64_t parts = threads * PARTS_PER_THREAD < limit ? threads * PARTS_PER_THREAD : limit;
    return parts < count ? parts : count;
}

}  // namespace sage
