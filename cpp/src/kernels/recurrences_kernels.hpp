// Linear recurrences in the log domain and their reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_RECURRENCES_KERNELS_HPP
#define SUBQUAD_KERNELS_RECURRENCES_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "lane_tile.hpp"
#include "matrix_view.hpp"

namespace subquad {

// log h = reference + remainder + log(sum) with sum >= 1, or sum = 0 and the lowest reference where
// h = 0. A reference is log_b_j plus the log_a that follow it, never a sum over a whole row; what
// rounding takes from it is kept for float64 alone.
struct recurrence_state {
  lane_numbers reference;
  lane_numbers remainder;
  lane_numbers sum;
};

// How a piece of a row acts on the state that enters it: h leaves as exp(log_scale) h, plus the h
// that an empty state leaves with. log_scale is -inf after a reset, whatever came before or after.
struct recurrence_scale {
  lane_numbers log_scale;
  lane_numbers remainder;
};

// How a piece of a row passes a gradient on: what leaves its front is
// constant + product * (what enters its end).
struct recurrence_link {
  lane_numbers constant;
  lane_numbers product;
};

// Tiles of h_t = exp(log_a_t) h_{t-1} + exp(log_b_t) and of its reverse, formulas in c_api.h; a
// border between segments acts as log_a = -inf, and so does the first entry of a row where `fresh`.
//   scan       out from state, and the last state
//   summarise  state and scale of the tile, from an empty state
//   prepare    from state the states that reverse needs, and with grad also link
//   reverse    grad_log_a, grad_log_b (each optional) from saved; carry, the gradient of log h that
//              enters from behind, becomes the one that leaves at the front
// Nothing aliases. Sums are of positive terms, in double. Relative to h, a step errs by 12 ulp of
// a double and, for float32, a reference by half an ulp of a double of |log h|; float32 adds 4e-11
// for the exponentials and 2.5e-10 for the logarithm, which it does not see.
template <class T>
struct recurrence_task {
  lane_tile tile;
  lane_view<const T> log_a;
  lane_view<const T> log_b;
  lane_view<const T> grad;
  lane_view<T> out;
  lane_view<T> grad_log_a;
  lane_view<T> grad_log_b;
  vector_view<const std::int64_t> segments;  // of a row, optional
  bool fresh;
  recurrence_state* state;
  recurrence_scale* scale;
  recurrence_link* link;
  recurrence_state* saved;  // before each block of kBlockSteps steps
  double* carry;            // kTileLanes
  void* scratch;            // recurrence_scratch bytes, aligned to 64
};

template <class T>
struct recurrences_functions {
  std::size_t recurrence_scratch;
  void (*scan)(const recurrence_task<T>& task);
  void (*summarise)(const recurrence_task<T>& task);
  void (*prepare)(const recurrence_task<T>& task);
  void (*reverse)(const recurrence_task<T>& task);
};

struct recurrences_kernels {
  recurrences_functions<float> f32;
  recurrences_functions<double> f64;
};

// A log_b that exceeds the reference by more than this becomes the reference: e^16 for each of 2^63
// terms is far from overflow, and log(sum) stays small beside what it is added to.
constexpr double kRecurrenceThreshold = 16;

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_RECURRENCES_KERNELS_HPP
