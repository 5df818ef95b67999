// Statistics of keys by component: what one task computes.
#ifndef SUBQUAD_KERNELS_CLUSTERS_KERNELS_HPP
#define SUBQUAD_KERNELS_CLUSTERS_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// The larger of two lengths, NaN where one is.
SUBQUAD_ALWAYS_INLINE inline double larger_or_nan(double a, double b) {
  return a == a && !(b <= a) ? b : a;
}

// label_i = argmax_c x_i . centroids_c + offsets_c, score_i the maximum; the lowest index wins
// ties, label 0 where every score is NaN or -inf.
template <class T>
struct nearest_centroids_task {
  matrix_view<const T> x;
  std::int64_t n;
  matrix_view<const T> centroids;
  std::int64_t k;
  std::int64_t depth;
  vector_view<const T> offsets;
  vector_view<std::int64_t> labels;
  vector_view<T> score;
  void* scratch;  // nearest_centroids_scratch bytes, aligned to 64
};

// counts_a += sum of weights and sums_a += sum of weighted rows, over the rows of label a.
template <class T>
struct component_sums_task {
  matrix_view<const T> y;
  std::int64_t n;
  std::int64_t depth;
  vector_view<const std::int64_t> labels;
  vector_view<const T> weights;  // optional
  double* counts;                // (k)
  double* sums;                  // (k, depth)
};

// Over the rows y_j, j in `rows` (or 0 .. n - 1 where null), centred on `center` (or 0 where null):
//   scatter = sum_j w_j c_j c_j^T, its lower triangle, or its diagonal
//   radius = the largest |c_j| among rows of non-zero weight
// Products and sums of 128 rows in T, sums of those in double; c_j is rounded to T once.
template <class T>
struct component_scatter_task {
  matrix_view<const T> y;
  const std::int64_t* rows;
  std::int64_t n;
  std::int64_t depth;
  vector_view<const T> weights;  // optional, by row of y
  const double* center;          // optional
  double* scatter;               // (depth, depth) or (depth): written
  double* radius;                // written
  void* scratch;                 // component_scatter_scratch bytes, aligned to 64
};

template <class T>
struct clusters_functions {
  std::size_t (*nearest_centroids_scratch)(std::int64_t n, std::int64_t k, std::int64_t depth);
  void (*nearest_centroids)(const nearest_centroids_task<T>& task);
  void (*component_sums)(const component_sums_task<T>& task);
  std::size_t (*component_scatter_scratch)(std::int64_t depth);
  void (*component_scatter)(const component_scatter_task<T>& task);
  void (*component_diagonal_scatter)(const component_scatter_task<T>& task);
};

struct clusters_kernels {
  clusters_functions<float> f32;
  clusters_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_CLUSTERS_KERNELS_HPP
