// Products of sparse factors and their reverse, at every instruction set, against the definition in
// long double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "strided_array.hpp"
#include "subquad/factors.hpp"
#include "subquad/threads.hpp"

namespace {

using checks::layout;
using checks::strided_array;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// How an input follows the batch: an element of its own, one for all through a stride of 0, through
// a length of 1, or through a dimension less.
enum class sharing { own, stride, length, rank };

struct problem {
  std::int64_t batch = 1;
  std::int64_t n = 1;
  std::int64_t d = 3;
  std::vector<std::vector<std::int64_t>> offsets;  // K of each factor
  std::int64_t k = 0;
  std::int32_t residual = SUBQUAD_RESIDUAL_NONE;
  bool circular = true;
  std::vector<std::int64_t> segments{};
  layout how = layout::contiguous;
  sharing factors = sharing::own;
  sharing rows = sharing::own;

  std::int64_t n_factors() const { return static_cast<std::int64_t>(offsets.size()); }
  std::int64_t kept() const { return n_factors() > 1 ? n_factors() - 1 : 0; }

  // The row of term k of row i of factor m, -1 where it is left out.
  std::int64_t row(std::int64_t m, std::int64_t i, std::int64_t term) const {
    std::int64_t first = 0;
    std::int64_t last = n;
    if (!segments.empty()) {
      const auto same = [&](std::int64_t j) {
        return segments[static_cast<std::size_t>(j)] == segments[static_cast<std::size_t>(i)];
      };
      for (first = i; first > 0 && same(first - 1);) --first;
      for (last = i; last < n && same(last);) ++last;
    }
    const std::int64_t length = last - first;
    const std::int64_t offset =
        offsets[static_cast<std::size_t>(m)][static_cast<std::size_t>(term)];
    if (circular) return first + ((i - first + offset % length) % length + length) % length;
    if (offset >= length || offset <= -length) return -1;
    const std::int64_t j = i + offset;
    return j >= first && j < last ? j : -1;
  }
};

void set_offsets(problem& p, std::int64_t n_factors, const std::vector<std::int64_t>& offsets) {
  p.offsets.assign(static_cast<std::size_t>(n_factors), offsets);
  p.k = static_cast<std::int64_t>(offsets.size());
}

std::int64_t links(std::int64_t n) {
  std::int64_t count = 0;
  while ((std::int64_t{1} << count) < n) ++count;
  return count;
}

void chord(problem& p, std::int64_t n_factors) {
  std::vector<std::int64_t> offsets{0};
  for (std::int64_t link = 0; link < links(p.n); ++link) offsets.push_back(std::int64_t{1} << link);
  set_offsets(p, n_factors, offsets);
}

// The dilations of the last factors: those reach around the sequence.
void cdil(problem& p, std::int64_t n_factors, std::int64_t k) {
  p.offsets.clear();
  p.k = k;
  for (std::int64_t m = 0; m < n_factors; ++m) {
    const std::int64_t dilation = std::int64_t{1}
                                  << (links(p.n) > n_factors ? links(p.n) - n_factors + m : m);
    std::vector<std::int64_t> offsets{0};
    for (const std::int64_t sign : {1, -1}) {
      for (std::int64_t link = 1; link <= k / 2; ++link) offsets.push_back(sign * link * dilation);
    }
    p.offsets.push_back(offsets);
  }
}

// Sequences of 1, 2, 3, 5, 8 ... rows, whose numbers come again.
void cut(problem& p) {
  p.segments.clear();
  std::int64_t length = 1;
  std::int64_t next = 2;
  std::int64_t id = 9;
  while (static_cast<std::int64_t>(p.segments.size()) < p.n) {
    for (std::int64_t i = 0; i < length; ++i) {
      if (static_cast<std::int64_t>(p.segments.size()) < p.n) p.segments.push_back(id);
    }
    id = id == 9 ? -4 : 9;
    std::swap(length, next);
    next += length;
  }
}

// An input whose first index is the batch, whatever its layout makes of it.
template <class T>
class input {
 public:
  input(std::int64_t batch, std::vector<std::int64_t> shape, layout how, sharing kind)
      : kind_(kind),
        array_(full_shape(batch, std::move(shape), kind), how, kind == sharing::stride ? 0 : -1) {}

  subquad::array_view view() const { return array_.view(); }

