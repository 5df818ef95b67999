// The networks that make the values of sparse factors and their reverse, at every instruction set,
// against the definition in long double.
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
#include "subquad/factors.hpp"
#include "subquad/threads.hpp"

namespace {

using checks::layout;
using checks::strided_array;
using lengths = std::vector<std::int64_t>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Batch dimensions, of which each input has its own, aligned from the last on; `repeated` puts a
// stride of 0 on the first one of the weights.
struct problem {
  lengths batch{};
  std::int64_t n = 1;
  std::int64_t m = 1;
  std::int64_t d = 1;
  std::int64_t h = 1;
  std::int64_t k = 1;
  layout how = layout::contiguous;
  lengths x{};
  lengths weight_in{};
  lengths bias_in{};
  lengths weight_out{};
  lengths bias_out{};
  bool repeated = false;

  std::int64_t count() const {
    std::int64_t count = 1;
    for (const std::int64_t length : batch) count *= length;
    return count;
  }
};

// An array whose first index is that of the batch, whichever dimensions it has of this.
template <class T>
class batched {
 public:
  batched(const lengths& batch, lengths own, const lengths& shape, layout how,
          bool repeated = false)
      : batch_(batch),
        own_(std::move(own)),
        array_(joined(own_, shape), how, repeated && !own_.empty() ? 0 : -1) {}

  subquad::array_view view() const { return array_.view(); }
  const strided_array<T>& array() const { return array_; }

  template <class... I>
  T& at(std::int64_t b, I... index) {
    std::int64_t own[2] = {0, 0};
    std::size_t axis = own_.size();
    for (std::size_t i = batch_.size(); i > 0; --i) {
      const std::int64_t in_batch = b % batch_[i - 1];
      b /= batch_[i - 1];
      if (axis == 0) continue;
      --axis;
      own[axis] = own_[axis] == 1 ? 0 : in_batch;
    }
    if (own_.empty()) return array_.at(index...);
    if (own_.size() == 1) return array_.at(own[0], index...);
    return array_.at(own[0], own[1], index...);
  }
  template <class... I>
  long double operator()(std::int64_t b, I... index) const {
    return const_cast<batched*>(this)->at(b, index...);
  }

 private:
  static lengths joined(lengths own, const lengths& shape) {
    own.insert(own.end(), shape.begin(), shape.end());
    return own;
  }

  lengths batch_;
  lengths own_;
  strided_array<T> array_;
};

template <class T>
struct arrays {
  batched<T> x;
  batched<T> weight_in;
  batched<T> bias_in;
  batched<T> weight_out;
  batched<T> bias_out;
  batched<T> grad;

  explicit arrays(const problem& p)
      : x(p.batch, p.x, {p.n, p.d}, p.how),
        weight_in(p.batch, p.weight_in, {p.m, p.h, p.d}, p.how, p.repeated),
        bias_in(p.batch, p.bias_in, {p.m, p.h}, p.how, p.repeated),
        weight_out(p.batch, p.weight_out, {p.m, p.k, p.h}, p.how, p.repeated),
        bias_out(p.batch, p.bias_out, {p.m, p.k}, p.how, p.repeated),
        grad(p.batch, p.batch, {p.m, p.n, p.k}, p.how) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(p.n * 1000003 + p.h * 1009 + p.d));
    std::normal_distribution<double> normal;
    const auto draw = [&](double by) { return static_cast<T>(by * normal(generator)); };
    const double in = 1 / std::sqrt(static_cast<double>(p.d + 1));
    const double out = 1 / std::sqrt(static_cast<double>(p.h + 1));
    for (std::int64_t b = 0; b < p.count(); ++b) {
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t t = 0; t < p.d; ++t) x.at(b, i, t) = draw(2);
      }
      for (std::int64_t m = 0; m < p.m; ++m) {
        for (std::int64_t j = 0; j < p.h; ++j) {
          bias_in.at(b, m, j) = draw(1);
          for (std::int64_t t = 0; t < p.d; ++t) weight_in.at(b, m, j, t) = draw(in);
        }
        for (std::int64_t o = 0; o < p.k; ++o) {
          bias_out.at(b, m, o) = draw(1);
          for (std::int64_t j = 0; j < p.h; ++j) weight_out.at(b, m, o, j) = draw(out);
          for (std::int64_t i = 0; i < p.n; ++i) grad.at(b, m, i, o) = draw(1);
        }
      }
    }
  }
};

