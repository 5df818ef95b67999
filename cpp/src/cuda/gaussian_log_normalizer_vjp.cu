// The reverse of the log-normaliser of Gaussian mixtures.
#include "column_split.cuh"
#include "gaussian_moments.cuh"
#include "gram.cuh"
#include "launch.cuh"
#include "normalizers_core.hpp"
#include "tile_product.cuh"

namespace subquad::cuda {
namespace {

// R_ia = grad_i exp(log_counts_a + m_ia + v_ia / 2 - log_z_i), 0 where log_z_i or log_counts_a is
// -inf, of a slab. v is read and R written in the same place of responsibilities[batch][k][n]; m in
// means[entry of the slab][k][rows].
//
// Nothing else aliases. With e_ia what m_ia + v_ia / 2 misses, and s_ia the score, R is within
// e_ia + u (|log_counts_a + m_ia| + |s_ia| + 2 |s_ia - log_z_i| + 6) of itself.
template <class T>
struct responsibilities_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  struct shared_memory {
    const T* means;  // of the block's first row, and so on
    T* responsibilities;
    const T* grad;
    const T* log_z;
    T log_count;
    int rows;
  };

  mixture_arrays<T> mixture;
  mixture_slab slab;
  const T* means;
  T* responsibilities;
  vector_view<const T> grad;
  vector_view<const T> log_z;
  batches<2> batch;  // of grad and log_z
  std::int64_t row_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    if (row >= shared.rows) return;
    const T log_count = shared.log_count;
    const T normalizer = shared.log_z[row * log_z.stride];
    T& place = shared.responsibilities[row];
    T responsibility = 0;
    if (log_count != -infinity<T>() && normalizer != -infinity<T>()) {
      const T score = fma(T(0.5), place, log_count + shared.means[row]);
      responsibility =
          shared.grad[row * grad.stride] * power_of_2((score - normalizer) * kLog2E<T>);
    }
    place = responsibility;
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    std::int64_t index = blockIdx.x;
    const std::int64_t first = index % row_tiles * kThreads;
    index /= row_tiles;  // of the component, over the slab's entries
    const std::int64_t b = slab.first_batch + index / mixture.k;
    const std::int64_t i = slab.first_row + first;
    const std::int64_t left = slab.rows - first;
    shared.rows = static_cast<int>(left < kThreads ? left : kThreads);
    shared.log_count = mixture.log_count(b, index % mixture.k);
    shared.means = means + index * slab.rows + first;
    shared.responsibilities =
        responsibilities + (slab.first_batch * mixture.k + index) * mixture.n + i;
    shared.grad = &grad[i] + batch.offset(0, b);
    shared.log_z = &log_z[i] + batch.offset(1, b);
  }
};

// Operands and result of one small product.
template <class T>
struct small_product {
  rows_of<T> left;
  rows_of<T> right;
  std::int64_t entry;  // of the batch, from the first of the group on
  std::int64_t component;
  bool is_empty;
};

// The products left_i . right_j of a matrix for each component of each entry of a group, one block
// for a tile of one of them; `problem` says what is multiplied and takes the results:
//   std::int64_t rows, columns                             of each result
//   void locate(std::int64_t index, small_product<T>& to)  component index % k of entry index / k
//   void put(const small_product<T>&, int row, int column, T product)
//                                                          outside of the result too: 0
// Products that the split of float32 made NaN are those of plain arithmetic.
template <class T, class Problem>
struct small_products_kernel {
  using tile = tile_product<T, 64, 64, 2, 2>;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kBlocks = 3;
  static constexpr int kStride = tile::kColumns + 1;
  struct shared_memory {
    typename tile::shared_memory product;
    // From here they are taken by a loop: unrolled with the accumulators, what `put` does would be
    // there for each of them.
    T results[tile::kRows * kStride];
    small_product<T> operands;
    int first_row;
    int first_column;
  };

