// Linear attention with values in logarithms and its reverse against the pairwise sums in long
// double, on whichever device the program is for.
#ifndef SUBQUAD_TESTS_LOG_ATTENTION_CASES_HPP
#define SUBQUAD_TESTS_LOG_ATTENTION_CASES_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "subquad/attention.hpp"

namespace log_attention_cases {

using std::size_t;
using real = long double;

constexpr real kInfinity = std::numeric_limits<real>::infinity();
#if defined(SUBQUAD_FOR_CUDA)
constexpr auto kDevice = subquad::device_type::cuda;
#else
constexpr auto kDevice = subquad::device_type::cpu;
#endif

template <class T>
subquad::array_view placed_view(T* data, const std::int64_t* shape, std::int32_t ndim) {
  subquad::array_view view = subquad::contiguous_view(data, shape, ndim);
  view.device = kDevice;
  return view;
}

constexpr int kCausal = 1;
constexpr int kSigned = 2;
constexpr int kDecay = 4;
constexpr int kMask = 8;
constexpr int kSegments = 16;
constexpr int kState = 32;

// An argument with its shape beside it; without elements where it is left out.
template <class T>
struct array {
  std::vector<std::int64_t> shape;
  std::vector<T> data;
  bool given = false;
  mutable subquad::array_view kept{};

  void resize(std::vector<std::int64_t> lengths, T value) {
    shape = std::move(lengths);
    std::int64_t product = 1;
    for (const std::int64_t length : shape) product *= length;
    data.assign(static_cast<size_t>(product), value);
    given = true;
  }
  subquad::array_view view() const {
    return placed_view(data.data(), shape.data(), static_cast<std::int32_t>(shape.size()));
  }
  const subquad::array_view* pointer() const {
    if (!given) return nullptr;
    kept = view();
    return &kept;
  }
  T& operator()(std::int64_t i, std::int64_t j) {
    return data[static_cast<size_t>(i * shape.back() + j)];
  }
  T operator()(std::int64_t i, std::int64_t j) const {
    return data[static_cast<size_t>(i * shape.back() + j)];
  }
  T& operator[](std::int64_t i) { return data[static_cast<size_t>(i)]; }
  T operator[](std::int64_t i) const { return data[static_cast<size_t>(i)]; }
};

template <class T>
struct problem {
  std::int64_t n_q = 0;
  std::int64_t n = 0;
  std::int64_t d_k = 0;
  std::int64_t d_v = 0;
  std::int64_t batch = 1;  // in front of the shapes where it is more than 1
  bool causal = false;
  array<T> log_q, log_k, log_v, sign_v, log_decay, log_numerator, sign_numerator, log_denominator;
  array<std::uint8_t> key_mask;
  array<std::int64_t> segments;

  std::vector<std::int64_t> batched(std::vector<std::int64_t> lengths) const {
    if (batch > 1) lengths.insert(lengths.begin(), batch);
    return lengths;
  }

  problem(std::int64_t queries, std::int64_t tokens, std::int64_t features, std::int64_t width,
          int parts, std::int64_t members = 1)
      : n_q(queries),
        n(tokens),
        d_k(features),
        d_v(width),
        batch(members),
        causal((parts & kCausal) != 0) {
    if (n_q > 0) log_q.resize(batched({n_q, d_k}), 0);
    log_k.resize(batched({n, d_k}), 0);
    log_v.resize(batched({n, d_v}), 0);
    if (parts & kSigned) sign_v.resize(batched({n, d_v}), 1);
    if (parts & kDecay) log_decay.resize(batched({n, d_k}), 0);
    if (parts & kMask) key_mask.resize(batched({n}), 1);
    if (parts & kSegments) segments.resize({n}, 0);
    if (parts & kState) {
      log_numerator.resize(batched({d_k, d_v}), 0);
      log_denominator.resize(batched({d_k}), 0);
      if (parts & kSigned) sign_numerator.resize(batched({d_k, d_v}), 1);
    }
  }

  // Normal queries, keys and values of a scale, and everything else to fit.
  problem& fill(std::uint64_t seed, double scale, double value_scale) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    const auto normals = [&](array<T>& to, double by) {
      for (T& x : to.data) x = static_cast<T>(by * normal(generator));
    };
    const auto signs = [&](array<T>& to) {
      for (T& x : to.data) x = generator() % 2 ? T(1) : T(-1);
    };
    normals(log_q, scale);
    normals(log_k, scale);
    normals(log_v, value_scale);
    signs(sign_v);
    for (T& x : log_decay.data) x = static_cast<T>(-std::abs(normal(generator)));
    for (auto& x : key_mask.data) x = generator() % 4 != 0;
    std::int64_t run = 3;
    for (auto& x : segments.data) {
      if (generator() % 13 == 0) run = run == 3 ? 7 : 3;
      x = run;
    }
    normals(log_numerator, scale);
    normals(log_denominator, scale);
    signs(sign_numerator);
    // The denominator of a state is no smaller than its parts.
    for (std::int64_t d = 0; log_denominator.given && d < d_k; ++d) {
      log_denominator[d] = std::max(log_denominator[d], static_cast<T>(scale));
    }
    return *this;
  }
};

// Gradients that come in.
template <class T>
struct upstream {
  array<T> log_y, log_z, log_numerator, log_denominator;

  upstream(const problem<T>& p, std::uint64_t seed, bool final_state) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    if (p.n_q > 0) {
      log_y.resize(p.batched({p.n_q, p.d_v}), 0);
      log_z.resize(p.batched({p.n_q}), 0);
    }
    if (final_state) {
      log_numerator.resize(p.batched({p.d_k, p.d_v}), 0);
      log_denominator.resize(p.batched({p.d_k}), 0);
    }
    for (array<T>* part : {&log_y, &log_z, &log_numerator, &log_denominator}) {
      for (T& x : part->data) x = static_cast<T>(normal(generator));
    }
  }
};

