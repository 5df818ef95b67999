// Cumulative log-sum-exp and its reverse, on every instruction set, against sums in long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "subquad/scans.hpp"
#include "subquad/threads.hpp"

namespace {

using std::size_t;
using index = std::int64_t;

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

size_t at(index i) { return static_cast<size_t>(i); }

// One lane, in the order of the scan.
template <class T>
struct lane {
  std::vector<T> x;
  std::vector<index> segments;  // none: one run
  bool has_state = false;
  T log_sum = -kInf<T>;
  T remainder = 0;
  bool exclusive = false;
  std::vector<T> grad;
  T grad_final = 0;

  bool begins(size_t i) const {
    return i == 0 || (!segments.empty() && segments[i] != segments[i - 1]);
  }
};

// e^top sum, in long double; not finite: top alone.
struct sum_of_powers {
  long double top = -kInf<long double>;
  long double sum = 0;

  void add(long double x) {
    if (x == -kInf<long double> || std::isnan(top)) return;
    if (std::isnan(x) || std::isinf(x) || std::isinf(-top)) {
      if (std::isnan(x) || top != kInf<long double>) sum = 1, top = x;
      return;
    }
    if (top == kInf<long double>) return;
    const long double greater = std::max(top, x);
    sum = sum * std::exp(top - greater) + std::exp(x - greater);
    top = greater;
  }
  bool empty() const { return top == -kInf<long double>; }
  bool finite() const { return std::isfinite(top); }
  long double log() const { return finite() ? top + std::log(sum) : top; }
};

template <class T>
struct expected {
  std::vector<long double> out;
  sum_of_powers last;
  std::vector<long double> grad_x;
  long double grad_log_sum = 0;
  std::vector<long double> grad_x_size;  // the same sums of the terms' magnitudes
  long double grad_log_sum_size = 0;
};

template <class T>
expected<T> truth(const lane<T>& in) {
  const size_t n = in.x.size();
  expected<T> want;
  std::vector<sum_of_powers> sums(n);
  sum_of_powers state;
  if (in.has_state) {
    state.add(static_cast<long double>(in.log_sum) + static_cast<long double>(in.remainder));
    if (state.finite()) {
      state.top = in.log_sum;
      state.sum = std::exp(static_cast<long double>(in.remainder));
    }
  }
  sum_of_powers running = state;
  for (size_t i = 0; i < n; ++i) {
    if (i > 0 && in.begins(i)) running = {};
    if (in.exclusive) want.out.push_back(running.log());
    running.add(in.x[i]);
    sums[i] = running;
    if (!in.exclusive) want.out.push_back(running.log());
  }
  want.last = running;
  // From the end: what the sums so far pass back, in units of e^-top of `next`.
  want.grad_x.assign(n, 0);
  want.grad_x_size.assign(n, 0);
  long double passed = 0;
  long double size = 0;
  sum_of_powers next = running;
  const auto add_gradient = [&](const sum_of_powers& sum, long double gradient) {
    if (sum.empty() || gradient == 0) return;
    passed += sum.finite() ? gradient / sum.sum : kNaN<long double>;
    if (sum.finite()) size += std::abs(gradient) / sum.sum;
  };
  const auto move = [&](const sum_of_powers& sum) {
    if (sum.top != next.top && std::isfinite(sum.top) && std::isfinite(next.top)) {
      passed *= std::exp(sum.top - next.top);
      size *= std::exp(sum.top - next.top);
    }
    next = sum;
  };
  add_gradient(running, in.grad_final);
  for (size_t i = n; i-- > 0;) {
    move(sums[i]);
    if (!in.grad.empty()) {
      if (!in.exclusive) add_gradient(sums[i], in.grad[i]);
      if (in.exclusive && i + 1 < n && !in.begins(i + 1)) add_gradient(sums[i], in.grad[i + 1]);
    }
    const long double x = in.x[i];
    if (x == -kInf<long double> || passed == 0) {
      want.grad_x[i] = 0;
    } else {
      want.grad_x[i] = sums[i].finite() ? std::exp(x - sums[i].top) * passed : passed;
    }
    if (sums[i].finite()) want.grad_x_size[i] = std::exp(x - sums[i].top) * size;
    if (i > 0 && in.begins(i)) passed = size = 0;
  }
  if (state.empty()) return want;
  move(state);
  if (in.exclusive && n > 0 && !in.grad.empty()) add_gradient(state, in.grad[0]);
  want.grad_log_sum = state.finite() ? passed * state.sum : passed;
  want.grad_log_sum_size = state.finite() ? size * state.sum : 0;
  return want;
}

// An array (outer, n, inner) with the strides of a test, around it memory that must not change.
template <class T>
struct strided {
  std::vector<T> memory;
  index shape[3];
  index strides[3];
  index origin = 0;

