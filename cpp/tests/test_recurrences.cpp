// log_linear_recurrence and its reverse, at every instruction set, against the definition in long
// double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <random>
#include <string>
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
  std::int32_t axis = 1;  // 1: (outer, n, inner); 2: (outer, inner, n); 0: (n, outer, inner)
  layout how = layout::contiguous;
  std::int32_t broadcast_log_a = -1;
  bool reverse = false;
  bool with_state = false;
  std::vector<std::int64_t> segments{};

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
  bool is_border(std::int64_t t) const {
    if (t == 0) return !with_state;
    if (segments.empty()) return false;
    const auto number = [&](std::int64_t step) {
      return segments[static_cast<std::size_t>(reverse ? n - 1 - step : step)];
    };
    return number(t) != number(t - 1);
  }
};

template <class T>
struct arrays {
  strided_array<T> log_a;
  strided_array<T> log_b;
  strided_array<T> grad;
  strided_array<T> state;
  strided_array<T> out;
  strided_array<T> grad_log_a;
  strided_array<T> grad_log_b;
  strided_array<T> grad_state;

  explicit arrays(const problem& p)
      : log_a(p.shape(), p.how, p.broadcast_log_a),
        log_b(p.shape(), p.how),
        grad(p.shape(), p.how),
        state({p.outer, p.inner}, p.how),
        out(p.shape(), p.how),
        grad_log_a(p.shape(), p.how),
        grad_log_b(p.shape(), p.how),
        grad_state({p.outer, p.inner}, p.how) {}

  using number = std::function<double()>;
  void fill(const problem& p, const number& a, const number& b, const number& g) {
    for (std::int64_t o = 0; o < p.outer; ++o) {
      for (std::int64_t i = 0; i < p.inner; ++i) {
        state.at(o, i) = static_cast<T>(b());
        for (std::int64_t t = 0; t < p.n; ++t) {
          p.at(log_a, o, t, i) = static_cast<T>(a());
          p.at(log_b, o, t, i) = static_cast<T>(b());
          p.at(grad, o, t, i) = static_cast<T>(g());
        }
      }
    }
  }
};

template <class F>
void with_segments(const problem& p, F&& call) {
  strided_array<std::int64_t> runs({p.n}, p.how);
  for (std::int64_t t = 0; t < p.n && !p.segments.empty(); ++t) {
    runs.at(t) = p.segments[static_cast<std::size_t>(t)];
  }
  const subquad::array_view view = runs.view();
  call(p.segments.empty() ? nullptr : &view);
}

template <class T>
void run(const problem& p, arrays<T>& with, int n_threads = 0) {
  const std::int64_t lanes = p.outer * p.inner;
  subquad::context how{};
  how.n_threads = n_threads;
  const subquad::array_view state = with.state.view();
  const subquad::array_view grad_log_a = with.grad_log_a.view();
  const subquad::array_view grad_log_b = with.grad_log_b.view();
  const subquad::array_view grad_state = with.grad_state.view();
  with_segments(p, [&](const subquad::array_view* segments) {
    const strided_array<std::uint8_t> forward({static_cast<std::int64_t>(
        subquad::log_linear_recurrence_workspace(lanes, p.n, sizeof(T)))});
    subquad::log_linear_recurrence(with.log_a.view(), with.log_b.view(),
                                   p.with_state ? &state : nullptr, segments, p.axis, p.reverse,
                                   with.out.view(), forward.view(), how);
    const strided_array<std::uint8_t> backward({static_cast<std::int64_t>(
        subquad::log_linear_recurrence_vjp_workspace(lanes, p.n, sizeof(T)))});
    subquad::log_linear_recurrence_vjp(with.log_a.view(), with.log_b.view(),
                                       p.with_state ? &state : nullptr, segments, p.axis, p.reverse,
                                       with.grad.view(), &grad_log_a, &grad_log_b,
                                       p.with_state ? &grad_state : nullptr, backward.view(), how);
  });
}

long double log_add(long double a, long double b) {
  const long double top = std::max(a, b);
  if (std::isnan(a) || std::isnan(b)) return kNaN;
  if (std::isinf(top)) return top;
  return top + std::log1p(std::exp(std::min(a, b) - top));
}

