// Maps of random features for kernels under test, and what they are in long double.
#ifndef SUBQUAD_CUDA_ON_HOST_FEATURE_MAPS_HPP
#define SUBQUAD_CUDA_ON_HOST_FEATURE_MAPS_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cuda_on_host/strided.hpp"

namespace feature_maps {

using subquad::array_view;
using subquad::cuda::arithmetic_t;
using subquad::cuda::on_host::joined;
using subquad::cuda::on_host::layout;
using subquad::cuda::on_host::number;
using subquad::cuda::on_host::rounded;
using subquad::cuda::on_host::strided_array;
using shape = subquad::cuda::on_host::shape_list;
using real = long double;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
constexpr real kUnit = sizeof(T) == 8 ? 0x1p-53L : 0x1p-24L;

// Of a product of `depth` elements on tensor cores, over the sum of the sizes of its terms, those
// of float32 as tile_product says.
template <class T>
real product_unit(std::int64_t depth) {
  const auto d = static_cast<real>(depth);
  return sizeof(T) == 8 ? (d + 1) * kUnit<T> : (d / 4 + 13) * 0x1p-22L;
}

// Batch dimensions of x, of the arrays of the map, and of all.
struct form {
  std::int64_t n;
  std::int64_t m;
  std::int64_t d;
  std::int64_t r = 0;       // 0: no factor
  bool has_vectors = true;  // diagonal, shift and linear
  bool antithetic = false;
  shape batch = {};
  shape x_batch = {};
  shape map_batch = {};
  layout inputs = layout::contiguous;
  layout output = layout::contiguous;
  double scale = 1;  // of products, about
};

// What a call may go without, null where it does.
struct optional_arrays {
  array_view views[4];
  bool present[4];

  const array_view* operator[](int i) const { return present[i] ? &views[i] : nullptr; }
};

// A number and how far from it a computed one may be.
struct estimate {
  real value = 0;
  real error = 0;
};

template <class S>
struct feature_case {
  using sum = arithmetic_t<S>;
  form of;
  std::mt19937_64 random;
  strided_array<S> x;
  strided_array<sum> projection;
  strided_array<sum> bias;
  strided_array<sum> diagonal;
  strided_array<sum> factor;
  strided_array<sum> shift;
  strided_array<sum> linear;
  bool has_diagonal;
  bool has_shift;
  bool has_linear;

  explicit feature_case(const form& f)
      : of(f),
        random(static_cast<std::uint64_t>(f.n * 1000003 + f.m * 1009 + f.d * 31 + f.r)),
        x(joined(f.x_batch, {f.n, f.d}), f.inputs),
        projection(joined(f.map_batch, {f.m, f.d}), f.inputs),
        bias(joined(f.map_batch, {f.m}), f.inputs),
        diagonal(joined(f.map_batch, {f.d}), f.inputs),
        factor(joined(f.map_batch, {f.r, f.d}), f.inputs),
        shift(joined(f.map_batch, {f.d}), f.inputs),
        linear(joined(f.map_batch, {f.d}), f.inputs),
        has_diagonal(f.has_vectors),
        has_shift(f.has_vectors),
        has_linear(f.has_vectors) {
    const double size = std::sqrt(f.scale / std::sqrt(std::max(1.0, double(f.d))));
    fill(x, size);
    fill(projection, size);
    fill(bias, 1);
    fill(diagonal, 1);
    fill(factor, 0.3);
    fill(shift, size / 2);
    fill(linear, size);
  }

  template <class E>
  void fill(const strided_array<E>& array, double size) {
    std::normal_distribution<double> normal;
    array.each([&](E& element, const shape&) { element = rounded<E>(size * normal(random)); });
  }

  std::int64_t entries() const { return subquad::cuda::on_host::product(of.batch); }

  // In the order of the functions.
  optional_arrays optional() const {
    return {{diagonal.view(), factor.view(), shift.view(), linear.view()},
            {has_diagonal, of.r > 0, has_shift, has_linear}};
  }

  // z of a row, rounded once.
  std::vector<real> row(const shape& b, std::int64_t i) const {
    std::vector<real> z;
    for (std::int64_t t = 0; t < of.d; ++t) {
      z.push_back(number(x(joined(b, {i, t}))) -
                  (has_shift ? static_cast<real>(number(shift(joined(b, {t})))) : 0));
    }
    return z;
  }

  estimate product(const std::vector<real>& z, const strided_array<sum>& columns, const shape& b,
                   std::int64_t j) const {
    estimate found;
    for (std::int64_t t = 0; t < of.d; ++t) {
      const real term = z[static_cast<std::size_t>(t)] * number(columns(joined(b, {j, t})));
      found.value += term;
      found.error += std::abs(term);
    }
    found.error *= product_unit<sum>(of.d) + kUnit<sum>;
    return found;
  }

  // q of a row. Sums in any order, each of three roundings or fewer to a term.
  estimate term(const std::vector<real>& z, const shape& b) const {
    const real u = kUnit<sum>;
    estimate of_linear;
    estimate squares;
    for (std::int64_t t = 0; t < of.d; ++t) {
      const real each = z[static_cast<std::size_t>(t)];
      if (has_linear) {
        const real part = each * number(linear(joined(b, {t})));
        of_linear.value += part;
        of_linear.error += std::abs(part);
      }
      if (has_diagonal) {
        const real part = each * number(diagonal(joined(b, {t}))) * each;
        squares.value += part;
        squares.error += std::abs(part);
      }
    }
    const auto depth = static_cast<real>(of.d + 3);
    of_linear.error *= depth * u;
    squares.error *= depth * u;
    for (std::int64_t k = 0; k < of.r; ++k) {
      const estimate each = product(z, factor, b, k);
      const real square = each.value * each.value;
      squares.value += square;
      squares.error += 2 * std::abs(each.value) * each.error + each.error * each.error +
                       static_cast<real>(of.r + 4) * u * square;
    }
    const real value = of_linear.value - squares.value / 2;
    return {value, of_linear.error + squares.error / 2 + 3 * u * std::abs(squares.value) +
                       u * std::abs(value)};
  }
};

template <class E>
void set(const strided_array<E>& array, const shape& at, double value) {
  array(at) = rounded<E>(value);
}

// Whether a number is what it should be; keeps the largest error over its bound.
inline bool holds(real found, const estimate& expected, double& worst) {
  if (std::isnan(expected.value)) return std::isnan(found);
  if (std::isinf(expected.value)) return found == expected.value;
  const real error = std::abs(found - expected.value);
  if (expected.error > 0 && !std::isnan(error)) {
    worst = std::max(worst, static_cast<double>(error / expected.error));
  }
  return error <= expected.error;
}

}  // namespace feature_maps

#endif  // SUBQUAD_CUDA_ON_HOST_FEATURE_MAPS_HPP
