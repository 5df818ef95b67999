// What the tests of the scans share: arrays by lanes, and sums of exponentials in long double.
#ifndef SUBQUAD_CUDA_ON_HOST_SCAN_LANES_HPP
#define SUBQUAD_CUDA_ON_HOST_SCAN_LANES_HPP

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/strided.hpp"

namespace subquad::cuda::on_host {

using number_list = std::vector<long double>;

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// How an array is scanned.
struct scan_form {
  shape_list shape;
  std::int32_t axis;
  bool reverse = false;
  bool exclusive = false;
  bool has_state = false;
  layout inputs = layout::contiguous;
  layout outputs = layout::contiguous;
  std::vector<std::int64_t> segments = {};

  std::int64_t length() const { return shape[static_cast<std::size_t>(axis)]; }
  shape_list lanes() const {
    shape_list rest = shape;
    rest.erase(rest.begin() + axis);
    return rest;
  }
  std::int64_t lane_count() const { return product(lanes()); }
  // The index of step i of a lane.
  shape_list at(const shape_list& lane, std::int64_t i) const {
    shape_list index = lane;
    index.insert(index.begin() + axis, reverse ? length() - 1 - i : i);
    return index;
  }
  bool begins_run(std::int64_t i) const {
    if (segments.empty() || i == 0) return false;
    const auto position = [&](std::int64_t step) {
      return static_cast<std::size_t>(reverse ? length() - 1 - step : step);
    };
    return segments[position(i)] != segments[position(i - 1)];
  }
  std::string text() const {
    std::string text = "shape";
    for (const std::int64_t each : shape) text += " " + std::to_string(each);
    return text + " axis " + std::to_string(axis) + (reverse ? " reverse" : "") +
           (exclusive ? " exclusive" : "") + (has_state ? " state" : "") +
           (segments.empty() ? "" : " segments");
  }
};

inline std::vector<std::int64_t> some_segments(std::int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<std::int64_t> segments;
  std::int64_t run = 5;
  for (std::int64_t i = 0; i < n; ++i) {
    if (generator() % 19 == 0) run = static_cast<std::int64_t>(generator() % 3);
    segments.push_back(run);
  }
  return segments;
}

template <class T>
number_list lane_of(const strided_array<T>& array, const scan_form& form, const shape_list& lane) {
  number_list values;
  for (std::int64_t i = 0; i < form.length(); ++i) {
    values.push_back(static_cast<long double>(array(form.at(lane, i))));
  }
  return values;
}

// sum weight e^x, in long double.
struct long_sum {
  long double reference = -kInf;
  long double sum = 0;

  void add(long double x, long double weight = 1) {
    if (weight == 0 || x == -static_cast<long double>(kInf)) return;
    if (std::isinf(weight)) x = kInf;
    if (x > reference || std::isnan(x)) {
      sum = reference == -static_cast<long double>(kInf) ? 0.0L : sum * std::exp(reference - x);
      reference = x;
    }
    sum += weight * (x == reference ? 1.0L : std::exp(x - reference));
    if (std::isinf(x)) sum += weight * std::numeric_limits<long double>::infinity();
  }
  long double log() const { return sum == 0 ? -kInf : reference + std::log(std::abs(sum)); }
  bool is_finite() const { return std::isfinite(reference) && std::isfinite(sum); }
};

// The first of two sums over the second, without what their logarithms would lose to rounding.
inline long double ratio(const long_sum& a, const long_sum& b) {
  if (a.sum == 0) return 0;
  if (a.reference == b.reference) return a.sum / b.sum;
  return std::exp(a.reference - b.reference) * (a.sum / b.sum);
}
inline long_sum term_of(long double x) {
  long_sum one;
  one.add(x);
  return one;
}

// 2^-24 or 2^-53.
template <class T>
inline constexpr long double kUnit = sizeof(T) == 8 ? 0x1p-53L : 0x1p-24L;

// The distance between neighbours at the magnitude of x.
template <class T>
long double ulp_at(long double x) {
  return std::ldexp(2 * kUnit<T>, std::ilogb(x));
}

inline double worst_error = 0;  // of those compared, over their bounds

// What an element of type T holds of it.
template <class T>
long double held(long double value) {
  return static_cast<long double>(static_cast<T>(value));
}

inline bool agree(long double found, long double expected, long double bound) {
  if (std::isnan(expected)) return std::isnan(found);
  if (std::isinf(expected) || found == expected) return found == expected;
  const long double error = std::abs(found - expected);
  if (std::isnan(error)) return false;
  if (bound > 0) worst_error = std::max(worst_error, static_cast<double>(error / bound));
  return error <= bound;
}

// Prints the first few that do not agree.
inline void expect(const char* what, const scan_form& form, std::int64_t step, long double found,
                   long double expected, long double bound) {
  if (agree(found, expected, bound)) return;
  if (checks::failures() < 20) {
    std::printf("%s, %s, step %d: %.12Lg, expected %.12Lg within %.3Lg\n", form.text().c_str(),
                what, static_cast<int>(step), found, expected, bound);
  }
  SUBQUAD_CHECK(false && "values agree");
}

// The shapes and layouts that take every way through the kernels; `body(form)`.
template <class F>
void for_forms(std::int64_t tile, bool with_segments, F&& body) {
  for (const bool reverse : {false, true}) {
    for (const bool exclusive : {false, true}) {
      const auto with = [&](scan_form form) {
        form.reverse = reverse;
        form.exclusive = exclusive;
        form.has_state = reverse != exclusive;
        body(form);
        if (!with_segments || form.length() < 2) return;
        form.segments = some_segments(form.length(), 7);
        form.has_state = !form.has_state;
        body(form);
      };
      // Along lanes: parts of a warp, a warp, some warps, a block, and tiles.
      for (const std::int64_t n : {1, 2, 15, 17, 100}) with({{5, n}, 1});
      with({{3, 2, 16}, 2});
      with({{3, 600}, 1});
      with({{2, 2 * tile + 3}, 1});
      // Across lanes: one part, some, all, and tiles.
      with({{1, 40}, 0});
      with({{17, 33}, 0});
      with({{2, 130, 20}, 1});
      with({{300, 18}, 0});
    }
  }
  // Other strides; more tiles than a group of them has.
  for (const layout each :
       {layout::transposed, layout::spread, layout::reversed, layout::unaligned}) {
    body({{7, 45}, 1, false, false, true, each, each});
    body({{3, 33, 18}, 1, true, true, true, each, layout::contiguous});
    body({{3, 33, 5}, 0, false, true, true, layout::contiguous, each});
  }
  body({{4, 20}, 1, false, false, false, layout::repeated, layout::contiguous});
  body({{1, 35 * tile + 1}, 1, true, false, true});
  body({{35 * tile / 32 + 5, 17}, 0, false, true, true});
  body({{0, 5}, 1, false, false, true});
  body({{5, 0}, 1, false, false, true});
  body({{6}, 0, false, false, true});
}

}  // namespace subquad::cuda::on_host

#endif  // SUBQUAD_CUDA_ON_HOST_SCAN_LANES_HPP
