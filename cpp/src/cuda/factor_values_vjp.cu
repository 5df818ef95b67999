// The reverse of the networks of sparse factors. What lies between the layers is made anew, a tile
// of rows and hidden units at a time, in shared memory.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "column_split.cuh"
#include "factor_values.cuh"
#include "factors_core.hpp"
#include "launch.cuh"

namespace subquad::cuda {
namespace {

constexpr int kTileRows = 64;
constexpr int kTileUnits = 64;    // hidden
constexpr int kTileColumns = 64;  // of results
constexpr int kRightStride = kTileColumns + 8;

// A tile of what the hidden units hold, or of its gradient, and its products with a second operand.
// As the left operand it serves as it is, its units summed over, or transposed, its rows summed
// over, in either case with a stride that lets the lanes of a warp read from different banks.
//
// A tile that the split of float32 made NaN, or a product of one, is computed again in plain
// arithmetic.
template <class T, bool kTransposed>
struct hidden_tile {
  using tile = tile_product<T, kTileRows, kTileUnits, 2, 2>;
  using accumulators = typename tile::accumulators;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kStride = kTileUnits + (kTransposed ? 8 : 4);
  static constexpr int kAtOnce = sizeof(T) == 8 ? 1 : 4;

  struct shared_memory {
    union {
      typename tile::shared_memory product;
      alignas(16) T right[kTileUnits * kRightStride];  // rows of the second operand
    };
    T values[kTileRows * kStride];
    T bias[kTileUnits];
    // In registers they would push the accumulators out.
    rows_of<T> x;
    rows_of<T> hidden;
    rows_of<T> grad;
    rows_of<T> outputs;  // weights of the second layer by hidden unit
    vector_view<const T> of_hidden;
  };

  static SUBQUAD_DEVICE int thread() { return static_cast<int>(threadIdx.x); }

  // gelu(z) of the rows and units of `shared`, or the gradients of z; 0 where there is no row or
  // unit. The operands are those that thread 0 sees; all threads see the values after.
  static SUBQUAD_DEVICE void make(shared_memory& shared, bool of_gradient) {
    if (thread() == 0) set(shared.product, shared.x, shared.hidden);
    __syncthreads();
    tile::run(
        shared.product,
        [&](int) {
          if (thread() >= kTileUnits) return;
          shared.bias[thread()] =
              thread() < shared.hidden.count ? shared.of_hidden[thread()] : T(0);
        },
        [&](int, accumulators& products) {
          each(products, [&](int row, int unit, T& product) {
            shared.values[row * kStride + unit] = product;
          });
        });
    SUBQUAD_UNROLL_BY(kAtOnce)
    for (int index = thread(); index < kTileRows * kTileUnits; index += kThreads) {
      const int unit = index % kTileUnits;
      T& value = shared.values[index / kTileUnits * kStride + unit];
      value = of_unit(value + shared.bias[unit], of_gradient);
    }
    if (of_gradient) {
      if (thread() == 0) set(shared.product, shared.grad, shared.outputs);
      __syncthreads();
      tile::run(
          shared.product, [](int) {},
          [&](int, accumulators& products) {
            each(products, [&](int row, int unit, T& product) {
              shared.values[row * kStride + unit] *= product;
            });
          });
    } else {
      __syncthreads();
    }
    bool is_nan = false;
    SUBQUAD_UNROLL_BY(kAtOnce)
    for (int index = thread(); index < kTileRows * kTileUnits; index += kThreads) {
      const int row = index / kTileUnits;
      const int unit = index % kTileUnits;
      T& value = shared.values[row * kStride + unit];
      if (row >= shared.x.count || unit >= shared.hidden.count) value = 0;
      is_nan = is_nan || isnan(value);
    }
    if constexpr (tile::warp::kIsSplit) {
      if (is_nan) settle(shared, of_gradient);
    }
    __syncthreads();
  }

  // Starts the copies of rows of the second operand, from element `first` of each on, zeros where
  // there are none.
  static SUBQUAD_DEVICE void load(shared_memory& shared, const rows_of<T>& from, int first) {
    stage_rows<T, kTileUnits, kTileColumns, kRightStride, kThreads>(shared.right, from, 0, first);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
  }

