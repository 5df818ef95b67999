// What products of sparse factors and of sparse matrices share: channels that a thread holds, and
// where the rows of a factor's terms lie.
#ifndef SUBQUAD_CUDA_FACTORS_CUH
#define SUBQUAD_CUDA_FACTORS_CUH

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <type_traits>

#include "arguments.hpp"
#include "batches.cuh"
#include "device.cuh"
#include "factors_checks.hpp"
#include "launch.cuh"

namespace subquad::cuda {

// ---- channels ----------------------------------------------------------------------------------

// What one load takes: neighbouring channels of a row.
template <class T>
inline constexpr int kChannels = 16 / static_cast<int>(sizeof(T));

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) channels {
  T values[kWidth];

  static SUBQUAD_DEVICE channels zero() {
    channels all;
    SUBQUAD_UNROLL
    for (int c = 0; c < kWidth; ++c) all.values[c] = T(0);
    return all;
  }
  SUBQUAD_DEVICE void add(const channels& other) {
    SUBQUAD_UNROLL
    for (int c = 0; c < kWidth; ++c) values[c] += other.values[c];
  }
  SUBQUAD_DEVICE void add(T factor, const channels& other) {
    SUBQUAD_UNROLL
    for (int c = 0; c < kWidth; ++c) values[c] = fma(factor, other.values[c], values[c]);
  }
};

// The channels that lie at `at`, which is aligned to all of them: the host would not tell.
template <int kWidth, class T>
SUBQUAD_DEVICE auto* channels_at(T* at) {
  using block = channels<std::remove_const_t<T>, kWidth>;
#if !defined(__CUDACC__)
  if (reinterpret_cast<std::uintptr_t>(at) % alignof(block) != 0) {
    throw on_host::executor_error("takes channels that are not aligned");
  }
#endif
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const block, block>*>(at);
}

// A matrix of which threads take kWidth channels of a row at a time; null where it is absent.
template <class T>
struct channel_view {
  matrix_view<T> matrix;
  bool by_vectors;

  SUBQUAD_DEVICE explicit operator bool() const { return matrix.data != nullptr; }
  SUBQUAD_DEVICE channel_view from(std::int64_t offset) const {
    return {
        {matrix.data ? matrix.data + offset : matrix.data, matrix.row_stride, matrix.column_stride},
        by_vectors};
  }

  // Channels first, first + 1, ... of a row, those from d on as zeros.
  template <int kWidth, class Value>
  SUBQUAD_DEVICE void load(channels<Value, kWidth>& to, std::int64_t row, int first, int d) const {
    const Value* at = matrix.data + row * matrix.row_stride;
    if (by_vectors) {
      to = *channels_at<kWidth>(at + first);
      return;
    }
    SUBQUAD_UNROLL
    for (int c = 0; c < kWidth; ++c) {
      to.values[c] = first + c < d ? at[(first + c) * matrix.column_stride] : Value(0);
    }
  }
  template <int kWidth>
  SUBQUAD_DEVICE void store(const channels<T, kWidth>& values, std::int64_t row, int first,
                            int d) const {
    T* at = matrix.data + row * matrix.row_stride;
    if (by_vectors) {
      *channels_at<kWidth>(at + first) = values;
      return;
    }
    SUBQUAD_UNROLL
    for (int c = 0; c < kWidth; ++c) {
      if (first + c < d) at[(first + c) * matrix.column_stride] = values.values[c];
    }
  }
};

// The last two axes of an array that is number `which` of a batch; with further_axes != 0, of a
// stack of such matrices.
template <class T, int kArrays>
channel_view<T> channels_of(const array_view* array, const batches<kArrays>& batch, int which,
                            int width, int further_axes = 0) {
  if (array == nullptr) return {};
  const matrix_view<T> matrix = matrix_at<T>(*array, 0);
  const auto bytes = static_cast<std::uintptr_t>(width) * sizeof(T);
  bool by_vectors = matrix.column_stride == 1 && length_from_end(*array, 1) % width == 0 &&
                    matrix.row_stride % width == 0 &&
                    reinterpret_cast<std::uintptr_t>(matrix.data) % bytes == 0;
  for (int i = 0; i < batch.rank; ++i) by_vectors &= batch.strides[which][i] % width == 0;
  for (int i = 0; i < further_axes; ++i) {
    by_vectors &= array->strides[array->ndim - 3 - i] % width == 0;
  }
  return {matrix, by_vectors};
}

// Lanes that a row's channels are dealt out to: a power of two, as many as have any, or a warp's.
inline int lanes_of_channels(std::int64_t d, int width) {
  int lanes = 1;
  while (lanes < kWarp && std::int64_t{lanes} * width < d) lanes *= 2;
  return lanes;
}

// C-contiguous memory as an array with the batch dimensions of a call.
class contiguous_array {
 public:
  template <class T>
  contiguous_array(const batch_shape& batch, std::initializer_list<std::int64_t> core, T* data)
      : ndim_(batch.rank() + static_cast<std::int32_t>(core.size())) {
    for (std::int32_t i = 0; i < batch.rank(); ++i) {
      shape_[batch.rank() - 1 - i] = batch.length(i);
    }
    std::copy(core.begin(), core.end(), shape_ + batch.rank());
    std::int64_t stride = 1;
    for (std::int32_t axis = ndim_; axis-- > 0;) {
      strides_[axis] = stride;
      stride *= shape_[axis];
    }
    view_ = {data, shape_, strides_, ndim_, subquad::detail::dtype_of<T>::kValue, device_type::cuda,
             0};
  }
  contiguous_array(const contiguous_array&) = delete;
  contiguous_array& operator=(const contiguous_array&) = delete;

