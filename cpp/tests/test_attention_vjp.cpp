// The reverse of linear attention, on every instruction set, against sums over all pairs of tokens
// in long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "subquad/attention.hpp"
#include "subquad/threads.hpp"

namespace {

using std::size_t;
using lengths = std::vector<std::int64_t>;

constexpr long double kInfinity = std::numeric_limits<long double>::infinity();

enum class layout { contiguous, transposed, reversed };

// Elements in C order for the test, and the same elsewhere in memory for the library.
template <class T>
class tensor {
 public:
  tensor() = default;
  explicit tensor(lengths shape, layout how = layout::contiguous) : shape_(std::move(shape)) {
    std::int64_t count = 1;
    strides_.assign(shape_.size(), 0);
    std::vector<size_t> order(shape_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    if (how == layout::transposed) std::reverse(order.begin(), order.end());
    for (size_t i = order.size(); i-- > 0;) {
      strides_[order[i]] = count * (how == layout::contiguous ? 1 : 2);
      count *= shape_[order[i]];
    }
    memory_.assign(static_cast<size_t>(2 * count + 1), sizeof(T) == 1 ? T(255) : T(77));
    if (how == layout::reversed && count > 0) {
      for (size_t i = 0; i < order.size(); ++i) {
        first_ += (shape_[i] - 1) * strides_[i];
        strides_[i] = -strides_[i];
      }
    }
    present_ = true;
  }

  explicit operator bool() const { return present_; }
  std::int64_t count() const {
    std::int64_t count = 1;
    for (const std::int64_t length : shape_) count *= length;
    return count;
  }
  T& operator[](std::int64_t i) { return memory_[static_cast<size_t>(place(i))]; }
  const T& operator[](std::int64_t i) const { return memory_[static_cast<size_t>(place(i))]; }
  const subquad::array_view* view() {
    if (!present_) return nullptr;
    view_ = {memory_.data() + first_,
             shape_.data(),
             strides_.data(),
             static_cast<std::int32_t>(shape_.size()),
             subquad::detail::dtype_of<T>::kValue,
             subquad::device_type::cpu,
             0};
    return &view_;
  }
  tensor& fill(const std::function<double()>& value) {
    for (std::int64_t i = 0; i < count(); ++i) (*this)[i] = static_cast<T>(value());
    return *this;
  }
  // The same elements for every index of the first dimension, by a stride of 0.
  void share_first() { strides_[0] = 0; }

 private:
  std::int64_t place(std::int64_t i) const {
    std::int64_t at = first_;
    for (size_t axis = shape_.size(); axis-- > 0;) {
      at += i % shape_[axis] * strides_[axis];
      i /= shape_[axis];
    }
    return at;
  }

  lengths shape_;
  lengths strides_;
  std::vector<T> memory_;
  std::int64_t first_ = 0;
  subquad::array_view view_{};
  bool present_ = false;
};

struct sizes {
  std::int64_t batch;
  std::int64_t n_q;
  std::int64_t n;
  std::int64_t d_k;
  std::int64_t d_v;
};

template <class T>
struct gradients {
  tensor<T> log_k, v, log_q, log_decay, key_sums, value_sums;

  std::vector<std::pair<const char*, tensor<T>*>> parts() {
    return {{"log_k", &log_k},       {"v", &v},
            {"log_q", &log_q},       {"log_decay", &log_decay},
            {"key_sums", &key_sums}, {"value_sums", &value_sums}};
  }
};

template <class T>
struct problem {
  sizes size{};
  bool causal = true;
  tensor<T> log_k, v, log_q, log_decay, key_sums, value_sums;
  tensor<std::uint8_t> key_mask;
  tensor<std::int64_t> segments;
  tensor<T> y, grad_y, grad_log_z, grad_final_key_sums, grad_final_value_sums;

  bool same_run(std::int64_t a, std::int64_t b) const {
    if (!segments) return true;
    const auto [low, high] = std::minmax(a, b);
    for (std::int64_t i = low; i < high; ++i) {
      if (segments[i] != segments[i + 1]) return false;
    }
    return true;
  }
  bool counts(std::int64_t b, std::int64_t j) const {
    if (key_mask && !key_mask[b * size.n + j]) return false;
    for (std::int64_t r = 0; r < size.d_k; ++r) {
      if (key(b, j, r) != -kInfinity) return true;
    }
    return false;
  }
  long double key(std::int64_t b, std::int64_t j, std::int64_t r) const {
    return log_k[(b * size.n + j) * size.d_k + r];
  }
  // What the logarithm of feature r loses from token `from` to token `to`; from = -1: the state.
  long double decay(std::int64_t b, std::int64_t from, std::int64_t to, std::int64_t r) const {
    long double sum = 0;
    if (!log_decay) return sum;
    for (std::int64_t s = to; s > from && sum != -kInfinity; --s) {
      sum += log_decay[(b * size.n + s) * size.d_k + r];
    }
    return sum;
  }

