// nearest_centroids on the host executor, against long double.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/indexed.hpp"
#include "normalizers_core.hpp"
#include "subquad/errors.hpp"

using namespace subquad;
using namespace subquad::cuda::on_host;

namespace {

template <class T>
struct problem {
  std::int64_t n;
  std::int64_t k;
  std::int64_t d;
  indexed_array<T> x;
  indexed_array<T> centroids;
  indexed_array<T> offsets;
  indexed_array<std::int64_t> labels;
  indexed_array<T> score;

  problem(std::int64_t n_, std::int64_t k_, std::int64_t d_, layout how = layout::contiguous)
      : n(n_),
        k(k_),
        d(d_),
        x({n_, d_}, how),
        centroids({k_, d_}, how),
        offsets({k_}, how),
        labels({n_}, for_outputs(how)),
        score({n_}, for_outputs(how)) {}

  template <class F>
  void fill(F&& value) {
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t t = 0; t < d; ++t) x(i, t) = static_cast<T>(value());
    }
    for (std::int64_t c = 0; c < k; ++c) {
      for (std::int64_t t = 0; t < d; ++t) centroids(c, t) = static_cast<T>(value());
      offsets(c) = static_cast<T>(value());
    }
  }

  void run() const {
    const std::size_t bytes =
        core::nearest_centroids_workspace(n, k, d, static_cast<std::int64_t>(sizeof(T)));
    const device_array<std::uint8_t> workspace({static_cast<std::int64_t>(bytes)});
    core::nearest_centroids(x.view(), centroids.view(), offsets.view(), labels.view(), score.view(),
                            workspace.view());
  }

  long double exact(std::int64_t i, std::int64_t c) const {
    long double sum = offsets(c);
    for (std::int64_t t = 0; t < d; ++t) {
      sum += static_cast<long double>(x(i, t)) * static_cast<long double>(centroids(c, t));
    }
    return sum;
  }
  // How far a computed score may be off: tile_product's bound, and the addition of the offset.
  long double bound(std::int64_t i, std::int64_t c) const {
    long double magnitude = 0;
    for (std::int64_t t = 0; t < d; ++t) {
      magnitude +=
          std::fabs(static_cast<long double>(x(i, t)) * static_cast<long double>(centroids(c, t)));
    }
    const long double unit = std::numeric_limits<T>::epsilon() / 2;
    const auto depth = static_cast<long double>(d);
    const long double relative = sizeof(T) == 4 ? (depth / 8 + 13) * 4 * unit : depth * unit;
    return relative * magnitude +
           2 * unit * (magnitude + std::fabs(static_cast<long double>(offsets(c))));
  }

  // The score belongs to the label, and no other label is better than rounding may hide.
  bool row_is_right(std::int64_t i) const {
    const std::int64_t label = labels(i);
    if (label < 0 || label >= k) return false;
    if (!(std::fabs(score(i) - exact(i, label)) <= bound(i, label))) return false;
    for (std::int64_t c = 0; c < k; ++c) {
      if (exact(i, c) - exact(i, label) > bound(i, c) + bound(i, label)) return false;
    }
    return true;
  }
};

template <class T>
void check_random(std::int64_t n, std::int64_t k, std::int64_t d, layout how) {
  std::mt19937 engine(static_cast<unsigned>(n * 31 + k * 7 + d));
  std::normal_distribution<double> normal;
  problem<T> p(n, k, d, how);
  p.fill([&] { return normal(engine); });
  p.run();
  bool right = true;
  for (std::int64_t i = 0; i < n; ++i) right = right && p.row_is_right(i);
  if (!right) std::printf("n=%ld k=%ld d=%ld layout %d\n", n, k, d, static_cast<int>(how));
  SUBQUAD_CHECK(right);
  SUBQUAD_CHECK(p.labels.gaps_untouched());
  SUBQUAD_CHECK(p.score.gaps_untouched());
}

// Small integers: every score is exact, and many are equal.
template <class T>
void check_ties(std::int64_t n, std::int64_t k, std::int64_t d) {
  std::mt19937 engine(5);
  std::uniform_int_distribution<int> digit(-1, 1);
  problem<T> p(n, k, d);
  p.fill([&] { return digit(engine); });
  p.run();
  bool right = true;
  for (std::int64_t i = 0; i < n; ++i) {
    std::int64_t best = 0;
    for (std::int64_t c = 1; c < k; ++c) {
      if (p.exact(i, c) > p.exact(i, best)) best = c;
    }
    right = right && p.labels(i) == best && p.score(i) == static_cast<T>(p.exact(i, best));
  }
  SUBQUAD_CHECK(right);
}

