// The reverse of the logarithms of random features, through x.
#include <algorithm>
#include <cstdint>

#include "features.cuh"
#include "features_core.hpp"
#include "launch.cuh"

namespace subquad::cuda {
namespace {

// Elements of x, of whichever type they are, as those they are computed in.
template <class T>
struct x_view {
  const void* data;
  std::int64_t row_stride;
  std::int64_t column_stride;
  dtype type;

  SUBQUAD_DEVICE T operator()(std::int64_t i, std::int64_t j) const {
    const std::int64_t at = i * row_stride + j * column_stride;
    if constexpr (sizeof(T) == 4) {
      if (type != dtype::float32) {
        return widen(static_cast<const word16*>(data)[at], type == dtype::bfloat16);
      }
    }
    return static_cast<const T*>(data)[at];
  }

  SUBQUAD_DEVICE x_view from(std::int64_t elements) const {
    const std::int64_t size =
        type == dtype::float64 || type == dtype::float32 ? sizeof(T) : sizeof(word16);
    return {static_cast<const char*>(data) + elements * size, row_stride, column_stride, type};
  }
};

// form_st = sum_k factor_ks factor_kt, entry by entry of a part of the batch, rows of `stride`
// elements. A thread computes an element, by one sum in order of k. Nothing aliases.
template <class T>
struct form_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  struct shared_memory {};

  matrix_view<const T> factor;
  batches<kFeatureArrays> batch;
  std::int64_t first_batch;
  std::int64_t entries;
  std::int64_t depth;
  std::int64_t rank;
  T* form;
  std::int64_t stride;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= entries * depth * depth) return;
    const std::int64_t t = index % depth;
    index /= depth;
    const std::int64_t s = index % depth;
    const std::int64_t entry = index / depth;
    const T* of_entry = factor.data + batch.offset(kFactor, first_batch + entry);
    const T* left = of_entry + s * factor.column_stride;
    const T* right = of_entry + t * factor.column_stride;
    T sum = 0;
    for (std::int64_t k = 0; k < rank; ++k) {
      sum = fma(left[k * factor.row_stride], right[k * factor.row_stride], sum);
    }
    form[(entry * depth + s) * stride + t] = sum;
  }
};

// With z_i = x_i - shift, g_i the sum of row i of grad, and h_im = grad_im, or grad_im - grad_i,m+j
// of a pair,
//   grad_x_i = sum_m h_im projection_m + g_i (linear - diagonal z_i - form z_i),  form = F^T F
// as one product of rows (h_i, -g_i z_i) with columns (projection, form), to which the rest is
// added. One block computes a tile of rows and kColumns elements of each; gradients are read once
// for every such tile, by blocks that follow each other.
//
// Nothing aliases. With u = 2^-24 or 2^-53, h and z are rounded once and -g z once more; g is
// within (2 m / kPerRow + 4) u sum |grad|, the form within r u sum_k |F_ks F_kt|, the product
// within tile_product's bound at the depth of both parts, and the rest takes 3 u of its terms.
//
// A row that is not finite is computed again in plain arithmetic (`settle`): an infinity may be
// what the form makes of numbers that are none, and a NaN what the split makes of an infinity.
template <class T>
struct features_vjp_kernel {
  // float64 is twice as wide: as many rows as leave room for both halves of the gradient.
  using tile = tile_product<T, sizeof(T) == 8 ? 64 : 128, 64, 4, 2>;
  using walk = tile_walk<tile>;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;
  static constexpr int kChunk = tile::kChunk;
  static constexpr int kColumns = tile::kColumns;
  // Lanes of a warp read their fragments from different banks.
  static constexpr int kColumnStride = kColumns + 32 / static_cast<int>(sizeof(T));
  static constexpr int kPerRow = kThreads / tile::kRows;  // threads that pass over a row
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kRowsSize = tile::kRows * tile::kStride;
  static_assert(2 * kRowsSize >= walk::kSize);

