// The reverse of the log-normaliser of Gaussian mixtures, against long double.
#include <cmath>

#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/mixtures.hpp"
#include "normalizers_core.hpp"

namespace {

using namespace mixtures;
namespace core = subquad::core;

// A sum, and how far from it the kernels may be.
struct bounded {
  real value = 0;
  real error = 0;
};

struct wanted {
  bool x = true;
  bool log_counts = true;
  bool means = true;
  bool factors = true;
  bool diagonal = true;
};

template <class T>
struct reverse : mixture_case<T> {
  using base = mixture_case<T>;
  using base::size;
  array<T> grad;
  array<T> log_z;
  array<T> grad_x;
  array<T> grad_log_counts;
  array<T> grad_means;
  array<T> grad_factors;
  array<T> grad_diagonal;
  std::int64_t unchecked = -1;  // column of grad_x
  std::int64_t step = 1;        // between the components that are checked

  explicit reverse(const sizes& s, layout how = layout::contiguous, batch_shapes b = {})
      : base(s, how, b),
        grad(joined(b.all, {s.n}), how),
        log_z(joined(b.all, {s.n}), how),
        grad_x(joined(b.all, {s.n, s.d}), how),
        grad_log_counts(joined(b.all, {s.k}), how),
        grad_means(joined(b.all, {s.k, s.d}), how),
        grad_factors(joined(b.all, {s.k, s.d, s.r}), how),
        grad_diagonal(joined(b.all, {s.k, s.d}), how) {
    fill(grad, this->random, -1, 1);
    normalize();
  }

  // What the forward function gives, rounded.
  void normalize() {
    for (std::int64_t b = 0; b < this->entries(); ++b) {
      for (std::int64_t i = 0; i < size.n; ++i) {
        real sum = 0;
        for (std::int64_t a = 0; a < size.k; ++a) {
          if (this->is_empty(b, a)) continue;
          const moments m = this->moments_of(b, i, a);
          sum += std::exp(this->log_count_at(b, a) + m.mean + m.variance / 2);
        }
        log_z[b * size.n + i] = static_cast<T>(std::log(sum));
      }
    }
  }

  void run(const wanted& what = {}) const {
    next_order();
    const auto scratch = workspace(core::gaussian_log_normalizer_vjp_workspace(
        this->entries(), size.n, size.k, size.d, size.r, sizeof(T)));
    const array_view diagonals = this->diagonal.view();
    const array_view to_x = grad_x.view();
    const array_view to_log_counts = grad_log_counts.view();
    const array_view to_means = grad_means.view();
    const array_view to_factors = grad_factors.view();
    const array_view to_diagonal = grad_diagonal.view();
    core::gaussian_log_normalizer_vjp(
        grad.view(), this->x.view(), this->log_counts.view(), this->means.view(),
        this->factors.view(), size.has_diagonal ? &diagonals : nullptr, log_z.view(),
        what.x ? &to_x : nullptr, what.log_counts ? &to_log_counts : nullptr,
        what.means ? &to_means : nullptr, what.factors ? &to_factors : nullptr,
        what.diagonal ? &to_diagonal : nullptr, scratch.view());
  }

  bounded responsibility(std::int64_t b, std::int64_t i, std::int64_t a) const {
    const real u = kUnit<T>;
    const real normalizer = log_z[b * size.n + i];
    if (this->is_empty(b, a) || normalizer == -kInfinity) return {};
    const moments m = this->moments_of(b, i, a);
    const real log_count = this->log_count_at(b, a);
    const real score = log_count + m.mean + m.variance / 2;
    const real value = grad[b * size.n + i] * std::exp(score - normalizer);
    const real exponent =
        m.mean_error + m.variance_error / 2 +
        u * (std::abs(log_count + m.mean) + std::abs(score) + 2 * std::abs(score - normalizer) + 6);
    return {value, std::abs(value) * std::expm1(exponent)};
  }

  bool report(const char* what, const char* name, std::int64_t index, T got,
              const bounded& expected) const {
    if (matches(got, expected.value, expected.error)) return true;
    std::printf("%s, %zu bytes, n %d k %d d %d r %d: %s[%d] = %.9Lg, expected %.9Lg within %.3Lg\n",
                what, sizeof(T), int(size.n), int(size.k), int(size.d), int(size.r), name,
                int(index), real(got), expected.value, expected.error);
    ++checks::failures();
    return false;
  }

