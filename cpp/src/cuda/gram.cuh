// Weighted sums over rows: their Gram matrix on tensor cores, its diagonal and the plain sum in
// float64, of many products at once ("product": one set of rows and weights).
//
// A source says which rows belong to a product and how they are cut into parts, one block each (and
// each piece of the output). The first part of a product is written to its place in the output, the
// others beside it, from where they are added in order: results do not depend on the device. A
// source has
//   std::int64_t products
//   std::int64_t slots                                   parts at most
//   bool part(std::int64_t slot, row_part<T>& to) const  false where the slot has none
//   row_parts parts(std::int64_t product) const
#ifndef SUBQUAD_CUDA_GRAM_CUH
#define SUBQUAD_CUDA_GRAM_CUH

#include <algorithm>
#include <cstdint>

#include "batches.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "tile_product.cuh"

namespace subquad::cuda {

// Rows of a matrix: those of `list`, or 0 .. count - 1 where there is none.
template <class T>
struct weighted_rows {
  matrix_view<const T> matrix;
  vector_view<const T> weights;  // by row of the matrix; optional: 1
  const std::uint32_t* list;     // optional
  const double* center;          // optional: 0
  int count;

  SUBQUAD_DEVICE std::int64_t index(int row) const {
    return list ? static_cast<std::int64_t>(list[row]) : row;
  }
  SUBQUAD_DEVICE T weight(std::int64_t index) const { return weights ? weights[index] : T(1); }
};

template <class T>
struct row_part {
  weighted_rows<T> rows;
  std::int64_t product;
  std::int64_t extra;  // of the parts after the first of their product, counted over all; else -1
  bool is_only;        // the product's only part
};

// The parts of a product after its first.
struct row_parts {
  std::int64_t first;
  std::int64_t count;
};

// Sums of `size` elements by product, and those of the parts after the first.
struct part_sums {
  double* out;    // [product][size]
  double* extra;  // [extra part][size]
  std::int64_t size;

  template <class T>
  SUBQUAD_DEVICE double* of(const row_part<T>& part) const {
    return part.extra < 0 ? out + part.product * size : extra + part.extra * size;
  }
};

// How n rows of each of `products` are cut, from the shapes alone: into as many parts as fill a
// large device, where a part of the rows takes `blocks` blocks, of whole groups of at least
// kSmallestPart rows. There are less than kPartBlocks / blocks extra parts (beside those that rows
// beyond 2^30 need): for Gram matrices less than 32 MiB.
struct product_split {
  static constexpr std::int64_t kPartBlocks = 512;
  static constexpr std::int64_t kSmallestPart = 1024;
  std::int64_t rows;   // of a part
  std::int64_t parts;  // of a product

  product_split(std::int64_t products, std::int64_t n, std::int64_t blocks) {
    const std::int64_t wanted =
        kPartBlocks / std::max<std::int64_t>(1, products * std::max<std::int64_t>(1, blocks));
    rows = divide_up(std::max<std::int64_t>(n, 1), std::max<std::int64_t>(1, wanted));
    rows = std::clamp(divide_up(rows, kSmallestPart) * kSmallestPart, kSmallestPart, kMostRows);
    parts = std::max<std::int64_t>(1, divide_up(n, rows));
  }

  std::int64_t extra_parts(std::int64_t products) const { return products * (parts - 1); }
};

// A source: every row of a batch of matrices, once for each of `of_batch` products, whose weights
// lie in weights[product][n].
template <class T, int kArrays>
struct all_rows {
  matrix_view<const T> matrix;
  batches<kArrays> batch;
  int which;  // of the arrays of `batch` the matrix is
  std::int64_t of_batch;
  std::int64_t n;
  const T* weights;
  std::int64_t rows;      // of a part
  std::int64_t of_parts;  // parts of a product
  std::int64_t products;
  std::int64_t slots;

  all_rows(const matrix_view<const T>& matrix_, const batches<kArrays>& batch_, int which_,
           std::int64_t size, std::int64_t of_batch_, std::int64_t n_, const T* weights_,
           const product_split& cut)
      : matrix(matrix_),
        batch(batch_),
        which(which_),
        of_batch(of_batch_),
        n(n_),
        weights(weights_),
        rows(cut.rows),
        of_parts(cut.parts),
        products(size * of_batch_),
        slots(products * cut.parts) {}

