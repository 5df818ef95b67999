// component_sums, component_scatter and what they are made of on the host executor, against long
// double.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "cuda/gram.cuh"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/indexed.hpp"
#include "normalizers_core.hpp"
#include "subquad/errors.hpp"

using namespace subquad;
using namespace subquad::cuda::on_host;

namespace {

constexpr long double kUnit = 0x1p-53L;

// Whether `got` is `truth` within `bound`, or the infinity or NaN that it is.
bool is_near(double got, long double truth, long double bound) {
  if (truth != truth) return got != got;
  if (std::isinf(truth)) return static_cast<long double>(got) == truth;
  return std::fabs(got - truth) <= bound;
}

// How far a sum in T-made terms may be off, in units of the sum of their magnitudes.
template <class T>
long double gram_bound(std::int64_t rows, std::int64_t parts) {
  const auto additions = static_cast<long double>(divide_up(rows, 128) + parts);
  return (sizeof(T) == 4 ? 31 * 0x1p-22L : 133 * kUnit) + additions * kUnit;
}
template <class T>
long double row_sums_bound(std::int64_t rows, std::int64_t parts, int power) {
  const long double unit = std::numeric_limits<T>::epsilon() / 2;
  return (static_cast<long double>(rows) / 8 + static_cast<long double>(parts) + 12) * kUnit +
         (power == 2 ? 2.01L * unit : 0);
}
constexpr std::int64_t parts_of(std::int64_t rows) { return rows / 1024 + 1; }

template <class T>
struct problem {
  std::int64_t n;
  std::int64_t k;
  std::int64_t d;
  indexed_array<T> y;
  indexed_array<std::int64_t> labels;
  indexed_array<T> weights;
  bool has_weights = true;
  indexed_array<double> means;
  indexed_array<double> counts;
  indexed_array<double> sums;
  device_array<double> scatter;
  indexed_array<double> diagonal;
  indexed_array<double> radii;

  problem(std::int64_t n_, std::int64_t k_, std::int64_t d_, layout how = layout::contiguous)
      : n(n_),
        k(k_),
        d(d_),
        y({n_, d_}, how),
        labels({n_}, how),
        weights({n_}, how),
        means({k_, d_}),
        counts({k_}),
        sums({k_, d_}),
        scatter({k_, d_, d_}),
        diagonal({k_, d_}),
        radii({k_}) {}

  template <class Value, class Weight, class Label>
  void fill(Value&& value, Weight&& weight, Label&& label) {
    for (std::int64_t j = 0; j < n; ++j) {
      for (std::int64_t t = 0; t < d; ++t) y(j, t) = static_cast<T>(value());
      weights(j) = static_cast<T>(weight());
      labels(j) = label();
    }
    for (std::int64_t a = 0; a < k; ++a) {
      for (std::int64_t t = 0; t < d; ++t) means(a, t) = static_cast<double>(value());
    }
  }

  void run_sums() const {
    const device_array<std::uint8_t> workspace({static_cast<std::int64_t>(
        core::component_sums_workspace(n, k, d, static_cast<std::int64_t>(sizeof(T))))});
    const array_view w = weights.view();
    core::component_sums(y.view(), labels.view(), has_weights ? &w : nullptr, counts.view(),
                         sums.view(), workspace.view());
  }
  void run_scatter(bool is_diagonal) const {
    const device_array<std::uint8_t> workspace(
        {static_cast<std::int64_t>(core::component_scatter_workspace(
            n, k, d, static_cast<std::int64_t>(sizeof(T)), is_diagonal))});
    const array_view w = weights.view();
    core::component_scatter(y.view(), labels.view(), has_weights ? &w : nullptr, means.view(),
                            is_diagonal ? diagonal.view() : scatter.view(), radii.view(),
                            workspace.view());
  }

  bool counts_for(std::int64_t j, std::int64_t a) const {
    return labels(j) == a && !(has_weights && weights(j) == T(0));
  }
  long double weight(std::int64_t j) const { return has_weights ? weights(j) : T(1); }
  long double centred(std::int64_t j, std::int64_t a, std::int64_t t) const {
    return static_cast<long double>(y(j, t)) - static_cast<long double>(means(a, t));
  }
  std::int64_t rows_of(std::int64_t a) const {
    std::int64_t rows = 0;
    for (std::int64_t j = 0; j < n; ++j) rows += labels(j) == a;
    return rows;
  }

