// Numbers of any range: a double and an exponent of its own.
#ifndef SUBQUAD_CUDA_EXTENDED_CUH
#define SUBQUAD_CUDA_EXTENDED_CUH

#include <cmath>

#include "device.cuh"

namespace subquad::cuda {

// value * 2^(512 exponent), |value| in [2^-256, 2^256). Steps of 512 are wide enough that numbers
// which are added mostly have one exponent, and narrow enough that a product of two values is
// finite and normal. 0 has an exponent below, infinities and NaN one above all others, so that
// neither is lost beside another number. Sums and products round once, as doubles do.
struct extended {
  double value;
  int exponent;

  static constexpr int kStep = 512;
  static constexpr int kLowest = -(1 << 26);
  static constexpr int kHighest = 1 << 26;

  static SUBQUAD_DEVICE extended zero() { return {0.0, kLowest}; }

  // sign e^x: within 1 ulp of a double for |x| < 2^31.
  static SUBQUAD_DEVICE extended exp(double x, double sign = 1) {
    if (x == -infinity<double>() || sign == 0) return zero();
    if (!(std::fabs(x) < 1073741824.0)) {
      return x < 0 ? zero() : extended{sign * std::exp(x), kHighest};
    }
    // log(2) in two parts, the first short enough that its product with an integer is exact.
    constexpr double kHigh = 6.93147180369123816490e-01;
    constexpr double kLow = 1.90821492927058770002e-10;
    const double power = std::rint(x * kLog2E<double>);
    const double rest = (x - power * kHigh) - power * kLow;
    const double step = std::rint(power * (1.0 / kStep));
    const int shift = static_cast<int>(power - step * kStep);
    return extended{sign * std::ldexp(std::exp(rest), shift), static_cast<int>(step)}.normalised();
  }

  SUBQUAD_DEVICE extended normalised() const {
    const double size = std::fabs(value);
    if (size >= 0x1p-256 && size < 0x1p256) return *this;
    if (size == 0) return zero();
    if (size < 0x1p-256) return {value * 0x1p512, exponent - 1};
    if (size < infinity<double>()) return {value * 0x1p-512, exponent + 1};
    return {value, kHighest};
  }

  friend SUBQUAD_DEVICE extended operator*(const extended& a, const extended& b) {
    return extended{a.value * b.value, a.exponent + b.exponent}.normalised();
  }

  friend SUBQUAD_DEVICE extended operator+(const extended& a, const extended& b) {
    if (a.exponent == b.exponent) return extended{a.value + b.value, a.exponent}.normalised();
    const bool a_leads = a.exponent > b.exponent;
    const double high = a_leads ? a.value : b.value;
    const double low = a_leads ? b.value : a.value;
    const int larger = a_leads ? a.exponent : b.exponent;
    const int steps = larger - (a_leads ? b.exponent : a.exponent);
    // Two steps lower, a number is below half an ulp of any other.
    return extended{high + (steps > 1 ? 0.0 : low * 0x1p-512), larger}.normalised();
  }

  SUBQUAD_DEVICE extended inverse() const {
    return value == 0 ? extended{infinity<double>(), kHighest}
                      : extended{1 / value, -exponent}.normalised();
  }

  // log |a / b|, b not 0: exponents meet as integers.
  static SUBQUAD_DEVICE double log_ratio(const extended& a, const extended& b) {
    if (a.value == 0) return -infinity<double>();
    return std::log(std::fabs(a.value / b.value)) +
           static_cast<double>(a.exponent - b.exponent) * (kStep * kLn2<double>);
  }
  SUBQUAD_DEVICE double log() const { return log_ratio(*this, {1.0, 0}); }

  SUBQUAD_DEVICE double sign() const { return value > 0 ? 1.0 : (value < 0 ? -1.0 : value); }

  // As a double, which may overflow.
  SUBQUAD_DEVICE double rounded() const {
    if (exponent == 0 || value == 0 || exponent == kHighest) return value;
    const int step = exponent > 3 ? 3 : (exponent < -3 ? -3 : exponent);
    return std::ldexp(value, step * kStep);
  }
};

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_EXTENDED_CUH