  SUBQUAD_DEVICE bool part(std::int64_t slot, row_part<T>& to) const {
    const std::int64_t product = slot / of_parts;
    const std::int64_t index = slot % of_parts;
    const std::int64_t first = index * rows;
    const std::int64_t left = n - first;
    to.rows.matrix = matrix.from(first);
    to.rows.matrix.data += batch.offset(which, product / of_batch);
    to.rows.weights = {weights + product * n + first, 1};
    to.rows.list = nullptr;
    to.rows.center = nullptr;
    to.rows.count = static_cast<int>(left < rows ? left : rows);
    to.product = product;
    to.extra = index > 0 ? product * (of_parts - 1) + index - 1 : -1;
    to.is_only = of_parts == 1;
    return true;
  }
  SUBQUAD_DEVICE row_parts parts(std::int64_t product) const {
    return {product * (of_parts - 1), of_parts - 1};
  }
};

// y - center in float64, rounded once.
template <class T>
SUBQUAD_DEVICE T centred(T y, double center) {
  return static_cast<T>(static_cast<double>(y) - center);
}

inline constexpr int kGramTile = 64;  // rows and columns of the output that one block computes

// Blocks that compute the lower triangle.
inline std::int64_t gram_blocks(std::int64_t depth) {
  const std::int64_t tiles = divide_up(depth, kGramTile);
  return tiles * (tiles + 1) / 2;
}

// out = sum_j w_j c_j c_j^T over the rows j of each product, c_j = y_j - center rounded to T: the
// lower triangle, and the upper one where the product has one part. Rows of weight 0 count for
// nothing, whatever they hold.
//
// Nothing aliases. w_j c_j is rounded to T; products and sums of 128 rows on tensor cores, sums of
// those in float64. With c as it is before rounding, an entry is within 31 * 2^-22 (float32), or
// 133 * 2^-53 (float64), and 2^-53 for each 128 rows and each part of sum_j |w_j c_ji c_jk|.
// Entries with infinities or NaN are those of plain arithmetic.
template <class T, class Source>
struct gram_kernel {
  using warp = warp_product<T>;
  static constexpr int kWarps = 2;  // down, and across
  static constexpr int kThreads = kWarps * kWarps * kWarp;
  static constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;  // 64 registers of totals
  static constexpr int kChunk = 128 / static_cast<int>(sizeof(T));
  static constexpr int kGroup = 128;  // rows between two additions to the totals
  // Rows lie one below the other. With this padding the lanes of a fragment, 4 rows by 8 columns,
  // read from different banks.
  static constexpr int kStride = kGramTile + (sizeof(T) == 8 ? 4 : 8);
  static constexpr int kOfWarp = kGramTile / kWarps;
  static constexpr int kTilesDown = kOfWarp / warp::kRows;
  static constexpr int kTilesAcross = kOfWarp / 8;
  static constexpr int kPerTile = warp::kRows / 4;  // accumulators of a thread
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPerRow = kGramTile / kVector;
  static constexpr int kStep = kThreads / kPerRow;  // rows that the threads reach at once
  static_assert(kChunk % kStep == 0 && kGroup % kChunk == 0 && kChunk <= kThreads);

  struct alignas(16) vector {
    T values[kVector];
  };
  struct alignas(16) stage {
    T left[kChunk * kStride];  // w_j c_j
    T right[kChunk * kStride];
    T weights[kChunk];
  };
  struct shared_memory {
    stage stages[2];
    double left_center[kGramTile];
    double right_center[kGramTile];
    std::int64_t indices[2][kChunk];  // of the rows of a chunk
    row_part<T> part;
    double* out;
    int left_first;  // columns of the matrix
    int right_first;
    bool counts;
    bool is_vector;
  };
  using accumulators = T[kTilesDown][kTilesAcross][kPerTile];
  using wide = double[kTilesDown][kTilesAcross][kPerTile];

