// What the host executor sees of broken kernels, each beside its right twin. A kernel that is right
// writes 0, 1, 2, ... over its threads, or what its test says.
#include "cuda_on_host/executor.hpp"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "cuda/launch.cuh"
#include "cuda_on_host/guarded.hpp"

namespace subquad::cuda {
namespace {

using on_host::device_array;
using on_host::executor_error;
using on_host::order;

constexpr order kOrders[] = {order::ascending, order::descending, order::shuffled};
constexpr std::uint32_t kAll = 0xffffffffu;

device_array<std::int32_t> ints(std::int64_t size, bool flush_high = true) {
  return device_array<std::int32_t>({size}, dtype::uint8, flush_high);
}

// The message of what `function` throws, empty if it does not.
std::string problem_of(const std::function<void()>& function) {
  try {
    function();
  } catch (const executor_error& e) {
    return e.what();
  }
  return {};
}

bool contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::printf("expected \"%s\" in \"%s\"\n", part.c_str(), text.c_str());
  return false;
}

bool counts_up(const device_array<std::int32_t>& out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (out[static_cast<std::int64_t>(i)] != static_cast<std::int32_t>(i)) return false;
  }
  return true;
}

// For ascending, descending and shuffled threads: r where the result is right, w where it is wrong,
// x where the executor refused. `run` launches and tells whether the result is right.
std::string seen(const std::function<bool()>& run, std::string* problem = nullptr) {
  std::string outcomes;
  for (const order each : kOrders) {
    on_host::set_order(each);
    try {
      outcomes += run() ? 'r' : 'w';
    } catch (const executor_error& e) {
      outcomes += 'x';
      if (problem) *problem = e.what();
    }
  }
  on_host::set_order(order::each_in_turn);
  return outcomes;
}

template <class Kernel>
std::string seen_in_counting(const Kernel& kernel, std::string* problem = nullptr,
                             std::int64_t blocks = 1, bool flush_high = true) {
  return seen(
      [&] {
        const auto out = ints(blocks * Kernel::kThreads, flush_high);
        Kernel with_output = kernel;
        with_output.out = out.begin();
        launch(blocks, with_output);
        return counts_up(out);
      },
      problem);
}

int thread() { return static_cast<int>(threadIdx.x); }
int thread_of_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// ---- barriers -----------------------------------------------------------------------------------

struct counting {
  static constexpr int kThreads = 64;
  std::int32_t* out = nullptr;
};

// Reads what the thread `distance` further has written.
struct missing_barrier : counting {
  struct shared_memory {
    std::int32_t values[kThreads];
  };
  int distance;
  bool is_broken;

  void operator()(shared_memory& shared) const {
    shared.values[thread()] = thread();
    if (!is_broken) __syncthreads();
    const int from = (thread() + distance + kThreads) % kThreads;
    out[from] = shared.values[from];
  }
};

// Writes its buffer again while others may still read it.
struct missing_second_barrier : counting {
  struct shared_memory {
    std::int32_t values[kThreads];
  };
  int distance;
  bool is_broken;

  void operator()(shared_memory& shared) const {
    const int from = std::min(std::max(thread() + distance, 0), kThreads - 1);
    int sum = 0;
    for (int round = 0; round < 3; ++round) {
      shared.values[thread()] = 100 * round;
      __syncthreads();
      sum += shared.values[from];
      if (!is_broken) __syncthreads();
    }
    out[thread()] = sum == 300 ? thread() : -1;
  }
};

struct barrier_in_branch : counting {
  struct shared_memory {};
  bool is_broken;

  void operator()(shared_memory&) const {
    if (!is_broken || thread() >= 40) __syncthreads();
    out[thread()] = thread();
  }
};

struct barriers_in_both_branches : counting {
  struct shared_memory {};
  bool is_broken;

  void operator()(shared_memory&) const {
    if (is_broken && thread() < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
    out[thread()] = thread();
  }
};

struct return_before_barrier : counting {
  struct shared_memory {};
  bool is_broken;

  void operator()(shared_memory&) const {
    out[thread()] = thread();
    if (is_broken && thread() == 7) return;
    __syncthreads();
  }
};

// The lanes of one warp wait for each other, those of the other for the block.
struct barrier_against_exchange : counting {
  struct shared_memory {};
  bool is_broken;

  void operator()(shared_memory&) const {
    if (!is_broken || thread() % 32 != 3) __syncwarp();
    __syncthreads();
    if (is_broken && thread() % 32 == 3) __syncwarp();
    out[thread()] = thread();
  }
};

struct barrier_votes {
  static constexpr int kThreads = 96;
  struct shared_memory {};
  std::int32_t* out;

