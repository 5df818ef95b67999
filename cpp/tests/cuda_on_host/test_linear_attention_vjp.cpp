// The reverse of linear attention on CUDA against the same sums in long double.
#include <functional>

#include "cuda_on_host/attention.hpp"
#include "subquad/errors.hpp"

namespace {

using namespace attention;

template <class T>
constexpr double kTolerance = sizeof(T) == 8 ? 4e-14 : 6e-6;
double worst_seen[2] = {0, 0};

struct wanted {
  bool grad_y = true;
  bool grad_log_z = true;
  bool grad_key_sums = true;
  bool grad_value_sums = true;
  bool log_q = true;
  int outputs = 63;  // a bit for each
};

template <class T>
struct gradients {
  strided_array<T> y;
  strided_array<T> of_y;
  strided_array<T> of_log_z;
  strided_array<T> of_key_sums;
  strided_array<T> of_value_sums;
  strided_array<T> log_k;
  strided_array<T> v;
  strided_array<T> log_q;
  strided_array<T> log_decay;
  strided_array<T> key_sums;
  strided_array<T> value_sums;

  explicit gradients(const form& f)
      : y(joined(f.batch, {f.n_q, f.d_v}), f.inputs),
        of_y(joined(f.q_batch, {f.n_q, f.d_v}), f.inputs),
        of_log_z(joined(f.batch, {f.n_q}), f.inputs),
        of_key_sums(joined(f.state_batch, {5, f.d_k}), f.inputs),
        of_value_sums(joined(f.state_batch, {2, f.d_k, f.d_v}), f.inputs),
        log_k(joined(f.batch, {f.n, f.d_k}), f.outputs),
        v(joined(f.batch, {f.n, f.d_v}), f.outputs),
        log_q(joined(f.batch, {f.n_q, f.d_k}), f.outputs),
        log_decay(joined(f.batch, {f.n, f.d_k}), f.outputs),
        key_sums(joined(f.batch, {5, f.d_k}), f.outputs),
        value_sums(joined(f.batch, {2, f.d_k, f.d_v}), f.outputs) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(f.n * 31 + f.d_k * 7 + f.d_v));
    std::normal_distribution<double> normal;
    for (const strided_array<T>* each : {&of_y, &of_log_z, &of_key_sums, &of_value_sums}) {
      each->each([&](T& e, const shape&) { e = static_cast<T>(normal(generator)); });
    }
  }
};

// A gradient, and the sum of the sizes of what it is made of.
struct bounded {
  number value = 0;
  number size = 0;
  number span = 0;  // of exponents

  void add(number gradient, number its_size, number its_span) {
    value += gradient;
    size += std::abs(its_size);
    span = std::max(span, its_span);
  }
};

struct truths {
  std::vector<bounded> log_k, v, log_q, log_decay, key_sums, value_sums;
};

