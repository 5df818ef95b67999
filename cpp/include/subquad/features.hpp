// Random features: their logarithms and values, the reverse, and the Walsh-Hadamard transform.
//
// Formulas and shapes stand in subquad/c_api.h, function by function under the same names. Optional
// arrays are pointers, null where absent; workspaces are for the device where the arrays lie.
// Throws invalid_argument (a value, rank or size), type_error (an element type or a device),
// device_error (reported by CUDA), out_of_memory or error.
#ifndef SUBQUAD_FEATURES_HPP
#define SUBQUAD_FEATURES_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"
#include "subquad/c_api.h"
#include "subquad/call.hpp"

namespace subquad {

inline std::size_t log_features_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                          std::int64_t d, std::int64_t r, std::int64_t itemsize,
                                          device_type device = device_type::cpu) {
  return subquad_log_features_workspace(batch, n, m, d, r, itemsize,
                                        static_cast<std::int32_t>(device));
}

inline void log_features(const array_view& x, const array_view& projection, const array_view& bias,
                         const array_view* diagonal, const array_view* factor,
                         const array_view* shift, const array_view* linear, bool antithetic,
                         bool exponentiate, const array_view& out, const array_view& workspace,
                         const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_log_features, as_c(x), as_c(projection), as_c(bias), as_c(diagonal),
               as_c(factor), as_c(shift), as_c(linear), static_cast<std::int32_t>(antithetic),
               static_cast<std::int32_t>(exponentiate), as_c(out), as_c(workspace), &how);
}

inline std::size_t log_features_vjp_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                              std::int64_t d, std::int64_t r, std::int64_t itemsize,
                                              device_type device = device_type::cpu) {
  return subquad_log_features_vjp_workspace(batch, n, m, d, r, itemsize,
                                            static_cast<std::int32_t>(device));
}

inline void log_features_vjp(const array_view& grad, const array_view& x,
                             const array_view& projection, const array_view* diagonal,
                             const array_view* factor, const array_view* shift,
                             const array_view* linear, bool antithetic, const array_view& grad_x,
                             const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_log_features_vjp, as_c(grad), as_c(x), as_c(projection), as_c(diagonal),
               as_c(factor), as_c(shift), as_c(linear), static_cast<std::int32_t>(antithetic),
               as_c(grad_x), as_c(workspace), &how);
}

inline void trigonometric_features(const array_view& x, const array_view& projection,
                                   const array_view& bias, const array_view* diagonal,
                                   const array_view* factor, const array_view* shift,
                                   const array_view* linear, const array_view& out,
                                   const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_trigonometric_features, as_c(x), as_c(projection), as_c(bias),
               as_c(diagonal), as_c(factor), as_c(shift), as_c(linear), as_c(out), as_c(workspace),
               &how);
}

inline std::size_t hadamard_transform_workspace(std::int64_t batch, std::int64_t d,
                                                std::int64_t itemsize,
                                                device_type device = device_type::cpu) {
  return subquad_hadamard_transform_workspace(batch, d, itemsize,
                                              static_cast<std::int32_t>(device));
}

inline void hadamard_transform(const array_view& x, const array_view& out,
                               const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_hadamard_transform, as_c(x), as_c(out), as_c(workspace), &how);
}

}  // namespace subquad

#endif  // SUBQUAD_FEATURES_HPP
