// Random features and their reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_FEATURES_KERNELS_HPP
#define SUBQUAD_KERNELS_FEATURES_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// What makes features of a row: with z = x - shift,
//   t_m = z . projection_m    and    q = z . linear - (sum_k diagonal_k z_k^2 + |factor z|^2) / 2
// Packed once by pack or pack_reverse, read by any number of tasks. Of q, leading and trailing
// columns that are 0 in all of a tile's rows of the factor are skipped: a triangular factor costs
// less than a full one.
template <class T>
struct feature_map_task {
  matrix_view<const T> projection;  // (m, depth)
  std::int64_t m;
  std::int64_t depth;
  vector_view<const T> bias;      // (m), not looked at by the reverse
  vector_view<const T> diagonal;  // (depth), optional
  matrix_view<const T> factor;    // (rank, depth), optional
  std::int64_t rank;
  vector_view<const T> shift;   // (depth), optional
  vector_view<const T> linear;  // (depth), optional
  void* packed;                 // packed_map or packed_reverse bytes, aligned to 64
};

enum class feature_values { logarithms, exponentials, waves };

// With l_m = t_m + bias_m + q, and l_m+j = - t_j + bias_j + q of pairs:
//   logarithms    out = l
//   exponentials  out = exp(l)
//   waves         out_m = exp(bias_m + q) cos t_m, out_m+j = exp(bias_j + q) sin t_j; pairs
// z is rounded once, so that the shift costs no more than eps / 2 of z; t and the parts of q are
// within (depth + 2) eps / 2 of the sums of their terms' magnitudes, |factor z|^2 within
// (2 depth + rank + 4) eps / 2; a pair has the same |t|. exp is within 1 ulp of its argument's, sin
// and cos as well up to |t| of 1.6e6, and within 4 eps of 1 beyond. A bias of -inf makes -inf, or
// 0, of a finite row. What a row holds reaches its own outputs only.
template <class T>
struct features_task {
  feature_map_task<T> map;  // packed by pack
  matrix_view<const T> x;
  std::int64_t n;
  bool pairs;
  feature_values values;
  bool beyond_caches;  // the whole output is far larger than they are: it is written past them
  matrix_view<T> out;
  void* scratch;  // features_scratch bytes, aligned to 64
};

// With g the sum of a row of grad, and h = grad_m, or grad_m - grad_m+j of pairs:
//   out_k = sum_m h_m projection_mk + g (linear_k - diagonal_k z_k - (factor^T factor z)_k)
// Sums over features in T, 256 at a time, from zero; factor^T factor is formed once in T, so that
// its part is within (rank + depth + 4) eps / 2 of |g| |factor|^T |factor| |z|. What a row of grad
// or x holds reaches its own row of out only.
template <class T>
struct features_reverse_task {
  feature_map_task<T> map;  // packed by pack_reverse
  matrix_view<const T> grad;
  matrix_view<const T> x;
  std::int64_t n;
  bool pairs;
  matrix_view<T> out;
  void* scratch;  // reverse_scratch bytes, aligned to 64
};

template <class T>
struct features_functions {
  std::size_t (*packed_map)(std::int64_t m, std::int64_t depth, std::int64_t rank);
  void (*pack)(const feature_map_task<T>& task);
  std::size_t (*features_scratch)(std::int64_t n, std::int64_t m, std::int64_t depth);
  void (*features)(const features_task<T>& task);
  std::size_t (*packed_reverse)(std::int64_t m, std::int64_t depth, std::int64_t rank);
  void (*pack_reverse)(const feature_map_task<T>& task);
  std::size_t (*reverse_scratch)(std::int64_t n, std::int64_t m, std::int64_t depth);
  void (*reverse)(const features_reverse_task<T>& task);
};

struct features_kernels {
  features_functions<float> f32;
  features_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_FEATURES_KERNELS_HPP