  struct shared_memory {
    struct alignas(16) stage {
      T rows[2 * kRowsSize];  // a chunk of both halves of the gradient; then what is multiplied
      T columns[kChunk * kColumnStride];
    };
    stage stages[2];
    T totals[tile::kRows];  // g
    int is_unsettled[tile::kRows];
    T settled[kThreads];
    // In registers they would push the accumulators out.
    rows_of<T> grad;
    rows_of<T> second_half;
    rows_of<T> projection;
    rows_of<T> form;
    x_view<T> x;
    matrix_view<const T> factor;
    vector_view<const T> shift;
    vector_view<const T> linear;
    vector_view<const T> diagonal;
    matrix_view<T> grad_x;
    int first_element;
    int elements;
    bool by_vectors;
  };

  // x lies behind `x`, whatever its type is.
  feature_arguments<T> arguments;
  dtype type;
  matrix_view<const T> grad;
  matrix_view<T> grad_x;
  bool antithetic;
  std::int64_t first_batch;
  std::int64_t row_tiles;
  std::int64_t blocks_across;
  const T* form;  // [entry][d][form_stride], null where there is no factor
  std::int64_t form_stride;
  std::int64_t form_of_entry;  // elements to the next entry's, 0 where all have one

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    for (int row = static_cast<int>(threadIdx.x); row < tile::kRows; row += kThreads) {
      shared.is_unsettled[row] = 0;
    }
    __syncthreads();
    typename tile::accumulators products;
    tile::clear(products);
    const int of_grad = (shared.grad.depth + kChunk - 1) / kChunk;
    const int chunks = of_grad + (shared.form.depth + kChunk - 1) / kChunk;
    T total = 0;  // of what the thread passes over
    // A step copies the next chunk while it multiplies the last one; the first only copies.
    for (int chunk = -1; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks) copy(chunk + 1, of_grad, shared);
      commit_copies();
      if (chunk < 0) continue;
      wait_copies<1>();
      __syncthreads();
      typename shared_memory::stage& stage = shared.stages[chunk % 2];
      if (chunk < of_grad) {
        total = pass_over(stage, total);
      } else {
        scale_rows(stage, (chunk - of_grad) * kChunk, total_of_row(total), shared);
      }
      __syncthreads();
      multiply(stage, products);
      __syncthreads();
    }
    wait_copies<0>();
    total = total_of_row(total);
    if (threadIdx.x % kPerRow == 0) shared.totals[threadIdx.x / kPerRow] = total;
    __syncthreads();
    write(products, shared);
    __syncthreads();
    for (int row = 0; row < shared.grad.count; ++row) {
      if (shared.is_unsettled[row]) settle(row, shared);
    }
  }

  // What the block computes, and where its operands lie.
  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const feature_arguments<T>& a = arguments;
    const std::int64_t d = a.size.d;
    const std::int64_t m = a.size.m;
    std::int64_t index = blockIdx.x;
    const std::int64_t first_element = index % blocks_across * kColumns;
    index /= blocks_across;
    const std::int64_t first_row = index % row_tiles * tile::kRows;
    const std::int64_t entry = index / row_tiles;
    const std::int64_t b = first_batch + entry;
    const std::int64_t end_row =
        first_row + tile::kRows < a.size.n ? first_row + tile::kRows : a.size.n;
    const std::int64_t of_grad = a.batch.offset(kBiasOrGrad, b);
    shared.grad = rows_between(grad, of_grad, first_row, end_row, m);
    shared.second_half =
        rows_between(grad, of_grad + m * grad.column_stride, first_row, end_row, m);
    shared.projection = rows_between(a.projection, a.batch.offset(kProjection, b), 0, m, d);
    shared.form = {};
    if (form) {
      const matrix_view<const T> rows{form, form_stride, 1};
      shared.form = rows_between(rows, entry * form_of_entry, 0, d, d);
    }
    shared.x = x_view<T>{a.x.data, a.x.row_stride, a.x.column_stride, type}.from(
        a.batch.offset(kX, b) + first_row * a.x.row_stride);
    shared.factor = a.factor;
    if (a.factor) shared.factor.data += a.batch.offset(kFactor, b);
    shared.shift = a.vector_of(a.shift, kShift, b);
    shared.linear = a.vector_of(a.linear, kLinear, b);
    shared.diagonal = a.vector_of(a.diagonal, kDiagonal, b);
    shared.grad_x = {grad_x.data + a.batch.offset(kResult, b) + first_row * grad_x.row_stride +
                         first_element * grad_x.column_stride,
                     grad_x.row_stride, grad_x.column_stride};
    shared.first_element = static_cast<int>(first_element);
    shared.elements = static_cast<int>(d - first_element < kColumns ? d - first_element : kColumns);
    shared.by_vectors = walk::is_vector(shared.grad_x, shared.elements);
  }

  SUBQUAD_DEVICE void copy(int chunk, int of_grad, shared_memory& shared) const {
    typename shared_memory::stage& to = shared.stages[chunk % 2];
    const bool is_grad = chunk < of_grad;
    const int k = (is_grad ? chunk : chunk - of_grad) * kChunk;
    if (is_grad) {
      stage_rows<T, tile::kRows, kChunk, tile::kStride, kThreads>(to.rows, shared.grad, 0, k);
      if (antithetic) {
        stage_rows<T, tile::kRows, kChunk, tile::kStride, kThreads>(to.rows + kRowsSize,
                                                                    shared.second_half, 0, k);
      }
    }
    stage_rows<T, kChunk, kColumns, kColumnStride, kThreads>(
        to.columns, is_grad ? shared.projection : shared.form, k, shared.first_element);
  }

  // Makes h of a chunk of gradients, and adds them to the thread's share of their sum.
  SUBQUAD_DEVICE T pass_over(typename shared_memory::stage& stage, T total) const {
    constexpr int kOfThread = kChunk / kPerRow;
    T* at = stage.rows + static_cast<int>(threadIdx.x) / kPerRow * tile::kStride +
            static_cast<int>(threadIdx.x) % kPerRow * kOfThread;
    SUBQUAD_UNROLL
    for (int k = 0; k < kOfThread; k += kVector) {
      pack<T, kVector> first = *reinterpret_cast<const pack<T, kVector>*>(at + k);
      if (antithetic) {
        const auto second = *reinterpret_cast<const pack<T, kVector>*>(at + kRowsSize + k);
        SUBQUAD_UNROLL
        for (int e = 0; e < kVector; ++e) {
          total += first.values[e] + second.values[e];
          first.values[e] -= second.values[e];
        }
        store(at + k, first);
      } else {
        SUBQUAD_UNROLL
        for (int e = 0; e < kVector; ++e) total += first.values[e];
      }
    }
    return total;
  }

  static SUBQUAD_DEVICE T total_of_row(T total) {
    SUBQUAD_UNROLL
    for (int flip = 1; flip < kPerRow; flip *= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, flip);
    }
    return total;
  }

  static SUBQUAD_DEVICE T z_of(int row, int t, const shared_memory& shared) {
    const T value = shared.x(row, t);
    return shared.shift ? value - shared.shift[t] : value;
  }

  // Rows -g z of a chunk of the form.
  SUBQUAD_DEVICE void scale_rows(typename shared_memory::stage& stage, int first, T total,
                                 const shared_memory& shared) const {
    const int row = static_cast<int>(threadIdx.x) / kPerRow;
    T* to = stage.rows + row * tile::kStride;
    const bool exists = row < shared.grad.count;
    SUBQUAD_NO_UNROLL
    for (int k = static_cast<int>(threadIdx.x) % kPerRow; k < kChunk; k += kPerRow) {
      to[k] =
          exists && first + k < shared.form.depth ? -total * z_of(row, first + k, shared) : T(0);
    }
  }

  static SUBQUAD_DEVICE void multiply(const typename shared_memory::stage& from,
                                      typename tile::accumulators& products) {
    const int lane = tile::lane();
    const T* rows =
        from.rows + tile::warp_down() * tile::kTilesDown * tile::warp::kRows * tile::kStride;
    const T* columns = from.columns + tile::warp_across() * tile::kTilesAcross * 8;
    multiply_chunk<tile>(
        products,
        [&](typename tile::warp::left& a, int i, int k) {
          tile::warp::load(a, rows + i * tile::kStride + k, tile::kStride, lane);
        },
        [&](typename tile::warp::right& b, int j, int k) {
          make_right(b, lane, [&](int column, int part) {
            return columns[(k + part) * kColumnStride + j + column];
          });
        });
  }

  SUBQUAD_DEVICE void write(typename tile::accumulators& products, shared_memory& shared) const {
    walk::visit(products, shared.stages[0].rows, shared.by_vectors,
                shared.grad_x.row_stride == 1 && shared.grad_x.column_stride != 1,
                [&](auto width, int row, int column, const T* values) {
                  constexpr int kWidth = decltype(width)::value;
                  if (row >= shared.grad.count || column >= shared.elements) return;
                  pack<T, kWidth> result;
                  bool is_settled = true;
                  SUBQUAD_UNROLL
                  for (int e = 0; e < kWidth; ++e) {
                    const int t = shared.first_element + column + e;
                    // What is absent must not meet infinities.
                    const T value =
                        shared.linear || shared.diagonal
                            ? fma(shared.totals[row], rest_of(row, t, shared), values[e])
                            : values[e];
                    is_settled = is_settled && isfinite(value);
                    result.values[e] = value;
                  }
                  if (!is_settled) shared.is_unsettled[row] = 1;
                  store(&shared.grad_x(row, column), result);
                });
  }

  // linear - diagonal z
  static SUBQUAD_DEVICE T rest_of(int row, int t, const shared_memory& shared) {
    const T rest = shared.linear ? shared.linear[t] : T(0);
    return shared.diagonal ? fma(-shared.diagonal[t], z_of(row, t, shared), rest) : rest;
  }

  // Writes the block's elements of a row from plain arithmetic.
  SUBQUAD_DEVICE void settle(int row, shared_memory& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int t = shared.first_element + thread;
    const bool counts = thread < shared.elements;
    T total = 0;
    T sum = 0;
    for (int j = 0; counts && j < shared.grad.depth; ++j) {
      T share = shared.grad.matrix(row, j);
      total += share;
      if (antithetic) {
        total += shared.second_half.matrix(row, j);
        share -= shared.second_half.matrix(row, j);
      }
      sum = fma(share, shared.projection.matrix(j, t), sum);
    }
    T rest = counts ? rest_of(row, t, shared) : T(0);
    const int rank = shared.form.depth > 0 ? static_cast<int>(arguments.size.r) : 0;
    for (int first = 0; first < rank; first += kThreads) {
      const int of_round = rank - first < kThreads ? rank - first : kThreads;
      __syncthreads();
      T product = 0;
      for (int s = 0; thread < of_round && s < shared.form.depth; ++s) {
        product = fma(shared.factor(first + thread, s), z_of(row, s, shared), product);
      }
      shared.settled[thread] = product;
      __syncthreads();
      for (int k = 0; counts && k < of_round; ++k) {
        rest = fma(-shared.factor(first + k, t), shared.settled[k], rest);
      }
    }
    if (!counts) return;
    const bool has_rest = shared.linear || shared.diagonal || rank > 0;
    shared.grad_x(row, thread) = has_rest ? fma(total, rest, sum) : sum;
  }
};

