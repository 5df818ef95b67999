// The moments of the scores of Gaussian mixtures.
#include "gaussian_moments.cuh"

#include "launch.cuh"
#include "normalizers_core.hpp"
#include "tile_product.cuh"

namespace subquad::cuda {
namespace {

// packed[entry of the slab][component][column][stride] = the columns of the factors. Each column is
// then one that asynchronous copies of 16 bytes can fetch, which a row-major factor denies them.
template <class T>
struct pack_factors_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  static constexpr int kSide = 32;
  struct shared_memory {
    T tile[kSide][kSide + 1];
    matrix_view<const T> from;
    T* to;
    std::int64_t first_row;
    std::int64_t first_column;
  };

  mixture_arrays<T> mixture;
  std::int64_t first_batch;
  T* packed;
  std::int64_t stride;
  std::int64_t row_tiles;
  std::int64_t column_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % kSide;
    const int start = static_cast<int>(threadIdx.x) / kSide;
    // Neighbouring threads read neighbours in either order of storage.
    const bool by_rows = shared.from.row_stride == 1;
    for (int each = start; each < kSide; each += kThreads / kSide) {
      const int i = by_rows ? lane : each;
      const int c = by_rows ? each : lane;
      if (shared.first_row + i < mixture.depth && shared.first_column + c < mixture.rank) {
        shared.tile[i][c] = shared.from(shared.first_row + i, shared.first_column + c);
      }
    }
    __syncthreads();
    for (int c = start; c < kSide; c += kThreads / kSide) {
      if (shared.first_row + lane < mixture.depth && shared.first_column + c < mixture.rank) {
        shared.to[(shared.first_column + c) * stride + shared.first_row + lane] =
            shared.tile[lane][c];
      }
    }
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    std::int64_t index = blockIdx.x;
    shared.first_column = index % column_tiles * kSide;
    index /= column_tiles;
    shared.first_row = index % row_tiles * kSide;
    index /= row_tiles;
    shared.to = packed + index * mixture.rank * stride;
    shared.from = mixture.factor(first_batch + index / mixture.k, index % mixture.k);
  }
};

// mean_ia = x_i . means_a and variance_ia = sum_t x_it^2 diagonal_at, 0 without a diagonal, in
// plain arithmetic: beside a factor of more than a few columns they are little of the work, and
// would take a whole tile of columns where the rank fills its tiles. A block computes a tile of
// rows against a tile of components.
template <class T>
struct linear_moments_kernel {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 4;
  static constexpr int kRows = 128;
  static constexpr int kComponents = 16;
  static constexpr int kChunk = 128 / static_cast<int>(sizeof(T));
  // Neighbouring rows begin in different banks.
  static constexpr int kStride = kChunk + 16 / static_cast<int>(sizeof(T));
  static constexpr int kAcross = 4;  // threads that share a row
  static constexpr int kThreadRows = kRows / (kThreads / kAcross);
  static constexpr int kThreadComponents = kComponents / kAcross;
  struct shared_memory {
    struct alignas(16) stage {
      T x[kRows * kStride];
      T means[kComponents * kStride];
      T diagonal[kComponents * kStride];
    } staged;
    rows_of<T> x;
    rows_of<T> means;
    rows_of<T> diagonal;
    T* mean;  // of the block's first row and component
    T* variance;
  };

