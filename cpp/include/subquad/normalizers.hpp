// log sum_j exp(x_i . y_j): exactly, and from a Gaussian mixture of the keys; and the steps that
// fit the mixture.
//
// Formulas and shapes stand in subquad/c_api.h, function by function under the same names. Optional
// arrays are pointers, null where absent; workspaces are for the device where the arrays lie.
// Throws invalid_argument (a value, rank or size), type_error (an element type or a device),
// device_error (reported by CUDA), out_of_memory or error.
#ifndef SUBQUAD_NORMALIZERS_HPP
#define SUBQUAD_NORMALIZERS_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"
#include "subquad/c_api.h"
#include "subquad/call.hpp"

namespace subquad {

inline std::size_t log_normalizer_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                            std::int64_t d, std::int64_t itemsize,
                                            device_type device = device_type::cpu) {
  return subquad_log_normalizer_workspace(batch, n, m, d, itemsize,
                                          static_cast<std::int32_t>(device));
}

inline void log_normalizer(const array_view& x, const array_view& y, const array_view* log_weights,
                           const array_view* excluded, const array_view& out,
                           const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_log_normalizer, as_c(x), as_c(y), as_c(log_weights), as_c(excluded),
               as_c(out), as_c(workspace), &how);
}

inline std::size_t log_normalizer_vjp_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                                std::int64_t d, std::int64_t itemsize,
                                                device_type device = device_type::cpu) {
  return subquad_log_normalizer_vjp_workspace(batch, n, m, d, itemsize,
                                              static_cast<std::int32_t>(device));
}

inline void log_normalizer_vjp(const array_view& grad, const array_view& x, const array_view& y,
                               const array_view* log_weights, const array_view* excluded,
                               const array_view& log_z, const array_view* grad_x,
                               const array_view* grad_y, const array_view* grad_log_weights,
                               const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_log_normalizer_vjp, as_c(grad), as_c(x), as_c(y), as_c(log_weights),
               as_c(excluded), as_c(log_z), as_c(grad_x), as_c(grad_y), as_c(grad_log_weights),
               as_c(workspace), &how);
}

inline std::size_t gaussian_log_normalizer_workspace(std::int64_t batch, std::int64_t n,
                                                     std::int64_t k, std::int64_t d, std::int64_t r,
                                                     std::int64_t itemsize,
                                                     device_type device = device_type::cpu) {
  return subquad_gaussian_log_normalizer_workspace(batch, n, k, d, r, itemsize,
                                                   static_cast<std::int32_t>(device));
}

inline void gaussian_log_normalizer(const array_view& x, const array_view& log_counts,
                                    const array_view& means, const array_view& factors,
                                    const array_view* diagonal, const array_view* own_component,
                                    const array_view* own_log_weight, bool include_own,
                                    const array_view& out, const array_view& workspace,
                                    const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_gaussian_log_normalizer, as_c(x), as_c(log_counts), as_c(means),
               as_c(factors), as_c(diagonal), as_c(own_component), as_c(own_log_weight),
               static_cast<std::int32_t>(include_own), as_c(out), as_c(workspace), &how);
}

inline std::size_t gaussian_log_normalizer_vjp_workspace(std::int64_t batch, std::int64_t n,
                                                         std::int64_t k, std::int64_t d,
                                                         std::int64_t r, std::int64_t itemsize,
                                                         device_type device = device_type::cpu) {
  return subquad_gaussian_log_normalizer_vjp_workspace(batch, n, k, d, r, itemsize,
                                                       static_cast<std::int32_t>(device));
}

inline void gaussian_log_normalizer_vjp(
    const array_view& grad, const array_view& x, const array_view& log_counts,
    const array_view& means, const array_view& factors, const array_view* diagonal,
    const array_view& log_z, const array_view* grad_x, const array_view* grad_log_counts,
    const array_view* grad_means, const array_view* grad_factors, const array_view* grad_diagonal,
    const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_gaussian_log_normalizer_vjp, as_c(grad), as_c(x), as_c(log_counts),
               as_c(means), as_c(factors), as_c(diagonal), as_c(log_z), as_c(grad_x),
               as_c(grad_log_counts), as_c(grad_means), as_c(grad_factors), as_c(grad_diagonal),
               as_c(workspace), &how);
}

inline std::size_t gaussian_score_moments_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                                    std::int64_t r, std::int64_t itemsize,
                                                    device_type device = device_type::cpu) {
  return subquad_gaussian_score_moments_workspace(n, k, d, r, itemsize,
                                                  static_cast<std::int32_t>(device));
}

inline void gaussian_score_moments(const array_view& x, const array_view& means,
                                   const array_view& factors, const array_view* diagonal,
                                   const array_view& mean, const array_view& variance,
                                   const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_gaussian_score_moments, as_c(x), as_c(means), as_c(factors), as_c(diagonal),
               as_c(mean), as_c(variance), as_c(workspace), &how);
}

inline std::size_t nearest_centroids_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                               std::int64_t itemsize,
                                               device_type device = device_type::cpu) {
  return subquad_nearest_centroids_workspace(n, k, d, itemsize, static_cast<std::int32_t>(device));
}

inline void nearest_centroids(const array_view& x, const array_view& centroids,
                              const array_view& offsets, const array_view& labels,
                              const array_view& score, const array_view& workspace,
                              const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_nearest_centroids, as_c(x), as_c(centroids), as_c(offsets), as_c(labels),
               as_c(score), as_c(workspace), &how);
}

inline std::size_t component_sums_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                            std::int64_t itemsize,
                                            device_type device = device_type::cpu) {
  return subquad_component_sums_workspace(n, k, d, itemsize, static_cast<std::int32_t>(device));
}

inline void component_sums(const array_view& y, const array_view& labels, const array_view* weights,
                           const array_view& counts, const array_view& sums,
                           const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_component_sums, as_c(y), as_c(labels), as_c(weights), as_c(counts),
               as_c(sums), as_c(workspace), &how);
}

inline std::size_t component_scatter_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                               std::int64_t itemsize, bool diagonal,
                                               device_type device = device_type::cpu) {
  return subquad_component_scatter_workspace(n, k, d, itemsize, diagonal ? 1 : 0,
                                             static_cast<std::int32_t>(device));
}

inline void component_scatter(const array_view& y, const array_view& labels,
                              const array_view* weights, const array_view& means,
                              const array_view& scatter, const array_view& radii,
                              const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_component_scatter, as_c(y), as_c(labels), as_c(weights), as_c(means),
               as_c(scatter), as_c(radii), as_c(workspace), &how);
}

inline std::size_t sample_residuals_workspace(std::int64_t n, std::int64_t d, std::int64_t largest,
                                              std::int64_t itemsize,
                                              device_type device = device_type::cpu) {
  return subquad_sample_residuals_workspace(n, d, largest, itemsize,
                                            static_cast<std::int32_t>(device));
}

inline void sample_residuals(const array_view& x, const array_view& deviations,
                             const array_view& weights, const array_view& offsets,
                             const array_view& variance, const array_view& scale,
                             const array_view* shift, const array_view* excluded, bool quadratic,
                             const array_view& log_factor, const array_view& log_error,
                             const array_view& third, const array_view& workspace,
                             const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_sample_residuals, as_c(x), as_c(deviations), as_c(weights), as_c(offsets),
               as_c(variance), as_c(scale), as_c(shift), as_c(excluded), quadratic ? 1 : 0,
               as_c(log_factor), as_c(log_error), as_c(third), as_c(workspace), &how);
}

}  // namespace subquad

#endif  // SUBQUAD_NORMALIZERS_HPP
