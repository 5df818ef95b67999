// Random features and their reverse, at every instruction set, against the definition in long
// double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "strided_array.hpp"
#include "subquad/features.hpp"
#include "subquad/threads.hpp"

namespace {

using checks::layout;
using checks::strided_array;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// How an input follows the batch: an element of its own, one for all through a stride of 0, through
// a length of 1, or through a dimension less.
enum class sharing { own, stride, length, rank };

struct problem {
  std::int64_t batch = 1;
  std::int64_t n = 1;
  std::int64_t m = 1;
  std::int64_t d = 1;
  std::int64_t r = 0;
  bool antithetic = false;
  bool bias = true;
  bool diagonal = false;
  bool shift = false;
  bool linear = false;
  bool triangular = false;
  layout how = layout::contiguous;
  sharing rows = sharing::own;
  sharing maps = sharing::own;
  double scale = 1;

  std::int64_t features() const { return antithetic ? 2 * m : m; }
};

// An input whose first index is the batch, whatever its layout makes of it.
template <class T>
class input {
 public:
  input(std::int64_t batch, std::vector<std::int64_t> shape, layout how, sharing kind)
      : kind_(kind),
        array_(full_shape(batch, std::move(shape), kind), how, kind == sharing::stride ? 0 : -1) {}

  subquad::array_view view() const { return array_.view(); }

  template <class... I>
  T& at(std::int64_t b, I... index) {
    if (kind_ == sharing::rank) return array_.at(index...);
    return array_.at(kind_ == sharing::length ? 0 : b, index...);
  }
  template <class... I>
  long double operator()(std::int64_t b, I... index) const {
    return const_cast<input*>(this)->at(b, index...);
  }

 private:
  static std::vector<std::int64_t> full_shape(std::int64_t batch, std::vector<std::int64_t> shape,
                                              sharing kind) {
    if (kind != sharing::rank) {
      shape.insert(shape.begin(), kind == sharing::length ? 1 : batch);
    }
    return shape;
  }

  sharing kind_;
  strided_array<T> array_;
};

template <class T>
struct arrays {
  input<T> x;
  input<T> projection;
  input<T> bias;
  input<T> diagonal;
  input<T> factor;
  input<T> shift;
  input<T> linear;
  input<T> grad;

  explicit arrays(const problem& p)
      : x(p.batch, {p.n, p.d}, p.how, p.rows),
        projection(p.batch, {p.m, p.d}, p.how, p.maps),
        bias(p.batch, {p.m}, p.how, p.maps),
        diagonal(p.batch, {p.d}, p.how, p.maps),
        factor(p.batch, {p.r, p.d}, p.how, p.maps),
        shift(p.batch, {p.d}, p.how, p.maps),
        linear(p.batch, {p.d}, p.how, p.maps),
        grad(p.batch, {p.n, p.features()}, p.how, sharing::own) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(p.n * 1000003 + p.m * 1009 + p.d));
    std::normal_distribution<double> normal;
    const double size = p.scale / std::sqrt(static_cast<double>(p.d + 1));
    const auto draw = [&](double by) { return static_cast<T>(by * normal(generator)); };
    for (std::int64_t b = 0; b < p.batch; ++b) {
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t k = 0; k < p.d; ++k) x.at(b, i, k) = draw(1);
        for (std::int64_t j = 0; j < p.features(); ++j) grad.at(b, i, j) = draw(1);
      }
      for (std::int64_t j = 0; j < p.m; ++j) {
        bias.at(b, j) = draw(1);
        for (std::int64_t k = 0; k < p.d; ++k) projection.at(b, j, k) = draw(size);
      }
      for (std::int64_t k = 0; k < p.d; ++k) {
        diagonal.at(b, k) = draw(size);
        shift.at(b, k) = draw(1);
        linear.at(b, k) = draw(size);
        for (std::int64_t t = 0; t < p.r; ++t) {
          factor.at(b, t, k) = p.triangular && k < t ? T(0) : draw(size / 2);
        }
      }
    }
  }
};

// The views of optional arrays that a problem has.
template <class T>
struct optional_views {
  const problem& p;
  subquad::array_view views[4];

  optional_views(const problem& of, const arrays<T>& with)
      : p(of),
        views{with.diagonal.view(), with.factor.view(), with.shift.view(), with.linear.view()} {}

