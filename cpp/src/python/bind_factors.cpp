#include "subquad/factors.hpp"

#include <cstdint>

#include "bindings.hpp"
#include "dlpack.hpp"

namespace subquad::python {
namespace {

using py::arg;
using py::handle;
using py::pos_only;

// The offsets of every factor: a contiguous array in memory of the CPU.
const std::int64_t* offsets_of(const input& offsets, const array_view& values) {
  const array_view& view = offsets.view();
  const std::int64_t count =
      values.ndim >= 3 ? values.shape[values.ndim - 3] * values.shape[values.ndim - 1] : 0;
  if (view.type != dtype::int64 || view.device != device_type::cpu) {
    throw py::type_error("offsets: expected int64 numbers in memory of the CPU");
  }
  if (view.ndim != 1 || view.shape[0] != count || (count > 1 && view.strides[0] != 1)) {
    throw py::value_error("offsets: expected a contiguous array of " + std::to_string(count) +
                          " numbers");
  }
  return static_cast<const std::int64_t*>(view.data);
}

void sparse_factor_product(handle values, handle x, handle segments, handle offsets,
                           std::int32_t residual, bool circular, bool transpose, handle out,
                           handle intermediates, handle workspace, std::uintptr_t stream) {
  const input values_view(values, "values");
  const input x_view(x, "x");
  const optional_input segments_view(segments, "segments");
  const input offsets_view(offsets, "offsets");
  const output out_view(out, "out");
  const optional_output intermediates_view(intermediates, "intermediates");
  const output workspace_view(workspace, "workspace");
  const std::int64_t* numbers = offsets_of(offsets_view, values_view.view());
  const py::gil_scoped_release unlocked;
  subquad::sparse_factor_product(values_view.view(), x_view.view(), segments_view.get(), numbers,
                                 residual, circular, transpose, out_view.view(),
                                 intermediates_view.get(), workspace_view.view(), on(stream));
}

void sparse_factor_product_vjp(handle grad, handle values, handle x, handle segments,
                               handle intermediates, handle offsets, std::int32_t residual,
                               bool circular, handle grad_values, handle grad_x, handle workspace,
                               std::uintptr_t stream) {
  const input grad_view(grad, "grad");
  const input values_view(values, "values");
  const input x_view(x, "x");
  const optional_input segments_view(segments, "segments");
  const optional_input intermediates_view(intermediates, "intermediates");
  const input offsets_view(offsets, "offsets");
  const optional_output grad_values_view(grad_values, "grad_values");
  const optional_output grad_x_view(grad_x, "grad_x");
  const output workspace_view(workspace, "workspace");
  const std::int64_t* numbers = offsets_of(offsets_view, values_view.view());
  const py::gil_scoped_release unlocked;
  subquad::sparse_factor_product_vjp(grad_view.view(), values_view.view(), x_view.view(),
                                     segments_view.get(), intermediates_view.get(), numbers,
                                     residual, circular, grad_values_view.get(), grad_x_view.get(),
                                     workspace_view.view(), on(stream));
}

void factor_values(handle x, handle weight_in, handle bias_in, handle weight_out, handle bias_out,
                   handle out, handle workspace, std::uintptr_t stream) {
  const input x_view(x, "x");
  const input weight_in_view(weight_in, "weight_in");
  const input bias_in_view(bias_in, "bias_in");
  const input weight_out_view(weight_out, "weight_out");
  const input bias_out_view(bias_out, "bias_out");
  const output out_view(out, "out");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::factor_values(x_view.view(), weight_in_view.view(), bias_in_view.view(),
                         weight_out_view.view(), bias_out_view.view(), out_view.view(),
                         workspace_view.view(), on(stream));
}

void factor_values_vjp(handle grad, handle x, handle weight_in, handle bias_in, handle weight_out,
                       handle grad_x, handle grad_weight_in, handle grad_bias_in,
                       handle grad_weight_out, handle grad_bias_out, handle workspace,
                       std::uintptr_t stream) {
  const input grad_view(grad, "grad");
  const input x_view(x, "x");
  const input weight_in_view(weight_in, "weight_in");
  const input bias_in_view(bias_in, "bias_in");
  const input weight_out_view(weight_out, "weight_out");
  const optional_output grad_x_view(grad_x, "grad_x");
  const optional_output grad_weight_in_view(grad_weight_in, "grad_weight_in");
  const optional_output grad_bias_in_view(grad_bias_in, "grad_bias_in");
  const optional_output grad_weight_out_view(grad_weight_out, "grad_weight_out");
  const optional_output grad_bias_out_view(grad_bias_out, "grad_bias_out");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::factor_values_vjp(
      grad_view.view(), x_view.view(), weight_in_view.view(), bias_in_view.view(),
      weight_out_view.view(), grad_x_view.get(), grad_weight_in_view.get(), grad_bias_in_view.get(),
      grad_weight_out_view.get(), grad_bias_out_view.get(), workspace_view.view(), on(stream));
}

void csr_product(handle data, handle indices, handle indptr, handle x, handle addend, double scale,
                 handle out, handle workspace, std::uintptr_t stream) {
  const input data_view(data, "data");
  const input indices_view(indices, "indices");
  const input indptr_view(indptr, "indptr");
  const input x_view(x, "x");
  const optional_input addend_view(addend, "addend");
  const output out_view(out, "out");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::csr_product(data_view.view(), indices_view.view(), indptr_view.view(), x_view.view(),
                       addend_view.get(), scale, out_view.view(), workspace_view.view(),
                       on(stream));
}

void csr_product_vjp(handle grad, handle indices, handle indptr, handle x, handle grad_data,
                     handle workspace, std::uintptr_t stream) {
  const input grad_view(grad, "grad");
  const input indices_view(indices, "indices");
  const input indptr_view(indptr, "indptr");
  const input x_view(x, "x");
  const output grad_data_view(grad_data, "grad_data");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::csr_product_vjp(grad_view.view(), indices_view.view(), indptr_view.view(), x_view.view(),
                           grad_data_view.view(), workspace_view.view(), on(stream));
}

}  // namespace

void bind_factors(py::module_& module) {
  module.def("sparse_factor_product_workspace", &subquad_sparse_factor_product_workspace,
             arg("batch"), arg("n_factors"), arg("n"), arg("k"), arg("d"), arg("itemsize"),
             arg("device"), pos_only());
  module.def("sparse_factor_product", &sparse_factor_product, arg("values"), arg("x"),
             arg("segments"), arg("offsets"), arg("residual"), arg("circular"), arg("transpose"),
             arg("out"), arg("intermediates"), arg("workspace"), arg("stream"), pos_only());
  module.def("sparse_factor_product_vjp_workspace", &subquad_sparse_factor_product_vjp_workspace,
             arg("batch"), arg("n_factors"), arg("n"), arg("k"), arg("d"), arg("itemsize"),
             arg("recompute"), arg("device"), pos_only());
  module.def("sparse_factor_product_vjp", &sparse_factor_product_vjp, arg("grad"), arg("values"),
             arg("x"), arg("segments"), arg("intermediates"), arg("offsets"), arg("residual"),
             arg("circular"), arg("grad_values"), arg("grad_x"), arg("workspace"), arg("stream"),
             pos_only());
  module.def("factor_values_workspace", &subquad_factor_values_workspace, arg("batch"),
             arg("n_factors"), arg("n"), arg("d"), arg("h"), arg("k"), arg("itemsize"),
             arg("device"), pos_only());
  module.def("factor_values", &factor_values, arg("x"), arg("weight_in"), arg("bias_in"),
             arg("weight_out"), arg("bias_out"), arg("out"), arg("workspace"), arg("stream"),
             pos_only());
  module.def("factor_values_vjp_workspace", &subquad_factor_values_vjp_workspace, arg("batch"),
             arg("n_factors"), arg("n"), arg("d"), arg("h"), arg("k"), arg("itemsize"),
             arg("device"), pos_only());
  module.def("factor_values_vjp", &factor_values_vjp, arg("grad"), arg("x"), arg("weight_in"),
             arg("bias_in"), arg("weight_out"), arg("grad_x"), arg("grad_weight_in"),
             arg("grad_bias_in"), arg("grad_weight_out"), arg("grad_bias_out"), arg("workspace"),
             arg("stream"), pos_only());
  module.def("csr_product_workspace", &subquad_csr_product_workspace, arg("batch"), arg("rows"),
             arg("columns"), arg("nnz"), arg("d"), arg("itemsize"), arg("device"), pos_only());
  module.def("csr_product", &csr_product, arg("data"), arg("indices"), arg("indptr"), arg("x"),
             arg("addend"), arg("scale"), arg("out"), arg("workspace"), arg("stream"), pos_only());
  module.def("csr_product_vjp_workspace", &subquad_csr_product_vjp_workspace, arg("batch"),
             arg("rows"), arg("columns"), arg("nnz"), arg("d"), arg("itemsize"), arg("device"),
             pos_only());
  module.def("csr_product_vjp", &csr_product_vjp, arg("grad"), arg("indices"), arg("indptr"),
             arg("x"), arg("grad_data"), arg("workspace"), arg("stream"), pos_only());
}

}  // namespace subquad::python
