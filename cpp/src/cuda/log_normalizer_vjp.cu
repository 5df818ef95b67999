// The reverse of the exact log-normaliser.
#include <algorithm>

#include "batches.cuh"
#include "column_split.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "normalizers_checks.hpp"
#include "normalizers_core.hpp"
#include "storage.hpp"
#include "tile_product.cuh"

namespace subquad::cuda {
namespace {

// How one warp multiplies weights with elements of the columns that they belong to. The weights
// stay in the registers that they were accumulated in: a step of the product may take its k in any
// order that both operands agree on, so that k = t is column 2t here, and k = t + 4 (in float64: k
// = t of a second step) is column 2t + 1. Weights are split as warp_product<float> splits; elements
// of 16 bits are exact in tf32.
template <class S>
struct weight_product {
  using left = warp_product<float>::left;
  struct right {
    std::uint32_t bits[2];
  };
  static SUBQUAD_DEVICE void load(left& to, const float (&weights)[4]) {
    warp_product<float>::split(weights[0], to.high[0], to.low[0]);
    warp_product<float>::split(weights[2], to.high[1], to.low[1]);
    warp_product<float>::split(weights[1], to.high[2], to.low[2]);
    warp_product<float>::split(weights[3], to.high[3], to.low[3]);
  }
  static SUBQUAD_DEVICE void load(right& to, const S* from, int stride, int lane) {
    const S* at = from + lane % 4 * 2 * stride + lane / 4;
    to.bits[0] = as_bits(widen(at[0]));
    to.bits[1] = as_bits(widen(at[stride]));
  }
  static SUBQUAD_DEVICE void multiply(float (&sum)[4], const left& a, const right& b) {
    mma_tf32(sum, a.low, b.bits);
    mma_tf32(sum, a.high, b.bits);
  }
};

template <>
struct weight_product<float> {
  using left = warp_product<float>::left;
  using right = warp_product<float>::right;
  static SUBQUAD_DEVICE void load(left& to, const float (&weights)[4]) {
    weight_product<float16>::load(to, weights);
  }
  static SUBQUAD_DEVICE void load(right& to, const float* from, int stride, int lane) {
    const float* at = from + lane % 4 * 2 * stride + lane / 4;
    warp_product<float>::split(at[0], to.high[0], to.low[0]);
    warp_product<float>::split(at[stride], to.high[1], to.low[1]);
  }
  static SUBQUAD_DEVICE void multiply(float (&sum)[4], const left& a, const right& b) {
    warp_product<float>::multiply(sum, a, b);
  }
};

template <>
struct weight_product<double> {
  struct left {
    double of_step[2];
  };
  using right = left;
  static SUBQUAD_DEVICE void load(left& to, const double (&weights)[2]) {
    to.of_step[0] = weights[0];
    to.of_step[1] = weights[1];
  }
  static SUBQUAD_DEVICE void load(right& to, const double* from, int stride, int lane) {
    const double* at = from + lane % 4 * 2 * stride + lane / 4;
    to.of_step[0] = at[0];
    to.of_step[1] = at[stride];
  }
  static SUBQUAD_DEVICE void multiply(double (&sum)[2], const left& a, const right& b) {
    mma_float64(sum, a.of_step[0], b.of_step[0]);
    mma_float64(sum, a.of_step[1], b.of_step[1]);
  }
};

enum { kOfRows, kOfColumns, kLogWeights, kLogZ, kGrad, kSums, kTotal, kArrays };

// Rows are queries and columns keys, or the other way round.
template <class S>
struct weighted_sum_arguments {
  using sum = arithmetic_t<S>;
  bool of_queries;
  matrix_view<const S> rows;
  matrix_view<const S> columns;
  vector_view<const sum> log_weights;        // of keys, optional
  vector_view<const sum> log_z;              // of queries
  vector_view<const sum> grad;               // of queries
  vector_view<const std::int64_t> excluded;  // of queries, optional
  matrix_view<sum> out;                      // optional
  vector_view<sum> total;                    // optional
  batches<kArrays> batch;
  std::int64_t n;
  std::int64_t m;
  std::int64_t depth;
};

// What scores of one side have added to them: log weights of keys, or minus log normalisers of
// queries. A value of -inf says that there is no such key, or nothing that its query sums over.
template <class T>
struct offset_view {
  vector_view<const T> values;  // none: all 0
  bool of_queries;

