// Two-layer networks of the rows of x, one a factor, and their reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_FACTOR_VALUES_KERNELS_HPP
#define SUBQUAD_KERNELS_FACTOR_VALUES_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

struct factor_network_sizes {
  std::int64_t n_factors;
  std::int64_t d;
  std::int64_t h;
  std::int64_t k;
};

// Packed once by pack or pack_reverse, read by any number of tasks.
template <class T>
struct factor_networks_task {
  factor_network_sizes size;
  stack_view<const T> weight_in;   // (n_factors, h, d)
  matrix_view<const T> bias_in;    // (n_factors, h)
  stack_view<const T> weight_out;  // (n_factors, k, h)
  matrix_view<const T> bias_out;   // (n_factors, k), not looked at by the reverse
  void* packed;                    // packed or packed_reverse bytes, aligned to 64
};

// out_mi = weight_out_m gelu(z_mi) + bias_out_m, z_mi = weight_in_m x_i + bias_in_m.
// Sums in T, from the bias on, in the order of d and of h: z is within (d + 1) eps / 2 of its
// terms' magnitudes added up, gelu within 12 ulp of its argument's, out within (h + 1) eps / 2 of
// its terms' magnitudes added up. What a row of x holds reaches its own rows of out only. No output
// may share memory with an input.
template <class T>
struct factor_values_task {
  factor_networks_task<T> networks;  // packed by pack
  matrix_view<const T> x;            // (n, d)
  std::int64_t n;
  stack_view<T> out;  // (n_factors, n, k)
  void* scratch;      // scratch bytes, aligned to 64
};

// Partial sums of the gradients of weights and biases. Of a factor's matrix, hidden number j and
// column c, of d or k columns, is at
//   c / panel * panel * h_padded + j * width + c % panel,
// width being what is left of the columns, in whole vectors, up to panel.
template <class T>
struct factor_network_sums {
  T* weight_in;   // [n_factors][in_size]
  T* bias_in;     // [n_factors][h]
  T* weight_out;  // [n_factors][out_size], k columns
  T* bias_out;    // [n_factors][k]
  std::int64_t in_size;
  std::int64_t out_size;
  std::int64_t h_padded;
  std::int64_t panel;
  std::int64_t lanes;
  std::int64_t size;  // elements of all four, which lie one after another from weight_in on
};

struct factor_values_needs {
  bool weight_in;
  bool bias_in;
  bool weight_out;
  bool bias_out;
};

// With q_mi = (weight_out_m^T grad_mi) gelu'(z_mi), element by element, z computed anew:
//   grad_x_i = sum_m weight_in_m^T q_mi
// and, added to the sums, of the rows of this task,
//   weight_in_m: sum_i q_mi x_i^T    bias_in_m: sum_i q_mi
//   weight_out_m: sum_i grad_mi gelu(z_mi)^T    bias_out_m: sum_i grad_mi
// Sums in T: over k and h in their order, from zero; over rows in their order for weights and in
// lanes, block by block, for biases. gelu' is within 2.5 eps of the sum of its terms' magnitudes.
// Rows past n take no part. No output may share memory with an input.
template <class T>
struct factor_values_reverse_task {
  factor_networks_task<T> networks;  // packed by pack_reverse
  stack_view<const T> grad;          // (n_factors, n, k)
  matrix_view<const T> x;            // (n, d)
  std::int64_t n;
  matrix_view<T> grad_x;  // (n, d), optional
  factor_values_needs needs;
  bool first;  // the sums hold nothing yet
  factor_network_sums<T> sums;
  void* scratch;  // reverse_scratch bytes, aligned to 64
};

template <class T>
struct factor_values_functions {
  std::size_t (*packed)(const factor_network_sizes& size);
  void (*pack)(const factor_networks_task<T>& task);
  std::size_t (*scratch)(const factor_network_sizes& size);
  void (*values)(const factor_values_task<T>& task);
  std::size_t (*packed_reverse)(const factor_network_sizes& size);
  void (*pack_reverse)(const factor_networks_task<T>& task);
  std::size_t (*reverse_scratch)(const factor_network_sizes& size);
  factor_network_sums<T> (*place_sums)(const factor_network_sizes& size, T* memory);
  void (*reverse)(const factor_values_reverse_task<T>& task);
};

struct factor_values_kernels {
  factor_values_functions<float> f32;
  factor_values_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_FACTOR_VALUES_KERNELS_HPP
