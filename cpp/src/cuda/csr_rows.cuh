// Sums over the rows of a sparse matrix in compressed rows, by the threads of a block.
#ifndef SUBQUAD_CUDA_CSR_ROWS_CUH
#define SUBQUAD_CUDA_CSR_ROWS_CUH

#include <cstddef>
#include <cstdint>

#include "factors.cuh"

namespace subquad::cuda {

// Where the elements of a matrix's rows lie. What an index out of range would lead to is left out.
template <class Index>
struct csr_rows {
  vector_view<const Index> indices;
  vector_view<const Index> indptr;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t nnz;

  // None.
  csr_rows() : indices{}, indptr{}, rows(0), columns(0), nnz(0) {}
  csr_rows(const csr_sizes& size, const array_view& index_array, const array_view& starts)
      : indices(vector_at<const Index>(index_array, 0)),
        indptr(vector_at<const Index>(starts, 0)),
        rows(size.rows),
        columns(size.columns),
        nnz(size.nnz) {}

  SUBQUAD_DEVICE std::int64_t start(std::int64_t row) const {
    const std::int64_t at = indptr[row];
    return at < 0 ? 0 : at > nnz ? nnz : at;
  }
  SUBQUAD_DEVICE std::int64_t column(std::int64_t element) const {
    const std::int64_t at = indices[element];
    return at >= 0 && at < columns ? at : -1;
  }
};

// sum_e data_e x_(indices_e) over rows of a matrix. A row is of `lanes` * `slots` neighbouring
// lanes: kChannels channels to a lane, and every slots-th element of the row; the slots' sums are
// added by halves. A row of more than kLong elements is a whole block's: its warps' sums are added
// in their order. Shapes and the matrix determine the order of all sums; with p elements in a row
// the error is at most p u sum_e |data_e x_e|, u = 2^-24 or 2^-53.
template <class T, class Index, int kThreads>
struct csr_row_sums {
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kWidth = kChannels<T>;
  static constexpr int kElements = 4;  // whose loads are under way at a time
  static constexpr std::int64_t kLong = 512;
  using block = channels<T, kWidth>;
  using of_warps = block[kWarps][kWarp];

  csr_rows<Index> matrix;
  vector_view<const T> data;
  int d;
  int lanes;
  int slots;

  // Of no matrix.
  explicit csr_row_sums(std::int64_t channels_of_row)
      : data{},
        d(static_cast<int>(channels_of_row)),
        lanes(lanes_of_channels(channels_of_row, kWidth)),
        slots(1) {}
  csr_row_sums(const csr_sizes& size, const array_view& data_array, const array_view& indices,
               const array_view& indptr)
      : matrix(size, indices, indptr),
        data(vector_at<const T>(data_array, 0)),
        d(static_cast<int>(size.d)),
        lanes(lanes_of_channels(size.d, kWidth)),
        slots(1) {
    // As many elements at a time as rows have, in the mean.
    while (lanes * slots < kWarp && slots * size.rows < size.nnz) slots *= 2;
  }

  SUBQUAD_HOST_DEVICE explicit operator bool() const { return data.data != nullptr; }
  SUBQUAD_HOST_DEVICE int rows_at_a_time() const { return kThreads / (lanes * slots); }

  // Calls store(sum, row, channel) for each row below `rows`, of the elements from starts[row] to
  // starts[row + 1] - 1, and every kWidth-th of lanes * kWidth channels from first_channel on,
  // those below d. All threads of the block call it, after a barrier; `sums` is for its own use.
  template <class Store>
  SUBQUAD_DEVICE void run(const channel_view<const T>& x, const std::int64_t* starts, int rows,
                          int first_channel, of_warps& sums, Store&& store) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int channel = first_channel + thread % lanes * kWidth;
    bool is_long = false;
    for (int row = thread; row < rows; row += kThreads) {
      is_long |= starts[row + 1] - starts[row] > kLong;
    }
    const bool any_long = __syncthreads_or(is_long) != 0;
    const int turns = (rows + rows_at_a_time() - 1) / rows_at_a_time();
    // At first all rows but the long ones, then these one by one, in one piece of code.
    SUBQUAD_NO_UNROLL
    for (int turn = 0; turn < (any_long ? turns + rows : turns); ++turn) {
      const bool is_whole = turn >= turns;
      const int own = is_whole ? turn - turns : turn * rows_at_a_time() + thread / (lanes * slots);
      const std::int64_t start = own < rows ? starts[own] : 0;
      const std::int64_t end = own < rows ? starts[own + 1] : 0;
      const bool exists = own < rows && is_whole == (end - start > kLong);
      if (is_whole && !exists) continue;
      const int slot = thread / lanes % (is_whole ? kThreads : slots);
      block total = block::zero();
      if (exists && channel < d) {
        add_elements(total, x, start + slot, end, is_whole ? kThreads / lanes : slots, channel);
      }
      add_lanes(total, is_whole ? kWarp / lanes : slots);
      if (is_whole) {
        __syncthreads();
        sums[thread / kWarp][thread % kWarp] = total;
        __syncthreads();
        for (int warp = 1; warp < kWarps; ++warp) total.add(sums[warp][thread % lanes]);
      }
      if (exists && slot == 0 && channel < d) store(total, own, channel);
    }
  }

 private:
  SUBQUAD_DEVICE void add_elements(block& total, const channel_view<const T>& from,
                                   std::int64_t start, std::int64_t end, int step,
                                   int channel) const {
    for (std::int64_t first = start; first < end; first += kElements * step) {
      std::int64_t columns[kElements];
      T factors[kElements];
      block terms[kElements];
      SUBQUAD_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const std::int64_t at = first + e * step;
        columns[e] = at < end ? matrix.column(at) : -1;
        if (columns[e] >= 0) factors[e] = data[at];
      }
      SUBQUAD_UNROLL
      for (int e = 0; e < kElements; ++e) {
        if (columns[e] >= 0) from.load(terms[e], columns[e], channel, d);
      }
      SUBQUAD_UNROLL
      for (int e = 0; e < kElements; ++e) {
        if (columns[e] >= 0) total.add(factors[e], terms[e]);
      }
    }
  }

  // The sum over `count` lanes that have the same channels, to all of them.
  SUBQUAD_DEVICE void add_lanes(block& total, int count) const {
    for (int flip = lanes; flip < lanes * count; flip *= 2) {
      SUBQUAD_UNROLL
      for (int c = 0; c < kWidth; ++c) {
        total.values[c] += __shfl_xor_sync(0xffffffffu, total.values[c], flip);
      }
    }
  }
};

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_CSR_ROWS_CUH