  mixture_arrays<T> mixture;
  mixture_slab slab;
  moment_planes<T> planes;
  std::int64_t row_tiles;
  std::int64_t component_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    const int across = static_cast<int>(threadIdx.x) % kAcross;
    const int down = static_cast<int>(threadIdx.x) / kAcross;
    T means[kThreadRows][kThreadComponents];
    T variances[kThreadRows][kThreadComponents];
    SUBQUAD_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      SUBQUAD_UNROLL
      for (int c = 0; c < kThreadComponents; ++c) means[r][c] = variances[r][c] = 0;
    }
    typename shared_memory::stage& staged = shared.staged;
    const bool has_diagonal = static_cast<bool>(mixture.diagonal);
    for (int k = 0; k < shared.x.depth; k += kChunk) {
      stage_rows<T, kRows, kChunk, kStride, kThreads>(staged.x, shared.x, 0, k);
      stage_rows<T, kComponents, kChunk, kStride, kThreads>(staged.means, shared.means, 0, k);
      if (has_diagonal) {
        stage_rows<T, kComponents, kChunk, kStride, kThreads>(staged.diagonal, shared.diagonal, 0,
                                                              k);
      }
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      SUBQUAD_NO_UNROLL
      for (int first = 0; first < kChunk; first += 4) {
        SUBQUAD_UNROLL
        for (int t = first; t < first + 4; ++t) {
          T x[kThreadRows];
          SUBQUAD_UNROLL
          for (int r = 0; r < kThreadRows; ++r) x[r] = staged.x[row(down, r) * kStride + t];
          SUBQUAD_UNROLL
          for (int c = 0; c < kThreadComponents; ++c) {
            const T mean = staged.means[component(across, c) * kStride + t];
            SUBQUAD_UNROLL
            for (int r = 0; r < kThreadRows; ++r) means[r][c] = fma(x[r], mean, means[r][c]);
          }
          if (!has_diagonal) continue;
          SUBQUAD_UNROLL
          for (int c = 0; c < kThreadComponents; ++c) {
            const T diagonal = staged.diagonal[component(across, c) * kStride + t];
            SUBQUAD_UNROLL
            for (int r = 0; r < kThreadRows; ++r) {
              variances[r][c] = fma(x[r] * x[r], diagonal, variances[r][c]);
            }
          }
        }
      }
      __syncthreads();
    }
    SUBQUAD_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const int i = row(down, r);
      SUBQUAD_UNROLL
      for (int c = 0; c < kThreadComponents; ++c) {
        const int a = component(across, c);
        if (i >= shared.x.count || a >= shared.means.count) continue;
        shared.mean[i * planes.mean.row_stride + a * planes.mean.column_stride] = means[r][c];
        shared.variance[i * planes.variance.row_stride + a * planes.variance.column_stride] =
            variances[r][c];
      }
    }
  }

  static SUBQUAD_DEVICE int row(int down, int r) { return down + r * (kThreads / kAcross); }
  static SUBQUAD_DEVICE int component(int across, int c) { return across + c * kAcross; }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    using arrays = mixture_arrays<T>;
    std::int64_t index = blockIdx.x;
    const std::int64_t first = index % component_tiles * kComponents;
    index /= component_tiles;
    const std::int64_t row = index % row_tiles * kRows;
    const std::int64_t entry = index / row_tiles;
    const std::int64_t b = slab.first_batch + entry;
    const std::int64_t end_row = row + kRows < slab.rows ? row + kRows : slab.rows;
    const std::int64_t end = first + kComponents < mixture.k ? first + kComponents : mixture.k;
    shared.x = rows_between(mixture.x, mixture.batch.offset(arrays::kX, b), slab.first_row + row,
                            slab.first_row + end_row, mixture.depth);
    shared.means = rows_between(mixture.means, mixture.batch.offset(arrays::kMeans, b), first, end,
                                mixture.depth);
    if (mixture.diagonal) {
      shared.diagonal = rows_between(mixture.diagonal, mixture.batch.offset(arrays::kDiagonal, b),
                                     first, end, mixture.depth);
    }
    shared.mean = &planes.mean(row, first) + entry * planes.mean_stride;
    shared.variance = &planes.variance(row, first) + entry * planes.variance_stride;
  }
};

// variance_ia += |factors_a^T x_i|^2. A block computes a tile of rows against the columns of one
// factor; products stay in registers. A variance that the split of float32 made NaN is computed
// again in plain arithmetic, in which it may be infinite, or finite.
template <class T, class Tile>
struct factor_squares_kernel {
  using tile = Tile;
  static constexpr int kThreads = tile::kThreads;
  // As many as do not spill: tiles are shallow, and blocks must hide each other's first copies.
  static constexpr int kBlocks = (sizeof(T) == 8 ? 512 : 640) / kThreads;
  static_assert(tile::kRows == kMomentRows);
  struct shared_memory {
    typename tile::shared_memory product;
    // Of the threads' rows, of which each thread touches its own; where a thread's sum is, that of
    // its row is in the end.
    T sums[tile::kThreadRows][kThreads];
    T settled[kThreads / kWarp];
    T* variance;  // of the block's first row
    bool is_empty;
  };

