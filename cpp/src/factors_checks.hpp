// What sparse factors ask of their arrays, on every device.
#ifndef SUBQUAD_FACTORS_CHECKS_HPP
#define SUBQUAD_FACTORS_CHECKS_HPP

#include <algorithm>
#include <cstdint>
#include <string>

#include "arguments.hpp"
#include "factors_core.hpp"

namespace subquad {

struct product_sizes {
  std::int64_t batch;
  std::int64_t n_factors;
  std::int64_t n;
  std::int64_t k;
  std::int64_t d;
};

// The arrays that both directions take.
struct factor_chain {
  batch_shape shape{};
  product_sizes size{};
};

inline residual_type checked_residual(std::int32_t residual) {
  if (residual < 0 || residual > 2) {
    throw invalid_argument("residual: expected 0 (none), 1 (step) or 2 (input), got " +
                           std::to_string(residual));
  }
  return static_cast<residual_type>(residual);
}

inline factor_chain check_factor_chain(const array_view& values, const array_view& x,
                                       const array_view* segments, const std::int64_t* offsets) {
  factor_chain chain;
  require_real(values, "values");
  require_rank(values, 3, "values", "(..., M, n, K)");
  require_dtype(x, values.type, "x");
  require_rank(x, 2, "x", "(..., n, d)");
  const std::int64_t n = length_from_end(values, 2);
  require_length(x, 2, n, "x", "(..., n, d)");
  chain.shape.include(values, 3, "values");
  chain.shape.include(x, 2, "x");
  require_segments(segments, n);
  chain.size = {chain.shape.count(), length_from_end(values, 3), n, length_from_end(values, 1),
                length_from_end(x, 1)};
  if (offsets == nullptr && chain.size.n_factors * chain.size.k > 0) {
    throw invalid_argument("offsets: expected M K numbers, got NULL");
  }
  return chain;
}

inline void require_product(const factor_chain& chain, const array_view& array, dtype type,
                            const char* name) {
  const char* expected = "(..., n, d)";
  require_dtype(array, type, name);
  require_rank(array, 2, name, expected);
  require_length(array, 2, chain.size.n, name, expected);
  require_length(array, 1, chain.size.d, name, expected);
}

inline void require_intermediates(const factor_chain& chain, const array_view* intermediates,
                                  dtype type) {
  if (intermediates == nullptr) return;
  const char* expected = "(..., max(M - 1, 0), n, d)";
  require_dtype(*intermediates, type, "intermediates");
  require_rank(*intermediates, 3, "intermediates", expected);
  require_length(*intermediates, 3, std::max<std::int64_t>(chain.size.n_factors - 1, 0),
                 "intermediates", expected);
  require_length(*intermediates, 2, chain.size.n, "intermediates", expected);
  require_length(*intermediates, 1, chain.size.d, "intermediates", expected);
  chain.shape.require(*intermediates, 3, "intermediates");
}

inline factor_chain check_sparse_factor_product(const array_view& values, const array_view& x,
                                                const array_view* segments,
                                                const std::int64_t* offsets, bool transpose,
                                                const array_view& out,
                                                const array_view* intermediates) {
  const factor_chain chain = check_factor_chain(values, x, segments, offsets);
  require_product(chain, out, values.type, "out");
  chain.shape.require(out, 2, "out");
  if (transpose && intermediates != nullptr) {
    throw invalid_argument("intermediates: expected none of a transpose, got an array");
  }
  require_intermediates(chain, intermediates, values.type);
  return chain;
}

inline factor_chain check_sparse_factor_product_vjp(
    const array_view& grad, const array_view& values, const array_view& x,
    const array_view* segments, const array_view* intermediates, const std::int64_t* offsets,
    const array_view* grad_values, const array_view* grad_x) {
  factor_chain chain = check_factor_chain(values, x, segments, offsets);
  require_product(chain, grad, values.type, "grad");
  chain.shape.include(grad, 2, "grad");
  chain.size.batch = chain.shape.count();
  require_intermediates(chain, intermediates, values.type);
  if (grad_values != nullptr) {
    const char* expected = "(..., M, n, K)";
    require_dtype(*grad_values, values.type, "grad_values");
    require_rank(*grad_values, 3, "grad_values", expected);
    require_length(*grad_values, 3, chain.size.n_factors, "grad_values", expected);
    require_length(*grad_values, 2, chain.size.n, "grad_values", expected);
    require_length(*grad_values, 1, chain.size.k, "grad_values", expected);
    chain.shape.require(*grad_values, 3, "grad_values");
  }
  if (grad_x != nullptr) {
    require_product(chain, *grad_x, values.type, "grad_x");
    chain.shape.require(*grad_x, 2, "grad_x");
  }
  return chain;
}

struct network_sizes {
  std::int64_t batch;
  std::int64_t n_factors;
  std::int64_t n;
  std::int64_t d;
  std::int64_t h;
  std::int64_t k;
};

struct factor_networks {
  batch_shape shape{};
  network_sizes size{};
};

// `values` is out or its gradient.
inline factor_networks check_factor_networks(const array_view& x, const array_view& weight_in,
                                             const array_view& bias_in,
                                             const array_view& weight_out,
                                             const array_view* bias_out, const array_view& values,
                                             const char* name) {
  factor_networks networks;
  require_real(x, "x");
  require_rank(x, 2, "x", "(..., n, d)");
  const std::int64_t d = length_from_end(x, 1);
  const auto weights = [&](const array_view& array, const char* what, std::int32_t core,
                           const char* expected) {
    require_dtype(array, x.type, what);
    require_rank(array, core, what, expected);
    networks.shape.include(array, core, what);
  };
  networks.shape.include(x, 2, "x");
  weights(weight_in, "weight_in", 3, "(..., M, h, d)");
  require_length(weight_in, 1, d, "weight_in", "(..., M, h, d)");
  const std::int64_t n_factors = length_from_end(weight_in, 3);
  const std::int64_t h = length_from_end(weight_in, 2);
  weights(bias_in, "bias_in", 2, "(..., M, h)");
  require_length(bias_in, 2, n_factors, "bias_in", "(..., M, h)");
  require_length(bias_in, 1, h, "bias_in", "(..., M, h)");
  weights(weight_out, "weight_out", 3, "(..., M, K, h)");
  require_length(weight_out, 3, n_factors, "weight_out", "(..., M, K, h)");
  require_length(weight_out, 1, h, "weight_out", "(..., M, K, h)");
  const std::int64_t k = length_from_end(weight_out, 2);
  if (bias_out != nullptr) {
    weights(*bias_out, "bias_out", 2, "(..., M, K)");
    require_length(*bias_out, 2, n_factors, "bias_out", "(..., M, K)");
    require_length(*bias_out, 1, k, "bias_out", "(..., M, K)");
  }
  const std::int64_t n = length_from_end(x, 2);
  require_dtype(values, x.type, name);
  require_rank(values, 3, name, "(..., M, n, K)");
  require_length(values, 3, n_factors, name, "(..., M, n, K)");
  require_length(values, 2, n, name, "(..., M, n, K)");
  require_length(values, 1, k, name, "(..., M, n, K)");
  networks.size = {networks.shape.count(), n_factors, n, d, h, k};
  return networks;
}

inline factor_networks check_factor_values(const array_view& x, const array_view& weight_in,
                                           const array_view& bias_in, const array_view& weight_out,
                                           const array_view& bias_out, const array_view& out) {
  const factor_networks networks =
      check_factor_networks(x, weight_in, bias_in, weight_out, &bias_out, out, "out");
  networks.shape.require(out, 3, "out");
  return networks;
}

inline void require_gradient_of(const array_view* gradient, const array_view& array,
                                const char* name, const char* array_name) {
  if (gradient == nullptr) return;
  require_dtype(*gradient, array.type, name);
  require_same_shape(*gradient, array, name, array_name);
}

// The gradient of bias_out has the shape (own batch, M, K), that of weight_out without h.
inline factor_networks check_factor_values_vjp(
    const array_view& grad, const array_view& x, const array_view& weight_in,
    const array_view& bias_in, const array_view& weight_out, const array_view* grad_x,
    const array_view* grad_weight_in, const array_view* grad_bias_in,
    const array_view* grad_weight_out, const array_view* grad_bias_out) {
  factor_networks networks =
      check_factor_networks(x, weight_in, bias_in, weight_out, nullptr, grad, "grad");
  networks.shape.include(grad, 3, "grad");
  networks.size.batch = networks.shape.count();
  if (grad_x != nullptr) {
    require_dtype(*grad_x, x.type, "grad_x");
    require_rank(*grad_x, 2, "grad_x", "(..., n, d)");
    require_length(*grad_x, 2, networks.size.n, "grad_x", "(..., n, d)");
    require_length(*grad_x, 1, networks.size.d, "grad_x", "(..., n, d)");
    networks.shape.require(*grad_x, 2, "grad_x");
  }
  require_gradient_of(grad_weight_in, weight_in, "grad_weight_in", "weight_in");
  require_gradient_of(grad_bias_in, bias_in, "grad_bias_in", "bias_in");
  require_gradient_of(grad_weight_out, weight_out, "grad_weight_out", "weight_out");
  if (grad_bias_out != nullptr) {
    require_dtype(*grad_bias_out, x.type, "grad_bias_out");
    require_rank(*grad_bias_out, 2, "grad_bias_out", "(..., M, K)");
    require_length(*grad_bias_out, 2, networks.size.n_factors, "grad_bias_out", "(..., M, K)");
    require_length(*grad_bias_out, 1, networks.size.k, "grad_bias_out", "(..., M, K)");
    batch_shape with = networks.shape;
    with.include(*grad_bias_out, 2, "grad_bias_out");
    if (with.count() != networks.shape.count()) {
      throw invalid_argument("grad_bias_out: expected the shape of bias_out, got " +
                             shape_text(grad_bias_out->shape, grad_bias_out->ndim));
    }
  }
  return networks;
}

struct csr_sizes {
  std::int64_t batch;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t nnz;
  std::int64_t d;
};

struct csr_call {
  batch_shape shape{};
  csr_sizes size{};
};

// `data` is the matrix's or its gradient.
inline csr_call check_csr(const array_view& data, const char* data_name, const array_view& indices,
                          const array_view& indptr, const array_view& x) {
  csr_call call;
  require_real(data, data_name);
  require_rank(data, 1, data_name, "(nnz,)");
  require_shape(data, data_name, "(nnz,)", {data.shape[0]});
  if (indices.type != dtype::int32 && indices.type != dtype::int64) {
    throw type_error(std::string("indices: expected int32 or int64, got ") +
                     dtype_name(indices.type));
  }
  require_shape(indices, "indices", "(nnz,)", {data.shape[0]});
  require_dtype(indptr, indices.type, "indptr");
  if (indptr.ndim != 1 || indptr.shape[0] < 1) {
    throw invalid_argument("indptr: expected shape (rows + 1,), got " +
                           shape_text(indptr.shape, indptr.ndim));
  }
  require_dtype(x, data.type, "x");
  require_rank(x, 2, "x", "(..., columns, d)");
  call.shape.include(x, 2, "x");
  call.size = {call.shape.count(), indptr.shape[0] - 1, length_from_end(x, 2), data.shape[0],
               length_from_end(x, 1)};
  return call;
}

inline void require_csr_rows(const csr_call& call, const array_view& array, dtype type,
                             const char* name) {
  require_dtype(array, type, name);
  require_rank(array, 2, name, "(..., rows, d)");
  require_length(array, 2, call.size.rows, name, "(..., rows, d)");
  require_length(array, 1, call.size.d, name, "(..., rows, d)");
}

inline csr_call check_csr_product(const array_view& data, const array_view& indices,
                                  const array_view& indptr, const array_view& x,
                                  const array_view* addend, const array_view& out) {
  csr_call call = check_csr(data, "data", indices, indptr, x);
  if (addend != nullptr) {
    require_csr_rows(call, *addend, data.type, "addend");
    call.shape.include(*addend, 2, "addend");
    call.size.batch = call.shape.count();
  }
  require_csr_rows(call, out, data.type, "out");
  call.shape.require(out, 2, "out");
  return call;
}

inline csr_call check_csr_product_vjp(const array_view& grad, const array_view& indices,
                                      const array_view& indptr, const array_view& x,
                                      const array_view& grad_data) {
  csr_call call = check_csr(grad_data, "grad_data", indices, indptr, x);
  require_csr_rows(call, grad, grad_data.type, "grad");
  call.shape.include(grad, 2, "grad");
  call.size.batch = call.shape.count();
  return call;
}

}  // namespace subquad

#endif  // SUBQUAD_FACTORS_CHECKS_HPP