  strided(index outer, index n, index inner, const std::string& layout) : shape{outer, n, inner} {
    const index length = outer * n * inner;
    if (layout == "contiguous") {
      set(n * inner, inner, 1);
    } else if (layout == "axis last") {
      set(n * inner, 1, n);
    } else if (layout == "steps") {
      set(2 * n * (inner + 3) + 5, 2 * (inner + 3), 2);
    } else if (layout == "padded rows") {
      set(n * (inner + 5), inner + 5, 1);
    } else if (layout == "backwards") {
      set(n * inner, -1, n);
      origin = std::max<index>(0, n - 1);
    } else if (layout == "fortran") {
      set(1, outer, outer * n);
    }
    const index last = origin + (outer - 1) * strides[0] + (inner - 1) * strides[2] +
                       std::max<index>(0, (n - 1) * strides[1]);
    memory.assign(at(std::max(length, last + 1) + 8), T(-77));
  }
  void set(index a, index b, index c) { strides[0] = a, strides[1] = b, strides[2] = c; }
  T& operator()(index a, index i, index b) {
    return memory[at(origin + a * strides[0] + i * strides[1] + b * strides[2])];
  }
  subquad::array_view view() {
    auto made = subquad::contiguous_view(memory.data() + origin, shape, 3);
    made.strides = strides;
    return made;
  }
};

template <class T>
struct problem {
  index outer;
  index inner;
  index n;
  std::vector<lane<T>> lanes;  // [outer][inner]
  bool reverse = false;
  std::string layout = "contiguous";
};

template <class T>
struct result {
  std::vector<std::vector<T>> out;  // [lane], in the order of the scan
  std::vector<T> final_log_sum;
  std::vector<T> final_remainder;
  std::vector<std::vector<T>> grad_x;
  std::vector<T> grad_log_sum;

  bool operator==(const result& other) const {
    const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
    };
    bool equal = out.size() == other.out.size();
    for (size_t l = 0; equal && l < out.size(); ++l) {
      equal = same(out[l], other.out[l]) && same(grad_x[l], other.grad_x[l]);
    }
    return equal && same(final_log_sum, other.final_log_sum) &&
           same(final_remainder, other.final_remainder) && same(grad_log_sum, other.grad_log_sum);
  }
};