  const subquad::array_view* diagonal() const { return p.diagonal ? views : nullptr; }
  const subquad::array_view* factor() const { return p.r > 0 ? views + 1 : nullptr; }
  const subquad::array_view* shift() const { return p.shift ? views + 2 : nullptr; }
  const subquad::array_view* linear() const { return p.linear ? views + 3 : nullptr; }
};

// A workspace of exactly the bytes asked for, at an address that nothing is aligned to.
struct workspace {
  explicit workspace(std::size_t bytes)
      : data(bytes + 2, std::uint8_t{0xA5}), length(static_cast<std::int64_t>(bytes)) {}

  subquad::array_view view() { return subquad::contiguous_view(data.data() + 1, &length, 1); }
  bool is_kept() const { return data.front() == 0xA5 && data.back() == 0xA5; }

  std::vector<std::uint8_t> data;
  std::int64_t length;
};

enum class function { logarithms, exponentials, waves, reverse };

template <class T>
strided_array<T> run(const problem& p, const arrays<T>& with, function f, int n_threads = 0) {
  subquad::context how{};
  how.n_threads = n_threads;
  const optional_views<T> optional(p, with);
  strided_array<T> out({p.batch, p.n, f == function::reverse ? p.d : p.features()}, p.how);
  workspace memory((f == function::reverse ? subquad::log_features_vjp_workspace
                                           : subquad::log_features_workspace)(
      p.batch, p.n, p.m, p.d, p.r, sizeof(T), subquad::device_type::cpu));
  if (f == function::reverse) {
    subquad::log_features_vjp(with.grad.view(), with.x.view(), with.projection.view(),
                              optional.diagonal(), optional.factor(), optional.shift(),
                              optional.linear(), p.antithetic, out.view(), memory.view(), how);
  } else if (f == function::waves) {
    subquad::trigonometric_features(with.x.view(), with.projection.view(), with.bias.view(),
                                    optional.diagonal(), optional.factor(), optional.shift(),
                                    optional.linear(), out.view(), memory.view(), how);
  } else {
    subquad::log_features(with.x.view(), with.projection.view(), with.bias.view(),
                          optional.diagonal(), optional.factor(), optional.shift(),
                          optional.linear(), p.antithetic, f == function::exponentials, out.view(),
                          memory.view(), how);
  }
  SUBQUAD_CHECK(memory.is_kept());
  SUBQUAD_CHECK(out.touched_gaps() == 0);
  return out;
}

struct value {
  long double is = 0;
  long double size = 0;  // the sum of the terms' magnitudes

  void add(long double term) { add(term, std::abs(term)); }
  void add(long double term, long double magnitude) {
    is += term;
    size += magnitude;
  }
};

// z of one row, its term, and its inner products with the factor and the projection.
template <class T>
struct row_truth {
  std::vector<long double> z;
  std::vector<value> projected;  // factor z
  std::vector<value> waves;      // projection z
  value term;

  row_truth(const problem& p, const arrays<T>& with, std::int64_t b, std::int64_t i) {
    for (std::int64_t k = 0; k < p.d; ++k) {
      z.push_back(with.x(b, i, k) - (p.shift ? with.shift(b, k) : 0));
      const long double z_k = z.back();
      if (p.linear) term.add(z_k * with.linear(b, k));
      if (p.diagonal) term.add(-z_k * z_k * with.diagonal(b, k) / 2);
    }
    for (std::int64_t t = 0; t < p.r; ++t) {
      value sum;
      for (std::int64_t k = 0; k < p.d; ++k) {
        sum.add(z[static_cast<std::size_t>(k)] * with.factor(b, t, k));
      }
      term.add(-sum.is * sum.is / 2, sum.size * sum.size);
      projected.push_back(sum);
    }
    for (std::int64_t j = 0; j < p.m; ++j) {
      value sum;
      for (std::int64_t k = 0; k < p.d; ++k) {
        sum.add(z[static_cast<std::size_t>(k)] * with.projection(b, j, k));
      }
      waves.push_back(sum);
    }
  }
};

