// linear_attention of every instruction set against the sums over pairs in long double.
#include "subquad/attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "subquad/errors.hpp"
#include "subquad/threads.hpp"

namespace {

using std::int64_t;
using std::size_t;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
constexpr long double kEmptyLog = -std::numeric_limits<long double>::infinity();

// 16 units: an exponent of magnitude 16 is rounded by 16 / 2 of them, twice.
template <class T>
constexpr long double kTolerance = 16 * static_cast<long double>(std::numeric_limits<T>::epsilon());

// One head. Empty vectors are absent arrays.
template <class T>
struct problem {
  int64_t n_q = 0;
  int64_t n = 0;
  int64_t d_k = 0;
  int64_t d_v = 0;
  bool causal = true;
  bool empty_is_nan = false;
  std::vector<T> q, k, v, decay;
  std::vector<std::uint8_t> mask;
  std::vector<int64_t> segments;

  T& key(int64_t t, int64_t r) { return k[static_cast<size_t>(t * d_k + r)]; }
  T& value(int64_t t, int64_t c) { return v[static_cast<size_t>(t * d_v + c)]; }
};

template <class T>
struct sums {
  std::vector<T> keys, values;
  bool operator==(const sums& other) const {
    const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
      return a.size() == b.size() &&
             (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
    };
    return same(keys, other.keys) && same(values, other.values);
  }
};

template <class T>
struct result {
  std::vector<T> y, log_z;
  sums<T> state;
};

template <class T>
std::vector<T> normal(int64_t count, double scale, std::mt19937_64& generator, double mean = 0) {
  std::normal_distribution<double> distribution(mean, scale);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(distribution(generator));
  return values;
}

template <class T>
problem<T> random_problem(int64_t n_q, int64_t n, int64_t d_k, int64_t d_v, double scale,
                          bool causal = true) {
  std::mt19937_64 generator(static_cast<std::uint64_t>(n * 1000003 + d_k * 1009 + d_v));
  problem<T> p;
  p.n_q = n_q;
  p.n = n;
  p.d_k = d_k;
  p.d_v = d_v;
  p.causal = causal;
  p.q = normal<T>(n_q * d_k, scale, generator);
  p.k = normal<T>(n * d_k, scale, generator);
  p.v = normal<T>(n * d_v, 1.0, generator);
  return p;
}

// Tokens [begin, end) of a causal problem.
template <class T>
problem<T> part(const problem<T>& p, int64_t begin, int64_t end) {
  problem<T> out = p;
  const auto cut = [&](auto& values, int64_t d) {
    if (values.empty()) return;
    values = {values.begin() + begin * d, values.begin() + end * d};
  };
  out.n = end - begin;
  out.n_q = out.n;
  cut(out.q, p.d_k);
  cut(out.k, p.d_k);
  cut(out.v, p.d_v);
  cut(out.decay, p.d_k);
  cut(out.mask, 1);
  cut(out.segments, 1);
  return out;
}

struct optional_view {
  template <class T>
  optional_view(const std::vector<T>& data, std::initializer_list<int64_t> shape, bool present)
      : present_(present),
        lengths_(shape),
        view_(subquad::contiguous_view(const_cast<T*>(data.data()), lengths_.data(),
                                       static_cast<std::int32_t>(lengths_.size()))) {}
  const subquad::array_view* get() const { return present_ ? &view_ : nullptr; }