  SUBQUAD_DEVICE bool is_absent(std::int64_t i) const {
    return values && values[i] == -infinity<T>();
  }
  SUBQUAD_DEVICE T offset(std::int64_t i) const {
    const T value = values ? values[i] : T(0);
    return of_queries ? -value : value;
  }
  // -inf for what is absent alone: what log_z = +inf makes of finite scores underflows as well from
  // the lowest number, and `settle` sees to the others.
  SUBQUAD_DEVICE T present_offset(std::int64_t i) const {
    if (is_absent(i)) return -infinity<T>();
    const T value = offset(i);
    return value == -infinity<T>() ? -std::numeric_limits<T>::max() : value;
  }
};

// With P_rc = exp(row_r . column_c + log_weight - log_z) of the key and the query of the pair, 0
// where either is absent or the query leaves the key out:
//   of queries:  out_r = grad_r sum_c P_rc column_c    and    total_r = grad_r sum_c P_rc
//   of keys:     out_r = sum_c P_rc grad_c column_c    and    total_r = sum_c P_rc grad_c
// or, where columns are cut into parts, the same over the columns of each part. One block computes
// up to kOut elements of the sums of a tile of rows over one part; scores and weights stay in
// registers. Blocks that compute other elements of the same rows compute the scores again: at depth
// d that is (1 + divide_up(d, kOut)) / 2 times the products that are needed, hence none too many up
// to kOut.
//
// Nothing aliases. Let u = 2^-24, and e = the bound of tile_product on the score + u (|score| + the
// larger offset + 3 |exponent|). A weight is within the factor exp(e) (1 + 5 u) of itself, or 0
// below 2^-126. Sums over the columns of a tile are within 19 * 4 u sum |P grad column|, which is
// the bound of tile_product at that depth and holds for elements of 16 bits too; adding them, over
// tiles and parts, and the factor of the row take u each, of the sum of sizes. Totals are within
// (16 + tiles + parts) u sum |P grad|. float64: u = 2^-53, (columns + tiles + parts + 2) u for
// both, 0 below 2^-1022.
//
// A row of which any sum is not finite is computed again in plain arithmetic (`settle`): that alone
// tells an infinite score from one that the split made NaN, and keeps what counts for nothing from
// meeting an infinity.
template <class S>
struct weighted_sum_kernel {
  using sum = arithmetic_t<S>;
  // One warp across: no two hold sums of the same row. 48 registers of scores, 64 of sums and 64 of
  // those of one tile leave room for fragments below the 255 that a thread can have; two such
  // blocks fill the registers of a multiprocessor.
  static constexpr int kTileRows = sizeof(sum) == 8 ? 64 : 128;
  static constexpr int kOut = 64;
  using tile = tile_product<S, kTileRows, 48, 4, 1>;
  using accumulators = typename tile::accumulators;
  using weights = weight_product<S>;
  // Sums lie in registers as scores do.
  using out_tile = tile_product<S, kTileRows, kOut, 4, 1>;
  using outputs = typename out_tile::accumulators;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kBlocks = 2;
  // 16 bytes more than a row make the lanes of a warp read columns 2t from different banks.
  static constexpr int kOutStride = kOut + 16 / static_cast<int>(sizeof(S));
  static constexpr int kWords = (tile::kColumns + kWarp - 1) / kWarp;  // a bit for each column
  static_assert(tile::kWarpsOfRow == 1 && kOut <= kThreads);

  struct shared_memory {
    typename tile::shared_memory product;
    alignas(16) S columns[tile::kColumns * kOutStride];  // a tile's columns: elements of the output
    // Of a tile's columns, by turns: what is added to their scores, -inf for none; what weights are
    // multiplied by; the row that leaves the column out, -1 for none; and a bit for each that is
    // there but counts for nothing.
    sum offsets[2][tile::kColumns];
    sum factors[2][tile::kColumns];
    int left_out_row[2][tile::kColumns];
    std::uint32_t absent[2][kWords];
    sum totals[tile::kThreadRows][kThreads];  // of the threads' rows, of which each touches its own
    sum row_offsets[tile::kRows];
    int left_out_column[tile::kRows];  // that the row leaves out, -1 for none
    int is_unsettled[tile::kRows];
    sum settled_weights[kThreads];
    int nan_column;  // one that was NaN for a row, -1 for none yet
    int elements;    // of the output
    int first_element;
    offset_view<sum> of_rows;
    offset_view<sum> of_columns;
    vector_view<const sum> row_factors;     // optional
    vector_view<const sum> column_factors;  // optional
    matrix_view<sum> out;                   // optional
    vector_view<sum> total;                 // optional
    std::int64_t first_row;
    std::int64_t first_column;
  };