template <class T>
void forward(const problem& p) {
  const arrays<T> with(p);
  const strided_array<T> logarithms = run(p, with, function::logarithms);
  const strided_array<T> exponentials = run(p, with, function::exponentials);
  const long double unit = std::numeric_limits<T>::epsilon();
  // Half a unit of roundings for each of d products and sums, the subtraction of the shift, r sums
  // of squares and 3 sums at the end; the square of an inner product has twice its relative error.
  const auto roundings = static_cast<long double>(p.d + p.r + 4);
  bool close = true;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t i = 0; i < p.n; ++i) {
      const row_truth<T> row(p, with, b, i);
      for (std::int64_t f = 0; f < p.features(); ++f) {
        const std::int64_t j = f % p.m;
        const value& wave = row.waves[static_cast<std::size_t>(j)];
        const long double bias = with.bias(b, j);
        const long double l = (f < p.m ? wave.is : -wave.is) + bias + row.term.is;
        const long double bound = unit * roundings * (wave.size + std::abs(bias) + row.term.size);
        close = close && std::abs(logarithms.at(b, i, f) - l) <= bound;
        close = close && std::abs(exponentials.at(b, i, f) - std::exp(l)) <=
                             std::exp(l) * (std::expm1(bound) + unit);
      }
    }
  }
  SUBQUAD_CHECK(close);
}

template <class T>
void waves(problem p) {
  p.antithetic = true;
  const arrays<T> with(p);
  const strided_array<T> out = run(p, with, function::waves);
  const long double unit = std::numeric_limits<T>::epsilon();
  const auto roundings = static_cast<long double>(p.d + p.r + 4);
  bool close = true;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t i = 0; i < p.n; ++i) {
      const row_truth<T> row(p, with, b, i);
      for (std::int64_t j = 0; j < p.m; ++j) {
        const value& wave = row.waves[static_cast<std::size_t>(j)];
        const long double bias = with.bias(b, j);
        const long double size = std::exp(bias + row.term.is);
        const long double bound =
            size * (std::expm1(unit * roundings * (wave.size + std::abs(bias) + row.term.size)) +
                    2 * unit);
        close = close && std::abs(out.at(b, i, j) - size * std::cos(wave.is)) <= bound;
        close = close && std::abs(out.at(b, i, p.m + j) - size * std::sin(wave.is)) <= bound;
      }
    }
  }
  SUBQUAD_CHECK(close);
}

template <class T>
void reverse(const problem& p) {
  const arrays<T> with(p);
  const strided_array<T> out = run(p, with, function::reverse);
  const long double unit = std::numeric_limits<T>::epsilon();
  // As above, with the roundings of sums over the features and over them and factor^T factor.
  const auto roundings = static_cast<long double>(p.features() + p.d + p.r + 6);
  bool close = true;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t i = 0; i < p.n; ++i) {
      const row_truth<T> row(p, with, b, i);
      value total;
      for (std::int64_t f = 0; f < p.features(); ++f) total.add(with.grad(b, i, f));
      for (std::int64_t k = 0; k < p.d; ++k) {
        value inner;
        if (p.linear) inner.add(with.linear(b, k));
        if (p.diagonal) inner.add(-with.diagonal(b, k) * row.z[static_cast<std::size_t>(k)]);
        for (std::int64_t t = 0; t < p.r; ++t) {
          const value& projected = row.projected[static_cast<std::size_t>(t)];
          const long double f = with.factor(b, t, k);
          inner.add(-f * projected.is, std::abs(f) * projected.size);
        }
        value sum;
        sum.add(total.is * inner.is, total.size * inner.size);
        for (std::int64_t j = 0; j < p.m; ++j) {
          const long double weight = with.projection(b, j, k);
          sum.add(with.grad(b, i, j) * weight);
          if (p.antithetic) sum.add(-with.grad(b, i, p.m + j) * weight);
        }
        close = close && std::abs(out.at(b, i, k) - sum.is) <= unit * roundings * sum.size;
      }
    }
  }
  SUBQUAD_CHECK(close);
}

template <class T>
void all_of(const problem& p) {
  const int before = checks::failures();
  forward<T>(p);
  waves<T>(p);
  reverse<T>(p);
  if (checks::failures() == before) return;
  std::printf(
      "batch %d n %d m %d d %d r %d antithetic %d diagonal %d shift %d linear %d layout %d\n",
      static_cast<int>(p.batch), static_cast<int>(p.n), static_cast<int>(p.m),
      static_cast<int>(p.d), static_cast<int>(p.r), p.antithetic, p.diagonal, p.shift, p.linear,
      static_cast<int>(p.how));
}

