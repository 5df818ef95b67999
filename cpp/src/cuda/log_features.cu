// Random features: logarithms, values, and trigonometric ones.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "column_split.cuh"
#include "features.cuh"
#include "features_core.hpp"
#include "launch.cuh"

namespace subquad::cuda {
namespace {

// 1 / pi in two parts.
template <class T>
struct inverse_of_pi;
template <>
struct inverse_of_pi<float> {
  static constexpr float kHigh = 0x1.45f306p-2f;
  static constexpr float kLow = 0x1.b93910p-27f;
};
template <>
struct inverse_of_pi<double> {
  static constexpr double kHigh = 0x1.45f306dc9c883p-2;
  static constexpr double kLow = -0x1.6b01ec5417056p-56;
};

#if defined(__CUDACC__)
SUBQUAD_DEVICE void sine_and_cosine_of_pi(float x, float& sine, float& cosine) {
  sincospif(x, &sine, &cosine);
}
SUBQUAD_DEVICE void sine_and_cosine_of_pi(double x, double& sine, double& cosine) {
  sincospi(x, &sine, &cosine);
}
#else
using std::rint;
template <class T>
void sine_and_cosine_of_pi(T x, T& sine, T& cosine) {
  const long double angle = 3.14159265358979323846264338327950288L * static_cast<long double>(x);
  sine = static_cast<T>(std::sin(angle));
  cosine = static_cast<T>(std::cos(angle));
}
#endif

// Within 4 u + |x| u^2, u = 2^-24 or 2^-53: none is so large that it takes another path.
template <class T>
SUBQUAD_DEVICE void sine_and_cosine(T x, T& sine, T& cosine) {
  using inverse = inverse_of_pi<T>;
  const T quotient = x * inverse::kHigh;
  const T rest = fma(x, inverse::kLow, fma(x, inverse::kHigh, -quotient));
  // The difference is exact.
  const T nearest = rint(quotient);
  sine_and_cosine_of_pi((quotient - nearest) + rest, sine, cosine);
  if (T(2) * rint(nearest * T(0.5)) == nearest) return;
  sine = -sine;
  cosine = -cosine;
}

// With z_i = x_i - shift, q_i = z_i . linear - (sum_t diagonal_t z_it^2 + |factor z_i|^2) / 2,
// t_im = z_i . projection_m and e_im = q_i + bias_m, writes
//   logarithms:    e_im + t_im, and in the second half of a row e_im - t_im where features come in
//                  pairs; or the exponentials of these
//   trigonometric: exp(e_im) cos t_im, and in the second half exp(e_im) sin t_im
// One block computes a tile of rows against the rows of the factor, then against those of one part
// of the projection. x is read once for every tile of those: z exists in registers alone, and the
// terms of its row that are not products are added up beside the first tile.
//
// Nothing aliases. z is rounded once. With u = 2^-24 or 2^-53: t_im and the elements of factor z_i
// are within tile_product's bound; q_i within (d + ceil(r / 96) + 20) u of the sum of the sizes of
// its terms, and what the squares take over from factor z_i; a logarithm is rounded twice more, an
// exponential is within 2 ulp, and so is its product with a sine or a cosine.
//
// A row of which a product or the term is NaN is computed again in plain arithmetic (`settle`),
// which alone tells an infinity from what the split made of it.
template <class S, bool kIsTrigonometric>
struct features_kernel {
  using sum = arithmetic_t<S>;
  using tile = default_tile_t<sum>;
  using walk = tile_walk<tile>;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kBlocks = sizeof(sum) == 8 ? 1 : 2;  // 64 accumulators, twice as wide
  static constexpr int kChunk = tile::kChunk;
  // Lanes of a warp read their fragments from different banks.
  static constexpr int kRowStride = kChunk + (sizeof(S) == 2 ? 8 : tile::warp::kPadding);
  static constexpr int kPerRow = kThreads / tile::kRows;  // threads that add up a row's terms
  static constexpr int kColumnsSize = std::max(tile::kColumns * tile::kStride, walk::kSize);