template <class T>
struct results {
  array<T> log_y, sign_y, log_z, log_numerator, sign_numerator, log_denominator;
};

template <class T>
struct gradients {
  array<T> log_k, log_v, log_q, log_decay, log_numerator, log_denominator;
};

inline subquad::array_view view_of(std::vector<std::uint8_t>& bytes, std::int64_t* length) {
  *length = static_cast<std::int64_t>(bytes.size());
  return placed_view(bytes.data(), length, 1);
}

template <class T>
results<T> forward(const problem<T>& p) {
  results<T> out;
  if (p.n_q > 0) {
    out.log_y.resize(p.batched({p.n_q, p.d_v}), -77);
    out.sign_y.resize(p.batched({p.n_q, p.d_v}), -77);
    out.log_z.resize(p.batched({p.n_q}), -77);
  }
  out.log_numerator.resize(p.batched({p.d_k, p.d_v}), -77);
  out.sign_numerator.resize(p.batched({p.d_k, p.d_v}), -77);
  out.log_denominator.resize(p.batched({p.d_k}), -77);
  std::vector<std::uint8_t> bytes(subquad::log_linear_attention_workspace(
      p.batch, p.n_q, p.n, p.d_k, p.d_v, sizeof(T), p.causal, kDevice));
  std::int64_t length = 0;
  subquad::log_linear_attention(
      p.log_k.view(), p.log_v.view(), p.sign_v.pointer(), p.log_q.pointer(), p.log_decay.pointer(),
      p.key_mask.pointer(), p.segments.pointer(), p.log_numerator.pointer(),
      p.sign_numerator.pointer(), p.log_denominator.pointer(), p.causal, out.log_y.pointer(),
      out.sign_y.pointer(), out.log_z.pointer(), out.log_numerator.pointer(),
      out.sign_numerator.pointer(), out.log_denominator.pointer(), view_of(bytes, &length));
  return out;
}

template <class T>
gradients<T> reverse(const problem<T>& p, const upstream<T>& g) {
  gradients<T> out;
  out.log_k.resize(p.batched({p.n, p.d_k}), -77);
  out.log_v.resize(p.batched({p.n, p.d_v}), -77);
  if (p.n_q > 0) out.log_q.resize(p.batched({p.n_q, p.d_k}), -77);
  if (p.log_decay.given) out.log_decay.resize(p.batched({p.n, p.d_k}), -77);
  if (p.log_denominator.given) {
    out.log_numerator.resize(p.batched({p.d_k, p.d_v}), -77);
    out.log_denominator.resize(p.batched({p.d_k}), -77);
  }
  std::vector<std::uint8_t> bytes(subquad::log_linear_attention_vjp_workspace(
      p.batch, p.n_q, p.n, p.d_k, p.d_v, sizeof(T), p.causal, kDevice));
  std::int64_t length = 0;
  subquad::log_linear_attention_vjp(
      p.log_k.view(), p.log_v.view(), p.sign_v.pointer(), p.log_q.pointer(), p.log_decay.pointer(),
      p.key_mask.pointer(), p.segments.pointer(), p.log_numerator.pointer(),
      p.sign_numerator.pointer(), p.log_denominator.pointer(), p.causal, g.log_y.pointer(),
      g.log_z.pointer(), g.log_numerator.pointer(), g.log_denominator.pointer(),
      out.log_k.pointer(), out.log_v.pointer(), out.log_q.pointer(), out.log_decay.pointer(),
      out.log_numerator.pointer(), out.log_denominator.pointer(), view_of(bytes, &length));
  return out;
}

// A sum of signed exponentials: its logarithm and sign, and the logarithm of the magnitudes' sum.
struct signed_sum {
  real log = -kInfinity;
  real sign = 0;
  real log_magnitude = -kInfinity;
};

struct term {
  real log;
  real sign;
};

inline signed_sum add(const std::vector<term>& terms) {
  signed_sum sum;
  real top = -kInfinity;
  for (const term& x : terms) {
    if (x.sign != 0) top = std::max(top, x.log);
  }
  if (top == -kInfinity) return sum;
  real total = 0;
  real magnitude = 0;
  for (const term& x : terms) {
    if (x.sign == 0) continue;
    const real value = std::exp(x.log - top) * std::abs(x.sign);
    magnitude += value;
    total += x.sign > 0 ? value : -value;
  }
  sum.log = total == 0 ? -kInfinity : top + std::log(std::abs(total));
  sum.sign = total > 0 ? 1 : total < 0 ? -1 : 0;
  sum.log_magnitude = top + std::log(magnitude);
  return sum;
}

// The pairwise definition. Sources are the state (-1) and the keys; `after` n stands for the final
// state.
template <class T>
struct truth {
  const problem<T>& p;
  std::vector<signed_sum> num;
  std::vector<signed_sum> den;
  // Gradients, and the sums of their terms' magnitudes times the conditioning of what each term
  // is a share of.
  struct gradient {
    std::vector<real> value;
    std::vector<real> size;
    void resize(std::int64_t count) {
      value.assign(static_cast<size_t>(count), 0);
      size.assign(static_cast<size_t>(count), 0);
    }
    void add(std::int64_t at, real term, real condition) {
      value[static_cast<size_t>(at)] += term;
      size[static_cast<size_t>(at)] += std::abs(term) * condition;
    }
  };
  gradient log_k, log_v, log_q, log_decay, log_numerator, log_denominator;