// A workspace of exactly the bytes asked for, at an address that nothing is aligned to.
struct workspace {
  explicit workspace(std::size_t bytes)
      : data(bytes + 2, std::uint8_t{0xFF}), length(static_cast<std::int64_t>(bytes)) {}

  subquad::array_view view() { return subquad::contiguous_view(data.data() + 1, &length, 1); }
  bool is_kept() const { return data.front() == 0xFF && data.back() == 0xFF; }

  std::vector<std::uint8_t> data;
  std::int64_t length;
};

template <class T>
batched<T> values(const problem& p, const arrays<T>& with, int n_threads = 0) {
  subquad::context how{};
  how.n_threads = n_threads;
  batched<T> out(p.batch, p.batch, {p.m, p.n, p.k}, p.how);
  workspace memory(subquad::factor_values_workspace(p.count(), p.m, p.n, p.d, p.h, p.k, sizeof(T)));
  subquad::factor_values(with.x.view(), with.weight_in.view(), with.bias_in.view(),
                         with.weight_out.view(), with.bias_out.view(), out.view(), memory.view(),
                         how);
  SUBQUAD_CHECK(memory.is_kept());
  SUBQUAD_CHECK(out.array().touched_gaps() == 0);
  return out;
}

enum gradient : unsigned {
  kX = 1,
  kWeightIn = 2,
  kBiasIn = 4,
  kWeightOut = 8,
  kBiasOut = 16,
  kAll = 31
};

template <class T>
struct gradients {
  batched<T> x;
  batched<T> weight_in;
  batched<T> bias_in;
  batched<T> weight_out;
  batched<T> bias_out;

  explicit gradients(const problem& p)
      : x(p.batch, p.batch, {p.n, p.d}, p.how),
        weight_in(p.batch, p.weight_in, {p.m, p.h, p.d}, p.how),
        bias_in(p.batch, p.bias_in, {p.m, p.h}, p.how),
        weight_out(p.batch, p.weight_out, {p.m, p.k, p.h}, p.how),
        bias_out(p.batch, p.bias_out, {p.m, p.k}, p.how) {}

  bool operator==(const gradients& other) const {
    return x.array().data() == other.x.array().data() &&
           weight_in.array().data() == other.weight_in.array().data() &&
           bias_in.array().data() == other.bias_in.array().data() &&
           weight_out.array().data() == other.weight_out.array().data() &&
           bias_out.array().data() == other.bias_out.array().data();
  }
};

template <class T>
gradients<T> reverse(const problem& p, const arrays<T>& with, unsigned asked = kAll,
                     int n_threads = 0) {
  subquad::context how{};
  how.n_threads = n_threads;
  gradients<T> out(p);
  const subquad::array_view views[] = {out.x.view(), out.weight_in.view(), out.bias_in.view(),
                                       out.weight_out.view(), out.bias_out.view()};
  const auto optional = [&](int i) { return (asked >> i & 1) != 0 ? views + i : nullptr; };
  workspace memory(
      subquad::factor_values_vjp_workspace(p.count(), p.m, p.n, p.d, p.h, p.k, sizeof(T)));
  subquad::factor_values_vjp(with.grad.view(), with.x.view(), with.weight_in.view(),
                             with.bias_in.view(), with.weight_out.view(), optional(0), optional(1),
                             optional(2), optional(3), optional(4), memory.view(), how);
  SUBQUAD_CHECK(memory.is_kept());
  SUBQUAD_CHECK(out.x.array().touched_gaps() == 0);
  SUBQUAD_CHECK(out.weight_in.array().touched_gaps() == 0);
  SUBQUAD_CHECK(out.bias_in.array().touched_gaps() == 0);
  SUBQUAD_CHECK(out.weight_out.array().touched_gaps() == 0);
  SUBQUAD_CHECK(out.bias_out.array().touched_gaps() == 0);
  return out;
}

// A number, and what roundings may have made of it in units of eps.
struct value {
  long double is = 0;
  long double error = 0;
};

// Sums and the bound of their errors, at the indices of an array.
class table {
 public:
  table(const problem& p, const lengths& own, const lengths& shape)
      : is_(p.batch, own, shape, layout::contiguous),
        error_(p.batch, own, shape, layout::contiguous) {
    auto clear = [&](auto& of) {
      for (double& element : const_cast<std::vector<double>&>(of.array().data())) element = 0;
    };
    clear(error_);
    sums_.assign(is_.array().data().size(), 0.0L);
  }