  struct shared_memory {
    struct alignas(16) stage {
      sum columns[kColumnsSize];  // and, where a tile has ended, results on their way out
      S rows[tile::kRows * kRowStride];
      sum vectors[3][kChunk];  // shift, linear and diagonal, zeros where there are none
    };
    stage stages[2];
    sum bias[2][tile::kColumns];     // of a tile's columns, by turns
    sum partial_terms[2][kThreads];  // z . linear and diagonal z^2, each thread its own
    sum linear_terms[tile::kRows];   // z . linear of rows
    sum squares[tile::kWarpsOfRow + 1][tile::kRows];  // diagonal z^2, and (factor z)^2 by warp
    int is_unsettled[tile::kRows];
    sum settled[kThreads / kWarp];
    // In registers they would push the accumulators out.
    rows_of<S> x;
    rows_of<sum> factor;
    rows_of<sum> projection;
    vector_view<const sum> vectors[3];
    vector_view<const sum> of_columns;  // bias
    matrix_view<sum> out;
    std::int64_t second;  // elements to the second half of a row
    bool by_vectors;
  };

  feature_arguments<S> arguments;
  vector_view<const sum> bias;
  matrix_view<sum> out;
  bool antithetic;
  bool exponentiate;
  std::int64_t row_tiles;
  std::int64_t columns;  // of a part
  std::int64_t parts;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    for (int row = static_cast<int>(threadIdx.x); row < tile::kRows; row += kThreads) {
      shared.is_unsettled[row] = 0;
      SUBQUAD_UNROLL
      for (int each = 0; each <= tile::kWarpsOfRow; ++each) shared.squares[each][row] = 0;
    }
    shared.partial_terms[0][threadIdx.x] = 0;
    shared.partial_terms[1][threadIdx.x] = 0;
    __syncthreads();
    run(shared);
    if constexpr (tile::warp::kIsSplit) {
      for (int row = 0; row < shared.x.count; ++row) {
        if (shared.is_unsettled[row]) settle(row, shared);
      }
    }
  }

  // What the block computes, and where its operands lie.
  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const feature_arguments<S>& a = arguments;
    std::int64_t index = blockIdx.x;
    const std::int64_t first_column = index % parts * columns;
    index /= parts;
    const std::int64_t first_row = index % row_tiles * tile::kRows;
    const std::int64_t b = index / row_tiles;
    const std::int64_t end_row = first_row + tile::kRows;
    const std::int64_t end_column = first_column + columns;
    const std::int64_t m = a.size.m;
    shared.x = rows_between(a.x, a.batch.offset(kX, b), first_row,
                            end_row < a.size.n ? end_row : a.size.n, a.size.d);
    shared.factor = {};
    if (a.factor) {
      shared.factor = rows_between(a.factor, a.batch.offset(kFactor, b), 0, a.size.r, a.size.d);
    }
    shared.projection = rows_between(a.projection, a.batch.offset(kProjection, b), first_column,
                                     end_column < m ? end_column : m, a.size.d);
    shared.vectors[0] = a.vector_of(a.shift, kShift, b);
    shared.vectors[1] = a.vector_of(a.linear, kLinear, b);
    shared.vectors[2] = a.vector_of(a.diagonal, kDiagonal, b);
    shared.of_columns = a.vector_of(bias, kBiasOrGrad, b).from(first_column);
    shared.out = {out.data + a.batch.offset(kResult, b) + first_row * out.row_stride +
                      first_column * out.column_stride,
                  out.row_stride, out.column_stride};
    shared.second = m * out.column_stride;
    shared.by_vectors = walk::is_vector(shared.out, m);
  }

  SUBQUAD_DEVICE bool has_pairs() const { return kIsTrigonometric || antithetic; }

