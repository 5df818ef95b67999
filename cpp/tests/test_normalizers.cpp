// The normalizers of every instruction set against the same sums in long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "subquad/normalizers.hpp"
#include "subquad/threads.hpp"

namespace {

using std::size_t;

// An argument with its shape beside it.
template <class T>
struct array {
  explicit array(std::vector<std::int64_t> lengths) : shape(std::move(lengths)) {
    std::int64_t product = 1;
    for (const std::int64_t length : shape) product *= length;
    data.assign(static_cast<size_t>(product), T(-77));
  }

  subquad::array_view view() const {
    return subquad::contiguous_view(data.data(), shape.data(),
                                    static_cast<std::int32_t>(shape.size()));
  }

  array& fill_normal(std::mt19937_64& generator, double scale = 1.0) {
    std::normal_distribution<double> normal(0.0, scale);
    for (T& value : data) value = static_cast<T>(normal(generator));
    return *this;
  }

  std::vector<std::int64_t> shape;
  std::vector<T> data;
};

array<std::uint8_t> workspace(size_t bytes) {
  return array<std::uint8_t>({static_cast<std::int64_t>(bytes)});
}

// log sum_j exp(terms_j), terms of -inf left out.
long double log_sum_exp(const std::vector<long double>& terms) {
  const long double top = *std::max_element(terms.begin(), terms.end());
  if (std::isinf(top)) return top;
  long double total = 0;
  for (const long double term : terms) total += std::exp(term - top);
  return top + std::log(total);
}

template <class T>
void exact(std::int64_t n, std::int64_t m, std::int64_t d, double scale) {
  std::mt19937_64 generator(static_cast<std::uint64_t>(n * 1000003 + m * 1009 + d));
  const auto x = array<T>({n, d}).fill_normal(generator, scale);
  const auto y = array<T>({m, d}).fill_normal(generator);
  auto log_weights = array<T>({m}).fill_normal(generator);
  log_weights.data[0] = -std::numeric_limits<T>::infinity();
  array<std::int64_t> excluded({n});
  for (std::int64_t i = 0; i < n; ++i) excluded.data[static_cast<size_t>(i)] = i % (m + 1) - 1;
  const array<T> out({n});
  const auto bytes = workspace(subquad::log_normalizer_workspace(1, n, m, d, sizeof(T)));
  const subquad::array_view weights_view = log_weights.view();
  const subquad::array_view excluded_view = excluded.view();
  subquad::log_normalizer(x.view(), y.view(), &weights_view, &excluded_view, out.view(),
                          bytes.view());

  const long double unit = std::numeric_limits<T>::epsilon();
  for (std::int64_t i = 0; i < n; ++i) {
    std::vector<long double> terms{-std::numeric_limits<long double>::infinity()};
    long double magnitude = 0;
    for (std::int64_t j = 0; j < m; ++j) {
      const long double weight = log_weights.data[static_cast<size_t>(j)];
      if (j == excluded.data[static_cast<size_t>(i)] || std::isinf(weight)) continue;
      long double score = weight;
      long double size = std::abs(weight);
      for (std::int64_t t = 0; t < d; ++t) {
        const long double product =
            static_cast<long double>(x.data[static_cast<size_t>(i * d + t)]) *
            static_cast<long double>(y.data[static_cast<size_t>(j * d + t)]);
        score += product;
        size += std::abs(product);
      }
      terms.push_back(score);
      magnitude = std::max(magnitude, size);
    }
    const long double expected = log_sum_exp(terms);
    const long double found = out.data[static_cast<size_t>(i)];
    if (std::isinf(expected)) {
      SUBQUAD_CHECK(found == expected);
    } else {
      // d roundings of the score, one of the exponential, one of the logarithm.
      const auto depth = static_cast<long double>(d);
      SUBQUAD_CHECK(std::abs(found - expected) <=
                    unit * (depth * magnitude / 2 + std::abs(expected) + 4));
    }
  }
}

template <class T>
void gaussian(std::int64_t n, std::int64_t k, std::int64_t d, std::int64_t r) {
  std::mt19937_64 generator(static_cast<std::uint64_t>(n * 1000003 + k * 1009 + d * 31 + r));
  const auto x = array<T>({n, d}).fill_normal(generator, 0.5);
  const auto log_counts = array<T>({k}).fill_normal(generator);
  const auto means = array<T>({k, d}).fill_normal(generator);
  const auto factors = array<T>({k, d, r}).fill_normal(generator, 0.3);
  auto diagonal = array<T>({k, d}).fill_normal(generator, 0.3);
  for (T& value : diagonal.data) value = std::abs(value);
  const array<T> out({n});
  const auto bytes =
      workspace(subquad::gaussian_log_normalizer_workspace(1, n, k, d, r, sizeof(T)));
  const subquad::array_view diagonal_view = diagonal.view();
  subquad::gaussian_log_normalizer(x.view(), log_counts.view(), means.view(), factors.view(),
                                   &diagonal_view, nullptr, nullptr, false, out.view(),
                                   bytes.view());

  const long double unit = std::numeric_limits<T>::epsilon();
  const auto value = [](const array<T>& from, std::int64_t index) {
    return static_cast<long double>(from.data[static_cast<size_t>(index)]);
  };
  for (std::int64_t i = 0; i < n; ++i) {
    std::vector<long double> terms;
    long double magnitude = 0;
    for (std::int64_t a = 0; a < k; ++a) {
      long double term = value(log_counts, a);
      long double size = std::abs(term);
      for (std::int64_t t = 0; t < d; ++t) {
        const long double x_t = value(x, i * d + t);
        const long double linear = x_t * value(means, a * d + t);
        const long double square = x_t * x_t * value(diagonal, a * d + t) / 2;
        term += linear + square;
        size += std::abs(linear) + square;
      }
      for (std::int64_t c = 0; c < r; ++c) {
        long double projection = 0;
        long double projection_size = 0;
        for (std::int64_t t = 0; t < d; ++t) {
          const long double product =
              x.data[static_cast<size_t>(i * d + t)] * value(factors, (a * d + t) * r + c);
          projection += product;
          projection_size += std::abs(product);
        }
        term += projection * projection / 2;
        size += projection_size * projection_size;
      }
      terms.push_back(term);
      magnitude = std::max(magnitude, size);
    }
    const long double expected = log_sum_exp(terms);
    const auto depth = static_cast<long double>(d + r);
    SUBQUAD_CHECK(std::abs(value(out, i) - expected) <=
                  unit * (depth * magnitude + std::abs(expected) + 4));
  }
}

template <class T>
void every_shape() {
  for (const auto& [n, m] : {std::pair{1, 1}, {1, 300}, {13, 33}, {97, 65}, {5, 1}}) {
    for (const int d : {1, 3, 16, 65, 300}) {
      exact<T>(n, m, d, 1.0);
      exact<T>(n, m, d, 20.0);
    }
  }
  for (const auto& [k, d] : {std::pair{1, 1}, {3, 7}, {2, 33}, {5, 64}}) {
    gaussian<T>(29, k, d, d);
    gaussian<T>(7, k, d, 1);
    gaussian<T>(7, k, d, 0);
  }
}

}  // namespace

int main() {
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    every_shape<float>();
    every_shape<double>();
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}