  Problem problem;
  std::int64_t row_tiles;
  std::int64_t column_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    tile::run(
        shared.product, [](int) {},
        [&](int, typename tile::accumulators& products) {
          SUBQUAD_UNROLL
          for (int r = 0; r < tile::kThreadRows; ++r) {
            SUBQUAD_UNROLL
            for (int c = 0; c < tile::kThreadColumns; ++c) {
              shared.results[tile::row(r) * kStride + tile::column(c)] = products(r, c);
            }
          }
        });
    SUBQUAD_NO_UNROLL
    for (int index = static_cast<int>(threadIdx.x); index < tile::kRows * tile::kColumns;
         index += kThreads) {
      put(index / tile::kColumns, index % tile::kColumns, shared);
    }
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    std::int64_t index = blockIdx.x;
    shared.first_column = static_cast<int>(index % column_tiles) * tile::kColumns;
    index /= column_tiles;
    shared.first_row = static_cast<int>(index % row_tiles) * tile::kRows;
    problem.locate(index / row_tiles, shared.operands);
    shared.product.x = part_of(shared.operands.left, shared.first_row, tile::kRows);
    shared.product.y = part_of(shared.operands.right, shared.first_column, tile::kColumns);
  }

  static SUBQUAD_DEVICE rows_of<T> part_of(const rows_of<T>& rows, int first, int count) {
    const int left = rows.count - first;
    return {rows.matrix.from(first), left < count ? left : count, rows.depth};
  }

  SUBQUAD_DEVICE void put(int row, int column, const shared_memory& shared) const {
    T product = shared.results[row * kStride + column];
    if constexpr (tile::warp::kIsSplit) {
      if (isnan(product) && row < shared.product.x.count && column < shared.product.y.count) {
        product = plain_product(shared.product.x, row, shared.product.y, column);
      }
    }
    problem.put(shared.operands, shared.first_row + row, shared.first_column + column, product);
  }
};

template <class T, class Problem>
void small_products(const Problem& problem, std::int64_t products) {
  using kernel = small_products_kernel<T, Problem>;
  const std::int64_t down = divide_up(problem.rows, kernel::tile::kRows);
  const std::int64_t across = divide_up(problem.columns, kernel::tile::kColumns);
  launch(products * down * across, kernel{problem, down, across});
}

// Rows of the covariances in tiles, so that those of all components follow each other:
// covariances[entry][tile][component][kTileColumns][stride], zeros after the last. They are the
// columns of gradients.
constexpr int kTileColumns = 64;

template <class T>
std::int64_t aligned_stride(std::int64_t length) {
  constexpr std::int64_t kVector = 16 / sizeof(T);
  return divide_up(length, kVector) * kVector;
}

// covariances_a = factors_a factors_a^T + diag(diagonal_a), within
// (r / 8 + 13) 2^-22 |factors_a| |factors_a|^T + u covariances_a for float32.
template <class T>
struct covariance_problem {
  mixture_arrays<T> mixture;
  std::int64_t first_batch;
  T* covariances;
  std::int64_t stride;
  std::int64_t rows;  // whole tiles
  std::int64_t columns;

  SUBQUAD_DEVICE void locate(std::int64_t index, small_product<T>& to) const {
    to.entry = index / mixture.k;
    to.component = index % mixture.k;
    to.left = rows_between(mixture.factor(first_batch + to.entry, to.component), 0, 0,
                           mixture.depth, mixture.rank);
    to.right = to.left;
  }
  SUBQUAD_DEVICE void put(const small_product<T>& of, int row, int column, T product) const {
    if (column >= mixture.depth) return;
    if (mixture.diagonal && row == column) {
      product +=
          mixture.diagonal
              .data[mixture.batch.offset(mixture_arrays<T>::kDiagonal, first_batch + of.entry) +
                    of.component * mixture.diagonal.row_stride +
                    row * mixture.diagonal.column_stride];
    }
    const std::int64_t tile = (of.entry * rows + row) / kTileColumns;
    covariances[((tile * mixture.k + of.component) * kTileColumns + row % kTileColumns) * stride +
                column] = product;
  }
};

// grad_x_i = sum_a R_ia (means_a + covariances_a x_i), over the components of a part where they are
// cut. A block computes a tile of rows and columns; the products with one component's covariance
// are weighed and added in registers. Terms of R_ia = 0 count for nothing. Entries that the split
// of float32 made NaN are computed again in plain arithmetic.
//
// Nothing aliases. Beside what R and the covariances miss: each product as tile_product says, and
// u (components + 2) sum_a |R_ia| (|means_a| + |covariances_a| |x_i|).
template <class T>
struct gradient_kernel {
  using tile = tile_product<T, 128, kTileColumns, 4, 2>;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;
  using arrays = mixture_arrays<T>;
  struct shared_memory {
    typename tile::shared_memory product;
    T weights[2][tile::kRows];
    T means[2][kTileColumns];
    int is_nan[tile::kRows];
    const T* responsibilities;  // of the block's first component and row
    const T* first_means;       // of its first component and column
    T* out;                     // of its first row and column
    std::int64_t row_stride;    // of the output
    std::int64_t column_stride;
    int columns;
  };

