// Register tiles of inner products, and the packing they read.
//
//   acc[r][v] += sum_k left[k * left_stride + r] * right[k * right_stride + v * lanes + lane]
//
// One operand, the rows, is broadcast; the other, the columns, lies in vector lanes. What follows a
// product (exp, sum, maximum, scaling) is written by the caller on the accumulators while they are
// still in registers. What belongs to a column stays in its lane: no epilogue crosses lanes.
//
// Shapes: v4 and NEON hold 24 accumulators of 32 registers (12 x 2), v3 and v2 12 of 16 (6 x 2):
// 12 x 2 spills there. Measured in registers and through this loop, one core, float32, inner
// dimension 32 / 64 / 384: v4 118 and 115 / 116 / 117 GFLOP/s, v3 the same, v2 57 and 38 / 39 / 39.
// Packing is apart from the product, so that a level whose tiles are matrix registers replaces both
// and no epilogue.
#ifndef SUBQUAD_KERNELS_TILE_PRODUCT_INL
#define SUBQUAD_KERNELS_TILE_PRODUCT_INL

#include "matrix_view.hpp"
#include "vector.inl"

namespace subquad {
namespace SUBQUAD_ISA {

#if SUBQUAD_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;
template <class T>
constexpr int kTileColumns = kTileVectors * lanes<T>;

template <class T>
using tile = vec<T>[kTileRows][kTileVectors];

#define SUBQUAD_UNROLL_ROWS _Pragma("GCC unroll 12")
#define SUBQUAD_UNROLL_VECTORS _Pragma("GCC unroll 2")

// Every accumulator of row r starts from values[r].
template <class T>
SUBQUAD_INLINE void tile_fill(const T* values, tile<T>& acc) {
  SUBQUAD_UNROLL_ROWS
  for (int r = 0; r < kTileRows; ++r) {
    acc[r][0] = broadcast(values[r]);
    acc[r][1] = acc[r][0];
  }
}

template <class T>
SUBQUAD_INLINE void tile_zero(tile<T>& acc) {
  SUBQUAD_UNROLL_ROWS
  for (int r = 0; r < kTileRows; ++r) {
    acc[r][0] = vec<T>{};
    acc[r][1] = vec<T>{};
  }
}

// Accumulates `depth` rank-one updates; left and right need only the alignment of T.
template <class T>
SUBQUAD_INLINE void tile_product(std::int64_t depth, const T* left, std::int64_t left_stride,
                                 const T* right, std::int64_t right_stride, tile<T>& acc) {
  for (std::int64_t k = 0; k < depth; ++k) {
    const vec<T> right0 = load(right);
    const vec<T> right1 = load(right + lanes<T>);
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kTileRows; ++r) {
      const vec<T> value = broadcast(left[r]);
      acc[r][0] += value * right0;
      acc[r][1] += value * right1;
    }
    left += left_stride;
    right += right_stride;
  }
}

// The same on packed panels.
template <class T>
SUBQUAD_INLINE void tile_product(std::int64_t depth, const T* left, const T* right, tile<T>& acc) {
  tile_product<T>(depth, left, kTileRows, right, kTileColumns<T>, acc);
}

SUBQUAD_INLINE std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <class T>
SUBQUAD_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

// Elements of `count` rows packed in panels of Width.
template <int Width>
SUBQUAD_INLINE std::int64_t packed_size(std::int64_t count, std::int64_t depth) {
  return divide_up(count, Width) * Width * depth;
}

// Rows in panels of Width: out[(p * depth + k) * Width + r] = rows(p * Width + r, k), 0 past count.
template <int Width, class T>
SUBQUAD_INLINE void pack_rows(matrix_view<const T> rows, std::int64_t count, std::int64_t depth,
                              T* out) {
  for (; count > 0; count -= Width, rows = rows.from(Width)) {
    if (count >= Width) {
      for (std::int64_t k = 0; k < depth; ++k, out += Width) {
        const T* column = rows.data + k * rows.column_stride;
        for (int r = 0; r < Width; ++r) out[r] = column[r * rows.row_stride];
      }
    } else {
      for (std::int64_t k = 0; k < depth; ++k, out += Width) {
        for (int r = 0; r < Width; ++r) out[r] = r < count ? rows(r, k) : T(0);
      }
    }
  }
}

// Sets row `index` of packed panels to zero.
template <int Width, class T>
SUBQUAD_INLINE void zero_packed_row(T* packed, std::int64_t index, std::int64_t depth) {
  T* out = packed + index / Width * Width * depth + index % Width;
  for (std::int64_t k = 0; k < depth; ++k) out[k * Width] = T(0);
}

}  // namespace SUBQUAD_ISA
}  // namespace subquad

#endif  // SUBQUAD_KERNELS_TILE_PRODUCT_INL