  // Adds the products of the values with the second operand.
  static SUBQUAD_DEVICE void add_products(accumulators& totals, const shared_memory& shared) {
    const int lane = tile::lane();
    const T* left = shared.values + left_index(tile::warp_down() * (kTileRows / 2), 0);
    const T* right = shared.right + tile::warp_across() * (kTileColumns / 2);
    accumulators sums;
    tile::clear(sums);
    SUBQUAD_NO_UNROLL
    for (int first = 0; first < kTileUnits; first += tile::kChunk) {
      multiply_chunk<tile>(
          sums,
          [&](typename tile::warp::left& a, int i, int k) {
            make_left(a, lane, [&](int row, int part) {
              return left[left_index(i + row, first + k + part)];
            });
          },
          [&](typename tile::warp::right& b, int j, int k) {
            make_right(b, lane, [&](int column, int part) {
              return right[(first + k + part) * kRightStride + j + column];
            });
          });
    }
    if constexpr (tile::warp::kIsSplit) {
      bool is_nan = false;
      each(sums, [&](int, int, T& sum) { is_nan = is_nan || isnan(sum); });
      if (is_nan) multiply_plainly(sums, shared);
    }
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) totals(r, c) += sums(r, c);
    }
  }

  // Calls body(row, column, element) for what the thread holds.
  template <class Body>
  static SUBQUAD_DEVICE void each(accumulators& of, Body&& body) {
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) body(tile::row(r), tile::column(c), of(r, c));
    }
  }

 private:
  static SUBQUAD_DEVICE int left_index(int row, int k) {
    return kTransposed ? k * kStride + row : row * kStride + k;
  }

  static SUBQUAD_DEVICE void set(typename tile::shared_memory& product, const rows_of<T>& x,
                                 const rows_of<T>& y) {
    product.x = x;
    product.y = y;
  }

  // gelu(z), or its derivative P(z) + z p(z).
  static SUBQUAD_DEVICE T of_unit(T z, bool of_gradient) {
    return of_gradient ? gelu_derivative(z) : gelu(z);
  }

  // Those of the thread's values that are NaN.
  static SUBQUAD_DEVICE void settle(shared_memory& shared, bool of_gradient) {
    SUBQUAD_NO_UNROLL
    for (int index = thread(); index < kTileRows * kTileUnits; index += kThreads) {
      const int row = index / kTileUnits;
      const int unit = index % kTileUnits;
      T& value = shared.values[row * kStride + unit];
      if (!isnan(value)) continue;
      const T z = plain_product(shared.x, row, shared.hidden, unit) + shared.bias[unit];
      value = of_unit(z, of_gradient);
      if (of_gradient) value *= plain_product(shared.grad, row, shared.outputs, unit);
    }
  }

  static SUBQUAD_DEVICE void multiply_plainly(accumulators& sums, const shared_memory& shared) {
    tile::clear(sums);
    SUBQUAD_NO_UNROLL
    for (int k = 0; k < kTileUnits; ++k) {
      each(sums, [&](int row, int column, T& sum) {
        sum = fma(shared.values[left_index(row, k)], shared.right[k * kRightStride + column], sum);
      });
    }
  }
};

// With z_mi = weight_in_m x_i + bias_in_m and p_mi = (weight_out_m^T grad_mi) gelu'(z_mi),
//   grad_x_i = sum_m weight_in_m^T p_mi
// over the factors and units of a part where they are cut. One block computes a tile of rows and
// columns.
//
// Nothing aliases. With u = 2^-24 or 2^-53, z as in the forward direction: gelu' within 0.8 of the
// error of z, and (2 z^2 + 9) u (1 + |z|) beside; p within the bound of its product and that, and
// u; a result within what p misses, tile_product's bound at depth kTileUnits, and u for each tile
// of units and each part, of the sum of the sizes of its terms.
template <class T>
struct x_gradient_kernel {
  using hidden = hidden_tile<T, false>;
  using tile = typename hidden::tile;
  static constexpr int kThreads = hidden::kThreads;
  static constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;
  struct shared_memory {
    typename hidden::shared_memory units;
    std::int64_t of_array[kNetworkArrays];
    std::int64_t first_row;
    std::int64_t unit_tile;  // over all factors
    std::int64_t end_tile;
    matrix_view<T> out;
    int first_column;
    int columns;
  };

