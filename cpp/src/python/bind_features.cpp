#include "subquad/features.hpp"

#include <cstdint>

#include "bindings.hpp"
#include "dlpack.hpp"

namespace subquad::python {
namespace {

using py::arg;
using py::handle;
using py::pos_only;

void log_features(handle x, handle projection, handle bias, handle diagonal, handle factor,
                  handle shift, handle linear, bool antithetic, bool exponentiate, handle out,
                  handle workspace, std::uintptr_t stream) {
  const input x_view(x, "x");
  const input projection_view(projection, "projection");
  const input bias_view(bias, "bias");
  const optional_input diagonal_view(diagonal, "diagonal");
  const optional_input factor_view(factor, "factor");
  const optional_input shift_view(shift, "shift");
  const optional_input linear_view(linear, "linear");
  const output out_view(out, "out");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::log_features(x_view.view(), projection_view.view(), bias_view.view(),
                        diagonal_view.get(), factor_view.get(), shift_view.get(), linear_view.get(),
                        antithetic, exponentiate, out_view.view(), workspace_view.view(),
                        on(stream));
}

void log_features_vjp(handle grad, handle x, handle projection, handle diagonal, handle factor,
                      handle shift, handle linear, bool antithetic, handle grad_x, handle workspace,
                      std::uintptr_t stream) {
  const input grad_view(grad, "grad");
  const input x_view(x, "x");
  const input projection_view(projection, "projection");
  const optional_input diagonal_view(diagonal, "diagonal");
  const optional_input factor_view(factor, "factor");
  const optional_input shift_view(shift, "shift");
  const optional_input linear_view(linear, "linear");
  const output grad_x_view(grad_x, "grad_x");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::log_features_vjp(grad_view.view(), x_view.view(), projection_view.view(),
                            diagonal_view.get(), factor_view.get(), shift_view.get(),
                            linear_view.get(), antithetic, grad_x_view.view(),
                            workspace_view.view(), on(stream));
}

void trigonometric_features(handle x, handle projection, handle bias, handle diagonal,
                            handle factor, handle shift, handle linear, handle out,
                            handle workspace, std::uintptr_t stream) {
  const input x_view(x, "x");
  const input projection_view(projection, "projection");
  const input bias_view(bias, "bias");
  const optional_input diagonal_view(diagonal, "diagonal");
  const optional_input factor_view(factor, "factor");
  const optional_input shift_view(shift, "shift");
  const optional_input linear_view(linear, "linear");
  const output out_view(out, "out");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::trigonometric_features(x_view.view(), projection_view.view(), bias_view.view(),
                                  diagonal_view.get(), factor_view.get(), shift_view.get(),
                                  linear_view.get(), out_view.view(), workspace_view.view(),
                                  on(stream));
}

void hadamard_transform(handle x, handle out, handle workspace, std::uintptr_t stream) {
  const input x_view(x, "x");
  const output out_view(out, "out");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::hadamard_transform(x_view.view(), out_view.view(), workspace_view.view(), on(stream));
}

}  // namespace

void bind_features(py::module_& module) {
  module.def("log_features_workspace", &subquad_log_features_workspace, arg("batch"), arg("n"),
             arg("m"), arg("d"), arg("r"), arg("itemsize"), arg("device"), pos_only());
  module.def("log_features", &log_features, arg("x"), arg("projection"), arg("bias"),
             arg("diagonal"), arg("factor"), arg("shift"), arg("linear"), arg("antithetic"),
             arg("exponentiate"), arg("out"), arg("workspace"), arg("stream"), pos_only());
  module.def("log_features_vjp_workspace", &subquad_log_features_vjp_workspace, arg("batch"),
             arg("n"), arg("m"), arg("d"), arg("r"), arg("itemsize"), arg("device"), pos_only());
  module.def("log_features_vjp", &log_features_vjp, arg("grad"), arg("x"), arg("projection"),
             arg("diagonal"), arg("factor"), arg("shift"), arg("linear"), arg("antithetic"),
             arg("grad_x"), arg("workspace"), arg("stream"), pos_only());
  module.def("trigonometric_features", &trigonometric_features, arg("x"), arg("projection"),
             arg("bias"), arg("diagonal"), arg("factor"), arg("shift"), arg("linear"), arg("out"),
             arg("workspace"), arg("stream"), pos_only());
  module.def("hadamard_transform_workspace", &subquad_hadamard_transform_workspace, arg("batch"),
             arg("d"), arg("itemsize"), arg("device"), pos_only());
  module.def("hadamard_transform", &hadamard_transform, arg("x"), arg("out"), arg("workspace"),
             arg("stream"), pos_only());
}

}  // namespace subquad::python
