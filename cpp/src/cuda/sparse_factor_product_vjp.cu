// The reverse of products of sparse factors.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "factors.cuh"

namespace subquad::cuda {
namespace {

enum dots_array { kGrad, kGradients, kX, kIntermediates, kGradValues, kDotsArrays };

// grad_values_mik = g_mi . v_(m-1)j, j the row of term k of row i, for some neighbouring factors;
// 0 where the term is left out. `lanes` neighbouring lanes have a row: each sums up kChannels
// channels at a time, and they add up what they have by halves, so that d alone determines the
// order. The error is at most d u sum_c |g_ic v_jc|, u = 2^-24 or 2^-53.
template <class T>
struct factor_dots_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  static constexpr int kWidth = kChannels<T>;
  using block = channels<T, kWidth>;
  struct shared_memory {
    std::int64_t offsets[kDotsArrays];
  };

  channel_view<const T> grad;       // of what the last of the factors gave
  channel_view<const T> gradients;  // of v_1, v_2, ...
  channel_view<const T> x;
  channel_view<const T> intermediates;
  std::int64_t gradients_stride;
  std::int64_t intermediates_stride;
  stack_view<T> grad_values;
  batches<kDotsArrays> batch;
  factor_pattern pattern;
  std::int64_t tiles;
  int first_factor;
  int factors;
  int k;
  int d;
  int lanes;  // a power of two

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t matrix = blockIdx.x / tiles;
    if (thread < kDotsArrays) shared.offsets[thread] = batch.offset(thread, matrix / factors);
    __syncthreads();
    const int n = pattern.rows.n;
    const auto of_launch = static_cast<int>(matrix % factors);
    const int m = first_factor + of_launch;
    const int row = static_cast<int>(blockIdx.x % tiles) * (kThreads / lanes) + thread / lanes;
    const int lane = thread % lanes;
    const channel_view<const T> left =
        of_launch == factors - 1
            ? grad.from(shared.offsets[kGrad])
            : gradients.from(shared.offsets[kGradients] + m * gradients_stride);
    const channel_view<const T> right =
        m == 0
            ? x.from(shared.offsets[kX])
            : intermediates.from(shared.offsets[kIntermediates] + (m - 1) * intermediates_stride);
    const row_run run = row < n ? pattern.rows.run_of(row) : row_run{0, 1};
    block own = block::zero();
    if (row < n && lane * kWidth < d) left.load(own, row, lane * kWidth, d);
    T* to = grad_values.data + shared.offsets[kGradValues] + m * grad_values.stride;
    // All lanes of a warp go through all terms: they exchange sums.
    for (int first = 0; first < k; first += lanes) {
      T mine = T(0);
      const int terms = k - first < lanes ? k - first : lanes;
      SUBQUAD_UNROLL_BY(4)
      for (int t = 0; t < terms; ++t) {
        const int other =
            row < n ? pattern.rows.after(row, run, pattern.offsets[std::int64_t{m} * k + first + t])
                    : -1;
        T dot = T(0);
        if (other >= 0) {
          for (int channel = lane * kWidth; channel < d; channel += lanes * kWidth) {
            block a = own;
            block b;
            if (channel >= lanes * kWidth) left.load(a, row, channel, d);
            right.load(b, other, channel, d);
            SUBQUAD_UNROLL
            for (int c = 0; c < kWidth; ++c) dot = fma(a.values[c], b.values[c], dot);
          }
        }
        for (int flip = 1; flip < lanes; flip *= 2) {
          dot += __shfl_xor_sync(0xffffffffu, dot, flip);
        }
        if (t == lane) mine = dot;
      }
      if (row < n && first + lane < k) {
        to[row * grad_values.row_stride + (first + lane) * grad_values.column_stride] = mine;
      }
    }
  }
};

// Of factors first, ..., first + count - 1.
template <class T>
void multiply_dots(const chain_call& call, std::int64_t first, std::int64_t count,
                   const array_view& grad, const array_view* gradients, const array_view& x,
                   const array_view* intermediates, const array_view& grad_values) {
  using kernel = factor_dots_kernel<T>;
  constexpr int kWidth = kernel::kWidth;
  const product_sizes& size = call.size;
  if (size.k == 0) return;
  const auto batch = batches_of<kDotsArrays>(
      call.shape, {{&grad, 2}, {gradients, 3}, {&x, 2}, {intermediates, 3}, {&grad_values, 3}});
  const auto stride = [](const array_view* stack) {
    return stack ? stack->strides[stack->ndim - 3] : 0;
  };
  kernel dots{};
  dots.grad = channels_of<const T>(&grad, batch, kGrad, kWidth);
  dots.gradients = channels_of<const T>(gradients, batch, kGradients, kWidth, 1);
  dots.x = channels_of<const T>(&x, batch, kX, kWidth);
  dots.intermediates = channels_of<const T>(intermediates, batch, kIntermediates, kWidth, 1);
  dots.gradients_stride = stride(gradients);
  dots.intermediates_stride = stride(intermediates);
  dots.grad_values = stack_at<T>(grad_values, 0);
  dots.batch = batch;
  dots.pattern = call.pattern;
  dots.first_factor = static_cast<int>(first);
  dots.factors = static_cast<int>(count);
  dots.k = static_cast<int>(size.k);
  dots.d = static_cast<int>(size.d);
  dots.lanes = lanes_of_channels(size.d, kWidth);
  dots.tiles = divide_up(size.n, kernel::kThreads / dots.lanes);
  launch(size.batch * count * dots.tiles, dots);
}