  void check_entry(const char* what, std::int64_t b, const wanted& outputs) const {
    const real u = kUnit<T>;
    const std::int64_t n = size.n;
    const std::int64_t k = size.k;
    const std::int64_t d = size.d;
    const std::int64_t r = size.r;
    const real of_gram = sizeof(T) == 4 ? 32 * std::ldexp(1.0L, -22)
                                        : (34 + static_cast<real>(n) / 128) * kUnit<double>;
    const real of_sums = (static_cast<real>(n) / 8 + 20) * kUnit<double>;
    std::vector<bounded> by_row(static_cast<std::size_t>(n * d));
    bool holds = true;
    for (std::int64_t a = 0; a < k; a += step) {
      std::vector<bounded> weights;
      for (std::int64_t i = 0; i < n; ++i) weights.push_back(responsibility(b, i, a));
      const auto weight = [&](std::int64_t i) { return weights[static_cast<std::size_t>(i)]; };
      // sum_i R_i f_i, its error with `relative` of the sum of magnitudes; rows of weight 0 do not
      // count.
      const auto sum_of = [&](real relative, auto&& f) {
        bounded sum;
        for (std::int64_t i = 0; i < n; ++i) {
          const bounded w = weight(i);
          if (w.value == 0) continue;
          const real factor = f(i);
          sum.value += w.value * factor;
          sum.error += (w.error + relative * std::abs(w.value)) * std::abs(factor);
        }
        return sum;
      };
      const auto rounded = [&](bounded sum) {
        sum.error += u * std::abs(sum.value);
        return sum;
      };
      if (outputs.log_counts) {
        const bounded sum = sum_of(of_sums, [](std::int64_t) { return 1.0L; });
        holds =
            holds && report(what, "grad_log_counts", a, grad_log_counts[b * k + a], rounded(sum));
      }
      for (std::int64_t t = 0; outputs.means && t < d; ++t) {
        const bounded sum =
            sum_of(of_sums, [&](std::int64_t i) { return real(this->x_at(b, i, t)); });
        holds = holds && report(what, "grad_means", a * d + t, grad_means[(b * k + a) * d + t],
                                rounded(sum));
      }
      const auto scatter_of = [&](std::int64_t s, std::int64_t t) {
        return sum_of(of_gram, [&](std::int64_t i) {
          return real(this->x_at(b, i, s)) * this->x_at(b, i, t);
        });
      };
      for (std::int64_t t = 0; outputs.diagonal && t < d; ++t) {
        bounded sum = scatter_of(t, t);
        sum.value /= 2;
        sum.error /= 2;
        holds = holds && report(what, "grad_diagonal", a * d + t,
                                grad_diagonal[(b * k + a) * d + t], rounded(sum));
      }
      for (std::int64_t t = 0; outputs.factors && r > 0 && t < d; ++t) {
        std::vector<bounded> sums(static_cast<std::size_t>(r));
        for (std::int64_t s = 0; s < d; ++s) {
          const bounded scatter = scatter_of(t, s);
          for (std::int64_t c = 0; c < r; ++c) {
            const real factor = this->factor_at(b, a, s, c);
            bounded& sum = sums[static_cast<std::size_t>(c)];
            if (this->is_empty(b, a)) continue;
            sum.value += scatter.value * factor;
            sum.error += (scatter.error + (u + base::product_error(d)) * std::abs(scatter.value)) *
                         std::abs(factor);
          }
        }
        for (std::int64_t c = 0; c < r; ++c) {
          const std::int64_t index = ((b * k + a) * d + t) * r + c;
          holds = holds && report(what, "grad_factors", index, grad_factors[index],
                                  sums[static_cast<std::size_t>(c)]);
        }
      }
      if (!outputs.x) continue;
      std::vector<bounded> covariance(static_cast<std::size_t>(d * d));
      for (std::int64_t s = 0; s < d; ++s) {
        for (std::int64_t t = 0; t < d; ++t) {
          bounded& c = covariance[static_cast<std::size_t>(s * d + t)];
          if (s == t && size.has_diagonal) c.value = this->diagonal_at(b, a, t);
          for (std::int64_t q = 0; q < r; ++q) {
            const real term = real(this->factor_at(b, a, s, q)) * this->factor_at(b, a, t, q);
            c.value += term;
            c.error += base::product_error(r) * std::abs(term);
          }
          c.error += u * std::abs(c.value);
        }
      }
      for (std::int64_t i = 0; i < n; ++i) {
        const bounded w = weight(i);
        if (w.value == 0) continue;
        for (std::int64_t s = 0; s < d; ++s) {
          const real mean = this->mean_at(b, a, s);
          bounded part{mean, 0};
          real magnitude = std::abs(mean);
          for (std::int64_t t = 0; t < d; ++t) {
            const bounded& c = covariance[static_cast<std::size_t>(s * d + t)];
            const real value = this->x_at(b, i, t);
            part.value += c.value * value;
            part.error += (c.error + base::product_error(d) * std::abs(c.value)) * std::abs(value);
            magnitude += std::abs(c.value * value);
          }
          bounded& sum = by_row[static_cast<std::size_t>(i * d + s)];
          sum.value += w.value * part.value;
          sum.error += w.error * std::abs(part.value) + std::abs(w.value) * part.error +
                       static_cast<real>(k + 2) * u * std::abs(w.value) * magnitude;
        }
      }
    }
    for (std::int64_t index = 0; outputs.x && index < n * d; ++index) {
      if (index % d == unchecked) continue;
      holds = holds && report(what, "grad_x", index, grad_x[b * n * d + index],
                              by_row[static_cast<std::size_t>(index)]);
    }
  }

