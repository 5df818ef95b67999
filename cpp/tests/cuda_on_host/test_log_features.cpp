// Random features on CUDA, their logarithms and trigonometric ones against long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/feature_maps.hpp"
#include "features_core.hpp"
#include "subquad/errors.hpp"

namespace {

using namespace feature_maps;
using subquad::cuda::bfloat16;
using subquad::cuda::float16;
using subquad::cuda::on_host::each_index;
using subquad::cuda::on_host::order;
using subquad::cuda::on_host::set_order;

enum class values { logarithms, exponentials, waves };

double worst = 0;  // error over bound

template <class S>
struct problem : feature_case<S> {
  using base = feature_case<S>;
  using sum = typename base::sum;
  using base::of;
  values kind;
  strided_array<sum> out;

  explicit problem(const form& f, values k = values::logarithms)
      : base(f), kind(k), out(joined(f.batch, {f.n, columns_of(f, k)}), f.output) {}

  static bool has_pairs(const form& f, values k) { return f.antithetic || k == values::waves; }
  static std::int64_t columns_of(const form& f, values k) {
    return has_pairs(f, k) ? 2 * f.m : f.m;
  }

  void run() const {
    const optional_arrays given = this->optional();
    const auto bytes = static_cast<std::int64_t>(
        subquad::core::log_features_workspace(this->entries(), of.n, of.m, of.d, of.r, sizeof(S)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    if (kind == values::waves) {
      subquad::core::trigonometric_features(this->x.view(), this->projection.view(),
                                            this->bias.view(), given[0], given[1], given[2],
                                            given[3], out.view(), memory.view());
    } else {
      subquad::core::log_features(this->x.view(), this->projection.view(), this->bias.view(),
                                  given[0], given[1], given[2], given[3], of.antithetic,
                                  kind == values::exponentials, out.view(), memory.view());
    }
  }

  void check() const {
    each_index(of.batch, [&](const shape& b) {
      for (std::int64_t i = 0; i < of.n; ++i) check_row(b, i);
    });
    SUBQUAD_CHECK(out.gaps_untouched());
  }

  void run_and_check() const {
    run();
    check();
  }

  void check_row(const shape& b, std::int64_t i) const {
    const real u = kUnit<sum>;
    const std::vector<real> z = this->row(b, i);
    const estimate term = this->term(z, b);
    for (std::int64_t j = 0; j < of.m; ++j) {
      const estimate product = this->product(z, this->projection, b, j);
      estimate offset;
      offset.value = term.value + number(this->bias(joined(b, {j})));
      offset.error = term.error + u * std::abs(offset.value);
      if (kind == values::waves) {
        const real scale = std::exp(offset.value);
        // An exponential, a sine and a cosine within 2 ulp, a product rounded.
        const real error = scale == 0
                               ? 0
                               : scale * (std::expm1(offset.error) + product.error + 9 * u) +
                                     static_cast<real>(std::numeric_limits<sum>::denorm_min());
        check_one(b, i, j, {scale * std::cos(product.value), error});
        check_one(b, i, of.m + j, {scale * std::sin(product.value), error});
        continue;
      }
      check_one(b, i, j, value(offset, product, 1));
      if (of.antithetic) check_one(b, i, of.m + j, value(offset, product, -1));
    }
  }

  estimate value(const estimate& offset, const estimate& product, int sign) const {
    const real u = kUnit<sum>;
    const real log = offset.value + sign * product.value;
    const real error = offset.error + product.error + u * std::abs(log);
    if (kind == values::logarithms) return {log, error};
    const real power = std::exp(log);
    if (power > static_cast<real>(std::numeric_limits<sum>::max())) return {kInfinity, 0};
    return {power, power == 0 ? 0
                              : power * (std::expm1(error) + 4 * u) +
                                    static_cast<real>(std::numeric_limits<sum>::denorm_min())};
  }

  void check_one(const shape& b, std::int64_t i, std::int64_t c, const estimate& expected) const {
    const real found = number(out(joined(b, {i, c})));
    if (holds(found, expected, worst)) return;
    std::printf(
        "row %d column %d (n %d m %d d %d r %d, %d bytes): %.9Lg, expected %.9Lg within "
        "%.3Lg\n",
        int(i), int(c), int(of.n), int(of.m), int(of.d), int(of.r), int(sizeof(S)), found,
        expected.value, expected.error);
    SUBQUAD_CHECK(false);
  }
};

template <class S>
void random(form f, values kind = values::logarithms) {
  problem<S>(f, kind).run_and_check();
}

template <class S>
void sizes() {
  for (const std::int64_t d : {0, 1, 3, 15, 16, 17, 31, 32, 33, 64, 70}) {
    random<S>({5, 7, d, 3});
    random<S>({3, 4, d});
  }
  // Around the rows of a tile, and around its columns.
  for (const std::int64_t n : {127, 128, 129}) random<S>({n, 5, 3});
  for (const std::int64_t m : {1, 63, 64, 65, 95, 96, 97, 193}) random<S>({3, m, 5});
  for (const std::int64_t r : {1, 63, 64, 65, 96, 97}) random<S>({3, 5, 6, r});
  // A part of several tiles: as many as those of the factor.
  random<S>({4, 290, 35, 130, true, true});
  random<S>({0, 4, 3});
  random<S>({4, 0, 3, 2});
  random<S>({4, 5, 3, 0, true, false, {0}, {0}});
  random<S>({130, 100, 40, 20, false, true});
}

template <class S>
void kinds() {
  for (const values kind : {values::logarithms, values::exponentials, values::waves}) {
    for (const std::int64_t m : {101, 104}) {
      form f = {35, m, 20, 5};
      random<S>(f, kind);
      f.antithetic = kind != values::waves;
      f.has_vectors = false;
      random<S>(f, kind);
    }
  }
  // Each of what is optional alone.
  for (int which = 0; which < 4; ++which) {
    problem<S> each({5, 9, 4, which == 3 ? 3 : 0, false});
    (which == 0 ? each.has_diagonal : which == 1 ? each.has_shift : each.has_linear) = which < 3;
    each.run_and_check();
  }
}

template <class S>
void layouts() {
  for (const layout each :
       {layout::transposed, layout::spread, layout::reversed, layout::unaligned}) {
    form f = {34, 100, 37, 7, true, true};
    f.inputs = each;
    f.output = each;
    random<S>(f);
    f.inputs = layout::contiguous;
    random<S>(f, values::waves);
  }
  form f = {6, 20, 8, 3, true, true, {2, 3}, {2, 3}, {3}};
  random<S>(f);
  f.inputs = layout::spread;
  f.output = layout::transposed;
  random<S>(f);
  f = {6, 9, 8, 3, true, false, {3}, {3}, {3}};
  f.inputs = layout::repeated;
  random<S>(f);
  // In dimensions that do not lie regularly, and of the map alone.
  random<S>({4, 5, 3, 2, true, false, {2, 3, 2}, {2, 1, 2}, {3, 1}});
  random<S>({4, 5, 3, 2, true, false, {4}, {}, {4}});
}

// The shift is taken off before the product: what is left of it is small beside both.
template <class S>
void shifted() {
  problem<S> each({9, 12, 6});
  each.shift.each([](auto& element, const shape&) { element += 1000; });
  each.x.each([](S& element, const shape&) { element = rounded<S>(number(element) + 1000); });
  each.run_and_check();
}

template <class S>
void special(std::int64_t n, std::int64_t m, std::int64_t d, std::int64_t r,
             std::initializer_list<values> kinds) {
  const auto with = [&](const std::function<void(problem<S>&)>& change) {
    for (const bool has_vectors : {true, false}) {
      for (const values kind : kinds) {
        form f = {n, m, d, r, has_vectors, kind != values::waves};
        problem<S> each(f, kind);
        change(each);
        each.run_and_check();
      }
    }
  };
  for (const double held : {kInfinity, -kInfinity, kNan}) {
    with([&](problem<S>& p) { set(p.x, {n / 2, d / 2}, held); });
    with([&](problem<S>& p) { set(p.projection, {m / 2, d / 2}, held); });
    with([&](problem<S>& p) { set(p.bias, {m / 2}, held); });
    with([&](problem<S>& p) { set(p.diagonal, {d / 2}, held); });
    with([&](problem<S>& p) { set(p.linear, {d / 2}, held); });
    with([&](problem<S>& p) { set(p.shift, {d / 2}, held); });
    if (r > 0) with([&](problem<S>& p) { set(p.factor, {r / 2, d / 2}, held); });
  }
  // Nothing at all, whatever stands beside it.
  with([&](problem<S>& p) {
    for (std::int64_t j = 0; j < m; ++j) set(p.bias, {j}, -kInfinity);
  });
}

// Elements that round to infinity in tf32.
void large() {
  for (const double sign : {-1.0, 1.0}) {
    problem<float> each({9, 12, 4, 0, false, true});
    set(each.projection, {3, 1}, sign * 3.4028e38);
    for (std::int64_t i = 0; i < 9; ++i) set(each.x, {i, 1}, i % 3 ? 1e-38 : 0.0);
    each.run_and_check();
  }
}

// Exponentials that underflow, to subnormal numbers too, and that overflow.
template <class S>
void ranges() {
  const double top = sizeof(arithmetic_t<S>) == 8 ? 740 : 100;
  problem<S> each({3, 80, 2, 0, false, false}, values::exponentials);
  for (std::int64_t j = 0; j < 80; ++j) set(each.bias, {j}, top * (double(j) / 40 - 1));
  each.run_and_check();
}

// Products of 1 + 3 * 2^-13 without that of the low parts, which plain arithmetic would keep: rows
// that need not be computed again are not.
void unsettled() {
  constexpr float kElement = 1 + 3 * 0x1p-13f;
  constexpr float kProduct = 1 + 6 * 0x1p-13f;
  problem<float> each({130, 210, 70, 100, false});
  each.x.each([](float& element, const shape&) { element = kElement; });
  each.projection.each([](float& element, const shape&) { element = kElement; });
  each.factor.each([](float& element, const shape&) { element = 0; });
  each.bias.each([](float& element, const shape&) { element = 0; });
  each.run();
  each.out.each([](float& element, const shape&) { SUBQUAD_CHECK(element == 70 * kProduct); });
}

// Waves of products that are exact, from next to nothing to far more than a period.
template <class T>
void waves() {
  constexpr std::int64_t kCount = 400;
  constexpr real kU = kUnit<T>;
  problem<T> each({1, kCount, 1, 0, false}, values::waves);
  set(each.x, {0, 0}, 1.0);
  for (std::int64_t j = 0; j < kCount; ++j) {
    // The eight bits that no split cuts.
    const double argument = std::exp(0.075 * double(j) - 12) * (j % 2 ? -1 : 1);
    set(each.projection, {j, 0}, number(rounded<bfloat16>(argument)));
    set(each.bias, {j}, 0.0);
  }
  each.run();
  for (std::int64_t j = 0; j < kCount; ++j) {
    const real argument = number(each.projection({j, 0}));
    const real bound = 4 * kU + std::abs(argument) * kU * kU;
    SUBQUAD_CHECK(std::abs(number(each.out({0, j})) - std::cos(argument)) <= bound);
    SUBQUAD_CHECK(std::abs(number(each.out({0, kCount + j})) - std::sin(argument)) <=
                  bound * std::min<real>(1, std::abs(argument)));
  }
}

// The same bits in every order of threads and blocks.
template <class S>
void orders() {
  const form f = {130, 210, 34, 5, true, true};
  const problem<S> first(f);
  first.run();
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    const problem<S> next(f);
    next.run();
    next.check();
    first.out.each([&](auto& element, const shape& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next.out(at), sizeof(element)) == 0);
    });
  }
  set_order(order::each_in_turn);
}

