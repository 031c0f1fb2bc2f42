// The meeting of the ranks of one host, in memory that all of them have mapped. See communicator.h.
//
// Each rank has a counter of the rounds that it has arrived in, and two buffers, which alternate: a rank that writes to
// a buffer again is two rounds further, and the round in between has ended the reads of all others.
#include "communicator.h"

#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t CACHE_LINE = 64;
constexpr int SPINS = 2000;  // about 50 us; a rank that is further behind has lost its core

struct alignas(CACHE_LINE) Counter {
    std::atomic<uint64_t> rounds;
};

struct Communicator {
    Counter* arrived = nullptr;
    char* buffers = nullptr;
    int64_t num_ranks = 1, rank = 0, buffer_bytes = 0;
    uint64_t rounds = 0;
};

Communicator own;

inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

// Maps the memory behind a file descriptor, of the size in communicator.py and filled with zeros before the first
// rank does so. Returns null, or an error message.
SAGE_EXPORT const char* sage_open_communicator(int64_t file, int64_t rank, int64_t num_ranks, int64_t buffer_bytes) {
    if (num_ranks < 1 || num_ranks > SAGE_MAX_RANKS) return "a communicator has from 1 to 64 ranks";
    const int64_t bytes = num_ranks * (CACHE_LINE + 2 * buffer_bytes);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, (int)file, 0);
    if (memory == MAP_FAILED) return "cannot map the memory of the communicator";
    own.arrived = (Counter*)memory;
    own.buffers = (char*)memory + num_ranks * CACHE_LINE;
    own.num_ranks = num_ranks;
    own.rank = rank;
    own.buffer_bytes = buffer_bytes;
    own.rounds = 0;
    return nullptr;
}

SAGE_EXPORT void sage_begin_round(SageRound* round) {
    round->num_ranks = own.num_ranks;
    round->rank = own.rank;
    round->buffer_bytes = own.buffer_bytes;
    const int64_t parity = own.rounds % 2;
    for (int64_t rank = 0; rank < own.num_ranks && own.buffers != nullptr; ++rank)
        round->buffers[rank] = own.buffers + (2 * rank + parity) * own.buffer_bytes;
}

// y = the bytes of x of all ranks, one after another; several rounds if a buffer is too small.
SAGE_EXPORT void sage_all_gather(const char* x, char* y, int64_t bytes) {
    SageRound round;
    for (int64_t begin = 0; begin < bytes; begin += round.buffer_bytes) {
        sage_begin_round(&round);
        const int64_t left = bytes - begin, size = left < round.buffer_bytes ? left : round.buffer_bytes;
        memcpy(round.buffers[round.rank], x + begin, size);
        sage_meet();
        for (int64_t rank = 0; rank < round.num_ranks; ++rank)
            memcpy(y + rank * bytes + begin, round.buffers[rank], size);
    }
}

SAGE_EXPORT void sage_meet() {
    const uint64_t round = ++own.rounds;
    own.arrived[own.rank].rounds.store(round, std::memory_order_release);
    for (int64_t rank = 0; rank < own.num_ranks; ++rank)
        for (int spin = 0; own.arrived[rank].rounds.load(std::memory_order_acquire) < round; ++spin)
            if (spin < SPINS)
                pause_briefly();
            else
                sched_yield();
}
