// Contracts stand in embedding_kernels.hpp. Rows lie in lanes, transposed: the matrices are the
// broadcast operand of the products, and every sum over a row adds up whole vectors.
#include "embedding_kernels.hpp"

#include "log_sum_exp.inl"
#include "tile_product.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// Rows of a matrix in groups of about equal size, none larger than a tile.
struct row_groups {
  std::int64_t count;
  std::int64_t rows;    // of a group,
  std::int64_t larger;  // and one more of so many groups

  SUBQUAD_ALWAYS_INLINE explicit row_groups(std::int64_t d)
      : count(divide_up(d, kTileRows)),
        rows(count > 0 ? d / count : 0),
        larger(count > 0 ? d % count : 0) {}

  SUBQUAD_ALWAYS_INLINE std::int64_t size(std::int64_t group) const {
    return group < larger ? rows + 1 : rows;
  }
};

// [group][column][row of the group].
template <class T>
void pack(matrix_view<const T> matrix, std::int64_t d, T* packed) {
  const row_groups groups(d);
  std::int64_t row = 0;
  for (std::int64_t g = 0; g < groups.count; ++g) {
    const std::int64_t size = groups.size(g);
    for (std::int64_t k = 0; k < d; ++k) {
      for (std::int64_t r = 0; r < size; ++r) *packed++ = matrix(row + r, k);
    }
    row += size;
  }
}

template <class T, int kRows>
void multiply_group(std::int64_t d, const T* left, vector_view<const T> start, const T* x, T* out) {
  constexpr int kColumns = kTileColumns<T>;
  vec<T> acc[kRows][kTileVectors];
  SUBQUAD_UNROLL_ROWS
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = broadcast(start[r]);
    acc[r][1] = acc[r][0];
  }
  for (std::int64_t k = 0; k < d; ++k) {
    const vec<T> x0 = load(x);
    const vec<T> x1 = load(x + lanes<T>);
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kRows; ++r) {
      const vec<T> value = broadcast(left[r]);
      acc[r][0] += value * x0;
      acc[r][1] += value * x1;
    }
    left += kRows;
    x += kColumns;
  }
  SUBQUAD_UNROLL_ROWS
  for (int r = 0; r < kRows; ++r) {
    store(out + r * kColumns, acc[r][0]);
    store(out + r * kColumns + lanes<T>, acc[r][1]);
  }
}

template <class T, int kRows>
void multiply_rows(std::int64_t rows, std::int64_t d, const T* left, vector_view<const T> start,
                   const T* x, T* out) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<T, kRows - 1>(rows, d, left, start, x, out);
  }
  multiply_group<T, kRows>(d, left, start, x, out);
}

// out = start + C x, [d][columns] as x is.
template <class T>
void multiply(std::int64_t d, const T* packed, vector_view<const T> start, const T* x, T* out) {
  const row_groups groups(d);
  for (std::int64_t g = 0; g < groups.count; ++g) {
    const std::int64_t size = groups.size(g);
    multiply_rows<T, kTileRows>(size, d, packed, start, x, out);
    packed += size * d;
    start = start.from(size);
    out += size * kTileColumns<T>;
  }
}

// Calls term(k, sums) for every k < d. Sums stand side by side, and are those of blocks: a term
// passes at most 34 + d / 64 of them.
template <int kSums, class T, class F>
SUBQUAD_INLINE void sums_over(std::int64_t d, vec<T> (&total)[kSums], F&& term) {
  constexpr std::int64_t kBlock = 64;
  constexpr int kBeside = kSums == 1 ? 4 : 2;
  for (int s = 0; s < kSums; ++s) total[s] = vec<T>{};
  for (std::int64_t k = 0; k < d;) {
    const std::int64_t end = smaller(d, k + kBlock);
    vec<T> acc[kBeside][kSums] = {};
    for (; k + kBeside <= end; k += kBeside) {
#pragma GCC unroll 4
      for (int u = 0; u < kBeside; ++u) term(k + u, acc[u]);
    }
    for (; k < end; ++k) term(k, acc[0]);
    for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 4
      for (int u = 1; u < kBeside; ++u) acc[0][s] += acc[u][s];
      total[s] += acc[0][s];
    }
  }
}