  bool sums_are_right() const {
    bool right = true;
    for (std::int64_t a = 0; a < k; ++a) {
      const std::int64_t rows = rows_of(a);
      const long double bound = row_sums_bound<T>(rows, parts_of(rows), 1);
      long double count = 0;
      long double size = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        if (labels(j) != a) continue;
        count += weight(j);
        size += std::fabs(weight(j));
      }
      right = right && is_near(counts(a), count, bound * size);
      for (std::int64_t t = 0; t < d; ++t) {
        long double sum = 0;
        long double magnitude = 0;
        for (std::int64_t j = 0; j < n; ++j) {
          if (!counts_for(j, a)) continue;
          const long double term = weight(j) * static_cast<long double>(y(j, t));
          sum += term;
          magnitude += std::fabs(term);
        }
        right = right && is_near(sums(a, t), sum, bound * magnitude);
      }
    }
    return right;
  }

  bool entry_is_right(std::int64_t a, std::int64_t s, std::int64_t t, double got,
                      long double bound) const {
    long double sum = 0;
    long double magnitude = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      if (!counts_for(j, a)) continue;
      const long double term = weight(j) * centred(j, a, s) * centred(j, a, t);
      sum += term;
      magnitude += std::fabs(term);
    }
    return is_near(got, sum, bound * magnitude);
  }

  bool scatter_is_right() const {
    bool right = true;
    for (std::int64_t a = 0; a < k; ++a) {
      const std::int64_t rows = rows_of(a);
      const long double bound = gram_bound<T>(rows, parts_of(rows));
      for (std::int64_t s = 0; s < d; ++s) {
        for (std::int64_t t = 0; t <= s; ++t) {
          const double lower = scatter[(a * d + s) * d + t];
          const double upper = scatter[(a * d + t) * d + s];
          right = right && entry_is_right(a, s, t, lower, bound);
          right = right && (lower == upper || (lower != lower && upper != upper));
        }
      }
    }
    return right;
  }
  bool diagonal_is_right() const {
    bool right = true;
    for (std::int64_t a = 0; a < k; ++a) {
      const std::int64_t rows = rows_of(a);
      const long double bound = row_sums_bound<T>(rows, parts_of(rows), 2);
      for (std::int64_t t = 0; t < d; ++t) {
        right = right && entry_is_right(a, t, t, diagonal(a, t), bound);
      }
    }
    return right;
  }
  bool radii_are_right() const {
    bool right = true;
    for (std::int64_t a = 0; a < k; ++a) {
      long double largest = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        if (!counts_for(j, a)) continue;
        long double square = 0;
        for (std::int64_t t = 0; t < d; ++t) square += centred(j, a, t) * centred(j, a, t);
        if (!(square <= largest) && largest == largest) largest = square;
      }
      const long double radius = std::sqrt(largest);
      const auto depth = static_cast<long double>(d);
      right = right && is_near(radii(a), radius, (depth / 32 + 10) * kUnit * radius);
    }
    return right;
  }

  void check(const char* what) const {
    run_sums();
    const bool sums_right = sums_are_right();
    run_scatter(false);
    const bool scatter_right = scatter_is_right() && radii_are_right();
    run_scatter(true);
    const bool diagonal_right = diagonal_is_right() && radii_are_right();
    if (!sums_right || !scatter_right || !diagonal_right) {
      std::printf("%s: n=%ld k=%ld d=%ld, %d bytes\n", what, n, k, d, static_cast<int>(sizeof(T)));
    }
    SUBQUAD_CHECK(sums_right);
    SUBQUAD_CHECK(scatter_right);
    SUBQUAD_CHECK(diagonal_right);
  }
};

// Labels in [0, k) that leave some components empty, and some that no component has.
class random_labels {
 public:
  random_labels(std::int64_t k, unsigned seed, bool out_of_range = true)
      : k_(k), out_of_range_(out_of_range), engine_(seed) {}
  std::int64_t operator()() {
    const auto draw = static_cast<std::int64_t>(engine_());
    if (out_of_range_ && draw % 17 == 0) return draw % 3 == 0 ? -1 : k_ + draw % 2 * 4000000000;
    const std::int64_t label = draw / 17 % k_;
    return k_ > 2 && label == k_ / 2 ? 0 : label;
  }

 private:
  std::int64_t k_;
  bool out_of_range_;
  std::mt19937 engine_;
};

