// Steps of embeddings on the sphere, at every instruction set, against the definition in long
// double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "strided_array.hpp"
#include "subquad/embedding.hpp"
#include "subquad/threads.hpp"

namespace {

using checks::layout;
using checks::strided_array;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct problem {
  std::int64_t n = 1;
  std::int64_t m = 0;  // 0: no matrix, and as many rows as x has
  std::int64_t d = 1;
  std::int64_t k = 0;
  std::int64_t c = 0;
  bool null = false;
  double scale = 1;
  double step = 0.6;
  bool with_out = true;
  bool with_attraction = true;
  bool with_log_z = true;
  bool in_place = false;
  layout how = layout::contiguous;

  std::int64_t n_rows() const { return m > 0 ? m : n; }
};

std::vector<std::int64_t> borders(const problem& p) {
  std::mt19937_64 generator(static_cast<std::uint64_t>(p.n * 1009 + p.m));
  std::vector<std::int64_t> at{0};
  for (std::int64_t i = 0; i < p.n; ++i) {
    const auto length = static_cast<std::int64_t>(generator() % 8);
    at.push_back(at.back() + (p.m > 0 ? length : 0));
  }
  return at;
}

template <class T, class I>
struct arrays {
  std::vector<std::int64_t> border;
  std::int64_t nnz;
  strided_array<T> x;
  strided_array<T> data;
  strided_array<I> indices;
  strided_array<I> indptr;
  strided_array<T> rows;
  strided_array<T> log_counts;
  strided_array<T> means;
  strided_array<T> covariances;
  strided_array<std::int64_t> labels;
  strided_array<T> shifts;
  strided_array<T> slopes;
  strided_array<T> null_weights;
  strided_array<T> null;

  explicit arrays(const problem& p)
      : border(borders(p)),
        nnz(border.back()),
        x({p.n, p.d}, p.how),
        data({nnz}, p.how),
        indices({nnz}, p.how),
        indptr({p.n + 1}, p.how),
        rows({p.n_rows(), p.d}, p.how),
        log_counts({p.k}, p.how),
        means({p.k, p.d}, p.how),
        covariances({p.k, p.d, p.d}, p.how),
        labels({p.n}, p.how),
        shifts({p.c, p.d}, p.how),
        slopes({p.c, p.d, p.d}, p.how),
        null_weights({p.n}, p.how),
        null({p.d}, p.how) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(p.n * 1000003 + p.d));
    std::normal_distribution<double> normal;
    const auto draw = [&] { return static_cast<T>(normal(generator)); };
    const auto below = [&](std::int64_t count) {
      return static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(count));
    };
    fill_sphere(x, p.n, p.d, draw);
    fill_sphere(rows, p.n_rows(), p.d, draw);
    for (std::int64_t i = 0; i <= p.n; ++i) {
      indptr.at(i) = static_cast<I>(border[static_cast<std::size_t>(i)]);
    }
    for (std::int64_t e = 0; e < nnz; ++e) {
      data.at(e) = draw();
      indices.at(e) = static_cast<I>(below(p.m));
    }
    for (std::int64_t a = 0; a < p.k; ++a) log_counts.at(a) = draw();
    fill_terms(means, covariances, p.k, p.d, draw);
    for (std::int64_t i = 0; i < p.n; ++i) {
      labels.at(i) = p.c > 0 ? below(p.c) : 0;
      null_weights.at(i) = draw();
    }
    fill_terms(shifts, slopes, p.c, p.d, draw);
    for (std::int64_t j = 0; j < p.d; ++j) null.at(j) = draw();
  }

 private:
  template <class F>
  static void fill_sphere(strided_array<T>& to, std::int64_t count, std::int64_t d, F&& draw) {
    for (std::int64_t i = 0; i < count; ++i) {
      long double square = 0;
      for (std::int64_t j = 0; j < d; ++j) {
        to.at(i, j) = draw();
        square += static_cast<long double>(to.at(i, j)) * to.at(i, j);
      }
      for (std::int64_t j = 0; j < d; ++j) {
        to.at(i, j) = static_cast<T>(to.at(i, j) / std::sqrt(square));
      }
    }
  }

  template <class F>
  static void fill_terms(strided_array<T>& vectors, strided_array<T>& matrices, std::int64_t count,
                         std::int64_t d, F&& draw) {
    for (std::int64_t a = 0; a < count; ++a) {
      for (std::int64_t i = 0; i < d; ++i) {
        vectors.at(a, i) = draw();
        for (std::int64_t j = 0; j <= i; ++j) {
          matrices.at(a, i, j) = draw();
          matrices.at(a, j, i) = matrices.at(a, i, j);
        }
      }
    }
  }
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

template <class T>
struct result {
  strided_array<T> out;
  strided_array<T> attraction;
  strided_array<T> log_z;

