// The log-normaliser of Gaussian mixtures and the moments of its scores, against long double.
#include <cmath>

#include "cuda/gaussian_moments.cuh"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/mixtures.hpp"
#include "normalizers_core.hpp"

namespace {

using namespace mixtures;
namespace core = subquad::core;

template <class T>
struct evaluation : mixture_case<T> {
  using base = mixture_case<T>;
  using base::size;
  array<T> out;
  bool has_own = false;
  bool includes_own = false;
  array<std::int64_t> own_component;
  array<T> own_log_weight;

  explicit evaluation(const sizes& s, layout how = layout::contiguous, batch_shapes b = {})
      : base(s, how, b),
        out(joined(b.all, {s.n}), how),
        own_component({s.n}, how),
        own_log_weight({s.n}, how) {}

  // Rows belong to components by turns, every third to none, with a tenth of its weight, more or
  // less.
  void own(bool includes) {
    has_own = true;
    includes_own = includes;
    fill(own_log_weight, this->random, -3, -1);
    for (std::int64_t i = 0; i < size.n; ++i) {
      own_component[i] = i % 3 == 2 ? -1 : i % size.k;
      if (i % 3 != 2) own_log_weight[i] += this->log_count_at(0, i % size.k);
    }
  }

  void run() {
    next_order();
    const auto bytes = core::gaussian_log_normalizer_workspace(this->entries(), size.n, size.k,
                                                               size.d, size.r, sizeof(T));
    const auto scratch = workspace(bytes);
    const array_view diagonals = this->diagonal.view();
    const array_view component = own_component.view();
    const array_view log_weight = own_log_weight.view();
    core::gaussian_log_normalizer(this->x.view(), this->log_counts.view(), this->means.view(),
                                  this->factors.view(), size.has_diagonal ? &diagonals : nullptr,
                                  has_own ? &component : nullptr, has_own ? &log_weight : nullptr,
                                  includes_own, out.view(), scratch.view());
  }

  T& out_at(std::int64_t b, std::int64_t i) const { return out.at(this->batch.all, b, 1, i); }

  real square_of(std::int64_t b, std::int64_t i) const {
    real square = 0;
    for (std::int64_t t = 0; t < size.d; ++t) {
      square += real(this->x_at(b, i, t)) * this->x_at(b, i, t);
    }
    return square;
  }

  // The score of a component without the row, whose weight in it is not all of it.
  real score_without_own(std::int64_t b, std::int64_t i, std::int64_t a, const moments& m,
                         real& error) const {
    const real u = kUnit<T>;
    const real square = square_of(b, i);
    const real square_error = static_cast<real>(size.d) * u * square;
    const real log_count = this->log_count_at(b, a);
    const real share = std::exp(own_log_weight[i] - log_count);
    const real rest = 1 - share;
    real spread;
    real spread_error;
    if (size.r > 0 || !size.has_diagonal) {
      const real deviation = square - m.mean;
      const real deviation_error = square_error + m.mean_error + u * std::abs(deviation);
      spread = deviation * deviation;
      spread_error = 2 * std::abs(deviation) * deviation_error + deviation_error * deviation_error +
                     u * spread;
    } else {
      spread = spread_error = 0;
      for (std::int64_t t = 0; t < size.d; ++t) {
        const real value = this->x_at(b, i, t);
        const real center = this->mean_at(b, a, t);
        const real part = value * (value - center);
        spread += part * part;
        spread_error +=
            4 * u * std::abs(part) * std::abs(value) * (std::abs(value) + std::abs(center));
      }
      spread_error += static_cast<real>(size.d) * u * spread;
    }
    const real mean = (m.mean - share * square) / rest;
    const real variance = std::max(0.0L, (m.variance - share * spread / rest) / rest);
    error = (m.mean_error + share * square_error) / rest +
            (m.variance_error + share * spread_error / rest) / rest / 2 +
            u * (std::abs(log_count) + std::abs(mean) + variance / 2);
    if (rest <= 4 * std::numeric_limits<T>::epsilon()) return -kInfinity;
    return log_count + std::log(rest) + mean + variance / 2;
  }