template <class T>
void check_random(std::int64_t n, std::int64_t k, std::int64_t d, layout how, bool has_weights) {
  std::mt19937 engine(static_cast<unsigned>(n + 31 * k + d));
  std::normal_distribution<double> normal;
  problem<T> p(n, k, d, how);
  p.has_weights = has_weights;
  std::int64_t turn = 0;
  p.fill([&] { return 1 + normal(engine); }, [&] { return turn++ % 5 == 0 ? 0.0 : normal(engine); },
         random_labels(k, static_cast<unsigned>(d)));
  p.check("random");
}

// Small integers: results are exact, whatever the order of additions, and no row is lost.
template <class T>
void check_exact(std::int64_t n, std::int64_t k, std::int64_t d, bool with_scatter) {
  std::mt19937 engine(3);
  std::uniform_int_distribution<int> digit(-3, 3);
  problem<T> p(n, k, d);
  p.fill([&] { return digit(engine); }, [&] { return digit(engine); }, random_labels(k, 4));
  p.run_sums();
  std::vector<double> sums(static_cast<std::size_t>(k * (1 + d + d * d)));
  const auto at = [&](std::int64_t a, std::int64_t i) -> double& {
    return sums[static_cast<std::size_t>(a * (1 + d + d * d) + i)];
  };
  for (std::int64_t j = 0; j < n; ++j) {
    const std::int64_t a = p.labels(j);
    if (a < 0 || a >= k) continue;
    const auto weight = static_cast<double>(p.weights(j));
    at(a, 0) += weight;
    for (std::int64_t s = 0; s < d; ++s) {
      at(a, 1 + s) += weight * static_cast<double>(p.y(j, s));
      for (std::int64_t t = 0; t < d; ++t) {
        at(a, 1 + d + s * d + t) +=
            weight * static_cast<double>(p.centred(j, a, s) * p.centred(j, a, t));
      }
    }
  }
  bool right = true;
  for (std::int64_t a = 0; a < k; ++a) {
    right = right && p.counts(a) == at(a, 0);
    for (std::int64_t t = 0; t < d; ++t) right = right && p.sums(a, t) == at(a, 1 + t);
  }
  SUBQUAD_CHECK(right);
  if (!with_scatter) return;
  p.run_scatter(false);
  for (std::int64_t a = 0; a < k; ++a) {
    for (std::int64_t i = 0; i < d * d; ++i) {
      right = right && p.scatter[a * d * d + i] == at(a, 1 + d + i);
    }
  }
  SUBQUAD_CHECK(right);
}

// All rows in one component of several parts.
template <class T>
void check_one_component(std::int64_t d) {
  std::mt19937 engine(8);
  std::normal_distribution<double> normal;
  problem<T> p(2500, 4, d);
  p.fill([&] { return normal(engine); }, [&] { return 1 + normal(engine) / 2; }, [] { return 2; });
  p.check("one component");
}