  weighted_sum_arguments<S> arguments;
  std::int64_t blocks_across;  // of kOut elements
  std::int64_t row_tiles;
  std::int64_t columns;  // of a part
  std::int64_t parts;
  std::int64_t size;  // of the batch
  sum* part_outs;     // [part][batch][n][depth], null where there is one part
  sum* part_totals;   // [part][batch][n]

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    for (int row = static_cast<int>(threadIdx.x); row < tile::kRows; row += kThreads) {
      prepare_row(row, shared);
    }
    outputs sums;
    out_tile::clear(sums);
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) shared.totals[r][threadIdx.x] = 0;
    __syncthreads();
    tile::run(
        shared.product, [&](int first_column) { prepare(first_column, shared); },
        [&](int first_column, accumulators& scores) {
          // In flight beside the exponentials.
          if (shared.elements > 0) {
            stage_rows<S, tile::kColumns, kOut, kOutStride, kThreads>(
                shared.columns, shared.product.y, first_column, shared.first_element);
          }
          commit_copies();
          weigh(first_column, scores, shared);
          if (shared.elements == 0) return;
          wait_copies<0>();
          __syncthreads();
          clear_absent(first_column, shared);
          add_products(scores, sums, shared);
        });
    const bool is_settled = write(sums, shared);
    if (!__syncthreads_or(!is_settled)) return;
    for (int row = 0; row < shared.product.x.count; ++row) {
      if (shared.is_unsettled[row]) settle(row, shared);
    }
  }

