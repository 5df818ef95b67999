// The reverse of the exact log-normaliser on CUDA against the same sums in long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
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
constexpr float kFloatInfinity = std::numeric_limits<float>::infinity();
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
  shape log_z_batch = {};
  shape grad_batch = {};
  layout inputs = layout::contiguous;
  layout outputs = layout::contiguous;
  bool has_log_weights = true;
  bool has_excluded = true;
  double scale = 1;  // of scores, about
};

// One member of the batch, as numbers.
struct member {
  std::int64_t n;
  std::int64_t m;
  std::int64_t d;
  std::vector<double> x;
  std::vector<double> y;
  std::vector<double> log_weights;
  std::vector<double> log_z;
  std::vector<double> grad;
  std::vector<std::int64_t> excluded;

  double x_at(std::int64_t i, std::int64_t k) const {
    return x[static_cast<std::size_t>(i * d + k)];
  }
  double y_at(std::int64_t j, std::int64_t k) const {
    return y[static_cast<std::size_t>(j * d + k)];
  }
  double log_weight(std::int64_t j) const { return log_weights[static_cast<std::size_t>(j)]; }
  double log_z_at(std::int64_t i) const { return log_z[static_cast<std::size_t>(i)]; }
  bool leaves_out(std::int64_t i, std::int64_t j) const {
    return excluded[static_cast<std::size_t>(i)] == j || log_weight(j) == -kInfinity;
  }
  // x_i . y_j and the sum of the sizes of its terms.
  long double score(std::int64_t i, std::int64_t j, long double& size) const {
    long double total = 0;
    size = 0;
    for (std::int64_t k = 0; k < d; ++k) {
      const long double term =
          static_cast<long double>(x_at(i, k)) * static_cast<long double>(y_at(j, k));
      total += term;
      size += std::abs(term);
    }
    return total;
  }
};

template <class S>
struct problem {
  using sum = arithmetic_t<S>;
  form of;
  strided_array<S> x;
  strided_array<S> y;
  strided_array<sum> log_weights;
  strided_array<sum> log_z;
  strided_array<sum> grad;
  strided_array<std::int64_t> excluded;
  strided_array<sum> grad_x;
  strided_array<sum> grad_y;
  strided_array<sum> grad_log_weights;