  // One more thing that a row may attend: key j, or the state for j = -1.
  struct source {
    std::int64_t j;
    std::vector<long double> log_weight;  // d_k
    std::vector<long double> weight;      // d_k
  };

  // Everything by its definition, and the sum of the absolute values of what was added.
  void truth(gradients<long double>& g, gradients<long double>& magnitude) {
    const std::int64_t d_k = size.d_k;
    const std::int64_t d_v = size.d_v;
    const std::int64_t n = size.n;
    for (gradients<long double>* set : {&g, &magnitude}) {
      *set = {};
      set->log_k = tensor<long double>({size.batch, n, d_k});
      set->v = tensor<long double>({size.batch, n, d_v});
      set->log_q = tensor<long double>({size.batch, size.n_q, d_k});
      set->log_decay = tensor<long double>({size.batch, n, d_k});
      set->key_sums = tensor<long double>({size.batch, 5, d_k});
      set->value_sums = tensor<long double>({size.batch, 2, d_k, d_v});
      for (auto& [name, part] : set->parts()) part->fill([] { return 0.0; });
    }
    const auto add = [](tensor<long double>& to, tensor<long double>& absolute, std::int64_t i,
                        long double value) {
      to[i] += value;
      absolute[i] += std::abs(value);
    };
    for (std::int64_t b = 0; b < size.batch; ++b) {
      const auto value = [&](std::int64_t j, std::int64_t r, std::int64_t c) -> long double {
        if (j >= 0) return v[(b * n + j) * d_v + c];
        const std::int64_t at = (b * 2 * d_k + r) * d_v + c;
        return static_cast<long double>(value_sums[at]) + value_sums[at + d_k * d_v];
      };
      const auto mass = [&](std::int64_t j, std::int64_t r) -> long double {
        if (j >= 0) return 1;
        const std::int64_t at = (b * 5 + 2) * d_k + r;
        return static_cast<long double>(key_sums[at]) + key_sums[at + d_k];
      };
      const auto log_key = [&](std::int64_t j, std::int64_t r) -> long double {
        if (j >= 0) return key(b, j, r);
        const std::int64_t at = b * 5 * d_k + r;
        return static_cast<long double>(key_sums[at]) + key_sums[at + d_k];
      };
      const auto add_value = [&](std::int64_t j, std::int64_t r, std::int64_t c, long double x) {
        if (j >= 0) {
          add(g.v, magnitude.v, (b * n + j) * d_v + c, x);
        } else {
          for (int part = 0; part < 2; ++part) {
            add(g.value_sums, magnitude.value_sums, ((b * 2 + part) * d_k + r) * d_v + c, x);
          }
        }
      };
      const auto add_mass = [&](std::int64_t j, std::int64_t r, long double x) {
        if (j >= 0) return;
        for (int part = 2; part < 4; ++part) {
          add(g.key_sums, magnitude.key_sums, (b * 5 + part) * d_k + r, x);
        }
      };
      // The gradient of the logarithm of one source's weight, as seen from token `to`.
      const auto add_log = [&](std::int64_t j, std::int64_t to, std::int64_t r, long double x) {
        if (j >= 0) add(g.log_k, magnitude.log_k, (b * n + j) * d_k + r, x);
        for (std::int64_t s = j + 1; log_decay && s <= to; ++s) {
          add(g.log_decay, magnitude.log_decay, (b * n + s) * d_k + r, x);
        }
      };
      const auto sources = [&](std::int64_t t, bool until_t) {
        std::vector<source> found;
        for (std::int64_t j = -1; j < (until_t ? t + 1 : n); ++j) {
          if (j < 0 && (!key_sums || (n > 0 && !same_run(0, std::max<std::int64_t>(t, 0)))))
            continue;
          if (j >= 0 && (!counts(b, j) || (segments && !same_run(j, t)))) continue;
          source one{j, {}, {}};
          for (std::int64_t r = 0; r < d_k; ++r) {
            const long double log_weight = log_key(j, r);
            one.log_weight.push_back(log_weight == -kInfinity
                                         ? log_weight
                                         : log_weight + (causal ? decay(b, j, t, r) : 0));
          }
          found.push_back(one);
        }
        return found;
      };
      for (std::int64_t t = 0; log_q && t < size.n_q; ++t) {
        const std::int64_t row = b * size.n_q + t;
        std::vector<source> all = sources(t, causal);
        long double top = -kInfinity;
        for (source& one : all) {
          for (std::int64_t r = 0; r < d_k; ++r) {
            one.log_weight[static_cast<size_t>(r)] += log_q[row * d_k + r];
            top = std::max(top, one.log_weight[static_cast<size_t>(r)]);
          }
        }
        if (top == -kInfinity) continue;
        long double total = 0;
        for (source& one : all) {
          for (std::int64_t r = 0; r < d_k; ++r) {
            one.weight.push_back(std::exp(one.log_weight[static_cast<size_t>(r)] - top));
            total += one.weight.back() * mass(one.j, r);
          }
        }
        long double delta = grad_log_z ? -static_cast<long double>(grad_log_z[row]) : 0;
        for (std::int64_t c = 0; c < d_v; ++c) {
          long double mean = 0;
          for (const source& one : all) {
            for (std::int64_t r = 0; r < d_k; ++r) {
              mean += one.weight[static_cast<size_t>(r)] / total * value(one.j, r, c);
            }
          }
          if (y) y[row * d_v + c] = static_cast<T>(mean);
          if (grad_y) delta += grad_y[row * d_v + c] * mean;
        }
        for (const source& one : all) {
          for (std::int64_t r = 0; r < d_k; ++r) {
            const long double p = one.weight[static_cast<size_t>(r)] / total;
            long double score = -delta * mass(one.j, r);
            for (std::int64_t c = 0; grad_y && c < d_v; ++c) {
              const long double grad = grad_y[row * d_v + c];
              score += grad * value(one.j, r, c);
              add_value(one.j, r, c, p * grad);
            }
            add_mass(one.j, r, -p * delta);
            add(g.log_q, magnitude.log_q, row * d_k + r, p * score);
            add_log(one.j, t, r, p * score);
          }
        }
      }
      const std::vector<source> all = sources(n - 1, false);
      for (std::int64_t r = 0; r < d_k; ++r) {
        long double top = -kInfinity;
        for (const source& one : all) top = std::max(top, one.log_weight[static_cast<size_t>(r)]);
        for (const source& one : all) {
          if (top == -kInfinity) continue;
          const long double p = std::exp(one.log_weight[static_cast<size_t>(r)] - top);
          long double score = 0;
          if (grad_final_key_sums) {
            const long double grad = grad_final_key_sums[(b * 5 + 2) * d_k + r];
            score += grad * mass(one.j, r);
            add_mass(one.j, r, p * grad);
          }
          for (std::int64_t c = 0; grad_final_value_sums && c < d_v; ++c) {
            const long double grad = grad_final_value_sums[(b * 2 * d_k + r) * d_v + c];
            score += grad * value(one.j, r, c);
            add_value(one.j, r, c, p * grad);
          }
          add_log(one.j, n - 1, r, p * score);
        }
        if (!grad_final_key_sums) continue;
        const long double grad = grad_final_key_sums[(b * 5 + 4) * d_k + r];
        for (std::int64_t s = 0; log_decay && s < n; ++s) {
          if (same_run(s, n - 1))
            add(g.log_decay, magnitude.log_decay, (b * n + s) * d_k + r, grad);
        }
        if (n == 0 || same_run(0, n - 1)) {
          add(g.key_sums, magnitude.key_sums, (b * 5 + 4) * d_k + r, grad);
        }
      }
    }
  }

