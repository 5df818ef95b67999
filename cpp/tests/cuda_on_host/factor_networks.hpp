// Networks of sparse factors for kernels under test, and what they make in long double.
#ifndef SUBQUAD_CUDA_ON_HOST_FACTOR_NETWORKS_HPP
#define SUBQUAD_CUDA_ON_HOST_FACTOR_NETWORKS_HPP

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/feature_maps.hpp"
#include "cuda_on_host/strided.hpp"

namespace factor_networks {

using feature_maps::estimate;
using feature_maps::holds;
using feature_maps::kInfinity;
using feature_maps::kNan;
using feature_maps::kUnit;
using feature_maps::product_unit;
using feature_maps::real;
using feature_maps::set;
using feature_maps::shape;
using subquad::array_view;
using subquad::cuda::on_host::each_index;
using subquad::cuda::on_host::joined;
using subquad::cuda::on_host::layout;
using subquad::cuda::on_host::number;
using subquad::cuda::on_host::order;
using subquad::cuda::on_host::rounded;
using subquad::cuda::on_host::set_order;
using subquad::cuda::on_host::strided_array;

// Sizes, and the batch dimensions of all, of x and of the weights and biases.
struct form {
  std::int64_t n_factors;
  std::int64_t n;
  std::int64_t d;
  std::int64_t h;
  std::int64_t k;
  shape batch = {};
  shape x_batch = {};
  shape weight_in_batch = {};
  shape bias_in_batch = {};
  shape weight_out_batch = {};
  shape bias_out_batch = {};
  layout inputs = layout::contiguous;
  layout outputs = layout::contiguous;
};

// One number for each index below `lengths`, in C order.
struct table {
  shape lengths;
  std::vector<estimate> values;

  explicit table(const shape& of)
      : lengths(of), values(static_cast<std::size_t>(subquad::cuda::on_host::product(of))) {}
  template <class... Index>
  estimate& operator()(Index... index) {
    std::int64_t found = 0;
    std::size_t axis = 0;
    ((found = found * lengths[axis++] + index), ...);
    return values[static_cast<std::size_t>(found)];
  }
  std::size_t at(const shape& index) const {
    std::int64_t found = 0;
    for (std::size_t axis = 0; axis < index.size(); ++axis) {
      found = found * lengths[axis] + index[axis];
    }
    return static_cast<std::size_t>(found);
  }
};

// The part of an array for an entry of the batch.
template <class T>
table part_of(const strided_array<T>& array, const shape& entry, const shape& core) {
  table part(core);
  each_index(core, [&](const shape& index) {
    part.values[part.at(index)].value = number(array(joined(entry, index)));
  });
  return part;
}

// What kernels make of z, of the distribution function P and the density p of a standard normal
// number: z P(z), or P(z) + z p(z), with slopes below 1.13 and 0.8.
template <class T>
estimate gelu(const estimate& z, bool derivative) {
  const real u = kUnit<T>;
  const real probability = std::erfc(-z.value / std::sqrt(2.0L)) / 2;
  const real tail = std::erfc(std::abs(z.value) / std::sqrt(2.0L)) / 2;
  const real density = std::exp(-z.value * z.value / 2) / std::sqrt(2 * std::acos(-1.0L));
  // The limits, where the formula has infinity times 0.
  if (std::isinf(z.value) && (derivative || z.value < 0)) return {probability, 0};
  const real square = z.value * z.value;
  const real of_probability = ((2 * square + 12) * tail + probability) * u + 0x1p-120L;
  if (!derivative) {
    return {z.value * probability,
            1.13L * z.error + std::abs(z.value) * (of_probability + u * probability)};
  }
  const real value = probability + z.value * density;
  return {value, 0.8L * z.error + of_probability + u * std::abs(value) +
                     std::abs(z.value) * ((square + 8) * u * density + 0x1p-120L)};
}

// Adds a product of which both may be off.
inline void add_product(estimate& to, const estimate& a, const estimate& b, real unit) {
  const real term = a.value * b.value;
  to.value += term;
  to.error += unit * std::abs(term) + std::abs(a.value) * b.error + a.error * std::abs(b.value) +
              a.error * b.error;
}

template <class T>
struct network_case {
  form of;
  std::mt19937_64 random;
  strided_array<T> x;
  strided_array<T> weight_in;
  strided_array<T> bias_in;
  strided_array<T> weight_out;
  strided_array<T> bias_out;

