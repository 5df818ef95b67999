// The Walsh-Hadamard transform.
#include <algorithm>
#include <cstdint>

#include "batches.cuh"
#include "device.cuh"
#include "features_checks.hpp"
#include "features_core.hpp"
#include "launch.cuh"

namespace subquad::cuda {
namespace {

// Which elements of a row a block holds, and which bits of their indices it transforms. Bits of the
// place within the block are those of the index: the lowest `low` as they are, the others from
// `shift` on; what they leave out numbers the blocks of a row.
struct hadamard_pass {
  int bits;  // of the place: a block holds 2^bits elements of a row
  int low;
  int shift;
  int first;  // bits [first, bits) of the place are transformed
};

// One pass of out_i = sum_j (-1)^popcount(i & j) from_j: the sums over those bits that the pass
// says. A block holds up to kSize elements of as many whole rows, or of one. A thread sums over
// four bits in registers, three times; between them elements change places in shared memory.
//
// `from` may be `out`: a block reads all that it writes before. After all passes elements are
// within log2(d) u of the sum of the sizes of those of their row, u = 2^-24 or 2^-53.
template <class T>
struct hadamard_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = sizeof(T) == 8 ? 2 : 4;
  static constexpr int kBits = 12;
  static constexpr int kSize = 1 << kBits;
  static constexpr int kOfThread = kSize / kThreads;
  static_assert(kOfThread == 16);
  struct shared_memory {
    T elements[kSize + kSize / 16];
    const T* from[kThreads];  // of rows
    T* out[kThreads];
  };

  vector_view<const T> from;
  vector_view<T> out;
  batches<2> batch;
  std::int64_t rows;
  hadamard_pass pass;
  int rows_of_block;  // at most a row to a thread
  std::int64_t blocks_of_row;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t first_row = blockIdx.x / blocks_of_row * rows_of_block;
    const std::int64_t left = rows - first_row;
    const int count = static_cast<int>(left < rows_of_block ? left : rows_of_block) << pass.bits;
    if (thread < rows_of_block && thread < left) {
      const std::int64_t first = first_element(blockIdx.x % blocks_of_row);
      shared.from[thread] = from.data + batch.offset(0, first_row + thread) + first * from.stride;
      shared.out[thread] = out.data + batch.offset(1, first_row + thread) + first * out.stride;
    }
    __syncthreads();
    T values[kOfThread];
    SUBQUAD_UNROLL
    for (int v = 0; v < kOfThread; ++v) {
      const int place = thread + v * kThreads;
      values[v] = T(0);
      if (place < count) {
        values[v] = shared.from[place >> pass.bits][element(place) * from.stride];
      }
    }
    transform(values, 8);
    SUBQUAD_UNROLL
    for (int v = 0; v < kOfThread; ++v) shared.elements[padded(thread + v * kThreads)] = values[v];
    __syncthreads();
    exchange(values, thread * 16, 1, shared);
    transform(values, 0);
    put_back(values, thread * 16, 1, shared);
    __syncthreads();
    const int first = thread % 16 + thread / 16 * 256;
    exchange(values, first, 16, shared);
    transform(values, 4);
    SUBQUAD_UNROLL
    for (int v = 0; v < kOfThread; ++v) {
      const int place = first + v * 16;
      if (place < count) {
        shared.out[place >> pass.bits][element(place) * out.stride] = values[v];
      }
    }
  }

  // Neighbours 16 apart lie in different banks.
  static SUBQUAD_DEVICE int padded(int place) { return place + place / 16; }

  // Of the block `which` of its row.
  SUBQUAD_DEVICE std::int64_t first_element(std::int64_t which) const {
    const int between = pass.shift - pass.low;
    const std::int64_t high = which >> between;
    return ((which & ((std::int64_t{1} << between) - 1)) << pass.low) |
           (high << (pass.shift + pass.bits - pass.low));
  }

  SUBQUAD_DEVICE std::int64_t element(int place) const {
    const int of_row = place & ((1 << pass.bits) - 1);
    return (of_row & ((1 << pass.low) - 1)) |
           (static_cast<std::int64_t>(of_row >> pass.low) << pass.shift);
  }

  // Sums over bits first_bit, ..., first_bit + 3 of the places, which are those of the register.
  SUBQUAD_DEVICE void transform(T (&values)[kOfThread], int first_bit) const {
    SUBQUAD_UNROLL
    for (int level = 0; level < 4; ++level) {
      if (first_bit + level < pass.first || first_bit + level >= pass.bits) continue;
      SUBQUAD_UNROLL
      for (int v = 0; v < kOfThread; ++v) {
        if (v >> level & 1) continue;
        const T a = values[v];
        const T b = values[v | 1 << level];
        values[v] = a + b;
        values[v | 1 << level] = a - b;
      }
    }
  }

  static SUBQUAD_DEVICE void exchange(T (&values)[kOfThread], int first, int step,
                                      const shared_memory& shared) {
    SUBQUAD_UNROLL
    for (int v = 0; v < kOfThread; ++v) values[v] = shared.elements[padded(first + v * step)];
  }
  static SUBQUAD_DEVICE void put_back(const T (&values)[kOfThread], int first, int step,
                                      shared_memory& shared) {
    SUBQUAD_UNROLL
    for (int v = 0; v < kOfThread; ++v) shared.elements[padded(first + v * step)] = values[v];
  }
};

template <class T>
void hadamard_transform_as(const batch_shape& shape, const array_view& x, const array_view& out) {
  using kernel = hadamard_kernel<T>;
  const std::int64_t rows = shape.count();
  const std::int64_t d = length_from_end(x, 1);
  int bits = 0;
  while (std::int64_t{1} << bits < d) ++bits;
  const int of_first = std::min(bits, kernel::kBits);
  const int rows_of_block = std::min(kernel::kThreads, kernel::kSize >> of_first);
  const auto run = [&](const array_view& from, const hadamard_pass& pass) {
    const std::int64_t blocks_of_row = d >> pass.bits;
    launch(divide_up(rows, rows_of_block) * blocks_of_row,
           kernel{vector_at<const T>(from, 0), vector_at<T>(out, 0),
                  batches_of<2>(shape, {{&from, 1}, {&out, 1}}), rows, pass, rows_of_block,
                  blocks_of_row});
  };
  run(x, {of_first, of_first, of_first, 0});
  // Up to 7 more bits a pass, so that 32 neighbours or more stay together.
  constexpr int kMore = 7;
  for (int done = of_first; done < bits; done += kMore) {
    const int more = std::min(kMore, bits - done);
    run(out, {kernel::kBits, kernel::kBits - more, done, kernel::kBits - more});
  }
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t hadamard_transform_workspace(std::int64_t, std::int64_t, std::int64_t) {
  return workspace_layout().size();
}

void hadamard_transform(const array_view& x, const array_view& out, const array_view&) {
  const batch_shape shape = check_hadamard_transform(x, out);
  (x.type == dtype::float32 ? cuda::hadamard_transform_as<float>
                            : cuda::hadamard_transform_as<double>)(shape, x, out);
}

}  // namespace subquad::core