template <class T>
result<T> compute(const problem<T>& p) {
  const lane<T>& first = p.lanes[0];
  const index count = p.outer * p.inner;
  const auto time = [&](index i) { return p.reverse ? p.n - 1 - i : i; };
  strided<T> x(p.outer, p.n, p.inner, p.layout);
  strided<T> out(p.outer, p.n, p.inner, p.layout);
  strided<T> grad(p.outer, p.n, p.inner, p.layout);
  strided<T> grad_x(p.outer, p.n, p.inner, p.layout);
  std::vector<T> log_sum, remainder, grad_final;
  for (index l = 0; l < count; ++l) {
    const lane<T>& in = p.lanes[at(l)];
    for (index i = 0; i < p.n; ++i) {
      x(l / p.inner, time(i), l % p.inner) = in.x[at(i)];
      if (!in.grad.empty()) grad(l / p.inner, time(i), l % p.inner) = in.grad[at(i)];
    }
    log_sum.push_back(in.log_sum);
    remainder.push_back(in.remainder);
    grad_final.push_back(in.grad_final);
  }
  std::vector<index> segments(first.segments);
  if (p.reverse) std::reverse(segments.begin(), segments.end());
  const index lane_shape[2] = {p.outer, p.inner};
  const auto lanes_view = [&](const std::vector<T>& v) {
    return subquad::contiguous_view(v.data(), lane_shape, 2);
  };
  result<T> got;
  got.final_log_sum.assign(at(count), T(-77));
  got.final_remainder.assign(at(count), T(-77));
  got.grad_log_sum.assign(at(count), T(-77));
  const auto segments_view = subquad::contiguous_view(segments.data(), &p.n, 1);
  const auto log_sum_view = lanes_view(log_sum);
  const auto remainder_view = lanes_view(remainder);
  const auto grad_final_view = lanes_view(grad_final);
  const auto final_view = lanes_view(got.final_log_sum);
  const auto final_remainder_view = lanes_view(got.final_remainder);
  const auto grad_log_sum_view = lanes_view(got.grad_log_sum);
  const auto* state = first.has_state ? &log_sum_view : nullptr;
  const auto* state_remainder = first.has_state ? &remainder_view : nullptr;
  const auto* runs = first.segments.empty() ? nullptr : &segments_view;
  const auto with_workspace = [&](size_t bytes, const auto& function) {
    std::vector<std::uint8_t> memory(bytes + 64, 0xa5);
    const auto length = static_cast<index>(bytes);
    function(subquad::contiguous_view(memory.data(), &length, 1));
    SUBQUAD_CHECK(std::all_of(memory.begin() + static_cast<index>(bytes), memory.end(),
                              [](std::uint8_t byte) { return byte == 0xa5; }));
  };
  with_workspace(subquad::logcumsumexp_workspace(count, p.n, sizeof(T)), [&](const auto& memory) {
    subquad::logcumsumexp(x.view(), state, state_remainder, runs, 1, p.reverse, first.exclusive,
                          out.view(), &final_view, &final_remainder_view, memory);
  });
  const auto grad_view = grad.view();
  const auto grad_x_view = grad_x.view();
  with_workspace(
      subquad::logcumsumexp_vjp_workspace(count, p.n, sizeof(T)), [&](const auto& memory) {
        subquad::logcumsumexp_vjp(x.view(), state, state_remainder, runs, 1, p.reverse,
                                  first.exclusive, first.grad.empty() ? nullptr : &grad_view,
                                  &grad_final_view, &grad_x_view, &grad_log_sum_view, memory);
      });
  for (index l = 0; l < count; ++l) {
    got.out.emplace_back();
    got.grad_x.emplace_back();
    for (index i = 0; i < p.n; ++i) {
      got.out.back().push_back(out(l / p.inner, time(i), l % p.inner));
      got.grad_x.back().push_back(grad_x(l / p.inner, time(i), l % p.inner));
      out(l / p.inner, time(i), l % p.inner) = T(-77);
      grad_x(l / p.inner, time(i), l % p.inner) = T(-77);
    }
  }
  const auto untouched = [](const std::vector<T>& memory) {
    return std::all_of(memory.begin(), memory.end(), [](T v) { return v == T(-77); });
  };
  SUBQUAD_CHECK(untouched(out.memory) && untouched(grad_x.memory));
  return got;
}

template <class T>
long double ulp(long double size) {
  return std::ldexp(static_cast<long double>(std::numeric_limits<T>::epsilon()),
                    std::ilogb(std::min<long double>(size, std::numeric_limits<T>::max())));
}

bool same_class(long double a, long double b) {
  return std::isnan(a) == std::isnan(b) && (!std::isinf(b) || a == b) && (!std::isinf(a) || a == b);
}

long double worst_out = 0;
long double worst_grad = 0;

// Gradients are sums of quotients times exponentials: each may err by 4 ulp for the sums of a
// vector's lanes, as much for what follows, 2 for an exponential, its argument's |x - r| <= 16
// times a sixth of an ulp, and 3 for quotient, product and total.
constexpr long double kGradient = 16;

// So many more where a sum of magnitudes is this part of the gradients': exponents as large as the
// logarithm of that (Jensen), of which each unit costs half an ulp, and a sixth for log2(e).
long double for_exponents(long double size, long double gradients) {
  return 0.67L * std::max<long double>(0, std::log(gradients / size));
}