  explicit network_case(const form& f)
      : of(f),
        random(static_cast<std::uint64_t>(f.n_factors * 1000003 + f.n * 10007 + f.d * 1009 +
                                          f.h * 31 + f.k)),
        x(joined(f.x_batch, {f.n, f.d}), f.inputs),
        weight_in(joined(f.weight_in_batch, {f.n_factors, f.h, f.d}), f.inputs),
        bias_in(joined(f.bias_in_batch, {f.n_factors, f.h}), f.inputs),
        weight_out(joined(f.weight_out_batch, {f.n_factors, f.k, f.h}), f.inputs),
        bias_out(joined(f.bias_out_batch, {f.n_factors, f.k}), f.inputs) {
    fill(x, 1.5);
    fill(weight_in, 1 / std::sqrt(static_cast<double>(f.d + 1)));
    fill(bias_in, 1);
    fill(weight_out, 1);
    fill(bias_out, 1);
  }

  void fill(const strided_array<T>& array, double size) {
    std::normal_distribution<double> normal;
    array.each([&](T& element, const shape&) { element = rounded<T>(size * normal(random)); });
  }

  std::int64_t entries() const { return subquad::cuda::on_host::product(of.batch); }

  // The sums of the first layer of an entry: (factor, row, unit).
  table sums(const shape& entry) const {
    table z({of.n_factors, of.n, of.h});
    table rows = part_of(x, entry, {of.n, of.d});
    table weights = part_of(weight_in, entry, {of.n_factors, of.h, of.d});
    table biases = part_of(bias_in, entry, {of.n_factors, of.h});
    for (std::int64_t m = 0; m < of.n_factors; ++m) {
      for (std::int64_t i = 0; i < of.n; ++i) {
        for (std::int64_t j = 0; j < of.h; ++j) {
          estimate& sum = z(m, i, j);
          for (std::int64_t t = 0; t < of.d; ++t) {
            add_product(sum, rows(i, t), weights(m, j, t), product_unit<T>(of.d));
          }
          sum.value += biases(m, j).value;
          sum.error += kUnit<T> * std::abs(sum.value);
        }
      }
    }
    return z;
  }
};

// Reports an element that is not what it should be.
inline void check_element(real found, const estimate& expected, const char* name,
                          const shape& index, const form& f, double& worst) {
  if (holds(found, expected, worst)) return;
  std::printf("%s (", name);
  for (const std::int64_t i : index) std::printf(" %d", int(i));
  std::printf(" ) of M %d n %d d %d h %d K %d: %.9Lg, expected %.9Lg within %.3Lg\n",
              int(f.n_factors), int(f.n), int(f.d), int(f.h), int(f.k), found, expected.value,
              expected.error);
  SUBQUAD_CHECK(false);
}

// Batch dimensions in which everything has its own, or shares, or lies irregularly.
inline std::vector<form> batched_forms() {
  const form f = {2, 3, 5, 4, 3};
  std::vector<form> forms;
  const auto add = [&](const shape& all, const shape& x, const shape& weight_in,
                       const shape& bias_in, const shape& weight_out, const shape& bias_out) {
    forms.push_back(
        {f.n_factors, f.n, f.d, f.h, f.k, all, x, weight_in, bias_in, weight_out, bias_out});
  };
  add({3}, {3}, {}, {}, {}, {});
  add({3}, {}, {3}, {3}, {3}, {3});
  add({3}, {1}, {}, {3}, {1}, {});
  add({2, 3}, {2, 3}, {3}, {2, 1}, {1, 3}, {2, 1});
  add({2, 3, 2}, {2, 1, 2}, {3, 1}, {3, 1}, {}, {2});
  add({0}, {0}, {}, {}, {}, {});
  return forms;
}

inline std::vector<form> edge_forms() {
  std::vector<form> forms;
  for (const std::int64_t each : {1, 3, 16, 17, 65}) {
    forms.push_back({1, 3, each, 5, 4});
    forms.push_back({1, 3, 5, each, 4});
    forms.push_back({1, 3, 5, 6, each});
  }
  forms.push_back({0, 3, 4, 5, 2});
  forms.push_back({2, 0, 4, 5, 2});
  forms.push_back({2, 3, 0, 5, 2});
  forms.push_back({2, 3, 4, 0, 2});
  forms.push_back({2, 3, 4, 5, 0});
  return forms;
}

}  // namespace factor_networks

#endif  // SUBQUAD_CUDA_ON_HOST_FACTOR_NETWORKS_HPP
