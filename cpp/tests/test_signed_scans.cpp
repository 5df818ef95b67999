// signed_logcumsumexp and its reverse, at every instruction set, against the definition in
// compensated long double, and against sums that cancel by construction.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "strided_array.hpp"
#include "subquad/scans.hpp"
#include "subquad/threads.hpp"

namespace {

using checks::layout;
using checks::strided_array;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct problem {
  std::int64_t outer = 1;
  std::int64_t n = 1;
  std::int64_t inner = 1;
  std::int32_t axis = 2;  // 1: (outer, n, inner); 2: (outer, inner, n); 0: (n, outer, inner)
  layout how = layout::contiguous;
  std::int32_t broadcast_sign = -1;
  bool reverse = false;
  bool exclusive = false;

  std::vector<std::int64_t> shape() const {
    if (axis == 0) return {n, outer, inner};
    if (axis == 1) return {outer, n, inner};
    return {outer, inner, n};
  }
  template <class A>
  auto& at(A& array, std::int64_t o, std::int64_t t, std::int64_t i) const {
    const std::int64_t step = reverse ? n - 1 - t : t;
    if (axis == 0) return array.at(step, o, i);
    if (axis == 1) return array.at(o, step, i);
    return array.at(o, i, step);
  }
};

template <class T>
struct arrays {
  strided_array<T> x;
  strided_array<T> sign;
  strided_array<T> grad;
  strided_array<T> out;
  strided_array<T> out_sign;
  strided_array<T> grad_x;
  strided_array<T> grad_sign;

  explicit arrays(const problem& p)
      : x(p.shape(), p.how),
        sign(p.shape(), p.how, p.broadcast_sign),
        grad(p.shape(), p.how),
        out(p.shape(), p.how),
        out_sign(p.shape(), p.how),
        grad_x(p.shape(), p.how),
        grad_sign(p.shape(), p.how) {}

  using number = std::function<double()>;
  void fill(const problem& p, const number& exponent, const number& weight, const number& g) {
    for (std::int64_t o = 0; o < p.outer; ++o) {
      for (std::int64_t i = 0; i < p.inner; ++i) {
        for (std::int64_t t = 0; t < p.n; ++t) {
          p.at(x, o, t, i) = static_cast<T>(exponent());
          p.at(sign, o, t, i) = static_cast<T>(weight());
          p.at(grad, o, t, i) = static_cast<T>(g());
        }
      }
    }
  }
};

template <class T>
void run(const problem& p, arrays<T>& with, int n_threads = 0) {
  const std::int64_t lanes = p.outer * p.inner;
  subquad::context how{};
  how.n_threads = n_threads;
  const subquad::array_view grad_x = with.grad_x.view();
  const subquad::array_view grad_sign = with.grad_sign.view();
  const strided_array<std::uint8_t> forward(
      {static_cast<std::int64_t>(subquad::signed_logcumsumexp_workspace(lanes, p.n, sizeof(T)))});
  subquad::signed_logcumsumexp(with.x.view(), with.sign.view(), p.axis, p.reverse, p.exclusive,
                               with.out.view(), with.out_sign.view(), forward.view(), how);
  const strided_array<std::uint8_t> backward({static_cast<std::int64_t>(
      subquad::signed_logcumsumexp_vjp_workspace(lanes, p.n, sizeof(T)))});
  subquad::signed_logcumsumexp_vjp(with.x.view(), with.sign.view(), p.axis, p.reverse, p.exclusive,
                                   with.grad.view(), &grad_x, &grad_sign, backward.view(), how);
}

long double times(long double a, long double b) { return a == 0 || b == 0 ? 0 : a * b; }

// A sum that keeps what rounding takes from it.
struct exact_sum {
  long double sum = 0;
  long double remainder = 0;

  void add(long double term) {
    const long double next = sum + term;
    const long double part = next - sum;
    const long double lost = (sum - (next - part)) + (term - part);
    sum = next;
    remainder = std::isfinite(next) ? remainder + lost : 0;
  }
  long double total() const { return sum + remainder; }
};

// One row by the definition; condition[t] = sum |terms| / |sum of terms| of out_t.
struct truth {
  std::vector<long double> logs;
  std::vector<long double> signs;
  std::vector<long double> condition;
  std::vector<long double> slopes;  // exp(x_j) sum_i grad_i / s_i
  std::vector<long double> sizes;   // exp(x_j) sum_i |grad_i / s_i| (8 condition_i + 16 + n)
  long double spread = 0;           // of the finite x, as far as double tells terms apart

