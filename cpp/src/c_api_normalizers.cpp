// The functions of the concept `normalizers`, in both libraries: see c_api_call.hpp.
#include <cstddef>
#include <cstdint>

#include "c_api_call.hpp"
#include "normalizers_core.hpp"
#include "subquad/c_api.h"

namespace core = subquad::core;
using subquad::c_api::common_place;
using subquad::c_api::optional_argument;
using subquad::c_api::required_argument;
using subquad::c_api::run;
using subquad::c_api::workspace_size;

size_t subquad_log_normalizer_workspace(int64_t batch, int64_t n, int64_t m, int64_t d,
                                        int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_log_normalizer_workspace),
                        core::log_normalizer_workspace, device, batch, n, m, d, itemsize);
}

subquad_status subquad_log_normalizer(const subquad_array* x, const subquad_array* y,
                                      const subquad_array* log_weights,
                                      const subquad_array* excluded, const subquad_array* out,
                                      const subquad_array* workspace,
                                      const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_log_normalizer), "x",
      [&](const common_place& at) {
        core::log_normalizer(required_argument(x, "x", at).get(),
                             required_argument(y, "y", at).get(),
                             optional_argument(log_weights, "log_weights", at).get(),
                             optional_argument(excluded, "excluded", at).get(),
                             required_argument(out, "out", at).get(),
                             required_argument(workspace, "workspace", at).get());
      },
      x, y, log_weights, excluded, out, workspace, context, error);
}

size_t subquad_log_normalizer_vjp_workspace(int64_t batch, int64_t n, int64_t m, int64_t d,
                                            int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_log_normalizer_vjp_workspace),
                        core::log_normalizer_vjp_workspace, device, batch, n, m, d, itemsize);
}

subquad_status subquad_log_normalizer_vjp(const subquad_array* grad, const subquad_array* x,
                                          const subquad_array* y, const subquad_array* log_weights,
                                          const subquad_array* excluded, const subquad_array* log_z,
                                          const subquad_array* grad_x, const subquad_array* grad_y,
                                          const subquad_array* grad_log_weights,
                                          const subquad_array* workspace,
                                          const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_log_normalizer_vjp), "grad",
      [&](const common_place& at) {
        core::log_normalizer_vjp(required_argument(grad, "grad", at).get(),
                                 required_argument(x, "x", at).get(),
                                 required_argument(y, "y", at).get(),
                                 optional_argument(log_weights, "log_weights", at).get(),
                                 optional_argument(excluded, "excluded", at).get(),
                                 required_argument(log_z, "log_z", at).get(),
                                 optional_argument(grad_x, "grad_x", at).get(),
                                 optional_argument(grad_y, "grad_y", at).get(),
                                 optional_argument(grad_log_weights, "grad_log_weights", at).get(),
                                 required_argument(workspace, "workspace", at).get());
      },
      grad, x, y, log_weights, excluded, log_z, grad_x, grad_y, grad_log_weights, workspace,
      context, error);
}

size_t subquad_gaussian_log_normalizer_workspace(int64_t batch, int64_t n, int64_t k, int64_t d,
                                                 int64_t r, int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_gaussian_log_normalizer_workspace),
                        core::gaussian_log_normalizer_workspace, device, batch, n, k, d, r,
                        itemsize);
}

subquad_status subquad_gaussian_log_normalizer(
    const subquad_array* x, const subquad_array* log_counts, const subquad_array* means,
    const subquad_array* factors, const subquad_array* diagonal, const subquad_array* own_component,
    const subquad_array* own_log_weight, int32_t include_own, const subquad_array* out,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_gaussian_log_normalizer), "x",
      [&](const common_place& at) {
        core::gaussian_log_normalizer(required_argument(x, "x", at).get(),
                                      required_argument(log_counts, "log_counts", at).get(),
                                      required_argument(means, "means", at).get(),
                                      required_argument(factors, "factors", at).get(),
                                      optional_argument(diagonal, "diagonal", at).get(),
                                      optional_argument(own_component, "own_component", at).get(),
                                      optional_argument(own_log_weight, "own_log_weight", at).get(),
                                      include_own != 0, required_argument(out, "out", at).get(),
                                      required_argument(workspace, "workspace", at).get());
      },
      x, log_counts, means, factors, diagonal, own_component, own_log_weight, include_own, out,
      workspace, context, error);
}