  networks<T> arrays;
  stack_view<const T> grad;
  batches<kNetworkArrays> batch;
  matrix_view<T> out;
  T* partial;  // [part][entry][n][d], null where there is one part
  column_split cut;
  std::int64_t unit_tiles;  // of a factor
  std::int64_t column_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    typename tile::accumulators totals;
    tile::clear(totals);
    __syncthreads();
    while (shared.unit_tile < shared.end_tile) {
      if (threadIdx.x == 0) set_operands(shared);
      hidden::make(shared.units, true);
      hidden::load(shared.units, shared.units.hidden, shared.first_column);
      hidden::add_products(totals, shared.units);
      if (threadIdx.x == 0) ++shared.unit_tile;
      __syncthreads();
    }
    hidden::each(totals, [&](int row, int column, T& total) {
      if (shared.first_row + row < arrays.size.n && column < shared.columns) {
        shared.out(row, column) = total;
      }
    });
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const network_sizes& size = arrays.size;
    std::int64_t index = blockIdx.x;
    const std::int64_t first_column = index % column_tiles * kTileColumns;
    index /= column_tiles;
    const std::int64_t part = index % cut.parts;
    index /= cut.parts;
    shared.first_row = index % cut.row_tiles * kTileRows;
    const std::int64_t b = index / cut.row_tiles;
    for (int which = 0; which < kNetworkArrays; ++which) {
      shared.of_array[which] = batch.offset(which, b);
    }
    const std::int64_t of_part = cut.columns / kTileUnits;
    shared.unit_tile = part * of_part;
    shared.end_tile = arrays.end_of(shared.unit_tile, of_part, size.n_factors * unit_tiles);
    shared.first_column = static_cast<int>(first_column);
    shared.columns =
        static_cast<int>(arrays.end_of(first_column, kTileColumns, size.d) - first_column);
    if (partial) {
      shared.out = {
          partial + ((part * size.batch + b) * size.n + shared.first_row) * size.d + first_column,
          size.d, 1};
    } else {
      shared.out = {&out(shared.first_row, first_column) + shared.of_array[kOfResult],
                    out.row_stride, out.column_stride};
    }
  }

  SUBQUAD_DEVICE void set_operands(shared_memory& shared) const {
    const std::int64_t factor = shared.unit_tile / unit_tiles;
    const std::int64_t first_unit = shared.unit_tile % unit_tiles * kTileUnits;
    set_tile_operands(arrays, grad, shared.of_array, factor, first_unit, shared.first_row,
                      shared.units);
  }
};

// What a tile of rows and units of a factor is made of.
template <class T, class Shared>
SUBQUAD_DEVICE void set_tile_operands(const networks<T>& arrays, const stack_view<const T>& grad,
                                      const std::int64_t (&of_array)[kNetworkArrays],
                                      std::int64_t factor, std::int64_t first_unit,
                                      std::int64_t first_row, Shared& to) {
  const network_sizes& size = arrays.size;
  const matrix_view<const T> weight_out = arrays.weight_out[factor];
  const matrix_view<const T> outputs{weight_out.data, weight_out.column_stride,
                                     weight_out.row_stride};
  to.x = arrays.rows(of_array[kOfX], first_row, kTileRows);
  to.hidden = arrays.hidden_rows(of_array[kOfWeightIn], factor, first_unit, kTileUnits);
  to.of_hidden = arrays.hidden_bias(of_array[kOfBiasIn], factor, first_unit);
  to.grad = rows_between(grad[factor], of_array[kOfValues], first_row,
                         arrays.end_of(first_row, kTileRows, size.n), size.k);
  to.outputs = rows_between(outputs, of_array[kOfWeightOut], first_unit,
                            arrays.end_of(first_unit, kTileUnits, size.h), size.k);
}

// How the batch lies towards a result that is summed over some of its dimensions ("shared"), in
// which its strides are 0, and not over the others ("own").
struct batch_split {
  batches<kNetworkArrays> own;
  batches<kNetworkArrays> shared;
  std::int64_t own_count = 1;
  std::int64_t shared_count = 1;