  template <class... I>
  void add(long double term, long double error, std::int64_t b, I... index) {
    sums_[position(b, index...)] += term;
    error_.at(b, index...) += static_cast<double>(error);
  }

  // Whether what was found is as near as the bound, in units of eps, says.
  template <class T, class... I>
  bool is_near(const batched<T>& found, std::int64_t b, I... index) const {
    const long double unit = std::numeric_limits<T>::epsilon();
    const long double truth = sums_[position(b, index...)];
    return std::abs(found(b, index...) - truth) <=
           unit * error_(b, index...) + 4 * std::numeric_limits<T>::denorm_min();
  }

 private:
  template <class... I>
  std::size_t position(std::int64_t b, I... index) const {
    auto& element = const_cast<batched<double>&>(is_).at(b, index...);
    return static_cast<std::size_t>(&element - is_.array().data().data());
  }

  batched<double> is_;
  batched<double> error_;
  std::vector<long double> sums_;
};

struct truth {
  table out;
  table x;
  table weight_in;
  table bias_in;
  table weight_out;
  table bias_out;

  template <class T>
  truth(const problem& p, const arrays<T>& with)
      : out(p, p.batch, {p.m, p.n, p.k}),
        x(p, p.batch, {p.n, p.d}),
        weight_in(p, p.weight_in, {p.m, p.h, p.d}),
        bias_in(p, p.bias_in, {p.m, p.h}),
        weight_out(p, p.weight_out, {p.m, p.k, p.h}),
        bias_out(p, p.bias_out, {p.m, p.k}) {
    // Every sum of s terms has s roundings, of half a unit each, of at most the sum of the terms'
    // magnitudes; s counts the rows of all batches for weights and biases.
    const auto rows = static_cast<long double>(p.n * p.count() + 2);
    const auto terms = [](std::int64_t count) { return static_cast<long double>(count + 2) / 2; };
    for (std::int64_t b = 0; b < p.count(); ++b) {
      for (std::int64_t m = 0; m < p.m; ++m) {
        for (std::int64_t i = 0; i < p.n; ++i) {
          for (std::int64_t o = 0; o < p.k; ++o) {
            const long double bias = with.bias_out(b, m, o);
            out.add(bias, terms(p.h) * std::abs(bias), b, m, i, o);
            const long double g = with.grad(b, m, i, o);
            bias_out.add(g, rows * std::abs(g), b, m, o);
          }
          for (std::int64_t j = 0; j < p.h; ++j) add_hidden(p, with, b, m, i, j, rows, terms);
        }
      }
    }
  }

  template <class T, class Terms>
  void add_hidden(const problem& p, const arrays<T>& with, std::int64_t b, std::int64_t m,
                  std::int64_t i, std::int64_t j, long double rows, const Terms& terms) {
    value z{with.bias_in(b, m, j), std::abs(with.bias_in(b, m, j))};
    for (std::int64_t t = 0; t < p.d; ++t) {
      const long double term = with.weight_in(b, m, j, t) * with.x(b, i, t);
      z.is += term;
      z.error += std::abs(term);
    }
    z.error *= terms(p.d);
    const long double phi = std::exp(-z.is * z.is / 2) * 0.398942280401432677939946L;
    const long double probability = std::erfc(-z.is / std::sqrt(2.0L)) / 2;
    // gelu is within 12 ulp, its derivative within 2.5 eps of the magnitudes of its terms; the
    // greatest slopes of the two are 1.13 and 0.8.
    const value a{z.is * probability, 1.13L * z.error + 12 * std::abs(z.is) * probability};
    const value slope{probability + z.is * phi,
                      0.8L * z.error + 2.5L * (probability + std::abs(z.is) * phi)};
    value back;
    long double back_size = 0;
    for (std::int64_t o = 0; o < p.k; ++o) {
      const long double w = with.weight_out(b, m, o, j);
      const long double g = with.grad(b, m, i, o);
      out.add(w * a.is, std::abs(w) * (a.error + terms(p.h) * std::abs(a.is)), b, m, i, o);
      weight_out.add(g * a.is, std::abs(g) * (a.error + rows * std::abs(a.is)), b, m, o, j);
      back.is += w * g;
      back_size += std::abs(w * g);
    }
    const value q{back.is * slope.is, back_size * (slope.error + terms(p.k + 1) * 1.13L)};
    const long double q_size = back_size * 1.13L;
    bias_in.add(q.is, q.error + rows * q_size, b, m, j);
    for (std::int64_t t = 0; t < p.d; ++t) {
      const long double w = with.weight_in(b, m, j, t);
      const long double x_t = with.x(b, i, t);
      x.add(w * q.is, std::abs(w) * (q.error + terms(p.h * p.m) * q_size), b, i, t);
      weight_in.add(q.is * x_t, std::abs(x_t) * (q.error + rows * q_size), b, m, j, t);
    }
  }
};

