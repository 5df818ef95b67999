// The exact log-normaliser.
#include "batches.cuh"
#include "column_split.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "log_sum_exp.cuh"
#include "normalizers_checks.hpp"
#include "normalizers_core.hpp"
#include "storage.hpp"
#include "tile_product.cuh"

namespace subquad::cuda {
namespace {

enum { kX, kY, kLogWeights, kOut, kArrays };

template <class S>
struct log_normalizer_arguments {
  matrix_view<const S> x;
  matrix_view<const S> y;
  vector_view<const arithmetic_t<S>> log_weights;  // optional
  vector_view<const std::int64_t> excluded;        // optional
  vector_view<arithmetic_t<S>> out;
  batches<kArrays> batch;
  std::int64_t n;
  std::int64_t m;
  std::int64_t depth;
};

// out_i = log sum_j exp(x_i . y_j + log_weights_j) over keys j != excluded_i; or, where keys are
// cut into parts, the state of that sum over the keys of each part, in states[part][batch][n]. One
// block computes a tile of rows against the keys of one part; scores stay in registers.
//
// Nothing aliases. A score is within tile_product's bound; a power of two within 2 ulp; sums over a
// thread's columns of a tile in order, over tiles compensated.
template <class S>
struct log_normalizer_kernel {
  using tile = default_tile_t<S>;
  using sum = arithmetic_t<S>;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kBlocks = sizeof(sum) == 8 ? 1 : 2;  // 64 accumulators, twice as wide
  struct shared_memory {
    typename tile::shared_memory product;
    // The states of the threads' rows, of which each thread touches its own; where a thread's state
    // of a row is, that of the row is in the end.
    log_sum<sum> states[tile::kThreadRows][kThreads];
    sum offsets[2][tile::kColumns];  // log2(e) log_weights of a tile's columns, -inf for none
    int left_out[tile::kRows];       // the column that a row leaves out, -1 for none
    vector_view<const sum> log_weights;
    std::int64_t batch;
    std::int64_t part;
    std::int64_t first_row;
  };

