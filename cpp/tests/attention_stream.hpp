// Streaming linear attention against sums in long double, on whichever device the program is for.
#ifndef SUBQUAD_TESTS_ATTENTION_STREAM_HPP
#define SUBQUAD_TESTS_ATTENTION_STREAM_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "subquad/attention.hpp"

namespace attention_stream {

using subquad::array_view;

using subquad::dtype;

#if defined(SUBQUAD_FOR_CUDA)
constexpr auto kDevice = subquad::device_type::cuda;
#else
constexpr auto kDevice = subquad::device_type::cpu;
#endif

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
constexpr dtype type_of = sizeof(T) == 4 ? dtype::float32 : dtype::float64;

template <class T>
struct array {
  std::vector<std::int64_t> shape;
  std::vector<T> values;

  array(std::vector<std::int64_t> lengths, T value = T(0)) : shape(std::move(lengths)) {
    std::int64_t count = 1;
    for (const std::int64_t length : shape) count *= length;
    values.assign(static_cast<std::size_t>(count), value);
  }
  array_view view(dtype type = type_of<T>) {
    return {values.data(), shape.data(), nullptr, static_cast<std::int32_t>(shape.size()),
            type,          kDevice,      0};
  }
};

// A batch of states and what they are fed.
template <class T>
struct stream {
  std::int64_t batch, d_k, d_v, room;
  array<T> key_sums, value_sums, recent_keys, recent_values;
  array<std::int64_t> recent_count;
  array<T> y, log_z;

  stream(std::int64_t b, std::int64_t k, std::int64_t v, std::int64_t r)
      : batch(b),
        d_k(k),
        d_v(v),
        room(r),
        key_sums({b, 5, k}),
        value_sums({b, 2, k, v}),
        recent_keys({b, r, k}, std::numeric_limits<T>::quiet_NaN()),
        recent_values({b, r, v}, std::numeric_limits<T>::quiet_NaN()),
        recent_count({b}),
        y({b, v}, std::numeric_limits<T>::quiet_NaN()),
        log_z({b}, std::numeric_limits<T>::quiet_NaN()) {
    for (std::int64_t i = 0; i < b; ++i) {
      for (std::int64_t d = 0; d < k; ++d) {
        key_sums.values[static_cast<std::size_t>(i * 5 * k + d)] =
            -std::numeric_limits<T>::infinity();
      }
    }
  }

  void step(array<T>& log_k, array<T>& v, array<T>& log_q, array<T>* log_decay = nullptr,
            bool empty_is_nan = false) {
    const std::size_t bytes =
        subquad::attention_step_workspace(batch, d_k, d_v, sizeof(T), kDevice);
    array<std::uint8_t> workspace({static_cast<std::int64_t>(bytes)}, 0xff);
    array_view decay{};
    if (log_decay) decay = log_decay->view();
    const array_view log_z_view = log_z.view();
    subquad::attention_step(log_k.view(), v.view(), log_q.view(), log_decay ? &decay : nullptr,
                            key_sums.view(), value_sums.view(), recent_keys.view(),
                            recent_values.view(), recent_count.view(dtype::int64), empty_is_nan,
                            y.view(), &log_z_view, workspace.view(dtype::uint8));
  }
};

// The same with every token kept, in long double.
struct truth {
  std::int64_t d_k, d_v;
  std::vector<std::vector<long double>> keys;  // decayed to the last token
  std::vector<std::vector<long double>> values;

  void decay(const std::vector<long double>& by) {
    for (auto& key : keys) {
      for (std::int64_t d = 0; d < d_k; ++d) {
        auto& k = key[static_cast<std::size_t>(d)];
        const long double a = by[static_cast<std::size_t>(d)];
        k = std::isinf(a) ? -static_cast<long double>(kInfinity) : k + a;
      }
    }
  }

