// Errors in units of the last place of the vector mathematics, at every level this machine runs,
// against long double. Prints the greatest of each function; fails above the budget, and where a
// special value is not exact.
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.hpp"
#include "vector_math_kernels.hpp"

namespace subquad {
SUBQUAD_FOR_EACH_ISA(SUBQUAD_DETAIL_DECLARE_KERNELS, vector_math)
}  // namespace subquad

namespace {

constexpr long double kBudget = 1.0L;
constexpr std::size_t kBlock = 4096;
constexpr long double kHalfPi = 1.5707963267948966192313L;

struct level {
  const char* name;
  const subquad::vector_math_kernels* table;
};

std::vector<level> supported_levels() {
  std::vector<level> levels;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v2")) {
    levels.push_back({"v2", &subquad::v2::kernels_vector_math});
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    levels.push_back({"v3", &subquad::v3::kernels_vector_math});
  }
  if (__builtin_cpu_supports("x86-64-v4")) {
    levels.push_back({"v4", &subquad::v4::kernels_vector_math});
  }
#else
  levels.push_back({"neon", &subquad::neon::kernels_vector_math});
#endif
  return levels;
}

template <class T>
using kernel = void (*)(const T*, T*, std::int64_t);

template <class T>
struct bits_type;
template <>
struct bits_type<float> {
  using type = std::uint32_t;
};
template <>
struct bits_type<double> {
  using type = std::uint64_t;
};