  template <class... I>
  T& at(std::int64_t b, I... index) {
    if (kind_ == sharing::rank) return array_.at(index...);
    return array_.at(kind_ == sharing::length ? 0 : b, index...);
  }
  template <class... I>
  long double operator()(std::int64_t b, I... index) const {
    return const_cast<input*>(this)->at(b, index...);
  }

 private:
  static std::vector<std::int64_t> full_shape(std::int64_t batch, std::vector<std::int64_t> shape,
                                              sharing kind) {
    if (kind != sharing::rank) {
      shape.insert(shape.begin(), kind == sharing::length ? 1 : batch);
    }
    return shape;
  }

  sharing kind_;
  strided_array<T> array_;
};

// A channel's numbers do not depend on how many channels there are.
template <class T>
struct arrays {
  input<T> values;
  input<T> x;
  input<T> grad;
  strided_array<std::int64_t> segments;

  explicit arrays(const problem& p)
      : values(p.batch, {p.n_factors(), p.n, p.k}, p.how, p.factors),
        x(p.batch, {p.n, p.d}, p.how, p.rows),
        grad(p.batch, {p.n, p.d}, p.how, sharing::own),
        segments({p.n}, p.how) {
    std::uint64_t state = 88172645463325252u;
    const auto draw = [&] {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      return static_cast<T>(static_cast<double>(state >> 11) * 0x1p-52 - 1);
    };
    for (std::int64_t b = 0; b < p.batch; ++b) {
      for (std::int64_t m = 0; m < p.n_factors(); ++m) {
        for (std::int64_t i = 0; i < p.n; ++i) {
          for (std::int64_t k = 0; k < p.k; ++k) values.at(b, m, i, k) = draw();
        }
      }
    }
    for (std::int64_t c = 0; c < p.d; ++c) {
      for (std::int64_t b = 0; b < p.batch; ++b) {
        for (std::int64_t i = 0; i < p.n; ++i) {
          x.at(b, i, c) = draw();
          grad.at(b, i, c) = draw();
        }
      }
    }
    for (std::int64_t i = 0; i < p.n && !p.segments.empty(); ++i) {
      segments.at(i) = p.segments[static_cast<std::size_t>(i)];
    }
  }
};

// A workspace of NaN, of exactly the bytes asked for, at an address that nothing is aligned to.
struct workspace {
  explicit workspace(std::size_t bytes)
      : data(bytes + 2, std::uint8_t{0xFF}), length(static_cast<std::int64_t>(bytes)) {}

  subquad::array_view view() { return subquad::contiguous_view(data.data() + 1, &length, 1); }
  bool is_kept() const { return data.front() == 0xFF && data.back() == 0xFF; }

  std::vector<std::uint8_t> data;
  std::int64_t length;
};

std::vector<std::int64_t> flat(const problem& p) {
  std::vector<std::int64_t> all;
  for (const auto& offsets : p.offsets) all.insert(all.end(), offsets.begin(), offsets.end());
  all.push_back(0);  // so that there is an address
  return all;
}

template <class T>
struct product_result {
  strided_array<T> out;
  strided_array<T> intermediates;

  explicit product_result(const problem& p)
      : out({p.batch, p.n, p.d}, p.how), intermediates({p.batch, p.kept(), p.n, p.d}, p.how) {}
};

template <class T>
product_result<T> run_product(const problem& p, const arrays<T>& with, bool transpose, bool keeps,
                              int n_threads = 0) {
  subquad::context how{};
  how.n_threads = n_threads;
  product_result<T> result(p);
  workspace memory(
      subquad::sparse_factor_product_workspace(p.batch, p.n_factors(), p.n, p.k, p.d, sizeof(T)));
  const subquad::array_view segments = with.segments.view();
  const subquad::array_view intermediates = result.intermediates.view();
  subquad::sparse_factor_product(with.values.view(), with.x.view(),
                                 p.segments.empty() ? nullptr : &segments, flat(p).data(),
                                 p.residual, p.circular, transpose, result.out.view(),
                                 keeps ? &intermediates : nullptr, memory.view(), how);
  SUBQUAD_CHECK(memory.is_kept());
  if (p.how == layout::spaced) {
    SUBQUAD_CHECK(result.out.touched_gaps() == 0);
    SUBQUAD_CHECK(result.intermediates.touched_gaps() == 0);
  }
  return result;
}

enum class wanted { both, values, x };

template <class T>
struct gradients {
  strided_array<T> values;
  strided_array<T> x;

