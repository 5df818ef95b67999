// sample_residuals on the host executor, against long double.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/indexed.hpp"
#include "normalizers_core.hpp"
#include "subquad/errors.hpp"

using namespace subquad;
using namespace subquad::cuda::on_host;

namespace {

// What one row and component should give, and how far each result may be off.
struct expectation {
  long double log_factor;
  long double log_factor_bound;
  long double common;
  long double spread;  // sqrt(sum (r - mean r)^2) e^-common
  long double spread_bound;
  std::int64_t number;
  long double third;
  long double third_bound;
};

template <class T>
struct problem {
  std::int64_t n;
  std::int64_t d;
  std::vector<std::int64_t> sizes;
  std::int64_t k;
  std::int64_t s;
  indexed_array<T> x;
  indexed_array<T> deviations;
  indexed_array<T> weights;
  indexed_array<std::int64_t> offsets;
  indexed_array<T> variance;
  indexed_array<T> scale;
  indexed_array<T> shift;
  indexed_array<std::int64_t> excluded;
  bool has_shift = true;
  bool has_excluded = true;
  bool quadratic = false;
  indexed_array<T> log_factor;
  indexed_array<T> log_error;
  indexed_array<T> third;

  static std::int64_t total(const std::vector<std::int64_t>& sizes) {
    std::int64_t sum = 0;
    for (const std::int64_t size : sizes) sum += size;
    return sum;
  }

  problem(std::int64_t n_, std::int64_t d_, std::vector<std::int64_t> sizes_,
          layout how = layout::contiguous)
      : n(n_),
        d(d_),
        sizes(std::move(sizes_)),
        k(static_cast<std::int64_t>(sizes.size())),
        s(total(sizes)),
        x({n, d}, how),
        deviations({s, d}, how),
        weights({s}, how),
        offsets({k + 1}, for_outputs(how)),
        variance({n, k}, how),
        scale({n, k}, how),
        shift({n, k}, how),
        excluded({n}, how),
        log_factor({n, k}, for_outputs(how)),
        log_error({n, k}, for_outputs(how)),
        third({n, k}, for_outputs(how)) {
    offsets(0) = 0;
    for (std::int64_t a = 0; a < k; ++a) {
      offsets(a + 1) = offsets(a) + sizes[static_cast<std::size_t>(a)];
    }
  }

