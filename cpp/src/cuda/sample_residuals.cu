// What samples of each component say of its Gaussian value.
#include <string>

#include "device.cuh"
#include "launch.cuh"
#include "normalizers_core.hpp"
#include "sample_residuals_checks.hpp"
#include "tile_product.cuh"

namespace subquad::cuda {
namespace {

// Sums over samples of one component, of r and its squared deviations scaled by e^-common and
// e^-2common. The largest exponent above 1 is the common one, else 0.
template <class T>
struct residual_sums {
  T number;  // of samples
  T common;
  T sum;     // of r
  T square;  // of (r - mean r)^2
  T third;   // of w t^3
  T weight;

  static SUBQUAD_DEVICE residual_sums nothing() { return {0, 0, 0, 0, 0, 0}; }

  SUBQUAD_DEVICE void raise(T exponent) {
    if (!(exponent > T(1) && exponent > common)) return;
    const T scale = power_of_2((common - exponent) * kLog2E<T>);
    sum *= scale;
    square *= scale * scale;
    common = exponent;
  }

  SUBQUAD_DEVICE void merge(residual_sums other) {
    if (other.number == 0) return;
    raise(other.common);
    other.raise(common);
    const T total = number + other.number;
    if (number > 0) {
      const T delta = other.sum / other.number - sum / number;
      other.square += delta * delta * (number * (other.number / total));
    }
    number = total;
    sum += other.sum;
    square += other.square;
    third += other.third;
    weight += other.weight;
  }
};

// The sums of the warp's lanes, merged; all lanes get the same.
template <class T>
SUBQUAD_DEVICE residual_sums<T> merged_over_warp(residual_sums<T> sums) {
  SUBQUAD_NO_UNROLL
  for (int flip = 1; flip < kWarp; flip *= 2) {
    residual_sums<T> other;
    other.number = __shfl_xor_sync(0xffffffffu, sums.number, flip);
    other.common = __shfl_xor_sync(0xffffffffu, sums.common, flip);
    other.sum = __shfl_xor_sync(0xffffffffu, sums.sum, flip);
    other.square = __shfl_xor_sync(0xffffffffu, sums.square, flip);
    other.third = __shfl_xor_sync(0xffffffffu, sums.third, flip);
    other.weight = __shfl_xor_sync(0xffffffffu, sums.weight, flip);
    // The lower lane's sums come first on both sides.
    const bool is_upper = (threadIdx.x & static_cast<unsigned>(flip)) != 0;
    const residual_sums<T> second = is_upper ? sums : other;
    if (is_upper) sums = other;
    sums.merge(second);
  }
  return sums;
}

// Room for the sums beside the tile in shared memory: two blocks of 82 KiB to a multiprocessor.
template <class T>
struct residual_tile {
  using type = tile_product<T, 128, 64, 4, 2>;
};
template <>
struct residual_tile<double> {
  using type = tile_product<double, 64, 64, 4, 2>;
};

// log_factor, log_error and third of c_api.h, for a tile of rows and one component a block.
//
// Nothing aliases. Exponents t - v/2 above 1 share a factor e^c that returns as a logarithm:
// nothing overflows that is finite. With p = e^(t - v/2 - c), u = 2^-24 (2^-53) and scores within
// e, that is tile_product's bound and two roundings, r e^-c is within
//   |w| (p (e + u (|t - v/2| + 3 |log p| + 4)) + e^-c (|q'(t)| e + (8 + 2 c) u |q|))
// and two roundings, |q| with the magnitudes of the terms of q; sums over s samples are within
// (s / 8 + 90 + 2 c) u of the sums of magnitudes.
template <class T>
struct sample_residuals_kernel {
  using tile = typename residual_tile<T>::type;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;
  struct shared_memory {
    typename tile::shared_memory product;
    // Of the threads' rows, of which each thread touches its own; where a thread's sums of a row
    // are, those of the row are in the end.
    residual_sums<T> sums[tile::kThreadRows][kThreads];
    T weights[2][tile::kColumns];  // of a tile's columns
    T half[tile::kRows];           // v / 2
    T shift[tile::kRows];
    int left_out[tile::kRows];  // the sample that a row leaves out, -1 for none
    vector_view<const T> all_weights;
    std::int64_t component;
    std::int64_t first_row;
    std::int64_t first_sample;
  };