  // What the block computes, and where its operands lie.
  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const weighted_sum_arguments<S>& a = arguments;
    std::int64_t index = blockIdx.x;
    const std::int64_t first_element = index % blocks_across * kOut;
    index /= blocks_across;
    const std::int64_t part = index % parts;
    index /= parts;
    const std::int64_t first_row = index % row_tiles * tile::kRows;
    const std::int64_t batch = index / row_tiles;
    const std::int64_t first_column = part * columns;
    const std::int64_t end_row = first_row + tile::kRows;
    const std::int64_t end_column = first_column + columns;
    shared.first_row = first_row;
    shared.first_column = first_column;
    shared.product.x = rows_between(a.rows, a.batch.offset(kOfRows, batch), first_row,
                                    end_row < a.n ? end_row : a.n, a.depth);
    shared.product.y = rows_between(a.columns, a.batch.offset(kOfColumns, batch), first_column,
                                    end_column < a.m ? end_column : a.m, a.depth);
    vector_view<const sum> log_weights = a.log_weights;
    if (log_weights) log_weights.data += a.batch.offset(kLogWeights, batch);
    vector_view<const sum> log_z = a.log_z;
    log_z.data += a.batch.offset(kLogZ, batch);
    vector_view<const sum> grad = a.grad;
    grad.data += a.batch.offset(kGrad, batch);
    shared.of_rows = {(a.of_queries ? log_z : log_weights).from(first_row), a.of_queries};
    shared.of_columns = {(a.of_queries ? log_weights : log_z).from(first_column), !a.of_queries};
    shared.row_factors = a.of_queries ? grad.from(first_row) : vector_view<const sum>{};
    shared.column_factors = a.of_queries ? vector_view<const sum>{} : grad.from(first_column);
    shared.nan_column = -1;
    shared.first_element = static_cast<int>(first_element);
    const std::int64_t left = a.depth - first_element;
    shared.elements = !a.out ? 0 : static_cast<int>(left < kOut ? left : kOut);
    const std::int64_t row_of_parts = (part * size + batch) * a.n + first_row;
    shared.out = {};
    if (a.out && part_outs) {
      shared.out = {part_outs + row_of_parts * a.depth + first_element, a.depth, 1};
    } else if (a.out) {
      shared.out = {a.out.data + a.batch.offset(kSums, batch) + first_row * a.out.row_stride +
                        first_element * a.out.column_stride,
                    a.out.row_stride, a.out.column_stride};
    }
    // One of the blocks across writes it.
    shared.total = {};
    if (a.total && first_element == 0) {
      if (part_totals) {
        shared.total = {part_totals + row_of_parts, 1};
      } else {
        shared.total = a.total.from(first_row);
        shared.total.data += a.batch.offset(kTotal, batch);
      }
    }
  }

  SUBQUAD_DEVICE void prepare_row(int row, shared_memory& shared) const {
    const bool exists = row < shared.product.x.count;
    shared.row_offsets[row] = exists ? shared.of_rows.present_offset(row) : -infinity<sum>();
    shared.is_unsettled[row] = 0;
    std::int64_t key = -1;
    if (exists && arguments.excluded && arguments.of_queries) {
      key = arguments.excluded[shared.first_row + row] - shared.first_column;
    }
    shared.left_out_column[row] = key >= 0 && key < columns ? static_cast<int>(key) : -1;
  }

  SUBQUAD_DEVICE void prepare(int first_column, shared_memory& shared) const {
    const int turn = tile::parity(first_column);
    // Whole warps, for the vote.
    for (int c = static_cast<int>(threadIdx.x); c < kWords * kWarp; c += kThreads) {
      const int j = first_column + c;
      const bool exists = c < tile::kColumns && j < shared.product.y.count;
      const sum offset = exists ? shared.of_columns.present_offset(j) : -infinity<sum>();
      const std::uint32_t absent = __ballot_sync(0xffffffffu, exists && offset == -infinity<sum>());
      if (c % kWarp == 0) shared.absent[turn][c / kWarp] = absent;
      if (c >= tile::kColumns) continue;
      shared.offsets[turn][c] = offset;
      shared.factors[turn][c] = exists && shared.column_factors ? shared.column_factors[j] : sum(1);
      std::int64_t key = -1;
      if (exists && arguments.excluded && !arguments.of_queries) {
        key = arguments.excluded[shared.first_column + j] - shared.first_row;
      }
      shared.left_out_row[turn][c] = key >= 0 && key < tile::kRows ? static_cast<int>(key) : -1;
    }
  }

  // Makes weights of a tile of scores, and adds them to the totals of the thread's rows.
  SUBQUAD_DEVICE void weigh(int first_column, accumulators& scores, shared_memory& shared) const {
    const int turn = tile::parity(first_column);
    SUBQUAD_UNROLL
    for (int c = 0; c < tile::kThreadColumns; ++c) {
      const sum offset = shared.offsets[turn][tile::column(c)];
      const sum factor = shared.factors[turn][tile::column(c)];
      const bool counts = offset != -infinity<sum>();
      SUBQUAD_UNROLL
      for (int r = 0; r < tile::kThreadRows; ++r) {
        // Offsets cancel before the change of base rounds.
        const sum exponent = scores(r, c) + offset + shared.row_offsets[tile::row(r)];
        scores(r, c) = counts ? power_of_2(exponent * kLog2E<sum>) * factor : sum(0);
      }
    }
    if (arguments.excluded) leave_out(first_column, scores, shared);
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      sum total = 0;
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) total += scores(r, c);
      shared.totals[r][threadIdx.x] += total;
    }
  }

  // Pairs that are left out have no weight.
  SUBQUAD_DEVICE void leave_out(int first_column, accumulators& scores,
                                const shared_memory& shared) const {
    if (arguments.of_queries) {
      SUBQUAD_UNROLL
      for (int r = 0; r < tile::kThreadRows; ++r) {
        const int column = shared.left_out_column[tile::row(r)] - first_column;
        if (column < 0 || column >= tile::kColumns) continue;
        SUBQUAD_UNROLL
        for (int c = 0; c < tile::kThreadColumns; ++c) {
          if (tile::column(c) == column) scores(r, c) = 0;
        }
      }
      return;
    }
    SUBQUAD_UNROLL
    for (int c = 0; c < tile::kThreadColumns; ++c) {
      const int row = shared.left_out_row[tile::parity(first_column)][tile::column(c)];
      SUBQUAD_UNROLL
      for (int r = 0; r < tile::kThreadRows; ++r) {
        if (tile::row(r) == row) scores(r, c) = 0;
      }
    }
  }

  // Elements of columns that count for nothing become 0: a weight of 0 would not keep NaN away.
  SUBQUAD_DEVICE void clear_absent(int first_column, shared_memory& shared) const {
    const std::uint32_t* absent = shared.absent[tile::parity(first_column)];
    std::uint32_t any = 0;
    for (int word = 0; word < kWords; ++word) any |= absent[word];
    if (any == 0) return;
    for (int index = static_cast<int>(threadIdx.x); index < tile::kColumns * kOut;
         index += kThreads) {
      const int column = index / kOut;
      if (absent[column / kWarp] >> column % kWarp & 1) {
        shared.columns[column * kOutStride + index % kOut] = S{};
      }
    }
    __syncthreads();
  }

  // Adds the products of a tile's weights with its columns. The sums of a tile start from zero, for
  // tensor cores round toward zero.
  SUBQUAD_DEVICE void add_products(const accumulators& scores, outputs& sums,
                                   const shared_memory& shared) const {
    outputs of_tile;
    out_tile::clear(of_tile);
    const int elements = shared.elements;
    SUBQUAD_UNROLL
    for (int j = 0; j < tile::kTilesAcross; ++j) {
      typename weights::left a[tile::kTilesDown];
      SUBQUAD_UNROLL
      for (int i = 0; i < tile::kTilesDown; ++i) weights::load(a[i], scores.values[i][j]);
      SUBQUAD_UNROLL
      for (int e = 0; e < out_tile::kTilesAcross; ++e) {
        if (e % 2 == 0 && e * 8 >= elements) break;
        typename weights::right b;
        weights::load(b, shared.columns + j * 8 * kOutStride + e * 8, kOutStride, tile::lane());
        SUBQUAD_UNROLL
        for (int i = 0; i < tile::kTilesDown; ++i) {
          weights::multiply(of_tile.values[i][e], a[i], b);
        }
      }
    }
    SUBQUAD_UNROLL
    for (int r = 0; r < out_tile::kThreadRows; ++r) {
      SUBQUAD_UNROLL
      for (int c = 0; c < out_tile::kThreadColumns; ++c) sums(r, c) += of_tile(r, c);
    }
  }

  // Writes the thread's rows; returns whether all their sums are finite, and marks those that are
  // not.
  SUBQUAD_DEVICE bool write(outputs& sums, shared_memory& shared) const {
    bool all_finite = true;
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      sum total = shared.totals[r][threadIdx.x];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      bool is_finite = fabs(total) < infinity<sum>();
      SUBQUAD_UNROLL
      for (int c = 0; c < out_tile::kThreadColumns; ++c) {
        is_finite = is_finite && fabs(sums(r, c)) < infinity<sum>();
      }
      const int row = tile::row(r);
      const bool is_absent = shared.row_offsets[row] == -infinity<sum>();
      const bool settled = is_finite || is_absent;
      // Of the four lanes that share the row.
      const std::uint32_t unsettled = __ballot_sync(0xffffffffu, !settled);
      if (tile::lane() % 4 == 0 && (unsettled >> tile::lane() & 15)) shared.is_unsettled[row] = 1;
      all_finite = all_finite && settled;
      if (row >= shared.product.x.count) continue;
      const sum factor = shared.row_factors ? shared.row_factors[row] : sum(1);
      if (shared.total && tile::lane() % 4 == 0) {
        shared.total[row] = is_absent ? sum(0) : total * factor;
      }
      SUBQUAD_UNROLL
      for (int c = 0; c < out_tile::kThreadColumns; ++c) {
        const int element = out_tile::column(c);
        if (element >= shared.elements) continue;
        shared.out(row, element) = is_absent ? sum(0) : sums(r, c) * factor;
      }
    }
    return all_finite;
  }

  // The weight of a pair, from plain arithmetic.
  SUBQUAD_DEVICE sum plain_weight(int row, int j, const shared_memory& shared) const {
    const bool is_left_out =
        arguments.of_queries ? shared.left_out_column[row] == j
                             : arguments.excluded && arguments.excluded[shared.first_column + j] ==
                                                         shared.first_row + row;
    if (is_left_out || shared.of_columns.is_absent(j)) return 0;
    const sum exponent = plain_product(shared.product.x, row, shared.product.y, j) +
                         shared.of_columns.offset(j) + shared.of_rows.offset(row);
    if (exponent == -infinity<sum>()) return 0;
    const sum power = power_of_2(exponent * kLog2E<sum>);
    return shared.column_factors ? power * shared.column_factors[j] : power;
  }

  // Writes the sums of a row from plain arithmetic, over columns whose weight is not 0.
  SUBQUAD_DEVICE void settle(int row, shared_memory& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int count = shared.product.y.count;
    const int nan_column = shared.nan_column;
    sum total = 0;
    sum own = 0;
    // A column that is NaN for one row is so for most, and no other needs a look then.
    bool is_nan = false;
    if (nan_column >= 0) {
      const sum weight = plain_weight(row, nan_column, shared);
      is_nan = isnan(weight);
    }
    for (int first = 0; first < count && !is_nan; first += kThreads) {
      const sum weight =
          first + thread < count ? plain_weight(row, first + thread, shared) : sum(0);
      shared.settled_weights[thread] = weight;
      is_nan = __syncthreads_or(isnan(weight));
      if (isnan(weight)) atomicMax(&shared.nan_column, first + thread);
      for (int c = 0; c < kThreads && !is_nan; ++c) {
        const sum each = shared.settled_weights[c];
        if (each == 0) continue;
        total += each;
        if (thread < shared.elements) {
          own = fma(each, widen(shared.product.y.matrix(first + c, shared.first_element + thread)),
                    own);
        }
      }
      __syncthreads();
    }
    if (is_nan) total = own = std::numeric_limits<sum>::quiet_NaN();
    const sum factor = shared.row_factors ? shared.row_factors[row] : sum(1);
    if (thread < shared.elements) shared.out(row, thread) = own * factor;
    if (shared.total && thread == 0) shared.total[row] = total * factor;
  }
};

