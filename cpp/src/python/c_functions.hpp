// The C ABI as _core hands it to the other modules of this package. They carry no second copy of
// the core: the number of threads and the instruction set belong to the process.
#ifndef SUBQUAD_PYTHON_C_FUNCTIONS_HPP
#define SUBQUAD_PYTHON_C_FUNCTIONS_HPP

#include <cstddef>

#include "subquad/c_api.h"

namespace subquad::python {

// The attribute of _core that holds a capsule of this name, whose pointer is a c_functions.
inline constexpr const char* kCFunctionsAttribute = "_c_functions";
inline constexpr const char* kCFunctionsCapsule = "subquad._core._c_functions";

struct c_functions {
  std::size_t size;  // of this struct, where _core was built
  decltype(&subquad_cuda_prepare) cuda_prepare;
  decltype(&subquad_log_normalizer) log_normalizer;
  decltype(&subquad_log_normalizer_vjp) log_normalizer_vjp;
  decltype(&subquad_gaussian_log_normalizer) gaussian_log_normalizer;
  decltype(&subquad_gaussian_log_normalizer_vjp) gaussian_log_normalizer_vjp;
  decltype(&subquad_gaussian_score_moments) gaussian_score_moments;
  decltype(&subquad_nearest_centroids) nearest_centroids;
  decltype(&subquad_component_sums) component_sums;
  decltype(&subquad_component_scatter) component_scatter;
  decltype(&subquad_sample_residuals) sample_residuals;
  decltype(&subquad_logcumsumexp) logcumsumexp;
  decltype(&subquad_logcumsumexp_vjp) logcumsumexp_vjp;
  decltype(&subquad_signed_logcumsumexp) signed_logcumsumexp;
  decltype(&subquad_signed_logcumsumexp_vjp) signed_logcumsumexp_vjp;
  decltype(&subquad_log_linear_recurrence) log_linear_recurrence;
  decltype(&subquad_log_linear_recurrence_vjp) log_linear_recurrence_vjp;
  decltype(&subquad_linear_attention) linear_attention;
  decltype(&subquad_linear_attention_vjp) linear_attention_vjp;
  decltype(&subquad_log_linear_attention) log_linear_attention;
  decltype(&subquad_log_linear_attention_vjp) log_linear_attention_vjp;
  decltype(&subquad_attention_step) attention_step;
  decltype(&subquad_log_features) log_features;
  decltype(&subquad_log_features_vjp) log_features_vjp;
  decltype(&subquad_trigonometric_features) trigonometric_features;
  decltype(&subquad_hadamard_transform) hadamard_transform;
  decltype(&subquad_sparse_factor_product) sparse_factor_product;
  decltype(&subquad_sparse_factor_product_vjp) sparse_factor_product_vjp;
  decltype(&subquad_factor_values) factor_values;
  decltype(&subquad_factor_values_vjp) factor_values_vjp;
  decltype(&subquad_csr_product) csr_product;
  decltype(&subquad_csr_product_vjp) csr_product_vjp;
  decltype(&subquad_embedding_step) embedding_step;
};

}  // namespace subquad::python

#endif  // SUBQUAD_PYTHON_C_FUNCTIONS_HPP
