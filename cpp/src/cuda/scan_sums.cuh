// Sums of exponentials of any range, as the states of scans.
//
// Between threads a sum is e^reference sum in float64, the reference an element of the sum. Within
// a thread, over a few steps, it is held in the type of the elements: it keeps its reference until
// an element exceeds that by more than a threshold, so that an element costs one power and no error
// is carried from element to element.
//
// An empty sum has the lowest reference, and not -inf, so that -inf - -inf does not arise. What is
// infinite has the reference +inf; what is NaN has a sum that is.
#ifndef SUBQUAD_CUDA_SCAN_SUMS_CUH
#define SUBQUAD_CUDA_SCAN_SUMS_CUH

#include "batches.cuh"
#include "device.cuh"
#include "scan.cuh"

namespace subquad::cuda {

// In nats. Small: exponents err by a part of their size, and so does the logarithm of a sum.
inline constexpr int kScanThreshold = 4;

template <class A>
inline constexpr A kLowest = -std::numeric_limits<A>::max();

// a b, but 0 where either is, whatever the other: a gradient of 0 asks for nothing, and a weight of
// 0 keeps what is not finite away.
template <class A>
SUBQUAD_DEVICE A weighted(A a, A b) {
  return a == 0 || b == 0 ? A(0) : a * b;
}

// e^x between states of elements of type T: within 5e-8 relative in float32, within 2 ulp of
// float64 in float64. In float32 for x < 600, which differences of references are.
template <class T>
SUBQUAD_DEVICE double exp_between(double x) {
  if constexpr (sizeof(T) == 8) return exp(x);
  const double exponent = x * kLog2E<double>;
  if (!(exponent > -1000.0)) return exponent == exponent ? 0.0 : exponent;
  const double whole = rint(exponent);
  const auto rest = static_cast<float>(exponent - whole);
  // (2^r - 1) / r for |r| <= 1/2: ln 2^k / k!. Added to 1 in float64, its rounding counts for less
  // than that of a power in float.
  float p = 1.3215487e-6f;
  p = fma(p, rest, 1.5252734e-5f);
  p = fma(p, rest, 1.5403530e-4f);
  p = fma(p, rest, 1.3333558e-3f);
  p = fma(p, rest, 9.6181291e-3f);
  p = fma(p, rest, 5.5504109e-2f);
  p = fma(p, rest, 2.4022651e-1f);
  p = fma(p, rest, 6.9314718e-1f);
  const auto bits = (static_cast<long long>(whole) + 1023) << 52;
  return (1.0 + static_cast<double>(p * rest)) * __longlong_as_double(bits);
}

// e^x within a thread: within 3 ulp in float32 (0 below e^-87), 2 ulp of float64 in float64.
SUBQUAD_DEVICE double exp_within(double x) { return exp(x); }
SUBQUAD_DEVICE float exp_within(float x) {
  // Not beyond, for what -inf would make of its own rounding; NaN stays.
  const float bounded = x < -200.0f ? -200.0f : x;
  const float exponent = bounded * kLog2E<float>;
  // What log2(e) lost to rounding, and the product.
  constexpr float kRest = 1.92596299e-8f;
  const float lost = fma(bounded, kLog2E<float>, -exponent) + bounded * kRest;
  const float power = power_of_2(exponent);
  return fma(power, lost * kLn2<float>, power);
}

template <class T>
struct scaled_sum {
  double reference;
  double sum;

  static SUBQUAD_DEVICE scaled_sum nothing() { return {static_cast<double>(kLowest<T>), 0.0}; }
  static SUBQUAD_DEVICE scaled_sum merged(const scaled_sum& first, const scaled_sum& second) {
    const bool swaps = second.reference > first.reference;
    const double high = swaps ? second.reference : first.reference;
    const double low = swaps ? first.reference : second.reference;
    const double factor = exp_between<T>(low == high ? 0.0 : low - high);
    const double sum = swaps ? second.sum + first.sum * factor : first.sum + second.sum * factor;
    // What cancels leaves no reference behind: smaller terms may follow.
    return {sum == 0.0 ? nothing().reference : high, sum};
  }
  template <class F>
  SUBQUAD_DEVICE scaled_sum exchanged(F&& f) const {
    return {f(reference), f(sum)};
  }
};

// A state and whether a run begins in its piece: then it is that of the last one, and what came
// before counts no more.
template <class State>
struct of_runs {
  State state;
  int begins;