  // Scores t of about `size`.
  void fill(double size, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    const double each = size / std::sqrt(static_cast<double>(d > 0 ? d : 1));
    for (std::int64_t j = 0; j < s; ++j) {
      for (std::int64_t t = 0; t < d; ++t) deviations(j, t) = static_cast<T>(normal(engine));
      weights(j) = static_cast<T>(0.5 + std::fabs(normal(engine)));
    }
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t t = 0; t < d; ++t) x(i, t) = static_cast<T>(each * normal(engine));
      for (std::int64_t a = 0; a < k; ++a) {
        variance(i, a) = static_cast<T>(size * size * (0.5 + std::fabs(normal(engine))));
        scale(i, a) = static_cast<T>(0.1 + 0.05 * std::fabs(normal(engine)));
        shift(i, a) = static_cast<T>(0.1 * size * normal(engine));
      }
      // Of some component, or of none.
      excluded(i) = static_cast<std::int64_t>(engine() % static_cast<unsigned>(s + 2)) - 1;
    }
  }

  void run() const {
    const std::size_t bytes =
        core::sample_residuals_workspace(n, d, s, static_cast<std::int64_t>(sizeof(T)));
    const device_array<std::uint8_t> workspace({static_cast<std::int64_t>(bytes)});
    const array_view shift_view = shift.view();
    const array_view excluded_view = excluded.view();
    core::sample_residuals(x.view(), deviations.view(), weights.view(), offsets.view(),
                           variance.view(), scale.view(), has_shift ? &shift_view : nullptr,
                           has_excluded ? &excluded_view : nullptr, quadratic, log_factor.view(),
                           log_error.view(), third.view(), workspace.view());
  }

  long double score(std::int64_t i, std::int64_t a, std::int64_t j) const {
    long double t = has_shift ? static_cast<long double>(shift(i, a)) : 0;
    for (std::int64_t u = 0; u < d; ++u) {
      t += static_cast<long double>(x(i, u)) * static_cast<long double>(deviations(j, u));
    }
    return t;
  }

  // Formulas of c_api.h. Bounds: of a score, tile_product's; of a term, the error of its score and
  // the roundings of its operations; of sums, one rounding for each addition that a term sees.
  expectation expect(std::int64_t i, std::int64_t a) const {
    const long double unit = std::numeric_limits<T>::epsilon() / 2;
    const auto depth = static_cast<long double>(d);
    const long double half = static_cast<long double>(variance(i, a)) / 2;
    const auto factor = static_cast<long double>(scale(i, a));
    std::vector<long double> terms;
    std::vector<long double> errors;
    long double peak = 0;
    for (std::int64_t j = offsets(a); j < offsets(a + 1); ++j) {
      if (!(has_excluded && excluded(i) == j)) peak = std::fmax(peak, score(i, a, j) - half);
    }
    expectation e{};
    e.common = peak > 1 ? peak : 0;
    const long double small = std::exp(-e.common);
    long double weight_sum = 0;
    long double weight_size = 0;
    long double cubes = 0;
    long double cubes_error = 0;
    long double cubes_size = 0;
    for (std::int64_t j = offsets(a); j < offsets(a + 1); ++j) {
      if (has_excluded && excluded(i) == j) continue;
      const long double t = score(i, a, j);
      const auto weight = static_cast<long double>(weights(j));
      long double magnitude = 0;
      for (std::int64_t u = 0; u < d; ++u) {
        magnitude += std::fabs(static_cast<long double>(x(i, u)) *
                               static_cast<long double>(deviations(j, u)));
      }
      const long double error =
          (sizeof(T) == 4 ? (depth / 8 + 13) * 4 : depth + 2) * unit * magnitude +
          unit * (std::fabs(t) + magnitude);
      const long double argument = t - half - e.common;
      const long double power = std::exp(argument);
      const long double control = 1 + t + (quadratic ? t * t / 2 - half : 0);
      const long double control_size =
          1 + std::fabs(t) + (quadratic ? t * t / 2 + std::fabs(half) : 0);
      const long double slope = quadratic ? 1 + std::fabs(t) : 1;
      const long double term = weight * (power - control * small);
      terms.push_back(term);
      errors.push_back(
          std::fabs(weight) *
              (power * (error + unit * (std::fabs(t - half) + 3 * std::fabs(argument) + 4)) +
               small * (slope * error + (8 + 2 * e.common) * unit * control_size)) +
          2 * unit * std::fabs(term));
      weight_sum += weight;
      weight_size += std::fabs(weight);
      const long double cube = std::fabs(t * t * t);
      cubes += weight * t * t * t;
      cubes_error +=
          std::fabs(weight) * (3 * error * (std::fabs(t) + error) * (std::fabs(t) + error));
      cubes_size += std::fabs(weight) * cube;
    }
    e.number = static_cast<std::int64_t>(terms.size());
    if (e.number == 0) return e;
    const auto number = static_cast<long double>(e.number);
    // A term is added to those of a thread's tile, then merged with those of tiles and threads;
    // each merge may scale.
    const long double merges = number / 64 + 10;
    const long double additions = 10 + merges * 8 + 2 * e.common;
    long double sum = 0;
    long double size = 0;
    long double error = 0;
    for (std::size_t j = 0; j < terms.size(); ++j) {
      sum += terms[j];
      size += std::fabs(terms[j]);
      error += errors[j];
    }
    const long double mean = sum / number;
    const long double mean_error = (error + additions * unit * size) / number;
    long double square = 0;
    long double square_error = 0;
    for (std::size_t j = 0; j < terms.size(); ++j) {
      square += (terms[j] - mean) * (terms[j] - mean);
      const long double each =
          errors[j] + 3 * unit * std::fabs(terms[j]) + additions * unit * size / number;
      square_error += each * each;
    }
    e.spread = std::sqrt(square);
    e.spread_bound = std::sqrt(square_error) + additions * unit * e.spread;
    const long double inner = small + factor * mean;
    const long double inner_error =
        factor * mean_error + unit * ((2 * e.common + 6) * small + 3 * std::fabs(factor * mean));
    e.log_factor = e.common + std::log(inner);
    e.log_factor_bound =
        inner_error / (inner - inner_error) + 4 * unit * (std::fabs(e.log_factor) + 2 * e.common);
    if (!(inner > 0)) e.log_factor = std::numeric_limits<long double>::quiet_NaN();
    const long double divisor = weight_sum == 0 ? 1 : weight_sum;
    e.third = cubes / divisor;
    e.third_bound = (cubes_error + (additions + 4) * unit * cubes_size) / std::fabs(divisor) +
                    additions * unit * weight_size / std::fabs(divisor) * std::fabs(e.third);
    return e;
  }

  bool is_right(std::int64_t i, std::int64_t a) const {
    const expectation e = expect(i, a);
    if (e.number == 0) {
      return log_factor(i, a) == 0 && log_error(i, a) == -std::numeric_limits<T>::infinity() &&
             third(i, a) == 0;
    }
    const long double unit = std::numeric_limits<T>::epsilon() / 2;
    bool right = e.log_factor == e.log_factor
                     ? std::fabs(log_factor(i, a) - e.log_factor) <= e.log_factor_bound
                     : log_factor(i, a) != log_factor(i, a);
    right = right && std::fabs(third(i, a) - e.third) <= e.third_bound;
    if (e.number == 1) {
      return right && log_error(i, a) == -std::numeric_limits<T>::infinity();
    }
    const auto number = static_cast<long double>(e.number);
    const auto factor = static_cast<long double>(scale(i, a));
    const auto got_log = static_cast<long double>(log_error(i, a));
    const long double got =
        std::exp(got_log - e.common - std::log(factor)) * std::sqrt(number * (number - 1));
    if (got == 0) return right && e.spread <= e.spread_bound;
    const long double rounding =
        8 * unit * (std::fabs(got_log) + 2 * e.common + std::fabs(std::log(factor)) + 1);
    return right && std::fabs(got - e.spread) <= e.spread_bound + rounding * got;
  }

  void check(const char* what) const {
    run();
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t a = 0; a < k; ++a) {
        if (is_right(i, a)) continue;
        if (++wrong > 1) continue;
        const expectation e = expect(i, a);
        std::printf(
            "%s, %d bytes: n=%ld d=%ld, row %ld of component %ld (%ld samples): %g for %Lg"
            " (%Lg), error %g, third %g for %Lg (%Lg)\n",
            what, static_cast<int>(sizeof(T)), n, d, i, a, e.number,
            static_cast<double>(log_factor(i, a)), e.log_factor, e.log_factor_bound,
            static_cast<double>(log_error(i, a)), static_cast<double>(third(i, a)), e.third,
            e.third_bound);
      }
    }
    SUBQUAD_CHECK(wrong == 0);
    SUBQUAD_CHECK(log_factor.gaps_untouched());
    SUBQUAD_CHECK(log_error.gaps_untouched());
    SUBQUAD_CHECK(third.gaps_untouched());
  }
};