  matrix_view<const T> x;
  matrix_view<const T> deviations;
  vector_view<const T> weights;
  vector_view<const std::int64_t> offsets;
  matrix_view<const T> variance;
  matrix_view<const T> scale;
  matrix_view<const T> shift;                // optional
  vector_view<const std::int64_t> excluded;  // optional
  matrix_view<T> log_factor;
  matrix_view<T> log_error;
  matrix_view<T> third;
  std::int64_t n;
  std::int64_t k;
  std::int64_t depth;
  std::int64_t samples;
  bool quadratic;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    const int n_rows = shared.product.x.count;
    for (int row = static_cast<int>(threadIdx.x); row < tile::kRows; row += kThreads) {
      const std::int64_t i = shared.first_row + row;
      const bool is_row = row < n_rows;
      shared.half[row] = is_row ? T(0.5) * variance(i, shared.component) : T(0);
      shared.shift[row] = is_row && shift ? shift(i, shared.component) : T(0);
      std::int64_t sample = -1;
      if (is_row && excluded && excluded[i] >= 0) sample = excluded[i] - shared.first_sample;
      const bool is_here = sample >= 0 && sample < shared.product.y.count;
      shared.left_out[row] = is_here ? static_cast<int>(sample) : -1;
    }
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      shared.sums[r][threadIdx.x] = residual_sums<T>::nothing();
    }
    __syncthreads();
    tile::run(
        shared.product, [&](int first_column) { prepare(first_column, shared); },
        [&](int first_column, typename tile::accumulators& scores) {
          accumulate(first_column, scores, shared);
        });

    for (int row = static_cast<int>(threadIdx.x); row < n_rows; row += kThreads) {
      residual_sums<T> sums = residual_sums<T>::nothing();
      SUBQUAD_NO_UNROLL
      for (int each = 0; each < 4 * tile::kWarpsOfRow; ++each) {
        sums.merge((&sums_of(row, each / 4, shared))[each % 4]);
      }
      sums_of(row, 0, shared) = sums;
    }
    __syncthreads();
    if constexpr (tile::warp::kIsSplit) {
      for (int row = 0; row < n_rows; ++row) {
        const T sum = sums_of(row, 0, shared).sum;
        if (!isnan(sum)) continue;
        __syncthreads();
        settle(row, shared);
      }
    }
    for (int row = static_cast<int>(threadIdx.x); row < n_rows; row += kThreads) {
      write(shared.first_row + row, shared.component, sums_of(row, 0, shared));
    }
  }

  // What the block computes, and where its operands lie.
  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const std::int64_t a = static_cast<std::int64_t>(blockIdx.x) % k;
    shared.component = a;
    shared.first_row = static_cast<std::int64_t>(blockIdx.x) / k * tile::kRows;
    const std::int64_t end_row = shared.first_row + tile::kRows;
    const std::int64_t first = in_range(offsets[a]);
    const std::int64_t end = in_range(offsets[a + 1]);
    shared.first_sample = first;
    shared.product.x = rows_between(x, 0, shared.first_row, end_row < n ? end_row : n, depth);
    shared.product.y = rows_between(deviations, 0, first, end > first ? end : first, depth);
    shared.all_weights = weights.from(first);
  }
  SUBQUAD_DEVICE std::int64_t in_range(std::int64_t offset) const {
    return offset < 0 ? 0 : offset > samples ? samples : offset;
  }

  // The sums of the first of the four threads that share a row in one of its warps.
  static SUBQUAD_DEVICE residual_sums<T>& sums_of(int row, int warp, shared_memory& shared) {
    int thread;
    int r;
    tile::holder(row, warp, thread, r);
    return shared.sums[r][thread];
  }

  SUBQUAD_DEVICE void prepare(int first_column, shared_memory& shared) const {
    for (int c = static_cast<int>(threadIdx.x); c < tile::kColumns; c += kThreads) {
      const int j = first_column + c;
      shared.weights[tile::parity(first_column)][c] =
          j < shared.product.y.count ? shared.all_weights[j] : T(0);
    }
  }

  // w (e^(t - v/2) - q(t)) e^-common
  SUBQUAD_DEVICE T residual(T t, T weight, T half, T common, T small) const {
    T control = T(1) + t;
    if (quadratic) control += T(0.5) * t * t - half;
    return weight * (power_of_2((t - half - common) * kLog2E<T>) - control * small);
  }

  // Adds a tile of scores to the sums of the thread's rows.
  SUBQUAD_DEVICE void accumulate(int first_column, typename tile::accumulators& scores,
                                 shared_memory& shared) const {
    const T* column_weights = shared.weights[tile::parity(first_column)];
    const int n_columns = shared.product.y.count - first_column;
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      const int row = tile::row(r);
      const int left_out = shared.left_out[row] - first_column;
      const T half = shared.half[row];
      const T shift_of_row = shared.shift[row];
      residual_sums<T> block = residual_sums<T>::nothing();
      T peak = 0;
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        const int column = tile::column(c);
        const bool counts = column < n_columns && column != left_out;
        const T t = counts ? scores(r, c) + shift_of_row : T(0);
        const T weight = counts ? column_weights[column] : T(0);
        scores(r, c) = t;
        peak = counts && t - half > peak ? t - half : peak;
        block.number += counts ? T(1) : T(0);
        block.third += weight * t * t * t;
        block.weight += weight;
      }
      if (block.number == T(0)) continue;
      residual_sums<T> sums = shared.sums[r][threadIdx.x];
      sums.raise(peak);
      block.common = sums.common;
      const T small = power_of_2(-block.common * kLog2E<T>);
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        const int column = tile::column(c);
        const bool counts = column < n_columns && column != left_out;
        const T value = residual(scores(r, c), column_weights[column], half, block.common, small);
        scores(r, c) = value;
        block.sum += counts ? value : T(0);
      }
      const T mean = block.sum / block.number;
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        const int column = tile::column(c);
        const bool counts = column < n_columns && column != left_out;
        const T deviation = counts ? scores(r, c) - mean : T(0);
        block.square += deviation * deviation;
      }
      sums.merge(block);
      shared.sums[r][threadIdx.x] = sums;
    }
  }

  // The sums of a row that are NaN, from plain arithmetic: a score that the split made NaN may be
  // infinite, or finite.
  SUBQUAD_DEVICE void settle(int row, shared_memory& shared) const {
    const rows_of<T>& columns = shared.product.y;
    const T half = shared.half[row];
    residual_sums<T> sums = residual_sums<T>::nothing();
    for (int j = static_cast<int>(threadIdx.x); j < columns.count; j += kThreads) {
      if (j == shared.left_out[row]) continue;
      const T t = plain_product(shared.product.x, row, columns, j) + shared.shift[row];
      const T weight = shared.all_weights[j];
      sums.raise(t - half);
      const T small = power_of_2(-sums.common * kLog2E<T>);
      sums.merge({T(1), sums.common, residual(t, weight, half, sums.common, small), T(0),
                  weight * t * t * t, weight});
    }
    sums = merged_over_warp(sums);
    for (int turn = 0; turn < kThreads / kWarp; ++turn) {
      if (static_cast<int>(threadIdx.x) == turn * kWarp) {
        if (turn > 0) {
          residual_sums<T> before = sums_of(row, 0, shared);
          before.merge(sums);
          sums = before;
        }
        sums_of(row, 0, shared) = sums;
      }
      __syncthreads();
    }
  }

  SUBQUAD_DEVICE void write(std::int64_t i, std::int64_t a, const residual_sums<T>& sums) const {
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    const T factor = scale(i, a);
    const T number = sums.number > T(1) ? sums.number : T(1);
    const T small = power_of_2(-sums.common * kLog2E<T>);
    const T delta = factor * (sums.sum / number);
    T log_of = sums.common == T(0) ? log1p(delta) : sums.common + log(small + delta);
    if (!(small + delta > T(0))) log_of = kNaN;
    log_factor(i, a) = log_of;
    const T spread = sums.square / (number * (number - T(1)));
    log_error(i, a) =
        sums.number > T(1) ? sums.common + log(factor) + T(0.5) * log(spread) : -infinity<T>();
    third(i, a) = sums.third / (sums.weight == T(0) ? T(1) : sums.weight);
  }
};

