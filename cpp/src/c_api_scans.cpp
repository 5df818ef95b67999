// The functions of the concept `scans`, in both libraries: see c_api_call.hpp.
#include "scans_core.hpp"

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

size_t subquad_logcumsumexp_workspace(int64_t lanes, int64_t n, int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_logcumsumexp_workspace),
                        core::logcumsumexp_workspace, device, lanes, n, itemsize);
}

subquad_status subquad_logcumsumexp(const subquad_array* x, const subquad_array* log_sum,
                                    const subquad_array* remainder, const subquad_array* segments,
                                    int32_t axis, int32_t reverse, int32_t exclusive,
                                    const subquad_array* out, const subquad_array* final_log_sum,
                                    const subquad_array* final_remainder,
                                    const subquad_array* workspace, const subquad_context* context,
                                    subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_logcumsumexp), "x",
      [&](const common_place& at) {
        core::logcumsumexp(required_argument(x, "x", at).get(),
                           optional_argument(log_sum, "log_sum", at).get(),
                           optional_argument(remainder, "remainder", at).get(),
                           optional_argument(segments, "segments", at).get(), axis, reverse != 0,
                           exclusive != 0, required_argument(out, "out", at).get(),
                           optional_argument(final_log_sum, "final_log_sum", at).get(),
                           optional_argument(final_remainder, "final_remainder", at).get(),
                           required_argument(workspace, "workspace", at).get());
      },
      x, log_sum, remainder, segments, axis, reverse, exclusive, out, final_log_sum,
      final_remainder, workspace, context, error);
}

size_t subquad_logcumsumexp_vjp_workspace(int64_t lanes, int64_t n, int64_t itemsize,
                                          int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_logcumsumexp_vjp_workspace),
                        core::logcumsumexp_vjp_workspace, device, lanes, n, itemsize);
}

subquad_status subquad_logcumsumexp_vjp(
    const subquad_array* x, const subquad_array* log_sum, const subquad_array* remainder,
    const subquad_array* segments, int32_t axis, int32_t reverse, int32_t exclusive,
    const subquad_array* grad, const subquad_array* grad_final, const subquad_array* grad_x,
    const subquad_array* grad_log_sum, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_logcumsumexp_vjp), "x",
      [&](const common_place& at) {
        core::logcumsumexp_vjp(
            required_argument(x, "x", at).get(), optional_argument(log_sum, "log_sum", at).get(),
            optional_argument(remainder, "remainder", at).get(),
            optional_argument(segments, "segments", at).get(), axis, reverse != 0, exclusive != 0,
            optional_argument(grad, "grad", at).get(),
            optional_argument(grad_final, "grad_final", at).get(),
            optional_argument(grad_x, "grad_x", at).get(),
            optional_argument(grad_log_sum, "grad_log_sum", at).get(),
            required_argument(workspace, "workspace", at).get());
      },
      x, log_sum, remainder, segments, axis, reverse, exclusive, grad, grad_final, grad_x,
      grad_log_sum, workspace, context, error);
}

size_t subquad_signed_logcumsumexp_workspace(int64_t lanes, int64_t n, int64_t itemsize,
                                             int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_signed_logcumsumexp_workspace),
                        core::signed_logcumsumexp_workspace, device, lanes, n, itemsize);
}

subquad_status subquad_signed_logcumsumexp(const subquad_array* x, const subquad_array* sign,
                                           int32_t axis, int32_t reverse, int32_t exclusive,
                                           const subquad_array* out, const subquad_array* out_sign,
                                           const subquad_array* workspace,
                                           const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_signed_logcumsumexp), "x",
      [&](const common_place& at) {
        core::signed_logcumsumexp(required_argument(x, "x", at).get(),
                                  required_argument(sign, "sign", at).get(), axis, reverse != 0,
                                  exclusive != 0, required_argument(out, "out", at).get(),
                                  required_argument(out_sign, "out_sign", at).get(),
                                  required_argument(workspace, "workspace", at).get());
      },
      x, sign, axis, reverse, exclusive, out, out_sign, workspace, context, error);
}

