// The thread pool that all kernels of a process share; see thread_pool.h.
//
// A job is published in one word, `open_`: its number, and how many of its parts have not been taken. Taking a part is
// one compare-exchange of that word, which fails if the job has changed meanwhile, so a thread that wakes late does no
// harm. Idle threads poll the word for some microseconds, because the kernels of a step follow each other closely, then
// sleep.
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>

#include "error.h"

namespace {

using Body = void (*)(void* state, int64_t part);

constexpr int SPINS = 1500;  // about 50 microseconds, the cost of a sleep and a wake-up
constexpr int SPINS_PER_YIELD = 100;
constexpr int64_t MAX_PARTS = 1 << 30;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Every few pauses the core is offered to other threads: one that waits for it, such as that of the engine, which plans
// the next step, would otherwise not run before the end of the step that follows.
inline void pause_or_yield(int spin) {
    if (spin % SPINS_PER_YIELD == SPINS_PER_YIELD - 1)
        sched_yield();
    else
        pause();
}

thread_local bool is_inside = false;  // a part: a nested loop runs on its own thread

class ThreadPool {
  public:
    // Returns false, having done nothing, if another thread has the pool.
    bool run(int64_t parts, Body body, void* state, int64_t num_threads) {
        if (!owner_.try_lock()) return false;
        resize(num_threads - 1);
        // Relaxed stores are enough: the store to `open_` below publishes them, and no thread reads them before it has
        // seen that word. The job's number changes with each job, so an exchange on an old word cannot succeed.
        body_.store(body, std::memory_order_relaxed);
        state_.store(state, std::memory_order_relaxed);
        parts_.store(parts, std::memory_order_relaxed);
        unfinished_.store(parts, std::memory_order_relaxed);
        open_.store(++job_ << 32 | (uint64_t)parts);
        wake();
        is_inside = true;
        take_parts(-1);
        is_inside = false;
        wait_for_others();
        owner_.unlock();
        return true;
    }

  private:
    std::mutex owner_;
    int64_t num_workers_ = 0;
    uint64_t job_ = 0;

    // Words that different threads write often have a cache line each.
    alignas(64) std::atomic<uint64_t> open_{0};  // the job's number, and below it the number of parts not taken
    std::atomic<Body> body_{nullptr};
    std::atomic<void*> state_{nullptr};
    std::atomic<int64_t> parts_{0};
    std::atomic<int64_t> num_active_{0};  // workers with a greater number stay asleep
    alignas(64) std::atomic<int64_t> unfinished_{0};
    alignas(64) std::atomic<int64_t> num_sleeping_{0};
    std::atomic<bool> owner_sleeps_{false};
    std::mutex sleep_;
    std::condition_variable has_job_, is_done_, is_activated_;

    static int64_t remaining(uint64_t open) { return (int64_t)(open & 0xffffffff); }

    // Sets the number of active workers; fewer if the system refuses to create threads.
    void resize(int64_t num_active) {
        if (num_active_.load() != num_active) {
            std::lock_guard<std::mutex> lock(sleep_);
            num_active_.store(num_active);
            is_activated_.notify_all();
        }
        while (num_workers_ < num_active && start_worker()) {}
    }

    struct Worker {
        ThreadPool* pool;
        int64_t number;
    };

    bool start_worker() {
        Worker* worker = new (std::nothrow) Worker{this, num_workers_};
        pthread_t thread;
        if (!worker || pthread_create(&thread, nullptr, worker_main, worker)) {
            delete worker;
            return false;
        }
        pthread_detach(thread);
        ++num_workers_;
        return true;
    }

    static void* worker_main(void* argument) {
        const Worker worker = *(Worker*)argument;
        delete (Worker*)argument;
        is_inside = true;
        for (;;) worker.pool->worker_step(worker.number);
        return nullptr;
    }

    void worker_step(int64_t number) {
        const auto is_idle = [&] { return number < num_active_.load() && !remaining(open_.load()); };
        for (int spin = 0; spin < SPINS && is_idle(); ++spin) pause_or_yield(spin);
        if (is_idle()) {
            std::unique_lock<std::mutex> lock(sleep_);
            num_sleeping_.fetch_add(1);
            has_job_.wait(lock, [&] { return !is_idle(); });
            num_sleeping_.fetch_sub(1);
        }
        if (number < num_active_.load()) return take_parts(number);
        std::unique_lock<std::mutex> lock(sleep_);
        is_activated_.wait(lock, [&] { return number < num_active_.load(); });
    }

    // Takes part after part of the open job. The acquire load of `open_` makes the job's fields visible. They belong to
    // that word if the exchange succeeds: a new job is published only when all parts of the old one have been taken.
    void take_parts(int64_t number) {
        uint64_t open = open_.load(std::memory_order_acquire);
        while (remaining(open) > 0 && number < num_active_.load(std::memory_order_relaxed)) {
            const Body body = body_.load(std::memory_order_relaxed);
            void* state = state_.load(std::memory_order_relaxed);
            const int64_t part = parts_.load(std::memory_order_relaxed) - remaining(open);
            if (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel, std::memory_order_acquire))
                continue;
            body(state, part);
            // Sequentially consistent, as is the owner's store to `owner_sleeps_` before its check of `unfinished_`: of
            // the two threads, at least one sees the other's write, so the last notification is not lost.
            if (unfinished_.fetch_sub(1) == 1 && owner_sleeps_.load()) {
                std::lock_guard<std::mutex> lock(sleep_);
                is_done_.notify_one();
            }
            open = open_.load(std::memory_order_acquire);
        }
    }

    // The sequentially consistent store to `open_` comes first, and a worker counts itself as sleeping before it checks
    // the word again: either the count is seen here, or the worker sees the job.
    void wake() {
        if (!num_sleeping_.load()) return;
        // A worker between its check and its wait holds the lock; after this it waits, or it has seen the job.
        { std::lock_guard<std::mutex> lock(sleep_); }
        has_job_.notify_all();
    }

    void wait_for_others() {
        for (int spin = 0; spin < SPINS && unfinished_.load(std::memory_order_acquire); ++spin) pause();
        if (!unfinished_.load()) return;
        std::unique_lock<std::mutex> lock(sleep_);
        owner_sleeps_.store(true);
        is_done_.wait(lock, [this] { return unfinished_.load() == 0; });
        owner_sleeps_.store(false);
    }
};

std::atomic<int64_t> num_threads{1};
ThreadPool* pool = nullptr;  // never destroyed: its threads sleep in it when the process exits
std::once_flag is_created;

void create_pool() { pool = new ThreadPool; }

}  // namespace

SAGE_EXPORT void sage_set_num_threads(int64_t count) {
    num_threads.store(count > 1 ? count : 1, std::memory_order_relaxed);
}

SAGE_EXPORT int64_t sage_num_threads() { return is_inside ? 1 : num_threads.load(std::memory_order_relaxed); }

// Loops of the calling thread run on it alone from now on, and leave the pool to others.
SAGE_EXPORT void sage_stay_on_thread() { is_inside = true; }

SAGE_EXPORT void sage_parallel_for(int64_t parts, Body body, void* state) {
    if (parts <= 0) return;
    std::call_once(is_created, [] {
        create_pool();
        pthread_atfork(nullptr, nullptr, create_pool);  // a forked child has none of the threads
    });
    const int64_t threads = sage_num_threads();
    if (threads > 1 && parts < MAX_PARTS && pool->run(parts, body, state, threads)) return;
    for (int64_t part = 0; part < parts; ++part) body(state, part);
}
