// Linear attention on CUDA against the same sums in long double.
#include <cstring>

#include "arguments.hpp"
#include "cuda_on_host/attention.hpp"
#include "subquad/errors.hpp"

namespace {

using namespace attention;

// Twice what random numbers showed, and below the bound that the kernels state.
template <class T>
constexpr double kTolerance = sizeof(T) == 8 ? 4e-14 : 6e-6;
double worst_seen[2] = {0, 0};

template <class T>
struct outputs {
  strided_array<T> y;
  strided_array<T> log_z;
  strided_array<T> key_sums;
  strided_array<T> value_sums;

  explicit outputs(const form& f)
      : y(joined(f.batch, {f.n_q, f.d_v}), f.outputs),
        log_z(joined(f.batch, {f.n_q}), f.outputs),
        key_sums(joined(f.batch, {5, f.d_k}), f.outputs),
        value_sums(joined(f.batch, {2, f.d_k, f.d_v}), f.outputs) {}
};

struct wanted {
  bool y = true;
  bool log_z = true;
  bool state = true;
  bool log_q = true;
};

// Returns how many blocks of rows were left to the plain kernel: the last that is in the workspace.
template <class T>
std::int64_t run(const problem<T>& p, const outputs<T>& out, const wanted& which = {}) {
  const form& f = p.of;
  const std::int64_t n_q = which.log_q ? f.n_q : 0;
  const auto bytes = static_cast<std::int64_t>(subquad::core::linear_attention_workspace(
      product(f.batch), n_q, f.n, f.d_k, f.d_v, sizeof(T), f.causal));
  const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
  const array_view views[] = {p.log_k.view(),     p.v.view(),         p.log_q.view(),
                              p.log_decay.view(), p.key_mask.view(),  p.segments.view(),
                              p.key_sums.view(),  p.value_sums.view()};
  const array_view results[] = {out.y.view(), out.log_z.view(), out.key_sums.view(),
                                out.value_sums.view()};
  subquad::core::linear_attention(
      views[0], views[1], which.log_q ? &views[2] : nullptr, p.has_decay() ? &views[3] : nullptr,
      f.kept < 1 ? &views[4] : nullptr, f.run > 0 ? &views[5] : nullptr,
      f.has_state ? &views[6] : nullptr, f.has_state ? &views[7] : nullptr, f.causal,
      f.empty_is_nan, which.y ? &results[0] : nullptr, which.log_z ? &results[1] : nullptr,
      which.state ? &results[2] : nullptr, which.state ? &results[3] : nullptr, memory.view());
  const std::int64_t blocks =
      product(f.batch) * ((n_q + 63) / 64) * std::max<std::int64_t>(1, (f.d_v + 63) / 64);
  const auto alignment = static_cast<std::int64_t>(subquad::workspace_layout::kAlignment);
  const auto* begin = static_cast<const std::uint8_t*>(memory.view().data);
  while (reinterpret_cast<std::uintptr_t>(begin) % subquad::workspace_layout::kAlignment) ++begin;
  const auto* flags = reinterpret_cast<const std::int32_t*>(
      begin + bytes - alignment - (blocks * 4 + alignment - 1) / alignment * alignment);
  return std::count(flags, flags + blocks, 1);
}

template <class T>
void expect(const char* what, T found, number truth, number size, number span, const form& f,
            const shape& at) {
  const bool is_same = std::isnan(truth) ? std::isnan(found) : static_cast<number>(found) == truth;
  if (is_same) return;
  // Exponents are differences of float64 numbers of size `span`.
  const number error = std::max<number>(
      0, std::abs(static_cast<number>(found) - truth) / size - 3 * 0x1p-53L * span);
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
      what, place.c_str(), static_cast<double>(found), truth, size, error,
      static_cast<long long>(f.n), static_cast<long long>(f.d_k), static_cast<long long>(f.d_v),
      static_cast<long long>(f.n_q), f.causal, f.scale, f.decay, f.run, f.has_state, f.kept);
  SUBQUAD_CHECK(!"an output is off");
}