  explicit gradients(const problem& p)
      : values({p.batch, p.n_factors(), p.n, p.k}, p.how), x({p.batch, p.n, p.d}, p.how) {}
};

template <class T>
gradients<T> run_reverse(const problem& p, const arrays<T>& with,
                         const strided_array<T>* intermediates, wanted what = wanted::both,
                         int n_threads = 0) {
  subquad::context how{};
  how.n_threads = n_threads;
  gradients<T> result(p);
  workspace memory(
      subquad::sparse_factor_product_vjp_workspace(p.batch, p.n_factors(), p.n, p.k, p.d, sizeof(T),
                                                   intermediates == nullptr && what != wanted::x));
  const subquad::array_view segments = with.segments.view();
  const subquad::array_view values = result.values.view();
  const subquad::array_view x = result.x.view();
  const subquad::array_view kept = intermediates ? intermediates->view() : values;
  subquad::sparse_factor_product_vjp(with.grad.view(), with.values.view(), with.x.view(),
                                     p.segments.empty() ? nullptr : &segments,
                                     intermediates ? &kept : nullptr, flat(p).data(), p.residual,
                                     p.circular, what != wanted::x ? &values : nullptr,
                                     what != wanted::values ? &x : nullptr, memory.view(), how);
  SUBQUAD_CHECK(memory.is_kept());
  if (p.how == layout::spaced) {
    SUBQUAD_CHECK(result.values.touched_gaps() == 0);
    SUBQUAD_CHECK(result.x.touched_gaps() == 0);
  }
  return result;
}

struct value {
  long double is = 0;
  long double size = 0;  // the sum of the terms' magnitudes
};

value operator*(const value& a, const value& b) { return {a.is * b.is, a.size * b.size}; }
value& operator+=(value& a, const value& b) {
  a.is += b.is;
  a.size += b.size;
  return a;
}

// (n, d) of one element of the batch.
using matrix = std::vector<value>;

matrix& operator+=(matrix& a, const matrix& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

template <class T>
struct truth {
  const problem& p;
  const arrays<T>& with;
  std::int64_t b;

  matrix read(const input<T>& rows) const {
    matrix result;
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t c = 0; c < p.d; ++c) {
        result.push_back({rows(b, i, c), std::abs(rows(b, i, c))});
      }
    }
    return result;
  }

  // Calls body(i, k, j) for the terms of factor m.
  template <class F>
  void for_each_term(std::int64_t m, F&& body) const {
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t k = 0; k < p.k; ++k) {
        const std::int64_t j = p.row(m, i, k);
        if (j >= 0) body(i, k, j);
      }
    }
  }

  matrix apply(std::int64_t m, const matrix& v, bool transpose) const {
    matrix result(v.size());
    for_each_term(m, [&](std::int64_t i, std::int64_t k, std::int64_t j) {
      const long double w = with.values(b, m, i, k);
      const std::int64_t to = transpose ? j : i;
      const std::int64_t from = transpose ? i : j;
      for (std::int64_t c = 0; c < p.d; ++c) {
        result[static_cast<std::size_t>(to * p.d + c)] +=
            value{w, std::abs(w)} * v[static_cast<std::size_t>(from * p.d + c)];
      }
    });
    return result;
  }

  // v_0 ... v_M
  std::vector<matrix> forward() const {
    std::vector<matrix> v{read(with.x)};
    for (std::int64_t m = 0; m < p.n_factors(); ++m) {
      v.push_back(apply(m, v.back(), false));
      if (p.residual == SUBQUAD_RESIDUAL_STEP) v.back() += v[static_cast<std::size_t>(m)];
      if (p.residual == SUBQUAD_RESIDUAL_INPUT) v.back() += v[0];
    }
    return v;
  }

  // The gradients of v_M ... v_1, then that of x, of a gradient of v_M.
  std::vector<matrix> backward(const matrix& gradient) const {
    std::vector<matrix> g{gradient};
    matrix sum(gradient.size());
    for (std::int64_t m = p.n_factors() - 1; m >= 0; --m) {
      sum += g.back();
      matrix next = apply(m, g.back(), true);
      if (p.residual == SUBQUAD_RESIDUAL_STEP) next += g.back();
      g.push_back(next);
    }
    if (p.residual == SUBQUAD_RESIDUAL_INPUT) g.back() += sum;
    return g;
  }
};

