// The threads of a process that compute kernels together; see team.h.
//
// A job is announced in one word, `open`: its number, and how many of its parts nobody has taken. Taking a part is one
// exchange of that word, which fails if the job has changed meanwhile; so a thread that wakes late does no harm. Threads
// that find nothing watch the word for some microseconds, as kernels follow each other closely, and sleep then.
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

using Body = void (*)(void* state, int64_t part);

constexpr int WATCHES = 1500;          // about 50 microseconds
constexpr int64_t MAX_PARTS = 1 << 30;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

thread_local bool is_inside = false;  // of a part: what it shares out it does itself

class Team {
  public:
    // Does nothing if another thread has the team.
    bool share(int64_t parts, Body body, void* state, int64_t num_threads) {
        if (!owner_.try_lock()) return false;
        want(num_threads - 1);
        body_.store(body, std::memory_order_relaxed);
        state_.store(state, std::memory_order_relaxed);
        parts_.store(parts, std::memory_order_relaxed);
        unfinished_.store(parts, std::memory_order_relaxed);
        open_.store(++job_ << 32 | (uint64_t)parts);
        wake();
        is_inside = true;
        work(-1);
        is_inside = false;
        wait_for_others();
        owner_.unlock();
        return true;
    }

  private:
    std::mutex owner_;
    int64_t num_workers_ = 0;
    uint64_t job_ = 0;

    alignas(64) std::atomic<uint64_t> open_{0};  // the job's number, and below it the number of parts not taken
    std::atomic<Body> body_{nullptr};
    std::atomic<void*> state_{nullptr};
    std::atomic<int64_t> parts_{0};
    std::atomic<int64_t> helpers_{0};  // workers of a greater number sit by
    alignas(64) std::atomic<int64_t> unfinished_{0};
    alignas(64) std::atomic<int64_t> sleepers_{0};
    std::atomic<bool> owner_sleeps_{false};
    std::mutex sleep_;
    std::condition_variable has_job_, is_done_, is_wanted_;

    static int64_t left(uint64_t open) { return (int64_t)(open & 0xffffffff); }

    // Sets how many workers help. If the system gives no more threads, there are fewer.
    void want(int64_t helpers) {
        if (helpers_.load() != helpers) {
            std::lock_guard<std::mutex> lock(sleep_);
            helpers_.store(helpers);
            is_wanted_.notify_all();
        }
        while (num_workers_ < helpers && hire()) {}
    }

    struct Worker {
        Team* team;
        int64_t number;
    };

    bool hire() {
        Worker* worker = new Worker{this, num_workers_};
        pthread_t thread;
        if (pthread_create(&thread, nullptr, serve, worker)) {
            delete worker;
            return false;
        }
        pthread_detach(thread);
        ++num_workers_;
        return true;
    }

    static void* serve(void* of) {
        const Worker worker = *(Worker*)of;
        delete (Worker*)of;
        is_inside = true;
        for (;;) worker.team->serve(worker.number);
        return nullptr;
    }

    void serve(int64_t number) {
        const auto is_idle = [&] { return number < helpers_.load() && !left(open_.load()); };
        for (int watch = 0; watch < WATCHES && is_idle(); ++watch) pause();
        if (is_idle()) {
            std::unique_lock<std::mutex> lock(sleep_);
            sleepers_.fetch_add(1);
            has_job_.wait(lock, [&] { return !is_idle(); });
            sleepers_.fetch_sub(1);
        }
        if (number < helpers_.load()) return work(number);
        std::unique_lock<std::mutex> lock(sleep_);
        is_wanted_.wait(lock, [&] { return number < helpers_.load(); });
    }

    // Takes part after part of the open job. What is read of it between a look at `open_` and an exchange that succeeds
    // belongs together: a new job is announced only when all parts of the old one are taken.
    void work(int64_t number) {
        uint64_t open = open_.load(std::memory_order_acquire);
        while (left(open) > 0 && number < helpers_.load(std::memory_order_relaxed)) {
            const Body body = body_.load(std::memory_order_relaxed);
            void* state = state_.load(std::memory_order_relaxed);
            const int64_t part = parts_.load(std::memory_order_relaxed) - left(open);
            if (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            body(state, part);
            if (unfinished_.fetch_sub(1) == 1 && owner_sleeps_.load()) {
                std::lock_guard<std::mutex> lock(sleep_);
                is_done_.notify_one();
            }
            open = open_.load(std::memory_order_acquire);
        }
    }

    void wake() {
        if (!sleepers_.load()) return;
        { std::lock_guard<std::mutex> lock(sleep_); }  // who is about to sleep sleeps now, or has seen the job
        has_job_.notify_all();
    }

    void wait_for_others() {
        for (int watch = 0; watch < WATCHES && unfinished_.load(std::memory_order_acquire); ++watch) pause();
        if (!unfinished_.load()) return;
        std::unique_lock<std::mutex> lock(sleep_);
        owner_sleeps_.store(true);
        is_done_.wait(lock, [this] { return unfinished_.load() == 0; });
        owner_sleeps_.store(false);
    }
};

std::atomic<int64_t> num_threads{1};
Team* team = nullptr;  // never destroyed: its threads sleep in it when the process ends
std::once_flag is_made;

void make_team() { team = new Team; }

}  // namespace

EXPORTED void sage_use_threads(int64_t count) { num_threads.store(count > 1 ? count : 1, std::memory_order_relaxed); }

EXPORTED int64_t sage_num_threads() { return is_inside ? 1 : num_threads.load(std::memory_order_relaxed); }

EXPORTED void sage_share(int64_t parts, Body body, void* state) {
    if (parts <= 0) return;
    std::call_once(is_made, [] {
        make_team();
        pthread_atfork(nullptr, nullptr, make_team);  // a forked child has none of the threads
    });
    const int64_t threads = sage_num_threads();
    if (threads > 1 && parts < MAX_PARTS && team->share(parts, body, state, threads)) return;
    for (int64_t part = 0; part < parts; ++part) body(state, part);
}
