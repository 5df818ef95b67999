#include "subquad/embedding.hpp"

#include <cstdint>

#include "bindings.hpp"
#include "dlpack.hpp"

namespace subquad::python {
namespace {

using py::arg;
using py::handle;
using py::pos_only;

void embedding_step(handle x, handle data, handle indices, handle indptr, handle rows, double scale,
                    handle log_counts, handle means, handle covariances, handle labels,
                    handle shifts, handle slopes, handle null_weights, handle null, double step,
                    handle out, handle attraction, handle log_z, handle workspace,
                    std::uintptr_t stream) {
  const input x_view(x, "x");
  const optional_input data_view(data, "data");
  const optional_input indices_view(indices, "indices");
  const optional_input indptr_view(indptr, "indptr");
  const input rows_view(rows, "rows");
  const optional_input log_counts_view(log_counts, "log_counts");
  const optional_input means_view(means, "means");
  const optional_input covariances_view(covariances, "covariances");
  const optional_input labels_view(labels, "labels");
  const optional_input shifts_view(shifts, "shifts");
  const optional_input slopes_view(slopes, "slopes");
  const optional_input null_weights_view(null_weights, "null_weights");
  const optional_input null_view(null, "null");
  const optional_output out_view(out, "out");
  const optional_output attraction_view(attraction, "attraction");
  const optional_output log_z_view(log_z, "log_z");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::embedding_step(
      x_view.view(), data_view.get(), indices_view.get(), indptr_view.get(), rows_view.view(),
      scale, log_counts_view.get(), means_view.get(), covariances_view.get(), labels_view.get(),
      shifts_view.get(), slopes_view.get(), null_weights_view.get(), null_view.get(), step,
      out_view.get(), attraction_view.get(), log_z_view.get(), workspace_view.view(), on(stream));
}

}  // namespace

void bind_embedding(py::module_& module) {
  module.def("embedding_step_workspace", &subquad_embedding_step_workspace, arg("n"), arg("m"),
             arg("nnz"), arg("d"), arg("k"), arg("c"), arg("itemsize"), arg("device"), pos_only());
  module.def("embedding_step", &embedding_step, arg("x"), arg("data"), arg("indices"),
             arg("indptr"), arg("rows"), arg("scale"), arg("log_counts"), arg("means"),
             arg("covariances"), arg("labels"), arg("shifts"), arg("slopes"), arg("null_weights"),
             arg("null"), arg("step"), arg("out"), arg("attraction"), arg("log_z"),
             arg("workspace"), arg("stream"), pos_only());
}

}  // namespace subquad::python