template <class T>
bool is_close(const strided_array<T>& found, std::int64_t b, const problem& p,
              const matrix& expected, long double bound) {
  for (std::int64_t i = 0; i < p.n; ++i) {
    for (std::int64_t c = 0; c < p.d; ++c) {
      const value& e = expected[static_cast<std::size_t>(i * p.d + c)];
      if (!(std::abs(found.at(b, i, c) - e.is) <= bound * e.size)) return false;
    }
  }
  return true;
}

// Every factor rounds K products, K sums and that of what the residual adds: (K + 1) halves of a
// unit where they are fused, twice that where not, of the magnitudes' sum. An inner product of d
// terms adds d, or twice that. Halves of a unit taken as whole ones cover both, and the powers that
// a bound of first order leaves out.
template <class T>
void all_of(const problem& p) {
  const int before = checks::failures();
  const arrays<T> with(p);
  const product_result<T> forward = run_product(p, with, false, true);
  const product_result<T> transposed = run_product(p, with, true, false);
  const gradients<T> kept = run_reverse(p, with, &forward.intermediates);
  const gradients<T> anew = run_reverse<T>(p, with, nullptr);
  const long double unit = std::numeric_limits<T>::epsilon();
  const long double bound = unit * static_cast<long double>((p.n_factors() + 1) * (p.k + 2));
  const long double inner = bound + unit * static_cast<long double>(p.d + 1);
  bool close = true;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const truth<T> is{p, with, b};
    const std::vector<matrix> v = is.forward();
    const std::vector<matrix> g = is.backward(is.read(with.grad));
    close = close && is_close(forward.out, b, p, v.back(), bound);
    close = close && is_close(transposed.out, b, p, is.backward(v[0]).back(), bound);
    close = close && is_close(kept.x, b, p, g.back(), bound);
    SUBQUAD_CHECK(close);
    for (std::int64_t m = 0; m < p.n_factors(); ++m) {
      const matrix& before_it = v[static_cast<std::size_t>(m)];
      const matrix& after_it = g[static_cast<std::size_t>(p.n_factors() - 1 - m)];
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t k = 0; k < p.k; ++k) {
          const std::int64_t j = p.row(m, i, k);
          value sum;
          for (std::int64_t c = 0; j >= 0 && c < p.d; ++c) {
            sum += after_it[static_cast<std::size_t>(i * p.d + c)] *
                   before_it[static_cast<std::size_t>(j * p.d + c)];
          }
          close = close && std::abs(kept.values.at(b, m, i, k) - sum.is) <= inner * sum.size;
        }
      }
      if (m == 0) continue;
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t c = 0; c < p.d; ++c) {
          const value& e = before_it[static_cast<std::size_t>(i * p.d + c)];
          close =
              close && std::abs(forward.intermediates.at(b, m - 1, i, c) - e.is) <= bound * e.size;
        }
      }
    }
  }
  SUBQUAD_CHECK(close);
  SUBQUAD_CHECK(anew.values.data() == kept.values.data() && anew.x.data() == kept.x.data());
  SUBQUAD_CHECK(run_product(p, with, false, false).out.data() == forward.out.data());
  if (checks::failures() == before) return;
  std::printf("batch %d n %d d %d M %d K %d residual %d circular %d segments %d layout %d\n",
              static_cast<int>(p.batch), static_cast<int>(p.n), static_cast<int>(p.d),
              static_cast<int>(p.n_factors()), static_cast<int>(p.k), p.residual, p.circular,
              !p.segments.empty(), static_cast<int>(p.how));
}

// Every length with every kind of offsets, in turn with every residual, ends and sequences.
template <class T>
void patterns() {
  int turn = 0;
  for (const std::int64_t n : {1, 2, 8, 31, 33, 100, 129}) {
    for (int kind = 0; kind < 4; ++kind) {
      for (const bool circular : {true, false}) {
        for (const bool segments : {true, false}) {
          problem p;
          p.n = n;
          p.d = turn % 5 == 0 ? 19 : 1 + turn % 3;
          if (kind == 0) {
            chord(p, 3);
          } else if (kind == 1) {
            cdil(p, 2, 9);
          } else if (kind == 2) {
            set_offsets(p, 2, {-3, 0, n + 5, 2, 2, -2 * n - 1, 7});
          } else {
            constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();
            set_offsets(p, 1, {n / 2, kLargest, 1 - n, -kLargest - 1, n});
          }
          p.residual = turn++ % 3;
          p.circular = circular;
          if (segments) cut(p);
          all_of<T>(p);
        }
      }
    }
  }
  problem p;
  p.n = 1000;
  p.d = 2;
  p.residual = SUBQUAD_RESIDUAL_STEP;
  chord(p, 2);
  all_of<T>(p);
}