template <class T>
void compare(const problem<T>& p, const std::string& what) {
  const result<T> got = compute(p);
  bool good = true;
  const auto near = [&](long double value, long double want, long double scale, long double limit,
                        long double& worst) {
    if (!same_class(value, want)) return false;
    if (!std::isfinite(want)) return true;
    const long double error = std::abs(value - want) / scale;
    worst = std::max(worst, error / limit);
    return error <= limit;
  };
  const auto say = [&](bool holds, const char* part, size_t l, size_t i, long double value,
                       long double want) {
    if (holds || !good) return;
    good = false;
    std::printf("%s (%s, %s): %s of lane %zu at %zu: expected %.21Lg, got %.21Lg\n", what.c_str(),
                sizeof(T) == 4 ? "float" : "double", p.layout.c_str(), part, l, i, want, value);
  };
  for (size_t l = 0; l < p.lanes.size(); ++l) {
    const lane<T>& in = p.lanes[l];
    const expected<T> want = truth(in);
    for (size_t i = 0; i < in.x.size(); ++i) {
      const long double size = std::max<long double>(std::abs(want.out[i]), 16);
      say(near(got.out[l][i], want.out[i], ulp<T>(std::isfinite(size) ? size : 16), 2, worst_out),
          "out", l, i, got.out[l][i], want.out[i]);
    }
    const long double last = want.last.log();
    const long double got_last = static_cast<long double>(got.final_log_sum[l]);
    const long double size = std::isfinite(last) ? std::max<long double>(std::abs(last), 16) : 16;
    say(near(got_last, last, ulp<T>(size), 2, worst_out), "final_log_sum", l, 0, got_last, last);
    if (std::isfinite(last)) {
      const auto remainder = static_cast<long double>(got.final_remainder[l]);
      const long double below = (want.last.top - got_last) + std::log(want.last.sum);
      say(std::abs(remainder - below) <= 2 * ulp<T>(16) &&
              std::abs(remainder) <= ulp<T>(std::max<long double>(std::abs(last), 1e-30L)),
          "final_remainder", l, 0, remainder, below);
    } else {
      say(got.final_remainder[l] == 0, "final_remainder", l, 0, got.final_remainder[l], 0);
    }
    const long double unit = std::numeric_limits<T>::epsilon();
    long double gradients = std::abs(static_cast<long double>(in.grad_final));
    for (const T g : in.grad) gradients += std::abs(static_cast<long double>(g));
    // What falls below the normal numbers counts as 0, before it meets a gradient.
    const long double least = 64 * std::numeric_limits<T>::min();
    for (size_t i = 0; i < in.x.size(); ++i) {
      say(near(got.grad_x[l][i], want.grad_x[i], unit * want.grad_x_size[i] + least,
               kGradient + for_exponents(want.grad_x_size[i], gradients), worst_grad),
          "grad_x", l, i, got.grad_x[l][i], want.grad_x[i]);
    }
    if (in.has_state) {
      say(near(got.grad_log_sum[l], want.grad_log_sum, unit * want.grad_log_sum_size + least,
               kGradient + for_exponents(want.grad_log_sum_size, gradients), worst_grad),
          "grad_log_sum", l, 0, got.grad_log_sum[l], want.grad_log_sum);
    }
  }
  SUBQUAD_CHECK(good);
}

using generator = std::mt19937_64;

template <class T>
std::vector<T> normal(generator& random, size_t n, double scale = 1, double shift = 0) {
  std::normal_distribution<double> draw(shift, scale);
  std::vector<T> v(n);
  for (T& value : v) value = static_cast<T>(draw(random));
  return v;
}

template <class T>
lane<T> lane_of(generator& random, std::vector<T> x) {
  lane<T> made;
  made.grad = normal<T>(random, x.size());
  made.grad_final = static_cast<T>(0.5);
  made.x = std::move(x);
  return made;
}

template <class T>
problem<T> one(const lane<T>& in, const std::string& layout = "contiguous") {
  problem<T> p{1, 1, static_cast<index>(in.x.size()), {in}};
  p.layout = layout;
  return p;
}