  explicit result(const problem& p)
      : out({p.n, p.d}, p.how), attraction({p.n}, p.how), log_z({p.n}, p.how) {
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t j = 0; j < p.d; ++j) out.at(i, j) = static_cast<T>(kNaN);
      attraction.at(i) = static_cast<T>(kNaN);
      log_z.at(i) = static_cast<T>(kNaN);
    }
  }

  // Element for element, whatever the layouts are; NaN is as good as NaN.
  bool same_row(const problem& p, const result& other, std::int64_t i) const {
    const auto same = [](T a, T b) { return a == b || (std::isnan(a) && std::isnan(b)); };
    bool is_same =
        same(attraction.at(i), other.attraction.at(i)) && same(log_z.at(i), other.log_z.at(i));
    for (std::int64_t j = 0; j < p.d; ++j) {
      is_same = is_same && same(out.at(i, j), other.out.at(i, j));
    }
    return is_same;
  }
  bool same(const problem& p, const result& other) const {
    bool is_same = true;
    for (std::int64_t i = 0; i < p.n; ++i) is_same = is_same && same_row(p, other, i);
    return is_same;
  }
  bool is_nan(const problem& p, std::int64_t i) const {
    bool all = true;
    for (std::int64_t j = 0; j < p.d; ++j) all = all && std::isnan(out.at(i, j));
    return all;
  }
};

template <class T, class I>
result<T> turn(const problem& p, const arrays<T, I>& with, int n_threads = 0) {
  subquad::context how{};
  how.n_threads = n_threads;
  result<T> to(p);
  if (p.in_place) {
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t j = 0; j < p.d; ++j) to.out.at(i, j) = with.x.at(i, j);
    }
  }
  workspace memory(
      subquad::embedding_step_workspace(p.n, p.n_rows(), with.nnz, p.d, p.k, p.c, sizeof(T)));
  const subquad::array_view data = with.data.view();
  const subquad::array_view indices = with.indices.view();
  const subquad::array_view indptr = with.indptr.view();
  const subquad::array_view log_counts = with.log_counts.view();
  const subquad::array_view means = with.means.view();
  const subquad::array_view covariances = with.covariances.view();
  const subquad::array_view labels = with.labels.view();
  const subquad::array_view shifts = with.shifts.view();
  const subquad::array_view slopes = with.slopes.view();
  const subquad::array_view null_weights = with.null_weights.view();
  const subquad::array_view null = with.null.view();
  const subquad::array_view out = to.out.view();
  const subquad::array_view attraction = to.attraction.view();
  const subquad::array_view log_z = to.log_z.view();
  const auto where = [](bool is, const subquad::array_view& array) {
    return is ? &array : nullptr;
  };
  const bool has_matrix = p.m > 0;
  subquad::embedding_step(
      p.in_place ? out : with.x.view(), where(has_matrix, data), where(has_matrix, indices),
      where(has_matrix, indptr), with.rows.view(), p.scale, where(p.k > 0, log_counts),
      where(p.k > 0, means), where(p.k > 0, covariances), where(p.c > 0, labels),
      where(p.c > 0, shifts), where(p.c > 0, slopes), where(p.null, null_weights),
      where(p.null, null), p.step, where(p.with_out, out), where(p.with_attraction, attraction),
      where(p.with_log_z && p.k > 0, log_z), memory.view(), how);
  SUBQUAD_CHECK(memory.is_kept());
  SUBQUAD_CHECK(to.out.touched_gaps() == 0);
  SUBQUAD_CHECK(to.attraction.touched_gaps() == 0);
  SUBQUAD_CHECK(to.log_z.touched_gaps() == 0);
  return to;
}

struct value {
  long double is = 0;
  long double size = 0;  // the sum of the terms' magnitudes

  void add(long double term) { add(term, std::abs(term)); }
  void add(long double term, long double magnitude) {
    is += term;
    size += magnitude;
  }
};

// gamma_m = m u / (1 - m u), u half the distance from 1 to the next number.
template <class T>
long double gamma_of(std::int64_t m) {
  const long double unit = static_cast<long double>(m) * std::numeric_limits<T>::epsilon() / 2;
  return unit / (1 - unit);
}

// shift + matrix x for row i, by dimension.
template <class T>
std::vector<value> affine(const strided_array<T>& vectors, const strided_array<T>& matrices,
                          std::int64_t a, const strided_array<T>& x, std::int64_t i,
                          std::int64_t d) {
  std::vector<value> values(static_cast<std::size_t>(d));
  for (std::int64_t j = 0; j < d; ++j) {
    value& to = values[static_cast<std::size_t>(j)];
    to.add(vectors.at(a, j));
    for (std::int64_t l = 0; l < d; ++l) {
      to.add(static_cast<long double>(matrices.at(a, j, l)) * x.at(i, l));
    }
  }
  return values;
}

