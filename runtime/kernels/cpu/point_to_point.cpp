// Ring buffers between the ranks of one host, in memory that all of them have mapped. See point_to_point.h.
//
// A ring has one writer and one reader. Each owns a position, which only grows: the bytes between them are in the ring.
// A message is its size, as 8 bytes, and its data. Waits spin briefly, then sleep on a futex: a stage of a pipeline may
// wait for a whole step, and its core is of use to the others meanwhile.
#include "point_to_point.h"

#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t CACHE_LINE = 64;
constexpr int64_t PIECE = 64 * 1024;  // bytes after which the other side learns of them, so that both copy at once
constexpr int SPINS = 2000;           // about 50 us
constexpr int MAX_GROUPS = 8, MAX_PEERS = 64;

struct alignas(CACHE_LINE) Position {
    std::atomic<uint64_t> bytes;
    std::atomic<uint32_t> is_awaited;  // the other side sleeps until `bytes` changes
};

struct Ring {
    Position written, read;
    char data[];
};

struct Link {
    Ring* out = nullptr;
    Ring* in = nullptr;
    int64_t capacity = 0;
    char* own_memory = nullptr;          // of `sage_attach`
    std::atomic<bool> is_broken{false};  // the peer is gone: nobody answers, so waits end with an error
};

Link links[MAX_GROUPS][MAX_PEERS];
char* memory = nullptr;
int64_t num_ranks = 0, capacity = 0;

const char* const BROKEN = "the link to rank %lld of the group is broken";

inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

inline uint32_t* low_half(std::atomic<uint64_t>& value) {
    return (uint32_t*)&value + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 1 : 0);
}

// Returns when the position is not `seen` any more, or the link is broken.
uint64_t await_change(Position& position, uint64_t seen, const Link& link) {
    for (int spin = 0; spin < SPINS; ++spin) {
        const uint64_t now = position.bytes.load(std::memory_order_acquire);
        if (now != seen) return now;
        pause_briefly();
    }
    for (;;) {
        position.is_awaited.store(1);
        const uint64_t now = position.bytes.load();
        if (now != seen || link.is_broken.load()) {
            position.is_awaited.store(0);
            return now;
        }
#if defined(__linux__)
        const timespec limit = {0, 100 * 1000 * 1000};
        syscall(SYS_futex, low_half(position.bytes), FUTEX_WAIT, (uint32_t)seen, &limit, nullptr, 0);
#else
        sched_yield();
#endif
    }
}

inline void wake(Position& position) {
    position.is_awaited.store(0);
#if defined(__linux__)
    syscall(SYS_futex, low_half(position.bytes), FUTEX_WAKE, 1, nullptr, nullptr, 0);
#endif
}

inline void advance(Position& position, uint64_t bytes) {
    position.bytes.store(bytes);  // sequentially consistent: before the load of is_awaited
    if (position.is_awaited.load() != 0) wake(position);
}

inline int64_t smallest(int64_t a, int64_t b, int64_t c) {
    const int64_t least = a < b ? a : b;
    return least < c ? least : c;
}

// Each returns null, or an error message.
const char* write_bytes(Link& link, const char* data, int64_t bytes) {
    Ring& ring = *link.out;
    const int64_t capacity = link.capacity;
    uint64_t written = ring.written.bytes.load(std::memory_order_relaxed);
    while (bytes > 0) {
        uint64_t read = ring.read.bytes.load(std::memory_order_acquire);
        if (written - read == (uint64_t)capacity) read = await_change(ring.read, read, link);
        if (link.is_broken.load(std::memory_order_relaxed)) return BROKEN;
        const int64_t at = (int64_t)(written % capacity), room = capacity - (int64_t)(written - read);
        const int64_t size = smallest(smallest(bytes, PIECE, room), capacity - at, bytes);
        memcpy(ring.data + at, data, size);
        advance(ring.written, written += size);
        data += size;
        bytes -= size;
    }
    return nullptr;
}

const char* read_bytes(Link& link, char* data, int64_t bytes) {
    Ring& ring = *link.in;
    const int64_t capacity = link.capacity;
    uint64_t read = ring.read.bytes.load(std::memory_order_relaxed);
    while (bytes > 0) {
        uint64_t written = ring.written.bytes.load(std::memory_order_acquire);
        if (written == read) written = await_change(ring.written, written, link);
        if (link.is_broken.load(std::memory_order_relaxed)) return BROKEN;
        const int64_t at = (int64_t)(read % capacity), held = (int64_t)(written - read);
        const int64_t size = smallest(bytes, held, capacity - at);
        memcpy(data, ring.data + at, size);
        advance(ring.read, read += size);
        data += size;
        bytes -= size;
    }
    return nullptr;
}