template <class T>
truths find_truth(const problem<T>& p, const gradients<T>& g, const wanted& which, const shape& b) {
  const form& f = p.of;
  const truth<T> one(p, b);
  const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  truths to;
  to.log_k.resize(at(f.n * f.d_k));
  to.v.resize(at(f.n * f.d_v));
  to.log_q.resize(at(f.n_q * f.d_k));
  to.log_decay.resize(at(f.n * f.d_k));
  to.key_sums.resize(at(5 * f.d_k));
  to.value_sums.resize(at(f.d_k * f.d_v));
  // What a weight of log_k_jr, decayed to token t, adds per unit of its gradient.
  const auto add = [&](const term& each, std::int64_t t, number gradient, number size,
                       number span) {
    if (each.key >= 0) to.log_k[at(each.key * f.d_k + each.feature)].add(gradient, size, span);
    for (std::int64_t i = each.key + 1; p.has_decay() && i <= t; ++i) {
      to.log_decay[at(i * f.d_k + each.feature)].add(gradient, 0, span);
    }
  };
  for (std::int64_t t = 0; which.log_q && t < f.n_q; ++t) {
    const std::vector<term> terms = one.terms_of(t);
    if (terms.empty()) continue;
    number top = -kInfinity;
    number total = 0;
    for (const term& each : terms) top = std::max(top, each.logarithm);
    for (const term& each : terms) total += one.mass(each) * std::exp(each.logarithm - top);
    std::vector<number> grad_y;
    for (std::int64_t c = 0; c < f.d_v; ++c) {
      grad_y.push_back(which.grad_y ? static_cast<number>(g.of_y(joined(b, {t, c}))) : 0);
    }
    const auto grad = [&](std::int64_t c) { return grad_y[at(c)]; };
    const number grad_log_z =
        which.grad_log_z ? static_cast<number>(g.of_log_z(joined(b, {t}))) : 0;
    std::vector<number> y(at(f.d_v));
    std::vector<number> sizes(at(f.d_v));
    for (const term& each : terms) {
      const number share = std::exp(each.logarithm - top) / total;
      for (std::int64_t c = 0; c < f.d_v; ++c) {
        y[at(c)] += share * one.value_of(each, c);
        sizes[at(c)] += std::abs(share * (one.value_of(each, c) - one.mass(each) * f.value_offset));
      }
    }
    for (const term& each : terms) {
      const number share = std::exp(each.logarithm - top) / total;
      const number q = one.q(t, each.feature);
      const number span = std::abs(q) + std::abs(each.logarithm - q);
      number gradient = grad_log_z * one.mass(each);
      number size = std::abs(gradient);
      number of_sum = grad_log_z;
      number of_sum_size = std::abs(grad_log_z);
      for (std::int64_t c = 0; c < f.d_v; ++c) {
        const number difference = one.value_of(each, c) - one.mass(each) * y[at(c)];
        gradient += grad(c) * difference;
        // y is given rounded.
        const number of_y = sizes[at(c)] + std::abs(y[at(c)]) * (f.value_offset > 0 ? 0.01L : 0);
        size +=
            std::abs(grad(c)) * (std::abs(one.value_of(each, c) - one.mass(each) * f.value_offset) +
                                 one.mass(each) * of_y);
        of_sum -= grad(c) * y[at(c)];
        of_sum_size += std::abs(grad(c)) * (of_y + std::abs(f.value_offset));
        if (each.key >= 0) {
          to.v[at(each.key * f.d_v + c)].add(share * grad(c), share * grad(c), span);
        } else {
          to.value_sums[at(each.feature * f.d_v + c)].add(share * grad(c), share * grad(c), span);
        }
      }
      to.log_q[at(t * f.d_k + each.feature)].add(share * gradient, share * size, span);
      if (each.key < 0) {
        to.key_sums[at(2 * f.d_k + each.feature)].add(share * of_sum, share * of_sum_size, span);
      }
      add(each, t, share * gradient, share * size, span);
    }
  }
  const std::vector<term> finals = one.keys_of(f.n - 1, true);
  for (std::int64_t r = 0; r < f.d_k; ++r) {
    number top = -kInfinity;
    for (const term& each : finals) {
      if (each.feature == r) top = std::max(top, each.logarithm);
    }
    const auto of_key_sum = [&](std::int64_t row) {
      return which.grad_key_sums ? static_cast<number>(g.of_key_sums(joined(b, {row, r}))) : 0;
    };
    std::vector<number> grads;
    for (std::int64_t c = 0; c < f.d_v; ++c) {
      grads.push_back(
          which.grad_value_sums ? static_cast<number>(g.of_value_sums(joined(b, {0, r, c}))) : 0);
    }
    for (const term& each : finals) {
      if (each.feature != r) continue;
      const number weight = std::exp(each.logarithm - top);
      number gradient = of_key_sum(2) * one.mass(each);
      number size = std::abs(gradient);
      number of_centre = 0;
      for (std::int64_t c = 0; c < f.d_v; ++c) {
        const number grad = grads[at(c)];
        gradient += grad * one.value_of(each, c);
        size += std::abs(grad * one.value_of(each, c)) + std::abs(grad * one.mass(each));
        of_centre += std::abs(grad) * (1 + std::abs(f.value_offset));
        if (each.key >= 0) {
          to.v[at(each.key * f.d_v + c)].add(weight * grad, weight * grad, std::abs(top));
        } else {
          to.value_sums[at(r * f.d_v + c)].add(weight * grad, weight * grad, std::abs(top));
        }
      }
      if (each.key < 0) {
        to.key_sums[at(2 * f.d_k + r)].add(
            weight * of_key_sum(2), weight * (std::abs(of_key_sum(2)) + of_centre), std::abs(top));
      }
      add(each, f.n - 1, weight * gradient, weight * size, std::abs(top));
    }
    const bool is_one_run = one.last_run() == 0;
    to.key_sums[at(3 * f.d_k + r)] = to.key_sums[at(2 * f.d_k + r)];
    if (is_one_run) to.key_sums[at(4 * f.d_k + r)].add(of_key_sum(4), of_key_sum(4), 0);
    // Sums of what the rows and keys from here on have.
    number size = 0;
    for (std::int64_t t = f.n - 1; t >= 0; --t) {
      bounded& here = to.log_decay[at(t * f.d_k + r)];
      if (which.log_q && t < f.n_q) size += to.log_q[at(t * f.d_k + r)].size;
      size += to.log_k[at(t * f.d_k + r)].size;
      here.size = size;
      if (one.run(t) == one.last_run()) here.add(of_key_sum(4), of_key_sum(4), 0);
    }
  }
  return to;
}

