#include <algorithm>
#include <type_traits>

#include "arguments.hpp"
#include "attention_checks.hpp"
#include "attention_core.hpp"
#include "isa.hpp"
#include "kernels/attention_vjp_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(attention_vjp)

namespace subquad::core {
namespace {

template <class T>
const attention_vjp_functions<T>& functions();
template <>
const attention_vjp_functions<float>& functions() {
  return attention_vjp_table().f32;
}
template <>
const attention_vjp_functions<double>& functions() {
  return attention_vjp_table().f64;
}

// Memory for runs side by side, each on one thread, and for one run whose chunks go over the
// threads, a window of them at a time. Both take the same bytes.
template <class T>
struct layout {
  static constexpr std::int64_t kWindowPart = 8;  // chunks per thread: few meetings of the threads
  static constexpr std::int64_t kMostParts = 8;

  std::size_t run_bytes;
  std::size_t chunk_bytes;
  std::int64_t window_part;
  workspace_layout::slots runs;  // each: a run's memory, then one chunk's
  char* run;
  workspace_layout::slots window;

  layout(workspace_layout& pieces, std::int64_t runs_count, std::int64_t longest, std::int64_t d_k,
         std::int64_t d_v, bool causal) {
    const auto& kernels = functions<T>();
    run_bytes = kernels.run_bytes(longest, d_k, d_v, causal);
    chunk_bytes = kernels.chunk_bytes(d_k, d_v);
    const std::int64_t chunks = std::max<std::int64_t>(1, divide_up(longest, kAttentionChunk));
    window_part = std::min(kWindowPart, chunks);
    workspace_layout side_by_side = pieces;
    runs = side_by_side.take_slots(run_bytes + chunk_bytes, runs_count);
    workspace_layout one_by_one = pieces;
    run = one_by_one.take<char>(static_cast<std::int64_t>(run_bytes));
    window = one_by_one.take_slots(chunk_bytes * static_cast<std::size_t>(window_part),
                                   std::min(kMostParts, divide_up(chunks, window_part)));
    if (side_by_side.size() > one_by_one.size()) {
      pieces = side_by_side;
    } else {
      pieces = one_by_one;
    }
  }
};

// All of one run. `memory` holds `window` chunks; results do not depend on how many.
template <class T>
void run_vjp(attention_vjp_task<T> task, char* memory, std::size_t chunk_bytes, std::int64_t window,
             int threads) {
  const auto& kernels = functions<T>();
  const std::int64_t key_chunks = divide_up(task.n, kAttentionChunk);
  const std::int64_t query_chunks = task.log_q ? divide_up(task.n_q, kAttentionChunk) : 0;
  const auto place = [&](std::int64_t chunk) {
    return static_cast<void*>(memory + static_cast<std::size_t>(chunk % window) * chunk_bytes);
  };
  using on_chunk = void (*)(const attention_vjp_task<T>&, std::int64_t, void*);
  const auto each = [&](std::int64_t begin, std::int64_t end, on_chunk function) {
    if (window == 1) {
      function(task, begin, place(begin));
    } else {
      parallel_for(end - begin, threads,
                   [&](std::int64_t i, int) { function(task, begin + i, place(begin + i)); });
    }
  };
  kernels.begin(task, memory);
  if (!task.causal || window > 1) {
    kernels.scales(task, memory);
    task.scales_known = true;
  }
  for (std::int64_t begin = 0; begin < key_chunks; begin += window) {
    const std::int64_t end = std::min(key_chunks, begin + window);
    each(begin, end, kernels.sums);
    for (std::int64_t c = begin; c < end; ++c) kernels.advance_sums(task, c, place(c));
  }
  kernels.turn(task);
  if (task.causal) {
    for (std::int64_t end = key_chunks; end > 0;) {
      const std::int64_t begin = (end - 1) / window * window;
      each(begin, end, kernels.queries);
      for (std::int64_t c = end; c-- > begin;) kernels.advance_gradients(task, c, place(c));
      each(begin, end, kernels.keys);
      end = begin;
    }
  } else {
    for (std::int64_t begin = 0; begin < query_chunks; begin += window) {
      const std::int64_t end = std::min(query_chunks, begin + window);
      each(begin, end, kernels.queries);
      for (std::int64_t c = begin; c < end; ++c) kernels.advance_gradients(task, c, place(c));
    }
    kernels.finish_queries(task);
    for (std::int64_t begin = 0; begin < key_chunks; begin += window) {
      each(begin, std::min(key_chunks, begin + window), kernels.keys);
    }
  }
  kernels.finish(task);
}

struct vjp_arguments {
  const array_view* log_k;
  const array_view* v;
  const array_view* log_q;
  const array_view* log_decay;
  const array_view* key_mask;
  const array_view* segments;
  const array_view* key_sums;
  const array_view* value_sums;
  const array_view* grad_y;
  const array_view* grad_log_z;
  const array_view* grad_final_key_sums;
  const array_view* grad_final_value_sums;
  const array_view* grad_log_k;
  const array_view* grad_v;
  const array_view* grad_log_q;
  const array_view* grad_log_decay;
  const array_view* grad_key_sums;
  const array_view* grad_value_sums;
};

// Batch member b, tokens [begin, end) of it.
template <class T>
attention_vjp_task<T> task_of(const attention_shape& shape, const vjp_arguments& with, bool causal,
                              std::int64_t b, std::int64_t begin, std::int64_t end) {
  const auto rows = [&](const array_view* array, auto& to) {
    using element = std::remove_pointer_t<decltype(to.data)>;
    if (array) to = matrix_at<element>(*array, shape.batch.offset(*array, 2, b)).from(begin);
  };
  const auto vector = [&](const array_view* array, auto& to) {
    using element = std::remove_pointer_t<decltype(to.data)>;
    if (array) to = vector_at<element>(*array, shape.batch.offset(*array, 1, b)).from(begin);
  };
  const auto whole = [&](const array_view* array, auto& to) {
    using element = std::remove_pointer_t<decltype(to.data)>;
    if (array) to = matrix_at<element>(*array, shape.batch.offset(*array, 2, b));
  };
  const auto stack = [&](const array_view* array, auto& to) {
    using element = std::remove_pointer_t<decltype(to.data)>;
    if (array) to = stack_at<element>(*array, shape.batch.offset(*array, 3, b));
  };
  attention_vjp_task<T> task{};
  task.causal = causal;
  task.n = end - begin;
  task.n_q = with.segments ? task.n : shape.n_q;
  task.keys.d_k = shape.d_k;
  task.keys.d_v = shape.d_v;
  rows(with.log_k, task.keys.log_k);
  rows(with.v, task.keys.v);
  rows(with.log_decay, task.keys.log_decay);
  vector(with.key_mask, task.keys.key_mask);
  rows(with.log_q, task.log_q);
  rows(with.grad_y, task.grad_y);
  vector(with.grad_log_z, task.grad_log_z);
  rows(with.grad_log_k, task.grad_log_k);
  rows(with.grad_v, task.grad_v);
  rows(with.grad_log_q, task.grad_log_q);
  rows(with.grad_log_decay, task.grad_log_decay);
  if (begin == 0) {
    whole(with.key_sums, task.key_sums);
    stack(with.value_sums, task.value_sums);
    whole(with.grad_key_sums, task.grad_key_sums);
    stack(with.grad_value_sums, task.grad_value_sums);
  }
  if (end == shape.n) {
    whole(with.grad_final_key_sums, task.grad_final_key_sums);
    stack(with.grad_final_value_sums, task.grad_final_value_sums);
  }
  return task;
}

template <class T>
void linear_attention_vjp_as(const attention_shape& shape, const vjp_arguments& with, bool causal,
                             const array_view& workspace) {
  const std::int64_t batch = shape.batch.count();
  if (batch == 0) return;
  workspace_layout pieces(workspace);
  std::int64_t* const starts = pieces.take<std::int64_t>(shape.n + 2);
  std::int64_t runs = 1;
  std::int64_t longest = 0;
  starts[0] = 0;
  if (with.segments) {
    const auto segments = vector_at<const std::int64_t>(*with.segments, 0);
    for (std::int64_t i = 1; i < shape.n; ++i) {
      if (segments[i] != segments[i - 1]) starts[runs++] = i;
    }
  }
  starts[runs] = shape.n;
  for (std::int64_t i = 0; i < runs; ++i) longest = std::max(longest, starts[i + 1] - starts[i]);
  if (shape.d_k == 0) {
    if (!with.grad_v) return;
    for (std::int64_t b = 0; b < batch; ++b) {
      const auto to = matrix_at<T>(*with.grad_v, shape.batch.offset(*with.grad_v, 2, b));
      for (std::int64_t j = 0; j < shape.n; ++j) {
        for (std::int64_t i = 0; i < shape.d_v; ++i) to(j, i) = T(0);
      }
    }
    return;
  }
  const layout<T> memory(pieces, batch * runs, longest, shape.d_k, shape.d_v, causal);
  const auto task = [&](std::int64_t index) {
    const std::int64_t run = index % runs;
    return task_of<T>(shape, with, causal, index / runs, starts[run], starts[run + 1]);
  };
  const double work = static_cast<double>(batch) * static_cast<double>(shape.n + shape.n_q) *
                      static_cast<double>(shape.d_k + 32) * static_cast<double>(shape.d_v + 32) * 2;
  const std::int64_t chunks = divide_up(longest, kAttentionChunk);
  const int threads = threads_for(work, available_threads());
  if (memory.runs.count < threads && chunks > memory.runs.count) {
    const std::int64_t window = memory.window_part * memory.window.count;
    for (std::int64_t index = 0; index < batch * runs; ++index) {
      attention_vjp_task<T> one = task(index);
      one.run = memory.run;
      run_vjp(one, memory.window.data, memory.chunk_bytes, window, threads);
    }
    return;
  }
  parallel_for(
      batch * runs, std::min(threads, memory.runs.count), [&](std::int64_t index, int slot) {
        attention_vjp_task<T> one = task(index);
        one.run = memory.runs[slot];
        run_vjp(one, static_cast<char*>(one.run) + memory.run_bytes, memory.chunk_bytes, 1, 1);
      });
}

}  // namespace

std::size_t linear_attention_vjp_workspace(std::int64_t batch, std::int64_t, std::int64_t n,
                                           std::int64_t d_k, std::int64_t d_v,
                                           std::int64_t itemsize, bool causal) {
  workspace_layout pieces;
  pieces.take<std::int64_t>(n + 2);
  if (itemsize == 8) {
    layout<double>(pieces, batch, n, d_k, d_v, causal);
  } else {
    layout<float>(pieces, batch, n, d_k, d_v, causal);
  }
  return pieces.size();
}

void linear_attention_vjp(const array_view& log_k, const array_view& v, const array_view* log_q,
                          const array_view* log_decay, const array_view* key_mask,
                          const array_view* segments, const array_view* key_sums,
                          const array_view* value_sums, bool causal, const array_view* y,
                          const array_view* grad_y, const array_view* grad_log_z,
                          const array_view* grad_final_key_sums,
                          const array_view* grad_final_value_sums, const array_view* grad_log_k,
                          const array_view* grad_v, const array_view* grad_log_q,
                          const array_view* grad_log_decay, const array_view* grad_key_sums,
                          const array_view* grad_value_sums, const array_view& workspace) {
  const attention_shape shape = check_linear_attention_vjp(
      log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums, causal, y, grad_y,
      grad_log_z, grad_final_key_sums, grad_final_value_sums, grad_log_k, grad_v, grad_log_q,
      grad_log_decay, grad_key_sums, grad_value_sums);
  // y is formed anew: its rounding would not cancel with that of the products it is taken from.
  const vjp_arguments with = {&log_k,
                              &v,
                              log_q,
                              log_decay,
                              key_mask,
                              segments,
                              key_sums,
                              value_sums,
                              grad_y,
                              grad_log_z,
                              grad_final_key_sums,
                              grad_final_value_sums,
                              grad_log_k,
                              grad_v,
                              grad_log_q,
                              grad_log_decay,
                              grad_key_sums,
                              grad_value_sums};
  if (shape.type == dtype::float64) {
    linear_attention_vjp_as<double>(shape, with, causal, workspace);
  } else {
    linear_attention_vjp_as<float>(shape, with, causal, workspace);
  }
}

}  // namespace subquad::core
