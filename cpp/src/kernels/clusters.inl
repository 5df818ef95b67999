// Contracts stand in clusters_kernels.hpp.
#include "clusters_kernels.hpp"

#include "log_sum_exp.inl"
#include "tile_product.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// Centroids in a block: as many as leave half of a 512 KiB second-level cache to the rows.
template <class T>
std::int64_t centroid_block(std::int64_t k, std::int64_t depth) {
  std::int64_t block = (256 << 10) / static_cast<std::int64_t>(sizeof(T)) / (depth + 1);
  block = block / kTileRows * kTileRows;
  block = block < kTileRows ? kTileRows : block;
  return smaller(block, divide_up(k, kTileRows) * kTileRows);
}

template <class T>
std::size_t nearest_centroids_scratch(std::int64_t n, std::int64_t k, std::int64_t depth) {
  const std::int64_t block = centroid_block<T>(k, depth);
  return sizeof(T) *
         static_cast<std::size_t>(packed_size<kTileColumns<T>>(n, depth) + block * (depth + 1));
}

template <class T>
void nearest_centroids(const nearest_centroids_task<T>& task) {
  using index = typename vector_of<T>::scalar_int;
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = task.depth;
  const std::int64_t block = centroid_block<T>(task.k, depth);
  T* panels = static_cast<T*>(task.scratch);
  T* centroids = panels + packed_size<kColumns>(task.n, depth);
  T* offsets = centroids + block * depth;
  pack_rows<kColumns, T>(task.x, task.n, depth, panels);
  for (std::int64_t i = 0; i < task.n; ++i) {
    task.labels[i] = 0;
    task.score[i] = -kInfinity<T>;
  }
  for (std::int64_t first = 0; first < task.k; first += block) {
    const std::int64_t count = smaller(block, task.k - first);
    const std::int64_t padded = divide_up(count, kTileRows) * kTileRows;
    pack_rows<kTileRows, T>(task.centroids.from(first), count, depth, centroids);
    for (std::int64_t c = 0; c < padded; ++c) {
      offsets[c] = c < count ? task.offsets[first + c] : -kInfinity<T>;
    }
    for (std::int64_t row = 0; row < task.n; row += kColumns) {
      const std::int64_t width = smaller<std::int64_t>(kColumns, task.n - row);
      vec<T> best[kTileVectors];
      ivec<T> label[kTileVectors] = {};
      for (int v = 0; v < kTileVectors; ++v) best[v] = broadcast(-kInfinity<T>);
      for (std::int64_t c = 0; c < padded; c += kTileRows) {
        tile<T> scores;
        tile_fill<T>(offsets + c, scores);
        tile_product<T>(depth, centroids + c * depth, panels + row * depth, scores);
        SUBQUAD_UNROLL_ROWS
        for (int r = 0; r < kTileRows; ++r) {
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kTileVectors; ++v) {
            const ivec<T> better = scores[r][v] > best[v];
            label[v] = better ? ivec<T>{} + static_cast<index>(c + r) : label[v];
            best[v] = better ? scores[r][v] : best[v];
          }
        }
      }
      for (std::int64_t c = 0; c < width; ++c) {
        const T score = best[c / lanes<T>][c % lanes<T>];
        if (score > task.score[row + c]) {
          task.score[row + c] = score;
          task.labels[row + c] = first + label[c / lanes<T>][c % lanes<T>];
        }
      }
    }
  }
}

template <class T>
void component_sums(const component_sums_task<T>& task) {
  const std::int64_t depth = task.depth;
  for (std::int64_t j = 0; j < task.n; ++j) {
    const double weight = task.weights ? static_cast<double>(task.weights[j]) : 1;
    const std::int64_t label = task.labels[j];
    const T* row = task.y.data + j * task.y.row_stride;
    double* sum = task.sums + label * depth;
    task.counts[label] += weight;
    if (weight == 0) continue;
    if (task.y.column_stride == 1) {
      for (std::int64_t k = 0; k < depth; ++k) sum[k] += weight * static_cast<double>(row[k]);
    } else {
      for (std::int64_t k = 0; k < depth; ++k) {
        sum[k] += weight * static_cast<double>(row[k * task.y.column_stride]);
      }
    }
  }
}

constexpr std::int64_t kScatterBlock = 128;  // rows whose products meet in T

// Length of a centred row: whole tiles of either operand, and off the multiples of 4 KiB at which
// the rows of a block would share a set of the first-level cache.
template <class T>
std::int64_t centred_length(std::int64_t depth) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t padded = divide_up(depth + kTileRows, kColumns) * kColumns;
  return padded * static_cast<std::int64_t>(sizeof(T)) % 1024 == 0 ? padded + lanes<T> : padded;
}

template <class T>
std::size_t component_scatter_scratch(std::int64_t depth) {
  return 2 * sizeof(T) * static_cast<std::size_t>(kScatterBlock * centred_length<T>(depth));
}