template <class T, class F>
SUBQUAD_INLINE vec<T> sum_over(std::int64_t d, F&& term) {
  vec<T> total[1];
  sums_over<1, T>(d, total, [&](std::int64_t k, vec<T>(&acc)[1]) __attribute__((always_inline)) {
    acc[0] += term(k);
  });
  return total[0];
}

template <class T>
SUBQUAD_INLINE vec<T> square_root(vec<T> x) {
  T memory[lanes<T>];
  store(memory, x);
  for (int c = 0; c < lanes<T>; ++c) {
    memory[c] = sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(memory[c])))
                               : static_cast<T>(__builtin_sqrt(static_cast<double>(memory[c])));
  }
  return load(memory);
}

template <class T>
SUBQUAD_INLINE bool holds_everywhere(ivec<T> mask) {
  std::uint64_t words[SUBQUAD_VECTOR_BYTES / 8];
  __builtin_memcpy(words, &mask, sizeof words);
  std::uint64_t all = ~std::uint64_t{0};
  for (const std::uint64_t word : words) all &= word;
  return all == ~std::uint64_t{0};
}

template <class T>
SUBQUAD_INLINE vec<T> magnitude(vec<T> x) {
  constexpr typename vector_of<T>::scalar_int kSign =
      ~(typename vector_of<T>::scalar_int{1}
        << (8 * static_cast<int>(sizeof(typename vector_of<T>::scalar_int)) - 1));
  return from_bits<T>(bits_of<T>(x) & kSign);
}

// The power of two that takes x >= 0 to [1, 2), or as near as there is a normal one.
template <class T>
SUBQUAD_INLINE vec<T> inverse_power(vec<T> x) {
  using format = float_format<T>;
  const ivec<T> exponent = bits_of<T>(x) >> format::kFractionBits;
  const ivec<T> inverse = 2 * format::kBias - exponent;
  const ivec<T> least = inverse < 1 ? ivec<T>{} + 1 : inverse;
  const ivec<T> within =
      least > 2 * format::kBias - 1 ? ivec<T>{} + (2 * format::kBias - 1) : least;
  return from_bits<T>(within << format::kFractionBits);
}

// Of the rows in the lanes: [d][columns] each.
template <class T>
struct step_layout {
  T* x;
  T* pull;
  T* sum;   // of the terms that come with matrices, then g, then the result
  T* term;  // one of them, where they are several

  SUBQUAD_ALWAYS_INLINE step_layout(void* scratch, std::int64_t d)
      : x(static_cast<T*>(scratch)),
        pull(x + d * kTileColumns<T>),
        sum(pull + d * kTileColumns<T>),
        term(sum + d * kTileColumns<T>) {}
};

template <class T>
std::size_t scratch_size(std::int64_t d, std::int64_t terms) {
  return sizeof(T) * static_cast<std::size_t>((terms > 1 ? 4 : 3) * d * kTileColumns<T>);
}

template <class T>
SUBQUAD_INLINE vec<T> gather(vector_view<const T> from, std::int64_t count) {
  T memory[lanes<T>] = {};
  for (std::int64_t c = 0; c < smaller<std::int64_t>(lanes<T>, count); ++c) memory[c] = from[c];
  return load(memory);
}

template <class T>
SUBQUAD_INLINE void scatter(vec<T> values, std::int64_t count, vector_view<T> to) {
  if (to.stride == 1 && count >= lanes<T>) return store(to.data, values);
  T memory[lanes<T>];
  store(memory, values);
  for (std::int64_t c = 0; c < smaller<std::int64_t>(lanes<T>, count); ++c) to[c] = memory[c];
}

// s of one component for the rows in the lanes of x, less the log count; term = means + C x.
template <class T>
SUBQUAD_INLINE vec<T> score_of(vector_view<const T> means, std::int64_t d, const T* x,
                               const T* term) {
  constexpr int kColumns = kTileColumns<T>;
  return sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
    return load(x + k * kColumns) * (T(0.5) * (load(term + k * kColumns) + means[k]));
  });
}