  template <class T>
  truth(const problem& p, const arrays<T>& with, std::int64_t o, std::int64_t i) {
    const auto n = static_cast<std::size_t>(p.n);
    long double high = -kInfinity;
    long double low = kInfinity;
    for (std::int64_t t = 0; t < p.n; ++t) {
      const long double x = p.at(with.x, o, t, i);
      if (!std::isfinite(x) || p.at(with.sign, o, t, i) == T(0)) continue;
      high = std::max(high, x);
      low = std::min(low, x);
    }
    if (high >= low) spread = std::min<long double>(high - low, 745);
    const long double middle = high >= low ? (high + low) / 2 : 0;

    exact_sum sum;
    long double size = 0;
    std::vector<long double> totals;
    logs.resize(n);
    signs.resize(n);
    condition.resize(n);
    const auto look = [&](std::size_t at) {
      const long double total = sum.total();
      logs[at] = middle + std::log(std::abs(total));
      signs[at] = total > 0 ? 1 : total < 0 ? -1 : total;
      condition[at] = total == 0 ? 0 : size / std::abs(total);
      totals.push_back(total);
    };
    for (std::int64_t t = 0; t < p.n; ++t) {
      const auto at = static_cast<std::size_t>(t);
      if (p.exclusive) look(at);
      const long double x = p.at(with.x, o, t, i);
      const long double weight = p.at(with.sign, o, t, i);
      const long double term = times(weight, std::exp(x - middle));
      if (!(std::isinf(sum.total()) && x < kInfinity)) sum.add(term);
      size += std::abs(term);
      if (!p.exclusive) look(at);
    }
    slopes.resize(n);
    sizes.resize(n);
    long double share = 0;
    long double share_size = 0;
    const auto take = [&](std::int64_t t) {
      const auto at = static_cast<std::size_t>(t);
      const long double g = p.at(with.grad, o, t, i);
      if (g == 0 || totals[at] == 0) return;
      const long double part = std::isfinite(totals[at]) ? g / totals[at] : kNaN;
      share += part;
      share_size += std::abs(part) * (8 * condition[at] + 16 + static_cast<long double>(n));
    };
    for (std::int64_t t = p.n - 1; t >= 0; --t) {
      const auto at = static_cast<std::size_t>(t);
      if (!p.exclusive) take(t);
      const long double weight = std::exp(static_cast<long double>(p.at(with.x, o, t, i)) - middle);
      slopes[at] = times(weight, share);
      sizes[at] = times(weight, share_size);
      if (p.exclusive) take(t);
    }
  }
};

bool same_class(long double found, long double expected) {
  if (std::isnan(expected)) return std::isnan(found);
  return found == expected;
}

// Tolerances: half an ulp of the result, and in units of a double 4 for every term of a sum (an
// exponential, a weight, a change of the reference), the logarithm of a sum that lies up to
// `spread` from its reference, and the sum of both.
template <class T>
void check(const problem& p, const arrays<T>& with) {
  const long double half_ulp = std::numeric_limits<T>::epsilon() / 2;
  const long double unit = std::numeric_limits<double>::epsilon();
  // A change of reference may be a subnormal factor, of 5e-324, and weights reach e^300.
  const long double least = std::numeric_limits<T>::denorm_min() + 1e-190L;
  bool logs = true;
  bool signs = true;
  bool grads_x = true;
  bool grads_sign = true;
  for (std::int64_t o = 0; o < p.outer; ++o) {
    for (std::int64_t i = 0; i < p.inner; ++i) {
      const truth expected(p, with, o, i);
      for (std::int64_t t = 0; t < p.n; ++t) {
        const auto at = static_cast<std::size_t>(t);
        const long double found = p.at(with.out, o, t, i);
        const long double exact = expected.logs[at];
        logs = logs &&
               (std::isfinite(exact)
                    ? std::abs(found - exact) <= half_ulp * std::abs(exact) +
                                                     unit * (4 * expected.condition[at] +
                                                             std::abs(exact) + expected.spread + 1)
                    : same_class(found, exact));
        signs = signs && same_class(p.at(with.out_sign, o, t, i), expected.signs[at]);
        const auto close = [&](long double gradient, long double slope, long double size) {
          if (!std::isfinite(slope)) return same_class(gradient, slope);
          if (std::abs(slope) > std::numeric_limits<T>::max()) return std::isinf(gradient);
          // e^x over a reference that lies 300 nats below the sum overflows that much earlier.
          if (std::abs(slope) > 1e177L && std::isinf(gradient)) return true;
          return std::abs(gradient - slope) <=
                 half_ulp * std::abs(slope) + unit * (1 + expected.spread) * size + least;
        };
        const long double weight = p.at(with.sign, o, t, i);
        grads_sign = grads_sign &&
                     close(p.at(with.grad_sign, o, t, i), expected.slopes[at], expected.sizes[at]);
        grads_x = grads_x && close(p.at(with.grad_x, o, t, i), times(weight, expected.slopes[at]),
                                   times(std::abs(weight), expected.sizes[at]));
      }
    }
  }
  const int before = checks::failures();
  SUBQUAD_CHECK(logs);
  SUBQUAD_CHECK(signs);
  SUBQUAD_CHECK(grads_x);
  SUBQUAD_CHECK(grads_sign);
  SUBQUAD_CHECK(with.out.touched_gaps() == 0);
  SUBQUAD_CHECK(with.out_sign.touched_gaps() == 0);
  SUBQUAD_CHECK(with.grad_x.touched_gaps() == 0);
  SUBQUAD_CHECK(with.grad_sign.touched_gaps() == 0);
  if (checks::failures() != before) {
    std::printf(
        "  %zu bytes, outer %d n %d inner %d axis %d layout %d broadcast %d reverse %d "
        "exclusive %d\n",
        sizeof(T), static_cast<int>(p.outer), static_cast<int>(p.n), static_cast<int>(p.inner),
        p.axis, static_cast<int>(p.how), p.broadcast_sign, p.reverse, p.exclusive);
  }
}

struct generator {
  std::mt19937_64 engine;
  std::normal_distribution<double> normal{0.0, 1.0};
  std::uniform_real_distribution<double> uniform{0.0, 1.0};