template <class T>
void run(const problem<T>& p, const gradients<T>& g, const wanted& which) {
  const form& f = p.of;
  const std::int64_t n_q = which.log_q ? f.n_q : 0;
  const std::int64_t size = product(f.batch);
  const array_view views[] = {p.log_k.view(),     p.v.view(),         p.log_q.view(),
                              p.log_decay.view(), p.key_mask.view(),  p.segments.view(),
                              p.key_sums.view(),  p.value_sums.view()};
  const array_view given[] = {g.y.view(), g.of_y.view(), g.of_log_z.view(), g.of_key_sums.view(),
                              g.of_value_sums.view()};
  const array_view found[] = {g.log_k.view(),     g.v.view(),        g.log_q.view(),
                              g.log_decay.view(), g.key_sums.view(), g.value_sums.view()};
  const auto wants = [&](int output) {
    const bool exists = output < 2 || (output == 2 && which.log_q) ||
                        (output == 3 && p.has_decay()) || (output > 3 && f.has_state);
    return exists && (which.outputs >> output & 1) ? &found[output] : nullptr;
  };
  const auto bytes = static_cast<std::int64_t>(subquad::core::linear_attention_vjp_workspace(
      size, n_q, f.n, f.d_k, f.d_v, sizeof(T), f.causal));
  const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
  subquad::core::linear_attention_vjp(
      views[0], views[1], which.log_q ? &views[2] : nullptr, p.has_decay() ? &views[3] : nullptr,
      f.kept < 1 ? &views[4] : nullptr, f.run > 0 ? &views[5] : nullptr,
      f.has_state ? &views[6] : nullptr, f.has_state ? &views[7] : nullptr, f.causal,
      which.grad_y && which.log_q ? &given[0] : nullptr,
      which.grad_y && which.log_q ? &given[1] : nullptr,
      which.grad_log_z && which.log_q ? &given[2] : nullptr,
      which.grad_key_sums ? &given[3] : nullptr, which.grad_value_sums ? &given[4] : nullptr,
      wants(0), wants(1), wants(2), wants(3), wants(4), wants(5), memory.view());
}

template <class T>
void find_y(const problem<T>& p, const gradients<T>& g) {
  const form& f = p.of;
  each_index(f.batch, [&](const shape& b) {
    const truth<T> one(p, b);
    for (std::int64_t t = 0; t < f.n_q; ++t) {
      const std::vector<term> terms = one.terms_of(t);
      number top = -kInfinity;
      number total = 0;
      for (const term& each : terms) top = std::max(top, each.logarithm);
      for (const term& each : terms) total += one.mass(each) * std::exp(each.logarithm - top);
      for (std::int64_t c = 0; c < f.d_v; ++c) {
        number sum = 0;
        for (const term& each : terms) {
          sum += std::exp(each.logarithm - top) / total * one.value_of(each, c);
        }
        g.y(joined(b, {t, c})) = static_cast<T>(terms.empty() ? number(kNan) : sum);
      }
    }
  });
}