template <class T, class I>
void row_is_right(const problem& p, const arrays<T, I>& with, const result<T>& found,
                  std::int64_t i, bool& close) {
  const auto d = static_cast<std::size_t>(p.d);
  const auto at = [](std::size_t j) { return static_cast<std::int64_t>(j); };
  const auto scale = static_cast<long double>(static_cast<T>(p.scale));
  // Roundings that a sum over the dimensions passes at most, besides those of its terms.
  const std::int64_t sum = 35 + p.d / 64;
  std::vector<value> g(d);
  std::vector<long double> error(d);  // of g
  const std::int64_t begin = with.border[static_cast<std::size_t>(i)];
  const std::int64_t end = with.border[static_cast<std::size_t>(i) + 1];
  // What a term passes: its product, fewer than n sums, 3 of sums side by side, and the scale.
  const long double pull_bound = gamma_of<T>(end - begin + 6);
  value attraction;
  for (std::size_t j = 0; j < d; ++j) {
    value pull;
    if (p.m > 0) {
      for (std::int64_t e = begin; e < end; ++e) {
        pull.add(scale * with.data.at(e) * with.rows.at(with.indices.at(e), at(j)));
      }
    } else {
      pull.add(scale * with.rows.at(i, at(j)));
    }
    g[j].add(-pull.is, pull.size);
    error[j] = pull_bound * pull.size;
    const long double x = with.x.at(i, at(j));
    attraction.add(x * pull.is, std::abs(x) * pull.size);
  }
  if (p.with_attraction) {
    close = close && std::abs(found.attraction.at(i) - attraction.is) <=
                         (pull_bound + gamma_of<T>(sum + 2)) * attraction.size;
  }

  // A term passes its product, d sums and the start; a score all that again, halved.
  const long double affine_bound = gamma_of<T>(p.d + 2);
  std::vector<value> scores;
  long double peak = -std::numeric_limits<long double>::infinity();
  long double score_error = 0;
  for (std::int64_t a = 0; a < p.k; ++a) {
    value score;
    score.add(with.log_counts.at(a));
    if (std::isfinite(score.is)) {
      const auto terms = affine(with.means, with.covariances, a, with.x, i, p.d);
      for (std::size_t j = 0; j < d; ++j) {
        const long double x = with.x.at(i, at(j));
        const long double mean = with.means.at(a, at(j));
        score.add(x * (terms[j].is + mean) / 2, std::abs(x) * (terms[j].size + std::abs(mean)) / 2);
      }
      // In units of log 2 and back: two roundings more.
      score_error = std::max(score_error, gamma_of<T>(p.d + sum + 8) * score.size);
      peak = std::max(peak, score.is);
    }
    scores.push_back(score);
  }
  long double total = 0;
  for (const value& score : scores) {
    if (std::isfinite(score.is)) total += std::exp(score.is - peak);
  }
  const long double log_z = peak + std::log(total);
  if (p.k > 0 && p.with_log_z) {
    // An error of the scores is one of log_z, beside those of exponentials, of their sum (rounded
    // and rescaled once for each) and of the last sum.
    const long double bound =
        score_error + gamma_of<T>(4 * p.k + 8) * (1 + std::abs(log_z) + std::abs(peak));
    close = close && (total == 0 ? found.log_z.at(i) == -kInfinity
                                 : std::abs(found.log_z.at(i) - log_z) <= bound);
  }
  for (std::int64_t a = 0; a < p.k && total > 0; ++a) {
    const value& score = scores[static_cast<std::size_t>(a)];
    if (!std::isfinite(score.is)) continue;
    const long double weight = std::exp(score.is - log_z);
    const auto terms = affine(with.means, with.covariances, a, with.x, i, p.d);
    // A weight has the errors of two scores, and is multiplied, rescaled and added up.
    const long double weight_bound = 2 * score_error + gamma_of<T>(6 * p.k + 10);
    for (std::size_t j = 0; j < d; ++j) {
      g[j].add(weight * terms[j].is);
      error[j] += weight * (affine_bound + 2 * weight_bound) * terms[j].size;
    }
  }
  if (p.c > 0) {
    const auto terms = affine(with.shifts, with.slopes, with.labels.at(i), with.x, i, p.d);
    for (std::size_t j = 0; j < d; ++j) {
      g[j].add(terms[j].is);
      error[j] += affine_bound * terms[j].size;
    }
  }
  if (p.null) {
    for (std::size_t j = 0; j < d; ++j) {
      g[j].add(static_cast<long double>(with.null_weights.at(i)) * with.null.at(at(j)));
    }
  }
  if (!p.with_out) return;

  long double along = 0;
  long double square = 0;
  long double error_square = 0;
  long double x_square = 0;
  for (std::size_t j = 0; j < d; ++j) {
    const long double x = with.x.at(i, at(j));
    x_square += x * x;
    along += x * g[j].is;
    square += g[j].is * g[j].is;
    error[j] += gamma_of<T>(4) * g[j].size;  // the four groups of terms are added up
    error_square += error[j] * error[j];
  }
  along /= x_square;
  long double tangent_square = 0;
  for (std::size_t j = 0; j < d; ++j) {
    const long double t = g[j].is - along * with.x.at(i, at(j));
    tangent_square += t * t;
  }
  const long double tangent = std::sqrt(tangent_square);
  if (tangent == 0) {
    for (std::size_t j = 0; j < d; ++j)
      close = close && found.out.at(i, at(j)) == with.x.at(i, at(j));
    return;
  }
  // What the projections round is that of sums as large as g; what the first one leaves along x,
  // from the rounding of its sum and of |x|, the second takes off to second order.
  const long double tangent_error =
      std::sqrt(error_square) + gamma_of<T>(6) * std::sqrt(square) * 2;
  const auto step = static_cast<long double>(p.step);
  const long double cosine = std::sqrt((1 - step) * (1 + step));
  // An error of the tangent turns its direction by up to twice its share of it.
  const long double out_error = 2 * step * tangent_error / tangent + gamma_of<T>(sum + 10);
  long double difference = 0;
  long double out_square = 0;
  for (std::size_t j = 0; j < d; ++j) {
    const long double x = with.x.at(i, at(j)) / std::sqrt(x_square);
    const long double t = g[j].is - along * with.x.at(i, at(j));
    const long double expected = cosine * x - step * t / tangent;
    const long double out = found.out.at(i, at(j));
    difference += (out - expected) * (out - expected);
    out_square += out * out;
  }
  // In one dimension there is nothing but what rounding makes of the tangent.
  if (p.d > 1) close = close && std::sqrt(difference) <= out_error;
  // The square of the norm is made of those of x and the tangent; half the error of these sums, and
  // what that of a third leaves of their orthogonality.
  close = close && std::abs(std::sqrt(out_square) - 1) <= gamma_of<T>(sum + 10);
}

