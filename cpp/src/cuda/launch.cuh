// How kernels are launched: on the device and the stream of the call that is under way.
//
// A kernel is an object: its parameters are its members, `shared_memory` is all the shared memory
// of a block, `kThreads` the threads of a block, `kBlocks` the blocks that a multiprocessor should
// hold, and operator() what each thread does.
#ifndef SUBQUAD_CUDA_LAUNCH_CUH
#define SUBQUAD_CUDA_LAUNCH_CUH

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "device.cuh"
#include "runtime.hpp"
#include "subquad/errors.hpp"

namespace subquad::cuda {

inline constexpr std::int64_t kMostBlocks = 2147483647;

inline void check_blocks(std::int64_t blocks) {
  if (blocks > kMostBlocks) {
    throw invalid_argument("expected work for at most 2^31 - 1 blocks of threads, got " +
                           std::to_string(blocks));
  }
}

// What a block may have on every device, and the most that is ever asked for.
inline constexpr std::size_t kSharedMemoryEverywhere = 99 * 1024;
inline constexpr std::size_t kMostSharedMemory = 227 * 1024;

#if defined(__CUDACC__)

namespace detail {

cudaStream_t current_stream() noexcept;
void check(cudaError_t status, const char* what);
// Adds what `prepare` calls; returns true.
bool add_preparation(void (*prepare_kernel)());

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    run(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) unsigned char memory[];
  kernel(*reinterpret_cast<typename Kernel::shared_memory*>(memory));
}

template <class Kernel>
void prepare_kernel() {
  // Also what loads it.
  check(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(sizeof(typename Kernel::shared_memory))),
        "loading a kernel");
}

template <class Kernel>
struct registration {
  static const bool kDone;
};
template <class Kernel>
const bool registration<Kernel>::kDone = add_preparation(prepare_kernel<Kernel>);

}  // namespace detail

template <class Kernel>
void launch(std::int64_t blocks, const Kernel& kernel) {
  using shared_memory = typename Kernel::shared_memory;
  static_assert(std::is_trivially_default_constructible_v<shared_memory>);
  static_assert(alignof(shared_memory) <= 16);
  if (blocks <= 0 || !detail::registration<Kernel>::kDone) return;
  check_blocks(blocks);
  detail::run<Kernel><<<dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
                        sizeof(shared_memory), detail::current_stream()>>>(kernel);
  detail::check(cudaGetLastError(), "launching a kernel");
}

// Fills memory with zero bytes, in the order of the stream.
inline void clear(void* data, std::size_t bytes) {
  if (bytes > 0) {
    detail::check(cudaMemsetAsync(data, 0, bytes, detail::current_stream()), "clearing memory");
  }
}

inline std::size_t most_shared_memory() {
  int device = 0;
  int bytes = 0;
  detail::check(cudaGetDevice(&device), "asking for the current device");
  detail::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                "asking for the shared memory of a block");
  return std::min(static_cast<std::size_t>(bytes), kMostSharedMemory);
}

namespace detail {

template <class Kernel>
void prepare_sized_kernel() {
  check(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most_shared_memory())),
        "loading a kernel");
}

template <class Kernel>
struct sized_registration {
  static const bool kDone;
};
template <class Kernel>
const bool sized_registration<Kernel>::kDone = add_preparation(prepare_sized_kernel<Kernel>);

}  // namespace detail

// A launch with `bytes` of shared memory, of which the kernel's own struct is the beginning.
template <class Kernel>
void launch_with_memory(std::int64_t blocks, std::size_t bytes, const Kernel& kernel) {
  if (blocks <= 0 || !detail::sized_registration<Kernel>::kDone) return;
  check_blocks(blocks);
  detail::run<Kernel><<<dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads), bytes,
                        detail::current_stream()>>>(kernel);
  detail::check(cudaGetLastError(), "launching a kernel");
}

#else

template <class Kernel>
void launch(std::int64_t blocks, const Kernel& kernel) {
  using shared_memory = typename Kernel::shared_memory;
  static_assert(std::is_trivially_default_constructible_v<shared_memory>);
  static_assert(alignof(shared_memory) <= 16);
  if (blocks <= 0) return;
  check_blocks(blocks);
  on_host::run_grid(
      blocks, Kernel::kThreads, sizeof(shared_memory),
      [](const void* object, void* shared) {
        (*static_cast<const Kernel*>(object))(*static_cast<shared_memory*>(shared));
      },
      &kernel);
}

inline std::size_t most_shared_memory() { return kSharedMemoryEverywhere; }

template <class Kernel>
void launch_with_memory(std::int64_t blocks, std::size_t bytes, const Kernel& kernel) {
  if (blocks <= 0) return;
  check_blocks(blocks);
  on_host::run_grid(
      blocks, Kernel::kThreads, bytes,
      [](const void* object, void* shared) {
        (*static_cast<const Kernel*>(object))(
            *static_cast<typename Kernel::shared_memory*>(shared));
      },
      &kernel);
}

inline void clear(void* data, std::size_t bytes) { on_host::clear(data, bytes); }

#endif

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_LAUNCH_CUH
