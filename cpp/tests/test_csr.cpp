// Products with matrices in compressed rows and their reverse, at every instruction set, against
// the definition in long double.
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
  std::int64_t rows = 1;
  std::int64_t columns = 1;
  std::int64_t d = 1;
  std::int64_t row_length = 5;   // of most rows: some are empty, some twice as long
  std::int64_t longest_row = 0;  // of the row in the middle, where not 0
  std::int64_t unused = 0;       // entries before the first row and after the last
  double scale = 1;
  bool addend = false;
  layout how = layout::contiguous;
  sharing x = sharing::own;
  sharing added = sharing::own;
};

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

// Where the rows of a problem's matrix begin, and where the last one ends.
std::vector<std::int64_t> borders(const problem& p) {
  std::mt19937_64 generator(static_cast<std::uint64_t>(p.rows * 1009 + p.columns));
  std::vector<std::int64_t> at{p.unused};
  for (std::int64_t row = 0; row < p.rows; ++row) {
    std::int64_t length = 0;
    if (p.columns > 0 && generator() % 4 != 0) {
      length =
          static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(2 * p.row_length + 1));
    }
    if (p.longest_row > 0 && row == p.rows / 2) length = p.longest_row;
    at.push_back(at.back() + length);
  }
  return at;
}

template <class T, class I>
struct arrays {
  std::vector<std::int64_t> border;
  std::int64_t nnz;
  strided_array<T> data;
  strided_array<I> indices;
  strided_array<I> indptr;
  input<T> x;
  input<T> addend;
  input<T> grad;

  explicit arrays(const problem& p)
      : border(borders(p)),
        nnz(border.back() + p.unused),
        data({nnz}, p.how),
        indices({nnz}, p.how),
        indptr({p.rows + 1}, p.how),
        x(p.batch, {p.columns, p.d}, p.how, p.x),
        addend(p.batch, {p.rows, p.d}, p.how, p.added),
        grad(p.batch, {p.rows, p.d}, p.how, p.added) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(p.rows * 1000003 + p.d));
    std::normal_distribution<double> normal;
    const auto draw = [&] { return static_cast<T>(normal(generator)); };
    for (std::int64_t i = 0; i <= p.rows; ++i) {
      indptr.at(i) = static_cast<I>(border[static_cast<std::size_t>(i)]);
    }
    for (std::int64_t e = 0; e < nnz; ++e) {
      data.at(e) = draw();
      // What no row has is not looked at.
      const bool used = e >= border.front() && e < border.back();
      indices.at(e) =
          used ? static_cast<I>(generator() % static_cast<std::uint64_t>(p.columns)) : I(-1);
    }
    for (std::int64_t b = 0; b < p.batch; ++b) {
      for (std::int64_t k = 0; k < p.d; ++k) {
        for (std::int64_t j = 0; j < p.columns; ++j) x.at(b, j, k) = draw();
        for (std::int64_t i = 0; i < p.rows; ++i) {
          addend.at(b, i, k) = draw();
          grad.at(b, i, k) = draw();
        }
      }
    }
  }

  std::int64_t begin(std::int64_t row) const { return border[static_cast<std::size_t>(row)]; }
  std::int64_t end(std::int64_t row) const { return border[static_cast<std::size_t>(row + 1)]; }
};

// A workspace of exactly the bytes asked for, at an address that nothing is aligned to.
struct workspace {
  explicit workspace(std::size_t bytes)
      : data(bytes + 2, std::uint8_t{0xA5}), length(static_cast<std::int64_t>(bytes)) {}

  subquad::array_view view() { return subquad::contiguous_view(data.data() + 1, &length, 1); }
  bool is_kept() const { return data.front() == 0xA5 && data.back() == 0xA5; }

  std::vector<std::uint8_t> data;
  std::int64_t length;
};

template <class T, class I>
strided_array<T> multiply(const problem& p, const arrays<T, I>& with, int n_threads = 0) {
  subquad::context how{};
  how.n_threads = n_threads;
  strided_array<T> out({p.batch, p.rows, p.d}, p.how);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t i = 0; i < p.rows; ++i) {
      for (std::int64_t k = 0; k < p.d; ++k) out.at(b, i, k) = static_cast<T>(kNaN);
    }
  }
  workspace memory(
      subquad::csr_product_workspace(p.batch, p.rows, p.columns, with.nnz, p.d, sizeof(T)));
  const subquad::array_view addend = with.addend.view();
  subquad::csr_product(with.data.view(), with.indices.view(), with.indptr.view(), with.x.view(),
                       p.addend ? &addend : nullptr, p.scale, out.view(), memory.view(), how);
  SUBQUAD_CHECK(memory.is_kept());
  SUBQUAD_CHECK(out.touched_gaps() == 0);
  return out;
}