// Sums over the parts, in order.
template <class T>
struct weighted_sum_finish {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  struct shared_memory {};

  const T* part_outs;    // [part][batch][n][depth]
  const T* part_totals;  // [part][batch][n]
  std::int64_t parts;
  std::int64_t size;
  std::int64_t n;
  std::int64_t depth;
  matrix_view<T> out;    // optional
  vector_view<T> total;  // optional
  batches<kArrays> batch;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const std::int64_t rows = size * n;
    if (index < rows * depth) {
      if (!out) return;
      const std::int64_t row = index / depth;
      out.data[batch.offset(kSums, row / n) + row % n * out.row_stride +
               index % depth * out.column_stride] = added(part_outs + index, rows * depth);
      return;
    }
    index -= rows * depth;
    if (index >= rows || !total) return;
    total.data[batch.offset(kTotal, index / n) + index % n * total.stride] =
        added(part_totals + index, rows);
  }

  SUBQUAD_DEVICE T added(const T* from, std::int64_t stride) const {
    T sum = 0;
    for (std::int64_t part = 0; part < parts; ++part) sum += from[part * stride];
    return sum;
  }
};

// One of the two passes of the reverse: how it is cut, and where its parts lie. These are at most
// 528 * 128 * 65 elements, for more blocks across mean fewer parts.
template <class S>
struct weighted_sum_layout {
  using sum = arithmetic_t<S>;
  using kernel = weighted_sum_kernel<S>;
  column_split cut;
  sum* part_outs;
  sum* part_totals;

