// The functions of the concept `scans`, as the C ABI and the Python module call them.
//
// Formulas and shapes stand in subquad/c_api.h. Optional arrays are pointers, null where absent.
// Outputs are written in full. `workspace` is uint8, 1-D, contiguous and at least as long as the
// matching `*_workspace` function says; it needs no alignment.
// Throws invalid_argument for a wrong shape and type_error for a wrong element type, naming the
// argument.
#ifndef SUBQUAD_SCANS_CORE_HPP
#define SUBQUAD_SCANS_CORE_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"

namespace subquad::core {

std::size_t logcumsumexp_workspace(std::int64_t lanes, std::int64_t n, std::int64_t itemsize);
void logcumsumexp(const array_view& x, const array_view* log_sum, const array_view* remainder,
                  const array_view* segments, std::int32_t axis, bool reverse, bool exclusive,
                  const array_view& out, const array_view* final_log_sum,
                  const array_view* final_remainder, const array_view& workspace);

std::size_t logcumsumexp_vjp_workspace(std::int64_t lanes, std::int64_t n, std::int64_t itemsize);
void logcumsumexp_vjp(const array_view& x, const array_view* log_sum, const array_view* remainder,
                      const array_view* segments, std::int32_t axis, bool reverse, bool exclusive,
                      const array_view* grad, const array_view* grad_final,
                      const array_view* grad_x, const array_view* grad_log_sum,
                      const array_view& workspace);

std::size_t signed_logcumsumexp_workspace(std::int64_t lanes, std::int64_t n,
                                          std::int64_t itemsize);
void signed_logcumsumexp(const array_view& x, const array_view& sign, std::int32_t axis,
                         bool reverse, bool exclusive, const array_view& out,
                         const array_view& out_sign, const array_view& workspace);

std::size_t signed_logcumsumexp_vjp_workspace(std::int64_t lanes, std::int64_t n,
                                              std::int64_t itemsize);
void signed_logcumsumexp_vjp(const array_view& x, const array_view& sign, std::int32_t axis,
                             bool reverse, bool exclusive, const array_view& grad,
                             const array_view* grad_x, const array_view* grad_sign,
                             const array_view& workspace);

std::size_t log_linear_recurrence_workspace(std::int64_t lanes, std::int64_t n,
                                            std::int64_t itemsize);
void log_linear_recurrence(const array_view& log_a, const array_view& log_b,
                           const array_view* state, const array_view* segments, std::int32_t axis,
                           bool reverse, const array_view& out, const array_view& workspace);

std::size_t log_linear_recurrence_vjp_workspace(std::int64_t lanes, std::int64_t n,
                                                std::int64_t itemsize);
void log_linear_recurrence_vjp(const array_view& log_a, const array_view& log_b,
                               const array_view* state, const array_view* segments,
                               std::int32_t axis, bool reverse, const array_view& grad,
                               const array_view* grad_log_a, const array_view* grad_log_b,
                               const array_view* grad_state, const array_view& workspace);

}  // namespace subquad::core

#endif  // SUBQUAD_SCANS_CORE_HPP