  const array_view& view() const { return view_; }

 private:
  std::int32_t ndim_;
  std::int64_t shape_[kMaxDimensions + 3] = {};
  std::int64_t strides_[kMaxDimensions + 3] = {};
  array_view view_{};
};

// One matrix of a stack, the array without its axis -3.
template <class T>
class matrix_of_stack {
 public:
  matrix_of_stack(const array_view& stack, std::int64_t index) : view_(stack) {
    view_.ndim = stack.ndim - 1;
    for (std::int32_t axis = 0; axis < view_.ndim; ++axis) {
      const std::int32_t from = axis < stack.ndim - 3 ? axis : axis + 1;
      shape_[axis] = stack.shape[from];
      strides_[axis] = stack.strides[from];
    }
    view_.data = static_cast<T*>(stack.data) + index * stack.strides[stack.ndim - 3];
    view_.shape = shape_;
    view_.strides = strides_;
  }
  matrix_of_stack(const matrix_of_stack&) = delete;
  matrix_of_stack& operator=(const matrix_of_stack&) = delete;

  const array_view& view() const { return view_; }

 private:
  std::int64_t shape_[kMaxDimensions] = {};
  std::int64_t strides_[kMaxDimensions] = {};
  array_view view_;
};

// ---- rows of terms -----------------------------------------------------------------------------

// The rows of a sequence of their own.
struct row_run {
  int start;
  int length;
};

// Rows, channels, factors and terms are counted in 32 bits.
inline constexpr std::int64_t kMostLength = std::int64_t{1} << 30;

// Which row lies so many rows after another one, in its sequence.
struct factor_rows {
  const row_run* runs;  // of every row; null: all rows are one sequence
  int n;
  bool circular;
  bool backwards;  // before, in place of after

  // All rows are one circle, and offsets below n.
  SUBQUAD_DEVICE bool are_plain() const { return runs == nullptr && circular; }
  SUBQUAD_DEVICE row_run run_of(int row) const { return runs ? runs[row] : row_run{0, n}; }

  // -1 where there is none.
  SUBQUAD_DEVICE int after(int row, const row_run& run, std::int64_t offset) const {
    if (are_plain()) {
      const auto length = static_cast<unsigned>(n);
      const auto by = static_cast<unsigned>(offset);
      const auto place = static_cast<unsigned>(row) + (backwards ? length - by : by);
      // The smaller one of two, of which one is beyond the rows.
      const unsigned wrapped = place - length;
      return static_cast<int>(place < wrapped ? place : wrapped);
    }
    int by;
    if (offset > -run.length && offset < run.length) {
      by = static_cast<int>(offset);
    } else if (!circular) {
      return -1;
    } else if (offset == static_cast<int>(offset)) {
      by = static_cast<int>(offset) % run.length;
    } else {
      by = static_cast<int>(offset % run.length);
    }
    const int place = row - run.start + (backwards ? -by : by);
    if (place >= 0 && place < run.length) return run.start + place;
    if (!circular) return -1;
    return run.start + (place < 0 ? place + run.length : place - run.length);
  }
};

inline constexpr int kOffsetsOfLaunch = 256;

// The offsets of all factors: the launch's own where they are few.
struct offset_table {
  const std::int64_t* memory;
  std::int64_t values[kOffsetsOfLaunch];

  SUBQUAD_DEVICE std::int64_t operator[](std::int64_t index) const {
    return memory ? memory[index] : values[index];
  }
};

// ---- chains ------------------------------------------------------------------------------------

// Where the terms of all factors lie.
struct factor_pattern {
  factor_rows rows;
  offset_table offsets;
};

// What a chain takes of the workspace.
struct chain_memory {
  std::int64_t* offsets;
  std::uint32_t* borders;
  row_run* runs;
  // Of the chain that runs: states on their way from factor to factor, or values in columns.
  char* scratch;

  chain_memory(workspace_layout& workspace, const product_sizes& size, std::int64_t itemsize);
};

struct chain_call {
  const batch_shape& shape;
  product_sizes size;
  const array_view& values;
  factor_pattern pattern;
  chain_memory memory;

  chain_call(const factor_chain& chain, const array_view& all_values, const array_view* segments,
             const std::int64_t* offsets, bool circular, const chain_memory& taken);
};

// Bytes of a row in shared memory where all factors are applied in one launch; 0: one launch each.
int bytes_of_fused_row(const product_sizes& size, std::int64_t itemsize, std::size_t shared_memory);

// What a factor's launch does with the sum of its inputs, for the transpose of residual "input".
enum class chain_part { inner, first, last, only };

// to = W_m from + residual, or with W_m^T. With `sum`: sum = from or sum + from, as it is the first
// factor or a later one, and to = (sum + from) + W_m^T from at the last one. `to` may be `sum`.
// m < 0: to = from.
template <class T>
void multiply_factor(const chain_call& call, std::int64_t m, bool transpose, const array_view& from,
                     const array_view* residual, const array_view* sum, chain_part part,
                     const array_view& to);

// Told of each factor that has a launch of its own, before it, and of what it is applied to.
using factor_visitor = std::function<void(std::int64_t m, const array_view& from)>;

// out, optional, as of sparse_factor_product; `states`, optional, takes what lies between factors:
// v_1 ... v_(M-1), or of the transpose W_M^T x, ..., the last of these first. Without `out`, what
// comes after the last state is not computed.
template <class T>
void multiply_chain(const chain_call& call, const array_view& x, residual_type residual,
                    bool transpose, const array_view* out, const array_view* states,
                    const factor_visitor& visit = {});

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_FACTORS_CUH