template <class T>
void sample_residuals_as(const array_view& x, const array_view& deviations,
                         const array_view& weights, const array_view& offsets,
                         const array_view& variance, const array_view& scale,
                         const array_view* shift, const array_view* excluded, bool quadratic,
                         const array_view& log_factor, const array_view& log_error,
                         const array_view& third) {
  using kernel = sample_residuals_kernel<T>;
  kernel call{};
  call.x = matrix_at<const T>(x, 0);
  call.deviations = matrix_at<const T>(deviations, 0);
  call.weights = vector_at<const T>(weights, 0);
  call.offsets = vector_at<const std::int64_t>(offsets, 0);
  call.variance = matrix_at<const T>(variance, 0);
  call.scale = matrix_at<const T>(scale, 0);
  if (shift) call.shift = matrix_at<const T>(*shift, 0);
  if (excluded) call.excluded = vector_at<const std::int64_t>(*excluded, 0);
  call.log_factor = matrix_at<T>(log_factor, 0);
  call.log_error = matrix_at<T>(log_error, 0);
  call.third = matrix_at<T>(third, 0);
  call.n = x.shape[0];
  call.k = offsets.shape[0] - 1;
  call.depth = x.shape[1];
  call.samples = deviations.shape[0];
  call.quadratic = quadratic;
  launch(divide_up(call.n, kernel::tile::kRows) * call.k, call);
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t sample_residuals_workspace(std::int64_t, std::int64_t, std::int64_t, std::int64_t) {
  return workspace_layout().size();
}

void sample_residuals(const array_view& x, const array_view& deviations, const array_view& weights,
                      const array_view& offsets, const array_view& variance,
                      const array_view& scale, const array_view* shift, const array_view* excluded,
                      bool quadratic, const array_view& log_factor, const array_view& log_error,
                      const array_view& third, const array_view&) {
  check_sample_residuals(x, deviations, weights, offsets, variance, scale, shift, excluded,
                         log_factor, log_error, third);
  if (deviations.shape[0] > cuda::kMostRows) {
    throw invalid_argument("deviations: expected at most 2^30 samples on CUDA, got " +
                           std::to_string(deviations.shape[0]));
  }
  (x.type == dtype::float32
       ? cuda::sample_residuals_as<float>
       : cuda::sample_residuals_as<double>)(x, deviations, weights, offsets, variance, scale, shift,
                                            excluded, quadratic, log_factor, log_error, third);
}

}  // namespace subquad::core