template <class T>
void check_semantics() {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  constexpr T kMax = std::numeric_limits<T>::max();
  std::mt19937 engine(11);
  std::normal_distribution<double> normal;
  const std::int64_t k = 6;
  const std::int64_t d = 70;
  problem<T> p(400, k, d);
  random_labels label(k, 6, false);
  p.fill([&] { return normal(engine); }, [&] { return normal(engine); }, label);
  for (std::int64_t a = 0; a < k; ++a) {
    for (std::int64_t t = 0; t < d; ++t) p.means(a, t) = a == 4 ? 0 : p.means(a, t);
  }
  std::int64_t seen[k] = {};
  for (std::int64_t j = 0; j < p.n; ++j) {
    const std::int64_t a = p.labels(j);
    const std::int64_t turn = seen[a]++;
    if (a == 0 && turn == 3) {  // of weight 0: whatever it holds
      p.weights(j) = 0;
      for (std::int64_t t = 0; t < d; ++t) p.y(j, t) = t % 2 ? kNaN : kInfinity;
    }
    if (a == 1 && turn == 2) p.y(j, 66) = kNaN;
    if (a == 2 && turn == 1) p.y(j, 5) = kInfinity;
    if (a == 2 && turn == 30) p.y(j, 69) = -kInfinity;
    if (a == 4 && turn == 0) {  // a number that the split cannot hold, times small ones
      for (std::int64_t t = 0; t < d; ++t) p.y(j, t) = static_cast<T>(1e-3);
      p.y(j, 7) = kMax;
      p.weights(j) = T(1);
    }
    if (a == 5 && turn == 4) p.weights(j) = kNaN;
  }
  p.run_sums();
  SUBQUAD_CHECK(p.sums_are_right());
  p.run_scatter(false);
  SUBQUAD_CHECK(p.radii(1) != p.radii(1));
  SUBQUAD_CHECK(p.radii(2) == std::numeric_limits<double>::infinity());
  SUBQUAD_CHECK(p.radii(5) > 0);
  // The square of the largest number is infinite in T, and finite in long double.
  const std::int64_t square = (4 * d + 7) * d + 7;
  SUBQUAD_CHECK(p.scatter[square] == std::numeric_limits<double>::infinity());
  long double exact = 0;
  for (std::int64_t j = 0; j < p.n; ++j) {
    if (p.counts_for(j, 4)) exact += p.weight(j) * p.centred(j, 4, 7) * p.centred(j, 4, 7);
  }
  p.scatter[square] = static_cast<double>(exact);
  if (sizeof(T) == 4) {
    SUBQUAD_CHECK(p.scatter_is_right());
  } else {
    bool right = true;  // but for the overflow in float64 of what is compared with
    for (std::int64_t a = 0; a < k && right; ++a) {
      for (std::int64_t s = 0; s < d; ++s) {
        for (std::int64_t t = 0; t <= s; ++t) {
          if (a == 4 && s == 7 && t == 7) continue;
          right = right &&
                  p.entry_is_right(a, s, t, p.scatter[(a * d + s) * d + t], gram_bound<T>(p.n, 1));
        }
      }
    }
    SUBQUAD_CHECK(right);
  }
  p.run_scatter(true);
  SUBQUAD_CHECK(p.radii(1) != p.radii(1));
  for (std::int64_t a = 0; a < k; ++a) {
    for (std::int64_t t = 0; t < d; ++t) {
      if (sizeof(T) == 8 && a == 4 && t == 7) continue;
      SUBQUAD_CHECK(p.entry_is_right(a, t, t, p.diagonal(a, t), row_sums_bound<T>(p.n, 1, 2)));
    }
  }
}

// The rows of a batch of matrices, with weights by product.
template <class T>
void check_all_rows(std::int64_t n, std::int64_t d, bool transposed) {
  using namespace subquad::cuda;
  constexpr std::int64_t kBatch = 2;
  constexpr std::int64_t kOfBatch = 3;
  constexpr std::int64_t kProducts = kBatch * kOfBatch;
  std::mt19937 engine(21);
  std::normal_distribution<double> normal;
  const device_array<T> x({kBatch, n, d});
  const device_array<T> weights({kProducts, n});
  for (T& value : x) value = static_cast<T>(normal(engine));
  for (T& value : weights) value = static_cast<T>(normal(engine));
  for (std::int64_t i = 0; i < kProducts * n; i += 7) weights[i] = 0;
  const auto at = [&](std::int64_t b, std::int64_t j, std::int64_t t) {
    return static_cast<long double>(x[b * n * d + (transposed ? t * n + j : j * d + t)]);
  };
  batches<2> batch;
  batch.rank = 1;
  batch.lengths[0] = kBatch;
  batch.strides[1][0] = n * d;
  product_split cut(kProducts, n, gram_blocks(d));
  cut.rows = 128;
  cut.parts = std::max<std::int64_t>(1, divide_up(n, cut.rows));
  const matrix_view<const T> matrix{x.begin(), transposed ? 1 : d, transposed ? n : 1};
  const all_rows<T, 2> rows(matrix, batch, 1, kBatch, kOfBatch, n, weights.begin(), cut);
  const std::int64_t extra = cut.extra_parts(kProducts);
  const device_array<double> out({kProducts, d, d});
  const device_array<double> out_extra({extra, d, d});
  const device_array<double> sums({kProducts, d});
  const device_array<double> sums_extra({extra, d});
  const device_array<double> counts({kProducts});
  const device_array<double> counts_extra({extra});
  gram<T>(rows, d, {out.begin(), out_extra.begin(), d * d});
  row_sums<T, 1>(rows, d, {sums.begin(), sums_extra.begin(), d},
                 {counts.begin(), counts_extra.begin(), 1});
  bool right = true;
  for (std::int64_t product = 0; product < kProducts; ++product) {
    long double count = 0;
    for (std::int64_t j = 0; j < n; ++j) count += weights[product * n + j];
    right = right && is_near(counts[product], count, 4 * kUnit * static_cast<long double>(n * n));
    for (std::int64_t s = 0; s < d; ++s) {
      long double sum = 0;
      long double magnitude = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        const long double term = weights[product * n + j] * at(product / kOfBatch, j, s);
        sum += term;
        magnitude += std::fabs(term);
      }
      right = right &&
              is_near(sums[product * d + s], sum, row_sums_bound<T>(n, cut.parts, 1) * magnitude);
      for (std::int64_t t = 0; t < d; ++t) {
        sum = 0;
        magnitude = 0;
        for (std::int64_t j = 0; j < n; ++j) {
          const long double term = weights[product * n + j] * at(product / kOfBatch, j, s) *
                                   at(product / kOfBatch, j, t);
          sum += term;
          magnitude += std::fabs(term);
        }
        right = right && is_near(out[(product * d + s) * d + t], sum,
                                 gram_bound<T>(n, cut.parts) * magnitude);
      }
    }
  }
  SUBQUAD_CHECK(right);
}