// One row by the definition, with the sums of magnitudes that bound what rounding does.
struct truth {
  std::vector<long double> logs;
  std::vector<long double> grad_log_a;
  std::vector<long double> grad_log_b;
  std::vector<long double> size_a;  // of the terms of a gradient
  std::vector<long double> size_b;
  long double grad_state = 0;
  long double largest = 0;  // |log h|
  long double largest_total = 0;

  template <class T>
  truth(const problem& p, const arrays<T>& with, std::int64_t o, std::int64_t i) {
    const auto n = static_cast<std::size_t>(p.n);
    std::vector<long double> kept(n);
    std::vector<long double> added(n);
    logs.resize(n);
    long double before = p.with_state ? static_cast<long double>(with.state.at(o, i)) : -kInfinity;
    for (std::int64_t t = 0; t < p.n; ++t) {
      const auto at = static_cast<std::size_t>(t);
      const long double a =
          p.is_border(t) ? -kInfinity : static_cast<long double>(p.at(with.log_a, o, t, i));
      const long double b = p.at(with.log_b, o, t, i);
      const long double decayed = std::isinf(a) && a < 0 ? a : a + before;
      const long double after = log_add(decayed, b);
      const bool infinite = !std::isfinite(after) && !(after < 0);
      // From the difference: log h itself has no digits left where |log h| is large.
      const auto share = [&](long double part, long double other) -> long double {
        if (part == -kInfinity) return 0;
        return infinite ? kNaN : 1 / (1 + std::exp(other - part));
      };
      kept[at] = before == -kInfinity ? 0 : share(decayed, b);
      added[at] = share(b, decayed);
      logs[at] = before = after;
      if (std::isfinite(after)) largest = std::max(largest, std::abs(after));
    }
    grad_log_a.resize(n);
    grad_log_b.resize(n);
    size_a.resize(n);
    size_b.resize(n);
    const auto times = [](long double a, long double b) { return a == 0 || b == 0 ? 0 : a * b; };
    long double carry = 0;
    long double size = 0;
    for (std::int64_t t = p.n - 1; t >= 0; --t) {
      const auto at = static_cast<std::size_t>(t);
      const long double g = p.at(with.grad, o, t, i);
      const long double total = g + carry;
      const long double total_size = std::abs(g) + size;
      if (std::isfinite(total_size)) largest_total = std::max(largest_total, total_size);
      grad_log_a[at] = carry = times(kept[at], total);
      grad_log_b[at] = times(added[at], total);
      size_b[at] = times(added[at], total_size);
      size_a[at] = size = times(kept[at], total_size);
    }
    grad_state = carry;
  }
};

bool same_class(long double found, long double expected) {
  if (std::isnan(expected)) return std::isnan(found);
  return found == expected;
}

// Beside half an ulp of the result: what the states err by, relative to h. In units of a double,
// every step rounds d = log_b - reference (|d| <= 16 where it counts), an exponential, a product
// and a sum: 12; and, for float32, the reference. For float32 an exponential errs by 4.0e-11 and a
// logarithm by 7.2e-10 log(2) / 2. The former compound where a reference is left for one more than
// 16 nats above, which six times make of anything a number below float32.
template <class T>
long double state_error(const problem& p, long double largest) {
  const long double unit = std::numeric_limits<double>::epsilon();
  const auto steps = static_cast<long double>(p.n);
  if (sizeof(T) == 8) return unit * (16 + 12 * steps);
  return unit * (16 + steps * (28 + largest)) + 6 * 4.0e-11L + 2.5e-10L;
}

