// Linear attention with values in logarithms, and its reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_LOG_ATTENTION_KERNELS_HPP
#define SUBQUAD_KERNELS_LOG_ATTENTION_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// The sizes of one sequence; n_q is 0 where there are no queries.
struct log_attention_sizes {
  std::int64_t n_q;
  std::int64_t n;
  std::int64_t d_k;
  std::int64_t d_v;
  bool causal;
};

template <class T>
struct log_attention_inputs {
  log_attention_sizes sizes;
  matrix_view<const T> log_k;                // n x d_k
  matrix_view<const T> log_v;                // n x d_v
  matrix_view<const T> sign_v;               // optional
  matrix_view<const T> log_q;                // n_q x d_k
  matrix_view<const T> log_decay;            // n x d_k, optional
  vector_view<const std::uint8_t> key_mask;  // n, optional
  vector_view<const std::int64_t> segments;  // n, optional
  bool has_state;
  matrix_view<const T> log_numerator;   // d_k x d_v, where has_state
  matrix_view<const T> sign_numerator;  // optional
  vector_view<const T> log_denominator;
};

// The formulas and edge rules of subquad_log_linear_attention for one sequence; nothing aliases.
//
// Every sum is one of numbers s 2^k with a whole k beside a significand s of type T: no range makes
// it overflow or underflow, and its error is at most (d_k + 34) eps / 2 of the sum of its terms'
// magnitudes plus 3 eps; sums over tokens are compensated every 32 of them. Logarithms count up to
// a magnitude of 1.1e7 (float) or 7e14 (double); beyond that finite ones count as the end of the
// range. The logarithms of the results are formed from whole powers, which cancel exactly.
template <class T>
struct log_attention_task {
  log_attention_inputs<T> inputs;
  matrix_view<T> log_y;   // n_q x d_v, optional
  matrix_view<T> sign_y;  // optional
  vector_view<T> log_z;   // n_q, optional
  matrix_view<T> final_log_numerator;
  matrix_view<T> final_sign_numerator;
  vector_view<T> final_log_denominator;
  void* scratch;  // log_attention_scratch bytes, aligned to 64
};

// The reverse, in the same arithmetic: nothing of the forward pass is kept but its state before
// every 256 tokens. Gradients that are 0 count for nothing, whatever their row holds.
template <class T>
struct log_attention_vjp_task {
  log_attention_inputs<T> inputs;
  matrix_view<const T> grad_log_y;
  vector_view<const T> grad_log_z;
  matrix_view<const T> grad_final_log_numerator;
  vector_view<const T> grad_final_log_denominator;
  matrix_view<T> grad_log_k;
  matrix_view<T> grad_log_v;
  matrix_view<T> grad_log_q;
  matrix_view<T> grad_log_decay;
  matrix_view<T> grad_log_numerator;
  vector_view<T> grad_log_denominator;
  void* scratch;  // log_attention_vjp_scratch bytes, aligned to 64
};

template <class T>
struct log_attention_functions {
  std::size_t (*log_attention_scratch)(const log_attention_sizes& sizes);
  void (*log_attention)(const log_attention_task<T>& task);
  std::size_t (*log_attention_vjp_scratch)(const log_attention_sizes& sizes);
  void (*log_attention_vjp)(const log_attention_vjp_task<T>& task);
};

struct log_attention_kernels {
  log_attention_functions<float> f32;
  log_attention_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_LOG_ATTENTION_KERNELS_HPP