  explicit problem(const form& f)
      : of(f),
        x(joined(f.x_batch, {f.n, f.d}), f.inputs),
        y(joined(f.y_batch, {f.m, f.d}), f.inputs),
        log_weights(joined(f.log_weights_batch, {f.m}), f.inputs),
        log_z(joined(f.log_z_batch, {f.n}), f.inputs),
        grad(joined(f.grad_batch, {f.n}), f.inputs),
        excluded({f.n}, f.inputs == layout::repeated ? layout::contiguous : f.inputs),
        grad_x(joined(f.batch, {f.n, f.d}), f.outputs),
        grad_y(joined(f.batch, {f.m, f.d}), f.outputs),
        grad_log_weights(joined(f.batch, {f.m}), f.outputs) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(f.n * 1000003 + f.m * 1009 + f.d));
    std::normal_distribution<double> normal;
    const double size = std::sqrt(f.scale) / std::pow(std::max<double>(1, double(f.d)), 0.25);
    x.each([&](S& e, const shape&) { e = rounded<S>(size * normal(generator)); });
    y.each([&](S& e, const shape&) { e = rounded<S>(size * normal(generator)); });
    log_weights.each([&](sum& e, const shape&) { e = static_cast<sum>(normal(generator)); });
    grad.each([&](sum& e, const shape&) { e = static_cast<sum>(normal(generator)); });
    excluded.each([&](std::int64_t& e, const shape& at) { e = at[0] % (f.m + 1) - 1; });
    find_log_z();
  }

  member at(const shape& b) const {
    member one{of.n, of.m, of.d, {}, {}, {}, {}, {}, {}};
    for (std::int64_t i = 0; i < of.n; ++i) {
      for (std::int64_t k = 0; k < of.d; ++k) one.x.push_back(number(x(joined(b, {i, k}))));
      one.log_z.push_back(number(log_z(joined(b, {i}))));
      one.grad.push_back(number(grad(joined(b, {i}))));
      one.excluded.push_back(of.has_excluded ? excluded({i}) : -1);
    }
    for (std::int64_t j = 0; j < of.m; ++j) {
      for (std::int64_t k = 0; k < of.d; ++k) one.y.push_back(number(y(joined(b, {j, k}))));
      one.log_weights.push_back(of.has_log_weights ? number(log_weights(joined(b, {j}))) : 0);
    }
    return one;
  }

  // log_z as the forward function gives it; where it has fewer batch dimensions than the scores, of
  // whichever batch comes last.
  void find_log_z() {
    each_index(of.batch, [&](const shape& b) {
      const member one = at(b);
      for (std::int64_t i = 0; i < of.n; ++i) {
        long double top = -kInfinity;
        std::vector<long double> terms;
        for (std::int64_t j = 0; j < of.m; ++j) {
          if (one.leaves_out(i, j)) continue;
          long double size;
          terms.push_back(one.score(i, j, size) + one.log_weight(j));
          top = terms.back() > top || std::isnan(terms.back()) ? terms.back() : top;
        }
        long double total = 0;
        for (const long double term : terms) total += std::exp(term - top);
        log_z(joined(b, {i})) = static_cast<sum>(std::isinf(top) ? top : top + std::log(total));
      }
    });
  }

  void run(bool with_x = true, bool with_y = true, bool with_log_weights = true) const {
    const array_view views[] = {grad.view(),        x.view(),        y.view(),
                                log_weights.view(), excluded.view(), log_z.view(),
                                grad_x.view(),      grad_y.view(),   grad_log_weights.view()};
    const std::int64_t batch = subquad::cuda::on_host::product(of.batch);
    const auto bytes = static_cast<std::int64_t>(
        subquad::core::log_normalizer_vjp_workspace(batch, of.n, of.m, of.d, sizeof(S)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    subquad::core::log_normalizer_vjp(
        views[0], views[1], views[2], of.has_log_weights ? &views[3] : nullptr,
        of.has_excluded ? &views[4] : nullptr, views[5], with_x ? &views[6] : nullptr,
        with_y ? &views[7] : nullptr, with_log_weights ? &views[8] : nullptr, memory.view());
  }

  // A sum and how far the kernel's may be from it.
  struct bounded {
    long double value = 0;
    long double size = 0;   // of its terms
    long double error = 0;  // of the weights, on it

    void add(long double weight, long double relative, long double absolute, long double element) {
      if (absolute > 0 && std::isfinite(element)) error += absolute * std::abs(element);
      if (weight == 0) return;  // counts for nothing, whatever the element is
      const long double term = weight * (std::isfinite(element) ? element : 0.0L);
      value += term;
      size += std::abs(term);
      error += std::abs(term) * relative;
    }
  };

  static constexpr long double kUnit = sizeof(sum) == 8 ? 0x1p-53L : 0x1p-24L;
  static constexpr long double kSmallest = std::numeric_limits<sum>::min();

  void compare(const char* what, sum found, const bounded& truth, std::int64_t terms,
               bool of_weights, long double factor, const shape& place) const {
    const long double value = truth.value * factor;
    // Tiles of 48 columns, at most as many parts, and the row's factor.
    const auto tiles = static_cast<long double>((terms + 47) / 48);
    const long double unit = sizeof(sum) == 8
                                 ? (static_cast<long double>(terms) + 2 * tiles + 2) * kUnit
                             : of_weights ? (16 + 2 * tiles) * kUnit
                                          : (76 + 2 * tiles + 2) * kUnit;
    const long double bound =
        std::abs(factor) * (truth.error + unit * (truth.size + truth.error)) + kSmallest;
    bool holds;
    if (std::isnan(value) || std::isinf(value)) {
      holds = std::isnan(value) ? std::isnan(found) : found == value;
    } else {
      const long double error = std::abs(number(found) - value);
      holds = error <= bound;
      if (bound > kSmallest) worst = std::max(worst, static_cast<double>(error / bound));
    }
    if (holds) return;
    std::string text;
    for (const std::int64_t i : place) text += std::to_string(i) + " ";
    std::printf("%s at %s(n %d m %d d %d, %d bytes): %.9g, expected %.9Lg within %.3Lg\n", what,
                text.c_str(), int(of.n), int(of.m), int(of.d), int(sizeof(S)), number(found), value,
                bound);
    SUBQUAD_CHECK(holds);
  }

  // The weight of a pair without its gradient, and its relative error.
  static long double weight(const member& one, std::int64_t i, std::int64_t j,
                            long double& relative) {
    relative = 0;
    const long double z = one.log_z_at(i);
    if (one.leaves_out(i, j) || z == -kInfinity) return 0;
    long double size;
    long double s = one.score(i, j, size);
    // What overflows in the type of the sum.
    if (std::abs(s) > std::numeric_limits<sum>::max()) s = s > 0 ? kInfinity : -kInfinity;
    const long double w = one.log_weight(j);
    const long double exponent = s + w - z;
    if (exponent == -kInfinity) return 0;
    const auto depth = static_cast<long double>(one.d);
    const long double of_score = sizeof(S) == 4 ? (std::ceil(depth / 8) + 13) * 0x1p-22L * size
                                                : (depth + 1) * 2 * kUnit * size;
    const long double of_exponent =
        of_score + kUnit * (std::abs(s) + std::max(std::abs(w), std::abs(z)) +
                            3 * (std::abs(exponent) + of_score));
    relative = std::expm1(of_exponent) + 5 * kUnit;
    return std::exp(exponent);
  }

  void check() const {
    each_index(of.batch, [&](const shape& b) {
      const member one = at(b);
      const auto m = static_cast<std::size_t>(of.m);
      const auto d = static_cast<std::size_t>(of.d);
      std::vector<bounded> of_keys(m * d);
      std::vector<bounded> of_weights(m);
      for (std::int64_t i = 0; i < of.n; ++i) {
        std::vector<bounded> of_query(d);
        const long double g = one.grad[static_cast<std::size_t>(i)];
        for (std::int64_t j = 0; j < of.m; ++j) {
          long double relative;
          const long double p = weight(one, i, j, relative);
          // What is absent has no error.
          const long double smallest = relative == 0 ? 0 : kSmallest;
          const auto key = static_cast<std::size_t>(j);
          const long double pg = p == 0 ? 0 : p * g;
          const long double small_g = std::isfinite(g) ? smallest * std::abs(g) : 0;
          of_weights[key].add(pg, relative, small_g, 1);
          for (std::size_t k = 0; k < d; ++k) {
            const auto element = static_cast<std::int64_t>(k);
            of_query[k].add(p, relative, smallest, one.y_at(j, element));
            of_keys[key * d + k].add(pg, relative, small_g, one.x_at(i, element));
          }
        }
        for (std::size_t k = 0; k < d; ++k) {
          const shape place = joined(b, {i, static_cast<std::int64_t>(k)});
          compare("grad_x", grad_x(place), of_query[k], of.m, false,
                  one.log_z_at(i) == -kInfinity ? 0 : g, place);
        }
      }
      for (std::size_t j = 0; j < m; ++j) {
        const shape place = joined(b, {static_cast<std::int64_t>(j)});
        compare("grad_log_weights", grad_log_weights(place), of_weights[j], of.n, true, 1, place);
        for (std::size_t k = 0; k < d; ++k) {
          const shape element = joined(place, {static_cast<std::int64_t>(k)});
          compare("grad_y", grad_y(element), of_keys[j * d + k], of.n, false, 1, element);
        }
      }
    });
    SUBQUAD_CHECK(grad_x.gaps_untouched());
    SUBQUAD_CHECK(grad_y.gaps_untouched());
    SUBQUAD_CHECK(grad_log_weights.gaps_untouched());
  }

  void run_and_check() const {
    run();
    check();
  }

  mutable double worst = 0;  // error over bound
};

double worst = 0;

// Random values, a key without weight that holds NaN, one of infinity.
template <class S>
void random(form f) {
  problem<S> each(f);
  each.run_and_check();
  worst = std::max(worst, each.worst);
}

template <class S>
void sizes() {
  for (const std::int64_t d : {0, 1, 3, 16, 17, 32, 33, 64, 65, 130}) random<S>({5, 7, d});
  for (const std::int64_t d : {0, 2}) {
    random<S>({1, 1, d});
    random<S>({1, 150, d});
    random<S>({150, 1, d});
  }
  for (const std::int64_t n : {63, 64, 65, 128, 129}) random<S>({n, 190 - n, 8});
  random<S>({129, 193, 34});
  random<S>({0, 4, 3});
  random<S>({4, 0, 3});
  random<S>({4, 5, 3, {0}, {0}, {0}, {}, {}, {}});
  form few = {7, 90, 20};
  few.scale = 20;  // far from uniform
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
    form f = {34, 66, 67};
    f.inputs = each;
    f.outputs = each;
    random<S>(f);
  }
  form f = {6, 100, 8, {2, 3}, {2, 3}, {3}, {2, 1}, {2, 3}, {1, 3}};
  random<S>(f);
  f.inputs = layout::spread;
  f.outputs = layout::transposed;
  random<S>(f);
  f = {6, 9, 8, {3}, {3}, {3}, {3}, {3}, {3}};
  f.inputs = layout::repeated;
  random<S>(f);
  // Of the batch, only the gradient.
  f = {4, 5, 3, {4}, {}, {}, {}, {}, {4}};
  random<S>(f);
}

