// The functions of the concept `attention`, in both libraries: see c_api_call.hpp.
#include "attention_core.hpp"

#include <cstddef>
#include <cstdint>

#include "c_api_call.hpp"
#include "subquad/c_api.h"

namespace core = subquad::core;
using subquad::c_api::common_place;
using subquad::c_api::optional_argument;
using subquad::c_api::required_argument;
using subquad::c_api::run;
using subquad::c_api::workspace_size;

size_t subquad_linear_attention_workspace(int64_t batch, int64_t n_q, int64_t n, int64_t d_k,
                                          int64_t d_v, int64_t itemsize, int32_t causal,
                                          int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_linear_attention_workspace),
                        core::linear_attention_workspace, device, batch, n_q, n, d_k, d_v, itemsize,
                        causal);
}

subquad_status subquad_linear_attention(
    const subquad_array* log_k, const subquad_array* v, const subquad_array* log_q,
    const subquad_array* log_decay, const subquad_array* key_mask, const subquad_array* segments,
    const subquad_array* key_sums, const subquad_array* value_sums, int32_t causal,
    int32_t empty_is_nan, const subquad_array* y, const subquad_array* log_z,
    const subquad_array* final_key_sums, const subquad_array* final_value_sums,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_linear_attention), "log_k",
      [&](const common_place& at) {
        core::linear_attention(
            required_argument(log_k, "log_k", at).get(), required_argument(v, "v", at).get(),
            optional_argument(log_q, "log_q", at).get(),
            optional_argument(log_decay, "log_decay", at).get(),
            optional_argument(key_mask, "key_mask", at).get(),
            optional_argument(segments, "segments", at).get(),
            optional_argument(key_sums, "key_sums", at).get(),
            optional_argument(value_sums, "value_sums", at).get(), causal != 0, empty_is_nan != 0,
            optional_argument(y, "y", at).get(), optional_argument(log_z, "log_z", at).get(),
            optional_argument(final_key_sums, "final_key_sums", at).get(),
            optional_argument(final_value_sums, "final_value_sums", at).get(),
            required_argument(workspace, "workspace", at).get());
      },
      log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums, causal, empty_is_nan, y,
      log_z, final_key_sums, final_value_sums, workspace, context, error);
}

size_t subquad_linear_attention_vjp_workspace(int64_t batch, int64_t n_q, int64_t n, int64_t d_k,
                                              int64_t d_v, int64_t itemsize, int32_t causal,
                                              int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_linear_attention_vjp_workspace),
                        core::linear_attention_vjp_workspace, device, batch, n_q, n, d_k, d_v,
                        itemsize, causal);
}

subquad_status subquad_linear_attention_vjp(
    const subquad_array* log_k, const subquad_array* v, const subquad_array* log_q,
    const subquad_array* log_decay, const subquad_array* key_mask, const subquad_array* segments,
    const subquad_array* key_sums, const subquad_array* value_sums, int32_t causal,
    const subquad_array* y, const subquad_array* grad_y, const subquad_array* grad_log_z,
    const subquad_array* grad_final_key_sums, const subquad_array* grad_final_value_sums,
    const subquad_array* grad_log_k, const subquad_array* grad_v, const subquad_array* grad_log_q,
    const subquad_array* grad_log_decay, const subquad_array* grad_key_sums,
    const subquad_array* grad_value_sums, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_linear_attention_vjp), "log_k",
      [&](const common_place& at) {
        core::linear_attention_vjp(
            required_argument(log_k, "log_k", at).get(), required_argument(v, "v", at).get(),
            optional_argument(log_q, "log_q", at).get(),
            optional_argument(log_decay, "log_decay", at).get(),
            optional_argument(key_mask, "key_mask", at).get(),
            optional_argument(segments, "segments", at).get(),
            optional_argument(key_sums, "key_sums", at).get(),
            optional_argument(value_sums, "value_sums", at).get(), causal != 0,
            optional_argument(y, "y", at).get(), optional_argument(grad_y, "grad_y", at).get(),
            optional_argument(grad_log_z, "grad_log_z", at).get(),
            optional_argument(grad_final_key_sums, "grad_final_key_sums", at).get(),
            optional_argument(grad_final_value_sums, "grad_final_value_sums", at).get(),
            optional_argument(grad_log_k, "grad_log_k", at).get(),
            optional_argument(grad_v, "grad_v", at).get(),
            optional_argument(grad_log_q, "grad_log_q", at).get(),
            optional_argument(grad_log_decay, "grad_log_decay", at).get(),
            optional_argument(grad_key_sums, "grad_key_sums", at).get(),
            optional_argument(grad_value_sums, "grad_value_sums", at).get(),
            required_argument(workspace, "workspace", at).get());
      },
      log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums, causal, y, grad_y,
      grad_log_z, grad_final_key_sums, grad_final_value_sums, grad_log_k, grad_v, grad_log_q,
      grad_log_decay, grad_key_sums, grad_value_sums, workspace, context, error);
}