template <class T>
void shapes() {
  bool antithetic = false;
  for (const std::int64_t n : {1, 3, 13, 50}) {
    for (const std::int64_t m : {1, 5, 32, 67}) {
      for (const std::int64_t d : {1, 2, 7, 33}) {
        problem p;
        p.n = n;
        p.m = m;
        p.d = d;
        p.r = (n + d) % 3 == 0 ? 0 : d;
        p.antithetic = antithetic = !antithetic;
        p.diagonal = m % 2 == 1;
        p.shift = true;
        p.linear = true;
        all_of<T>(p);
      }
    }
  }
  problem p;  // many tasks, and a projection that is read in parts
  p.n = 403;
  p.m = 37;
  p.d = 40;
  p.r = 40;
  p.triangular = true;
  all_of<T>(p);
  p.n = 29;
  p.m = 700;
  p.d = 130;
  p.r = 70;
  p.shift = true;
  p.antithetic = true;
  all_of<T>(p);
}

template <class T>
void optional_arrays() {
  for (int present = 0; present < 32; ++present) {
    problem p;
    p.n = 15;
    p.m = 9;
    p.d = 5;
    p.diagonal = (present & 1) != 0;
    p.shift = (present & 2) != 0;
    p.linear = (present & 4) != 0;
    p.r = (present & 8) != 0 ? 3 : 0;
    p.antithetic = (present & 16) != 0;
    all_of<T>(p);
  }
}

template <class T>
void layouts() {
  for (const layout how :
       {layout::contiguous, layout::transposed, layout::flipped, layout::spaced}) {
    for (const sharing rows : {sharing::own, sharing::stride}) {
      for (const sharing maps : {sharing::own, sharing::stride, sharing::length, sharing::rank}) {
        problem p;
        p.batch = 3;
        p.n = 14;
        p.m = 35;
        p.d = 6;
        p.r = 4;
        p.diagonal = p.shift = p.linear = true;
        p.how = how;
        p.rows = rows;
        p.maps = maps;
        p.antithetic = maps == sharing::own;
        all_of<T>(p);
      }
    }
  }
}

template <class T>
void empty() {
  for (const std::vector<std::int64_t>& lengths :
       {std::vector<std::int64_t>{0, 3, 4, 2}, {2, 0, 4, 2}, {2, 3, 0, 2}, {2, 3, 4, 0}}) {
    problem p;
    p.batch = lengths[0];
    p.n = lengths[1];
    p.m = lengths[2];
    p.d = lengths[3];
    p.r = 2;
    p.diagonal = p.shift = p.linear = true;
    all_of<T>(p);
    p.antithetic = true;
    all_of<T>(p);
  }
}