  gradients<T> run(layout how = layout::contiguous) {
    gradients<T> g;
    g.log_k = tensor<T>({size.batch, size.n, size.d_k}, how);
    g.v = tensor<T>({size.batch, size.n, size.d_v}, how);
    if (log_q) g.log_q = tensor<T>({size.batch, size.n_q, size.d_k}, how);
    if (log_decay) g.log_decay = tensor<T>({size.batch, size.n, size.d_k}, how);
    if (key_sums) g.key_sums = tensor<T>({size.batch, 5, size.d_k}, how);
    if (key_sums) g.value_sums = tensor<T>({size.batch, 2, size.d_k, size.d_v}, how);
    call(g);
    return g;
  }

  void call(gradients<T>& g) {
    tensor<std::uint8_t> workspace(
        {static_cast<std::int64_t>(subquad::linear_attention_vjp_workspace(
            size.batch, size.n_q, size.n, size.d_k, size.d_v, sizeof(T), causal))});
    subquad::linear_attention_vjp(
        *log_k.view(), *v.view(), log_q.view(), log_decay.view(), key_mask.view(), segments.view(),
        key_sums.view(), value_sums.view(), causal, y.view(), grad_y.view(), grad_log_z.view(),
        grad_final_key_sums.view(), grad_final_value_sums.view(), g.log_k.view(), g.v.view(),
        g.log_q.view(), g.log_decay.view(), g.key_sums.view(), g.value_sums.view(),
        *workspace.view());
  }
};

struct options {
  bool causal = true;
  bool query = true;
  bool decay = false;
  bool mask = false;
  bool segments = false;
  bool state = false;
  bool final_state = false;
  bool log_z = false;
  double scale = 1;
  layout how = layout::contiguous;
  double value_offset = 0;
};

template <class T>
problem<T> make(const sizes& size, const options& with) {
  problem<T> p;
  p.size = size;
  p.causal = with.causal;
  std::mt19937_64 generator(static_cast<std::uint64_t>(size.n * 1009 + size.d_k * 31 + size.d_v));
  std::normal_distribution<double> normal;
  const auto scaled = [&] { return with.scale * normal(generator); };
  const auto plain = [&] { return normal(generator); };
  const std::int64_t batch = size.batch;
  p.log_k = tensor<T>({batch, size.n, size.d_k}, with.how).fill(scaled);
  p.v = tensor<T>({batch, size.n, size.d_v}, with.how).fill([&] {
    return with.value_offset + plain();
  });
  if (with.query) {
    p.log_q = tensor<T>({batch, size.n_q, size.d_k}, with.how).fill(scaled);
    p.y = tensor<T>({batch, size.n_q, size.d_v}, with.how).fill([] { return 0; });
    p.grad_y = tensor<T>({batch, size.n_q, size.d_v}, with.how).fill(plain);
    if (with.log_z) p.grad_log_z = tensor<T>({batch, size.n_q}, with.how).fill(plain);
  }
  if (with.decay) {
    p.log_decay = tensor<T>({batch, size.n, size.d_k}, with.how).fill([&] {
      return -with.scale * std::abs(normal(generator)) / 8;
    });
    std::int64_t i = 0;
    for (; i < p.log_decay.count(); i += 97) p.log_decay[i] = -std::numeric_limits<T>::infinity();
    for (i = 5; i < p.log_decay.count(); i += 101) p.log_decay[i] = T(0.25);
  }
  if (with.mask) {
    p.key_mask = tensor<std::uint8_t>({batch, size.n}, with.how).fill([] { return 1; });
    for (std::int64_t i = 0; i < p.key_mask.count(); ++i) {
      if (i % size.n < 3 || i % 7 == 2) p.key_mask[i] = 0;
      if (!p.key_mask[i] && i % 2 == 0) {
        for (std::int64_t c = 0; c < size.d_v; ++c) {
          p.v[i * size.d_v + c] = std::numeric_limits<T>::quiet_NaN();
        }
        if (size.d_k > 0) p.log_k[i * size.d_k] = std::numeric_limits<T>::infinity();
      } else if (i % 11 == 5) {  // without the mask, a key that counts for nothing all the same
        for (std::int64_t r = 0; r < size.d_k; ++r) {
          p.log_k[i * size.d_k + r] = -std::numeric_limits<T>::infinity();
        }
      }
    }
    for (std::int64_t i = 1; i < p.log_k.count(); i += 13) {
      p.log_k[i] = -std::numeric_limits<T>::infinity();
    }
  }
  if (with.segments) {
    p.segments = tensor<std::int64_t>({size.n}, with.how);
    for (std::int64_t i = 0; i < size.n; ++i) p.segments[i] = (i + 20) / 37 % 3;
  }
  if (with.state) {
    p.key_sums = tensor<T>({batch, 5, size.d_k}, with.how).fill(scaled);
    p.value_sums = tensor<T>({batch, 2, size.d_k, size.d_v}, with.how).fill(plain);
    const T unit = std::numeric_limits<T>::epsilon() / 2;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t r = 0; r < size.d_k; ++r) {
        const auto part = [&](std::int64_t i) -> T& {
          return p.key_sums[(b * 5 + i) * size.d_k + r];
        };
        part(1) = part(0) * unit / 2;
        part(2) = T(1) + std::abs(static_cast<T>(plain()));
        part(3) = unit / 2;
        part(4) = T(-1);
        if (r % 5 == 3) {
          part(0) = -std::numeric_limits<T>::infinity();
          part(1) = part(2) = part(3) = T(0);
        }
        for (std::int64_t c = 0; c < size.d_v; ++c) {
          const std::int64_t at = (b * 2 * size.d_k + r) * size.d_v + c;
          if (r % 5 == 3) p.value_sums[at] = T(0);
          p.value_sums[at + size.d_k * size.d_v] = p.value_sums[at] * unit / 2;
        }
      }
    }
  }
  if (with.final_state) {
    p.grad_final_key_sums = tensor<T>({batch, 5, size.d_k}, with.how).fill(plain);
    p.grad_final_value_sums = tensor<T>({batch, 2, size.d_k, size.d_v}, with.how).fill(plain);
  }
  return p;
}