  batch_split(const batches<kNetworkArrays>& all, int result) {
    for (int i = 0; i < all.rank; ++i) {
      const bool is_shared = all.strides[result][i] == 0;
      batches<kNetworkArrays>& to = is_shared ? shared : own;
      to.lengths[to.rank] = all.lengths[i];
      for (int which = 0; which < kNetworkArrays; ++which) {
        to.strides[which][to.rank] = all.strides[which][i];
      }
      ++to.rank;
      (is_shared ? shared_count : own_count) *= all.lengths[i];
    }
  }
};

// How the tiles of rows of all entries that share a result are cut, from the shapes alone: into as
// many parts as fill a large device, where a part takes `blocks` blocks, of kSmallestPart tiles at
// least.
struct tile_split {
  static constexpr std::int64_t kPartBlocks = 512;
  static constexpr std::int64_t kSmallestPart = 8;
  std::int64_t row_tiles;  // of an entry
  std::int64_t all;
  std::int64_t tiles;  // of a part
  std::int64_t parts;

  tile_split(std::int64_t blocks, std::int64_t entries, std::int64_t n)
      : row_tiles(divide_up(n, kTileRows)), all(entries * row_tiles) {
    const std::int64_t wanted =
        std::max<std::int64_t>(1, kPartBlocks / std::max<std::int64_t>(1, blocks));
    tiles = std::max(kSmallestPart, divide_up(all, wanted));
    parts = std::max<std::int64_t>(1, divide_up(all, tiles));
  }

  // Of the elements of all parts, where each block makes up to `of_block` of a result that has
  // `size` elements for an entry, at most.
  static std::int64_t most_elements(std::int64_t batch, std::int64_t n, std::int64_t size,
                                    std::int64_t of_block) {
    const std::int64_t parts = divide_up(divide_up(n, kTileRows), kSmallestPart);
    return std::min(batch * parts * size, kPartBlocks * of_block);
  }
};

// Which tiles of rows a block passes over.
struct tile_range {
  std::int64_t factor;
  std::int64_t own;
  std::int64_t part;
  std::int64_t tile;
  std::int64_t end;

  SUBQUAD_DEVICE void locate(std::int64_t index, const tile_split& cut, std::int64_t n_factors) {
    part = index % cut.parts;
    index /= cut.parts;
    factor = index % n_factors;
    own = index / n_factors;
    tile = part * cut.tiles;
    end = tile + cut.tiles < cut.all ? tile + cut.tiles : cut.all;
  }
};

// Gradients of the weights of one layer, over a part of the rows where they are cut: of the first
//   grad_weight_in_m = sum_i p_mi x_i^T    and grad_bias_in_m = sum_i p_mi,
// p as in x_gradient_kernel, or of the second
//   grad_weight_out_m = sum_i grad_mi gelu(z_mi)^T,
// sums over the entries of the batch too that share the weights. Results lie by hidden unit. One
// block computes a tile of units and columns.
//
// Nothing aliases. Within what p or gelu misses, tile_product's bound at depth kTileRows, and u for
// each tile of rows and each part, of the sum of the sizes of the terms; the bias within 32 u and
// the same u.
template <class T>
struct weight_gradient_kernel {
  using hidden = hidden_tile<T, true>;
  using tile = typename hidden::tile;
  static constexpr int kThreads = hidden::kThreads;
  static constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;
  static constexpr int kThreadsOfUnit = kThreads / kTileUnits;
  static_assert(kTileRows / kThreadsOfUnit == 32);
  struct shared_memory {
    typename hidden::shared_memory units;
    std::int64_t of_own[kNetworkArrays];
    std::int64_t of_array[kNetworkArrays];
    tile_range rows;
    matrix_view<T> out;
    vector_view<T> bias_out;
    std::int64_t first_unit;
    int units_left;
    int first_column;
    int columns;
  };