template <class T>
T from_bits(typename bits_type<T>::type bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
typename bits_type<T>::type to_bits(T value) {
  typename bits_type<T>::type bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// |got - truth| in units of the last place of T at truth; infinity counts as the power of two that
// follows the greatest number.
template <class T>
long double ulps(T got, long double truth) {
  using limits = std::numeric_limits<T>;
  if (std::isnan(truth)) return std::isnan(got) ? 0.0L : limits::infinity();
  if (std::isnan(got)) return limits::infinity();
  const long double beyond = std::ldexp(1.0L, limits::max_exponent);
  if (std::isinf(got) && std::isinf(truth)) {
    return (got > 0) == (truth > 0) ? 0.0L : limits::infinity();
  }
  if (std::isinf(got) && std::fabs(truth) >= beyond) return 0.0L;
  const long double value = std::isinf(got) ? std::copysign(beyond, got) : got;
  if (value == truth) return 0.0L;
  int exponent = limits::min_exponent;
  if (truth != 0) {
    std::frexp(truth, &exponent);
    if (exponent < limits::min_exponent) exponent = limits::min_exponent;
    if (exponent > limits::max_exponent) exponent = limits::max_exponent;
  }
  return std::fabs(value - truth) / std::ldexp(1.0L, exponent - limits::digits);
}

template <class T>
struct function {
  const char* name;
  kernel<T> subquad::vector_math_kernels::* member;
  long double (*truth)(long double);
};

template <class T>
long double exp2_or_zero(long double t) {
  // A power that would be subnormal by more than a half is promised to be 0.
  return t <= std::numeric_limits<T>::min_exponent - 1.5L ? 0.0L : std::exp2(t);
}

long double sine(long double x) { return std::sin(x); }
long double cosine(long double x) { return std::cos(x); }

template <class T>
std::vector<function<T>> functions();

template <>
std::vector<function<float>> functions<float>() {
  using table = subquad::vector_math_kernels;
  return {{"exp", &table::exp_f32, [](long double x) { return std::exp(x); }},
          {"log", &table::log_f32, [](long double x) { return std::log(x); }},
          {"log1p", &table::log1p_f32, [](long double x) { return std::log1p(x); }},
          {"exp2_bounded", &table::exp2_bounded_f32, exp2_or_zero<float>},
          {"sin_bounded", &table::sin_bounded_f32, sine},
          {"cos_bounded", &table::cos_bounded_f32, cosine}};
}

template <>
std::vector<function<double>> functions<double>() {
  using table = subquad::vector_math_kernels;
  return {{"exp", &table::exp_f64, [](long double x) { return std::exp(x); }},
          {"log", &table::log_f64, [](long double x) { return std::log(x); }},
          {"log1p", &table::log1p_f64, [](long double x) { return std::log1p(x); }},
          {"exp2_bounded", &table::exp2_bounded_f64, exp2_or_zero<double>},
          {"sin_bounded", &table::sin_bounded_f64, sine},
          {"cos_bounded", &table::cos_bounded_f64, cosine}};
}

template <class T>
constexpr T kGreatestBounded = sizeof(T) == 4 ? T{120} : T{1000};

template <class T>
constexpr T kGreatestTurned = T{1647099};

// Whether f is asked for values of x.
template <class T>
bool takes(const function<T>& f, T x) {
  if (f.truth == &exp2_or_zero<T>) return !(x > kGreatestBounded<T>);
  if (f.truth == &sine || f.truth == &cosine) return !(std::abs(x) > kGreatestTurned<T>);
  return true;
}

// Feeds values to one function at every level, block by block, and keeps the greatest errors.
template <class T>
class sweep {
 public:
  sweep(const function<T>& f, const std::vector<level>& levels)
      : function_(f), levels_(levels), worst_(levels.size(), 0.0L), worst_at_(levels.size()) {
    x_.reserve(kBlock);
  }

  void add(T x) {
    if (!takes(function_, x)) return;
    x_.push_back(x);
    if (x_.size() == kBlock) flush();
  }

  void flush() {
    std::vector<long double> truth(x_.size());
    for (std::size_t i = 0; i < x_.size(); ++i) truth[i] = function_.truth(x_[i]);
    std::vector<T> out(x_.size());
    for (std::size_t l = 0; l < levels_.size(); ++l) {
      (levels_[l].table->*function_.member)(x_.data(), out.data(),
                                            static_cast<std::int64_t>(x_.size()));
      for (std::size_t i = 0; i < x_.size(); ++i) {
        const long double error = ulps(out[i], truth[i]);
        if (error > worst_[l]) {
          worst_[l] = error;
          worst_at_[l] = x_[i];
        }
      }
    }
    count_ += x_.size();
    x_.clear();
  }

  // Prints a line a level; the number of levels above the budget.
  int report() const {
    int failures = 0;
    for (std::size_t l = 0; l < levels_.size(); ++l) {
      std::printf("%-13s float%-3d %-5s %7.4Lf  at % .17g (%a)  of %" PRIu64 "\n", function_.name,
                  static_cast<int>(8 * sizeof(T)), levels_[l].name, worst_[l],
                  static_cast<double>(worst_at_[l]), static_cast<double>(worst_at_[l]), count_);
      if (!(worst_[l] <= kBudget)) ++failures;
    }
    return failures;
  }

 private:
  function<T> function_;
  const std::vector<level>& levels_;
  std::vector<T> x_;
  std::vector<long double> worst_;
  std::vector<T> worst_at_;
  std::uint64_t count_ = 0;
};

template <class T>
void add_line(sweep<T>& s, long double from, long double to, int steps) {
  for (int i = 0; i <= steps; ++i) s.add(static_cast<T>(from + (to - from) * i / steps));
}

// The neighbours of a value, whose bits follow each other.
template <class T>
void add_neighbours(sweep<T>& s, T value, int radius) {
  T x = value;
  for (int i = 0; i < radius; ++i) {
    s.add(x);
    x = std::nextafter(x, std::numeric_limits<T>::infinity());
  }
  x = value;
  for (int i = 0; i < radius; ++i) {
    s.add(x);
    x = std::nextafter(x, -std::numeric_limits<T>::infinity());
  }
}

// Bit patterns at equal distances: about a million of them.
template <class T>
void add_patterns(sweep<T>& s) {
  using bits = typename bits_type<T>::type;
  const bits stride = sizeof(T) == 4 ? bits{4099} : static_cast<bits>(0x000010c6f7a0b5ed);
  const std::uint64_t count = std::numeric_limits<bits>::max() / stride;
  bits pattern = 0;
  for (std::uint64_t i = 0; i <= count; ++i) {
    s.add(from_bits<T>(pattern));
    pattern = static_cast<bits>(pattern + stride);
  }
}

template <class T>
void add_interesting(sweep<T>& s) {
  using limits = std::numeric_limits<T>;
  const bool single = sizeof(T) == 4;
  const long double low = single ? -104.5L : -747.0L;
  const long double high = single ? 89.5L : 711.0L;
  add_line<T>(s, low, high, 400000);
  add_line<T>(s, low, low * 0.8L, 100000);  // subnormal results of exp
  add_line<T>(s, high * 0.98L, high, 50000);
  add_line<T>(s, low * 1.5L, kGreatestBounded<T>, 300000);
  add_line<T>(s, -1.0L, 1.0L, 400000);
  add_line<T>(s, 0.25L, 4.0L, 400000);
  add_line<T>(s, 0.99L, 1.01L, 100000);
  add_line<T>(s, -0.01L, 0.01L, 100000);
  const long double root_half = std::sqrt(0.5L);
  for (long double centre :
       {0.0L, 1.0L, -1.0L, root_half, root_half - 1, 2 * root_half, 2 * root_half - 1,
        std::log(2.0L) / 2, -std::log(2.0L) / 2, 0.5L, -0.5L}) {
    add_neighbours<T>(s, static_cast<T>(centre), 10000);
  }
  for (int exponent = limits::min_exponent - limits::digits; exponent < limits::max_exponent;
       ++exponent) {
    for (long double factor : {1.0L, root_half, -1.0L}) {
      add_neighbours<T>(s, static_cast<T>(std::ldexp(factor, exponent)), 20);
    }
  }
  const int least = limits::min_exponent - limits::digits - 2;
  for (int k = least; k <= limits::max_exponent; ++k) {  // where exponents change in exp and 2^t
    add_neighbours<T>(s, static_cast<T>((k + 0.5L) * std::log(2.0L)), 20);
    add_neighbours<T>(s, static_cast<T>(k * std::log(2.0L)), 20);
    add_neighbours<T>(s, static_cast<T>(k + 0.5L), 20);
    add_neighbours<T>(s, static_cast<T>(k), 20);
  }
  for (int k = 0; k < 1048576; k += k < 2000 ? 1 : 997) {  // zeros of the sine and the cosine
    for (int sign : {1, -1}) add_neighbours<T>(s, static_cast<T>(sign * k * kHalfPi), 3);
  }
  for (T edge : {limits::max(), limits::lowest(), limits::min(), limits::denorm_min()}) {
    add_neighbours<T>(s, edge, 1000);
  }
}

// The value itself, or any NaN for NaN.
template <class T>
bool same(T got, T expected) {
  return std::isnan(expected) ? std::isnan(got) : to_bits(got) == to_bits(expected);
}

template <class T>
struct special {
  const char* name;
  kernel<T> subquad::vector_math_kernels::* member;
  T x;
  T expected;
};

template <class T>
int check_special_values(const std::vector<level>& levels) {
  using limits = std::numeric_limits<T>;
  const auto f = functions<T>();
  const auto exp = f[0].member;
  const auto log = f[1].member;
  const auto log1p = f[2].member;
  const auto exp2_bounded = f[3].member;
  const auto sin_bounded = f[4].member;
  const auto cos_bounded = f[5].member;
  const T infinity = limits::infinity();
  const T nan = limits::quiet_NaN();
  const T tiny = limits::denorm_min();
  const T least_exponent = limits::min_exponent - 1;
  const T first_zero = sizeof(T) == 4 ? T(-103.98) : T(-745.14);
  const T first_infinity = sizeof(T) == 4 ? T(88.7229) : T(709.7828);
  const special<T> cases[] = {
      {"exp", exp, 0, 1},
      {"exp", exp, -T{0}, 1},
      {"exp", exp, tiny, 1},
      {"exp", exp, -tiny, 1},
      {"exp", exp, infinity, infinity},
      {"exp", exp, -infinity, 0},
      {"exp", exp, nan, nan},
      {"exp", exp, -nan, nan},
      {"exp", exp, limits::max(), infinity},
      {"exp", exp, limits::lowest(), 0},
      {"exp", exp, first_zero, 0},
      {"exp", exp, first_infinity, infinity},
      {"log", log, 1, 0},
      {"log", log, 0, -infinity},
      {"log", log, -T{0}, -infinity},
      {"log", log, infinity, infinity},
      {"log", log, -infinity, nan},
      {"log", log, -1, nan},
      {"log", log, -tiny, nan},
      {"log", log, limits::lowest(), nan},
      {"log", log, nan, nan},
      {"log", log, -nan, nan},
      {"log1p", log1p, 0, 0},
      {"log1p", log1p, -T{0}, -T{0}},
      {"log1p", log1p, tiny, tiny},
      {"log1p", log1p, -tiny, -tiny},
      {"log1p", log1p, limits::min(), limits::min()},
      {"log1p", log1p, -limits::min(), -limits::min()},
      {"log1p", log1p, -1, -infinity},
      {"log1p", log1p, std::nextafter(T{-1}, T{-2}), nan},
      {"log1p", log1p, limits::lowest(), nan},
      {"log1p", log1p, infinity, infinity},
      {"log1p", log1p, -infinity, nan},
      {"log1p", log1p, nan, nan},
      {"log1p", log1p, -nan, nan},
      {"exp2_bounded", exp2_bounded, 0, 1},
      {"exp2_bounded", exp2_bounded, -T{0}, 1},
      {"exp2_bounded", exp2_bounded, 1, 2},
      {"exp2_bounded", exp2_bounded, -1, T{0.5}},
      {"exp2_bounded", exp2_bounded, kGreatestBounded<T>,
       static_cast<T>(std::exp2(static_cast<long double>(kGreatestBounded<T>)))},
      {"exp2_bounded", exp2_bounded, least_exponent, limits::min()},
      {"exp2_bounded", exp2_bounded, least_exponent - T{0.5}, 0},
      {"exp2_bounded", exp2_bounded, least_exponent - 1, 0},
      {"exp2_bounded", exp2_bounded, least_exponent - 2, 0},
      {"exp2_bounded", exp2_bounded, limits::lowest(), 0},
      {"exp2_bounded", exp2_bounded, -infinity, 0},
      {"exp2_bounded", exp2_bounded, nan, nan},
      {"exp2_bounded", exp2_bounded, -nan, nan},
      {"sin_bounded", sin_bounded, 0, 0},
      {"sin_bounded", sin_bounded, -T{0}, -T{0}},
      {"sin_bounded", sin_bounded, tiny, tiny},
      {"sin_bounded", sin_bounded, -tiny, -tiny},
      {"sin_bounded", sin_bounded, infinity, nan},
      {"sin_bounded", sin_bounded, -infinity, nan},
      {"sin_bounded", sin_bounded, nan, nan},
      {"cos_bounded", cos_bounded, 0, 1},
      {"cos_bounded", cos_bounded, -T{0}, 1},
      {"cos_bounded", cos_bounded, tiny, 1},
      {"cos_bounded", cos_bounded, infinity, nan},
      {"cos_bounded", cos_bounded, -infinity, nan},
      {"cos_bounded", cos_bounded, nan, nan},
  };
  int failures = 0;
  for (const level& l : levels) {
    for (const special<T>& c : cases) {
      // Every position of the widest vector and of a tail: a special value disturbs no neighbour.
      for (int n : {1, 3, 16, 35}) {
        for (int position = 0; position < n; ++position) {
          std::vector<T> x(n, T{1});
          std::vector<T> out(n + 1, T{-77});
          std::vector<T> ordinary(n, T{0});
          (l.table->*c.member)(x.data(), ordinary.data(), n);
          x[position] = c.x;
          (l.table->*c.member)(x.data(), out.data(), n);
          bool right = same(out[position], c.expected) && out[n] == T{-77};
          for (int i = 0; i < n; ++i) right = right && (i == position || same(out[i], ordinary[i]));
          if (!right) {
            std::printf("%s float%d %s: of %a is %a, expected %a (element %d of %d)\n", c.name,
                        static_cast<int>(8 * sizeof(T)), l.name, static_cast<double>(c.x),
                        static_cast<double>(out[position]), static_cast<double>(c.expected),
                        position, n);
            ++failures;
          }
        }
      }
    }
  }
  return failures;
}

// Any length gives each element the bits that it has in a long array, in place too.
template <class T>
int check_lengths(const std::vector<level>& levels) {
  int failures = 0;
  std::vector<T> x(67);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = T(0.37) * static_cast<T>(i) + T(0.01);
  for (const function<T>& f : functions<T>()) {
    for (const level& l : levels) {
      std::vector<T> all(x.size());
      (l.table->*f.member)(x.data(), all.data(), static_cast<std::int64_t>(x.size()));
      for (std::size_t n = 0; n <= 65; ++n) {
        std::vector<T> out(n + 1, T{-77});
        (l.table->*f.member)(x.data(), out.data(), static_cast<std::int64_t>(n));
        std::vector<T> in_place(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(n));
        (l.table->*f.member)(in_place.data(), in_place.data(), static_cast<std::int64_t>(n));
        bool right = out[n] == T{-77};
        for (std::size_t i = 0; i < n; ++i) {
          right = right && same(out[i], all[i]) && same(in_place[i], all[i]);
        }
        if (!right) {
          std::printf("%s float%d %s: wrong at length %zu\n", f.name,
                      static_cast<int>(8 * sizeof(T)), l.name, n);
          ++failures;
        }
      }
    }
  }
  return failures;
}

// gelu is promised in ulp, its derivative relative to its terms' magnitudes.
template <class T>
int check_gelu(const std::vector<level>& levels) {
  using limits = std::numeric_limits<T>;
  using table = subquad::vector_math_kernels;
  kernel<T> table::* gelu;
  kernel<T> table::* derivative;
  if constexpr (sizeof(T) == 4) {
    gelu = &table::gelu_f32;
    derivative = &table::gelu_derivative_f32;
  } else {
    gelu = &table::gelu_f64;
    derivative = &table::gelu_derivative_f64;
  }
  constexpr long double kAbove = 3.5L;
  constexpr long double kBelow = 12.0L;
  constexpr long double kDerivative = 2.5L;
  const double far = sizeof(T) == 4 ? 16 : 40;  // the result is 0 before
  std::vector<T> x = {0, -T{0}};
  for (int i = -100000; i <= 100000; ++i) {
    x.push_back(static_cast<T>(far * i / 100000));
    x.push_back(static_cast<T>(3.0 * i / 100000));
  }
  for (int exponent = limits::min_exponent - limits::digits; exponent < limits::max_exponent;
       ++exponent) {
    for (const T sign : {T{1}, T{-1}}) {
      for (const T factor : {T{1}, static_cast<T>(1.3), static_cast<T>(1.7)})
        x.push_back(std::ldexp(sign * factor, exponent));
    }
  }
  const auto n = static_cast<std::int64_t>(x.size());
  std::vector<long double> probability(x.size());
  std::vector<long double> slope(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double z = x[i];
    probability[i] = std::erfc(-z / std::sqrt(2.0L)) / 2;
    slope[i] = z * std::exp(-z * z / 2) * 0.398942280401432677939946L;
  }
  int failures = 0;
  for (const level& l : levels) {
    std::vector<T> out(x.size());
    std::vector<T> slopes(x.size());
    (l.table->*gelu)(x.data(), out.data(), n);
    (l.table->*derivative)(x.data(), slopes.data(), n);
    long double above = 0;
    long double below = 0;
    long double worst = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      long double& side = x[i] < 0 ? below : above;
      side = std::fmax(side, ulps(out[i], x[i] * probability[i]));
      const long double bound = limits::epsilon() * (probability[i] + std::fabs(slope[i]));
      const long double error = std::fabs(slopes[i] - (probability[i] + slope[i]));
      worst = std::fmax(worst, std::fmax(0.0L, error - 3 * limits::denorm_min()) / bound);
    }
    std::printf("%-13s float%-3d %-5s %7.4Lf above 0, %.4Lf below; derivative %.4Lf\n", "gelu",
                static_cast<int>(8 * sizeof(T)), l.name, above, below, worst);
    failures += !(above <= kAbove) + !(below <= kBelow) + !(worst <= kDerivative);

    const T infinity = limits::infinity();
    const std::vector<T> special = {infinity, -infinity,     limits::quiet_NaN(), T{0},
                                    -T{0},    limits::max(), limits::lowest()};
    const std::vector<T> values = {infinity, 0, limits::quiet_NaN(), 0, 0, limits::max(), 0};
    const std::vector<T> derivatives = {1, 0, limits::quiet_NaN(), T{0.5}, T{0.5}, 1, 0};
    std::vector<T> found(special.size());
    std::vector<T> found_slopes(special.size());
    (l.table->*gelu)(special.data(), found.data(), static_cast<std::int64_t>(special.size()));
    (l.table->*derivative)(special.data(), found_slopes.data(),
                           static_cast<std::int64_t>(special.size()));
    for (std::size_t i = 0; i < special.size(); ++i) {
      const bool is_nan = std::isnan(special[i]);
      bool right = is_nan ? std::isnan(found[i]) && std::isnan(found_slopes[i])
                          : found[i] == values[i] && found_slopes[i] == derivatives[i];
      right = right && (special[i] != 0 || std::signbit(found[i]) == std::signbit(special[i]));
      if (right) continue;
      std::printf("gelu float%d %s: of %a is %a and %a\n", static_cast<int>(8 * sizeof(T)), l.name,
                  static_cast<double>(special[i]), static_cast<double>(found[i]),
                  static_cast<double>(found_slopes[i]));
      ++failures;
    }
  }
  return failures;
}

template <class T>
int check_type(const std::vector<level>& levels) {
  int failures = check_special_values<T>(levels) + check_lengths<T>(levels) + check_gelu<T>(levels);
  for (const function<T>& f : functions<T>()) {
    sweep<T> s(f, levels);
    add_patterns(s);
    add_interesting(s);
    s.flush();
    failures += s.report();
  }
  return failures;
}

}  // namespace

int main() {
  const std::vector<level> levels = supported_levels();
  std::printf("function      type     level max ulp\n");
  const int failures = check_type<float>(levels) + check_type<double>(levels);
  if (failures != 0) std::printf("%d failures (budget %.1Lf ulp)\n", failures, kBudget);
  return failures == 0 ? 0 : 1;
}