  std::vector<std::int64_t> runs;          // of each token
  std::vector<real> decay_sums;            // of the finite decays before each token
  std::vector<std::int64_t> decay_counts;  // of those that forget

  explicit truth(const problem<T>& input) : p(input) {
    runs.assign(static_cast<size_t>(p.n), 0);
    for (size_t i = 1; p.segments.given && i < runs.size(); ++i) {
      runs[i] = runs[i - 1] + (p.segments.data[i] != p.segments.data[i - 1]);
    }
    const auto features = static_cast<size_t>(p.d_k);
    decay_sums.assign(features, 0);
    decay_counts.assign(features, 0);
    for (size_t i = 0; i < p.log_decay.data.size(); ++i) {
      const T decay = p.log_decay.data[i];
      decay_sums.push_back(decay_sums[i] + (std::isfinite(decay) ? real(decay) : 0));
      decay_counts.push_back(decay_counts[i] + !std::isfinite(decay));
    }
    for (std::int64_t t = 0; t < p.n_q; ++t) {
      for (std::int64_t v = 0; v < p.d_v; ++v) num.push_back(row_sum(t, v));
      den.push_back(row_sum(t, -1));
    }
  }

  // Whether a source is seen after token t (rows), or by the final state (t = n).
  bool sees(std::int64_t t, std::int64_t source) const {
    const std::int64_t token = t == p.n ? p.n - 1 : t;
    if (source < 0)
      return p.log_denominator.given && (p.n == 0 || runs[static_cast<size_t>(token)] == 0);
    if (p.causal && source > token) return false;
    if (p.segments.given && runs[static_cast<size_t>(source)] != runs[static_cast<size_t>(token)])
      return false;
    if (p.key_mask.given && p.key_mask[source] == 0) return false;
    return true;
  }

  real decay(std::int64_t t, std::int64_t source, std::int64_t d) const {
    if (!p.log_decay.given) return 0;
    const auto last = static_cast<size_t>((std::min(t, p.n - 1) + 1) * p.d_k + d);
    const auto first = static_cast<size_t>((source + 1) * p.d_k + d);
    if (decay_counts[last] != decay_counts[first]) return -kInfinity;
    return decay_sums[last] - decay_sums[first];
  }

  // The logarithm and sign of what one feature of a source adds to value v, -1: to the denominator.
  term source_term(std::int64_t source, std::int64_t d, std::int64_t v) const {
    if (source < 0) {
      if (v < 0) return {p.log_denominator[d], 1};
      return {p.log_numerator(d, v), p.sign_numerator.given ? real(p.sign_numerator(d, v)) : 1};
    }
    const real key = p.log_k(source, d);
    if (v < 0) return {key, 1};
    if (key == -kInfinity) return {-kInfinity, 1};
    return {key + p.log_v(source, v), p.sign_v.given ? real(p.sign_v(source, v)) : 1};
  }

  signed_sum row_sum(std::int64_t t, std::int64_t v) const {
    std::vector<term> terms;
    for (std::int64_t d = 0; d < p.d_k; ++d) {
      for (std::int64_t source = -1; source < p.n; ++source) {
        const std::int64_t token = p.causal || p.segments.given ? t : p.n;
        if (!sees(token, source)) continue;
        term x = source_term(source, d, v);
        x.log += decay(t, source, d) + real(p.log_q(t, d));
        terms.push_back(x);
      }
    }
    return add(terms);
  }

  signed_sum final_sum(std::int64_t d, std::int64_t v) const {
    std::vector<term> terms;
    for (std::int64_t source = -1; source < p.n; ++source) {
      if (!sees(p.n, source)) continue;
      term x = source_term(source, d, v);
      x.log += decay(p.n, source, d);
      terms.push_back(x);
    }
    return add(terms);
  }

  // Adds the gradients through one sum: g d log |sum|.
  void through(real g, const signed_sum& sum, std::int64_t t, std::int64_t v, std::int64_t only) {
    if (g == 0 || sum.sign == 0) return;
    const real condition = std::exp(sum.log_magnitude - sum.log);
    for (std::int64_t d = 0; d < p.d_k; ++d) {
      if (only >= 0 && d != only) continue;
      for (std::int64_t source = -1; source < p.n; ++source) {
        const std::int64_t token = only >= 0 || !(p.causal || p.segments.given) ? p.n : t;
        if (!sees(token, source)) continue;
        const term x = source_term(source, d, v);
        real log = x.log + decay(only >= 0 ? p.n : t, source, d);
        if (only < 0) log += p.log_q(t, d);
        if (x.sign == 0 || log == -kInfinity) continue;
        const real share = g * x.sign * sum.sign * std::exp(log - sum.log);
        if (only < 0) log_q.add(t * p.d_k + d, share, condition);
        if (source < 0) {
          if (v < 0) {
            log_denominator.add(d, share, condition);
          } else {
            log_numerator.add(d * p.d_v + v, share, condition);
          }
        } else {
          log_k.add(source * p.d_k + d, share, condition);
          if (v >= 0) log_v.add(source * p.d_v + v, share, condition);
        }
        if (!p.log_decay.given) continue;
        for (std::int64_t i = source + 1; i <= std::min(only >= 0 ? p.n : t, p.n - 1); ++i) {
          log_decay.add(i * p.d_k + d, share, condition);
        }
      }
    }
  }