template <class T>
void check(const problem& p, const arrays<T>& with, long double max_error = kInfinity) {
  const long double half_ulp = std::numeric_limits<T>::epsilon() / 2;
  long double worst = 0;
  bool logs = true;
  bool grads_a = true;
  bool grads_b = true;
  bool grads_state = true;
  for (std::int64_t o = 0; o < p.outer; ++o) {
    for (std::int64_t i = 0; i < p.inner; ++i) {
      const truth expected(p, with, o, i);
      const long double lost = state_error<T>(p, expected.largest);
      const auto close = [&](long double found, long double exact, long double size) {
        if (!std::isfinite(exact)) return same_class(found, exact);
        return std::abs(found - exact) <= half_ulp * std::abs(exact) + lost * size;
      };
      // A share of h, and the gradient that is made of it, may be subnormal.
      const auto close_gradient = [&](long double found, long double exact, long double size) {
        const long double least = (1 + expected.largest_total) *
                                  static_cast<long double>(std::numeric_limits<T>::denorm_min());
        return close(found, exact, 4 * size + least / lost);
      };
      for (std::int64_t t = 0; t < p.n; ++t) {
        const auto at = static_cast<std::size_t>(t);
        const long double found = p.at(with.out, o, t, i);
        const long double exact = expected.logs[at];
        // log h is rounded once in double before it is rounded to T.
        logs = logs && close(found, exact,
                             1 + std::abs(exact) * std::numeric_limits<double>::epsilon() / lost);
        if (std::isfinite(exact)) worst = std::max(worst, std::abs(found - exact));
        grads_a = grads_a && close_gradient(p.at(with.grad_log_a, o, t, i), expected.grad_log_a[at],
                                            expected.size_a[at]);
        grads_b = grads_b && close_gradient(p.at(with.grad_log_b, o, t, i), expected.grad_log_b[at],
                                            expected.size_b[at]);
      }
      if (p.with_state) {
        grads_state = grads_state && close_gradient(with.grad_state.at(o, i), expected.grad_state,
                                                    p.n > 0 ? expected.size_a[0] : 0);
      }
    }
  }
  const int before = checks::failures();
  SUBQUAD_CHECK(logs);
  SUBQUAD_CHECK(grads_a);
  SUBQUAD_CHECK(grads_b);
  SUBQUAD_CHECK(grads_state);
  SUBQUAD_CHECK(worst <= max_error);
  SUBQUAD_CHECK(with.out.touched_gaps() == 0);
  SUBQUAD_CHECK(with.grad_log_a.touched_gaps() == 0);
  SUBQUAD_CHECK(with.grad_log_b.touched_gaps() == 0);
  SUBQUAD_CHECK(with.grad_state.touched_gaps() == 0);
  if (checks::failures() != before) {
    std::printf(
        "  %zu bytes, outer %d n %d inner %d axis %d layout %d broadcast %d reverse %d "
        "state %d segments %d: %.3Lg\n",
        sizeof(T), static_cast<int>(p.outer), static_cast<int>(p.n), static_cast<int>(p.inner),
        p.axis, static_cast<int>(p.how), p.broadcast_log_a, p.reverse, p.with_state,
        !p.segments.empty(), worst);
  }
}

struct generator {
  std::mt19937_64 engine;
  std::normal_distribution<double> normal{0.0, 1.0};
  std::uniform_real_distribution<double> uniform{0.0, 1.0};

  explicit generator(std::uint64_t seed) : engine(seed) {}
  double gauss() { return normal(engine); }
  double between(double low, double high) { return low + (high - low) * uniform(engine); }
  bool one_in(int k) { return uniform(engine) * k < 1.0; }
};

double log_sigmoid(double x) { return -std::log1p(std::exp(-x)); }

// The gates of table 1.5 of the specification, and the errors that float32 may have there. In
// float64 a reference of 1e4, which 20000 sums would leave 100 ulp off, must not show: 1 ulp.
template <class T>
void gates(std::int64_t outer, std::int64_t n, std::int64_t inner, std::int32_t axis) {
  generator random(17);
  const auto b = [&] { return random.gauss(); };
  const struct {
    std::function<double()> log_a;
    double max_error;
    double max_error_float64 = kInfinity;
  } regimes[] = {
      {[&] { return log_sigmoid(random.gauss()); }, 3.4e-7},
      {[&] { return log_sigmoid(4 + random.gauss()); }, 1.1e-6},
      {[&] { return 0.5 + random.gauss(); }, 1.0e-3, 1.9e-12},
      {[&] { return random.between(-60, -30); }, 3.6e-7},
      {[&] { return random.one_in(100) ? -kInfinity : log_sigmoid(4 + random.gauss()); }, 1.1e-6},
  };
  for (const auto& regime : regimes) {
    problem p;
    p.outer = outer;
    p.n = n;
    p.inner = inner;
    p.axis = axis;
    arrays<T> with(p);
    with.fill(p, regime.log_a, b, b);
    run(p, with);
    check(p, with, sizeof(T) == 4 ? regime.max_error : regime.max_error_float64);
  }
}