// How many entries of the batch are computed at a time, so that their forms take at most kFormBytes
// unless one takes more: a function of the shapes alone.
struct form_cut {
  static constexpr std::int64_t kFormBytes = std::int64_t{8} << 20;
  std::int64_t stride;   // elements between rows, of whole vectors
  std::int64_t entries;  // 0 where there is no factor

  form_cut(std::int64_t batch, std::int64_t d, std::int64_t r, std::int64_t itemsize)
      : stride(divide_up(d * itemsize, 16) * 16 / itemsize), entries(0) {
    if (d * r == 0) return;
    entries = std::clamp<std::int64_t>(kFormBytes / (d * stride * itemsize), 1,
                                       std::max<std::int64_t>(1, batch));
  }
};

template <class T>
T* take_forms(workspace_layout& workspace, const form_cut& cut, std::int64_t d) {
  return workspace.take<T>(cut.entries * d * cut.stride);
}

template <class T>
void log_features_vjp_as(const feature_map& map, const array_view& grad, bool antithetic,
                         const array_view& grad_x, const array_view& workspace) {
  using kernel = features_vjp_kernel<T>;
  const feature_sizes& size = map.size;
  const form_cut cut(size.batch, size.d, size.r, sizeof(T));
  workspace_layout pieces(workspace);
  T* form = take_forms<T>(pieces, cut, size.d);
  const feature_arguments<T> arguments(map, grad, 2, grad_x);
  bool is_one = true;
  for (int i = 0; i < arguments.batch.rank; ++i) {
    is_one = is_one && arguments.batch.strides[kFactor][i] == 0;
  }
  const std::int64_t step = cut.entries == 0 || is_one ? size.batch : cut.entries;
  const std::int64_t row_tiles = divide_up(size.n, kernel::tile::kRows);
  const std::int64_t blocks_across = divide_up(size.d, kernel::kColumns);
  for (std::int64_t first = 0; first < size.batch; first += step) {
    const std::int64_t entries = std::min(step, size.batch - first);
    if (cut.entries > 0) {
      const std::int64_t forms = is_one ? 1 : entries;
      launch(divide_up(forms * size.d * size.d, form_kernel<T>::kThreads),
             form_kernel<T>{arguments.factor, arguments.batch, first, forms, size.d, size.r, form,
                            cut.stride});
    }
    launch(entries * row_tiles * blocks_across,
           kernel{arguments, map.x.type, matrix_at<const T>(grad, 0), matrix_at<T>(grad_x, 0),
                  antithetic, first, row_tiles, blocks_across, cut.entries > 0 ? form : nullptr,
                  cut.stride, is_one ? 0 : size.d * cut.stride});
  }
}

