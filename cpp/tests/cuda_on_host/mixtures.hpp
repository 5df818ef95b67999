// Mixtures for the tests of the Gaussian kernels: arrays of any layout, and the truth about scores
// in long double beside what float32 and float64 may miss of it.
#ifndef SUBQUAD_CUDA_ON_HOST_MIXTURES_HPP
#define SUBQUAD_CUDA_ON_HOST_MIXTURES_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/strided.hpp"

namespace mixtures {

using subquad::array_view;
using subquad::cuda::on_host::joined;
using subquad::cuda::on_host::layout;
using subquad::cuda::on_host::product;
using subquad::cuda::on_host::shape_list;
using real = long double;

constexpr real kInfinity = std::numeric_limits<real>::infinity();

template <class T>
constexpr real kUnit = std::numeric_limits<T>::epsilon() / 2;

// An array with plain indices.
template <class T>
class array : public subquad::cuda::on_host::strided_array<T> {
 public:
  using subquad::cuda::on_host::strided_array<T>::strided_array;

  std::int64_t size() const { return this->count(); }
  // Element `index` in C order.
  T& operator[](std::int64_t index) const {
    return at({}, 0, static_cast<std::size_t>(this->view().ndim), index);
  }
  // Element `index`, in C order of the last `core` dimensions, for index `b` of a broadcast batch.
  T& at(const shape_list& batch, std::int64_t b, std::size_t core, std::int64_t index) const {
    const array_view view = this->view();
    const auto rank = static_cast<std::size_t>(view.ndim);
    T* at = static_cast<T*>(view.data);
    for (std::size_t axis = rank; axis-- > rank - core;) {
      at += index % view.shape[axis] * view.strides[axis];
      index /= view.shape[axis];
    }
    const std::size_t own = rank - core;
    for (std::size_t step = 0; step < batch.size(); ++step) {
      const std::int64_t i = b % batch[batch.size() - 1 - step];
      b /= batch[batch.size() - 1 - step];
      if (step < own && view.shape[own - 1 - step] != 1) at += i * view.strides[own - 1 - step];
    }
    return *at;
  }
};

template <class T>
void fill(const array<T>& to, std::mt19937& random, double low, double high) {
  std::uniform_real_distribution<double> uniform(low, high);
  for (std::int64_t i = 0; i < to.size(); ++i) to[i] = static_cast<T>(uniform(random));
}

inline array<std::uint8_t> workspace(std::size_t bytes) {
  return array<std::uint8_t>({static_cast<std::int64_t>(bytes)});
}

struct sizes {
  std::int64_t n;
  std::int64_t k;
  std::int64_t d;
  std::int64_t r;
  bool has_diagonal = true;
};

// The batch dimensions of the inputs, and of what they broadcast to.
struct batch_shapes {
  shape_list all;
  shape_list x;
  shape_list log_counts;
  shape_list means;
  shape_list factors;
  shape_list diagonal;
};

// All alike; broadcast over each other; some absent.
inline const batch_shapes kBatchShapes[] = {
    {{3}, {3}, {3}, {3}, {3}, {3}},
    {{2, 3}, {2, 1}, {3}, {}, {1, 3}, {2, 3}},
    {{3}, {}, {3}, {3}, {}, {1}},
    {{2}, {2}, {}, {}, {}, {}},
};

struct moments {
  real mean;
  real variance;
  real mean_error;
  real variance_error;
};

template <class T>
struct mixture_case {
  sizes size;
  batch_shapes batch;
  std::mt19937 random;
  array<T> x;
  array<T> log_counts;
  array<T> means;
  array<T> factors;
  array<T> diagonal;

