// What the kernels of random features share: their arrays, products whose operands change while
// they are loaded, and what walks over a tile of results.
#ifndef SUBQUAD_CUDA_FEATURES_CUH
#define SUBQUAD_CUDA_FEATURES_CUH

#include <cstdint>
#include <type_traits>

#include "batches.cuh"
#include "device.cuh"
#include "features_checks.hpp"
#include "tile_product.cuh"

namespace subquad::cuda {

// 16 bits of either type: which one a kernel is told, so that one serves both.
struct word16 {
  std::uint16_t bits;
};

SUBQUAD_DEVICE float widen(word16 value, bool is_bfloat16) {
  return is_bfloat16 ? widen(bfloat16{value.bits}) : widen(float16{value.bits});
}
SUBQUAD_DEVICE float widen(float value, bool) { return value; }
SUBQUAD_DEVICE double widen(double value, bool) { return value; }

enum feature_array {
  kX,
  kProjection,
  kDiagonal,
  kFactor,
  kShift,
  kLinear,
  kBiasOrGrad,
  kResult,
  kFeatureArrays
};

template <class S>
struct feature_arguments {
  using sum = arithmetic_t<S>;
  matrix_view<const S> x;
  bool is_bfloat16;
  matrix_view<const sum> projection;
  vector_view<const sum> diagonal;  // these four optional
  matrix_view<const sum> factor;
  vector_view<const sum> shift;
  vector_view<const sum> linear;
  batches<kFeatureArrays> batch;
  feature_sizes size;

  // Beside `map`: the bias or the gradient, whose last dimensions are `core`, and what is written.
  feature_arguments(const feature_map& map, const array_view& bias_or_grad, std::int32_t core,
                    const array_view& result)
      : x(matrix_at<const S>(map.x, 0)),
        is_bfloat16(map.x.type == dtype::bfloat16),
        projection(matrix_at<const sum>(map.projection, 0)),
        diagonal(optional(map.diagonal)),
        factor(map.factor && map.size.r > 0 ? matrix_at<const sum>(*map.factor, 0)
                                            : matrix_view<const sum>{}),
        shift(optional(map.shift)),
        linear(optional(map.linear)),
        batch(batches_of<kFeatureArrays>(map.shape, {{&map.x, 2},
                                                     {&map.projection, 2},
                                                     {map.diagonal, 1},
                                                     {map.factor, 2},
                                                     {map.shift, 1},
                                                     {map.linear, 1},
                                                     {&bias_or_grad, core},
                                                     {&result, 2}})),
        size(map.size) {}

  SUBQUAD_DEVICE vector_view<const sum> vector_of(const vector_view<const sum>& vector,
                                                  feature_array which, std::int64_t b) const {
    return {vector ? vector.data + batch.offset(which, b) : vector.data, vector.stride};
  }

 private:
  static vector_view<const sum> optional(const array_view* array) {
    return array ? vector_at<const sum>(*array, 0) : vector_view<const sum>{};
  }
};

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) pack {
  T values[kWidth];
};

template <class T, int kWidth>
SUBQUAD_DEVICE void store(T* to, const pack<T, kWidth>& from) {
  *reinterpret_cast<pack<T, kWidth>*>(to) = from;
}

// Results on their way from accumulators to memory: eight rows of each warp at a time go through
// shared memory, whence neighbouring threads write neighbours.
template <class Tile>
struct tile_walk {
  using T = typename Tile::sum;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kAcross = Tile::kTilesAcross * 8;
  static constexpr int kStride = kAcross + 8;
  static constexpr int kOfWarp = 8 * kStride;
  static constexpr int kSize = kOfWarp * (Tile::kThreads / kWarp);  // of `patches`, 16-byte aligned

  // Whether rows of `to`, of `columns` columns, can be written 16 bytes at a time.
  static SUBQUAD_DEVICE bool is_vector(const matrix_view<T>& to, std::int64_t columns) {
    return to.column_stride == 1 && to.row_stride % kVector == 0 && columns % kVector == 0 &&
           reinterpret_cast<std::uintptr_t>(to.data) % 16 == 0;
  }

  // Calls body(width, row, column, values) for all elements of a tile: `width` elements of a row, a
  // std::integral_constant, of which the values lie in shared memory. Nothing is read of `patches`
  // that others wrote; all lanes of a warp call it.
  template <class Body>
  static SUBQUAD_DEVICE void visit(typename Tile::accumulators& tile, T* patches, bool by_vectors,
                                   bool along_rows, Body&& body) {
    T* patch = patches + static_cast<int>(threadIdx.x) / kWarp * kOfWarp;
    const int lane = Tile::lane();
    // One body for all rows: it holds exponentials.
    SUBQUAD_NO_UNROLL
    for (int turn = 0; turn < Tile::kThreadRows; ++turn) {
      SUBQUAD_UNROLL
      for (int r = 0; r < Tile::kThreadRows; ++r) {
        if (r != turn) continue;
        SUBQUAD_UNROLL
        for (int c = 0; c < Tile::kThreadColumns; c += 2) {
          store(patch + lane / 4 * kStride + c / 2 * 8 + lane % 4 * 2,
                pack<T, 2>{{tile(r, c), tile(r, c + 1)}});
        }
      }
      __syncwarp();
      const int first_row = Tile::warp_down() * Tile::kTilesDown * Tile::warp::kRows + 8 * turn;
      const int first_column = Tile::warp_across() * kAcross;
      if (by_vectors) {
        SUBQUAD_NO_UNROLL
        for (int index = lane; index < 8 * kAcross / kVector; index += kWarp) {
          const int row = index / (kAcross / kVector);
          const int column = index % (kAcross / kVector) * kVector;
          body(std::integral_constant<int, kVector>{}, first_row + row, first_column + column,
               patch + row * kStride + column);
        }
      } else {
        SUBQUAD_NO_UNROLL
        for (int index = lane; index < 8 * kAcross; index += kWarp) {
          const int row = along_rows ? index % 8 : index / kAcross;
          const int column = along_rows ? index / 8 : index % kAcross;
          body(std::integral_constant<int, 1>{}, first_row + row, first_column + column,
               patch + row * kStride + column);
        }
      }
      __syncwarp();
    }
  }
};

// The sum over all threads of a block, in order of threads within warps and of warps; all threads
// get it. `scratch` holds a number for each warp.
template <int kThreads, class T>
SUBQUAD_DEVICE T sum_over_block(T value, T* scratch) {
  SUBQUAD_UNROLL
  for (int flip = 1; flip < kWarp; flip *= 2) value += __shfl_xor_sync(0xffffffffu, value, flip);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = scratch[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) total += scratch[warp];
  return total;
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_FEATURES_CUH