template <class T>
void check_random(std::int64_t n, std::int64_t d, std::vector<std::int64_t> sizes, double size,
                  layout how = layout::contiguous) {
  problem<T> p(n, d, std::move(sizes), how);
  p.fill(size, static_cast<unsigned>(n + 7 * d));
  for (const int options : {0, 1, 2, 3}) {
    if (how != layout::contiguous && options % 3 != 0) continue;
    p.quadratic = options % 2 != 0;
    p.has_shift = options >= 2;
    p.has_excluded = options >= 2;
    p.check("random");
  }
}

// Exponents that overflow alone, in samples of later tiles too.
template <class T>
void check_large() {
  problem<T> p(3, 2, {200, 3});
  p.fill(0.5, 3);
  const long double large = sizeof(T) == 4 ? 300 : 3000;
  for (std::int64_t i = 0; i < p.n; ++i) {
    p.x(i, 0) = 1;
    p.x(i, 1) = 0;
    p.excluded(i) = i == 2 ? 150 : -1;
  }
  p.deviations(10, 0) = 5;
  p.deviations(150, 0) = static_cast<T>(large);
  p.deviations(151, 0) = static_cast<T>(large / 2);
  p.deviations(199, 0) = static_cast<T>(large - 1);
  for (const bool quadratic : {false, true}) {
    p.quadratic = quadratic;
    p.check("large");
    SUBQUAD_CHECK(p.log_factor(0, 0) > T(large) / 2);
  }
}

