#include "bindings.hpp"
#include "rates.hpp"

namespace subquad::python {

void bind_rates(pybind11::module_& module) {
  namespace py = pybind11;
  module.def(
      "measure_rate",
      [](const std::string& name, std::int64_t itemsize, std::int64_t depth, double seconds) {
        const py::gil_scoped_release released;
        return measure_rate(name, itemsize, depth, seconds);
      },
      py::arg("name"), py::arg("itemsize"), py::arg("depth") = 1, py::arg("seconds") = 0.1);
}

}  // namespace subquad::python
