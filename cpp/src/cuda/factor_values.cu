// The values of sparse factors, by networks of two layers.
#include "factor_values.cuh"

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "factors_core.hpp"
#include "launch.cuh"

namespace subquad::cuda {
namespace {

// Products with the accumulators of a product as the left operand, without a way through memory:
// the elements of a sum may come in any order, so that the columns that a lane holds, 2t and 2t + 1
// of eight, serve as elements t and t + 4 of a fragment, if those of the right operand do.
struct chained_float {
  using warp = warp_product<float>;
  static SUBQUAD_DEVICE void load(warp::left& to, const float (&from)[4]) {
    warp::split(from[0], to.high[0], to.low[0]);
    warp::split(from[2], to.high[1], to.low[1]);
    warp::split(from[1], to.high[2], to.low[2]);
    warp::split(from[3], to.high[3], to.low[3]);
  }
  static SUBQUAD_DEVICE void load(warp::right& to, const float* pair) {
    warp::split(pair[0], to.high[0], to.low[0]);
    warp::split(pair[1], to.high[1], to.low[1]);
  }
  using left = warp::left;
  using right = warp::right;
  static SUBQUAD_DEVICE void multiply(float (&sum)[4], const left& a, const right& b) {
    warp::multiply(sum, a, b);
  }
};
// Two products of four elements each: the even columns, and the odd ones.
struct chained_double {
  struct left {
    double even;
    double odd;
  };
  using right = left;
  static SUBQUAD_DEVICE void load(left& to, const double (&from)[2]) { to = {from[0], from[1]}; }
  static SUBQUAD_DEVICE void load(right& to, const double* pair) { to = {pair[0], pair[1]}; }
  static SUBQUAD_DEVICE void multiply(double (&sum)[2], const left& a, const right& b) {
    mma_float64(sum, a.even, b.even);
    mma_float64(sum, a.odd, b.odd);
  }
};
template <class T>
using chained = std::conditional_t<std::is_same_v<T, float>, chained_float, chained_double>;

// out_mi = weight_out_m gelu(weight_in_m x_i + bias_in_m) + bias_out_m for a tile of rows, one
// factor and up to kOutputs elements of each row. Hidden units come kColumns at a time and go from
// the accumulators of the first product into the second; the warps that share rows add what their
// units make at the end.
//
// Nothing aliases. With u = 2^-24 or 2^-53: a sum z of the first layer is within tile_product's
// bound and u |z|, gelu within (2 z^2 + 7) u |gelu(z)| or |z| u of itself there, whichever is more,
// and its slope below 1.13; a result within tile_product's bound at depth h and 2 u of its terms.
//
// A row of which a result is NaN is computed again in plain arithmetic (`settle`), which alone
// tells an infinity from what the split, or a zero that fills a tile, made of it.
template <class T>
struct factor_values_kernel {
  using tile = tile_product<T, sizeof(T) == 8 ? 64 : 128, 64, 4, 2>;
  using chain = chained<T>;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kBlocks = 2;
  static constexpr int kOutputs = 32;
  static constexpr int kOutputTiles = kOutputs / 8;
  // Lanes of a half or a quarter of a warp read their pairs from different banks.
  static constexpr int kOutputStride = tile::kColumns + 8;
  static constexpr int kResultStride = kOutputs + 1;
  using outputs = T[tile::kTilesDown][kOutputTiles][tile::warp::kRows / 4];

  struct shared_memory {
    union {
      typename tile::shared_memory product;
      T results[tile::kRows * kResultStride];  // when the products are done
    };
    alignas(16) T weight_out[2][kOutputs * kOutputStride];  // of a tile's units, by turns
    T bias_in[2][tile::kColumns];
    T settled[kThreads];
    int is_unsettled[tile::kRows];
    // In registers they would push the accumulators out.
    rows_of<T> x;
    rows_of<T> hidden;
    rows_of<T> outputs;
    vector_view<const T> of_hidden;  // biases
    vector_view<const T> of_outputs;
    matrix_view<T> out;
  };

