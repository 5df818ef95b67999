// What k-means and the statistics of components ask of their arrays, on every device. Values of
// labels are another matter: only the CPU looks at them before it computes.
#ifndef SUBQUAD_CLUSTERS_CHECKS_HPP
#define SUBQUAD_CLUSTERS_CHECKS_HPP

#include <cstdint>
#include <string>

#include "arguments.hpp"

namespace subquad {

inline void check_nearest_centroids(const array_view& x, const array_view& centroids,
                                    const array_view& offsets, const array_view& labels,
                                    const array_view& score) {
  require_real(x, "x");
  require_dtype(centroids, x.type, "centroids");
  require_dtype(offsets, x.type, "offsets");
  require_dtype(labels, dtype::int64, "labels");
  require_dtype(score, x.type, "score");
  if (x.ndim != 2) {
    throw invalid_argument("x: expected shape (n, d), got " + shape_text(x.shape, x.ndim));
  }
  if (centroids.ndim != 2 || centroids.shape[1] != x.shape[1] || centroids.shape[0] < 1) {
    throw invalid_argument("centroids: expected shape (k, " + std::to_string(x.shape[1]) +
                           ") with k >= 1, got " + shape_text(centroids.shape, centroids.ndim));
  }
  require_shape(offsets, "offsets", "(k,)", {centroids.shape[0]});
  require_shape(labels, "labels", "(n,)", {x.shape[0]});
  require_shape(score, "score", "(n,)", {x.shape[0]});
}

// Checks y, labels and weights, which component_sums and component_scatter share.
inline void check_keys(const array_view& y, const array_view& labels, const array_view* weights) {
  require_real(y, "y");
  if (y.ndim != 2) {
    throw invalid_argument("y: expected shape (n, d), got " + shape_text(y.shape, y.ndim));
  }
  if (weights) {
    require_dtype(*weights, y.type, "weights");
    require_shape(*weights, "weights", "(n,)", {y.shape[0]});
  }
  require_dtype(labels, dtype::int64, "labels");
  require_shape(labels, "labels", "(n,)", {y.shape[0]});
}

inline void require_contiguous_double(const array_view& array, const char* name) {
  require_dtype(array, dtype::float64, name);
  std::int64_t stride = 1;
  bool is_contiguous = true;
  for (std::int32_t axis = array.ndim - 1; axis >= 0; --axis) {
    is_contiguous = is_contiguous && (array.shape[axis] <= 1 || array.strides[axis] == stride);
    stride *= array.shape[axis];
  }
  // Without elements, any strides are.
  if (!is_contiguous && stride > 0) {
    throw invalid_argument(std::string(name) + ": expected a C-contiguous array");
  }
}

inline void check_component_sums(const array_view& y, const array_view& labels,
                                 const array_view* weights, const array_view& counts,
                                 const array_view& sums) {
  check_keys(y, labels, weights);
  require_contiguous_double(counts, "counts");
  require_contiguous_double(sums, "sums");
  if (counts.ndim != 1) {
    throw invalid_argument("counts: expected shape (k,), got " +
                           shape_text(counts.shape, counts.ndim));
  }
  require_shape(sums, "sums", "(k, d)", {counts.shape[0], y.shape[1]});
}

inline void check_component_scatter(const array_view& y, const array_view& labels,
                                    const array_view* weights, const array_view& means,
                                    const array_view& scatter, const array_view& radii) {
  check_keys(y, labels, weights);
  const std::int64_t d = y.shape[1];
  require_contiguous_double(means, "means");
  require_contiguous_double(scatter, "scatter");
  require_contiguous_double(radii, "radii");
  if (means.ndim != 2 || means.shape[1] != d) {
    throw invalid_argument("means: expected shape (k, " + std::to_string(d) + "), got " +
                           shape_text(means.shape, means.ndim));
  }
  const std::int64_t k = means.shape[0];
  if (scatter.ndim == 2) {
    require_shape(scatter, "scatter", "(k, d)", {k, d});
  } else {
    require_shape(scatter, "scatter", "(k, d, d)", {k, d, d});
  }
  require_shape(radii, "radii", "(k,)", {k});
}

}  // namespace subquad

#endif  // SUBQUAD_CLUSTERS_CHECKS_HPP