template <class T>
long double largest(const tensor<T>& x) {
  long double most = 0;
  for (std::int64_t i = 0; x && i < x.count(); ++i) {
    if (std::isfinite(x[i])) most = std::max<long double>(most, std::abs(x[i]));
  }
  return most;
}

// What errors are relative to: the most that one pair of tokens adds to a gradient of a logarithm.
template <class T>
long double unit_of(const problem<T>& p) {
  const long double values = std::max(largest(p.v), largest(p.value_sums));
  return (largest(p.grad_y) + largest(p.grad_final_value_sums)) * values + largest(p.grad_log_z) +
         largest(p.grad_final_key_sums);
}

template <class T>
bool report(const std::string& what, const std::string& part, long double error,
            long double limit) {
  if (error <= limit) return true;
  std::printf("%s %s %s: error %.3Lg of at most %.3Lg\n", subquad::get_isa().c_str(), what.c_str(),
              part.c_str(), error, limit);
  return false;
}

// Errors are those of the sums' own terms, in units of their size: a gradient is a sum over rows of
// cancelling terms, and each term carries a few units of the last place of its softmax.
template <class T>
void compare(problem<T>& p, layout how, const std::string& what) {
  gradients<long double> expected;
  gradients<long double> magnitude;
  p.truth(expected, magnitude);
  gradients<T> got = p.run(how);
  const long double ulp = std::numeric_limits<T>::epsilon();
  const long double unit = unit_of(p);
  const auto parts = got.parts();
  auto expected_parts = expected.parts();
  auto magnitude_parts = magnitude.parts();
  for (size_t i = 0; i < parts.size(); ++i) {
    const tensor<T>& part = *parts[i].second;
    if (!part) continue;
    const bool values =
        parts[i].first == std::string("v") || parts[i].first == std::string("value_sums");
    const long double size_of = values ? unit / std::max(largest(p.v), 1e-300L) : unit;
    long double worst = 0;
    long double worst_of_terms = 0;
    for (std::int64_t at = 0; at < part.count(); ++at) {
      long double error = std::abs(part[at] - (*expected_parts[i].second)[at]);
      if (std::isnan(error)) error = kInfinity;
      worst = std::max(worst, error / size_of);
      worst_of_terms =
          std::max(worst_of_terms, error / (size_of + (*magnitude_parts[i].second)[at]));
    }
    SUBQUAD_CHECK(report<T>(what, parts[i].first, worst_of_terms, 8 * ulp));
    if (std::getenv("SUBQUAD_TEST_ERRORS")) {
      std::printf("%s %s %s: %.3Lg (%.3Lg of terms)\n", subquad::get_isa().c_str(), what.c_str(),
                  parts[i].first, worst / ulp, worst_of_terms / ulp);
    }
  }
}

