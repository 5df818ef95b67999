// Steps of embeddings on CUDA, against the formula in long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/indexed.hpp"
#include "embedding_core.hpp"
#include "subquad/errors.hpp"

namespace {

using subquad::array_view;
using subquad::cuda::on_host::for_outputs;
using subquad::cuda::on_host::in_every_order;
using subquad::cuda::on_host::kLayouts;
using subquad::cuda::on_host::layout;
using subquad::cuda::on_host::order;
using subquad::cuda::on_host::set_order;
using subquad::cuda::on_host::strided_array;
using shape = subquad::cuda::on_host::shape_list;
using real = long double;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double worst = 0;  // error over bound

struct form {
  std::int64_t n;
  std::int64_t m;
  std::int64_t d;
  std::int64_t most = 3;  // elements of a row; -1: no matrix
  std::int64_t k = 0;
  std::int64_t c = 0;
  bool null = false;
  double step = 0.6;
  double scale = -0.7;
  layout inputs = layout::contiguous;
  layout outputs = layout::contiguous;
};

// A number and what it may be wrong by.
struct estimate {
  real value = 0;
  real error = 0;
};

template <class T, class Index>
struct problem {
  static constexpr real kUnit = sizeof(T) == 8 ? 0x1p-53L : 0x1p-24L;

  form of;
  std::mt19937_64 engine;
  std::vector<std::int64_t> starts;  // n + 1
  strided_array<T> x;
  strided_array<T> data;
  strided_array<Index> indices;
  strided_array<Index> indptr;
  strided_array<T> rows;
  strided_array<T> log_counts;
  strided_array<T> means;
  strided_array<T> covariances;
  strided_array<std::int64_t> labels;
  strided_array<T> shifts;
  strided_array<T> slopes;
  strided_array<T> null_weights;
  strided_array<T> null;
  strided_array<T> out;
  strided_array<T> attraction;
  strided_array<T> log_z;

  explicit problem(const form& f, const std::vector<std::int64_t>& lengths = {})
      : of(f),
        engine(static_cast<std::uint64_t>(f.n * 10007 + f.d * 101 + f.k * 11 + f.c)),
        starts(starts_of(lengths)),
        x({f.n, f.d}, f.inputs),
        data({starts.back()}, f.inputs),
        indices({starts.back()}, f.inputs),
        indptr({f.n + 1}, for_outputs(f.inputs)),
        rows({f.most < 0 ? f.n : f.m, f.d}, f.inputs),
        log_counts({f.k}, f.inputs),
        means({f.k, f.d}, f.inputs),
        covariances({f.k, f.d, f.d}, f.inputs),
        labels({f.n}, f.inputs),
        shifts({f.c, f.d}, f.inputs),
        slopes({f.c, f.d, f.d}, f.inputs),
        null_weights({f.n}, f.inputs),
        null({f.d}, f.inputs),
        out({f.n, f.d}, f.outputs),
        attraction({f.n}, f.outputs),
        log_z({f.n}, f.outputs) {
    fill_rows(x, 1);
    fill(data, 1);
    fill_rows(rows, 1);
    fill(log_counts, 1);
    fill_rows(means, 0.5);
    fill_symmetric(covariances);
    fill_rows(shifts, 0.5);
    fill_symmetric(slopes);
    fill(null_weights, 1);
    fill(null, 0.3);
    std::uniform_int_distribution<std::int64_t> any(0, std::max<std::int64_t>(f.m - 1, 0));
    indices.each([&](Index& index, const shape&) { index = static_cast<Index>(any(engine)); });
    indptr.each([&](Index& start, const shape& at) {
      start = static_cast<Index>(starts[static_cast<std::size_t>(at[0])]);
    });
    std::uniform_int_distribution<std::int64_t> label(0, std::max<std::int64_t>(f.c - 1, 0));
    labels.each([&](std::int64_t& element, const shape&) { element = label(engine); });
  }

