// The only door to threads.
//
// Tasks are handed out one by one, so which thread runs a task differs from run to run: results
// must depend on the task alone, never on the slot or on how many threads there are.
#ifndef SUBQUAD_PARALLEL_HPP
#define SUBQUAD_PARALLEL_HPP

#include <cstdint>
#include <memory>
#include <type_traits>

namespace subquad {

// Threads that a region opened by this thread may use now: set_num_threads, else
// SUBQUAD_NUM_THREADS, else OMP_NUM_THREADS, else the processors of the affinity mask; never more
// than those. 1 inside a region and in a forked child.
int available_threads() noexcept;

// What is asked for, throughout the process; throws invalid_argument unless n_threads >= 1.
void request_num_threads(int n_threads);

// A limit for the calls made by this thread while the object lives; 0: none.
class scoped_thread_limit {
 public:
  explicit scoped_thread_limit(int n_threads) noexcept;
  ~scoped_thread_limit();
  scoped_thread_limit(const scoped_thread_limit&) = delete;
  scoped_thread_limit& operator=(const scoped_thread_limit&) = delete;

 private:
  int previous_;
};

namespace detail {
using task_function = void (*)(void* context, std::int64_t task, int slot);
void run_tasks(std::int64_t n_tasks, int max_threads, task_function function, void* context);
}  // namespace detail

// Calls body(task, slot) for every task in [0, n_tasks), slot in [0, max_threads). At most
// min(max_threads, n_tasks, available_threads()) threads; the caller alone inside another region,
// in a forked child, and while other callers hold the process's extra threads. The first exception
// that the body throws stops the handing out of tasks and is rethrown here.
template <class F>
void parallel_for(std::int64_t n_tasks, int max_threads, F&& body) {
  using body_type = std::remove_reference_t<F>;
  detail::run_tasks(
      n_tasks, max_threads,
      [](void* closure, std::int64_t task, int slot) {
        (*static_cast<body_type*>(closure))(task, slot);
      },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

}  // namespace subquad

#endif  // SUBQUAD_PARALLEL_HPP
