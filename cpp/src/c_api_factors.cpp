// The functions of the concept `factors`, in both libraries: see c_api_call.hpp.
#include <cstddef>
#include <cstdint>

#include "c_api_call.hpp"
#include "factors_checks.hpp"
#include "factors_core.hpp"
#include "subquad/c_api.h"

namespace core = subquad::core;
using subquad::checked_residual;
using subquad::c_api::common_place;
using subquad::c_api::optional_argument;
using subquad::c_api::required_argument;
using subquad::c_api::run;
using subquad::c_api::workspace_size;

size_t subquad_sparse_factor_product_workspace(int64_t batch, int64_t n_factors, int64_t n,
                                               int64_t k, int64_t d, int64_t itemsize,
                                               int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_sparse_factor_product_workspace),
                        core::sparse_factor_product_workspace, device, batch, n_factors, n, k, d,
                        itemsize);
}

subquad_status subquad_sparse_factor_product(const subquad_array* values, const subquad_array* x,
                                             const subquad_array* segments, const int64_t* offsets,
                                             int32_t residual, int32_t circular, int32_t transpose,
                                             const subquad_array* out,
                                             const subquad_array* intermediates,
                                             const subquad_array* workspace,
                                             const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_sparse_factor_product), "values",
      [&](const common_place& at) {
        core::sparse_factor_product(
            required_argument(values, "values", at).get(), required_argument(x, "x", at).get(),
            optional_argument(segments, "segments", at).get(), offsets, checked_residual(residual),
            circular != 0, transpose != 0, required_argument(out, "out", at).get(),
            optional_argument(intermediates, "intermediates", at).get(),
            required_argument(workspace, "workspace", at).get());
      },
      values, x, segments, offsets, residual, circular, transpose, out, intermediates, workspace,
      context, error);
}

size_t subquad_sparse_factor_product_vjp_workspace(int64_t batch, int64_t n_factors, int64_t n,
                                                   int64_t k, int64_t d, int64_t itemsize,
                                                   int32_t recompute, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_sparse_factor_product_vjp_workspace),
                        core::sparse_factor_product_vjp_workspace, device, batch, n_factors, n, k,
                        d, itemsize, recompute);
}

subquad_status subquad_sparse_factor_product_vjp(
    const subquad_array* grad, const subquad_array* values, const subquad_array* x,
    const subquad_array* segments, const subquad_array* intermediates, const int64_t* offsets,
    int32_t residual, int32_t circular, const subquad_array* grad_values,
    const subquad_array* grad_x, const subquad_array* workspace, const subquad_context* context,
    subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_sparse_factor_product_vjp), "grad",
      [&](const common_place& at) {
        core::sparse_factor_product_vjp(required_argument(grad, "grad", at).get(),
                                        required_argument(values, "values", at).get(),
                                        required_argument(x, "x", at).get(),
                                        optional_argument(segments, "segments", at).get(),
                                        optional_argument(intermediates, "intermediates", at).get(),
                                        offsets, checked_residual(residual), circular != 0,
                                        optional_argument(grad_values, "grad_values", at).get(),
                                        optional_argument(grad_x, "grad_x", at).get(),
                                        required_argument(workspace, "workspace", at).get());
      },
      grad, values, x, segments, intermediates, offsets, residual, circular, grad_values, grad_x,
      workspace, context, error);
}

size_t subquad_factor_values_workspace(int64_t batch, int64_t n_factors, int64_t n, int64_t d,
                                       int64_t h, int64_t k, int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_factor_values_workspace),
                        core::factor_values_workspace, device, batch, n_factors, n, d, h, k,
                        itemsize);
}

subquad_status subquad_factor_values(const subquad_array* x, const subquad_array* weight_in,
                                     const subquad_array* bias_in, const subquad_array* weight_out,
                                     const subquad_array* bias_out, const subquad_array* out,
                                     const subquad_array* workspace, const subquad_context* context,
                                     subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_factor_values), "x",
      [&](const common_place& at) {
        core::factor_values(required_argument(x, "x", at).get(),
                            required_argument(weight_in, "weight_in", at).get(),
                            required_argument(bias_in, "bias_in", at).get(),
                            required_argument(weight_out, "weight_out", at).get(),
                            required_argument(bias_out, "bias_out", at).get(),
                            required_argument(out, "out", at).get(),
                            required_argument(workspace, "workspace", at).get());
      },
      x, weight_in, bias_in, weight_out, bias_out, out, workspace, context, error);
}

