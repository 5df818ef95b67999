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

// A square of as many elements as fit 16 bytes, transposed: to[k * to_stride + r] = from[r][k].
SUBQUAD_INLINE void transpose_square(const float* const* from, float* to, std::int64_t to_stride) {
  typedef float quad __attribute__((vector_size(16)));
  typedef float unaligned_quad __attribute__((vector_size(16), aligned(4), may_alias));
  typedef std::int32_t index __attribute__((vector_size(16)));
  const quad a = *reinterpret_cast<const unaligned_quad*>(from[0]);
  const quad b = *reinterpret_cast<const unaligned_quad*>(from[1]);
  const quad c = *reinterpret_cast<const unaligned_quad*>(from[2]);
  const quad d = *reinterpret_cast<const unaligned_quad*>(from[3]);
  const quad ab_low = __builtin_shuffle(a, b, index{0, 4, 1, 5});
  const quad ab_high = __builtin_shuffle(a, b, index{2, 6, 3, 7});
  const quad cd_low = __builtin_shuffle(c, d, index{0, 4, 1, 5});
  const quad cd_high = __builtin_shuffle(c, d, index{2, 6, 3, 7});
  const auto put = [&](std::int64_t k, quad column) {
    *reinterpret_cast<unaligned_quad*>(to + k * to_stride) = column;
  };
  put(0, __builtin_shuffle(ab_low, cd_low, index{0, 1, 4, 5}));
  put(1, __builtin_shuffle(ab_low, cd_low, index{2, 3, 6, 7}));
  put(2, __builtin_shuffle(ab_high, cd_high, index{0, 1, 4, 5}));
  put(3, __builtin_shuffle(ab_high, cd_high, index{2, 3, 6, 7}));
}

SUBQUAD_INLINE void transpose_square(const double* const* from, double* to,
                                     std::int64_t to_stride) {
  typedef double pair __attribute__((vector_size(16)));
  typedef double unaligned_pair __attribute__((vector_size(16), aligned(8), may_alias));
  typedef std::int64_t index __attribute__((vector_size(16)));
  const pair a = *reinterpret_cast<const unaligned_pair*>(from[0]);
  const pair b = *reinterpret_cast<const unaligned_pair*>(from[1]);
  *reinterpret_cast<unaligned_pair*>(to) = __builtin_shuffle(a, b, index{0, 2});
  *reinterpret_cast<unaligned_pair*>(to + to_stride) = __builtin_shuffle(a, b, index{1, 3});
}

// Width whole rows of unit column stride into one panel, by squares, and element by element where
// those do not fit.
template <int Width, class T>
SUBQUAD_INLINE void pack_panel(const T* rows, std::int64_t row_stride, std::int64_t depth, T* out) {
  constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  constexpr int kWhole = Width / kSide * kSide;
  std::int64_t k = 0;
  for (; k + kSide <= depth; k += kSide) {
    for (int r = 0; r < kWhole; r += kSide) {
      const T* from[kSide];
      for (int i = 0; i < kSide; ++i) from[i] = rows + (r + i) * row_stride + k;
      transpose_square(from, out + k * Width + r, Width);
    }
    for (int r = kWhole; r < Width; ++r) {
      for (int i = 0; i < kSide; ++i) out[(k + i) * Width + r] = rows[r * row_stride + k + i];
    }
  }
  for (; k < depth; ++k) {
    for (int r = 0; r < Width; ++r) out[k * Width + r] = rows[r * row_stride + k];
  }
}

// Rows in panels of Width: out[(p * depth + k) * Width + r] = rows(p * Width + r, k), 0 past count.
template <int Width, class T>
SUBQUAD_INLINE void pack_rows(matrix_view<const T> rows, std::int64_t count, std::int64_t depth,
                              T* out) {
  for (; count > 0; count -= Width, rows = rows.from(Width)) {
    if (count >= Width && rows.column_stride == 1) {
      pack_panel<Width>(rows.data, rows.row_stride, depth, out);
      out += Width * depth;
    } else if (count >= Width) {
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