template <class T>
void layouts() {
  int turn = 0;
  for (const layout how :
       {layout::contiguous, layout::transposed, layout::flipped, layout::spaced}) {
    for (const sharing factors : {sharing::own, sharing::stride, sharing::length, sharing::rank}) {
      for (const sharing rows : {sharing::own, sharing::stride, sharing::rank}) {
        const bool alike = factors == sharing::length || factors == sharing::rank;
        if (rows == sharing::rank && alike) continue;  // no array knows the batch
        problem p;
        p.batch = 3;
        p.n = 13;
        p.d = turn % 2 ? 16 : 5;
        p.how = how;
        p.factors = factors;
        p.rows = rows;
        p.residual = turn++ % 3;
        cdil(p, 3, 5);
        if (turn % 4 == 0) cut(p);
        all_of<T>(p);
      }
    }
  }
}

template <class T>
void empty() {
  for (const std::int32_t residual : {0, 1, 2}) {
    for (int what = 0; what < 5; ++what) {
      problem p;
      p.batch = what == 0 ? 0 : 2;
      p.n = what == 1 ? 0 : 5;
      p.d = what == 2 ? 0 : 3;
      p.residual = residual;
      set_offsets(p, what == 3 ? 0 : 2,
                  what == 4 ? std::vector<std::int64_t>{} : std::vector<std::int64_t>{0, 1});
      all_of<T>(p);
    }
  }
}

// Only what is asked for is written, to the same numbers.
template <class T>
void parts() {
  problem p;
  p.n = 40;
  p.d = 7;
  p.residual = SUBQUAD_RESIDUAL_INPUT;
  cdil(p, 3, 5);
  const arrays<T> with(p);
  const gradients<T> both = run_reverse<T>(p, with, nullptr);
  const gradients<T> values = run_reverse<T>(p, with, nullptr, wanted::values);
  const gradients<T> x = run_reverse<T>(p, with, nullptr, wanted::x);
  SUBQUAD_CHECK(values.values.data() == both.values.data());
  SUBQUAD_CHECK(x.x.data() == both.x.data());
  SUBQUAD_CHECK(values.x.data() == gradients<T>(p).x.data());
  SUBQUAD_CHECK(x.values.data() == gradients<T>(p).values.data());
}

// Numbers reach what they are terms of, and nothing else: not other channels, and no row past an
// end.
template <class T>
void not_finite() {
  for (const std::int64_t d : {5, 16}) {
    problem p;
    p.n = 50;
    p.d = d;
    p.circular = false;
    set_offsets(p, 1, {0, 3, -20, 20});
    const arrays<T> clean(p);
    const product_result<T> expected = run_product(p, clean, false, false);
    const gradients<T> expected_gradients = run_reverse<T>(p, clean, nullptr);
    for (const double bad : {kNaN, kInfinity}) {
      arrays<T> with(p);
      with.x.at(0, 30, 2) = static_cast<T>(bad);
      with.values.at(0, 0, 49, 3) = static_cast<T>(bad);  // left out
      const product_result<T> found = run_product(p, with, false, false);
      const gradients<T> gradient = run_reverse<T>(p, with, nullptr);
      bool right = true;
      for (std::int64_t i = 0; i < p.n; ++i) {
        bool reached = false;
        for (std::int64_t k = 0; k < p.k; ++k) {
          const bool here = p.row(0, i, k) == 30;
          const T g = gradient.values.at(0, 0, i, k);
          right =
              right && (here ? !std::isfinite(g) : g == expected_gradients.values.at(0, 0, i, k));
          if (here && bad == kInfinity) right = right && std::isinf(g);
          reached = reached || here;
        }
        for (std::int64_t c = 0; c < p.d; ++c) {
          const T v = found.out.at(0, i, c);
          right = right && (reached && c == 2 ? !std::isfinite(v) : v == expected.out.at(0, i, c));
        }
      }
      SUBQUAD_CHECK(right);
      SUBQUAD_CHECK(gradient.x.data() == expected_gradients.x.data());
    }
    // An infinite value makes infinities of the channels there are, none of those that fill up.
    arrays<T> with(p);
    with.values.at(0, 0, 10, 1) = static_cast<T>(kInfinity);
    const product_result<T> found = run_product(p, with, false, false);
    for (std::int64_t c = 0; c < p.d; ++c) SUBQUAD_CHECK(std::isinf(found.out.at(0, 10, c)));
    set_offsets(p, 2, {0, 3, -20, 20});
    arrays<T> chain(p);
    chain.values.at(0, 1, 10, 1) = static_cast<T>(kInfinity);
    for (std::int64_t c = 0; c < p.d; ++c) chain.grad.at(0, 10, c) = T(1);
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t c = 0; c < p.d; ++c) chain.x.at(0, i, c) = T(1);
    }
    const gradients<T> gradient = run_reverse<T>(p, chain, nullptr);
    for (std::int64_t k = 0; k < p.k; ++k) {
      if (p.row(0, 13, k) >= 0) SUBQUAD_CHECK(std::isinf(gradient.values.at(0, 0, 13, k)));
    }
  }
}