// Where the factors are applied in one launch, the gradients between them are kept.
struct vjp_layout {
  chain_memory chain;
  char* intermediates;
  char* gradients;

  vjp_layout(workspace_layout& workspace, const product_sizes& size, std::int64_t itemsize,
             bool recompute)
      : chain(workspace, size, itemsize) {
    const std::int64_t bytes =
        std::max<std::int64_t>(size.n_factors - 1, 0) * size.batch * size.n * size.d * itemsize;
    intermediates = workspace.take<char>(recompute ? bytes : 0);
    gradients = workspace.take<char>(
        bytes_of_fused_row(size, itemsize, kMostSharedMemory) != 0 ? bytes : 0);
  }
};

template <class T>
void sparse_factor_product_vjp_as(const chain_call& call, const vjp_layout& memory,
                                  const array_view& grad, const array_view& x,
                                  residual_type residual, const array_view* intermediates,
                                  const array_view* grad_values, const array_view* grad_x) {
  const product_sizes& size = call.size;
  if (size.batch == 0 || size.n == 0) return;
  if (grad_values == nullptr || size.n_factors == 0) {
    if (grad_x) multiply_chain<T>(call, grad, residual, true, grad_x, nullptr);
    return;
  }
  const std::int64_t between = size.n_factors - 1;
  const contiguous_array computed(call.shape, {between, size.n, size.d},
                                  reinterpret_cast<T*>(memory.intermediates));
  if (intermediates == nullptr && between > 0) {
    intermediates = &computed.view();
    multiply_chain<T>(call, x, residual, false, nullptr, intermediates);
  }
  if (size.d == 0) {
    multiply_dots<T>(call, 0, size.n_factors, grad, nullptr, x, nullptr, *grad_values);
  } else if (bytes_of_fused_row(size, sizeof(T), most_shared_memory()) > 0) {
    const contiguous_array gradients(call.shape, {between, size.n, size.d},
                                     reinterpret_cast<T*>(memory.gradients));
    multiply_chain<T>(call, grad, residual, true, grad_x, &gradients.view());
    multiply_dots<T>(call, 0, size.n_factors, grad, &gradients.view(), x, intermediates,
                     *grad_values);
  } else {
    multiply_chain<T>(call, grad, residual, true, grad_x, nullptr,
                      [&](std::int64_t m, const array_view& from) {
                        multiply_dots<T>(call, m, 1, from, nullptr, x, intermediates, *grad_values);
                      });
  }
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t sparse_factor_product_vjp_workspace(std::int64_t batch, std::int64_t n_factors,
                                                std::int64_t n, std::int64_t k, std::int64_t d,
                                                std::int64_t itemsize, bool recompute) {
  workspace_layout workspace;
  cuda::vjp_layout(workspace, {batch, n_factors, n, k, d}, itemsize, recompute);
  return workspace.size();
}

void sparse_factor_product_vjp(const array_view& grad, const array_view& values,
                               const array_view& x, const array_view* segments,
                               const array_view* intermediates, const std::int64_t* offsets,
                               residual_type residual, bool circular, const array_view* grad_values,
                               const array_view* grad_x, const array_view& workspace) {
  const factor_chain chain = check_sparse_factor_product_vjp(
      grad, values, x, segments, intermediates, offsets, grad_values, grad_x);
  workspace_layout pieces(workspace);
  const bool is_float = values.type == dtype::float32;
  const bool recompute = intermediates == nullptr && grad_values != nullptr;
  const cuda::vjp_layout memory(pieces, chain.size, is_float ? 4 : 8, recompute);
  const cuda::chain_call call(chain, values, segments, offsets, circular, memory.chain);
  (is_float ? cuda::sparse_factor_product_vjp_as<float>
            : cuda::sparse_factor_product_vjp_as<double>)(call, memory, grad, x, residual,
                                                          intermediates, grad_values, grad_x);
}

}  // namespace subquad::core
