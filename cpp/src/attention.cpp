#include "attention_core.hpp"

#include <algorithm>

#include "attention_checks.hpp"
#include "attention_chunks.hpp"
#include "isa.hpp"
#include "parallel.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(attention)

namespace subquad::core {
namespace {

template <class T>
const attention_functions<T>& functions();
template <>
const attention_functions<float>& functions() {
  return attention_table().f32;
}
template <>
const attention_functions<double>& functions() {
  return attention_table().f64;
}

// Groups of one head whose sums are held at once, where the groups of one head run side by side.
constexpr std::int64_t kWave = 64;
// Heads from which on they alone make enough tasks.
constexpr std::int64_t kManyHeads = 64;
// Tokens whose runs make one task, where runs are bidirectional.
constexpr std::int64_t kRunBlock = 1024;
constexpr std::int64_t kQueryBlock = 256;
constexpr std::int64_t kFeatureBlock = 16;

double work_of(std::int64_t batch, std::int64_t n, std::int64_t d_k, std::int64_t d_v) {
  return static_cast<double>(batch) * static_cast<double>(n) *
         static_cast<double>(2 * d_k * d_v + 48 * d_k + 16 * d_v + 64);
}

// One head at work: its state, and the sums of the group that is next to be added to it.
template <class T>
struct head_memory {
  attention_state<T> state;
  T* local;
  T* factor;

  static std::int64_t size(std::int64_t d_k, std::int64_t d_v) {
    return attention_state_size<T>(d_k, d_v) + attention_sums_size<T>(d_k, d_v) +
           attention_padded<T>(d_k);
  }
  head_memory(T* memory, std::int64_t d_k, std::int64_t d_v) {
    local = place_attention_state<T>(memory, d_k, d_v, state);
    factor = local + attention_sums_size<T>(d_k, d_v);
  }
};

template <class T>
struct linear_attention_layout {
  // Groups side by side: for each of a wave its sums, then what came before it; [0] alone is null
  // where there are none.
  std::int64_t wave = 0;
  T* local = nullptr;
  T* factor = nullptr;
  T* scale = nullptr;
  T* head = nullptr;
  std::size_t kernel_bytes;
  workspace_layout::slots slots;

  linear_attention_layout(workspace_layout& workspace, std::int64_t batch, std::int64_t n_q,
                          std::int64_t n, std::int64_t d_k, std::int64_t d_v) {
    const std::int64_t groups = divide_up(n, kAttentionGroup);
    const std::int64_t features = attention_padded<T>(d_k);
    if (batch < kManyHeads && (groups > 1 || n_q > kQueryBlock)) {
      wave = std::max<std::int64_t>(1, std::min(groups, kWave));
      local = workspace.take<T>(wave * attention_sums_size<T>(d_k, d_v));
      factor = workspace.take<T>(wave * features);
      scale = workspace.take<T>(wave * 2 * features);
      head = workspace.take<T>(head_memory<T>::size(d_k, d_v));
    }
    kernel_bytes = (functions<T>().scratch(d_k, d_v) + 63) / 64 * 64;
    const auto head_bytes = sizeof(T) * static_cast<std::size_t>(head_memory<T>::size(d_k, d_v));
    const std::int64_t tasks = batch * std::max(groups, divide_up(n_q, kQueryBlock));
    slots = workspace.take_slots(kernel_bytes + head_bytes, tasks);
  }

  T* head_of(int slot) const {
    return reinterpret_cast<T*>(static_cast<char*>(slots[slot]) + kernel_bytes);
  }
};

template <class T>
class forward {
 public:
  forward(const attention_shape& shape, const array_view& log_k, const array_view& v,
          const array_view* log_q, const array_view* log_decay, const array_view* key_mask,
          const array_view* segments, const array_view* key_sums, const array_view* value_sums,
          bool causal, bool empty_is_nan, const array_view* y, const array_view* log_z,
          const array_view* final_key_sums, const array_view* final_value_sums,
          const linear_attention_layout<T>& layout)
      : shape_(shape),
        log_k_(log_k),
        v_(v),
        log_q_(log_q),
        log_decay_(log_decay),
        key_mask_(key_mask),
        segments_(segments),
        key_sums_(key_sums),
        value_sums_(value_sums),
        causal_(causal),
        empty_is_nan_(empty_is_nan),
        y_(log_q ? y : nullptr),
        log_z_(log_q ? log_z : nullptr),
        final_key_sums_(final_key_sums),
        final_value_sums_(final_value_sums),
        layout_(layout) {}