template <class T>
void expect(const char* what, T found, const bounded& truth, const form& f, const shape& at) {
  if (static_cast<number>(found) == truth.value) return;
  // Weights below the smallest number are 0, or that number.
  const number allowed = std::numeric_limits<T>::min() * 1e3L;
  number error = std::abs(static_cast<number>(found) - truth.value);
  if (error <= allowed) return;
  error = std::max<number>(0, error / truth.size - 4 * 0x1p-53L * truth.span);
  if (error <= kTolerance<T>) {
    double& worst = worst_seen[sizeof(T) == 8];
    worst = std::max(worst, static_cast<double>(error));
    return;
  }
  std::string place;
  for (const std::int64_t i : at) place += std::to_string(i) + " ";
  std::printf(
      "%s at %s: found %.9g, expected %.9Lg, of size %.3Lg, error %.3Lg (n %lld d_k %lld d_v %lld "
      "n_q %lld causal %d scale %g decay %g run %d state %d kept %g)\n",
      what, place.c_str(), static_cast<double>(found), truth.value, truth.size, error,
      static_cast<long long>(f.n), static_cast<long long>(f.d_k), static_cast<long long>(f.d_v),
      static_cast<long long>(f.n_q), f.causal, f.scale, f.decay, f.run, f.has_state, f.kept);
  SUBQUAD_CHECK(!"a gradient is off");
}

template <class T>
void check(const problem<T>& p, const wanted& which = {}) {
  const form& f = p.of;
  const gradients<T> g(f);
  find_y(p, g);
  run(p, g, which);
  each_index(f.batch, [&](const shape& b) {
    const truths truth = find_truth(p, g, which, b);
    const auto compare = [&](const char* name, const strided_array<T>& found,
                             const std::vector<bounded>& expected, const shape& lengths) {
      std::size_t index = 0;
      each_index(lengths, [&](const shape& at) {
        expect(name, found(joined(b, at)), expected[index++], f, joined(b, at));
      });
    };
    const auto has = [&](int output) { return (which.outputs >> output & 1) != 0; };
    if (has(0)) compare("log_k", g.log_k, truth.log_k, {f.n, f.d_k});
    if (has(1)) compare("v", g.v, truth.v, {f.n, f.d_v});
    if (has(2) && which.log_q) compare("log_q", g.log_q, truth.log_q, {f.n_q, f.d_k});
    if (has(3) && p.has_decay()) compare("log_decay", g.log_decay, truth.log_decay, {f.n, f.d_k});
    if (!f.has_state) return;
    if (has(4)) compare("key_sums", g.key_sums, truth.key_sums, {5, f.d_k});
    if (has(5)) {
      for (const std::int64_t part : {0, 1}) {
        std::size_t index = 0;
        each_index({f.d_k, f.d_v}, [&](const shape& at) {
          expect("value_sums", g.value_sums(joined(b, {part, at[0], at[1]})),
                 truth.value_sums[index++], f, joined(b, at));
        });
      }
    }
  });
  SUBQUAD_CHECK(g.log_k.gaps_untouched() && g.v.gaps_untouched() && g.log_q.gaps_untouched() &&
                g.log_decay.gaps_untouched() && g.key_sums.gaps_untouched() &&
                g.value_sums.gaps_untouched());
}

template <class T>
void check(const form& f, const wanted& which = {}) {
  check(problem<T>(f), which);
}

form sized(std::int64_t n, std::int64_t d_k, std::int64_t d_v, bool causal = true) {
  form f;
  f.n = n;
  f.d_k = d_k;
  f.d_v = d_v;
  f.causal = causal;
  return f;
}

template <class T>
void check_sizes() {
  for (const std::int64_t n : {0, 1, 64, 150}) {
    check<T>(sized(n, 5, 3));
    check<T>(sized(n, 5, 3, false));
  }
  check<T>(sized(66, 64, 64));
  check<T>(sized(66, 33, 65));
  check<T>(sized(20, 130, 1));
  check<T>(sized(5, 0, 3));
  check<T>(sized(5, 3, 0));
  form f = sized(70, 6, 4, false);
  f.has_state = true;
  for (const std::int64_t n_q : {0, 1, 64, 130}) {
    f.n_q = n_q;
    check<T>(f);
  }
  f.n = 0;
  check<T>(f);
  f = sized(0, 4, 3);
  f.has_state = true;
  f.decay = 0.1;
  check<T>(f);
}