template <class S>
void optional_outputs() {
  // Sums of which one pass is cut and the other is not, one and two blocks across.
  for (const form& f : {form{3, 70, 66}, form{130, 5, 3}}) {
    const problem<S> all(f);
    all.run();
    for (int which = 0; which < 8; ++which) {
      const problem<S> some(f);
      some.run(which & 1, which & 2, which & 4);
      const auto compare = [&](const auto& given, const auto& expected, bool wanted) {
        given.each([&](auto& element, const shape& at) {
          // What is not asked for stays as it was: all bits set.
          using value = std::decay_t<decltype(element)>;
          value untouched;
          std::memset(&untouched, 0xff, sizeof(untouched));
          const value& other = wanted ? expected(at) : untouched;
          SUBQUAD_CHECK(std::memcmp(&element, &other, sizeof(value)) == 0);
        });
      };
      compare(some.grad_x, all.grad_x, which & 1);
      compare(some.grad_y, all.grad_y, which & 2);
      compare(some.grad_log_weights, all.grad_log_weights, which & 4);
    }
  }
}

template <class S>
void set(const strided_array<S>& array, const shape& at, double value) {
  array(at) = rounded<S>(value);
}

// Sums that are exact tile by tile and lose every 1 in order: rows that are settled show, which
// they must be neither for what counts for nothing nor for anything that a barrier would have
// given. A batch of 265 leaves columns uncut, so that sums go on from tile to tile.
template <class S>
void unsettled(const shape& batch) {
  constexpr std::int64_t kCount = 96;  // two tiles
  const double large = sizeof(arithmetic_t<S>) == 8 ? 0x1p53 : 0x1p24;
  problem<S> each({kCount, kCount, 2, batch, batch, {}, {}, {}, {}});
  // All scores are 0.
  const auto is_absent = [](std::int64_t i) { return i == 5 || i == 50 || i == 51; };
  const auto fill = [&](S& element, std::int64_t i, bool counts) {
    element = rounded<S>(is_absent(i) ? kNan : !counts ? 0.0 : i == 0 ? large : 1.0 * (i >= 48));
  };
  each.x.each([&](S& e, const shape& at) { fill(e, at[at.size() - 2], at.back() == 0); });
  each.y.each([&](S& e, const shape& at) { fill(e, at[at.size() - 2], at.back() == 1); });
  each.log_weights.each(
      [&](auto& e, const shape& at) { e = is_absent(at[0]) ? -kFloatInfinity : 0; });
  each.log_z.each([&](auto& e, const shape& at) { e = is_absent(at[0]) ? -kFloatInfinity : 0; });
  each.grad.each([](auto& e, const shape&) { e = 1; });
  each.excluded.each([](std::int64_t& e, const shape& at) { e = (90 + at[0]) % kCount; });
  each.run();
  const auto expected = [&](std::int64_t left_out) {
    double sum = 0;
    for (std::int64_t i = 0; i < kCount; ++i) {
      if (!is_absent(i) && i != left_out) sum += i >= 48;
    }
    return sum + (left_out == 0 ? 0 : large);
  };
  each.grad_x.each([&](auto& found, const shape& at) {
    const std::int64_t i = at[at.size() - 2];
    using sum = std::decay_t<decltype(found)>;
    const bool counts = at.back() == 1 && !is_absent(i);
    SUBQUAD_CHECK(found == (counts ? static_cast<sum>(expected((90 + i) % kCount)) : 0));
  });
  each.grad_y.each([&](auto& found, const shape& at) {
    const std::int64_t j = at[at.size() - 2];
    using sum = std::decay_t<decltype(found)>;
    const bool counts = at.back() == 0 && !is_absent(j);
    SUBQUAD_CHECK(found == (counts ? static_cast<sum>(expected((j + 6) % kCount)) : 0));
  });
}