template <class T>
void compare(const sizes& size, const options& with, const std::string& what) {
  problem<T> p = make<T>(size, with);
  compare(p, with.how, what);
}

template <class T>
void all_forms() {
  for (const double scale : {1.0, 4.0, 30.0, 1e3}) {
    options with;
    with.scale = scale;
    with.log_z = scale == 4.0;
    compare<T>({1, 150, 150, 16, 8}, with, "scale " + std::to_string(scale));
  }
  for (const bool causal : {true, false}) {
    for (int form = 0; form < 32; ++form) {
      options with;
      with.causal = causal;
      with.mask = form & 1;
      with.segments = form & 2;
      with.state = form & 4;
      with.decay = causal && (form & 8);
      with.final_state = form & 16;
      with.log_z = form & 1;
      with.how = static_cast<layout>(form % 3);
      with.scale = form & 2 ? 20 : 1;
      compare<T>({2, 75, 75, 5 + form % 7, 3 + form % 5}, with,
                 (causal ? "causal form " : "form ") + std::to_string(form));
    }
  }
}

// Sizes at the edges, one head or row or none.
template <class T>
void odd_sizes() {
  for (const sizes& size : std::vector<sizes>{{1, 1, 1, 1, 1},
                                              {1, 33, 33, 1, 17},
                                              {3, 64, 64, 17, 1},
                                              {1, 31, 31, 65, 33},
                                              {1, 40, 40, 3, 0},
                                              {2, 0, 0, 4, 3},
                                              {0, 5, 5, 4, 3},
                                              {1, 9, 9, 0, 4}}) {
    for (const bool causal : {true, false}) {
      options with;
      with.causal = causal;
      with.state = with.final_state = with.log_z = true;
      with.decay = causal;
      compare<T>(size, with, "n " + std::to_string(size.n) + " d_k " + std::to_string(size.d_k));
    }
  }
  options with;
  with.causal = false;
  with.state = true;
  compare<T>({2, 70, 45, 6, 5}, with, "more queries");
  compare<T>({2, 5, 45, 6, 5}, with, "fewer queries");
  compare<T>({2, 7, 0, 6, 5}, with, "no keys");
  compare<T>({2, 0, 45, 6, 5}, with, "no queries");
  for (const bool causal : {true, false}) {
    with = {};
    with.causal = causal;
    with.query = false;
    with.state = with.final_state = true;
    with.decay = causal;
    compare<T>({2, 0, 77, 6, 5}, with, "the state alone");
  }
}

