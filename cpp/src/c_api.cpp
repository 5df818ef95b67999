#include "subquad/c_api.h"

#include <cstddef>
#include <cstdio>
#include <exception>
#include <new>
#include <string>

#include "array_check.hpp"
#include "isa.hpp"
#include "normalizers_core.hpp"
#include "parallel.hpp"
#include "subquad/array_view.hpp"
#include "subquad/errors.hpp"

namespace subquad {
namespace {

static_assert(sizeof(subquad_array) == sizeof(array_view));
static_assert(offsetof(subquad_array, data) == offsetof(array_view, data));
static_assert(offsetof(subquad_array, shape) == offsetof(array_view, shape));
static_assert(offsetof(subquad_array, strides) == offsetof(array_view, strides));
static_assert(offsetof(subquad_array, ndim) == offsetof(array_view, ndim));
static_assert(offsetof(subquad_array, dtype) == offsetof(array_view, type));
static_assert(offsetof(subquad_array, device) == offsetof(array_view, device));
static_assert(offsetof(subquad_array, device_id) == offsetof(array_view, device_id));

subquad_status report(subquad_error* error, subquad_status status, const char* message) noexcept {
  if (error != nullptr) std::snprintf(error->message, sizeof(error->message), "%s", message);
  return status;
}

// No exception passes a C frame.
template <class F>
subquad_status guarded(subquad_error* error, F&& body) noexcept {
  try {
    check_environment();
    body();
    return report(error, SUBQUAD_SUCCESS, "");
  } catch (const invalid_argument& e) {
    return report(error, SUBQUAD_INVALID_ARGUMENT, e.what());
  } catch (const type_error& e) {
    return report(error, SUBQUAD_TYPE_ERROR, e.what());
  } catch (const std::bad_alloc&) {
    return report(error, SUBQUAD_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return report(error, SUBQUAD_INTERNAL_ERROR, e.what());
  } catch (...) {
    return report(error, SUBQUAD_INTERNAL_ERROR, "unknown exception");
  }
}

int threads_of(const subquad_context* context) {
  if (context == nullptr) return 0;
  if (context->n_threads < 0) {
    throw invalid_argument("context: expected n_threads of at least 0, got " +
                           std::to_string(context->n_threads));
  }
  return context->n_threads;
}

template <class F>
subquad_status run(const subquad_context* context, subquad_error* error, F&& body) noexcept {
  return guarded(error, [&] {
    const scoped_thread_limit limit(threads_of(context));
    body();
  });
}

// An argument, checked and with its strides written out.
class argument {
 public:
  argument(const subquad_array* array, const char* name) : present_(array != nullptr) {
    if (!present_) return;
    const std::string prefix = std::string(name) + ": ";
    if (array->ndim < 0 || array->ndim > kMaxDimensions) {
      throw invalid_argument(prefix + "expected from 0 to " + std::to_string(kMaxDimensions) +
                             " dimensions, got " + std::to_string(array->ndim));
    }
    if (array->ndim > 0 && array->shape == nullptr) {
      throw invalid_argument(prefix + "expected a shape, got NULL");
    }
    if (array->dtype < SUBQUAD_FLOAT32 || array->dtype > SUBQUAD_UINT8) {
      throw type_error(prefix + "unknown dtype " + std::to_string(array->dtype));
    }
    view_ = {array->data,
             array->shape,
             array->strides,
             array->ndim,
             static_cast<dtype>(array->dtype),
             static_cast<device_type>(array->device),
             array->device_id};
    check_array(view_, name);
    if (view_.strides == nullptr) {
      contiguous_strides(view_.shape, view_.ndim, strides_);
      view_.strides = strides_;
    }
  }

  argument(const argument&) = delete;
  argument& operator=(const argument&) = delete;

 protected:
  bool present_;
  array_view view_{};
  std::int64_t strides_[kMaxDimensions];
};

class optional_argument : public argument {
 public:
  using argument::argument;
  const array_view* get() const noexcept { return present_ ? &view_ : nullptr; }
};

class required_argument : public argument {
 public:
  required_argument(const subquad_array* array, const char* name) : argument(array, name) {
    if (!present_) throw invalid_argument(std::string(name) + ": expected an array, got NULL");
  }
  const array_view& get() const noexcept { return view_; }
};

}  // namespace
}  // namespace subquad

using subquad::optional_argument;
using subquad::required_argument;

const char* subquad_version(void) { return SUBQUAD_VERSION; }

int32_t subquad_get_num_threads(void) { return subquad::available_threads(); }

subquad_status subquad_set_num_threads(int32_t n_threads, subquad_error* error) {
  return subquad::guarded(error, [&] { subquad::request_num_threads(n_threads); });
}

const char* subquad_get_isa(void) { return subquad::isa_name(subquad::current_isa()); }

subquad_status subquad_set_isa(const char* level, subquad_error* error) {
  return subquad::guarded(error, [&] { subquad::select_isa(level == nullptr ? "" : level); });
}

int32_t subquad_isa_level_count(void) { return subquad::isa_level_count(); }

const char* subquad_isa_level(int32_t index) {
  if (index < 0 || index >= subquad::isa_level_count()) return nullptr;
  return subquad::isa_name(subquad::isa_level_at(index));
}

size_t subquad_log_normalizer_workspace(int64_t batch, int64_t n, int64_t m, int64_t d,
                                        int64_t itemsize) {
  return subquad::core::log_normalizer_workspace(batch, n, m, d, itemsize);
}

subquad_status subquad_log_normalizer(const subquad_array* x, const subquad_array* y,
                                      const subquad_array* log_weights,
                                      const subquad_array* excluded, const subquad_array* out,
                                      const subquad_array* workspace,
                                      const subquad_context* context, subquad_error* error) {
  return subquad::run(context, error, [&] {
    subquad::core::log_normalizer(required_argument(x, "x").get(), required_argument(y, "y").get(),
                                  optional_argument(log_weights, "log_weights").get(),
                                  optional_argument(excluded, "excluded").get(),
                                  required_argument(out, "out").get(),
                                  required_argument(workspace, "workspace").get());
  });
}

size_t subquad_log_normalizer_vjp_workspace(int64_t batch, int64_t n, int64_t m, int64_t d,
                                            int64_t itemsize) {
  return subquad::core::log_normalizer_vjp_workspace(batch, n, m, d, itemsize);
}

subquad_status subquad_log_normalizer_vjp(const subquad_array* grad, const subquad_array* x,
                                          const subquad_array* y, const subquad_array* log_weights,
                                          const subquad_array* excluded, const subquad_array* log_z,
                                          const subquad_array* grad_x, const subquad_array* grad_y,
                                          const subquad_array* grad_log_weights,
                                          const subquad_array* workspace,
                                          const subquad_context* context, subquad_error* error) {
  return subquad::run(context, error, [&] {
    subquad::core::log_normalizer_vjp(
        required_argument(grad, "grad").get(), required_argument(x, "x").get(),
        required_argument(y, "y").get(), optional_argument(log_weights, "log_weights").get(),
        optional_argument(excluded, "excluded").get(), required_argument(log_z, "log_z").get(),
        optional_argument(grad_x, "grad_x").get(), optional_argument(grad_y, "grad_y").get(),
        optional_argument(grad_log_weights, "grad_log_weights").get(),
        required_argument(workspace, "workspace").get());
  });
}

size_t subquad_gaussian_log_normalizer_workspace(int64_t batch, int64_t n, int64_t k, int64_t d,
                                                 int64_t r, int64_t itemsize) {
  return subquad::core::gaussian_log_normalizer_workspace(batch, n, k, d, r, itemsize);
}

subquad_status subquad_gaussian_log_normalizer(
    const subquad_array* x, const subquad_array* log_counts, const subquad_array* means,
    const subquad_array* factors, const subquad_array* diagonal, const subquad_array* own_component,
    const subquad_array* own_log_weight, int32_t include_own, const subquad_array* out,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error) {
  return subquad::run(context, error, [&] {
    subquad::core::gaussian_log_normalizer(
        required_argument(x, "x").get(), required_argument(log_counts, "log_counts").get(),
        required_argument(means, "means").get(), required_argument(factors, "factors").get(),
        optional_argument(diagonal, "diagonal").get(),
        optional_argument(own_component, "own_component").get(),
        optional_argument(own_log_weight, "own_log_weight").get(), include_own != 0,
        required_argument(out, "out").get(), required_argument(workspace, "workspace").get());
  });
}

size_t subquad_gaussian_log_normalizer_vjp_workspace(int64_t batch, int64_t n, int64_t k, int64_t d,
                                                     int64_t r, int64_t itemsize) {
  return subquad::core::gaussian_log_normalizer_vjp_workspace(batch, n, k, d, r, itemsize);
}

subquad_status subquad_gaussian_log_normalizer_vjp(
    const subquad_array* grad, const subquad_array* x, const subquad_array* log_counts,
    const subquad_array* means, const subquad_array* factors, const subquad_array* diagonal,
    const subquad_array* log_z, const subquad_array* grad_x, const subquad_array* grad_log_counts,
    const subquad_array* grad_means, const subquad_array* grad_factors,
    const subquad_array* grad_diagonal, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error) {
  return subquad::run(context, error, [&] {
    subquad::core::gaussian_log_normalizer_vjp(
        required_argument(grad, "grad").get(), required_argument(x, "x").get(),
        required_argument(log_counts, "log_counts").get(), required_argument(means, "means").get(),
        required_argument(factors, "factors").get(), optional_argument(diagonal, "diagonal").get(),
        required_argument(log_z, "log_z").get(), optional_argument(grad_x, "grad_x").get(),
        optional_argument(grad_log_counts, "grad_log_counts").get(),
        optional_argument(grad_means, "grad_means").get(),
        optional_argument(grad_factors, "grad_factors").get(),
        optional_argument(grad_diagonal, "grad_diagonal").get(),
        required_argument(workspace, "workspace").get());
  });
}

size_t subquad_gaussian_score_moments_workspace(int64_t n, int64_t k, int64_t d, int64_t r,
                                                int64_t itemsize) {
  return subquad::core::gaussian_score_moments_workspace(n, k, d, r, itemsize);
}

subquad_status subquad_gaussian_score_moments(
    const subquad_array* x, const subquad_array* means, const subquad_array* factors,
    const subquad_array* diagonal, const subquad_array* mean, const subquad_array* variance,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error) {
  return subquad::run(context, error, [&] {
    subquad::core::gaussian_score_moments(
        required_argument(x, "x").get(), required_argument(means, "means").get(),
        required_argument(factors, "factors").get(), optional_argument(diagonal, "diagonal").get(),
        required_argument(mean, "mean").get(), required_argument(variance, "variance").get(),
        required_argument(workspace, "workspace").get());
  });
}

size_t subquad_nearest_centroids_workspace(int64_t n, int64_t k, int64_t d, int64_t itemsize) {
  return subquad::core::nearest_centroids_workspace(n, k, d, itemsize);
}

subquad_status subquad_nearest_centroids(const subquad_array* x, const subquad_array* centroids,
                                         const subquad_array* offsets, const subquad_array* labels,
                                         const subquad_array* score, const subquad_array* workspace,
                                         const subquad_context* context, subquad_error* error) {
  return subquad::run(context, error, [&] {
    subquad::core::nearest_centroids(
        required_argument(x, "x").get(), required_argument(centroids, "centroids").get(),
        required_argument(offsets, "offsets").get(), required_argument(labels, "labels").get(),
        required_argument(score, "score").get(), required_argument(workspace, "workspace").get());
  });
}

size_t subquad_component_sums_workspace(int64_t n, int64_t k, int64_t d, int64_t itemsize) {
  return subquad::core::component_sums_workspace(n, k, d, itemsize);
}

subquad_status subquad_component_sums(const subquad_array* y, const subquad_array* labels,
                                      const subquad_array* weights, const subquad_array* counts,
                                      const subquad_array* sums, const subquad_array* workspace,
                                      const subquad_context* context, subquad_error* error) {
  return subquad::run(context, error, [&] {
    subquad::core::component_sums(
        required_argument(y, "y").get(), required_argument(labels, "labels").get(),
        optional_argument(weights, "weights").get(), required_argument(counts, "counts").get(),
        required_argument(sums, "sums").get(), required_argument(workspace, "workspace").get());
  });
}

size_t subquad_component_scatter_workspace(int64_t n, int64_t k, int64_t d, int64_t itemsize,
                                           int32_t diagonal) {
  return subquad::core::component_scatter_workspace(n, k, d, itemsize, diagonal != 0);
}

subquad_status subquad_component_scatter(const subquad_array* y, const subquad_array* labels,
                                         const subquad_array* weights, const subquad_array* means,
                                         const subquad_array* scatter, const subquad_array* radii,
                                         const subquad_array* workspace,
                                         const subquad_context* context, subquad_error* error) {
  return subquad::run(context, error, [&] {
    subquad::core::component_scatter(
        required_argument(y, "y").get(), required_argument(labels, "labels").get(),
        optional_argument(weights, "weights").get(), required_argument(means, "means").get(),
        required_argument(scatter, "scatter").get(), required_argument(radii, "radii").get(),
        required_argument(workspace, "workspace").get());
  });
}

size_t subquad_sample_residuals_workspace(int64_t n, int64_t d, int64_t largest, int64_t itemsize) {
  return subquad::core::sample_residuals_workspace(n, d, largest, itemsize);
}

subquad_status subquad_sample_residuals(const subquad_array* x, const subquad_array* deviations,
                                        const subquad_array* weights, const subquad_array* offsets,
                                        const subquad_array* variance, const subquad_array* scale,
                                        const subquad_array* shift, const subquad_array* excluded,
                                        int32_t quadratic, const subquad_array* log_factor,
                                        const subquad_array* log_error, const subquad_array* third,
                                        const subquad_array* workspace,
                                        const subquad_context* context, subquad_error* error) {
  return subquad::run(context, error, [&] {
    subquad::core::sample_residuals(
        required_argument(x, "x").get(), required_argument(deviations, "deviations").get(),
        required_argument(weights, "weights").get(), required_argument(offsets, "offsets").get(),
        required_argument(variance, "variance").get(), required_argument(scale, "scale").get(),
        optional_argument(shift, "shift").get(), optional_argument(excluded, "excluded").get(),
        quadratic != 0, required_argument(log_factor, "log_factor").get(),
        required_argument(log_error, "log_error").get(), required_argument(third, "third").get(),
        required_argument(workspace, "workspace").get());
  });
}