  Source source;
  int depth;
  std::int64_t blocks;  // of a part
  part_sums sums;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    if (!shared.counts) return;
    const weighted_rows<T>& rows = shared.part.rows;
    if (thread() < kGramTile) {
      const int left = shared.left_first + thread();
      const int right = shared.right_first + thread();
      shared.left_center[thread()] = rows.center && left < depth ? rows.center[left] : 0;
      shared.right_center[thread()] = rows.center && right < depth ? rows.center[right] : 0;
    }
    if (thread() < kChunk) {
      shared.indices[0][thread()] = index_at(rows, thread());
      shared.indices[1][thread()] = index_at(rows, kChunk + thread());
    }
    wide totals;
    accumulators tile;
    clear(totals);
    clear(tile);
    __syncthreads();
    copy(0, shared);
    for (int first = 0; first < rows.count; first += kChunk) {
      const int slot = first / kChunk % 2;
      const std::int64_t ahead =
          thread() < kChunk ? index_at(rows, first + 2 * kChunk + thread()) : 0;
      copy(first + kChunk, shared);
      wait_copies<1>();
      // Threads read what they copied themselves, where that was vectors.
      if (!shared.is_vector || rows.weights) __syncthreads();
      prepare(first, shared);
      __syncthreads();
      multiply(shared.stages[slot], shared.left_first == shared.right_first, tile);
      if ((first + kChunk) % kGroup == 0) add(tile, totals);
      if (thread() < kChunk) shared.indices[slot][thread()] = ahead;
      __syncthreads();
    }
    wait_copies<0>();
    add(tile, totals);
    write(totals, shared);
  }

  static SUBQUAD_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
  static SUBQUAD_DEVICE int lane() { return thread() % kWarp; }
  static SUBQUAD_DEVICE int warp_down() { return thread() / kWarp / kWarps * kOfWarp; }
  static SUBQUAD_DEVICE int warp_across() { return thread() / kWarp % kWarps * kOfWarp; }