  void differentiate(const upstream<T>& g) {
    log_k.resize(p.n * p.d_k);
    log_v.resize(p.n * p.d_v);
    log_q.resize(p.n_q * p.d_k);
    log_decay.resize(p.n * p.d_k);
    log_numerator.resize(p.d_k * p.d_v);
    log_denominator.resize(p.d_k);
    for (std::int64_t t = 0; t < p.n_q; ++t) {
      const signed_sum& mass = den[static_cast<size_t>(t)];
      real total = g.log_z[t];
      for (std::int64_t v = 0; v < p.d_v; ++v) {
        const signed_sum& sum = num[static_cast<size_t>(t * p.d_v + v)];
        through(g.log_y(t, v), sum, t, v, -1);
        if (sum.sign != 0) total -= g.log_y(t, v);
      }
      through(total, mass, t, -1, -1);
    }
    for (std::int64_t d = 0; d < p.d_k; ++d) {
      for (std::int64_t v = 0; g.log_numerator.given && v < p.d_v; ++v) {
        through(g.log_numerator(d, v), final_sum(d, v), p.n, v, d);
      }
      if (g.log_denominator.given) through(g.log_denominator[d], final_sum(d, -1), p.n, -1, d);
    }
  }
};

// What rounding may do, in units of eps: the roundings of a sum of depth d_k + 32, of its terms and
// of two such sums add up like a random walk; the truth has 64 bits for logarithms of `range`.
template <class T>
real allowance(const problem<T>& p, real range) {
  return 4 * std::sqrt(static_cast<real>(p.d_k + p.d_v + 40)) / 2 +
         range * 2 * std::numeric_limits<real>::epsilon() / std::numeric_limits<T>::epsilon();
}

template <class T>
real largest_log(const problem<T>& p) {
  real range = 1;
  for (const array<T>* x : {&p.log_q, &p.log_k, &p.log_v, &p.log_numerator, &p.log_denominator}) {
    for (const T value : x->data) {
      if (std::abs(value) < 1e7) range = std::max(range, std::abs(real(value)));
    }
  }
  real decay = 0;
  for (const T value : p.log_decay.data) {
    if (std::abs(value) < 1e7) decay += std::abs(real(value));
  }
  return 4 * range + decay;
}

// |found - expected| in units of eps max(conditioning, |expected|).
template <class T>
real sum_error(real found, const signed_sum& expected) {
  if (expected.sign == 0) return found == -kInfinity ? 0 : kInfinity;
  const real condition = std::exp(expected.log_magnitude - expected.log);
  const real error = std::abs(found - expected.log);
  const real unit = std::numeric_limits<T>::epsilon() * std::max(condition, std::abs(expected.log));
  return std::isnan(error) ? kInfinity : error / unit;
}

// A sum that rounding may turn round, or lose.
template <class T>
bool is_lost(const signed_sum& sum, real allowed) {
  return sum.sign != 0 &&
         std::exp(sum.log_magnitude - sum.log) * allowed * std::numeric_limits<T>::epsilon() > 0.1L;
}

template <class T>
void check_sum(T found, T found_sign, const signed_sum& expected, real allowed) {
  if (is_lost<T>(expected, allowed)) return;
  const real error = sum_error<T>(found, expected);
  SUBQUAD_CHECK(error <= allowed);
  SUBQUAD_CHECK(found_sign == T(expected.sign));
  if (error > allowed) {
    std::printf("  found %.9g, expected %.9Lg: %.3Lg of %.3Lg\n", static_cast<double>(found),
                expected.log, error, allowed);
  }
}

template <class T>
void check_forward(const problem<T>& p, const results<T>& found, const truth<T>& expected) {
  const real allowed = allowance(p, largest_log(p));
  for (std::int64_t t = 0; t < p.n_q; ++t) {
    const signed_sum& mass = expected.den[static_cast<size_t>(t)];
    check_sum<T>(found.log_z[t], T(mass.sign), mass, allowed);
    for (std::int64_t v = 0; v < p.d_v; ++v) {
      signed_sum y = expected.num[static_cast<size_t>(t * p.d_v + v)];
      if (mass.sign == 0) {
        y = {};
      } else {
        y.log -= mass.log;
        y.log_magnitude -= mass.log;
      }
      check_sum<T>(found.log_y(t, v), found.sign_y(t, v), y, allowed);
    }
  }
  for (std::int64_t d = 0; d < p.d_k; ++d) {
    const signed_sum mass = expected.final_sum(d, -1);
    check_sum<T>(found.log_denominator[d], T(mass.sign), mass, allowed);
    for (std::int64_t v = 0; v < p.d_v; ++v) {
      check_sum<T>(found.log_numerator(d, v), found.sign_numerator(d, v), expected.final_sum(d, v),
                   allowed);
    }
  }
}

template <class T>
void check_gradient(const char* name, const array<T>& found,
                    const typename truth<T>::gradient& expected, real allowed) {
  for (size_t i = 0; i < found.data.size(); ++i) {
    const real error = std::abs(found.data[i] - expected.value[i]);
    const real bound = std::numeric_limits<T>::min() +
                       std::numeric_limits<T>::epsilon() * allowed * expected.size[i];
    SUBQUAD_CHECK(error <= bound);
    if (!(error <= bound)) {
      std::printf("  %s %d: found %.9g, expected %.9Lg, bound %.3Lg\n", name, static_cast<int>(i),
                  static_cast<double>(found.data[i]), expected.value[i], bound);
    }
  }
}