// Entries of every kind, in every layout.
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
          p.with_state = option >= 2;
          p.broadcast_log_a = option == 3 ? (axis == 2 ? 1 : 2) : -1;
          generator random(++seed);
          for (std::int64_t t = 0, number = 0; t < p.n && option >= 1; ++t) {
            number += random.one_in(40);
            p.segments.push_back(number % 3);
          }
          arrays<T> with(p);
          with.fill(
              p, [&] { return random.one_in(50) ? -kInfinity : log_sigmoid(1 + random.gauss()); },
              [&] { return random.one_in(4) ? -kInfinity : 30 * random.gauss(); },
              [&] { return random.one_in(9) ? 0.0 : random.gauss(); });
          run(p, with);
          check(p, with);
        }
      }
    }
  }
}

template <class T>
std::vector<T> of_rows(const std::vector<double>& log_a, const std::vector<double>& log_b,
                       std::int64_t rows, std::optional<double> state, bool check_it = true) {
  problem p;
  p.outer = rows;
  p.n = static_cast<std::int64_t>(log_a.size());
  p.axis = 2;
  p.with_state = state.has_value();
  arrays<T> with(p);
  for (std::int64_t row = 0; row < rows; ++row) {
    if (state) with.state.at(row, 0) = static_cast<T>(*state);
    for (std::int64_t t = 0; t < p.n; ++t) {
      with.log_a.at(row, 0, t) = static_cast<T>(log_a[static_cast<std::size_t>(t)]);
      with.log_b.at(row, 0, t) = static_cast<T>(log_b[static_cast<std::size_t>(t)]);
      with.grad.at(row, 0, t) = T(t % 3 == 1 ? 0 : 1);
    }
  }
  run(p, with);
  if (check_it) check(p, with);
  std::vector<T> out;
  for (std::int64_t t = 0; t < p.n; ++t) out.push_back(with.out.at(rows - 1, 0, t));
  return out;
}

// What is not finite: +inf until a reset, NaN until a reset, and nothing before.
template <class T>
void not_finite() {
  const double inf = kInfinity;
  for (const std::int64_t rows : {1, 40}) {
    for (const std::int64_t gap : {0, 3, 700}) {
      const auto spread = [&](const std::vector<double>& values, double between) {
        std::vector<double> out;
        for (const double value : values) {
          out.push_back(value);
          out.insert(out.end(), static_cast<std::size_t>(gap), between);
        }
        return out;
      };
      const auto rows_of = [&](const std::vector<double>& a, const std::vector<double>& b,
                               std::optional<double> state = {}) {
        of_rows<T>(spread(a, -0.01), spread(b, -1.0), rows, state);
      };
      rows_of({-1, -1, -1, -inf, -1}, {0, inf, 0, 0, 0});
      rows_of({-1, -1, -1, -inf, -1}, {0, kNaN, 0, 0, 0});
      rows_of({-1, inf, -1, -inf, -1}, {0, 0, 0, 0, 0});
      rows_of({-1, kNaN, -1, -inf, -1}, {0, 0, 0, 0, 0});
      rows_of({-1, -1, -1, -1, -1}, {inf, inf, 0, -inf, kNaN});
      rows_of({-inf, -inf, -inf, -inf, -inf}, {-inf, inf, 0, kNaN, -inf});
      rows_of({kNaN, -1, inf, -1, -1}, {0, 0, 0, 0, 0});
      rows_of({-1, -1, -inf, -1, -1}, {0, 0, 0, 0, 0}, inf);
      rows_of({-1, -1, -inf, -1, -1}, {0, 0, 0, 0, 0}, kNaN);
      rows_of({-1, -1, -inf, -1, -1}, {0, 0, 0, 0, 0}, -inf);
      rows_of({5, inf, -1, -inf, -1}, {0, 0, 0, 0, 0}, 3.0);
      rows_of({5, -inf, inf, -1, -1}, {0, 0, 0, 0, 0}, inf);
    }
    // An empty state stays empty, at any log_a but +inf; and an infinite log_a is seen by a state
    // that comes from far before.
    std::vector<double> a(900, 0.5);
    std::vector<double> b(900, -inf);
    of_rows<T>(a, b, rows, {});
    of_rows<T>(a, b, rows, 2.0);
    a[700] = inf;
    of_rows<T>(a, b, rows, 2.0);
    b[701] = 3.0;
    of_rows<T>(a, b, rows, 2.0);
    // A reset hides what came before, whatever follows it in the same piece of a row.
    a.assign(900, -0.1);
    b.assign(900, 0.0);
    a[300] = -inf;
    a[303] = inf;
    of_rows<T>(a, b, rows, 2.0);
    a[306] = -inf;
    of_rows<T>(a, b, rows, 2.0);
    // As large as an element can be, and as small.
    const auto largest = static_cast<double>(std::numeric_limits<T>::max());
    of_rows<T>({0, 0, 0, 0}, {largest, 0, largest, -largest}, rows, {});
    of_rows<T>({0, -largest, 0, 0}, {-largest, -largest, 0, largest}, rows, {});
  }
}

