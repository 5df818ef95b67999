// Contracts stand in normalizers_kernels.hpp. Queries (the rows whose sums are wanted) lie in
// lanes, keys are broadcast: a running state per query never crosses lanes, and the weights of a
// second product leave the accumulators in the layout in which it reads them.
#include "normalizers_kernels.hpp"

#include "log_sum_exp.inl"
#include "tile_product.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// Keys in a block: a packed block takes half of a 512 KiB second-level cache, and no more than 480
// terms meet in T before a block's sum goes into double.
template <class T>
std::int64_t log_normalizer_block(std::int64_t m, std::int64_t depth) {
  std::int64_t block = (256 << 10) / static_cast<std::int64_t>(sizeof(T)) / (depth + 1);
  block = smaller<std::int64_t>(block, 480) / kTileRows * kTileRows;
  block = block < kTileRows ? kTileRows : block;
  return smaller(block, divide_up(m, kTileRows) * kTileRows);
}

template <class T>
std::size_t log_normalizer_scratch(std::int64_t n, std::int64_t m, std::int64_t depth) {
  const std::int64_t block = log_normalizer_block<T>(m, depth);
  return sizeof(T) *
         static_cast<std::size_t>(packed_size<kTileColumns<T>>(n, depth) + block * depth + block);
}

// Offsets of one block of keys, -inf past the last; a key of weight -inf becomes a row of zeros, so
// that 0 * NaN cannot reach a sum in which it does not take part. Returns whether any is -inf.
template <class T>
bool pack_keys(matrix_view<const T> y, std::int64_t count, std::int64_t depth,
               vector_view<const T> log_weights, T* packed, T* offsets) {
  pack_rows<kTileRows, T>(y, count, depth, packed);
  const std::int64_t padded = divide_up(count, kTileRows) * kTileRows;
  bool absent = count < padded;
  for (std::int64_t j = 0; j < count; ++j) {
    offsets[j] = log_weights ? log_weights[j] : T(0);
    if (offsets[j] != -kInfinity<T>) continue;
    zero_packed_row<kTileRows>(packed, j, depth);
    absent = true;
  }
  for (std::int64_t j = count; j < padded; ++j) offsets[j] = -kInfinity<T>;
  return absent;
}

// After the product and not before it: each step of a sum that starts from an offset would round at
// the offset's size (at depth 384 an error of 6e-6 instead of 5e-7 in float32 gradients).
template <class T>
SUBQUAD_INLINE void add_offsets(const T* offsets, tile<T>& scores) {
  SUBQUAD_UNROLL_ROWS
  for (int r = 0; r < kTileRows; ++r) {
    const vec<T> offset = broadcast(offsets[r]);
    scores[r][0] += offset;
    scores[r][1] += offset;
  }
}

// Rows of a tile whose offset is -inf score -inf: the infinities of a query would make NaN of the
// zeros that stand for a key that is absent.
template <class T>
SUBQUAD_INLINE void drop_absent(const T* offsets, tile<T>& scores) {
  SUBQUAD_UNROLL_ROWS
  for (int r = 0; r < kTileRows; ++r) {
    const bool absent = offsets[r] == -kInfinity<T>;
    scores[r][0] = absent ? broadcast(-kInfinity<T>) : scores[r][0];
    scores[r][1] = absent ? broadcast(-kInfinity<T>) : scores[r][1];
  }
}

// The excluded key of each lane, as an index into the current block, -1 where it lies elsewhere.
template <class T>
struct lane_exclusions {
  ivec<T> index[kTileVectors];
  std::int64_t first;
  std::int64_t last;

  bool touches(std::int64_t begin) const { return begin <= last && first < begin + kTileRows; }
};

template <class T>
lane_exclusions<T> find_exclusions(vector_view<const std::int64_t> excluded, std::int64_t count,
                                   std::int64_t first_key, std::int64_t n_keys) {
  lane_exclusions<T> found;
  found.first = n_keys;
  found.last = -1;
  for (int v = 0; v < kTileVectors; ++v) found.index[v] = ivec<T>{} - 1;
  if (!excluded) return found;
  for (std::int64_t c = 0; c < count; ++c) {
    const std::int64_t index = excluded[c] - first_key;
    if (excluded[c] < 0 || index < 0 || index >= n_keys) continue;
    found.index[c / lanes<T>][c % lanes<T>] = static_cast<typename vector_of<T>::scalar_int>(index);
    found.first = smaller(found.first, index);
    found.last = index > found.last ? index : found.last;
  }
  return found;
}