  void run() const {
    const std::int64_t batch = shape_.batch.count();
    const std::int64_t n = shape_.n;
    const int threads = threads_for(work_of(batch, std::max(n, shape_.n_q), shape_.d_k, shape_.d_v),
                                    std::min(layout_.slots.count, available_threads()));
    if (segments_ && !causal_ && n > 0) {
      const std::int64_t blocks = divide_up(n, kRunBlock);
      parallel_for(batch * blocks, threads, [&](std::int64_t task, int slot) {
        runs_of_block(task / blocks, task % blocks * kRunBlock, slot);
      });
    } else if (layout_.wave > 0 && batch < threads) {
      for (std::int64_t b = 0; b < batch; ++b) head_side_by_side(b, threads);
    } else {
      parallel_for(batch, threads, [&](std::int64_t b, int slot) {
        head_memory<T> head(layout_.head_of(slot), shape_.d_k, shape_.d_v);
        read_state(b, true, head.state);
        run_of_keys(b, 0, n, head, slot);
        if (!causal_) rows(b, 0, shape_.n_q, head.state, slot);
        write_state(b, head.state);
      });
    }
  }

 private:
  bool outputs() const { return y_ || log_z_; }
  bool needs_state() const { return final_key_sums_ || (!causal_ && outputs()); }

  void read_state(std::int64_t b, bool first_run, const attention_state<T>& state) const {
    read_attention_state<T>(shape_.batch, first_run ? key_sums_ : nullptr, value_sums_, shape_.d_k,
                            shape_.d_v, b, state);
  }
  void write_state(std::int64_t b, const attention_state<T>& state) const {
    write_attention_state<T>(shape_.batch, state, shape_.d_k, shape_.d_v, b, final_key_sums_,
                             final_value_sums_);
  }

  attention_group_task<T> group_of(std::int64_t b, std::int64_t begin, std::int64_t end,
                                   int slot) const {
    attention_group_task<T> task{};
    task.tokens =
        attention_tokens_at<T>(shape_.batch, log_k_, v_, log_decay_, key_mask_, segments_, b);
    task.begin = begin;
    task.end = std::min(end, begin + kAttentionGroup);
    task.scratch = layout_.slots[slot];
    return task;
  }

  void add_outputs(std::int64_t b, attention_group_task<T>& task) const {
    if (!causal_ || !outputs()) return;
    task.log_q = matrix_at<const T>(*log_q_, shape_.batch.offset(*log_q_, 2, b));
    if (y_) task.y = matrix_at<T>(*y_, shape_.batch.offset(*y_, 2, b));
    if (log_z_) task.log_z = vector_at<T>(*log_z_, shape_.batch.offset(*log_z_, 1, b));
    task.empty_is_nan = empty_is_nan_;
  }

  attention_fold_task<T> fold_of(const attention_state<T>& state, const T* factor,
                                 const T* local) const {
    return {0, shape_.d_k, shape_.d_k, shape_.d_v, state.high, state.low, factor, local, nullptr};
  }

  // Keys [begin, end), and their rows if causal, group after group.
  void run_of_keys(std::int64_t b, std::int64_t begin, std::int64_t end, const head_memory<T>& head,
                   int slot) const {
    const auto& kernels = functions<T>();
    for (std::int64_t first = begin; first < end; first += kAttentionGroup) {
      attention_group_task<T> task = group_of(b, first, end, slot);
      add_outputs(b, task);
      task.scale = head.state.scale;
      task.total_decay = head.state.total_decay;
      task.base = head.state.high;
      const bool sums = task.end < end || needs_state();
      if (sums) {
        task.local = head.local;
        task.factor = head.factor;
      }
      kernels.group(task);
      if (sums) kernels.fold(fold_of(head.state, head.factor, head.local));
    }
  }

  // Rows [begin, end) of the bidirectional form.
  void rows(std::int64_t b, std::int64_t begin, std::int64_t end, const attention_state<T>& state,
            int slot) const {
    if (!outputs() || begin == end) return;
    attention_rows_task<T> task{};
    task.n = end - begin;
    task.d_k = shape_.d_k;
    task.d_v = shape_.d_v;
    task.log_q = matrix_at<const T>(*log_q_, shape_.batch.offset(*log_q_, 2, b)).from(begin);
    task.scale = state.scale;
    task.sums = state.high;
    if (y_) task.y = matrix_at<T>(*y_, shape_.batch.offset(*y_, 2, b)).from(begin);
    if (log_z_) task.log_z = vector_at<T>(*log_z_, shape_.batch.offset(*log_z_, 1, b)).from(begin);
    task.empty_is_nan = empty_is_nan_;
    task.scratch = layout_.slots[slot];
    functions<T>().rows(task);
  }