// What counts for nothing may hold anything.
template <class S>
void absent(std::int64_t n, std::int64_t m, std::int64_t d) {
  for (const double held : {kNan, kInfinity, -kInfinity}) {
    problem<S> each({n, m, d});
    for (std::int64_t j = 0; j < m; j += 3) {
      set(each.log_weights, {j}, -kInfinity);
      for (std::int64_t k = 0; k < d; ++k) set(each.y, {j, k}, held);
    }
    each.find_log_z();
    for (std::int64_t i = 0; i < n; i += 4) {
      set(each.log_z, {i}, -kInfinity);
      set(each.grad, {i}, kNan);
      for (std::int64_t k = 0; k < d; ++k) set(each.x, {i, k}, held);
    }
    each.run_and_check();
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t k = 0; k < d; ++k) {
        SUBQUAD_CHECK(i % 4 == 0 ? each.grad_x({i, k}) == 0 : std::isfinite(each.grad_x({i, k})));
      }
    }
    for (std::int64_t j = 0; j < m; ++j) {
      const auto total = each.grad_log_weights({j});
      SUBQUAD_CHECK(j % 3 == 0 ? total == 0 : std::isfinite(total));
    }
  }
}

// A key is left out by the one query that may not see what it holds.
template <class S>
void left_out() {
  for (const double held : {kNan, kInfinity}) {
    problem<S> each({90, 80, 5});
    set(each.y, {71, 2}, held);
    for (std::int64_t i = 0; i < 90; ++i) each.excluded({i}) = i % 2 ? 71 : -1;
    each.find_log_z();
    each.run_and_check();
    for (std::int64_t i = 0; i < 90; ++i) {
      SUBQUAD_CHECK(std::isfinite(each.grad_x({i, 0})) ==
                    (i % 2 || (std::isinf(held) && number(each.x({i, 2})) < 0)));
    }
  }
  // No keys: nothing is summed, whatever the gradient.
  problem<S> empty({64, 0, 2});
  for (std::int64_t i = 0; i < 64; ++i) set(empty.grad, {i}, kNan);
  for (int order = 0; order < 3; ++order) empty.run_and_check();
  // All queries leave out the same key, and one every key there is.
  problem<S> each({70, 1, 3});
  for (std::int64_t i = 0; i < 70; ++i) each.excluded({i}) = i == 4 ? -1 : 0;
  each.find_log_z();
  each.run_and_check();
  SUBQUAD_CHECK(number(each.grad_log_weights({0})) == number(each.grad({4})));
}