// Keys that rise by more than the threshold at every token, and ones that jump.
template <class T>
void steep_keys() {
  for (const int form : {0, 1, 2}) {
    problem<T> p = make<T>({1, 90, 90, 5, 4}, options{});
    for (std::int64_t t = 0; t < 90; ++t) {
      for (std::int64_t r = 0; r < 5; ++r) {
        const auto turn = static_cast<T>(t / 30 - 1);
        p.log_k[t * 5 + r] += form == 0   ? static_cast<T>(31 * t)
                              : form == 1 ? T(3) * static_cast<T>(t)
                                          : turn * T(1e4);
      }
    }
    compare<T>(p, layout::contiguous, "steep " + std::to_string(form));
  }
}

// Values far from zero: errors are those of their differences.
template <class T>
void distant_values() {
  options with;
  with.value_offset = 1000;
  with.state = false;
  for (const bool causal : {true, false}) {
    with.causal = causal;
    problem<T> p = make<T>({1, 120, 120, 8, 6}, with);
    gradients<long double> expected;
    gradients<long double> magnitude;
    p.truth(expected, magnitude);
    gradients<T> got = p.run();
    const long double spread = 8 * largest(p.grad_y);
    for (std::int64_t i = 0; i < got.log_q.count(); ++i) {
      SUBQUAD_CHECK(std::abs(got.log_q[i] - expected.log_q[i]) <
                    16 * std::numeric_limits<T>::epsilon() * spread);
      SUBQUAD_CHECK(std::abs(got.log_k[i] - expected.log_k[i]) <
                    32 * std::numeric_limits<T>::epsilon() * spread);
    }
  }
}

// What no gradient can tell: a constant added to a row of log_q, to all keys, and moved from one
// feature's queries to its keys.
template <class T>
void invariances() {
  for (const bool causal : {true, false}) {
    options with;
    with.causal = causal;
    with.scale = 5;
    const std::int64_t n = 200;
    const std::int64_t d_k = 12;
    problem<T> p = make<T>({1, n, n, d_k, 7}, with);
    gradients<T> got = p.run();
    const long double unit = unit_of(p) * std::numeric_limits<T>::epsilon();
    std::vector<long double> by_feature(static_cast<size_t>(d_k), 0);
    long double of_keys = 0;
    for (std::int64_t t = 0; t < n; ++t) {
      long double of_row = 0;
      for (std::int64_t r = 0; r < d_k; ++r) {
        of_row += got.log_q[t * d_k + r];
        of_keys += got.log_k[t * d_k + r];
        by_feature[static_cast<size_t>(r)] += got.log_q[t * d_k + r] - got.log_k[t * d_k + r];
      }
      SUBQUAD_CHECK(std::abs(of_row) < 8 * unit);
    }
    SUBQUAD_CHECK(std::abs(of_keys) < 64 * unit);
    for (const long double sum : by_feature) SUBQUAD_CHECK(std::abs(sum) < 64 * unit);
  }
}

