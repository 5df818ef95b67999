// A strided matrix, and the row of weights or indices that may come with it, as kernels see them.
#ifndef SUBQUAD_KERNELS_MATRIX_VIEW_HPP
#define SUBQUAD_KERNELS_MATRIX_VIEW_HPP

#include <cstdint>

// Kernels of every level include these: a copy that was not inlined would be one weak function for
// all of them, with the instructions of whichever the linker kept.
#if defined(__CUDACC__)
#define SUBQUAD_ALWAYS_INLINE __attribute__((always_inline)) __host__ __device__
#else
#define SUBQUAD_ALWAYS_INLINE __attribute__((always_inline))
#endif

namespace subquad {

// Element i is data[i * stride]; data may be null where the vector is optional.
template <class T>
struct vector_view {
  T* data;
  std::int64_t stride;

  SUBQUAD_ALWAYS_INLINE T& operator[](std::int64_t i) const { return data[i * stride]; }
  SUBQUAD_ALWAYS_INLINE vector_view from(std::int64_t i) const {
    return {data ? data + i * stride : data, stride};
  }
  SUBQUAD_ALWAYS_INLINE explicit operator bool() const { return data != nullptr; }
};

// Element (i, j) is data[i * row_stride + j * column_stride].
template <class T>
struct matrix_view {
  T* data;
  std::int64_t row_stride;
  std::int64_t column_stride;

  SUBQUAD_ALWAYS_INLINE T& operator()(std::int64_t i, std::int64_t j) const {
    return data[i * row_stride + j * column_stride];
  }
  SUBQUAD_ALWAYS_INLINE matrix_view from(std::int64_t i) const {
    return {data + i * row_stride, row_stride, column_stride};
  }
  SUBQUAD_ALWAYS_INLINE explicit operator bool() const { return data != nullptr; }
};

// A stack of matrices: matrix a starts at data + a * stride.
template <class T>
struct stack_view {
  T* data;
  std::int64_t stride;
  std::int64_t row_stride;
  std::int64_t column_stride;

  SUBQUAD_ALWAYS_INLINE matrix_view<T> operator[](std::int64_t a) const {
    return {data + a * stride, row_stride, column_stride};
  }
  SUBQUAD_ALWAYS_INLINE explicit operator bool() const { return data != nullptr; }
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_MATRIX_VIEW_HPP