// layout.sum = what the components add to g; 0 without any that counts. Where there is only one, it
// is returned, and its score, which is log_z, left to the caller unless labels add terms; else -1.
template <class T>
std::int64_t add_components(const embedding_step_task<T>& task, const step_layout<T>& layout,
                            std::int64_t row, std::int64_t width) {
  constexpr int kColumns = kTileColumns<T>;
  constexpr int L = lanes<T>;
  const std::int64_t d = task.d;
  const auto counts = [&](std::int64_t a) { return task.log_counts[a] != -kInfinity<T>; };
  std::int64_t active = 0;
  std::int64_t first = 0;
  for (std::int64_t a = task.k; a-- > 0;) {
    if (!counts(a)) continue;
    ++active;
    first = a;
  }
  const auto write_log_z = [&](int v, vec<T> value) {
    if (task.log_z && width > v * L) scatter<T>(value, width - v * L, task.log_z.from(row + v * L));
  };
  if (active == 0) {
    for (std::int64_t i = 0; i < d * kColumns; ++i) layout.sum[i] = T(0);
    for (int v = 0; v < kTileVectors; ++v) write_log_z(v, broadcast(-kInfinity<T>));
    return -1;
  }
  if (active == 1) {
    const vector_view<const T> means{&task.means(first, 0), task.means.column_stride};
    multiply<T>(d, task.covariances + first * d * d, means, layout.x, layout.sum);
    if (!task.labels) return first;
    for (int v = 0; v < kTileVectors; ++v) {
      write_log_z(
          v, task.log_counts[first] + score_of<T>(means, d, layout.x + v * L, layout.sum + v * L));
    }
    return -1;
  }
  log_sum_exp<T> states[kTileVectors];
  for (std::int64_t a = first; a < task.k; ++a) {
    if (!counts(a)) continue;
    const vector_view<const T> means{&task.means(a, 0), task.means.column_stride};
    T* to = a == first ? layout.sum : layout.term;
    multiply<T>(d, task.covariances + a * d * d, means, layout.x, to);
    for (int v = 0; v < kTileVectors; ++v) {
      const vec<T> score =
          (task.log_counts[a] + score_of<T>(means, d, layout.x + v * L, to + v * L)) * kLog2E<T>;
      if (a == first) {
        states[v] = {score, broadcast(T(1))};
        continue;
      }
      // What is NaN stays NaN: it makes either factor so, and with it the sum.
      const vec<T> shift = max<T>(score, states[v].shift);
      const vec<T> before = exp2_bounded<T>(states[v].shift - shift);
      const vec<T> here = exp2_bounded<T>(score - shift);
      states[v] = {shift, states[v].sum * before + here};
      for (std::int64_t k = 0; k < d; ++k) {
        T* at = layout.sum + k * kColumns + v * L;
        store(at, load(at) * before + load(to + k * kColumns + v * L) * here);
      }
    }
  }
  for (int v = 0; v < kTileVectors; ++v) {
    const vec<T> infinite = broadcast(kInfinity<T>);
    write_log_z(v, states[v].shift == infinite ? infinite : finalize<T>(states[v]));
    const vec<T> weight = T(1) / states[v].sum;
    for (std::int64_t k = 0; k < d; ++k) {
      T* at = layout.sum + k * kColumns + v * L;
      store(at, load(at) * weight);
    }
  }
  return -1;
}

// Adds shifts_c + slopes_c x to layout.sum, label by label, where a lane has it; in place of what
// stands there where these terms are the first.
template <class T>
void add_own_terms(const embedding_step_task<T>& task, const step_layout<T>& layout,
                   std::int64_t row, std::int64_t width, bool is_first) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t d = task.d;
  const vector_view<const std::int64_t> labels = task.labels.from(row);
  bool is_done[kColumns] = {};
  for (std::int64_t c = 0; c < width; ++c) {
    if (is_done[c]) continue;
    const std::int64_t label = labels[c];
    typename vector_of<T>::scalar_int mask[kColumns] = {};
    for (std::int64_t i = c; i < width; ++i) {
      if (labels[i] != label) continue;
      is_done[i] = true;
      mask[i] = -1;
    }
    T* to = is_first && c == 0 ? layout.sum : layout.term;
    multiply<T>(d, task.slopes + label * d * d, {&task.shifts(label, 0), task.shifts.column_stride},
                layout.x, to);
    if (to == layout.sum) continue;
    for (int v = 0; v < kTileVectors; ++v) {
      ivec<T> has_label;
      __builtin_memcpy(&has_label, mask + v * lanes<T>, sizeof has_label);
      for (std::int64_t k = 0; k < d; ++k) {
        T* at = layout.sum + k * kColumns + v * lanes<T>;
        const vec<T> term = load(to + k * kColumns + v * lanes<T>);
        const vec<T> before = load(at);
        store(at, has_label ? (is_first ? term : before + term) : before);
      }
    }
  }
}

