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

// Calls term(k, sums) for every k < d. Terms are added up in fours of blocks: an error of at most
// 19 + d / 64 roundings of a sum.
template <int kSums, class T, class F>
SUBQUAD_INLINE void sums_over(std::int64_t d, vec<T> (&total)[kSums], F&& term) {
  constexpr std::int64_t kBlock = 64;
  for (int s = 0; s < kSums; ++s) total[s] = vec<T>{};
  for (std::int64_t k = 0; k < d;) {
    const std::int64_t end = smaller(d, k + kBlock);
    vec<T> acc[4][kSums] = {};
    for (; k + 4 <= end; k += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) term(k + u, acc[u]);
    }
    for (; k < end; ++k) term(k, acc[0]);
    for (int s = 0; s < kSums; ++s) {
      total[s] += (acc[0][s] + acc[1][s]) + (acc[2][s] + acc[3][s]);
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

// Of `width` rows: [d][columns] each.
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
  T memory[lanes<T>];
  store(memory, values);
  for (std::int64_t c = 0; c < smaller<std::int64_t>(lanes<T>, count); ++c) to[c] = memory[c];
}

// s of one component for the rows in the lanes of x; term = means + C x.
template <class T>
SUBQUAD_INLINE vec<T> score_of(T log_count, vector_view<const T> means, std::int64_t d, const T* x,
                               const T* term) {
  constexpr int kColumns = kTileColumns<T>;
  return log_count + sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
           return load(x + k * kColumns) * (T(0.5) * (load(term + k * kColumns) + means[k]));
         });
}

// layout.sum = what the components add to g; 0 without any that counts.
template <class T>
void add_components(const embedding_step_task<T>& task, const step_layout<T>& layout,
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
  if (active <= 1) {
    if (active == 0) {
      for (std::int64_t i = 0; i < d * kColumns; ++i) layout.sum[i] = T(0);
    } else if (task.out || task.log_z) {
      multiply<T>(d, task.covariances + first * d * d,
                  {&task.means(first, 0), task.means.column_stride}, layout.x, layout.sum);
    }
    for (int v = 0; task.log_z && v < kTileVectors; ++v) {
      write_log_z(v, active == 0 ? broadcast(-kInfinity<T>)
                                 : score_of<T>(task.log_counts[first],
                                               {&task.means(first, 0), task.means.column_stride}, d,
                                               layout.x + v * L, layout.sum + v * L));
    }
    return;
  }
  log_sum_exp<T> states[kTileVectors];
  for (std::int64_t a = first; a < task.k; ++a) {
    if (!counts(a)) continue;
    const vector_view<const T> means{&task.means(a, 0), task.means.column_stride};
    T* to = a == first ? layout.sum : layout.term;
    multiply<T>(d, task.covariances + a * d * d, means, layout.x, to);
    for (int v = 0; v < kTileVectors; ++v) {
      const vec<T> score =
          score_of<T>(task.log_counts[a], means, d, layout.x + v * L, to + v * L) * kLog2E<T>;
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
}

// Adds shifts_c + slopes_c x to layout.sum, label by label, where a lane has it; in place of what is
// there with kFirst.
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

// What the tangent of a row is made of: t = (g - along x - rest x) * lift.
template <class T>
struct projection {
  vec<T> along;
  vec<T> rest;
  vec<T> lift;
};

template <class T>
SUBQUAD_INLINE vec<T> tangent_of(const projection<T>& p, vec<T> g, vec<T> x) {
  return ((g - p.along * x) - p.rest * x) * p.lift;
}

// layout.sum = g and x . g, attraction = x . pull (without scale).
template <class T, bool kHasNull>
SUBQUAD_INLINE void make_gradient(const embedding_step_task<T>& task, const T* x, const T* pull,
                                  vec<T> null_weights, T* g, vec<T>& attraction, vec<T>& along) {
  constexpr int kColumns = kTileColumns<T>;
  vec<T> total[2];
  sums_over<2, T>(task.d, total,
                  [&](std::int64_t k, vec<T>(&acc)[2]) __attribute__((always_inline)) {
                    const vec<T> x_k = load(x + k * kColumns);
                    const vec<T> pull_k = load(pull + k * kColumns);
                    vec<T> g_k = load(g + k * kColumns) - task.scale * pull_k;
                    if constexpr (kHasNull) g_k += null_weights * task.null[k];
                    store(g + k * kColumns, g_k);
                    acc[0] += x_k * pull_k;
                    acc[1] += x_k * g_k;
                  });
  attraction = total[0];
  along = total[1];
}

template <class T>
SUBQUAD_INLINE vec<T> rest_of(std::int64_t d, const T* x, const T* g, vec<T> along) {
  constexpr int kColumns = kTileColumns<T>;
  return sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
    const vec<T> x_k = load(x + k * kColumns);
    return (load(g + k * kColumns) - along * x_k) * x_k;
  });
}

