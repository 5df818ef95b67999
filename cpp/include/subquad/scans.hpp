// Running sums of exponentials and linear recurrences, in the log domain, and their reverse.
//
// Formulas and shapes stand in subquad/c_api.h, function by function under the same names. Optional
// arrays are pointers, null where absent; workspaces are for the device where the arrays lie.
// Throws invalid_argument (a value, rank or size), type_error (an element type or a device),
// device_error (reported by CUDA), out_of_memory or error.
#ifndef SUBQUAD_SCANS_HPP
#define SUBQUAD_SCANS_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"
#include "subquad/c_api.h"
#include "subquad/call.hpp"

namespace subquad {

inline std::size_t logcumsumexp_workspace(std::int64_t lanes, std::int64_t n, std::int64_t itemsize,
                                          device_type device = device_type::cpu) {
  return subquad_logcumsumexp_workspace(lanes, n, itemsize, static_cast<std::int32_t>(device));
}

inline void logcumsumexp(const array_view& x, const array_view* log_sum,
                         const array_view* remainder, const array_view* segments, std::int32_t axis,
                         bool reverse, bool exclusive, const array_view& out,
                         const array_view* final_log_sum, const array_view* final_remainder,
                         const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_logcumsumexp, as_c(x), as_c(log_sum), as_c(remainder), as_c(segments), axis,
               reverse, exclusive, as_c(out), as_c(final_log_sum), as_c(final_remainder),
               as_c(workspace), &how);
}

inline std::size_t logcumsumexp_vjp_workspace(std::int64_t lanes, std::int64_t n,
                                              std::int64_t itemsize,
                                              device_type device = device_type::cpu) {
  return subquad_logcumsumexp_vjp_workspace(lanes, n, itemsize, static_cast<std::int32_t>(device));
}

inline void logcumsumexp_vjp(const array_view& x, const array_view* log_sum,
                             const array_view* remainder, const array_view* segments,
                             std::int32_t axis, bool reverse, bool exclusive,
                             const array_view* grad, const array_view* grad_final,
                             const array_view* grad_x, const array_view* grad_log_sum,
                             const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_logcumsumexp_vjp, as_c(x), as_c(log_sum), as_c(remainder), as_c(segments),
               axis, reverse, exclusive, as_c(grad), as_c(grad_final), as_c(grad_x),
               as_c(grad_log_sum), as_c(workspace), &how);
}

inline std::size_t signed_logcumsumexp_workspace(std::int64_t lanes, std::int64_t n,
                                                 std::int64_t itemsize,
                                                 device_type device = device_type::cpu) {
  return subquad_signed_logcumsumexp_workspace(lanes, n, itemsize,
                                               static_cast<std::int32_t>(device));
}

inline void signed_logcumsumexp(const array_view& x, const array_view& sign, std::int32_t axis,
                                bool reverse, bool exclusive, const array_view& out,
                                const array_view& out_sign, const array_view& workspace,
                                const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_signed_logcumsumexp, as_c(x), as_c(sign), axis, reverse, exclusive,
               as_c(out), as_c(out_sign), as_c(workspace), &how);
}

inline std::size_t signed_logcumsumexp_vjp_workspace(std::int64_t lanes, std::int64_t n,
                                                     std::int64_t itemsize,
                                                     device_type device = device_type::cpu) {
  return subquad_signed_logcumsumexp_vjp_workspace(lanes, n, itemsize,
                                                   static_cast<std::int32_t>(device));
}

inline void signed_logcumsumexp_vjp(const array_view& x, const array_view& sign, std::int32_t axis,
                                    bool reverse, bool exclusive, const array_view& grad,
                                    const array_view* grad_x, const array_view* grad_sign,
                                    const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_signed_logcumsumexp_vjp, as_c(x), as_c(sign), axis, reverse, exclusive,
               as_c(grad), as_c(grad_x), as_c(grad_sign), as_c(workspace), &how);
}

inline std::size_t log_linear_recurrence_workspace(std::int64_t lanes, std::int64_t n,
                                                   std::int64_t itemsize,
                                                   device_type device = device_type::cpu) {
  return subquad_log_linear_recurrence_workspace(lanes, n, itemsize,
                                                 static_cast<std::int32_t>(device));
}

inline void log_linear_recurrence(const array_view& log_a, const array_view& log_b,
                                  const array_view* state, const array_view* segments,
                                  std::int32_t axis, bool reverse, const array_view& out,
                                  const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_log_linear_recurrence, as_c(log_a), as_c(log_b), as_c(state), as_c(segments),
               axis, reverse, as_c(out), as_c(workspace), &how);
}

inline std::size_t log_linear_recurrence_vjp_workspace(std::int64_t lanes, std::int64_t n,
                                                       std::int64_t itemsize,
                                                       device_type device = device_type::cpu) {
  return subquad_log_linear_recurrence_vjp_workspace(lanes, n, itemsize,
                                                     static_cast<std::int32_t>(device));
}

inline void log_linear_recurrence_vjp(const array_view& log_a, const array_view& log_b,
                                      const array_view* state, const array_view* segments,
                                      std::int32_t axis, bool reverse, const array_view& grad,
                                      const array_view* grad_log_a, const array_view* grad_log_b,
                                      const array_view* grad_state, const array_view& workspace,
                                      const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_log_linear_recurrence_vjp, as_c(log_a), as_c(log_b), as_c(state),
               as_c(segments), axis, reverse, as_c(grad), as_c(grad_log_a), as_c(grad_log_b),
               as_c(grad_state), as_c(workspace), &how);
}

}  // namespace subquad

#endif  // SUBQUAD_SCANS_HPP
