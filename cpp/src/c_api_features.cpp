// The functions of the concept `features`, in both libraries: see c_api_call.hpp.
#include <cstddef>
#include <cstdint>

#include "c_api_call.hpp"
#include "features_core.hpp"
#include "subquad/c_api.h"

namespace core = subquad::core;
using subquad::c_api::common_place;
using subquad::c_api::optional_argument;
using subquad::c_api::required_argument;
using subquad::c_api::run;
using subquad::c_api::workspace_size;

size_t subquad_log_features_workspace(int64_t batch, int64_t n, int64_t m, int64_t d, int64_t r,
                                      int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_log_features_workspace),
                        core::log_features_workspace, device, batch, n, m, d, r, itemsize);
}

subquad_status subquad_log_features(const subquad_array* x, const subquad_array* projection,
                                    const subquad_array* bias, const subquad_array* diagonal,
                                    const subquad_array* factor, const subquad_array* shift,
                                    const subquad_array* linear, int32_t antithetic,
                                    int32_t exponentiate, const subquad_array* out,
                                    const subquad_array* workspace, const subquad_context* context,
                                    subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_log_features), "x",
      [&](const common_place& at) {
        core::log_features(required_argument(x, "x", at).get(),
                           required_argument(projection, "projection", at).get(),
                           required_argument(bias, "bias", at).get(),
                           optional_argument(diagonal, "diagonal", at).get(),
                           optional_argument(factor, "factor", at).get(),
                           optional_argument(shift, "shift", at).get(),
                           optional_argument(linear, "linear", at).get(), antithetic != 0,
                           exponentiate != 0, required_argument(out, "out", at).get(),
                           required_argument(workspace, "workspace", at).get());
      },
      x, projection, bias, diagonal, factor, shift, linear, antithetic, exponentiate, out,
      workspace, context, error);
}

size_t subquad_log_features_vjp_workspace(int64_t batch, int64_t n, int64_t m, int64_t d, int64_t r,
                                          int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_log_features_vjp_workspace),
                        core::log_features_vjp_workspace, device, batch, n, m, d, r, itemsize);
}

subquad_status subquad_log_features_vjp(const subquad_array* grad, const subquad_array* x,
                                        const subquad_array* projection,
                                        const subquad_array* diagonal, const subquad_array* factor,
                                        const subquad_array* shift, const subquad_array* linear,
                                        int32_t antithetic, const subquad_array* grad_x,
                                        const subquad_array* workspace,
                                        const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_log_features_vjp), "grad",
      [&](const common_place& at) {
        core::log_features_vjp(required_argument(grad, "grad", at).get(),
                               required_argument(x, "x", at).get(),
                               required_argument(projection, "projection", at).get(),
                               optional_argument(diagonal, "diagonal", at).get(),
                               optional_argument(factor, "factor", at).get(),
                               optional_argument(shift, "shift", at).get(),
                               optional_argument(linear, "linear", at).get(), antithetic != 0,
                               required_argument(grad_x, "grad_x", at).get(),
                               required_argument(workspace, "workspace", at).get());
      },
      grad, x, projection, diagonal, factor, shift, linear, antithetic, grad_x, workspace, context,
      error);
}

subquad_status subquad_trigonometric_features(
    const subquad_array* x, const subquad_array* projection, const subquad_array* bias,
    const subquad_array* diagonal, const subquad_array* factor, const subquad_array* shift,
    const subquad_array* linear, const subquad_array* out, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_trigonometric_features), "x",
      [&](const common_place& at) {
        core::trigonometric_features(required_argument(x, "x", at).get(),
                                     required_argument(projection, "projection", at).get(),
                                     required_argument(bias, "bias", at).get(),
                                     optional_argument(diagonal, "diagonal", at).get(),
                                     optional_argument(factor, "factor", at).get(),
                                     optional_argument(shift, "shift", at).get(),
                                     optional_argument(linear, "linear", at).get(),
                                     required_argument(out, "out", at).get(),
                                     required_argument(workspace, "workspace", at).get());
      },
      x, projection, bias, diagonal, factor, shift, linear, out, workspace, context, error);
}

size_t subquad_hadamard_transform_workspace(int64_t batch, int64_t d, int64_t itemsize,
                                            int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_hadamard_transform_workspace),
                        core::hadamard_transform_workspace, device, batch, d, itemsize);
}

subquad_status subquad_hadamard_transform(const subquad_array* x, const subquad_array* out,
                                          const subquad_array* workspace,
                                          const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_hadamard_transform), "x",
      [&](const common_place& at) {
        core::hadamard_transform(required_argument(x, "x", at).get(),
                                 required_argument(out, "out", at).get(),
                                 required_argument(workspace, "workspace", at).get());
      },
      x, out, workspace, context, error);
}