template <class T, class I>
void is_right(const problem& p) {
  const int before = checks::failures();
  const arrays<T, I> with(p);
  const result<T> found = turn(p, with);
  bool close = true;
  for (std::int64_t i = 0; i < p.n; ++i) row_is_right(p, with, found, i, close);
  SUBQUAD_CHECK(close);
  if (checks::failures() == before) return;
  std::printf("n %d m %d d %d k %d c %d null %d step %g layout %d, %d bytes\n",
              static_cast<int>(p.n), static_cast<int>(p.m), static_cast<int>(p.d),
              static_cast<int>(p.k), static_cast<int>(p.c), p.null, p.step, static_cast<int>(p.how),
              static_cast<int>(sizeof(T)));
}

template <class T, class I>
void shapes() {
  int turn_of = 0;
  for (const std::int64_t d : {2, 3, 17, 32, 129}) {
    for (const std::int64_t n : {1, 35}) {
      for (const std::int64_t k : {0, 1, 3}) {
        problem p;
        p.n = n;
        p.d = d;
        p.k = k;
        p.m = ++turn_of % 3 == 0 ? 0 : 23;
        p.c = turn_of % 2 == 0 ? 2 : 0;
        p.null = turn_of % 4 < 2;
        p.scale = turn_of % 5 == 0 ? -1.5 : 0.3;
        p.step = turn_of % 7 == 0 ? 1.0 : 0.6;
        is_right<T, I>(p);
      }
    }
  }
  problem p;
  p.n = 70;
  p.m = 9;
  p.k = 2;
  is_right<T, I>(p);  // d = 1
  p.d = 700;
  p.n = 5;
  p.k = 1;
  is_right<T, I>(p);
}

template <class T, class I>
void layouts() {
  for (const bool has_matrix : {false, true}) {
    problem p;
    p.n = 41;
    p.m = has_matrix ? 11 : 0;
    p.d = 6;
    p.k = 2;
    p.c = 3;
    p.null = true;
    const result<T> plain = turn(p, arrays<T, I>(p));
    for (const layout how : {layout::transposed, layout::flipped, layout::spaced}) {
      problem q = p;
      q.how = how;
      is_right<T, I>(q);
      if (!has_matrix) SUBQUAD_CHECK(turn(q, arrays<T, I>(q)).same(p, plain));
    }
  }
}

template <class T, class I>
void threads_and_places_do_not_show() {
  for (const bool has_matrix : {false, true}) {
    problem p;
    p.n = 3000;
    p.m = has_matrix ? 500 : 0;
    p.d = 40;
    p.k = 2;
    p.c = 2;
    p.null = true;
    const arrays<T, I> with(p);
    const result<T> one = turn(p, with, 1);
    for (const int threads : {2, 3}) SUBQUAD_CHECK(turn(p, with, threads).same(p, one));
    p.in_place = true;
    SUBQUAD_CHECK(turn(p, with, 2).same(p, one));
  }
}

