// What the host side of linear attention and of its reverse share: a head as its kernels see it,
// and the state that goes in and comes out.
#ifndef SUBQUAD_ATTENTION_CHUNKS_HPP
#define SUBQUAD_ATTENTION_CHUNKS_HPP

#include <algorithm>
#include <cstdint>
#include <limits>

#include "arguments.hpp"
#include "kernels/attention_kernels.hpp"

namespace subquad {

template <class T>
attention_tokens<T> attention_tokens_at(const batch_shape& batch, const array_view& log_k,
                                        const array_view& v, const array_view* log_decay,
                                        const array_view* key_mask, const array_view* segments,
                                        std::int64_t b) {
  attention_tokens<T> tokens{};
  tokens.log_k = matrix_at<const T>(log_k, batch.offset(log_k, 2, b));
  tokens.v = matrix_at<const T>(v, batch.offset(v, 2, b));
  if (log_decay) tokens.log_decay = matrix_at<const T>(*log_decay, batch.offset(*log_decay, 2, b));
  if (key_mask) {
    tokens.key_mask = vector_at<const std::uint8_t>(*key_mask, batch.offset(*key_mask, 1, b));
  }
  if (segments) tokens.segments = vector_at<const std::int64_t>(*segments, 0);
  tokens.d_k = length_from_end(log_k, 1);
  tokens.d_v = length_from_end(v, 1);
  return tokens;
}

// A state in the layout of the kernels: Z and S as high + low of attention_sums_size elements each.
template <class T>
struct attention_state {
  attention_scale<T> scale;
  attention_scale<T> total_decay;
  T* high;
  T* low;
};

template <class T>
constexpr std::int64_t attention_state_size(std::int64_t d_k, std::int64_t d_v) {
  return 4 * attention_padded<T>(d_k) + 2 * attention_sums_size<T>(d_k, d_v);
}

// Cuts attention_state_size elements; returns the first after them.
template <class T>
T* place_attention_state(T* memory, std::int64_t d_k, std::int64_t d_v, attention_state<T>& state) {
  const std::int64_t features = attention_padded<T>(d_k);
  const std::int64_t sums = attention_sums_size<T>(d_k, d_v);
  state.scale = {memory, memory + features};
  state.total_decay = {memory + 2 * features, memory + 3 * features};
  state.high = memory + 4 * features;
  state.low = state.high + sums;
  return state.low + sums;
}

// The state of batch member b, or the empty one where key_sums is null. A feature whose M is -inf
// has no sums, whatever is given for them.
template <class T>
void read_attention_state(const batch_shape& batch, const array_view* key_sums,
                          const array_view* value_sums, std::int64_t d_k, std::int64_t d_v,
                          std::int64_t b, const attention_state<T>& state) {
  constexpr T kEmpty = -std::numeric_limits<T>::infinity();
  const std::int64_t features = attention_padded<T>(d_k);
  const std::int64_t columns = attention_padded<T>(d_v);
  std::fill_n(state.scale.high, 4 * features + 2 * attention_sums_size<T>(d_k, d_v), T(0));
  std::fill_n(state.scale.high, features, kEmpty);
  if (key_sums == nullptr) return;
  const auto keys = matrix_at<const T>(*key_sums, batch.offset(*key_sums, 2, b));
  const auto values = stack_at<const T>(*value_sums, batch.offset(*value_sums, 3, b));
  for (std::int64_t k = 0; k < d_k; ++k) {
    state.total_decay.high[k] = keys(4, k);
    if (keys(0, k) == kEmpty) continue;
    state.scale.high[k] = keys(0, k);
    state.scale.low[k] = keys(1, k);
    state.high[k] = keys(2, k);
    state.low[k] = keys(3, k);
    for (std::int64_t v = 0; v < d_v; ++v) {
      state.high[features + k * columns + v] = values[0](k, v);
      state.low[features + k * columns + v] = values[1](k, v);
    }
  }
}

// Writes a state to the outputs of batch member b, which may be null together.
template <class T>
void write_attention_state(const batch_shape& batch, const attention_state<T>& state,
                           std::int64_t d_k, std::int64_t d_v, std::int64_t b,
                           const array_view* key_sums, const array_view* value_sums) {
  if (key_sums == nullptr) return;
  const std::int64_t features = attention_padded<T>(d_k);
  const std::int64_t columns = attention_padded<T>(d_v);
  const auto keys = matrix_at<T>(*key_sums, batch.offset(*key_sums, 2, b));
  const auto values = stack_at<T>(*value_sums, batch.offset(*value_sums, 3, b));
  for (std::int64_t k = 0; k < d_k; ++k) {
    const bool empty = state.scale.high[k] == -std::numeric_limits<T>::infinity();
    keys(0, k) = state.scale.high[k];
    keys(1, k) = empty ? T(0) : state.scale.low[k];
    keys(2, k) = empty ? T(0) : state.high[k];
    keys(3, k) = empty ? T(0) : state.low[k];
    keys(4, k) = state.total_decay.high[k];
    for (std::int64_t v = 0; v < d_v; ++v) {
      const std::int64_t at = features + k * columns + v;
      values[0](k, v) = empty ? T(0) : state.high[at];
      values[1](k, v) = empty ? T(0) : state.low[at];
    }
  }
}

}  // namespace subquad

#endif  // SUBQUAD_ATTENTION_CHUNKS_HPP