// What the tangent of a row is made of: t = g - along x - rest x.
template <class T>
struct projection {
  vec<T> along;
  vec<T> rest;
};

template <class T>
SUBQUAD_INLINE vec<T> tangent_of(const projection<T>& p, vec<T> g, vec<T> x) {
  return (g - p.along * x) - p.rest * x;
}

// Sums over a row.
template <class T>
struct row_sums {
  vec<T> x_pull;
  vec<T> x_g;
  vec<T> x_x;
  vec<T> score;  // less the log count
};

// What stands in g becomes the whole gradient; with kIsScored it was that of a component with these
// means.
template <class T, bool kHasNull, bool kIsScored>
SUBQUAD_INLINE row_sums<T> make_gradient(const embedding_step_task<T>& task, vec<T> null_weights,
                                         vector_view<const T> means, const T* x, const T* pull,
                                         T* g) {
  constexpr int kColumns = kTileColumns<T>;
  vec<T> total[4];
  sums_over<4, T>(task.d, total,
                  [&](std::int64_t k, vec<T>(&acc)[4]) __attribute__((always_inline)) {
                    const vec<T> x_k = load(x + k * kColumns);
                    const vec<T> pull_k = load(pull + k * kColumns);
                    const vec<T> term = load(g + k * kColumns);
                    if constexpr (kIsScored) acc[3] += x_k * (T(0.5) * (term + means[k]));
                    vec<T> g_k = term - task.scale * pull_k;
                    if constexpr (kHasNull) g_k += null_weights * task.null[k];
                    store(g + k * kColumns, g_k);
                    acc[0] += x_k * pull_k;
                    acc[1] += x_k * g_k;
                    acc[2] += x_k * x_k;
                  });
  return {total[0], total[1], total[2], total[3]};
}

// The projection of g, and the square of the tangent, where both are safe from everything; the
// square of what is left is that of the first tangent less what the second projection takes.
template <class T>
SUBQUAD_INLINE ivec<T> project(std::int64_t d, const T* x, const T* g, const row_sums<T>& sums,
                               projection<T>& p, vec<T>& square) {
  constexpr int kColumns = kTileColumns<T>;
  vec<T> total[2];
  sums_over<2, T>(d, total, [&](std::int64_t k, vec<T>(&acc)[2]) __attribute__((always_inline)) {
    const vec<T> x_k = load(x + k * kColumns);
    const vec<T> t = load(g + k * kColumns) - sums.x_g * x_k;
    acc[0] += t * x_k;
    acc[1] += t * t;
  });
  p = {sums.x_g, total[0]};
  const vec<T> rest_square = p.rest * p.rest;
  square = total[1] + rest_square * (sums.x_x - T(2));
  // Terms that a sum of this size lost to underflow are smaller than its rounding.
  constexpr T kEpsilon =
      sizeof(T) == 4 ? static_cast<T>(__FLT_EPSILON__) : static_cast<T>(__DBL_EPSILON__);
  constexpr T kLeast = float_format<T>::kMinNormal / (kEpsilon * kEpsilon);
  return (square > kLeast) & (square < T(1) / kLeast) & (T(4) * rest_square < square);
}

