#include <cstdint>

#include "bindings.hpp"
#include "dlpack.hpp"
#include "subquad/normalizers.hpp"

namespace subquad::python {
namespace {

using py::arg;
using py::handle;
using py::pos_only;

void log_normalizer(handle x, handle y, handle log_weights, handle excluded, handle out,
                    handle workspace, std::uintptr_t stream) {
  const input x_view(x, "x");
  const input y_view(y, "y");
  const optional_input log_weights_view(log_weights, "log_weights");
  const optional_input excluded_view(excluded, "excluded");
  const output out_view(out, "out");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::log_normalizer(x_view.view(), y_view.view(), log_weights_view.get(), excluded_view.get(),
                          out_view.view(), workspace_view.view(), on(stream));
}

void log_normalizer_vjp(handle grad, handle x, handle y, handle log_weights, handle excluded,
                        handle log_z, handle grad_x, handle grad_y, handle grad_log_weights,
                        handle workspace, std::uintptr_t stream) {
  const input grad_view(grad, "grad");
  const input x_view(x, "x");
  const input y_view(y, "y");
  const optional_input log_weights_view(log_weights, "log_weights");
  const optional_input excluded_view(excluded, "excluded");
  const input log_z_view(log_z, "log_z");
  const optional_output grad_x_view(grad_x, "grad_x");
  const optional_output grad_y_view(grad_y, "grad_y");
  const optional_output grad_log_weights_view(grad_log_weights, "grad_log_weights");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::log_normalizer_vjp(grad_view.view(), x_view.view(), y_view.view(),
                              log_weights_view.get(), excluded_view.get(), log_z_view.view(),
                              grad_x_view.get(), grad_y_view.get(), grad_log_weights_view.get(),
                              workspace_view.view(), on(stream));
}

void gaussian_log_normalizer(handle x, handle log_counts, handle means, handle factors,
                             handle diagonal, handle own_component, handle own_log_weight,
                             bool include_own, handle out, handle workspace,
                             std::uintptr_t stream) {
  const input x_view(x, "x");
  const input log_counts_view(log_counts, "log_counts");
  const input means_view(means, "means");
  const input factors_view(factors, "factors");
  const optional_input diagonal_view(diagonal, "diagonal");
  const optional_input own_component_view(own_component, "own_component");
  const optional_input own_log_weight_view(own_log_weight, "own_log_weight");
  const output out_view(out, "out");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::gaussian_log_normalizer(x_view.view(), log_counts_view.view(), means_view.view(),
                                   factors_view.view(), diagonal_view.get(),
                                   own_component_view.get(), own_log_weight_view.get(), include_own,
                                   out_view.view(), workspace_view.view(), on(stream));
}

void gaussian_log_normalizer_vjp(handle grad, handle x, handle log_counts, handle means,
                                 handle factors, handle diagonal, handle log_z, handle grad_x,
                                 handle grad_log_counts, handle grad_means, handle grad_factors,
                                 handle grad_diagonal, handle workspace, std::uintptr_t stream) {
  const input grad_view(grad, "grad");
  const input x_view(x, "x");
  const input log_counts_view(log_counts, "log_counts");
  const input means_view(means, "means");
  const input factors_view(factors, "factors");
  const optional_input diagonal_view(diagonal, "diagonal");
  const input log_z_view(log_z, "log_z");
  const optional_output grad_x_view(grad_x, "grad_x");
  const optional_output grad_log_counts_view(grad_log_counts, "grad_log_counts");
  const optional_output grad_means_view(grad_means, "grad_means");
  const optional_output grad_factors_view(grad_factors, "grad_factors");
  const optional_output grad_diagonal_view(grad_diagonal, "grad_diagonal");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::gaussian_log_normalizer_vjp(
      grad_view.view(), x_view.view(), log_counts_view.view(), means_view.view(),
      factors_view.view(), diagonal_view.get(), log_z_view.view(), grad_x_view.get(),
      grad_log_counts_view.get(), grad_means_view.get(), grad_factors_view.get(),
      grad_diagonal_view.get(), workspace_view.view(), on(stream));
}

void gaussian_score_moments(handle x, handle means, handle factors, handle diagonal, handle mean,
                            handle variance, handle workspace, std::uintptr_t stream) {
  const input x_view(x, "x");
  const input means_view(means, "means");
  const input factors_view(factors, "factors");
  const optional_input diagonal_view(diagonal, "diagonal");
  const output mean_view(mean, "mean");
  const output variance_view(variance, "variance");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::gaussian_score_moments(x_view.view(), means_view.view(), factors_view.view(),
                                  diagonal_view.get(), mean_view.view(), variance_view.view(),
                                  workspace_view.view(), on(stream));
}

void nearest_centroids(handle x, handle centroids, handle offsets, handle labels, handle score,
                       handle workspace, std::uintptr_t stream) {
  const input x_view(x, "x");
  const input centroids_view(centroids, "centroids");
  const input offsets_view(offsets, "offsets");
  const output labels_view(labels, "labels");
  const output score_view(score, "score");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::nearest_centroids(x_view.view(), centroids_view.view(), offsets_view.view(),
                             labels_view.view(), score_view.view(), workspace_view.view(),
                             on(stream));
}

void component_sums(handle y, handle labels, handle weights, handle counts, handle sums,
                    handle workspace, std::uintptr_t stream) {
  const input y_view(y, "y");
  const input labels_view(labels, "labels");
  const optional_input weights_view(weights, "weights");
  const output counts_view(counts, "counts");
  const output sums_view(sums, "sums");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::component_sums(y_view.view(), labels_view.view(), weights_view.get(), counts_view.view(),
                          sums_view.view(), workspace_view.view(), on(stream));
}

void component_scatter(handle y, handle labels, handle weights, handle means, handle scatter,
                       handle radii, handle workspace, std::uintptr_t stream) {
  const input y_view(y, "y");
  const input labels_view(labels, "labels");
  const optional_input weights_view(weights, "weights");
  const input means_view(means, "means");
  const output scatter_view(scatter, "scatter");
  const output radii_view(radii, "radii");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::component_scatter(y_view.view(), labels_view.view(), weights_view.get(),
                             means_view.view(), scatter_view.view(), radii_view.view(),
                             workspace_view.view(), on(stream));
}

void sample_residuals(handle x, handle deviations, handle weights, handle offsets, handle variance,
                      handle scale, handle shift, handle excluded, bool quadratic,
                      handle log_factor, handle log_error, handle third, handle workspace,
                      std::uintptr_t stream) {
  const input x_view(x, "x");
  const input deviations_view(deviations, "deviations");
  const input weights_view(weights, "weights");
  const input offsets_view(offsets, "offsets");
  const input variance_view(variance, "variance");
  const input scale_view(scale, "scale");
  const optional_input shift_view(shift, "shift");
  const optional_input excluded_view(excluded, "excluded");
  const output log_factor_view(log_factor, "log_factor");
  const output log_error_view(log_error, "log_error");
  const output third_view(third, "third");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::sample_residuals(x_view.view(), deviations_view.view(), weights_view.view(),
                            offsets_view.view(), variance_view.view(), scale_view.view(),
                            shift_view.get(), excluded_view.get(), quadratic,
                            log_factor_view.view(), log_error_view.view(), third_view.view(),
                            workspace_view.view(), on(stream));
}

}  // namespace

void bind_normalizers(py::module_& module) {
  module.def("log_normalizer_workspace", &subquad_log_normalizer_workspace, arg("batch"), arg("n"),
             arg("m"), arg("d"), arg("itemsize"), arg("device"), pos_only());
  module.def("log_normalizer", &log_normalizer, arg("x"), arg("y"), arg("log_weights"),
             arg("excluded"), arg("out"), arg("workspace"), arg("stream"), pos_only());
  module.def("log_normalizer_vjp_workspace", &subquad_log_normalizer_vjp_workspace, arg("batch"),
             arg("n"), arg("m"), arg("d"), arg("itemsize"), arg("device"), pos_only());
  module.def("log_normalizer_vjp", &log_normalizer_vjp, arg("grad"), arg("x"), arg("y"),
             arg("log_weights"), arg("excluded"), arg("log_z"), arg("grad_x"), arg("grad_y"),
             arg("grad_log_weights"), arg("workspace"), arg("stream"), pos_only());
  module.def("gaussian_log_normalizer_workspace", &subquad_gaussian_log_normalizer_workspace,
             arg("batch"), arg("n"), arg("k"), arg("d"), arg("r"), arg("itemsize"), arg("device"),
             pos_only());
  module.def("gaussian_log_normalizer", &gaussian_log_normalizer, arg("x"), arg("log_counts"),
             arg("means"), arg("factors"), arg("diagonal"), arg("own_component"),
             arg("own_log_weight"), arg("include_own"), arg("out"), arg("workspace"), arg("stream"),
             pos_only());
  module.def("gaussian_log_normalizer_vjp_workspace",
             &subquad_gaussian_log_normalizer_vjp_workspace, arg("batch"), arg("n"), arg("k"),
             arg("d"), arg("r"), arg("itemsize"), arg("device"), pos_only());
  module.def("gaussian_log_normalizer_vjp", &gaussian_log_normalizer_vjp, arg("grad"), arg("x"),
             arg("log_counts"), arg("means"), arg("factors"), arg("diagonal"), arg("log_z"),
             arg("grad_x"), arg("grad_log_counts"), arg("grad_means"), arg("grad_factors"),
             arg("grad_diagonal"), arg("workspace"), arg("stream"), pos_only());
  module.def("gaussian_score_moments_workspace", &subquad_gaussian_score_moments_workspace,
             arg("n"), arg("k"), arg("d"), arg("r"), arg("itemsize"), arg("device"), pos_only());
  module.def("gaussian_score_moments", &gaussian_score_moments, arg("x"), arg("means"),
             arg("factors"), arg("diagonal"), arg("mean"), arg("variance"), arg("workspace"),
             arg("stream"), pos_only());
  module.def("nearest_centroids_workspace", &subquad_nearest_centroids_workspace, arg("n"),
             arg("k"), arg("d"), arg("itemsize"), arg("device"), pos_only());
  module.def("nearest_centroids", &nearest_centroids, arg("x"), arg("centroids"), arg("offsets"),
             arg("labels"), arg("score"), arg("workspace"), arg("stream"), pos_only());
  module.def("component_sums_workspace", &subquad_component_sums_workspace, arg("n"), arg("k"),
             arg("d"), arg("itemsize"), arg("device"), pos_only());
  module.def("component_sums", &component_sums, arg("y"), arg("labels"), arg("weights"),
             arg("counts"), arg("sums"), arg("workspace"), arg("stream"), pos_only());
  module.def("component_scatter_workspace", &subquad_component_scatter_workspace, arg("n"),
             arg("k"), arg("d"), arg("itemsize"), arg("diagonal"), arg("device"), pos_only());
  module.def("component_scatter", &component_scatter, arg("y"), arg("labels"), arg("weights"),
             arg("means"), arg("scatter"), arg("radii"), arg("workspace"), arg("stream"),
             pos_only());
  module.def("sample_residuals_workspace", &subquad_sample_residuals_workspace, arg("n"), arg("d"),
             arg("largest"), arg("itemsize"), arg("device"), pos_only());
  module.def("sample_residuals", &sample_residuals, arg("x"), arg("deviations"), arg("weights"),
             arg("offsets"), arg("variance"), arg("scale"), arg("shift"), arg("excluded"),
             arg("quadratic"), arg("log_factor"), arg("log_error"), arg("third"), arg("workspace"),
             arg("stream"), pos_only());
}

}  // namespace subquad::python