template <class T, class I>
strided_array<T> reverse(const problem& p, const arrays<T, I>& with, int n_threads = 0) {
  subquad::context how{};
  how.n_threads = n_threads;
  strided_array<T> out({with.nnz}, p.how);
  for (std::int64_t e = 0; e < with.nnz; ++e) out.at(e) = static_cast<T>(kNaN);
  workspace memory(
      subquad::csr_product_vjp_workspace(p.batch, p.rows, p.columns, with.nnz, p.d, sizeof(T)));
  subquad::csr_product_vjp(with.grad.view(), with.indices.view(), with.indptr.view(), with.x.view(),
                           out.view(), memory.view(), how);
  SUBQUAD_CHECK(memory.is_kept());
  SUBQUAD_CHECK(out.touched_gaps() == 0);
  return out;
}

struct value {
  long double is = 0;
  long double size = 0;  // the sum of the terms' magnitudes

  void add(long double term) {
    is += term;
    size += std::abs(term);
  }
};

// gamma_m = m u / (1 - m u), u half the distance from 1 to the next number.
template <class T>
long double gamma_of(std::int64_t m) {
  const long double unit = static_cast<long double>(m) * std::numeric_limits<T>::epsilon() / 2;
  return unit / (1 - unit);
}

template <class T, class I>
void product_is_right(const problem& p, const arrays<T, I>& with) {
  const strided_array<T> out = multiply(p, with);
  const auto scale = static_cast<long double>(static_cast<T>(p.scale));
  bool close = true;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t i = 0; i < p.rows; ++i) {
      // What a term passes: its product, fewer than n sums, 3 of sums side by side, the scale and
      // the addend; in a row of several parts, two more and fewer sums.
      const long double bound = gamma_of<T>(with.end(i) - with.begin(i) + 7);
      for (std::int64_t k = 0; k < p.d; ++k) {
        value sum;
        for (std::int64_t e = with.begin(i); e < with.end(i); ++e) {
          sum.add(scale * with.data.at(e) * with.x(b, with.indices.at(e), k));
        }
        if (p.addend) sum.add(with.addend(b, i, k));
        close = close && std::abs(out.at(b, i, k) - sum.is) <= bound * sum.size;
      }
    }
  }
  SUBQUAD_CHECK(close);
}

template <class T, class I>
void reverse_is_right(const problem& p, const arrays<T, I>& with) {
  const strided_array<T> out = reverse(p, with);
  // What a term passes: its product, and fewer sums than there are terms and lanes to halve.
  const long double bound = gamma_of<T>(p.batch * p.d + 5);
  bool close = true;
  for (std::int64_t e = 0; e < with.nnz; ++e) {
    if (e < with.border.front() || e >= with.border.back()) close = close && out.at(e) == T(0);
  }
  for (std::int64_t i = 0; i < p.rows; ++i) {
    for (std::int64_t e = with.begin(i); e < with.end(i); ++e) {
      value sum;
      for (std::int64_t b = 0; b < p.batch; ++b) {
        for (std::int64_t k = 0; k < p.d; ++k) {
          sum.add(with.grad(b, i, k) * with.x(b, with.indices.at(e), k));
        }
      }
      close = close && std::abs(out.at(e) - sum.is) <= bound * sum.size;
    }
  }
  SUBQUAD_CHECK(close);
}

template <class T, class I>
void both(const problem& p) {
  const int before = checks::failures();
  const arrays<T, I> with(p);
  product_is_right(p, with);
  reverse_is_right(p, with);
  if (checks::failures() == before) return;
  std::printf("batch %d rows %d columns %d d %d longest %d addend %d layout %d index %d bytes\n",
              static_cast<int>(p.batch), static_cast<int>(p.rows), static_cast<int>(p.columns),
              static_cast<int>(p.d), static_cast<int>(p.longest_row), p.addend,
              static_cast<int>(p.how), static_cast<int>(sizeof(I)));
}