  // log sum exp of the scores, raised or lowered by `sign` times their bounds.
  real truth(std::int64_t b, std::int64_t i, real sign) const {
    const real u = kUnit<T>;
    real top = -kInfinity;
    std::vector<real> scores;
    std::vector<real> errors;
    const auto add = [&](real score, real error) {
      if (score == -kInfinity) return;
      scores.push_back(score);
      errors.push_back(error + 2 * u * std::abs(score));
      if (!(score <= top) && !std::isnan(top)) top = score;
    };
    for (std::int64_t a = 0; a < size.k; ++a) {
      if (this->is_empty(b, a)) continue;
      const moments m = this->moments_of(b, i, a);
      const real log_count = this->log_count_at(b, a);
      if (has_own && own_component[i] == a) {
        real error = 0;
        const real score = score_without_own(b, i, a, m, error);
        add(score, error);
      } else {
        add(log_count + m.mean + m.variance / 2,
            m.mean_error + m.variance_error / 2 +
                2 * u * (std::abs(log_count) + std::abs(m.mean) + m.variance / 2));
      }
    }
    if (has_own && includes_own && own_component[i] >= 0) {
      const real square = square_of(b, i);
      add(own_log_weight[i] + square, static_cast<real>(size.d) * u * square);
    }
    if (top == -kInfinity || !std::isfinite(top)) return top;
    real sum = 0;
    for (std::size_t j = 0; j < scores.size(); ++j) {
      // Of a score below the top, the difference in the exponent is rounded too.
      const real error = errors[j] + 2 * u * (top - scores[j]);
      sum += std::exp(scores[j] + (sign == 0 ? 0 : sign * error) - top);
    }
    return top + std::log(sum);
  }

  void check(const char* what, std::int64_t step = 1) {
    SUBQUAD_CHECK(out.gaps_untouched());
    for (std::int64_t b = 0; b < this->entries(); ++b) {
      for (std::int64_t i = 0; i < size.n; i += step) {
        const real expected = truth(b, i, 0);
        real error = 0;
        if (std::isfinite(expected)) {
          // Beside the scores': each time that the shift rises or states merge scales the sum by a
          // power of two, of 2 ulp; logarithm, product and sum at the end.
          const real sums = (5 * (static_cast<real>(size.k) / 8 + 1) + 5 * 8 + 8) * kUnit<T>;
          error = std::max(truth(b, i, 1) - expected, expected - truth(b, i, -1)) + sums +
                  4 * kUnit<T> * std::abs(expected);
        }
        const T got = out_at(b, i);
        if (matches(got, expected, error)) continue;
        std::printf(
            "%s, %zu bytes, n %d k %d d %d r %d: out[%d, %d] = %.9Lg, expected %.9Lg "
            "within %.3Lg\n",
            what, sizeof(T), int(size.n), int(size.k), int(size.d), int(size.r), int(b), int(i),
            real(got), expected, error);
        ++checks::failures();
        return;
      }
    }
  }

