// parallel_for: every task once, at most so many threads, exceptions, nesting, fork.
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <iterator>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.hpp"
#include "parallel.hpp"
#include "subquad/errors.hpp"

namespace {

using subquad::available_threads;
using subquad::parallel_for;

void every_task_runs_once() {
  for (const std::int64_t n_tasks : {0, 1, 2, 3, 1000}) {
    for (const int max_threads : {1, 2, 4, 100}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n_tasks));
      std::atomic<bool> slots_fit{true};
      const int limit = std::min(max_threads, available_threads());
      parallel_for(n_tasks, max_threads, [&](std::int64_t task, int slot) {
        runs[static_cast<std::size_t>(task)].fetch_add(1);
        if (slot < 0 || slot >= limit) slots_fit = false;
      });
      SUBQUAD_CHECK(std::all_of(runs.begin(), runs.end(), [](const auto& r) { return r == 1; }));
      SUBQUAD_CHECK(slots_fit);
    }
  }
}

void slots_are_not_shared() {
  std::vector<std::atomic<int>> users(64);
  std::atomic<bool> shared{false};
  parallel_for(2000, 64, [&](std::int64_t, int slot) {
    std::atomic<int>& user = users[static_cast<std::size_t>(slot)];
    if (user.fetch_add(1) != 0) shared = true;
    std::this_thread::yield();
    user.fetch_sub(1);
  });
  SUBQUAD_CHECK(!shared);
}

void exceptions_reach_the_caller() {
  for (const int max_threads : {1, 8}) {
    std::atomic<int> after{0};
    SUBQUAD_CHECK(checks::throws<std::runtime_error>(
        [&] {
          parallel_for(100000, max_threads, [&](std::int64_t task, int) {
            if (task == 7) throw std::runtime_error("task 7");
            if (task > 7) after.fetch_add(1);
          });
        },
        "task 7"));
    SUBQUAD_CHECK(after < 100000 - 8);
    std::atomic<int> count{0};
    parallel_for(100, max_threads, [&](std::int64_t, int) { count.fetch_add(1); });
    SUBQUAD_CHECK(count == 100);
  }
}

void regions_do_not_nest() {
  std::atomic<int> most{0};
  parallel_for(8, 8, [&](std::int64_t, int slot) {
    if (slot > 0 && available_threads() != 1) most = 2;
    parallel_for(50, 8, [&](std::int64_t, int inner) { most = std::max(most.load(), inner); });
  });
  if (available_threads() > 1) SUBQUAD_CHECK(most == 0);
  std::atomic<int> highest{0};
#pragma omp parallel num_threads(2)
  {
    if (omp_get_num_threads() == 2) {
      SUBQUAD_CHECK(available_threads() == 1);
      parallel_for(50, 8,
                   [&](std::int64_t, int slot) { highest = std::max(highest.load(), slot); });
    }
  }
  SUBQUAD_CHECK(highest == 0);
}

int threads_alive() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<int>(std::distance(begin(tasks), end(tasks)));
}

void many_callers_share_the_processors() {
  constexpr int kCallers = 16;
  std::atomic<int> inside{0};
  std::atomic<int> most{0};
  std::atomic<int> finished{0};
  std::atomic<bool> leave{false};
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        parallel_for(64, 64, [&](std::int64_t, int slot) {
          if (slot == 0) return;
          const int now = inside.fetch_add(1) + 1;
          int before = most.load();
          while (before < now && !most.compare_exchange_weak(before, now)) {
          }
          std::this_thread::sleep_for(std::chrono::microseconds(20));
          inside.fetch_sub(1);
        });
      }
      finished.fetch_add(1);
      while (!leave) std::this_thread::yield();
    });
  }
  while (finished < kCallers) std::this_thread::yield();
  // Idle threads that pools keep, those of this thread included.
  SUBQUAD_CHECK(threads_alive() <= 1 + kCallers + available_threads() - 1);
  leave = true;
  for (std::thread& caller : callers) caller.join();
  SUBQUAD_CHECK(most <= available_threads() - 1);
}

void limits_hold() {
  const int all = available_threads();
  {
    const subquad::scoped_thread_limit one(1);
    SUBQUAD_CHECK(available_threads() == 1);
    {
      const subquad::scoped_thread_limit none(0);
      SUBQUAD_CHECK(available_threads() == all);
    }
    SUBQUAD_CHECK(available_threads() == 1);
    std::thread([&] { SUBQUAD_CHECK(available_threads() == all); }).join();
  }
  SUBQUAD_CHECK(available_threads() == all);
  subquad::request_num_threads(1);
  SUBQUAD_CHECK(available_threads() == 1);
  {
    const subquad::scoped_thread_limit two(2);
    SUBQUAD_CHECK(available_threads() == std::min(2, all));
  }
  subquad::request_num_threads(all);
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([] { subquad::request_num_threads(0); },
                                                          "n_threads: expected at least 1, got 0"));
}

void a_forked_child_is_serial() {
  parallel_for(100, 8, [](std::int64_t, int) {});
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    int sum = 0;
    parallel_for(100, 8, [&](std::int64_t task, int) { sum += static_cast<int>(task); });
    _exit(sum == 4950 && available_threads() == 1 ? 0 : 1);
  }
  int status = 1;
  SUBQUAD_CHECK(waitpid(child, &status, 0) == child);
  SUBQUAD_CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main() {
  every_task_runs_once();
  slots_are_not_shared();
  exceptions_reach_the_caller();
  regions_do_not_nest();
  many_callers_share_the_processors();
  limits_hold();
  a_forked_child_is_serial();
  return checks::status();
}
