// Reverse of linear attention: what one task computes.
#ifndef SUBQUAD_KERNELS_ATTENTION_VJP_KERNELS_HPP
#define SUBQUAD_KERNELS_ATTENTION_VJP_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "attention_kernels.hpp"
#include "matrix_view.hpp"

namespace subquad {

// One run of one batch member: n keys, and n_q queries (n with causal) that may attend them.
//
// With K^ and Q^ of attention_chunk.inl, Q~ = Q^ over its row's sum, S and Z the sums that a chunk
// of queries finds, E_S and E_Z the gradients of the sums that a chunk of keys leaves, and within a
// causal chunk P = tril(Q~ K^T):
//   grad_log_q = Q~ (grad_y S^T - delta Z^T + dW K^),   dW = tril(grad_y V^T - delta)
//   grad_log_k = K^ (V E_S^T + E_Z + dW^T Q~),          grad_v = K^ E_S + P^T grad_y
// Values are taken less the entry nearest to zero of each column whose entries have one sign, which
// changes no gradient but for its rounding. delta = grad_y . y - grad_log_z is formed from the same
// products as the rest, so that what it cancels in them cancels to the last place.
//
// Chunks are walked forwards for S and Z, which are kept for each of them, and backwards for E; all
// three are carried in double. `sums`, `queries` and `keys` work on one chunk and its memory alone,
// in any order, the others are sequential: results do not depend on how many chunks are under way.
// Nothing aliases. In float32 gradients of logarithms are within 8 ulp of the greatest |grad_y| |v|
// plus the sum of their own terms' absolute values.
template <class T>
struct attention_vjp_task {
  attention_tokens<T> keys;                   // without segments
  matrix_view<const T> log_q;                 // optional
  matrix_view<const T> grad_y;                // optional
  vector_view<const T> grad_log_z;            // optional
  matrix_view<const T> key_sums;              // (5, d_k), optional
  stack_view<const T> value_sums;             // (2, d_k, d_v)
  matrix_view<const T> grad_final_key_sums;   // optional
  stack_view<const T> grad_final_value_sums;  // optional
  matrix_view<T> grad_log_k;                  // each output optional
  matrix_view<T> grad_v;
  matrix_view<T> grad_log_q;
  matrix_view<T> grad_log_decay;
  matrix_view<T> grad_key_sums;
  stack_view<T> grad_value_sums;
  std::int64_t n_q;
  std::int64_t n;
  bool causal;
  bool scales_known;  // `scales` has run
  void* run;          // run_bytes, aligned to 64
};

template <class T>
struct attention_vjp_functions {
  // Memory that the chunks of a run share, and what each chunk under way has to itself.
  std::size_t (*run_bytes)(std::int64_t n, std::int64_t d_k, std::int64_t d_v, bool causal);
  std::size_t (*chunk_bytes)(std::int64_t d_k, std::int64_t d_v);
  // The state that goes in, and the row that values are taken less.
  void (*begin)(const attention_vjp_task<T>& task, void* memory);
  // The scales of all chunks; needed first where not causal, and where the sums of chunks do not
  // go in order.
  void (*scales)(const attention_vjp_task<T>& task, void* memory);
  // The sums of one chunk of keys, and their way into S and Z.
  void (*sums)(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory);
  void (*advance_sums)(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory);
  // What comes from the gradients of the final state.
  void (*turn)(const attention_vjp_task<T>& task);
  // grad_log_q of a chunk of queries and its part of E, E past it, and the gradients of a chunk of
  // keys.
  void (*queries)(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory);
  void (*advance_gradients)(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory);
  // Where not causal, between the last queries and the first keys.
  void (*finish_queries)(const attention_vjp_task<T>& task);
  void (*keys)(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory);
  // The gradients of the state that went in.
  void (*finish)(const attention_vjp_task<T>& task);
};

struct attention_vjp_kernels {
  attention_vjp_functions<float> f32;
  attention_vjp_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_ATTENTION_VJP_KERNELS_HPP
