// Numbers s * 2^k with an integer k beside the floating-point s: sums and products of exponentials
// of any range and sign, without an overflow, an underflow or a rescaling.
//
// Stored numbers have |s| in [1, 2) (exponentials in [0.7, 1.5]); zero is (0, kZero), infinities
// and NaN have k = kInfinite. Whatever takes part in a product with a zero counts for nothing, NaN
// included. Inputs have |k| <= kInput; the products of five of them stay within (kFloor, -kFloor),
// products with an infinity lie above those, products with a zero below kFloor.
#ifndef SUBQUAD_KERNELS_EXTENDED_INL
#define SUBQUAD_KERNELS_EXTENDED_INL

#include "log_sum_exp.inl"
#include "tile_product.inl"
#include "vector_math.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

template <class T>
using exponent = typename vector_of<T>::scalar_int;

template <class T>
struct extended_format;

template <>
struct extended_format<float> {
  static constexpr std::int32_t kInput = 1 << 24;
  static constexpr std::int32_t kInfinite = 1 << 27;
  static constexpr std::int32_t kFloor = -(1 << 28);
  static constexpr std::int32_t kZero = -(1 << 29);
  static constexpr float kReliable = 0x1p-88f;
};

template <>
struct extended_format<double> {
  static constexpr std::int64_t kInput = std::int64_t{1} << 50;
  static constexpr std::int64_t kInfinite = std::int64_t{1} << 53;
  static constexpr std::int64_t kFloor = -(std::int64_t{1} << 54);
  static constexpr std::int64_t kZero = -(std::int64_t{1} << 55);
  static constexpr double kReliable = 0x1p-950;
};

template <class T>
struct extended {
  vec<T> s;
  ivec<T> k;
};

// Rows of numbers; lanes along a row.
template <class T>
struct extended_matrix {
  T* s;
  exponent<T>* k;
  std::int64_t stride;

  SUBQUAD_ALWAYS_INLINE extended_matrix from(std::int64_t row) const {
    return {s + row * stride, k + row * stride, stride};
  }
};

template <class T>
SUBQUAD_INLINE ivec<T> load_exponents(const exponent<T>* p) {
  return bits_of<T>(load(reinterpret_cast<const T*>(p)));
}

template <class T>
SUBQUAD_INLINE void store_exponents(exponent<T>* p, ivec<T> k) {
  store<T>(reinterpret_cast<T*>(p), from_bits<T>(k));
}

template <class T>
SUBQUAD_INLINE ivec<T> broadcast_exponent(exponent<T> k) {
  return ivec<T>{} + k;
}

template <class T>
SUBQUAD_INLINE extended<T> load_extended(const extended_matrix<T>& from, std::int64_t row,
                                         std::int64_t column) {
  const std::int64_t at = row * from.stride + column;
  return {load(from.s + at), load_exponents<T>(from.k + at)};
}

template <class T>
SUBQUAD_INLINE void store_extended(const extended_matrix<T>& to, std::int64_t row,
                                   std::int64_t column, const extended<T>& value) {
  const std::int64_t at = row * to.stride + column;
  store<T>(to.s + at, value.s);
  store_exponents<T>(to.k + at, value.k);
}

template <class T>
SUBQUAD_INLINE ivec<T> larger(ivec<T> a, ivec<T> b) {
  return a > b ? a : b;
}

template <class T>
SUBQUAD_INLINE bool any(ivec<T> lanes_set) {
  exponent<T> values[lanes<T>];
  store_exponents<T>(values, lanes_set);
  exponent<T> all = 0;
  for (int i = 0; i < lanes<T>; ++i) all |= values[i];
  return all != 0;
}

// 2^d for d <= 0, and 0 where it would not be a normal number.
template <class T>
SUBQUAD_INLINE vec<T> power_of_two(ivec<T> d) {
  constexpr exponent<T> kBias = float_format<T>::kBias;
  return from_bits<T>(larger<T>(d + kBias, ivec<T>{}) << float_format<T>::kFractionBits);
}