template <class T>
void check_scales() {
  for (const bool causal : {true, false}) {
    for (const double scale : {0.1, 4.0, 30.0, 1e4}) {
      form f = sized(70, 5, 4, causal);
      f.scale = scale;
      f.has_state = scale > 1;
      f.kept = scale < 20 ? 1 : 0.8;
      check<T>(f);
    }
  }
}

template <class T>
void check_options(int step) {
  for (const bool causal : {true, false}) {
    for (int options = 0; options < 8; options += step) {
      form f = sized(options & 4 ? 135 : 70, 6, 5, causal);
      f.kept = options & 1 ? 0.5 : 1;
      f.has_state = options & 2;
      f.run = options & 4 ? 11 : 0;
      if (options & 1) check<T>(f);
      if (options & 4) f.run = 80;
      f.decay = causal ? 0.05 : -1;
      check<T>(f);
      if (!causal) continue;
      f.decay = options & 1 ? 2 : 40;
      check<T>(f);
    }
  }
}

template <class T>
void check_layouts() {
  for (const layout how :
       {layout::transposed, layout::spread, layout::reversed, layout::unaligned}) {
    form f = sized(67, 7, 5);
    f.inputs = f.outputs = how;
    f.batch = {2, 3};
    f.k_batch = {3};
    f.v_batch = {2, 1};
    f.q_batch = {2, 3};
    f.decay_batch = {1, 3};
    f.mask_batch = {2, 3};
    f.state_batch = {3};
    f.has_state = true;
    f.decay = 0.1;
    f.kept = 0.9;
    f.run = 40;
    check<T>(f);
    f.causal = false;
    f.decay = -1;
    check<T>(f);
  }
}

// Runs that start where chunks do.
template <class T>
void check_borders() {
  for (const bool causal : {true, false}) {
    form f = sized(150, 4, 3, causal);
    f.has_state = true;
    f.decay = causal ? 0.05 : -1;
    f.run = 1;
    const problem<T> p(f);
    p.segments.each([&](std::int64_t& e, const shape& at) {
      e = at[0] < 64 ? 5 : at[0] < 128 ? 2 : at[0] < 140 ? 9 : 1;
    });
    check(p);
    p.segments.each([&](std::int64_t& e, const shape& at) { e = at[0] >= 64; });
    check(p);
  }
}

template <class T>
void check_absent() {
  form f = sized(66, 3, 2);
  f.has_state = true;
  f.decay = 0.1;
  for (const bool causal : {true, false}) {
    f.causal = causal;
    f.run = causal ? 30 : 0;
    if (!causal) f.decay = -1;
    for (int given = causal ? 0 : 1; given < 16; given += causal ? 1 : 4) {
      check<T>(f, {(given & 1) != 0, (given & 2) != 0, (given & 4) != 0, (given & 8) != 0, true,
                   1 << given % 6});
    }
    check<T>(f, {false, false, true, true, false, 63});
  }
}

template <class T>
void check_ramps() {
  for (const double slope : {3.0, -31.0, 1000.0}) {
    for (const bool has_state : {false, true}) {
      form f = sized(66, 4, 3);
      f.has_state = has_state;
      f.decay = has_state ? 0.1 : -1;
      const problem<T> p(f);
      p.log_k.each([&](T& e, const shape& at) { e += static_cast<T>(slope * double(at[0])); });
      check(p);
    }
  }
  // Rows before the first key attend the state alone.
  form f = sized(70, 4, 3);
  f.has_state = true;
  f.kept = 0.9;
  const problem<T> late(f);
  late.key_mask.each([&](std::uint8_t& e, const shape& at) { e = at[0] > 4; });
  late.log_k.each([&](T& e, const shape&) { e += 1000; });
  check(late);
}

