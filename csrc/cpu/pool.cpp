#include "cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace smallreduce::cpu {
namespace {

// torch.set_flush_denormal must not change our bits: IEEE arithmetic while a kernel runs, the thread's own mode afterwards.
class IeeeArithmetic {
 public:
#if defined(__SSE2__)
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeArithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
  }
  ~IeeeArithmetic() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t count, chunk;
  std::atomic<int64_t> next{0};
  std::atomic<int> helpers{0};  // how many workers may still join

  void work() {
    IeeeArithmetic ieee;
    for (;;) {
      int64_t begin = next.fetch_add(chunk);
      if (begin >= count) return;
      (*body)(begin, std::min(begin + chunk, count));
    }
  }
};

class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  bool try_run(Job& job, int threads) {
    std::unique_lock busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    {
      std::lock_guard lock(mutex_);
      while (int(workers_.size()) < threads - 1) workers_.emplace_back([this] { serve(); });
      job.helpers = threads - 1;
      job_ = &job;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock lock(mutex_);
    job_ = nullptr;
    idle_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stopping_ || (job_ && job_->helpers > 0); });
      if (stopping_) return;
      Job* job = job_;
      --job->helpers;
      ++active_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) idle_.notify_all();
    }
  }

  std::mutex busy_;   // held by the caller whose job is running
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, idle_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int active_ = 0;
  bool stopping_ = false;
};

std::atomic<Pool*> the_pool{nullptr};

// The threads of the parent do not exist in a forked child, and its mutexes may be held by them: the child starts anew and
// leaves the parent's pool alone.
void forget_pool_in_child() { the_pool = nullptr; }

Pool& pool() {
  static std::once_flag registered;
  std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, forget_pool_in_child); });
  Pool* current = the_pool.load();
  if (!current) {
    auto fresh = std::make_unique<Pool>();
    if (the_pool.compare_exchange_strong(current, fresh.get())) current = fresh.release();
  }
  return *current;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  int64_t wanted = std::clamp<int64_t>(count / grain, 1, std::max(threads, 1));
  Job job{&body, count, count};
  if (wanted > 1) {
    // Four ranges a thread even out a core that is shared with others.
    job.chunk = std::max(grain, (count + 4 * wanted - 1) / (4 * wanted));
    if (pool().try_run(job, int(wanted))) return;
    job.next = 0;
  }
  job.work();
}

}  // namespace smallreduce::cpu