  networks<T> arrays;
  stack_view<const T> grad;
  batch_split batch;
  tile_split cut;
  bool is_first;            // layer
  stack_view<T> out;        // [factor](unit, column), null: only biases are wanted
  matrix_view<T> bias_out;  // (factor, unit), optional
  T* partial;               // [part][entry][factor][unit][column], null where there is one part
  T* partial_bias;          // [part][entry][factor][unit]
  std::int64_t depth;       // columns of results
  std::int64_t unit_tiles;
  std::int64_t column_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    typename tile::accumulators totals;
    tile::clear(totals);
    T bias_total = 0;
    __syncthreads();
    while (shared.rows.tile < shared.rows.end) {
      if (threadIdx.x == 0) set_operands(shared);
      hidden::make(shared.units, is_first);
      if (shared.bias_out) bias_total += column_sum(shared);
      if (out) {
        hidden::load(shared.units, is_first ? shared.units.x : shared.units.grad,
                     shared.first_column);
        hidden::add_products(totals, shared.units);
      }
      if (threadIdx.x == 0) ++shared.rows.tile;
      __syncthreads();
    }
    hidden::each(totals, [&](int unit, int column, T& total) {
      if (unit < shared.units_left && column < shared.columns) shared.out(unit, column) = total;
    });
    if (!shared.bias_out) return;
    T* sums = shared.units.values;  // which nobody needs any more
    sums[threadIdx.x] = bias_total;
    __syncthreads();
    const int unit = static_cast<int>(threadIdx.x);
    if (unit >= shared.units_left || unit >= kTileUnits) return;
    for (int each = 1; each < kThreadsOfUnit; ++each) {
      bias_total += sums[each * kTileUnits + unit];
    }
    shared.bias_out[unit] = bias_total;
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const network_sizes& size = arrays.size;
    std::int64_t index = blockIdx.x;
    const std::int64_t first_column = index % column_tiles * kTileColumns;
    index /= column_tiles;
    shared.first_unit = index % unit_tiles * kTileUnits;
    index /= unit_tiles;
    shared.rows.locate(index, cut, size.n_factors);
    for (int which = 0; which < kNetworkArrays; ++which) {
      shared.of_own[which] = batch.own.offset(which, shared.rows.own);
    }
    shared.units_left =
        static_cast<int>(arrays.end_of(shared.first_unit, kTileUnits, size.h) - shared.first_unit);
    shared.first_column = static_cast<int>(first_column);
    shared.columns =
        out ? static_cast<int>(arrays.end_of(first_column, kTileColumns, depth) - first_column) : 0;
    const std::int64_t entry =
        (shared.rows.part * batch.own_count + shared.rows.own) * size.n_factors +
        shared.rows.factor;
    shared.out = {};
    if (out && partial) {
      shared.out = {partial + (entry * size.h + shared.first_unit) * depth + first_column, depth,
                    1};
    } else if (out) {
      const matrix_view<T> to = out[shared.rows.factor];
      shared.out = {&to(shared.first_unit, first_column) + shared.of_own[kOfResult], to.row_stride,
                    to.column_stride};
    }
    shared.bias_out = {};
    if (!bias_out || first_column > 0) return;
    if (partial_bias) {
      shared.bias_out = {partial_bias + entry * size.h + shared.first_unit, 1};
    } else {
      shared.bias_out = {
          &bias_out(shared.rows.factor, shared.first_unit) + shared.of_own[kOfBiasResult],
          bias_out.column_stride};
    }
  }

  SUBQUAD_DEVICE void set_operands(shared_memory& shared) const {
    const std::int64_t entry = shared.rows.tile / cut.row_tiles;
    for (int which = 0; which < kNetworkArrays; ++which) {
      shared.of_array[which] = shared.of_own[which] + batch.shared.offset(which, entry);
    }
    set_tile_operands(arrays, grad, shared.of_array, shared.rows.factor, shared.first_unit,
                      shared.rows.tile % cut.row_tiles * kTileRows, shared.units);
  }

  // Of the thread's unit, over its share of the tile's rows.
  static SUBQUAD_DEVICE T column_sum(const shared_memory& shared) {
    constexpr int kRows = kTileRows / kThreadsOfUnit;
    const int thread = static_cast<int>(threadIdx.x);
    const T* at =
        shared.units.values + thread / kTileUnits * kRows * hidden::kStride + thread % kTileUnits;
    T sum = 0;
    SUBQUAD_UNROLL_BY(8)
    for (int row = 0; row < kRows; ++row) sum += at[row * hidden::kStride];
    return sum;
  }
};

// grad_bias_out_m = sum_i grad_mi, over a part of the rows where they are cut, in float64: row i of
// a tile goes to warp i % kWarps, and the warps' sums are added in order. Within 2^-53 (rows /
// kWarps + kWarps) of the sum of sizes, and u for each part. Nothing aliases.
template <class T>
struct bias_gradient_kernel {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlocks = 4;
  struct shared_memory {
    double sums[kWarps][kWarp];
  };

