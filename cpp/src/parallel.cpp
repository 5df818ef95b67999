#include "parallel.hpp"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <exception>
#include <string>

#include "isa.hpp"
#include "subquad/errors.hpp"

namespace subquad {
namespace {

std::atomic<int> requested_threads{0};     // by request_num_threads; 0: not yet
std::atomic<int> active_extra_threads{0};  // in the regions open now, their callers not counted
std::atomic<int> pooled_extra_threads{0};  // alive in the runtime's pools, idle ones included
std::atomic<bool> forked{false};

thread_local int thread_limit = 0;
thread_local bool in_region = false;

// libgomp keeps a pool of its own for every thread that opens a region, until that thread ends.
struct pool_of_thread {
  int extra_threads = 0;
  ~pool_of_thread() { pooled_extra_threads.fetch_sub(extra_threads, std::memory_order_relaxed); }
};
thread_local pool_of_thread own_pool;

// libgomp's threads do not exist in a forked child, and a region there waits for them for ever.
void forget_threads() {
  forked.store(true, std::memory_order_relaxed);
  active_extra_threads.store(0, std::memory_order_relaxed);
  pooled_extra_threads.store(0, std::memory_order_relaxed);
  own_pool.extra_threads = 0;
  in_region = false;
}

[[maybe_unused]] const int kForkHandlerRegistered =
    pthread_atfork(nullptr, nullptr, forget_threads);

int processors_in_affinity_mask() noexcept {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  // More processors than a cpu_set_t holds.
  for (int processors = 2 * CPU_SETSIZE; errno == EINVAL && processors <= (1 << 20);
       processors *= 2) {
    cpu_set_t* large = CPU_ALLOC(static_cast<std::size_t>(processors));
    if (large == nullptr) break;
    const std::size_t size = CPU_ALLOC_SIZE(static_cast<std::size_t>(processors));
    const bool known = sched_getaffinity(0, size, large) == 0;
    const int count = known ? CPU_COUNT_S(size, large) : 0;
    const int reason = errno;
    CPU_FREE(large);
    if (known) return std::max(1, count);
    errno = reason;
  }
  return 1;
}

// The number that `text` starts with, where it is positive and ends there or, in a list, at a
// comma; otherwise 0.
int positive_number(const char* text, bool list) noexcept {
  if (text == nullptr) return 0;
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(text, &end, 10);
  while (end != text && (*end == ' ' || *end == '\t')) ++end;
  const bool ends = *end == '\0' || (list && *end == ',');
  return end != text && ends && errno == 0 && value > 0 && value <= INT_MAX
             ? static_cast<int>(value)
             : 0;
}

int threads_of_environment() noexcept {
  static const int threads = [] {
    const int own = positive_number(std::getenv("SUBQUAD_NUM_THREADS"), false);
    return own > 0 ? own : positive_number(std::getenv("OMP_NUM_THREADS"), true);
  }();
  return threads;
}

// Takes up to `wanted` of the process's `cap` extra threads; returns how many it got.
int take_extra_threads(int wanted, int cap) noexcept {
  int active = active_extra_threads.load(std::memory_order_relaxed);
  for (;;) {
    const int granted = std::min(wanted, cap - active);
    if (granted <= 0) return 0;
    if (active_extra_threads.compare_exchange_weak(active, active + granted,
                                                   std::memory_order_relaxed)) {
      return granted;
    }
  }
}

class extra_threads {
 public:
  extra_threads(int wanted, int cap) noexcept
      : cap_(cap), count_(take_extra_threads(wanted, cap)) {}

  ~extra_threads() {
    if (count_ == 0) return;
    pooled_extra_threads.fetch_add(count_ - own_pool.extra_threads, std::memory_order_relaxed);
    own_pool.extra_threads = count_;
    // Kept pools make the next region cheap, but many callers must not keep one each.
    if (pooled_extra_threads.load(std::memory_order_relaxed) > cap_ &&
        omp_pause_resource(omp_pause_soft, omp_get_initial_device()) == 0) {
      pooled_extra_threads.fetch_sub(own_pool.extra_threads, std::memory_order_relaxed);
      own_pool.extra_threads = 0;
    }
    active_extra_threads.fetch_sub(count_, std::memory_order_relaxed);
  }

  extra_threads(const extra_threads&) = delete;
  extra_threads& operator=(const extra_threads&) = delete;

  int count() const noexcept { return count_; }

 private:
  int cap_;
  int count_;
};

}  // namespace

int available_threads() noexcept {
  if (forked.load(std::memory_order_relaxed) || in_region || omp_in_parallel() != 0) return 1;
  int asked = thread_limit;
  if (asked == 0) asked = requested_threads.load(std::memory_order_relaxed);
  if (asked == 0) asked = threads_of_environment();
  if (asked == 1) return 1;
  const int processors = processors_in_affinity_mask();
  return asked == 0 ? processors : std::min(asked, processors);
}

void request_num_threads(int n_threads) {
  if (n_threads < 1) {
    throw invalid_argument("n_threads: expected at least 1, got " + std::to_string(n_threads));
  }
  requested_threads.store(n_threads, std::memory_order_relaxed);
}

scoped_thread_limit::scoped_thread_limit(int n_threads) noexcept : previous_(thread_limit) {
  thread_limit = n_threads;
}

scoped_thread_limit::~scoped_thread_limit() { thread_limit = previous_; }

void detail::check_threads_environment() {
  const char* value = std::getenv("SUBQUAD_NUM_THREADS");
  if (value != nullptr && *value != '\0' && positive_number(value, false) == 0) {
    throw invalid_argument("SUBQUAD_NUM_THREADS: expected a positive integer, got '" +
                           std::string(value) + "'");
  }
}

void detail::run_tasks(std::int64_t n_tasks, int max_threads, task_function function,
                       void* context) {
  int threads = static_cast<int>(std::min<std::int64_t>(n_tasks, max_threads));
  const int available = threads > 1 ? available_threads() : 1;
  threads = std::min(threads, available);
  const extra_threads extra(threads - 1, available - 1);
  if (extra.count() == 0) {
    for (std::int64_t task = 0; task < n_tasks; ++task) function(context, task, 0);
    return;
  }
  std::atomic<std::int64_t> next_task{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  const isa_level isa = current_isa();
#pragma omp parallel num_threads(extra.count() + 1)
  {
    const scoped_isa of_caller(isa);
    in_region = true;
    const int slot = omp_get_thread_num();
    while (!failed.load(std::memory_order_relaxed)) {
      const std::int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= n_tasks) break;
      try {
        function(context, task, slot);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    }
    in_region = false;
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace subquad
