#include "arguments.hpp"
#include "attention_checks.hpp"
#include "attention_core.hpp"
#include "isa.hpp"
#include "kernels/log_attention_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(log_attention)

namespace subquad::core {
namespace {

template <class T>
const log_attention_functions<T>& functions();
template <>
const log_attention_functions<float>& functions() {
  return log_attention_table().f32;
}
template <>
const log_attention_functions<double>& functions() {
  return log_attention_table().f64;
}

log_attention_sizes sizes_of(const attention_shape& shape, bool causal) {
  return {shape.n_q, shape.n, shape.d_k, shape.d_v, causal};
}

int threads_of(const attention_shape& shape, double products, int slots) {
  const auto rows = static_cast<double>(shape.n + shape.n_q);
  const auto width = static_cast<double>((shape.d_k + 32) * (shape.d_v + 33));
  return threads_for(products * static_cast<double>(shape.batch.count()) * rows * width, slots);
}

// The parts of an array for one member of the batch, empty where it is absent.
struct batch_member {
  const batch_shape& batch;
  std::int64_t index;

  template <class T>
  matrix_view<T> matrix(const array_view* array) const {
    return array ? matrix_at<T>(*array, batch.offset(*array, 2, index)) : matrix_view<T>{};
  }
  template <class T>
  vector_view<T> vector(const array_view* array) const {
    return array ? vector_at<T>(*array, batch.offset(*array, 1, index)) : vector_view<T>{};
  }
};

// Every optional argument of both directions.
struct log_attention_arrays {
  const array_view* log_k;
  const array_view* log_v;
  const array_view* sign_v;
  const array_view* log_q;
  const array_view* log_decay;
  const array_view* key_mask;
  const array_view* segments;
  const array_view* log_numerator;
  const array_view* sign_numerator;
  const array_view* log_denominator;
  bool causal;

  template <class T>
  log_attention_inputs<T> inputs(const attention_shape& shape, const batch_member& at) const {
    log_attention_inputs<T> in{};
    in.sizes = sizes_of(shape, causal);
    in.log_k = at.matrix<const T>(log_k);
    in.log_v = at.matrix<const T>(log_v);
    in.sign_v = at.matrix<const T>(sign_v);
    in.log_q = at.matrix<const T>(log_q);
    in.log_decay = at.matrix<const T>(log_decay);
    in.key_mask = at.vector<const std::uint8_t>(key_mask);
    if (segments) in.segments = vector_at<const std::int64_t>(*segments, 0);
    in.has_state = log_denominator != nullptr;
    in.log_numerator = at.matrix<const T>(log_numerator);
    in.sign_numerator = at.matrix<const T>(sign_numerator);
    in.log_denominator = at.vector<const T>(log_denominator);
    return in;
  }
};

struct log_attention_outputs {
  const array_view* log_y;
  const array_view* sign_y;
  const array_view* log_z;
  const array_view* final_log_numerator;
  const array_view* final_sign_numerator;
  const array_view* final_log_denominator;
};

template <class T>
void log_linear_attention_as(const attention_shape& shape, const log_attention_arrays& arrays,
                             const log_attention_outputs& out, const array_view& workspace) {
  const auto& kernels = functions<T>();
  const std::int64_t batch = shape.batch.count();
  workspace_layout pieces(workspace);
  const auto slots =
      pieces.take_slots(kernels.log_attention_scratch(sizes_of(shape, arrays.causal)), batch);
  parallel_for(batch, threads_of(shape, 3, slots.count), [&](std::int64_t index, int slot) {
    const batch_member at{shape.batch, index};
    log_attention_task<T> task{};
    task.inputs = arrays.inputs<T>(shape, at);
    task.log_y = at.matrix<T>(out.log_y);
    task.sign_y = at.matrix<T>(out.sign_y);
    task.log_z = at.vector<T>(out.log_z);
    task.final_log_numerator = at.matrix<T>(out.final_log_numerator);
    task.final_sign_numerator = at.matrix<T>(out.final_sign_numerator);
    task.final_log_denominator = at.vector<T>(out.final_log_denominator);
    task.scratch = slots[slot];
    kernels.log_attention(task);
  });
}

struct log_attention_gradients {
  const array_view* grad_log_y;
  const array_view* grad_log_z;
  const array_view* grad_final_log_numerator;
  const array_view* grad_final_log_denominator;
  const array_view* grad_log_k;
  const array_view* grad_log_v;
  const array_view* grad_log_q;
  const array_view* grad_log_decay;
  const array_view* grad_log_numerator;
  const array_view* grad_log_denominator;
};

template <class T>
void log_linear_attention_vjp_as(const attention_shape& shape, const log_attention_arrays& arrays,
                                 const log_attention_gradients& of, const array_view& workspace) {
  const auto& kernels = functions<T>();
  const std::int64_t batch = shape.batch.count();
  workspace_layout pieces(workspace);
  const auto slots =
      pieces.take_slots(kernels.log_attention_vjp_scratch(sizes_of(shape, arrays.causal)), batch);
  parallel_for(batch, threads_of(shape, 8, slots.count), [&](std::int64_t index, int slot) {
    const batch_member at{shape.batch, index};
    log_attention_vjp_task<T> task{};
    task.inputs = arrays.inputs<T>(shape, at);
    task.grad_log_y = at.matrix<const T>(of.grad_log_y);
    task.grad_log_z = at.vector<const T>(of.grad_log_z);
    task.grad_final_log_numerator = at.matrix<const T>(of.grad_final_log_numerator);
    task.grad_final_log_denominator = at.vector<const T>(of.grad_final_log_denominator);
    task.grad_log_k = at.matrix<T>(of.grad_log_k);
    task.grad_log_v = at.matrix<T>(of.grad_log_v);
    task.grad_log_q = at.matrix<T>(of.grad_log_q);
    task.grad_log_decay = at.matrix<T>(of.grad_log_decay);
    task.grad_log_numerator = at.matrix<T>(of.grad_log_numerator);
    task.grad_log_denominator = at.vector<T>(of.grad_log_denominator);
    task.scratch = slots[slot];
    kernels.log_attention_vjp(task);
  });
}

}  // namespace

std::size_t log_linear_attention_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                           std::int64_t d_k, std::int64_t d_v,
                                           std::int64_t itemsize, bool causal) {
  const log_attention_sizes sizes{n_q, n, d_k, d_v, causal};
  workspace_layout workspace;
  workspace.take_slots(itemsize == 4 ? functions<float>().log_attention_scratch(sizes)
                                     : functions<double>().log_attention_scratch(sizes),
                       batch);
  return workspace.size();
}