// Infinities and NaN where they count.
template <class S>
void special(std::int64_t n, std::int64_t m, std::int64_t d) {
  const auto with = [&](const std::function<void(problem<S>&)>& change) {
    problem<S> each({n, m, d});
    change(each);
    each.find_log_z();
    each.run_and_check();
  };
  // A key that is infinite in one element: scores are infinite of either sign.
  for (const double held : {kInfinity, -kInfinity}) {
    with([&](problem<S>& p) { set(p.y, {m / 2, d / 2}, held); });
    with([&](problem<S>& p) {
      set(p.y, {m / 2, d / 2}, held);
      for (std::int64_t i = 0; i < n; ++i) {
        set(p.x, {i, d / 2}, held > 0 ? -1.0 : 1.0);  // all -inf
      }
      set(p.grad, {n / 2}, kNan);
    });
    with([&](problem<S>& p) { set(p.x, {n / 2, d / 2}, held); });
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
  with([&](problem<S>& p) { set(p.grad, {n / 2}, kNan); });
  with([&](problem<S>& p) { set(p.grad, {n / 2}, 0.0); });
  // A sum that overflowed although no score is infinite.
  problem<S> each({n, m, d});
  set(each.log_z, {n / 2}, kInfinity);
  set(each.log_z, {0}, kNan);
  each.run_and_check();
  SUBQUAD_CHECK(number(each.grad_x({n / 2, 0})) == 0);
}

// Scores that overflow downwards, and elements that round to infinity in tf32.
void large() {
  problem<float> each({9, 70, 4});
  set(each.y, {3, 1}, 1e30);
  for (std::int64_t i = 0; i < 9; ++i) set(each.x, {i, 1}, -1e30);
  set(each.y, {5, 2}, 3.4028e38);
  for (std::int64_t i = 0; i < 9; ++i) set(each.x, {i, 2}, 1e-38);
  for (std::int64_t j = 0; j < 70; ++j) {
    if (j != 3) set(each.y, {j, 1}, 0.0);
  }
  each.find_log_z();
  each.run_and_check();
}

// The same bits in every order of threads and blocks.
template <class S>
void orders() {
  const form f = {70, 130, 66};
  const problem<S> first(f);
  first.run();
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    const problem<S> next(f);
    next.run();
    const auto compare = [](const auto& a, const auto& b) {
      a.each([&](auto& element, const shape& at) {
        SUBQUAD_CHECK(std::memcmp(&element, &b(at), sizeof(element)) == 0);
      });
    };
    compare(first.grad_x, next.grad_x);
    compare(first.grad_y, next.grad_y);
    compare(first.grad_log_weights, next.grad_log_weights);
  }
  set_order(order::each_in_turn);
}