  SUBQUAD_DEVICE void run(shared_memory& shared) const {
    const int depth = shared.x.depth;
    const int of_factor = (shared.factor.count + tile::kColumns - 1) / tile::kColumns;
    const int tiles = of_factor + (shared.projection.count + tile::kColumns - 1) / tile::kColumns;
    typename tile::accumulators products;
    tile::clear(products);
    // A step copies the next chunk while it multiplies the last one; the first only copies.
    int at = 0;
    int k = -kChunk;
    for (int slot = 1; at < tiles; slot ^= 1) {
      const bool ends_tile = k + kChunk >= depth && k >= 0;
      const int next = ends_tile ? at + 1 : at;
      const int next_k = ends_tile ? 0 : k + kChunk;
      if (next < tiles) {
        const bool is_factor = next < of_factor;
        const int column = (is_factor ? next : next - of_factor) * tile::kColumns;
        if (next_k == 0 && !is_factor) load_bias(column, shared.bias[next % 2], shared);
        copy(shared.stages[slot ^ 1], is_factor ? shared.factor : shared.projection, column, next_k,
             shared);
      }
      commit_copies();
      if (k >= 0) {
        wait_copies<1>();
        __syncthreads();
        typename shared_memory::stage& stage = shared.stages[slot];
        multiply(stage, products);
        if (at == 0) add_terms(stage, shared);
        if (ends_tile) {
          if (at == 0) finish_terms(shared);
          // Terms are there, and nobody reads the columns any more.
          __syncthreads();
          if (at < of_factor) {
            add_squares(shared.factor.count - at * tile::kColumns, products, shared);
          } else {
            write((at - of_factor) * tile::kColumns, shared.bias[at % 2], stage.columns, products,
                  shared);
          }
          tile::clear(products);
        }
        __syncthreads();
      }
      at = next;
      k = next_k;
    }
    wait_copies<0>();
  }

  static SUBQUAD_DEVICE void load_bias(int first_column, sum* to, const shared_memory& shared) {
    for (int c = static_cast<int>(threadIdx.x); c < tile::kColumns; c += kThreads) {
      const int j = first_column + c;
      to[c] = j < shared.projection.count ? shared.of_columns[j] : sum(0);
    }
  }

  static SUBQUAD_DEVICE void copy(typename shared_memory::stage& to, const rows_of<sum>& operand,
                                  int column, int k, const shared_memory& shared) {
    stage_rows<S, tile::kRows, kChunk, kRowStride, kThreads>(to.rows, shared.x, 0, k);
    stage_rows<sum, tile::kColumns, kChunk, tile::kStride, kThreads>(to.columns, operand, column,
                                                                     k);
    static_assert(3 * kChunk <= kThreads);
    const int which = static_cast<int>(threadIdx.x) / kChunk;
    if (which >= 3) return;
    const int part = static_cast<int>(threadIdx.x) % kChunk;
    const vector_view<const sum>& from = shared.vectors[which];
    const bool valid = from && k + part < shared.x.depth;
    const sum* source = shared.projection.matrix.data;
    if (valid) source = &from[k + part];
    copy_async<sizeof(sum)>(&to.vectors[which][part], source,
                            valid ? static_cast<int>(sizeof(sum)) : 0);
  }

  SUBQUAD_DEVICE void multiply(const typename shared_memory::stage& from,
                               typename tile::accumulators& products) const {
    const int lane = tile::lane();
    const S* rows =
        from.rows + tile::warp_down() * tile::kTilesDown * tile::warp::kRows * kRowStride;
    const sum* of_warp =
        from.columns + tile::warp_across() * tile::kTilesAcross * 8 * tile::kStride;
    multiply_chunk<tile>(
        products,
        [&](typename tile::warp::left& a, int i, int k) {
          make_left(a, lane, [&](int row, int part) {
            return widen(rows[(i + row) * kRowStride + k + part], arguments.is_bfloat16) -
                   from.vectors[0][k + part];
          });
        },
        [&](typename tile::warp::right& b, int j, int k) {
          tile::warp::load(b, of_warp + j * tile::kStride + k, tile::kStride, lane);
        });
  }