// Inputs on which shortcuts fail.
template <class T>
std::vector<std::pair<std::string, std::vector<T>>> hard_inputs(generator& random, size_t n) {
  std::vector<std::pair<std::string, std::vector<T>>> all;
  const auto each = [&](const char* name, const std::function<double(size_t)>& value) {
    std::vector<T> x(n);
    for (size_t i = 0; i < n; ++i) x[i] = static_cast<T>(value(i));
    all.emplace_back(name, x);
  };
  const auto last = static_cast<double>(n > 1 ? n - 1 : 1);
  std::uniform_real_distribution<double> uniform(0, 1);
  all.emplace_back("normal", normal<T>(random, n));
  all.emplace_back("normal * 10", normal<T>(random, n, 10));
  all.emplace_back("normal * 100", normal<T>(random, n, 100));
  all.emplace_back("normal * 1e4", normal<T>(random, n, 1e4));
  all.emplace_back("normal + 1e4", normal<T>(random, n, 1, 1e4));
  all.emplace_back("normal - 1e4", normal<T>(random, n, 1, -1e4));
  each("zeros", [](size_t) { return 0; });
  each("increasing", [&](size_t i) { return 1e4 * static_cast<double>(i) / last; });
  each("decreasing", [&](size_t i) { return -1e4 * static_cast<double>(i) / last; });
  each("ramp of 31", [](size_t i) { return 31.0 * static_cast<double>(i); });
  each("ramp of 3", [](size_t i) { return 3.0 * static_cast<double>(i); });
  each("ramp of 0.1", [](size_t i) { return 0.1 * static_cast<double>(i); });
  each("alternating", [](size_t i) { return i % 2 ? 1e4 : -1e4; });
  each("spikes", [](size_t i) { return i % 37 == 36 ? 100.0 + static_cast<double>(i) : 0.0; });
  each("30% -inf", [&](size_t) { return uniform(random) < 0.3 ? -kInf<double> : uniform(random); });
  each("leading -inf", [&](size_t i) { return i < n / 3 ? -kInf<double> : uniform(random); });
  each("all -inf", [](size_t) { return -kInf<double>; });
  each("ties at 3e38", [](size_t i) { return i % 3 == 2 ? -3e38 : 3e38; });
  each("-3e38 to 3e38", [](size_t i) { return i % 5 == 4 ? 3e38 : -3e38; });
  each("subnormal", [](size_t i) { return 1e-40 * static_cast<double>(i); });
  each("nearly nothing before", [](size_t i) { return i % 300 == 299 ? 0 : -19.0; });
  return all;
}

template <class T>
void hard() {
  generator random(1);
  for (const size_t n : {size_t{1}, size_t{7}, size_t{300}, size_t{2000}}) {
    for (auto& [name, x] : hard_inputs<T>(random, n)) {
      lane<T> in = lane_of<T>(random, x);
      compare(one(in), name);
      in.exclusive = true;
      in.has_state = true;
      in.log_sum = static_cast<T>(1.5);
      in.remainder = static_cast<T>(1e-9);
      compare(one(in), name + ", exclusive with a state");
      // The same in columns, beside other lanes.
      problem<T> p{1, 19, static_cast<index>(n), {}};
      for (index l = 0; l < p.inner; ++l) {
        p.lanes.push_back(l % 3 == 1 ? in : lane_of<T>(random, normal<T>(random, n)));
        p.lanes.back().exclusive = true;
        p.lanes.back().has_state = true;
      }
      compare(p, name + ", columns");
    }
  }
}

template <class T>
void lengths() {
  generator random(2);
  std::vector<index> all(71);
  std::iota(all.begin(), all.end(), 0);
  for (const index n : {255, 256, 257, 511, 513, 1000, 16383, 16385, 32768, 32769}) {
    all.push_back(n);
  }
  for (const index n : all) {
    lane<T> in = lane_of<T>(random, normal<T>(random, at(n), 3));
    for (const bool exclusive : {false, true}) {
      in.exclusive = exclusive;
      compare(one(in), "length " + std::to_string(n));
    }
    if (n > 1000) continue;
    problem<T> p{2, 9, n, {}};
    for (index l = 0; l < p.outer * p.inner; ++l) {
      p.lanes.push_back(lane_of<T>(random, normal<T>(random, at(n), 3)));
    }
    compare(p, "columns of length " + std::to_string(n));
  }
}

