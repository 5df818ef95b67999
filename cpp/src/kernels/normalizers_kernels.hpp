// Exact log-normalisers and their reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_NORMALIZERS_KERNELS_HPP
#define SUBQUAD_KERNELS_NORMALIZERS_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// For every row i of n and the keys j of m, j = excluded[i] - first_key apart:
//   ln 2 * (shift[i] + log2(sum[i])) = log sum_j exp(x_i . y_j + log_weights_j)
// shift[i] is +inf where a score was +inf; sum[i] then does not tell whether another was NaN.
// A key of weight -inf counts for nothing, whatever its row holds. Nothing aliases.
// Scores in T, each within (depth + 1) eps |x_i||y_j|; sums in T over 480 keys, then double.
template <class T>
struct log_normalizer_task {
  matrix_view<const T> x;
  std::int64_t n;
  matrix_view<const T> y;
  std::int64_t m;
  std::int64_t depth;
  vector_view<const T> log_weights;          // optional
  vector_view<const std::int64_t> excluded;  // optional
  std::int64_t first_key;
  double* shift;
  double* sum;
  void* scratch;  // log_normalizer_scratch bytes, aligned to 64
};

// With p_rc = exp(x_r . y_c + row_offset_r + column_offset_c) gamma_c, 0 for excluded pairs:
//   out_r = scale_r sum_c p_rc y_c    and    total_r = scale_r sum_c p_rc
// The exponent must not exceed 80. excluded holds row -> column where excluded_by_row, else
// column -> row, counted from the first column, or row, of the whole. A row or column with offset
// -inf counts for nothing, whatever it holds, and elements of y that are not finite act through p
// alone: where p is 0 they count for nothing. Sums of 96 columns in T, from zero.
template <class T>
struct weighted_sum_task {
  matrix_view<const T> x;
  std::int64_t n;
  matrix_view<const T> y;
  std::int64_t m;
  std::int64_t depth;
  const T* row_offset;                       // n
  const T* column_offset;                    // m
  const T* gamma;                            // m, optional
  const T* scale;                            // n, optional
  vector_view<const std::int64_t> excluded;  // optional
  bool excluded_by_row;
  std::int64_t first_row;
  std::int64_t first_column;
  matrix_view<T> out;    // optional
  vector_view<T> total;  // optional
  void* scratch;         // weighted_sum_scratch bytes, aligned to 64
};

template <class T>
struct normalizers_functions {
  std::size_t (*log_normalizer_scratch)(std::int64_t n, std::int64_t m, std::int64_t depth);
  void (*log_normalizer)(const log_normalizer_task<T>& task);
  std::size_t (*weighted_sum_scratch)(std::int64_t n, std::int64_t m, std::int64_t depth);
  void (*weighted_sum)(const weighted_sum_task<T>& task);
};

struct normalizers_kernels {
  normalizers_functions<float> f32;
  normalizers_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_NORMALIZERS_KERNELS_HPP
