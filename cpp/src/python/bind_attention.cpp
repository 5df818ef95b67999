#include "subquad/attention.hpp"

#include <cstdint>

#include "bindings.hpp"
#include "dlpack.hpp"

namespace subquad::python {
namespace {

using py::arg;
using py::handle;
using py::pos_only;

void linear_attention(handle log_k, handle v, handle log_q, handle log_decay, handle key_mask,
                      handle segments, handle key_sums, handle value_sums, bool causal,
                      bool empty_is_nan, handle y, handle log_z, handle final_key_sums,
                      handle final_value_sums, handle workspace, std::uintptr_t stream) {
  const input log_k_view(log_k, "log_k");
  const input v_view(v, "v");
  const optional_input log_q_view(log_q, "log_q");
  const optional_input log_decay_view(log_decay, "log_decay");
  const optional_input key_mask_view(key_mask, "key_mask");
  const optional_input segments_view(segments, "segments");
  const optional_input key_sums_view(key_sums, "key_sums");
  const optional_input value_sums_view(value_sums, "value_sums");
  const optional_output y_view(y, "y");
  const optional_output log_z_view(log_z, "log_z");
  const optional_output final_key_sums_view(final_key_sums, "final_key_sums");
  const optional_output final_value_sums_view(final_value_sums, "final_value_sums");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::linear_attention(log_k_view.view(), v_view.view(), log_q_view.get(),
                            log_decay_view.get(), key_mask_view.get(), segments_view.get(),
                            key_sums_view.get(), value_sums_view.get(), causal, empty_is_nan,
                            y_view.get(), log_z_view.get(), final_key_sums_view.get(),
                            final_value_sums_view.get(), workspace_view.view(), on(stream));
}

void linear_attention_vjp(handle log_k, handle v, handle log_q, handle log_decay, handle key_mask,
                          handle segments, handle key_sums, handle value_sums, bool causal,
                          handle y, handle grad_y, handle grad_log_z, handle grad_final_key_sums,
                          handle grad_final_value_sums, handle grad_log_k, handle grad_v,
                          handle grad_log_q, handle grad_log_decay, handle grad_key_sums,
                          handle grad_value_sums, handle workspace, std::uintptr_t stream) {
  const input log_k_view(log_k, "log_k");
  const input v_view(v, "v");
  const optional_input log_q_view(log_q, "log_q");
  const optional_input log_decay_view(log_decay, "log_decay");
  const optional_input key_mask_view(key_mask, "key_mask");
  const optional_input segments_view(segments, "segments");
  const optional_input key_sums_view(key_sums, "key_sums");
  const optional_input value_sums_view(value_sums, "value_sums");
  const optional_input y_view(y, "y");
  const optional_input grad_y_view(grad_y, "grad_y");
  const optional_input grad_log_z_view(grad_log_z, "grad_log_z");
  const optional_input grad_final_key_sums_view(grad_final_key_sums, "grad_final_key_sums");
  const optional_input grad_final_value_sums_view(grad_final_value_sums, "grad_final_value_sums");
  const optional_output grad_log_k_view(grad_log_k, "grad_log_k");
  const optional_output grad_v_view(grad_v, "grad_v");
  const optional_output grad_log_q_view(grad_log_q, "grad_log_q");
  const optional_output grad_log_decay_view(grad_log_decay, "grad_log_decay");
  const optional_output grad_key_sums_view(grad_key_sums, "grad_key_sums");
  const optional_output grad_value_sums_view(grad_value_sums, "grad_value_sums");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::linear_attention_vjp(
      log_k_view.view(), v_view.view(), log_q_view.get(), log_decay_view.get(), key_mask_view.get(),
      segments_view.get(), key_sums_view.get(), value_sums_view.get(), causal, y_view.get(),
      grad_y_view.get(), grad_log_z_view.get(), grad_final_key_sums_view.get(),
      grad_final_value_sums_view.get(), grad_log_k_view.get(), grad_v_view.get(),
      grad_log_q_view.get(), grad_log_decay_view.get(), grad_key_sums_view.get(),
      grad_value_sums_view.get(), workspace_view.view(), on(stream));
}

void log_linear_attention(handle log_k, handle log_v, handle sign_v, handle log_q, handle log_decay,
                          handle key_mask, handle segments, handle log_numerator,
                          handle sign_numerator, handle log_denominator, bool causal, handle log_y,
                          handle sign_y, handle log_z, handle final_log_numerator,
                          handle final_sign_numerator, handle final_log_denominator,
                          handle workspace, std::uintptr_t stream) {
  const input log_k_view(log_k, "log_k");
  const input log_v_view(log_v, "log_v");
  const optional_input sign_v_view(sign_v, "sign_v");
  const optional_input log_q_view(log_q, "log_q");
  const optional_input log_decay_view(log_decay, "log_decay");
  const optional_input key_mask_view(key_mask, "key_mask");
  const optional_input segments_view(segments, "segments");
  const optional_input log_numerator_view(log_numerator, "log_numerator");
  const optional_input sign_numerator_view(sign_numerator, "sign_numerator");
  const optional_input log_denominator_view(log_denominator, "log_denominator");
  const optional_output log_y_view(log_y, "log_y");
  const optional_output sign_y_view(sign_y, "sign_y");
  const optional_output log_z_view(log_z, "log_z");
  const optional_output final_log_numerator_view(final_log_numerator, "final_log_numerator");
  const optional_output final_sign_numerator_view(final_sign_numerator, "final_sign_numerator");
  const optional_output final_log_denominator_view(final_log_denominator, "final_log_denominator");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::log_linear_attention(
      log_k_view.view(), log_v_view.view(), sign_v_view.get(), log_q_view.get(),
      log_decay_view.get(), key_mask_view.get(), segments_view.get(), log_numerator_view.get(),
      sign_numerator_view.get(), log_denominator_view.get(), causal, log_y_view.get(),
      sign_y_view.get(), log_z_view.get(), final_log_numerator_view.get(),
      final_sign_numerator_view.get(), final_log_denominator_view.get(), workspace_view.view(),
      on(stream));
}

void log_linear_attention_vjp(handle log_k, handle log_v, handle sign_v, handle log_q,
                              handle log_decay, handle key_mask, handle segments,
                              handle log_numerator, handle sign_numerator, handle log_denominator,
                              bool causal, handle grad_log_y, handle grad_log_z,
                              handle grad_final_log_numerator, handle grad_final_log_denominator,
                              handle grad_log_k, handle grad_log_v, handle grad_log_q,
                              handle grad_log_decay, handle grad_log_numerator,
                              handle grad_log_denominator, handle workspace,
                              std::uintptr_t stream) {
  const input log_k_view(log_k, "log_k");
  const input log_v_view(log_v, "log_v");
  const optional_input sign_v_view(sign_v, "sign_v");
  const optional_input log_q_view(log_q, "log_q");
  const optional_input log_decay_view(log_decay, "log_decay");
  const optional_input key_mask_view(key_mask, "key_mask");
  const optional_input segments_view(segments, "segments");
  const optional_input log_numerator_view(log_numerator, "log_numerator");
  const optional_input sign_numerator_view(sign_numerator, "sign_numerator");
  const optional_input log_denominator_view(log_denominator, "log_denominator");
  const optional_input grad_log_y_view(grad_log_y, "grad_log_y");
  const optional_input grad_log_z_view(grad_log_z, "grad_log_z");
  const optional_input grad_final_log_numerator_view(grad_final_log_numerator,
                                                     "grad_final_log_numerator");
  const optional_input grad_final_log_denominator_view(grad_final_log_denominator,
                                                       "grad_final_log_denominator");
  const optional_output grad_log_k_view(grad_log_k, "grad_log_k");
  const optional_output grad_log_v_view(grad_log_v, "grad_log_v");
  const optional_output grad_log_q_view(grad_log_q, "grad_log_q");
  const optional_output grad_log_decay_view(grad_log_decay, "grad_log_decay");
  const optional_output grad_log_numerator_view(grad_log_numerator, "grad_log_numerator");
  const optional_output grad_log_denominator_view(grad_log_denominator, "grad_log_denominator");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::log_linear_attention_vjp(
      log_k_view.view(), log_v_view.view(), sign_v_view.get(), log_q_view.get(),
      log_decay_view.get(), key_mask_view.get(), segments_view.get(), log_numerator_view.get(),
      sign_numerator_view.get(), log_denominator_view.get(), causal, grad_log_y_view.get(),
      grad_log_z_view.get(), grad_final_log_numerator_view.get(),
      grad_final_log_denominator_view.get(), grad_log_k_view.get(), grad_log_v_view.get(),
      grad_log_q_view.get(), grad_log_decay_view.get(), grad_log_numerator_view.get(),
      grad_log_denominator_view.get(), workspace_view.view(), on(stream));
}

void attention_step(handle log_k, handle v, handle log_q, handle log_decay, handle key_sums,
                    handle value_sums, handle recent_keys, handle recent_values,
                    handle recent_count, bool empty_is_nan, handle y, handle log_z,
                    handle workspace, std::uintptr_t stream) {
  const input log_k_view(log_k, "log_k");
  const input v_view(v, "v");
  const input log_q_view(log_q, "log_q");
  const optional_input log_decay_view(log_decay, "log_decay");
  const output key_sums_view(key_sums, "key_sums");
  const output value_sums_view(value_sums, "value_sums");
  const output recent_keys_view(recent_keys, "recent_keys");
  const output recent_values_view(recent_values, "recent_values");
  const output recent_count_view(recent_count, "recent_count");
  const output y_view(y, "y");
  const optional_output log_z_view(log_z, "log_z");
  const output workspace_view(workspace, "workspace");
  const py::gil_scoped_release unlocked;
  subquad::attention_step(log_k_view.view(), v_view.view(), log_q_view.view(), log_decay_view.get(),
                          key_sums_view.view(), value_sums_view.view(), recent_keys_view.view(),
                          recent_values_view.view(), recent_count_view.view(), empty_is_nan,
                          y_view.view(), log_z_view.get(), workspace_view.view(), on(stream));
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("linear_attention_workspace", &subquad_linear_attention_workspace, arg("batch"),
             arg("n_q"), arg("n"), arg("d_k"), arg("d_v"), arg("itemsize"), arg("causal"),
             arg("device"), pos_only());
  module.def("linear_attention", &linear_attention, arg("log_k"), arg("v"), arg("log_q"),
             arg("log_decay"), arg("key_mask"), arg("segments"), arg("key_sums"), arg("value_sums"),
             arg("causal"), arg("empty_is_nan"), arg("y"), arg("log_z"), arg("final_key_sums"),
             arg("final_value_sums"), arg("workspace"), arg("stream"), pos_only());
  module.def("linear_attention_vjp_workspace", &subquad_linear_attention_vjp_workspace,
             arg("batch"), arg("n_q"), arg("n"), arg("d_k"), arg("d_v"), arg("itemsize"),
             arg("causal"), arg("device"), pos_only());
  module.def("linear_attention_vjp", &linear_attention_vjp, arg("log_k"), arg("v"), arg("log_q"),
             arg("log_decay"), arg("key_mask"), arg("segments"), arg("key_sums"), arg("value_sums"),
             arg("causal"), arg("y"), arg("grad_y"), arg("grad_log_z"), arg("grad_final_key_sums"),
             arg("grad_final_value_sums"), arg("grad_log_k"), arg("grad_v"), arg("grad_log_q"),
             arg("grad_log_decay"), arg("grad_key_sums"), arg("grad_value_sums"), arg("workspace"),
             arg("stream"), pos_only());
  module.def("log_linear_attention_workspace", &subquad_log_linear_attention_workspace,
             arg("batch"), arg("n_q"), arg("n"), arg("d_k"), arg("d_v"), arg("itemsize"),
             arg("causal"), arg("device"), pos_only());
  module.def("log_linear_attention", &log_linear_attention, arg("log_k"), arg("log_v"),
             arg("sign_v"), arg("log_q"), arg("log_decay"), arg("key_mask"), arg("segments"),
             arg("log_numerator"), arg("sign_numerator"), arg("log_denominator"), arg("causal"),
             arg("log_y"), arg("sign_y"), arg("log_z"), arg("final_log_numerator"),
             arg("final_sign_numerator"), arg("final_log_denominator"), arg("workspace"),
             arg("stream"), pos_only());
  module.def("log_linear_attention_vjp_workspace", &subquad_log_linear_attention_vjp_workspace,
             arg("batch"), arg("n_q"), arg("n"), arg("d_k"), arg("d_v"), arg("itemsize"),
             arg("causal"), arg("device"), pos_only());
  module.def("log_linear_attention_vjp", &log_linear_attention_vjp, arg("log_k"), arg("log_v"),
             arg("sign_v"), arg("log_q"), arg("log_decay"), arg("key_mask"), arg("segments"),
             arg("log_numerator"), arg("sign_numerator"), arg("log_denominator"), arg("causal"),
             arg("grad_log_y"), arg("grad_log_z"), arg("grad_final_log_numerator"),
             arg("grad_final_log_denominator"), arg("grad_log_k"), arg("grad_log_v"),
             arg("grad_log_q"), arg("grad_log_decay"), arg("grad_log_numerator"),
             arg("grad_log_denominator"), arg("workspace"), arg("stream"), pos_only());
  module.def("attention_step_workspace", &subquad_attention_step_workspace, arg("batch"),
             arg("d_k"), arg("d_v"), arg("itemsize"), arg("device"), pos_only());
  module.def("attention_step", &attention_step, arg("log_k"), arg("v"), arg("log_q"),
             arg("log_decay"), arg("key_sums"), arg("value_sums"), arg("recent_keys"),
             arg("recent_values"), arg("recent_count"), arg("empty_is_nan"), arg("y"), arg("log_z"),
             arg("workspace"), arg("stream"), pos_only());
}

}  // namespace subquad::python