void errors() {
  const problem<float> each({3, 5, 4});
  const problem<double> other({3, 5, 4});
  const problem<float> wide({3, 7, 4});
  const array_view x = each.x.view();
  const array_view out = each.out.view();
  const strided_array<std::uint8_t> memory({64});
  const auto call = [&](const array_view& projection, const array_view& result) {
    subquad::core::log_features(x, projection, each.bias.view(), nullptr, nullptr, nullptr, nullptr,
                                false, false, result, memory.view());
  };
  SUBQUAD_CHECK(checks::throws<subquad::type_error>([&] { call(other.projection.view(), out); },
                                                    "projection: expected float32, got float64"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(each.projection.view(), wide.out.view()); }, "out: expected shape (..., n, m)"));
  // 16-bit numbers are those of x alone.
  const strided_array<float16> half({3, 4});
  half.each([](float16& element, const shape&) { element = rounded<float16>(1.0); });
  SUBQUAD_CHECK(checks::throws<subquad::type_error>([&] { call(half.view(), out); },
                                                    "projection: expected float32, got float16"));
}

template <class S>
void of_storage(const char* name) {
  worst = 0;
  // Both types of 16 bits have one kernel.
  if (!std::is_same_v<S, bfloat16>) {
    sizes<S>();
    kinds<S>();
  }
  shifted<S>();
  if (!std::is_same_v<S, float16>) layouts<S>();
  if (sizeof(S) == 2) {
    special<S>(4, 6, 3, 2, {values::logarithms});
  } else {
    special<S>(4, 6, 3, 2, {values::logarithms, values::exponentials, values::waves});
  }
  std::printf("%s: largest error over bound %.3f\n", name, worst);
}

}  // namespace

int main() {
  of_storage<float>("float32");
  of_storage<double>("float64");
  of_storage<float16>("float16");
  of_storage<bfloat16>("bfloat16");
  special<float>(5, 100, 34, 3, {values::logarithms});
  special<float>(70, 6, 3, 2, {values::logarithms});
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    unsettled();
  }
  set_order(order::each_in_turn);
  waves<float>();
  waves<double>();
  ranges<float>();
  ranges<double>();
  orders<float>();
  orders<double>();
  orders<bfloat16>();
  large();
  errors();
  return checks::status();
}