constexpr number kUnit(std::size_t bytes) { return bytes == 8 ? 0x1p-53L : 0x1p-24L; }

template <class T>
void check_rows(const problem<T>& p, const outputs<T>& out, const wanted& which) {
  each_index(p.of.batch, [&](const shape& b) {
    const truth<T> one(p, b);
    for (std::int64_t t = 0; t < p.of.n_q; ++t) {
      const std::vector<term> terms = one.terms_of(t);
      number top = -kInfinity;
      for (const term& each : terms) {
        top = each.logarithm > top || std::isnan(each.logarithm) ? each.logarithm : top;
      }
      number total = 0;
      number span = 0;
      for (const term& each : terms) {
        total += one.mass(each) * std::exp(each.logarithm - top);
        const number q = one.q(t, each.feature);
        span = std::max(span, std::abs(q) + std::abs(each.logarithm - q));
      }
      const number log_z = terms.empty()                         ? -kInfinity
                           : std::isinf(top) && !std::isnan(top) ? top
                                                                 : top + std::log(total);
      if (which.log_z) {
        // As a difference of what the weights are measured against.
        const number size = 1 + std::abs(log_z) * kUnit(sizeof(T)) / number(kTolerance<T>);
        expect("log_z", out.log_z(joined(b, {t})), log_z, size, span, p.of, joined(b, {t}));
      }
      if (!which.y) continue;
      for (std::int64_t c = 0; c < p.of.d_v; ++c) {
        number sum = 0;
        number size = 0;
        for (const term& each : terms) {
          const number share = std::exp(each.logarithm - top) / total;
          sum += share * one.value_of(each, c);
          size += std::abs(share * one.value_of(each, c));
        }
        if (terms.empty()) sum = p.of.empty_is_nan ? number(kNan) : 0;
        expect("y", out.y(joined(b, {t, c})), sum, size, span, p.of, joined(b, {t, c}));
      }
    }
  });
}

template <class T>
void check_state(const problem<T>& p, const outputs<T>& out) {
  // Kept in numbers of two parts, where products of 64 tokens are not.
  each_index(p.of.batch, [&](const shape& b) {
    const truth<T> one(p, b);
    const std::vector<term> terms = one.keys_of(p.of.n - 1, true);
    for (std::int64_t r = 0; r < p.of.d_k; ++r) {
      const auto found = [&](std::int64_t row) {
        return static_cast<number>(out.key_sums(joined(b, {row, r})));
      };
      number top = -kInfinity;
      for (const term& each : terms) {
        if (each.feature != r) continue;
        top = each.logarithm > top || std::isnan(each.logarithm) ? each.logarithm : top;
      }
      const number scale = found(0) + found(1);
      const number unit = sizeof(T) == 8 ? 0x1p-50L : 0x1p-45L;
      if (std::isfinite(top)) {
        SUBQUAD_CHECK(std::abs(scale - top) <= unit * (1 + std::abs(top)));
        SUBQUAD_CHECK(std::abs(found(1)) <= std::abs(found(0)) * kUnit(sizeof(T)));
      } else {
        SUBQUAD_CHECK(scale == top || std::isnan(scale) == std::isnan(top));
      }
      number total = 0;
      for (const term& each : terms) {
        if (each.feature == r) total += one.mass(each) * std::exp(each.logarithm - scale);
      }
      expect("Z", static_cast<T>(found(2) + found(3)), total, std::abs(total), std::abs(scale),
             p.of, joined(b, {r}));
      number decay = 0;
      const int last = one.last_run();
      if (p.of.has_state && last == 0) decay = one.state(4, r);
      for (std::int64_t t = 0; t < p.of.n; ++t) {
        if (one.run(t) == last) decay += one.decay(t, r);
      }
      if (decay != found(4)) {
        SUBQUAD_CHECK(std::abs(decay - found(4)) <= 2 * kUnit(sizeof(T)) * (1 + std::abs(decay)));
      }
      for (std::int64_t c = 0; c < p.of.d_v; ++c) {
        number sum = 0;
        number size = 0;
        for (const term& each : terms) {
          if (each.feature != r) continue;
          const number product = std::exp(each.logarithm - scale) * one.value_of(each, c);
          sum += product;
          size += std::abs(product);
        }
        const T high = out.value_sums(joined(b, {0, r, c}));
        const T low = out.value_sums(joined(b, {1, r, c}));
        expect("S", static_cast<T>(high + low), sum, size, std::abs(scale), p.of,
               joined(b, {r, c}));
        if (std::isfinite(high)) {
          SUBQUAD_CHECK(std::abs(low) <= std::abs(high) * static_cast<T>(kUnit(sizeof(T))));
        }
      }
    }
  });
}