void set_link(Link& link, Ring* out, Ring* in, int64_t ring_bytes, char* own_memory) {
    if (link.own_memory) munmap(link.own_memory, 2 * (sizeof(Ring) + link.capacity));
    link.out = out;
    link.in = in;
    link.capacity = ring_bytes;
    link.own_memory = own_memory;
    link.is_broken.store(false);
}

Ring* ring_between(int64_t source, int64_t target) {
    return (Ring*)(memory + (source * num_ranks + target) * (sizeof(Ring) + capacity));
}

}  // namespace

// Maps the memory behind a file descriptor, of the size in point_to_point.py and filled with zeros before the first
// rank does so. Returns null, or an error message.
SAGE_EXPORT const char* sage_open_links(int64_t file, int64_t ranks, int64_t ring_bytes) {
    void* mapped =
        mmap(nullptr, ranks * ranks * (sizeof(Ring) + ring_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, (int)file, 0);
    if (mapped == MAP_FAILED) return "cannot map the memory of the links between ranks";
    memory = (char*)mapped;
    num_ranks = ranks;
    capacity = ring_bytes;
    return nullptr;
}

// Makes the rank number `other` of all ranks the rank `peer` of a group.
SAGE_EXPORT const char* sage_connect(int64_t group, int64_t peer, int64_t own, int64_t other) {
    if (memory == nullptr) return "the links between ranks are not open";
    if (group < 0 || group >= MAX_GROUPS || peer < 0 || peer >= MAX_PEERS) return "a group has from 1 to 64 ranks";
    set_link(links[group][peer], ring_between(own, other), ring_between(other, own), capacity, nullptr);
    return nullptr;
}

// Makes the process with the other end of this memory the rank `peer` of a group, in place of the one before, if any.
// The two ends have `side` 0 and 1. No other thread may use the link meanwhile.
SAGE_EXPORT const char* sage_attach(int64_t group, int64_t peer, int64_t file, int64_t ring_bytes, int64_t side) {
    if (group < 0 || group >= MAX_GROUPS || peer < 0 || peer >= MAX_PEERS) return "a group has from 1 to 64 ranks";
    const int64_t size = sizeof(Ring) + ring_bytes;
    void* mapped = mmap(nullptr, 2 * size, PROT_READ | PROT_WRITE, MAP_SHARED, (int)file, 0);
    if (mapped == MAP_FAILED) return "cannot map the memory of a link";
    char* own = (char*)mapped;
    set_link(links[group][peer], (Ring*)(own + side * size), (Ring*)(own + (1 - side) * size), ring_bytes, own);
    return nullptr;
}

// Ends all waits for the peer, now and later, with an error.
SAGE_EXPORT void sage_break(int64_t group, int64_t peer) {
    Link& link = links[group][peer];
    link.is_broken.store(true);
    if (link.out == nullptr) return;
    wake(link.out->read);
    wake(link.in->written);
}

SAGE_EXPORT const char* sage_begin_send(int64_t group, int64_t peer, int64_t bytes) {
    Link& link = links[group][peer];
    if (link.out == nullptr) return "no link to rank %lld of the group";
    return write_bytes(link, (const char*)&bytes, sizeof bytes);
}

SAGE_EXPORT const char* sage_send_piece(int64_t group, int64_t peer, const void* data, int64_t bytes) {
    return write_bytes(links[group][peer], (const char*)data, bytes);
}

SAGE_EXPORT const char* sage_begin_receive(int64_t group, int64_t peer, int64_t bytes) {
    Link& link = links[group][peer];
    if (link.in == nullptr) return "no link from rank %lld of the group";
    int64_t sent = 0;
    if (const char* error = read_bytes(link, (char*)&sent, sizeof sent)) return error;
    return sent == bytes ? nullptr : "the message of rank %lld has an unexpected size; the ranks disagree on the step";
}

SAGE_EXPORT const char* sage_receive_piece(int64_t group, int64_t peer, void* data, int64_t bytes) {
    return read_bytes(links[group][peer], (char*)data, bytes);
}