  weighted_sum_layout(workspace_layout workspace, std::int64_t batch, std::int64_t n,
                      std::int64_t m, std::int64_t depth)
      : cut(batch * std::max<std::int64_t>(1, divide_up(depth, kernel::kOut)), n, m,
            kernel::tile::kRows, kernel::tile::kColumns) {
    const std::int64_t rows = cut.parts > 1 ? cut.parts * batch * n : 0;
    part_outs = workspace.take<sum>(rows * depth);
    part_totals = workspace.take<sum>(rows);
    bytes = workspace.size();
  }
  std::size_t bytes;
};

template <class S>
void weighted_sums(const weighted_sum_arguments<S>& arguments, std::int64_t size,
                   const weighted_sum_layout<S>& layout) {
  using kernel = weighted_sum_kernel<S>;
  using finish = weighted_sum_finish<arithmetic_t<S>>;
  const column_split& cut = layout.cut;
  const bool is_cut = cut.parts > 1;
  std::int64_t across = arguments.out ? divide_up(arguments.depth, kernel::kOut) : 0;
  if (arguments.total) across = std::max<std::int64_t>(1, across);
  launch(across * size * cut.row_tiles * cut.parts,
         kernel{arguments, across, cut.row_tiles, cut.columns, cut.parts, size,
                is_cut ? layout.part_outs : nullptr, is_cut ? layout.part_totals : nullptr});
  if (!is_cut || across == 0) return;
  launch(divide_up(size * arguments.n * (arguments.depth + 1), finish::kThreads),
         finish{layout.part_outs, layout.part_totals, cut.parts, size, arguments.n, arguments.depth,
                arguments.out, arguments.total, arguments.batch});
}