template <class T>
SUBQUAD_INLINE void mask_tile(const lane_exclusions<T>& exclusions, std::int64_t begin,
                              tile<T>& scores) {
  const auto key = static_cast<typename vector_of<T>::scalar_int>(begin);
  SUBQUAD_UNROLL_ROWS
  for (int r = 0; r < kTileRows; ++r) {
    SUBQUAD_UNROLL_VECTORS
    for (int v = 0; v < kTileVectors; ++v) {
      scores[r][v] = exclusions.index[v] == key + r ? broadcast(-kInfinity<T>) : scores[r][v];
    }
  }
}

// Rows up to which a key is read where it lies, once for all of them, instead of being packed for
// tiles that few rows leave mostly empty: 20000 keys of length 50, one row, v4, 0.1 ms against 1.2.
constexpr std::int64_t kFewRows = 8;

template <class T>
void log_normalizer_of_few(const log_normalizer_task<T>& task) {
  constexpr std::int64_t kBlock = 256;
  const std::int64_t depth = task.depth;
  T* rows = static_cast<T*>(task.scratch);
  for (std::int64_t i = 0; i < task.n; ++i) {
    for (std::int64_t k = 0; k < depth; ++k) rows[i * depth + k] = task.x(i, k);
    task.shift[i] = kLowest<T>;
    task.sum[i] = 0;
  }
  for (std::int64_t first = 0; first < task.m; first += kBlock) {
    const std::int64_t count = smaller(kBlock, task.m - first);
    const vector_view<const T> log_weights = task.log_weights.from(first);
    for (std::int64_t i = 0; i < task.n; ++i) {
      const T* row = rows + i * depth;
      T scores[kBlock];
      for (std::int64_t j = 0; j < count; j += 4) {
        const T* keys[4];
        for (int r = 0; r < 4; ++r) {
          keys[r] = task.y.data + (first + smaller(j + r, count - 1)) * task.y.row_stride;
        }
        T s0 = 0;
        T s1 = 0;
        T s2 = 0;
        T s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (std::int64_t k = 0; k < depth; ++k) {
          s0 += row[k] * keys[0][k];
          s1 += row[k] * keys[1][k];
          s2 += row[k] * keys[2][k];
          s3 += row[k] * keys[3][k];
        }
        scores[j] = s0;
        scores[j + 1] = s1;
        scores[j + 2] = s2;
        scores[j + 3] = s3;
      }
      for (std::int64_t j = count; j < kBlock; ++j) scores[j] = -kInfinity<T>;
      for (std::int64_t j = 0; log_weights && j < count; ++j) {
        scores[j] = log_weights[j] == -kInfinity<T> ? -kInfinity<T> : scores[j] + log_weights[j];
      }
      if (task.excluded) {
        const std::int64_t j = task.excluded[i] - task.first_key - first;
        if (task.excluded[i] >= 0 && j >= 0 && j < count) scores[j] = -kInfinity<T>;
      }
      const std::int64_t padded = divide_up(count, lanes<T>) * lanes<T>;
      vec<T> largest = broadcast(kLowest<T>);
      for (std::int64_t j = 0; j < padded; j += lanes<T>)
        largest = max<T>(load(scores + j), largest);
      T peak = largest[0];
      for (int c = 1; c < lanes<T>; ++c) peak = largest[c] > peak ? largest[c] : peak;
      peak *= kLog2E<T>;
      const T shift = peak > static_cast<T>(task.shift[i]) ? peak : static_cast<T>(task.shift[i]);
      vec<T> sum = {};
      for (std::int64_t j = 0; j < padded; j += lanes<T>) {
        sum += exp2_bounded<T>(load(scores + j) * kLog2E<T> - shift);
      }
      if (static_cast<double>(shift) != task.shift[i]) {
        task.sum[i] *= __builtin_exp2(task.shift[i] - static_cast<double>(shift));
        task.shift[i] = static_cast<double>(shift);
      }
      for (int c = 0; c < lanes<T>; ++c) task.sum[i] += static_cast<double>(sum[c]);
    }
  }
}