template <class T>
void check_reverse(const problem<T>& p, truth<T>& expected, bool final_state) {
  const upstream<T> g(p, 11, final_state);
  expected.differentiate(g);
  const gradients<T> found = reverse(p, g);
  const real allowed = allowance(p, largest_log(p));
  check_gradient("log_k", found.log_k, expected.log_k, allowed);
  check_gradient("log_v", found.log_v, expected.log_v, allowed);
  check_gradient("log_q", found.log_q, expected.log_q, allowed);
  check_gradient("log_numerator", found.log_numerator, expected.log_numerator, allowed);
  check_gradient("log_denominator", found.log_denominator, expected.log_denominator, allowed);
  if (!p.log_decay.given) return;
  // A gradient of a decay is that of the queries less that of the keys since, over 32 tokens at
  // most before it is formed anew.
  auto decay = expected.log_decay;
  for (std::int64_t t = 0; t < p.n; ++t) {
    for (std::int64_t d = 0; d < p.d_k; ++d) {
      real& size = decay.size[static_cast<size_t>(t * p.d_k + d)];
      for (std::int64_t s = t; s < std::min(p.n, t + 32); ++s) {
        const auto at = static_cast<size_t>(s * p.d_k + d);
        size += expected.log_k.size[at] + (p.n_q > 0 ? expected.log_q.size[at] : 0);
        if (s + 1 < p.n) size += expected.log_decay.size[at + static_cast<size_t>(p.d_k)];
      }
    }
  }
  check_gradient("log_decay", found.log_decay, decay, allowed);
}

template <class T>
void check_both(const problem<T>& p, bool final_state = true) {
  truth<T> expected(p);
  check_forward(p, forward(p), expected);
  check_reverse(p, expected, final_state);
}

template <class T>
void every_part() {
  std::uint64_t seed = 1;
  for (const int parts : {0, kCausal, kCausal | kSigned, kCausal | kDecay, kCausal | kSegments,
                          kMask | kState, kSegments | kSigned | kState, kSigned,
                          kCausal | kSigned | kDecay | kMask | kSegments | kState}) {
    for (const double scale : {1.0, 30.0, 1e3, 1e4}) {
      check_both(problem<T>(41, 41, 5, 3, parts).fill(++seed, scale, scale));
    }
    check_both(problem<T>(1, 1, 3, 2, parts).fill(++seed, 1, 1), false);
    check_both(problem<T>(0, 37, 3, 2, parts).fill(++seed, 1, 1));
    if (parts & (kCausal | kSegments)) continue;
    check_both(problem<T>(7, 40, 3, 2, parts).fill(++seed, 1, 1));
    check_both(problem<T>(40, 3, 2, 17, parts).fill(++seed, 1, 1));
  }
  check_both(problem<T>(70, 70, 33, 2, kCausal | kSigned).fill(++seed, 1, 1));
  check_both(problem<T>(35, 35, 2, 33, kCausal | kDecay | kState).fill(++seed, 2, 1));
  // Values of a wide range below keys of a moderate one.
  for (const double range : {20.0, 80.0, 150.0}) {
    auto p = problem<T>(60, 60, 4, 4, kCausal | kSigned).fill(++seed, 5, range);
    check_both(p);
  }
}

// What rounding the result costs, and little more, at any scale and any offset of the keys.
inline void accuracy() {
  struct line {
    double scale;
    double offset;
  };
  for (const line& x : {line{1, 0}, {10, 0}, {1e3, 0}, {1e4, 0}, {1, 1e3}, {1, 1e4}, {1, 1e5}}) {
    auto p = problem<float>(100, 100, 16, 8, kCausal).fill(5, x.scale, x.scale);
    for (float& key : p.log_k.data) key += static_cast<float>(x.offset);
    const results<float> found = forward(p);
    const truth<float> expected(p);
    for (size_t i = 0; i < expected.num.size(); ++i) {
      const real log_y = expected.num[i].log - expected.den[i / 8].log;
      const float top = std::abs(found.log_y.data[i]);
      const float unit = std::nextafter(top, std::numeric_limits<float>::infinity()) - top;
      SUBQUAD_CHECK(std::abs(found.log_y.data[i] - log_y) <= unit / 2 + 6e-7L);
    }
  }
}

// The largest value lies below a weight that is flushed where products are formed in one scale.
template <class T>
void far_apart() {
  const double gap = sizeof(T) == 4 ? 1 : 8;
  for (const int extra : {0, 1, 2}) {
    problem<T> p(3, 3, 1 + extra, 1 + extra, kCausal);
    for (std::int64_t d = 0; d < p.d_k; ++d) {
      p.log_k(1, d) = p.log_k(2, d) = static_cast<T>(-200 * gap);
      p.log_k(0, d) = static_cast<T>(-7 * gap * static_cast<double>(d));
    }
    p.log_v(0, 0) = static_cast<T>(-110 * gap);
    const results<T> found = forward(p);
    for (std::int64_t t = 0; t < 3; ++t) {
      SUBQUAD_CHECK(std::abs(found.log_y(t, 0) + 110 * gap) <= 1e-5 * gap);
    }
    check_both(p);
  }
  // A range that no scale of rows and columns covers.
  for (const std::uint64_t seed : {1, 2, 3}) {
    auto p = problem<T>(50, 50, 3, 4, kCausal | (seed == 3 ? kSigned : 0)).fill(seed, 40 * gap, 0);
    std::mt19937_64 generator(seed);
    for (T& x : p.log_v.data) x = static_cast<T>(-gap * static_cast<double>(generator() % 150));
    check_both(p);
  }
}

template <class T>
void decays() {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  for (const int parts : {kCausal | kDecay, kCausal | kDecay | kSegments | kState | kSigned}) {
    for (const double size : {1e-4, 30.0, 1e5, 1e9}) {
      // More than one of the blocks before which the reverse keeps a state.
      const std::int64_t n = size == 30.0 ? 270 : 70;
      auto p = problem<T>(n, n, 2, 2, parts).fill(3, 1, 1);
      std::mt19937_64 generator(9);
      for (T& x : p.log_decay.data) {
        // Growing at times, and forgetting at others.
        x = static_cast<T>(generator() % 3 ? -size : size * 0.5);
        if (generator() % 17 == 0) x = -kInf;
        if (size > 1e8) x = generator() % 5 ? T(0) : static_cast<T>(-size);
      }
      check_both(p);
    }
  }
}