template <class T>
SUBQUAD_INLINE vec<T> square_of(const projection<T>& p, std::int64_t d, const T* x, const T* g) {
  constexpr int kColumns = kTileColumns<T>;
  return sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
    const vec<T> t = tangent_of<T>(p, load(g + k * kColumns), load(x + k * kColumns));
    return t * t;
  });
}

// Rows whose squares leave the range of T: g is scaled, and the tangent again. Other lanes keep
// every bit.
template <class T>
void rescale(std::int64_t d, const T* x, T* g, ivec<T> is_safe, projection<T>& p, vec<T>& square) {
  constexpr int kColumns = kTileColumns<T>;
  const vec<T> one = broadcast(T(1));
  vec<T> largest = {};
  for (std::int64_t k = 0; k < d; ++k) {
    largest = max<T>(magnitude<T>(load(g + k * kColumns)), largest);
  }
  const vec<T> scale = is_safe ? one : inverse_power<T>(largest);
  for (std::int64_t k = 0; k < d; ++k) store(g + k * kColumns, load(g + k * kColumns) * scale);
  const vec<T> along = sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
    return load(g + k * kColumns) * load(x + k * kColumns);
  });
  p.along = is_safe ? p.along : along;
  p.rest = is_safe ? p.rest : rest_of<T>(d, x, g, p.along);
  largest = vec<T>{};
  for (std::int64_t k = 0; k < d; ++k) {
    largest = max<T>(magnitude<T>(tangent_of<T>(p, load(g + k * kColumns), load(x + k * kColumns))),
                     largest);
  }
  p.lift = is_safe ? one : inverse_power<T>(largest);
  square = is_safe ? square : square_of<T>(p, d, x, g);
}

// g becomes the result.
template <class T>
void turn(const embedding_step_task<T>& task, const T* x, T* g, vec<T> along) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t d = task.d;
  projection<T> p{along, rest_of<T>(d, x, g, along), broadcast(T(1))};
  vec<T> square = square_of<T>(p, d, x, g);
  // Terms that a sum of this size lost to underflow are smaller than its rounding.
  constexpr T kEpsilon =
      sizeof(T) == 4 ? static_cast<T>(__FLT_EPSILON__) : static_cast<T>(__DBL_EPSILON__);
  constexpr T kLeast = float_format<T>::kMinNormal / (kEpsilon * kEpsilon);
  const ivec<T> is_safe = (square > kLeast) & (square < T(1) / kLeast);
  if (!holds_everywhere<T>(is_safe)) rescale<T>(d, x, g, is_safe, p, square);
  const vec<T> zero = {};
  const ivec<T> stays = square == zero;
  const vec<T> step = stays ? zero : task.step / square_root<T>(square);
  const auto turned = [&](std::int64_t k, vec<T> x_k) __attribute__((always_inline)) {
    return task.cosine * x_k - step * tangent_of<T>(p, load(g + k * kColumns), x_k);
  };
  const vec<T> norm =
      square_root<T>(sum_over<T>(d, [&](std::int64_t k) __attribute__((always_inline)) {
        const vec<T> y = turned(k, load(x + k * kColumns));
        return y * y;
      }));
  const vec<T> scale = T(1) / norm;
  for (std::int64_t k = 0; k < d; ++k) {
    const vec<T> x_k = load(x + k * kColumns);
    store(g + k * kColumns, stays ? x_k : turned(k, x_k) * scale);
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
    if (task.log_counts && (task.out || task.log_z)) add_components<T>(task, layout, row, width);
    if (task.labels && task.out) add_own_terms<T>(task, layout, row, width, !task.log_counts);
    if (!task.out || (!task.log_counts && !task.labels)) {
      for (std::int64_t i = 0; i < d * kColumns; ++i) layout.sum[i] = T(0);
    }
    for (int v = 0; v < kTileVectors && v * L < width; ++v) {
      const T* x = layout.x + v * L;
      const T* pull = layout.pull + v * L;
      T* g = layout.sum + v * L;
      const std::int64_t first = row + v * L;
      const std::int64_t count = width - v * L;
      vec<T> attraction;
      vec<T> along;
      if (task.null) {
        make_gradient<T, true>(task, x, pull, gather<T>(task.null_weights.from(first), count), g,
                               attraction, along);
      } else {
        make_gradient<T, false>(task, x, pull, vec<T>{}, g, attraction, along);
      }
      if (task.attraction) scatter<T>(task.scale * attraction, count, task.attraction.from(first));
      if (task.out) turn<T>(task, x, g, along);
    }
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