  std::vector<std::int64_t> starts_of(const std::vector<std::int64_t>& lengths) {
    std::vector<std::int64_t> all{0};
    std::uniform_int_distribution<std::int64_t> any(0, std::max<std::int64_t>(of.most, 0));
    for (std::int64_t i = 0; i < of.n; ++i) {
      const std::int64_t drawn = i % 7 == 3 ? 0 : any(engine);
      all.push_back(all.back() + (lengths.empty() ? drawn : lengths[static_cast<std::size_t>(i)]));
    }
    return all;
  }
  void fill(const strided_array<T>& array, double size) {
    std::normal_distribution<double> normal;
    array.each([&](T& element, const shape&) { element = static_cast<T>(size * normal(engine)); });
  }
  // Rows of norm `size`.
  void fill_rows(const strided_array<T>& array, double size) {
    std::normal_distribution<double> normal;
    std::vector<double> row(static_cast<std::size_t>(of.d));
    array.each([&](T& element, const shape& at) {
      if (at[1] == 0) {
        double square = 0;
        for (double& each : row) {
          each = normal(engine);
          square += each * each;
        }
        for (double& each : row) each *= size / std::sqrt(square);
      }
      element = static_cast<T>(row[static_cast<std::size_t>(at[1])]);
    });
  }
  void fill_symmetric(const strided_array<T>& array) {
    std::normal_distribution<double> normal(0, 1 / std::sqrt(static_cast<double>(of.d) + 1));
    array.each([&](T& element, const shape& at) {
      element = at[1] <= at[2] ? static_cast<T>(normal(engine)) : T(0);
    });
    array.each([&](T& element, const shape& at) {
      if (at[1] > at[2]) element = array({at[0], at[2], at[1]});
    });
  }

  bool has_matrix() const { return of.most >= 0; }