  networks<T> arrays;
  matrix_view<const T> bias_out;
  stack_view<T> out;
  batches<kNetworkArrays> batch;
  std::int64_t row_tiles;
  std::int64_t parts;  // of a row's elements

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    for (int row = static_cast<int>(threadIdx.x); row < tile::kRows; row += kThreads) {
      shared.is_unsettled[row] = 0;
    }
    outputs sums;
    SUBQUAD_UNROLL
    for (int i = 0; i < tile::kTilesDown; ++i) {
      SUBQUAD_UNROLL
      for (int j = 0; j < kOutputTiles; ++j) {
        SUBQUAD_UNROLL
        for (int v = 0; v < tile::warp::kRows / 4; ++v) sums[i][j][v] = 0;
      }
    }
    __syncthreads();
    tile::run(
        shared.product, [&](int first) { prepare(first, shared); },
        [&](int first, typename tile::accumulators& products) {
          add_outputs(products, tile::parity(first), sums, shared);
        });
    gather(sums, shared);
    write(shared);
    // Infinities become NaN in the split, and beside the zeros that fill a tile.
    __syncthreads();
    for (int row = 0; row < shared.x.count; ++row) {
      if (shared.is_unsettled[row]) settle(row, shared);
    }
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const networks<T>& a = arrays;
    std::int64_t index = blockIdx.x;
    const std::int64_t first = index % parts * kOutputs;
    index /= parts;
    const std::int64_t factor = index % a.size.n_factors;
    index /= a.size.n_factors;
    const std::int64_t row = index % row_tiles * tile::kRows;
    const std::int64_t b = index / row_tiles;
    shared.x = a.rows(batch.offset(kOfX, b), row, tile::kRows);
    shared.hidden = a.hidden_rows(batch.offset(kOfWeightIn, b), factor, 0, a.size.h);
    shared.outputs = rows_between(a.weight_out[factor], batch.offset(kOfWeightOut, b), first,
                                  a.end_of(first, kOutputs, a.size.k), a.size.h);
    shared.of_hidden = a.hidden_bias(batch.offset(kOfBiasIn, b), factor, 0);
    shared.of_outputs = {&bias_out(factor, first) + batch.offset(kOfBiasOut, b),
                         bias_out.column_stride};
    const matrix_view<T> to = out[factor];
    shared.out = {&to(row, first) + batch.offset(kOfValues, b), to.row_stride, to.column_stride};
    shared.product.x = shared.x;
    shared.product.y = shared.hidden;
  }

  // The biases of a tile of hidden units and their part of the second layer, zeros where there is
  // none; the copies are waited for with those of the tile.
  SUBQUAD_DEVICE void prepare(int first, shared_memory& shared) const {
    const int parity = tile::parity(first);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < tile::kColumns) {
      const int unit = first + thread;
      shared.bias_in[parity][thread] = unit < shared.hidden.count ? shared.of_hidden[unit] : T(0);
    }
    stage_rows<T, kOutputs, tile::kColumns, kOutputStride, kThreads>(shared.weight_out[parity],
                                                                     shared.outputs, 0, first);
  }

  static SUBQUAD_DEVICE void add_outputs(typename tile::accumulators& products, int parity,
                                         outputs& sums, const shared_memory& shared) {
    const int of_warp = tile::warp_across() * tile::kTilesAcross * 8 + tile::lane() % 4 * 2;
    const T* bias = shared.bias_in[parity] + of_warp;
    const T* weights = shared.weight_out[parity] + tile::lane() / 4 * kOutputStride + of_warp;
    SUBQUAD_UNROLL
    for (int j = 0; j < tile::kTilesAcross; ++j) {
      typename chain::left a[tile::kTilesDown];
      SUBQUAD_UNROLL
      for (int i = 0; i < tile::kTilesDown; ++i) {
        SUBQUAD_UNROLL
        for (int v = 0; v < tile::warp::kRows / 4; ++v) {
          T& value = products.values[i][j][v];
          value = gelu(value + bias[j * 8 + v % 2]);
        }
        chain::load(a[i], products.values[i][j]);
      }
      SUBQUAD_UNROLL
      for (int k = 0; k < kOutputTiles; ++k) {
        if (k * 8 >= shared.outputs.count) continue;
        typename chain::right b;
        chain::load(b, weights + k * 8 * kOutputStride + j * 8);
        SUBQUAD_UNROLL
        for (int i = 0; i < tile::kTilesDown; ++i) chain::multiply(sums[i][k], a[i], b);
      }
    }
  }

