// The functions of the concept `normalizers`, as the C ABI and the Python module call them.
//
// Formulas and shapes stand in subquad/c_api.h. Optional arrays are pointers, null where absent.
// Outputs are written in full. `workspace` is uint8, 1-D, contiguous and at least as long as the
// matching `*_workspace` function says for the broadcast batch; it needs no alignment.
// Throws invalid_argument for a wrong shape and type_error for a wrong element type, naming the
// argument.
#ifndef SUBQUAD_NORMALIZERS_CORE_HPP
#define SUBQUAD_NORMALIZERS_CORE_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"

namespace subquad::core {

std::size_t log_normalizer_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                     std::int64_t d, std::int64_t itemsize);
void log_normalizer(const array_view& x, const array_view& y, const array_view* log_weights,
                    const array_view* excluded, const array_view& out, const array_view& workspace);

std::size_t log_normalizer_vjp_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                         std::int64_t d, std::int64_t itemsize);
void log_normalizer_vjp(const array_view& grad, const array_view& x, const array_view& y,
                        const array_view* log_weights, const array_view* excluded,
                        const array_view& log_z, const array_view* grad_x, const array_view* grad_y,
                        const array_view* grad_log_weights, const array_view& workspace);

std::size_t gaussian_log_normalizer_workspace(std::int64_t batch, std::int64_t n, std::int64_t k,
                                              std::int64_t d, std::int64_t r,
                                              std::int64_t itemsize);
void gaussian_log_normalizer(const array_view& x, const array_view& log_counts,
                             const array_view& means, const array_view& factors,
                             const array_view* diagonal, const array_view* own_component,
                             const array_view* own_log_weight, bool include_own,
                             const array_view& out, const array_view& workspace);

std::size_t gaussian_log_normalizer_vjp_workspace(std::int64_t batch, std::int64_t n,
                                                  std::int64_t k, std::int64_t d, std::int64_t r,
                                                  std::int64_t itemsize);
void gaussian_log_normalizer_vjp(const array_view& grad, const array_view& x,
                                 const array_view& log_counts, const array_view& means,
                                 const array_view& factors, const array_view* diagonal,
                                 const array_view& log_z, const array_view* grad_x,
                                 const array_view* grad_log_counts, const array_view* grad_means,
                                 const array_view* grad_factors, const array_view* grad_diagonal,
                                 const array_view& workspace);

std::size_t gaussian_score_moments_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                             std::int64_t r, std::int64_t itemsize);
void gaussian_score_moments(const array_view& x, const array_view& means, const array_view& factors,
                            const array_view* diagonal, const array_view& mean,
                            const array_view& variance, const array_view& workspace);

std::size_t nearest_centroids_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                        std::int64_t itemsize);
void nearest_centroids(const array_view& x, const array_view& centroids, const array_view& offsets,
                       const array_view& labels, const array_view& score,
                       const array_view& workspace);

std::size_t component_sums_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                     std::int64_t itemsize);
void component_sums(const array_view& y, const array_view& labels, const array_view* weights,
                    const array_view& counts, const array_view& sums, const array_view& workspace);

// `diagonal`: the scatter wanted is (k, d) rather than (k, d, d).
std::size_t component_scatter_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                        std::int64_t itemsize, bool diagonal);
void component_scatter(const array_view& y, const array_view& labels, const array_view* weights,
                       const array_view& means, const array_view& scatter, const array_view& radii,
                       const array_view& workspace);

// `largest`: samples of one component, at most.
std::size_t sample_residuals_workspace(std::int64_t n, std::int64_t d, std::int64_t largest,
                                       std::int64_t itemsize);
void sample_residuals(const array_view& x, const array_view& deviations, const array_view& weights,
                      const array_view& offsets, const array_view& variance,
                      const array_view& scale, const array_view* shift, const array_view* excluded,
                      bool quadratic, const array_view& log_factor, const array_view& log_error,
                      const array_view& third, const array_view& workspace);

}  // namespace subquad::core

#endif  // SUBQUAD_NORMALIZERS_CORE_HPP