  explicit mixture_case(const sizes& s, layout how = layout::contiguous, batch_shapes b = {})
      : size(s),
        batch(std::move(b)),
        random(static_cast<unsigned>(s.n + 7 * s.k + 31 * s.d + 101 * s.r)),
        x(joined(batch.x, {s.n, s.d}), how),
        log_counts(joined(batch.log_counts, {s.k}), how),
        means(joined(batch.means, {s.k, s.d}), how),
        factors(joined(batch.factors, {s.k, s.d, s.r}), how),
        diagonal(joined(batch.diagonal, {s.k, s.d}), how) {
    const double scale = 1 / std::sqrt(static_cast<double>(std::max<std::int64_t>(1, s.d)));
    fill(x, random, -1.5, 1.5);
    fill(log_counts, random, 0, 3);
    fill(means, random, -scale, scale);
    fill(factors, random, -scale, scale);
    fill(diagonal, random, 0, scale);
  }

  std::int64_t entries() const { return product(batch.all); }
  T& x_at(std::int64_t b, std::int64_t i, std::int64_t t) const {
    return x.at(batch.all, b, 2, i * size.d + t);
  }
  T& log_count_at(std::int64_t b, std::int64_t a) const {
    return log_counts.at(batch.all, b, 1, a);
  }
  T& mean_at(std::int64_t b, std::int64_t a, std::int64_t t) const {
    return means.at(batch.all, b, 2, a * size.d + t);
  }
  T& factor_at(std::int64_t b, std::int64_t a, std::int64_t t, std::int64_t c) const {
    return factors.at(batch.all, b, 3, (a * size.d + t) * size.r + c);
  }
  T& diagonal_at(std::int64_t b, std::int64_t a, std::int64_t t) const {
    return diagonal.at(batch.all, b, 2, a * size.d + t);
  }
  bool is_empty(std::int64_t b, std::int64_t a) const {
    return log_count_at(b, a) == -std::numeric_limits<T>::infinity();
  }

  // Relative to the sum of magnitudes, what a product of `depth` terms on tensor cores misses.
  static real product_error(std::int64_t depth) {
    const auto terms = static_cast<real>(depth);
    return sizeof(T) == 4 ? (terms / 8 + 13) * std::ldexp(1.0L, -22) : (terms + 1) * kUnit<T>;
  }

  // m and v of row i and component a, and the bounds of gaussian_moments.cuh.
  moments moments_of(std::int64_t b, std::int64_t i, std::int64_t a) const {
    const real u = kUnit<T>;
    const auto d = static_cast<real>(size.d);
    moments found{0, 0, 0, 0};
    for (std::int64_t t = 0; t < size.d; ++t) {
      const real term = real(x_at(b, i, t)) * mean_at(b, a, t);
      found.mean += term;
      found.mean_error += d * u * std::abs(term);
      if (size.has_diagonal) {
        found.variance += real(x_at(b, i, t)) * x_at(b, i, t) * diagonal_at(b, a, t);
      }
    }
    for (std::int64_t c = 0; c < size.r; ++c) {
      real value = 0;
      real magnitude = 0;
      for (std::int64_t t = 0; t < size.d; ++t) {
        const real term = real(x_at(b, i, t)) * factor_at(b, a, t, c);
        value += term;
        magnitude += std::abs(term);
      }
      const real error = product_error(size.d) * magnitude;
      found.variance += value * value;
      found.variance_error += 2 * std::abs(value) * error + error * error;
    }
    const auto tiles = static_cast<real>((size.r + 63) / 64);
    found.variance_error += (tiles + d + 13) * u * found.variance;
    return found;
  }
};

// Whether a value is the truth: alike where that is not finite in T, else within `error` (plus what
// the bounds leave out: products of errors).
template <class T>
bool matches(T value, real truth, real error) {
  const real got = value;
  if (std::isnan(truth)) return std::isnan(got);
  if (std::abs(truth) > std::numeric_limits<T>::max()) {
    return std::isinf(got) && (got > 0) == (truth > 0);
  }
  return std::abs(got - truth) <= error * 1.001L + std::numeric_limits<float>::denorm_min();
}

// Rotates through the orders in which the executor takes turns.
inline void next_order() {
  using subquad::cuda::on_host::order;
  static int turn = 0;
  constexpr order kOrders[] = {order::ascending, order::descending, order::shuffled};
  subquad::cuda::on_host::set_order(kOrders[turn++ % 3]);
}

}  // namespace mixtures

#endif  // SUBQUAD_CUDA_ON_HOST_MIXTURES_HPP