template <class T>
void log_normalizer(const log_normalizer_task<T>& task) {
  if (task.n <= kFewRows && task.y.column_stride == 1) {
    log_normalizer_of_few<T>(task);
    return;
  }
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = task.depth;
  const std::int64_t block = log_normalizer_block<T>(task.m, depth);
  T* panels = static_cast<T*>(task.scratch);
  T* keys = panels + packed_size<kColumns>(task.n, depth);
  T* offsets = keys + block * depth;
  pack_rows<kColumns, T>(task.x, task.n, depth, panels);
  for (std::int64_t i = 0; i < task.n; ++i) {
    task.shift[i] = kLowest<T>;
    task.sum[i] = 0;
  }
  for (std::int64_t first = 0; first < task.m; first += block) {
    const std::int64_t count = smaller(block, task.m - first);
    const bool absent =
        pack_keys<T>(task.y.from(first), count, depth, task.log_weights.from(first), keys, offsets);
    for (std::int64_t begin = 0; begin < task.n; begin += kColumns) {
      const T* panel = panels + begin * depth;
      const std::int64_t width = smaller<std::int64_t>(kColumns, task.n - begin);
      const lane_exclusions<T> exclusions =
          find_exclusions<T>(task.excluded.from(begin), width, task.first_key + first, count);
      log_sum_exp<T> state[kTileVectors];
      for (int c = 0; c < kColumns; ++c) {
        state[c / lanes<T>].shift[c % lanes<T>] =
            c < width ? static_cast<T>(task.shift[begin + c]) : kLowest<T>;
        state[c / lanes<T>].sum[c % lanes<T>] = 0;
      }
      for (std::int64_t j = 0; j < count; j += kTileRows) {
        tile<T> scores;
        tile_zero<T>(scores);
        tile_product<T>(depth, keys + j * depth, panel, scores);
        if (task.log_weights) add_offsets<T>(offsets + j, scores);
        if (absent) drop_absent<T>(offsets + j, scores);
        if (exclusions.touches(j)) mask_tile<T>(exclusions, j, scores);
        push<T>(state, scores);
      }
      for (std::int64_t c = 0; c < width; ++c) {
        const double shift = state[c / lanes<T>].shift[c % lanes<T>];
        double& total = task.sum[begin + c];
        if (shift != task.shift[begin + c]) {
          total *= __builtin_exp2(task.shift[begin + c] - shift);
          task.shift[begin + c] = shift;
        }
        total += static_cast<double>(state[c / lanes<T>].sum[c % lanes<T>]);
      }
    }
  }
}

// Keys between two visits to the output, a multiple of 12.
constexpr std::int64_t kWeightBlock = 96;

template <class T>
std::size_t weighted_sum_scratch(std::int64_t n, std::int64_t /*m*/, std::int64_t depth) {
  constexpr int kColumns = kTileColumns<T>;
  return sizeof(T) *
         static_cast<std::size_t>(
             packed_size<kColumns>(n, depth) +
             packed_size<kColumns>(n, divide_up(depth, kTileRows) * kTileRows) +
             packed_size<kColumns>(n, 1) + kWeightBlock * depth +
             packed_size<kTileRows>(depth, kWeightBlock) + kWeightBlock * (kColumns + 2));
}