template <class T>
void layouts() {
  generator random(3);
  for (const char* layout :
       {"contiguous", "axis last", "steps", "padded rows", "backwards", "fortran"}) {
    for (const index inner : {1, 3, 16, 37, 150}) {
      for (const index n : {5, 70, 300}) {
        for (const bool reverse : {false, true}) {
          problem<T> p{3, inner, n, {}};
          p.layout = layout;
          p.reverse = reverse;
          for (index l = 0; l < p.outer * p.inner; ++l) {
            p.lanes.push_back(lane_of<T>(random, normal<T>(random, at(n), l % 5 == 4 ? 50 : 2)));
            p.lanes.back().exclusive = n == 70;
            p.lanes.back().has_state = n != 5;
            p.lanes.back().log_sum = static_cast<T>(l % 4 == 0 ? -kInf<T> : T(l % 7));
          }
          compare(p, "inner " + std::to_string(inner) + ", n " + std::to_string(n));
        }
      }
    }
  }
}

template <class T>
void runs() {
  generator random(4);
  for (const index inner : {1, 9}) {
    for (const index longest : {1, 4, 40, 700, 30000}) {
      for (const bool exclusive : {false, true}) {
        const index n = longest > 700 ? 40000 : 1500;
        std::vector<index> segments;
        while (static_cast<index>(segments.size()) < n) {
          const index length = 1 + static_cast<index>(random() % static_cast<size_t>(longest));
          const index number = segments.empty() ? 5 : 7 - segments.back();
          segments.insert(segments.end(), at(length), number);
        }
        segments.resize(at(n));
        problem<T> p{1, inner, n, {}};
        p.reverse = longest == 40;
        for (index l = 0; l < inner; ++l) {
          lane<T> in = lane_of<T>(random, normal<T>(random, at(n), 5));
          in.segments = segments;
          in.exclusive = exclusive;
          in.has_state = true;
          in.log_sum = 3;
          if (l % 4 == 1) in.x[at(n / 2)] = kNaN<T>;
          if (l % 4 == 2) in.x[at(n / 3)] = kInf<T>;
          p.lanes.push_back(in);
        }
        compare(p, "runs of up to " + std::to_string(longest));
      }
    }
  }
}

// What is not finite, where it must and must not reach.
template <class T>
void not_finite() {
  generator random(5);
  const T inf = kInf<T>;
  const T nan = kNaN<T>;
  const std::vector<std::vector<T>> table = {
      {-inf, -inf, 1, 2}, {1, -inf, 2}, {1, inf, 2}, {inf, -inf}, {1, nan, 2}, {inf, nan, 0},
      {T(3e38), T(3e38)}, {nan},        {inf},       {-inf},      {-inf, inf}, {-inf, nan, -inf}};
  for (const auto& x : table) {
    for (const bool exclusive : {false, true}) {
      for (int zeros = 0; zeros < 4; ++zeros) {
        for (const T log_sum : {-inf, T(2), inf, nan}) {
          lane<T> in = lane_of<T>(random, x);
          in.exclusive = exclusive;
          in.has_state = true;
          in.log_sum = log_sum;
          if (zeros & 1) in.grad_final = 0;
          if (zeros & 2) std::fill(in.grad.begin() + 1, in.grad.end(), T(0));
          compare(one(in), "table of values");
          problem<T> p{1, 11, static_cast<index>(x.size()), std::vector<lane<T>>(11, in)};
          compare(p, "table of values, columns");
        }
      }
    }
  }
  // One such entry in a long row; gradients from some place on are 0.
  for (const index n : {600, 33000}) {
    for (const T bad : {inf, nan}) {
      for (const index place : {index{0}, index{300}, n - 1}) {
        for (const index zero_from : {index{0}, place, n}) {
          lane<T> in = lane_of<T>(random, normal<T>(random, at(n)));
          in.x[at(place)] = bad;
          in.x[at(n / 2)] = -inf;
          in.grad_final = zero_from == n ? T(1) : T(0);
          std::fill(in.grad.begin() + zero_from, in.grad.end(), T(0));
          compare(one(in), "one entry that is not finite");
          problem<T> p{1, 8, n, {}};
          for (index l = 0; l < 8; ++l) {
            p.lanes.push_back(l == 3 ? in : lane_of<T>(random, normal<T>(random, at(n))));
          }
          compare(p, "one entry that is not finite, columns");
        }
      }
    }
  }
  // A gradient that is not finite reaches what its sum holds, and no entry of -inf.
  for (const T bad : {inf, nan}) {
    lane<T> in = lane_of<T>(random, normal<T>(random, 600));
    in.grad[300] = bad;
    in.x[10] = in.x[290] = -inf;
    const result<T> got = compute(one(in));
    bool good = true;
    for (size_t i = 0; i < 600; ++i) {
      const bool zero = i == 10 || i == 290;
      good = good && (zero ? got.grad_x[0][i] == 0 : std::isfinite(got.grad_x[0][i]) == (i > 300));
    }
    SUBQUAD_CHECK(good);
  }
}