template <class T>
bool is_right(const problem& p, const truth& expected, const batched<T>& out) {
  bool near = true;
  for (std::int64_t b = 0; b < p.count(); ++b) {
    for (std::int64_t m = 0; m < p.m; ++m) {
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t o = 0; o < p.k; ++o) {
          near = near && expected.out.is_near(out, b, m, i, o);
        }
      }
    }
  }
  return near;
}

// What was not asked for is as it was.
template <class T>
bool is_right(const problem& p, const truth& expected, const gradients<T>& found,
              unsigned asked = kAll) {
  bool near = true;
  const auto same = [&](gradient which, const table& of, const batched<T>& out, std::int64_t b,
                        auto... index) {
    near = near && ((asked & which) != 0 ? of.is_near(out, b, index...)
                                         : out(b, index...) == checks::kUntouched);
  };
  for (std::int64_t b = 0; b < p.count(); ++b) {
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t t = 0; t < p.d; ++t) same(kX, expected.x, found.x, b, i, t);
    }
    for (std::int64_t m = 0; m < p.m; ++m) {
      for (std::int64_t j = 0; j < p.h; ++j) {
        same(kBiasIn, expected.bias_in, found.bias_in, b, m, j);
        for (std::int64_t t = 0; t < p.d; ++t) {
          same(kWeightIn, expected.weight_in, found.weight_in, b, m, j, t);
        }
      }
      for (std::int64_t o = 0; o < p.k; ++o) {
        same(kBiasOut, expected.bias_out, found.bias_out, b, m, o);
        for (std::int64_t j = 0; j < p.h; ++j) {
          same(kWeightOut, expected.weight_out, found.weight_out, b, m, o, j);
        }
      }
    }
  }
  return near;
}

template <class F>
void at_every_level(F&& body) {
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    body();
  }
}

template <class T>
void all_of(const problem& p) {
  const int before = checks::failures();
  const arrays<T> with(p);
  const truth expected(p, with);
  at_every_level([&] {
    SUBQUAD_CHECK(is_right(p, expected, values(p, with)));
    SUBQUAD_CHECK(is_right(p, expected, reverse(p, with)));
  });
  if (checks::failures() == before) return;
  std::printf("float%d n %d m %d d %d h %d k %d batch %d layout %d\n",
              static_cast<int>(8 * sizeof(T)), static_cast<int>(p.n), static_cast<int>(p.m),
              static_cast<int>(p.d), static_cast<int>(p.h), static_cast<int>(p.k),
              static_cast<int>(p.count()), static_cast<int>(p.how));
}

template <class T>
void shapes() {
  const lengths sizes[] = {{1, 1, 1},   {3, 16, 17}, {16, 3, 1},  {17, 64, 16},
                           {64, 17, 3}, {65, 1, 64}, {1, 65, 65}, {3, 12, 13}};
  std::int64_t which = 0;
  for (const lengths& size : sizes) {
    for (const std::int64_t n : {1, 2, 33, 130}) {
      problem p;
      p.n = n;
      p.m = ++which % 2 == 0 ? 3 : 1;
      p.d = size[0];
      p.h = size[1];
      p.k = size[2];
      all_of<T>(p);
    }
  }
  problem p;  // many units
  p.n = 1500;
  p.d = 4;
  p.h = 5;
  p.k = 3;
  all_of<T>(p);
}

template <class T>
void layouts() {
  for (const layout how :
       {layout::contiguous, layout::transposed, layout::flipped, layout::spaced}) {
    problem p;
    p.n = 37;
    p.m = 2;
    p.d = 18;
    p.h = 9;
    p.k = 6;
    p.how = how;
    all_of<T>(p);
    p.batch = {3};
    p.x = {3};
    p.weight_in = p.bias_in = p.weight_out = p.bias_out = {3};
    p.n = 3;
    all_of<T>(p);
    p.repeated = true;
    all_of<T>(p);
  }
}

