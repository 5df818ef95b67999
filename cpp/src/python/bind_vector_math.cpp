#include <string>

#include "array_check.hpp"
#include "bindings.hpp"
#include "dlpack.hpp"
#include "isa.hpp"
#include "subquad/errors.hpp"
#include "vector_math_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(vector_math)

namespace subquad::python {
namespace {

void require_vector(const array_view& view, const char* name) {
  check_place(view, name, {device_type::cpu, 0});
  check_array(view, name);
  if (view.ndim != 1 || (view.shape[0] > 1 && view.strides[0] != 1)) {
    throw invalid_argument(std::string(name) + ": expected a contiguous array of one dimension");
  }
}

void vector_math(const std::string& name, py::handle x_object, py::handle out_object) {
  const input x_argument(x_object, "x");
  const output out_argument(out_object, "out");
  const array_view& x = x_argument.view();
  const array_view& out = out_argument.view();
  require_vector(x, "x");
  require_vector(out, "out");
  if (x.type != dtype::float32 && x.type != dtype::float64) {
    throw type_error("x: expected elements of type float32 or float64");
  }
  if (out.type != x.type) throw type_error("out: expected the element type of x");
  if (out.shape[0] != x.shape[0]) throw invalid_argument("out: expected the length of x");

  const vector_math_kernels& kernels = vector_math_table();
  decltype(kernels.exp_f32) single = nullptr;
  decltype(kernels.exp_f64) double_ = nullptr;
  if (name == "exp") {
    single = kernels.exp_f32;
    double_ = kernels.exp_f64;
  } else if (name == "log") {
    single = kernels.log_f32;
    double_ = kernels.log_f64;
  } else if (name == "log1p") {
    single = kernels.log1p_f32;
    double_ = kernels.log1p_f64;
  } else if (name == "exp2_bounded") {
    single = kernels.exp2_bounded_f32;
    double_ = kernels.exp2_bounded_f64;
  } else if (name == "gelu") {
    single = kernels.gelu_f32;
    double_ = kernels.gelu_f64;
  } else if (name == "gelu_derivative") {
    single = kernels.gelu_derivative_f32;
    double_ = kernels.gelu_derivative_f64;
  } else {
    throw invalid_argument(
        "name: expected 'exp', 'log', 'log1p', 'exp2_bounded', 'gelu' or 'gelu_derivative', got '" +
        name + "'");
  }
  const py::gil_scoped_release unlocked;
  if (x.type == dtype::float32) {
    single(static_cast<const float*>(x.data), static_cast<float*>(out.data), x.shape[0]);
  } else {
    double_(static_cast<const double*>(x.data), static_cast<double*>(out.data), x.shape[0]);
  }
}

}  // namespace

void bind_vector_math(py::module_& module) {
  module.def("vector_math", &vector_math, py::arg("name"), py::arg("x"), py::arg("out"),
             py::pos_only());
}

}  // namespace subquad::python