// Any split of a sequence, with the state carried over, gives what one call does.
template <class T>
void splits() {
  generator random(6);
  for (auto& [name, x] : hard_inputs<T>(random, 90)) {
    const lane<T> whole = lane_of<T>(random, x);
    const result<T> want = compute(one(whole));
    bool good = true;
    for (index cut = 0; cut <= 90; ++cut) {
      lane<T> head = whole;
      lane<T> tail = whole;
      head.x.resize(at(cut));
      head.grad.resize(at(cut));
      tail.x.erase(tail.x.begin(), tail.x.begin() + cut);
      tail.grad.erase(tail.grad.begin(), tail.grad.begin() + cut);
      const result<T> before = compute(one(head));
      tail.has_state = true;
      tail.log_sum = before.final_log_sum[0];
      tail.remainder = before.final_remainder[0];
      const result<T> after = compute(one(tail));
      for (index i = 0; i < 90; ++i) {
        const T value = i < cut ? before.out[0][at(i)] : after.out[0][at(i - cut)];
        const T other = want.out[0][at(i)];
        const long double size = std::max<long double>(std::abs(other), 16);
        good = good && (value == other || std::abs(value - other) <= 2 * ulp<T>(size));
      }
    }
    if (!good) std::printf("%s: a split differs\n", name.c_str());
    SUBQUAD_CHECK(good);
  }
  // One entry at a time, many times.
  lane<T> whole = lane_of<T>(random, normal<T>(random, 3000));
  const expected<T> want = truth(whole);
  T log_sum = -kInf<T>;
  T remainder = 0;
  for (const T value : whole.x) {
    lane<T> step;
    step.x = {value};
    step.has_state = true;
    step.log_sum = log_sum;
    step.remainder = remainder;
    const result<T> got = compute(one(step));
    log_sum = got.final_log_sum[0];
    remainder = got.final_remainder[0];
  }
  SUBQUAD_CHECK(std::abs(log_sum - want.last.log()) <= 2 * ulp<T>(16));
}

// Gradients do not feel a shift that is exact; neither do they move when nothing else does.
template <class T>
void shifts() {
  generator random(7);
  for (const index inner : {1, 16}) {
    problem<T> p{1, inner, 3000, {}};
    for (index l = 0; l < inner; ++l) {
      std::vector<T> x = normal<T>(random, 3000, l % 2 ? 40 : 1);
      for (T& value : x) value = std::round(value * 64) / 64;
      p.lanes.push_back(lane_of<T>(random, x));
    }
    problem<T> moved = p;
    for (lane<T>& in : moved.lanes) {
      for (T& value : in.x) value += T(10000);
    }
    SUBQUAD_CHECK(compute(p).grad_x == compute(moved).grad_x);
  }
}

template <class T>
void threads() {
  generator random(8);
  struct size {
    index outer, n, inner;
  };
  for (const size s : {size{1, 140000, 1}, size{3, 70000, 1}, size{70, 500, 1}, size{1, 9000, 9},
                       size{1, 700, 140}}) {
    for (const index longest : {0, 20000}) {
      problem<T> p{s.outer, s.inner, s.n, {}};
      std::vector<index> segments;
      while (longest > 0 && static_cast<index>(segments.size()) < s.n) {
        segments.insert(segments.end(), at(1 + static_cast<index>(random() % at(longest))),
                        static_cast<index>(segments.size()));
      }
      if (longest > 0) segments.resize(at(s.n));
      for (index l = 0; l < s.outer * s.inner; ++l) {
        auto x = normal<T>(random, at(s.n), l % 3 == 1 ? 30 : 1);
        if (l % 3 == 2) std::fill_n(x.begin(), s.n / 2, -kInf<T>);
        p.lanes.push_back(lane_of<T>(random, x));
        p.lanes.back().segments = segments;
        p.lanes.back().exclusive = longest > 0;
      }
      if (s.outer * s.inner < 10) compare(p, "several chunks");
      subquad::set_num_threads(1);
      const result<T> alone = compute(p);
      subquad::set_num_threads(4);
      bool same = true;
      for (int repeat = 0; repeat < 3; ++repeat) same = same && compute(p) == alone;
      SUBQUAD_CHECK(same);
    }
  }
}

