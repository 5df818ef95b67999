#include "subquad/scans.hpp"

#include <cstdint>

#include "bindings.hpp"
#include "dlpack.hpp"

namespace subquad::python {
namespace {

using py::arg;
using py::handle;
using py::pos_only;

void logcumsumexp(handle x, handle log_sum, handle remainder, handle segments, std::int32_t axis,
                  bool reverse, bool exclusive, handle out, handle final_log_sum,
                  handle final_remainder, handle workspace, std::uintptr_t stream) {
  const input x_view(x, "x");
  const optional_input log_sum_view(log_sum, "log_sum");
  const optional_input remainder_view(remainder, "remainder");
  const optional_input segments_view(segments, "segments");
  const output out_view(out, "out");
  const optional_output final_log_sum_view(final_log_sum, "final_log_sum");
  const optional_output final_remainder_view(final_remainder, "final_remainder");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::logcumsumexp(x_view.view(), log_sum_view.get(), remainder_view.get(),
                        segments_view.get(), axis, reverse, exclusive, out_view.view(),
                        final_log_sum_view.get(), final_remainder_view.get(), workspace_view.view(),
                        on(stream));
}

void logcumsumexp_vjp(handle x, handle log_sum, handle remainder, handle segments,
                      std::int32_t axis, bool reverse, bool exclusive, handle grad,
                      handle grad_final, handle grad_x, handle grad_log_sum, handle workspace,
                      std::uintptr_t stream) {
  const input x_view(x, "x");
  const optional_input log_sum_view(log_sum, "log_sum");
  const optional_input remainder_view(remainder, "remainder");
  const optional_input segments_view(segments, "segments");
  const optional_input grad_view(grad, "grad");
  const optional_input grad_final_view(grad_final, "grad_final");
  const optional_output grad_x_view(grad_x, "grad_x");
  const optional_output grad_log_sum_view(grad_log_sum, "grad_log_sum");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::logcumsumexp_vjp(x_view.view(), log_sum_view.get(), remainder_view.get(),
                            segments_view.get(), axis, reverse, exclusive, grad_view.get(),
                            grad_final_view.get(), grad_x_view.get(), grad_log_sum_view.get(),
                            workspace_view.view(), on(stream));
}

void signed_logcumsumexp(handle x, handle sign, std::int32_t axis, bool reverse, bool exclusive,
                         handle out, handle out_sign, handle workspace, std::uintptr_t stream) {
  const input x_view(x, "x");
  const input sign_view(sign, "sign");
  const output out_view(out, "out");
  const output out_sign_view(out_sign, "out_sign");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::signed_logcumsumexp(x_view.view(), sign_view.view(), axis, reverse, exclusive,
                               out_view.view(), out_sign_view.view(), workspace_view.view(),
                               on(stream));
}

void signed_logcumsumexp_vjp(handle x, handle sign, std::int32_t axis, bool reverse, bool exclusive,
                             handle grad, handle grad_x, handle grad_sign, handle workspace,
                             std::uintptr_t stream) {
  const input x_view(x, "x");
  const input sign_view(sign, "sign");
  const input grad_view(grad, "grad");
  const optional_output grad_x_view(grad_x, "grad_x");
  const optional_output grad_sign_view(grad_sign, "grad_sign");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::signed_logcumsumexp_vjp(x_view.view(), sign_view.view(), axis, reverse, exclusive,
                                   grad_view.view(), grad_x_view.get(), grad_sign_view.get(),
                                   workspace_view.view(), on(stream));
}

void log_linear_recurrence(handle log_a, handle log_b, handle state, handle segments,
                           std::int32_t axis, bool reverse, handle out, handle workspace,
                           std::uintptr_t stream) {
  const input log_a_view(log_a, "log_a");
  const input log_b_view(log_b, "log_b");
  const optional_input state_view(state, "state");
  const optional_input segments_view(segments, "segments");
  const output out_view(out, "out");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::log_linear_recurrence(log_a_view.view(), log_b_view.view(), state_view.get(),
                                 segments_view.get(), axis, reverse, out_view.view(),
                                 workspace_view.view(), on(stream));
}

void log_linear_recurrence_vjp(handle log_a, handle log_b, handle state, handle segments,
                               std::int32_t axis, bool reverse, handle grad, handle grad_log_a,
                               handle grad_log_b, handle grad_state, handle workspace,
                               std::uintptr_t stream) {
  const input log_a_view(log_a, "log_a");
  const input log_b_view(log_b, "log_b");
  const optional_input state_view(state, "state");
  const optional_input segments_view(segments, "segments");
  const input grad_view(grad, "grad");
  const optional_output grad_log_a_view(grad_log_a, "grad_log_a");
  const optional_output grad_log_b_view(grad_log_b, "grad_log_b");
  const optional_output grad_state_view(grad_state, "grad_state");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::log_linear_recurrence_vjp(log_a_view.view(), log_b_view.view(), state_view.get(),
                                     segments_view.get(), axis, reverse, grad_view.view(),
                                     grad_log_a_view.get(), grad_log_b_view.get(),
                                     grad_state_view.get(), workspace_view.view(), on(stream));
}

}  // namespace

void bind_scans(py::module_& module) {
  module.def("logcumsumexp_workspace", &subquad_logcumsumexp_workspace, arg("lanes"), arg("n"),
             arg("itemsize"), arg("device"), pos_only());
  module.def("logcumsumexp", &logcumsumexp, arg("x"), arg("log_sum"), arg("remainder"),
             arg("segments"), arg("axis"), arg("reverse"), arg("exclusive"), arg("out"),
             arg("final_log_sum"), arg("final_remainder"), arg("workspace"), arg("stream"),
             pos_only());
  module.def("logcumsumexp_vjp_workspace", &subquad_logcumsumexp_vjp_workspace, arg("lanes"),
             arg("n"), arg("itemsize"), arg("device"), pos_only());
  module.def("logcumsumexp_vjp", &logcumsumexp_vjp, arg("x"), arg("log_sum"), arg("remainder"),
             arg("segments"), arg("axis"), arg("reverse"), arg("exclusive"), arg("grad"),
             arg("grad_final"), arg("grad_x"), arg("grad_log_sum"), arg("workspace"), arg("stream"),
             pos_only());
  module.def("signed_logcumsumexp_workspace", &subquad_signed_logcumsumexp_workspace, arg("lanes"),
             arg("n"), arg("itemsize"), arg("device"), pos_only());
  module.def("signed_logcumsumexp", &signed_logcumsumexp, arg("x"), arg("sign"), arg("axis"),
             arg("reverse"), arg("exclusive"), arg("out"), arg("out_sign"), arg("workspace"),
             arg("stream"), pos_only());
  module.def("signed_logcumsumexp_vjp_workspace", &subquad_signed_logcumsumexp_vjp_workspace,
             arg("lanes"), arg("n"), arg("itemsize"), arg("device"), pos_only());
  module.def("signed_logcumsumexp_vjp", &signed_logcumsumexp_vjp, arg("x"), arg("sign"),
             arg("axis"), arg("reverse"), arg("exclusive"), arg("grad"), arg("grad_x"),
             arg("grad_sign"), arg("workspace"), arg("stream"), pos_only());
  module.def("log_linear_recurrence_workspace", &subquad_log_linear_recurrence_workspace,
             arg("lanes"), arg("n"), arg("itemsize"), arg("device"), pos_only());
  module.def("log_linear_recurrence", &log_linear_recurrence, arg("log_a"), arg("log_b"),
             arg("state"), arg("segments"), arg("axis"), arg("reverse"), arg("out"),
             arg("workspace"), arg("stream"), pos_only());
  module.def("log_linear_recurrence_vjp_workspace", &subquad_log_linear_recurrence_vjp_workspace,
             arg("lanes"), arg("n"), arg("itemsize"), arg("device"), pos_only());
  module.def("log_linear_recurrence_vjp", &log_linear_recurrence_vjp, arg("log_a"), arg("log_b"),
             arg("state"), arg("segments"), arg("axis"), arg("reverse"), arg("grad"),
             arg("grad_log_a"), arg("grad_log_b"), arg("grad_state"), arg("workspace"),
             arg("stream"), pos_only());
}

}  // namespace subquad::python