  void run_and_check(const char* what, const wanted& outputs = {}) const {
    run(outputs);
    for (std::int64_t b = 0; b < this->entries(); ++b) check_entry(what, b, outputs);
  }
};

template <class T>
void test_sizes() {
  for (const sizes& size :
       {sizes{1, 1, 1, 0, false}, sizes{1, 1, 1, 1}, sizes{5, 5, 3, 2}, sizes{127, 5, 3, 3},
        sizes{129, 9, 3, 1}, sizes{9, 3, 64, 64}, sizes{130, 1, 65, 65, false}, sizes{7, 5, 65, 0},
        sizes{1030, 2, 3, 2}, sizes{2100, 1, 2, 1}, sizes{33, 1, 64, 33}, sizes{3, 2, 130, 2},
        sizes{3, 5, 0, 2}}) {
    reverse<T>(size).run_and_check("sizes");
  }
  reverse<T>({0, 3, 2, 1}).run_and_check("no row");
  // No component: the gradient of a constant.
  reverse<T>({3, 0, 2, 1}).run_and_check("no component");
}

template <class T>
void test_outputs() {
  const wanted kWanted[] = {{true, false, false, false, false},  {false, true, false, false, false},
                            {false, false, true, false, false},  {false, false, false, true, false},
                            {false, false, false, false, true},  {false, true, true, false, true},
                            {false, false, false, false, false}, {false, false, true, true, true}};
  for (const wanted& outputs : kWanted) {
    reverse<T>({37, 3, 5, 4}).run_and_check("outputs", outputs);
    reverse<T>({1100, 2, 3, 0}).run_and_check("outputs", outputs);
  }
}

template <class T>
void test_layouts() {
  for (const layout how :
       {layout::reversed, layout::transposed, layout::spread, layout::unaligned}) {
    const reverse<T> each({131, 3, 9, 5}, how);
    each.run_and_check("layout");
    SUBQUAD_CHECK(each.grad_x.gaps_untouched() && each.grad_log_counts.gaps_untouched() &&
                  each.grad_means.gaps_untouched() && each.grad_factors.gaps_untouched() &&
                  each.grad_diagonal.gaps_untouched());
  }
}

template <class T>
void test_batches() {
  for (const batch_shapes& shapes : kBatchShapes) {
    for (const layout how : {layout::contiguous, layout::spread}) {
      reverse<T>({17, 3, 5, 4}, how, shapes).run_and_check("batch");
    }
  }
  reverse<T>({515, 2, 3, 2}, layout::contiguous, kBatchShapes[0]).run_and_check("batch, packed");
}

// Entries enough that a block takes all components. Not of float32, where plain arithmetic would
// mend what is read before it is written.
void test_components_in_turn() {
  reverse<double>({2, 3, 2, 0}, layout::contiguous, {{265}, {265}, {}, {265}, {}, {265}})
      .run_and_check("components in turn", {true, false, false, false, false});
}

// More than one group of entries.
void test_groups() {
  const batch_shapes batch{{2}, {2}, {2}, {2}, {2}, {2}};
  reverse<double>({2, 8, 256, 1}, layout::contiguous, batch).run_and_check("groups");
  reverse<double>({2, 8, 256, 1}, layout::contiguous, batch)
      .run_and_check("groups", {false, false, false, false, true});
}

// More moments than one slab has room for.
void test_slabs() {
  reverse<double> each({900, 10000, 0, 0, false});
  each.step = 101;
  each.run_and_check("slabs", {false, true, false, false, false});
}

template <class T>
void test_special_values() {
  const T infinity = std::numeric_limits<T>::infinity();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  reverse<T> empty({37, 4, 5, 5});
  empty.log_counts[1] = empty.log_counts[2] = -infinity;
  for (std::int64_t t = 0; t < 5; ++t) {
    empty.mean_at(0, 1, t) = nan;
    empty.diagonal_at(0, 1, t) = infinity;
    for (std::int64_t c = 0; c < 5; ++c) {
      empty.factor_at(0, 1, t, c) = infinity;
      empty.factor_at(0, 2, t, c) = nan;
    }
  }
  empty.normalize();
  empty.run_and_check("empty components");
  // A row of no gradient, whatever it holds, and rows whose gradient is 0.
  empty.log_z[7] = -infinity;
  empty.x_at(0, 7, 1) = nan;
  empty.grad[8] = 0;
  empty.grad[9] = 0;
  empty.run_and_check("empty rows");
  for (std::int64_t a = 0; a < 4; ++a) empty.log_counts[a] = -infinity;
  for (std::int64_t i = 0; i < 37; ++i) empty.log_z[i] = -infinity;
  empty.run_and_check("all empty");
  // NaN reaches the row, and the parameters.
  reverse<T> row({20, 3, 4, 2});
  row.x_at(0, 5, 2) = nan;
  row.log_z[5] = nan;
  row.run();
  for (std::int64_t i = 0; i < 20; ++i) {
    for (std::int64_t t = 0; t < 4; ++t) {
      SUBQUAD_CHECK(std::isnan(row.grad_x[i * 4 + t]) == (i == 5));
    }
  }
  for (std::int64_t a = 0; a < 3; ++a) {
    SUBQUAD_CHECK(std::isnan(row.grad_log_counts[a]));
    SUBQUAD_CHECK(std::isnan(row.grad_means[a * 4]));
    SUBQUAD_CHECK(std::isnan(row.grad_factors[a * 8]));
    SUBQUAD_CHECK(std::isnan(row.grad_diagonal[a * 4]));
  }
  // The largest float, which tf32 rounds to an infinity, with rows that make its effect finite.
  reverse<T> large({20, 3, 4, 2});
  for (std::int64_t i = 0; i < 20; ++i) {
    large.x_at(0, i, 3) *= std::ldexp(std::numeric_limits<T>::min(), 24);
  }
  large.diagonal_at(0, 1, 3) = std::numeric_limits<T>::max();
  large.log_counts[2] = -infinity;
  large.mean_at(0, 2, 3) = nan;
  large.normalize();
  large.run_and_check("largest diagonal");
  // In its own column, the gradient is beyond what T holds.
  reverse<T> factor({20, 3, 4, 2});
  for (std::int64_t i = 0; i < 20; ++i) {
    factor.x_at(0, i, 3) *= std::numeric_limits<T>::min() * 2;
  }
  factor.factor_at(0, 1, 3, 1) = std::numeric_limits<T>::max();
  factor.normalize();
  factor.unchecked = 3;
  factor.run_and_check("largest factor", {true, true, true, false, false});
}

template <class T>
void test_all() {
  test_sizes<T>();
  test_outputs<T>();
  test_layouts<T>();
  test_batches<T>();
  test_special_values<T>();
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_components_in_turn();
  test_groups();
  test_slabs();
  return checks::status();
}