  static SUBQUAD_DEVICE std::int64_t index_at(const weighted_rows<T>& rows, int row) {
    return row < rows.count ? rows.index(row) : 0;
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) / blocks;
    int column = static_cast<int>(static_cast<std::int64_t>(blockIdx.x) % blocks);
    int row = 0;
    while (column > row) column -= ++row;
    shared.left_first = row * kGramTile;
    shared.right_first = column * kGramTile;
    shared.counts = source.part(slot, shared.part);
    if (!shared.counts) return;
    shared.out = sums.of(shared.part);
    const matrix_view<const T>& matrix = shared.part.rows.matrix;
    shared.is_vector = matrix.column_stride == 1 && matrix.row_stride % kVector == 0 &&
                       reinterpret_cast<std::uintptr_t>(matrix.data) % 16 == 0;
  }

  template <class U>
  static SUBQUAD_DEVICE void clear(U (&tile)[kTilesDown][kTilesAcross][kPerTile]) {
    SUBQUAD_UNROLL
    for (int i = 0; i < kTilesDown; ++i) {
      SUBQUAD_UNROLL
      for (int j = 0; j < kTilesAcross; ++j) {
        SUBQUAD_UNROLL
        for (int v = 0; v < kPerTile; ++v) tile[i][j][v] = 0;
      }
    }
  }

  // Starts the copies of the rows from `first` on, zeros where there are none, and of their
  // weights.
  SUBQUAD_DEVICE void copy(int first, shared_memory& shared) const {
    const weighted_rows<T>& rows = shared.part.rows;
    const int slot = first / kChunk % 2;
    stage& to = shared.stages[slot];
    const std::int64_t* indices = shared.indices[slot];
    if (first < rows.count) {
      if (rows.weights && thread() < kChunk) {
        const bool valid = first + thread() < rows.count;
        copy_async<sizeof(T)>(to.weights + thread(), &rows.weights[indices[thread()]],
                              valid ? static_cast<int>(sizeof(T)) : 0);
      }
      copy_columns(to.right, rows, indices, first, shared.right_first, shared.is_vector);
      if (shared.left_first != shared.right_first) {
        copy_columns(to.left, rows, indices, first, shared.left_first, shared.is_vector);
      }
    }
    commit_copies();
  }
  SUBQUAD_DEVICE void copy_columns(T* to, const weighted_rows<T>& rows, const std::int64_t* indices,
                                   int first, int column, bool is_vector) const {
    const matrix_view<const T>& matrix = rows.matrix;
    if (is_vector) {
      const int part = thread() % kPerRow * kVector;
      const int left = depth - column - part;
      const int bytes = left <= 0 ? 0 : left < kVector ? left * static_cast<int>(sizeof(T)) : 16;
      SUBQUAD_UNROLL
      for (int each = 0; each < kChunk / kStep; ++each) {
        const int row = thread() / kPerRow + each * kStep;
        const int valid = first + row < rows.count ? bytes : 0;
        const T* source_row = matrix.data;
        if (valid > 0) source_row += indices[row] * matrix.row_stride + column + part;
        copy_async<16>(to + row * kStride + part, source_row, valid);
      }
      return;
    }
    const bool along_rows = matrix.row_stride == 1 && matrix.column_stride != 1;
    SUBQUAD_NO_UNROLL
    for (int index = thread(); index < kChunk * kGramTile; index += kThreads) {
      const int row = along_rows ? index % kChunk : index / kGramTile;
      const int part = along_rows ? index / kChunk : index % kGramTile;
      const bool valid = first + row < rows.count && column + part < depth;
      const T* element = matrix.data;
      if (valid) element = &matrix(indices[row], column + part);
      copy_async<sizeof(T)>(to + row * kStride + part, element,
                            valid ? static_cast<int>(sizeof(T)) : 0);
    }
  }

  // Centres and weighs the rows from `first` on, in place.
  SUBQUAD_DEVICE void prepare(int first, shared_memory& shared) const {
    const weighted_rows<T>& rows = shared.part.rows;
    stage& to = shared.stages[first / kChunk % 2];
    const bool is_diagonal = shared.left_first == shared.right_first;
    const int part = thread() % kPerRow * kVector;
    SUBQUAD_UNROLL
    for (int each = 0; each < kChunk / kStep; ++each) {
      const int row = thread() / kPerRow + each * kStep;
      T weight = first + row < rows.count ? T(1) : T(0);
      if (rows.weights && weight != T(0)) weight = to.weights[row];
      auto& right = *reinterpret_cast<vector*>(to.right + row * kStride + part);
      auto& left = *reinterpret_cast<vector*>(to.left + row * kStride + part);
      vector c = right;
      centre(c, shared.right_center + part, weight, rows.center);
      right = c;
      if (!is_diagonal) {
        c = left;
        centre(c, shared.left_center + part, weight, rows.center);
      }
      SUBQUAD_UNROLL
      for (int v = 0; v < kVector; ++v) c.values[v] = weight * c.values[v];
      left = c;
    }
  }
  static SUBQUAD_DEVICE void centre(vector& c, const double* center, T weight, bool is_centred) {
    SUBQUAD_UNROLL
    for (int v = 0; v < kVector; ++v) {
      if (weight == T(0)) {
        c.values[v] = T(0);  // 0 * NaN must not count
      } else if (is_centred) {
        c.values[v] = centred(c.values[v], center[v]);
      }
    }
  }

  // Fragments of what lies one row of the matrix below the other: tile_product's, transposed.
  static SUBQUAD_DEVICE void load(typename warp_product<float>::left& to, const float* from) {
    const float* at = from + lane() % 4 * kStride + lane() / 4;
    warp_product<float>::split(at[0], to.high[0], to.low[0]);
    warp_product<float>::split(at[8], to.high[1], to.low[1]);
    warp_product<float>::split(at[4 * kStride], to.high[2], to.low[2]);
    warp_product<float>::split(at[4 * kStride + 8], to.high[3], to.low[3]);
  }
  static SUBQUAD_DEVICE void load(typename warp_product<float>::right& to, const float* from) {
    const float* at = from + lane() % 4 * kStride + lane() / 4;
    warp_product<float>::split(at[0], to.high[0], to.low[0]);
    warp_product<float>::split(at[4 * kStride], to.high[1], to.low[1]);
  }
  static SUBQUAD_DEVICE void load(double& to, const double* from) {
    to = from[lane() % 4 * kStride + lane() / 4];
  }

  static SUBQUAD_DEVICE void multiply(const stage& from, bool is_diagonal, accumulators& tile) {
    if (is_diagonal && warp_down() < warp_across()) return;  // above the diagonal
    SUBQUAD_UNROLL
    for (int k = 0; k < kChunk; k += warp::kDepth) {
      typename warp::left a[kTilesDown];
      SUBQUAD_UNROLL
      for (int i = 0; i < kTilesDown; ++i) {
        load(a[i], from.left + k * kStride + warp_down() + i * warp::kRows);
      }
      SUBQUAD_UNROLL
      for (int j = 0; j < kTilesAcross; ++j) {
        typename warp::right b;
        load(b, from.right + k * kStride + warp_across() + j * 8);
        SUBQUAD_UNROLL
        for (int i = 0; i < kTilesDown; ++i) warp::multiply(tile[i][j], a[i], b);
      }
    }
  }

  static SUBQUAD_DEVICE void add(accumulators& tile, wide& totals) {
    SUBQUAD_UNROLL
    for (int i = 0; i < kTilesDown; ++i) {
      SUBQUAD_UNROLL
      for (int j = 0; j < kTilesAcross; ++j) {
        SUBQUAD_UNROLL
        for (int v = 0; v < kPerTile; ++v) {
          totals[i][j][v] += static_cast<double>(tile[i][j][v]);
          tile[i][j][v] = 0;
        }
      }
    }
  }

  SUBQUAD_DEVICE void write_entry(int row, int column, double value,
                                  const shared_memory& shared) const {
    shared.out[static_cast<std::int64_t>(row) * depth + column] = value;
    if (shared.part.is_only) shared.out[static_cast<std::int64_t>(column) * depth + row] = value;
  }

  SUBQUAD_DEVICE void write(const wide& totals, shared_memory& shared) const {
    bool is_nan = false;
    SUBQUAD_UNROLL
    for (int i = 0; i < kTilesDown; ++i) {
      SUBQUAD_UNROLL
      for (int j = 0; j < kTilesAcross; ++j) {
        SUBQUAD_UNROLL
        for (int v = 0; v < kPerTile; ++v) {
          const int row =
              shared.left_first + warp_down() + i * warp::kRows + v / 2 * 8 + lane() / 4;
          const int column = shared.right_first + warp_across() + j * 8 + lane() % 4 * 2 + v % 2;
          if (row >= depth || column > row) continue;
          write_entry(row, column, totals[i][j][v], shared);
          is_nan = is_nan || totals[i][j][v] != totals[i][j][v];
        }
      }
    }
    if constexpr (warp::kIsSplit) {
      if (__syncthreads_or(is_nan)) settle(shared);
    }
  }

  // Entries that are NaN, from plain arithmetic: a product that the split made NaN may be infinite,
  // or finite.
  SUBQUAD_DEVICE void settle(const shared_memory& shared) const {
    for (int index = thread(); index < kGramTile * kGramTile; index += kThreads) {
      const int row = shared.left_first + index / kGramTile;
      const int column = shared.right_first + index % kGramTile;
      if (row >= depth || column > row) continue;
      const double value = shared.out[static_cast<std::int64_t>(row) * depth + column];
      if (value != value) write_entry(row, column, plain_entry(row, column, shared), shared);
    }
  }
  SUBQUAD_DEVICE double plain_entry(int row, int column, const shared_memory& shared) const {
    const weighted_rows<T>& rows = shared.part.rows;
    double total = 0;
    T sum = 0;
    for (int each = 0; each < rows.count && sum == sum; ++each) {
      const std::int64_t index = rows.index(each);
      const T weight = rows.weight(index);
      if (weight != T(0)) {
        T left = rows.matrix(index, row);
        T right = rows.matrix(index, column);
        if (rows.center) {
          left = centred(left, rows.center[row]);
          right = centred(right, rows.center[column]);
        }
        sum = fma(weight * left, right, sum);
      }
      if ((each + 1) % kGroup == 0) {
        total += static_cast<double>(sum);
        sum = 0;
      }
    }
    return total + static_cast<double>(sum);
  }
};