  static SUBQUAD_DEVICE of_runs nothing() { return {State::nothing(), 0}; }
  static SUBQUAD_DEVICE of_runs merged(const of_runs& first, const of_runs& second) {
    const State both = State::merged(first.state, second.state);
    return {second.begins ? second.state : both, first.begins | second.begins};
  }
  template <class F>
  SUBQUAD_DEVICE of_runs exchanged(F&& f) const {
    return {state.exchanged(f), f(begins)};
  }
};

// Within a thread: sum weight_j e^x_j over a few steps, in A.
template <class A>
struct running_sum {
  A reference = kLowest<A>;
  A sum = 0;

  SUBQUAD_DEVICE running_sum() {}
  template <class T>
  SUBQUAD_DEVICE explicit running_sum(const scaled_sum<T>& from)
      : reference(static_cast<A>(from.reference)), sum(static_cast<A>(from.sum)) {}

  SUBQUAD_DEVICE void clear() { *this = running_sum(); }

  // Returns e^(x - reference), with the reference after.
  SUBQUAD_DEVICE A add(A x) { return add(x, A(1)); }
  SUBQUAD_DEVICE A add(A x, A weight) {
    const A d = x == reference ? A(0) : x - reference;
    const bool moves = d > A(kScanThreshold);
    const A e = exp_within(moves ? -d : d);
    sum = moves ? fma(sum, e, weight) : fma(weight, e, sum);
    if (moves) reference = x;
    return moves ? A(1) : e;
  }

  // grad over the sum, times e^reference: 0 where the sum is empty or nothing is asked of it.
  SUBQUAD_DEVICE A share(A grad) const {
    if (grad == 0 || sum == 0) return 0;
    return reference == infinity<A>() ? std::numeric_limits<A>::quiet_NaN() : grad / sum;
  }
};

// Within a thread, from the last step to the first: a sum of shares over e^-reference.
template <class A>
struct running_adjoint {
  A reference;
  A sum;

  template <class T>
  SUBQUAD_DEVICE explicit running_adjoint(const scaled_sum<T>& from)
      : reference(-static_cast<A>(from.reference)), sum(static_cast<A>(from.sum)) {}

  // To the reference of a sum before, unless that is empty.
  SUBQUAD_DEVICE void move(A to) {
    if (to == reference || to == kLowest<A>) return;
    if (sum != 0) sum *= exp_within(to - reference);
    reference = to;
  }
  SUBQUAD_DEVICE void clear() { sum = 0; }

  template <class T>
  SUBQUAD_DEVICE scaled_sum<T> state() const {
    if (sum == 0) return scaled_sum<T>::nothing();
    return {-static_cast<double>(reference), static_cast<double>(sum)};
  }
};

// What a gradient of the logarithm of a sum is to the terms of that sum.
template <class T>
SUBQUAD_DEVICE scaled_sum<T> share_of(const scaled_sum<T>& total, double grad) {
  if (grad == 0 || total.sum == 0) return scaled_sum<T>::nothing();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  return {-total.reference, total.reference == infinity<double>() ? nan : grad / total.sum};
}

// The gradient of the logarithm of a term, or of a part of the sums.
template <class T>
SUBQUAD_DEVICE double gradient_of(const scaled_sum<T>& term, const scaled_sum<T>& shares) {
  if (term.sum == 0 || shares.sum == 0) return 0;
  return term.sum * shares.sum * exp_between<T>(term.reference + shares.reference);
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_SCAN_SUMS_CUH
