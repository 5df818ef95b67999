// Products of a sparse matrix in compressed rows with a dense one, and their reverse.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "csr_rows.cuh"

namespace subquad::cuda {
namespace {

enum product_array { kProductX, kAddend, kProductOut, kProductArrays };

// out_i = scale sum_e data_e x_(indices_e) + addend_i, sums as of csr_row_sums: with p elements in
// a row the error is at most (p + 1) u |scale| sum_e |data_e x_e| + u |out|, u = 2^-24 or 2^-53.
template <class T, class Index>
struct csr_product_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 3;
  using row_sums = csr_row_sums<T, Index, kThreads>;
  using block = typename row_sums::block;
  struct shared_memory {
    std::int64_t offsets[kProductArrays];
    std::int64_t starts[kThreads + 1];  // of the block's rows
    typename row_sums::of_warps sums;
  };

  row_sums elements;
  channel_view<const T> x;
  channel_view<const T> addend;  // optional
  channel_view<T> out;
  batches<kProductArrays> batch;
  std::int64_t tiles;
  T scale;
  int parts;  // of the channels, each lanes * kWidth of them

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int rows_of_block = elements.rows_at_a_time();
    const auto block_index = static_cast<std::int64_t>(blockIdx.x);
    const std::int64_t b = block_index / parts / tiles;
    const std::int64_t first_row = block_index / parts % tiles * rows_of_block;
    const std::int64_t left = elements.matrix.rows - first_row;
    const int rows = left < rows_of_block ? static_cast<int>(left) : rows_of_block;
    if (thread < kProductArrays) shared.offsets[thread] = batch.offset(thread, b);
    for (int i = thread; i <= rows; i += kThreads) {
      shared.starts[i] = elements.matrix.start(first_row + i);
    }
    __syncthreads();
    const int first_channel =
        static_cast<int>(block_index % parts) * elements.lanes * row_sums::kWidth;
    elements.run(x.from(shared.offsets[kProductX]), shared.starts, rows, first_channel, shared.sums,
                 [&](const block& total, int row, int channel) {
                   finish(total, first_row + row, channel, shared);
                 });
  }

  SUBQUAD_DEVICE void finish(const block& total, std::int64_t row, int channel,
                             const shared_memory& shared) const {
    block result;
    block more = block::zero();
    if (addend) addend.from(shared.offsets[kAddend]).load(more, row, channel, elements.d);
    SUBQUAD_UNROLL
    for (int c = 0; c < row_sums::kWidth; ++c) {
      result.values[c] =
          addend ? fma(scale, total.values[c], more.values[c]) : scale * total.values[c];
    }
    out.from(shared.offsets[kProductOut]).store(result, row, channel, elements.d);
  }
};

template <class T, class Index>
void csr_product_as(const csr_call& call, const array_view& data, const array_view& indices,
                    const array_view& indptr, const array_view& x, const array_view* addend,
                    double scale, const array_view& out) {
  using kernel = csr_product_kernel<T, Index>;
  constexpr int kWidth = kernel::row_sums::kWidth;
  const csr_sizes& size = call.size;
  if (size.d == 0) return;
  const typename kernel::row_sums elements(size, data, indices, indptr);
  const auto batch = batches_of<kProductArrays>(call.shape, {{&x, 2}, {addend, 2}, {&out, 2}});
  const std::int64_t tiles = divide_up(size.rows, elements.rows_at_a_time());
  const auto parts = static_cast<int>(divide_up(size.d, std::int64_t{elements.lanes} * kWidth));
  launch(size.batch * tiles * parts,
         kernel{elements, channels_of<const T>(&x, batch, kProductX, kWidth),
                channels_of<const T>(addend, batch, kAddend, kWidth),
                channels_of<T>(&out, batch, kProductOut, kWidth), batch, tiles,
                static_cast<T>(scale), parts});
}

enum csr_dots_array { kDotsGrad, kDotsX, kDotsArrays };