  // Adds the sums of the warps that share rows.
  static SUBQUAD_DEVICE void gather(const outputs& sums, shared_memory& shared) {
    SUBQUAD_UNROLL
    for (int across = 0; across < tile::kWarpsOfRow; ++across) {
      if (tile::warp_across() == across) {
        SUBQUAD_UNROLL
        for (int i = 0; i < tile::kTilesDown; ++i) {
          SUBQUAD_UNROLL
          for (int k = 0; k < kOutputTiles; ++k) {
            SUBQUAD_UNROLL
            for (int v = 0; v < tile::warp::kRows / 4; ++v) {
              const int row = tile::row(i * tile::warp::kRows / 8 + v / 2);
              T& place = shared.results[row * kResultStride + k * 8 + tile::lane() % 4 * 2 + v % 2];
              place = across == 0 ? sums[i][k][v] : place + sums[i][k][v];
            }
          }
        }
      }
      __syncthreads();
    }
  }

  static SUBQUAD_DEVICE void write(shared_memory& shared) {
    const int count = shared.outputs.count;
    for (int index = static_cast<int>(threadIdx.x); index < shared.x.count * count;
         index += kThreads) {
      const int row = index / count;
      const int k = index % count;
      const T value = shared.results[row * kResultStride + k] + shared.of_outputs[k];
      if (isnan(value)) shared.is_unsettled[row] = 1;
      shared.out(row, k) = value;
    }
  }

  // Writes a row from plain arithmetic.
  static SUBQUAD_DEVICE void settle(int row, shared_memory& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    T sum = 0;
    for (int first = 0; first < shared.hidden.count; first += kThreads) {
      const int left = shared.hidden.count - first;
      const int of_round = left < kThreads ? left : kThreads;
      __syncthreads();
      if (thread < of_round) {
        const int unit = first + thread;
        shared.settled[thread] =
            gelu(plain_product(shared.x, row, shared.hidden, unit) + shared.of_hidden[unit]);
      }
      __syncthreads();
      if (thread >= shared.outputs.count) continue;
      for (int each = 0; each < of_round; ++each) {
        sum = fma(shared.settled[each], shared.outputs.matrix(thread, first + each), sum);
      }
    }
    if (thread < shared.outputs.count) {
      shared.out(row, thread) = sum + shared.of_outputs[thread];
    }
  }
};

template <class T>
void factor_values_as(const factor_networks& call, const array_view& x, const array_view& weight_in,
                      const array_view& bias_in, const array_view& weight_out,
                      const array_view& bias_out, const array_view& out) {
  using kernel = factor_values_kernel<T>;
  const network_sizes& size = call.size;
  const std::int64_t row_tiles = divide_up(size.n, kernel::tile::kRows);
  const std::int64_t parts = divide_up(size.k, kernel::kOutputs);
  const batches<kNetworkArrays> batch = batches_of<kNetworkArrays>(call.shape, {{&x, 2},
                                                                                {&weight_in, 3},
                                                                                {&bias_in, 2},
                                                                                {&weight_out, 3},
                                                                                {&out, 3},
                                                                                {&bias_out, 2},
                                                                                {nullptr, 0}});
  launch(size.batch * size.n_factors * row_tiles * parts,
         kernel{networks<T>(call, x, weight_in, bias_in, weight_out),
                matrix_at<const T>(bias_out, 0), stack_at<T>(out, 0), batch, row_tiles, parts});
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t factor_values_workspace(std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                    std::int64_t, std::int64_t, std::int64_t) {
  return workspace_layout().size();
}

void factor_values(const array_view& x, const array_view& weight_in, const array_view& bias_in,
                   const array_view& weight_out, const array_view& bias_out, const array_view& out,
                   const array_view&) {
  const factor_networks call =
      check_factor_values(x, weight_in, bias_in, weight_out, bias_out, out);
  (x.type == dtype::float64
       ? cuda::factor_values_as<double>
       : cuda::factor_values_as<float>)(call, x, weight_in, bias_in, weight_out, bias_out, out);
}

}  // namespace subquad::core
