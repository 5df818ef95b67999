// Linear attention over log-features: what its kernels and those of its reverse see of a head, and
// what one task of the forward computes.
#ifndef SUBQUAD_KERNELS_ATTENTION_KERNELS_HPP
#define SUBQUAD_KERNELS_ATTENTION_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// Tokens are cut at multiples of these, counted from the first: chunks, whose tokens meet each
// other in a product of their own, and groups, whose sums meet in T before they are added to what
// came before with the rounding error kept.
constexpr std::int64_t kAttentionChunk = 32;
constexpr std::int64_t kAttentionGroup = 256;

// Features, and values, as they lie in scratch and in sums: whole vectors at every level.
template <class T>
SUBQUAD_ALWAYS_INLINE constexpr std::int64_t attention_padded(std::int64_t d) {
  constexpr std::int64_t kPad = 64 / static_cast<std::int64_t>(sizeof(T));
  return (d + kPad - 1) / kPad * kPad;
}

// One head.
template <class T>
struct attention_tokens {
  matrix_view<const T> log_k;                // n, d_k
  matrix_view<const T> v;                    // n, d_v
  matrix_view<const T> log_decay;            // n, d_k, optional
  vector_view<const std::uint8_t> key_mask;  // n, optional
  vector_view<const std::int64_t> segments;  // n, optional
  std::int64_t d_k;
  std::int64_t d_v;
};

// The logarithms M of the scales, padded: M = high + low.
template <class T>
struct attention_scale {
  T* high;
  T* low;
};

// Sums over keys in the scale M: Z_r = sum_j exp(log_k_jr - M_r), padded, then S_r = sum_j
// exp(log_k_jr - M_r) v_j in rows of padded values.
template <class T>
SUBQUAD_ALWAYS_INLINE constexpr std::int64_t attention_sums_size(std::int64_t d_k,
                                                                 std::int64_t d_v) {
  return attention_padded<T>(d_k) * (attention_padded<T>(d_v) + 1);
}

// The tokens [begin, end) of one group, or any part of one that starts where a chunk does.
template <class T>
struct attention_group_task {
  attention_tokens<T> tokens;
  std::int64_t begin;
  std::int64_t end;
  // In: decayed to the token before `begin`; out: to the last one.
  attention_scale<T> scale;
  // The sum of log_decay since the state was empty, as high + low; not kept where null.
  attention_scale<T> total_decay;
  // Sums of what came before, in the scale that goes in.
  const T* base;
  // Out: sums of the group's own keys in the scale that comes out, and what one multiplies the base
  // with to have it there: below 0 where it was emptied, whatever it held. Null: not wanted.
  T* local;
  T* factor;
  // Rows [begin, end) of the causal form, of the whole arrays; log_q null: none are wanted.
  matrix_view<const T> log_q;
  matrix_view<T> y;      // optional
  vector_view<T> log_z;  // optional
  bool empty_is_nan;
  void* scratch;  // attention scratch bytes, aligned to 64
};

// high + low becomes factor (high + low) + local, with the rounding error kept, for the features
// [begin, end), begin a multiple of 16; what it was, rounded to T, goes to `before` (which may be
// `local`) where not null.
template <class T>
struct attention_fold_task {
  std::int64_t begin;
  std::int64_t end;
  std::int64_t d_k;
  std::int64_t d_v;
  T* high;
  T* low;
  const T* factor;
  const T* local;
  T* before;
};

// Rows of queries that all attend the same sums.
template <class T>
struct attention_rows_task {
  std::int64_t n;
  std::int64_t d_k;
  std::int64_t d_v;
  matrix_view<const T> log_q;
  attention_scale<T> scale;
  const T* sums;
  matrix_view<T> y;      // optional
  vector_view<T> log_z;  // optional
  bool empty_is_nan;
  void* scratch;  // attention scratch bytes, aligned to 64
};

template <class T>
struct attention_functions {
  std::size_t (*scratch)(std::int64_t d_k, std::int64_t d_v);
  // The scale alone: neither outputs nor sums are looked at.
  void (*scale)(const attention_group_task<T>& task);
  void (*group)(const attention_group_task<T>& task);
  void (*fold)(const attention_fold_task<T>& task);
  void (*rows)(const attention_rows_task<T>& task);
};

struct attention_kernels {
  attention_functions<float> f32;
  attention_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_ATTENTION_KERNELS_HPP