template <class T>
SUBQUAD_INLINE extended<T> normalised(vec<T> s, ivec<T> k) {
  using format = float_format<T>;
  using unsigned_bits = typename format::unsigned_bits;
  constexpr exponent<T> kBias = format::kBias;
  constexpr typename format::scalar_bits kExponentMask = 2 * format::kBias + 1;
  constexpr typename format::scalar_bits kField = kExponentMask << format::kFractionBits;
  const unsigned_bits bits = (unsigned_bits)s;
  const ivec<T> power = (ivec<T>)((bits >> format::kFractionBits) & kExponentMask);
  const vec<T> fraction = (vec<T>)((bits & ~kField) | format::kOneBits);
  const auto vanishes = power == 0;
  const auto infinite = power == static_cast<exponent<T>>(kExponentMask);
  extended<T> result;
  result.s = vanishes ? vec<T>{} : infinite ? s : fraction;
  result.k = vanishes   ? broadcast_exponent<T>(extended_format<T>::kZero)
             : infinite ? broadcast_exponent<T>(extended_format<T>::kInfinite)
                        : k + (power - kBias);
  return result;
}

template <class T>
SUBQUAD_INLINE extended<T> multiply(const extended<T>& a, const extended<T>& b) {
  const ivec<T> k = a.k + b.k;
  extended<T> product = normalised<T>(a.s * b.s, k);
  const auto vanishes = k < extended_format<T>::kFloor;
  product.s = vanishes ? vec<T>{} : product.s;
  product.k = vanishes ? broadcast_exponent<T>(extended_format<T>::kZero) : product.k;
  return product;
}

// The number itself, infinite or 0 past the range of T. Two factors reach every subnormal.
template <class T>
SUBQUAD_INLINE vec<T> value_of(const extended<T>& x) {
  constexpr exponent<T> kBias = float_format<T>::kBias;
  constexpr int kFractionBits = float_format<T>::kFractionBits;
  const auto bounded = [](ivec<T> k) {
    const ivec<T> low = larger<T>(k, broadcast_exponent<T>(1 - kBias));
    return low < kBias ? low : broadcast_exponent<T>(kBias);
  };
  const ivec<T> first = bounded(x.k);
  const ivec<T> second = bounded(x.k - first);
  return x.s * from_bits<T>((first + kBias) << kFractionBits) *
         from_bits<T>((second + kBias) << kFractionBits);
}

template <class T>
SUBQUAD_INLINE void fill_zero(const extended_matrix<T>& to, std::int64_t rows,
                              std::int64_t columns) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; c += lanes<T>) {
      store_extended<T>(to, r, c, {vec<T>{}, broadcast_exponent<T>(extended_format<T>::kZero)});
    }
  }
}

template <class T>
SUBQUAD_INLINE void transpose(const T* from, std::int64_t from_stride, std::int64_t rows,
                              std::int64_t columns, T* to, std::int64_t to_stride) {
  constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  for (std::int64_t r = 0; r < rows; r += kSide) {
    for (std::int64_t c = 0; c < columns; c += kSide) {
      const T* square[kSide];
      for (int i = 0; i < kSide; ++i) square[i] = from + (r + i) * from_stride + c;
      transpose_square(square, to + c * to_stride + r, to_stride);
    }
  }
}

// to[c][r] = from[r][c]; rows and columns are multiples of the elements of 16 bytes.
template <class T>
void transpose(const extended_matrix<T>& from, std::int64_t rows, std::int64_t columns,
               const extended_matrix<T>& to) {
  transpose<T>(from.s, from.stride, rows, columns, to.s, to.stride);
  transpose<T>(reinterpret_cast<const T*>(from.k), from.stride, rows, columns,
               reinterpret_cast<T*>(to.k), to.stride);
}

// e^(x + low) for `count` numbers, a multiple of the lanes. Relative error 1 ulp where |x| is
// within the range of inputs (1.1e7 for float, 7e14 for double); finite x beyond it count as its
// end.
SUBQUAD_INLINE void finite_exponentials(const double* x, const double*, std::int64_t count,
                                        float* s, std::int32_t* k) {
  constexpr double kLog2EValue = log2_constants<double>::kLog2E;
  constexpr double kLimit = extended_format<float>::kInput / kLog2EValue;
  for (std::int64_t i = 0; i < count; ++i) {
    const double below = x[i] < kLimit ? x[i] : kLimit;
    const double bounded = below > -kLimit ? below : -kLimit;
    const double power = bounded * kLog2EValue;
    const double whole = (power + kRounder<double>)-kRounder<double>;
    k[i] = static_cast<std::int32_t>(whole);
    s[i] = static_cast<float>(power - whole);
  }
  for (std::int64_t i = 0; i < count; i += lanes<float>) {
    store<float>(s + i, exp2_fraction(load(s + i)));
  }
}