template <class T>
bool all_finite(const tensor<T>& x, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    if (!std::isfinite(x[i])) return false;
  }
  return true;
}
template <class T>
bool none_finite(const tensor<T>& x, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    if (std::isfinite(x[i])) return false;
  }
  return true;
}
template <class T>
bool same(const tensor<T>& a, const tensor<T>& b, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

// What is not a number reaches what depends on it, and nothing else.
template <class T>
void not_finite() {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const std::int64_t n = 80;
  const std::int64_t at = 45;
  const std::int64_t d_k = 6;
  const std::int64_t d_v = 5;
  const auto fresh = [&] { return make<T>({1, n, n, d_k, d_v}, options{}); };
  for (const T value : {nan, std::numeric_limits<T>::infinity()}) {
    problem<T> p = fresh();
    p.v[at * d_v + 2] = value;
    gradients<T> got = p.run();
    SUBQUAD_CHECK(all_finite(got.log_q, 0, at * d_k));
    SUBQUAD_CHECK(none_finite(got.log_q, at * d_k, n * d_k));
    SUBQUAD_CHECK(none_finite(got.log_k, 0, n * d_k));
    SUBQUAD_CHECK(all_finite(got.v, 0, n * d_v));

    p = fresh();
    p.log_k[at * d_k + 1] = value;
    got = p.run();
    SUBQUAD_CHECK(all_finite(got.log_q, 0, at * d_k));
    SUBQUAD_CHECK(none_finite(got.log_q, at * d_k, n * d_k));
    SUBQUAD_CHECK(none_finite(got.v, 0, n * d_v));

    p = fresh();
    p.log_q[at * d_k + 1] = value;
    got = p.run();
    SUBQUAD_CHECK(all_finite(got.log_q, 0, at * d_k));
    SUBQUAD_CHECK(none_finite(got.log_q, at * d_k, (at + 1) * d_k));
    SUBQUAD_CHECK(all_finite(got.log_q, (at + 1) * d_k, n * d_k));
    SUBQUAD_CHECK(none_finite(got.log_k, 0, (at + 1) * d_k));
    SUBQUAD_CHECK(all_finite(got.log_k, (at + 1) * d_k, n * d_k));
    SUBQUAD_CHECK(all_finite(got.v, (at + 1) * d_v, n * d_v));

    p = fresh();
    p.grad_y[at * d_v + 1] = value;
    got = p.run();
    SUBQUAD_CHECK(all_finite(got.log_q, 0, at * d_k));
    SUBQUAD_CHECK(none_finite(got.log_q, at * d_k, (at + 1) * d_k));
    SUBQUAD_CHECK(all_finite(got.log_q, (at + 1) * d_k, n * d_k));
    SUBQUAD_CHECK(all_finite(got.log_k, (at + 1) * d_k, n * d_k));
    SUBQUAD_CHECK(all_finite(got.v, (at + 1) * d_v, n * d_v));
    for (std::int64_t j = 0; j < n; ++j) SUBQUAD_CHECK(std::isfinite(got.v[j * d_v]));

    // The rows from there on are not asked for.
    p = fresh();
    p.v[at * d_v + 2] = value;
    p.log_q[(at + 3) * d_k] = value;
    for (std::int64_t i = at * d_v; i < n * d_v; ++i) p.grad_y[i] = T(0);
    got = p.run();
    problem<T> without = fresh();
    for (std::int64_t i = at * d_v; i < n * d_v; ++i) without.grad_y[i] = T(0);
    gradients<T> expected = without.run();
    const long double limit = 8 * unit_of(without) * std::numeric_limits<T>::epsilon();
    for (std::int64_t i = 0; i < n * d_k; ++i) {
      SUBQUAD_CHECK(std::abs(got.log_q[i] - expected.log_q[i]) < limit);
      if (i / d_k == at) continue;  // 0 times its value
      SUBQUAD_CHECK(std::abs(got.log_k[i] - expected.log_k[i]) < limit);
    }
    for (std::int64_t i = 0; i < n * d_v; ++i) {
      SUBQUAD_CHECK(std::abs(got.v[i] - expected.v[i]) < limit);
    }
  }
  // A masked key changes no bit of anything.
  options with;
  with.mask = true;
  for (const bool causal : {true, false}) {
    with.causal = causal;
    problem<T> p = make<T>({1, n, n, d_k, d_v}, with);
    gradients<T> expected = p.run();
    for (std::int64_t j = 0; j < n; ++j) {
      if (p.key_mask[j]) continue;
      for (std::int64_t c = 0; c < d_v; ++c) p.v[j * d_v + c] = T(3);
      for (std::int64_t r = 0; r < d_k; ++r) p.log_k[j * d_k + r] = T(5);
    }
    gradients<T> got = p.run();
    SUBQUAD_CHECK(same(got.log_q, expected.log_q, 0, n * d_k));
    SUBQUAD_CHECK(same(got.log_k, expected.log_k, 0, n * d_k));
    SUBQUAD_CHECK(same(got.v, expected.v, 0, n * d_v));
  }
  // A run that is not finite leaves the others alone; so does a feature's past that is forgotten.
  with = {};
  with.segments = true;
  with.decay = true;
  problem<T> p = make<T>({1, n, n, d_k, d_v}, with);
  p.v[40 * d_v] = nan;  // the run of tokens 17 to 53
  gradients<T> got = p.run();
  SUBQUAD_CHECK(all_finite(got.log_k, 0, 17 * d_k));
  SUBQUAD_CHECK(none_finite(got.log_q, 40 * d_k, 54 * d_k));
  SUBQUAD_CHECK(all_finite(got.log_k, 54 * d_k, n * d_k));
  SUBQUAD_CHECK(all_finite(got.log_decay, 54 * d_k, n * d_k));
  with.segments = false;
  p = make<T>({1, n, n, d_k, d_v}, with);
  p.v[40 * d_v] = nan;
  for (std::int64_t r = 0; r < d_k; ++r) {
    p.log_decay[54 * d_k + r] = -std::numeric_limits<T>::infinity();
  }
  got = p.run();
  SUBQUAD_CHECK(all_finite(got.log_k, 54 * d_k, n * d_k));
  SUBQUAD_CHECK(all_finite(got.log_q, 54 * d_k, n * d_k));
  SUBQUAD_CHECK(all_finite(got.log_decay, 54 * d_k, n * d_k));
  // ... nor does what comes after it say anything of the past.
  p = make<T>({1, n, n, d_k, d_v}, with);
  p.log_q[60 * d_k] = nan;
  for (std::int64_t r = 0; r < d_k; ++r) {
    p.log_decay[54 * d_k + r] = -std::numeric_limits<T>::infinity();
  }
  got = p.run();
  SUBQUAD_CHECK(none_finite(got.log_k, 54 * d_k, 61 * d_k));
  for (const tensor<T>* part : {&got.log_k, &got.log_q, &got.log_decay}) {
    SUBQUAD_CHECK(all_finite(*part, 0, 54 * d_k));
  }
  for (std::int64_t r = 0; r < d_k; ++r) SUBQUAD_CHECK(got.log_decay[54 * d_k + r] == T(0));
  // A masked key has gradients of 0, whatever the rows after it are.
  for (const bool causal : {true, false}) {
    with = {};
    with.causal = causal;
    with.mask = true;
    p = make<T>({1, n, n, d_k, d_v}, with);
    p.log_q[60 * d_k] = nan;
    got = p.run();
    for (std::int64_t j = 0; j < n; ++j) {
      if (p.key_mask[j]) continue;
      for (std::int64_t c = 0; c < d_v; ++c) SUBQUAD_CHECK(got.v[j * d_v + c] == T(0));
      for (std::int64_t r = 0; r < d_k; ++r) SUBQUAD_CHECK(got.log_k[j * d_k + r] == T(0));
    }
  }
}

// The same bits for every number of threads, for one head and for several, and with segments.
template <class T>
void threads() {
  const int before = subquad::get_num_threads();
  for (int form = 0; form < 8; ++form) {
    options with;
    with.causal = form & 1;
    with.decay = with.causal;
    with.segments = form & 2;
    with.state = with.final_state = true;
    const std::int64_t batch = form & 4 ? 3 : 1;
    const std::int64_t n = 900;
    problem<T> p = make<T>({batch, n, n, 32, 32}, with);
    subquad::set_num_threads(1);
    gradients<T> expected = p.run();
    for (const int count : {2, 3, 16}) {
      subquad::set_num_threads(count);
      gradients<T> got = p.run();
      const auto parts = got.parts();
      const auto expected_parts = expected.parts();
      for (size_t i = 0; i < parts.size(); ++i) {
        if (!*parts[i].second) continue;
        SUBQUAD_CHECK(
            same(*parts[i].second, *expected_parts[i].second, 0, parts[i].second->count()));
      }
    }
  }
  subquad::set_num_threads(before);
}

// Each output alone gives what it gives beside the others; shared inputs are read in place.
template <class T>
void parts_alone() {
  options with;
  with.state = with.final_state = with.decay = with.log_z = true;
  problem<T> p = make<T>({2, 70, 70, 6, 5}, with);
  gradients<T> all = p.run();
  for (size_t i = 0; i < 6; ++i) {
    gradients<T> one = p.run();
    const auto parts = one.parts();
    for (size_t other = 0; other < 6; ++other) {
      if (other != i) *parts[other].second = {};
    }
    p.call(one);
    SUBQUAD_CHECK(same(*parts[i].second, *all.parts()[i].second, 0, parts[i].second->count()));
  }
  for (tensor<T>* input : {&p.log_k, &p.v, &p.log_q, &p.log_decay, &p.grad_y}) {
    input->share_first();
  }
  for (tensor<T>* input : {&p.key_sums, &p.value_sums}) input->share_first();
  compare<T>(p, layout::contiguous, "shared inputs");
}

void errors() {
  problem<float> p = make<float>({2, 8, 8, 3, 4}, options{});
  gradients<float> g = p.run();
  g.v = tensor<float>({2, 8, 3});
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { p.call(g); }, "grad_v"));
  g = p.run();
  g.log_decay = tensor<float>({2, 8, 3});
  p.causal = false;
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { p.call(g); }, "grad_log_decay: expected a causal call"));
  g = p.run();
  p.y = {};
  SUBQUAD_CHECK(
      checks::throws<subquad::invalid_argument>([&] { p.call(g); }, "grad_y: expected y"));
}

// n = 65536 at 64 x 64 takes less than 64 MB.
void memory() {
  const auto bytes = subquad::linear_attention_vjp_workspace(1, 65536, 65536, 64, 64, 4, true);
  SUBQUAD_CHECK(bytes < (std::size_t{64} << 20));
}

template <class T>
void all() {
  all_forms<T>();
  odd_sizes<T>();
  steep_keys<T>();
  distant_values<T>();
  invariances<T>();
  not_finite<T>();
  threads<T>();
  parts_alone<T>();
}

}  // namespace

int main() {
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    all<float>();
    all<double>();
  }
  errors();
  memory();
  return checks::status();
}