// Infinities, NaN and numbers that only the split cannot hold.
template <class T>
void check_semantics(std::int64_t k) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  constexpr T kMax = std::numeric_limits<T>::max();
  const std::int64_t n = 140;
  const std::int64_t d = 5;
  problem<T> p(n, k, d);
  std::mt19937 engine(9);
  std::normal_distribution<double> normal;
  p.fill([&] { return normal(engine); });
  for (std::int64_t t = 0; t < d; ++t) p.x(1, t) = kNaN;
  p.x(2, 3) = kInfinity;
  p.x(3, 3) = -kInfinity;
  p.x(4, 0) = kMax;
  for (std::int64_t t = 1; t < d; ++t) p.x(4, t) = 0;
  // Of no label: a row that holds NaN, and offsets below everything.
  p.centroids(k / 2, 1) = kNaN;
  p.offsets(k / 3) = -kInfinity;
  p.centroids(k / 3, 2) = kInfinity;
  p.offsets(k / 4) = kNaN;
  const std::int64_t large = 2 * k / 3;
  p.centroids(large, 1) = kInfinity;
  const auto is_open = [&](std::int64_t c) {
    return c != k / 2 && c != k / 3 && c != k / 4 && c != large;
  };
  for (std::int64_t c = 0; c < k; ++c) {
    if (is_open(c)) p.centroids(c, 3) = c % 2 ? 1 : -1;
  }
  p.centroids(large, 3) = 0;  // inf * 0 is NaN
  const std::int64_t with_max = k - 1;
  p.centroids(with_max, 0) = static_cast<T>(0.4);
  for (std::int64_t c = 0; c < k; ++c) {
    if (is_open(c) && c != with_max) p.centroids(c, 0) = static_cast<T>(-0.25);
  }
  p.centroids(large, 0) = 0;
  p.x(5, 1) = 2;   // + inf from centroid `large`
  p.x(6, 1) = -2;  // - inf
  p.run();
  SUBQUAD_CHECK(p.labels(1) == 0);
  SUBQUAD_CHECK(p.score(1) == -kInfinity);
  std::int64_t first_odd = 0;
  std::int64_t first_even = 0;
  while (!is_open(first_odd) || first_odd % 2 == 0) ++first_odd;
  while (!is_open(first_even) || first_even % 2 == 1) ++first_even;
  SUBQUAD_CHECK(p.labels(2) == first_odd);
  SUBQUAD_CHECK(p.score(2) == kInfinity);
  SUBQUAD_CHECK(p.labels(3) == first_even);
  SUBQUAD_CHECK(p.score(3) == kInfinity);
  SUBQUAD_CHECK(p.labels(4) == with_max);
  SUBQUAD_CHECK(std::fabs(p.score(4) / kMax - T(0.4)) < T(1e-6));
  SUBQUAD_CHECK(p.labels(5) == large);
  SUBQUAD_CHECK(p.score(5) == kInfinity);
  SUBQUAD_CHECK(is_open(p.labels(6)));
  SUBQUAD_CHECK(std::isfinite(p.score(6)));
  for (std::int64_t i = 6; i < n; ++i) {
    const long double other = p.exact(i, large);
    if (other == kInfinity) {
      SUBQUAD_CHECK(p.labels(i) == large && p.score(i) == kInfinity);
      continue;
    }
    const std::int64_t label = p.labels(i);
    SUBQUAD_CHECK(is_open(label));
    SUBQUAD_CHECK(std::fabs(p.score(i) - p.exact(i, label)) <= p.bound(i, label));
    bool best = true;
    for (std::int64_t c = 0; c < k; ++c) {
      if (!is_open(c)) continue;
      best = best && p.exact(i, c) - p.exact(i, label) <= p.bound(i, c) + p.bound(i, label);
    }
    SUBQUAD_CHECK(best);
  }

  // Nothing above -inf.
  for (std::int64_t c = 0; c < k; ++c) p.offsets(c) = -kInfinity;
  p.run();
  for (std::int64_t i = 0; i < n; ++i) {
    SUBQUAD_CHECK(p.labels(i) == 0 && p.score(i) == -kInfinity);
  }
}

void check_errors() {
  problem<float> p(3, 2, 4);
  const device_array<std::uint8_t> workspace({4096});
  const indexed_array<float> wide({2, 5});
  SUBQUAD_CHECK(checks::throws<invalid_argument>(
      [&] {
        core::nearest_centroids(p.x.view(), wide.view(), p.offsets.view(), p.labels.view(),
                                p.score.view(), workspace.view());
      },
      "centroids: expected shape (k, 4) with k >= 1, got (2, 5)"));
  const indexed_array<double> doubles({2});
  SUBQUAD_CHECK(checks::throws<type_error>(
      [&] {
        core::nearest_centroids(p.x.view(), p.centroids.view(), doubles.view(), p.labels.view(),
                                p.score.view(), workspace.view());
      },
      "offsets: expected float32, got float64"));
}

// What shows threads in a wrong order.
template <class T>
void check_some() {
  check_random<T>(131, 99, 33, layout::contiguous);
  check_random<T>(17, 200, 65, layout::unaligned);
  check_ties<T>(200, 300, 3);
  check_semantics<T>(13);
}

template <class T>
void check_all() {
  for (const layout how : kLayouts) {
    check_random<T>(131, 99, 33, how);
    check_random<T>(3, 5, 1, how);
  }
  for (const std::int64_t k : {1, 5, 64, 65, 96, 97, 300}) {
    for (const std::int64_t d : {1, 3, 64, 65}) {
      check_random<T>(k == 300 ? 129 : 17, k, d, layout::contiguous);
    }
  }
  check_random<T>(5, 300, 130, layout::unaligned);
  check_random<T>(128, 7, 0, layout::contiguous);
  check_random<T>(0, 7, 3, layout::contiguous);
  check_ties<T>(200, 300, 3);
  check_ties<T>(40, 97, 8);
  for (const std::int64_t k : {13, 300}) check_semantics<T>(k);
}

}  // namespace

int main() {
  in_every_order([] { check_all<float>(), check_all<double>(); },
                 [] { check_some<float>(), check_some<double>(); });
  check_errors();
  return checks::status();
}