size_t subquad_log_linear_attention_workspace(int64_t batch, int64_t n_q, int64_t n, int64_t d_k,
                                              int64_t d_v, int64_t itemsize, int32_t causal,
                                              int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_log_linear_attention_workspace),
                        core::log_linear_attention_workspace, device, batch, n_q, n, d_k, d_v,
                        itemsize, causal);
}

subquad_status subquad_log_linear_attention(
    const subquad_array* log_k, const subquad_array* log_v, const subquad_array* sign_v,
    const subquad_array* log_q, const subquad_array* log_decay, const subquad_array* key_mask,
    const subquad_array* segments, const subquad_array* log_numerator,
    const subquad_array* sign_numerator, const subquad_array* log_denominator, int32_t causal,
    const subquad_array* log_y, const subquad_array* sign_y, const subquad_array* log_z,
    const subquad_array* final_log_numerator, const subquad_array* final_sign_numerator,
    const subquad_array* final_log_denominator, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_log_linear_attention), "log_k",
      [&](const common_place& at) {
        core::log_linear_attention(
            required_argument(log_k, "log_k", at).get(),
            required_argument(log_v, "log_v", at).get(),
            optional_argument(sign_v, "sign_v", at).get(),
            optional_argument(log_q, "log_q", at).get(),
            optional_argument(log_decay, "log_decay", at).get(),
            optional_argument(key_mask, "key_mask", at).get(),
            optional_argument(segments, "segments", at).get(),
            optional_argument(log_numerator, "log_numerator", at).get(),
            optional_argument(sign_numerator, "sign_numerator", at).get(),
            optional_argument(log_denominator, "log_denominator", at).get(), causal != 0,
            optional_argument(log_y, "log_y", at).get(),
            optional_argument(sign_y, "sign_y", at).get(),
            optional_argument(log_z, "log_z", at).get(),
            optional_argument(final_log_numerator, "final_log_numerator", at).get(),
            optional_argument(final_sign_numerator, "final_sign_numerator", at).get(),
            optional_argument(final_log_denominator, "final_log_denominator", at).get(),
            required_argument(workspace, "workspace", at).get());
      },
      log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, log_numerator, sign_numerator,
      log_denominator, causal, log_y, sign_y, log_z, final_log_numerator, final_sign_numerator,
      final_log_denominator, workspace, context, error);
}

size_t subquad_log_linear_attention_vjp_workspace(int64_t batch, int64_t n_q, int64_t n,
                                                  int64_t d_k, int64_t d_v, int64_t itemsize,
                                                  int32_t causal, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_log_linear_attention_vjp_workspace),
                        core::log_linear_attention_vjp_workspace, device, batch, n_q, n, d_k, d_v,
                        itemsize, causal);
}