// x as its own rows, and outputs that nobody asked for.
template <class T, class I>
void optional_outputs() {
  problem p;
  p.n = 37;
  p.m = 20;
  p.d = 5;
  for (const std::int64_t k : {0, 1, 3}) {
    p.k = k;
    const arrays<T, I> with(p);
    const result<T> full = turn(p, with);
    problem q = p;
    q.with_attraction = false;
    q.with_log_z = false;
    const result<T> bare = turn(q, with);
    bool same = true;
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t j = 0; j < p.d; ++j) same = same && full.out.at(i, j) == bare.out.at(i, j);
      same = same && std::isnan(bare.attraction.at(i)) && std::isnan(bare.log_z.at(i));
    }
    q = p;
    q.step = 0;
    q.with_out = false;
    const result<T> measured = turn(q, with);
    for (std::int64_t i = 0; i < p.n; ++i) {
      same = same && full.attraction.at(i) == measured.attraction.at(i) &&
             (k == 0 || full.log_z.at(i) == measured.log_z.at(i)) &&
             std::isnan(measured.out.at(i, 0));
    }
    SUBQUAD_CHECK(same);
    q.with_out = true;
    const result<T> still = turn(q, with);
    bool stays = true;
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t j = 0; j < p.d; ++j) {
        stays = stays && still.out.at(i, j) == with.x.at(i, j);
      }
    }
    SUBQUAD_CHECK(stays);
  }
}

// Components of weight 0, and none but these.
template <class T, class I>
void absent_components() {
  problem p;
  p.n = 40;
  p.d = 7;
  p.k = 3;
  arrays<T, I> with(p);
  const arrays<T, I> all(p);
  const auto absent = static_cast<T>(-kInfinity);
  for (const std::int64_t a : {0, 2}) {
    with.log_counts.at(a) = absent;
    for (std::int64_t j = 0; j < p.d; ++j) {
      with.means.at(a, j) = static_cast<T>(kNaN);
      with.covariances.at(a, j, 0) = static_cast<T>(kInfinity);
    }
  }
  problem q = p;
  q.k = 1;
  arrays<T, I> one(q);
  for (std::int64_t i = 0; i < p.n; ++i) {
    for (std::int64_t j = 0; j < p.d; ++j) {
      one.x.at(i, j) = with.x.at(i, j);
      one.rows.at(i, j) = with.rows.at(i, j);
    }
  }
  one.log_counts.at(0) = with.log_counts.at(1);
  for (std::int64_t j = 0; j < p.d; ++j) {
    one.means.at(0, j) = with.means.at(1, j);
    for (std::int64_t l = 0; l < p.d; ++l)
      one.covariances.at(0, j, l) = with.covariances.at(1, j, l);
  }
  SUBQUAD_CHECK(turn(p, with).same(p, turn(q, one)));
  // Between others, and first.
  for (const std::int64_t a : {0, 1}) {
    arrays<T, I> two(p);
    two.log_counts.at(a) = absent;
    const result<T> found = turn(p, two);
    bool close = true;
    for (std::int64_t i = 0; i < p.n; ++i) row_is_right(p, two, found, i, close);
    SUBQUAD_CHECK(close);
  }
  with.log_counts.at(1) = absent;
  problem none = p;
  none.k = 0;
  const result<T> empty = turn(p, with);
  const result<T> without = turn(none, all);
  bool same = true;
  for (std::int64_t i = 0; i < p.n; ++i) {
    same = same && empty.log_z.at(i) == absent;
    for (std::int64_t j = 0; j < p.d; ++j)
      same = same && empty.out.at(i, j) == without.out.at(i, j);
  }
  SUBQUAD_CHECK(same);
}

// Gradients whose squares overflow or vanish are followed as any others, and change nothing of the
// rows beside them.
template <class T, class I>
void magnitudes() {
  problem p;
  p.n = 45;
  p.d = 9;
  const int powers[] = {sizeof(T) == 4 ? -95 : -950, sizeof(T) == 4 ? -60 : -500,
                        sizeof(T) == 4 ? 60 : 500, sizeof(T) == 4 ? 110 : 1000};
  for (const int power : powers) {
    p.scale = std::ldexp(1.0, power);
    is_right<T, I>(p);
  }
  p.scale = 1;
  const result<T> plain = turn(p, arrays<T, I>(p));
  arrays<T, I> mixed(p);
  for (std::int64_t j = 0; j < p.d; ++j) {
    mixed.rows.at(5, j) = std::ldexp(mixed.rows.at(5, j), powers[0]);
    mixed.rows.at(12, j) = std::ldexp(mixed.rows.at(12, j), powers[3]);
    mixed.rows.at(20, j) = T(0);
  }
  const result<T> found = turn(p, mixed);
  bool right = true;
  for (std::int64_t i = 0; i < p.n; ++i) {
    row_is_right(p, mixed, found, i, right);
    const bool is_other = i == 5 || i == 12 || i == 20;
    right = right && (is_other || found.same_row(p, plain, i));
  }
  SUBQUAD_CHECK(right);
}

