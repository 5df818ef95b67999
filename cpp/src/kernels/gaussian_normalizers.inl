// Contracts stand in gaussian_normalizers_kernels.hpp. Rows lie in lanes; the components' means,
// their diagonals and the columns of their factors are the broadcast operand, so that a component's
// score is a vector over rows and nothing of size n * k * rank exists.
#include "gaussian_normalizers_kernels.hpp"

#include "log_sum_exp.inl"
#include "tile_product.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

template <class T>
struct packed_factor {
  const T* panels;
  const std::int64_t*
      begin;  // first and one past the last row that is not zero, per group of columns
  const std::int64_t* end;
  std::int64_t n_groups;
};

// Everything of the scratch that the loop over components uses.
template <class T>
struct scores_layout {
  T* panels;   // [row panel][depth][columns]
  T* squares;  // [depth][columns] of one row panel
  T* moments;  // [row panel][mean, variance][kTileRows][columns] of a group of components
  T* states;   // [row panel][shift, sum][columns]
  T* group;    // [depth][kTileRows]: means, then diagonals
  T* diagonals;
  T* factor;  // [group][depth][kTileRows]
  std::int64_t* begin;
  std::int64_t* end;
  std::size_t bytes;

  scores_layout(void* scratch, std::int64_t n, std::int64_t depth, std::int64_t rank) {
    constexpr int kColumns = kTileColumns<T>;
    const std::int64_t n_panels = divide_up(n, kColumns);
    const std::int64_t n_groups = divide_up(rank, kTileRows);
    begin = static_cast<std::int64_t*>(scratch);
    end = begin + n_groups;
    panels = reinterpret_cast<T*>(end + n_groups);
    squares = panels + n_panels * kColumns * depth;
    moments = squares + kColumns * depth;
    states = moments + n_panels * 2 * kTileRows * kColumns;
    group = states + n_panels * 2 * kColumns;
    diagonals = group + kTileRows * depth;
    factor = diagonals + kTileRows * depth;
    bytes = static_cast<std::size_t>(n_groups) * 2 * sizeof(std::int64_t) +
            sizeof(T) *
                static_cast<std::size_t>(n_panels * kColumns * (depth + 2 * kTileRows + 2) +
                                         depth * (kColumns + 2 * kTileRows + n_groups * kTileRows));
  }
};

template <class T>
std::size_t scores_scratch(std::int64_t n, std::int64_t depth, std::int64_t rank) {
  return scores_layout<T>(nullptr, n, depth, rank).bytes;
}

template <class T>
packed_factor<T> pack_factor(matrix_view<const T> factor, std::int64_t depth, std::int64_t rank,
                             const scores_layout<T>& layout) {
  const matrix_view<const T> columns{factor.data, factor.column_stride, factor.row_stride};
  pack_rows<kTileRows, T>(columns, rank, depth, layout.factor);
  const std::int64_t n_groups = divide_up(rank, kTileRows);
  for (std::int64_t g = 0; g < n_groups; ++g) {
    const T* panel = layout.factor + g * kTileRows * depth;
    const auto is_zero = [panel](std::int64_t k) {
      for (int r = 0; r < kTileRows; ++r) {
        if (panel[k * kTileRows + r] != T(0)) return false;
      }
      return true;
    };
    std::int64_t begin = 0;
    std::int64_t end = depth;
    while (begin < end && is_zero(begin)) ++begin;
    while (end > begin && is_zero(end - 1)) --end;
    layout.begin[g] = begin;
    layout.end[g] = end;
  }
  return {layout.factor, layout.begin, layout.end, n_groups};
}