// Sums over many tokens do not drift: against sums in long double.
template <class T>
void long_sequence(double decay) {
  constexpr std::int64_t n = 65536;
  problem<T> p(n, n, 2, 1, kCausal | (decay != 0 ? kDecay : 0));
  std::mt19937_64 generator(21);
  std::uniform_real_distribution<double> uniform;
  for (T& x : p.log_k.data) x = static_cast<T>(uniform(generator));
  for (T& x : p.log_v.data) x = static_cast<T>(uniform(generator));
  for (T& x : p.log_q.data) x = static_cast<T>(uniform(generator));
  for (T& x : p.log_decay.data) x = static_cast<T>(decay);
  const results<T> found = forward(p);
  real num[2] = {};
  real den[2] = {};
  real largest = 0;
  const real factor = std::exp(real(static_cast<T>(decay)));
  for (std::int64_t t = 0; t < n; ++t) {
    real row_num = 0;
    real row_den = 0;
    for (std::int64_t d = 0; d < 2; ++d) {
      const real key = std::exp(real(p.log_k(t, d)));
      num[d] = num[d] * factor + key * std::exp(real(p.log_v(t, 0)));
      den[d] = den[d] * factor + key;
      row_num += std::exp(real(p.log_q(t, d))) * num[d];
      row_den += std::exp(real(p.log_q(t, d))) * den[d];
    }
    largest = std::max(largest, std::abs(found.log_y(t, 0) - std::log(row_num / row_den)));
    const real log_z = std::log(row_den);
    largest =
        std::max(largest, std::abs(found.log_z[t] - log_z) / std::max(real(1), std::abs(log_z)));
  }
  // No more than for a short one.
  SUBQUAD_CHECK(largest <= allowance(p, largest_log(p)) * std::numeric_limits<T>::epsilon());
  const real last = std::abs(found.log_denominator[0] - std::log(den[0]));
  SUBQUAD_CHECK(last <= 2 * std::numeric_limits<T>::epsilon() * std::abs(std::log(den[0])));
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a == b;
}

template <class T>
bool same(const results<T>& a, const results<T>& b) {
  return same(a.log_y.data, b.log_y.data) && same(a.sign_y.data, b.sign_y.data) &&
         same(a.log_z.data, b.log_z.data) && same(a.log_numerator.data, b.log_numerator.data) &&
         same(a.sign_numerator.data, b.sign_numerator.data) &&
         same(a.log_denominator.data, b.log_denominator.data);
}

template <class T>
bool same(const gradients<T>& a, const gradients<T>& b) {
  return same(a.log_k.data, b.log_k.data) && same(a.log_v.data, b.log_v.data) &&
         same(a.log_q.data, b.log_q.data) && same(a.log_decay.data, b.log_decay.data) &&
         same(a.log_numerator.data, b.log_numerator.data) &&
         same(a.log_denominator.data, b.log_denominator.data);
}

template <class T>
void keys_that_are_absent() {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  for (const int parts : {kCausal | kMask, kMask}) {
    auto p = problem<T>(50, 50, 3, 2, parts).fill(4, 1, 1);
    // Neither the values of a key that is removed nor, below a mask, the key itself.
    for (std::int64_t j = 0; j < p.n; ++j) {
      p.key_mask[j] = j > 4 && j % 3 != 0;
      if (j % 7 != 0) continue;
      for (std::int64_t d = 0; d < p.d_k; ++d) p.log_k(j, d) = -kInf;
    }
    const upstream<T> g(p, 5, true);
    const results<T> clean = forward(p);
    const gradients<T> clean_gradients = reverse(p, g);
    auto dirty = p;
    for (std::int64_t j = 0; j < p.n; ++j) {
      const bool masked = p.key_mask[j] == 0;
      if (!masked && j % 7 != 0) continue;
      for (std::int64_t v = 0; v < p.d_v; ++v) dirty.log_v(j, v) = j % 2 ? kNaN : kInf;
      for (std::int64_t d = 0; masked && d < p.d_k; ++d) dirty.log_k(j, d) = d ? kNaN : kInf;
    }
    SUBQUAD_CHECK(same(clean, forward(dirty)));
    SUBQUAD_CHECK(same(clean_gradients, reverse(dirty, g)));
    // The lowest finite numbers are masks too.
    auto lowest = p;
    for (T& x : lowest.log_k.data) x = x == -kInf ? std::numeric_limits<T>::lowest() : x;
    const results<T> found = forward(lowest);
    for (std::int64_t t = 0; t < p.n_q; ++t) {
      if (clean.log_z[t] == -kInf) continue;
      SUBQUAD_CHECK(std::abs(found.log_y(t, 0) - clean.log_y(t, 0)) <=
                    16 * std::numeric_limits<T>::epsilon());
    }
    if (parts & kCausal) {
      for (std::int64_t t = 0; t < 5; ++t) {
        SUBQUAD_CHECK(clean.log_z[t] == -kInf && clean.log_y(t, 1) == -kInf);
        SUBQUAD_CHECK(clean.sign_y(t, 1) == 0 && clean_gradients.log_q(t, 0) == 0);
      }
    }
    check_both(p);
  }
}

