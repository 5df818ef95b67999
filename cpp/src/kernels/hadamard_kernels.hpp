// The Walsh-Hadamard transform: what one task computes.
#ifndef SUBQUAD_KERNELS_HADAMARD_KERNELS_HPP
#define SUBQUAD_KERNELS_HADAMARD_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// out_ri = sum_j (-1)^popcount(i & j) x_rj for n rows of length d, a power of two. Every element
// passes log2(d) sums: within log2(d) eps / 2 of the sum of the row's magnitudes. x and out do not
// overlap.
template <class T>
struct hadamard_rows_task {
  matrix_view<const T> x;
  matrix_view<T> out;
  std::int64_t n;
  std::int64_t d;
  void* scratch;  // rows_scratch bytes, aligned to 64; where out has contiguous rows, not used
};

// The same across `rows` rows, a power of two, in place: for each c < width,
//   data[i * stride + c] = sum_j (-1)^popcount(i & j) data[j * stride + c]
// width is a multiple of 64.
template <class T>
struct hadamard_columns_task {
  T* data;
  std::int64_t rows;
  std::int64_t stride;
  std::int64_t width;
  void* scratch;  // columns_scratch bytes, aligned to 64
};

template <class T>
struct hadamard_functions {
  std::size_t (*rows_scratch)(std::int64_t d);
  void (*rows)(const hadamard_rows_task<T>& task);
  std::size_t (*columns_scratch)(std::int64_t rows, std::int64_t width);
  void (*columns)(const hadamard_columns_task<T>& task);
};

struct hadamard_kernels {
  hadamard_functions<float> f32;
  hadamard_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_HADAMARD_KERNELS_HPP