// Calls sink(first row, component, mean, variance) with vectors over the kTileColumns rows from
// `first row` on, every component of every panel once, the components of a panel in order.
template <class T, class Sink>
SUBQUAD_INLINE void for_each_score(const gaussian_scores<T>& task, const scores_layout<T>& layout,
                                   Sink&& sink) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = task.depth;
  for (std::int64_t first = 0; first < task.k; first += kTileRows) {
    const std::int64_t count = smaller<std::int64_t>(kTileRows, task.k - first);
    pack_rows<kTileRows, T>(task.means.from(first), count, depth, layout.group);
    if (task.diagonal) {
      pack_rows<kTileRows, T>(task.diagonal.from(first), count, depth, layout.diagonals);
    }
    for (std::int64_t row = 0; row < task.n; row += kColumns) {
      const T* panel = layout.panels + row * depth;
      T* moments = layout.moments + row * 2 * kTileRows;
      tile<T> acc;
      tile_zero<T>(acc);
      tile_product<T>(depth, layout.group, panel, acc);
      SUBQUAD_UNROLL_ROWS
      for (int r = 0; r < kTileRows; ++r) {
        store(moments + r * kColumns, acc[r][0]);
        store(moments + r * kColumns + lanes<T>, acc[r][1]);
      }
      tile_zero<T>(acc);
      if (task.diagonal) {
        for (std::int64_t i = 0; i < depth * kColumns; ++i) layout.squares[i] = panel[i] * panel[i];
        tile_product<T>(depth, layout.diagonals, layout.squares, acc);
      }
      moments += kTileRows * kColumns;
      SUBQUAD_UNROLL_ROWS
      for (int r = 0; r < kTileRows; ++r) {
        store(moments + r * kColumns, acc[r][0]);
        store(moments + r * kColumns + lanes<T>, acc[r][1]);
      }
    }
    for (std::int64_t a = 0; a < count; ++a) {
      const packed_factor<T> factor =
          pack_factor<T>(task.factors[first + a], depth, task.rank, layout);
      for (std::int64_t row = 0; row < task.n; row += kColumns) {
        const T* panel = layout.panels + row * depth;
        const T* moments = layout.moments + row * 2 * kTileRows + a * kColumns;
        const vec<T> mean[kTileVectors] = {load(moments), load(moments + lanes<T>)};
        moments += kTileRows * kColumns;
        vec<T> variance[kTileVectors] = {load(moments), load(moments + lanes<T>)};
        for (std::int64_t g = 0; g < factor.n_groups; ++g) {
          const std::int64_t begin = factor.begin[g];
          tile<T> acc;
          tile_zero<T>(acc);
          tile_product<T>(factor.end[g] - begin, factor.panels + (g * depth + begin) * kTileRows,
                          panel + begin * kColumns, acc);
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kTileVectors; ++v) {
            SUBQUAD_UNROLL_ROWS
            for (int r = 0; r < kTileRows; r += 3) {
              variance[v] += acc[r][v] * acc[r][v] + acc[r + 1][v] * acc[r + 1][v] +
                             acc[r + 2][v] * acc[r + 2][v];
            }
          }
        }
        sink(row, first + a, mean, variance);
      }
    }
  }
}

// The term of a component without the row itself. `square` is |x|^2 and `spread` what the row added
// to weight * variance: (|x|^2 - mean)^2, or the same by dimension where that is how v is made.
template <class T>
T leave_one_out(T log_count, T log_weight, T square, T spread, T mean, T variance) {
  const double weight =
      __builtin_exp(static_cast<double>(log_weight) - static_cast<double>(log_count));
  const double rest = 1 - weight;
  constexpr double kEpsilon = sizeof(T) == 4 ? __FLT_EPSILON__ : __DBL_EPSILON__;
  if (rest <= 4 * kEpsilon) return -kInfinity<T>;
  const double deviation = static_cast<double>(square) - static_cast<double>(mean);
  const double own_mean = static_cast<double>(mean) - weight * deviation / rest;
  double own_variance =
      (static_cast<double>(variance) - weight * static_cast<double>(spread) / rest) / rest;
  own_variance = own_variance < 0 ? 0 : own_variance;
  return static_cast<T>(static_cast<double>(log_count) + __builtin_log(rest) + own_mean +
                        own_variance / 2);
}