// The other lanes, where squares leave the range of T or the first tangent is mostly what rounding
// left of it along x: g is scaled, the tangent made twice and scaled again, and takes its place.
template <class T>
void project_with_care(std::int64_t d, const T* x, T* g, ivec<T> is_safe, projection<T>& p,
                       vec<T>& square) {
  constexpr int kColumns = kTileColumns<T>;
  const vec<T> zero = {};
  const vec<T> one = broadcast(T(1));
  vec<T> largest = zero;
  for (std::int64_t k = 0; k < d; ++k) {
    largest = max<T>(magnitude<T>(load(g + k * kColumns)), largest);
  }
  const vec<T> scale = is_safe ? one : inverse_power<T>(largest);
  for (std::int64_t k = 0; k < d; ++k) store(g + k * kColumns, load(g + k * kColumns) * scale);
  projection<T> here;
  here.along = sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
    return load(g + k * kColumns) * load(x + k * kColumns);
  });
  here.rest = sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
    const vec<T> x_k = load(x + k * kColumns);
    return (load(g + k * kColumns) - here.along * x_k) * x_k;
  });
  largest = zero;
  for (std::int64_t k = 0; k < d; ++k) {
    const vec<T> t = tangent_of<T>(here, load(g + k * kColumns), load(x + k * kColumns));
    largest = max<T>(magnitude<T>(t), largest);
  }
  const vec<T> lift = inverse_power<T>(largest);
  const vec<T> direct = sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
    const vec<T> g_k = load(g + k * kColumns);
    const vec<T> t = tangent_of<T>(here, g_k, load(x + k * kColumns)) * lift;
    store(g + k * kColumns, is_safe ? g_k : t);
    return t * t;
  });
  // Where the second projection takes half of the square, the first left nothing but rounding.
  const vec<T> taken = here.rest * lift;
  p.along = is_safe ? p.along : zero;
  p.rest = is_safe ? p.rest : zero;
  square = is_safe ? square : (taken * taken >= direct ? zero : direct);
}

// g, `vectors` of lanes of it, becomes the result. Stage by stage, that the long chains of a few
// instructions between the loops overlap.
template <class T>
void turn(const embedding_step_task<T>& task, const T* x, T* g,
          const row_sums<T> (&sums)[kTileVectors], int vectors) {
  constexpr int kColumns = kTileColumns<T>;
  constexpr int L = lanes<T>;
  const std::int64_t d = task.d;
  const vec<T> zero = {};
  const vec<T> one = broadcast(T(1));
  projection<T> p[kTileVectors];
  vec<T> square[kTileVectors];
  ivec<T> is_safe[kTileVectors];
  bool is_plain[kTileVectors];
  for (int v = 0; v < vectors; ++v) {
    is_safe[v] = project<T>(d, x + v * L, g + v * L, sums[v], p[v], square[v]);
    is_plain[v] = holds_everywhere<T>(is_safe[v]);
    if (is_plain[v]) continue;
    project_with_care<T>(d, x + v * L, g + v * L, is_safe[v], p[v], square[v]);
  }
  // out = by_x x - by_t t.
  vec<T> by_x[kTileVectors];
  vec<T> by_t[kTileVectors];
  for (int v = 0; v < vectors; ++v) {
    const ivec<T> stays = (square[v] == zero) | (broadcast(task.step) == zero);
    const vec<T> step = stays ? zero : task.step / square_root<T>(square[v]);
    // x . t = rest (1 - x . x).
    vec<T> norm_square =
        task.cosine * (task.cosine * sums[v].x_x - T(2) * step * p[v].rest * (T(1) - sums[v].x_x)) +
        step * step * square[v];
    if (!is_plain[v]) {
      const vec<T> direct = sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
        const vec<T> y =
            task.cosine * load(x + k * kColumns + v * L) - step * load(g + k * kColumns + v * L);
        return y * y;
      });
      norm_square = is_safe[v] ? norm_square : direct;
    }
    const vec<T> scale = T(1) / square_root<T>(norm_square);
    by_x[v] = stays ? one : task.cosine * scale;
    by_t[v] = stays ? zero : step * scale;
  }
  for (int v = 0; v < vectors; ++v) {
    for (std::int64_t k = 0; k < d; ++k) {
      const vec<T> x_k = load(x + k * kColumns + v * L);
      T* to = g + k * kColumns + v * L;
      store(to, by_x[v] * x_k - by_t[v] * tangent_of<T>(p[v], load(to), x_k));
    }
  }
}

