// The exact log-normaliser on CUDA against the same sums in long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/strided.hpp"
#include "normalizers_core.hpp"
#include "subquad/errors.hpp"

namespace {

using subquad::array_view;
using subquad::cuda::arithmetic_t;
using subquad::cuda::bfloat16;
using subquad::cuda::float16;
using subquad::cuda::on_host::each_index;
using subquad::cuda::on_host::joined;
using subquad::cuda::on_host::layout;
using subquad::cuda::on_host::number;
using subquad::cuda::on_host::order;
using subquad::cuda::on_host::rounded;
using subquad::cuda::on_host::set_order;
using subquad::cuda::on_host::strided_array;
using shape = subquad::cuda::on_host::shape_list;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Batch dimensions of each argument, and how its elements lie.
struct form {
  std::int64_t n;
  std::int64_t m;
  std::int64_t d;
  shape batch = {};
  shape x_batch = {};
  shape y_batch = {};
  shape log_weights_batch = {};
  layout inputs = layout::contiguous;
  layout output = layout::contiguous;
  bool has_log_weights = true;
  bool has_excluded = true;
  double scale = 1;  // of scores, about
};

double worst = 0;  // error over bound

template <class S>
struct problem {
  using sum = arithmetic_t<S>;
  form of;
  strided_array<S> x;
  strided_array<S> y;
  strided_array<sum> log_weights;
  strided_array<std::int64_t> excluded;
  strided_array<sum> out;