  void run_and_check(const char* what) {
    run();
    check(what);
  }
};

constexpr sizes kSizes[] = {
    {1, 1, 1, 0, false}, {1, 1, 1, 0},     {1, 1, 1, 1, false}, {5, 5, 3, 2},
    {127, 5, 3, 3},      {129, 33, 3, 1},  {3, 33, 64, 64},     {130, 1, 65, 65, false},
    {33, 5, 64, 33},     {7, 17, 65, 0},   {20, 2, 32, 32},     {128, 1, 3, 130, false},
    {515, 2, 5, 4},      {514, 3, 33, 34}, {3, 5, 0, 2},        {256, 9, 1, 0, false},
    {2, 5, 3, 0},        {6, 1, 130, 2},   {260, 300, 2, 0},
};

template <class T>
void test_sizes() {
  for (const sizes& size : kSizes) evaluation<T>(size).run_and_check("sizes");
  // No component, no row.
  evaluation<T> none({3, 0, 2, 1});
  none.run_and_check("no component");
  evaluation<T>({0, 3, 2, 1}).run_and_check("no row");
}

template <class T>
void test_layouts() {
  for (const layout how :
       {layout::reversed, layout::transposed, layout::spread, layout::unaligned}) {
    evaluation<T>({131, 3, 9, 5}, how).run_and_check("layout");
    evaluation<T>({520, 2, 4, 35}, how).run_and_check("layout, packed");
    evaluation<T> own({40, 3, 6, 0}, how);
    own.own(true);
    own.run_and_check("layout, own rows");
  }
}

template <class T>
void test_batches() {
  for (const batch_shapes& shapes : kBatchShapes) {
    for (const layout how : {layout::contiguous, layout::spread}) {
      evaluation<T>({17, 3, 5, 4}, how, shapes).run_and_check("batch");
    }
    evaluation<T>({515, 2, 5, 3}, layout::contiguous, shapes).run_and_check("batch, packed");
  }
  evaluation<T>({4, 3, 2, 1}, layout::contiguous, {{0}, {0}, {}, {}, {}, {}}).run();
}

template <class T>
void test_own_rows() {
  for (const bool includes : {false, true}) {
    for (const sizes& size : {sizes{129, 5, 7, 4}, sizes{40, 3, 5, 0}, sizes{40, 1, 5, 0, false},
                              sizes{30, 33, 3, 3}}) {
      evaluation<T> each(size);
      each.own(includes);
      each.run_and_check("own rows");
    }
    // A component that is the row alone, exactly and but for rounding, on either side of its mean,
    // and one of which no variance is left.
    evaluation<T> alone({6, 2, 3, 3});
    alone.own(includes);
    const T log_count = alone.log_counts[1] = T(2.5);
    for (std::int64_t i = 0; i < 6; ++i) {
      alone.own_component[i] = i == 5 ? -1 : 1;
      alone.own_log_weight[i] = i % 2 == 0 ? log_count : std::nextafter(log_count, T(0));
      for (std::int64_t t = 0; i < 2 && t < 3; ++t) {
        alone.x_at(0, i, t) = alone.mean_at(0, 1, t) / 2;
      }
    }
    alone.own_log_weight[4] = log_count + T(std::log(0.9));
    alone.run_and_check("own rows, alone");
    // An own component that is empty, and a row whose weight is 0.
    evaluation<T> empty({4, 2, 3, 3});
    empty.own(includes);
    empty.own_component[0] = 1;
    empty.log_counts[1] = -std::numeric_limits<T>::infinity();
    empty.own_component[1] = 0;
    empty.own_log_weight[1] = -std::numeric_limits<T>::infinity();
    empty.own_component[2] = empty.own_component[3] = -1;
    empty.run_and_check("own rows, empty");
    const batch_shapes batch{{2}, {2}, {2}, {2}, {2}, {2}};
    evaluation<T> several({20, 3, 5, 2}, layout::contiguous, batch);
    several.own(includes);
    for (std::int64_t a = 0; a < 3; ++a) several.log_count_at(1, a) = several.log_count_at(0, a);
    several.run_and_check("own rows, batch");
  }
}

template <class T>
void test_special_values() {
  const T infinity = std::numeric_limits<T>::infinity();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (const std::int64_t n : {37, 600}) {
    evaluation<T> each({n, 4, 5, 5});
    // Whatever an empty component holds counts for nothing.
    each.log_counts[1] = each.log_counts[2] = -infinity;
    for (std::int64_t t = 0; t < 5; ++t) {
      each.mean_at(0, 1, t) = nan;
      each.diagonal_at(0, 1, t) = infinity;
      for (std::int64_t c = 0; c < 5; ++c) {
        each.factor_at(0, 1, t, c) = infinity;
        each.factor_at(0, 2, t, c) = nan;
      }
    }
    each.run_and_check("empty components");
    // Rows: NaN, an infinity, one that only some factors meet, and more than tf32 holds.
    each.x_at(0, 3, 1) = nan;
    each.x_at(0, 5, 0) = infinity;
    each.x_at(0, 17, 4) = -infinity;
    each.x_at(0, 18, 2) = std::numeric_limits<T>::max();
    for (std::int64_t c = 0; c < 5; ++c) {
      if (c != 2) each.factor_at(0, 0, 4, c) = 0;
    }
    each.run_and_check("special rows");
    each.log_counts[0] = each.log_counts[3] = -infinity;
    each.run_and_check("all empty");
  }
  // An infinite factor: rows that are 0 there are NaN, others infinite.
  for (const std::int64_t rank : {2, 40}) {
    evaluation<T> factor({20, 2, 3, rank, false});
    factor.factor_at(0, 1, 2, rank - 1) = infinity;
    factor.x_at(0, 7, 2) = 0;
    factor.run_and_check("infinite factor");
  }
  // Of the largest float that tf32 rounds to an infinity, products are finite.
  evaluation<T> large({20, 2, 3, 2, false});
  for (std::int64_t i = 0; i < 20; ++i) {
    for (std::int64_t t = 0; t < 3; ++t) large.x_at(0, i, t) *= std::numeric_limits<T>::min() * 8;
  }
  large.factor_at(0, 1, 2, 1) = std::numeric_limits<T>::max();
  large.run_and_check("largest factor");
  evaluation<T> count({5, 3, 2, 1});
  count.log_counts[1] = infinity;
  count.run_and_check("infinite count");
  count.log_counts[1] = nan;
  count.run_and_check("NaN count");
}

// Scores up to 1e8: shifts, not sums, hold the magnitude.
template <class T>
void test_large_norms() {
  evaluation<T> each({19, 5, 7, 7});
  for (std::int64_t i = 0; i < each.x.size(); ++i) each.x[i] *= 3000;
  each.run_and_check("large norms");
}

// More components than one slab has room for.
void test_slabs() {
  evaluation<double> each({131, 33000, 1, 0});
  for (std::int64_t a = 0; a < each.size.k; ++a) each.log_counts[a] -= 10;
  each.own(true);
  each.run();
  each.check("slabs", 13);
}

template <class T>
void test_score_moments() {
  for (const layout how : {layout::contiguous, layout::transposed, layout::spread}) {
    for (const sizes& size : {sizes{130, 17, 5, 3}, sizes{5, 3, 65, 70, false}, sizes{3, 2, 4, 0},
                              sizes{530, 2, 33, 40}}) {
      next_order();
      const mixture_case<T> each(size, how);
      const array<T> mean({size.n, size.k}, how);
      const array<T> variance({size.n, size.k}, how);
      const auto scratch = workspace(
          core::gaussian_score_moments_workspace(size.n, size.k, size.d, size.r, sizeof(T)));
      const array_view diagonal = each.diagonal.view();
      core::gaussian_score_moments(each.x.view(), each.means.view(), each.factors.view(),
                                   size.has_diagonal ? &diagonal : nullptr, mean.view(),
                                   variance.view(), scratch.view());
      bool holds = true;
      for (std::int64_t i = 0; i < size.n; ++i) {
        for (std::int64_t a = 0; a < size.k; ++a) {
          const moments m = each.moments_of(0, i, a);
          holds = holds && matches(mean[i * size.k + a], m.mean, m.mean_error) &&
                  matches(variance[i * size.k + a], m.variance, m.variance_error);
        }
      }
      SUBQUAD_CHECK(holds && mean.gaps_untouched() && variance.gaps_untouched());
    }
  }
}

// Slabs that are not all rows of an entry, with factors that the first of them packs.
template <class T>
void test_packed_slabs() {
  const sizes size{600, 2, 7, 5};
  const mixture_case<T> each(size, layout::contiguous, {{3}, {3}, {3}, {3}, {3}, {}});
  const array_view diagonal = each.diagonal.view();
  const array_view log_counts = each.log_counts.view();
  const array_view x = each.x.view();
  const array_view means = each.means.view();
  const array_view factors = each.factors.view();
  const subquad::mixture m = subquad::check_mixture(x, &log_counts, means, factors, &diagonal);
  subquad::cuda::slab_cut cut(m.size, sizeof(T), 2);
  SUBQUAD_CHECK(cut.packed_stride == 8 && cut.size == 3);
  for (const std::int64_t rows : {std::int64_t{600}, std::int64_t{131}}) {
    next_order();
    cut.size = rows == size.n ? 2 : 1;
    cut.rows = rows;
    const array<T> packed({cut.size * 2 * 5 * 8});
    const array<T> mean({3, 2, 600});
    const array<T> variance({3, 2, 600});
    cut.for_each(m.size, [&](const subquad::cuda::mixture_slab& slab) {
      const std::int64_t start = slab.first_batch * 1200 + slab.first_row;
      subquad::cuda::score_moments<T>(
          subquad::cuda::mixture_arrays<T>(m), cut, slab, &packed[0],
          {{&mean[start], 1, 600}, 1200, {&variance[start], 1, 600}, 1200});
    });
    bool holds = true;
    for (std::int64_t b = 0; b < 3; ++b) {
      for (std::int64_t a = 0; a < 2; ++a) {
        for (std::int64_t i = 0; i < 600; ++i) {
          const moments truth = each.moments_of(b, i, a);
          const std::int64_t index = (b * 2 + a) * 600 + i;
          holds = holds && matches(mean[index], truth.mean, truth.mean_error) &&
                  matches(variance[index], truth.variance, truth.variance_error);
        }
      }
    }
    SUBQUAD_CHECK(holds);
  }
}

void test_slab_cut() {
  using subquad::cuda::slab_cut;
  const auto bytes = [](const slab_cut& cut, std::int64_t k, std::int64_t itemsize) {
    return 2 * cut.size * cut.rows * k * itemsize;
  };
  for (const std::int64_t itemsize : {4, 8}) {
    for (const std::int64_t n : {1, 100, 5000, 100000000}) {
      for (const std::int64_t k : {1, 64, 5000, 1000000}) {
        for (const std::int64_t batch : {1, 3, 4096}) {
          const slab_cut cut({batch, n, k, 64, 64}, itemsize, 2);
          SUBQUAD_CHECK(bytes(cut, k, itemsize) <= subquad::cuda::kSlabBytes);
          SUBQUAD_CHECK(cut.packed * itemsize <= subquad::cuda::kSlabBytes);
          SUBQUAD_CHECK(cut.size >= 1 && cut.rows >= 1 && cut.rows <= n && cut.size <= batch);
          SUBQUAD_CHECK(cut.rows == n || cut.size == 1);
        }
      }
    }
  }
}

template <class T>
void test_all() {
  test_sizes<T>();
  test_layouts<T>();
  test_batches<T>();
  test_own_rows<T>();
  test_special_values<T>();
  test_large_norms<T>();
  test_score_moments<T>();
  test_packed_slabs<T>();
}

}  // namespace

int main() {
  test_slab_cut();
  test_all<float>();
  test_all<double>();
  test_slabs();
  return checks::status();
}