  arrays mixture;
  std::int64_t first_batch;
  std::int64_t size;          // entries of the group
  const T* responsibilities;  // [entry][k][n]
  const T* covariances;
  std::int64_t stride;
  matrix_view<T> out;
  batches<1> batch_of_out;
  T* partial;  // [part][entry][n][depth], null where there is one part
  column_split cut;
  std::int64_t column_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    for (int row = static_cast<int>(threadIdx.x); row < tile::kRows; row += kThreads) {
      shared.is_nan[row] = 0;
    }
    typename tile::accumulators sums;
    tile::clear(sums);
    __syncthreads();
    tile::run(
        shared.product, [&](int first_column) { prepare(first_column, shared); },
        [&](int first_column, typename tile::accumulators& products) {
          const int parity = tile::parity(first_column);
          SUBQUAD_UNROLL
          for (int r = 0; r < tile::kThreadRows; ++r) {
            const T weight = shared.weights[parity][tile::row(r)];
            if (weight == T(0)) continue;
            SUBQUAD_UNROLL
            for (int c = 0; c < tile::kThreadColumns; ++c) {
              sums(r, c) =
                  fma(weight, products(r, c) + shared.means[parity][tile::column(c)], sums(r, c));
            }
          }
        });
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      const int row = tile::row(r);
      if (row >= shared.product.x.count) continue;
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        const int column = tile::column(c);
        if (column >= shared.columns) continue;
        const T sum = sums(r, c);
        if (isnan(sum)) atomicMax(&shared.is_nan[row], 1);
        shared.out[row * shared.row_stride + column * shared.column_stride] = sum;
      }
    }
    if constexpr (tile::warp::kIsSplit) {
      __syncthreads();
      constexpr int kAtOnce = kThreads / kTileColumns;
      const int column = static_cast<int>(threadIdx.x) % kTileColumns;
      for (int row = static_cast<int>(threadIdx.x) / kTileColumns; row < tile::kRows;
           row += kAtOnce) {
        if (shared.is_nan[row] != 0 && column < shared.columns) settle(row, column, shared);
      }
    }
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    std::int64_t index = blockIdx.x;
    const std::int64_t part = index % cut.parts;
    index /= cut.parts;
    const std::int64_t column_tile = index % column_tiles;
    index /= column_tiles;
    const std::int64_t row = index % cut.row_tiles * tile::kRows;
    const std::int64_t entry = index / cut.row_tiles;
    const std::int64_t b = first_batch + entry;
    const std::int64_t end_row = row + tile::kRows < mixture.n ? row + tile::kRows : mixture.n;
    shared.product.x =
        rows_between(mixture.x, mixture.batch.offset(arrays::kX, b), row, end_row, mixture.depth);
    const std::int64_t all = mixture.k * kTileColumns;
    const std::int64_t first = part * cut.columns;
    const std::int64_t end = first + cut.columns < all ? first + cut.columns : all;
    const matrix_view<const T> rows{covariances, stride, 1};
    shared.product.y = rows_between(rows, (entry * column_tiles + column_tile) * all * stride,
                                    first, end, mixture.depth);
    const std::int64_t component = first / kTileColumns;
    const std::int64_t column = column_tile * kTileColumns;
    shared.responsibilities = responsibilities + (entry * mixture.k + component) * mixture.n + row;
    shared.first_means =
        &mixture.means(component, column) + mixture.batch.offset(arrays::kMeans, b);
    const std::int64_t left = mixture.depth - column;
    shared.columns = static_cast<int>(left < kTileColumns ? left : kTileColumns);
    if (partial) {
      shared.out = partial + ((part * size + entry) * mixture.n + row) * mixture.depth + column;
      shared.row_stride = mixture.depth;
      shared.column_stride = 1;
    } else {
      shared.out = &out(row, column) + batch_of_out.offset(0, b);
      shared.row_stride = out.row_stride;
      shared.column_stride = out.column_stride;
    }
  }

  // The weights and the mean of the component whose columns these are, 0 where there is no row or
  // column; the copies are waited for with those of the tile.
  SUBQUAD_DEVICE void prepare(int first_column, shared_memory& shared) const {
    constexpr int kSize = static_cast<int>(sizeof(T));
    const int parity = tile::parity(first_column);
    const int component = first_column / kTileColumns;
    const int thread = static_cast<int>(threadIdx.x);
    static_assert(tile::kRows + kTileColumns <= kThreads);
    if (thread < tile::kRows) {
      const bool valid = thread < shared.product.x.count;
      copy_async<kSize>(&shared.weights[parity][thread],
                        shared.responsibilities + component * mixture.n + (valid ? thread : 0),
                        valid ? kSize : 0);
    } else if (thread < tile::kRows + kTileColumns) {
      const int column = thread - tile::kRows;
      const bool valid = column < shared.columns;
      copy_async<kSize>(&shared.means[parity][column],
                        shared.first_means + component * mixture.means.row_stride +
                            (valid ? column : 0) * mixture.means.column_stride,
                        valid ? kSize : 0);
    }
  }

  SUBQUAD_DEVICE void settle(int row, int column, shared_memory& shared) const {
    const rows_of<T>& columns = shared.product.y;
    T sum = 0;
    for (int a = 0; a < columns.count / kTileColumns && !isnan(sum); ++a) {
      const T weight = shared.responsibilities[a * mixture.n + row];
      if (weight == T(0)) continue;
      const T mean =
          shared.first_means[a * mixture.means.row_stride + column * mixture.means.column_stride];
      // A NaN weight says enough.
      const T product =
          !isnan(weight) ? plain_product(shared.product.x, row, columns, a * kTileColumns + column)
                         : weight;
      sum = fma(weight, product + mean, sum);
    }
    shared.out[row * shared.row_stride + column * shared.column_stride] = sum;
  }
};