  mixture_arrays<T> mixture;
  mixture_slab slab;
  const T* packed;  // null: the factors as they are
  std::int64_t packed_stride;
  matrix_view<T> variance;
  std::int64_t variance_stride;
  std::int64_t row_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    if (shared.is_empty) return;
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) shared.sums[r][threadIdx.x] = 0;
    tile::run(
        shared.product, [](int) {},
        [&](int, typename tile::accumulators& products) {
          SUBQUAD_UNROLL
          for (int r = 0; r < tile::kThreadRows; ++r) {
            T sum = 0;
            SUBQUAD_UNROLL
            for (int c = 0; c < tile::kThreadColumns; ++c) {
              sum = fma(products(r, c), products(r, c), sum);
            }
            shared.sums[r][threadIdx.x] += sum;
          }
        });
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      T sum = shared.sums[r][threadIdx.x];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      shared.sums[r][threadIdx.x] = sum;
    }
    __syncthreads();
    const int n_rows = shared.product.x.count;
    for (int row = static_cast<int>(threadIdx.x); row < n_rows; row += kThreads) {
      for (int across = 1; across < tile::kWarpsOfRow; ++across) {
        sum_of(row, 0, shared) += sum_of(row, across, shared);
      }
    }
    __syncthreads();
    if constexpr (tile::warp::kIsSplit) {
      for (int row = 0; row < n_rows; ++row) {
        const T sum = sum_of(row, 0, shared);
        if (isnan(sum)) settle(row, shared);
      }
    }
    for (int row = static_cast<int>(threadIdx.x); row < n_rows; row += kThreads) {
      shared.variance[row * variance.row_stride] += sum_of(row, 0, shared);
    }
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    using arrays = mixture_arrays<T>;
    std::int64_t index = blockIdx.x;
    const std::int64_t a = index % mixture.k;
    index /= mixture.k;
    const std::int64_t row = index % row_tiles * tile::kRows;
    const std::int64_t entry = index / row_tiles;
    const std::int64_t b = slab.first_batch + entry;
    const std::int64_t end_row = row + tile::kRows < slab.rows ? row + tile::kRows : slab.rows;
    shared.product.x = rows_between(mixture.x, mixture.batch.offset(arrays::kX, b),
                                    slab.first_row + row, slab.first_row + end_row, mixture.depth);
    matrix_view<const T> columns{packed, packed_stride, 1};
    if (packed) {
      columns.data += (entry * mixture.k + a) * mixture.rank * packed_stride;
    } else {
      const matrix_view<const T> factor = mixture.factor(b, a);
      columns = {factor.data, factor.column_stride, factor.row_stride};
    }
    shared.product.y = rows_between(columns, 0, 0, mixture.rank, mixture.depth);
    shared.variance = &variance(row, a) + entry * variance_stride;
    shared.is_empty = mixture.is_empty(b, a);
  }

  // A row's sum over the columns of one of the warps that share it.
  static SUBQUAD_DEVICE T& sum_of(int row, int across, shared_memory& shared) {
    int thread;
    int r;
    tile::holder(row, across, thread, r);
    return shared.sums[r][thread];
  }

  SUBQUAD_DEVICE void settle(int row, shared_memory& shared) const {
    const rows_of<T>& columns = shared.product.y;
    T sum = 0;
    for (int c = static_cast<int>(threadIdx.x); c < columns.count; c += kThreads) {
      const T product = plain_product(shared.product.x, row, columns, c);
      sum = fma(product, product, sum);
    }
    SUBQUAD_UNROLL
    for (int flip = 1; flip < kWarp; flip *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, flip);
    if (tile::lane() == 0) shared.settled[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += shared.settled[warp];
      sum_of(row, 0, shared) = sum;
    }
    __syncthreads();
  }
};