template <class T>
void threads_do_not_show() {
  for (const bool segments : {false, true}) {
    problem p;
    p.batch = 3;
    p.n = 6000;
    p.d = 33;
    p.residual = SUBQUAD_RESIDUAL_INPUT;
    set_offsets(p, 3, {0, 1, 2, 4, 8, -700, 5000, 31, 16, 77, -1});
    if (segments) cut(p);
    const arrays<T> with(p);
    const product_result<T> one = run_product(p, with, false, true, 1);
    const product_result<T> transposed = run_product(p, with, true, false, 1);
    const gradients<T> gradient = run_reverse<T>(p, with, nullptr, wanted::both, 1);
    for (const int threads : {2, 5}) {
      const product_result<T> other = run_product(p, with, false, true, threads);
      SUBQUAD_CHECK(other.out.data() == one.out.data());
      SUBQUAD_CHECK(other.intermediates.data() == one.intermediates.data());
      SUBQUAD_CHECK(run_product(p, with, false, false, threads).out.data() == one.out.data());
      SUBQUAD_CHECK(run_product(p, with, true, false, threads).out.data() == transposed.out.data());
      const gradients<T> others = run_reverse(p, with, &one.intermediates, wanted::both, threads);
      SUBQUAD_CHECK(others.values.data() == gradient.values.data());
      SUBQUAD_CHECK(others.x.data() == gradient.x.data());
    }
  }
}

// A channel has the same numbers whatever the channels beside it, also where their number or the
// length of the sequence calls for other tiles.
template <class T>
void tiles_do_not_show() {
  for (const std::int64_t n : {70, 9000}) {
    problem p;
    p.n = n;
    p.d = n == 70 ? 130 : 67;
    p.residual = SUBQUAD_RESIDUAL_STEP;
    set_offsets(p, 2, {0, 1, 2, 4, n / 2});
    const arrays<T> with(p);
    const product_result<T> all = run_product(p, with, false, true);
    const product_result<T> transposed = run_product(p, with, true, false);
    bool same = true;
    for (const std::int64_t d : {1, 3, 16, 17, 64, 65}) {
      if (n != 70 && d != 17) continue;
      problem few = p;
      few.d = d;
      const arrays<T> channels(few);
      const product_result<T> found = run_product(few, channels, false, true);
      const product_result<T> found_transposed = run_product(few, channels, true, false);
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t c = 0; c < d; ++c) {
          same = same && found.out.at(0, i, c) == all.out.at(0, i, c);
          same = same && found.intermediates.at(0, 0, i, c) == all.intermediates.at(0, 0, i, c);
          same = same && found_transposed.out.at(0, i, c) == transposed.out.at(0, i, c);
        }
      }
    }
    SUBQUAD_CHECK(same);
  }
}