template <class T, class I>
void shapes() {
  bool addend = false;
  for (const std::int64_t d : {1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 64, 100, 130, 257}) {
    for (const std::int64_t rows : {1, 40}) {
      problem p;
      p.rows = rows;
      p.columns = 29;
      p.d = d;
      p.addend = addend = !addend;
      p.scale = addend ? 1.0 : -1.5;
      p.unused = d % 2 == 0 ? 3 : 0;
      both<T, I>(p);
    }
  }
}

// Rows that are added up in several parts, and many parts of short rows.
template <class T, class I>
void many_parts() {
  problem p;
  p.rows = 3;
  p.columns = 17;
  p.d = 1030;
  p.longest_row = 1400;
  p.addend = true;
  p.scale = 0.75;
  both<T, I>(p);
  p.rows = 1;
  p.batch = 2;
  both<T, I>(p);
  p.batch = 1;
  p.rows = 900;
  p.longest_row = 257;
  p.how = layout::flipped;
  p.d = 1025;
  p.row_length = 1;
  both<T, I>(p);
}

// Rows that the caches do not hold are asked for ahead.
template <class T, class I>
void large_inputs(std::int64_t d) {
  problem p;
  p.rows = 40;
  p.columns = (17 << 20) / static_cast<std::int64_t>(sizeof(T)) / d;
  p.d = d;
  both<T, I>(p);
}

template <class T, class I>
void layouts() {
  for (const layout how :
       {layout::contiguous, layout::transposed, layout::flipped, layout::spaced}) {
    for (const sharing x : {sharing::own, sharing::stride, sharing::length, sharing::rank}) {
      for (const sharing added : {sharing::own, sharing::stride, sharing::length, sharing::rank}) {
        if (x != sharing::own && added != sharing::own) continue;
        problem p;
        p.batch = 3;
        p.rows = 11;
        p.columns = 6;
        p.d = 6;
        p.how = how;
        p.x = x;
        p.added = added;
        p.addend = true;
        p.scale = 2;
        both<T, I>(p);
      }
    }
  }
}

template <class T, class I>
void empty() {
  for (const std::vector<std::int64_t>& lengths :
       {std::vector<std::int64_t>{0, 3, 4, 2}, {2, 0, 4, 2}, {2, 3, 0, 2}, {2, 3, 4, 0}}) {
    for (const bool addend : {false, true}) {
      problem p;
      p.batch = lengths[0];
      p.rows = lengths[1];
      p.columns = lengths[2];
      p.d = lengths[3];
      p.addend = addend;
      both<T, I>(p);
    }
  }
}

// NaN and infinities reach the outputs that have a term with them, and no others: a stored zero
// times either is NaN, an entry that is not stored takes no part.
template <class T, class I>
void not_finite() {
  for (const std::int64_t d : {1, 3, 8, 21, 37}) {
    problem p;
    p.rows = 23;
    p.columns = 9;
    p.d = d;
    arrays<T, I> with(p);
    const std::int64_t column = d / 2;
    for (std::int64_t e = 0; e < with.nnz; ++e) {
      if (e % 3 == 0) with.data.at(e) = T(0);
    }
    const strided_array<T> clean = multiply(p, with);
    const strided_array<T> clean_reverse = reverse(p, with);
    for (const double bad : {kNaN, kInfinity, -kInfinity}) {
      with.x.at(0, 4, column) = static_cast<T>(bad);
      const strided_array<T> found = multiply(p, with);
      const strided_array<T> found_reverse = reverse(p, with);
      bool right = true;
      for (std::int64_t i = 0; i < p.rows; ++i) {
        double expected = 0;
        bool meets = false;
        for (std::int64_t e = with.begin(i); e < with.end(i); ++e) {
          const bool is_met = with.indices.at(e) == 4;
          meets = meets || is_met;
          if (is_met) expected += static_cast<double>(with.data.at(e)) * bad;
          const double slope = static_cast<double>(with.grad(0, i, column)) * bad;
          const double here = found_reverse.at(e);
          right = right && (!is_met             ? here == clean_reverse.at(e)
                            : std::isnan(slope) ? std::isnan(here)
                                                : here == slope);
        }
        for (std::int64_t k = 0; k < d; ++k) {
          const double here = found.at(0, i, k);
          right = right && (k != column || !meets  ? here == clean.at(0, i, k)
                            : std::isnan(expected) ? std::isnan(here)
                                                   : here == expected);
        }
      }
      SUBQUAD_CHECK(right);
    }
  }
}

