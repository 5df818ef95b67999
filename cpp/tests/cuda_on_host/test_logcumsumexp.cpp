// Logarithms of cumulative sums of exponentials on CUDA against the same in long double.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cuda_on_host/scan_lanes.hpp"
#include "scans_core.hpp"
#include "subquad/errors.hpp"

namespace {

using namespace subquad::cuda::on_host;
using subquad::array_view;

// float32 takes 4096 steps of a lane at once, float64 2048.
template <class T>
constexpr std::int64_t kTile = sizeof(T) == 8 ? 2048 : 4096;

template <class T>
struct problem {
  scan_form of;
  strided_array<T> x;
  strided_array<T> log_sum;
  strided_array<T> remainder;
  strided_array<std::int64_t> segments;
  strided_array<T> out;
  strided_array<T> final_log_sum;
  strided_array<T> final_remainder;

  explicit problem(const scan_form& form, double scale = 3)
      : of(form),
        x(form.shape, form.inputs),
        log_sum(form.lanes(), form.inputs),
        remainder(form.lanes(), form.outputs),
        segments({form.length()},
                 form.inputs == layout::repeated ? layout::contiguous : form.inputs),
        out(form.shape, form.outputs),
        final_log_sum(form.lanes(), form.outputs),
        final_remainder(form.lanes(), form.outputs) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(form.length()) * 31 + form.shape.size());
    std::normal_distribution<double> normal;
    x.each([&](T& e, const shape_list&) { e = static_cast<T>(scale * normal(generator)); });
    log_sum.each([&](T& e, const shape_list&) { e = static_cast<T>(normal(generator)); });
    remainder.each([&](T& e, const shape_list&) {
      e = static_cast<T>(1e-8 * normal(generator) * (sizeof(T) == 8 ? 1e-9 : 1));
    });
    segments.each([&](std::int64_t& e, const shape_list& at) {
      if (!form.segments.empty()) e = form.segments[static_cast<std::size_t>(at[0])];
    });
  }

  void run() const {
    const array_view views[] = {
        x.view(),   log_sum.view(),       remainder.view(),      segments.view(),
        out.view(), final_log_sum.view(), final_remainder.view()};
    const auto bytes = static_cast<std::int64_t>(
        subquad::core::logcumsumexp_workspace(of.lane_count(), of.length(), sizeof(T)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    subquad::core::logcumsumexp(views[0], of.has_state ? &views[1] : nullptr,
                                of.has_state ? &views[2] : nullptr,
                                of.segments.empty() ? nullptr : &views[3], of.axis, of.reverse,
                                of.exclusive, views[4], &views[5], &views[6], memory.view());
  }

  void check() const {
    each_index(of.lanes(), [&](const shape_list& lane) { check_lane(lane); });
    SUBQUAD_CHECK(out.gaps_untouched());
    SUBQUAD_CHECK(final_log_sum.gaps_untouched());
  }

  void check_lane(const shape_list& lane) const {
    const number_list values = lane_of(x, of, lane);
    const number_list found = lane_of(out, of, lane);
    long_sum sum;
    if (of.has_state && log_sum(lane) != -static_cast<T>(kInf)) {
      sum.add(static_cast<long double>(log_sum(lane)) + static_cast<long double>(remainder(lane)));
    }
    // The contract: 2 ulp of max(|out|, 16).
    const auto bound = [](long double value) {
      return 2 * ulp_at<T>(std::fmax(std::abs(value), 16.0L));
    };
    for (std::int64_t i = 0; i < of.length(); ++i) {
      const auto at = static_cast<std::size_t>(i);
      if (of.begins_run(i)) sum = long_sum();
      const long double before = sum.log();
      sum.add(values[at]);
      const long double expected = of.exclusive ? before : sum.log();
      expect("out", of, i, found[at], expected, bound(expected));
    }
    const long double total = sum.log();
    const auto large = static_cast<long double>(final_log_sum(lane));
    const auto small = static_cast<long double>(final_remainder(lane));
    expect("final_log_sum", of, of.length(), large, total, bound(total));
    expect("final sum", of, of.length(), large + small, total,
           std::isfinite(total) ? 1.5L * ulp_at<T>(16.0L) : 0.0L);
    SUBQUAD_CHECK(std::isfinite(large) ? std::abs(small) <= ulp_at<T>(large == 0 ? 1 : large)
                                       : small == 0);
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

// Ramps, jumps, large numbers, infinities and NaN; what NaN follows is not touched by it.
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
                                                  {5, -kInf, -kInf, -kInf},
                                                  {0, 7.9, 8.1, 16, 3},
                                                  {-1e5, 88, 89, 0, 200, 709}};
  for (const auto& list : lists) {
    for (const std::int64_t n : {4, 70}) {
      for (const bool exclusive : {false, true}) {
        for (const bool has_state : {false, true}) {
          problem<T> each({{2, n}, 1, false, exclusive, has_state});
          put(each.x, list);
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
  // A NaN and an infinity in tiles, and states that are not finite.
  for (const double value : {kNan, kInf, -kInf}) {
    problem<T> each({{3, kTile<T> + 700}, 1, false, false, true});
    each.x({1, kTile<T> - 3}) = static_cast<T>(value);
    each.log_sum({2}) = static_cast<T>(value);
    each.remainder({2}) = 0;
    each.run_and_check();
    SUBQUAD_CHECK(std::isfinite(each.out({1, kTile<T> - 4})));
  }
  // Elements that make a sum by themselves come out as they are.
  problem<T> alone({{1, 300}, 1});
  alone.x.each(
      [](T& e, const shape_list& at) { e = static_cast<T>(at[1] == 7 ? 1234.567 : -kInf); });
  alone.run();
  SUBQUAD_CHECK(alone.out({0, 299}) == static_cast<T>(1234.567));
  // A long sum of equal terms.
  problem<T> equal({{1, 3 * kTile<T>}, 1});
  put(equal.x, {0.25});
  equal.run_and_check();
}

// Any split of a lane gives what one call gives.
template <class T>
void splits() {
  constexpr std::int64_t kN = 1000;
  problem<T> whole({{2, kN}, 1}, 5);
  whole.run();
  std::vector<T> log_sums(2, -static_cast<T>(kInf));
  std::vector<T> remainders(2, T(0));
  std::int64_t first = 0;
  for (const std::int64_t n : {1, 1, 1, 30, 0, 400, 1, 500, 66}) {
    problem<T> part({{2, n}, 1, false, false, true});
    part.x.each([&](T& e, const shape_list& at) { e = whole.x({at[0], first + at[1]}); });
    for (const std::int64_t lane : {0, 1}) {
      part.log_sum({lane}) = log_sums[static_cast<std::size_t>(lane)];
      part.remainder({lane}) = remainders[static_cast<std::size_t>(lane)];
    }
    part.run();
    part.out.each([&](T& e, const shape_list& at) {
      const auto expected = static_cast<long double>(whole.out({at[0], first + at[1]}));
      expect("split", part.of, at[1], static_cast<long double>(e), expected,
             2 * ulp_at<T>(std::fmax(std::abs(expected), 16.0L)));
    });
    for (const std::int64_t lane : {0, 1}) {
      log_sums[static_cast<std::size_t>(lane)] = part.final_log_sum({lane});
      remainders[static_cast<std::size_t>(lane)] = part.final_remainder({lane});
    }
    first += n;
  }
  SUBQUAD_CHECK(first == kN);
}

// So many lanes that blocks walk their tiles.
template <class T>
void many_lanes() {
  problem<T>({{528, kTile<T> + 1}, 1, false, false, true}).run_and_check();
  problem<T>({{130, 16880}, 0, true, false, true}).run_and_check();
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
    first.out.each([&](T& element, const shape_list& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next.out(at), sizeof(element)) == 0);
    });
  }
  set_order(order::each_in_turn);
}

void errors() {
  const problem<float> each({{3, 5000}, 1});
  const problem<double> other({{3, 5000}, 1});
  const strided_array<std::uint8_t> memory({8});
  const auto call = [&](const array_view& out, std::int32_t axis) {
    subquad::core::logcumsumexp(each.x.view(), nullptr, nullptr, nullptr, axis, false, false, out,
                                nullptr, nullptr, memory.view());
  };
  SUBQUAD_CHECK(
      checks::throws<subquad::invalid_argument>([&] { call(each.out.view(), 1); }, "workspace"));
  SUBQUAD_CHECK(
      checks::throws<subquad::invalid_argument>([&] { call(each.out.view(), 2); }, "axis"));
  SUBQUAD_CHECK(checks::throws<subquad::type_error>([&] { call(other.out.view(), 1); },
                                                    "out: expected float32, got float64"));
}

template <class T>
void of_type(const char* name) {
  worst_error = 0;
  for_forms(kTile<T>, true, [](const scan_form& form) { problem<T>(form).run_and_check(); });
  values<T>();
  splits<T>();
  std::printf("%s: largest error over bound %.3f\n", name, worst_error);
  orders<T>({{2, 2 * kTile<T> + 9}, 1, false, false, true});
  orders<T>({{300, 18}, 0, true, false, true});
}

}  // namespace

int main() {
  of_type<float>("float32");
  of_type<double>("float64");
  many_lanes<float>();
  errors();
  return checks::status();
}