  explicit generator(std::uint64_t seed) : engine(seed) {}
  double gauss() { return normal(engine); }
  bool one_in(int k) { return uniform(engine) * k < 1.0; }
};

template <class T>
void shapes_and_layouts() {
  std::uint64_t seed = 0;
  const std::int64_t shapes[][3] = {{1, 1, 1},   {1, 2, 3},    {3, 0, 5},
                                    {2, 129, 8}, {5, 37, 7},   {1, 300, 16},
                                    {33, 17, 1}, {1, 1000, 1}, {1, 2500, 3}};
  for (const auto& shape : shapes) {
    for (const std::int32_t axis : {0, 1, 2}) {
      for (const layout how :
           {layout::contiguous, layout::transposed, layout::flipped, layout::spaced}) {
        for (const int option : {0, 1, 2, 3}) {
          problem p;
          p.outer = shape[0];
          p.n = shape[1];
          p.inner = shape[2];
          p.axis = axis;
          p.how = how;
          p.reverse = option == 1 || option == 2;
          p.exclusive = option >= 2;
          p.broadcast_sign = option == 3 ? (axis == 2 ? 1 : 2) : -1;
          generator random(++seed);
          arrays<T> with(p);
          with.fill(
              p, [&] { return random.one_in(9) ? -kInfinity : 4 * random.gauss(); },
              [&] {
                if (random.one_in(9)) return 0.0;
                return random.one_in(3) ? random.gauss() : random.one_in(2) ? 1.0 : -1.0;
              },
              [&] { return random.one_in(9) ? 0.0 : random.gauss(); });
          run(p, with);
          check(p, with);
        }
      }
    }
  }
}

// Rows whose entries lie so far apart that references change.
template <class T>
void ranges() {
  for (const double scale : {100.0, 1000.0}) {
    for (const bool exclusive : {false, true}) {
      for (const std::int64_t outer : {1, 40}) {
        for (const int kind : {0, 1, 2}) {
          problem p;
          p.outer = outer;
          p.n = 800;
          p.exclusive = exclusive;
          generator random(23);
          std::int64_t count = 0;
          arrays<T> with(p);
          with.fill(
              p,
              [&] {
                const auto t = static_cast<double>(count++ % p.n);
                if (kind == 0) return scale * random.gauss();
                return (kind == 1 ? t : 800 - t) * scale / 400;
              },
              [&] { return random.one_in(5) ? 0.0 : random.gauss(); },
              [&] { return random.gauss(); });
          run(p, with);
          check(p, with);
        }
      }
    }
  }
}

template <class T>
arrays<T> of_row(const problem& p, const std::vector<double>& x, const std::vector<double>& sign) {
  arrays<T> with(p);
  for (std::int64_t o = 0; o < p.outer; ++o) {
    for (std::int64_t t = 0; t < p.n; ++t) {
      p.at(with.x, o, t, 0) = static_cast<T>(x[static_cast<std::size_t>(t)]);
      p.at(with.sign, o, t, 0) = static_cast<T>(sign[static_cast<std::size_t>(t)]);
      p.at(with.grad, o, t, 0) = T(t % 3 == 1 ? 0 : 1);
    }
  }
  run(p, with);
  return with;
}

// What is added and then taken away again, in the opposite order, leaves the sums that were there
// before, bit for bit, and nothing in the end: within a piece of a row and across pieces.
template <class T>
void cancellation() {
  for (const std::int64_t outer : {1, 20}) {
    for (const std::int64_t half : {1, 2, 70, 501, 3000}) {
      generator random(static_cast<std::uint64_t>(half));
      std::vector<double> x;
      std::vector<double> sign;
      for (std::int64_t t = 0; t < half; ++t) {
        x.push_back(static_cast<double>(static_cast<T>(3 * random.gauss())));
        sign.push_back(random.one_in(2) ? 1.0 : -0.75);
      }
      for (std::int64_t t = half - 1; t >= 0; --t) {
        x.push_back(x[static_cast<std::size_t>(t)]);
        sign.push_back(-sign[static_cast<std::size_t>(t)]);
      }
      problem p;
      p.outer = outer;
      p.n = 2 * half;
      const arrays<T> with = of_row<T>(p, x, sign);
      bool mirrored = true;
      for (std::int64_t o = 0; o < outer; ++o) {
        SUBQUAD_CHECK(with.out.at(o, 0, p.n - 1) == T(-kInfinity));
        SUBQUAD_CHECK(with.out_sign.at(o, 0, p.n - 1) == T(0));
        for (std::int64_t t = 0; t + 1 < half; ++t) {
          mirrored = mirrored && with.out.at(o, 0, p.n - 2 - t) == with.out.at(o, 0, t) &&
                     with.out_sign.at(o, 0, p.n - 2 - t) == with.out_sign.at(o, 0, t);
        }
      }
      SUBQUAD_CHECK(mirrored);
    }
  }
  const double inf = kInfinity;
  // A sum lies up to kSignedThreshold = 300 nats from its reference.
  const double logarithm = 300 * std::numeric_limits<double>::epsilon();
  const double half_ulp = std::numeric_limits<T>::epsilon() / 2;
  const auto logs = [&](const std::vector<double>& x, const std::vector<double>& sign,
                        const std::vector<double>& expected,
                        const std::vector<double>& expected_sign) {
    problem p;
    p.n = static_cast<std::int64_t>(x.size());
    const arrays<T> with = of_row<T>(p, x, sign);
    for (std::int64_t t = 0; t < p.n; ++t) {
      const auto at = static_cast<std::size_t>(t);
      const double found = with.out.at(0, 0, t);
      SUBQUAD_CHECK(std::isfinite(expected[at]) ? std::abs(found - expected[at]) <=
                                                      half_ulp * std::abs(expected[at]) + logarithm
                                                : same_class(found, expected[at]));
      SUBQUAD_CHECK(same_class(with.out_sign.at(0, 0, t), static_cast<T>(expected_sign[at])));
      SUBQUAD_CHECK(!std::isnan(with.grad_x.at(0, 0, t)) || !std::isfinite(expected[at]));
    }
  };
  logs({2, 2, 2}, {1, 1, -2}, {2, 2 + std::log(2.0), -inf}, {1, 1, 0});
  logs({2, 2, 2}, {0.5, 0.25, -0.75}, {2 + std::log(0.5), 2 + std::log(0.75), -inf}, {1, 1, 0});
  // What follows a sum that cancelled, far below, near and far above.
  logs({5, 5, -900, 5}, {1, -1, -1, 1}, {5, -inf, -900, 5}, {1, 0, -1, 1});
  logs({5, 5, -200, 900}, {1, -1, -1, 2}, {5, -inf, -200, 900 + std::log(2.0)}, {1, 0, -1, 1});
  logs({900, 900, -900, -900}, {1, -1, 1, -1}, {900, -inf, -900, -inf}, {1, 0, 1, 0});
  // Pieces of a row without an entry that counts leave alone what is below their common reference.
  std::vector<double> x(2000, -5.0);
  std::vector<double> sign(2000, 0.0);
  std::vector<double> expected(2000, 0.0);
  std::vector<double> expected_sign(2000, 1.0);
  x[0] = x[1] = expected[0] = 900;
  x[2] = 0;
  sign[0] = sign[2] = 1;
  sign[1] = -1;
  expected[1] = -inf;
  expected_sign[1] = 0;
  logs(x, sign, expected, expected_sign);
  // 20 nats below what cancels: 29 bits, which a double alone keeps 24 of.
  logs({-20, 0, 0, -20}, {1, 1, -1, -1}, {-20, std::exp(-20.0), -20, -inf}, {1, 1, 1, 0});
  logs({0, 20, 20, 0}, {1, 1, -1, -1}, {0, 20 + std::exp(-20.0), 0, -inf}, {1, 1, 1, 0});
  const double largest = std::numeric_limits<T>::max();
  logs({-largest, -largest, largest, largest}, {1, -1, -1, 1}, {-largest, -inf, largest, -inf},
       {1, 0, -1, 0});
}

// What is not finite.
template <class T>
void not_finite() {
  const double inf = kInfinity;
  const std::vector<std::pair<std::vector<double>, std::vector<double>>> rows = {
      {{0, inf, 0, 1, -inf}, {1, 1, -5, 1, 1}},
      {{0, inf, 0, inf, 0}, {1, -1, 1, -1, 1}},
      {{0, inf, 0, inf, 0}, {1, -1, 1, 1, 1}},
      {{0, kNaN, 0, inf, 0}, {1, 1, 1, 1, 1}},
      {{0, kNaN, inf, -inf, 0}, {1, 0, 0, 1, 1}},
      {{-inf, -inf, 0, 1, 2}, {1, kNaN, 1, 1, 1}},
      {{-inf, -inf, 0, 1, 2}, {1, inf, 1, 0, 1}},
      {{0, 1, 2, 3, 4}, {1, kNaN, 1, 1, 1}},
      {{0, 1, 2, 3, 4}, {0, 0, 0, 0, 0}},
      {{0, 1, 2, 3, 4}, {1, inf, 1, 1, 1}},
      {{0, 1, 800, 3, 4}, {1, inf, -1, 1, 1}},
      {{0, inf, kNaN, 0, 0}, {1, 1, 1, 1, 1}},
      {{-inf, -inf, -inf, -inf, -inf}, {1, 1, 1, 1, 1}},
      {{500, 0, 0, 1000, 0}, {0, 1, -3, 0, 1}},
  };
  for (const auto& [x, sign] : rows) {
    for (const std::int64_t outer : {1, 40}) {
      for (const std::int64_t gap : {0, 3, 300}) {
        for (const bool exclusive : {false, true}) {
          std::vector<double> spread_x;
          std::vector<double> spread_sign;
          for (std::size_t t = 0; t < x.size(); ++t) {
            spread_x.push_back(x[t]);
            spread_sign.push_back(sign[t]);
            spread_x.insert(spread_x.end(), static_cast<std::size_t>(gap), -2.0);
            spread_sign.insert(spread_sign.end(), static_cast<std::size_t>(gap), 1.0);
          }
          problem p;
          p.outer = outer;
          p.n = static_cast<std::int64_t>(spread_x.size());
          p.exclusive = exclusive;
          check(p, of_row<T>(p, spread_x, spread_sign));
        }
      }
    }
  }
}

template <class T>
void threads_do_not_show() {
  for (const auto& [outer, n] : {std::pair<int, int>{1, 70001}, {300, 500}}) {
    problem p;
    p.outer = outer;
    p.n = n;
    generator random(9);
    arrays<T> one(p);
    one.fill(
        p, [&] { return random.gauss(); }, [&] { return random.gauss(); },
        [&] { return random.gauss(); });
    arrays<T> two = one;
    run(p, one, 1);
    run(p, two, 2);
    SUBQUAD_CHECK(one.out.data() == two.out.data());
    SUBQUAD_CHECK(one.out_sign.data() == two.out_sign.data());
    SUBQUAD_CHECK(one.grad_x.data() == two.grad_x.data());
    SUBQUAD_CHECK(one.grad_sign.data() == two.grad_sign.data());
  }
}

template <class T>
void everything() {
  shapes_and_layouts<T>();
  ranges<T>();
  cancellation<T>();
  not_finite<T>();
  threads_do_not_show<T>();
}

void refusals() {
  const strided_array<float> x({2, 3});
  const strided_array<float> other({3, 2});
  const strided_array<double> wide({2, 3});
  const strided_array<std::uint8_t> none({0});
  const strided_array<std::uint8_t> enough({1 << 20});
  const auto call = [&](const subquad::array_view& sign, std::int32_t axis,
                        const subquad::array_view& workspace) {
    subquad::signed_logcumsumexp(x.view(), sign, axis, false, false, x.view(), x.view(), workspace);
  };
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(other.view(), 1, enough.view()); }, "sign"));
  SUBQUAD_CHECK(
      checks::throws<subquad::type_error>([&] { call(wide.view(), 1, enough.view()); }, "sign"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(x.view(), -1, enough.view()); }, "axis"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { call(x.view(), 1, none.view()); },
                                                          "workspace"));
}

}  // namespace

int main() {
  refusals();
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    everything<float>();
    everything<double>();
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}