  void run(const array_view* to, const array_view* attraction_to, const array_view* log_z_to,
           bool poisoned_memory = true) const {
    const auto bytes = static_cast<std::int64_t>(subquad::core::embedding_step_workspace(
        of.n, of.m, starts.back(), of.d, of.k, of.c, sizeof(T)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    if (!poisoned_memory) memory.each([](std::uint8_t& byte, const shape&) { byte = 0; });
    const array_view views[] = {data.view(),         indices.view(), indptr.view(),
                                log_counts.view(),   means.view(),   covariances.view(),
                                labels.view(),       shifts.view(),  slopes.view(),
                                null_weights.view(), null.view()};
    const auto given = [&](int index, bool present) { return present ? &views[index] : nullptr; };
    const subquad::embedding_terms terms{
        given(0, has_matrix()), given(1, has_matrix()), given(2, has_matrix()), of.scale,
        given(3, of.k > 0),     given(4, of.k > 0),     given(5, of.k > 0),     given(6, of.c > 0),
        given(7, of.c > 0),     given(8, of.c > 0),     given(9, of.null),      given(10, of.null)};
    subquad::core::embedding_step(x.view(), rows.view(), terms, of.step, to, attraction_to,
                                  log_z_to, memory.view());
  }
  void run() const {
    const array_view views[] = {out.view(), attraction.view(), log_z.view()};
    run(&views[0], &views[1], of.k > 0 ? &views[2] : nullptr);
  }

  void check() const {
    for (std::int64_t i = 0; i < of.n; ++i) {
      if (!check_row(i)) {
        std::printf("row %d of %d x %d, %d elements, k %d, c %d, %d bytes\n", int(i), int(of.n),
                    int(of.d), int(of.most), int(of.k), int(of.c), int(sizeof(T)));
        SUBQUAD_CHECK(false);
        return;
      }
    }
    SUBQUAD_CHECK(out.gaps_untouched());
    SUBQUAD_CHECK(attraction.gaps_untouched());
    SUBQUAD_CHECK(log_z.gaps_untouched());
  }
  void run_and_check() const {
    run();
    check();
  }

  static bool is_right(real found, const estimate& expected, const char* what) {
    if (std::isnan(expected.value)) return std::isnan(found);
    if (std::isinf(expected.value)) return found == expected.value;
    const real error = std::abs(found - expected.value);
    if (error <= expected.error && expected.error > 0) {
      worst = std::max(worst, static_cast<double>(error / expected.error));
    }
    if (error <= expected.error) return true;
    std::printf("%s %.9Lg, expected %.9Lg within %.3Lg\n", what, found, expected.value,
                expected.error);
    return false;
  }

  using vector = std::vector<estimate>;

  // matrix_a x, symmetric, and the same of magnitudes.
  void product(const strided_array<T>& matrix, std::int64_t a, const std::vector<real>& point,
               std::vector<real>& values, std::vector<real>& magnitudes) const {
    const auto d = static_cast<std::size_t>(of.d);
    values.assign(d, 0);
    magnitudes.assign(d, 0);
    for (std::size_t t = 0; t < d; ++t) {
      const T* row = &matrix({a, static_cast<std::int64_t>(t), 0});
      const std::int64_t stride = matrix.view().strides[2];
      for (std::size_t u = 0; u < d; ++u) {
        const real term = point[u] * row[static_cast<std::int64_t>(u) * stride];
        values[t] += term;
        magnitudes[t] += std::abs(term);
      }
    }
  }

  bool check_row(std::int64_t i) const {
    const real u = kUnit;
    const auto d = static_cast<std::size_t>(of.d);
    const auto length = static_cast<real>(of.d);
    std::vector<real> point(d);
    for (std::size_t t = 0; t < d; ++t) point[t] = x({i, static_cast<std::int64_t>(t)});
    vector gradient(d);
    std::vector<real> magnitude(d, 0);  // of the gradient's terms
    estimate attracted;
    add_pull(i, point, gradient, magnitude, attracted);
    if (!is_right(attraction({i}), attracted, "attraction")) return false;
    if (of.k > 0) {
      estimate log_sum;
      add_push(point, gradient, magnitude, log_sum);
      if (!is_right(log_z({i}), log_sum, "log_z")) return false;
    }
    const std::int64_t label = of.c > 0 ? labels({i}) : -1;
    if (label >= 0 && label < of.c) {
      std::vector<real> values;
      std::vector<real> sizes;
      product(slopes, label, point, values, sizes);
      for (std::size_t t = 0; t < d; ++t) {
        const real shift = shifts({label, static_cast<std::int64_t>(t)});
        gradient[t].value += values[t] + shift;
        gradient[t].error += (length + 1) * u * sizes[t] + u * std::abs(shift);
        magnitude[t] += sizes[t] + std::abs(shift);
      }
    }
    for (std::size_t t = 0; of.null && t < d; ++t) {
      const real term = static_cast<real>(null_weights({i})) * null({static_cast<std::int64_t>(t)});
      gradient[t].value += term;
      magnitude[t] += std::abs(term);
    }
    // Pull, push, own terms and null are added one after another.
    for (std::size_t t = 0; t < d; ++t) gradient[t].error += 4 * u * magnitude[t];
    return check_turn(i, point, gradient);
  }

  void add_pull(std::int64_t i, const std::vector<real>& point, vector& gradient,
                std::vector<real>& magnitude, estimate& attracted) const {
    const real u = kUnit;
    std::vector<std::pair<real, std::int64_t>> terms;
    if (has_matrix()) {
      const auto clamped = [&](std::int64_t at) {
        return std::clamp<std::int64_t>(indptr({at}), 0, starts.back());
      };
      for (std::int64_t e = clamped(i); e < clamped(i + 1); ++e) {
        const std::int64_t column = indices({e});
        if (column >= 0 && column < of.m) terms.emplace_back(data({e}), column);
      }
    } else {
      terms.emplace_back(1, i);
    }
    const auto count = static_cast<real>(terms.size());
    real size = 0;
    for (std::size_t t = 0; t < point.size(); ++t) {
      real pull = 0;
      real magnitude_of_pull = 0;
      for (const auto& [weight, column] : terms) {
        const real term = of.scale * weight * rows({column, static_cast<std::int64_t>(t)});
        pull += term;
        magnitude_of_pull += std::abs(term);
      }
      gradient[t].value -= pull;
      // The scale is rounded, and a product with it.
      gradient[t].error += (count + 2) * u * magnitude_of_pull;
      magnitude[t] += magnitude_of_pull;
      attracted.value += point[t] * pull;
      size += std::abs(point[t]) * magnitude_of_pull;
    }
    attracted.error =
        1.001L * (count + 2 + static_cast<real>(point.size())) * u * size + underflow();
  }

  // What underflows of numbers that are not tiny.
  static real underflow() { return sizeof(T) == 8 ? 0x1p-1000L : 0x1p-120L; }

  // Of each score: d roundings of C x, of its product with x, and a few; three of the exponent. The
  // weights that come of it are wrong by twice the errors of exponents, by 4 u of a power of two,
  // and by the same and 2 u of each change of the shift.
  void add_push(const std::vector<real>& point, vector& gradient, std::vector<real>& magnitude,
                estimate& log_sum) const {
    const real u = kUnit;
    const std::size_t d = point.size();
    const auto length = static_cast<real>(d);
    const auto components = static_cast<real>(of.k);
    std::vector<std::int64_t> present;
    std::vector<real> scores;
    std::vector<std::vector<real>> values;
    std::vector<std::vector<real>> sizes;
    real of_exponents = 0;
    for (std::int64_t a = 0; a < of.k; ++a) {
      const real log_count = log_counts({a});
      if (log_count == -std::numeric_limits<real>::infinity()) continue;
      present.push_back(a);
      values.emplace_back();
      sizes.emplace_back();
      product(covariances, a, point, values.back(), sizes.back());
      real score = log_count;
      real size = std::abs(log_count);
      for (std::size_t t = 0; t < d; ++t) {
        const real mean = means({a, static_cast<std::int64_t>(t)});
        score += point[t] * (mean + values.back()[t] / 2);
        size += std::abs(point[t]) * (std::abs(mean) + sizes.back()[t] / 2);
        values.back()[t] += mean;
        sizes.back()[t] += std::abs(mean);
      }
      scores.push_back(score);
      of_exponents = std::max(of_exponents, (2 * length + 4 + 3) * u * size);
    }
    if (present.empty()) {
      log_sum.value = -std::numeric_limits<real>::infinity();
      return;
    }
    const real most = *std::max_element(scores.begin(), scores.end());
    const real least = *std::min_element(scores.begin(), scores.end());
    real total = 0;
    for (const real score : scores) total += std::exp(score - most);
    log_sum.value = most + std::log(total);
    const real of_powers = (6 * components + 8) * u + 2 * (most - least) * u;
    const real of_weights = 2 * (of_exponents + of_powers);
    log_sum.error =
        1.01L * (of_exponents + of_powers) + 4 * u * (std::abs(log_sum.value) + std::abs(most) + 1);
    for (std::size_t a = 0; a < present.size(); ++a) {
      const real weight = std::exp(scores[a] - log_sum.value);
      for (std::size_t t = 0; t < d; ++t) {
        gradient[t].value += weight * values[a][t];
        gradient[t].error +=
            1.01L * weight * sizes[a][t] * (of_weights + (length + 2 * components + 3) * u);
        magnitude[t] += weight * sizes[a][t];
      }
    }
  }

  // The direction is off by what the gradient is, and by d roundings of each of two projections,
  // over the length of the tangent part: twice that as a unit vector.
  bool check_turn(std::int64_t i, const std::vector<real>& point, const vector& gradient) const {
    const real u = kUnit;
    const std::size_t d = point.size();
    const auto length = static_cast<real>(d);
    real along = 0;
    real size = 0;
    real error = 0;
    for (std::size_t t = 0; t < d; ++t) {
      along += gradient[t].value * point[t];
      size = std::hypot(size, gradient[t].value);
      error = std::hypot(error, gradient[t].error);
    }
    real tangent = 0;
    for (std::size_t t = 0; t < d; ++t) {
      tangent = std::hypot(tangent, gradient[t].value - along * point[t]);
    }
    const auto found = [&](std::size_t t) {
      return static_cast<real>(out({i, static_cast<std::int64_t>(t)}));
    };
    if (!std::isfinite(along)) {
      for (std::size_t t = 0; t < d; ++t) {
        if (!std::isnan(found(t))) return false;
      }
      return true;
    }
    if (size == 0 || of.step == 0) {
      for (std::size_t t = 0; t < d; ++t) {
        if (found(t) != point[t]) return false;
      }
      return true;
    }
    real norm = 0;
    real cosine = 0;
    real distance = 0;
    const real wanted = std::sqrt((1 - static_cast<real>(of.step)) * (1 + of.step));
    for (std::size_t t = 0; t < d; ++t) {
      norm = std::hypot(norm, found(t));
      cosine += found(t) * point[t];
      const real direction = tangent == 0 ? 0 : (gradient[t].value - along * point[t]) / tangent;
      distance = std::hypot(distance, found(t) - (wanted * point[t] - of.step * direction));
    }
    const real of_direction =
        tangent == 0 ? 2 : 2 * (error + (2 * length + 8) * u * size) / tangent;
    // A tangent part that may be nothing but rounding, as of one channel, may count as nothing.
    bool stays = of_direction >= 2;
    for (std::size_t t = 0; t < d; ++t) stays = stays && found(t) == point[t];
    if (stays) return true;
    return is_right(norm, {1, (length / 2 + 4) * u}, "norm") &&
           is_right(cosine, {wanted, (2 * length + 8) * u * of.step + (2 * length + 8) * u},
                    "cosine") &&
           is_right(distance, {0, of.step * std::min<real>(of_direction, 2) + (length + 8) * u},
                    "distance");
  }
};

template <class T, class Index>
void sizes() {
  for (const std::int64_t d : {2, 3, 4, 5, 16, 31, 64, 65, 128, 130, 300}) {
    problem<T, Index>({9, 17, d, 4}).run_and_check();
    problem<T, Index>({7, 7, d, -1, 2}).run_and_check();
    problem<T, Index>({11, 5, d, 2, 3, 4, true}).run_and_check();
  }
  // Around the rows of a tile, and with fewer lanes than those of a warp.
  for (const std::int64_t n : {1, 31, 32, 33, 65}) {
    problem<T, Index>({n, 9, 129, 3, 2, 3, true}).run_and_check();
  }
  for (const std::int64_t n : {255, 256, 257, 513}) {
    problem<T, Index>({n, 9, 3, 3, 3, 5, true}).run_and_check();
  }
  for (const std::int64_t n : {127, 129}) problem<T, Index>({n, 9, 24, 3, 5, 40}).run_and_check();
  // Rows of which few fit into shared memory, then none.
  problem<T, Index>({5, 6, sizeof(T) == 8 ? 500 : 1030, 3, 1, 2}).run_and_check();
  problem<T, Index>({2, 6, sizeof(T) == 8 ? 971 : 1950, 3, 1, 0}).run_and_check();
  problem<T, Index>({19, 6, sizeof(T) == 8 ? 971 : 1950, 3, 0, 0, true}).run_and_check();
  problem<T, Index>({2, 6, sizeof(T) == 8 ? 971 : 1950, 3, 0, 1}).run_and_check();
  // Long rows, others beside them.
  problem<T, Index>({6, 40, 9, 900}, {3, 512, 0, 513, 900, 2}).run_and_check();
  problem<T, Index>({3, 40, 133, 900, 1}, {3, 600, 513}).run_and_check();
  // Nothing at all.
  problem<T, Index>({0, 3, 4, 2, 1, 1, true}).run_and_check();
  problem<T, Index>({3, 0, 4, 0, 1}).run_and_check();
  problem<T, Index>({3, 2, 4, 0}).run_and_check();
  problem<T, Index>({3, 2, 1, 2, 1}).run_and_check();
  problem<T, Index>({3, 2, 0, 2, 2, 1, true}).run_and_check();
}

template <class T, class Index>
void layouts() {
  for (const layout how : kLayouts) {
    form f = {37, 8, 12, 3, 2, 3, true};
    f.inputs = how;
    problem<T, Index>(f).run_and_check();
    f.inputs = layout::contiguous;
    f.outputs = for_outputs(how);
    problem<T, Index>(f).run_and_check();
    f = {9, 8, 7, -1, 2, 0, true};
    f.inputs = how;
    f.outputs = for_outputs(how);
    problem<T, Index>(f).run_and_check();
    f = {3, 8, 130, 2, 1, 2};
    f.inputs = how;
    problem<T, Index>(f).run_and_check();
  }
}

template <class T, class Index>
void special() {
  const auto with = [](const form& f, const std::function<void(problem<T, Index>&)>& change) {
    problem<T, Index> each(f);
    change(each);
    each.run_and_check();
  };
  using p = problem<T, Index>;
  const form all = {9, 6, 5, 4, 3, 2, true};
  for (const double held : {kInfinity, -kInfinity, kNan}) {
    const auto value = static_cast<T>(held);
    with(all, [&](p& each) { each.x({2, 3}) = value; });
    with(all, [&](p& each) { each.rows({2, 3}) = value; });
    with(all, [&](p& each) { each.null_weights({4}) = value; });
    with(all, [&](p& each) { each.shifts({1, 2}) = value; });
  }
  with(all, [](p& each) { each.means({1, 2}) = static_cast<T>(kNan); });
  // Components without keys, whatever else is said of them.
  with(all, [](p& each) {
    each.log_counts({1}) = static_cast<T>(-kInfinity);
    each.means({1, 0}) = static_cast<T>(kNan);
    each.covariances({1, 2, 2}) = static_cast<T>(kInfinity);
  });
  with(all, [](p& each) {
    each.log_counts.each([](T& count, const shape&) { count = static_cast<T>(-kInfinity); });
  });
  // Scores that differ by much, in either order.
  for (const T by : {T(-90), T(90)}) {
    with({9, 6, 5, 4, 6}, [&](p& each) {
      each.log_counts.each([&](T& count, const shape& at) { count = by * static_cast<T>(at[0]); });
    });
  }
  // What an index or a label out of range would lead to is left out.
  with(all, [](p& each) {
    each.indices({1}) = static_cast<Index>(-1);
    each.indices({3}) = static_cast<Index>(6);
    each.indices({4}) = std::numeric_limits<Index>::max();
    each.labels({2}) = -1;
    each.labels({3}) = 2;
    each.labels({5}) = std::numeric_limits<std::int64_t>::min();
  });
  with(all, [](p& each) {
    each.indptr({9}) = std::numeric_limits<Index>::max();
    each.indptr({0}) = std::numeric_limits<Index>::min();
  });
  // Lengths whose squares overflow or vanish.
  for (const double scale : {1e30, 1e-30, 1e-37}) {
    form f = {9, 6, 33, 4};
    f.scale = scale;
    problem<T, Index>(f).run_and_check();
  }
  for (const double step : {0.0, 1e-4, 1.0}) {
    form f = all;
    f.step = step;
    problem<T, Index>(f).run_and_check();
  }
}

// A gradient whose tangent part is tiny beside it, or nothing.
template <class T>
void tangents() {
  using p = problem<T, std::int32_t>;
  for (const double size : {1e-3, 1e-6, 1e-7, 1e-12, 0.0}) {
    p each({12, 12, 33, -1});
    std::normal_distribution<double> normal;
    each.rows.each([&](T& element, const shape& at) {
      element = 3 * each.x(at) + static_cast<T>(size * normal(each.engine));
    });
    each.run_and_check();
  }
  // A tangent part that is as nothing beside the gradient, but known exactly.
  p exact({1, 1, 6, -1});
  exact.x.each([](T& element, const shape& at) { element = at[1] == 2 ? T(-1) : T(0); });
  exact.rows.each([](T& element, const shape& at) {
    element = at[1] == 2 ? T(5) : at[1] == 4 ? static_cast<T>(-1e-30) : T(0);
  });
  exact.run();
  SUBQUAD_CHECK(p::is_right(exact.out({0, 2}), {-0.8L, 4 * p::kUnit}, "along x"));
  SUBQUAD_CHECK(p::is_right(exact.out({0, 4}), {0.6L, 4 * p::kUnit}, "across x"));
  // Rows that have drifted off the sphere come back.
  p off({5, 5, 6, -1});
  off.x.each([](T& element, const shape&) { element *= T(1.01); });
  off.run();
  for (std::int64_t i = 0; i < 5; ++i) {
    real norm = 0;
    for (std::int64_t t = 0; t < 6; ++t)
      norm = std::hypot(norm, static_cast<real>(off.out({i, t})));
    SUBQUAD_CHECK(p::is_right(norm, {1, 7 * p::kUnit}, "norm"));
  }
  // Rows with no tangent gradient stay, to the bit.
  p each({4, 4, 6, -1});
  each.x.each([](T& element, const shape& at) { element = at[1] == 2 ? T(-1) : T(0); });
  each.rows.each([](T& element, const shape& at) { element = at[1] == 2 ? T(5) : T(0); });
  each.run();
  each.x.each([&](T& element, const shape& at) { SUBQUAD_CHECK(each.out(at) == element); });
}

template <class T>
bool is_same(const strided_array<T>& a, const strided_array<T>& b) {
  bool same = true;
  a.each(
      [&](T& element, const shape& at) { same &= std::memcmp(&element, &b(at), sizeof(T)) == 0; });
  return same;
}

// Outputs that are not asked for, and the rows themselves as output.
template <class T>
void outputs() {
  for (const std::int64_t most : {-1, 3}) {
    form f = {40, 40, 12, most, 2, 2, true};
    const problem<T, std::int32_t> all(f);
    all.run();
    const problem<T, std::int32_t> part(f);
    const array_view views[] = {part.out.view(), part.attraction.view(), part.log_z.view(),
                                part.x.view()};
    part.run(&views[0], nullptr, nullptr);
    SUBQUAD_CHECK(is_same(all.out, part.out));
    part.run(&views[3], &views[1], nullptr);
    SUBQUAD_CHECK(is_same(all.out, part.x));
    SUBQUAD_CHECK(is_same(all.attraction, part.attraction));
    f.step = 0;
    const problem<T, std::int32_t> still(f);
    const array_view log_z = still.log_z.view();
    still.run(nullptr, nullptr, &log_z);
    SUBQUAD_CHECK(is_same(all.log_z, still.log_z));
  }
  // Both the rows of no matrix and the output.
  problem<T, std::int32_t> same({9, 9, 5, -1, 1});
  same.x.each([&](T& element, const shape& at) { same.rows(at) = element; });
  same.run_and_check();
}

// More tiles than have a place in the workspace.
void slices() { problem<double, std::int32_t>({4131, 3, 971, 1}).run_and_check(); }

// The order of threads does not change a bit, nor what memory holds.
template <class T>
void orders() {
  const std::vector<std::int64_t> lengths{3, 700, 0, 5, 1};
  for (const std::int64_t d : {9, 300}) {
    const form f = {5, 40, d, 3, 3, 2, true};
    const problem<T, std::int32_t> first(f, lengths);
    set_order(order::shuffled);
    first.run();
    for (const order how : {order::ascending, order::descending}) {
      set_order(how);
      const problem<T, std::int32_t> next(f, lengths);
      const array_view views[] = {next.out.view(), next.attraction.view(), next.log_z.view()};
      next.run(&views[0], &views[1], &views[2], how == order::ascending);
      SUBQUAD_CHECK(is_same(first.out, next.out));
      SUBQUAD_CHECK(is_same(first.attraction, next.attraction));
      SUBQUAD_CHECK(is_same(first.log_z, next.log_z));
    }
  }
}

void errors() {
  problem<float, std::int32_t> each({3, 4, 5, 2, 2});
  const array_view out = each.out.view();
  const array_view attraction = each.attraction.view();
  each.of.step = 1.5;
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { each.run(&out, &attraction, nullptr); }, "step: expected a number from 0 to 1"));
  each.of.step = 0.5;
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { each.run(nullptr, &attraction, nullptr); }, "out: expected an array"));
  const array_view rows = each.rows.view();
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { each.run(&rows, &attraction, nullptr); }, "out: expected shape (n, d)"));
}

template <class T, class Index>
void some() {
  problem<T, Index>({37, 9, 129, 3, 2, 3, true}).run_and_check();
  problem<T, Index>({70, 9, 12, 3, 2, 30, true}).run_and_check();
  problem<T, Index>({7, 7, 5, -1, 2}).run_and_check();
}

template <class T, class Index>
void of_type(const char* name) {
  worst = 0;
  in_every_order(
      [] {
        sizes<T, Index>();
        layouts<T, Index>();
        special<T, Index>();
      },
      [] { some<T, Index>(); });
  tangents<T>();
  outputs<T>();
  std::printf("%s: largest error over bound %.3f\n", name, worst);
}

}  // namespace

int main() {
  of_type<float, std::int32_t>("float32, int32");
  of_type<double, std::int64_t>("float64, int64");
  in_every_order([] { some<float, std::int64_t>(); }, [] { some<double, std::int32_t>(); });
  orders<float>();
  orders<double>();
  slices();
  errors();
  return checks::status();
}
