// Contracts stand in scans_kernels.hpp.
//
// A lane carries a reference and the sum of exp(x - reference), in double. Blocks are computed as
// if no entry rose far above the reference; where one did, or is not finite, the block's own sum
// shows it, and the block is done again by a scan in which every entry has the largest so far as
// its reference. Prefixes P are those of the task alone; what came before enters as A P + B.
#include "scans_kernels.hpp"

#include "vector_math.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
template <class T>
constexpr T kNaN = static_cast<T>(__builtin_nan(""));

// e^16: what a block may add to a sum before it needs another reference. Small enough for log(sum)
// to stay accurate, and for gradients divided by sums to stay normal numbers.
constexpr double kLargestSum = 8886110.520507872;

// Bounds of exp_bounded: e^x is 0 below the lower and beyond kLargestSum at the upper.
template <class T>
constexpr T kExpLow = sizeof(T) == 4 ? T(-88.0) : T(-709.0);
template <class T>
constexpr T kExpHigh = T(60);

// x log2(e) - power, where the difference is small.
template <class T>
SUBQUAD_INLINE vec<T> exp2_argument(vec<T> x, vec<T> power) {
  using constants = log2_constants<T>;
  if constexpr (kFusedMultiplyAdd) {
    return x * constants::kLog2E - power;
  } else {
    return ((x - power * constants::kLog2High) - power * constants::kLog2Low) * constants::kLog2E;
  }
}