// Weights that some sequences share and some do not, each array its own way.
template <class T>
void batches() {
  problem p;
  p.batch = {2, 3};
  p.n = 3;
  p.m = 2;
  p.d = 5;
  p.h = 4;
  p.k = 3;
  p.x = {2, 3};
  all_of<T>(p);
  for (const lengths& x : {lengths{2, 3}, lengths{3}, lengths{1, 3}}) {
    p.x = x;
    p.weight_in = {2, 1};
    p.bias_in = p.weight_out = p.bias_out = {};
    all_of<T>(p);
    p.bias_out = {2, 1};
    p.bias_in = {1, 1};
    all_of<T>(p);
    p.weight_in = {1, 1};
    p.weight_out = {3};
    all_of<T>(p);
    p.bias_in = {2, 3};
    p.n = 1;
    all_of<T>(p);
    p.n = 3;
  }
  // More sets of weights than there are partial sums at a time, and sequences that share a unit.
  p.batch = {41, 2};
  p.x = {41, 2};
  p.weight_in = {41, 1};
  p.weight_out = {};
  p.bias_in = {2};
  p.bias_out = {};
  p.n = 1;
  all_of<T>(p);
  p.weight_in = p.bias_in = {};
  p.batch = p.x = {2, 350};
  all_of<T>(p);
}

template <class T>
void subsets() {
  problem p;
  p.n = 35;
  p.m = 2;
  p.d = 6;
  p.h = 7;
  p.k = 5;
  const arrays<T> with(p);
  const truth expected(p, with);
  at_every_level([&] {
    for (unsigned asked = 0; asked <= kAll; ++asked) {
      SUBQUAD_CHECK(is_right(p, expected, reverse(p, with, asked), asked));
    }
  });
}

template <class T>
void empty() {
  for (const lengths& size :
       {lengths{0, 2, 3, 4, 5}, lengths{3, 0, 3, 4, 5}, lengths{3, 2, 0, 4, 5},
        lengths{3, 2, 3, 0, 5}, lengths{3, 2, 3, 4, 0}}) {
    problem p;
    p.n = size[0];
    p.m = size[1];
    p.d = size[2];
    p.h = size[3];
    p.k = size[4];
    all_of<T>(p);
    p.batch = p.x = {0};  // weights that no sequence uses have gradients of 0
    all_of<T>(p);
  }
}

// What is not finite reaches what depends on it, and nothing else.
template <class T>
void not_finite() {
  problem p;
  p.n = 40;
  p.m = 2;
  p.d = 6;
  p.h = 7;
  p.k = 5;
  const arrays<T> clean(p);
  at_every_level([&] {
    const batched<T> clean_out = values(p, clean);
    const gradients<T> clean_gradients = reverse(p, clean);
    for (const double bad : {kNaN, kInfinity, -kInfinity}) {
      arrays<T> with(p);
      with.x.at(0, 17, 3) = with.x.at(0, 39, 3) = static_cast<T>(bad);
      const batched<T> out = values(p, with);
      const gradients<T> found = reverse(p, with);
      bool right = true;
      for (std::int64_t i = 0; i < p.n; ++i) {
        const bool touched = i == 17 || i == 39;
        for (std::int64_t m = 0; m < p.m; ++m) {
          for (std::int64_t o = 0; o < p.k; ++o) {
            right = right && (touched ? !std::isfinite(out(0, m, i, o))
                                      : out(0, m, i, o) == clean_out(0, m, i, o));
            right = right && (!touched || !std::isnan(bad) || std::isnan(out(0, m, i, o)));
          }
        }
        for (std::int64_t t = 0; t < p.d; ++t) {
          right = right && (touched ? std::isnan(bad) == std::isnan(found.x(0, i, t))
                                    : found.x(0, i, t) == clean_gradients.x(0, i, t));
        }
      }
      SUBQUAD_CHECK(right);

      // One hidden number, one factor.
      with = clean;
      with.weight_in.at(0, 1, 2, 0) = static_cast<T>(bad);
      const gradients<T> hidden = reverse(p, with);
      right = true;
      for (std::int64_t m = 0; m < p.m; ++m) {
        for (std::int64_t j = 0; j < p.h; ++j) {
          const bool is_bad = std::isnan(bad) && m == 1 && j == 2;
          const bool may_differ = m == 1 && j == 2;
          right = right && std::isnan(hidden.bias_in(0, m, j)) == is_bad;
          right =
              right && (may_differ || hidden.bias_in(0, m, j) == clean_gradients.bias_in(0, m, j));
          for (std::int64_t t = 0; t < p.d; ++t) {
            right = right && std::isnan(hidden.weight_in(0, m, j, t)) == is_bad;
          }
          // Infinities of both signs meet in the sums over rows of a hidden number.
          for (std::int64_t o = 0; o < p.k && !(may_differ && !is_bad); ++o) {
            right = right && std::isnan(hidden.weight_out(0, m, o, j)) == is_bad;
          }
        }
      }
      SUBQUAD_CHECK(right);

      // One number of grad: its row, its factor.
      with = clean;
      with.grad.at(0, 1, 33, 2) = static_cast<T>(bad);
      const gradients<T> back = reverse(p, with);
      right = true;
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t t = 0; t < p.d; ++t) {
          right = right && std::isfinite(back.x(0, i, t)) == (i != 33);
        }
      }
      for (std::int64_t m = 0; m < p.m; ++m) {
        for (std::int64_t o = 0; o < p.k; ++o) {
          right = right && std::isfinite(back.bias_out(0, m, o)) == !(m == 1 && o == 2);
        }
        for (std::int64_t j = 0; j < p.h; ++j) {
          right = right && std::isfinite(back.bias_in(0, m, j)) == (m == 0);
        }
      }
      SUBQUAD_CHECK(right);
    }
  });
}

