// log sum exp in one pass, as a state that merges.
#ifndef SUBQUAD_CUDA_LOG_SUM_EXP_CUH
#define SUBQUAD_CUDA_LOG_SUM_EXP_CUH

#include "device.cuh"

namespace subquad::cuda {

// Stands for sum 2^shift, where sum is an unevaluated total + rest (the rest is what the total lost
// to rounding). The shift is finite: terms of +inf make the sum +inf, terms of NaN make it NaN, and
// no term of -inf counts. A sum over nothing has the lowest shift.
template <class T>
struct log_sum {
  T shift;
  T total;
  T rest;

  static SUBQUAD_DEVICE log_sum nothing() { return {-std::numeric_limits<T>::max(), 0, 0}; }

  // Raises the shift to that of a term 2^exponent; NaN counts for nothing here.
  SUBQUAD_DEVICE void raise(T exponent) {
    const T next = fmin(fmax(shift, exponent), std::numeric_limits<T>::max());
    if (next == shift) return;
    const T scale = power_of_2(shift - next);
    total *= scale;
    rest *= scale;
    shift = next;
  }

  // Adds a sum of terms that were scaled by 2^-shift.
  SUBQUAD_DEVICE void add(T sum) {
    const T before = total;
    const T term = sum + rest;
    total = before + term;
    rest = term - (total - before);
    // Infinities have no rest.
    if (!(fabs(rest) <= total)) rest = 0;
  }

  SUBQUAD_DEVICE void merge(const log_sum& other) {
    raise(other.shift);
    const T scale = power_of_2(other.shift - shift);
    // An infinite sum has the largest shift, hence the scale 1.
    add(other.total * scale);
    add(other.rest * scale);
  }

  // Natural logarithm of the sum.
  SUBQUAD_DEVICE T value() const {
    if (total == 0) return -infinity<T>();
    return (shift + log2(total)) * kLn2<T>;
  }
};

// The states of the warp's lanes merged over `groups` groups of neighbours; all lanes of a
// group get the same.
template <class T>
SUBQUAD_DEVICE log_sum<T> merged_over_warp(log_sum<T> state, int groups) {
  SUBQUAD_UNROLL
  for (int flip = 1; flip < kWarp / groups; flip *= 2) {
    log_sum<T> other;
    other.shift = __shfl_xor_sync(0xffffffffu, state.shift, flip);
    other.total = __shfl_xor_sync(0xffffffffu, state.total, flip);
    other.rest = __shfl_xor_sync(0xffffffffu, state.rest, flip);
    // The lower lane's state comes first on both sides.
    if (threadIdx.x & static_cast<unsigned>(flip)) {
      other.merge(state);
      state = other;
    } else {
      state.merge(other);
    }
  }
  return state;
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_LOG_SUM_EXP_CUH
