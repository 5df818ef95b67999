// How kernels are launched: on the device and the stream of the call that is under way.
//
// A kernel is an object: its parameters are its members, `shared_memory` is all the shared memory
// of a block, `kThreads` the threads of a block, `kBlocks` the blocks that a multiprocessor should
// hold, and operator() what each thread does.
#ifndef SUBQUAD_CUDA_LAUNCH_CUH
#define SUBQUAD_CUDA_LAUNCH_CUH

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

inline void clear(void* data, std::size_t bytes) { on_host::clear(data, bytes); }

#endif

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_LAUNCH_CUH