template <class T>
void check(const problem<T>& p, const wanted& which = {}) {
  const outputs<T> out(p.of);
  run(p, out, which);
  if (which.log_q && (which.y || which.log_z)) check_rows(p, out, which);
  if (which.state) check_state(p, out);
  SUBQUAD_CHECK(out.y.gaps_untouched() && out.log_z.gaps_untouched() &&
                out.key_sums.gaps_untouched() && out.value_sums.gaps_untouched());
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
  for (const std::int64_t n : {0, 1, 64, 65, 150}) {
    check<T>(sized(n, 5, 3));
    check<T>(sized(n, 5, 3, false));
  }
  check<T>(sized(70, 64, 64));
  check<T>(sized(66, 33, 65));
  check<T>(sized(66, 70, 2));
  check<T>(sized(20, 130, 1));
  check<T>(sized(5, 0, 3));
  check<T>(sized(5, 3, 0));
  check<T>(sized(70, 3, 0, false));
  form f = sized(70, 6, 4, false);
  for (const std::int64_t n_q : {0, 1, 64, 130}) {
    f.n_q = n_q;
    check<T>(f);
  }
  f.n = 0;
  check<T>(f);
  f.has_state = true;
  check<T>(f);
}

template <class T>
void check_scales() {
  for (const bool causal : {true, false}) {
    for (const double scale : {0.1, 4.0, 30.0, 1e4}) {
      form f = sized(75, 9, 4, causal);
      f.scale = scale;
      check<T>(f);
      f.has_state = true;
      f.kept = 0.8;
      f.run = 50;
      check<T>(f);
    }
  }
}