// grad_x from its parts, added in order.
template <class T>
struct add_gradients_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  struct shared_memory {};

  const T* partial;  // [part][entry][n][depth]
  std::int64_t parts;
  std::int64_t first_batch;
  std::int64_t size;
  std::int64_t n;
  std::int64_t depth;
  matrix_view<T> out;
  batches<1> batch_of_out;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const std::int64_t of_part = size * n * depth;
    if (index >= of_part) return;
    T sum = partial[index];
    for (std::int64_t part = 1; part < parts; ++part) sum += partial[part * of_part + index];
    const std::int64_t i = index / depth;
    (&out(i % n, index % depth))[batch_of_out.offset(0, first_batch + i / n)] = sum;
  }
};

// A source of rows for sums over them: all of them, once for each component of the entries of a
// group. Entries are counted from the first of the group on.
template <class T>
struct entry_rows : all_rows<T, mixture_arrays<T>::kArrays> {
  using base = all_rows<T, mixture_arrays<T>::kArrays>;
  std::int64_t first_batch;

  entry_rows(const mixture_arrays<T>& mixture, std::int64_t first, std::int64_t size,
             const T* responsibilities, const product_split& cut)
      : base(mixture.x, mixture.batch, mixture_arrays<T>::kX, size, mixture.k, mixture.n,
             responsibilities, cut),
        first_batch(first) {}

  SUBQUAD_DEVICE bool part(std::int64_t slot, row_part<T>& to) const {
    const bool found = base::part(slot, to);
    const std::int64_t entry = to.product / this->of_batch;
    to.rows.matrix.data += this->batch.offset(this->which, first_batch + entry) -
                           this->batch.offset(this->which, entry);
    return found;
  }
};

enum { kGradLogCounts, kGradMeans, kGradFactors, kGradDiagonal, kGradients };

template <class T>
struct parameter_gradients {
  vector_view<T> log_counts;  // each optional
  matrix_view<T> means;
  stack_view<T> factors;
  matrix_view<T> diagonal;
  batches<kGradients> batch;
};

// Writes what needs no product, rounded from float64, and the scatter rounded for the product:
// rounded[product][depth][stride]. One block for each row of a scatter.
template <class T>
struct write_sums_kernel {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 8;
  struct shared_memory {};