template <class T>
std::size_t vjp_workspace_as(std::int64_t batch, std::int64_t d, std::int64_t r) {
  workspace_layout workspace;
  take_forms<T>(workspace, form_cut(batch, d, r, sizeof(T)), d);
  return workspace.size();
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

// At most kFormBytes, unless those of one entry of the batch take more.
std::size_t log_features_vjp_workspace(std::int64_t batch, std::int64_t, std::int64_t,
                                       std::int64_t d, std::int64_t r, std::int64_t itemsize) {
  return (itemsize == 8 ? cuda::vjp_workspace_as<double> : cuda::vjp_workspace_as<float>)(batch, d,
                                                                                          r);
}

void log_features_vjp(const array_view& grad, const array_view& x, const array_view& projection,
                      const array_view* diagonal, const array_view* factor, const array_view* shift,
                      const array_view* linear, bool antithetic, const array_view& grad_x,
                      const array_view& workspace) {
  const feature_map map = check_log_features_vjp(grad, x, projection, diagonal, factor, shift,
                                                 linear, antithetic, grad_x);
  if (map.size.batch * map.size.n * map.size.d == 0) return;
  (x.type == dtype::float64
       ? cuda::log_features_vjp_as<double>
       : cuda::log_features_vjp_as<float>)(map, grad, antithetic, grad_x, workspace);
}

}  // namespace subquad::core