template <class T>
void weighted_sum(const weighted_sum_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = task.depth;
  const std::int64_t out_depth = divide_up(depth, kTileRows) * kTileRows;
  const std::int64_t n_padded = divide_up(task.n, kColumns) * kColumns;
  T* panels = static_cast<T*>(task.scratch);
  T* sums = panels + n_padded * depth;      // [panel][out_depth][kColumns]
  T* totals = sums + n_padded * out_depth;  // [panel][kColumns]
  T* keys = totals + n_padded;              // [tile][depth][kTileRows]: left of the scores
  T* values = keys + kWeightBlock * depth;  // [dimension tile][key][kTileRows]: left of the sums
  T* weights = values + packed_size<kTileRows>(depth, kWeightBlock);  // [key][kColumns]
  T* offsets = weights + kWeightBlock * kColumns;
  T* gammas = offsets + kWeightBlock;

  pack_rows<kColumns, T>(task.x, task.n, depth, panels);
  for (std::int64_t i = 0; i < task.n; ++i) {
    if (task.row_offset[i] == -kInfinity<T>) zero_packed_row<kColumns>(panels, i, depth);
  }
  for (std::int64_t i = 0; i < n_padded * (out_depth + 1); ++i) sums[i] = T(0);

  for (std::int64_t first = 0; first < task.m; first += kWeightBlock) {
    const std::int64_t count = smaller(kWeightBlock, task.m - first);
    const std::int64_t padded = divide_up(count, kTileRows) * kTileRows;
    const bool absent = pack_keys<T>(task.y.from(first), count, depth,
                                     {task.column_offset + first, 1}, keys, offsets);
    for (std::int64_t j = 0; j < padded; ++j) {
      gammas[j] = j < count ? (task.gamma ? task.gamma[first + j] : T(1)) : T(0);
    }
    for (std::int64_t dim = 0; dim < out_depth; dim += kTileRows) {
      T* value = values + dim * kWeightBlock;
      for (std::int64_t j = 0; j < padded; ++j, value += kTileRows) {
        const T* key = keys + j / kTileRows * kTileRows * depth + j % kTileRows;
        for (int r = 0; r < kTileRows; ++r) {
          const T element = dim + r < depth ? key[(dim + r) * kTileRows] : T(0);
          value[r] = element - element == T(0) ? element : T(0);
        }
      }
    }
    for (std::int64_t begin = 0; begin < task.n; begin += kColumns) {
      const T* panel = panels + begin * depth;
      const std::int64_t width = smaller<std::int64_t>(kColumns, task.n - begin);
      lane_exclusions<T> exclusions = find_exclusions<T>(
          task.excluded_by_row ? task.excluded.from(begin) : vector_view<const std::int64_t>{},
          width, task.first_column + first, count);
      vec<T> offset[kTileVectors] = {};
      vec<T> total[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) total[v] = load(totals + begin + v * lanes<T>);
      for (int c = 0; c < kColumns; ++c) {
        offset[c / lanes<T>][c % lanes<T>] = c < width ? task.row_offset[begin + c] : -kInfinity<T>;
      }
      for (std::int64_t j = 0; j < padded; j += kTileRows) {
        tile<T> scores;
        tile_zero<T>(scores);
        tile_product<T>(depth, keys + j * depth, panel, scores);
        add_offsets<T>(offsets + j, scores);
        SUBQUAD_UNROLL_ROWS
        for (int r = 0; r < kTileRows; ++r) {
          scores[r][0] += offset[0];
          scores[r][1] += offset[1];
        }
        if (absent) drop_absent<T>(offsets + j, scores);
        if (exclusions.touches(j)) mask_tile<T>(exclusions, j, scores);
        SUBQUAD_UNROLL_ROWS
        for (int r = 0; r < kTileRows; ++r) {
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kTileVectors; ++v) {
            const vec<T> weight = exp2_bounded<T>(scores[r][v] * kLog2E<T>) * gammas[j + r];
            store(weights + (j + r) * kColumns + v * lanes<T>, weight);
          }
        }
      }
      if (task.excluded && !task.excluded_by_row) {
        for (std::int64_t j = 0; j < count; ++j) {
          const std::int64_t lane = task.excluded[first + j] - task.first_row - begin;
          if (task.excluded[first + j] >= 0 && lane >= 0 && lane < width) {
            weights[j * kColumns + lane] = T(0);
          }
        }
      }
      for (std::int64_t j = 0; j < padded; ++j) {
        SUBQUAD_UNROLL_VECTORS
        for (int v = 0; v < kTileVectors; ++v) {
          total[v] += load(weights + j * kColumns + v * lanes<T>);
        }
      }
      for (int v = 0; v < kTileVectors; ++v) store(totals + begin + v * lanes<T>, total[v]);
      if (!task.out) continue;
      for (std::int64_t dim = 0; dim < out_depth; dim += kTileRows) {
        T* sum = sums + begin * out_depth + dim * kColumns;
        tile<T> acc;  // from zero: a sum of blocks errs less than one long sum
        tile_zero<T>(acc);
        tile_product<T>(padded, values + dim * kWeightBlock, weights, acc);
        SUBQUAD_UNROLL_ROWS
        for (int r = 0; r < kTileRows; ++r) {
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kTileVectors; ++v) {
            T* out = sum + r * kColumns + v * lanes<T>;
            store(out, load(out) + acc[r][v]);
          }
        }
      }
    }
  }
  for (std::int64_t i = 0; i < task.n; ++i) {
    const T scale = task.scale ? task.scale[i] : T(1);
    const bool absent = task.row_offset[i] == -kInfinity<T>;
    if (task.total) task.total[i] = absent ? T(0) : scale * totals[i];
    if (!task.out) continue;
    const T* sum = sums + i / kColumns * kColumns * out_depth + i % kColumns;
    for (std::int64_t k = 0; k < depth; ++k) {
      task.out(i, k) = absent ? T(0) : scale * sum[k * kColumns];
    }
  }
}

template <class T>
constexpr normalizers_functions<T> functions = {log_normalizer_scratch<T>, log_normalizer<T>,
                                                weighted_sum_scratch<T>, weighted_sum<T>};

}  // namespace

extern const normalizers_kernels kernels_normalizers;
const normalizers_kernels kernels_normalizers = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