  parameter_gradients<T> out;
  std::int64_t first_batch;
  std::int64_t k;
  std::int64_t depth;
  const double* counts;    // [product]
  const double* sums;      // [product][depth]
  const double* scatter;   // [product][depth][depth], null where it was not computed
  const double* diagonal;  // [product][depth] likewise
  T* rounded;
  std::int64_t stride;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t rows = depth > 0 ? depth : 1;
    const std::int64_t product = blockIdx.x / rows;
    const std::int64_t row = blockIdx.x % rows;
    const std::int64_t b = first_batch + product / k;
    const std::int64_t a = product % k;
    if (threadIdx.x == 0) {
      if (out.log_counts && row == 0) {
        (&out.log_counts[a])[out.batch.offset(kGradLogCounts, b)] = static_cast<T>(counts[product]);
      }
      if (out.means && depth > 0) {
        (&out.means(a, row))[out.batch.offset(kGradMeans, b)] =
            static_cast<T>(sums[product * depth + row]);
      }
      if (out.diagonal && depth > 0) {
        const double square = scatter ? scatter[(product * depth + row) * depth + row]
                                      : diagonal[product * depth + row];
        (&out.diagonal(a, row))[out.batch.offset(kGradDiagonal, b)] = static_cast<T>(square / 2);
      }
    }
    if (!scatter) return;
    for (std::int64_t column = threadIdx.x; column < depth; column += kThreads) {
      rounded[(product * depth + row) * stride + column] =
          static_cast<T>(scatter[(product * depth + row) * depth + column]);
    }
  }
};

// grad_factors_a = scatter_a factors_a, 0 for an empty component.
template <class T>
struct factor_gradient_problem {
  mixture_arrays<T> mixture;
  std::int64_t first_batch;
  const T* rounded;
  std::int64_t stride;
  parameter_gradients<T> out;
  std::int64_t rows;
  std::int64_t columns;

  SUBQUAD_DEVICE void locate(std::int64_t index, small_product<T>& to) const {
    to.entry = index / mixture.k;
    to.component = index % mixture.k;
    to.is_empty = mixture.is_empty(first_batch + to.entry, to.component);
    const matrix_view<const T> scatter{rounded, stride, 1};
    to.left =
        rows_between(scatter, 0, index * mixture.depth, (index + 1) * mixture.depth, mixture.depth);
    const matrix_view<const T> factor = mixture.factor(first_batch + to.entry, to.component);
    const matrix_view<const T> factor_columns{factor.data, factor.column_stride, factor.row_stride};
    to.right = rows_between(factor_columns, 0, 0, mixture.rank, mixture.depth);
  }
  SUBQUAD_DEVICE void put(const small_product<T>& of, int row, int column, T product) const {
    if (row >= mixture.depth || column >= mixture.rank) return;
    const matrix_view<T> to = out.factors[of.component];
    (&to(row, column))[out.batch.offset(kGradFactors, first_batch + of.entry)] =
        of.is_empty ? T(0) : product;
  }
};

// The workspace. Responsibilities take all of batch * k * n, means and packed factors at most
// kSlabBytes each. Covariances and scatters take kGroupBytes, or what one entry of the batch needs:
// entries go in groups. The parts of sums take less than 512 of these, of blocks, more.
constexpr std::int64_t kGroupBytes = std::int64_t{16} << 20;

template <class T>
struct vjp_layout {
  std::int64_t stride;  // of covariances and rounded scatters
  std::int64_t group;   // entries
  std::int64_t column_tiles;
  slab_cut cut;
  column_split components;
  product_split by_gram;
  product_split by_sums;
  T* responsibilities;  // [batch][k][n]
  T* means;             // of a slab
  T* packed;
  T* matrices;  // covariances of a group, then its rounded scatters
  T* partial;   // of grad_x
  part_sums counts;
  part_sums sums;  // of rows, or of their squares
  part_sums scatters;