  stack_view<const T> grad;
  std::int64_t n_factors;
  std::int64_t n;
  std::int64_t k;
  batch_split batch;
  tile_split cut;
  matrix_view<T> out;
  T* partial;  // [part][entry][factor][k], null where there is one part
  std::int64_t column_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    std::int64_t index = blockIdx.x;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const std::int64_t column = index % column_tiles * kWarp + lane;
    tile_range rows;
    rows.locate(index / column_tiles, cut, n_factors);
    double sum = 0;
    if (column < k) {
      const T* of_own = &grad[rows.factor](0, column) + batch.own.offset(kOfValues, rows.own);
      for (std::int64_t tile = rows.tile; tile < rows.end; ++tile) {
        const T* of_entry = of_own + batch.shared.offset(kOfValues, tile / cut.row_tiles);
        const std::int64_t first = tile % cut.row_tiles * kTileRows;
        SUBQUAD_UNROLL_BY(4)
        for (std::int64_t i = first + warp; i < first + kTileRows; i += kWarps) {
          if (i < n) sum += static_cast<double>(of_entry[i * grad.row_stride]);
        }
      }
    }
    shared.sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= k) return;
    for (int each = 1; each < kWarps; ++each) sum += shared.sums[each][lane];
    if (partial) {
      partial[((rows.part * batch.own_count + rows.own) * n_factors + rows.factor) * k + column] =
          static_cast<T>(sum);
    } else {
      (&out(rows.factor, column))[batch.own.offset(kOfResult, rows.own)] = static_cast<T>(sum);
    }
  }
};

// out[entry][a](i, j) = sum of partial[part][entry][a][i][j] over the parts in order, in float64.
// Nothing aliases.
template <class T>
struct add_parts_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  struct shared_memory {};

  const T* partial;
  std::int64_t parts;
  std::int64_t size;  // elements of a part
  std::int64_t stack;
  std::int64_t rows;
  std::int64_t columns;
  stack_view<T> out;
  batches<kNetworkArrays> batch;
  int which;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= size) return;
    double sum = 0;
    for (std::int64_t part = 0; part < parts; ++part) {
      sum += static_cast<double>(partial[part * size + index]);
    }
    const std::int64_t column = index % columns;
    index /= columns;
    const std::int64_t row = index % rows;
    index /= rows;
    const matrix_view<T> to = out[index % stack];
    (&to(row, column))[batch.offset(which, index / stack)] = static_cast<T>(sum);
  }
};

template <class T>
void add_parts(const T* partial, std::int64_t parts, std::int64_t entries, std::int64_t stack,
               std::int64_t rows, std::int64_t columns, const stack_view<T>& out,
               const batches<kNetworkArrays>& batch, int which) {
  const std::int64_t size = entries * stack * rows * columns;
  launch(divide_up(size, add_parts_kernel<T>::kThreads),
         add_parts_kernel<T>{partial, parts, size, stack, rows, columns, out, batch, which});
}

column_split cut_of_x(const network_sizes& s) {
  const std::int64_t units = s.n_factors * divide_up(s.h, kTileUnits) * kTileUnits;
  return {s.batch * divide_up(s.d, kTileColumns), s.n, units, kTileRows, kTileUnits};
}

// Parts of one gradient after the other take the same memory: at most 9 MiB for float32 and 17 MiB
// for float64.
template <class T>
struct vjp_parts {
  T* of_weights;
  T* of_biases;

  vjp_parts(workspace_layout& workspace, const network_sizes& s) {
    const column_split x = cut_of_x(s);
    const auto most = [&](std::int64_t rows, std::int64_t columns, std::int64_t tile_rows,
                          std::int64_t tile_columns) {
      return tile_split::most_elements(s.batch, s.n, s.n_factors * rows * columns,
                                       std::min(rows, tile_rows) * std::min(columns, tile_columns));
    };
    of_weights = workspace.take<T>(std::max({x.parts > 1 ? x.parts * s.batch * s.n * s.d : 0,
                                             most(s.h, s.d, kTileUnits, kTileColumns),
                                             most(s.h, s.k, kTileUnits, kTileColumns)}));
    of_biases = workspace.take<T>(std::max(most(1, s.h, 1, kTileUnits), most(1, s.k, 1, kWarp)));
  }
};

