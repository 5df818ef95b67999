// Linear attention over log-features, its states and its reverse.
//
// Formulas and shapes stand in subquad/c_api.h, function by function under the same names. Optional
// arrays are pointers, null where absent; workspaces are for the device where the arrays lie.
// Throws invalid_argument (a value, rank or size), type_error (an element type or a device),
// device_error (reported by CUDA), out_of_memory or error.
#ifndef SUBQUAD_ATTENTION_HPP
#define SUBQUAD_ATTENTION_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"
#include "subquad/c_api.h"
#include "subquad/call.hpp"

namespace subquad {

inline std::size_t linear_attention_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                              std::int64_t d_k, std::int64_t d_v,
                                              std::int64_t itemsize, bool causal,
                                              device_type device = device_type::cpu) {
  return subquad_linear_attention_workspace(batch, n_q, n, d_k, d_v, itemsize, causal,
                                            static_cast<std::int32_t>(device));
}

inline void linear_attention(const array_view& log_k, const array_view& v, const array_view* log_q,
                             const array_view* log_decay, const array_view* key_mask,
                             const array_view* segments, const array_view* key_sums,
                             const array_view* value_sums, bool causal, bool empty_is_nan,
                             const array_view* y, const array_view* log_z,
                             const array_view* final_key_sums, const array_view* final_value_sums,
                             const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_linear_attention, as_c(log_k), as_c(v), as_c(log_q), as_c(log_decay),
               as_c(key_mask), as_c(segments), as_c(key_sums), as_c(value_sums), causal,
               empty_is_nan, as_c(y), as_c(log_z), as_c(final_key_sums), as_c(final_value_sums),
               as_c(workspace), &how);
}

inline std::size_t linear_attention_vjp_workspace(std::int64_t batch, std::int64_t n_q,
                                                  std::int64_t n, std::int64_t d_k,
                                                  std::int64_t d_v, std::int64_t itemsize,
                                                  bool causal,
                                                  device_type device = device_type::cpu) {
  return subquad_linear_attention_vjp_workspace(batch, n_q, n, d_k, d_v, itemsize, causal,
                                                static_cast<std::int32_t>(device));
}

inline void linear_attention_vjp(
    const array_view& log_k, const array_view& v, const array_view* log_q,
    const array_view* log_decay, const array_view* key_mask, const array_view* segments,
    const array_view* key_sums, const array_view* value_sums, bool causal, const array_view* y,
    const array_view* grad_y, const array_view* grad_log_z, const array_view* grad_final_key_sums,
    const array_view* grad_final_value_sums, const array_view* grad_log_k, const array_view* grad_v,
    const array_view* grad_log_q, const array_view* grad_log_decay, const array_view* grad_key_sums,
    const array_view* grad_value_sums, const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_linear_attention_vjp, as_c(log_k), as_c(v), as_c(log_q), as_c(log_decay),
               as_c(key_mask), as_c(segments), as_c(key_sums), as_c(value_sums), causal, as_c(y),
               as_c(grad_y), as_c(grad_log_z), as_c(grad_final_key_sums),
               as_c(grad_final_value_sums), as_c(grad_log_k), as_c(grad_v), as_c(grad_log_q),
               as_c(grad_log_decay), as_c(grad_key_sums), as_c(grad_value_sums), as_c(workspace),
               &how);
}

inline std::size_t log_linear_attention_workspace(std::int64_t batch, std::int64_t n_q,
                                                  std::int64_t n, std::int64_t d_k,
                                                  std::int64_t d_v, std::int64_t itemsize,
                                                  bool causal,
                                                  device_type device = device_type::cpu) {
  return subquad_log_linear_attention_workspace(batch, n_q, n, d_k, d_v, itemsize, causal,
                                                static_cast<std::int32_t>(device));
}

inline void log_linear_attention(
    const array_view& log_k, const array_view& log_v, const array_view* sign_v,
    const array_view* log_q, const array_view* log_decay, const array_view* key_mask,
    const array_view* segments, const array_view* log_numerator, const array_view* sign_numerator,
    const array_view* log_denominator, bool causal, const array_view* log_y,
    const array_view* sign_y, const array_view* log_z, const array_view* final_log_numerator,
    const array_view* final_sign_numerator, const array_view* final_log_denominator,
    const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_log_linear_attention, as_c(log_k), as_c(log_v), as_c(sign_v), as_c(log_q),
               as_c(log_decay), as_c(key_mask), as_c(segments), as_c(log_numerator),
               as_c(sign_numerator), as_c(log_denominator), causal, as_c(log_y), as_c(sign_y),
               as_c(log_z), as_c(final_log_numerator), as_c(final_sign_numerator),
               as_c(final_log_denominator), as_c(workspace), &how);
}

inline std::size_t log_linear_attention_vjp_workspace(std::int64_t batch, std::int64_t n_q,
                                                      std::int64_t n, std::int64_t d_k,
                                                      std::int64_t d_v, std::int64_t itemsize,
                                                      bool causal,
                                                      device_type device = device_type::cpu) {
  return subquad_log_linear_attention_vjp_workspace(batch, n_q, n, d_k, d_v, itemsize, causal,
                                                    static_cast<std::int32_t>(device));
}

inline void log_linear_attention_vjp(
    const array_view& log_k, const array_view& log_v, const array_view* sign_v,
    const array_view* log_q, const array_view* log_decay, const array_view* key_mask,
    const array_view* segments, const array_view* log_numerator, const array_view* sign_numerator,
    const array_view* log_denominator, bool causal, const array_view* grad_log_y,
    const array_view* grad_log_z, const array_view* grad_final_log_numerator,
    const array_view* grad_final_log_denominator, const array_view* grad_log_k,
    const array_view* grad_log_v, const array_view* grad_log_q, const array_view* grad_log_decay,
    const array_view* grad_log_numerator, const array_view* grad_log_denominator,
    const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_log_linear_attention_vjp, as_c(log_k), as_c(log_v), as_c(sign_v),
               as_c(log_q), as_c(log_decay), as_c(key_mask), as_c(segments), as_c(log_numerator),
               as_c(sign_numerator), as_c(log_denominator), causal, as_c(grad_log_y),
               as_c(grad_log_z), as_c(grad_final_log_numerator), as_c(grad_final_log_denominator),
               as_c(grad_log_k), as_c(grad_log_v), as_c(grad_log_q), as_c(grad_log_decay),
               as_c(grad_log_numerator), as_c(grad_log_denominator), as_c(workspace), &how);
}

inline std::size_t attention_step_workspace(std::int64_t batch, std::int64_t d_k, std::int64_t d_v,
                                            std::int64_t itemsize,
                                            device_type device = device_type::cpu) {
  return subquad_attention_step_workspace(batch, d_k, d_v, itemsize,
                                          static_cast<std::int32_t>(device));
}

inline void attention_step(const array_view& log_k, const array_view& v, const array_view& log_q,
                           const array_view* log_decay, const array_view& key_sums,
                           const array_view& value_sums, const array_view& recent_keys,
                           const array_view& recent_values, const array_view& recent_count,
                           bool empty_is_nan, const array_view& y, const array_view* log_z,
                           const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_attention_step, as_c(log_k), as_c(v), as_c(log_q), as_c(log_decay),
               as_c(key_sums), as_c(value_sums), as_c(recent_keys), as_c(recent_values),
               as_c(recent_count), empty_is_nan, as_c(y), as_c(log_z), as_c(workspace), &how);
}

}  // namespace subquad

#endif  // SUBQUAD_ATTENTION_HPP
