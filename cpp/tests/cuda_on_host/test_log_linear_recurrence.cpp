// Linear recurrences in logarithms, and their reverse, on CUDA against the same in long double.
#include <algorithm>
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

// float32 takes 2048 steps of a lane at once, float64 and the reverse 1024.
template <class T>
constexpr std::int64_t kTile = sizeof(T) == 8 ? 1024 : 2048;

template <class T>
struct problem {
  scan_form of;
  int absent = -1;  // one of the outputs of the reverse
  strided_array<T> log_a;
  strided_array<T> log_b;
  strided_array<T> state;
  strided_array<std::int64_t> segments;
  strided_array<T> out;
  strided_array<T> grad;
  strided_array<T> grad_a;
  strided_array<T> grad_b;
  strided_array<T> grad_state;

  explicit problem(const scan_form& form, double size = 1, double mean = -0.5)
      : of(form),
        log_a(form.shape, form.inputs),
        log_b(form.shape, form.outputs == layout::contiguous ? form.inputs : layout::contiguous),
        state(form.lanes(), form.inputs),
        segments({form.length()},
                 form.inputs == layout::repeated ? layout::contiguous : form.inputs),
        out(form.shape, form.outputs),
        grad(form.shape, form.inputs),
        grad_a(form.shape, form.outputs),
        grad_b(form.shape, form.outputs),
        grad_state(form.lanes(), form.outputs) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(form.length()) * 31 + form.shape.size());
    std::normal_distribution<double> normal;
    const auto fill = [&](const strided_array<T>& array, double scale, double center) {
      array.each(
          [&](T& e, const shape_list&) { e = static_cast<T>(scale * normal(generator) + center); });
    };
    fill(log_a, size, mean);
    fill(log_b, 2, 0);
    fill(state, 1, 0);
    fill(grad, 1, 0);
    segments.each([&](std::int64_t& e, const shape_list& at) {
      if (!form.segments.empty()) e = form.segments[static_cast<std::size_t>(at[0])];
    });
  }

  void run() const {
    const array_view a = log_a.view();
    const array_view b = log_b.view();
    const array_view start = state.view();
    const array_view runs = segments.view();
    const array_view* optional_start = of.has_state ? &start : nullptr;
    const array_view* optional_runs = of.segments.empty() ? nullptr : &runs;
    const auto bytes = static_cast<std::int64_t>(
        subquad::core::log_linear_recurrence_workspace(of.lane_count(), of.length(), sizeof(T)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    subquad::core::log_linear_recurrence(a, b, optional_start, optional_runs, of.axis, of.reverse,
                                         out.view(), memory.view());
    const auto more = static_cast<std::int64_t>(subquad::core::log_linear_recurrence_vjp_workspace(
        of.lane_count(), of.length(), sizeof(T)));
    const strided_array<std::uint8_t> others({more}, layout::unaligned);
    const array_view outputs[] = {grad_a.view(), grad_b.view(), grad_state.view()};
    subquad::core::log_linear_recurrence_vjp(
        a, b, optional_start, optional_runs, of.axis, of.reverse, grad.view(),
        absent == 0 ? nullptr : &outputs[0], absent == 1 ? nullptr : &outputs[1],
        absent == 2 ? nullptr : &outputs[2], others.view());
  }

  void check() const {
    each_index(of.lanes(), [&](const shape_list& lane) { check_lane(lane); });
    SUBQUAD_CHECK(out.gaps_untouched());
    SUBQUAD_CHECK(grad_a.gaps_untouched());
    SUBQUAD_CHECK(grad_b.gaps_untouched());
  }

  void check_lane(const shape_list& lane) const {
    const auto n = static_cast<std::size_t>(of.length());
    const number_list a = lane_of(log_a, of, lane);
    const number_list b = lane_of(log_b, of, lane);
    const number_list g = lane_of(grad, of, lane);
    const number_list found = lane_of(out, of, lane);
    const number_list found_a = lane_of(grad_a, of, lane);
    const number_list found_b = lane_of(grad_b, of, lane);
    constexpr long double kWide = 0x1p-53L;
    long_sum sum;
    if (of.has_state) sum.add(static_cast<long double>(state(lane)));
    number_list kept;
    number_list added;
    long double highest = 16;  // of what references and decays reach
    long double decay = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const bool begins = of.begins_run(static_cast<std::int64_t>(i)) || (i == 0 && !of.has_state);
      long_sum before = sum;
      if (begins || a[i] == -static_cast<long double>(kInf)) {
        before = long_sum();
        decay = 0;
      } else if (sum.sum != 0 || !std::isfinite(a[i])) {
        before.reference += a[i];
        decay += a[i];
        if (std::isnan(a[i])) before.sum = a[i];
        if (std::isnan(before.reference)) before.reference = 0;
      }
      sum = before;
      sum.add(b[i]);
      const long_sum entry = term_of(b[i]);
      const bool is_known = sum.sum == 0 || sum.is_finite();
      kept.push_back(before.sum == 0 ? 0.0L
                     : is_known      ? ratio(before, sum)
                     : std::isinf(sum.reference) && std::isfinite(before.reference) &&
                             before.is_finite()
                         ? 0.0L
                         : std::nanl(""));
      added.push_back(entry.sum == 0 ? 0.0L : is_known ? ratio(entry, sum) : std::nanl(""));
      const long double expected = sum.log();
      if (std::isfinite(decay)) highest = std::max(highest, std::abs(decay));
      if (std::isfinite(expected)) highest = std::max(highest, std::abs(expected));
      // As logcumsumexp, beside which references err by what thirty sums in float64 do.
      expect("out", of, static_cast<std::int64_t>(i), found[i], expected,
             2 * ulp_at<T>(std::fmax(std::abs(expected), 16.0L)) + 30 * kWide * highest);
    }
    // Shares err by 30 units and 5 of their logarithm, those of up to 16 steps of a thread add up,
    // and so do, over threads, the errors of their factors: of a merge each, and of references.
    long double total = 0;
    long double size = 0;
    long double later = 0;
    const auto threads = static_cast<long double>(n / 8 + 1);
    const auto units = (160 + threads / 4) * kUnit<T> + threads * kWide * highest;
    const long double smallest = sizeof(T) == 8 ? 1e-300L : 1e-36L;
    for (std::size_t i = n; i-- > 0;) {
      const auto step = static_cast<std::int64_t>(i);
      total = later + g[i];
      size += std::abs(g[i]);
      later = kept[i] == 0 || total == 0 ? 0.0L : kept[i] * total;
      const auto bound = [&](long double share) {
        const long double exponent = share > 0 ? -std::log(share) : 0.0L;
        return (units + 5 * exponent * kUnit<T>)*share * size + smallest;
      };
      if (absent != 0) expect("grad_log_a", of, step, found_a[i], later, bound(kept[i]));
      if (absent != 1) {
        expect("grad_log_b", of, step, found_b[i],
               added[i] == 0 || total == 0 ? 0.0L : added[i] * total, bound(added[i]));
      }
      size *= kept[i];
      if (kept[i] == 0) size = 0;
    }
    if (absent != 2) {
      expect("grad_state", of, 0, static_cast<long double>(grad_state(lane)), later,
             2 * units * size + smallest);
    }
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
  const auto with = [](const std::vector<double>& a, const std::vector<double>& b) {
    for (const std::int64_t n : {5, 70}) {
      for (const bool has_state : {false, true}) {
        problem<T> each({{2, n}, 1, false, false, has_state});
        put(each.log_a, a);
        put(each.log_b, b);
        each.run_and_check();
      }
    }
  };
  with({-kInf, -1}, {0, 1, kInf});
  with({-1, -kInf, -1, -1}, {0, kNan, 0, 1, -kInf});
  with({-0.1}, {-kInf});
  with({-0.1, -0.2, -kInf}, {-kInf, 3, -kInf, -kInf, -kInf});
  with({-60, -30, -45}, {1, 2, 3});
  with({7, -7}, {1e4, -1e4, 0});
  with({-1e4, 1e4}, {1, -3, 0});
  with({0}, {-3e38, 3e38, 0});
  with({-1, -1, kNan, -1, -kInf}, {0, 1});
  with({-1, -1, kInf, -1, -kInf}, {0, 1});
  // What the first factor is makes no difference without a state.
  problem<T> first({{1, 9}, 1});
  first.log_a({0, 0}) = static_cast<T>(kNan);
  first.run_and_check();
  SUBQUAD_CHECK(std::isfinite(first.out({0, 8})));
  // States that are not finite, and a NaN in the second tile.
  for (const double value : {kNan, kInf, -kInf}) {
    problem<T> each({{3, kTile<T> + 500}, 1, false, false, true});
    each.state({1}) = static_cast<T>(value);
    each.log_b({2, kTile<T> + 7}) = static_cast<T>(value);
    each.log_a({1, 60}) = static_cast<T>(-kInf);
    each.run_and_check();
    SUBQUAD_CHECK(std::isfinite(each.out({1, 60})));
  }
  // Sums that grow, that shrink, and that neither do.
  for (const double mean : {0.5, 0.0, -0.001, -45.0}) {
    for (const shape_list& shape : {shape_list{1, kTile<T> + 50}, shape_list{1, 300, 17}}) {
      problem<T>({shape, 1, false, false, true}, mean == 0 ? 0.0 : 0.3, mean).run_and_check();
    }
  }
}

// With factors of 1 that all count, errors of float32 do not add up from thread to thread, those of
// float64 by half a unit each.
template <class T>
void long_lane() {
  const std::int64_t n = 16 * kTile<T>;
  problem<T> each({{1, n}, 1, false, false, true}, 0, 0);
  put(each.log_b, {0});
  put(each.grad, {0});
  each.state({0}) = 0;
  each.grad({0, n - 1}) = 1;
  each.run();
  const double expected = 1.0 / static_cast<double>(n + 1);
  const double units = 40 + (sizeof(T) == 8 ? static_cast<double>(n) / 8 : 0);
  SUBQUAD_CHECK(std::abs(static_cast<double>(each.grad_state({0})) - expected) <=
                units * static_cast<double>(kUnit<T>) * expected);
}

template <class T>
void orders(const scan_form& form) {
  const problem<T> first(form);
  first.run();
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    const problem<T> next(form);
    next.run();
    first.out.each([&](T& element, const shape_list& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next.out(at), sizeof(element)) == 0);
    });
    first.grad_a.each([&](T& element, const shape_list& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next.grad_a(at), sizeof(element)) == 0);
    });
  }
  set_order(order::each_in_turn);
}

template <class T>
void of_type(const char* name) {
  worst_error = 0;
  for_forms(kTile<T>, true, [](const scan_form& form) {
    if (!form.exclusive) problem<T>(form).run_and_check();
  });
  values<T>();
  for (int without = 0; without < 3; ++without) {
    problem<T> each({{2, kTile<T> + 10}, 1, false, false, true});
    each.absent = without;
    each.run_and_check();
  }
  long_lane<T>();
  std::printf("%s: largest error over bound %.3f\n", name, worst_error);
  orders<T>({{2, 2 * kTile<T> + 9}, 1, false, false, true});
  orders<T>({{300, 18}, 0, true, false, true});
}

}  // namespace

int main() {
  of_type<float>("float32");
  of_type<double>("float64");
  problem<float>({{528, kTile<float> + 1}, 1, false, false, true}).run_and_check();
  return checks::status();
}