size_t subquad_signed_logcumsumexp_vjp_workspace(int64_t lanes, int64_t n, int64_t itemsize,
                                                 int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_signed_logcumsumexp_vjp_workspace),
                        core::signed_logcumsumexp_vjp_workspace, device, lanes, n, itemsize);
}

subquad_status subquad_signed_logcumsumexp_vjp(
    const subquad_array* x, const subquad_array* sign, int32_t axis, int32_t reverse,
    int32_t exclusive, const subquad_array* grad, const subquad_array* grad_x,
    const subquad_array* grad_sign, const subquad_array* workspace, const subquad_context* context,
    subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_signed_logcumsumexp_vjp), "x",
      [&](const common_place& at) {
        core::signed_logcumsumexp_vjp(required_argument(x, "x", at).get(),
                                      required_argument(sign, "sign", at).get(), axis, reverse != 0,
                                      exclusive != 0, required_argument(grad, "grad", at).get(),
                                      optional_argument(grad_x, "grad_x", at).get(),
                                      optional_argument(grad_sign, "grad_sign", at).get(),
                                      required_argument(workspace, "workspace", at).get());
      },
      x, sign, axis, reverse, exclusive, grad, grad_x, grad_sign, workspace, context, error);
}

size_t subquad_log_linear_recurrence_workspace(int64_t lanes, int64_t n, int64_t itemsize,
                                               int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_log_linear_recurrence_workspace),
                        core::log_linear_recurrence_workspace, device, lanes, n, itemsize);
}

subquad_status subquad_log_linear_recurrence(const subquad_array* log_a, const subquad_array* log_b,
                                             const subquad_array* state,
                                             const subquad_array* segments, int32_t axis,
                                             int32_t reverse, const subquad_array* out,
                                             const subquad_array* workspace,
                                             const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_log_linear_recurrence), "log_a",
      [&](const common_place& at) {
        core::log_linear_recurrence(required_argument(log_a, "log_a", at).get(),
                                    required_argument(log_b, "log_b", at).get(),
                                    optional_argument(state, "state", at).get(),
                                    optional_argument(segments, "segments", at).get(), axis,
                                    reverse != 0, required_argument(out, "out", at).get(),
                                    required_argument(workspace, "workspace", at).get());
      },
      log_a, log_b, state, segments, axis, reverse, out, workspace, context, error);
}

size_t subquad_log_linear_recurrence_vjp_workspace(int64_t lanes, int64_t n, int64_t itemsize,
                                                   int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_log_linear_recurrence_vjp_workspace),
                        core::log_linear_recurrence_vjp_workspace, device, lanes, n, itemsize);
}

subquad_status subquad_log_linear_recurrence_vjp(
    const subquad_array* log_a, const subquad_array* log_b, const subquad_array* state,
    const subquad_array* segments, int32_t axis, int32_t reverse, const subquad_array* grad,
    const subquad_array* grad_log_a, const subquad_array* grad_log_b,
    const subquad_array* grad_state, const subquad_array* workspace, const subquad_context* context,
    subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_log_linear_recurrence_vjp), "log_a",
      [&](const common_place& at) {
        core::log_linear_recurrence_vjp(required_argument(log_a, "log_a", at).get(),
                                        required_argument(log_b, "log_b", at).get(),
                                        optional_argument(state, "state", at).get(),
                                        optional_argument(segments, "segments", at).get(), axis,
                                        reverse != 0, required_argument(grad, "grad", at).get(),
                                        optional_argument(grad_log_a, "grad_log_a", at).get(),
                                        optional_argument(grad_log_b, "grad_log_b", at).get(),
                                        optional_argument(grad_state, "grad_state", at).get(),
                                        required_argument(workspace, "workspace", at).get());
      },
      log_a, log_b, state, segments, axis, reverse, grad, grad_log_a, grad_log_b, grad_state,
      workspace, context, error);
}