// Narrower than the default of float32: the rank of a factor is its depth or less, a multiple of 64
// rather than of 96, and a tile that ranks fill wastes nothing.
template <class T>
using wide_tile = tile_product<T, kMomentRows, 64, 4, 2>;
template <class T>
using narrow_tile = tile_product<T, kMomentRows, 32, 4, 1>;

template <class T, class Tile>
void add_factor_squares(const mixture_arrays<T>& mixture, const slab_cut& cut,
                        const mixture_slab& slab, const T* packed, const moment_planes<T>& planes) {
  const std::int64_t row_tiles = divide_up(slab.rows, Tile::kRows);
  launch(slab.size * row_tiles * mixture.k,
         factor_squares_kernel<T, Tile>{mixture, slab, cut.packed_stride > 0 ? packed : nullptr,
                                        cut.packed_stride, planes.variance, planes.variance_stride,
                                        row_tiles});
}

}  // namespace

template <class T>
void score_moments(const mixture_arrays<T>& mixture, const slab_cut& cut, const mixture_slab& slab,
                   T* packed, const moment_planes<T>& planes) {
  using linear = linear_moments_kernel<T>;
  const std::int64_t row_tiles = divide_up(slab.rows, linear::kRows);
  const std::int64_t component_tiles = divide_up(mixture.k, linear::kComponents);
  launch(slab.size * row_tiles * component_tiles,
         linear{mixture, slab, planes, row_tiles, component_tiles});
  if (mixture.rank == 0) return;
  if (cut.packed_stride > 0 && slab.first_row == 0) {
    using pack = pack_factors_kernel<T>;
    const std::int64_t down = divide_up(mixture.depth, pack::kSide);
    const std::int64_t across = divide_up(mixture.rank, pack::kSide);
    launch(slab.size * mixture.k * down * across,
           pack{mixture, slab.first_batch, packed, cut.packed_stride, down, across});
  }
  (mixture.rank <= narrow_tile<T>::kColumns
       ? add_factor_squares<T, narrow_tile<T>>
       : add_factor_squares<T, wide_tile<T>>)(mixture, cut, slab, packed, planes);
}
template void score_moments(const mixture_arrays<float>&, const slab_cut&, const mixture_slab&,
                            float*, const moment_planes<float>&);
template void score_moments(const mixture_arrays<double>&, const slab_cut&, const mixture_slab&,
                            double*, const moment_planes<double>&);

namespace {

template <class T>
void score_moments_as(const mixture& m, const array_view& mean, const array_view& variance,
                      const array_view& workspace) {
  const slab_cut cut = slab_cut::of_entries(m.size, sizeof(T));
  workspace_layout pieces(workspace);
  T* packed = pieces.take<T>(cut.packed);
  const mixture_arrays<T> arrays(m);
  cut.for_each(m.size, [&](const mixture_slab& slab) {
    const auto plane = [&](const array_view& array) {
      return matrix_at<T>(array, m.shape.offset(array, 2, slab.first_batch)).from(slab.first_row);
    };
    score_moments<T>(arrays, cut, slab, packed, {plane(mean), 0, plane(variance), 0});
  });
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t gaussian_score_moments_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                             std::int64_t r, std::int64_t itemsize) {
  workspace_layout workspace;
  workspace.take<char>(cuda::slab_cut::of_entries({1, n, k, d, r}, itemsize).packed * itemsize);
  return workspace.size();
}

void gaussian_score_moments(const array_view& x, const array_view& means, const array_view& factors,
                            const array_view* diagonal, const array_view& mean,
                            const array_view& variance, const array_view& workspace) {
  const mixture m = check_gaussian_score_moments(x, means, factors, diagonal, mean, variance);
  if (m.size.batch * m.size.n * m.size.k == 0) return;
  (x.type == dtype::float32 ? cuda::score_moments_as<float>
                            : cuda::score_moments_as<double>)(m, mean, variance, workspace);
}

}  // namespace subquad::core