void log_linear_attention(const array_view& log_k, const array_view& log_v,
                          const array_view* sign_v, const array_view* log_q,
                          const array_view* log_decay, const array_view* key_mask,
                          const array_view* segments, const array_view* log_numerator,
                          const array_view* sign_numerator, const array_view* log_denominator,
                          bool causal, const array_view* log_y, const array_view* sign_y,
                          const array_view* log_z, const array_view* final_log_numerator,
                          const array_view* final_sign_numerator,
                          const array_view* final_log_denominator, const array_view& workspace) {
  const attention_shape shape = check_log_linear_attention(
      log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, log_numerator, sign_numerator,
      log_denominator, causal, log_y, sign_y, log_z, final_log_numerator, final_sign_numerator,
      final_log_denominator);
  const log_attention_arrays arrays{&log_k,         &log_v,          sign_v,   log_q,
                                    log_decay,      key_mask,        segments, log_numerator,
                                    sign_numerator, log_denominator, causal};
  const log_attention_outputs out{
      log_y, sign_y, log_z, final_log_numerator, final_sign_numerator, final_log_denominator};
  (shape.type == dtype::float32 ? log_linear_attention_as<float>
                                : log_linear_attention_as<double>)(shape, arrays, out, workspace);
}

std::size_t log_linear_attention_vjp_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                               std::int64_t d_k, std::int64_t d_v,
                                               std::int64_t itemsize, bool causal) {
  const log_attention_sizes sizes{n_q, n, d_k, d_v, causal};
  workspace_layout workspace;
  workspace.take_slots(itemsize == 4 ? functions<float>().log_attention_vjp_scratch(sizes)
                                     : functions<double>().log_attention_vjp_scratch(sizes),
                       batch);
  return workspace.size();
}

void log_linear_attention_vjp(
    const array_view& log_k, const array_view& log_v, const array_view* sign_v,
    const array_view* log_q, const array_view* log_decay, const array_view* key_mask,
    const array_view* segments, const array_view* log_numerator, const array_view* sign_numerator,
    const array_view* log_denominator, bool causal, const array_view* grad_log_y,
    const array_view* grad_log_z, const array_view* grad_final_log_numerator,
    const array_view* grad_final_log_denominator, const array_view* grad_log_k,
    const array_view* grad_log_v, const array_view* grad_log_q, const array_view* grad_log_decay,
    const array_view* grad_log_numerator, const array_view* grad_log_denominator,
    const array_view& workspace) {
  const attention_shape shape = check_log_linear_attention_vjp(
      log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, log_numerator, sign_numerator,
      log_denominator, causal, grad_log_y, grad_log_z, grad_final_log_numerator,
      grad_final_log_denominator, grad_log_k, grad_log_v, grad_log_q, grad_log_decay,
      grad_log_numerator, grad_log_denominator);
  const log_attention_arrays arrays{&log_k,         &log_v,          sign_v,   log_q,
                                    log_decay,      key_mask,        segments, log_numerator,
                                    sign_numerator, log_denominator, causal};
  const log_attention_gradients of{grad_log_y,
                                   grad_log_z,
                                   grad_final_log_numerator,
                                   grad_final_log_denominator,
                                   grad_log_k,
                                   grad_log_v,
                                   grad_log_q,
                                   grad_log_decay,
                                   grad_log_numerator,
                                   grad_log_denominator};
  (shape.type == dtype::float32
       ? log_linear_attention_vjp_as<float>
       : log_linear_attention_vjp_as<double>)(shape, arrays, of, workspace);
}

}  // namespace subquad::core
