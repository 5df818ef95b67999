// Sparse factors: their products, the networks that make their values, matrices in compressed rows.
//
// Formulas and shapes stand in subquad/c_api.h, function by function under the same names. Optional
// arrays are pointers, null where absent; workspaces are for the device where the arrays lie;
// offsets are in memory of the CPU.
// Throws invalid_argument (a value, rank or size), type_error (an element type or a device),
// device_error (reported by CUDA), out_of_memory or error.
#ifndef SUBQUAD_FACTORS_HPP
#define SUBQUAD_FACTORS_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"
#include "subquad/c_api.h"
#include "subquad/call.hpp"

namespace subquad {

inline std::size_t sparse_factor_product_workspace(std::int64_t batch, std::int64_t n_factors,
                                                   std::int64_t n, std::int64_t k, std::int64_t d,
                                                   std::int64_t itemsize,
                                                   device_type device = device_type::cpu) {
  return subquad_sparse_factor_product_workspace(batch, n_factors, n, k, d, itemsize,
                                                 static_cast<std::int32_t>(device));
}

// `residual` is one of SUBQUAD_RESIDUAL_*.
inline void sparse_factor_product(const array_view& values, const array_view& x,
                                  const array_view* segments, const std::int64_t* offsets,
                                  std::int32_t residual, bool circular, bool transpose,
                                  const array_view& out, const array_view* intermediates,
                                  const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_sparse_factor_product, as_c(values), as_c(x), as_c(segments), offsets,
               residual, static_cast<std::int32_t>(circular), static_cast<std::int32_t>(transpose),
               as_c(out), as_c(intermediates), as_c(workspace), &how);
}

inline std::size_t sparse_factor_product_vjp_workspace(std::int64_t batch, std::int64_t n_factors,
                                                       std::int64_t n, std::int64_t k,
                                                       std::int64_t d, std::int64_t itemsize,
                                                       bool recompute,
                                                       device_type device = device_type::cpu) {
  return subquad_sparse_factor_product_vjp_workspace(batch, n_factors, n, k, d, itemsize,
                                                     static_cast<std::int32_t>(recompute),
                                                     static_cast<std::int32_t>(device));
}

inline void sparse_factor_product_vjp(const array_view& grad, const array_view& values,
                                      const array_view& x, const array_view* segments,
                                      const array_view* intermediates, const std::int64_t* offsets,
                                      std::int32_t residual, bool circular,
                                      const array_view* grad_values, const array_view* grad_x,
                                      const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_sparse_factor_product_vjp, as_c(grad), as_c(values), as_c(x), as_c(segments),
               as_c(intermediates), offsets, residual, static_cast<std::int32_t>(circular),
               as_c(grad_values), as_c(grad_x), as_c(workspace), &how);
}

inline std::size_t factor_values_workspace(std::int64_t batch, std::int64_t n_factors,
                                           std::int64_t n, std::int64_t d, std::int64_t h,
                                           std::int64_t k, std::int64_t itemsize,
                                           device_type device = device_type::cpu) {
  return subquad_factor_values_workspace(batch, n_factors, n, d, h, k, itemsize,
                                         static_cast<std::int32_t>(device));
}

inline void factor_values(const array_view& x, const array_view& weight_in,
                          const array_view& bias_in, const array_view& weight_out,
                          const array_view& bias_out, const array_view& out,
                          const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_factor_values, as_c(x), as_c(weight_in), as_c(bias_in), as_c(weight_out),
               as_c(bias_out), as_c(out), as_c(workspace), &how);
}

inline std::size_t factor_values_vjp_workspace(std::int64_t batch, std::int64_t n_factors,
                                               std::int64_t n, std::int64_t d, std::int64_t h,
                                               std::int64_t k, std::int64_t itemsize,
                                               device_type device = device_type::cpu) {
  return subquad_factor_values_vjp_workspace(batch, n_factors, n, d, h, k, itemsize,
                                             static_cast<std::int32_t>(device));
}

inline void factor_values_vjp(const array_view& grad, const array_view& x,
                              const array_view& weight_in, const array_view& bias_in,
                              const array_view& weight_out, const array_view* grad_x,
                              const array_view* grad_weight_in, const array_view* grad_bias_in,
                              const array_view* grad_weight_out, const array_view* grad_bias_out,
                              const array_view& workspace, const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_factor_values_vjp, as_c(grad), as_c(x), as_c(weight_in), as_c(bias_in),
               as_c(weight_out), as_c(grad_x), as_c(grad_weight_in), as_c(grad_bias_in),
               as_c(grad_weight_out), as_c(grad_bias_out), as_c(workspace), &how);
}

inline std::size_t csr_product_workspace(std::int64_t batch, std::int64_t rows,
                                         std::int64_t columns, std::int64_t nnz, std::int64_t d,
                                         std::int64_t itemsize,
                                         device_type device = device_type::cpu) {
  return subquad_csr_product_workspace(batch, rows, columns, nnz, d, itemsize,
                                       static_cast<std::int32_t>(device));
}

inline void csr_product(const array_view& data, const array_view& indices, const array_view& indptr,
                        const array_view& x, const array_view* addend, double scale,
                        const array_view& out, const array_view& workspace,
                        const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_csr_product, as_c(data), as_c(indices), as_c(indptr), as_c(x), as_c(addend),
               scale, as_c(out), as_c(workspace), &how);
}

inline std::size_t csr_product_vjp_workspace(std::int64_t batch, std::int64_t rows,
                                             std::int64_t columns, std::int64_t nnz, std::int64_t d,
                                             std::int64_t itemsize,
                                             device_type device = device_type::cpu) {
  return subquad_csr_product_vjp_workspace(batch, rows, columns, nnz, d, itemsize,
                                           static_cast<std::int32_t>(device));
}

inline void csr_product_vjp(const array_view& grad, const array_view& indices,
                            const array_view& indptr, const array_view& x,
                            const array_view& grad_data, const array_view& workspace,
                            const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_csr_product_vjp, as_c(grad), as_c(indices), as_c(indptr), as_c(x),
               as_c(grad_data), as_c(workspace), &how);
}

}  // namespace subquad

#endif  // SUBQUAD_FACTORS_HPP