template <class T>
void what_is_not_finite() {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  const auto p = problem<T>(70, 70, 3, 2, kCausal).fill(8, 1, 1);
  const results<T> clean = forward(p);
  const size_t at = 21;
  for (const T bad : {kNaN, kInf}) {
    auto key = p;
    key.log_k(at, 1) = bad;
    // Rows 40 to 70 do not look at that feature.
    for (std::int64_t t = 40; t < 70; ++t) key.log_q(t, 1) = -kInf;
    auto other = p;
    for (std::int64_t t = 40; t < 70; ++t) other.log_q(t, 1) = -kInf;
    const results<T> found = forward(key);
    const results<T> expected = forward(other);
    // Chunks that hold it are formed in another way, of as small an error.
    const auto near = [](T a, T b) {
      return std::abs(a - b) <= 32 * std::numeric_limits<T>::epsilon();
    };
    for (size_t t = 0; t < at; ++t) {
      SUBQUAD_CHECK(near(found.log_y.data[2 * t], clean.log_y.data[2 * t]));
      SUBQUAD_CHECK(near(found.log_z.data[t], clean.log_z.data[t]));
    }
    for (size_t t = at; t < 40; ++t) {
      SUBQUAD_CHECK(std::isnan(found.log_y.data[2 * t]));
      SUBQUAD_CHECK(std::isnan(found.log_z.data[t]) || found.log_z.data[t] == kInf);
    }
    for (size_t i = 80; i < 140; ++i) {
      SUBQUAD_CHECK(near(found.log_y.data[i], expected.log_y.data[i]));
    }

    // A value reaches its column alone, and +inf is a value.
    auto value = p;
    value.log_v(at, 1) = bad;
    const results<T> with_value = forward(value);
    for (size_t t = 0; t < 70; ++t) {
      SUBQUAD_CHECK(near(with_value.log_y.data[2 * t], clean.log_y.data[2 * t]));
      const T found_y = with_value.log_y.data[2 * t + 1];
      if (t < at) {
        SUBQUAD_CHECK(near(found_y, clean.log_y.data[2 * t + 1]));
      } else {
        SUBQUAD_CHECK(std::isnan(bad) ? std::isnan(found_y) : found_y == kInf);
      }
    }

    auto query = p;
    query.log_q(at, 1) = bad;
    const results<T> with_query = forward(query);
    const upstream<T> g(p, 5, false);
    const gradients<T> clean_gradients = reverse(p, g);
    const gradients<T> with_query_gradients = reverse(query, g);
    for (size_t t = 0; t < 70; ++t) {
      const T found_y = with_query.log_y.data[2 * t];
      SUBQUAD_CHECK(t == at ? std::isnan(found_y) : near(found_y, clean.log_y.data[2 * t]));
      const bool finite = std::isfinite(with_query_gradients.log_k.data[3 * t + 1]);
      SUBQUAD_CHECK(finite == (t > at));
      SUBQUAD_CHECK(t == at || near(with_query_gradients.log_q.data[3 * t],
                                    clean_gradients.log_q.data[3 * t]));
    }
  }
}

template <class T>
void zeros() {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  auto p = problem<T>(40, 40, 2, 3, kCausal | kSigned).fill(6, 1, 1);
  for (std::int64_t j = 0; j < p.n; ++j) {
    p.log_v(j, 0) = -kInf;
    if (j < 35) p.log_v(j, 2) = -kInf;
    // Pairs that cancel.
    if (j % 2 == 0) continue;
    for (std::int64_t d = 0; d < p.d_k; ++d) p.log_k(j, d) = p.log_k(j - 1, d);
    p.log_v(j, 1) = p.log_v(j - 1, 1);
    p.sign_v(j, 1) = -p.sign_v(j - 1, 1);
  }
  const results<T> found = forward(p);
  for (std::int64_t t = 0; t < p.n; ++t) {
    SUBQUAD_CHECK(found.log_y(t, 0) == -kInf && found.sign_y(t, 0) == 0);
    if (t < 35) SUBQUAD_CHECK(found.log_y(t, 2) == -kInf && found.sign_y(t, 2) == 0);
  }
  // What cancels is at most the rounding of what cancelled.
  SUBQUAD_CHECK(std::exp(found.log_y(1, 1) - p.log_v(0, 1)) <=
                4 * std::numeric_limits<T>::epsilon());
  upstream<T> g(p, 3, true);
  for (const T x : reverse(p, g).log_k.data) SUBQUAD_CHECK(!std::isnan(x));
  for (const T x : reverse(p, g).log_v.data) SUBQUAD_CHECK(!std::isnan(x));
  // Nothing asked for: nothing comes back, whatever the sums hold.
  for (array<T>* part : {&g.log_y, &g.log_z, &g.log_numerator, &g.log_denominator}) {
    for (T& x : part->data) x = 0;
  }
  p.log_k(3, 1) = std::numeric_limits<T>::quiet_NaN();
  for (const T x : reverse(p, g).log_k.data) SUBQUAD_CHECK(x == 0);
}