// Rows along an axis have tangents without rounding: however small beside the gradient, they are
// followed, and nothing is where they are 0.
template <class T, class I>
void small_tangents() {
  problem p;
  p.n = 34;
  p.d = 6;
  p.null = true;
  p.scale = 0;
  const struct {
    double step;
    double cosine;
  } turns[] = {{0.6, 0.8}, {1.0, 0.0}};
  const T ratios[] = {T(1), std::numeric_limits<T>::epsilon() / 16,
                      std::numeric_limits<T>::min() * 64};
  for (const auto& [step, cosine] : turns) {
    p.step = step;
    for (const T ratio : ratios) {
      for (const double size :
           {1.0, sizeof(T) == 4 ? 1e30 : 1e250, sizeof(T) == 4 ? 1e-6 : 1e-50}) {
        arrays<T, I> with(p);
        for (std::int64_t j = 0; j < p.d; ++j) {
          for (std::int64_t i = 0; i < p.n; ++i) with.x.at(i, j) = T(j == 2);
          with.null.at(j) = T(0);
        }
        with.null.at(2) = static_cast<T>(size);
        with.null.at(4) = -static_cast<T>(size) * ratio;
        for (std::int64_t i = 0; i < p.n; ++i) with.null_weights.at(i) = i % 3 == 0 ? T(0) : T(1);
        const result<T> found = turn(p, with);
        // sqrt, a division, products, the norm and its reciprocal.
        const double bound = 8 * static_cast<double>(std::numeric_limits<T>::epsilon());
        bool right = true;
        for (std::int64_t i = 0; i < p.n; ++i) {
          const bool stays = i % 3 == 0 || with.null.at(4) == T(0);
          for (std::int64_t j = 0; j < p.d; ++j) {
            const double moved = j == 2 ? cosine : (j == 4 ? p.step : 0.0);
            const double expected = stays ? double(j == 2) : moved;
            const double error = std::abs(static_cast<double>(found.out.at(i, j)) - expected);
            right = right && error <= (stays ? 0.0 : bound);
          }
        }
        SUBQUAD_CHECK(right);
      }
    }
  }
}

// Gradients nearly along x: the turn is by arcsin(step) or none, and where the tangent is above
// rounding it is followed.
template <class T, class I>
void gradients_along_x() {
  constexpr double kEpsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  const int top = sizeof(T) == 4 ? 126 : 1022;
  for (const double ratio : {1e-2, 1.0, 16.0, 1024.0, 1e6}) {
    for (const int power : {0, top, -top, 10 - top, top - 30}) {
      problem p;
      p.n = 45;
      p.d = 33;
      arrays<T, I> with(p);
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t j = 0; j < p.d; ++j) {
          const double along = 0.9 * static_cast<double>(with.x.at(i, j));
          const double beside = ratio * kEpsilon * static_cast<double>(with.rows.at(i, j));
          with.rows.at(i, j) = static_cast<T>(std::ldexp(along + beside, power));
        }
      }
      const result<T> found = turn(p, with);
      bool close = true;
      for (std::int64_t i = 0; i < p.n; ++i) row_is_right(p, with, found, i, close);
      SUBQUAD_CHECK(close);
    }
  }
  for (const std::int64_t d : {2, 3, 4}) {
    for (const double step : {0.6, 0.8}) {
      problem p;
      p.n = 3000;
      p.d = d;
      p.step = step;
      p.scale = 0.3;
      arrays<T, I> with(p);
      for (std::int64_t i = 0; i < p.n; ++i) {
        for (std::int64_t j = 0; j < p.d; ++j) with.rows.at(i, j) = with.x.at(i, j);
      }
      const result<T> found = turn(p, with);
      bool right = true;
      for (std::int64_t i = 0; i < p.n; ++i) {
        bool stays = true;
        double cosine = 0;
        for (std::int64_t j = 0; j < p.d; ++j) {
          const T x = with.x.at(i, j);
          stays = stays && found.out.at(i, j) == x;
          cosine += static_cast<double>(found.out.at(i, j)) * static_cast<double>(x);
        }
        // A tangent of which the second projection left more than half is orthogonal to x within
        // a few units of rounding, and so is the norm of x.
        right = right && (stays || std::abs(cosine - std::sqrt(1 - step * step)) <= 16 * kEpsilon);
      }
      SUBQUAD_CHECK(right);
    }
  }
}