  // Adds a chunk's share of the terms of rows that are not products.
  SUBQUAD_DEVICE void add_terms(const typename shared_memory::stage& from,
                                shared_memory& shared) const {
    if (!arguments.linear && !arguments.diagonal) return;
    const int row = static_cast<int>(threadIdx.x) / kPerRow;
    sum of_linear = shared.partial_terms[0][threadIdx.x];
    sum of_squares = shared.partial_terms[1][threadIdx.x];
    for (int k = static_cast<int>(threadIdx.x) % kPerRow; k < kChunk; k += kPerRow) {
      const sum z =
          widen(from.rows[row * kRowStride + k], arguments.is_bfloat16) - from.vectors[0][k];
      if (arguments.linear) of_linear = fma(z, from.vectors[1][k], of_linear);
      if (arguments.diagonal) of_squares = fma(z * from.vectors[2][k], z, of_squares);
    }
    shared.partial_terms[0][threadIdx.x] = of_linear;
    shared.partial_terms[1][threadIdx.x] = of_squares;
  }

  static SUBQUAD_DEVICE void finish_terms(shared_memory& shared) {
    sum of_linear = shared.partial_terms[0][threadIdx.x];
    sum of_squares = shared.partial_terms[1][threadIdx.x];
    SUBQUAD_UNROLL
    for (int flip = 1; flip < kPerRow; flip *= 2) {
      of_linear += __shfl_xor_sync(0xffffffffu, of_linear, flip);
      of_squares += __shfl_xor_sync(0xffffffffu, of_squares, flip);
    }
    if (threadIdx.x % kPerRow != 0) return;
    shared.linear_terms[threadIdx.x / kPerRow] = of_linear;
    shared.squares[tile::kWarpsOfRow][threadIdx.x / kPerRow] = of_squares;
  }

  // The squares of a tile of factor z, of `count` columns: others are zeros times what may be
  // infinite.
  static SUBQUAD_DEVICE void add_squares(int count, typename tile::accumulators& products,
                                         shared_memory& shared) {
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      sum squares = 0;
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        if (tile::column(c) < count) squares = fma(products(r, c), products(r, c), squares);
      }
      squares += __shfl_xor_sync(0xffffffffu, squares, 1);
      squares += __shfl_xor_sync(0xffffffffu, squares, 2);
      if (tile::lane() % 4 == 0) shared.squares[tile::warp_across()][tile::row(r)] += squares;
    }
  }

  static SUBQUAD_DEVICE sum term_of(int row, const shared_memory& shared) {
    sum squares = shared.squares[tile::kWarpsOfRow][row];
    SUBQUAD_UNROLL
    for (int across = 0; across < tile::kWarpsOfRow; ++across) {
      squares += shared.squares[across][row];
    }
    return fma(sum(-0.5), squares, shared.linear_terms[row]);
  }

  // A feature, and the other of its pair.
  SUBQUAD_DEVICE void finish(sum product, sum offset, sum& first, sum& second) const {
    if constexpr (kIsTrigonometric) {
      const sum scale = exp(offset);
      sine_and_cosine(product, second, first);
      first *= scale;
      second *= scale;
    } else {
      first = offset + product;
      second = offset - product;
      if (!exponentiate) return;
      first = exp(first);
      if (antithetic) second = exp(second);
    }
  }

  SUBQUAD_DEVICE void write(int first_column, const sum* of_columns, sum* patches,
                            typename tile::accumulators& products, shared_memory& shared) const {
    const int end = shared.projection.count - first_column;
    walk::visit(products, patches, shared.by_vectors,
                shared.out.row_stride == 1 && shared.out.column_stride != 1,
                [&](auto width, int row, int column, const sum* values) {
                  constexpr int kWidth = decltype(width)::value;
                  if (row >= shared.x.count || column >= end) return;
                  const sum term = term_of(row, shared);
                  pack<sum, kWidth> first;
                  pack<sum, kWidth> second;
                  bool is_settled = true;
                  SUBQUAD_UNROLL
                  for (int e = 0; e < kWidth; ++e) {
                    is_settled = is_settled && !isnan(values[e] + term);
                    finish(values[e], term + of_columns[column + e], first.values[e],
                           second.values[e]);
                  }
                  if (!is_settled) shared.is_unsettled[row] = 1;
                  sum* to = &shared.out(row, first_column + column);
                  store(to, first);
                  if (has_pairs()) store(to + shared.second, second);
                });
  }

  SUBQUAD_DEVICE sum z_of(int row, int t, const shared_memory& shared) const {
    const sum value = widen(shared.x.matrix(row, t), arguments.is_bfloat16);
    return shared.vectors[0] ? value - shared.vectors[0][t] : value;
  }

  SUBQUAD_DEVICE sum product_of(int row, const rows_of<sum>& operand, int j,
                                const shared_memory& shared) const {
    sum product = 0;
    for (int t = 0; t < operand.depth; ++t) {
      product = fma(z_of(row, t, shared), operand.matrix(j, t), product);
    }
    return product;
  }

  // Writes a row from plain arithmetic.
  SUBQUAD_DEVICE void settle(int row, shared_memory& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    sum of_linear = 0;
    sum of_squares = 0;
    for (int t = thread; t < shared.x.depth; t += kThreads) {
      const sum z = z_of(row, t, shared);
      if (shared.vectors[1]) of_linear = fma(z, shared.vectors[1][t], of_linear);
      if (shared.vectors[2]) of_squares = fma(z * shared.vectors[2][t], z, of_squares);
    }
    for (int c = thread; c < shared.factor.count; c += kThreads) {
      const sum product = product_of(row, shared.factor, c, shared);
      of_squares = fma(product, product, of_squares);
    }
    of_linear = sum_over_block<kThreads>(of_linear, shared.settled);
    of_squares = sum_over_block<kThreads>(of_squares, shared.settled);
    const sum term = fma(sum(-0.5), of_squares, of_linear);
    for (int j = thread; j < shared.projection.count; j += kThreads) {
      sum first;
      sum second;
      finish(product_of(row, shared.projection, j, shared), term + shared.of_columns[j], first,
             second);
      sum* to = &shared.out(row, j);
      *to = first;
      if (has_pairs()) to[shared.second] = second;
    }
  }
};