template <class T>
void log_normalizer(const gaussian_log_normalizer_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const gaussian_scores<T>& scores = task.scores;
  const std::int64_t depth = scores.depth;
  const scores_layout<T> layout(scores.scratch, scores.n, depth, scores.rank);
  pack_rows<kColumns, T>(scores.x, scores.n, depth, layout.panels);

  const auto load_states = [&](std::int64_t row, log_sum_exp<T>(&states)[kTileVectors]) {
    const T* from = layout.states + row * 2;
    for (int v = 0; v < kTileVectors; ++v) {
      states[v] = {load(from + v * lanes<T>), load(from + kColumns + v * lanes<T>)};
    }
  };
  const auto store_states = [&](std::int64_t row, const log_sum_exp<T>(&states)[kTileVectors]) {
    T* to = layout.states + row * 2;
    for (int v = 0; v < kTileVectors; ++v) {
      store(to + v * lanes<T>, states[v].shift);
      store(to + kColumns + v * lanes<T>, states[v].sum);
    }
  };
  for (std::int64_t row = 0; row < scores.n; row += kColumns) {
    T* state = layout.states + row * 2;
    for (int c = 0; c < kColumns; ++c) {
      state[c] = kLowest<T>;
      state[kColumns + c] = T(0);
    }
  }

  const auto square_of = [&](std::int64_t i) {
    const T* column = layout.panels + i / kColumns * kColumns * depth + i % kColumns;
    T square = T(0);
    for (std::int64_t k = 0; k < depth; ++k) square += column[k * kColumns] * column[k * kColumns];
    return square;
  };

  const auto spread_of = [&](std::int64_t i, std::int64_t a, T square, T mean) {
    if (scores.rank > 0 || !scores.diagonal) return (square - mean) * (square - mean);
    const T* column = layout.panels + i / kColumns * kColumns * depth + i % kColumns;
    T spread = T(0);
    for (std::int64_t k = 0; k < depth; ++k) {
      const T x = column[k * kColumns];
      const T part = x * (x - scores.means(a, k));
      spread += part * part;
    }
    return spread;
  };
  // A score of NaN stays in the shift: beside one of +inf the sum would not tell.
  const auto push_score = [](log_sum_exp<T>& state, vec<T> score) {
    push<T>(state, score);
    state.shift = score != score ? score : state.shift;
  };
  const auto push_component = [&](std::int64_t row, std::int64_t a,
                                  const vec<T>(&mean)[kTileVectors],
                                  const vec<T>(&variance)[kTileVectors]) {
    const T log_count = task.log_counts[a];
    if (log_count == -kInfinity<T>) return;  // whatever the component's statistics are
    const std::int64_t width = smaller<std::int64_t>(kColumns, scores.n - row);
    vec<T> score[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) score[v] = log_count + mean[v] + T(0.5) * variance[v];
    for (std::int64_t c = 0; task.own_component && c < width; ++c) {
      if (task.own_component[row + c] != a) continue;
      const T own_mean = mean[c / lanes<T>][c % lanes<T>];
      const T square = square_of(row + c);
      score[c / lanes<T>][c % lanes<T>] = leave_one_out<T>(
          log_count, task.own_log_weight[row + c], square, spread_of(row + c, a, square, own_mean),
          own_mean, variance[c / lanes<T>][c % lanes<T>]);
    }
    log_sum_exp<T> states[kTileVectors];
    load_states(row, states);
    for (int v = 0; v < kTileVectors; ++v) push_score(states[v], score[v]);
    store_states(row, states);
  };
  for_each_score<T>(scores, layout, push_component);

  for (std::int64_t row = 0; row < scores.n; row += kColumns) {
    const std::int64_t width = smaller<std::int64_t>(kColumns, scores.n - row);
    log_sum_exp<T> states[kTileVectors];
    load_states(row, states);
    if (task.own_component && task.include_own) {
      vec<T> own[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) own[v] = broadcast(-kInfinity<T>);
      for (std::int64_t c = 0; c < width; ++c) {
        if (task.own_component[row + c] < 0) continue;
        own[c / lanes<T>][c % lanes<T>] = task.own_log_weight[row + c] + square_of(row + c);
      }
      for (int v = 0; v < kTileVectors; ++v) push_score(states[v], own[v]);
    }
    for (int v = 0; v < kTileVectors; ++v) {
      // A score of +inf leaves NaN in the sum.
      const vec<T> infinite = broadcast(kInfinity<T>);
      const vec<T> log_z = states[v].shift == infinite ? infinite : finalize<T>(states[v]);
      for (std::int64_t c = v * lanes<T>; c < smaller<std::int64_t>(width, (v + 1) * lanes<T>);
           ++c) {
        task.out[row + c] = log_z[c % lanes<T>];
      }
    }
  }
}