// Plain sums over the rows of each product, in float64: kPower = 1: sum_j w_j y_j, and where counts
// has memory sum_j w_j; kPower = 2: sum_j w_j c_j^2 with c_j = y_j - center rounded to T. Rows of
// weight 0 count for nothing, whatever they hold.
//
// Nothing aliases. One block adds kColumns columns of a part: row j goes to warp j % 8, the warps'
// sums are added in order: within 2^-53 (rows / 8 + parts + 12) of the sum of magnitudes, beside
// the two roundings to T of c_j^2.
template <class T, class Source, int kPower>
struct row_sums_kernel {
  static constexpr int kColumns = kWarp;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlocks = 4;
  static constexpr int kAtOnce = 4;  // rows whose loads are under way together
  struct shared_memory {
    double sums[kWarps][kColumns];
    double counts[kWarps];
    row_part<T> part;
    bool counts_rows;
  };

  Source source;
  int depth;
  std::int64_t blocks;  // of a part
  part_sums sums;
  part_sums counts;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) {
      shared.counts_rows = source.part(static_cast<std::int64_t>(blockIdx.x) / blocks, shared.part);
    }
    __syncthreads();
    if (!shared.counts_rows) return;
    const weighted_rows<T>& rows = shared.part.rows;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.x) % blocks * kColumns;
    const std::int64_t column = first_column + lane;
    const bool is_column = column < depth;
    const double center = rows.center && is_column ? rows.center[column] : 0;
    double sum = 0;
    double count = 0;
    for (int first = warp; first < rows.count; first += kAtOnce * kWarps) {
      T values[kAtOnce];
      T weights[kAtOnce];
      SUBQUAD_UNROLL
      for (int each = 0; each < kAtOnce; ++each) {
        const int row = first + each * kWarps;
        values[each] = 0;
        weights[each] = 0;
        if (row >= rows.count) continue;
        const std::int64_t index = rows.index(row);
        weights[each] = rows.weight(index);
        if (is_column) values[each] = rows.matrix(index, column);
      }
      SUBQUAD_UNROLL
      for (int each = 0; each < kAtOnce; ++each) {
        const auto weight = static_cast<double>(weights[each]);
        count += weight;
        if (weight == 0) continue;
        if constexpr (kPower == 1) {
          sum = fma(weight, static_cast<double>(values[each]), sum);
        } else {
          const T value = rows.center ? centred(values[each], center) : values[each];
          const auto c = static_cast<double>(value);
          sum = fma(weight * c, c, sum);
        }
      }
    }
    shared.sums[warp][lane] = sum;
    if (lane == 0) shared.counts[warp] = count;
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < kWarps; ++other) {
      sum += shared.sums[other][lane];
      count += shared.counts[other];
    }
    if (is_column) sums.of(shared.part)[column] = sum;
    if (counts.out && first_column == 0 && lane == 0) *counts.of(shared.part) = count;
  }
};