template <class S>
void log_normalizer_vjp_as(const batch_shape& shape, const array_view& grad, const array_view& x,
                           const array_view& y, const array_view* log_weights,
                           const array_view* excluded, const array_view& log_z,
                           const array_view* grad_x, const array_view* grad_y,
                           const array_view* grad_log_weights, const array_view& workspace) {
  using sum = arithmetic_t<S>;
  const std::int64_t size = shape.count();
  const std::int64_t n = length_from_end(x, 2);
  const std::int64_t m = length_from_end(y, 2);
  const std::int64_t depth = length_from_end(x, 1);
  if (size == 0) return;
  const auto run = [&](bool of_queries, const array_view* out, const array_view* total) {
    const array_view& rows = of_queries ? x : y;
    const array_view& columns = of_queries ? y : x;
    weighted_sum_arguments<S> arguments{};
    arguments.of_queries = of_queries;
    arguments.rows = matrix_at<const S>(rows, 0);
    arguments.columns = matrix_at<const S>(columns, 0);
    if (log_weights) arguments.log_weights = vector_at<const sum>(*log_weights, 0);
    arguments.log_z = vector_at<const sum>(log_z, 0);
    arguments.grad = vector_at<const sum>(grad, 0);
    if (excluded) arguments.excluded = vector_at<const std::int64_t>(*excluded, 0);
    if (out) arguments.out = matrix_at<sum>(*out, 0);
    if (total) arguments.total = vector_at<sum>(*total, 0);
    arguments.batch = batches_of<kArrays>(shape, {{&rows, 2},
                                                  {&columns, 2},
                                                  {log_weights, 1},
                                                  {&log_z, 1},
                                                  {&grad, 1},
                                                  {out, 2},
                                                  {total, 1}});
    arguments.n = of_queries ? n : m;
    arguments.m = of_queries ? m : n;
    arguments.depth = depth;
    // The two passes run one after the other on the same memory.
    weighted_sums(
        arguments, size,
        weighted_sum_layout<S>(workspace_layout(workspace), size, arguments.n, arguments.m, depth));
  };
  if (grad_x) run(true, grad_x, nullptr);
  if (grad_y || grad_log_weights) run(false, grad_y, grad_log_weights);
}

template <class S>
std::size_t workspace_as(std::int64_t batch, std::int64_t n, std::int64_t m, std::int64_t depth) {
  return std::max(weighted_sum_layout<S>(workspace_layout(), batch, n, m, depth).bytes,
                  weighted_sum_layout<S>(workspace_layout(), batch, m, n, depth).bytes);
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t log_normalizer_vjp_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                         std::int64_t d, std::int64_t itemsize) {
  // 16-bit and 32-bit elements are cut alike.
  return itemsize == 8 ? cuda::workspace_as<double>(batch, n, m, d)
                       : cuda::workspace_as<float>(batch, n, m, d);
}

void log_normalizer_vjp(const array_view& grad, const array_view& x, const array_view& y,
                        const array_view* log_weights, const array_view* excluded,
                        const array_view& log_z, const array_view* grad_x, const array_view* grad_y,
                        const array_view* grad_log_weights, const array_view& workspace) {
  const batch_shape shape = check_log_normalizer_vjp(grad, x, y, log_weights, excluded, log_z,
                                                     grad_x, grad_y, grad_log_weights);
  cuda::for_storage(x.type, [&](auto element) {
    cuda::log_normalizer_vjp_as<decltype(element)>(shape, grad, x, y, log_weights, excluded, log_z,
                                                   grad_x, grad_y, grad_log_weights, workspace);
  });
}

}  // namespace subquad::core