template <class T>
void check_options(int step) {
  for (const bool causal : {true, false}) {
    for (int options = 0; options < 8; options += step) {
      form f = sized(100, 6, 5, causal);
      f.kept = options & 1 ? 0.5 : 1;
      f.has_state = options & 2;
      f.run = options & 4 ? 11 : 0;
      f.empty_is_nan = options & 1;
      check<T>(f);
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
  form f = sized(10, 3, 2);
  f.batch = f.k_batch = f.v_batch = f.q_batch = f.mask_batch = {4};
  f.inputs = layout::repeated;
  check<T>(f);
  f.batch = f.k_batch = f.v_batch = f.q_batch = f.mask_batch = {0};
  f.inputs = layout::contiguous;
  check<T>(f);
}

// Runs that start where chunks do.
template <class T>
void check_borders() {
  for (const bool causal : {true, false}) {
    form f = sized(200, 4, 3, causal);
    f.has_state = true;
    f.decay = causal ? 0.05 : -1;
    f.run = 1;
    const problem<T> p(f);
    p.segments.each([&](std::int64_t& e, const shape& at) {
      e = at[0] < 64 ? 5 : at[0] < 128 ? 2 : at[0] < 150 ? 9 : 1;
    });
    check(p);
    p.segments.each([&](std::int64_t& e, const shape& at) { e = at[0] >= 64; });
    check(p);
  }
}

template <class T>
void check_absent_outputs() {
  form f = sized(66, 3, 2);
  f.has_state = true;
  f.run = 30;
  for (const bool causal : {true, false}) {
    f.causal = causal;
    for (int which = 0; which < 8; ++which) {
      check<T>(f, {(which & 1) != 0, (which & 2) != 0, (which & 4) != 0, true});
    }
    check<T>(f, {false, false, true, false});
  }
}

// Sub-ranges of a ramp reach any height above what earlier rows attend.
template <class T>
void check_ramps() {
  for (const double slope : {3.0, -31.0, 1000.0}) {
    for (const bool has_state : {false, true}) {
      form f = sized(80, 4, 3);
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
  const problem<T> jumps(sized(100, 4, 3));
  jumps.log_k.each([&](T& e, const shape& at) {
    e += static_cast<T>(at[0] < 20 ? -1e4 : at[0] < 75 ? 0.0 : 1e4);
  });
  check(jumps);
}

template <class T>
void check_nothing() {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (const bool causal : {true, false}) {
    form f = sized(100, 5, 3, causal);
    f.has_state = causal;
    const problem<T> p(f);
    p.log_k.each([&](T& e, const shape& at) {
      if (at[0] % 7 == 3 || (at[0] < 40 && at[1] == 2)) e = kNone;
      if (at[0] == 10) e = kNone;
    });
    p.v.each([&](T& e, const shape& at) {
      if (at[0] == 10) e = nan;
    });
    p.log_q.each([&](T& e, const shape& at) {
      if (at[0] == 50 || at[1] == at[0] % 5) e = kNone;
    });
    p.key_sums.each([&](T& e, const shape& at) {
      if (at[1] == 1) e = at[0] == 0 ? kNone : T(0);
    });
    check(p);
    // All of it.
    p.log_k.each([&](T& e, const shape&) { e = kNone; });
    p.v.each([&](T& e, const shape&) { e = nan; });
    check(p);
  }
  // Removed keys first, whatever they hold.
  form f = sized(140, 5, 3);
  f.kept = 0.999;
  const problem<T> padded(f);
  padded.key_mask.each([&](std::uint8_t& e, const shape& at) { e = at[0] >= 70; });
  padded.v.each([&](T& e, const shape& at) {
    if (at[0] < 70) e = nan;
  });
  padded.log_k.each([&](T& e, const shape& at) {
    if (at[0] < 70) e = nan;
  });
  check(padded);
}

// Tensor cores have what is in range.
template <class T>
void check_paths() {
  form f = sized(200, 16, 8);
  for (const bool causal : {true, false}) {
    for (const double scale : {1.0, 1e5}) {
      f.causal = causal;
      f.scale = scale;
      f.decay = causal && scale < 2 ? 0.05 : -1;
      f.run = causal ? 40 : 0;
      const problem<T> p(f);
      const std::int64_t plain = run(p, outputs<T>(p.of));
      SUBQUAD_CHECK(plain == (causal && scale > 2 ? 4 : 0));
    }
  }
}

// NaN and infinities reach the rows that attend them, and no others.
template <class T>
void check_locality() {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const T infinity = std::numeric_limits<T>::infinity();
  for (const int kind : {0, 1, 2, 3, 4, 5}) {
    for (const bool causal : {true, false}) {
      form f = sized(150, 5, 3, causal);
      f.run = 1;
      const problem<T> p(f);
      p.segments.each([&](std::int64_t& e, const shape& at) { e = at[0] < 30 ? 0 : at[0] < 120; });
      const std::int64_t token = 40;
      if (kind == 0) p.v({token, 1}) = nan;
      if (kind == 1) p.v({token, 1}) = infinity;
      if (kind == 2) p.log_k({token, 2}) = nan;
      if (kind == 3) p.log_q({token, 2}) = nan;
      if (kind == 4) p.v({token, 1}) = std::numeric_limits<T>::max();
      // A weight that is too small for T is a weight.
      if (kind == 5) {
        p.v({token, 1}) = nan;
        for (std::int64_t r = 0; r < f.d_k; ++r) p.log_k({token, r}) = -3000;
      }
      f = p.of;
      const outputs<T> out(f);
      run(p, out);
      for (std::int64_t t = 0; t < f.n; ++t) {
        for (std::int64_t c = 0; c < f.d_v; ++c) {
          const bool attends = (causal ? t >= token : t >= 30) && t < 120;
          const bool expected = kind == 3 ? t == token : attends && (kind == 2 || c == 1);
          const T y = out.y({t, c});
          if (expected && kind == 1) {
            SUBQUAD_CHECK(y == infinity);
          } else if (expected && kind == 4) {
            SUBQUAD_CHECK(std::abs(y) > std::numeric_limits<T>::max() / 1000);
          } else {
            SUBQUAD_CHECK(std::isnan(y) == expected);
          }
        }
      }
    }
  }
  // A key of +inf: its rows have no values, and their sum is infinite.
  const problem<T> p(sized(80, 5, 3));
  p.log_k({66, 2}) = infinity;
  const outputs<T> out(p.of);
  run(p, out);
  for (std::int64_t t = 0; t < 80; ++t) {
    SUBQUAD_CHECK(std::isnan(out.y({t, 0})) == (t >= 66));
    SUBQUAD_CHECK((out.log_z({t}) == infinity) == (t >= 66));
  }
}

// A decay of -inf forgets a feature, whatever it held.
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
    // All features at once, and keys and values that are not numbers before.
    p.log_decay.each([&](T& e, const shape& at) {
      if (at[0] == 20 || at[0] == 90) e = kNone;
    });
    p.log_k({10, 1}) = std::numeric_limits<T>::quiet_NaN();
    p.log_k({70, 1}) = std::numeric_limits<T>::infinity();
    p.v({72, 2}) = std::numeric_limits<T>::quiet_NaN();
    const outputs<T> out(p.of);
    run(p, out);
    for (std::int64_t t = 0; t < f.n; ++t) {
      const bool is_nan = (t >= 10 && t < 20) || (t >= 70 && t < 90);
      SUBQUAD_CHECK(std::isnan(out.y({t, 0})) == is_nan);
    }
    check_state(p, out);
  }
}

// Any split of a sequence gives what one call gives.
template <class T>
void check_splits() {
  form f = sized(200, 6, 4);
  f.decay = 0.02;
  f.scale = 3;
  const problem<T> whole(f);
  f = whole.of;
  const outputs<T> at_once(f);
  run(whole, at_once);
  const outputs<T> before(f);
  std::int64_t first = 0;
  for (const std::int64_t n : {1, 70, 64, 65}) {
    form part = f;
    part.n = part.n_q = n;
    part.has_state = first > 0;
    const problem<T> p(part);
    const auto copy = [&](const strided_array<T>& to, const strided_array<T>& from) {
      to.each([&](T& e, const shape& at) { e = from({at[0] + first, at[1]}); });
    };
    copy(p.log_k, whole.log_k);
    copy(p.log_q, whole.log_q);
    copy(p.v, whole.v);
    copy(p.log_decay, whole.log_decay);
    if (first > 0) {
      p.key_sums.each([&](T& e, const shape& at) { e = before.key_sums(at); });
      p.value_sums.each([&](T& e, const shape& at) { e = before.value_sums(at); });
    }
    const outputs<T> out(part);
    run(p, out);
    out.y.each([&](T& e, const shape& at) {
      SUBQUAD_CHECK(std::abs(e - at_once.y({at[0] + first, at[1]})) <= 2 * T(kTolerance<T>));
    });
    out.key_sums.each([&](T& e, const shape& at) { before.key_sums(at) = e; });
    out.value_sums.each([&](T& e, const shape& at) { before.value_sums(at) = e; });
    first += n;
  }
  at_once.key_sums.each([&](T& e, const shape& at) {
    if (at[0] % 2 == 1 && at[0] < 4) return;
    SUBQUAD_CHECK(std::abs(e - before.key_sums(at)) <= T(kTolerance<T>) * std::abs(e));
  });
}

// Chunks that each are less than what rounding takes from the state.
template <class T>
void check_small_additions() {
  form f = sized(64 * 20, 1, 1);
  f.has_state = true;
  const problem<T> p(f);
  const T large = static_cast<T>(sizeof(T) == 8 ? 0x1p60 : 0x1p31);
  p.log_k.each([&](T& e, const shape&) { e = 0; });
  p.v.each([&](T& e, const shape&) { e = 1; });
  p.key_sums.each([&](T& e, const shape& at) { e = at[0] == 2 ? large : T(0); });
  p.value_sums.each([&](T& e, const shape& at) { e = at[0] == 0 ? large : T(0); });
  const outputs<T> out(p.of);
  run(p, out, {false, false, true, true});
  SUBQUAD_CHECK((out.key_sums({2, 0}) - large) + out.key_sums({3, 0}) == T(64 * 20));
  SUBQUAD_CHECK((out.value_sums({0, 0, 0}) - large) + out.value_sums({1, 0, 0}) == T(64 * 20));
}

// A scale that decays over many chunks keeps what rounding takes from it.
template <class T>
void check_decaying_scale() {
  form f = sized(64 * 20, 1, 1);
  f.has_state = true;
  f.decay = 1;
  const problem<T> p(f);
  p.log_k.each([&](T& e, const shape&) { e = -std::numeric_limits<T>::infinity(); });
  p.key_sums.each([&](T& e, const shape& at) {
    if (at[0] == 0) e = static_cast<T>(0x1p22);
  });
  number scale = static_cast<number>(p.key_sums({0, 0})) + static_cast<number>(p.key_sums({1, 0}));
  p.log_decay.each([&](T& e, const shape&) { scale += static_cast<number>(e); });
  const outputs<T> out(p.of);
  run(p, out, {false, false, true, true});
  const number found =
      static_cast<number>(out.key_sums({0, 0})) + static_cast<number>(out.key_sums({1, 0}));
  // Decays of a chunk are added in float64.
  SUBQUAD_CHECK(std::abs(found - scale) <= (sizeof(T) == 8 ? 20 * 64 * 0x1p-53L * 64 : 0x1p-26L));
}

void check_errors() {
  const problem<float> p(sized(4, 3, 2));
  const outputs<float> out(p.of);
  const array_view views[] = {p.log_k.view(), p.v.view(), p.log_q.view(), out.y.view()};
  const strided_array<std::uint8_t> memory({8});
  SUBQUAD_CHECK((checks::throws<subquad::invalid_argument>(
      [&] {
        subquad::core::linear_attention(views[0], views[1], &views[2], nullptr, nullptr, nullptr,
                                        nullptr, nullptr, true, false, &views[3], nullptr, nullptr,
                                        nullptr, memory.view());
      },
      "workspace")));
}

template <class T>
void check_all() {
  check_sizes<T>();
  check_scales<T>();
  check_options<T>(sizeof(T) == 8 ? 3 : 1);
  check_layouts<T>();
  check_borders<T>();
  check_absent_outputs<T>();
  check_ramps<T>();
  check_nothing<T>();
  check_locality<T>();
  check_forgetting<T>();
  check_splits<T>();
  check_small_additions<T>();
  check_decaying_scale<T>();
  check_paths<T>();
}

}  // namespace

int main() {
  subquad::cuda::on_host::in_every_order(
      [] {
        check_all<float>();
        check_all<double>();
        check_errors();
      },
      [] {
        check_options<float>(3);
        check<float>(sized(130, 5, 3, false));
      });
  std::printf("worst: float32 %.3g, float64 %.3g\n", worst_seen[0], worst_seen[1]);
  return checks::status();
}
