// Runs kernels on the host: a grid's blocks one after the other, a block's threads as fibres that
// change places where they wait for each other.
//
// What it finds, and reports as executor_error with block, thread and place:
// - a barrier or a warp's exchange that not all its threads reach, or reach at different places. It
//   is stricter than hardware: threads that have ended are missed too;
// - a missing barrier: threads run one at a time, as far as they can, in ascending, descending or
//   shuffled order, so that what another thread has not written yet is still poison;
// - copies that are read before they were waited for: they happen at the wait, and the memory they
//   go to is poison until then; copies that are not aligned, or never waited for;
// - accesses outside of the block's shared memory, which lies flush against a page that cannot be
//   touched (below it or above it, by turns), and outside of arrays that lie so themselves
//   (guarded.hpp). What does not fault, between memory and page, is poison to a read, and a write
//   is found when the block, or the grid, has ended;
// - integer divisions by zero, and exceptions.
// Shared memory is poison (all bits set: NaN, -1) when a block begins.
//
// What it cannot find: whatever needs two threads at the same time. The memory model is that of one
// processor, so that a missing fence goes unseen, and so does an addition to another block's sum
// that is not atomic; a race shows only if one of the three orders gives a wrong result; warps have
// no time slices, so that a spin on another block's flag would hang; an index that is wrong within
// the struct of shared memory is not caught; registers hold whatever the compiler left there.
// Exchanges and barriers on one line of the source count as one place.
//
// Products in float round as tensor cores of compute capability 8.0 have been seen to, those in
// double as sums in order.
#ifndef SUBQUAD_CUDA_ON_HOST_EXECUTOR_HPP
#define SUBQUAD_CUDA_ON_HOST_EXECUTOR_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace subquad::cuda::on_host {

struct executor_error : std::logic_error {
  using std::logic_error::logic_error;
};

// In which order blocks, and the threads of a block, have their turns. At first what the variable
// SUBQUAD_CUDA_ON_HOST_ORDER of the environment says ("ascending", "descending", "shuffled"), else
// each in turn, launch by launch.
enum class order { each_in_turn, ascending, descending, shuffled };
void set_order(order wanted);

struct index3 {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

// Where in the source a thread waits; strings that last.
struct place {
  const char* file;
  int line;
};

// The thread that has its turn.
struct current_thread {
  index3 thread;
  index3 block;
  index3 block_size;
  index3 grid_size;
};
extern current_thread current;

// Runs body(kernel, shared memory) for every thread of every block. Calls from several threads of
// the process take turns. Until it returns, a fault (SIGSEGV, SIGBUS, SIGFPE) of a kernel is the
// executor's; any other goes to the handler that was there before.
void run_grid(std::int64_t blocks, int threads, std::size_t shared_bytes,
              void (*body)(const void* kernel, void* shared), const void* kernel);
void clear(void* data, std::size_t bytes);

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

float from_float16(std::uint16_t bits);
std::uint32_t round_to_tf32(float x);
float power_of_2(float x);

void copy_async(void* shared, const void* global, int bytes, int valid);
void commit_copies();
void wait_copies(int pending);

// All threads of the block wait for each other; returns how many gave `predicate`.
int block_barrier(bool predicate, place where);

// All lanes of `mask` wait for each other, in calls with equal mask, `combine`, `what` and place.
// `combine`, called once for all, sees what each lane gave (null for lanes outside of the mask) and
// where it takes its result.
using combine_function = void (*)(std::uint32_t mask, const void* const* given, void* const* taken);
void warp_exchange(std::uint32_t mask, const void* given, void* taken, combine_function combine,
                   const char* what, place where);

void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
              const char* file = __builtin_FILE(), int line = __builtin_LINE());
void mma_float16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                 const char* file = __builtin_FILE(), int line = __builtin_LINE());
void mma_bfloat16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  const char* file = __builtin_FILE(), int line = __builtin_LINE());
void mma_float64(double (&d)[2], double a, double b, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE());

template <class T>
struct shuffle_offer {
  T value;
  int source;  // the lane that is read
};

template <class T>
T shuffle(std::uint32_t mask, T value, int source, const char* what, place where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "what CUDA has shuffles for");
  const shuffle_offer<T> offer{value, source};
  T result = value;
  warp_exchange(
      mask, &offer, &result,
      [](std::uint32_t of, const void* const* given, void* const* taken) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(of >> lane & 1)) continue;
          const int from = static_cast<const shuffle_offer<T>*>(given[lane])->source;
          // What a lane outside of the mask holds is not defined: poison.
          if (given[from] == nullptr) {
            std::memset(taken[lane], 0xff, sizeof(T));
          } else {
            *static_cast<T*>(taken[lane]) =
                static_cast<const shuffle_offer<T>*>(given[from])->value;
          }
        }
      },
      what, where);
  return result;
}

