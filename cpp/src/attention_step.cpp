#include <cmath>
#include <limits>

#include "arguments.hpp"
#include "attention_checks.hpp"
#include "attention_core.hpp"
#include "isa.hpp"
#include "kernels/attention_step_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(attention_step)

namespace subquad::core {
namespace {

template <class T>
const attention_step_functions<T>& functions();
template <>
const attention_step_functions<float>& functions() {
  return attention_step_table().f32;
}
template <>
const attention_step_functions<double>& functions() {
  return attention_step_table().f64;
}

// States that together are larger than this are in no core's own cache; so many bytes of them fit
// into it.
constexpr std::int64_t kNearBytes = 1 << 20;
constexpr std::int64_t kGroupBytes = 3 << 17;

// Asks for memory that is read soon. States that no cache holds are read at random pages, where the
// processor's own prefetching stops: 16 of them asked for together take 2.2 us each, one by one 2.8
// (64 x 64 float32, one thread).
template <class T>
void prefetch(const T* data, std::int64_t count) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = 0; i < count; i += kLine) __builtin_prefetch(data + i, 0, 2);
}

template <class T>
workspace_layout::slots slots_of(workspace_layout& workspace, std::int64_t batch, std::int64_t d_k,
                                 std::int64_t d_v) {
  return workspace.take_slots(functions<T>().scratch(d_k, d_v), batch);
}

template <class T>
void step_as(const attention_shape& shape, const array_view& log_k, const array_view& v,
             const array_view& log_q, const array_view* log_decay, const array_view& key_sums,
             const array_view& value_sums, const array_view& recent_keys,
             const array_view& recent_values, const array_view& recent_count, bool empty_is_nan,
             const array_view& y, const array_view* log_z, const array_view& workspace) {
  const std::int64_t batch = shape.batch.count();
  if (batch == 0) return;
  const std::int64_t d_k = shape.d_k;
  const std::int64_t d_v = shape.d_v;
  const std::int64_t room = length_from_end(recent_keys, 2);
  workspace_layout pieces(workspace);
  const workspace_layout::slots slots = slots_of<T>(pieces, batch, d_k, d_v);
  const auto& kernels = functions<T>();
  // A state costs the reading of its sums, about 8 multiply-adds for every element.
  const double work = 8.0 * static_cast<double>(batch) * static_cast<double>((d_k + room) * d_v);
  const auto step_of = [&](std::int64_t b, int slot) {
    const auto vector_of = [&](const array_view& array) {
      return vector_at<const T>(array, shape.batch.offset(array, 1, b));
    };
    double scale;
    double denominator;
    attention_step_task<T> task{};
    task.d_k = d_k;
    task.d_v = d_v;
    task.room = room;
    task.log_k = vector_of(log_k);
    task.v = vector_of(v);
    task.log_q = vector_of(log_q);
    if (log_decay) task.log_decay = vector_of(*log_decay);
    task.key_sums = static_cast<T*>(key_sums.data) + b * 5 * d_k;
    task.value_sums = static_cast<T*>(value_sums.data) + b * 2 * d_k * d_v;
    task.recent_keys = static_cast<T*>(recent_keys.data) + b * room * d_k;
    task.recent_values = static_cast<T*>(recent_values.data) + b * room * d_v;
    task.recent_count = static_cast<std::int64_t*>(recent_count.data) + b;
    task.y = vector_at<T>(y, shape.batch.offset(y, 1, b));
    task.scale = &scale;
    task.denominator = &denominator;
    task.scratch = slots[slot];
    kernels.step(task);
    const bool is_empty = denominator == 0;
    if (is_empty) {
      const T nothing = empty_is_nan ? std::numeric_limits<T>::quiet_NaN() : T(0);
      for (std::int64_t c = 0; c < d_v; ++c) task.y[c] = nothing;
    }
    if (log_z) {
      static_cast<T*>(log_z->data)[shape.batch.offset(*log_z, 0, b)] =
          is_empty ? -std::numeric_limits<T>::infinity()
                   : static_cast<T>(scale + std::log(denominator));
    }
  };
  const int threads = threads_for(work, slots.count);
  const std::int64_t state_bytes =
      (d_k * d_v + 5 * d_k + room * (d_k + d_v)) * static_cast<std::int64_t>(sizeof(T));
  const bool is_far = batch * state_bytes > kNearBytes;
  std::int64_t together = is_far ? kGroupBytes / state_bytes : 1;
  together = std::clamp<std::int64_t>(together, 1, divide_up(batch, 2 * threads));
  parallel_for(divide_up(batch, together), threads, [&](std::int64_t group, int slot) {
    const std::int64_t begin = group * together;
    const std::int64_t end = std::min(batch, begin + together);
    for (std::int64_t b = begin; b < end && is_far; ++b) {
      const std::int64_t recent = static_cast<const std::int64_t*>(recent_count.data)[b];
      prefetch(static_cast<const T*>(value_sums.data) + b * 2 * d_k * d_v, d_k * d_v);
      prefetch(static_cast<const T*>(key_sums.data) + b * 5 * d_k, 5 * d_k);
      prefetch(static_cast<const T*>(recent_keys.data) + b * room * d_k, recent * d_k);
      prefetch(static_cast<const T*>(recent_values.data) + b * room * d_v, recent * d_v);
    }
    for (std::int64_t b = begin; b < end; ++b) step_of(b, slot);
  });
}

}  // namespace

std::size_t attention_step_workspace(std::int64_t batch, std::int64_t d_k, std::int64_t d_v,
                                     std::int64_t itemsize) {
  workspace_layout workspace;
  if (itemsize == 8) {
    slots_of<double>(workspace, batch, d_k, d_v);
  } else {
    slots_of<float>(workspace, batch, d_k, d_v);
  }
  return workspace.size();
}

void attention_step(const array_view& log_k, const array_view& v, const array_view& log_q,
                    const array_view* log_decay, const array_view& key_sums,
                    const array_view& value_sums, const array_view& recent_keys,
                    const array_view& recent_values, const array_view& recent_count,
                    bool empty_is_nan, const array_view& y, const array_view* log_z,
                    const array_view& workspace) {
  const attention_shape shape =
      check_attention_step(log_k, v, log_q, log_decay, key_sums, value_sums, recent_keys,
                           recent_values, recent_count, y, log_z);
  const auto run = [&](auto element) {
    step_as<decltype(element)>(shape, log_k, v, log_q, log_decay, key_sums, value_sums, recent_keys,
                               recent_values, recent_count, empty_is_nan, y, log_z, workspace);
  };
  if (shape.type == dtype::float64) {
    run(double{});
  } else {
    run(float{});
  }
}

}  // namespace subquad::core
