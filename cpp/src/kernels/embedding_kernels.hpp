// A step of an embedding on the sphere: what one task computes.
#ifndef SUBQUAD_KERNELS_EMBEDDING_KERNELS_HPP
#define SUBQUAD_KERNELS_EMBEDDING_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// For every row i, with C_a x_i the product that a packed matrix stands for:
//   log_z_i = log sum_a exp(s_ia),  s_ia = log_counts_a + x_i . (means_a + C_a x_i / 2)
//   g_i = -scale pull_i + sum_a exp(s_ia - log_z_i) (means_a + C_a x_i)
//         + shifts_c + slopes_c x_i, c = labels_i  +  null_weights_i null
//   out_i = cosine x_i - step t / |t|, scaled to unit norm, t = g_i - (g_i . x_i) x_i; x_i where t
//           is 0
//   attraction_i = scale x_i . pull_i
// Components of log count -inf are not looked at; where there is no other, log_z is -inf. Labels
// are in range. Views of terms and outputs that are absent are null.
// The tangent is made twice: beside a g along x, what is left of it is orthogonal to x to rounding.
// Where the second takes half of its square it was rounding, and counts as 0.
// Where its square would leave the range of T, it and g are scaled by powers of two. |out_i| is 1
// to a few units of rounding: sums over d are those of blocks. Rows depend on their own values
// alone, bit by bit; those with infinities in g are NaN. out may be x or pull.
template <class T>
struct embedding_step_task {
  matrix_view<const T> x;     // (n, d)
  matrix_view<const T> pull;  // (n, d)
  std::int64_t n;
  std::int64_t d;
  T scale;
  std::int64_t k;  // components
  vector_view<const T> log_counts;
  matrix_view<const T> means;  // (k, d)
  const T* covariances;        // packed, d * d numbers each
  vector_view<const std::int64_t> labels;
  matrix_view<const T> shifts;  // (c, d)
  const T* slopes;              // packed, d * d numbers each
  vector_view<const T> null_weights;
  vector_view<const T> null;
  T cosine;
  T step;
  matrix_view<T> out;
  vector_view<T> attraction;
  vector_view<T> log_z;
  void* scratch;
};

template <class T>
struct embedding_functions {
  // Bytes; `terms`: components and matrices of labels.
  std::size_t (*scratch)(std::int64_t d, std::int64_t terms);
  // A matrix (d, d) as the tasks of this level read it.
  void (*pack)(matrix_view<const T> matrix, std::int64_t d, T* packed);
  void (*step)(const embedding_step_task<T>& task);
};

struct embedding_kernels {
  embedding_functions<float> f32;
  embedding_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_EMBEDDING_KERNELS_HPP