  // Values of one row and its log normaliser.
  void row(const std::vector<long double>& q, std::vector<long double>& y,
           long double& log_z) const {
    long double largest = -static_cast<long double>(kInfinity);
    for (const auto& key : keys) {
      for (std::int64_t d = 0; d < d_k; ++d) {
        largest =
            std::fmax(largest, key[static_cast<std::size_t>(d)] + q[static_cast<std::size_t>(d)]);
      }
    }
    y.assign(static_cast<std::size_t>(d_v), 0.0L);
    long double sum = 0;
    for (std::size_t j = 0; j < keys.size(); ++j) {
      long double weight = 0;
      for (std::int64_t d = 0; d < d_k; ++d) {
        const long double score =
            keys[j][static_cast<std::size_t>(d)] + q[static_cast<std::size_t>(d)];
        if (!std::isinf(score)) weight += std::exp(score - largest);
      }
      sum += weight;
      for (std::int64_t c = 0; c < d_v; ++c) {
        y[static_cast<std::size_t>(c)] += weight * values[j][static_cast<std::size_t>(c)];
      }
    }
    for (long double& value : y) value /= sum;
    log_z = largest + std::log(sum);
  }
};

// Largest error of y in units of the largest |v|, and of log z in ulp of max(|log z|, 1).
struct errors {
  double y = 0;
  double log_z = 0;
};

template <class T, class Key, class Decay>
errors run(std::int64_t d_k, std::int64_t d_v, std::int64_t room, int tokens, double scale_q,
           Key&& key_at, Decay&& decay_at, int check_every) {
  std::mt19937_64 random(static_cast<unsigned>(d_k * 1000 + d_v * 10 + tokens));
  std::normal_distribution<double> normal;
  stream<T> states(2, d_k, d_v, room);
  std::vector<truth> truths(2, truth{d_k, d_v, {}, {}});
  errors worst;
  double largest_value = 0;
  for (int t = 0; t < tokens; ++t) {
    array<T> k({2, d_k}), v({2, d_v}), q({2, d_k}), a({2, d_k});
    for (std::int64_t i = 0; i < 2 * d_k; ++i) {
      const auto at = static_cast<std::size_t>(i);
      k.values[at] = static_cast<T>(key_at(t, i % d_k, normal(random)));
      q.values[at] = static_cast<T>(scale_q * normal(random));
      a.values[at] = static_cast<T>(decay_at(t, i % d_k));
    }
    for (T& value : v.values) {
      value = static_cast<T>(normal(random));
      largest_value = std::max(largest_value, std::fabs(static_cast<double>(value)));
    }
    states.step(k, v, q, &a);
    for (std::size_t b = 0; b < 2; ++b) {
      std::vector<long double> key, value, decay, query;
      for (std::int64_t d = 0; d < d_k; ++d) {
        const std::size_t at = b * static_cast<std::size_t>(d_k) + static_cast<std::size_t>(d);
        key.push_back(static_cast<long double>(k.values[at]));
        decay.push_back(static_cast<long double>(a.values[at]));
        query.push_back(static_cast<long double>(q.values[at]));
      }
      for (std::int64_t c = 0; c < d_v; ++c) {
        value.push_back(static_cast<long double>(
            v.values[b * static_cast<std::size_t>(d_v) + static_cast<std::size_t>(c)]));
      }
      truths[b].decay(decay);
      truths[b].keys.push_back(key);
      truths[b].values.push_back(value);
      if (t % check_every != 0 && t + 1 != tokens) continue;
      std::vector<long double> y;
      long double log_z;
      truths[b].row(query, y, log_z);
      for (std::int64_t c = 0; c < d_v; ++c) {
        const double found = static_cast<double>(
            states.y.values[b * static_cast<std::size_t>(d_v) + static_cast<std::size_t>(c)]);
        const double error = std::fabs(found - static_cast<double>(y[static_cast<std::size_t>(c)]));
        worst.y = std::max(worst.y, std::isnan(error) ? kInfinity : error / largest_value);
      }
      const double found = static_cast<double>(states.log_z.values[b]);
      const double error = std::fabs(found - static_cast<double>(log_z)) /
                           std::max(1.0, std::fabs(static_cast<double>(log_z)));
      worst.log_z = std::max(worst.log_z, std::isnan(error) ? kInfinity : error);
    }
  }
  return worst;
}

template <class T>
void expect(const errors& found, const char* what) {
  // A weight is off by the rounding of its two exponents and exponentials, a mean of values by
  // twice that and the sum over d_k products: 16 ulp of the largest value leaves a factor of two.
  const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
  const bool holds = found.y <= 16 * eps && found.log_z <= 4 * eps;
  if (!holds) {
    std::printf("%s: y %.2f, log z %.2f ulp\n", what, found.y / eps, found.log_z / eps);
  }
  SUBQUAD_CHECK(holds);
}

inline double no_decay(int, std::int64_t) { return 0.0; }

template <class T>
void check_some_streams() {
  expect<T>(run<T>(
                33, 19, 3, 40, 1, [](int, std::int64_t, double g) { return g; }, no_decay, 3),
            "odd sizes");
  expect<T>(
      run<T>(
          4, 3, 16, 60, 1, [](int t, std::int64_t, double g) { return 31.0 * t + g; }, no_decay, 1),
      "ramp");
  expect<T>(run<T>(
                6, 3, 16, 80, 1, [](int, std::int64_t, double g) { return g; },
                [](int t, std::int64_t d) { return (t + d) % 11 == 10 ? -kInfinity : -0.5; }, 1),
            "forgetting");
}

template <class T>
void check_streams() {
  check_some_streams<T>();
  for (const double scale : {1.0, 4.0, 30.0, 1e3, 1e4}) {
    expect<T>(run<T>(
                  5, 7, 16, 70, scale, [&](int, std::int64_t, double g) { return scale * g; },
                  no_decay, 1),
              "scale");
  }
  expect<T>(run<T>(
                64, 64, 16, 50, 1, [](int, std::int64_t, double g) { return g; }, no_decay, 7),
            "64 x 64");
  expect<T>(
      run<T>(1, 1, 1, 20, 1, [](int, std::int64_t, double g) { return g; }, no_decay, 1), "ones");
  expect<T>(
      run<T>(
          4, 3, 16, 60, 1, [](int t, std::int64_t, double g) { return 3.0 * t + g; }, no_decay, 1),
      "slow ramp");
  expect<T>(run<T>(
                4, 3, 16, 60, 1,
                [](int t, std::int64_t, double g) {
                  return (t < 20 ? -1e4 : t < 40 ? 0.0 : 1e4) + g;
                },
                no_decay, 1),
            "jumps");
  expect<T>(run<T>(
                6, 3, 16, 60, 1,
                [](int t, std::int64_t d, double g) {
                  return (t + d) % 3 == 0 && t > 0 ? -kInfinity : g;
                },
                no_decay, 1),
            "masked features");
  expect<T>(
      run<T>(
          6, 3, 16, 80, 1, [](int, std::int64_t, double g) { return g; },
          [](int t, std::int64_t d) { return -0.01 * static_cast<double>(d + 1) * (t % 3); }, 1),
      "decay");
}

// What rounding takes from a sum is kept: thousands of single tokens leave no more error than one.
inline void check_long_stream(int tokens) {
  stream<float> states(1, 2, 2, 16);
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> uniform(0.5, 1.5);
  long double sums[2] = {};
  array<float> k({1, 2}), v({1, 2}), q({1, 2});
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < 2; ++c) {
      v.values[static_cast<std::size_t>(c)] = static_cast<float>(uniform(random));
      sums[c] += static_cast<long double>(v.values[static_cast<std::size_t>(c)]);
    }
    states.step(k, v, q);
  }
  for (int c = 0; c < 2; ++c) {
    const double truth = static_cast<double>(sums[c] / tokens);
    const double found = static_cast<double>(states.y.values[static_cast<std::size_t>(c)]);
    SUBQUAD_CHECK(std::fabs(found - truth) <= 4 * 0x1p-24 * truth);
  }
}

