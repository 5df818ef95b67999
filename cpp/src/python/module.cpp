#include <pybind11/pybind11.h>

#include "bindings.hpp"
#include "isa.hpp"

PYBIND11_MODULE(_core, module, pybind11::mod_gil_not_used()) {
  module.doc() = "Compiled kernels: they fill arrays of the CPU and of CUDA, passed by DLPack.";
  subquad::check_environment();
  subquad::python::bind_c_api(module);
  subquad::python::bind_runtime(module);
  subquad::python::bind_vector_math(module);
  subquad::python::bind_normalizers(module);
  subquad::python::bind_features(module);
  subquad::python::bind_factors(module);
  subquad::python::bind_embedding(module);
  subquad::python::bind_scans(module);
  subquad::python::bind_attention(module);
  subquad::python::bind_rates(module);
}