// What is computed does not depend on the order in which blocks and threads run.
template <class T>
void check_deterministic() {
  std::vector<double> first;
  for (const order how : {order::ascending, order::descending, order::shuffled}) {
    set_order(how);
    std::mt19937 engine(30);
    std::normal_distribution<double> normal;
    problem<T> p(1500, 3, 5);
    std::int64_t turn = 0;
    p.fill([&] { return normal(engine); }, [&] { return normal(engine); },
           [&] { return turn++ % 10 == 0 ? 0 : 2; });
    p.run_sums();
    p.run_scatter(false);
    std::vector<double> all;
    for (std::int64_t a = 0; a < p.k; ++a) {
      all.push_back(p.counts(a));
      all.push_back(p.radii(a));
      for (std::int64_t t = 0; t < p.d; ++t) all.push_back(p.sums(a, t));
    }
    all.insert(all.end(), p.scatter.begin(), p.scatter.end());
    if (first.empty()) first = all;
    SUBQUAD_CHECK(std::memcmp(first.data(), all.data(), first.size() * sizeof(double)) == 0);
  }
}

void check_errors() {
  problem<float> p(3, 2, 4);
  const device_array<std::uint8_t> workspace({1});
  const array_view weights = p.weights.view();
  const indexed_array<double> transposed({2, 4}, layout::transposed);
  const auto sum_to = [&](const array_view& sums) {
    core::component_sums(p.y.view(), p.labels.view(), &weights, p.counts.view(), sums,
                         workspace.view());
  };
  SUBQUAD_CHECK(checks::throws<invalid_argument>([&] { sum_to(transposed.view()); },
                                                 "sums: expected a C-contiguous array"));
  SUBQUAD_CHECK(checks::throws<invalid_argument>([&] { sum_to(p.sums.view()); },
                                                 "workspace: expected at least as many bytes"));
  SUBQUAD_CHECK(checks::throws<type_error>([&] { sum_to(p.y.view()); },
                                           "sums: expected float64, got float32"));
}

// What shows threads in a wrong order.
template <class T>
void check_some() {
  check_random<T>(200, 3, 66, layout::contiguous, true);
  check_random<T>(150, 5, 3, layout::unaligned, false);
  check_exact<T>(1000, 7, 4, true);
  check_semantics<T>();
  check_all_rows<T>(130, 4, true);
}

template <class T>
void check_all() {
  for (const layout how : kLayouts) {
    check_random<T>(150, 3, 66, how, true);
    check_random<T>(40, 5, 3, how, false);
  }
  for (const std::int64_t d : {0, 1, 3, 64, 65, 130}) {
    check_random<T>(d < 60 ? 300 : 90, 1, d, layout::contiguous, true);
    check_random<T>(d < 60 ? 300 : 90, 5, d, layout::contiguous, d % 2 == 0);
  }
  check_random<T>(200, 300, 3, layout::contiguous, true);
  check_random<T>(0, 3, 2, layout::contiguous, true);
  check_random<T>(1, 1, 1, layout::contiguous, true);
  check_exact<T>(1000, 7, 4, true);
  check_one_component<T>(3);
  check_semantics<T>();
  check_all_rows<T>(300, 65, false);
  check_all_rows<T>(130, 4, true);
  check_all_rows<T>(0, 2, false);
}

}  // namespace

int main() {
  in_every_order([] { check_all<float>(), check_all<double>(); },
                 [] { check_some<float>(), check_some<double>(); });
  check_exact<float>(700, 2100, 1, false);  // more labels than one round of a scan takes
  check_deterministic<float>();
  check_deterministic<double>();
  check_errors();
  return checks::status();
}