inline void check_edges() {
  stream<float> states(3, 2, 2, 4);
  const auto infinity = std::numeric_limits<float>::infinity();
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  array<float> k({3, 2}), v({3, 2}), q({3, 2});
  // A removed key with a value that is none, in the first state alone.
  k.values = {-infinity, -infinity, 0, 0, 0, -infinity};
  v.values = {nan, infinity, 1, 2, 3, 4};
  q.values = {0, 0, 0, 0, -infinity, 0};
  states.step(k, v, q);
  SUBQUAD_CHECK(states.y.values[0] == 0 && states.y.values[1] == 0 &&
                states.log_z.values[0] == -infinity);
  SUBQUAD_CHECK(states.y.values[2] == 1 && states.y.values[3] == 2);
  SUBQUAD_CHECK(std::fabs(states.log_z.values[1] - std::log(2.0F)) < 1e-7F);
  // The query sees the empty feature alone.
  SUBQUAD_CHECK(states.y.values[4] == 0 && states.log_z.values[2] == -infinity);
  states.step(k, v, q, nullptr, true);
  SUBQUAD_CHECK(std::isnan(states.y.values[0]) && std::isnan(states.y.values[5]));
  SUBQUAD_CHECK(states.recent_count.values[0] == 0 && states.recent_count.values[1] == 2);
  // NaN stays with the state that saw it.
  k.values = {0, 0, nan, 0, 0, 0};
  v.values = {1, 1, 1, 1, 1, 1};
  q.values = {0, 0, 0, 0, 0, 0};
  for (int t = 0; t < 6; ++t) {
    states.step(k, v, q);
    SUBQUAD_CHECK(states.y.values[0] == 1 && std::isnan(states.y.values[2]));
    SUBQUAD_CHECK(states.y.values[4] > 1 && states.y.values[4] < 3);
  }
  SUBQUAD_CHECK(std::isnan(states.log_z.values[1]));
}

}  // namespace attention_stream

#endif  // SUBQUAD_TESTS_ATTENTION_STREAM_HPP
