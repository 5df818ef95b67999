// Broadcast batch dimensions as kernels see them.
#ifndef SUBQUAD_CUDA_BATCHES_CUH
#define SUBQUAD_CUDA_BATCHES_CUH

#include <cstdint>
#include <initializer_list>
#include <string>

#include "arguments.hpp"
#include "device.cuh"

namespace subquad::cuda {

inline constexpr int kMostBatchDimensions = 8;

// Where the parts of kArrays arrays lie for one index of the batch. Dimensions that lie regularly
// in all arrays are one.
template <int kArrays>
struct batches {
  int rank = 0;
  std::int64_t lengths[kMostBatchDimensions] = {};  // last dimension first
  std::int64_t strides[kArrays][kMostBatchDimensions] = {};

  // Elements from the start of array `which` to its part for batch `index`.
  SUBQUAD_DEVICE std::int64_t offset(int which, std::int64_t index) const {
    std::int64_t offset = 0;
    for (int i = 0; i < rank; ++i) {
      offset += index % lengths[i] * strides[which][i];
      index /= lengths[i];
    }
    return offset;
  }
};

// An array of the call, null where it is absent, and the dimensions that are not batch.
struct batch_member {
  const array_view* array;
  std::int32_t core;
};

template <int kArrays>
batches<kArrays> batches_of(const batch_shape& shape, const batch_member (&members)[kArrays]) {
  batches<kArrays> found;
  for (std::int32_t i = 0; i < shape.rank(); ++i) {
    if (shape.length(i) == 1) continue;
    bool joins = found.rank > 0;
    std::int64_t strides[kArrays];
    for (int a = 0; a < kArrays; ++a) {
      strides[a] = members[a].array ? shape.stride(*members[a].array, members[a].core, i) : 0;
      joins =
          joins && strides[a] == found.strides[a][found.rank - 1] * found.lengths[found.rank - 1];
    }
    if (joins) {
      found.lengths[found.rank - 1] *= shape.length(i);
      continue;
    }
    if (found.rank == kMostBatchDimensions) {
      throw invalid_argument("expected at most " + std::to_string(kMostBatchDimensions) +
                             " batch dimensions that do not lie regularly in memory, got more");
    }
    found.lengths[found.rank] = shape.length(i);
    for (int a = 0; a < kArrays; ++a) found.strides[a][found.rank] = strides[a];
    ++found.rank;
  }
  return found;
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_BATCHES_CUH