void workspaces() {
  // Below 36 MiB, whatever the shapes.
  for (const std::int64_t itemsize : {2, 4, 8}) {
    for (std::int64_t n = 1; n < 1 << 24; n *= 5) {
      for (std::int64_t m = 1; m < 1 << 24; m *= 7) {
        for (const std::int64_t d : {1, 64, 65, 128, 1000}) {
          for (const std::int64_t batch : {1, 3, 100}) {
            SUBQUAD_CHECK(subquad::core::log_normalizer_vjp_workspace(batch, n, m, d, itemsize) <
                          std::size_t{36} << 20);
          }
        }
      }
    }
  }
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [] {
        const problem<float> each({3, 200, 4});
        const strided_array<std::uint8_t> memory({100});
        const array_view views[] = {each.grad.view(), each.x.view(), each.y.view(),
                                    each.log_z.view(), each.grad_x.view()};
        subquad::core::log_normalizer_vjp(views[0], views[1], views[2], nullptr, nullptr, views[3],
                                          &views[4], nullptr, nullptr, memory.view());
      },
      "workspace"));
}

template <class S>
void of_storage(const char* name) {
  worst = 0;
  sizes<S>();
  layouts<S>();
  optional_outputs<S>();
  absent<S>(9, 130, 5);
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
  special<float>(9, 133, 66);
  special<double>(133, 9, 3);
  unsettled<float>({265});
  unsettled<float>({});
  unsettled<double>({});
  unsettled<bfloat16>({});
  orders<float>();
  orders<double>();
  large();
  workspaces();
  return checks::status();
}
