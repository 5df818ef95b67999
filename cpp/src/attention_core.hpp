// The functions of the concept `attention`, as the C ABI and the Python module call them.
//
// Formulas and shapes stand in subquad/c_api.h. Optional arrays are pointers, null where absent.
// Outputs are written in full. `workspace` is uint8, 1-D, contiguous and at least as long as the
// matching `*_workspace` function says; it needs no alignment.
// Throws invalid_argument for a wrong shape and type_error for a wrong element type, naming the
// argument.
#ifndef SUBQUAD_ATTENTION_CORE_HPP
#define SUBQUAD_ATTENTION_CORE_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"

namespace subquad::core {

std::size_t linear_attention_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                       std::int64_t d_k, std::int64_t d_v, std::int64_t itemsize,
                                       bool causal);
void linear_attention(const array_view& log_k, const array_view& v, const array_view* log_q,
                      const array_view* log_decay, const array_view* key_mask,
                      const array_view* segments, const array_view* key_sums,
                      const array_view* value_sums, bool causal, bool empty_is_nan,
                      const array_view* y, const array_view* log_z,
                      const array_view* final_key_sums, const array_view* final_value_sums,
                      const array_view& workspace);

std::size_t linear_attention_vjp_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                           std::int64_t d_k, std::int64_t d_v,
                                           std::int64_t itemsize, bool causal);
void linear_attention_vjp(const array_view& log_k, const array_view& v, const array_view* log_q,
                          const array_view* log_decay, const array_view* key_mask,
                          const array_view* segments, const array_view* key_sums,
                          const array_view* value_sums, bool causal, const array_view* y,
                          const array_view* grad_y, const array_view* grad_log_z,
                          const array_view* grad_final_key_sums,
                          const array_view* grad_final_value_sums, const array_view* grad_log_k,
                          const array_view* grad_v, const array_view* grad_log_q,
                          const array_view* grad_log_decay, const array_view* grad_key_sums,
                          const array_view* grad_value_sums, const array_view& workspace);

std::size_t log_linear_attention_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                           std::int64_t d_k, std::int64_t d_v,
                                           std::int64_t itemsize, bool causal);
void log_linear_attention(const array_view& log_k, const array_view& log_v,
                          const array_view* sign_v, const array_view* log_q,
                          const array_view* log_decay, const array_view* key_mask,
                          const array_view* segments, const array_view* log_numerator,
                          const array_view* sign_numerator, const array_view* log_denominator,
                          bool causal, const array_view* log_y, const array_view* sign_y,
                          const array_view* log_z, const array_view* final_log_numerator,
                          const array_view* final_sign_numerator,
                          const array_view* final_log_denominator, const array_view& workspace);

std::size_t log_linear_attention_vjp_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                               std::int64_t d_k, std::int64_t d_v,
                                               std::int64_t itemsize, bool causal);
void log_linear_attention_vjp(
    const array_view& log_k, const array_view& log_v, const array_view* sign_v,
    const array_view* log_q, const array_view* log_decay, const array_view* key_mask,
    const array_view* segments, const array_view* log_numerator, const array_view* sign_numerator,
    const array_view* log_denominator, bool causal, const array_view* grad_log_y,
    const array_view* grad_log_z, const array_view* grad_final_log_numerator,
    const array_view* grad_final_log_denominator, const array_view* grad_log_k,
    const array_view* grad_log_v, const array_view* grad_log_q, const array_view* grad_log_decay,
    const array_view* grad_log_numerator, const array_view* grad_log_denominator,
    const array_view& workspace);

std::size_t attention_step_workspace(std::int64_t batch, std::int64_t d_k, std::int64_t d_v,
                                     std::int64_t itemsize);
void attention_step(const array_view& log_k, const array_view& v, const array_view& log_q,
                    const array_view* log_decay, const array_view& key_sums,
                    const array_view& value_sums, const array_view& recent_keys,
                    const array_view& recent_values, const array_view& recent_count,
                    bool empty_is_nan, const array_view& y, const array_view* log_z,
                    const array_view& workspace);

}  // namespace subquad::core

#endif  // SUBQUAD_ATTENTION_CORE_HPP