struct vjp_call {
  factor_networks networks;
  const array_view* grad;
  const array_view* x;
  const array_view* weight_in;
  const array_view* bias_in;
  const array_view* weight_out;

  // Beside the arrays: one or two results, null where absent.
  batches<kNetworkArrays> batch_of(const array_view* result, std::int32_t core,
                                   const array_view* bias_result) const {
    return batches_of<kNetworkArrays>(networks.shape, {{x, 2},
                                                       {weight_in, 3},
                                                       {bias_in, 2},
                                                       {weight_out, 3},
                                                       {grad, 3},
                                                       {result, core},
                                                       {bias_result, 2}});
  }
  template <class T>
  cuda::networks<T> arrays() const {
    return {networks, *x, *weight_in, *bias_in, *weight_out};
  }
};

template <class T>
void write_grad_x(const vjp_call& call, const vjp_parts<T>& memory, const array_view& grad_x) {
  using kernel = x_gradient_kernel<T>;
  const network_sizes& s = call.networks.size;
  const column_split cut = cut_of_x(s);
  const std::int64_t column_tiles = divide_up(s.d, kTileColumns);
  const batches<kNetworkArrays> batch = call.batch_of(&grad_x, 2, nullptr);
  const matrix_view<T> out = matrix_at<T>(grad_x, 0);
  const bool is_cut = cut.parts > 1;
  launch(
      s.batch * cut.row_tiles * cut.parts * column_tiles,
      kernel{call.arrays<T>(), stack_at<const T>(*call.grad, 0), batch, out,
             is_cut ? memory.of_weights : nullptr, cut, divide_up(s.h, kTileUnits), column_tiles});
  if (!is_cut) return;
  add_parts<T>(memory.of_weights, cut.parts, s.batch, 1, s.n, s.d,
               {out.data, 0, out.row_stride, out.column_stride}, batch, kOfResult);
}

// Either of both may be absent; they are summed over the same dimensions of the batch.
template <class T>
void write_layer(const vjp_call& call, const vjp_parts<T>& memory, bool is_first,
                 const array_view* weights, const array_view* biases) {
  using kernel = weight_gradient_kernel<T>;
  const network_sizes& s = call.networks.size;
  const std::int64_t depth = is_first ? s.d : s.k;
  const batch_split batch(call.batch_of(weights, 3, biases), weights ? kOfResult : kOfBiasResult);
  const std::int64_t unit_tiles = divide_up(s.h, kTileUnits);
  const std::int64_t column_tiles = weights ? divide_up(depth, kTileColumns) : 1;
  const tile_split cut(batch.own_count * s.n_factors * unit_tiles * column_tiles,
                       batch.shared_count, s.n);
  stack_view<T> out{};
  if (weights) {
    out = stack_at<T>(*weights, 0);
    if (!is_first) std::swap(out.row_stride, out.column_stride);
  }
  matrix_view<T> bias_out{};
  if (biases) bias_out = matrix_at<T>(*biases, 0);
  const bool is_cut = cut.parts > 1;
  launch(batch.own_count * s.n_factors * unit_tiles * column_tiles * cut.parts,
         kernel{call.arrays<T>(), stack_at<const T>(*call.grad, 0), batch, cut, is_first, out,
                bias_out, is_cut ? memory.of_weights : nullptr, is_cut ? memory.of_biases : nullptr,
                depth, unit_tiles, column_tiles});
  if (!is_cut) return;
  if (weights) {
    add_parts<T>(memory.of_weights, cut.parts, batch.own_count, s.n_factors, s.h, depth, out,
                 batch.own, kOfResult);
  }
  if (biases) {
    add_parts<T>(memory.of_biases, cut.parts, batch.own_count, s.n_factors, 1, s.h,
                 {bias_out.data, bias_out.row_stride, 0, bias_out.column_stride}, batch.own,
                 kOfBiasResult);
  }
}

