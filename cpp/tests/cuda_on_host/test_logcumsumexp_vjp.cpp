// The reverse of logcumsumexp on CUDA against the same sums in long double.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cuda_on_host/scan_lanes.hpp"
#include "scans_core.hpp"

namespace {

using namespace subquad::cuda::on_host;
using subquad::array_view;

// float32 takes 2048 steps of a lane at once, float64 1024.
template <class T>
constexpr std::int64_t kTile = sizeof(T) == 8 ? 1024 : 2048;

template <class T>
struct problem {
  scan_form of;
  bool has_grad = true;
  bool has_final = true;
  bool wants_x = true;
  bool wants_log_sum = true;
  strided_array<T> x;
  strided_array<T> log_sum;
  strided_array<T> remainder;
  strided_array<std::int64_t> segments;
  strided_array<T> grad;
  strided_array<T> grad_final;
  strided_array<T> grad_x;
  strided_array<T> grad_log_sum;

  explicit problem(const scan_form& form, double scale = 3)
      : of(form),
        x(form.shape, form.inputs),
        log_sum(form.lanes(), form.inputs),
        remainder(form.lanes(), form.outputs),
        segments({form.length()},
                 form.inputs == layout::repeated ? layout::contiguous : form.inputs),
        grad(form.shape, form.inputs == layout::repeated ? form.inputs : form.outputs),
        grad_final(form.lanes(), form.inputs),
        grad_x(form.shape, form.outputs),
        grad_log_sum(form.lanes(), form.outputs) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(form.length()) * 31 + form.shape.size());
    std::normal_distribution<double> normal;
    const auto fill = [&](const strided_array<T>& array, double size) {
      array.each([&](T& e, const shape_list&) { e = static_cast<T>(size * normal(generator)); });
    };
    fill(x, scale);
    fill(log_sum, 1);
    fill(remainder, sizeof(T) == 8 ? 1e-17 : 1e-8);
    fill(grad, 1);
    fill(grad_final, 1);
    segments.each([&](std::int64_t& e, const shape_list& at) {
      if (!form.segments.empty()) e = form.segments[static_cast<std::size_t>(at[0])];
    });
  }

  void run() const {
    const array_view views[] = {x.view(),        log_sum.view(),     remainder.view(),
                                segments.view(), grad.view(),        grad_final.view(),
                                grad_x.view(),   grad_log_sum.view()};
    const auto bytes = static_cast<std::int64_t>(
        subquad::core::logcumsumexp_vjp_workspace(of.lane_count(), of.length(), sizeof(T)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    subquad::core::logcumsumexp_vjp(
        views[0], of.has_state ? &views[1] : nullptr, of.has_state ? &views[2] : nullptr,
        of.segments.empty() ? nullptr : &views[3], of.axis, of.reverse, of.exclusive,
        has_grad ? &views[4] : nullptr, has_final ? &views[5] : nullptr,
        wants_x ? &views[6] : nullptr, wants_log_sum ? &views[7] : nullptr, memory.view());
  }

  void check() const {
    each_index(of.lanes(), [&](const shape_list& lane) { check_lane(lane); });
    SUBQUAD_CHECK(grad_x.gaps_untouched());
    SUBQUAD_CHECK(grad_log_sum.gaps_untouched());
  }

  void check_lane(const shape_list& lane) const {
    const auto n = static_cast<std::size_t>(of.length());
    number_list terms = lane_of(x, of, lane);
    number_list grads(n + 1, 0.0L);  // of the prefix before each step, and of the last
    number_list grad_values = lane_of(grad, of, lane);
    // Prefix i is over the state and the first i elements of the run.
    std::vector<long_sum> sums;
    long_sum start;
    if (of.has_state) {
      start = term_of(static_cast<long double>(log_sum(lane)) +
                      static_cast<long double>(remainder(lane)));
    }
    sums.push_back(start);
    for (std::size_t i = 0; i < n; ++i) {
      const bool begins = of.begins_run(static_cast<std::int64_t>(i));
      sums.push_back(begins ? long_sum() : sums.back());
      sums.back().add(terms[i]);
      const std::size_t at = of.exclusive ? i : i + 1;
      if (has_grad && !(of.exclusive && begins)) grads[at] += grad_values[i];
    }
    number_list sizes;
    for (const long double g : grads) sizes.push_back(std::abs(g));
    if (has_final) {
      grads[n] += static_cast<long double>(grad_final(lane));
      sizes[n] += std::abs(static_cast<long double>(grad_final(lane)));
    }
    // The sum over the sums that hold an element, times the first of them.
    long double share = 0;
    long double size = 0;
    const number_list found = lane_of(grad_x, of, lane);
    const auto take = [&](std::size_t prefix, const long_sum& after) {
      const long double link = ratio(sums[prefix], after);
      share = share == 0 ? 0.0L : share * link;
      size = size == 0 ? 0.0L : size * link;
      const long double g = grads[prefix];
      if (g == 0 || sums[prefix].sum == 0) return;
      share += sums[prefix].is_finite() ? g : std::nanl("");
      size += sizes[prefix];
    };
    const auto expect_gradient = [&](const char* what, std::int64_t step, T value,
                                     const long_sum& term, const long_sum& first) {
      const long double weight = ratio(term, first);
      const long double gap = term.reference - first.reference;
      // Of the element and of the sum, a power errs by 4 units and by one of its exponent, which
      // reaches 4 beyond where it would be if references were maxima; a sum in a thread by 16;
      // twenty merges by one (float32) or 6 (float64) each, forwards and backwards.
      const long double units = (sizeof(T) == 8 ? 240 : 20) + 2 * 4 + 16 + 2 * 4 + std::abs(gap);
      const long double smallest = sizeof(T) == 8 ? 1e-300L : 1e-36L;
      const long double expected = term.sum == 0 || share == 0 ? 0.0L : weight * share;
      expect(what, of, step, static_cast<long double>(value), expected,
             weight == 0 ? smallest : units * kUnit<T> * weight * size + smallest);
    };
    take(n, sums[n]);
    for (std::size_t i = n; i-- > 0;) {
      const auto step = static_cast<std::int64_t>(i);
      if (wants_x) {
        expect_gradient("grad_x", step, static_cast<T>(found[i]), term_of(terms[i]), sums[i + 1]);
      }
      if (of.begins_run(step)) {
        share = 0;
        size = 0;
      }
      take(i, sums[i + 1]);
    }
    if (wants_log_sum) expect_gradient("grad_log_sum", 0, grad_log_sum(lane), start, sums[0]);
  }

  void run_and_check() const {
    run();
    check();
  }
};

template <class T>
void put(const strided_array<T>& array, const std::vector<double>& values) {
  array.each([&](T& e, const shape_list& at) {
    const auto i = static_cast<std::size_t>(at.back());
    e = static_cast<T>(values[i % values.size()]);
  });
}

template <class T>
void values() {
  const double high = sizeof(T) == 8 ? 1.7e308 : 3e38;
  const std::vector<std::vector<double>> lists = {{1e4, -1e4},
                                                  {high, high, -high},
                                                  {-kInf, -kInf, 1, 2},
                                                  {1, kInf, 2, -kInf},
                                                  {kInf, kNan, 0},
                                                  {1, 2, kNan, kInf},
                                                  {-kInf},
                                                  {-high, -high, -kInf, -1},
                                                  {0, 7.9, 8.1, 16, 3},
                                                  {-300, 88, 89, 0, 200, 709}};
  for (const auto& list : lists) {
    for (const std::int64_t n : {4, 70}) {
      for (const bool exclusive : {false, true}) {
        for (const bool has_state : {false, true}) {
          problem<T> each({{2, n}, 1, false, exclusive, has_state});
          put(each.x, list);
          each.run_and_check();
          // Nothing is asked of what is not finite.
          put(each.grad, {1, 0, 0, 0});
          each.has_final = false;
          each.run_and_check();
        }
      }
    }
  }
  for (const double slope : {0.01, 0.3, 5.0, 31.0, -0.3, -40.0}) {
    for (const shape_list& shape : {shape_list{1, kTile<T> + 50}, shape_list{1, 300, 17}}) {
      problem<T> each({shape, 1, false, false, true});
      each.x.each([&](T& e, const shape_list& at) {
        e = static_cast<T>(slope * static_cast<double>(at[1]));
      });
      each.run_and_check();
    }
  }
  // A NaN and an infinity in the second tile, of which nothing is asked from there on.
  for (const double value : {kNan, kInf, -kInf}) {
    problem<T> each({{2, kTile<T> + 700}, 1, false, false, true});
    each.x({1, kTile<T> + 3}) = static_cast<T>(value);
    each.log_sum({0}) = static_cast<T>(value);
    each.remainder({0}) = 0;
    each.run_and_check();
    for (std::int64_t i = kTile<T> + 3; i < kTile<T> + 700; ++i) each.grad({1, i}) = 0;
    each.grad_final({1}) = 0;
    each.run_and_check();
    SUBQUAD_CHECK(std::isfinite(each.grad_x({1, 5})));
  }
  // A term that is nothing beside what is infinite later.
  problem<T> small({{1, 40}, 1});
  put(small.x, {-1e4});
  small.x({0, 0}) = 0;
  small.x({0, 35}) = static_cast<T>(kInf);
  small.run_and_check();
}

// Bits do not see a shift that rounding does not either.
template <class T>
void shifts() {
  problem<T> first({{2, 700}, 1});
  first.x.each([](T& e, const shape_list&) { e = std::round(e * 4) / 4; });
  first.run();
  problem<T> next({{2, 700}, 1});
  next.x.each([&](T& e, const shape_list& at) { e = first.x(at) + T(65536); });
  next.run();
  first.grad_x.each([&](T& e, const shape_list& at) { SUBQUAD_CHECK(e == next.grad_x(at)); });
}

template <class T>
void absent() {
  for (int without = 0; without < 4; ++without) {
    problem<T> each({{2, kTile<T> + 10}, 1, false, true, true});
    each.has_grad = without != 0;
    each.has_final = without != 1;
    each.wants_x = without != 2;
    each.wants_log_sum = without != 3;
    each.run_and_check();
  }
}

template <class T>
void many_lanes() {
  problem<T>({{528, kTile<T> + 1}, 1, false, false, true}).run_and_check();
  problem<T>({{66, 16880}, 0, true, true, true}).run_and_check();
}

// The same bits in every order of threads and blocks.
template <class T>
void orders(const scan_form& form) {
  const problem<T> first(form);
  first.run();
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    const problem<T> next(form);
    next.run();
    first.grad_x.each([&](T& element, const shape_list& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next.grad_x(at), sizeof(element)) == 0);
    });
  }
  set_order(order::each_in_turn);
}

template <class T>
void of_type(const char* name) {
  worst_error = 0;
  for_forms(kTile<T>, true, [](const scan_form& form) { problem<T>(form).run_and_check(); });
  values<T>();
  shifts<T>();
  absent<T>();
  std::printf("%s: largest error over bound %.3f\n", name, worst_error);
  orders<T>({{2, 2 * kTile<T> + 9}, 1, false, false, true});
  orders<T>({{300, 18}, 0, true, false, true});
}

}  // namespace

int main() {
  of_type<float>("float32");
  of_type<double>("float64");
  many_lanes<float>();
  return checks::status();
}
