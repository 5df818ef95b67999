#include <pybind11/typing.h>

#include <cstdint>
#include <exception>
#include <string>

#include "bindings.hpp"
#include "dlpack.hpp"
#include "isa.hpp"
#include "parallel.hpp"
#include "subquad/c_api.h"
#include "subquad/errors.hpp"

namespace subquad::python {
namespace {

py::typing::List<py::str> isa_levels() {
  py::list levels;
  for (int i = 0; i < isa_level_count(); ++i) levels.append(isa_name(isa_level_at(i)));
  return levels;
}

py::typing::Dict<py::str, py::object> build_config() {
  py::dict config;
  config["version"] = SUBQUAD_VERSION;
  config["compiler"] = SUBQUAD_COMPILER;
  config["build_type"] = SUBQUAD_BUILD_TYPE;
  config["cxx_standard"] = static_cast<int>(__cplusplus / 100 % 100);
  config["openmp"] = static_cast<int>(_OPENMP);
  config["isa_levels"] = isa_levels();
  return config;
}

py::typing::Dict<py::str, py::object> cuda_info() {
  subquad_cuda_info info{};
  {
    const py::gil_scoped_release unlocked;
    detail::call(subquad_cuda_query, &info);
  }
  py::dict found;
  found["runtime_version"] = info.runtime_version;
  found["driver_version"] = info.driver_version;
  found["device_count"] = info.device_count;
  found["architectures"] = info.architectures;
  found["problem"] = info.problem;
  return found;
}

void cuda_prepare(std::int32_t device_id) {
  const py::gil_scoped_release unlocked;
  detail::call(subquad_cuda_prepare, device_id);
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const invalid_argument& e) {
    py::set_error(PyExc_ValueError, e.what());
  } catch (const type_error& e) {
    py::set_error(PyExc_TypeError, e.what());
  } catch (const error& e) {
    py::set_error(PyExc_RuntimeError, e.what());
  }
}

}  // namespace

void bind_runtime(py::module_& module) {
  py::register_local_exception_translator(translate);
  module.def("set_num_threads", &request_num_threads, py::arg("n_threads"), py::pos_only());
  module.def("get_num_threads", &available_threads);
  module.def(
      "set_isa", [](const std::string& level) { select_isa(level); }, py::arg("level"),
      py::pos_only());
  module.def("get_isa", [] { return isa_name(current_isa()); });
  module.def("isa_levels", &isa_levels);
  module.def("build_config", &build_config);
  module.def("cuda_info", &cuda_info);
  module.def("cuda_prepare", &cuda_prepare, py::arg("device_id"), py::pos_only());
  module.def("_dlpack_layout", [] {
    return py::typing::Dict<py::str,
                            py::typing::Tuple<py::int_, py::typing::Tuple<py::int_, py::ellipsis>>>(
        dlpack_layout());
  });
}

}  // namespace subquad::python