// The lanes that a shuffle of `width` lanes may read: [first, first + width).
struct shuffle_segment {
  int lane;
  int first;
  int end;
};
// Fails unless `width` is a power of two up to 32 and `by`, the distance to the lane that is read,
// is in [0, 32).
shuffle_segment segment_of(int width, int by, const char* what, place where);

std::uint32_t ballot(std::uint32_t mask, bool vote, const char* what, place where);

// Blocks run one after the other: a flag that is not set when a block waits for it stays so.
inline void require_set(bool is_set) {
  if (!is_set) throw executor_error("waits for a flag that no block before it has set");
}

}  // namespace subquad::cuda::on_host

// ---- the words of CUDA that kernels use ---------------------------------------------------------

namespace subquad::cuda {

inline on_host::index3& threadIdx = on_host::current.thread;
inline on_host::index3& blockIdx = on_host::current.block;
inline on_host::index3& blockDim = on_host::current.block_size;
inline on_host::index3& gridDim = on_host::current.grid_size;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  on_host::block_barrier(false, {file, line});
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  return on_host::block_barrier(predicate != 0, {file, line}) > 0;
}
inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
  return on_host::block_barrier(predicate == 0, {file, line}) == 0;
}
inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  return on_host::block_barrier(predicate != 0, {file, line});
}

inline std::uint32_t __ballot_sync(std::uint32_t mask, int predicate,
                                   const char* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
  return on_host::ballot(mask, predicate != 0, "__ballot_sync", {file, line});
}
inline int __any_sync(std::uint32_t mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return on_host::ballot(mask, predicate != 0, "__any_sync", {file, line}) != 0;
}
inline int __all_sync(std::uint32_t mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return on_host::ballot(mask, predicate != 0, "__all_sync", {file, line}) == mask;
}
inline void __syncwarp(std::uint32_t mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  on_host::ballot(mask, false, "__syncwarp", {file, line});
}

// Any source: that of the segment which is equal to it modulo the width.
template <class T>
T __shfl_sync(std::uint32_t mask, T value, int source, int width = 32,
              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto in = on_host::segment_of(width, 0, "__shfl_sync", {file, line});
  return on_host::shuffle(mask, value, in.first + (source & (width - 1)), "__shfl_sync",
                          {file, line});
}
// Lanes that would read beyond their segment keep their own value; a lower segment may be read.
template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, int flip, int width = 32,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto in = on_host::segment_of(width, flip, "__shfl_xor_sync", {file, line});
  const int source = in.lane ^ flip;
  return on_host::shuffle(mask, value, source < in.end ? source : in.lane, "__shfl_xor_sync",
                          {file, line});
}
template <class T>
T __shfl_up_sync(std::uint32_t mask, T value, int delta, int width = 32,
                 const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto in = on_host::segment_of(width, delta, "__shfl_up_sync", {file, line});
  const int source = in.lane - delta;
  return on_host::shuffle(mask, value, source >= in.first ? source : in.lane, "__shfl_up_sync",
                          {file, line});
}
template <class T>
T __shfl_down_sync(std::uint32_t mask, T value, int delta, int width = 32,
                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto in = on_host::segment_of(width, delta, "__shfl_down_sync", {file, line});
  const int source = in.lane + delta;
  return on_host::shuffle(mask, value, source < in.end ? source : in.lane, "__shfl_down_sync",
                          {file, line});
}

// Threads take turns only where they wait: an operation between two waits is atomic. Integers
// alone: sums of floating numbers would depend on the order of threads.
template <class T>
T atomicAdd(T* to, T value) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  *to = before + value;
  return before;
}
template <class T>
T atomicMax(T* to, T value) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  *to = std::max(before, value);
  return before;
}
template <class T>
T atomicMin(T* to, T value) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  *to = std::min(before, value);
  return before;
}
template <class T>
T atomicExch(T* to, T value) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  *to = value;
  return before;
}
template <class T>
T atomicCAS(T* to, T expected, T value) {
  static_assert(std::is_integral_v<T>);
  const T before = *to;
  if (before == expected) *to = value;
  return before;
}

inline void __threadfence() {}

template <class T>
T __ldg(const T* from) {
  return *from;
}

inline int __popc(std::uint32_t bits) { return __builtin_popcount(bits); }
inline int __float_as_int(float value) { return on_host::bits_as<int>(value); }
inline float __int_as_float(int bits) { return on_host::bits_as<float>(bits); }
inline long long __double_as_longlong(double value) { return on_host::bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return on_host::bits_as<double>(bits); }

// Overloads for both types, as device code has them.
using std::exp;
using std::exp2;
using std::fabs;
using std::fma;
using std::fmax;
using std::fmin;
using std::isfinite;
using std::isinf;
using std::isnan;
using std::log;
using std::log1p;
using std::log2;
using std::sqrt;

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_ON_HOST_EXECUTOR_HPP
