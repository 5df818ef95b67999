// What module.cpp registers: one function for each concept.
#ifndef SUBQUAD_PYTHON_BINDINGS_HPP
#define SUBQUAD_PYTHON_BINDINGS_HPP

#include <pybind11/pybind11.h>

#include <cstdint>

#include "subquad/call.hpp"

namespace subquad::python {

// A call on a stream of CUDA, or 0.
inline context on(std::uintptr_t stream) { return {0, reinterpret_cast<void*>(stream)}; }

void bind_c_api(pybind11::module_& module);
void bind_runtime(pybind11::module_& module);  // threads, instruction set, build, exceptions
void bind_vector_math(pybind11::module_& module);
void bind_normalizers(pybind11::module_& module);
void bind_features(pybind11::module_& module);
void bind_embedding(pybind11::module_& module);
void bind_factors(pybind11::module_& module);
void bind_scans(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_rates(pybind11::module_& module);

}  // namespace subquad::python

#endif  // SUBQUAD_PYTHON_BINDINGS_HPP