template <class T>
void threads_do_not_show() {
  for (const lengths& size : {lengths{1, 2003}, lengths{5, 700}, lengths{70, 9}}) {
    problem p;
    p.batch = p.x = {size[0]};
    p.n = size[1];
    p.m = 2;
    p.d = 24;
    p.h = 20;
    p.k = 9;
    const arrays<T> with(p);
    const batched<T> one = values(p, with, 1);
    const gradients<T> one_reverse = reverse(p, with, kAll, 1);
    for (const int threads : {2, 5}) {
      SUBQUAD_CHECK(values(p, with, threads).array().data() == one.array().data());
      SUBQUAD_CHECK(reverse(p, with, kAll, threads) == one_reverse);
    }
  }
}

template <class T>
void everything() {
  shapes<T>();
  layouts<T>();
  batches<T>();
  subsets<T>();
  empty<T>();
  not_finite<T>();
  threads_do_not_show<T>();
}

void refusals() {
  problem p;
  p.n = 5;
  p.m = 2;
  p.d = 3;
  p.h = 4;
  p.k = 6;
  const arrays<float> with(p);
  const strided_array<float> out({2, 5, 6});
  const strided_array<float> grad_x({5, 3});
  const strided_array<float> narrow({2, 3});
  const strided_array<double> wide({2, 4});
  workspace none(0);
  workspace enough(1 << 20);
  const auto call = [&](const subquad::array_view& bias_in, const subquad::array_view& to,
                        const subquad::array_view& memory) {
    subquad::factor_values(with.x.view(), with.weight_in.view(), bias_in, with.weight_out.view(),
                           with.bias_out.view(), to, memory);
  };
  const auto back = [&](const subquad::array_view& grad, const subquad::array_view& grad_bias_in,
                        const subquad::array_view& memory) {
    const subquad::array_view to = grad_x.view();
    subquad::factor_values_vjp(grad, with.x.view(), with.weight_in.view(), with.bias_in.view(),
                               with.weight_out.view(), &to, nullptr, &grad_bias_in, nullptr,
                               nullptr, memory);
  };
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(narrow.view(), out.view(), enough.view()); }, "bias_in"));
  SUBQUAD_CHECK(checks::throws<subquad::type_error>(
      [&] { call(wide.view(), out.view(), enough.view()); }, "bias_in"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(with.bias_in.view(), grad_x.view(), enough.view()); }, "out"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(with.bias_in.view(), out.view(), none.view()); }, "workspace"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { back(with.x.view(), with.bias_in.view(), enough.view()); }, "grad"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { back(with.grad.view(), narrow.view(), enough.view()); }, "grad_bias_in"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { back(with.grad.view(), with.bias_in.view(), none.view()); }, "workspace"));
}

}  // namespace

int main() {
  refusals();
  everything<float>();
  everything<double>();
  return checks::status();
}