// What counts for nothing has no gradient, whatever it holds.
template <class T>
void check_nothing() {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (const bool causal : {true, false}) {
    form f = sized(100, 5, 3, causal);
    f.has_state = causal;
    f.kept = 0.9;
    const problem<T> p(f);
    p.log_k.each([&](T& e, const shape& at) {
      if (at[0] % 7 == 3 || (at[0] < 40 && at[1] == 2)) e = kNone;
      if (p.key_mask({at[0]}) == 0) e = nan;
    });
    p.v.each([&](T& e, const shape& at) {
      if (at[0] % 7 == 3 || p.key_mask({at[0]}) == 0) e = nan;
    });
    p.log_q.each([&](T& e, const shape& at) {
      if (at[0] == 50 || at[1] == at[0] % 5) e = kNone;
    });
    p.key_sums.each([&](T& e, const shape& at) {
      if (at[1] == 1) e = at[0] == 0 ? kNone : T(0);
    });
    p.value_sums.each([&](T& e, const shape& at) {
      if (at[1] == 1) e = 0;
    });
    const gradients<T> g(p.of);
    find_y(p, g);
    g.of_log_z.each([&](T& e, const shape& at) {
      if (at[0] == 50) e = nan;
    });
    run(p, g, {});
    for (const strided_array<T>* each : {&g.log_k, &g.v, &g.log_q}) {
      each->each([&](T& e, const shape&) { SUBQUAD_CHECK(std::isfinite(e)); });
    }
    p.v.each([&](T& e, const shape&) {
      if (std::isnan(e)) e = 0;
    });
    p.log_k.each([&](T& e, const shape&) {
      if (std::isnan(e)) e = 0;
    });
    check(p);
  }
}

template <class T>
void check_locality() {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (const int kind : {0, 1, 2}) {
    form f = sized(150, 5, 3);
    f.run = 1;
    const problem<T> p(f);
    p.segments.each([&](std::int64_t& e, const shape& at) { e = at[0] < 30 ? 0 : at[0] < 120; });
    const gradients<T> g(p.of);
    find_y(p, g);
    const std::int64_t token = 70;
    if (kind == 0) g.of_y({token, 1}) = nan;
    if (kind == 1) p.v({token, 1}) = nan;
    if (kind == 2) p.log_k({token, 2}) = nan;
    run(p, g, {});
    for (std::int64_t t = 0; t < f.n; ++t) {
      const bool in_run = t >= 30 && t < 120;
      const bool reaches_rows = kind == 0 ? t == token : in_run && t >= token;
      const bool reaches_keys = kind == 0 ? in_run && t <= token : in_run;
      SUBQUAD_CHECK(std::isnan(g.log_q({t, 0})) == reaches_rows);
      SUBQUAD_CHECK(!std::isnan(g.log_k({t, 0})) || reaches_keys);
      SUBQUAD_CHECK(!std::isnan(g.v({t, 1})) || reaches_keys);
      if (kind == 0) SUBQUAD_CHECK(std::isnan(g.log_k({t, 0})) == reaches_keys);
    }
  }
}

template <class T>
void check_forgetting() {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  for (const bool has_state : {false, true}) {
    form f = sized(140, 5, 3);
    f.decay = 0.2;
    f.has_state = has_state;
    const problem<T> p(f);
    p.log_decay.each([&](T& e, const shape& at) {
      if (at[0] % 31 == 5 * at[1]) e = kNone;
    });
    check(p);
    // Nothing crosses it, to the last bit.
    const gradients<T> g(p.of);
    find_y(p, g);
    run(p, g, {true, true, false, true});
    p.log_decay.each([&](T& e, const shape& at) {
      const bool is_first = at[0] == 0 && !has_state;
      if (e == kNone || is_first) SUBQUAD_CHECK(g.log_decay(at) == 0);
    });
  }
}

// Values that have much in common lose nothing of their differences but what y is rounded by.
template <class T>
void check_centre() {
  form f = sized(130, 5, 3);
  f.value_offset = 1000;
  check<T>(f, {true, true, false, false});
  f.has_state = true;
  check<T>(f, {true, true, false, false});
}

template <class T>
void check_all() {
  check_sizes<T>();
  check_scales<T>();
  check_options<T>(sizeof(T) == 8 ? 3 : 1);
  check_layouts<T>();
  check_borders<T>();
  check_absent<T>();
  check_ramps<T>();
  check_nothing<T>();
  check_locality<T>();
  check_forgetting<T>();
  check_centre<T>();
}

}  // namespace

int main() {
  subquad::cuda::on_host::in_every_order(
      [] {
        check_all<float>();
        check_all<double>();
      },
      [] { check_options<float>(3); });
  std::printf("worst: float32 %.3g, float64 %.3g\n", worst_seen[0], worst_seen[1]);
  return checks::status();
}