// Adds the parts of each product in order. With `mirror` > 0 the sums are matrices of that many
// rows, of which the lower triangle is there, and both are written.
template <class Source>
struct add_parts_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  struct shared_memory {};

  Source source;
  part_sums sums;
  std::int64_t mirror;
  std::int64_t blocks;  // of a product

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t product = static_cast<std::int64_t>(blockIdx.x) / blocks;
    const std::int64_t element =
        static_cast<std::int64_t>(blockIdx.x) % blocks * kThreads + threadIdx.x;
    const row_parts parts = source.parts(product);
    if (parts.count == 0 || element >= sums.size) return;
    const std::int64_t row = mirror > 0 ? element / mirror : 0;
    const std::int64_t column = mirror > 0 ? element % mirror : 0;
    if (column > row) return;
    double* out = sums.out + product * sums.size;
    double total = out[element];
    for (std::int64_t part = 0; part < parts.count; ++part) {
      total += sums.extra[(parts.first + part) * sums.size + element];
    }
    out[element] = total;
    if (mirror > 0) out[column * mirror + row] = total;
  }
};

template <class Source>
void add_parts(const Source& source, const part_sums& sums, std::int64_t mirror) {
  using kernel = add_parts_kernel<Source>;
  const std::int64_t blocks = divide_up(sums.size, kernel::kThreads);
  launch(source.products * blocks, kernel{source, sums, mirror, blocks});
}

// sums.out [product][depth][depth] = sum_j w_j c_j c_j^T, both triangles.
template <class T, class Source>
void gram(const Source& source, std::int64_t depth, const part_sums& sums) {
  const std::int64_t blocks = gram_blocks(depth);
  if (blocks == 0) return;
  launch(source.slots * blocks,
         gram_kernel<T, Source>{source, static_cast<int>(depth), blocks, sums});
  add_parts(source, sums, depth);
}

inline std::int64_t row_sums_blocks(std::int64_t depth) {
  return std::max<std::int64_t>(1, divide_up(depth, kWarp));
}

// sums.out [product][depth], and counts.out [product], optional: see row_sums_kernel.
template <class T, int kPower, class Source>
void row_sums(const Source& source, std::int64_t depth, const part_sums& sums,
              const part_sums& counts) {
  const std::int64_t blocks = row_sums_blocks(depth);
  launch(source.slots * blocks,
         row_sums_kernel<T, Source, kPower>{source, static_cast<int>(depth), blocks, sums, counts});
  add_parts(source, sums, 0);
  if (counts.out) add_parts(source, counts, 0);
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_GRAM_CUH
