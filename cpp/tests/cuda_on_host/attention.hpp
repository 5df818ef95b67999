// Problems of linear attention for the tests of its kernels, and their truth in long double.
#ifndef SUBQUAD_CUDA_ON_HOST_ATTENTION_HPP
#define SUBQUAD_CUDA_ON_HOST_ATTENTION_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention_core.hpp"
#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/strided.hpp"

namespace attention {

using subquad::array_view;
using subquad::cuda::on_host::each_index;
using subquad::cuda::on_host::joined;
using subquad::cuda::on_host::layout;
using subquad::cuda::on_host::product;
using subquad::cuda::on_host::strided_array;
using shape = subquad::cuda::on_host::shape_list;

using number = long double;
inline constexpr number kInfinity = std::numeric_limits<number>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct form {
  std::int64_t n = 0;
  std::int64_t d_k = 0;
  std::int64_t d_v = 0;
  bool causal = true;
  std::int64_t n_q = -1;  // n
  shape batch = {};
  shape k_batch = {};
  shape v_batch = {};
  shape q_batch = {};
  shape decay_batch = {};
  shape mask_batch = {};
  shape state_batch = {};
  layout inputs = layout::contiguous;
  layout outputs = layout::contiguous;
  double scale = 1;   // of log_q and log_k
  double decay = -1;  // the mean size of decays, none where negative
  double kept = 1;    // the share of keys that are not removed, all where 1
  int run = 0;        // the mean length of runs, no segments where 0
  bool has_state = false;
  bool empty_is_nan = false;
  double value_offset = 0;
};

template <class T>
struct problem {
  form of;
  strided_array<T> log_k;
  strided_array<T> v;
  strided_array<T> log_q;
  strided_array<T> log_decay;
  strided_array<std::uint8_t> key_mask;
  strided_array<std::int64_t> segments;
  strided_array<T> key_sums;
  strided_array<T> value_sums;

  static form completed(form f) {
    if (f.n_q < 0) f.n_q = f.n;
    return f;
  }

  explicit problem(const form& given)
      : of(completed(given)),
        log_k(joined(of.k_batch, {of.n, of.d_k}), of.inputs),
        v(joined(of.v_batch, {of.n, of.d_v}), of.inputs),
        log_q(joined(of.q_batch, {of.n_q, of.d_k}), of.inputs),
        log_decay(joined(of.decay_batch, {of.n, of.d_k}), of.inputs),
        key_mask(joined(of.mask_batch, {of.n}), of.inputs),
        segments({of.n}, of.inputs == layout::repeated ? layout::contiguous : of.inputs),
        key_sums(joined(of.state_batch, {5, of.d_k}), of.inputs),
        value_sums(joined(of.state_batch, {2, of.d_k, of.d_v}), of.inputs) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(of.n * 1000003 + of.d_k * 1009 + of.d_v));
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    const auto fill = [&](strided_array<T>& to, double scale, double mean) {
      to.each([&](T& e, const shape&) { e = static_cast<T>(mean + scale * normal(generator)); });
    };
    fill(log_k, of.scale, 0);
    fill(v, 1, of.value_offset);
    fill(log_q, of.scale, 0);
    log_decay.each([&](T& e, const shape&) {
      e = static_cast<T>(-2 * std::max(0.0, of.decay) * uniform(generator));
    });
    key_mask.each([&](std::uint8_t& e, const shape&) { e = uniform(generator) < of.kept; });
    std::int64_t name = 7;
    segments.each([&](std::int64_t& e, const shape&) {
      if (of.run > 0 && uniform(generator) * of.run < 1) name = name == 7 ? -3 : 7;
      e = name;
    });
    key_sums.each([&](T& e, const shape& at) {
      const std::int64_t row = at[at.size() - 2];
      const double tiny = static_cast<double>(std::numeric_limits<T>::epsilon()) / 4;
      e = static_cast<T>(row == 0   ? of.scale * normal(generator)
                         : row == 1 ? tiny * normal(generator)
                         : row == 2 ? 1 + 3 * uniform(generator)
                         : row == 3 ? tiny * normal(generator)
                                    : -uniform(generator));
    });
    value_sums.each([&](T& e, const shape& at) {
      const double tiny = static_cast<double>(std::numeric_limits<T>::epsilon()) / 4;
      e = static_cast<T>(at[at.size() - 3] == 0 ? of.value_offset * 2 + normal(generator)
                                                : tiny * normal(generator));
    });
  }

  bool has_decay() const { return of.decay >= 0; }
  bool starts_run(std::int64_t t) const {
    return of.run > 0 && t > 0 && segments({t}) != segments({t - 1});
  }
  bool counts(const shape& b, std::int64_t j) const {
    return of.kept >= 1 || key_mask(joined(b, {j})) != 0;
  }
  // Of every token.
  std::vector<int> runs() const {
    std::vector<int> of_token;
    int run = 0;
    for (std::int64_t t = 0; t < of.n; ++t) of_token.push_back(run += starts_run(t) ? 1 : 0);
    return of_token;
  }
};