  vjp_layout(workspace_layout& workspace, const mixture_sizes& s)
      : stride(aligned_stride<T>(s.d)),
        group(group_of(s)),
        column_tiles(divide_up(s.d, kTileColumns)),
        cut(s, sizeof(T), 1),
        components(group * column_tiles, s.n, s.k * kTileColumns, gradient_kernel<T>::tile::kRows,
                   kTileColumns),
        by_gram(group * s.k, s.n, gram_blocks(s.d)),
        by_sums(group * s.k, s.n, row_sums_blocks(s.d)) {
    const std::int64_t products = group * s.k;
    responsibilities = workspace.take<T>(s.batch * s.k * s.n);
    means = workspace.take<T>(cut.size * cut.rows * s.k);
    packed = workspace.take<T>(cut.packed);
    matrices = workspace.take<T>(products * column_tiles * kTileColumns * stride);
    partial = workspace.take<T>(components.parts > 1 ? components.parts * group * s.n * s.d : 0);
    const auto take_sums = [&](std::int64_t size, const product_split& split) {
      double* out = workspace.take<double>(products * size);
      return part_sums{out, workspace.take<double>(split.extra_parts(products) * size), size};
    };
    counts = take_sums(1, by_sums);
    sums = take_sums(s.d, by_sums);
    scatters = take_sums(s.d * s.d, by_gram);
  }

  static std::int64_t group_of(const mixture_sizes& s) {
    const std::int64_t matrix =
        divide_up(s.d, kTileColumns) * kTileColumns * aligned_stride<T>(s.d);
    const std::int64_t bytes =
        s.k * (matrix * static_cast<std::int64_t>(sizeof(T)) + s.d * s.d * 8 + 1);
    return std::clamp<std::int64_t>(kGroupBytes / std::max<std::int64_t>(1, bytes), 1,
                                    std::max<std::int64_t>(1, s.batch));
  }
};

struct vjp_outputs {
  const array_view* x;  // each optional
  const array_view* log_counts;
  const array_view* means;
  const array_view* factors;
  const array_view* diagonal;
};

template <class T>
void fill_responsibilities(const mixture& m, const mixture_arrays<T>& arrays,
                           const vjp_layout<T>& layout, const array_view& grad,
                           const array_view& log_z) {
  using kernel = responsibilities_kernel<T>;
  const std::int64_t k = m.size.k;
  const std::int64_t n = m.size.n;
  const batches<2> batch = batches_of<2>(m.shape, {{&grad, 1}, {&log_z, 1}});
  layout.cut.for_each(m.size, [&](const mixture_slab& slab) {
    T* variances = layout.responsibilities + slab.first_batch * k * n + slab.first_row;
    score_moments<T>(arrays, layout.cut, slab, layout.packed,
                     {{layout.means, 1, slab.rows}, k * slab.rows, {variances, 1, n}, k * n});
    const std::int64_t row_tiles = divide_up(slab.rows, kernel::kThreads);
    launch(slab.size * k * row_tiles,
           kernel{arrays, slab, layout.means, layout.responsibilities, vector_at<const T>(grad, 0),
                  vector_at<const T>(log_z, 0), batch, row_tiles});
  });
}

template <class T>
void write_grad_x(const mixture& m, const mixture_arrays<T>& arrays, const vjp_layout<T>& layout,
                  std::int64_t first, std::int64_t count, const array_view& grad_x) {
  using gradient = gradient_kernel<T>;
  using finish = add_gradients_kernel<T>;
  const mixture_sizes& s = m.size;
  small_products<T>(covariance_problem<T>{arrays, first, layout.matrices, layout.stride,
                                          layout.column_tiles * kTileColumns, s.d},
                    count * s.k);
  const matrix_view<T> out = matrix_at<T>(grad_x, 0);
  const batches<1> batch = batches_of<1>(m.shape, {{&grad_x, 2}});
  const bool is_cut = layout.components.parts > 1;
  launch(count * layout.components.row_tiles * layout.column_tiles * layout.components.parts,
         gradient{arrays, first, count, layout.responsibilities + first * s.k * s.n,
                  layout.matrices, layout.stride, out, batch, is_cut ? layout.partial : nullptr,
                  layout.components, layout.column_tiles});
  if (!is_cut) return;
  launch(divide_up(count * s.n * s.d, finish::kThreads),
         finish{layout.partial, layout.components.parts, first, count, s.n, s.d, out, batch});
}