template <class T>
void score_moments(const gaussian_score_moments_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const gaussian_scores<T>& scores = task.scores;
  const scores_layout<T> layout(scores.scratch, scores.n, scores.depth, scores.rank);
  pack_rows<kColumns, T>(scores.x, scores.n, scores.depth, layout.panels);
  const auto write = [&](std::int64_t row, std::int64_t a, const vec<T>(&mean)[kTileVectors],
                         const vec<T>(&variance)[kTileVectors]) {
    const std::int64_t width = smaller<std::int64_t>(kColumns, scores.n - row);
    for (std::int64_t c = 0; c < width; ++c) {
      task.mean(row + c, a) = mean[c / lanes<T>][c % lanes<T>];
      task.variance(row + c, a) = variance[c / lanes<T>][c % lanes<T>];
    }
  };
  for_each_score<T>(scores, layout, write);
}

template <class T>
void responsibilities(const gaussian_responsibilities_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const gaussian_scores<T>& scores = task.scores;
  const scores_layout<T> layout(scores.scratch, scores.n, scores.depth, scores.rank);
  pack_rows<kColumns, T>(scores.x, scores.n, scores.depth, layout.panels);
  const vec<T> empty = broadcast(-kInfinity<T>);
  const auto write = [&](std::int64_t row, std::int64_t a, const vec<T>(&mean)[kTileVectors],
                         const vec<T>(&variance)[kTileVectors]) {
    const T log_count = task.log_counts[a];
    const bool absent = log_count == -kInfinity<T>;  // whatever the component's statistics are
    const std::int64_t width = smaller<std::int64_t>(kColumns, scores.n - row);
    for (int v = 0; v < kTileVectors; ++v) {
      vec<T> log_z = {};
      vec<T> grad = {};
      const std::int64_t begin = v * lanes<T>;
      const std::int64_t end = smaller<std::int64_t>(width, begin + lanes<T>);
      for (std::int64_t c = begin; c < end; ++c) {
        log_z[c - begin] = task.log_z[row + c];
        grad[c - begin] = task.grad[row + c];
      }
      const vec<T> score = log_count + mean[v] + T(0.5) * variance[v] - log_z;
      const vec<T> exponent = absent ? empty : (log_z == empty ? empty : score);
      const vec<T> weight = grad * exp2_bounded<T>(exponent * kLog2E<T>);
      for (std::int64_t c = begin; c < end; ++c) task.out(a, row + c) = weight[c - begin];
    }
  };
  for_each_score<T>(scores, layout, write);
}

template <class T>
std::size_t gradient_scratch(std::int64_t n, std::int64_t depth) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t padded = divide_up(depth, kTileRows) * kTileRows;
  return sizeof(T) * static_cast<std::size_t>(packed_size<kColumns>(n, depth + padded + 1) +
                                              padded * (depth + 1));
}

template <class T>
void gradient(const gaussian_gradient_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = task.depth;
  const std::int64_t padded = divide_up(depth, kTileRows) * kTileRows;
  const std::int64_t n_padded = divide_up(task.n, kColumns) * kColumns;
  T* panels = static_cast<T*>(task.scratch);
  T* sums = panels + n_padded * depth;    // [row panel][padded][columns]
  T* weights = sums + n_padded * padded;  // [row]
  T* covariance = weights + n_padded;     // [group][depth][kTileRows]
  T* mean = covariance + padded * depth;  // [padded]
  pack_rows<kColumns, T>(task.x, task.n, depth, panels);
  for (std::int64_t i = 0; i < n_padded * padded; ++i) sums[i] = T(0);
  for (std::int64_t a = 0; a < task.k; ++a) {
    pack_rows<kTileRows, T>({task.covariances + a * depth * depth, depth, 1}, depth, depth,
                            covariance);
    for (std::int64_t k = 0; k < padded; ++k) mean[k] = k < depth ? task.means(a, k) : T(0);
    bool counts = false;
    for (std::int64_t i = 0; i < n_padded; ++i) {
      weights[i] = i < task.n ? task.responsibilities(a, i) : T(0);
      counts = counts || weights[i] != T(0);
    }
    if (!counts) continue;  // an absent component, whatever its statistics are
    for (std::int64_t row = 0; row < task.n; row += kColumns) {
      const vec<T> weight[kTileVectors] = {load(weights + row), load(weights + row + lanes<T>)};
      for (std::int64_t dim = 0; dim < padded; dim += kTileRows) {
        tile<T> acc;
        tile_fill<T>(mean + dim, acc);
        tile_product<T>(depth, covariance + dim * depth, panels + row * depth, acc);
        T* sum = sums + row * padded + dim * kColumns;
        SUBQUAD_UNROLL_ROWS
        for (int r = 0; r < kTileRows; ++r) {
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kTileVectors; ++v) {
            T* to = sum + r * kColumns + v * lanes<T>;
            store(to, load(to) + weight[v] * acc[r][v]);
          }
        }
      }
    }
  }
  for (std::int64_t i = 0; i < task.n; ++i) {
    const T* sum = sums + i / kColumns * kColumns * padded + i % kColumns;
    for (std::int64_t k = 0; k < depth; ++k) task.out(i, k) = sum[k * kColumns];
  }
}