// grad_data_e = sum over batches of grad_i . x_(indices_e), i the row of e; 0 where an index is out
// of range. An element is of `lanes` neighbouring lanes, of which each sums up kChannels channels
// at a time of all batches in their order; lanes are added by halves. The error is at most
// B d u sum |grad x|, u = 2^-24 or 2^-53.
template <class T, class Index>
struct csr_dots_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  static constexpr int kTurns = 8;  // elements of a lane
  static constexpr int kWidth = kChannels<T>;
  using block = channels<T, kWidth>;
  struct shared_memory {
    std::int64_t rows[kThreads];  // of the block's elements, -1: none
    std::int64_t columns[kThreads];
    std::int64_t offsets[kDotsArrays];
    T dots[kThreads];
  };

  csr_rows<Index> matrix;
  channel_view<const T> grad;
  channel_view<const T> x;
  vector_view<T> grad_data;
  batches<kDotsArrays> batch;
  std::int64_t n_batches;
  int d;
  int lanes;

  // At most one to a thread, whose row that thread finds.
  static int elements_of_block(int lanes) { return kThreads / lanes * std::min(kTurns, lanes); }

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int turns = lanes < kTurns ? lanes : kTurns;
    const int elements = kThreads / lanes * turns;
    const std::int64_t own = static_cast<std::int64_t>(blockIdx.x) * elements + thread;
    const bool exists = thread < elements && own < matrix.nnz;
    shared.columns[thread] = exists ? matrix.column(own) : -1;
    shared.rows[thread] = exists ? row_of(own) : -1;
    const int lane = thread % lanes;
    T dots[kTurns];
    SUBQUAD_UNROLL
    for (auto& dot : dots) dot = T(0);
    for (std::int64_t b = 0; b < n_batches; ++b) {
      __syncthreads();
      if (thread < kDotsArrays) shared.offsets[thread] = batch.offset(thread, b);
      __syncthreads();
      const channel_view<const T> left = grad.from(shared.offsets[kDotsGrad]);
      const channel_view<const T> right = x.from(shared.offsets[kDotsX]);
      SUBQUAD_UNROLL
      for (int turn = 0; turn < kTurns; ++turn) {
        if (turn >= turns) break;
        const int element = turn * (kThreads / lanes) + thread / lanes;
        if (shared.rows[element] < 0 || shared.columns[element] < 0) continue;
        for (int channel = lane * kWidth; channel < d; channel += lanes * kWidth) {
          block a;
          block c;
          left.load(a, shared.rows[element], channel, d);
          right.load(c, shared.columns[element], channel, d);
          SUBQUAD_UNROLL
          for (int w = 0; w < kWidth; ++w) dots[turn] = fma(a.values[w], c.values[w], dots[turn]);
        }
      }
    }
    SUBQUAD_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      if (turn >= turns) break;
      T dot = dots[turn];
      for (int flip = 1; flip < lanes; flip *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, flip);
      if (lane == 0) shared.dots[turn * (kThreads / lanes) + thread / lanes] = dot;
    }
    __syncthreads();
    if (exists) grad_data[own] = shared.dots[thread];
  }

  // The last row that starts at the element or before it; -1 where it ends before it, too.
  SUBQUAD_DEVICE std::int64_t row_of(std::int64_t element) const {
    std::int64_t below = -1;
    std::int64_t above = matrix.rows;
    while (above - below > 1) {
      const std::int64_t middle = below + (above - below) / 2;
      if (matrix.start(middle) <= element) {
        below = middle;
      } else {
        above = middle;
      }
    }
    return below >= 0 && matrix.start(below + 1) > element ? below : -1;
  }
};

template <class T, class Index>
void csr_product_vjp_as(const csr_call& call, const array_view& grad, const array_view& indices,
                        const array_view& indptr, const array_view& x,
                        const array_view& grad_data) {
  using kernel = csr_dots_kernel<T, Index>;
  const csr_sizes& size = call.size;
  const auto batch = batches_of<kDotsArrays>(call.shape, {{&grad, 2}, {&x, 2}});
  const int lanes = lanes_of_channels(size.d, kernel::kWidth);
  launch(divide_up(size.nnz, kernel::elements_of_block(lanes)),
         kernel{csr_rows<Index>(size, indices, indptr),
                channels_of<const T>(&grad, batch, kDotsGrad, kernel::kWidth),
                channels_of<const T>(&x, batch, kDotsX, kernel::kWidth), vector_at<T>(grad_data, 0),
                batch, size.batch, static_cast<int>(size.d), lanes});
}

void check_channels(std::int64_t d) {
  if (d > kMostLength) {
    throw invalid_argument("x: expected at most 2^30 channels on CUDA, got " + std::to_string(d));
  }
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t csr_product_workspace(std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                  std::int64_t, std::int64_t) {
  return workspace_layout().size();
}

void csr_product(const array_view& data, const array_view& indices, const array_view& indptr,
                 const array_view& x, const array_view* addend, double scale, const array_view& out,
                 const array_view&) {
  const csr_call call = check_csr_product(data, indices, indptr, x, addend, out);
  cuda::check_channels(call.size.d);
  const bool is_float = data.type == dtype::float32;
  const bool is_short = indices.type == dtype::int32;
  (is_float   ? is_short ? cuda::csr_product_as<float, std::int32_t>
                         : cuda::csr_product_as<float, std::int64_t>
   : is_short ? cuda::csr_product_as<double, std::int32_t>
              : cuda::csr_product_as<double, std::int64_t>)(call, data, indices, indptr, x, addend,
                                                            scale, out);
}

std::size_t csr_product_vjp_workspace(std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                      std::int64_t, std::int64_t) {
  return workspace_layout().size();
}

void csr_product_vjp(const array_view& grad, const array_view& indices, const array_view& indptr,
                     const array_view& x, const array_view& grad_data, const array_view&) {
  const csr_call call = check_csr_product_vjp(grad, indices, indptr, x, grad_data);
  cuda::check_channels(call.size.d);
  const bool is_float = grad_data.type == dtype::float32;
  const bool is_short = indices.type == dtype::int32;
  (is_float ? is_short ? cuda::csr_product_vjp_as<float, std::int32_t>
                       : cuda::csr_product_vjp_as<float, std::int64_t>
   : is_short
       ? cuda::csr_product_vjp_as<double, std::int32_t>
       : cuda::csr_product_vjp_as<double, std::int64_t>)(call, grad, indices, indptr, x, grad_data);
}

}  // namespace subquad::core