// The first `width` columns of `from`, [d][columns], as rows.
template <class T>
void unpack_rows(std::int64_t d, std::int64_t width, const T* from, matrix_view<T> to) {
  constexpr int kColumns = kTileColumns<T>;
  constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  std::int64_t row = 0;
  for (; to.column_stride == 1 && row + kSide <= width; row += kSide) {
    std::int64_t k = 0;
    for (; k + kSide <= d; k += kSide) {
      const T* rows[kSide];
      for (int i = 0; i < kSide; ++i) rows[i] = from + (k + i) * kColumns + row;
      transpose_square(rows, &to(row, k), to.row_stride);
    }
    for (; k < d; ++k) {
      for (int i = 0; i < kSide; ++i) to(row + i, k) = from[k * kColumns + row + i];
    }
  }
  for (; row < width; ++row) {
    for (std::int64_t k = 0; k < d; ++k) to(row, k) = from[k * kColumns + row];
  }
}

// Asks for the rows of a panel where they are few lines: a processor that reads ahead by itself
// stops at every page, and 32 rows of 32 numbers are one. A fifth of the time for rows from the
// third-level cache; asking for the lines of the output as well gains nothing.
template <class T>
SUBQUAD_INLINE void ask_for(matrix_view<const T> rows, std::int64_t d) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  if (rows.column_stride != 1 || d > 8 * kLine) return;
  for (std::int64_t r = 0; r < kTileColumns<T>; ++r) {
    for (std::int64_t k = 0; k < d; k += kLine) {
      __builtin_prefetch(rows.data + r * rows.row_stride + k);
    }
  }
}

template <class T>
void step(const embedding_step_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  constexpr int L = lanes<T>;
  const std::int64_t d = task.d;
  const step_layout<T> layout(task.scratch, d);
  for (std::int64_t row = 0; row < task.n; row += kColumns) {
    const std::int64_t width = smaller<std::int64_t>(kColumns, task.n - row);
    pack_rows<kColumns, T>(task.x.from(row), width, d, layout.x);
    pack_rows<kColumns, T>(task.pull.from(row), width, d, layout.pull);
    ask_for<T>(task.x.from(row + kColumns), d);
    ask_for<T>(task.pull.from(row + kColumns), d);

    std::int64_t only = -1;
    bool has_terms = false;
    if (task.log_counts && (task.out || task.log_z)) {
      only = add_components<T>(task, layout, row, width);
      has_terms = true;
    }
    if (task.labels && task.out) {
      add_own_terms<T>(task, layout, row, width, !has_terms);
      has_terms = true;
    }
    if (!has_terms) {
      for (std::int64_t i = 0; i < d * kColumns; ++i) layout.sum[i] = T(0);
    }
    const bool is_scored = only >= 0 && task.log_z;
    const vector_view<const T> means =
        is_scored ? vector_view<const T>{&task.means(only, 0), task.means.column_stride}
                  : vector_view<const T>{};
    const int vectors = width > L ? kTileVectors : 1;
    row_sums<T> sums[kTileVectors];
    for (int v = 0; v < vectors; ++v) {
      const T* x = layout.x + v * L;
      const T* pull = layout.pull + v * L;
      T* g = layout.sum + v * L;
      const std::int64_t first = row + v * L;
      const std::int64_t count = width - v * L;
      if (task.null) {
        const vec<T> weights = gather<T>(task.null_weights.from(first), count);
        sums[v] = is_scored ? make_gradient<T, true, true>(task, weights, means, x, pull, g)
                            : make_gradient<T, true, false>(task, weights, means, x, pull, g);
      } else {
        sums[v] = is_scored ? make_gradient<T, false, true>(task, vec<T>{}, means, x, pull, g)
                            : make_gradient<T, false, false>(task, vec<T>{}, means, x, pull, g);
      }
      if (is_scored) {
        scatter<T>(task.log_counts[only] + sums[v].score, count, task.log_z.from(first));
      }
      if (task.attraction) {
        scatter<T>(task.scale * sums[v].x_pull, count, task.attraction.from(first));
      }
    }
    if (task.out) turn<T>(task, layout.x, layout.sum, sums, vectors);
    if (task.out) unpack_rows<T>(d, width, layout.sum, task.out.from(row));
  }
}

}  // namespace

extern const embedding_kernels kernels_embedding;
const embedding_kernels kernels_embedding = {
    {scratch_size<float>, pack<float>, step<float>},
    {scratch_size<double>, pack<double>, step<double>},
};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