// Rows of NaN and infinities reach their own outputs only; a bias of -inf removes a feature.
template <class T>
void not_finite() {
  problem p;
  p.n = 40;
  p.m = 35;
  p.d = 6;
  p.r = 6;
  p.diagonal = p.shift = p.linear = p.antithetic = true;
  const arrays<T> clean(p);
  for (const double bad : {kNaN, kInfinity, -kInfinity}) {
    arrays<T> with(p);
    for (const std::int64_t i : {0, 17, 39}) {
      with.x.at(0, i, 3) = static_cast<T>(bad);
      with.grad.at(0, i, 2) = static_cast<T>(bad);
    }
    for (const function f :
         {function::logarithms, function::exponentials, function::waves, function::reverse}) {
      const strided_array<T> expected = run(p, clean, f);
      const strided_array<T> found = run(p, with, f);
      const std::int64_t columns = f == function::reverse ? p.d : p.features();
      bool right = true;
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) {
          if (i == 0 || i == 17 || i == 39) {
            right = right && (std::isfinite(bad) || !std::isfinite(found.at(0, i, j)) ||
                              f == function::exponentials);
            right = right && (!std::isnan(bad) || std::isnan(found.at(0, i, j)));
          } else {
            right = right && found.at(0, i, j) == expected.at(0, i, j);
          }
        }
      }
      SUBQUAD_CHECK(right);
    }
  }
  arrays<T> with(p);
  with.bias.at(0, 4) = static_cast<T>(-kInfinity);
  for (const function f : {function::logarithms, function::exponentials, function::waves}) {
    const strided_array<T> expected = run(p, clean, f);
    const strided_array<T> found = run(p, with, f);
    bool right = true;
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t j = 0; j < p.features(); ++j) {
        const T value = found.at(0, i, j);
        if (j % p.m != 4) {
          right = right && value == expected.at(0, i, j);
        } else {
          right = right && (f == function::logarithms ? value == -kInfinity : value == T(0));
        }
      }
    }
    SUBQUAD_CHECK(right);
  }
  // What is absent does not meet the infinities of a row.
  problem plain;
  plain.n = 3;
  plain.m = 2;
  plain.d = 2;
  arrays<T> rows(plain);
  rows.x.at(0, 1, 0) = static_cast<T>(kInfinity);
  rows.projection.at(0, 0, 0) = T(2);
  rows.projection.at(0, 1, 0) = T(-1);
  const strided_array<T> out = run(plain, rows, function::logarithms);
  SUBQUAD_CHECK(out.at(0, 1, 0) == kInfinity && out.at(0, 1, 1) == -kInfinity);
  const strided_array<T> values = run(plain, rows, function::exponentials);
  SUBQUAD_CHECK(values.at(0, 1, 0) == kInfinity && values.at(0, 1, 1) == 0);
  const strided_array<T> gradients = run(plain, rows, function::reverse);
  for (std::int64_t k = 0; k < plain.d; ++k) SUBQUAD_CHECK(std::isfinite(gradients.at(0, 1, k)));
}

// Subtracting the shift before the product keeps what the row and the shift have in common out of
// the rounding errors, and pairs have the same |t|.
template <class T>
void shifts_cancel() {
  problem p;
  p.n = 5;
  p.m = 3;
  p.d = 8;
  p.shift = true;
  p.antithetic = true;
  arrays<T> with(p);
  arrays<T> near(p);
  for (std::int64_t k = 0; k < p.d; ++k) {
    with.shift.at(0, k) = T(1 << 18);
    near.shift.at(0, k) = T(0);
    for (std::int64_t i = 0; i < p.n; ++i) {
      const T step = static_cast<T>((i * 7 + k * 3) % 11) / 4;
      with.x.at(0, i, k) = T(1 << 18) + step;
      near.x.at(0, i, k) = step;
    }
  }
  for (std::int64_t j = 0; j < p.m; ++j) with.bias.at(0, j) = near.bias.at(0, j) = T(0);
  const strided_array<T> found = run(p, with, function::logarithms);
  const strided_array<T> expected = run(p, near, function::logarithms);
  SUBQUAD_CHECK(found.data() == expected.data());
  for (std::int64_t i = 0; i < p.n; ++i) {
    for (std::int64_t j = 0; j < p.m; ++j) {
      SUBQUAD_CHECK(found.at(0, i, j) == -found.at(0, i, p.m + j));
    }
  }
}

// Angles of any size, which one product makes exactly.
template <class T>
void large_angles() {
  problem p;
  p.n = 29;
  p.m = 3;
  arrays<T> with(p);
  for (std::int64_t j = 0; j < p.m; ++j) {
    with.projection.at(0, j, 0) = static_cast<T>(j - 1);
    with.bias.at(0, j) = T(0);
  }
  for (std::int64_t i = 0; i < p.n; ++i) {
    with.x.at(0, i, 0) = static_cast<T>(0.37 * std::pow(10.0, static_cast<double>(i)));
  }
  with.x.at(0, 3, 0) = static_cast<T>(kInfinity);
  p.antithetic = true;
  const strided_array<T> out = run(p, with, function::waves);
  const long double bound = 4 * static_cast<long double>(std::numeric_limits<T>::epsilon());
  for (std::int64_t i = 0; i < p.n; ++i) {
    for (std::int64_t j = 0; j < p.m; ++j) {
      const long double t = with.x(0, i, 0) * with.projection(0, j, 0);
      if (i == 3) {
        SUBQUAD_CHECK(std::isnan(out.at(0, i, j)) && std::isnan(out.at(0, i, p.m + j)));
      } else {
        SUBQUAD_CHECK(std::abs(out.at(0, i, j) - std::cos(t)) <= bound);
        SUBQUAD_CHECK(std::abs(out.at(0, i, p.m + j) - std::sin(t)) <= bound);
      }
    }
  }
}