// Writes y_j - center, rounded to T, and returns its squared length.
template <class T>
SUBQUAD_INLINE double centre_row(matrix_view<const T> y, std::int64_t j, std::int64_t depth,
                                 const double* center, T* out) {
  const T* row = y.data + j * y.row_stride;
  const std::int64_t stride = y.column_stride;
  double square = 0;
  if (stride == 1 && center) {
#pragma omp simd reduction(+ : square)
    for (std::int64_t k = 0; k < depth; ++k) {
      const double c = static_cast<double>(row[k]) - center[k];
      out[k] = static_cast<T>(c);
      square += c * c;
    }
  } else {
    for (std::int64_t k = 0; k < depth; ++k) {
      const double c = static_cast<double>(row[k * stride]) - (center ? center[k] : 0);
      out[k] = static_cast<T>(c);
      square += c * c;
    }
  }
  return square;
}

// Rows of one component lie apart, which hides them from the hardware's prefetcher.
constexpr std::int64_t kAhead = 8;

template <class T>
SUBQUAD_INLINE void prefetch_row(matrix_view<const T> y, std::int64_t j, std::int64_t depth) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  if (y.column_stride != 1) return;
  for (std::int64_t k = 0; k < depth; k += kLine) __builtin_prefetch(&y(j, k));
}

template <class T>
void component_scatter(const component_scatter_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = task.depth;
  const std::int64_t length = centred_length<T>(depth);
  T* centred = static_cast<T*>(task.scratch);
  T* weighted = centred + kScatterBlock * length;
  for (std::int64_t i = 0; i < depth * depth; ++i) task.scatter[i] = 0;
  for (std::int64_t i = 0; i < kScatterBlock * length; ++i) centred[i] = T(0);
  for (std::int64_t i = 0; i < kScatterBlock * length; ++i) weighted[i] = T(0);
  double largest = 0;
  for (std::int64_t first = 0; first < task.n; first += kScatterBlock) {
    const std::int64_t count = smaller(kScatterBlock, task.n - first);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t j = task.rows ? task.rows[first + i] : first + i;
      if (task.rows && first + i + kAhead < task.n) {
        prefetch_row<T>(task.y, task.rows[first + i + kAhead], depth);
      }
      T* row = centred + i * length;
      const double square = centre_row<T>(task.y, j, depth, task.center, row);
      const T weight = task.weights ? task.weights[j] : T(1);
      if (weight != T(0)) {
        largest = larger_or_nan(largest, square);
      } else {
        for (std::int64_t k = 0; k < depth; ++k) row[k] = T(0);  // 0 * NaN must not count
      }
      if (task.weights) {
        for (std::int64_t k = 0; k < depth; ++k) weighted[i * length + k] = weight * row[k];
      }
    }
    const T* left = task.weights ? weighted : centred;
    for (std::int64_t i = 0; i < depth; i += kTileRows) {
      for (std::int64_t j = 0; j < i + kTileRows && j < depth; j += kColumns) {
        tile<T> acc;
        tile_zero<T>(acc);
        tile_product<T>(count, left + i, length, centred + j, length, acc);
        SUBQUAD_UNROLL_ROWS
        for (int r = 0; r < kTileRows; ++r) {
          if (i + r >= depth) break;
          T values[kColumns];
          store(values, acc[r][0]);
          store(values + lanes<T>, acc[r][1]);
          double* to = task.scatter + (i + r) * depth + j;
          if (j + kColumns <= depth) {
            for (int c = 0; c < kColumns; ++c) to[c] += static_cast<double>(values[c]);
          } else {
            for (std::int64_t c = 0; c < depth - j; ++c) to[c] += static_cast<double>(values[c]);
          }
        }
      }
    }
  }
  *task.radius = __builtin_sqrt(largest);
}

template <class T>
void component_diagonal_scatter(const component_scatter_task<T>& task) {
  const std::int64_t depth = task.depth;
  T* row = static_cast<T*>(task.scratch);
  for (std::int64_t k = 0; k < depth; ++k) task.scatter[k] = 0;
  double largest = 0;
  for (std::int64_t i = 0; i < task.n; ++i) {
    const std::int64_t j = task.rows ? task.rows[i] : i;
    const T weight = task.weights ? task.weights[j] : T(1);
    if (weight == T(0)) continue;
    const double square = centre_row<T>(task.y, j, depth, task.center, row);
    largest = larger_or_nan(largest, square);
    for (std::int64_t k = 0; k < depth; ++k) {
      const double c = static_cast<double>(row[k]);
      task.scatter[k] += static_cast<double>(weight) * c * c;
    }
  }
  *task.radius = __builtin_sqrt(largest);
}

template <class T>
constexpr clusters_functions<T> functions = {
    nearest_centroids_scratch<T>, nearest_centroids<T>, component_sums<T>,
    component_scatter_scratch<T>, component_scatter<T>, component_diagonal_scatter<T>};

}  // namespace

extern const clusters_kernels kernels_clusters;
const clusters_kernels kernels_clusters = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
