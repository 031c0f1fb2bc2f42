// Runner of a step: calls the kernels of a plan without returning to Python between them.
//
// A call belongs to a stream. Stream 0 runs on the thread of the caller, each other stream on a thread that sleeps
// between steps. The calls of a stream run in their order in the list, and a call waits for those calls of other
// streams that it names. The order of the list satisfies all waits, so that one thread can run the whole list, too.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>

#include "error.h"

extern "C" void sage_set_num_threads(int64_t count);  // of thread_pool.cpp
extern "C" void sage_stay_on_thread();

namespace {

using Kernel = const char* (*)(void* const* tensors, const int64_t* sizes, const double* attrs);

constexpr int64_t MAX_STREAMS = 16;
constexpr int SPINS = 1500;  // about 50 microseconds, the cost of a sleep and a wake-up
constexpr size_t CACHE_LINE = 64;

struct Call {
    Kernel kernel;
    void* const* tensors;
    const int64_t* sizes;
    const double* attrs;
    int64_t stream;
    const int64_t* waits;  // numbers of earlier calls, of other streams
    int64_t num_waits;
    int64_t is_awaited;  // by a call of another stream
};

// When a call ran. The orders number the beginnings and ends of all calls of a list: they prove what came first.
struct Stamp {
    int64_t begin_ns, end_ns, begin_order, end_order;
};

// Calls `first` to `end` of a list. `stamps`, one for each call of the list, is null unless the calls are timed.
struct Run {
    const Call* calls;
    int64_t first, end;
    Stamp* stamps;
};

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline int64_t now_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();  // the clock of time.perf_counter
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

const char* invoke(const Run& run, int64_t i, std::atomic<int64_t>& order) {
    const Call& call = run.calls[i];
    if (!run.stamps) return call.kernel(call.tensors, call.sizes, call.attrs);
    Stamp& stamp = run.stamps[i];
    stamp.begin_order = order.fetch_add(1);
    stamp.begin_ns = now_ns();
    const char* error = call.kernel(call.tensors, call.sizes, call.attrs);
    stamp.end_ns = now_ns();
    stamp.end_order = order.fetch_add(1);
    return error;
}

// All calls on one thread.
const char* run_in_order(const Run& run) {
    std::atomic<int64_t> order{2 * run.first};
    for (int64_t i = run.first; i < run.end; ++i)
        if (const char* error = invoke(run, i, order)) return error;
    return nullptr;
}

// A stream of a run: its progress, and the thread that runs it.
struct alignas(CACHE_LINE) Stream {
    // The number of the last call that is done, plus one: the event of every call of the stream.
    std::atomic<int64_t> done{0};
    std::atomic<uint64_t> run_number{0};  // of the run that the thread is to take part in
    std::atomic<bool> sleeps{false};
    std::mutex sleep;
    std::condition_variable has_changed;
    bool has_thread = false;

    // Polls for a short time, as kernels are short, then sleeps until `wake` finds that the condition holds.
    template <class Condition>
    void wait(Condition holds) {
        for (int spin = 0; spin < SPINS; ++spin, pause())
            if (holds()) return;
        std::unique_lock<std::mutex> lock(sleep);
        // Sequentially consistent, as are the writes before `wake`: either `wake` sees that this thread sleeps, or this
        // thread sees the write.
        sleeps.store(true);
        has_changed.wait(lock, holds);
        sleeps.store(false);
    }

    void wake() {
        if (!sleeps.load()) return;
        // A thread between its check and its wait holds the lock; after this it waits, or it has seen the change.
        { std::lock_guard<std::mutex> lock(sleep); }
        has_changed.notify_one();
    }
};

// The threads of streams 1 and up, and the state of the run that they take part in.
class Streams {
  public:
    // Returns false, having done nothing, if another thread has the streams or the system refuses to create threads.
    bool run(const Run& run, int64_t num_streams, const char** error) {
        if (!owner_.try_lock()) return false;
        const bool is_ready = start_threads(num_streams);
        if (is_ready) *error = run_together(run, num_streams);
        owner_.unlock();
        return is_ready;
    }

  private:
    std::mutex owner_;
    Stream streams_[MAX_STREAMS];
    Run run_{};
    int64_t num_streams_ = 0;
    uint64_t run_number_ = 0;
    std::atomic<int64_t> order_{0};
    std::atomic<int64_t> num_unfinished_{0};
    std::atomic<bool> has_failed_{false};
    std::mutex failure_;
    char message_[256];  // of the first call that failed

    struct Thread {
        Streams* streams;
        int64_t number;
    };

    bool start_threads(int64_t num_streams) {
        for (int64_t number = 1; number < num_streams; ++number) {
            if (streams_[number].has_thread) continue;
            Thread* argument = new (std::nothrow) Thread{this, number};
            pthread_t thread;
            if (!argument || pthread_create(&thread, nullptr, thread_main, argument)) {
                delete argument;
                return false;
            }
            pthread_detach(thread);
            streams_[number].has_thread = true;
        }
        return true;
    }

