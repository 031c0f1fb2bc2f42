// Shares work out between the threads of the process: whoever is free takes the next part, the caller included.
//
// The caller waits for parts that were begun, not for threads that took none, as the system may have put them aside. What a
// part computes must not depend on who computes it. One caller at a time has the team; another one computes alone.
#pragma once

#include <cstdint>
#include <type_traits>

// Of team.cpp, loaded once for all kernels
extern "C" void sage_share(int64_t parts, void (*body)(void* state, int64_t part), void* state);
extern "C" int64_t sage_num_threads();

namespace sage {

constexpr int64_t PARTS_PER_THREAD = 4;  // so that a thread that is late leaves its parts to others

// Calls body(part) for 0 <= part < parts, in any order and by any thread.
template <class Body>
inline void each_part(int64_t parts, Body&& body) {
    if (parts == 1) return body(int64_t{0});
    using Own = std::remove_reference_t<Body>;
    sage_share(parts, [](void* state, int64_t part) { (*(Own*)state)(part); }, (void*)&body);
}

// Into how many parts to cut `count` things that are worth `most` parts at the utmost.
inline int64_t num_parts(int64_t count, int64_t most) {
    const int64_t threads = sage_num_threads();
    if (threads == 1 || count < 2 || most < 2) return 1;
    const int64_t parts = threads * PARTS_PER_THREAD < most ? threads * PARTS_PER_THREAD : most;
    return parts < count ? parts : count;
}

}  // namespace sage