template <class T>
void covariance(matrix_view<const T> factor, std::int64_t depth, std::int64_t rank,
                vector_view<const T> diagonal, T* out) {
  for (std::int64_t i = 0; i < depth; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = i == j && diagonal ? static_cast<double>(diagonal[i]) : 0;
      for (std::int64_t r = 0; r < rank; ++r) {
        sum += static_cast<double>(factor(i, r)) * static_cast<double>(factor(j, r));
      }
      out[i * depth + j] = static_cast<T>(sum);
      out[j * depth + i] = static_cast<T>(sum);
    }
  }
}

template <class T>
std::size_t residuals_scratch(std::int64_t n, std::int64_t depth, std::int64_t largest) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t padded = divide_up(largest, kTileRows) * kTileRows;
  return sizeof(T) *
         static_cast<std::size_t>(packed_size<kColumns>(n, depth) + padded * (depth + kColumns));
}

// One column of a matrix over the lanes of a row panel, 0 past the last row.
template <class T>
SUBQUAD_INLINE void gather(matrix_view<const T> from, std::int64_t a, std::int64_t width,
                           vec<T> (&to)[kTileVectors]) {
  for (int v = 0; v < kTileVectors; ++v) to[v] = vec<T>{};
  if (!from) return;
  for (std::int64_t c = 0; c < width; ++c) to[c / lanes<T>][c % lanes<T>] = from(c, a);
}

// Sums over the samples of one component, per lane.
template <class T>
struct residual_sums {
  vec<T> residual;  // of r - first
  vec<T> square;    // of (r - first)^2
  vec<T> third;     // of w t^3
  vec<T> weight;
  vec<T> number;
};

template <class T>
SUBQUAD_INLINE void add(residual_sums<T>& to, const residual_sums<T>& from) {
  to.residual += from.residual;
  to.square += from.square;
  to.third += from.third;
  to.weight += from.weight;
  to.number += from.number;
}