SUBQUAD_INLINE void finite_exponentials(const double* x, const double* low, std::int64_t count,
                                        double* s, std::int64_t* k) {
  using constants = log2_constants<double>;
  constexpr double kLimit = extended_format<double>::kInput / constants::kLog2E;
  for (std::int64_t i = 0; i < count; i += lanes<double>) {
    const vec<double> bounded =
        max<double>(broadcast(-kLimit), min<double>(broadcast(kLimit), load(x + i)));
    const vec<double> rounded = bounded * constants::kLog2E + kRounder<double>;
    const vec<double> n = rounded - kRounder<double>;
    // Without a fused multiply-add only twelve bits times the high part of log(2) are exact.
    const vec<double> n_high = ((n * 0x1p-12 + kRounder<double>)-kRounder<double>)*0x1p12;
    const vec<double> high =
        (bounded - n_high * constants::kLog2High) - (n - n_high) * constants::kLog2High;
    const vec<double> rest = load(low + i) - n * constants::kLog2Low;
    const vec<double> r = high + rest;
    const vec<double> r_low = (high - r) + rest;
    store<double>(s + i, ((r * r * exp_remainder(r) + r_low) + r) + 1.0);
    store_exponents<double>(
        k + i, bits_of<double>(rounded) - bits_of<double>(broadcast(kRounder<double>)));
  }
}

template <class T>
SUBQUAD_INLINE void exponentials(const double* x, const double* low, std::int64_t count, T* s,
                                 exponent<T>* k) {
  finite_exponentials(x, low, count, s, k);
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) finite &= __builtin_fabs(x[i]) <= __DBL_MAX__;
  if (finite) return;
  for (std::int64_t i = 0; i < count; ++i) {
    if (__builtin_fabs(x[i]) <= __DBL_MAX__) continue;
    s[i] = x[i] < 0 ? T(0) : static_cast<T>(x[i]);
    k[i] = x[i] < 0 ? extended_format<T>::kZero : extended_format<T>::kInfinite;
  }
}

// out[i] = k[i] log(2) + l[i], formed in double.
SUBQUAD_INLINE void add_powers(const std::int32_t* k, const float* l, std::int64_t count,
                               float* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<float>(k[i] * kLn2<double> + static_cast<double>(l[i]));
  }
}

SUBQUAD_INLINE void add_powers(const std::int64_t* k, const double* l, std::int64_t count,
                               double* out) {
  using constants = log2_constants<double>;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto power = static_cast<double>(k[i]);
    out[i] = power * constants::kLog2High + (l[i] + power * constants::kLog2Low);
  }
}

// high + low += term.
SUBQUAD_INLINE void add_compensated(double& high, double& low, double term) {
  const double sum = high + term;
  const double part = sum - high;
  low += (high - (sum - part)) + (term - part);
  high = sum;
}

// out[i] = k[i] log(2) + l[i] + high[i] + low[i], of which the first and the third may cancel.
template <class T>
SUBQUAD_INLINE void add_powers(const exponent<T>* k, const T* l, const double* high,
                               const double* low, std::int64_t count, T* out) {
  using constants = log2_constants<double>;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto power = static_cast<double>(k[i]);
    double sum = power * constants::kLog2High;
    double rest = static_cast<double>(l[i]) + (power * constants::kLog2Low + low[i]);
    add_compensated(sum, rest, high[i]);
    out[i] = static_cast<T>(sum + rest);
  }
}

// One of the products that are added: left (rows x depth) right (depth x columns). Rows of left go
// on with zeros to a multiple of the lanes.
template <class T>
struct extended_term {
  extended_matrix<T> left;
  extended_matrix<T> right;
  std::int64_t depth;
};

template <class T>
struct product_scratch {
  exponent<T>* balance;    // depth
  exponent<T>* left_top;   // rows
  exponent<T>* right_top;  // columns
  T* rows;                 // kTileRows x depth
  T* left;                 // kTileRows x depth
  T* right;                // depth x columns
};

#if SUBQUAD_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kAlignedRows = 4;
#else
constexpr int kAlignedRows = 2;
#endif
#define SUBQUAD_UNROLL_ALIGNED _Pragma("GCC unroll 4")

