// One more token for one state of linear attention.
#ifndef SUBQUAD_KERNELS_ATTENTION_STEP_KERNELS_HPP
#define SUBQUAD_KERNELS_ATTENTION_STEP_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// Adds the token to the state, as subquad_attention_step says, and reads it: with the whole sums S
// and Z in the scale M, and c = max_r (log_q_r + M_r),
//   y = sum_r e^(log_q_r + M_r - c) S_r / denominator, where denominator is the same sum of Z
// log_z = c + log(denominator). Where the sum is empty denominator is 0 and y tells nothing. The
// state's arrays are contiguous; nothing aliases.
// Differences of logarithms in double, products in T; S and Z keep what folding a token rounds
// away, so that the error does not grow with the number of tokens.
template <class T>
struct attention_step_task {
  std::int64_t d_k;
  std::int64_t d_v;
  std::int64_t room;  // tokens that recent_keys and recent_values hold
  vector_view<const T> log_k;
  vector_view<const T> v;
  vector_view<const T> log_q;
  vector_view<const T> log_decay;  // optional
  T* key_sums;                     // (5, d_k)
  T* value_sums;                   // (2, d_k, d_v)
  T* recent_keys;                  // (room, d_k)
  T* recent_values;                // (room, d_v)
  std::int64_t* recent_count;
  vector_view<T> y;
  double* scale;        // written: c
  double* denominator;  // written
  void* scratch;        // attention_step_scratch bytes, aligned to 64
};

template <class T>
struct attention_step_functions {
  std::size_t (*scratch)(std::int64_t d_k, std::int64_t d_v);
  void (*step)(const attention_step_task<T>& task);
};

struct attention_step_kernels {
  attention_step_functions<float> f32;
  attention_step_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_ATTENTION_STEP_KERNELS_HPP