// Whether both are summed over the same dimensions of the batch.
bool share_batch(const batch_shape& shape, const array_view& weights, const array_view& biases) {
  bool same = true;
  for (std::int32_t i = 0; i < shape.rank(); ++i) {
    const auto is_shared = [&](const array_view& array, std::int32_t core) {
      const std::int32_t axis = array.ndim - core - 1 - i;
      return axis < 0 || array.shape[axis] == 1;
    };
    same = same && is_shared(weights, 3) == is_shared(biases, 2);
  }
  return same;
}

template <class T>
void write_bias_out(const vjp_call& call, const vjp_parts<T>& memory, const array_view& result) {
  using kernel = bias_gradient_kernel<T>;
  const network_sizes& s = call.networks.size;
  const batch_split batch(call.batch_of(&result, 2, nullptr), kOfResult);
  const std::int64_t column_tiles = divide_up(s.k, kWarp);
  const tile_split cut(batch.own_count * s.n_factors * column_tiles, batch.shared_count, s.n);
  const matrix_view<T> out = matrix_at<T>(result, 0);
  const bool is_cut = cut.parts > 1;
  launch(batch.own_count * s.n_factors * column_tiles * cut.parts,
         kernel{stack_at<const T>(*call.grad, 0), s.n_factors, s.n, s.k, batch, cut, out,
                is_cut ? memory.of_biases : nullptr, column_tiles});
  if (!is_cut) return;
  add_parts<T>(memory.of_biases, cut.parts, batch.own_count, s.n_factors, 1, s.k,
               {out.data, out.row_stride, 0, out.column_stride}, batch.own, kOfResult);
}

struct vjp_results {
  const array_view* x;  // each optional
  const array_view* weight_in;
  const array_view* bias_in;
  const array_view* weight_out;
  const array_view* bias_out;
};

template <class T>
void factor_values_vjp_as(const vjp_call& call, const vjp_results& results,
                          const array_view& workspace) {
  const network_sizes& s = call.networks.size;
  workspace_layout pieces(workspace);
  const vjp_parts<T> memory(pieces, s);
  // Nothing is written to arrays without elements, whose strides say nothing.
  const array_view* weight_in = s.h * s.d > 0 ? results.weight_in : nullptr;
  const array_view* bias_in = s.h > 0 ? results.bias_in : nullptr;
  if (results.x && s.d > 0) write_grad_x<T>(call, memory, *results.x);
  if (weight_in && bias_in && share_batch(call.networks.shape, *weight_in, *bias_in)) {
    write_layer<T>(call, memory, true, weight_in, bias_in);
  } else {
    if (weight_in) write_layer<T>(call, memory, true, weight_in, nullptr);
    if (bias_in) write_layer<T>(call, memory, true, nullptr, bias_in);
  }
  if (results.weight_out && s.h * s.k > 0) {
    write_layer<T>(call, memory, false, results.weight_out, nullptr);
  }
  if (results.bias_out && s.k > 0) write_bias_out<T>(call, memory, *results.bias_out);
}

template <class T>
std::size_t workspace_as(const network_sizes& size) {
  workspace_layout workspace;
  vjp_parts<T>(workspace, size);
  return workspace.size();
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t factor_values_vjp_workspace(std::int64_t batch, std::int64_t n_factors, std::int64_t n,
                                        std::int64_t d, std::int64_t h, std::int64_t k,
                                        std::int64_t itemsize) {
  return (itemsize == 8 ? cuda::workspace_as<double>
                        : cuda::workspace_as<float>)({batch, n_factors, n, d, h, k});
}

void factor_values_vjp(const array_view& grad, const array_view& x, const array_view& weight_in,
                       const array_view& bias_in, const array_view& weight_out,
                       const array_view* grad_x, const array_view* grad_weight_in,
                       const array_view* grad_bias_in, const array_view* grad_weight_out,
                       const array_view* grad_bias_out, const array_view& workspace) {
  const factor_networks networks =
      check_factor_values_vjp(grad, x, weight_in, bias_in, weight_out, grad_x, grad_weight_in,
                              grad_bias_in, grad_weight_out, grad_bias_out);
  (x.type == dtype::float64
       ? cuda::factor_values_vjp_as<double>
       : cuda::factor_values_vjp_as<float>)({networks, &grad, &x, &weight_in, &bias_in,
                                             &weight_out},
                                            {grad_x, grad_weight_in, grad_bias_in, grad_weight_out,
                                             grad_bias_out},
                                            workspace);
}

}  // namespace subquad::core