// A tile of the sum of both terms, every product aligned to the largest of its sum before it is
// added: at most (depth + 2) eps / 2 of the sum of magnitudes, whatever the range.
template <class T, int Rows>
void aligned_tile(const extended_term<T> (&terms)[2], std::int64_t row, std::int64_t column,
                  const extended_matrix<T>& out) {
  constexpr exponent<T> kBias = float_format<T>::kBias;
  ivec<T> top[Rows][kTileVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      top[r][v] = broadcast_exponent<T>(extended_format<T>::kFloor);
    }
  }
  for (const extended_term<T>& term : terms) {
    const exponent<T>* left = term.left.k + row * term.left.stride;
    const exponent<T>* right = term.right.k + column;
    for (std::int64_t i = 0; i < term.depth; ++i, right += term.right.stride) {
      const ivec<T> right0 = load_exponents<T>(right);
      const ivec<T> right1 = load_exponents<T>(right + lanes<T>);
      SUBQUAD_UNROLL_ALIGNED
      for (int r = 0; r < Rows; ++r) {
        const exponent<T> k = left[r * term.left.stride + i];
        top[r][0] = larger<T>(right0 + k, top[r][0]);
        top[r][1] = larger<T>(right1 + k, top[r][1]);
      }
    }
  }
  vec<T> sum[Rows][kTileVectors] = {};
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) top[r][v] -= kBias;
  }
  for (const extended_term<T>& term : terms) {
    const std::int64_t first = row * term.left.stride;
    for (std::int64_t i = 0; i < term.depth; ++i) {
      const extended<T> right[kTileVectors] = {load_extended<T>(term.right, i, column),
                                               load_extended<T>(term.right, i, column + lanes<T>)};
      SUBQUAD_UNROLL_ALIGNED
      for (int r = 0; r < Rows; ++r) {
        const std::int64_t at = first + r * term.left.stride + i;
        const T s = term.left.s[at];
        const exponent<T> k = term.left.k[at];
        SUBQUAD_UNROLL_VECTORS
        for (int v = 0; v < kTileVectors; ++v) {
          const ivec<T> biased = right[v].k + k - top[r][v];
          const vec<T> power = from_bits<T>(biased << float_format<T>::kFractionBits);
          // What is too small, a product with a zero included, is left out and not multiplied by
          // zero: it may be infinite.
          sum[r][v] = biased > 0 ? sum[r][v] + right[v].s * s * power : sum[r][v];
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      store_extended<T>(out, row + r, column + v * lanes<T>,
                        normalised<T>(sum[r][v], top[r][v] + kBias));
    }
  }
}

// Scratch of a product, in elements of T; exponents are as long.
template <class T>
SUBQUAD_INLINE std::int64_t product_scratch_size(std::int64_t rows, std::int64_t depth,
                                                 std::int64_t columns) {
  return depth + rows + columns + 2 * kTileRows * depth + depth * columns;
}

template <class T>
SUBQUAD_INLINE product_scratch<T> cut_product_scratch(T* from, std::int64_t depth,
                                                      std::int64_t columns) {
  product_scratch<T> scratch;
  scratch.right = from;
  scratch.rows = scratch.right + depth * columns;
  scratch.left = scratch.rows + kTileRows * depth;
  scratch.balance = reinterpret_cast<exponent<T>*>(scratch.left + kTileRows * depth);
  scratch.right_top = scratch.balance + depth;
  scratch.left_top = scratch.right_top + columns;
  return scratch;
}

// out = terms[0] + terms[1] for `columns` columns, a multiple of kTileColumns. out aliases nothing.
//
// First as plain products of s 2^(k - reference), with references for every row, every column and
// every summand. What is flushed to zero there is less than depth 2^-124 (2^-1020) in the scale of
// a sum, and depth 2^-36 (2^-70) of a sum of kReliable or more; tiles with smaller sums, but for
// those of a row or a column of zeros, are formed again with every product aligned.
template <class T>
void product(const extended_term<T> (&terms)[2], std::int64_t rows, std::int64_t columns,
             const product_scratch<T>& scratch, const extended_matrix<T>& out) {
  using format = extended_format<T>;
  constexpr std::int64_t kLanes = lanes<T>;
  const std::int64_t padded[2] = {divide_up(terms[0].depth, kLanes) * kLanes,
                                  divide_up(terms[1].depth, kLanes) * kLanes};
  const std::int64_t depth = terms[0].depth + terms[1].depth;

  for (int part = 0; part < 2; ++part) {
    const extended_matrix<T>& left = terms[part].left;
    for (std::int64_t i = 0; i < padded[part]; i += kLanes) {
      ivec<T> top = broadcast_exponent<T>(format::kZero);
      for (std::int64_t r = 0; r < rows; ++r) {
        top = larger<T>(load_exponents<T>(left.k + r * left.stride + i), top);
      }
      store_exponents<T>(scratch.balance + part * padded[0] + i,
                         top < format::kFloor ? ivec<T>{} : top);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    ivec<T> top = broadcast_exponent<T>(2 * format::kZero);
    for (int part = 0; part < 2; ++part) {
      const exponent<T>* k = terms[part].left.k + r * terms[part].left.stride;
      const exponent<T>* balance = scratch.balance + part * padded[0];
      for (std::int64_t i = 0; i < padded[part]; i += kLanes) {
        top = larger<T>(load_exponents<T>(k + i) - load_exponents<T>(balance + i), top);
      }
    }
    exponent<T> tops[kLanes];
    store_exponents<T>(tops, top);
    exponent<T> largest = tops[0];
    for (std::int64_t lane = 1; lane < kLanes; ++lane) {
      largest = tops[lane] > largest ? tops[lane] : largest;
    }
    scratch.left_top[r] = largest;
  }
  for (std::int64_t c = 0; c < columns; c += kLanes) {
    ivec<T> top = broadcast_exponent<T>(2 * format::kZero);
    for (int part = 0; part < 2; ++part) {
      const exponent<T>* k = terms[part].right.k + c;
      for (std::int64_t i = 0; i < terms[part].depth; ++i) {
        top = larger<T>(load_exponents<T>(k + i * terms[part].right.stride) +
                            scratch.balance[part * padded[0] + i],
                        top);
      }
    }
    store_exponents<T>(scratch.right_top + c, top);
    T* scaled = scratch.right + c;
    for (int part = 0; part < 2; ++part) {
      for (std::int64_t i = 0; i < terms[part].depth; ++i, scaled += columns) {
        const extended<T> x = load_extended<T>(terms[part].right, i, c);
        store<T>(scaled, x.s * power_of_two<T>(x.k + scratch.balance[part * padded[0] + i] - top));
      }
    }
  }

  const std::int64_t row_stride = padded[0] + padded[1];
  for (std::int64_t row = 0; row < rows; row += kTileRows) {
    const std::int64_t count = smaller<std::int64_t>(kTileRows, rows - row);
    for (std::int64_t r = 0; r < kTileRows; ++r) {
      T* scaled = scratch.rows + r * row_stride;
      if (r >= count) {
        for (std::int64_t i = 0; i < row_stride; i += kLanes) store<T>(scaled + i, vec<T>{});
        continue;
      }
      const exponent<T> top = scratch.left_top[row + r];
      for (int part = 0; part < 2; ++part) {
        const exponent<T>* balance = scratch.balance + part * padded[0];
        for (std::int64_t i = 0; i < padded[part]; i += kLanes) {
          const extended<T> x = load_extended<T>(terms[part].left, row + r, i);
          store<T>(scaled + part * padded[0] + i,
                   x.s * power_of_two<T>(x.k - load_exponents<T>(balance + i) - top));
        }
      }
    }
    pack_panel<kTileRows, T>(scratch.rows, row_stride, terms[0].depth, scratch.left);
    pack_panel<kTileRows, T>(scratch.rows + padded[0], row_stride, terms[1].depth,
                             scratch.left + kTileRows * terms[0].depth);
    for (std::int64_t column = 0; column < columns; column += kTileColumns<T>) {
      tile<T> acc;
      tile_zero<T>(acc);
      tile_product<T>(depth, scratch.left, kTileRows, scratch.right + column, columns, acc);
      ivec<T> top[kTileVectors];
      ivec<T> present[kTileVectors];
      ivec<T> doubtful = {};
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kTileVectors; ++v) {
        top[v] = load_exponents<T>(scratch.right_top + column + v * kLanes);
        present[v] = top[v] > format::kFloor;
      }
      SUBQUAD_UNROLL_ROWS
      for (int r = 0; r < kTileRows; ++r) {
        if (r >= count || scratch.left_top[row + r] < format::kFloor) continue;
        SUBQUAD_UNROLL_VECTORS
        for (int v = 0; v < kTileVectors; ++v) {
          const ivec<T> magnitude = bits_of<T>(acc[r][v]) & ~bits_of<T>(broadcast(-T{0}));
          doubtful |= present[v] & ~(from_bits<T>(magnitude) >= format::kReliable);
        }
      }
      if (any<T>(doubtful)) {
        std::int64_t r = 0;
        for (; r + kAlignedRows <= count; r += kAlignedRows) {
          aligned_tile<T, kAlignedRows>(terms, row + r, column, out);
        }
        for (; r < count; ++r) aligned_tile<T, 1>(terms, row + r, column, out);
        continue;
      }
      SUBQUAD_UNROLL_ROWS
      for (int r = 0; r < kTileRows; ++r) {
        if (r >= count) continue;
        SUBQUAD_UNROLL_VECTORS
        for (int v = 0; v < kTileVectors; ++v) {
          store_extended<T>(out, row + r, column + v * kLanes,
                            normalised<T>(acc[r][v], top[v] + scratch.left_top[row + r]));
        }
      }
    }
  }
}

// A running sum: (high, k) is a number, low what its rounding took, in the same power of two.
template <class T>
struct extended_sum {
  T* high;
  T* low;
  exponent<T>* k;
  std::int64_t stride;

  SUBQUAD_ALWAYS_INLINE extended_matrix<T> rounded() const { return {high, k, stride}; }
};

template <class T>
SUBQUAD_INLINE void clear(const extended_sum<T>& sum, std::int64_t rows) {
  fill_zero<T>(sum.rounded(), rows, sum.stride);
  for (std::int64_t i = 0; i < rows * sum.stride; i += lanes<T>) store<T>(sum.low + i, vec<T>{});
}

// sum += term, all of their columns.
template <class T>
void add(const extended_sum<T>& sum, const extended_matrix<T>& term, std::int64_t rows) {
  using format = float_format<T>;
  using unsigned_bits = typename format::unsigned_bits;
  constexpr exponent<T> kBias = format::kBias;
  constexpr T kLargest = -kLowest<T>;
  for (std::int64_t i = 0; i < rows * sum.stride; i += lanes<T>) {
    const ivec<T> k = load_exponents<T>(sum.k + i);
    const ivec<T> term_k = load_exponents<T>(term.k + i);
    const ivec<T> top = larger<T>(k, term_k);
    const vec<T> scale = power_of_two<T>(k - top);
    const vec<T> high = load(sum.high + i) * scale;
    const vec<T> low = load(sum.low + i) * scale;
    const vec<T> added = load(term.s + i) * power_of_two<T>(term_k - top);
    const vec<T> total = high + added;
    const vec<T> part = total - high;
    const vec<T> lost = ((high - (total - part)) + (added - part)) + low;
    const vec<T> magnitude = from_bits<T>(bits_of<T>(total) & ~bits_of<T>(broadcast(-T{0})));
    const auto finite = magnitude <= kLargest;
    const vec<T> kept = finite ? lost : vec<T>{};
    const vec<T> rounded = total + kept;
    const vec<T> rest = kept - (rounded - total);
    const extended<T> value = normalised<T>(rounded, top);
    const unsigned_bits power =
        ((unsigned_bits)rounded >> format::kFractionBits) & (2 * format::kBias + 1);
    const vec<T> back = from_bits<T>((2 * kBias - (ivec<T>)power) << format::kFractionBits);
    store<T>(sum.high + i, value.s);
    store<T>(sum.low + i, finite ? rest * back : vec<T>{});
    store_exponents<T>(sum.k + i, value.k);
  }
}

// Every row of the sum times factor, a row; what would leave the range of inputs stays at its end.
template <class T>
void scale_columns(const extended_sum<T>& sum, const extended_matrix<T>& factor,
                   std::int64_t rows) {
  constexpr exponent<T> kEnd = 2 * extended_format<T>::kInput;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < sum.stride; c += lanes<T>) {
      const extended<T> f = load_extended<T>(factor, 0, c);
      const extended<T> old = load_extended<T>(sum.rounded(), r, c);
      extended<T> scaled = multiply<T>(old, f);
      const auto finite = scaled.k < extended_format<T>::kInfinite;
      const auto present = scaled.k > extended_format<T>::kFloor;
      const ivec<T> low_end = larger<T>(scaled.k, broadcast_exponent<T>(-kEnd));
      const ivec<T> bounded = low_end < kEnd ? low_end : broadcast_exponent<T>(kEnd);
      // A factor of 1 keeps what rounding took, any other one rounds itself.
      const auto same = (f.s == T{1}) & (f.k == 0);
      const std::int64_t at = r * sum.stride + c;
      scaled.k = present & finite ? bounded : scaled.k;
      scaled.s = same ? old.s : scaled.s;
      scaled.k = same ? old.k : scaled.k;
      store_extended<T>(sum.rounded(), r, c, scaled);
      store<T>(sum.low + at, same ? load(sum.low + at) : vec<T>{});
    }
  }
}

}  // namespace
}  // namespace SUBQUAD_ISA
}  // namespace subquad

#endif  // SUBQUAD_KERNELS_EXTENDED_INL