// The largest gradients there are, and counts of which one is infinite.
template <class T, class I>
void largest_values() {
  const int top = sizeof(T) == 4 ? 126 : 1022;
  for (const double size : {1.0, 1.9}) {
    problem p;
    p.n = 20;
    p.d = 5;
    p.scale = std::ldexp(size, top);
    is_right<T, I>(p);
  }
  problem p;
  p.n = 20;
  p.d = 5;
  p.k = 4;
  arrays<T, I> with(p);
  with.log_counts.at(2) = static_cast<T>(-kInfinity);
  arrays<T, I> other(p);
  other.log_counts.at(2) = static_cast<T>(-kInfinity);
  for (std::int64_t j = 0; j < p.d; ++j) with.means.at(2, j) = static_cast<T>(kNaN);
  with.covariances.at(2, 0, 0) = static_cast<T>(kInfinity);
  SUBQUAD_CHECK(turn(p, with).same(p, turn(p, other)));
  arrays<T, I> infinite(p);
  infinite.log_counts.at(1) = static_cast<T>(kInfinity);
  SUBQUAD_CHECK(turn(p, infinite).log_z.at(3) == static_cast<T>(kInfinity));
}

// NaN and infinities make the rows NaN that depend on them, and change no others.
template <class T, class I>
void not_finite() {
  problem p;
  p.n = 50;
  p.m = 12;
  p.d = 19;
  p.k = 2;
  p.c = 2;
  p.null = true;
  const arrays<T, I> clean(p);
  const result<T> plain = turn(p, clean);
  const auto check = [&](const arrays<T, I>& with, auto&& depends) {
    const result<T> found = turn(p, with);
    bool right = true;
    for (std::int64_t i = 0; i < p.n; ++i) {
      right = right && (depends(i) ? found.is_nan(p, i) : found.same_row(p, plain, i));
    }
    SUBQUAD_CHECK(right);
  };
  for (const double bad : {kNaN, kInfinity, -kInfinity}) {
    const auto set = static_cast<T>(bad);
    arrays<T, I> with(p);
    with.rows.at(4, 7) = set;
    check(with, [&](std::int64_t i) {
      bool meets = false;
      for (std::int64_t e = with.border[static_cast<std::size_t>(i)];
           e < with.border[static_cast<std::size_t>(i) + 1]; ++e) {
        meets = meets || with.indices.at(e) == 4;
      }
      return meets;
    });
    arrays<T, I> in_x(p);
    in_x.x.at(13, 3) = set;
    check(in_x, [](std::int64_t i) { return i == 13; });
    arrays<T, I> in_slopes(p);
    in_slopes.slopes.at(1, 4, 4) = set;
    check(in_slopes, [&](std::int64_t i) { return in_slopes.labels.at(i) == 1; });
    arrays<T, I> in_weights(p);
    in_weights.null_weights.at(49) = set;
    check(in_weights, [](std::int64_t i) { return i == 49; });
    arrays<T, I> in_means(p);
    in_means.means.at(1, 5) = set;
    if (std::isnan(bad)) check(in_means, [](std::int64_t) { return true; });
  }
}

template <class T, class I>
void empty() {
  problem p;
  p.n = 0;
  p.d = 4;
  p.k = 2;
  p.c = 1;
  p.null = true;
  is_right<T, I>(p);
  p.m = 3;
  is_right<T, I>(p);
  p.n = 3;
  p.d = 0;
  is_right<T, I>(p);
}

template <class T, class I>
void values_out_of_range() {
  problem p;
  p.n = 30;
  p.m = 5;
  p.d = 4;
  p.c = 2;
  const auto refuses = [&](const arrays<T, I>& with, const char* part) {
    SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { turn(p, with); }, part));
  };
  for (const layout how : {layout::contiguous, layout::spaced}) {
    p.how = how;
    arrays<T, I> with(p);
    const I kept = with.indices.at(3);
    with.indices.at(3) = 5;
    refuses(with, "indices: expected at least 0 and less than the 5 rows of rows, got 5");
    with.indices.at(3) = std::numeric_limits<I>::min();
    refuses(with, "at position 3");
    with.indices.at(3) = kept;
    with.indptr.at(0) = -1;
    refuses(with, "indptr: expected numbers that do not decrease");
    with.indptr.at(0) = 0;
    with.indptr.at(30) = static_cast<I>(with.nnz + 1);
    refuses(with, "at position 30");
    with.indptr.at(30) = static_cast<I>(with.nnz);
    with.labels.at(29) = 2;
    refuses(with,
            "labels: expected at least 0 and less than the 2 rows of shifts, got 2 at position 29");
    with.labels.at(29) = -1;
    refuses(with, "got -1 at position 29");
  }
}

template <class T, class I>
void everything() {
  shapes<T, I>();
  layouts<T, I>();
  threads_and_places_do_not_show<T, I>();
  optional_outputs<T, I>();
  absent_components<T, I>();
  magnitudes<T, I>();
  small_tangents<T, I>();
  gradients_along_x<T, I>();
  largest_values<T, I>();
  not_finite<T, I>();
  empty<T, I>();
  values_out_of_range<T, I>();
}