  void operator()(shared_memory&) const {
    bool right = true;
    for (int round = 0; round < 4; ++round) {
      right &= __syncthreads_count(thread() < 10 * round) == 10 * round;
      right &= __syncthreads_or(thread() == 90 && round == 2) == (round == 2);
      right &= __syncthreads_and(thread() != 90 || round == 2) == (round == 2);
    }
    out[thread()] = right ? thread() : -1;
  }
};

void test_barriers() {
  // A distance that wraps around is seen by all orders: whoever runs first reads poison.
  SUBQUAD_CHECK(seen_in_counting(missing_barrier{{}, 1, true}) == "www");
  SUBQUAD_CHECK(seen_in_counting(missing_barrier{{}, -1, true}) == "www");
  SUBQUAD_CHECK(seen_in_counting(missing_barrier{{}, 1, false}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(missing_barrier{{}, -1, false}) == "rrr");
  // Without wrapping, ascending threads hide it in one direction, descending ones in the other.
  SUBQUAD_CHECK(seen_in_counting(missing_second_barrier{{}, 1, true}) == "rww");
  SUBQUAD_CHECK(seen_in_counting(missing_second_barrier{{}, -1, true}) == "wrw");
  SUBQUAD_CHECK(seen_in_counting(missing_second_barrier{{}, 1, false}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(missing_second_barrier{{}, -1, false}) == "rrr");

  std::string problem;
  SUBQUAD_CHECK(seen_in_counting(barrier_in_branch{{}, true}, &problem, 3) == "xxx");
  SUBQUAD_CHECK(contains(problem,
                         "wait for threads that do not come; thread 0 and 39 more ended; "
                         "thread 40 and 23 more in __syncthreads at test_executor.cpp:"));
  SUBQUAD_CHECK(seen_in_counting(barrier_in_branch{{}, false}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(barriers_in_both_branches{{}, true}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem,
                         "threads of block 0 wait at different barriers; thread 0 and 31 "
                         "more in __syncthreads at test_executor.cpp:"));
  SUBQUAD_CHECK(seen_in_counting(barriers_in_both_branches{{}, false}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(return_before_barrier{{}, true}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem, "thread 7 ended"));
  SUBQUAD_CHECK(seen_in_counting(return_before_barrier{{}, false}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(barrier_against_exchange{{}, true}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem, "in __syncwarp of lanes 0xffffffff at test_executor.cpp:"));
  SUBQUAD_CHECK(contains(problem, "thread 3 and 1 more in __syncthreads at test_executor.cpp:"));
  SUBQUAD_CHECK(seen_in_counting(barrier_against_exchange{{}, false}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(barrier_votes{nullptr}) == "rrr");
}

// ---- memory -------------------------------------------------------------------------------------

struct shared_index : counting {
  struct shared_memory {
    std::int32_t values[kThreads];
  };
  int offset;  // bytes / 4
  bool writes;

  void operator()(shared_memory& shared) const {
    shared.values[thread()] = thread();
    std::int32_t* at = shared.values + thread() + (thread() == 5 ? offset : 0);
    if (writes) {
      *static_cast<volatile std::int32_t*>(at) = thread();
      out[thread()] = thread();
    } else {
      out[thread()] = *static_cast<volatile std::int32_t*>(at);
    }
  }
};

struct global_index : counting {
  struct shared_memory {};
  int offset;
  bool writes;

  void operator()(shared_memory&) const {
    const int index = thread_of_grid();
    out[index] = index;
    if (index != 5) return;
    volatile std::int32_t* at = out + index + offset;
    if (writes) {
      *at = index + offset;
    } else {
      out[index] = *at - offset;
    }
  }
};

struct unwritten_output : counting {
  struct shared_memory {};
  bool is_broken;

  void operator()(shared_memory&) const {
    if (thread() < (is_broken ? 63 : 64)) out[thread()] = thread();
  }
};

// What the block before left must not be seen.
struct poison_at_start {
  static constexpr int kThreads = 32;
  struct shared_memory {
    unsigned char bytes[kThreads * 5 - 1];
  };
  std::int32_t* out;

  void operator()(shared_memory& shared) const {
    bool poison = true;
    for (int i = thread(); i < static_cast<int>(sizeof(shared)); i += kThreads) {
      poison &= shared.bytes[i] == 0xff;
    }
    __syncthreads();
    for (int i = thread(); i < static_cast<int>(sizeof(shared)); i += kThreads) {
      shared.bytes[i] = 1;
    }
    out[thread_of_grid()] = poison ? thread_of_grid() : -1;
  }
};

template <std::size_t kBytes>
struct odd_size : counting {
  struct shared_memory {
    unsigned char bytes[kBytes];
  };
  int beyond;

  void operator()(shared_memory& shared) const {
    for (int i = thread(); i < static_cast<int>(kBytes) + beyond; i += kThreads) {
      static_cast<volatile unsigned char*>(shared.bytes)[i] = 1;
    }
    out[thread_of_grid()] = thread_of_grid();
  }
};

template <std::size_t kBytes>
void test_odd_size() {
  SUBQUAD_CHECK(seen_in_counting(odd_size<kBytes>{{}, 0}, nullptr, 2) == "rrr");
  std::string problem;
  SUBQUAD_CHECK(seen_in_counting(odd_size<kBytes>{{}, 1}, &problem, 2) == "xxx");
  SUBQUAD_CHECK(contains(problem, "byte " + std::to_string(kBytes) + " of "));
}

void test_memory() {
  std::string problem;
  // Two blocks have both placements of shared memory, so that one of them lies at the page.
  for (const bool writes : {false, true}) {
    for (const int offset : {-7, 59, 70}) {
      SUBQUAD_CHECK(seen(
                        [&] {
                          const auto out = ints(64);
                          launch(2, shared_index{{out.begin()}, offset, writes});
                          return counts_up(out);
                        },
                        &problem) == "xxx");
      SUBQUAD_CHECK(contains(problem, "shared memory") &&
                    contains(problem, "byte " + std::to_string(4 * (5 + offset)) + " of "));
    }
    SUBQUAD_CHECK(seen([&] {
                    const auto out = ints(64);
                    launch(2, shared_index{{out.begin()}, 0, writes});
                    return counts_up(out);
                  }) == "rrr");
  }
  for (const bool flush_high : {false, true}) {
    // Flush against the page above: an index above faults at once, one below is poison to a read
    // and found after a write; and the other way round.
    const int into_page = flush_high ? 128 - 5 : -7;
    const int between = flush_high ? -7 : 128 - 5;
    SUBQUAD_CHECK(seen_in_counting(global_index{{}, into_page, false}, &problem, 2, flush_high) ==
                  "xxx");
    SUBQUAD_CHECK(contains(problem, "thread 5 of block 0 touches an array at byte " +
                                        std::to_string(4 * (5 + into_page)) + " of 512"));
    SUBQUAD_CHECK(seen_in_counting(global_index{{}, into_page, true}, &problem, 2, flush_high) ==
                  "xxx");
    SUBQUAD_CHECK(contains(problem, "thread 5 of block 0 touches an array at byte"));
    SUBQUAD_CHECK(seen_in_counting(global_index{{}, between, false}, &problem, 2, flush_high) ==
                  "www");
    SUBQUAD_CHECK(seen_in_counting(global_index{{}, between, true}, &problem, 2, flush_high) ==
                  "xxx");
    SUBQUAD_CHECK(contains(
        problem, "wrote to byte " + std::to_string(4 * (5 + between)) + " of an array of 512"));
    SUBQUAD_CHECK(seen_in_counting(global_index{{}, 0, true}, nullptr, 2, flush_high) == "rrr");
    SUBQUAD_CHECK(seen_in_counting(global_index{{}, 0, false}, nullptr, 2, flush_high) == "rrr");
  }
  SUBQUAD_CHECK(seen_in_counting(unwritten_output{{}, true}) == "www");
  SUBQUAD_CHECK(seen_in_counting(unwritten_output{{}, false}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(poison_at_start{nullptr}, nullptr, 7) == "rrr");
  test_odd_size<1>();
  test_odd_size<17>();
  test_odd_size<4095>();
  test_odd_size<4096>();
  test_odd_size<4097>();
  test_odd_size<99 * 1024>();
  SUBQUAD_CHECK(contains(problem_of([] {
                           const auto out = ints(64);
                           launch(1, odd_size<99 * 1024 + 1>{{out.begin()}, 0});
                         }),
                         "expected at most 101376 bytes of shared memory, got 101377"));
}

// ---- exchanges of a warp ------------------------------------------------------------------------

struct wrong_lane : counting {
  struct shared_memory {};
  int flip;

  void operator()(shared_memory&) const {
    out[thread()] = __shfl_xor_sync(kAll, thread(), flip) ^ 1;
  }
};

// Sums of the even lanes, whose mask must name them all, and whose sources must be in it.
struct shuffle_in_mask : counting {
  struct shared_memory {};
  std::uint32_t mask;
  int flip;

  void operator()(shared_memory&) const {
    out[thread()] = thread();
    if (thread() % 2 == 0) out[thread()] = __shfl_xor_sync(mask, thread(), flip) ^ flip;
  }
};

struct vote_without_lane : counting {
  struct shared_memory {};
  bool is_broken;

  void operator()(shared_memory&) const {
    out[thread()] = thread();
    if (is_broken && thread() == 37) return;
    if (__ballot_sync(kAll, thread() % 2) != 0xaaaaaaaau) out[thread()] = -1;
  }
};

struct different_exchanges : counting {
  struct shared_memory {};
  bool is_broken;

  void operator()(shared_memory&) const {
    int value;
    if (is_broken && thread() % 32 < 16) {
      value = __shfl_xor_sync(kAll, thread(), 1);
    } else {
      value = __shfl_xor_sync(kAll, thread(), 1);
    }
    out[thread()] = value ^ 1;
  }
};

// On one line, so that only kinds and types tell the calls apart.
struct exchanges_of_one_line : counting {
  struct shared_memory {};
  int kind;

  void operator()(shared_memory&) const {
    const int t = thread();
    const double wide = t;
    const bool low = t % 32 < 16;
    int value = t ^ 1;
    // clang-format off
    if (kind == 1) value = low ? __shfl_xor_sync(kAll, t, 1) : __shfl_sync(kAll, t, t ^ 1);
    if (kind == 2) value = low ? __shfl_xor_sync(kAll, t, 1) : int(__shfl_xor_sync(kAll, wide, 1));
    // clang-format on
    out[thread()] = value ^ 1;
  }
};

// Halves of a warp with masks of their own, out of step, some lanes gone.
struct masks_at_once : counting {
  struct shared_memory {};

  void operator()(shared_memory&) const {
    const int lane = thread() % 32;
    out[thread()] = -1;
    int sum = lane;
    if (lane < 12) {
      for (int round = 0; round < 5; ++round) {
        sum = __shfl_xor_sync(0x00000fffu, sum, 1);
        __syncwarp(0x00000fffu);
      }
      if (sum == (lane ^ 1)) out[thread()] = thread();
      return;
    }
    if (lane < 16) {
      out[thread()] = thread();
      return;
    }
    if (__ballot_sync(0xffff0000u, lane % 3 == 0) == 0x49240000u) out[thread()] = thread();
    if (!__all_sync(0xffff0000u, lane > 15) || __any_sync(0xffff0000u, lane == 3)) {
      out[thread()] = -1;
    }
  }
};

// Lane 0 meets 2, then 1; 1 may come while 0 still waits for 2.
struct chain_of_masks : counting {
  struct shared_memory {};

  void operator()(shared_memory&) const {
    const int lane = thread() % 32;
    int value = lane;
    if (lane == 0 || lane == 2) value = __shfl_sync(0x5u, value, 2 - lane);
    if (lane == 0 || lane == 1) value = __shfl_sync(0x3u, value, 1 - lane);
    const int right = lane == 0 ? 1 : lane == 1 ? 2 : lane == 2 ? 0 : lane;
    out[thread()] = value == right ? thread() : -1;
  }
};

// The PTX manual's shfl.sync, lane by lane: c has the segment in bits 8-12 and the clamp in 0-4.
int lane_of_manual(char mode, int lane, int b, int width) {
  const int segment_mask = 32 - width;
  const int clamp = mode == 'u' ? 0 : 31;
  const int max_lane = (lane & segment_mask) | (clamp & ~segment_mask);
  const int min_lane = lane & segment_mask;
  const int by = b & 31;
  switch (mode) {
    case 'u':
      return lane - by >= max_lane ? lane - by : lane;
    case 'd':
      return lane + by <= max_lane ? lane + by : lane;
    case 'x':
      return (lane ^ by) <= max_lane ? lane ^ by : lane;
    default:
      return min_lane | (by & ~segment_mask);
  }
}

template <class T>
struct all_shuffles : counting {
  struct shared_memory {};

  void operator()(shared_memory&) const {
    const int lane = thread() % 32;
    const T own = static_cast<T>(1000 + lane);
    bool right = true;
    for (int width = 1; width <= 32; width *= 2) {
      for (int by = -40; by < 72; ++by) {
        const T read = __shfl_sync(kAll, own, by, width);
        right &= read == static_cast<T>(1000 + lane_of_manual('i', lane, by, width));
        if (by < 0 || by >= 32) continue;
        const T up = __shfl_up_sync(kAll, own, by, width);
        const T down = __shfl_down_sync(kAll, own, by, width);
        const T across = __shfl_xor_sync(kAll, own, by, width);
        right &= up == static_cast<T>(1000 + lane_of_manual('u', lane, by, width));
        right &= down == static_cast<T>(1000 + lane_of_manual('d', lane, by, width));
        right &= across == static_cast<T>(1000 + lane_of_manual('x', lane, by, width));
      }
    }
    out[thread()] = right ? thread() : -1;
  }
};

struct shuffle_with : counting {
  struct shared_memory {};
  int by;
  int width;

  void operator()(shared_memory&) const {
    out[thread()] = thread();
    if (thread() >= 32) __shfl_down_sync(kAll, 1.0f, by, width);
  }
};

void test_warps() {
  std::string problem;
  SUBQUAD_CHECK(seen_in_counting(wrong_lane{{}, 2}) == "www");
  SUBQUAD_CHECK(seen_in_counting(wrong_lane{{}, 1}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(shuffle_in_mask{{}, 0x55555555u, 2}) == "rrr");
  // From lanes outside of the mask comes poison.
  SUBQUAD_CHECK(seen_in_counting(shuffle_in_mask{{}, 0x55555555u, 1}) == "www");
  SUBQUAD_CHECK(seen_in_counting(shuffle_in_mask{{}, 0x55555554u, 2}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem,
                         "is not in the mask 0x55555554 of its __shfl_xor_sync at "
                         "test_executor.cpp:"));
  SUBQUAD_CHECK(seen_in_counting(shuffle_in_mask{{}, 0x55555557u, 2}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem, "wait for threads that do not come"));
  SUBQUAD_CHECK(seen_in_counting(vote_without_lane{{}, true}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem,
                         "thread 32 and 30 more in __ballot_sync of lanes 0xffffffff at "
                         "test_executor.cpp:"));
  SUBQUAD_CHECK(contains(problem, "ended"));
  SUBQUAD_CHECK(seen_in_counting(vote_without_lane{{}, false}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(different_exchanges{{}, true}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem, "of block 0 is in __shfl_xor_sync at test_executor.cpp:"));
  SUBQUAD_CHECK(contains(problem, "of its warp in __shfl_xor_sync at test_executor.cpp:"));
  SUBQUAD_CHECK(seen_in_counting(different_exchanges{{}, false}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(exchanges_of_one_line{{}, 0}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(exchanges_of_one_line{{}, 1}) == "xxx");
  SUBQUAD_CHECK(seen_in_counting(exchanges_of_one_line{{}, 2}) == "xxx");
  SUBQUAD_CHECK(seen_in_counting(masks_at_once{}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(chain_of_masks{}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(all_shuffles<int>{}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(all_shuffles<std::uint64_t>{}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(all_shuffles<float>{}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(all_shuffles<double>{}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(shuffle_with{{}, 31, 32}) == "rrr");
  SUBQUAD_CHECK(seen_in_counting(shuffle_with{{}, 1, 24}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem, "with a width of 24, expected a power of 2 up to 32"));
  SUBQUAD_CHECK(seen_in_counting(shuffle_with{{}, 32, 32}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem, "over a distance of 32, expected one in [0, 32)"));
  SUBQUAD_CHECK(seen_in_counting(shuffle_with{{}, -1, 32}, &problem) == "xxx");
}

// ---- copies -------------------------------------------------------------------------------------

enum class copying {
  right,
  read_before_wait,
  read_before_barrier,
  not_committed,
  not_waited,
  waits_for_too_few,
  target_not_aligned,
  source_not_aligned,
  target_outside,
  source_outside,
  buffer_read_while_copied,
  read_in_flight
};

struct copies : counting {
  struct shared_memory {
    alignas(16) std::int32_t values[2][4 * kThreads];
  };
  copying how;
  const std::int32_t* from = nullptr;  // 4 kThreads + 4 of them

  void operator()(shared_memory& shared) const {
    const int own = 4 * thread();
    std::int32_t* to = shared.values[0] + own;
    const std::int32_t* source = from + own;
    if (how == copying::target_not_aligned && thread() == 9) to += 1;
    if (how == copying::source_not_aligned && thread() == 9) source += 1;
    if (how == copying::target_outside && thread() == 9) to += 8 * kThreads;
    if (how == copying::source_outside && thread() == 63) source += 4;
    copy_async<16>(to, source, 16);
    if (how != copying::not_committed) commit_copies();
    copy_async<16>(shared.values[1] + own, from + own, 12);
    commit_copies();
    std::int32_t early = how == copying::read_before_wait ? shared.values[0][own] : 0;
    if (how == copying::waits_for_too_few) {
      wait_copies<2>();
      early = shared.values[0][own];
    }
    if (how != copying::not_waited) wait_copies<1>();
    const int next = own ^ 4;
    if (how != copying::read_before_barrier) __syncthreads();
    const std::int32_t value = shared.values[0][next];
    if (how == copying::not_waited) {
      out[thread()] = thread();
      return;
    }
    wait_copies<0>();
    if (how != copying::buffer_read_while_copied) __syncthreads();
    // The buffer's next use.
    copy_async<16>(to, from + 4 * kThreads, 16);
    commit_copies();
    if (how == copying::read_in_flight) early = shared.values[0][own];
    wait_copies<0>();
    const bool right = shared.values[1][own + 2] == from[own + 2] && shared.values[1][own + 3] == 0;
    out[thread()] =
        value == from[next] && right && early == (early ? from[own] : 0) ? thread() : -1;
  }
};

std::string seen_in_copies(copying how, std::string* problem = nullptr) {
  return seen(
      [&] {
        const auto out = ints(copies::kThreads);
        const auto from = ints(4 * copies::kThreads + 4);
        for (std::int64_t i = 0; i < 4 * copies::kThreads + 4; ++i) {
          from[i] = static_cast<std::int32_t>(i) + 1;
        }
        const std::int32_t* source = from.begin();
        if (how == copying::source_outside) source += 4;
        launch(1, copies{{out.begin()}, how, source});
        return counts_up(out);
      },
      problem);
}

void test_copies() {
  std::string problem;
  SUBQUAD_CHECK(seen_in_copies(copying::right) == "rrr");
  SUBQUAD_CHECK(seen_in_copies(copying::read_before_wait) == "www");
  SUBQUAD_CHECK(seen_in_copies(copying::waits_for_too_few) == "www");
  SUBQUAD_CHECK(seen_in_copies(copying::read_before_barrier) == "www");
  SUBQUAD_CHECK(seen_in_copies(copying::buffer_read_while_copied) == "www");
  SUBQUAD_CHECK(seen_in_copies(copying::read_in_flight) == "www");
  // With one group less than it believes, the first is not waited for in time.
  SUBQUAD_CHECK(seen_in_copies(copying::not_committed) == "www");
  SUBQUAD_CHECK(seen_in_copies(copying::not_waited, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem,
                         "ended with 2 copies that it did not wait for, after "
                         "__syncthreads at test_executor.cpp:"));
  for (const copying how : {copying::target_not_aligned, copying::source_not_aligned}) {
    SUBQUAD_CHECK(seen_in_copies(how, &problem) == "xxx");
    SUBQUAD_CHECK(contains(problem,
                           "thread 9 of block 0 copies 16 bytes between addresses that "
                           "are not aligned to them, before its first wait"));
  }
  SUBQUAD_CHECK(seen_in_copies(copying::target_outside, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem,
                         "thread 9 of block 0 copies to byte 2192 of shared memory, which "
                         "has 2048"));
  SUBQUAD_CHECK(seen_in_copies(copying::source_outside, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem, "thread 63 of block 0 touches an array at byte 1040 of 1040"));
}

// ---- products -----------------------------------------------------------------------------------

// Each lane's fragments of a = (row, k) -> 100 row + k and b = 1 where k = column, so that d = a.
struct fragment_layout {
  static constexpr int kThreads = 32;
  struct shared_memory {};
  bool is_broken;
  float* out;  // [16][8]

  void operator()(shared_memory&) const {
    const int g = thread() / 4;
    const int t = thread() % 4;
    const auto bits = [](int value) { return as_bits(static_cast<float>(value)); };
    const std::uint32_t right[4] = {bits(100 * g + t), bits(100 * (g + 8) + t),
                                    bits(100 * g + t + 4), bits(100 * (g + 8) + t + 4)};
    const std::uint32_t swapped[4] = {right[0], right[2], right[1], right[3]};
    const std::uint32_t b[2] = {bits(t == g), bits(t + 4 == g)};
    float d[4] = {};
    mma_tf32(d, is_broken ? swapped : right, b);
    for (int v = 0; v < 4; ++v) out[(g + v / 2 * 8) * 8 + 2 * t + v % 2] = d[v];
  }
};

struct mma_without_lane : counting {
  struct shared_memory {};
  bool is_broken;

  void operator()(shared_memory&) const {
    out[thread()] = thread();
    if (is_broken && thread() == 12) return;
    double d[2] = {};
    mma_float64(d, 1, 1);
    if (d[0] != 4) out[thread()] = -1;
  }
};

void test_products() {
  const auto right = [](bool is_broken) {
    const device_array<float> out({16, 8});
    launch(1, fragment_layout{is_broken, out.begin()});
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 8; ++k) {
        if (out[row * 8 + k] != static_cast<float>(100 * row + k)) return false;
      }
    }
    return true;
  };
  SUBQUAD_CHECK(seen([&] { return right(true); }) == "www");
  SUBQUAD_CHECK(seen([&] { return right(false); }) == "rrr");
  std::string problem;
  SUBQUAD_CHECK(seen_in_counting(mma_without_lane{{}, true}, &problem) == "xxx");
  SUBQUAD_CHECK(contains(problem, "in mma of lanes 0xffffffff at device.cuh:"));
  SUBQUAD_CHECK(seen_in_counting(mma_without_lane{{}, false}) == "rrr");
}

// ---- blocks -------------------------------------------------------------------------------------

enum class finishing { by_counter, by_index };

// The sum over blocks of their indices, by the block that is last.
struct last_block {
  static constexpr int kThreads = 32;
  struct shared_memory {
    bool is_last;
  };
  finishing how;
  std::int32_t* parts;
  std::uint32_t* counter;
  std::int32_t* out;

  void operator()(shared_memory& shared) const {
    if (thread() == 0) {
      parts[blockIdx.x] = static_cast<std::int32_t>(blockIdx.x);
      __threadfence();
      const bool last_to_count = atomicAdd(counter, 1u) == gridDim.x - 1;
      shared.is_last = how == finishing::by_counter ? last_to_count : blockIdx.x == gridDim.x - 1;
    }
    __syncthreads();
    if (!shared.is_last || thread() != 0) return;
    std::int32_t sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += parts[block];
    out[0] = sum;
  }
};

// Blocks add to one sum without atomics: nothing here sees it.
struct racing_blocks {
  static constexpr int kThreads = 32;
  struct shared_memory {};
  std::int32_t* out;

  void operator()(shared_memory&) const {
    if (thread() == 0) out[0] += static_cast<std::int32_t>(blockIdx.x);
  }
};

struct count_visits {
  static constexpr int kThreads = 32;
  struct shared_memory {};
  std::uint8_t* visits;
  std::int64_t* times;

  void operator()(shared_memory&) const {
    if (thread() != 0) return;
    ++visits[blockIdx.x];
    atomicAdd(times, std::int64_t{1});
  }
};

struct order_of_turns {
  static constexpr int kThreads = 1024;
  struct shared_memory {
    std::int32_t count;
  };
  std::int32_t* out;  // which threads came, in order

  void operator()(shared_memory& shared) const {
    if (blockIdx.x != 1) return;
    if (shared.count == -1) shared.count = 0;
    out[atomicAdd(&shared.count, 1)] = thread();
    __syncthreads();
    if (shared.count != kThreads) out[0] = -1;
  }
};

void test_blocks() {
  const auto sums = [](finishing how) {
    const auto parts = ints(70);
    const auto out = ints(1);
    const device_array<std::uint32_t> counter({1}, dtype::uint8);
    clear(counter.begin(), sizeof(std::uint32_t));
    launch(70, last_block{how, parts.begin(), counter.begin(), out.begin()});
    return out[0] == 69 * 70 / 2;
  };
  SUBQUAD_CHECK(seen([&] { return sums(finishing::by_counter); }) == "rrr");
  SUBQUAD_CHECK(seen([&] { return sums(finishing::by_index); }) == "rww");
  // What it cannot find.
  SUBQUAD_CHECK(seen([&] {
                  const auto out = ints(1);
                  out[0] = 0;
                  launch(70, racing_blocks{out.begin()});
                  return out[0] == 69 * 70 / 2;
                }) == "rrr");

  for (const std::int64_t blocks : {0, 1, 5, 100000}) {
    SUBQUAD_CHECK(seen([&] {
                    const device_array<std::uint8_t> visits({blocks});
                    const device_array<std::int64_t> times({1});
                    clear(visits.begin(), static_cast<std::size_t>(blocks));
                    times[0] = 0;
                    launch(blocks, count_visits{visits.begin(), times.begin()});
                    for (const std::uint8_t each : visits) {
                      if (each != 1) return false;
                    }
                    return times[0] == blocks;
                  }) == "rrr");
  }

  const auto first_and_last = [] {
    const auto out = ints(1024);
    launch(2, order_of_turns{out.begin()});
    std::vector<bool> came(1024);
    for (const std::int32_t each : out) came.at(static_cast<std::size_t>(each)) = true;
    SUBQUAD_CHECK(came == std::vector<bool>(1024, true));
    return std::array<std::int32_t, 3>{out[0], out[1], out[1023]};
  };
  on_host::set_order(order::ascending);
  SUBQUAD_CHECK((first_and_last() == std::array<std::int32_t, 3>{0, 1, 1023}));
  on_host::set_order(order::descending);
  SUBQUAD_CHECK((first_and_last() == std::array<std::int32_t, 3>{1023, 1022, 0}));
  on_host::set_order(order::shuffled);
  const auto shuffled = first_and_last();
  SUBQUAD_CHECK(shuffled != first_and_last());
  on_host::set_order(order::each_in_turn);
  int ascending = 0;
  int descending = 0;
  for (int i = 0; i < 6; ++i) {
    const auto turns = first_and_last();
    ascending += turns == std::array<std::int32_t, 3>{0, 1, 1023};
    descending += turns == std::array<std::int32_t, 3>{1023, 1022, 0};
  }
  SUBQUAD_CHECK(ascending == 2 && descending == 2);

  const auto body = [](const void*, void*) {};
  for (const int threads : {-32, 0, 31, 33, 1056}) {
    SUBQUAD_CHECK(contains(
        problem_of([&] { on_host::run_grid(1, threads, 1, body, nullptr); }),
        "expected blocks of whole warps, at most 1024 threads, got " + std::to_string(threads)));
  }
  SUBQUAD_CHECK(contains(problem_of([&] { on_host::run_grid(-1, 32, 1, body, nullptr); }),
                         "expected at most 2^31 - 1 blocks, got -1"));
  SUBQUAD_CHECK(problem_of([&] { on_host::run_grid(3, 1024, 0, body, nullptr); }).empty());
  SUBQUAD_CHECK(contains(problem_of([] { __syncthreads(); }), "from within a kernel"));
}

// ---- faults and the rest of the process ---------------------------------------------------------

// The host's own code as a kernel, of one warp.
struct host_code {
  static constexpr int kThreads = 32;
  struct shared_memory {};
  const std::function<void()>* code;

  void operator()(shared_memory&) const { (*code)(); }
};

void run_code(const std::function<void()>& code, std::int64_t blocks = 1) {
  launch(blocks, host_code{&code});
}

volatile int zero = 0;
volatile int sink;
volatile int* volatile nowhere = reinterpret_cast<volatile int*>(64);

int fall(int depth) {
  volatile char here[512];
  here[depth % 512] = 1;
  return depth < 1 << 20 ? fall(depth + 1) + here[depth % 512] : 0;
}

thread_local sigjmp_buf fault_of_test;
std::atomic<int> faults_of_test{0};

void on_fault_of_test(int, siginfo_t*, void*) {
  ++faults_of_test;
  siglongjmp(fault_of_test, 1);
}

void test_faults() {
  std::string problem = problem_of([] { run_code([] { *nowhere = 1; }); });
  SUBQUAD_CHECK(
      contains(problem, "of block 0 touches memory that is not there, before its first wait"));
  problem = problem_of([] {
    run_code(
        [] {
          __syncthreads();
          if (blockIdx.x == 3 && threadIdx.x == 21) *nowhere = 1;
        },
        6);
  });
  SUBQUAD_CHECK(contains(problem,
                         "thread 21 of block 3 touches memory that is not there, after "
                         "__syncthreads at test_executor.cpp:"));
  problem = problem_of([] { run_code([] { sink = fall(0); }); });
  SUBQUAD_CHECK(contains(problem, "overflows its stack of 65536 bytes"));
#if defined(__x86_64__)
  problem = problem_of([] { run_code([] { sink = 100 / zero; }); });
  SUBQUAD_CHECK(contains(problem, "divides an integer by zero"));
#endif
  problem = problem_of([] {
    run_code([] {
      if (threadIdx.x == 4) throw std::runtime_error("no such thing");
    });
  });
  SUBQUAD_CHECK(contains(problem, "thread 4 of block 0 threw: no such thing"));
  // Stacks are as C++ expects them, and exceptions within a kernel go their way.
  problem = problem_of([] {
    run_code([] {
      alignas(16) volatile char here[16] = {};
      const bool is_aligned = reinterpret_cast<std::uintptr_t>(here) % 16 == 0;
      char text[32];
      std::snprintf(text, sizeof(text), "%.3f", 0.5 + threadIdx.x);
      try {
        if (threadIdx.x % 2) throw std::runtime_error(text);
        __syncwarp(0x55555555u);
      } catch (const std::runtime_error& e) {
        __syncwarp(0xaaaaaaaau);
        if (std::string(e.what()) != text) throw;
      }
      if (!is_aligned) throw std::runtime_error("not aligned");
    });
  });
  SUBQUAD_CHECK(problem.empty());
}

void test_process() {
  // A handler and an alternate stack that were there before.
  std::vector<unsigned char> memory(1 << 16);
  stack_t own{};
  own.ss_sp = memory.data();
  own.ss_size = memory.size();
  SUBQUAD_CHECK(sigaltstack(&own, nullptr) == 0);
  struct sigaction action{};
  action.sa_sigaction = on_fault_of_test;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  struct sigaction before{};
  sigaction(SIGSEGV, &action, &before);
  const auto fault = [] {
    if (sigsetjmp(fault_of_test, 1) == 0) *nowhere = 1;
  };
  // Another thread's fault while a kernel runs is the handler's, whatever the kernel does then.
  std::atomic<bool> runs{false};
  std::atomic<bool> has_faulted{false};
  std::thread other([&] {
    while (!runs) std::this_thread::yield();
    fault();
    has_faulted = true;
  });
  const std::string problem = problem_of([&] {
    run_code([&] {
      runs = true;
      while (!has_faulted) std::this_thread::yield();
      if (threadIdx.x == 17) *nowhere = 1;
    });
  });
  other.join();
  SUBQUAD_CHECK(contains(problem, "thread 17 of block 0 touches memory"));
  SUBQUAD_CHECK(faults_of_test == 1);
  fault();
  SUBQUAD_CHECK(faults_of_test == 2);
  stack_t now{};
  sigaltstack(nullptr, &now);
  SUBQUAD_CHECK(now.ss_sp == own.ss_sp && now.ss_size == own.ss_size);
  struct sigaction handler{};
  sigaction(SIGSEGV, &before, &handler);
  SUBQUAD_CHECK(handler.sa_sigaction == on_fault_of_test);
  stack_t none{};
  none.ss_flags = SS_DISABLE;
  sigaltstack(&none, nullptr);

  // Threads of the process take turns, whatever they do meanwhile, and a grid that is refused does
  // not disturb the next.
  std::atomic<int> right{0};
  std::atomic<int> waiting{4};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&right, &waiting, i] {
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      for (int round = 0; round < 20; ++round) {
        const auto out = ints(3 * 64);
        const bool is_broken = (i + round) % 3 == 0;
        const bool is_refused =
            !problem_of([&] { launch(1, barrier_in_branch{{out.begin()}, is_broken}); }).empty();
        int blocks = 0;
        run_code(
            [&] {
              if (threadIdx.x == 31) ++blocks;
              std::this_thread::yield();
              __syncthreads();
            },
            i + 1);
        launch(3, odd_size<17>{{out.begin()}, 0});
        right += is_refused == is_broken && blocks == i + 1 && counts_up(out);
      }
    });
  }
  for (std::thread& each : threads) each.join();
  SUBQUAD_CHECK(right == 80);
}

}  // namespace
}  // namespace subquad::cuda

int main() {
  using namespace subquad::cuda;
  test_barriers();
  test_memory();
  test_warps();
  test_copies();
  test_products();
  test_blocks();
  test_faults();
  test_process();
  return checks::status();
}