template <class T, class I>
void threads_do_not_show() {
  for (const std::int64_t batch : {1, 3}) {
    problem p;
    p.batch = batch;
    p.rows = 4000;
    p.columns = 700;
    p.d = 96;
    p.row_length = 4;
    p.longest_row = 6000;
    p.addend = true;
    p.scale = 0.3;
    const arrays<T, I> with(p);
    const strided_array<T> one = multiply(p, with, 1);
    const strided_array<T> one_reverse = reverse(p, with, 1);
    for (const int threads : {2, 5}) {
      SUBQUAD_CHECK(multiply(p, with, threads).data() == one.data());
      SUBQUAD_CHECK(reverse(p, with, threads).data() == one_reverse.data());
    }
  }
}

template <class T, class I>
void refusals_of() {
  problem p;
  p.rows = 7;
  p.columns = 5;
  p.d = 4;
  const auto refuses = [&](const arrays<T, I>& with, const char* part) {
    SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { multiply(p, with); }, part));
    SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { reverse(p, with); }, part));
  };
  for (const layout how : {layout::contiguous, layout::spaced}) {
    p.how = how;
    arrays<T, I> with(p);
    const I kept = with.indices.at(3);
    with.indices.at(3) = 5;
    refuses(with, "indices: expected at least 0 and less than the 5 rows of x, got 5");
    with.indices.at(3) = std::numeric_limits<I>::min();
    refuses(with, "at position 3");
    with.indices.at(3) = kept;
    with.indptr.at(0) = -1;
    refuses(with, "indptr: expected numbers that do not decrease");
    with.indptr.at(0) = 0;
    with.indptr.at(2) = static_cast<I>(with.nnz + 1);
    refuses(with, "at position 2");
    with.indptr.at(2) = 0;
    with.indptr.at(1) = 1;
    refuses(with, "got 0 at position 2");
    with.indptr.at(2) = 1;
    with.indptr.at(7) = static_cast<I>(with.nnz + 1);
    refuses(with, "at position 7");
  }
}

template <class T, class I>
void everything() {
  shapes<T, I>();
  many_parts<T, I>();
  layouts<T, I>();
  empty<T, I>();
  not_finite<T, I>();
  threads_do_not_show<T, I>();
  refusals_of<T, I>();
}

void refusals() {
  problem p;
  p.rows = 3;
  p.columns = 4;
  p.d = 2;
  const arrays<float, std::int32_t> with(p);
  const arrays<float, std::int64_t> wide(p);
  const strided_array<double> other({1, 4, 2});
  const strided_array<float> out({1, 3, 2});
  const strided_array<float> added({1, 2, 2});
  workspace none(0);
  workspace enough(1 << 20);
  const auto call = [&](const subquad::array_view& indptr, const subquad::array_view& x,
                        const subquad::array_view* addend, const subquad::array_view& memory) {
    subquad::csr_product(with.data.view(), with.indices.view(), indptr, x, addend, 1, out.view(),
                         memory);
  };
  const subquad::array_view short_addend = added.view();
  SUBQUAD_CHECK(checks::throws<subquad::type_error>(
      [&] { call(wide.indptr.view(), with.x.view(), nullptr, enough.view()); }, "indptr"));
  SUBQUAD_CHECK(checks::throws<subquad::type_error>(
      [&] { call(with.indptr.view(), other.view(), nullptr, enough.view()); }, "x"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(with.indptr.view(), with.x.view(), &short_addend, enough.view()); }, "addend"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(with.indptr.view(), with.x.view(), nullptr, none.view()); }, "workspace"));
}

}  // namespace

int main() {
  refusals();
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    everything<float, std::int32_t>();
    everything<double, std::int64_t>();
    shapes<float, std::int64_t>();
    shapes<double, std::int32_t>();
    many_parts<float, std::int64_t>();
    many_parts<double, std::int32_t>();
    large_inputs<float, std::int32_t>(1030);
    large_inputs<double, std::int64_t>(70);
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}