  explicit problem(const form& f)
      : of(f),
        x(joined(f.x_batch, {f.n, f.d}), f.inputs),
        y(joined(f.y_batch, {f.m, f.d}), f.inputs),
        log_weights(joined(f.log_weights_batch, {f.m}), f.inputs),
        excluded({f.n}, f.inputs == layout::repeated ? layout::contiguous : f.inputs),
        out(joined(f.batch, {f.n}), f.output) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(f.n * 1000003 + f.m * 1009 + f.d));
    std::normal_distribution<double> normal;
    const double size = std::sqrt(f.scale) / std::pow(std::max(1.0, double(f.d)), 0.25);
    x.each([&](S& e, const shape&) { e = rounded<S>(size * normal(generator)); });
    y.each([&](S& e, const shape&) { e = rounded<S>(size * normal(generator)); });
    log_weights.each([&](sum& e, const shape&) { e = static_cast<sum>(normal(generator)); });
    excluded.each([&](std::int64_t& e, const shape& at) { e = at[0] % (f.m + 1) - 1; });
  }

  void run() const {
    const array_view views[] = {x.view(), y.view(), log_weights.view(), excluded.view(),
                                out.view()};
    const std::int64_t batch = subquad::cuda::on_host::product(of.batch);
    const auto bytes = static_cast<std::int64_t>(
        subquad::core::log_normalizer_workspace(batch, of.n, of.m, of.d, sizeof(S)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    subquad::core::log_normalizer(views[0], views[1], of.has_log_weights ? &views[2] : nullptr,
                                  of.has_excluded ? &views[3] : nullptr, views[4], memory.view());
  }

  void check() const {
    each_index(of.batch, [&](const shape& b) { check_member(b); });
    SUBQUAD_CHECK(out.gaps_untouched());
  }

  void run_and_check() const {
    run();
    check();
  }

  void check_member(const shape& b) const {
    constexpr long double kUnit = sizeof(sum) == 8 ? 0x1p-53L : 0x1p-24L;
    const auto d = static_cast<std::size_t>(of.d);
    std::vector<double> keys;
    std::vector<double> weights;
    for (std::int64_t j = 0; j < of.m; ++j) {
      for (std::int64_t k = 0; k < of.d; ++k) keys.push_back(number(y(joined(b, {j, k}))));
      weights.push_back(of.has_log_weights ? number(log_weights(joined(b, {j}))) : 0.0);
    }
    for (std::int64_t i = 0; i < of.n; ++i) {
      std::vector<double> query;
      for (std::int64_t k = 0; k < of.d; ++k) query.push_back(number(x(joined(b, {i, k}))));
      std::vector<long double> terms;
      std::vector<long double> errors;
      long double top = -kInfinity;
      for (std::size_t j = 0; j < weights.size(); ++j) {
        const bool left_out = of.has_excluded && excluded({i}) == static_cast<std::int64_t>(j);
        if (left_out || weights[j] == -kInfinity) continue;
        long double score = 0;
        long double size = 0;
        for (std::size_t k = 0; k < d; ++k) {
          const long double term =
              static_cast<long double>(query[k]) * static_cast<long double>(keys[j * d + k]);
          score += term;
          size += std::abs(term);
        }
        // What overflows in the type of the sum.
        if (std::abs(score) > std::numeric_limits<sum>::max()) {
          score = score > 0 ? kInfinity : -kInfinity;
        }
        const long double term = score + static_cast<long double>(weights[j]);
        if (term == -kInfinity) continue;
        const auto depth = static_cast<long double>(of.d);
        const long double of_score = sizeof(S) == 4 ? (std::ceil(depth / 8) + 13) * 0x1p-22L * size
                                                    : (depth + 1) * 2 * kUnit * size;
        terms.push_back(term);
        // The weight is scaled, log2(e) is rounded, and so is their sum.
        errors.push_back(of_score + kUnit * (std::abs(static_cast<long double>(weights[j])) +
                                             2 * std::abs(term) + of_score));
        top =
            term > top || std::isnan(term) || std::isnan(top) ? term + (top != top ? top : 0) : top;
      }
      long double total = 0;
      long double error = 0;
      for (std::size_t t = 0; t < terms.size(); ++t) {
        const long double power = std::exp(terms[t] - top);
        total += power;
        error += power * (errors[t] + kUnit * std::abs(terms[t] - top));
      }
      const bool is_special = std::isinf(top) || std::isnan(top);
      const long double expected = is_special ? top : top + std::log(total);
      const long double found = number(out(joined(b, {i})));
      long double bound = 0;
      bool holds;
      if (is_special) {
        holds = std::isnan(expected) ? std::isnan(found) : found == expected;
      } else {
        // A power is within 4 units; a thread adds 16 columns of a tile in order; each tile may
        // raise the shift, which costs a power and a product, and so does each of a few mergers and
        // each part; then a logarithm, its scale and the shift.
        const auto tiles = static_cast<long double>((of.m + 63) / 64);
        bound = error / total * 1.01L + kUnit * (4 + 16 + 5 * (2 * tiles + 5) +
                                                 4 * std::log2(2 + of.m) + 3 * std::abs(expected));
        holds = std::abs(found - expected) <= bound;
        worst = std::max(worst, static_cast<double>(std::abs(found - expected) / bound));
      }
      if (holds) continue;
      std::printf("row %d (n %d m %d d %d, %d bytes): %.9Lg, expected %.9Lg within %.3Lg\n", int(i),
                  int(of.n), int(of.m), int(of.d), int(sizeof(S)), found, expected, bound);
      SUBQUAD_CHECK(holds);
    }
  }
};

template <class S>
void set(const strided_array<S>& array, const shape& at, double value) {
  array(at) = rounded<S>(value);
}

template <class S>
void random(const form& f) {
  problem<S>(f).run_and_check();
}

template <class S>
void sizes() {
  for (const std::int64_t d : {0, 1, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130}) {
    random<S>({5, 7, d});
  }
  for (const std::int64_t d : {0, 2}) {
    random<S>({1, 1, d});
    random<S>({1, 700, d});
    random<S>({150, 1, d});
  }
  // Around the rows of a tile, and around its columns.
  for (const std::int64_t n : {127, 128, 129}) random<S>({n, 5, 3});
  for (const std::int64_t m : {63, 64, 65, 95, 96, 97, 127, 128, 129, 193}) random<S>({3, m, 5});
  random<S>({129, 260, 70});
  random<S>({0, 4, 3});
  random<S>({4, 0, 3});
  random<S>({4, 5, 3, {0}, {0}, {0}, {}});
  form few = {7, 150, 20};
  few.scale = 20;
  random<S>(few);
  few.has_excluded = false;
  random<S>(few);
  few.has_log_weights = false;
  random<S>(few);
  few.has_excluded = true;
  random<S>(few);
}

template <class S>
void layouts() {
  for (const layout each :
       {layout::transposed, layout::spread, layout::reversed, layout::unaligned}) {
    form f = {34, 130, 67};
    f.inputs = each;
    f.output = each;
    random<S>(f);
  }
  form f = {6, 200, 8, {2, 3}, {2, 3}, {3}, {2, 1}};
  random<S>(f);
  f.inputs = layout::spread;
  f.output = layout::transposed;
  random<S>(f);
  f = {6, 9, 8, {3}, {3}, {3}, {3}};
  f.inputs = layout::repeated;
  random<S>(f);
  // The batch of one argument alone, and in dimensions that do not lie regularly.
  random<S>({4, 5, 3, {4}, {}, {}, {4}});
  random<S>({4, 5, 3, {2, 3, 2}, {2, 1, 2}, {3, 1}, {}});
}

// Largest scores in the first tile, in the last and in one between, differences beyond what a power
// of two reaches, and weights that cancel scores.
template <class S>
void ranges() {
  constexpr std::int64_t kKeys = 300;
  for (int kind = 0; kind < 5; ++kind) {
    problem<S> each({3, kKeys, 2});
    for (std::int64_t j = 0; j < kKeys; ++j) {
      const double values[] = {double(j), double(-j), j == 150 ? 300.0 : -300.0, 0.0,
                               j % 2 ? 1e4 : -1e4};
      const double value = values[kind];
      set(each.y, {j, 0}, kind == 4 ? -value : value);
      set(each.y, {j, 1}, 0.0);
      set(each.log_weights, {j}, kind == 4 ? value : 0.0);
    }
    for (std::int64_t i = 0; i < 3; ++i) set(each.x, {i, 0}, kind == 4 ? 1.0 : double(1 + i));
    each.run_and_check();
  }
}

// So many blocks that keys are not cut: sums go on from tile to tile, of scores that rise and that
// fall.
template <class S>
void uncut() {
  problem<S> each({2, 150, 2, {265}, {265}, {265}, {}});
  each.y.each([](S& element, const shape& at) {
    if (at[2] == 0) element = rounded<S>(double(at[1]));
  });
  each.x.each([](S& element, const shape& at) {
    if (at[2] == 0) element = rounded<S>((at[1] == 0 ? 1.0 : -1.0) * double(at[0]) / 64);
  });
  each.run_and_check();
}

// Many equal terms: nothing is lost in a long sum.
template <class S>
void long_sums() {
  problem<S> each({1, 20000, 0, {}, {}, {}, {}});
  each.of.has_log_weights = false;
  each.of.has_excluded = false;
  each.run();
  const double found = number(each.out({0}));
  SUBQUAD_CHECK(std::abs(found - std::log(20000.0)) <=
                16 * double(std::numeric_limits<arithmetic_t<S>>::epsilon()));
}

// What counts for nothing may hold anything, and queries may be infinite beside it.
template <class S>
void absent(std::int64_t n, std::int64_t m, std::int64_t d) {
  for (const double held : {kNan, kInfinity, -kInfinity}) {
    problem<S> each({n, m, d});
    for (std::int64_t j = 0; j < m; j += 3) {
      set(each.log_weights, {j}, -kInfinity);
      for (std::int64_t k = 0; k < d; ++k) set(each.y, {j, k}, held);
    }
    each.run_and_check();
    for (std::int64_t i = 0; i < n; ++i) SUBQUAD_CHECK(std::isfinite(each.out({i})) || m < 3);
    // No key at all.
    for (std::int64_t j = 0; j < m; ++j) set(each.log_weights, {j}, -kInfinity);
    set(each.x, {0, 0}, held);
    each.run();
    for (std::int64_t i = 0; i < n; ++i) SUBQUAD_CHECK(number(each.out({i})) == -kInfinity);
  }
  // All keys of one part, and all but one.
  problem<S> each({n, m, d});
  for (std::int64_t j = 0; j < m; ++j) {
    if (j != m / 2) set(each.log_weights, {j}, -kInfinity);
  }
  each.run_and_check();
}

template <class S>
void left_out() {
  for (const double held : {kNan, kInfinity}) {
    problem<S> each({90, 140, 5});
    set(each.y, {131, 2}, held);
    for (std::int64_t i = 0; i < 90; ++i) each.excluded({i}) = i % 2 ? 131 : -1;
    each.run_and_check();
  }
  problem<S> each({70, 1, 3});
  for (std::int64_t i = 0; i < 70; ++i) each.excluded({i}) = i == 4 ? -1 : 0;
  each.run_and_check();
  SUBQUAD_CHECK(number(each.out({3})) == -kInfinity && std::isfinite(each.out({4})));
}

// Infinities and NaN where they count.
template <class S>
void special(std::int64_t n, std::int64_t m, std::int64_t d) {
  const auto with = [&](const std::function<void(problem<S>&)>& change) {
    problem<S> each({n, m, d});
    change(each);
    each.run_and_check();
  };
  for (const double held : {kInfinity, -kInfinity}) {
    with([&](problem<S>& p) { set(p.y, {m / 2, d / 2}, held); });
    with([&](problem<S>& p) {
      set(p.y, {m / 2, d / 2}, held);
      for (std::int64_t i = 0; i < n; ++i) set(p.x, {i, d / 2}, held > 0 ? -1.0 : 1.0);
    });
    with([&](problem<S>& p) { set(p.x, {n / 2, d / 2}, held); });
    with([&](problem<S>& p) {
      // Every key scores -inf.
      set(p.x, {n / 2, d / 2}, held);
      for (std::int64_t j = 0; j < m; ++j) set(p.y, {j, d / 2}, held > 0 ? -1.0 : 1.0);
    });
    with([&](problem<S>& p) {
      set(p.y, {m / 2, d / 2}, held);
      set(p.y, {0, 0}, -held);
      set(p.x, {n / 2, d / 2}, 0.0);  // NaN
    });
  }
  // A key that scores -inf beside one that is NaN and has no weight.
  with([&](problem<S>& p) {
    set(p.y, {m / 2, d / 2}, kInfinity);
    set(p.y, {m / 3, d / 2}, kNan);
    set(p.log_weights, {m / 3}, -kInfinity);
    for (std::int64_t i = 0; i < n; ++i) set(p.x, {i, d / 2}, -1.0);
  });
  with([&](problem<S>& p) { set(p.y, {m / 2, d / 2}, kNan); });
  with([&](problem<S>& p) { set(p.x, {n / 2, d / 2}, kNan); });
  with([&](problem<S>& p) { set(p.log_weights, {m / 2}, kInfinity); });
  with([&](problem<S>& p) { set(p.log_weights, {m / 2}, kNan); });
  // NaN prevails over +inf, whichever comes first.
  for (const std::int64_t nan : {std::int64_t{0}, m - 1}) {
    with([&](problem<S>& p) {
      set(p.y, {nan, 0}, kNan);
      set(p.log_weights, {m / 2}, kInfinity);
    });
  }
}

// Scores that overflow, and elements that round to infinity in tf32.
void large() {
  for (const double sign : {-1.0, 1.0}) {
    problem<float> each({9, 110, 4});
    set(each.y, {3, 1}, sign * 1e30);
    for (std::int64_t i = 0; i < 9; ++i) set(each.x, {i, 1}, i % 3 ? 1e30 : 0.0);
    for (std::int64_t j = 0; j < 110; ++j) {
      if (j != 3) set(each.y, {j, 1}, 0.0);
    }
    set(each.y, {5, 2}, 3.4028e38);
    for (std::int64_t i = 0; i < 9; ++i) set(each.x, {i, 2}, 1e-38);
    each.run_and_check();
  }
}

// The same bits in every order of threads and blocks.
template <class S>
void orders() {
  const form f = {130, 270, 34};
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
  const problem<float> each({3, 500, 4});
  const problem<double> other({3, 500, 4});
  const array_view x = each.x.view();
  const array_view y = each.y.view();
  const array_view out = each.out.view();
  const strided_array<std::uint8_t> memory({8});
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { subquad::core::log_normalizer(x, y, nullptr, nullptr, out, memory.view()); },
      "workspace"));
  SUBQUAD_CHECK(checks::throws<subquad::type_error>(
      [&] {
        subquad::core::log_normalizer(x, other.y.view(), nullptr, nullptr, out, memory.view());
      },
      "y: expected float32, got float64"));
}

template <class S>
void of_storage(const char* name) {
  worst = 0;
  sizes<S>();
  layouts<S>();
  ranges<S>();
  absent<S>(9, 200, 5);
  absent<S>(70, 9, 66);
  left_out<S>();
  special<S>(5, 9, 3);
  std::printf("%s: largest error over bound %.3f\n", name, worst);
}

}  // namespace

int main() {
  of_storage<float>("float32");
  of_storage<double>("float64");
  of_storage<float16>("float16");
  of_storage<bfloat16>("bfloat16");
  special<float>(9, 170, 34);
  special<double>(9, 170, 34);
  long_sums<float>();
  uncut<float>();
  uncut<double>();
  orders<float>();
  orders<double>();
  large();
  errors();
  return checks::failures() > 0;
}
