// Logarithms of cumulative sums of weighted exponentials, and their reverse, on CUDA against the
// same in long double.
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

// Steps of a lane that are taken at once, by the reverse half of them.
constexpr std::int64_t kTile = 2048;

template <class T>
struct problem {
  scan_form of;
  int absent = -1;  // one of the outputs of the reverse
  strided_array<T> x;
  strided_array<T> sign;
  strided_array<T> out;
  strided_array<T> out_sign;
  strided_array<T> grad;
  strided_array<T> grad_x;
  strided_array<T> grad_sign;

  explicit problem(const scan_form& form, double scale = 2)
      : of(form),
        x(form.shape, form.inputs),
        sign(form.shape, form.outputs == layout::contiguous ? form.inputs : layout::contiguous),
        out(form.shape, form.outputs),
        out_sign(form.shape, form.outputs),
        grad(form.shape, form.inputs),
        grad_x(form.shape, form.outputs),
        grad_sign(form.shape, form.outputs) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(form.length()) * 31 + form.shape.size());
    std::normal_distribution<double> normal;
    x.each([&](T& e, const shape_list&) { e = static_cast<T>(scale * normal(generator)); });
    // Signs, weights of any size, and what does not count.
    sign.each([&](T& e, const shape_list&) {
      const auto kind = generator() % 8;
      e = static_cast<T>(kind == 0  ? 0.0
                         : kind < 3 ? 3 * normal(generator)
                         : kind < 5 ? -1.0
                                    : 1.0);
    });
    grad.each([&](T& e, const shape_list&) { e = static_cast<T>(normal(generator)); });
  }

  void run() const {
    const auto bytes = static_cast<std::int64_t>(
        subquad::core::signed_logcumsumexp_workspace(of.lane_count(), of.length(), sizeof(T)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    subquad::core::signed_logcumsumexp(x.view(), sign.view(), of.axis, of.reverse, of.exclusive,
                                       out.view(), out_sign.view(), memory.view());
    const auto more = static_cast<std::int64_t>(
        subquad::core::signed_logcumsumexp_vjp_workspace(of.lane_count(), of.length(), sizeof(T)));
    const strided_array<std::uint8_t> others({more}, layout::unaligned);
    const array_view outputs[] = {grad_x.view(), grad_sign.view()};
    subquad::core::signed_logcumsumexp_vjp(x.view(), sign.view(), of.axis, of.reverse, of.exclusive,
                                           grad.view(), absent == 0 ? nullptr : &outputs[0],
                                           absent == 1 ? nullptr : &outputs[1], others.view());
  }

  void check() const {
    each_index(of.lanes(), [&](const shape_list& lane) { check_lane(lane); });
    SUBQUAD_CHECK(out.gaps_untouched());
    SUBQUAD_CHECK(grad_x.gaps_untouched());
    SUBQUAD_CHECK(grad_sign.gaps_untouched());
  }

  void check_lane(const shape_list& lane) const {
    const auto n = static_cast<std::size_t>(of.length());
    const number_list terms = lane_of(x, of, lane);
    const number_list weights = lane_of(sign, of, lane);
    const number_list grads = lane_of(grad, of, lane);
    const number_list found = lane_of(out, of, lane);
    const number_list found_sign = lane_of(out_sign, of, lane);
    // What float64 takes from a sum: 16 units of its size in a thread and its powers, 6 for each
    // of twenty merges, each of a prefix.
    constexpr long double kOfSum = 140 * 0x1p-53L;
    long_sum sum;
    long_sum size;        // of the terms
    long double top = 0;  // the largest size of a prefix over e^size.reference
    std::vector<long_sum> sums;
    std::vector<long double> errors;  // relative, of each
    const auto judge = [&](std::size_t i) {
      const long double whole = sum.sum == 0 ? 0.0L : std::abs(ratio(sum, size));
      const long double error = size.sum == 0 ? 0.0L : kOfSum * std::max(1.0L, top);
      sums.push_back(sum);
      errors.push_back(whole == 0 ? (error > 0 ? 1.0L : 0.0L) : error / whole);
      const long double expected = sum.log();
      // Where what is left is not more than what rounding takes, nothing is known of it.
      if (errors.back() > 0.1L && size.is_finite()) return;
      expect("out", of, static_cast<std::int64_t>(i), found[i], expected,
             2 * ulp_at<T>(std::fmax(std::abs(expected), 16.0L)) + 1.1L * errors.back());
      const long double sign_of = sum.sum > 0 ? 1.0L : sum.sum < 0 ? -1.0L : sum.sum;
      expect("out_sign", of, static_cast<std::int64_t>(i), found_sign[i], sign_of, 0);
    };
    for (std::size_t i = 0; i < n; ++i) {
      if (of.exclusive) judge(i);
      sum.add(terms[i], weights[i]);
      size.add(terms[i], std::abs(weights[i]));
      if (!of.exclusive) judge(i);
    }
    // Shares over e^-reference, of the entries from the last to the first.
    long double share = 0;
    long double reach = 0;
    long double error = 0;
    long double reference = 0;
    const number_list found_x = lane_of(grad_x, of, lane);
    const number_list found_weight = lane_of(grad_sign, of, lane);
    const auto take = [&](std::size_t i) {
      if (grads[i] == 0 || sums[i].sum == 0) return;
      if (!sums[i].is_finite()) {
        share = std::nanl("");
        return;
      }
      const long double next = sums[i].reference;
      const long double factor = share == 0 ? 0.0L : std::exp(next - reference);
      share = share * factor + grads[i] / sums[i].sum;
      reach = reach * factor + std::abs(grads[i] / sums[i].sum);
      error = error * factor + std::abs(grads[i] / sums[i].sum) * errors[i];
      reference = next;
    };
    for (std::size_t i = n; i-- > 0;) {
      if (!of.exclusive) take(i);
      const bool is_nothing = terms[i] == -static_cast<long double>(kInf) || share == 0;
      const long double power = is_nothing ? 0.0L : std::exp(terms[i] - reference);
      const long double gradient = is_nothing ? 0.0L : power * share;
      const long double bound =
          is_nothing ? 0.0L
                     : power * (2 * error + reach * (2 * kUnit<T> + 4 * kOfSum +
                                                     0x1p-52L * std::abs(terms[i] - reference)));
      const auto step = static_cast<std::int64_t>(i);
      const long double smallest = sizeof(T) == 8 ? 1e-300L : 1e-37L;
      if (absent != 0) {
        expect("grad_x", of, step, found_x[i],
               weights[i] == 0 ? 0.0L : held<T>(weights[i] * gradient),
               std::abs(weights[i]) * bound + smallest);
      }
      if (absent != 1) {
        expect("grad_sign", of, step, found_weight[i], held<T>(gradient), bound + smallest);
      }
      if (of.exclusive) take(i);
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
  const auto with = [](const std::vector<double>& x, const std::vector<double>& sign) {
    for (const std::int64_t n : {4, 40}) {
      for (const bool exclusive : {false, true}) {
        problem<T> each({{2, n}, 1, false, exclusive});
        put(each.x, x);
        put(each.sign, sign);
        each.run_and_check();
      }
    }
  };
  with({1, 2}, {0, 1});
  with({-kInf, 1, 2}, {1, -1, 1});
  with({kNan, kInf, 3}, {0, 0, -2});
  with({1, 2, 3, kInf, 1}, {1, -1, 1, -1, 1});
  with({1, kInf, 0, 0, 0, 0, 0, 0, 0, kInf}, {1, 1, 1, 1, 1, 1, 1, 1, 1, -1});
  with({1, 2, 3}, {1, 1, kNan});
  with({1, 2, -kInf, 3}, {1, 1, kInf, -kInf});
  with({1, 700, -700, 20}, {1, 1e-30, 1e30, -1});
  with({1e4, -1e4}, {-1, 1});
  // What cancels exactly leaves nothing, and smaller terms follow.
  problem<T> cancelled({{1, 5}, 1});
  put(cancelled.x, {1e3, 1e3, 1, 1, 0});
  put(cancelled.sign, {1, -1, 2, -2, -1});
  put(cancelled.grad, {1, 1, 0, 1, 1});
  cancelled.run();
  const double expected[] = {1e3, -kInf, 1 + std::log(2.0), -kInf, 0};
  for (std::int64_t i = 0; i < 5; ++i) {
    SUBQUAD_CHECK(agree(static_cast<long double>(cancelled.out({0, i})),
                        static_cast<long double>(expected[i]), 1e-6L));
    SUBQUAD_CHECK(static_cast<double>(cancelled.out_sign({0, i})) == (i == 0 || i == 2 ? 1
                                                                      : i == 4         ? -1
                                                                                       : 0));
  }
  SUBQUAD_CHECK(static_cast<double>(cancelled.grad_x({0, 4})) == 1);
  for (const double value : {kNan, kInf}) {
    problem<T> each({{2, kTile + 500}, 1});
    each.x({1, kTile + 7}) = static_cast<T>(value);
    each.sign({1, kTile + 7}) = 1;
    each.run_and_check();
    for (std::int64_t i = kTile + 7; i < kTile + 500; ++i) each.grad({1, i}) = 0;
    each.run_and_check();
  }
  for (const double slope : {0.3, 31.0, -0.3}) {
    problem<T> each({{1, kTile + 50}, 1});
    each.x.each([&](T& e, const shape_list& at) {
      e = static_cast<T>(slope * static_cast<double>(at[1]));
    });
    each.run_and_check();
  }
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
    first.grad_x.each([&](T& element, const shape_list& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next.grad_x(at), sizeof(element)) == 0);
    });
  }
  set_order(order::each_in_turn);
}

template <class T>
void of_type(const char* name) {
  worst_error = 0;
  for_forms(kTile, false, [](const scan_form& form) { problem<T>(form).run_and_check(); });
  values<T>();
  for (int without = 0; without < 2; ++without) {
    problem<T> each({{2, kTile + 10}, 1, false, true});
    each.absent = without;
    each.run_and_check();
  }
  std::printf("%s: largest error over bound %.3f\n", name, worst_error);
  orders<T>({{2, 2 * kTile + 9}, 1});
  orders<T>({{300, 18}, 0, true});
}

}  // namespace

int main() {
  of_type<float>("float32");
  of_type<double>("float64");
  problem<float>({{528, kTile + 1}, 1}).run_and_check();
  return checks::status();
}
