// Linear attention over log-features.
#include "attention_checks.hpp"
#include "attention_core.hpp"
#include "attention_outputs.cuh"

namespace subquad::cuda {
namespace {

// What a call keeps between its kernels.
template <class T>
struct forward_workspace {
  attention_states<T> states;
  int* undone;
  std::size_t bytes;

  forward_workspace(workspace_layout workspace, std::int64_t batch, std::int64_t n_q,
                    std::int64_t n, std::int64_t d_k, std::int64_t d_v, bool causal,
                    bool has_later) {
    states.take(workspace, batch, n, d_k, d_v, causal, has_later);
    undone = workspace.take<int>(output_blocks(batch, n_q, d_v));
    bytes = workspace.size();
  }
};

template <class T>
void linear_attention_as(const attention_shape& shape, const attention_inputs<T>& in,
                         bool empty_is_nan, const array_view* y, const array_view* log_z,
                         const array_view* final_key_sums, const array_view* final_value_sums,
                         const array_view& workspace) {
  if (in.size == 0) return;
  const forward_workspace<T> kept(workspace_layout(workspace), in.size, in.n_q, in.n, in.d_k,
                                  in.d_v, in.attended == reach::causal,
                                  in.attended == reach::run && in.log_q);
  const attention_states<T>& states = kept.states;
  state_outputs<T> final_state{};
  if (final_key_sums) {
    final_state.key_sums = matrix_at<T>(*final_key_sums, 0);
    final_state.value_sums = stack_at<T>(*final_value_sums, 0);
    final_state.batch = batches_of<2>(shape.batch, {{final_key_sums, 2}, {final_value_sums, 3}});
  }
  const bool has_rows = (y || log_z) && in.log_q;
  // One chunk that nothing comes before attends itself alone.
  const bool needs_states = in.attended == reach::all || in.key_sums || in.key_chunks() > 1;
  if (final_key_sums || (has_rows && needs_states)) states.find(in, nullptr, final_state);
  if (!has_rows) return;
  row_outputs<T> out{};
  if (y) out.y = matrix_at<T>(*y, 0);
  if (log_z) out.log_z = vector_at<T>(*log_z, 0);
  out.batch = batches_of<2>(shape.batch, {{y, 2}, {log_z, 1}});
  out.empty_is_nan = empty_is_nan;
  find_outputs(in, states, out, row_sums<T>{}, kept.undone);
}

template <class T>
std::size_t workspace_as(std::int64_t batch, std::int64_t n_q, std::int64_t n, std::int64_t d_k,
                         std::int64_t d_v, bool causal) {
  return forward_workspace<T>(workspace_layout(), batch, n_q, n, d_k, d_v, causal,
                              !causal && n_q == n)
      .bytes;
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t linear_attention_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                       std::int64_t d_k, std::int64_t d_v, std::int64_t itemsize,
                                       bool causal) {
  return itemsize == 8 ? cuda::workspace_as<double>(batch, n_q, n, d_k, d_v, causal)
                       : cuda::workspace_as<float>(batch, n_q, n, d_k, d_v, causal);
}

void linear_attention(const array_view& log_k, const array_view& v, const array_view* log_q,
                      const array_view* log_decay, const array_view* key_mask,
                      const array_view* segments, const array_view* key_sums,
                      const array_view* value_sums, bool causal, bool empty_is_nan,
                      const array_view* y, const array_view* log_z,
                      const array_view* final_key_sums, const array_view* final_value_sums,
                      const array_view& workspace) {
  const attention_shape shape =
      check_linear_attention(log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums,
                             causal, y, log_z, final_key_sums, final_value_sums);
  cuda::for_real_type(shape.type, [&](auto element) {
    using T = decltype(element);
    const cuda::attention_inputs<T> in(shape, log_k, v, log_q, log_decay, key_mask, segments,
                                       key_sums, value_sums, causal);
    cuda::linear_attention_as<T>(shape, in, empty_is_nan, y, log_z, final_key_sums,
                                 final_value_sums, workspace);
  });
}

}  // namespace subquad::core