// Every argument by its place, so that one at a time can be wrong or absent.
void refusals() {
  using doubles = strided_array<double>;
  using floats = strided_array<float>;
  const doubles x({3, 2});
  const doubles rows({4, 2});
  const doubles data({5});
  const strided_array<std::int64_t> indices({5});
  const strided_array<std::int64_t> indptr({4});
  const strided_array<std::int32_t> narrow({4});
  const doubles log_counts({2});
  const doubles means({2, 2});
  const doubles covariances({2, 2, 2});
  const strided_array<std::int64_t> labels({3});
  const doubles weights({3});
  const doubles null({2});
  const doubles out({3, 2});
  const doubles cube({3, 2, 2});
  const floats wrong({3, 2});
  const doubles none({0, 2});
  const doubles long_vector({6});
  const strided_array<std::int64_t> long_indices({6});
  workspace enough(1 << 16);
  enum place {
    kX,
    kData,
    kIndices,
    kIndptr,
    kRows,
    kLogCounts,
    kMeans,
    kCovariances,
    kLabels,
    kShifts,
    kSlopes,
    kNullWeights,
    kNull,
    kOut,
    kAttraction,
    kLogZ,
    kCount
  };
  double step = 0.5;
  workspace* memory = &enough;
  const auto call =
      [&](std::initializer_list<std::pair<place, const subquad::array_view*>> changes) {
        const subquad::array_view usual[kCount] = {
            x.view(),      data.view(),       indices.view(),     indptr.view(),
            rows.view(),   log_counts.view(), means.view(),       covariances.view(),
            labels.view(), means.view(),      covariances.view(), weights.view(),
            null.view(),   out.view(),        weights.view(),     weights.view()};
        const subquad::array_view* a[kCount];
        for (int i = 0; i < kCount; ++i) a[i] = &usual[i];
        for (const auto& change : changes) a[change.first] = change.second;
        subquad::embedding_step(*a[kX], a[kData], a[kIndices], a[kIndptr], *a[kRows], 1,
                                a[kLogCounts], a[kMeans], a[kCovariances], a[kLabels], a[kShifts],
                                a[kSlopes], a[kNullWeights], a[kNull], step, a[kOut],
                                a[kAttraction], a[kLogZ], memory->view());
      };
  const auto bad_value = [&](place which, const subquad::array_view* array, const char* part) {
    SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { call({{which, array}}); }, part));
  };
  const auto bad_type = [&](place which, const subquad::array_view& array, const char* part) {
    SUBQUAD_CHECK(checks::throws<subquad::type_error>([&] { call({{which, &array}}); }, part));
  };
  const subquad::array_view too_long = long_vector.view();
  const subquad::array_view too_many = long_indices.view();
  const subquad::array_view too_deep = cube.view();
  const subquad::array_view no_rows = none.view();
  const subquad::array_view other_rows = rows.view();
  bad_type(kX, narrow.view(), "x: expected float32 or float64");
  bad_value(kX, &too_deep, "x: expected shape (n, d)");
  bad_type(kRows, wrong.view(), "rows");
  bad_value(kRows, &too_deep, "rows: expected shape (m, d)");
  bad_value(kData, nullptr, "data: expected all 3 arrays of its group or none, got 2");
  bad_value(kData, &other_rows, "data: expected shape (nnz,)");
  bad_value(kIndices, &too_many, "indices");
  bad_type(kIndptr, narrow.view(), "indptr");
  bad_type(kIndices, data.view(), "indices");
  bad_value(kLogCounts, nullptr, "log_counts: expected all 3");
  bad_value(kLogCounts, &too_long, "log_counts");
  bad_value(kMeans, &no_rows, "means: expected shape (k, d) with k >= 1");
  bad_value(kCovariances, &too_deep, "covariances");
  bad_type(kLabels, weights.view(), "labels");
  bad_value(kSlopes, nullptr, "labels: expected all 3");
  bad_value(kSlopes, &too_deep, "slopes");
  bad_type(kShifts, wrong.view(), "shifts");
  bad_value(kNull, nullptr, "null_weights: expected all 2");
  bad_value(kNullWeights, &too_long, "null_weights");
  bad_value(kNull, &too_long, "null");
  bad_value(kOut, nullptr, "out: expected an array where step is not 0");
  bad_value(kOut, &other_rows, "out");
  bad_value(kAttraction, &too_long, "attraction");
  bad_value(kLogZ, &too_long, "log_z");
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call({{kLogCounts, nullptr}, {kMeans, nullptr}, {kCovariances, nullptr}}); },
      "log_z: expected none"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call({{kData, nullptr}, {kIndices, nullptr}, {kIndptr, nullptr}}); },
      "rows: expected shape (n, d)"));
  for (const double other : {-0.1, 1.5, kNaN}) {
    step = other;
    SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { call({}); },
                                                            "step: expected a number from 0 to 1"));
  }
  step = 0.5;
  workspace small(8);
  memory = &small;
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { call({}); }, "workspace"));
}

}  // namespace

int main() {
  refusals();
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    everything<float, std::int32_t>();
    everything<double, std::int64_t>();
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}