template <class T>
void check_semantics() {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  problem<T> p(6, 3, {5, 0, 1, 70});
  p.fill(0.3, 5);
  for (std::int64_t i = 0; i < p.n; ++i) p.excluded(i) = i == 1 ? 2 : i == 2 ? 5 : -1;
  // Without samples, with one, and with one that the row leaves out.
  p.run();
  for (std::int64_t i = 0; i < p.n; ++i) SUBQUAD_CHECK(p.is_right(i, 1) && p.is_right(i, 2));
  SUBQUAD_CHECK(p.log_factor(2, 2) == 0 && p.third(2, 2) == 0);
  // NaN reaches what depends on it.
  p.deviations(2, 1) = kNaN;
  p.x(3, 0) = kNaN;
  p.scale(4, 3) = -1000;
  p.run();
  for (std::int64_t i = 0; i < p.n; ++i) {
    for (std::int64_t a = 0; a < p.k; ++a) {
      const bool is_nan = (a == 0 && i != 1) || (i == 3 && a != 1);
      if (is_nan) {
        SUBQUAD_CHECK(p.log_factor(i, a) != p.log_factor(i, a));
        SUBQUAD_CHECK(p.third(i, a) != p.third(i, a));
      } else if (i == 4 && a == 3) {
        SUBQUAD_CHECK(p.third(i, a) == p.third(i, a));
      } else {
        SUBQUAD_CHECK(p.is_right(i, a));
      }
    }
  }
  // 1 + scale mean r = 0 has no logarithm.
  problem<T> zero(1, 1, {1});
  zero.fill(0, 4);
  zero.has_excluded = false;
  zero.weights(0) = zero.scale(0, 0) = T(1);
  zero.variance(0, 0) = T(1e5);
  zero.shift(0, 0) = T(0);
  zero.run();
  SUBQUAD_CHECK(zero.log_factor(0, 0) != zero.log_factor(0, 0));
  // A score of - inf makes its residual infinite; one of - huge, which the split cannot hold, does
  // not.
  p.fill(0.3, 6);
  p.x(0, 0) = kInfinity;
  p.x(1, 0) = -std::numeric_limits<T>::max();
  for (std::int64_t j = 0; j < p.s; ++j) p.deviations(j, 0) = 0;
  p.deviations(20, 0) = static_cast<T>(1e-30);
  p.has_excluded = false;
  p.run();
  for (std::int64_t a = 0; a < p.k; ++a) {
    if (a != 1) SUBQUAD_CHECK(p.log_factor(0, a) != p.log_factor(0, a));  // inf * 0
    if (a != 3) SUBQUAD_CHECK(p.is_right(1, a));
  }
  const long double huge = p.score(1, 3, 20);
  const long double mean = static_cast<long double>(p.weights(20)) * -huge / 70 *
                           static_cast<long double>(p.scale(1, 3));
  SUBQUAD_CHECK(std::fabs(static_cast<long double>(p.log_factor(1, 3)) / std::log(mean) - 1) <
                1e-5L);
  for (std::int64_t j = 0; j < p.s; ++j) p.deviations(j, 0) = j == 20 ? T(-1) : T(1e-38);
  p.x(0, 0) = 0;
  p.x(1, 0) = kInfinity;
  p.x(2, 0) = 0;
  p.run();
  SUBQUAD_CHECK(p.is_right(0, 3) && p.is_right(2, 3));
  SUBQUAD_CHECK(!std::isfinite(p.log_factor(1, 3)));
}

void check_errors() {
  problem<float> p(3, 2, {4});
  const device_array<std::uint8_t> workspace({64});
  const indexed_array<float> narrow({3, 2});
  SUBQUAD_CHECK(checks::throws<invalid_argument>(
      [&] {
        core::sample_residuals(p.x.view(), p.deviations.view(), p.weights.view(), p.offsets.view(),
                               narrow.view(), p.scale.view(), nullptr, nullptr, false,
                               p.log_factor.view(), p.log_error.view(), p.third.view(),
                               workspace.view());
      },
      "variance: expected shape (n, k) = (3, 1), got (3, 2)"));
}

// What shows threads in a wrong order.
template <class T>
void check_some() {
  check_random<T>(70, 33, {66, 5}, 0.5);
  check_large<T>();
  check_semantics<T>();
}

template <class T>
void check_all() {
  for (const layout how : kLayouts) check_random<T>(20, 5, {3, 70, 1}, 0.4, how);
  for (const std::int64_t d : {0, 1, 3, 64, 65}) check_random<T>(5, d, {2, 65, 0}, 0.5);
  check_random<T>(130, 33, {64, 5}, 0.5);
  check_random<T>(4, 130, {300}, 0.5);
  check_random<T>(9, 4, std::vector<std::int64_t>(40, 2), 1.5);
  check_random<T>(3, 8, {130, 20}, 3);
  check_random<T>(0, 3, {2}, 1);
  check_large<T>();
  check_semantics<T>();
}

}  // namespace

int main() {
  in_every_order([] { check_all<float>(), check_all<double>(); },
                 [] { check_some<float>(), check_some<double>(); });
  check_errors();
  return checks::status();
}