template <class T>
void write_parameter_gradients(const mixture& m, const mixture_arrays<T>& arrays,
                               const vjp_layout<T>& layout, std::int64_t first, std::int64_t count,
                               const vjp_outputs& outputs) {
  const mixture_sizes& s = m.size;
  const T* responsibilities = layout.responsibilities + first * s.k * s.n;
  const entry_rows<T> by_sums(arrays, first, count, responsibilities, layout.by_sums);
  parameter_gradients<T> out{};
  if (outputs.log_counts) out.log_counts = vector_at<T>(*outputs.log_counts, 0);
  if (outputs.means) out.means = matrix_at<T>(*outputs.means, 0);
  if (outputs.factors) out.factors = stack_at<T>(*outputs.factors, 0);
  if (outputs.diagonal) out.diagonal = matrix_at<T>(*outputs.diagonal, 0);
  out.batch = batches_of<kGradients>(
      m.shape,
      {{outputs.log_counts, 1}, {outputs.means, 2}, {outputs.factors, 3}, {outputs.diagonal, 2}});
  const auto write = [&](const parameter_gradients<T>& to, const double* scatter,
                         const double* squares) {
    launch(count * s.k * std::max<std::int64_t>(1, s.d),
           write_sums_kernel<T>{to, first, s.k, s.d, layout.counts.out, layout.sums.out, scatter,
                                squares, layout.matrices, layout.stride});
  };
  if (outputs.log_counts || outputs.means) {
    row_sums<T, 1>(by_sums, s.d, layout.sums, layout.counts);
    parameter_gradients<T> linear = out;
    linear.diagonal = {};
    write(linear, nullptr, nullptr);
  }
  if (!outputs.factors && !outputs.diagonal) return;
  parameter_gradients<T> quadratic = out;
  quadratic.log_counts = {};
  quadratic.means = {};
  if (!outputs.factors) {
    row_sums<T, 2>(by_sums, s.d, layout.sums, {});
    write(quadratic, nullptr, layout.sums.out);
    return;
  }
  gram<T>(entry_rows<T>(arrays, first, count, responsibilities, layout.by_gram), s.d,
          layout.scatters);
  write(quadratic, layout.scatters.out, nullptr);
  small_products<T>(
      factor_gradient_problem<T>{arrays, first, layout.matrices, layout.stride, out, s.d, s.r},
      count * s.k);
}

template <class T>
void gaussian_log_normalizer_vjp_as(const mixture& m, const array_view& grad,
                                    const array_view& log_z, const vjp_outputs& outputs,
                                    const array_view& workspace) {
  workspace_layout pieces(workspace);
  const vjp_layout<T> layout(pieces, m.size);
  const mixture_arrays<T> arrays(m);
  fill_responsibilities(m, arrays, layout, grad, log_z);
  for (std::int64_t first = 0; first < m.size.batch; first += layout.group) {
    const std::int64_t count = std::min(layout.group, m.size.batch - first);
    if (outputs.x) write_grad_x(m, arrays, layout, first, count, *outputs.x);
    write_parameter_gradients(m, arrays, layout, first, count, outputs);
  }
}

template <class T>
std::size_t workspace_as(const mixture_sizes& size) {
  workspace_layout workspace;
  vjp_layout<T>(workspace, size);
  return workspace.size();
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t gaussian_log_normalizer_vjp_workspace(std::int64_t batch, std::int64_t n,
                                                  std::int64_t k, std::int64_t d, std::int64_t r,
                                                  std::int64_t itemsize) {
  return (itemsize == 4 ? cuda::workspace_as<float>
                        : cuda::workspace_as<double>)({batch, n, k, d, r});
}

void gaussian_log_normalizer_vjp(const array_view& grad, const array_view& x,
                                 const array_view& log_counts, const array_view& means,
                                 const array_view& factors, const array_view* diagonal,
                                 const array_view& log_z, const array_view* grad_x,
                                 const array_view* grad_log_counts, const array_view* grad_means,
                                 const array_view* grad_factors, const array_view* grad_diagonal,
                                 const array_view& workspace) {
  const mixture m = check_gaussian_log_normalizer_vjp(grad, x, log_counts, means, factors, diagonal,
                                                      log_z, grad_x, grad_log_counts, grad_means,
                                                      grad_factors, grad_diagonal);
  if (m.size.batch == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cuda::gaussian_log_normalizer_vjp_as<T>(
        m, grad, log_z, {grad_x, grad_log_counts, grad_means, grad_factors, grad_diagonal},
        workspace);
  };
  if (x.type == dtype::float32) {
    run(float{});
  } else {
    run(double{});
  }
}

}  // namespace subquad::core