  log_normalizer_arguments<S> arguments;
  std::int64_t row_tiles;
  std::int64_t keys;  // of a part
  std::int64_t parts;
  std::int64_t size;     // of the batch
  log_sum<sum>* states;  // null where there is one part

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    for (int row = static_cast<int>(threadIdx.x); row < tile::kRows; row += kThreads) {
      std::int64_t key = -1;
      if (arguments.excluded && row < shared.product.x.count) {
        key = arguments.excluded[shared.first_row + row] - shared.part * keys;
      }
      shared.left_out[row] = key >= 0 && key < keys ? static_cast<int>(key) : -1;
    }
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      shared.states[r][threadIdx.x] = log_sum<sum>::nothing();
    }
    __syncthreads();
    tile::run(
        shared.product, [&](int first_column) { prepare(first_column, shared); },
        [&](int first_column, typename tile::accumulators& scores) {
          accumulate(first_column, scores, shared);
        });

    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      shared.states[r][threadIdx.x] = merged_over_warp(shared.states[r][threadIdx.x], 8);
    }
    __syncthreads();
    const int n_rows = shared.product.x.count;
    for (int row = static_cast<int>(threadIdx.x); row < n_rows; row += kThreads) {
      log_sum<sum> state = state_of(row, 0, shared);
      for (int warp = 1; warp < tile::kWarpsOfRow; ++warp) state.merge(state_of(row, warp, shared));
      state_of(row, 0, shared) = state;
    }
    __syncthreads();
    if constexpr (tile::warp::kIsSplit) {
      for (int row = 0; row < n_rows; ++row) {
        const sum total = state_of(row, 0, shared).total;
        if (!isnan(total)) continue;
        __syncthreads();
        settle(row, shared);
      }
    }
    for (int row = static_cast<int>(threadIdx.x); row < n_rows; row += kThreads) {
      const log_sum<sum> state = state_of(row, 0, shared);
      const std::int64_t i = shared.first_row + row;
      if (states) {
        states[(shared.part * size + shared.batch) * arguments.n + i] = state;
      } else {
        const vector_view<sum>& out = arguments.out;
        out.data[arguments.batch.offset(kOut, shared.batch) + i * out.stride] = state.value();
      }
    }
  }

  // What the block computes, and where its operands lie.
  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const log_normalizer_arguments<S>& a = arguments;
    std::int64_t index = blockIdx.x;
    shared.part = index % parts;
    index /= parts;
    shared.first_row = index % row_tiles * tile::kRows;
    shared.batch = index / row_tiles;
    const std::int64_t first_key = shared.part * keys;
    const std::int64_t end_row = shared.first_row + tile::kRows;
    const std::int64_t end_key = first_key + keys;
    shared.product.x = rows_between(a.x, a.batch.offset(kX, shared.batch), shared.first_row,
                                    end_row < a.n ? end_row : a.n, a.depth);
    shared.product.y = rows_between(a.y, a.batch.offset(kY, shared.batch), first_key,
                                    end_key < a.m ? end_key : a.m, a.depth);
    shared.log_weights = a.log_weights.from(first_key);
    if (a.log_weights) shared.log_weights.data += a.batch.offset(kLogWeights, shared.batch);
  }

  // A row's state over the columns of one of the warps that share it.
  static SUBQUAD_DEVICE log_sum<sum>& state_of(int row, int warp, shared_memory& shared) {
    int thread;
    int r;
    tile::holder(row, warp, thread, r);
    return shared.states[r][thread];
  }

  SUBQUAD_DEVICE void prepare(int first_column, shared_memory& shared) const {
    for (int c = static_cast<int>(threadIdx.x); c < tile::kColumns; c += kThreads) {
      const int j = first_column + c;
      sum offset = j < shared.product.y.count ? sum(0) : -infinity<sum>();
      if (shared.log_weights && j < shared.product.y.count) {
        offset = shared.log_weights[j] * kLog2E<sum>;
      }
      shared.offsets[tile::parity(first_column)][c] = offset;
    }
  }

  // Adds a tile of scores to the states of the thread's rows.
  SUBQUAD_DEVICE void accumulate(int first_column, typename tile::accumulators& scores,
                                 shared_memory& shared) const {
    const sum* offsets = shared.offsets[tile::parity(first_column)];
    SUBQUAD_UNROLL
    for (int c = 0; c < tile::kThreadColumns; ++c) {
      const sum offset = offsets[tile::column(c)];
      const bool counts = offset != -infinity<sum>();
      SUBQUAD_UNROLL
      for (int r = 0; r < tile::kThreadRows; ++r) {
        sum& score = scores(r, c);
        score = counts ? fma(score, kLog2E<sum>, offset) : -infinity<sum>();
      }
    }
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      const int left_out = shared.left_out[tile::row(r)] - first_column;
      if (left_out >= 0 && left_out < tile::kColumns) {
        SUBQUAD_UNROLL
        for (int c = 0; c < tile::kThreadColumns; ++c) {
          if (tile::column(c) == left_out) scores(r, c) = -infinity<sum>();
        }
      }
      sum largest = scores(r, 0);
      SUBQUAD_UNROLL
      for (int c = 1; c < tile::kThreadColumns; ++c) largest = fmax(largest, scores(r, c));
      log_sum<sum> state = shared.states[r][threadIdx.x];
      state.raise(largest);
      sum total = 0;
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        total += power_of_2(scores(r, c) - state.shift);
      }
      state.add(total);
      shared.states[r][threadIdx.x] = state;
    }
  }

  // The state of a row whose sum is NaN, from plain arithmetic: a score that the split made NaN may
  // be infinite, or finite.
  SUBQUAD_DEVICE void settle(int row, shared_memory& shared) const {
    const rows_of<S>& columns = shared.product.y;
    log_sum<sum> state = log_sum<sum>::nothing();
    for (int j = static_cast<int>(threadIdx.x); j < columns.count; j += kThreads) {
      const sum offset = shared.log_weights ? shared.log_weights[j] : sum(0);
      if (offset == -infinity<sum>() || j == shared.left_out[row]) continue;
      const sum exponent =
          (plain_product(shared.product.x, row, columns, j) + offset) * kLog2E<sum>;
      state.raise(exponent);
      state.add(power_of_2(exponent - state.shift));
    }
    state = merged_over_warp(state, 1);
    for (int turn = 0; turn < kThreads / kWarp; ++turn) {
      if (static_cast<int>(threadIdx.x) == turn * kWarp) {
        if (turn > 0) state.merge(state_of(row, 0, shared));
        state_of(row, 0, shared) = state;
      }
      __syncthreads();
    }
  }
};