size_t subquad_gaussian_log_normalizer_vjp_workspace(int64_t batch, int64_t n, int64_t k, int64_t d,
                                                     int64_t r, int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_gaussian_log_normalizer_vjp_workspace),
                        core::gaussian_log_normalizer_vjp_workspace, device, batch, n, k, d, r,
                        itemsize);
}

subquad_status subquad_gaussian_log_normalizer_vjp(
    const subquad_array* grad, const subquad_array* x, const subquad_array* log_counts,
    const subquad_array* means, const subquad_array* factors, const subquad_array* diagonal,
    const subquad_array* log_z, const subquad_array* grad_x, const subquad_array* grad_log_counts,
    const subquad_array* grad_means, const subquad_array* grad_factors,
    const subquad_array* grad_diagonal, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_gaussian_log_normalizer_vjp), "grad",
      [&](const common_place& at) {
        core::gaussian_log_normalizer_vjp(
            required_argument(grad, "grad", at).get(), required_argument(x, "x", at).get(),
            required_argument(log_counts, "log_counts", at).get(),
            required_argument(means, "means", at).get(),
            required_argument(factors, "factors", at).get(),
            optional_argument(diagonal, "diagonal", at).get(),
            required_argument(log_z, "log_z", at).get(),
            optional_argument(grad_x, "grad_x", at).get(),
            optional_argument(grad_log_counts, "grad_log_counts", at).get(),
            optional_argument(grad_means, "grad_means", at).get(),
            optional_argument(grad_factors, "grad_factors", at).get(),
            optional_argument(grad_diagonal, "grad_diagonal", at).get(),
            required_argument(workspace, "workspace", at).get());
      },
      grad, x, log_counts, means, factors, diagonal, log_z, grad_x, grad_log_counts, grad_means,
      grad_factors, grad_diagonal, workspace, context, error);
}

size_t subquad_gaussian_score_moments_workspace(int64_t n, int64_t k, int64_t d, int64_t r,
                                                int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_gaussian_score_moments_workspace),
                        core::gaussian_score_moments_workspace, device, n, k, d, r, itemsize);
}

subquad_status subquad_gaussian_score_moments(
    const subquad_array* x, const subquad_array* means, const subquad_array* factors,
    const subquad_array* diagonal, const subquad_array* mean, const subquad_array* variance,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_gaussian_score_moments), "x",
      [&](const common_place& at) {
        core::gaussian_score_moments(required_argument(x, "x", at).get(),
                                     required_argument(means, "means", at).get(),
                                     required_argument(factors, "factors", at).get(),
                                     optional_argument(diagonal, "diagonal", at).get(),
                                     required_argument(mean, "mean", at).get(),
                                     required_argument(variance, "variance", at).get(),
                                     required_argument(workspace, "workspace", at).get());
      },
      x, means, factors, diagonal, mean, variance, workspace, context, error);
}

size_t subquad_nearest_centroids_workspace(int64_t n, int64_t k, int64_t d, int64_t itemsize,
                                           int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_nearest_centroids_workspace),
                        core::nearest_centroids_workspace, device, n, k, d, itemsize);
}