 private:
  bool present_;
  std::vector<int64_t> lengths_;
  subquad::array_view view_;
};

struct wanted {
  bool y = true;
  bool log_z = true;
  bool state = true;
};

template <class T>
result<T> run(const problem<T>& p, const sums<T>* state = nullptr, wanted want = {}) {
  result<T> out;
  const bool queries = want.y || want.log_z;
  out.y.assign(static_cast<size_t>(p.n_q * p.d_v), T(-77));
  out.log_z.assign(static_cast<size_t>(p.n_q), T(-77));
  out.state.keys.assign(static_cast<size_t>(5 * p.d_k), T(-77));
  out.state.values.assign(static_cast<size_t>(2 * p.d_k * p.d_v), T(-77));
  std::vector<std::uint8_t> bytes(
      subquad::linear_attention_workspace(1, p.n_q, p.n, p.d_k, p.d_v, sizeof(T), p.causal));
  const std::vector<T> none;
  const sums<T> empty{};
  const sums<T>& in = state ? *state : empty;
  const optional_view k(p.k, {p.n, p.d_k}, true);
  const optional_view v(p.v, {p.n, p.d_v}, true);
  const optional_view q(p.q, {p.n_q, p.d_k}, queries);
  const optional_view decay(p.decay, {p.n, p.d_k}, !p.decay.empty());
  const optional_view mask(p.mask, {p.n}, !p.mask.empty());
  const optional_view segments(p.segments, {p.n}, !p.segments.empty());
  const optional_view key_sums(in.keys, {5, p.d_k}, state != nullptr);
  const optional_view value_sums(in.values, {2, p.d_k, p.d_v}, state != nullptr);
  const optional_view y(out.y, {p.n_q, p.d_v}, want.y);
  const optional_view log_z(out.log_z, {p.n_q}, want.log_z);
  const optional_view final_keys(out.state.keys, {5, p.d_k}, want.state);
  const optional_view final_values(out.state.values, {2, p.d_k, p.d_v}, want.state);
  const optional_view workspace(bytes, {static_cast<int64_t>(bytes.size())}, true);
  subquad::linear_attention(*k.get(), *v.get(), q.get(), decay.get(), mask.get(), segments.get(),
                            key_sums.get(), value_sums.get(), p.causal, p.empty_is_nan, y.get(),
                            log_z.get(), final_keys.get(), final_values.get(), *workspace.get());
  return out;
}

struct expected_rows {
  std::vector<long double> y, log_z;
};

// The definition: a log-sum-exp over the pairs (key, feature) of every row.
template <class T>
expected_rows truth(const problem<T>& p) {
  expected_rows out;
  const auto d_k = static_cast<size_t>(p.d_k);
  const auto d_v = static_cast<size_t>(p.d_v);
  for (int64_t t = 0; t < p.n_q; ++t) {
    std::vector<long double> scores;
    std::vector<size_t> owners;
    std::vector<long double> decayed(d_k, 0);
    std::vector<bool> forgotten(d_k, false);
    long double top = kEmptyLog;
    bool nan = false;
    for (int64_t j = p.causal ? t : p.n - 1; j >= 0; --j) {
      const auto key = static_cast<size_t>(j);
      if (!p.segments.empty() && p.segments[key] != p.segments[static_cast<size_t>(t)]) {
        if (p.causal) break;
        continue;
      }
      bool counts = p.mask.empty() || p.mask[key] != 0;
      bool any = false;
      for (size_t r = 0; r < d_k; ++r) any = any || p.k[key * d_k + r] != -kInfinity<T>;
      for (size_t r = 0; r < d_k && counts && any; ++r) {
        const long double score = static_cast<long double>(p.q[static_cast<size_t>(t) * d_k + r]) +
                                  static_cast<long double>(p.k[key * d_k + r]) + decayed[r];
        if (forgotten[r] || score == kEmptyLog) continue;
        nan = nan || std::isnan(score);
        top = std::max(top, score);
        scores.push_back(score);
        owners.push_back(key);
      }
      for (size_t r = 0; r < d_k && !p.decay.empty(); ++r) {
        const T by = p.decay[key * d_k + r];
        forgotten[r] = forgotten[r] || by == -kInfinity<T>;
        decayed[r] += static_cast<long double>(by);
      }
    }
    nan = nan || std::isinf(top);
    long double total = 0;
    std::vector<long double> y(d_v, 0);
    for (size_t i = 0; i < scores.size(); ++i) {
      const long double weight = std::exp(scores[i] - top);
      total += weight;
      for (size_t c = 0; c < d_v; ++c) {
        y[c] += weight * static_cast<long double>(p.v[owners[i] * d_v + c]);
      }
    }
    for (size_t c = 0; c < d_v; ++c) {
      const bool empty = scores.empty();
      const long double none = p.empty_is_nan ? kNaN<long double> : 0.0L;
      out.y.push_back(empty ? none : nan ? kNaN<long double> : y[c] / total);
    }
    out.log_z.push_back(scores.empty() ? kEmptyLog
                        : nan          ? kNaN<long double>
                                       : top + std::log(total));
  }
  return out;
}

// Rows [begin, end) of `found`, which holds row `begin` first.
template <class T>
bool close(const problem<T>& p, const result<T>& found, const expected_rows& expected,
           int64_t begin = 0) {
  long double size = 0;
  for (const T value : p.v) {
    if (std::isfinite(value)) size = std::max(size, std::abs(static_cast<long double>(value)));
  }
  long double worst = 0;
  for (size_t i = 0; i < found.y.size(); ++i) {
    const auto value = static_cast<long double>(found.y[i]);
    const long double wanted_value = expected.y[i + static_cast<size_t>(begin * p.d_v)];
    if (!std::isfinite(wanted_value)) {
      if (std::isfinite(value)) worst = kInfinity<long double>;
    } else if (!(std::abs(value - wanted_value) <= worst * size)) {
      worst = std::isnan(value) ? kInfinity<long double> : std::abs(value - wanted_value) / size;
    }
  }
  long double worst_log = 0;
  for (size_t i = 0; i < found.log_z.size(); ++i) {
    const auto value = static_cast<long double>(found.log_z[i]);
    const long double wanted_value = expected.log_z[i + static_cast<size_t>(begin)];
    if (std::isnan(wanted_value)) {
      if (!std::isnan(value)) worst_log = kInfinity<long double>;
    } else if (value != wanted_value) {
      const long double error = std::abs(value - wanted_value) / (1 + std::abs(wanted_value) / 16);
      worst_log = error <= worst_log  ? worst_log
                  : std::isnan(error) ? kInfinity<long double>
                                      : error;
    }
  }
  if (worst <= kTolerance<T> && worst_log <= kTolerance<T>) return true;
  std::printf("n %ld, d %ld x %ld: y %.3Lg, log_z %.3Lg\n", static_cast<long>(p.n),
              static_cast<long>(p.d_k), static_cast<long>(p.d_v), worst, worst_log);
  return false;
}

template <class T>
bool right(const problem<T>& p) {
  return close(p, run(p), truth(p));
}

template <class T>
void shapes() {
  for (const bool causal : {true, false}) {
    for (const int64_t n : {0, 1, 2, 15, 31, 32, 33, 70, 256, 257, 300}) {
      SUBQUAD_CHECK(right(random_problem<T>(n, n, 5, 3, 1, causal)));
    }
    for (const int64_t d : {1, 4, 7, 8, 9, 16, 17, 31, 32, 33, 48, 64, 65}) {
      SUBQUAD_CHECK(right(random_problem<T>(45, 45, d, 6, 1, causal)));
      SUBQUAD_CHECK(right(random_problem<T>(45, 45, 3, d, 1, causal)));
    }
    SUBQUAD_CHECK(right(random_problem<T>(40, 40, 0, 3, 1, causal)));
    SUBQUAD_CHECK(right(random_problem<T>(40, 40, 3, 0, 1, causal)));
    SUBQUAD_CHECK(right(random_problem<T>(100, 100, 64, 64, 1, causal)));
  }
  SUBQUAD_CHECK(right(random_problem<T>(7, 300, 8, 5, 1, false)));
  SUBQUAD_CHECK(right(random_problem<T>(300, 7, 8, 5, 1, false)));
  SUBQUAD_CHECK(right(random_problem<T>(30, 0, 8, 5, 1, false)));
  SUBQUAD_CHECK(right(random_problem<T>(0, 30, 8, 5, 1, false)));
}

template <class T>
void ranges() {
  for (const double scale : {1.0, 4.0, 30.0, 1e3, 1e4}) {
    SUBQUAD_CHECK(right(random_problem<T>(300, 300, 16, 8, scale)));
    SUBQUAD_CHECK(right(random_problem<T>(300, 300, 16, 8, scale, false)));
  }
  auto jumps = random_problem<T>(90, 90, 4, 3, 1);
  for (int64_t t = 0; t < 90; ++t) {
    for (int64_t r = 0; r < 4; ++r) jumps.key(t, r) += static_cast<T>(10000 * (t / 30 - 1));
  }
  SUBQUAD_CHECK(right(jumps));
  for (const double slope : {3.0, 29.0, 31.0, -31.0, 299.0, 301.0}) {
    auto ramp = random_problem<T>(70, 70, 4, 3, 1);
    for (int64_t t = 0; t < 70; ++t) {
      for (int64_t r = 0; r < 4; ++r)
        ramp.key(t, r) += static_cast<T>(slope * static_cast<double>(t));
    }
    SUBQUAD_CHECK(right(ramp));
    // One feature at a time, which no other hides.
    for (int64_t t = 0; t < 70; ++t) {
      for (int64_t r = 1; r < 4; ++r) ramp.key(t, r) = -kInfinity<T>;
    }
    SUBQUAD_CHECK(right(ramp));
  }
}

template <class T>
void masks() {
  for (const bool causal : {true, false}) {
    auto p = random_problem<T>(110, 110, 6, 4, 2, causal);
    for (int64_t t = 0; t < 110; ++t) {
      // Leading rows that attend nothing, removed keys, empty keys, keys of few features.
      p.mask.push_back(t >= 5 && t % 7 != 3);
      if (p.mask.back() == 0) {
        p.value(t, 1) = kNaN<T>;
        p.key(t, 2) = t % 2 ? kNaN<T> : kInfinity<T>;
      }
      for (int64_t r = 0; r < 6; ++r) {
        if (t % 11 == 6 || (t + r) % 5 == 0 || (r == 3 && t < 60)) p.key(t, r) = -kInfinity<T>;
      }
      if (t % 11 == 6) p.value(t, 0) = t % 2 ? kInfinity<T> : kNaN<T>;
    }
    for (size_t r = 0; r < 6; ++r) p.q[40 * 6 + r] = -kInfinity<T>;
    p.q[41 * 6 + 2] = -kInfinity<T>;
    SUBQUAD_CHECK(right(p));
    p.empty_is_nan = true;
    const result<T> found = run(p);
    SUBQUAD_CHECK(close(p, found, truth(p)));
    SUBQUAD_CHECK(std::isnan(found.y[40 * 4]) && found.log_z[40] == -kInfinity<T>);
  }
}

template <class T>
void not_finite() {
  for (const T bad : {kNaN<T>, kInfinity<T>}) {
    for (const bool causal : {true, false}) {
      auto keys = random_problem<T>(90, 90, 6, 4, 1, causal);
      keys.key(17, 2) = bad;
      keys.key(43, 5) = bad;
      SUBQUAD_CHECK(right(keys));
      auto only = keys;
      for (T& value : only.k) value = std::isfinite(value) ? -kInfinity<T> : value;
      SUBQUAD_CHECK(right(only));
      auto queries = random_problem<T>(90, 90, 6, 4, 1, causal);
      queries.q[20 * 6 + 1] = bad;
      queries.q[55 * 6 + 5] = bad;
      SUBQUAD_CHECK(right(queries));
      auto values = random_problem<T>(90, 90, 6, 4, 1, causal);
      values.value(20, 1) = bad;
      values.value(55, 2) = -bad;
      SUBQUAD_CHECK(right(values));
    }
  }
}

template <class T>
problem<T> with_decay(int64_t n, double scale) {
  auto p = random_problem<T>(n, n, 6, 4, 2);
  std::mt19937_64 generator(5);
  p.decay = normal<T>(n * 6, scale, generator);
  for (T& by : p.decay) by = -std::abs(by);
  return p;
}

template <class T>
void decays() {
  for (const double scale : {0.01, 1.0, 5.0, 100.0})
    SUBQUAD_CHECK(right(with_decay<T>(300, scale)));
  auto p = with_decay<T>(200, 0.3);
  for (const size_t at : {6 * 10 + 2, 6 * 11 + 2, 6 * 100 + 5, 6 * 128 + 0, 6 * 150 + 3}) {
    p.decay[at] = -kInfinity<T>;
  }
  for (size_t r = 0; r < 6; ++r) p.decay[6 * 77 + r] = -kInfinity<T>;
  p.decay[0] = -kInfinity<T>;
  SUBQUAD_CHECK(right(p));
  for (const size_t at : {9, 60, 76}) {
    p.k[6 * at + 4] = kNaN<T>;
    p.v[4 * at + 1] = kNaN<T>;
  }
  const result<T> found = run(p);
  SUBQUAD_CHECK(close(p, found, truth(p)));
  SUBQUAD_CHECK(std::isnan(found.y[4 * 76]) && std::isfinite(found.y[4 * 77]));
  // Keys that are absent where a feature is forgotten, and decays that are not numbers.
  for (const T bad : {-kInfinity<T>, kNaN<T>}) {
    auto q = with_decay<T>(100, 0.3);
    for (size_t r = 0; r < 6; ++r) {
      for (const size_t at : {19, 20, 21, 22, 23}) q.k[6 * at + r] = -kInfinity<T>;
      q.decay[6 * 21 + r] = r < 3 ? bad : q.decay[6 * 21 + r];
      q.decay[6 * 70 + r] = -kInfinity<T>;
    }
    SUBQUAD_CHECK(right(q));
    for (T& by : q.decay) by = by == -kInfinity<T> ? by : T(0);
    SUBQUAD_CHECK(right(q));
  }
  // Sums of decays that would be lost beside the logarithms themselves.
  auto large = with_decay<T>(200, 0.3);
  for (T& key : large.k) key += T(10000);
  for (T& query : large.q) query -= T(10000);
  SUBQUAD_CHECK(right(large));
  auto growth = with_decay<T>(200, 4);
  for (size_t i = 0; i < growth.decay.size(); i += 2) growth.decay[i] *= -1;
  SUBQUAD_CHECK(right(growth));
}

template <class T>
void segments() {
  for (const bool causal : {true, false}) {
    auto p = random_problem<T>(700, 700, 6, 4, 2, causal);
    for (int64_t t = 0; t < 700; ++t) {
      const int64_t run = t < 3 ? 9 : t < 4 ? -1 : t < 40 ? 9 : t < 310 ? 0 : t < 320 ? 5 : 6;
      p.segments.push_back(run);
    }
    p.k[6 * 3] = kNaN<T>;
    p.v[4 * 39 + 2] = kNaN<T>;
    const result<T> found = run(p);
    const std::vector<int64_t> borders = {0, 3, 4, 40, 310, 320, 700};
    for (size_t i = 0; i + 1 < borders.size(); ++i) {
      auto alone = part(p, borders[i], borders[i + 1]);
      alone.segments.clear();
      result<T> here;
      here.y.assign(found.y.begin() + 4 * borders[i], found.y.begin() + 4 * borders[i + 1]);
      here.log_z.assign(found.log_z.begin() + borders[i], found.log_z.begin() + borders[i + 1]);
      SUBQUAD_CHECK(close(alone, here, truth(alone)));
      if (borders[i + 1] < 700) continue;
      const result<T> last = run(alone);
      for (size_t r = 0; r < 6; ++r) {
        SUBQUAD_CHECK(last.state.keys[r] == found.state.keys[r]);
        const T z = last.state.keys[12 + r];
        SUBQUAD_CHECK(std::abs(z - found.state.keys[12 + r]) <=
                      4 * std::numeric_limits<T>::epsilon() * z);
      }
    }
    if (causal) {
      p.decay.assign(700 * 6, T(-0.125));
      const result<T> decayed = run(p);
      SUBQUAD_CHECK(decayed.state.keys[24] == T(-0.125) * 380);
      p.decay.clear();
    }
    // The state belongs to the first run.
    auto prefix = random_problem<T>(50, 50, 6, 4, 2);
    const sums<T> state = run(prefix).state;
    auto first = part(p, 0, 3);
    first.segments.clear();
    SUBQUAD_CHECK(run(p, &state).y[0] == run(first, &state).y[0]);
    SUBQUAD_CHECK(run(p, &state).y[0] != found.y[0]);
    SUBQUAD_CHECK(run(p, &state).state == found.state);
  }
}

template <class T>
void states() {
  for (const bool decayed : {false, true}) {
    const auto p = decayed ? with_decay<T>(300, 0.2) : random_problem<T>(300, 300, 6, 4, 3);
    const expected_rows expected = truth(p);
    const result<T> whole = run(p);
    for (const int64_t at : {0, 1, 2, 31, 32, 100, 299, 300}) {
      const auto begin = part(p, 0, at);
      const auto end = part(p, at, 300);
      const result<T> first = run(begin);
      const result<T> second = run(end, &first.state);
      SUBQUAD_CHECK(close(p, second, expected, at));
      for (size_t r = 0; r < 6; ++r) {
        const auto log_sum = [&](const sums<T>& s) {
          const auto key = [&](size_t row) {
            return static_cast<long double>(s.keys[row * 6 + r]);
          };
          return key(0) + key(1) + std::log(key(2) + key(3));
        };
        SUBQUAD_CHECK(std::abs(log_sum(second.state) - log_sum(whole.state)) <= kTolerance<T>);
        SUBQUAD_CHECK(std::abs(second.state.keys[24 + r] - whole.state.keys[24 + r]) <=
                      kTolerance<T> * (1 + std::abs(whole.state.keys[24 + r])));
        for (size_t c = 0; c < 4; ++c) {
          const auto sum = [&](const sums<T>& s) {
            const auto value = [&](size_t half) {
              return static_cast<long double>(s.values[(half * 6 + r) * 4 + c]);
            };
            return (value(0) + value(1)) * std::exp(static_cast<long double>(s.keys[r]) -
                                                    static_cast<long double>(whole.state.keys[r]));
          };
          const auto z = static_cast<long double>(whole.state.keys[12 + r]);
          SUBQUAD_CHECK(std::abs(sum(second.state) - sum(whole.state)) <= 2 * kTolerance<T> * z);
        }
      }
    }
    // Token by token.
    sums<T> state = run(part(p, 0, 1)).state;
    for (int64_t t = 1; t < 300; ++t) {
      const result<T> row = run(part(p, t, t + 1), &state);
      SUBQUAD_CHECK(close(p, row, expected, t));
      state = row.state;
    }
    // What is not asked for changes nothing else.
    SUBQUAD_CHECK(run<T>(p, nullptr, {false, false, true}).state == whole.state);
    SUBQUAD_CHECK(run<T>(p, nullptr, {true, false, false}).y == whole.y);
    SUBQUAD_CHECK(run<T>(p, nullptr, {false, true, false}).log_z == whole.log_z);
  }
  // A bidirectional call sees the state as well, and holds it.
  const auto p = random_problem<T>(300, 300, 6, 4, 3, false);
  const sums<T> before = run(part(p, 0, 130)).state;
  auto rest = part(p, 130, 300);
  rest.n_q = 300;
  rest.q = p.q;
  const result<T> found = run(rest, &before);
  SUBQUAD_CHECK(close(p, found, truth(p)));
  auto nothing = part(p, 0, 0);
  SUBQUAD_CHECK(run(nothing, &before).state == before);
  const sums<T> empty = run(nothing).state;
  SUBQUAD_CHECK(empty.keys[0] == -kInfinity<T> && empty.keys[12] == 0 && empty.values[0] == 0);
}

// Sums over many tokens keep the accuracy of one.
template <class T>
void long_sums() {
  const int64_t n = 65536;
  auto p = random_problem<T>(n, n, 3, 2, 1);
  for (T& value : p.v) value = std::abs(value);
  const sums<T> state = run<T>(p, nullptr, {false, false, true}).state;
  for (size_t r = 0; r < 3; ++r) {
    long double z = 0;
    long double s[2] = {};
    for (size_t t = 0; t < static_cast<size_t>(n); ++t) {
      const long double weight = std::exp(static_cast<long double>(p.k[t * 3 + r]) -
                                          static_cast<long double>(state.keys[r]));
      z += weight;
      for (size_t c = 0; c < 2; ++c) s[c] += weight * static_cast<long double>(p.v[t * 2 + c]);
    }
    const long double unit = 2 * static_cast<long double>(std::numeric_limits<T>::epsilon());
    const auto near = [&](T high, T low, long double exact) {
      return std::abs(static_cast<long double>(high) + static_cast<long double>(low) - exact) <=
             unit * exact;
    };
    SUBQUAD_CHECK(near(state.keys[6 + r], state.keys[9 + r], z));
    for (size_t c = 0; c < 2; ++c) {
      SUBQUAD_CHECK(near(state.values[r * 2 + c], state.values[6 + r * 2 + c], s[c]));
    }
  }
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
void threads() {
  const int before = subquad::get_num_threads();
  const auto check = [&](const problem<T>& p, const sums<T>* state) {
    subquad::set_num_threads(1);
    const result<T> one = run(p, state);
    for (const int count : {2, 3}) {
      subquad::set_num_threads(count);
      const result<T> several = run(p, state);
      SUBQUAD_CHECK(same_bits(one.y, several.y) && same_bits(one.log_z, several.log_z));
      SUBQUAD_CHECK(one.state == several.state);
    }
  };
  auto p = random_problem<T>(20000, 20000, 9, 20, 2);
  const sums<T> state = run(part(p, 0, 70)).state;
  check(p, nullptr);
  check(p, &state);
  std::mt19937_64 generator(5);
  p.decay = normal<T>(p.n * 9, 0.1, generator, -0.1);
  p.decay[9 * 1000 + 3] = -kInfinity<T>;
  p.key(5000, 4) = kNaN<T>;
  for (size_t r = 0; r < 9; ++r) p.decay[9 * 5700 + r] = -kInfinity<T>;
  check(p, &state);
  for (int64_t t = 0; t < p.n; ++t) p.segments.push_back(t / 3000);
  check(p, &state);
  auto both = random_problem<T>(9000, 20000, 9, 20, 2, false);
  check(both, &state);
  subquad::set_num_threads(before);
}

// Any strides, and batches that broadcast, give what copies give.
template <class T>
void views() {
  const int64_t n = 70;
  const int64_t d_k = 20;
  const int64_t d_v = 35;
  auto p = random_problem<T>(n, n, d_k, d_v, 1);
  auto other = p;
  std::reverse(other.q.begin(), other.q.end());
  const result<T> found[2] = {run(p), run(other)};
  // log_q (2, n, d_k) with features apart by 2 n, last first; log_k a matrix for both; v stored by
  // columns.
  std::vector<T> q(static_cast<size_t>(2 * n * d_k));
  std::vector<T> v(static_cast<size_t>(n * d_v));
  std::vector<T> k(static_cast<size_t>(n * d_k));
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t r = 0; r < d_k; ++r) {
      const auto from = static_cast<size_t>(t * d_k + r);
      q[static_cast<size_t>((d_k - 1 - r) * 2 * n + t)] = p.q[from];
      q[static_cast<size_t>((d_k - 1 - r) * 2 * n + n + t)] = other.q[from];
      k[static_cast<size_t>((n - 1 - t) * d_k + r)] = p.k[from];
    }
    for (int64_t c = 0; c < d_v; ++c) {
      v[static_cast<size_t>(c * n + t)] = p.v[static_cast<size_t>(t * d_v + c)];
    }
  }
  std::vector<T> y(static_cast<size_t>(2 * n * d_v));
  std::vector<T> log_z(static_cast<size_t>(2 * n));
  // Shape, and strides of an array whose first element is data[offset].
  struct layout {
    std::vector<int64_t> shape, strides;
    subquad::array_view view(std::vector<T>& data, int64_t offset) const {
      subquad::array_view out = subquad::contiguous_view(data.data() + offset, shape.data(),
                                                         static_cast<std::int32_t>(shape.size()));
      out.strides = strides.data();
      return out;
    }
  };
  const layout q_layout{{2, n, d_k}, {n, 1, -2 * n}};
  const layout k_layout{{n, d_k}, {-d_k, 1}};
  const layout v_layout{{1, n, d_v}, {0, 1, n}};
  const layout y_layout{{2, n, d_v}, {n * d_v, 1, n}};
  const layout z_layout{{2, n}, {n, -1}};
  const subquad::array_view q_view = q_layout.view(q, (d_k - 1) * 2 * n);
  const subquad::array_view k_view = k_layout.view(k, (n - 1) * d_k);
  const subquad::array_view v_view = v_layout.view(v, 0);
  const subquad::array_view y_view = y_layout.view(y, 0);
  const subquad::array_view z_view = z_layout.view(log_z, n - 1);
  std::vector<std::uint8_t> bytes(
      subquad::linear_attention_workspace(2, n, n, d_k, d_v, sizeof(T), true));
  const optional_view workspace(bytes, {static_cast<int64_t>(bytes.size())}, true);
  subquad::linear_attention(k_view, v_view, &q_view, nullptr, nullptr, nullptr, nullptr, nullptr,
                            true, false, &y_view, &z_view, nullptr, nullptr, *workspace.get());
  bool same = true;
  for (size_t b = 0; b < 2; ++b) {
    for (int64_t t = 0; t < n; ++t) {
      const auto row = static_cast<size_t>(t);
      same = same && log_z[b * static_cast<size_t>(n) + static_cast<size_t>(n - 1 - t)] ==
                         found[b].log_z[row];
      for (int64_t c = 0; c < d_v; ++c) {
        same = same && y[b * static_cast<size_t>(n * d_v) + static_cast<size_t>(c * n + t)] ==
                           found[b].y[static_cast<size_t>(t * d_v + c)];
      }
    }
  }
  SUBQUAD_CHECK(same);
  // One key and one value for all tokens.
  const layout one_k{{n, d_k}, {0, 1}};
  const layout one_v{{n, d_v}, {0, 0}};
  const subquad::array_view one_k_view = one_k.view(k, 0);
  const subquad::array_view one_v_view = one_v.view(v, 0);
  subquad::linear_attention(one_k_view, one_v_view, &q_view, nullptr, nullptr, nullptr, nullptr,
                            nullptr, true, false, &y_view, nullptr, nullptr, nullptr,
                            *workspace.get());
  const T largest = *std::max_element(y.begin(), y.end());
  const T least = *std::min_element(y.begin(), y.end());
  SUBQUAD_CHECK(largest - v[0] <= kTolerance<T> && v[0] - least <= kTolerance<T>);
}

void errors() {
  auto p = random_problem<float>(4, 4, 3, 2, 1);
  auto longer = random_problem<float>(5, 4, 3, 2, 1);
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { run(longer); }, "log_q"));
  p.causal = false;
  p.decay.assign(12, 0.0F);
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { run(p); }, "log_decay"));
}

template <class T>
void every_check() {
  shapes<T>();
  ranges<T>();
  masks<T>();
  not_finite<T>();
  decays<T>();
  segments<T>();
  states<T>();
  long_sums<T>();
  threads<T>();
  views<T>();
}

}  // namespace

int main() {
  errors();
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    every_check<float>();
    every_check<double>();
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}