  // The groups of one head by several threads: scales one after the other, the groups' own sums,
  // what came before each, then its rows. The last repeats the arithmetic of the second, so that
  // the results are those of run_of_keys.
  void head_side_by_side(std::int64_t b, int threads) const {
    const auto& kernels = functions<T>();
    const std::int64_t n = shape_.n;
    const std::int64_t features = attention_padded<T>(shape_.d_k);
    const std::int64_t sums = attention_sums_size<T>(shape_.d_k, shape_.d_v);
    const head_memory<T> head(layout_.head, shape_.d_k, shape_.d_v);
    read_state(b, true, head.state);
    const std::int64_t groups = divide_up(n, kAttentionGroup);
    for (std::int64_t first = 0; first < groups; first += layout_.wave) {
      const std::int64_t count = std::min(layout_.wave, groups - first);
      for (std::int64_t g = 0; g < count; ++g) {
        std::copy_n(head.state.scale.high, 2 * features, layout_.scale + 2 * g * features);
        attention_group_task<T> task = group_of(b, (first + g) * kAttentionGroup, n, 0);
        task.scale = head.state.scale;
        task.total_decay = head.state.total_decay;
        kernels.scale(task);
      }
      const auto at_work = [&](std::int64_t g, int slot) {
        attention_group_task<T> task = group_of(b, (first + g) * kAttentionGroup, n, slot);
        T* const scale = layout_.head_of(slot);
        std::copy_n(layout_.scale + 2 * g * features, 2 * features, scale);
        task.scale = {scale, scale + features};
        return task;
      };
      parallel_for(count, threads, [&](std::int64_t g, int slot) {
        attention_group_task<T> task = at_work(g, slot);
        task.local = layout_.local + g * sums;
        task.factor = layout_.factor + g * features;
        kernels.group(task);
      });
      parallel_for(divide_up(shape_.d_k, kFeatureBlock), threads, [&](std::int64_t block, int) {
        for (std::int64_t g = 0; g < count; ++g) {
          attention_fold_task<T> task =
              fold_of(head.state, layout_.factor + g * features, layout_.local + g * sums);
          task.begin = block * kFeatureBlock;
          task.end = std::min(shape_.d_k, task.begin + kFeatureBlock);
          task.before = layout_.local + g * sums;
          kernels.fold(task);
        }
      });
      if (!causal_ || !outputs()) continue;
      parallel_for(count, threads, [&](std::int64_t g, int slot) {
        attention_group_task<T> task = at_work(g, slot);
        task.base = layout_.local + g * sums;
        add_outputs(b, task);
        kernels.group(task);
      });
    }
    if (!causal_) {
      parallel_for(divide_up(shape_.n_q, kQueryBlock), threads, [&](std::int64_t block, int slot) {
        const std::int64_t begin = block * kQueryBlock;
        rows(b, begin, std::min(shape_.n_q, begin + kQueryBlock), head.state, slot);
      });
    }
    write_state(b, head.state);
  }

  // Bidirectional runs that start in one block of tokens.
  void runs_of_block(std::int64_t b, std::int64_t block, int slot) const {
    const auto number = vector_at<const std::int64_t>(*segments_, 0);
    const head_memory<T> head(layout_.head_of(slot), shape_.d_k, shape_.d_v);
    const std::int64_t n = shape_.n;
    const auto starts = [&](std::int64_t t) { return t == 0 || number[t] != number[t - 1]; };
    std::int64_t begin = block;
    const std::int64_t block_end = std::min(n, block + kRunBlock);
    while (begin < block_end && !starts(begin)) ++begin;
    while (begin < block_end) {
      std::int64_t end = begin + 1;
      while (end < n && !starts(end)) ++end;
      read_state(b, begin == 0, head.state);
      run_of_keys(b, begin, end, head, slot);
      rows(b, begin, end, head.state, slot);
      if (end == n) write_state(b, head.state);
      begin = end;
    }
  }

  const attention_shape& shape_;
  const array_view& log_k_;
  const array_view& v_;
  const array_view* log_q_;
  const array_view* log_decay_;
  const array_view* key_mask_;
  const array_view* segments_;
  const array_view* key_sums_;
  const array_view* value_sums_;
  bool causal_;
  bool empty_is_nan_;
  const array_view* y_;
  const array_view* log_z_;
  const array_view* final_key_sums_;
  const array_view* final_value_sums_;
  const linear_attention_layout<T>& layout_;
};

}  // namespace

std::size_t linear_attention_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                       std::int64_t d_k, std::int64_t d_v, std::int64_t itemsize,
                                       bool) {
  workspace_layout pieces;
  if (itemsize == 8) {
    linear_attention_layout<double>(pieces, batch, n_q, n, d_k, d_v);
  } else {
    linear_attention_layout<float>(pieces, batch, n_q, n, d_k, d_v);
  }
  return pieces.size();
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
  const std::int64_t batch = shape.batch.count();
  if (batch == 0) return;
  workspace_layout pieces(workspace);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const linear_attention_layout<T> layout(pieces, batch, shape.n_q, shape.n, shape.d_k,
                                            shape.d_v);
    forward<T>(shape, log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums, causal,
               empty_is_nan, y, log_z, final_key_sums, final_value_sums, layout)
        .run();
  };
  if (shape.type == dtype::float64) {
    run(double{});
  } else {
    run(float{});
  }
}

}  // namespace subquad::core