// Broadcast lanes, an axis among three others, and what may be absent.
template <class T>
void arguments() {
  generator random(9);
  const auto x = normal<T>(random, 50);
  const index shape[2] = {4, 50};
  const index strides[2] = {0, 1};
  auto view = subquad::contiguous_view(x.data(), shape, 2);
  view.strides = strides;
  std::vector<T> out(200, T(-77));
  std::vector<std::uint8_t> memory(1 << 16);
  const auto bytes = static_cast<index>(memory.size());
  const auto workspace = subquad::contiguous_view(memory.data(), &bytes, 1);
  const auto out_view = subquad::contiguous_view(out.data(), shape, 2);
  subquad::logcumsumexp(view, nullptr, nullptr, nullptr, 1, false, false, out_view, nullptr,
                        nullptr, workspace);
  for (size_t i = 50; i < 200; ++i) SUBQUAD_CHECK(out[i] == out[i - 50]);
  const std::vector<T> grad_final(4, T(1));
  const index lane_shape[1] = {4};
  const auto grad_final_view = subquad::contiguous_view(grad_final.data(), lane_shape, 1);
  std::vector<T> grad_x(200, T(-77));
  const auto grad_x_view = subquad::contiguous_view(grad_x.data(), shape, 2);
  subquad::logcumsumexp_vjp(view, nullptr, nullptr, nullptr, 1, false, false, nullptr,
                            &grad_final_view, &grad_x_view, nullptr, workspace);
  long double total = 0;
  for (size_t i = 0; i < 50; ++i) total += static_cast<long double>(grad_x[i]);
  SUBQUAD_CHECK(std::abs(total - 1) < 16 * std::numeric_limits<T>::epsilon());
  const std::vector<T> log_sum(4, T(1));
  std::vector<T> grad_log_sum(4);
  const auto log_sum_view = subquad::contiguous_view(log_sum.data(), lane_shape, 1);
  const auto grad_log_sum_view = subquad::contiguous_view(grad_log_sum.data(), lane_shape, 1);
  subquad::logcumsumexp_vjp(view, &log_sum_view, nullptr, nullptr, 1, false, false, nullptr,
                            &grad_final_view, nullptr, &grad_log_sum_view, workspace);
  const long double share = 1 / (1 + std::exp(static_cast<long double>(out[49]) - 1));
  SUBQUAD_CHECK(std::abs(static_cast<long double>(grad_log_sum[0]) - share) <
                32 * std::numeric_limits<T>::epsilon());
  const auto call = [&](const subquad::array_view& in, std::int32_t axis) {
    subquad::logcumsumexp(in, nullptr, nullptr, nullptr, axis, false, false, out_view, nullptr,
                          nullptr, workspace);
  };
  using checks::throws;
  SUBQUAD_CHECK(throws<subquad::invalid_argument>([&] { call(view, 2); }, "axis"));
  SUBQUAD_CHECK(throws<subquad::invalid_argument>(
      [&] {
        subquad::logcumsumexp(view, nullptr, &log_sum_view, nullptr, 1, false, false, out_view,
                              nullptr, nullptr, workspace);
      },
      "remainder"));
}

template <class T>
void all() {
  arguments<T>();
  not_finite<T>();
  hard<T>();
  lengths<T>();
  layouts<T>();
  runs<T>();
  splits<T>();
  shifts<T>();
  threads<T>();
}

}  // namespace

int main() {
  for (const std::string& name : subquad::isa_levels()) {
    subquad::set_isa(name);
    all<float>();
    all<double>();
    std::printf("%s: outputs at %.2Lf, gradients at %.2Lf of their limits\n", name.c_str(),
                worst_out, worst_grad);
  }
  return checks::status();
}