// t holds the scores, [count][columns], -inf where excluded.
template <class T>
SUBQUAD_INLINE void finish_residuals(const sample_residuals_task<T>& task, std::int64_t row,
                                     std::int64_t a, std::int64_t width, const T* t) {
  constexpr int kColumns = kTileColumns<T>;
  constexpr std::int64_t kBlock = 48;
  const std::int64_t begin = task.offsets[a];
  const std::int64_t count = task.offsets[a + 1] - begin;
  const vec<T> zero = {};
  const vec<T> excluded = broadcast(-kInfinity<T>);
  vec<T> half[kTileVectors];
  vec<T> scale[kTileVectors];
  gather<T>(task.variance.from(row), a, width, half);
  gather<T>(task.scale.from(row), a, width, scale);
  for (int v = 0; v < kTileVectors; ++v) {
    half[v] *= T(0.5);
    vec<T> peak = zero;
    for (std::int64_t j = 0; j < count; ++j) {
      peak = max<T>(load(t + j * kColumns + v * lanes<T>) - half[v], peak);
    }
    const vec<T> common = peak > T(1) ? peak : zero;
    const vec<T> small = exp<T>(-common);
    residual_sums<T> sums = {};
    vec<T> first = zero;
    for (std::int64_t j = 0; j < count;) {
      const std::int64_t end = smaller(count, j + kBlock);
      residual_sums<T> block = {};
      for (; j < end; ++j) {
        const vec<T> stored = load(t + j * kColumns + v * lanes<T>);
        const ivec<T> absent = stored == excluded;
        const vec<T> score = absent ? zero : stored;
        const vec<T> weight = absent ? zero : broadcast(task.weights[begin + j]);
        vec<T> control = T(1) + score;
        if (task.quadratic) control += T(0.5) * score * score - half[v];
        const vec<T> exponential = exp2_bounded<T>((score - half[v] - common) * kLog2E<T>);
        const vec<T> residual = weight * (exponential - control * small);
        if (j == 0) first = residual;
        const vec<T> deviation = absent ? zero : residual - first;
        block.residual += deviation;
        block.square += deviation * deviation;
        block.third += weight * score * score * score;
        block.weight += weight;
        block.number += absent ? zero : broadcast(T(1));
      }
      add(sums, block);
    }
    const vec<T> number = sums.number > T(1) ? sums.number : broadcast(T(1));
    const vec<T> mean = (sums.number > zero ? first : zero) + sums.residual / number;
    const vec<T> delta = scale[v] * mean;
    const vec<T> near = log1p<T>(delta);
    const vec<T> far = common + log<T>(small + delta);
    vec<T> log_factor = common == zero ? near : far;
    log_factor = small + delta > zero ? log_factor : broadcast(static_cast<T>(__builtin_nan("")));
    const vec<T> spread = sums.square - sums.residual * sums.residual / number;
    const vec<T> degrees = number > T(1) ? number - T(1) : broadcast(T(1));
    vec<T> log_error =
        common + log<T>(scale[v]) + T(0.5) * log<T>(max<T>(zero, spread / (degrees * number)));
    log_error = sums.number > T(1) ? log_error : excluded;
    const vec<T> third = sums.third / (sums.weight == zero ? broadcast(T(1)) : sums.weight);
    for (std::int64_t c = v * lanes<T>; c < smaller<std::int64_t>(width, (v + 1) * lanes<T>); ++c) {
      task.log_factor(row + c, a) = log_factor[c % lanes<T>];
      task.log_error(row + c, a) = log_error[c % lanes<T>];
      task.third(row + c, a) = third[c % lanes<T>];
    }
  }
}

template <class T>
void sample_residuals(const sample_residuals_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = task.depth;
  const std::int64_t padded = divide_up(task.largest, kTileRows) * kTileRows;
  T* panels = static_cast<T*>(task.scratch);
  T* samples = panels + packed_size<kColumns>(task.n, depth);
  T* t = samples + padded * depth;
  pack_rows<kColumns, T>(task.x, task.n, depth, panels);
  for (std::int64_t a = 0; a < task.k; ++a) {
    const std::int64_t begin = task.offsets[a];
    const std::int64_t count = task.offsets[a + 1] - begin;
    pack_rows<kTileRows, T>(task.deviations.from(begin), count, depth, samples);
    for (std::int64_t row = 0; row < task.n; row += kColumns) {
      const std::int64_t width = smaller<std::int64_t>(kColumns, task.n - row);
      vec<T> shift[kTileVectors];
      gather<T>(task.shift ? task.shift.from(row) : task.shift, a, width, shift);
      for (std::int64_t j = 0; j < count; j += kTileRows) {
        tile<T> scores;
        SUBQUAD_UNROLL_ROWS
        for (int r = 0; r < kTileRows; ++r) {
          scores[r][0] = shift[0];
          scores[r][1] = shift[1];
        }
        tile_product<T>(depth, samples + j * depth, panels + row * depth, scores);
        T* to = t + j * kColumns;
        SUBQUAD_UNROLL_ROWS
        for (int r = 0; r < kTileRows; ++r) {
          store(to + r * kColumns, scores[r][0]);
          store(to + r * kColumns + lanes<T>, scores[r][1]);
        }
      }
      for (std::int64_t c = 0; task.excluded && c < width; ++c) {
        const std::int64_t j = task.excluded[row + c] - begin;
        if (task.excluded[row + c] >= 0 && j >= 0 && j < count) t[j * kColumns + c] = -kInfinity<T>;
      }
      finish_residuals<T>(task, row, a, width, t);
    }
  }
}

template <class T>
constexpr gaussian_normalizers_functions<T> functions = {
    scores_scratch<T>,   log_normalizer<T>,    score_moments<T>,
    responsibilities<T>, gradient_scratch<T>,  gradient<T>,
    covariance<T>,       residuals_scratch<T>, sample_residuals<T>};

}  // namespace

extern const gaussian_normalizers_kernels kernels_gaussian_normalizers;
const gaussian_normalizers_kernels kernels_gaussian_normalizers = {functions<float>,
                                                                   functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