subquad_status subquad_log_linear_attention_vjp(
    const subquad_array* log_k, const subquad_array* log_v, const subquad_array* sign_v,
    const subquad_array* log_q, const subquad_array* log_decay, const subquad_array* key_mask,
    const subquad_array* segments, const subquad_array* log_numerator,
    const subquad_array* sign_numerator, const subquad_array* log_denominator, int32_t causal,
    const subquad_array* grad_log_y, const subquad_array* grad_log_z,
    const subquad_array* grad_final_log_numerator, const subquad_array* grad_final_log_denominator,
    const subquad_array* grad_log_k, const subquad_array* grad_log_v,
    const subquad_array* grad_log_q, const subquad_array* grad_log_decay,
    const subquad_array* grad_log_numerator, const subquad_array* grad_log_denominator,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_log_linear_attention_vjp), "log_k",
      [&](const common_place& at) {
        core::log_linear_attention_vjp(
            required_argument(log_k, "log_k", at).get(),
            required_argument(log_v, "log_v", at).get(),
            optional_argument(sign_v, "sign_v", at).get(),
            optional_argument(log_q, "log_q", at).get(),
            optional_argument(log_decay, "log_decay", at).get(),
            optional_argument(key_mask, "key_mask", at).get(),
            optional_argument(segments, "segments", at).get(),
            optional_argument(log_numerator, "log_numerator", at).get(),
            optional_argument(sign_numerator, "sign_numerator", at).get(),
            optional_argument(log_denominator, "log_denominator", at).get(), causal != 0,
            optional_argument(grad_log_y, "grad_log_y", at).get(),
            optional_argument(grad_log_z, "grad_log_z", at).get(),
            optional_argument(grad_final_log_numerator, "grad_final_log_numerator", at).get(),
            optional_argument(grad_final_log_denominator, "grad_final_log_denominator", at).get(),
            optional_argument(grad_log_k, "grad_log_k", at).get(),
            optional_argument(grad_log_v, "grad_log_v", at).get(),
            optional_argument(grad_log_q, "grad_log_q", at).get(),
            optional_argument(grad_log_decay, "grad_log_decay", at).get(),
            optional_argument(grad_log_numerator, "grad_log_numerator", at).get(),
            optional_argument(grad_log_denominator, "grad_log_denominator", at).get(),
            required_argument(workspace, "workspace", at).get());
      },
      log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, log_numerator, sign_numerator,
      log_denominator, causal, grad_log_y, grad_log_z, grad_final_log_numerator,
      grad_final_log_denominator, grad_log_k, grad_log_v, grad_log_q, grad_log_decay,
      grad_log_numerator, grad_log_denominator, workspace, context, error);
}

size_t subquad_attention_step_workspace(int64_t batch, int64_t d_k, int64_t d_v, int64_t itemsize,
                                        int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_attention_step_workspace),
                        core::attention_step_workspace, device, batch, d_k, d_v, itemsize);
}

subquad_status subquad_attention_step(
    const subquad_array* log_k, const subquad_array* v, const subquad_array* log_q,
    const subquad_array* log_decay, const subquad_array* key_sums, const subquad_array* value_sums,
    const subquad_array* recent_keys, const subquad_array* recent_values,
    const subquad_array* recent_count, int32_t empty_is_nan, const subquad_array* y,
    const subquad_array* log_z, const subquad_array* workspace, const subquad_context* context,
    subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_attention_step), "log_k",
      [&](const common_place& at) {
        core::attention_step(
            required_argument(log_k, "log_k", at).get(), required_argument(v, "v", at).get(),
            required_argument(log_q, "log_q", at).get(),
            optional_argument(log_decay, "log_decay", at).get(),
            required_argument(key_sums, "key_sums", at).get(),
            required_argument(value_sums, "value_sums", at).get(),
            required_argument(recent_keys, "recent_keys", at).get(),
            required_argument(recent_values, "recent_values", at).get(),
            required_argument(recent_count, "recent_count", at).get(), empty_is_nan != 0,
            required_argument(y, "y", at).get(), optional_argument(log_z, "log_z", at).get(),
            required_argument(workspace, "workspace", at).get());
      },
      log_k, v, log_q, log_decay, key_sums, value_sums, recent_keys, recent_values, recent_count,
      empty_is_nan, y, log_z, workspace, context, error);
}