// Intermediates that the caches do not hold are written another way, where their rows lie on lines
// of the cache, to the same values.
void large_intermediates() {
  problem p;
  p.n = 70001;
  p.d = 64;
  p.residual = SUBQUAD_RESIDUAL_STEP;
  set_offsets(p, 3, {1, -3});
  const arrays<float> with(p);
  const product_result<float> expected = run_product(p, with, false, true);
  const std::int64_t shape[] = {1, 2, p.n, p.d};
  const std::int64_t one[] = {1, p.n, p.d};
  const auto elements = static_cast<std::size_t>(2 * p.n * p.d);
  std::vector<float> memory(elements + 16, static_cast<float>(kNaN));
  std::vector<float> result(elements / 2);
  float* aligned = memory.data();
  while (reinterpret_cast<std::uintptr_t>(aligned) % 64 != 0) ++aligned;
  workspace scratch(subquad::sparse_factor_product_workspace(1, 3, p.n, p.k, p.d, sizeof(float)));
  const subquad::array_view kept = subquad::contiguous_view(aligned, shape, 4);
  subquad::sparse_factor_product(
      with.values.view(), with.x.view(), nullptr, flat(p).data(), p.residual, true, false,
      subquad::contiguous_view(result.data(), one, 3), &kept, scratch.view());
  bool same = true;
  for (std::size_t i = 0; i < elements; ++i) {
    same = same && aligned[i] == expected.intermediates.data()[i];
  }
  for (std::size_t i = 0; i < elements / 2; ++i) same = same && result[i] == expected.out.data()[i];
  SUBQUAD_CHECK(same);
  const gradients<float> given = run_reverse(p, with, &expected.intermediates);
  const gradients<float> anew = run_reverse<float>(p, with, nullptr);
  SUBQUAD_CHECK(given.values.data() == anew.values.data() && given.x.data() == anew.x.data());
}

template <class T>
void everything() {
  patterns<T>();
  layouts<T>();
  empty<T>();
  parts<T>();
  not_finite<T>();
  threads_do_not_show<T>();
  tiles_do_not_show<T>();
}

void refusals() {
  const strided_array<float> values({2, 5, 3});
  const strided_array<float> x({5, 4});
  const strided_array<double> wide({5, 4});
  const strided_array<float> short_x({6, 4});
  const strided_array<float> kept({1, 5, 4});
  const strided_array<std::int64_t> segments({4});
  const strided_array<float> out({5, 4});
  const std::vector<std::int64_t> offsets(6);
  workspace none(0);
  workspace enough(1 << 20);
  const subquad::array_view kept_view = kept.view();
  const subquad::array_view segments_view = segments.view();
  const auto call = [&](const subquad::array_view& rows, const subquad::array_view* ids,
                        const std::int64_t* shifts, std::int32_t residual, bool transpose,
                        const subquad::array_view& memory) {
    subquad::sparse_factor_product(values.view(), rows, ids, shifts, residual, true, transpose,
                                   out.view(), &kept_view, memory);
  };
  using subquad::invalid_argument;
  const auto refused = [&](auto&& f, const char* name) {
    SUBQUAD_CHECK(checks::throws<invalid_argument>(f, name));
  };
  refused([&] { call(short_x.view(), nullptr, offsets.data(), 0, false, enough.view()); }, "x");
  SUBQUAD_CHECK(checks::throws<subquad::type_error>(
      [&] { call(wide.view(), nullptr, offsets.data(), 0, false, enough.view()); }, "x"));
  refused([&] { call(x.view(), &segments_view, offsets.data(), 0, false, enough.view()); },
          "segments");
  refused([&] { call(x.view(), nullptr, nullptr, 0, false, enough.view()); }, "offsets");
  refused([&] { call(x.view(), nullptr, offsets.data(), 3, false, enough.view()); }, "residual");
  refused([&] { call(x.view(), nullptr, offsets.data(), 0, true, enough.view()); },
          "intermediates");
  refused([&] { call(x.view(), nullptr, offsets.data(), 0, false, none.view()); }, "workspace");
  const subquad::array_view grad_values = values.view();
  workspace small(subquad::sparse_factor_product_vjp_workspace(1, 2, 5, 3, 4, 4, false));
  refused(
      [&] {
        subquad::sparse_factor_product_vjp(out.view(), values.view(), x.view(), nullptr, nullptr,
                                           offsets.data(), 0, true, &grad_values, nullptr,
                                           small.view());
      },
      "workspace");
}

}  // namespace

int main() {
  refusals();
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    everything<float>();
    everything<double>();
    large_intermediates();
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}