size_t subquad_factor_values_vjp_workspace(int64_t batch, int64_t n_factors, int64_t n, int64_t d,
                                           int64_t h, int64_t k, int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_factor_values_vjp_workspace),
                        core::factor_values_vjp_workspace, device, batch, n_factors, n, d, h, k,
                        itemsize);
}

subquad_status subquad_factor_values_vjp(
    const subquad_array* grad, const subquad_array* x, const subquad_array* weight_in,
    const subquad_array* bias_in, const subquad_array* weight_out, const subquad_array* grad_x,
    const subquad_array* grad_weight_in, const subquad_array* grad_bias_in,
    const subquad_array* grad_weight_out, const subquad_array* grad_bias_out,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_factor_values_vjp), "grad",
      [&](const common_place& at) {
        core::factor_values_vjp(required_argument(grad, "grad", at).get(),
                                required_argument(x, "x", at).get(),
                                required_argument(weight_in, "weight_in", at).get(),
                                required_argument(bias_in, "bias_in", at).get(),
                                required_argument(weight_out, "weight_out", at).get(),
                                optional_argument(grad_x, "grad_x", at).get(),
                                optional_argument(grad_weight_in, "grad_weight_in", at).get(),
                                optional_argument(grad_bias_in, "grad_bias_in", at).get(),
                                optional_argument(grad_weight_out, "grad_weight_out", at).get(),
                                optional_argument(grad_bias_out, "grad_bias_out", at).get(),
                                required_argument(workspace, "workspace", at).get());
      },
      grad, x, weight_in, bias_in, weight_out, grad_x, grad_weight_in, grad_bias_in,
      grad_weight_out, grad_bias_out, workspace, context, error);
}

size_t subquad_csr_product_workspace(int64_t batch, int64_t rows, int64_t columns, int64_t nnz,
                                     int64_t d, int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_csr_product_workspace), core::csr_product_workspace,
                        device, batch, rows, columns, nnz, d, itemsize);
}

subquad_status subquad_csr_product(const subquad_array* data, const subquad_array* indices,
                                   const subquad_array* indptr, const subquad_array* x,
                                   const subquad_array* addend, double scale,
                                   const subquad_array* out, const subquad_array* workspace,
                                   const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_csr_product), "data",
      [&](const common_place& at) {
        core::csr_product(required_argument(data, "data", at).get(),
                          required_argument(indices, "indices", at).get(),
                          required_argument(indptr, "indptr", at).get(),
                          required_argument(x, "x", at).get(),
                          optional_argument(addend, "addend", at).get(), scale,
                          required_argument(out, "out", at).get(),
                          required_argument(workspace, "workspace", at).get());
      },
      data, indices, indptr, x, addend, scale, out, workspace, context, error);
}

size_t subquad_csr_product_vjp_workspace(int64_t batch, int64_t rows, int64_t columns, int64_t nnz,
                                         int64_t d, int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_csr_product_vjp_workspace),
                        core::csr_product_vjp_workspace, device, batch, rows, columns, nnz, d,
                        itemsize);
}

subquad_status subquad_csr_product_vjp(const subquad_array* grad, const subquad_array* indices,
                                       const subquad_array* indptr, const subquad_array* x,
                                       const subquad_array* grad_data,
                                       const subquad_array* workspace,
                                       const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_csr_product_vjp), "grad",
      [&](const common_place& at) {
        core::csr_product_vjp(required_argument(grad, "grad", at).get(),
                              required_argument(indices, "indices", at).get(),
                              required_argument(indptr, "indptr", at).get(),
                              required_argument(x, "x", at).get(),
                              required_argument(grad_data, "grad_data", at).get(),
                              required_argument(workspace, "workspace", at).get());
      },
      grad, indices, indptr, x, grad_data, workspace, context, error);
}