    static void* thread_main(void* argument) {
        const Thread thread = *(Thread*)argument;
        delete (Thread*)argument;
#if defined(__linux__)
        char name[16];
        snprintf(name, sizeof name, "sage-stream-%d", (int)thread.number);
        pthread_setname_np(pthread_self(), name);
#endif
        sage_stay_on_thread();  // the pool belongs to stream 0
        uint64_t last = 0;
        for (;;) last = thread.streams->next_run(thread.number, last);
        return nullptr;
    }

    uint64_t next_run(int64_t number, uint64_t last) {
        Stream& own = streams_[number];
        own.wait([&] { return own.run_number.load() != last; });
        const uint64_t current = own.run_number.load();
        run_stream(number);
        if (num_unfinished_.fetch_sub(1) == 1) streams_[0].wake();
        return current;
    }

    const char* run_together(const Run& run, int64_t num_streams) {
        run_ = run;
        num_streams_ = num_streams;
        order_.store(2 * run.first);
        has_failed_.store(false);
        num_unfinished_.store(num_streams - 1);
        ++run_number_;
        for (int64_t i = 0; i < num_streams; ++i) streams_[i].done.store(run.first);
        for (int64_t i = 1; i < num_streams; ++i) {
            streams_[i].run_number.store(run_number_);  // publishes everything above
            streams_[i].wake();
        }
        run_stream(0);
        streams_[0].wait([this] { return num_unfinished_.load() == 0; });
        if (!has_failed_.load()) return nullptr;
        static thread_local char message[sizeof message_];  // the next run, of any thread, overwrites message_
        memcpy(message, message_, sizeof message);
        return message;
    }

    void run_stream(int64_t number) {
        for (int64_t i = run_.first; i < run_.end; ++i) {
            const Call& call = run_.calls[i];
            if (call.stream != number) continue;
            for (int64_t k = 0; k < call.num_waits; ++k) wait_for(number, call.waits[k]);
            if (has_failed_.load()) return;
            if (const char* error = invoke(run_, i, order_)) return fail(error);
            streams_[number].done.store(i + 1);
            if (call.is_awaited) wake_all();
        }
    }

    // Returns when the call is done, or when a call of any stream has failed.
    void wait_for(int64_t number, int64_t awaited) {
        if (awaited < run_.first) return;  // of an earlier run, which has ended
        const std::atomic<int64_t>& done = streams_[run_.calls[awaited].stream].done;
        streams_[number].wait([&] { return done.load() > awaited || has_failed_.load(); });
    }

    void fail(const char* error) {
        {
            std::lock_guard<std::mutex> lock(failure_);
            if (has_failed_.load()) return;
            snprintf(message_, sizeof message_, "%s", error);
            has_failed_.store(true);
        }
        wake_all();
    }

    void wake_all() {
        for (int64_t i = 0; i < num_streams_; ++i) streams_[i].wake();
    }
};

Streams* streams = nullptr;  // never destroyed: its threads sleep in it when the process exits
std::once_flag is_created;

void create_streams() { streams = new Streams; }

}  // namespace

// Makes calls `first` to `end` of the list at `calls`, which belong to streams below `num_streams`, and returns when
// all are done: null, or the error message of the first call that fails, after which no others begin.
SAGE_EXPORT const char* sage_run(const Call* calls, int64_t first, int64_t end, int64_t num_streams,
                                 int64_t num_threads, Stamp* stamps) {
    sage_set_num_threads(num_threads);
    const Run run{calls, first, end, stamps};
    if (num_streams > MAX_STREAMS) return "a plan has at most 16 streams";
    if (num_streams > 1) {
        std::call_once(is_created, [] {
            create_streams();
            pthread_atfork(nullptr, nullptr, create_streams);  // a forked child has none of the threads
        });
        const char* error = nullptr;
        if (streams->run(run, num_streams, &error)) return error;
    }
    return run_in_order(run);
}

// Copies a tensor of up to four dims to contiguous memory. sizes: bytes per element, the four dims, their strides.
SAGE_EXPORT const char* sage_gather_rows(void* const* tensors, const int64_t* sizes, const double*) {
    const int64_t width = sizes[0];
    const int64_t *dims = sizes + 1, *strides = sizes + 5;
    const char* source = static_cast<const char*>(tensors[0]);
    char* target = static_cast<char*>(tensors[1]);
    for (int64_t a = 0; a < dims[0]; ++a)
        for (int64_t b = 0; b < dims[1]; ++b)
            for (int64_t c = 0; c < dims[2]; ++c) {
                const char* row = source + (a * strides[0] + b * strides[1] + c * strides[2]) * width;
                if (strides[3] == 1) {
                    std::memcpy(target, row, dims[3] * width);
                    target += dims[3] * width;
                    continue;
                }
                for (int64_t d = 0; d < dims[3]; ++d, target += width)
                    std::memcpy(target, row + d * strides[3] * width, width);
            }
    return nullptr;
}

// Fills memory with bytes that read as NaN in every float type and as -1 in every integer type. sizes: the bytes.
SAGE_EXPORT const char* sage_poison(void* const* tensors, const int64_t* sizes, const double*) {
    std::memset(tensors[0], 0xFF, sizes[0]);
    return nullptr;
}