template <class T>
void split_sequences() {
  for (const int parts : {kCausal | kSigned, kCausal | kDecay | kMask}) {
    const auto whole = problem<T>(90, 90, 3, 2, parts).fill(13, 1, 1);
    const results<T> expected = forward(whole);
    for (const std::int64_t cut : {0, 1, 31, 32, 77, 90}) {
      const auto part = [&](std::int64_t begin, std::int64_t end, int state) {
        problem<T> p(end - begin, end - begin, 3, 2, parts | state);
        const auto copy = [&](const auto& from, auto& to, std::int64_t width) {
          if (to.given) {
            to.data.assign(from.data.begin() + begin * width, from.data.begin() + end * width);
          }
        };
        copy(whole.log_q, p.log_q, 3);
        copy(whole.log_k, p.log_k, 3);
        copy(whole.log_v, p.log_v, 2);
        copy(whole.sign_v, p.sign_v, 2);
        copy(whole.log_decay, p.log_decay, 3);
        copy(whole.key_mask, p.key_mask, 1);
        return p;
      };
      const results<T> first = forward(part(0, cut, 0));
      auto rest = part(cut, 90, kState);
      rest.log_numerator = first.log_numerator;
      rest.log_denominator = first.log_denominator;
      rest.sign_numerator.resize({3, 2}, 1);
      rest.sign_numerator = first.sign_numerator;
      const results<T> second = forward(rest);
      // A state in logarithms has their rounding.
      const T unit = 64 * std::numeric_limits<T>::epsilon();
      for (std::int64_t t = cut; t < 90; ++t) {
        for (std::int64_t v = 0; v < 2; ++v) {
          const T y = expected.sign_y(t, v) * std::exp(expected.log_y(t, v));
          const T found = second.sign_y(t - cut, v) * std::exp(second.log_y(t - cut, v));
          SUBQUAD_CHECK(std::abs(found - y) <= unit * 8);
        }
      }
      for (std::int64_t d = 0; d < 3; ++d) {
        const T error = std::abs(second.log_denominator[d] - expected.log_denominator[d]);
        SUBQUAD_CHECK(error <= unit || expected.log_denominator[d] == second.log_denominator[d]);
      }
    }
  }
}

template <class T>
void empty_sizes() {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  for (const int causal : {0, kCausal}) {
    const results<T> no_features = forward(problem<T>(3, 3, 0, 2, causal));
    for (const T x : no_features.log_y.data) SUBQUAD_CHECK(x == -kInf);
    for (const T x : no_features.sign_y.data) SUBQUAD_CHECK(x == 0);
    for (const T x : no_features.log_z.data) SUBQUAD_CHECK(x == -kInf);
    const auto no_values = problem<T>(3, 3, 2, 0, causal);
    const results<T> found = forward(no_values);
    const T expected = static_cast<T>(std::log(causal ? 2.0 : 6.0));
    SUBQUAD_CHECK(std::abs(found.log_z[0] - expected) <= 4 * std::numeric_limits<T>::epsilon());
    check_reverse(no_values, *std::make_unique<truth<T>>(no_values), true);
    // No tokens: the state passes through, and so does its gradient.
    auto none = problem<T>(0, 0, 2, 2, causal | kState | kSigned).fill(2, 1, 1);
    const results<T> same_state = forward(none);
    for (size_t i = 0; i < 4; ++i) {
      SUBQUAD_CHECK(std::abs(same_state.log_numerator.data[i] - none.log_numerator.data[i]) <=
                    4 * std::numeric_limits<T>::epsilon());
    }
    SUBQUAD_CHECK(same(same_state.sign_numerator.data, none.sign_numerator.data));
    check_both(none);
  }
  check_both(problem<T>(5, 0, 2, 2, kState).fill(2, 1, 1));
}

// Inputs of other strides give the same bits.
template <class T>
void strides_alike() {
  const auto p = problem<T>(40, 40, 3, 2, kCausal).fill(23, 1, 1);
  const results<T> expected = forward(p);
  // Keys backwards in memory, values across it, queries with gaps.
  std::vector<T> keys(p.log_k.data.rbegin(), p.log_k.data.rend());
  std::vector<T> values(80);
  std::vector<T> queries(40 * 3 * 5);
  for (std::int64_t t = 0; t < 40; ++t) {
    for (std::int64_t v = 0; v < 2; ++v) values[static_cast<size_t>(v * 40 + t)] = p.log_v(t, v);
    for (std::int64_t d = 0; d < 3; ++d) {
      queries[static_cast<size_t>((t * 3 + d) * 5)] = p.log_q(t, d);
    }
  }
  const std::int64_t key_shape[] = {40, 3};
  const std::int64_t value_shape[] = {40, 2};
  const std::int64_t key_strides[] = {-3, -1};
  const std::int64_t value_strides[] = {1, 40};
  const std::int64_t query_strides[] = {15, 5};
  const std::int64_t out_strides[] = {3, 120};
  subquad::array_view key_view = placed_view(keys.data(), key_shape, 2);
  key_view.data = keys.data() + 119;
  key_view.strides = key_strides;
  subquad::array_view value_view = placed_view(values.data(), value_shape, 2);
  value_view.strides = value_strides;
  subquad::array_view query_view = placed_view(queries.data(), key_shape, 2);
  query_view.strides = query_strides;
  std::vector<T> out(80 * 3, -1);
  subquad::array_view out_view = placed_view(out.data(), value_shape, 2);
  out_view.strides = out_strides;
  std::vector<std::uint8_t> bytes(
      subquad::log_linear_attention_workspace(1, 40, 40, 3, 2, sizeof(T), true, kDevice));
  std::int64_t length = 0;
  subquad::log_linear_attention(key_view, value_view, nullptr, &query_view, nullptr, nullptr,
                                nullptr, nullptr, nullptr, nullptr, true, &out_view, nullptr,
                                nullptr, nullptr, nullptr, nullptr, view_of(bytes, &length));
  for (std::int64_t t = 0; t < 40; ++t) {
    for (std::int64_t v = 0; v < 2; ++v) {
      SUBQUAD_CHECK(out[static_cast<size_t>(t * 3 + v * 120)] == expected.log_y(t, v));
    }
  }
}

}  // namespace log_attention_cases

#endif  // SUBQUAD_TESTS_LOG_ATTENTION_CASES_HPP