template <class T>
void threads_do_not_show() {
  for (const std::int64_t batch : {1, 5}) {
    problem p;
    p.batch = batch;
    p.n = 2003 / batch;
    p.m = 64;
    p.d = 48;
    p.r = 48;
    p.shift = p.linear = p.antithetic = true;
    const arrays<T> with(p);
    for (const function f :
         {function::logarithms, function::exponentials, function::waves, function::reverse}) {
      const strided_array<T> one = run(p, with, f, 1);
      for (const int threads : {2, 3}) {
        SUBQUAD_CHECK(run(p, with, f, threads).data() == one.data());
      }
    }
  }
}

// An output that the caches do not hold is written another way, to the same values; its address is
// aligned to nothing but its elements.
template <class T>
void large_outputs(std::int64_t m, bool antithetic, function f) {
  problem p;
  p.m = m;
  p.d = 3;
  p.antithetic = antithetic;
  p.n = (32 << 20) / static_cast<std::int64_t>(sizeof(T)) / p.features() + 100;
  p.shift = p.linear = true;
  const arrays<T> with(p);
  const strided_array<T> out = run(p, with, f);
  problem part = p;
  part.n = 1000;
  bool same = true;
  for (const std::int64_t first : {std::int64_t{0}, p.n / 2, p.n - part.n}) {
    arrays<T> rows(part);
    rows.projection = with.projection;
    rows.bias = with.bias;
    rows.shift = with.shift;
    rows.linear = with.linear;
    for (std::int64_t i = 0; i < part.n; ++i) {
      for (std::int64_t k = 0; k < p.d; ++k) {
        rows.x.at(0, i, k) = static_cast<T>(with.x(0, first + i, k));
      }
    }
    const strided_array<T> expected = run(part, rows, f);
    for (std::int64_t i = 0; i < part.n; ++i) {
      for (std::int64_t j = 0; j < p.features(); ++j) {
        same = same && out.at(0, first + i, j) == expected.at(0, i, j);
      }
    }
  }
  SUBQUAD_CHECK(same);
  for (std::int64_t i = 0; i < p.n; ++i) {
    for (std::int64_t j = 0; j < p.features(); ++j) same = same && out.at(0, i, j) != T(-77);
  }
  SUBQUAD_CHECK(same);
}

template <class T>
void everything() {
  shapes<T>();
  optional_arrays<T>();
  layouts<T>();
  empty<T>();
  not_finite<T>();
  shifts_cancel<T>();
  large_angles<T>();
  threads_do_not_show<T>();
}

void refusals() {
  const strided_array<float> x({5, 3});
  const strided_array<float> projection({4, 3});
  const strided_array<float> bias({1, 4});
  const strided_array<float> out({1, 5, 4});
  const strided_array<float> row({1, 3});
  const std::vector<double> other(3);
  const std::int64_t length = 3;
  workspace none(0);
  workspace enough(1 << 20);
  const auto call = [&](const subquad::array_view& bias_view, const subquad::array_view* linear,
                        bool antithetic, const subquad::array_view& memory) {
    subquad::log_features(x.view(), projection.view(), bias_view, nullptr, nullptr, nullptr, linear,
                          antithetic, false, out.view(), memory);
  };
  const subquad::array_view linear = subquad::contiguous_view(other.data(), &length, 1);
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(row.view(), nullptr, false, enough.view()); }, "bias"));
  SUBQUAD_CHECK(checks::throws<subquad::type_error>(
      [&] { call(bias.view(), &linear, false, enough.view()); }, "linear"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(bias.view(), nullptr, true, enough.view()); }, "out"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(bias.view(), nullptr, false, none.view()); }, "workspace"));
}

}  // namespace

int main() {
  refusals();
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    everything<float>();
    everything<double>();
    large_outputs<float>(65, false, function::logarithms);
    large_outputs<float>(32, true, function::logarithms);
    large_outputs<double>(33, true, function::waves);
    large_outputs<double>(64, false, function::exponentials);
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}
