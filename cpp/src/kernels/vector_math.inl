// Elementary functions on vectors: no branches, no tables, no library.
#ifndef SUBQUAD_KERNELS_VECTOR_MATH_INL
#define SUBQUAD_KERNELS_VECTOR_MATH_INL

#include "vector.inl"

namespace subquad {
namespace SUBQUAD_ISA {

// The same bits as integers, and back.
template <class T>
SUBQUAD_INLINE ivec<T> bits_of(vec<T> v) {
  return (ivec<T>)v;
}

template <class T>
SUBQUAD_INLINE vec<T> from_bits(ivec<T> b) {
  return (vec<T>)b;
}

template <class T>
struct float_format;

template <>
struct float_format<float> {
  typedef std::uint32_t scalar_bits;
  typedef std::uint32_t unsigned_bits __attribute__((vector_size(SUBQUAD_VECTOR_BYTES)));
  static constexpr int kFractionBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kMinNormal = 0x1p-126f;
  static constexpr scalar_bits kOneBits = 0x3f800000;
  static constexpr scalar_bits kRootHalfBits = 0x3f3504f3;  // of sqrt(1/2)
  static constexpr scalar_bits kOffsetBits = 0x4b000000;    // of 2^kFractionBits
};

template <>
struct float_format<double> {
  typedef std::uint64_t scalar_bits;
  typedef std::uint64_t unsigned_bits __attribute__((vector_size(SUBQUAD_VECTOR_BYTES)));
  static constexpr int kFractionBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kMinNormal = 0x1p-1022;
  static constexpr scalar_bits kOneBits = 0x3ff0000000000000;
  static constexpr scalar_bits kRootHalfBits = 0x3fe6a09e667f3bcd;
  static constexpr scalar_bits kOffsetBits = 0x4330000000000000;
};

// 1.5 * 2^fraction bits: what is added to it is rounded to an integer, which the lowest bits of the
// sum then hold.
template <class T>
constexpr T kRounder = static_cast<T>(std::int64_t{3} << (float_format<T>::kFractionBits - 1));

#if defined(__OPTIMIZE__) && (defined(__FMA__) || defined(__aarch64__))
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

// p * f + linear * f + 1. Where the products are rounded, f stands apart from the rest of its
// coefficient, which is smaller: without that the error would exceed 1 ulp.
template <class T>
SUBQUAD_INLINE vec<T> exp2_last_terms(vec<T> p, vec<T> f, T linear) {
  if constexpr (kFusedMultiplyAdd) {
    return (p * f + linear) * f + T{1};
  } else {
    return ((p * f + (linear - T{1})) * f + f) + T{1};
  }
}

// 2^f for |f| <= 1/2: minimax polynomials of relative error 3.0e-9 and 4.2e-18.
SUBQUAD_INLINE vec<float> exp2_fraction(vec<float> f) {
  vec<float> p = broadcast(0x1.417842p-13f);
  p = p * f + 0x1.5f0948p-10f;
  p = p * f + 0x1.3b2dd4p-7f;
  p = p * f + 0x1.c6af7ap-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  return exp2_last_terms<float>(p, f, 0x1.62e430p-1f);
}

SUBQUAD_INLINE vec<double> exp2_fraction(vec<double> f) {
  vec<double> p = broadcast(0x1.e8280f8fcb2b6p-32);
  p = p * f + 0x1.e612eaabc0cb5p-28;
  p = p * f + 0x1.b525fd77da621p-24;
  p = p * f + 0x1.62bfcd0b21992p-20;
  p = p * f + 0x1.ffcbfc000c3fep-17;
  p = p * f + 0x1.4309130c5fbf6p-13;
  p = p * f + 0x1.5d87fe78b2675p-10;
  p = p * f + 0x1.3b2ab6fba0fd2p-7;
  p = p * f + 0x1.c6b08d704a0d9p-5;
  p = p * f + 0x1.ebfbdff82c59dp-3;
  return exp2_last_terms<double>(p, f, 0x1.62e42fefa39efp-1);
}

// 2^t for t <= 120 (float), t <= 1000 (double): at most 1 ulp from -126 (-1022) on; exactly 0 below
// -126.5 (-1022.5), -inf included; NaN for NaN. For loops that have subtracted a maximum.
template <class T>
SUBQUAD_INLINE vec<T> exp2_bounded(vec<T> t) {
  constexpr int kFractionBits = float_format<T>::kFractionBits;
  constexpr int kBias = float_format<T>::kBias;
  // The rounder carries the exponent's bias: shifted, the sum's lowest bits are the power of two
  // itself, and 0 for the lower bound.
  constexpr T kBiasedRounder = kRounder<T> + static_cast<T>(kBias);
  t = max<T>(broadcast(static_cast<T>(-kBias)), t);  // in this order NaN stays
  const vec<T> rounded = t + kBiasedRounder;
  const vec<T> fraction = t - (rounded - kBiasedRounder);
  return exp2_fraction(fraction) * from_bits<T>(bits_of<T>(rounded) << kFractionBits);
}

// p * 2^n for p in (1/2, 2) and an integer n in [-1080, 1025] ([-152, 129] for float): overflows to
// infinity, and rounds once into the subnormals.
template <class T>
SUBQUAD_INLINE vec<T> scale_by_power(vec<T> p, vec<T> n) {
#if SUBQUAD_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (vec<T>)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)p, (__m512)n);
  } else {
    return (vec<T>)_mm512_maskz_scalef_pd((__mmask8)-1, (__m512d)p, (__m512d)n);
  }
#else
  // No single factor is a normal number for every n; the first product is exact.
  constexpr T kBiasedRounder = kRounder<T> + static_cast<T>(float_format<T>::kBias);
  const auto negative = n < T{0};
  const vec<T> bias =
      negative ? broadcast(kBiasedRounder + T{64}) : broadcast(kBiasedRounder - T{1});
  const vec<T> second = negative ? broadcast(static_cast<T>(0x1p-64)) : broadcast(T{2});
  return p * from_bits<T>(bits_of<T>(n + bias) << float_format<T>::kFractionBits) * second;
#endif
}

// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2: relative error of e^r 3.1e-9 and 3.7e-18.
SUBQUAD_INLINE vec<float> exp_remainder(vec<float> r) {
  vec<float> p = broadcast(0x1.6a4d40p-10f);
  p = p * r + 0x1.12398cp-7f;
  p = p * r + 0x1.5558b0p-5f;
  p = p * r + 0x1.555492p-3f;
  return p * r + 0x1.fffffcp-2f;
}

SUBQUAD_INLINE vec<double> exp_remainder(vec<double> r) {
  vec<double> p = broadcast(0x1.ada8e6b962655p-26);
  p = p * r + 0x1.28ae1402b253fp-22;
  p = p * r + 0x1.71df0a6fe07f6p-19;
  p = p * r + 0x1.a0199949c380ap-16;
  p = p * r + 0x1.a01a0136cbef6p-13;
  p = p * r + 0x1.6c16c1847d17fp-10;
  p = p * r + 0x1.1111111125563p-7;
  p = p * r + 0x1.55555555506abp-5;
  p = p * r + 0x1.5555555555504p-3;
  return p * r + 0x1.000000000000ap-1;
}

// Constants of the reductions by powers of two. The high part of log(2) ends in so many zeros that
// its product with an exponent is exact without a fused multiply-add.
template <class T>
struct log2_constants;

template <>
struct log2_constants<float> {
  static constexpr float kLog2E = 0x1.715476p+0f;
  static constexpr float kLog2High = 0x1.62e4p-1f;
  static constexpr float kLog2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExpLow = -104.0f;  // e^x rounds to 0 here,
  static constexpr float kExpHigh = 89.0f;   // and to infinity here
};

template <>
struct log2_constants<double> {
  static constexpr double kLog2E = 0x1.71547652b82fep+0;
  static constexpr double kLog2High = 0x1.62e42fefa38p-1;
  static constexpr double kLog2Low = 0x1.ef35793c7673p-45;
  static constexpr double kExpLow = -746.0;
  static constexpr double kExpHigh = 710.0;
};

// e^x: at most 1 ulp, subnormal results included; 0 for -inf, infinity from the overflow on, NaN
// for NaN.
template <class T>
SUBQUAD_INLINE vec<T> exp(vec<T> x) {
  using constants = log2_constants<T>;
  x = min<T>(broadcast(constants::kExpHigh), max<T>(broadcast(constants::kExpLow), x));
  const vec<T> rounded = x * constants::kLog2E + kRounder<T>;
  const vec<T> n = rounded - kRounder<T>;
  const vec<T> high = x - n * constants::kLog2High;  // exact
  const vec<T> r = high - n * constants::kLog2Low;
  const vec<T> r_low = (high - r) - n * constants::kLog2Low;
  const vec<T> p = (r * r * exp_remainder(r) + r_low) + r;
  return scale_by_power<T>(p + T{1}, n);
}

// log(1 + f) - f for 1 + f in [sqrt(1/2), sqrt(2)]: relative error of log(1 + f) 5.9e-9
// and 1.3e-18.
SUBQUAD_INLINE vec<float> log_remainder(vec<float> f) {
  vec<float> p = broadcast(-0x1.38bb80p-4f);
  p = p * f + 0x1.056192p-3f;
  p = p * f - 0x1.0d85d8p-3f;
  p = p * f + 0x1.22d8b0p-3f;
  p = p * f - 0x1.547218p-3f;
  p = p * f + 0x1.99a022p-3f;
  p = p * f - 0x1.000228p-2f;
  p = p * f + 0x1.555554p-2f;
  p = p * f - 0.5f;
  return p * (f * f);
}

SUBQUAD_INLINE vec<double> log_remainder(vec<double> f) {
  // With s = f / (2 + f), log(1 + f) = 2 s + s R(s^2) = f - f^2 / 2 + s (f^2 / 2 + R(s^2)).
  const vec<double> s = f / (f + 2.0);
  const vec<double> z = s * s;
  vec<double> p = broadcast(0x1.2f09126b27f35p-3);
  p = p * z + 0x1.39a15652c688bp-3;
  p = p * z + 0x1.74664325ec881p-3;
  p = p * z + 0x1.c71c51f25e90fp-3;
  p = p * z + 0x1.2492494211864p-2;
  p = p * z + 0x1.999999997fafep-2;
  p = p * z + 0x1.5555555555593p-1;
  const vec<double> half_square = f * f * 0.5;
  return s * (p * z + half_square) - half_square;
}

// A positive normal number as 2^exponent * (1 + fraction), 1 + fraction in [sqrt(1/2), sqrt(2)).
template <class T>
struct decomposed {
  vec<T> exponent;
  vec<T> fraction;
};

template <class T>
SUBQUAD_INLINE decomposed<T> decompose(vec<T> x) {
  using format = float_format<T>;
  using unsigned_bits = typename format::unsigned_bits;
  constexpr typename format::scalar_bits kFractionMask =
      (typename format::scalar_bits{1} << format::kFractionBits) - 1;
  // The exponent's bits in the fraction of 2^fraction bits make that number plus the exponent. The
  // shift is unsigned because only AVX-512 shifts 64-bit integers arithmetically.
  constexpr T kOffset = static_cast<T>(std::uint64_t{1} << format::kFractionBits);
  const unsigned_bits shifted = (unsigned_bits)x + (format::kOneBits - format::kRootHalfBits);
  const vec<T> exponent = (vec<T>)((shifted >> format::kFractionBits) | format::kOffsetBits) -
                          (kOffset + static_cast<T>(format::kBias));
  const vec<T> mantissa = (vec<T>)((shifted & kFractionMask) + format::kRootHalfBits);
  return {exponent, mantissa - T{1}};
}

// exponent * log(2) + log(1 + f + f_low), |f_low| at most half an ulp of f.
template <class T>
SUBQUAD_INLINE vec<T> log_sum(vec<T> exponent, vec<T> f, vec<T> f_low) {
  using constants = log2_constants<T>;
  // The product is exact, and 0 or greater than f: `low` is exactly what the sum lost.
  const vec<T> scaled = exponent * constants::kLog2High;
  const vec<T> sum = scaled + f;
  const vec<T> low = f - (sum - scaled);
  return sum + (low + (log_remainder(f) + (exponent * constants::kLog2Low + f_low)));
}

// value where low < x < infinity; -inf at low, NaN below it, infinity at infinity, NaN for NaN.
template <class T>
SUBQUAD_INLINE vec<T> with_log_limits(vec<T> value, vec<T> x, T low) {
  constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
  constexpr T kNaN = static_cast<T>(__builtin_nan(""));
  const vec<T> outside = x == low ? broadcast(-kInfinity) : broadcast(kNaN);
  const vec<T> inside = x > low ? value : outside;
  return x == kInfinity ? x : inside;
}

// log(x): at most 1 ulp, subnormal x included; -inf for 0, infinity for infinity, NaN below 0.
template <class T>
SUBQUAD_INLINE vec<T> log(vec<T> x) {
  using format = float_format<T>;
  constexpr T kScale = static_cast<T>(std::uint64_t{1} << format::kFractionBits);
  const auto subnormal = x < format::kMinNormal;
  const vec<T> shift =
      subnormal ? broadcast(static_cast<T>(-format::kFractionBits)) : broadcast(T{0});
  const decomposed<T> parts = decompose<T>(subnormal ? x * kScale : x);
  const vec<T> value = log_sum<T>(parts.exponent + shift, parts.fraction, vec<T>{});
  return with_log_limits<T>(value, x, T{0});
}

// log(1 + x): at most 1 ulp; keeps the sign of zero; -inf for -1, infinity for infinity, NaN below
// -1.
template <class T>
SUBQUAD_INLINE vec<T> log1p(vec<T> x) {
  using format = float_format<T>;
  constexpr T kBiasedRounder = kRounder<T> + static_cast<T>(format::kBias);
  const vec<T> u = x + T{1};
  const vec<T> x_in_u = u - T{1};
  const vec<T> lost = (T{1} - (u - x_in_u)) + (x - x_in_u);  // u + lost = 1 + x exactly
  const decomposed<T> parts = decompose<T>(u);
  // 2^-exponent is not a normal number for the greatest u, where what was lost does not matter.
  const vec<T> bounded = min<T>(broadcast(T{64}), parts.exponent);
  const vec<T> scale = from_bits<T>(bits_of<T>(kBiasedRounder - bounded) << format::kFractionBits);
  const vec<T> lost_fraction = lost * scale;
  const vec<T> f = parts.fraction + lost_fraction;
  // What f lost in turn moves the logarithm by itself / (1 + f).
  const vec<T> f_lost = lost_fraction - (f - parts.fraction);
  const vec<T> value = log_sum<T>(parts.exponent, f, f_lost - f_lost * (f - f * f));
  // The logarithm has the sign of x, which zero alone has lost on the way.
  const ivec<T> sign = bits_of<T>(x) & bits_of<T>(broadcast(-T{0}));
  return with_log_limits<T>(from_bits<T>(bits_of<T>(value) | sign), x, T{-1});
}

// |x| up to which sin_cos_bounded may be asked: quarters of a turn up to it have 20 bits, and their
// products with the first parts of pi / 2, of 33 bits, are exact.
template <class T>
constexpr T kSinCosBound = T(1647099);

// x less the nearest multiple of pi / 2, in two parts, and the number of that multiple in the
// lowest bits of `quarter`.
struct turned {
  vec<double> r;
  vec<double> r_low;
  ivec<double> quarter;
};

SUBQUAD_INLINE turned turn_back(vec<double> x, bool with_low) {
  constexpr double kFirst = 0x1.921fb544p+0;
  constexpr double kSecond = 0x1.0b4611a6p-34;
  constexpr double kRest = 0x1.3198a2e037073p-69;
  const vec<double> rounded = x * 0x1.45f306dc9c883p-1 + kRounder<double>;
  const vec<double> n = rounded - kRounder<double>;
  const vec<double> first = x - n * kFirst;  // exact
  const vec<double> second = n * kSecond;    // exact
  const vec<double> r = first - second;
  if (!with_low) return {r, vec<double>{}, bits_of<double>(rounded)};
  // What r lost, whichever of its terms is the greater, and the rest of pi / 2.
  const vec<double> taken = r - first;
  const vec<double> lost = (first - (r - taken)) - (second + taken);
  const vec<double> low = lost - n * kRest;
  const vec<double> sum = r + low;
  return {sum, (r - sum) + low, bits_of<double>(rounded)};
}

// Sine and cosine from those of what turn_back left.
SUBQUAD_INLINE void turn_forward(ivec<double> quarter, vec<double>& sine, vec<double>& cosine) {
  const ivec<double> swapped = -(quarter & 1);
  const ivec<double> s = bits_of<double>(sine);
  const ivec<double> c = bits_of<double>(cosine);
  const ivec<double> difference = (s ^ c) & swapped;
  sine = from_bits<double>((s ^ difference) ^ ((quarter & 2) << 62));
  cosine = from_bits<double>((c ^ difference) ^ (((quarter + 1) & 2) << 62));
}

// For |r| <= pi / 4: relative errors 1.6e-17 and 8.3e-19.
SUBQUAD_INLINE void sin_cos_bounded(vec<double> x, vec<double>& sine, vec<double>& cosine) {
  const turned t = turn_back(x, true);
  const vec<double> z = t.r * t.r;
  vec<double> p = broadcast(0x1.5dc86203d2cf9p-33);
  p = p * z - 0x1.ae5f28e829709p-26;
  p = p * z + 0x1.71de367fe6ba3p-19;
  p = p * z - 0x1.a01a019d5734ep-13;
  p = p * z + 0x1.111111111036ep-7;
  p = p * z - 0x1.5555555555551p-3;
  const vec<double> half_square = z * 0.5;
  const vec<double> value = t.r + (t.r * z * p + (t.r_low - t.r_low * half_square));
  sine = x == 0.0 ? x : value;  // of the sign of zero
  vec<double> q = broadcast(-0x1.903adc576a4adp-37);
  q = q * z + 0x1.1eeaf7c287a58p-29;
  q = q * z - 0x1.27e4f98c694c1p-22;
  q = q * z + 0x1.a01a019eb853ep-16;
  q = q * z - 0x1.6c16c16c16544p-10;
  q = q * z + 0x1.5555555555554p-5;
  const vec<double> near = 1.0 - half_square;
  cosine = near + (((1.0 - near) - half_square) + (z * z * q - t.r * t.r_low));
  turn_forward(t.quarter, sine, cosine);
}

// In double, a half of the lanes at a time: relative errors 9.7e-12 and 1.6e-13 before the one
// rounding.
SUBQUAD_INLINE void sin_cos_bounded(vec<float> x, vec<float>& sine, vec<float>& cosine) {
  typedef float half_lanes __attribute__((vector_size(SUBQUAD_VECTOR_BYTES / 2)));
  half_lanes halves[2];
  half_lanes sines[2];
  half_lanes cosines[2];
  __builtin_memcpy(halves, &x, sizeof x);
  for (int h = 0; h < 2; ++h) {
    const turned t = turn_back(__builtin_convertvector(halves[h], vec<double>), false);
    const vec<double> z = t.r * t.r;
    vec<double> p = broadcast(0x1.6d3969dc0f6b7p-19);
    p = p * z - 0x1.a0116b94e3b96p-13;
    p = p * z + 0x1.11110b2e41a8dp-7;
    p = p * z - 0x1.55555550f92dap-3;
    vec<double> s = t.r * (p * z + 1.0);
    vec<double> q = broadcast(-0x1.241c51a8c4fc5p-22);
    q = q * z + 0x1.a010adb8cacc5p-16;
    q = q * z - 0x1.6c16b75a113d0p-10;
    q = q * z + 0x1.5555554c7443bp-5;
    q = q * z - 0x1.fffffffff73abp-2;
    vec<double> c = q * z + 1.0;
    turn_forward(t.quarter, s, c);
    sines[h] = __builtin_convertvector(s, half_lanes);
    cosines[h] = __builtin_convertvector(c, half_lanes);
  }
  __builtin_memcpy(&sine, sines, sizeof sine);
  __builtin_memcpy(&cosine, cosines, sizeof cosine);
}

// Alone. Sine and cosine of |x| <= kSinCosBound are within 1 ulp + 2^-98 (float: 2^-49), keep the
// sign of zero, and are NaN for infinities and NaN.
template <class T>
SUBQUAD_INLINE vec<T> sin_bounded(vec<T> x) {
  vec<T> sine;
  vec<T> cosine;
  sin_cos_bounded(x, sine, cosine);
  return sine;
}

template <class T>
SUBQUAD_INLINE vec<T> cos_bounded(vec<T> x) {
  vec<T> sine;
  vec<T> cosine;
  sin_cos_bounded(x, sine, cosine);
  return cosine;
}

// exp(-r / 2) for |r| <= 0.76, |r| <= log(2) + 4e-5: relative errors 3.5e-9 and 3.4e-18.
SUBQUAD_INLINE vec<float> half_exp_fraction(vec<float> r) {
  vec<float> p = broadcast(0x1.6aaffap-16f);
  p = p * r - 0x1.12a312p-12f;
  p = p * r + 0x1.555938p-9f;
  p = p * r - 0x1.5553a2p-6f;
  p = p * r + 0x1.fffffap-4f;
  p = p * r - 0x1p-1f;
  return p * r + 0x1p+0f;
}

SUBQUAD_INLINE vec<double> half_exp_fraction(vec<double> r) {
  vec<double> p = broadcast(-0x1.ad565940d713ap-37);
  p = p * r + 0x1.28af93db6db57p-32;
  p = p * r - 0x1.71df4ab5a0af1p-28;
  p = p * r + 0x1.a01997607ed3bp-24;
  p = p * r - 0x1.a01a0110f2b9p-20;
  p = p * r + 0x1.6c16c1855901bp-16;
  p = p * r - 0x1.111111112fad5p-12;
  p = p * r + 0x1.555555555019cp-9;
  p = p * r - 0x1.55555555554b3p-6;
  p = p * r + 0x1.000000000000bp-3;
  p = p * r - 0x1p-1;
  return p * r + 0x1p+0;
}

// Q(t) exp(t^2 / 2) as a fraction, Q(t) the probability that a normal variable exceeds t, for t
// from 0 to the bound of gelu: relative errors 6.7e-9 and 1.0e-18. No coefficient is negative, so
// that the sums are as accurate as their terms.
SUBQUAD_INLINE vec<float> normal_tail_numerator(vec<float> t) {
  vec<float> p = broadcast(0x1.0e193p-8f);
  p = p * t + 0x1.4d4804p-5f;
  p = p * t + 0x1.779f2ap-3f;
  p = p * t + 0x1.c117b8p-2f;
  return p * t + 0x1p-1f;
}

SUBQUAD_INLINE vec<float> normal_tail_denominator(vec<float> t) {
  vec<float> q = broadcast(0x1.5283aep-7f);
  q = q * t + 0x1.a1bb54p-4f;
  q = q * t + 0x1.e13356p-2f;
  q = q * t + 0x1.340a8ap+0f;
  q = q * t + 0x1.acce0ap+0f;
  return q * t + 0x1p+0f;
}

SUBQUAD_INLINE vec<double> normal_tail_numerator(vec<double> t) {
  vec<double> p = broadcast(0x1.e005e155180d1p-23);
  p = p * t + 0x1.d30a794830c4dp-18;
  p = p * t + 0x1.be2187ad0e6e5p-14;
  p = p * t + 0x1.101f22dbd5234p-10;
  p = p * t + 0x1.d23355d86812fp-8;
  p = p * t + 0x1.23e33f6242ae4p-5;
  p = p * t + 0x1.0e365918ce446p-3;
  p = p * t + 0x1.6db3e0053601cp-2;
  p = p * t + 0x1.5bd21cea0121fp-1;
  p = p * t + 0x1.a7cf630dfe59ap-1;
  return p * t + 0x1p-1;
}

SUBQUAD_INLINE vec<double> normal_tail_denominator(vec<double> t) {
  vec<double> q = broadcast(0x1.2ccf4e332e956p-21);
  q = q * t + 0x1.24acab58fddc5p-16;
  q = q * t + 0x1.18289d39f2109p-12;
  q = q * t + 0x1.57572473e9cb3p-9;
  q = q * t + 0x1.287f6f862a7ep-6;
  q = q * t + 0x1.78578cb4ec178p-4;
  q = q * t + 0x1.64613c40f5662p-2;
  q = q * t + 0x1.f57e5a0d299ffp-1;
  q = q * t + 0x1.00115c84a636fp+1;
  q = q * t + 0x1.687935d2ea1e5p+1;
  q = q * t + 0x1.3a08c65650062p+1;
  return q * t + 0x1p+0;
}

template <class T>
struct gelu_constants;

// From the bound on, z Phi(z) and its derivative round to 0 for negative z. The grid has as many
// bits below the bound as have exact squares.
template <>
struct gelu_constants<float> {
  static constexpr float kBound = 15.0f;
  static constexpr float kGrid = 0x1.8p+15f;
  static constexpr int kDown = 64;
  static constexpr float kScaleDown = 0x1p-64f;
};

template <>
struct gelu_constants<double> {
  static constexpr double kBound = 39.0;
  static constexpr double kGrid = 0x1.8p+32;
  static constexpr int kDown = 128;
  static constexpr double kScaleDown = 0x1p-128;
};

// p * 2^n for |p| <= 8 and an integer n from -165 (float) or -1100 to 0; rounds once into the
// subnormals.
template <class T>
SUBQUAD_INLINE vec<T> scale_down(vec<T> p, vec<T> n) {
#if SUBQUAD_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return scale_by_power<T>(p, n);
#else
  using constants = gelu_constants<T>;
  constexpr T kBiasedRounder =
      kRounder<T> + static_cast<T>(float_format<T>::kBias + constants::kDown);
  const ivec<T> power = bits_of<T>(n + kBiasedRounder) << float_format<T>::kFractionBits;
  return p * from_bits<T>(power) * constants::kScaleDown;
#endif
}

// What z Phi(z) and its derivative are made of: with t = |z| up to the bound,
// exp(-t^2 / 2) = fraction * 2^exponent and Q(t) = ratio * exp(-t^2 / 2).
template <class T>
struct gelu_parts {
  vec<T> t;
  vec<T> ratio;
  vec<T> fraction;
  vec<T> exponent;
};

template <class T>
SUBQUAD_INLINE gelu_parts<T> make_gelu_parts(vec<T> z) {
  using constants = gelu_constants<T>;
  constexpr T kHalfLog2E = log2_constants<T>::kLog2E / 2;
  constexpr T kHigh = 2 * log2_constants<T>::kLog2High;
  constexpr T kLow = 2 * log2_constants<T>::kLog2Low;
  const vec<T> magnitude = from_bits<T>(bits_of<T>(z) & ~bits_of<T>(broadcast(-T{0})));
  const vec<T> t = min<T>(broadcast(constants::kBound), magnitude);  // in this order NaN stays
  // t^2 in two parts, the first one exact, the second one small.
  const vec<T> on_grid = (t + constants::kGrid) - constants::kGrid;
  const vec<T> square = on_grid * on_grid;
  const vec<T> n = (kRounder<T> - square * kHalfLog2E) - kRounder<T>;
  vec<T> r = square + n * kHigh;  // exact
  r = r + n * kLow;
  r = r + (t + on_grid) * (t - on_grid);
  return {t, normal_tail_numerator(t) / normal_tail_denominator(t), half_exp_fraction(r), n};
}

template <class T>
SUBQUAD_INLINE vec<T> gelu_value(vec<T> z, const gelu_parts<T>& parts) {
  const vec<T> tail = scale_down<T>((parts.t * parts.ratio) * parts.fraction, parts.exponent);
  return max<T>(vec<T>{}, z) - tail;  // in this order NaN and the sign of zero stay
}

template <class T>
SUBQUAD_INLINE vec<T> gelu_slope(vec<T> z, const gelu_parts<T>& parts) {
  constexpr T kRootDensity = T(0.39894228040143267793994605993438L);  // 1 / sqrt(2 pi)
  const vec<T> below =
      scale_down<T>((parts.ratio - parts.t * kRootDensity) * parts.fraction, parts.exponent);
  return z < T{0} ? below : T{1} - below;
}

// gelu(z) = z Phi(z), Phi the distribution function of the normal distribution: at most 3.5 ulp for
// z >= 0 and 12 ulp below, all of the tail and subnormal results included; infinity for infinity, 0
// for -infinity, NaN for NaN; keeps the sign of zero.
template <class T>
SUBQUAD_INLINE vec<T> gelu(vec<T> z) {
  return gelu_value<T>(z, make_gelu_parts<T>(z));
}

// Phi(z) + z phi(z), phi the density of the normal distribution: within 2.5 eps of the sum of the
// terms' magnitudes and 3 times the least number; 1 for infinity, 0 for -infinity, NaN for NaN.
template <class T>
SUBQUAD_INLINE vec<T> gelu_derivative(vec<T> z) {
  return gelu_slope<T>(z, make_gelu_parts<T>(z));
}

}  // namespace SUBQUAD_ISA
}  // namespace subquad

