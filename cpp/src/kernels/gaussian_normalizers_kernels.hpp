// Log-normalisers of Gaussian mixtures of keys and their reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_GAUSSIAN_NORMALIZERS_KERNELS_HPP
#define SUBQUAD_KERNELS_GAUSSIAN_NORMALIZERS_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// Rows x_i and k components: the score x_i . y of a key y of component a has
//   mean      m_ia = x_i . means_a
//   variance  v_ia = |factors_a^T x_i|^2 + sum_d x_id^2 diagonal_ad
// Leading and trailing zeros of a factor's columns are skipped in groups of 12 (6): a triangular
// factor costs half of a full one.
template <class T>
struct gaussian_scores {
  matrix_view<const T> x;
  std::int64_t n;
  std::int64_t depth;
  std::int64_t k;
  matrix_view<const T> means;   // (k, depth)
  stack_view<const T> factors;  // (k, depth, rank)
  std::int64_t rank;
  matrix_view<const T> diagonal;  // (k, depth), optional
  void* scratch;                  // scores_scratch bytes, aligned to 64
};

// out_i = log sum_a exp(log_counts_a + m_ia + v_ia / 2). Where own_component[i] = a >= 0, row i is
// itself a key of component a and weight exp(own_log_weight[i]): the component's term is that of
// the other keys, and include_own adds the term of the row itself, own_log_weight[i] + |x_i|^2.
template <class T>
struct gaussian_log_normalizer_task {
  gaussian_scores<T> scores;
  vector_view<const T> log_counts;
  vector_view<const std::int64_t> own_component;  // optional
  vector_view<const T> own_log_weight;            // with own_component
  bool include_own;
  vector_view<T> out;
};

template <class T>
struct gaussian_score_moments_task {
  gaussian_scores<T> scores;
  matrix_view<T> mean;      // (n, k)
  matrix_view<T> variance;  // (n, k)
};

// out(a, i) = grad_i exp(log_counts_a + m_ia + v_ia / 2 - log_z_i), 0 where log_z_i = -inf.
template <class T>
struct gaussian_responsibilities_task {
  gaussian_scores<T> scores;
  vector_view<const T> log_counts;
  vector_view<const T> grad;
  vector_view<const T> log_z;
  matrix_view<T> out;  // (k, n)
};

// out_i = sum_a responsibilities(a, i) (means_a + covariances_a x_i); covariances (k, depth, depth)
// contiguous and symmetric.
template <class T>
struct gaussian_gradient_task {
  matrix_view<const T> x;
  std::int64_t n;
  std::int64_t depth;
  std::int64_t k;
  matrix_view<const T> means;
  const T* covariances;
  matrix_view<const T> responsibilities;  // (k, n)
  matrix_view<T> out;
  void* scratch;  // gradient_scratch bytes, aligned to 64
};

// What samples of component a, j in [offsets[a], offsets[a + 1]) without excluded_i, say of its
// Gaussian value. With t = x_i . deviations_j + shift_ia, q(t) = 1 + t (- v/2 + t^2/2 where
// quadratic) and r_j = weights_j (e^(t - v/2) - q(t)):
//   log_factor = log(1 + scale_ia mean r), NaN where that is not positive
//   log_error = log(scale_ia sd(r) / sqrt(number of samples)), -inf for fewer than two
//   third = sum w t^3 / sum w
// Exponents above 1 share a factor that returns as a logarithm: nothing overflows that is finite.
// Without samples: 0, -inf, 0. Sums of 48 samples in T, then sums of those.
template <class T>
struct sample_residuals_task {
  matrix_view<const T> x;
  std::int64_t n;
  std::int64_t depth;
  std::int64_t k;
  matrix_view<const T> deviations;
  vector_view<const T> weights;
  vector_view<const std::int64_t> offsets;
  std::int64_t largest;                      // samples of a component, at most
  matrix_view<const T> variance;             // (n, k)
  matrix_view<const T> scale;                // (n, k)
  matrix_view<const T> shift;                // (n, k), optional
  vector_view<const std::int64_t> excluded;  // (n), optional
  bool quadratic;
  matrix_view<T> log_factor;  // (n, k)
  matrix_view<T> log_error;
  matrix_view<T> third;
  void* scratch;  // residuals_scratch bytes, aligned to 64
};

template <class T>
struct gaussian_normalizers_functions {
  std::size_t (*scores_scratch)(std::int64_t n, std::int64_t depth, std::int64_t rank);
  void (*log_normalizer)(const gaussian_log_normalizer_task<T>& task);
  void (*score_moments)(const gaussian_score_moments_task<T>& task);
  void (*responsibilities)(const gaussian_responsibilities_task<T>& task);
  std::size_t (*gradient_scratch)(std::int64_t n, std::int64_t depth);
  void (*gradient)(const gaussian_gradient_task<T>& task);
  // out = factor factor^T + diag(diagonal), out (depth, depth) contiguous.
  void (*covariance)(matrix_view<const T> factor, std::int64_t depth, std::int64_t rank,
                     vector_view<const T> diagonal, T* out);
  std::size_t (*residuals_scratch)(std::int64_t n, std::int64_t depth, std::int64_t largest);
  void (*sample_residuals)(const sample_residuals_task<T>& task);
};

struct gaussian_normalizers_kernels {
  gaussian_normalizers_functions<float> f32;
  gaussian_normalizers_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_GAUSSIAN_NORMALIZERS_KERNELS_HPP
