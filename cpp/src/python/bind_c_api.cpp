#include "bindings.hpp"
#include "c_functions.hpp"

namespace subquad::python {
namespace {

const c_functions kFunctions = {
    sizeof(c_functions),
    &subquad_cuda_prepare,
    &subquad_log_normalizer,
    &subquad_log_normalizer_vjp,
    &subquad_gaussian_log_normalizer,
    &subquad_gaussian_log_normalizer_vjp,
    &subquad_gaussian_score_moments,
    &subquad_nearest_centroids,
    &subquad_component_sums,
    &subquad_component_scatter,
    &subquad_sample_residuals,
    &subquad_logcumsumexp,
    &subquad_logcumsumexp_vjp,
    &subquad_signed_logcumsumexp,
    &subquad_signed_logcumsumexp_vjp,
    &subquad_log_linear_recurrence,
    &subquad_log_linear_recurrence_vjp,
    &subquad_linear_attention,
    &subquad_linear_attention_vjp,
    &subquad_log_linear_attention,
    &subquad_log_linear_attention_vjp,
    &subquad_attention_step,
    &subquad_log_features,
    &subquad_log_features_vjp,
    &subquad_trigonometric_features,
    &subquad_hadamard_transform,
    &subquad_sparse_factor_product,
    &subquad_sparse_factor_product_vjp,
    &subquad_factor_values,
    &subquad_factor_values_vjp,
    &subquad_csr_product,
    &subquad_csr_product_vjp,
    &subquad_embedding_step,
};

}  // namespace

void bind_c_api(pybind11::module_& module) {
  module.attr(kCFunctionsAttribute) = pybind11::capsule(&kFunctions, kCFunctionsCapsule);
}

}  // namespace subquad::python