template <class S, bool kIsTrigonometric>
void features_as(const feature_map& map, bool antithetic, bool exponentiate,
                 const array_view& out) {
  using kernel = features_kernel<S, kIsTrigonometric>;
  using sum = arithmetic_t<S>;
  const feature_sizes& size = map.size;
  column_split cut(size.batch, size.n, size.m, kernel::tile::kRows, kernel::tile::kColumns);
  // Every part computes the factor's products of its rows: they are not more than its own.
  const std::int64_t of_factor = divide_up(size.r, kernel::tile::kColumns) * kernel::tile::kColumns;
  cut.columns = std::max(cut.columns, of_factor);
  cut.parts = divide_up(size.m, cut.columns);
  launch(size.batch * cut.row_tiles * cut.parts,
         kernel{feature_arguments<S>(map, *map.bias, 1, out), vector_at<const sum>(*map.bias, 0),
                matrix_at<sum>(out, 0), antithetic, exponentiate, cut.row_tiles, cut.columns,
                cut.parts});
}

template <bool kIsTrigonometric>
void features(const feature_map& map, bool antithetic, bool exponentiate, const array_view& out) {
  if (map.size.batch * map.size.n * map.size.m == 0) return;
  const auto as = map.x.type == dtype::float64   ? features_as<double, kIsTrigonometric>
                  : map.x.type == dtype::float32 ? features_as<float, kIsTrigonometric>
                                                 : features_as<word16, kIsTrigonometric>;
  as(map, antithetic, exponentiate, out);
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t log_features_workspace(std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                   std::int64_t, std::int64_t) {
  return workspace_layout().size();
}

void log_features(const array_view& x, const array_view& projection, const array_view& bias,
                  const array_view* diagonal, const array_view* factor, const array_view* shift,
                  const array_view* linear, bool antithetic, bool exponentiate,
                  const array_view& out, const array_view&) {
  const feature_map map =
      check_features(x, projection, &bias, diagonal, factor, shift, linear, antithetic, out, "out");
  cuda::features<false>(map, antithetic, exponentiate, out);
}

void trigonometric_features(const array_view& x, const array_view& projection,
                            const array_view& bias, const array_view* diagonal,
                            const array_view* factor, const array_view* shift,
                            const array_view* linear, const array_view& out, const array_view&) {
  const feature_map map =
      check_features(x, projection, &bias, diagonal, factor, shift, linear, true, out, "out");
  cuda::features<true>(map, false, false, out);
}

}  // namespace subquad::core