#ifdef SUBQUAD_KERNELS_TABLE_vector_math

#include "vector_math_kernels.hpp"

namespace subquad {
namespace SUBQUAD_ISA {

// out[i] = F(x[i]); the tail goes through a full vector, so that every element meets the same
// instructions.
template <class T, vec<T> (*F)(vec<T>)>
static void map(const T* x, T* out, std::int64_t n) {
  constexpr std::int64_t kLanes = lanes<T>;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store<T>(out + i, F(load(x + i)));
  if (i == n) return;
  T tail[kLanes] = {};
  for (std::int64_t j = i; j < n; ++j) tail[j - i] = x[j];
  store<T>(tail, F(load(tail)));
  for (std::int64_t j = i; j < n; ++j) out[j] = tail[j - i];
}

extern const vector_math_kernels kernels_vector_math;
const vector_math_kernels kernels_vector_math = {
    map<float, exp<float>>,           map<float, log<float>>,
    map<float, log1p<float>>,         map<double, exp<double>>,
    map<double, log<double>>,         map<double, log1p<double>>,
    map<float, exp2_bounded<float>>,  map<double, exp2_bounded<double>>,
    map<float, sin_bounded<float>>,   map<float, cos_bounded<float>>,
    map<double, sin_bounded<double>>, map<double, cos_bounded<double>>,
    map<float, gelu<float>>,          map<float, gelu_derivative<float>>,
    map<double, gelu<double>>,        map<double, gelu_derivative<double>>,
};

}  // namespace SUBQUAD_ISA
}  // namespace subquad

#endif  // SUBQUAD_KERNELS_TABLE_vector_math

#endif  // SUBQUAD_KERNELS_VECTOR_MATH_INL