subquad_status subquad_nearest_centroids(const subquad_array* x, const subquad_array* centroids,
                                         const subquad_array* offsets, const subquad_array* labels,
                                         const subquad_array* score, const subquad_array* workspace,
                                         const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_nearest_centroids), "x",
      [&](const common_place& at) {
        core::nearest_centroids(required_argument(x, "x", at).get(),
                                required_argument(centroids, "centroids", at).get(),
                                required_argument(offsets, "offsets", at).get(),
                                required_argument(labels, "labels", at).get(),
                                required_argument(score, "score", at).get(),
                                required_argument(workspace, "workspace", at).get());
      },
      x, centroids, offsets, labels, score, workspace, context, error);
}

size_t subquad_component_sums_workspace(int64_t n, int64_t k, int64_t d, int64_t itemsize,
                                        int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_component_sums_workspace),
                        core::component_sums_workspace, device, n, k, d, itemsize);
}

subquad_status subquad_component_sums(const subquad_array* y, const subquad_array* labels,
                                      const subquad_array* weights, const subquad_array* counts,
                                      const subquad_array* sums, const subquad_array* workspace,
                                      const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_component_sums), "y",
      [&](const common_place& at) {
        core::component_sums(required_argument(y, "y", at).get(),
                             required_argument(labels, "labels", at).get(),
                             optional_argument(weights, "weights", at).get(),
                             required_argument(counts, "counts", at).get(),
                             required_argument(sums, "sums", at).get(),
                             required_argument(workspace, "workspace", at).get());
      },
      y, labels, weights, counts, sums, workspace, context, error);
}

size_t subquad_component_scatter_workspace(int64_t n, int64_t k, int64_t d, int64_t itemsize,
                                           int32_t diagonal, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_component_scatter_workspace),
                        core::component_scatter_workspace, device, n, k, d, itemsize,
                        diagonal != 0);
}

subquad_status subquad_component_scatter(const subquad_array* y, const subquad_array* labels,
                                         const subquad_array* weights, const subquad_array* means,
                                         const subquad_array* scatter, const subquad_array* radii,
                                         const subquad_array* workspace,
                                         const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_component_scatter), "y",
      [&](const common_place& at) {
        core::component_scatter(required_argument(y, "y", at).get(),
                                required_argument(labels, "labels", at).get(),
                                optional_argument(weights, "weights", at).get(),
                                required_argument(means, "means", at).get(),
                                required_argument(scatter, "scatter", at).get(),
                                required_argument(radii, "radii", at).get(),
                                required_argument(workspace, "workspace", at).get());
      },
      y, labels, weights, means, scatter, radii, workspace, context, error);
}

size_t subquad_sample_residuals_workspace(int64_t n, int64_t d, int64_t largest, int64_t itemsize,
                                          int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_sample_residuals_workspace),
                        core::sample_residuals_workspace, device, n, d, largest, itemsize);
}

subquad_status subquad_sample_residuals(const subquad_array* x, const subquad_array* deviations,
                                        const subquad_array* weights, const subquad_array* offsets,
                                        const subquad_array* variance, const subquad_array* scale,
                                        const subquad_array* shift, const subquad_array* excluded,
                                        int32_t quadratic, const subquad_array* log_factor,
                                        const subquad_array* log_error, const subquad_array* third,
                                        const subquad_array* workspace,
                                        const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_sample_residuals), "x",
      [&](const common_place& at) {
        core::sample_residuals(required_argument(x, "x", at).get(),
                               required_argument(deviations, "deviations", at).get(),
                               required_argument(weights, "weights", at).get(),
                               required_argument(offsets, "offsets", at).get(),
                               required_argument(variance, "variance", at).get(),
                               required_argument(scale, "scale", at).get(),
                               optional_argument(shift, "shift", at).get(),
                               optional_argument(excluded, "excluded", at).get(), quadratic != 0,
                               required_argument(log_factor, "log_factor", at).get(),
                               required_argument(log_error, "log_error", at).get(),
                               required_argument(third, "third", at).get(),
                               required_argument(workspace, "workspace", at).get());
      },
      x, deviations, weights, offsets, variance, scale, shift, excluded, quadratic, log_factor,
      log_error, third, workspace, context, error);
}
