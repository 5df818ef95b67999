// The functions of the concept `factors`, as the C ABI and the Python module call them.
//
// Formulas and shapes stand in subquad/c_api.h. Optional arrays are pointers, null where absent.
// Outputs are written in full. `workspace` is uint8, 1-D, contiguous and at least as long as the
// matching `*_workspace` function says for the broadcast batch; it needs no alignment.
// Throws invalid_argument for a wrong shape and type_error for a wrong element type, naming the
// argument.
#ifndef SUBQUAD_FACTORS_CORE_HPP
#define SUBQUAD_FACTORS_CORE_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"

namespace subquad {

enum class residual_type : std::int32_t { none = 0, step = 1, input = 2 };

}  // namespace subquad

namespace subquad::core {

std::size_t sparse_factor_product_workspace(std::int64_t batch, std::int64_t n_factors,
                                            std::int64_t n, std::int64_t k, std::int64_t d,
                                            std::int64_t itemsize);
void sparse_factor_product(const array_view& values, const array_view& x,
                           const array_view* segments, const std::int64_t* offsets,
                           residual_type residual, bool circular, bool transpose,
                           const array_view& out, const array_view* intermediates,
                           const array_view& workspace);

std::size_t sparse_factor_product_vjp_workspace(std::int64_t batch, std::int64_t n_factors,
                                                std::int64_t n, std::int64_t k, std::int64_t d,
                                                std::int64_t itemsize, bool recompute);
void sparse_factor_product_vjp(const array_view& grad, const array_view& values,
                               const array_view& x, const array_view* segments,
                               const array_view* intermediates, const std::int64_t* offsets,
                               residual_type residual, bool circular, const array_view* grad_values,
                               const array_view* grad_x, const array_view& workspace);

std::size_t factor_values_workspace(std::int64_t batch, std::int64_t n_factors, std::int64_t n,
                                    std::int64_t d, std::int64_t h, std::int64_t k,
                                    std::int64_t itemsize);
void factor_values(const array_view& x, const array_view& weight_in, const array_view& bias_in,
                   const array_view& weight_out, const array_view& bias_out, const array_view& out,
                   const array_view& workspace);

std::size_t factor_values_vjp_workspace(std::int64_t batch, std::int64_t n_factors, std::int64_t n,
                                        std::int64_t d, std::int64_t h, std::int64_t k,
                                        std::int64_t itemsize);
void factor_values_vjp(const array_view& grad, const array_view& x, const array_view& weight_in,
                       const array_view& bias_in, const array_view& weight_out,
                       const array_view* grad_x, const array_view* grad_weight_in,
                       const array_view* grad_bias_in, const array_view* grad_weight_out,
                       const array_view* grad_bias_out, const array_view& workspace);

std::size_t csr_product_workspace(std::int64_t batch, std::int64_t rows, std::int64_t columns,
                                  std::int64_t nnz, std::int64_t d, std::int64_t itemsize);
void csr_product(const array_view& data, const array_view& indices, const array_view& indptr,
                 const array_view& x, const array_view* addend, double scale, const array_view& out,
                 const array_view& workspace);

std::size_t csr_product_vjp_workspace(std::int64_t batch, std::int64_t rows, std::int64_t columns,
                                      std::int64_t nnz, std::int64_t d, std::int64_t itemsize);
void csr_product_vjp(const array_view& grad, const array_view& indices, const array_view& indptr,
                     const array_view& x, const array_view& grad_data, const array_view& workspace);

}  // namespace subquad::core

#endif  // SUBQUAD_FACTORS_CORE_HPP