// a * b, never fused with what it is added to: a pass for sums alone must find those of the pass
// that writes, whatever else each does with the product.
template <class T>
SUBQUAD_INLINE vec<T> rounded_product(vec<T> a, vec<T> b) {
  vec<T> product = a * b;
#if defined(__x86_64__)
  __asm__("" : "+v"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

// e^x within 2 ulp + |x| 2e-8 (float), |x| 2e-17 (double), relative; exactly 0 below kExpLow, -inf
// included; e^kExpHigh above kExpHigh; NaN for NaN.
template <class T>
SUBQUAD_INLINE vec<T> exp_bounded(vec<T> x) {
  using constants = log2_constants<T>;
  constexpr T kBiasedRounder = kRounder<T> + static_cast<T>(float_format<T>::kBias);
  x = min<T>(broadcast(kExpHigh<T>), max<T>(broadcast(kExpLow<T>), x));  // in this order NaN stays
  const vec<T> rounded = x * constants::kLog2E + kBiasedRounder;
  const vec<T> fraction = exp2_argument<T>(x, rounded - kBiasedRounder);
  return rounded_product<T>(exp2_fraction(fraction),
                            from_bits<T>(bits_of<T>(rounded) << float_format<T>::kFractionBits));
}

// log(x) for positive normal numbers.
template <class T>
SUBQUAD_INLINE vec<T> log_normal(vec<T> x) {
  const decomposed<T> parts = decompose<T>(x);
  return log_sum<T>(parts.exponent, parts.fraction, vec<T>{});
}

// Vectors that go through the same steps side by side: a chain of dependent steps a vector long
// leaves most of the processor idle, several in turn do not.
constexpr int kSideBySide = SUBQUAD_VECTOR_BYTES == 64 ? 4 : 2;

template <class T, int N>
struct pack {
  vec<T> v[N];
};

#define SUBQUAD_SIDE_BY_SIDE _Pragma("GCC unroll 4") for (int u = 0; u < N; ++u)

template <int N>
SUBQUAD_INLINE void multiply_add(pack<float, N>& p, const pack<float, N>& f, float c) {
  SUBQUAD_SIDE_BY_SIDE p.v[u] = p.v[u] * f.v[u] + c;
}

// exp_bounded of every vector. The polynomial's relative error is 2.6e-9, and it is 1 at 0.
template <int N>
SUBQUAD_INLINE void exp_bounded(pack<float, N>& x) {
  using constants = log2_constants<float>;
  constexpr float kBiasedRounder = kRounder<float> + static_cast<float>(float_format<float>::kBias);
  pack<float, N> rounded;
  pack<float, N> p;
  SUBQUAD_SIDE_BY_SIDE {
    x.v[u] = max<float>(broadcast(kExpLow<float>), x.v[u]);
    x.v[u] = min<float>(broadcast(kExpHigh<float>), x.v[u]);
    rounded.v[u] = x.v[u] * constants::kLog2E + kBiasedRounder;
  }
  SUBQUAD_SIDE_BY_SIDE x.v[u] = exp2_argument<float>(x.v[u], rounded.v[u] - kBiasedRounder);
  SUBQUAD_SIDE_BY_SIDE p.v[u] = x.v[u] * 0x1.470f9ep-13f + 0x1.5f7486p-10f;
  multiply_add<N>(p, x, 0x1.3b2706p-7f);
  multiply_add<N>(p, x, 0x1.c6ae6ep-5f);
  multiply_add<N>(p, x, 0x1.ebfbe2p-3f);
  multiply_add<N>(p, x, 0x1.62e432p-1f);
  multiply_add<N>(p, x, 1.0f);
  SUBQUAD_SIDE_BY_SIDE {
    x.v[u] = rounded_product<float>(
        p.v[u],
        from_bits<float>(bits_of<float>(rounded.v[u]) << float_format<float>::kFractionBits));
  }
}

template <int N>
SUBQUAD_INLINE void exp_bounded(pack<double, N>& x) {
  SUBQUAD_SIDE_BY_SIDE x.v[u] = exp_bounded<double>(x.v[u]);
}

// reference + log(x) of every vector of positive normal numbers; the logarithm within 4e-8, beside
// roundings, and 0 at 1.
template <int N>
SUBQUAD_INLINE void add_log(pack<float, N>& x, vec<float> reference) {
  pack<float, N> p;
  pack<float, N> base;
  SUBQUAD_SIDE_BY_SIDE {
    const decomposed<float> parts = decompose<float>(x.v[u]);
    x.v[u] = parts.fraction;
    base.v[u] = parts.exponent * static_cast<float>(0x1.62e42fefa39efp-1) + reference;
  }
  SUBQUAD_SIDE_BY_SIDE p.v[u] = x.v[u] * -0x1.9dc9a2p-4f + 0x1.50480ap-3f;
  multiply_add<N>(p, x, -0x1.62fd48p-3f);
  multiply_add<N>(p, x, 0x1.970000p-3f);
  multiply_add<N>(p, x, -0x1.ff2ad8p-3f);
  multiply_add<N>(p, x, 0x1.555ccep-2f);
  multiply_add<N>(p, x, -0x1.0000e0p-1f);
  multiply_add<N>(p, x, 0x1.fffffap-1f);
  SUBQUAD_SIDE_BY_SIDE x.v[u] = p.v[u] * x.v[u] + base.v[u];
}

template <int N>
SUBQUAD_INLINE void add_log(pack<double, N>& x, vec<double> reference) {
  SUBQUAD_SIDE_BY_SIDE x.v[u] = log_normal<double>(x.v[u]) + reference;
}

template <class T, int N>
SUBQUAD_INLINE void add_logs_to(const T* sums, T* out, std::int64_t stride, vec<T> reference) {
  pack<T, N> x;
  SUBQUAD_SIDE_BY_SIDE x.v[u] = load(sums + u * lanes<T>);
  add_log<N>(x, reference);
  SUBQUAD_SIDE_BY_SIDE store<T>(out + u * stride, x.v[u]);
}

// Outputs of `count` vectors of sums, which may lie where the outputs go: a pass of its own over
// what the first-level cache holds, because one chain of steps from entry to output is too long
// for processors to overlap.
template <class T>
SUBQUAD_INLINE void add_logs(const T* sums, T* out, std::int64_t stride, std::int64_t count,
                             vec<T> reference) {
  std::int64_t v = 0;
  for (; v + kSideBySide <= count; v += kSideBySide) {
    add_logs_to<T, kSideBySide>(sums + v * lanes<T>, out + v * stride, stride, reference);
  }
  for (; v < count; ++v) {
    add_logs_to<T, 1>(sums + v * lanes<T>, out + v * stride, stride, reference);
  }
}

SUBQUAD_INLINE double exp_of(double x) {
  return x == 0 ? 1 : SUBQUAD_ISA::exp<double>(broadcast(x))[0];
}

SUBQUAD_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
SUBQUAD_INLINE std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

template <class T>
SUBQUAD_INLINE bool is_finite(T x) {
  return x - x == 0;
}

// {0, 1, ...}
template <class T, int N = lanes<T>, int... I>
SUBQUAD_INLINE ivec<T> lane_numbers() {
  if constexpr (N == 0) {
    return ivec<T>{I...};
  } else {
    return lane_numbers<T, N - 1, N - 1, I...>();
  }
}

// Lanes kFrom ... kFrom + lanes - 1 of low followed by high. Named where compilers would take both
// apart: they know too well what lanes of zeros hold.
template <int kFrom, class T>
SUBQUAD_INLINE vec<T> lanes_from(vec<T> low, vec<T> high) {
  constexpr int kBytes = kFrom * static_cast<int>(sizeof(T));
#if SUBQUAD_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512i a = (__m512i)low;
  const __m512i b = (__m512i)high;
  return (vec<T>)_mm512_maskz_alignr_epi32((__mmask16)-1, b, a, kBytes / 4);
#elif SUBQUAD_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i a = (__m256i)low;
  const __m256i b = (__m256i)high;
  const __m256i middle = _mm256_permute2x128_si256(a, b, 0x21);
  if constexpr (kBytes == 16) {
    return (vec<T>)middle;
  } else if constexpr (kBytes < 16) {
    return (vec<T>)_mm256_alignr_epi8(middle, a, kBytes);
  } else {
    return (vec<T>)_mm256_alignr_epi8(b, middle, kBytes - 16);
  }
#elif SUBQUAD_VECTOR_BYTES == 16 && defined(__SSSE3__)
  return (vec<T>)_mm_alignr_epi8((__m128i)high, (__m128i)low, kBytes);
#else
  return __builtin_shuffle(low, high, lane_numbers<T>() + kFrom);
#endif
}

// Lane i is that of v K lanes before (after), or of `fill` where v has none: the lanes at the end
// (the start) of fill.
template <int K, class T>
SUBQUAD_INLINE vec<T> shift_up(vec<T> v, vec<T> fill) {
  return lanes_from<lanes<T> - K, T>(fill, v);
}

template <int K, class T>
SUBQUAD_INLINE vec<T> shift_down(vec<T> v, vec<T> fill) {
  return lanes_from<K, T>(v, fill);
}

template <class T>
SUBQUAD_INLINE vec<T> reversed(vec<T> v) {
  return __builtin_shuffle(v, (lanes<T> - 1) - lane_numbers<T>());
}

template <class T, int N>
SUBQUAD_INLINE void prefix_sum(pack<T, N>& x) {
  const vec<T> zero{};
  SUBQUAD_SIDE_BY_SIDE x.v[u] += shift_up<1, T>(x.v[u], zero);
  if constexpr (lanes<T> > 2) SUBQUAD_SIDE_BY_SIDE x.v[u] += shift_up<2, T>(x.v[u], zero);
  if constexpr (lanes<T> > 4) SUBQUAD_SIDE_BY_SIDE x.v[u] += shift_up<4, T>(x.v[u], zero);
  if constexpr (lanes<T> > 8) SUBQUAD_SIDE_BY_SIDE x.v[u] += shift_up<8, T>(x.v[u], zero);
}

template <class T, int N>
SUBQUAD_INLINE void suffix_sum(pack<T, N>& x) {
  const vec<T> zero{};
  SUBQUAD_SIDE_BY_SIDE x.v[u] += shift_down<1, T>(x.v[u], zero);
  if constexpr (lanes<T> > 2) SUBQUAD_SIDE_BY_SIDE x.v[u] += shift_down<2, T>(x.v[u], zero);
  if constexpr (lanes<T> > 4) SUBQUAD_SIDE_BY_SIDE x.v[u] += shift_down<4, T>(x.v[u], zero);
  if constexpr (lanes<T> > 8) SUBQUAD_SIDE_BY_SIDE x.v[u] += shift_down<8, T>(x.v[u], zero);
}

// The greater, or NaN where either is.
template <class T>
SUBQUAD_INLINE vec<T> max_or_nan(vec<T> a, vec<T> b) {
  return a != a ? a : max<T>(a, b);
}

template <class T>
SUBQUAD_INLINE T max_or_nan(T a, T b) {
  return a != a || b != b ? kNaN<T> : (a > b ? a : b);
}

template <class T>
SUBQUAD_INLINE vec<T> prefix_max(vec<T> v) {
  v = max_or_nan<T>(shift_up<1, T>(v, broadcast(-kInfinity<T>)), v);
  if constexpr (lanes<T> > 2) v = max_or_nan<T>(shift_up<2, T>(v, broadcast(-kInfinity<T>)), v);
  if constexpr (lanes<T> > 4) v = max_or_nan<T>(shift_up<4, T>(v, broadcast(-kInfinity<T>)), v);
  if constexpr (lanes<T> > 8) v = max_or_nan<T>(shift_up<8, T>(v, broadcast(-kInfinity<T>)), v);
  return v;
}

// e^{from - to} for from <= to, 1 where they are equal, infinite ones included.
template <class T>
SUBQUAD_INLINE vec<T> factor(vec<T> from, vec<T> to) {
  return exp_bounded<T>(from == to ? vec<T>{} : from - to);
}

template <class T>
SUBQUAD_INLINE double factor_of(T from, T to) {
  return from == to ? 1 : exp_of(static_cast<double>(from) - static_cast<double>(to));
}

// e^{x - top} for x <= top: 0 where x is -inf, whatever top.
template <class T>
SUBQUAD_INLINE vec<T> weight(vec<T> x, vec<T> top) {
  return x == -kInfinity<T> ? vec<T>{} : factor<T>(x, top);
}

// sum += value; for double, low takes what that lost.
template <class T>
SUBQUAD_INLINE void add(double& sum, T& low, double value) {
  const double total = sum + value;
  if constexpr (sizeof(T) == 8) {
    const double part = total - sum;
    low += (sum - (total - part)) + (value - part);
  }
  sum = total;
}

// Leaves in low no more than half an ulp of sum.
template <class T>
SUBQUAD_INLINE void settle(double& sum, T& low) {
  if constexpr (sizeof(T) == 8) {
    const double settled = sum + low;
    low -= settled - sum;
    sum = settled;
  }
}

template <class T>
SUBQUAD_INLINE double total(double sum, T low) {
  return sizeof(T) == 8 ? sum + static_cast<double>(low) : sum;  // of float nothing is low
}

// What maps local sums to outputs: log(e^entry + e^local P) = reference + log(own P + before).
template <class T>
struct outward {
  T reference;
  double own;
  double before;
};

template <class T>
SUBQUAD_INLINE outward<T> outward_of(T local, const scan_state<T>& entry) {
  if (entry.reference == -kInfinity<T>) return {local, 1, 0};
  const T top = max_or_nan<T>(local, entry.reference);
  return {top, factor_of<T>(local, top),
          (entry.sum + entry.low) * factor_of<T>(entry.reference, top)};
}

template <class T>
SUBQUAD_INLINE scan_state<T> empty_state() {
  return {0, T(0), -kInfinity<T>};
}

template <class T>
void merge(scan_state<T>* state, const scan_state<T>* next, std::int64_t width) {
  constexpr std::int64_t kLanes = lanes<double>;
  for (std::int64_t begin = 0; begin < width; begin += kLanes) {
    const std::int64_t count = least(kLanes, width - begin);
    vec<double> state_scale{};
    vec<double> next_scale{};
    for (std::int64_t l = 0; l < count; ++l) {
      const T a = state[begin + l].reference;
      const T b = next[begin + l].reference;
      const T top = max_or_nan(a, b);
      state_scale[l] = a == top ? 0 : static_cast<double>(a) - static_cast<double>(top);
      next_scale[l] = b == top ? 0 : static_cast<double>(b) - static_cast<double>(top);
    }
    state_scale = SUBQUAD_ISA::exp<double>(state_scale);
    next_scale = SUBQUAD_ISA::exp<double>(next_scale);
    for (std::int64_t l = 0; l < count; ++l) {
      scan_state<T>& a = state[begin + l];
      const scan_state<T>& b = next[begin + l];
      a.reference = max_or_nan(a.reference, b.reference);
      a.sum *= state_scale[l];
      a.low = static_cast<T>(static_cast<double>(a.low) * state_scale[l] +
                             static_cast<double>(b.low) * next_scale[l]);
      add<T>(a.sum, a.low, b.sum * next_scale[l]);
      settle<T>(a.sum, a.low);
    }
  }
}

// ---- rows: consecutive entries of one lane in a vector ------------------------------------------

// Prefix sums of the weights of N vectors; sum and low move past them. `base` gets what comes
// before each vector, in the outer reference.
template <class T, int N>
SUBQUAD_INLINE void near_prefixes(const T* x, vec<T> reference, const outward<T>& to, double& sum,
                                  T& low, pack<T, N>& weights, pack<T, N>& prefixes,
                                  pack<T, N>& base) {
  SUBQUAD_SIDE_BY_SIDE weights.v[u] = load(x + u * lanes<T>) - reference;
  exp_bounded<N>(weights);
  prefixes = weights;
  prefix_sum<T, N>(prefixes);
  SUBQUAD_SIDE_BY_SIDE {
    base.v[u] = broadcast(static_cast<T>(total<T>(sum, low) * to.own + to.before));
    add<T>(sum, low, static_cast<double>(prefixes.v[u][lanes<T> - 1]));
  }
}

// One block in reference to the state's own; false, and the state as it was, where an entry rises
// too far above it or is not finite.
template <class T, int N, bool kWrite>
SUBQUAD_INLINE void scan_near_vectors(const T* x, T* out, const outward<T>& to, vec<T> reference,
                                      double& sum, T& low) {
  pack<T, N> weights;
  pack<T, N> prefixes;
  pack<T, N> base;
  near_prefixes<T, N>(x, reference, to, sum, low, weights, prefixes, base);
  if constexpr (kWrite) {
    const vec<T> own = broadcast(static_cast<T>(to.own));
    SUBQUAD_SIDE_BY_SIDE store<T>(out + u * lanes<T>, prefixes.v[u] * own + base.v[u]);
  }
}

template <class T, bool kWrite>
SUBQUAD_INLINE bool scan_near(const T* x, T* out, std::int64_t vectors, scan_state<T>& state,
                              const outward<T>& to) {
  const vec<T> reference = broadcast(state.reference);
  double sum = state.sum;
  T low = state.low;
  std::int64_t v = 0;
  for (; v + kSideBySide <= vectors; v += kSideBySide) {
    scan_near_vectors<T, kSideBySide, kWrite>(x + v * lanes<T>, out + v * lanes<T>, to, reference,
                                              sum, low);
  }
  for (; v < vectors; ++v) {
    scan_near_vectors<T, 1, kWrite>(x + v * lanes<T>, out + v * lanes<T>, to, reference, sum, low);
  }
  if (!(sum - state.sum <= kLargestSum)) return false;
  if constexpr (kWrite) add_logs<T>(out, out, lanes<T>, vectors, broadcast(to.reference));
  settle<T>(sum, low);
  state.sum = sum;
  state.low = low;
  return true;
}

// Entries with the largest so far as their references: entry i stands for
// e^reference_i (product_i c + sum_i), c the sum that came before the vector.
template <class T>
struct far_prefix {
  vec<T> reference;
  vec<T> product;
  vec<T> sum;
};

template <class T>
SUBQUAD_INLINE far_prefix<T> far_scan(vec<T> x, T before) {
  const vec<T> reference = max_or_nan<T>(broadcast(before), prefix_max<T>(x));
  vec<T> a = factor<T>(shift_up<1, T>(reference, broadcast(before)), reference);
  vec<T> b = weight<T>(x, reference);
  const vec<T> zero{};
  const vec<T> one = broadcast(T(1));
  b += a * shift_up<1, T>(b, zero);
  a *= shift_up<1, T>(a, one);
  if constexpr (lanes<T> > 2) {
    b += a * shift_up<2, T>(b, zero);
    a *= shift_up<2, T>(a, one);
  }
  if constexpr (lanes<T> > 4) {
    b += a * shift_up<4, T>(b, zero);
    a *= shift_up<4, T>(a, one);
  }
  if constexpr (lanes<T> > 8) {
    b += a * shift_up<8, T>(b, zero);
    a *= shift_up<8, T>(a, one);
  }
  return {reference, a, b};
}

template <class T>
SUBQUAD_INLINE void advance(scan_state<T>& state, T reference, T product, T sum) {
  state.sum *= static_cast<double>(product);
  state.low *= product;
  add<T>(state.sum, state.low, static_cast<double>(sum));
  settle<T>(state.sum, state.low);
  state.reference = reference;
}

// Sums of every entry with what came before the task, in reference to the larger.
template <class T>
struct outer_sum {
  vec<T> reference;
  vec<T> sum;
};

template <class T>
SUBQUAD_INLINE outer_sum<T> with_entry(vec<T> reference, vec<T> sum, vec<T> entry_reference,
                                       vec<T> entry_sum) {
  const vec<T> top = max_or_nan<T>(reference, entry_reference);
  return {top, sum * factor<T>(reference, top) + entry_sum * factor<T>(entry_reference, top)};
}

template <class T>
SUBQUAD_INLINE vec<T> log_of(const outer_sum<T>& total) {
  const vec<T> value = total.reference + log_normal<T>(total.sum);
  return total.sum == T(0) ? broadcast(-kInfinity<T>) : value;
}

template <class T, bool kWrite>
void scan_far(const T* x, T* out, std::int64_t vectors, scan_state<T>& state,
              const scan_state<T>& entry) {
  for (std::int64_t v = 0; v < vectors; ++v) {
    const far_prefix<T> at = far_scan<T>(load(x + v * lanes<T>), state.reference);
    if constexpr (kWrite) {
      const vec<T> sum = at.sum + at.product * static_cast<T>(state.sum);
      store<T>(out + v * lanes<T>,
               log_of<T>(with_entry<T>(at.reference, sum, broadcast(entry.reference),
                                       broadcast(static_cast<T>(entry.sum)))));
    }
    constexpr int kLast = lanes<T> - 1;
    advance<T>(state, at.reference[kLast], at.product[kLast], at.sum[kLast]);
  }
}

// Entries of a lane as vectors read them: where they lie, or in `buffer`, with `fill` for what is
// not there and up to a whole vector.
template <class T>
SUBQUAD_INLINE const T* gathered(vector_view<const T> from, std::int64_t present,
                                 std::int64_t count, T* buffer, T fill) {
  if (from.stride == 1 && present == count && count % lanes<T> == 0) return from.data;
  std::int64_t i = 0;
  if (from.stride == 1) {
    for (; i + lanes<T> <= present; i += lanes<T>) store<T>(buffer + i, load(from.data + i));
  } else if (from.stride == -1) {
    for (; i + lanes<T> <= present; i += lanes<T>) {
      store<T>(buffer + i, reversed<T>(load(from.data - i - (lanes<T> - 1))));
    }
  }
  for (; i < present; ++i) buffer[i] = from[i];
  for (; i < count || i % lanes<T> != 0; ++i) buffer[i] = fill;
  return buffer;
}

template <class T>
SUBQUAD_INLINE void scatter(const T* buffer, std::int64_t count, vector_view<T> to) {
  std::int64_t i = 0;
  if (to.stride == 1) {
    for (; i + lanes<T> <= count; i += lanes<T>) store<T>(to.data + i, load(buffer + i));
  } else if (to.stride == -1) {
    for (; i + lanes<T> <= count; i += lanes<T>) {
      store<T>(to.data - i - (lanes<T> - 1), reversed<T>(load(buffer + i)));
    }
  }
  for (; i < count; ++i) to[i] = buffer[i];
}

// A reference for a lane that has none yet.
template <class T>
SUBQUAD_INLINE T first_reference(const scan_state<T>& state, T first) {
  return state.reference == -kInfinity<T> && is_finite(first) ? first : state.reference;
}

template <class T, bool kWrite>
SUBQUAD_INLINE void scan_row(const logcumsumexp_task<T>& task, std::int64_t lane) {
  const vector_view<const T> x{task.x.data + lane * task.x.column_stride, task.x.row_stride};
  const vector_view<T> out{kWrite ? task.out.data + lane * task.out.column_stride : nullptr,
                           task.out.row_stride};
  const scan_state<T> entry = kWrite ? task.entry[lane] : empty_state<T>();
  const bool entry_is_finite = entry.reference < kInfinity<T>;
  scan_state<T> state = empty_state<T>();
  outward<T> to{-kInfinity<T>, 1, 0};
  T to_reference = kNaN<T>;  // of the local sums that `to` maps
  T x_buffer[kScanRowBlock];
  T out_buffer[kScanRowBlock];
  for (std::int64_t begin = 0; begin < task.n; begin += kScanRowBlock) {
    if (begin > 0 && task.blocks)
      task.blocks[(begin / kScanRowBlock - 1) * task.width + lane] = state;
    const std::int64_t count = least(kScanRowBlock, task.n - begin);
    const std::int64_t vectors = (count + lanes<T> - 1) / lanes<T>;
    const T* from = gathered<T>(x.from(begin), count, count, x_buffer, -kInfinity<T>);
    const std::int64_t written = least(count, task.n_out - begin);
    const bool direct = kWrite && out.stride == 1 && written % lanes<T> == 0 && written == count;
    T* const into = direct ? out.data + begin : out_buffer;
    bool done = false;
    scan_state<T> near = state;
    near.reference = first_reference<T>(state, from[0]);
    if (is_finite(near.reference) && entry_is_finite) {
      if (kWrite && near.reference != to_reference) {
        to = outward_of<T>(near.reference, entry);
        to_reference = near.reference;
      }
      done = scan_near<T, kWrite>(from, into, vectors, near, to);
    }
    if (done) {
      state = near;
    } else {
      scan_far<T, kWrite>(from, into, vectors, state, entry);
    }
    if (kWrite && !direct) scatter<T>(into, written, out.from(begin));
  }
  task.local[lane] = state;
}

template <class T>
void rows(const logcumsumexp_task<T>& task) {
  if (task.out) {
    for (std::int64_t lane = 0; lane < task.width; ++lane) scan_row<T, true>(task, lane);
  } else {
    for (std::int64_t lane = 0; lane < task.width; ++lane) scan_row<T, false>(task, lane);
  }
}

// The running adjoint of a lane: e^-reference (own + scale later).
template <class T>
struct running_adjoint {
  T reference;
  double own;
  double scale;
};

// To a reference before, which is not greater. From sums that are not finite nothing or NaN comes.
template <class T>
SUBQUAD_INLINE void move_to(running_adjoint<T>& adjoint, T reference) {
  if (reference != adjoint.reference && adjoint.reference == adjoint.reference) {
    const double scale = factor_of<T>(reference, adjoint.reference);
    adjoint.own *= scale;
    adjoint.scale *= scale;
  }
  adjoint.reference = reference;
}

// What a sum passes to the entries that it holds, in units of its reference.
template <class T>
SUBQUAD_INLINE vec<T> quotient(vec<T> grad, const outer_sum<T>& total) {
  const auto empty = total.sum == T(0);
  const vec<T> inside = empty ? vec<T>{} : grad / total.sum;
  const vec<T> outside = grad == T(0) ? vec<T>{} : broadcast(kNaN<T>);
  return total.reference < kInfinity<T> ? inside : outside;
}

template <class T>
struct vjp_scratch {
  T x[kScanRowBlock];
  T grad[kScanRowBlock];
  T out[kScanRowBlock];
  T weights[kScanRowBlock];     // e^{x - reference}
  T quotients[kScanRowBlock];   // grad / sum
  T references[kScanRowBlock];  // scan_far alone
};

template <class T, int N>
SUBQUAD_INLINE void quotients_near(const T* x, const T* grad, const outward<T>& to,
                                   vec<T> reference, double& sum, T& low, T* weights_out,
                                   T* quotients_out) {
  pack<T, N> weights;
  pack<T, N> prefixes;
  pack<T, N> base;
  near_prefixes<T, N>(x, reference, to, sum, low, weights, prefixes, base);
  const vec<T> own = broadcast(static_cast<T>(to.own));
  SUBQUAD_SIDE_BY_SIDE store<T>(weights_out + u * lanes<T>, weights.v[u]);
  SUBQUAD_SIDE_BY_SIDE {
    store<T>(quotients_out + u * lanes<T>,
             load(grad + u * lanes<T>) / (prefixes.v[u] * own + base.v[u]));
  }
}

template <class T, int N, bool kWrite>
SUBQUAD_INLINE void adjoints_near(const T* weights, const T* quotients, T* out, double own,
                                  double from_later, double& adjoint) {
  pack<T, N> suffixes;
  SUBQUAD_SIDE_BY_SIDE suffixes.v[u] = load(quotients + u * lanes<T>);
  suffix_sum<T, N>(suffixes);
  for (int u = N - 1; u >= 0; --u) {
    if constexpr (kWrite) {
      const vec<T> base = broadcast(static_cast<T>((adjoint + from_later) * own));
      store<T>(out + u * lanes<T>,
               load(weights + u * lanes<T>) * (suffixes.v[u] * static_cast<T>(own) + base));
    }
    adjoint += static_cast<double>(suffixes.v[u][0]);
  }
}

// False, with the adjoint as it was, where scan_near is, or an infinite or NaN adjoint meets the
// weights, which are 0 at -inf.
template <class T, bool kWrite>
SUBQUAD_INLINE bool reverse_near(const T* x, const T* grad, T* out, std::int64_t vectors,
                                 const scan_state<T>& state, const outward<T>& to, double later,
                                 running_adjoint<T>& adjoint, vjp_scratch<T>& scratch) {
  constexpr std::int64_t kLanes = lanes<T>;
  const vec<T> reference = broadcast(state.reference);
  double sum = state.sum;
  T low = state.low;
  std::int64_t v = 0;
  for (; v + kSideBySide <= vectors; v += kSideBySide) {
    quotients_near<T, kSideBySide>(x + v * kLanes, grad + v * kLanes, to, reference, sum, low,
                                   scratch.weights + v * kLanes, scratch.quotients + v * kLanes);
  }
  for (; v < vectors; ++v) {
    quotients_near<T, 1>(x + v * kLanes, grad + v * kLanes, to, reference, sum, low,
                         scratch.weights + v * kLanes, scratch.quotients + v * kLanes);
  }
  if (!(sum - state.sum <= kLargestSum)) return false;
  running_adjoint<T> next = adjoint;
  move_to<T>(next, to.reference);
  const double from_later = kWrite ? next.scale * later : 0;
  while (v % kSideBySide != 0) {
    --v;
    adjoints_near<T, 1, kWrite>(scratch.weights + v * kLanes, scratch.quotients + v * kLanes,
                                out + v * kLanes, to.own, from_later, next.own);
  }
  while (v > 0) {
    v -= kSideBySide;
    adjoints_near<T, kSideBySide, kWrite>(scratch.weights + v * kLanes,
                                          scratch.quotients + v * kLanes, out + v * kLanes, to.own,
                                          from_later, next.own);
  }
  if (!is_finite(next.own + from_later)) return false;
  adjoint = next;
  return true;
}

template <class T, bool kWrite>
void reverse_far(const T* x, const T* grad, T* out, std::int64_t vectors, scan_state<T> state,
                 const scan_state<T>& entry, double later, running_adjoint<T>& adjoint,
                 vjp_scratch<T>& scratch) {
  const vec<T> entry_reference = broadcast(entry.reference);
  const vec<T> entry_sum = broadcast(static_cast<T>(entry.sum));
  for (std::int64_t v = 0; v < vectors; ++v) {
    const vec<T> value = load(x + v * lanes<T>);
    const far_prefix<T> at = far_scan<T>(value, state.reference);
    const outer_sum<T> total = with_entry<T>(
        at.reference, at.sum + at.product * static_cast<T>(state.sum), entry_reference, entry_sum);
    const vec<T> e =
        total.reference < kInfinity<T> ? weight<T>(value, total.reference) : broadcast(T(1));
    store<T>(scratch.weights + v * lanes<T>, e);
    store<T>(scratch.quotients + v * lanes<T>, quotient<T>(load(grad + v * lanes<T>), total));
    store<T>(scratch.references + v * lanes<T>, total.reference);
    constexpr int kLast = lanes<T> - 1;
    advance<T>(state, at.reference[kLast], at.product[kLast], at.sum[kLast]);
  }
  const vec<T> zero{};
  const vec<T> one = broadcast(T(1));
  for (std::int64_t v = vectors - 1; v >= 0; --v) {
    const vec<T> reference = load(scratch.references + v * lanes<T>);
    const vec<T> after = shift_down<1, T>(reference, broadcast(adjoint.reference));
    vec<T> a = after != after ? one : factor<T>(reference, after);
    vec<T> b = load(scratch.quotients + v * lanes<T>);
    b += a * shift_down<1, T>(b, zero);
    a *= shift_down<1, T>(a, one);
    if constexpr (lanes<T> > 2) {
      b += a * shift_down<2, T>(b, zero);
      a *= shift_down<2, T>(a, one);
    }
    if constexpr (lanes<T> > 4) {
      b += a * shift_down<4, T>(b, zero);
      a *= shift_down<4, T>(a, one);
    }
    if constexpr (lanes<T> > 8) {
      b += a * shift_down<8, T>(b, zero);
      a *= shift_down<8, T>(a, one);
    }
    if constexpr (kWrite) {
      const T after_vector = static_cast<T>(adjoint.own + adjoint.scale * later);
      const vec<T> value = load(scratch.weights + v * lanes<T>) * (b + a * after_vector);
      store<T>(out + v * lanes<T>, load(x + v * lanes<T>) == -kInfinity<T> ? zero : value);
    }
    adjoint.own = static_cast<double>(b[0]) + static_cast<double>(a[0]) * adjoint.own;
    adjoint.scale *= static_cast<double>(a[0]);
    adjoint.reference = reference[0];
  }
}

template <class T>
SUBQUAD_INLINE running_adjoint<T> adjoint_at_end(const logcumsumexp_vjp_task<T>& task,
                                                 std::int64_t lane) {
  return {task.end ? task.end[lane].reference : kNaN<T>, 0, 1};
}

template <class T, bool kWrite>
SUBQUAD_INLINE void reverse_row(const logcumsumexp_vjp_task<T>& task, std::int64_t lane) {
  const vector_view<const T> x{task.x.data + lane * task.x.column_stride, task.x.row_stride};
  const vector_view<const T> grad{
      task.grad ? task.grad.data + lane * task.grad.column_stride : nullptr, task.grad.row_stride};
  const vector_view<T> out{kWrite ? task.grad_x.data + lane * task.grad_x.column_stride : nullptr,
                           task.grad_x.row_stride};
  const scan_state<T> entry = task.entry[lane];
  const bool entry_is_finite = entry.reference < kInfinity<T>;
  const double later = kWrite && task.end ? task.later[lane] : 0;
  running_adjoint<T> adjoint = adjoint_at_end<T>(task, lane);
  outward<T> to{-kInfinity<T>, 1, 0};
  T to_reference = kNaN<T>;
  vjp_scratch<T> scratch;
  const std::int64_t blocks = (task.n + kScanRowBlock - 1) / kScanRowBlock;
  for (std::int64_t b = blocks - 1; b >= 0; --b) {
    const std::int64_t begin = b * kScanRowBlock;
    const std::int64_t count = least(kScanRowBlock, task.n - begin);
    const std::int64_t vectors = (count + lanes<T> - 1) / lanes<T>;
    const T* from = gathered<T>(x.from(begin), count, count, scratch.x, -kInfinity<T>);
    const std::int64_t grads = grad ? most(0, least(count, task.n_grad - begin)) : 0;
    const T* g = gathered<T>(grad.from(begin), grads, count, scratch.grad, T(0));
    const bool direct = kWrite && out.stride == 1 && count % lanes<T> == 0;
    T* const into = direct ? out.data + begin : scratch.out;
    const scan_state<T> state =
        b == 0 ? empty_state<T>() : task.blocks[(b - 1) * task.width + lane];
    scan_state<T> near = state;
    near.reference = first_reference<T>(state, from[0]);
    bool done = false;
    if (is_finite(near.reference) && entry_is_finite) {
      if (near.reference != to_reference) {
        to = outward_of<T>(near.reference, entry);
        to_reference = near.reference;
      }
      done = reverse_near<T, kWrite>(from, g, into, vectors, near, to, later, adjoint, scratch);
    }
    if (!done) {
      reverse_far<T, kWrite>(from, g, into, vectors, state, entry, later, adjoint, scratch);
    }
    if (kWrite && !direct) scatter<T>(into, count, out.from(begin));
  }
  move_to<T>(adjoint, entry.reference);
  task.adjoint[lane] = {adjoint.own, adjoint.scale};
}

template <class T>
void rows_vjp(const logcumsumexp_vjp_task<T>& task) {
  if (task.grad_x) {
    for (std::int64_t lane = 0; lane < task.width; ++lane) reverse_row<T, true>(task, lane);
  } else {
    for (std::int64_t lane = 0; lane < task.width; ++lane) reverse_row<T, false>(task, lane);
  }
}

// ---- columns: one entry of consecutive lanes in a vector ----------------------------------------

// Entries of a lane that are added in float before double takes their sum.
constexpr std::int64_t kGroup = 16;

// Whether all lanes are at most `limit`; no where one is NaN.
template <class T>
SUBQUAD_INLINE bool all_at_most(vec<T> v, T limit) {
  ivec<T> holds = v <= limit;
  auto all = holds[0];
  for (int l = 1; l < lanes<T>; ++l) all &= holds[l];
  return all != 0;
}

// States of the lanes of one vector.
template <class T>
struct lane_states {
  double sum[lanes<T>];
  T low[lanes<T>];
  vec<T> reference;
};

template <class T>
SUBQUAD_INLINE lane_states<T> load_states(const scan_state<T>* states, std::int64_t count) {
  lane_states<T> loaded;
  loaded.reference = broadcast(-kInfinity<T>);
  for (int l = 0; l < lanes<T>; ++l) {
    loaded.sum[l] = 0;
    loaded.low[l] = 0;
  }
  if (states == nullptr) return loaded;
  T references[lanes<T>];
  store<T>(references, loaded.reference);
  for (std::int64_t l = 0; l < count; ++l) {
    loaded.sum[l] = states[l].sum;
    loaded.low[l] = states[l].low;
    references[l] = states[l].reference;
  }
  loaded.reference = load(references);
  return loaded;
}

template <class T>
SUBQUAD_INLINE void store_states(const lane_states<T>& from, std::int64_t count,
                                 scan_state<T>* states) {
  T references[lanes<T>];
  store<T>(references, from.reference);
  for (std::int64_t l = 0; l < count; ++l) states[l] = {from.sum[l], from.low[l], references[l]};
}

// The sums, rounded to T.
template <class T>
SUBQUAD_INLINE vec<T> sums_of(const lane_states<T>& states) {
  T sums[lanes<T>];
  for (int l = 0; l < lanes<T>; ++l) {
    sums[l] = static_cast<T>(states.sum[l] + static_cast<double>(states.low[l]));
  }
  return load(sums);
}

template <class T>
SUBQUAD_INLINE void add(lane_states<T>& states, vec<T> values) {
  T value[lanes<T>];
  store<T>(value, values);
  for (int l = 0; l < lanes<T>; ++l) {
    add<T>(states.sum[l], states.low[l], static_cast<double>(value[l]));
    settle<T>(states.sum[l], states.low[l]);
  }
}

template <class T>
SUBQUAD_INLINE void advance(lane_states<T>& states, vec<T> reference, vec<T> products,
                            vec<T> values) {
  T product[lanes<T>];
  store<T>(product, products);
  for (int l = 0; l < lanes<T>; ++l) {
    states.sum[l] *= static_cast<double>(product[l]);
    states.low[l] *= product[l];
  }
  add<T>(states, values);
  states.reference = reference;
}

// `outward` for the lanes of a vector.
template <class T>
struct lanes_outward {
  vec<T> reference;
  vec<T> own;
  vec<T> before;
};

// What came before the lanes of a vector.
template <class T>
struct lanes_entry {
  vec<T> reference;
  vec<T> sum;
  bool finite;  // all of them
  bool empty;   // all of them
};

template <class T>
SUBQUAD_INLINE lanes_entry<T> load_entry(const scan_state<T>* states, std::int64_t count) {
  const lane_states<T> loaded = load_states<T>(states, count);
  const vec<T> reference = loaded.reference;
  const vec<T> finite = reference < kInfinity<T> ? vec<T>{} : broadcast(T(1));
  return {reference, sums_of<T>(loaded), all_at_most<T>(finite, T(0)),
          all_at_most<T>(reference, -kInfinity<T>)};
}

template <class T>
SUBQUAD_INLINE lanes_outward<T> outward_of(vec<T> local, const lanes_entry<T>& entry) {
  if (entry.empty) return {local, broadcast(T(1)), vec<T>{}};
  const vec<T> top = max_or_nan<T>(local, entry.reference);
  return {top, factor<T>(local, top), entry.sum * factor<T>(entry.reference, top)};
}

template <class T>
SUBQUAD_INLINE vec<T> first_references(vec<T> reference, vec<T> first) {
  const vec<T> finite = first - first == T(0) ? first : reference;
  return reference == -kInfinity<T> ? finite : reference;
}

template <class T>
SUBQUAD_INLINE bool all_finite(vec<T> v) {
  const vec<T> difference = v - v;
  return all_at_most<T>(difference, T(0));
}

// Weights of N rows. Where rows lie far apart, no processor foresees what is read next: the vectors
// to the right.
template <class T, int N>
SUBQUAD_INLINE pack<T, N> row_weights(matrix_view<const T> x, std::int64_t row, vec<T> reference) {
  pack<T, N> weights;
  SUBQUAD_SIDE_BY_SIDE {
    const T* const from = x.data + (row + u) * x.row_stride;
    __builtin_prefetch(from + 2 * lanes<T>);
    weights.v[u] = load(from) - reference;
  }
  exp_bounded<N>(weights);
  return weights;
}

// Sums of N rows, with what came before.
template <class T, int N, bool kWrite>
SUBQUAD_INLINE void sum_rows_near(matrix_view<const T> x, std::int64_t row, vec<T> reference,
                                  const lanes_outward<T>& to, vec<T> base, vec<T>& prefix,
                                  T* sums) {
  const pack<T, N> weights = row_weights<T, N>(x, row, reference);
  SUBQUAD_SIDE_BY_SIDE {
    prefix += weights.v[u];
    if constexpr (kWrite) store<T>(sums + (row + u) * lanes<T>, prefix * to.own + base);
  }
}

// One group of at most kGroup entries; as scan_near and scan_far.
template <class T, bool kWrite>
SUBQUAD_INLINE bool scan_group_near(matrix_view<const T> x, std::int64_t steps, matrix_view<T> out,
                                    std::int64_t out_steps, lane_states<T>& states,
                                    const lanes_outward<T>& to) {
  vec<T> prefix{};
  const vec<T> base = kWrite ? sums_of<T>(states) * to.own + to.before : prefix;
  const vec<T> reference = states.reference;
  T sums[kGroup * lanes<T>];
  std::int64_t t = 0;
  for (; t + kSideBySide <= steps; t += kSideBySide) {
    sum_rows_near<T, kSideBySide, kWrite>(x, t, reference, to, base, prefix, sums);
  }
  for (; t < steps; ++t) sum_rows_near<T, 1, kWrite>(x, t, reference, to, base, prefix, sums);
  if (!all_at_most<T>(prefix, static_cast<T>(kLargestSum))) return false;
  if constexpr (kWrite) add_logs<T>(sums, out.data, out.row_stride, out_steps, to.reference);
  add<T>(states, prefix);
  return true;
}

// The step of far_scan, down a column.
template <class T>
SUBQUAD_INLINE void push(far_prefix<T>& at, vec<T> x) {
  const vec<T> reference = max_or_nan<T>(at.reference, x);
  const vec<T> scale = factor<T>(at.reference, reference);
  at.product *= scale;
  at.sum = at.sum * scale + weight<T>(x, reference);
  at.reference = reference;
}

template <class T>
SUBQUAD_INLINE outer_sum<T> outer_sum_of(const far_prefix<T>& at, vec<T> before,
                                         const lanes_entry<T>& entry) {
  const vec<T> sum = at.sum + at.product * before;
  if (entry.empty) return {at.reference, sum};
  return with_entry<T>(at.reference, sum, entry.reference, entry.sum);
}

template <class T, bool kWrite>
SUBQUAD_INLINE void scan_group_far(matrix_view<const T> x, std::int64_t steps, matrix_view<T> out,
                                   std::int64_t out_steps, lane_states<T>& states,
                                   const lanes_entry<T>& entry) {
  const vec<T> before = sums_of<T>(states);
  far_prefix<T> at{states.reference, broadcast(T(1)), vec<T>{}};
  for (std::int64_t t = 0; t < steps; ++t) {
    push<T>(at, load(x.data + t * x.row_stride));
    if constexpr (kWrite) {
      if (t < out_steps) {
        store<T>(out.data + t * out.row_stride, log_of<T>(outer_sum_of<T>(at, before, entry)));
      }
    }
  }
  advance<T>(states, at.reference, at.product, at.sum);
}

// Columns [begin, begin + count) of `steps` rows, in `buffer` where they do not fill a vector.
template <class T>
SUBQUAD_INLINE matrix_view<const T> lanes_of(matrix_view<const T> from, std::int64_t row,
                                             std::int64_t column, std::int64_t count,
                                             std::int64_t steps, T* buffer) {
  const matrix_view<const T> part{from.data + row * from.row_stride + column, from.row_stride, 1};
  if (count == lanes<T>) return part;
  for (std::int64_t t = 0; t < steps; ++t) {
    for (std::int64_t l = 0; l < lanes<T>; ++l) {
      buffer[t * lanes<T> + l] = l < count ? part(t, l) : T(0);
    }
  }
  return {buffer, lanes<T>, 1};
}

template <class T>
SUBQUAD_INLINE void scatter_lanes(const T* buffer, std::int64_t count, std::int64_t steps,
                                  matrix_view<T> to) {
  for (std::int64_t t = 0; t < steps; ++t) {
    for (std::int64_t l = 0; l < count; ++l) to(t, l) = buffer[t * lanes<T> + l];
  }
}

template <class T, bool kWrite>
SUBQUAD_INLINE void scan_columns(const logcumsumexp_task<T>& task) {
  constexpr std::int64_t kLanes = lanes<T>;
  lane_states<T> states[kScanWidth / kLanes];
  lanes_entry<T> entries[kScanWidth / kLanes];
  lanes_outward<T> to[kScanWidth / kLanes];
  T x_buffer[kGroup * kLanes];
  T out_buffer[kGroup * kLanes];
  const std::int64_t vectors = (task.width + kLanes - 1) / kLanes;
  for (std::int64_t v = 0; v < vectors; ++v) {
    const std::int64_t count = least(kLanes, task.width - v * kLanes);
    states[v] = load_states<T>(nullptr, 0);
    entries[v] = load_entry<T>(kWrite ? task.entry + v * kLanes : nullptr, count);
    to[v] = outward_of<T>(states[v].reference, entries[v]);
  }
  for (std::int64_t begin = 0; begin < task.n; begin += kGroup) {
    const std::int64_t steps = least(kGroup, task.n - begin);
    const std::int64_t out_steps = kWrite ? most(0, least(steps, task.n_out - begin)) : 0;
    const bool saves = task.blocks && begin > 0 && begin % kScanColumnBlock == 0;
    for (std::int64_t v = 0; v < vectors; ++v) {
      const std::int64_t column = v * kLanes;
      const std::int64_t count = least(kLanes, task.width - column);
      if (saves) {
        store_states<T>(states[v], count,
                        task.blocks + (begin / kScanColumnBlock - 1) * task.width + column);
      }
      const matrix_view<const T> x = lanes_of<T>(task.x, begin, column, count, steps, x_buffer);
      matrix_view<T> out{out_buffer, kLanes, 1};
      if (kWrite && count == kLanes) {
        out = {task.out.data + begin * task.out.row_stride + column, task.out.row_stride, 1};
      }
      const vec<T> empty = states[v].reference;
      if (begin == 0 || !all_finite<T>(empty)) {
        states[v].reference = first_references<T>(empty, load(x.data));
        to[v] = outward_of<T>(states[v].reference, entries[v]);
      }
      const bool done = entries[v].finite && all_finite<T>(states[v].reference) &&
                        scan_group_near<T, kWrite>(x, steps, out, out_steps, states[v], to[v]);
      if (!done) {
        states[v].reference = empty;
        scan_group_far<T, kWrite>(x, steps, out, out_steps, states[v], entries[v]);
        to[v] = outward_of<T>(states[v].reference, entries[v]);
      }
      if (kWrite && count < kLanes) {
        scatter_lanes<T>(
            out_buffer, count, out_steps,
            {task.out.data + begin * task.out.row_stride + column, task.out.row_stride, 1});
      }
    }
  }
  for (std::int64_t v = 0; v < vectors; ++v) {
    store_states<T>(states[v], least(kLanes, task.width - v * kLanes), task.local + v * kLanes);
  }
}

template <class T>
void columns(const logcumsumexp_task<T>& task) {
  if (task.out) {
    scan_columns<T, true>(task);
  } else {
    scan_columns<T, false>(task);
  }
}

// Running adjoints of the lanes of a vector.
template <class T>
struct lane_adjoints {
  double own[lanes<T>];
  double scale[lanes<T>];
  double later[lanes<T>];
  vec<T> reference;
};

template <class T>
SUBQUAD_INLINE void scale_by(lane_adjoints<T>& adjoints, vec<T> factors) {
  T scale[lanes<T>];
  store<T>(scale, factors);
  for (int l = 0; l < lanes<T>; ++l) {
    adjoints.own[l] *= static_cast<double>(scale[l]);
    adjoints.scale[l] *= static_cast<double>(scale[l]);
  }
}

template <class T>
SUBQUAD_INLINE vec<T> adjoint_factor(vec<T> reference, vec<T> after) {
  return after != after ? broadcast(T(1)) : factor<T>(reference, after);
}

template <class T>
SUBQUAD_INLINE void add_own(lane_adjoints<T>& adjoints, vec<T> values) {
  T value[lanes<T>];
  store<T>(value, values);
  for (int l = 0; l < lanes<T>; ++l) adjoints.own[l] += static_cast<double>(value[l]);
}

// own + scale later, rounded to T.
template <class T>
SUBQUAD_INLINE vec<T> totals_of(const lane_adjoints<T>& adjoints) {
  T total[lanes<T>];
  for (int l = 0; l < lanes<T>; ++l) {
    total[l] = static_cast<T>(adjoints.own[l] + adjoints.scale[l] * adjoints.later[l]);
  }
  return load(total);
}

template <class T>
struct column_scratch {
  T x[kScanColumnBlock * lanes<T>];
  T grad[kScanColumnBlock * lanes<T>];
  T out[kScanColumnBlock * lanes<T>];
  T weights[kScanColumnBlock * lanes<T>];
  T quotients[kScanColumnBlock * lanes<T>];
  T references[kScanColumnBlock * lanes<T>];
};

template <class T>
SUBQUAD_INLINE vec<T> row_or_zero(matrix_view<const T> m, std::int64_t t, std::int64_t rows) {
  return t < rows ? load(m.data + t * m.row_stride) : vec<T>{};
}

// Weights and quotients of N rows.
template <class T, int N>
SUBQUAD_INLINE void quotient_rows_near(matrix_view<const T> x, matrix_view<const T> grad,
                                       std::int64_t grads, std::int64_t row, vec<T> reference,
                                       const lanes_outward<T>& to, vec<T> base, vec<T>& prefix,
                                       column_scratch<T>& scratch) {
  const pack<T, N> weights = row_weights<T, N>(x, row, reference);
  SUBQUAD_SIDE_BY_SIDE {
    prefix += weights.v[u];
    store<T>(scratch.weights + (row + u) * lanes<T>, weights.v[u]);
    store<T>(scratch.quotients + (row + u) * lanes<T>,
             row_or_zero<T>(grad, row + u, grads) / (prefix * to.own + base));
  }
}

// As reverse_near and reverse_far, for one block of a vector's lanes.
template <class T, bool kWrite>
SUBQUAD_INLINE bool reverse_lanes_near(matrix_view<const T> x, std::int64_t steps,
                                       matrix_view<const T> grad, std::int64_t grads,
                                       matrix_view<T> out, lane_states<T> states,
                                       const lanes_outward<T>& to, lane_adjoints<T>& adjoints,
                                       column_scratch<T>& scratch) {
  constexpr std::int64_t kLanes = lanes<T>;
  for (std::int64_t begin = 0; begin < steps; begin += kGroup) {
    const std::int64_t end = least(steps, begin + kGroup);
    const vec<T> base = sums_of<T>(states) * to.own + to.before;
    vec<T> prefix{};
    std::int64_t t = begin;
    for (; t + kSideBySide <= end; t += kSideBySide) {
      quotient_rows_near<T, kSideBySide>(x, grad, grads, t, states.reference, to, base, prefix,
                                         scratch);
    }
    for (; t < end; ++t) {
      quotient_rows_near<T, 1>(x, grad, grads, t, states.reference, to, base, prefix, scratch);
    }
    if (!all_at_most<T>(prefix, static_cast<T>(kLargestSum))) return false;
    add<T>(states, prefix);
  }
  lane_adjoints<T> next = adjoints;
  scale_by<T>(next, adjoint_factor<T>(to.reference, adjoints.reference));
  next.reference = to.reference;
  for (std::int64_t end = steps; end > 0; end = (end - 1) / kGroup * kGroup) {
    const vec<T> base = totals_of<T>(next) * to.own;
    vec<T> suffix{};
    for (std::int64_t t = end - 1; t >= (end - 1) / kGroup * kGroup; --t) {
      suffix += load(scratch.quotients + t * kLanes);
      if constexpr (kWrite) {
        store<T>(out.data + t * out.row_stride,
                 load(scratch.weights + t * kLanes) * (suffix * to.own + base));
      }
    }
    add_own<T>(next, suffix);
  }
  if (!all_finite<T>(totals_of<T>(next))) return false;
  adjoints = next;
  return true;
}

template <class T, bool kWrite>
SUBQUAD_INLINE void reverse_lanes_far(matrix_view<const T> x, std::int64_t steps,
                                      matrix_view<const T> grad, std::int64_t grads,
                                      matrix_view<T> out, lane_states<T> states,
                                      const lanes_entry<T>& entry, lane_adjoints<T>& adjoints,
                                      column_scratch<T>& scratch) {
  constexpr std::int64_t kLanes = lanes<T>;
  for (std::int64_t begin = 0; begin < steps; begin += kGroup) {
    const vec<T> before = sums_of<T>(states);
    far_prefix<T> at{states.reference, broadcast(T(1)), vec<T>{}};
    for (std::int64_t t = begin; t < least(steps, begin + kGroup); ++t) {
      const vec<T> value = load(x.data + t * x.row_stride);
      push<T>(at, value);
      const outer_sum<T> total = outer_sum_of<T>(at, before, entry);
      const vec<T> e =
          total.reference < kInfinity<T> ? weight<T>(value, total.reference) : broadcast(T(1));
      store<T>(scratch.weights + t * kLanes, e);
      store<T>(scratch.quotients + t * kLanes, quotient<T>(row_or_zero<T>(grad, t, grads), total));
      store<T>(scratch.references + t * kLanes, total.reference);
    }
    advance<T>(states, at.reference, at.product, at.sum);
  }
  for (std::int64_t t = steps - 1; t >= 0; --t) {
    const vec<T> reference = load(scratch.references + t * kLanes);
    scale_by<T>(adjoints, adjoint_factor<T>(reference, adjoints.reference));
    adjoints.reference = reference;
    add_own<T>(adjoints, load(scratch.quotients + t * kLanes));
    if constexpr (kWrite) {
      const vec<T> value = load(scratch.weights + t * kLanes) * totals_of<T>(adjoints);
      store<T>(out.data + t * out.row_stride,
               load(x.data + t * x.row_stride) == -kInfinity<T> ? vec<T>{} : value);
    }
  }
}

template <class T, bool kWrite>
SUBQUAD_INLINE void reverse_columns(const logcumsumexp_vjp_task<T>& task) {
  constexpr std::int64_t kLanes = lanes<T>;
  lane_adjoints<T> adjoints[kScanWidth / kLanes];
  lanes_entry<T> entries[kScanWidth / kLanes];
  column_scratch<T> scratch;
  const std::int64_t vectors = (task.width + kLanes - 1) / kLanes;
  for (std::int64_t v = 0; v < vectors; ++v) {
    const std::int64_t count = least(kLanes, task.width - v * kLanes);
    entries[v] = load_entry<T>(task.entry + v * kLanes, count);
    T references[kLanes];
    for (std::int64_t l = 0; l < kLanes; ++l) {
      const std::int64_t lane = v * kLanes + l;
      const bool present = l < count && task.end;
      adjoints[v].own[l] = 0;
      adjoints[v].scale[l] = 1;
      adjoints[v].later[l] = kWrite && present ? task.later[lane] : 0;
      references[l] = present ? task.end[lane].reference : kNaN<T>;
    }
    adjoints[v].reference = load(references);
  }
  const std::int64_t blocks = (task.n + kScanColumnBlock - 1) / kScanColumnBlock;
  for (std::int64_t b = blocks - 1; b >= 0; --b) {
    const std::int64_t begin = b * kScanColumnBlock;
    const std::int64_t steps = least(kScanColumnBlock, task.n - begin);
    const std::int64_t grads = task.grad ? most(0, least(steps, task.n_grad - begin)) : 0;
    for (std::int64_t v = 0; v < vectors; ++v) {
      const std::int64_t column = v * kLanes;
      const std::int64_t count = least(kLanes, task.width - column);
      const matrix_view<const T> x = lanes_of<T>(task.x, begin, column, count, steps, scratch.x);
      const matrix_view<const T> grad =
          grads > 0 ? lanes_of<T>(task.grad, begin, column, count, grads, scratch.grad)
                    : matrix_view<const T>{};
      matrix_view<T> to_out{};
      if constexpr (kWrite) {
        to_out = {task.grad_x.data + begin * task.grad_x.row_stride + column,
                  task.grad_x.row_stride, 1};
      }
      const matrix_view<T> out = count == kLanes ? to_out : matrix_view<T>{scratch.out, kLanes, 1};
      const lane_states<T> states =
          load_states<T>(b == 0 ? nullptr : task.blocks + (b - 1) * task.width + column, count);
      lane_states<T> near = states;
      near.reference = first_references<T>(states.reference, load(x.data));
      const bool done = entries[v].finite && all_finite<T>(near.reference) &&
                        reverse_lanes_near<T, kWrite>(x, steps, grad, grads, out, near,
                                                      outward_of<T>(near.reference, entries[v]),
                                                      adjoints[v], scratch);
      if (!done) {
        reverse_lanes_far<T, kWrite>(x, steps, grad, grads, out, states, entries[v], adjoints[v],
                                     scratch);
      }
      if (kWrite && count < kLanes) scatter_lanes<T>(scratch.out, count, steps, to_out);
    }
  }
  for (std::int64_t v = 0; v < vectors; ++v) {
    scale_by<T>(adjoints[v], adjoint_factor<T>(entries[v].reference, adjoints[v].reference));
    for (std::int64_t l = 0; l < least(kLanes, task.width - v * kLanes); ++l) {
      task.adjoint[v * kLanes + l] = {adjoints[v].own[l], adjoints[v].scale[l]};
    }
  }
}

template <class T>
void columns_vjp(const logcumsumexp_vjp_task<T>& task) {
  if (task.grad_x) {
    reverse_columns<T, true>(task);
  } else {
    reverse_columns<T, false>(task);
  }
}

template <class T>
constexpr scans_functions<T> functions = {rows<T>, columns<T>, rows_vjp<T>, columns_vjp<T>,
                                          merge<T>};

}  // namespace

extern const scans_kernels kernels_scans;
const scans_kernels kernels_scans = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