// What a row, or the final state, sums: keys and the state that came before, as logarithms of
// weights by feature.
struct term {
  std::int64_t key;  // -1: the state
  std::int64_t feature;
  number logarithm;
};

// One member of the batch.
template <class T>
class truth {
 public:
  truth(const problem<T>& p, const shape& b)
      : p_(p),
        b_(b),
        runs_(p.runs()),
        k_(numbers(p.log_k, {p.of.n, p.of.d_k})),
        v_(numbers(p.v, {p.of.n, p.of.d_v})),
        q_(numbers(p.log_q, {p.of.n_q, p.of.d_k})),
        decay_(numbers(p.log_decay, {p.of.n, p.of.d_k})),
        key_sums_(numbers(p.key_sums, {5, p.of.d_k})),
        value_sums_(numbers(p.value_sums, {2, p.of.d_k, p.of.d_v})) {}

  number k(std::int64_t j, std::int64_t r) const { return k_[at(j * p_.of.d_k + r)]; }
  number q(std::int64_t t, std::int64_t r) const { return q_[at(t * p_.of.d_k + r)]; }
  number decay(std::int64_t t, std::int64_t r) const {
    return p_.has_decay() ? decay_[at(t * p_.of.d_k + r)] : 0;
  }
  number value(std::int64_t j, std::int64_t c) const { return v_[at(j * p_.of.d_v + c)]; }
  number state(std::int64_t row, std::int64_t r) const {
    return key_sums_[at(row * p_.of.d_k + r)];
  }
  number state_weight(std::int64_t r) const { return state(2, r) + state(3, r); }
  number state_value(std::int64_t r, std::int64_t c) const {
    const std::int64_t size = p_.of.d_k * p_.of.d_v;
    return value_sums_[at(r * p_.of.d_v + c)] + value_sums_[at(size + r * p_.of.d_v + c)];
  }
  int run(std::int64_t t) const { return runs_[static_cast<std::size_t>(t)]; }
  int last_run() const { return runs_.empty() ? 0 : runs_.back(); }

  // Without log_q: what a row at t (n - 1: the end, -1 in an empty call) attends.
  std::vector<term> keys_of(std::int64_t t, bool is_final) const {
    std::vector<term> terms;
    const bool bounded = p_.of.causal || p_.of.run > 0;
    for (std::int64_t r = 0; r < p_.of.d_k; ++r) {
      const int run_of_row = is_final ? last_run() : bounded ? run(t) : 0;
      if (p_.of.has_state && run_of_row == 0 && state(0, r) != -kInfinity) {
        number logarithm = state(0, r) + state(1, r);
        for (std::int64_t i = 0; i <= (p_.of.causal ? t : -1); ++i) logarithm += decay(i, r);
        if (logarithm != -kInfinity) terms.push_back({-1, r, logarithm});
      }
      number decayed = 0;  // from the key to the row
      for (std::int64_t j = p_.of.causal ? t : p_.of.n - 1; j >= 0; --j) {
        if ((bounded || is_final) && run(j) != run_of_row) continue;
        const number logarithm = p_.counts(b_, j) ? k(j, r) : -kInfinity;
        if (logarithm != -kInfinity) terms.push_back({j, r, logarithm + decayed});
        decayed += decay(j, r);
        if (decayed == -kInfinity) break;
      }
    }
    return terms;
  }

  std::vector<term> terms_of(std::int64_t t) const {
    std::vector<term> terms = keys_of(t, false);
    for (term& each : terms) {
      each.logarithm =
          q(t, each.feature) == -kInfinity ? -kInfinity : each.logarithm + q(t, each.feature);
    }
    terms.erase(std::remove_if(terms.begin(), terms.end(),
                               [](const term& each) { return each.logarithm == -kInfinity; }),
                terms.end());
    return terms;
  }

  // The weight of a term that 1 stands for, and what it is multiplied by.
  number mass(const term& each) const { return each.key < 0 ? state_weight(each.feature) : 1; }
  number value_of(const term& each, std::int64_t c) const {
    return each.key < 0 ? state_value(each.feature, c) : value(each.key, c);
  }

 private:
  static std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
  std::vector<number> numbers(const strided_array<T>& of, const shape& lengths) const {
    std::vector<number> found;
    each_index(lengths, [&](const shape& index) { found.push_back(of(joined(b_, index))); });
    return found;
  }

  const problem<T>& p_;
  shape b_;
  std::vector<int> runs_;
  std::vector<number> k_, v_, q_, decay_, key_sums_, value_sums_;
};

}  // namespace attention

#endif  // SUBQUAD_CUDA_ON_HOST_ATTENTION_HPP