// Two halves through the state are one whole: the state is rounded to an element.
template <class T>
void splits() {
  const double unit = std::numeric_limits<T>::epsilon();
  for (const std::int64_t n : {40, 3000}) {
    generator random(5);
    std::vector<double> a;
    std::vector<double> b;
    for (std::int64_t t = 0; t < n; ++t) {
      a.push_back(log_sigmoid(2 + random.gauss()));
      b.push_back(3 * random.gauss());
    }
    const std::vector<T> whole = of_rows<T>(a, b, 1, {});
    for (const std::int64_t cut : {std::int64_t{1}, n / 3, n - 1}) {
      const std::vector<T> head =
          of_rows<T>({a.begin(), a.begin() + cut}, {b.begin(), b.begin() + cut}, 1, {});
      const std::vector<T> tail = of_rows<T>({a.begin() + cut, a.end()}, {b.begin() + cut, b.end()},
                                             1, static_cast<double>(head.back()));
      for (std::int64_t t = 0; t < n; ++t) {
        const T found =
            t < cut ? head[static_cast<std::size_t>(t)] : tail[static_cast<std::size_t>(t - cut)];
        const T expected = whole[static_cast<std::size_t>(t)];
        SUBQUAD_CHECK(std::abs(found - expected) <=
                      2 * unit * std::max(std::abs(static_cast<double>(expected)), 16.0));
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
    p.axis = 2;
    p.with_state = true;
    generator random(9);
    arrays<T> one(p);
    one.fill(
        p, [&] { return log_sigmoid(random.gauss()); }, [&] { return random.gauss(); },
        [&] { return random.gauss(); });
    arrays<T> two = one;
    run(p, one, 1);
    run(p, two, 2);
    SUBQUAD_CHECK(one.out.data() == two.out.data());
    SUBQUAD_CHECK(one.grad_log_a.data() == two.grad_log_a.data());
    SUBQUAD_CHECK(one.grad_log_b.data() == two.grad_log_b.data());
    SUBQUAD_CHECK(one.grad_state.data() == two.grad_state.data());
  }
}

void everything() {
  for (const std::int32_t axis : {1, 2}) {
    gates<float>(1, 20000, 1, axis);
    gates<float>(2, 1001, 16, axis);
  }
  gates<double>(1, 20000, 1, 1);
  gates<double>(17, 999, 2, 2);
  shapes_and_layouts<float>();
  shapes_and_layouts<double>();
  not_finite<float>();
  not_finite<double>();
  splits<float>();
  splits<double>();
  threads_do_not_show<float>();
  threads_do_not_show<double>();
}

void refusals() {
  const strided_array<float> x({2, 3});
  const strided_array<float> other({3, 2});
  const strided_array<float> out({2, 3});
  const strided_array<std::uint8_t> none({0});
  const strided_array<std::uint8_t> enough({1 << 20});
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] {
        subquad::log_linear_recurrence(x.view(), other.view(), nullptr, nullptr, 1, false,
                                       out.view(), enough.view());
      },
      "log_b"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] {
        subquad::log_linear_recurrence(x.view(), x.view(), nullptr, nullptr, 2, false, out.view(),
                                       enough.view());
      },
      "axis"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] {
        subquad::log_linear_recurrence(x.view(), x.view(), nullptr, nullptr, 1, false, out.view(),
                                       none.view());
      },
      "workspace"));
}

}  // namespace

int main() {
  refusals();
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    everything();
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}