// out_i from the states of its parts, merged in order.
template <class T>
struct log_normalizer_finish {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  struct shared_memory {};

  const log_sum<T>* states;  // [part][batch][n]
  std::int64_t parts;
  std::int64_t size;
  std::int64_t n;
  vector_view<T> out;
  batches<kArrays> batch;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= size * n) return;
    log_sum<T> state = states[index];
    for (std::int64_t part = 1; part < parts; ++part) state.merge(states[part * size * n + index]);
    const std::int64_t i = index % n;
    out.data[batch.offset(kOut, index / n) + i * out.stride] = state.value();
  }
};

template <class S>
column_split split_of(std::int64_t batch, std::int64_t n, std::int64_t m) {
  using tile = default_tile_t<S>;
  return column_split(batch, n, m, tile::kRows, tile::kColumns);
}

template <class S>
log_sum<arithmetic_t<S>>* take_states(workspace_layout& workspace, const column_split& cut,
                                      std::int64_t batch, std::int64_t n) {
  return workspace.take<log_sum<arithmetic_t<S>>>(cut.parts > 1 ? cut.parts * batch * n : 0);
}

template <class S>
void log_normalizer_as(const batch_shape& shape, const array_view& x, const array_view& y,
                       const array_view* log_weights, const array_view* excluded,
                       const array_view& out, const array_view& workspace) {
  using sum = arithmetic_t<S>;
  const std::int64_t size = shape.count();
  const std::int64_t n = length_from_end(x, 2);
  const std::int64_t m = length_from_end(y, 2);
  if (size * n == 0) return;
  const column_split cut = split_of<S>(size, n, m);
  workspace_layout pieces(workspace);
  log_sum<sum>* states = take_states<S>(pieces, cut, size, n);
  log_normalizer_arguments<S> arguments{};
  arguments.x = matrix_at<const S>(x, 0);
  arguments.y = matrix_at<const S>(y, 0);
  if (log_weights) arguments.log_weights = vector_at<const sum>(*log_weights, 0);
  if (excluded) arguments.excluded = vector_at<const std::int64_t>(*excluded, 0);
  arguments.out = vector_at<sum>(out, 0);
  arguments.batch = batches_of<kArrays>(shape, {{&x, 2}, {&y, 2}, {log_weights, 1}, {&out, 1}});
  arguments.n = n;
  arguments.m = m;
  arguments.depth = length_from_end(x, 1);
  launch(size * cut.row_tiles * cut.parts,
         log_normalizer_kernel<S>{arguments, cut.row_tiles, cut.columns, cut.parts, size,
                                  cut.parts > 1 ? states : nullptr});
  if (cut.parts == 1) return;
  using finish = log_normalizer_finish<sum>;
  launch(divide_up(size * n, finish::kThreads),
         finish{states, cut.parts, size, n, arguments.out, arguments.batch});
}

template <class S>
std::size_t workspace_as(std::int64_t batch, std::int64_t n, std::int64_t m) {
  workspace_layout workspace;
  take_states<S>(workspace, split_of<S>(batch, n, m), batch, n);
  return workspace.size();
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t log_normalizer_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                     std::int64_t, std::int64_t itemsize) {
  // 16-bit and 32-bit elements are cut alike.
  return itemsize == 8 ? cuda::workspace_as<double>(batch, n, m)
                       : cuda::workspace_as<float>(batch, n, m);
}

void log_normalizer(const array_view& x, const array_view& y, const array_view* log_weights,
                    const array_view* excluded, const array_view& out,
                    const array_view& workspace) {
  const batch_shape shape = check_log_normalizer(x, y, log_weights, excluded, out);
  cuda::for_storage(x.type, [&](auto element) {
    cuda::log_normalizer_as<decltype(element)>(shape, x, y, log_weights, excluded, out, workspace);
  });
}

}  // namespace subquad::core
