// Products of rows, tile by tile, on tensor cores; what follows the product happens on the
// accumulators before they leave registers.
#ifndef SUBQUAD_CUDA_TILE_PRODUCT_CUH
#define SUBQUAD_CUDA_TILE_PRODUCT_CUH

#include <cstdint>

#include "device.cuh"
#include "kernels/matrix_view.hpp"

namespace subquad::cuda {

// How one warp multiplies elements of type S: a fragment of kRows rows by one of 8 columns, over
// kDepth elements. `kPadding` elements after each row of shared memory let the lanes of a warp read
// their fragments from 32 different banks.
template <class S>
struct warp_product;

// Three products in tf32. With x = hi + lo, hi and lo rounded to 11 bits, what is dropped (lo lo
// and the rounding of lo) is at most 3 * 2^-22 |x| |y|. An infinity, or what rounds to one, makes
// lo NaN.
template <>
struct warp_product<float> {
  static constexpr int kRows = 16;
  static constexpr int kDepth = 8;
  static constexpr int kPadding = 4;
  static constexpr bool kIsSplit = true;

  struct left {
    std::uint32_t high[4];
    std::uint32_t low[4];
  };
  struct right {
    std::uint32_t high[2];
    std::uint32_t low[2];
  };
  static SUBQUAD_DEVICE void split(float x, std::uint32_t& high, std::uint32_t& low) {
    high = round_to_tf32(x);
    low = round_to_tf32(x - as_float(high));
  }
  static SUBQUAD_DEVICE void load(left& to, const float* from, int stride, int lane) {
    const float* at = from + lane / 4 * stride + lane % 4;
    split(at[0], to.high[0], to.low[0]);
    split(at[8 * stride], to.high[1], to.low[1]);
    split(at[4], to.high[2], to.low[2]);
    split(at[8 * stride + 4], to.high[3], to.low[3]);
  }
  static SUBQUAD_DEVICE void load(right& to, const float* from, int stride, int lane) {
    const float* at = from + lane / 4 * stride + lane % 4;
    split(at[0], to.high[0], to.low[0]);
    split(at[4], to.high[1], to.low[1]);
  }
  static SUBQUAD_DEVICE void multiply(float (&sum)[4], const left& a, const right& b) {
    mma_tf32(sum, a.low, b.high);
    mma_tf32(sum, a.high, b.low);
    mma_tf32(sum, a.high, b.high);
  }
};

template <class S>
struct warp_product_16 {
  static constexpr int kRows = 16;
  static constexpr int kDepth = 16;
  static constexpr int kPadding = 8;
  static constexpr bool kIsSplit = false;

  struct left {
    std::uint32_t pairs[4];
  };
  struct right {
    std::uint32_t pairs[2];
  };
  static SUBQUAD_DEVICE std::uint32_t pair(const S* at) {
    return *reinterpret_cast<const std::uint32_t*>(at);
  }
  static SUBQUAD_DEVICE void load(left& to, const S* from, int stride, int lane) {
    const S* at = from + lane / 4 * stride + lane % 4 * 2;
    to.pairs[0] = pair(at);
    to.pairs[1] = pair(at + 8 * stride);
    to.pairs[2] = pair(at + 8);
    to.pairs[3] = pair(at + 8 * stride + 8);
  }
  static SUBQUAD_DEVICE void load(right& to, const S* from, int stride, int lane) {
    const S* at = from + lane / 4 * stride + lane % 4 * 2;
    to.pairs[0] = pair(at);
    to.pairs[1] = pair(at + 8);
  }
};

template <>
struct warp_product<float16> : warp_product_16<float16> {
  static SUBQUAD_DEVICE void multiply(float (&sum)[4], const left& a, const right& b) {
    mma_float16(sum, a.pairs, b.pairs);
  }
};

template <>
struct warp_product<bfloat16> : warp_product_16<bfloat16> {
  static SUBQUAD_DEVICE void multiply(float (&sum)[4], const left& a, const right& b) {
    mma_bfloat16(sum, a.pairs, b.pairs);
  }
};

template <>
struct warp_product<double> {
  static constexpr int kRows = 8;
  static constexpr int kDepth = 4;
  static constexpr int kPadding = 4;
  static constexpr bool kIsSplit = false;

  using left = double;
  using right = double;
  static SUBQUAD_DEVICE void load(double& to, const double* from, int stride, int lane) {
    to = from[lane / 4 * stride + lane % 4];
  }
  static SUBQUAD_DEVICE void multiply(double (&sum)[2], const left& a, const right& b) {
    mma_float64(sum, a, b);
  }
};

// Rows 0 .. count - 1 of a matrix, each `depth` long, of which nothing else is read. 32 bits, for
// registers are scarce: a block sees at most 2^30 rows.
template <class S>
struct rows_of {
  matrix_view<const S> matrix;
  int count;
  int depth;

  // Whether rows can be copied 16 bytes at a time.
  SUBQUAD_DEVICE bool is_vector() const {
    constexpr std::int64_t kVector = 16 / sizeof(S);
    return matrix.column_stride == 1 && matrix.row_stride % kVector == 0 &&
           reinterpret_cast<std::uintptr_t>(matrix.data) % 16 == 0;
  }
};

inline constexpr std::int64_t kMostRows = std::int64_t{1} << 30;

// Rows [first, end) of a matrix of `depth` columns that starts `offset` elements after `matrix`.
template <class S>
SUBQUAD_DEVICE rows_of<S> rows_between(const matrix_view<const S>& matrix, std::int64_t offset,
                                       std::int64_t first, std::int64_t end, std::int64_t depth) {
  return {
      {matrix.data + offset + first * matrix.row_stride, matrix.row_stride, matrix.column_stride},
      static_cast<int>(end - first),
      static_cast<int>(depth)};
}

// x_i . y_j in plain arithmetic, in order of k.
template <class S>
SUBQUAD_DEVICE arithmetic_t<S> plain_product(const rows_of<S>& x, int i, const rows_of<S>& y,
                                             int j) {
  arithmetic_t<S> sum = 0;
  for (int k = 0; k < x.depth; ++k) {
    sum = fma(widen(x.matrix(i, k)), widen(y.matrix(j, k)), sum);
  }
  return sum;
}

// Copies rows first + 0 .. kCount - 1, elements k .. k + kDepth - 1, to `to[row * kStride + k]`,
// zeros where there are none, with the kThreads threads of the block. The copies are asynchronous,
// but for 16-bit elements that cannot go as vectors.
template <class S, int kCount, int kDepth, int kStride, int kThreads>
SUBQUAD_DEVICE void stage_rows(S* to, const rows_of<S>& from, int first, int k) {
  const int thread = static_cast<int>(threadIdx.x);
  if (from.is_vector()) {
    constexpr int kVector = 16 / sizeof(S);
    constexpr int kPerRow = kDepth / kVector;
    static_assert(kCount * kPerRow % kThreads == 0 && kThreads % kPerRow == 0);
    const int part = k + thread % kPerRow * kVector;
    const int left = from.depth - part;
    const int bytes = left <= 0 ? 0 : left < kVector ? left * static_cast<int>(sizeof(S)) : 16;
    const int row = thread / kPerRow;
    S* target = to + row * kStride + thread % kPerRow * kVector;
    SUBQUAD_UNROLL
    for (int each = 0; each < kCount * kPerRow / kThreads; ++each) {
      constexpr int kStep = kThreads / kPerRow;
      const int valid = first + row + each * kStep < from.count ? bytes : 0;
      const S* source = from.matrix.data;
      if (valid > 0) source += (first + row + each * kStep) * from.matrix.row_stride + part;
      copy_async<16>(target + each * kStep * kStride, source, valid);
    }
    return;
  }
  // Neighbouring threads read neighbours in memory where the matrix is the transpose of a
  // contiguous one.
  const bool along_rows = from.matrix.row_stride == 1 && from.matrix.column_stride != 1;
  static_assert(kCount * kDepth % kThreads == 0);
  SUBQUAD_NO_UNROLL
  for (int index = thread; index < kCount * kDepth; index += kThreads) {
    const int row = along_rows ? index % kCount : index / kDepth;
    const int part = along_rows ? index / kCount : index % kDepth;
    const bool valid = first + row < from.count && k + part < from.depth;
    const S* source = from.matrix.data;
    if (valid) source = &from.matrix(first + row, k + part);
    S* target = to + row * kStride + part;
    if constexpr (sizeof(S) >= 4) {
      copy_async<sizeof(S)>(target, source, valid ? static_cast<int>(sizeof(S)) : 0);
    } else {
      *target = valid ? *source : S{};
    }
  }
}

// The products of kRows rows of x with the rows of y ("columns"), kColumns at a time, by a block of
// kWarpsDown x kWarpsAcross warps. Each thread holds kThreadRows x kThreadColumns of a tile.
//
// float32: within (9 depth / 8 + 13) 2^-22 sum_k |x_k| |y_k|, underflow aside, on tensor cores that
// add four products at a time and cut them to 25 bits of the largest (compute capability 8.0; later
// ones lose less); the worst numbers known take (depth / 4 + 13) 2^-22. Products with infinities
// may be NaN where plain arithmetic gives an infinity, and users settle a NaN with plain_product.
// Other types: each product exact or rounded once, sums in the order of tensor cores.
template <class S, int kRows_, int kColumns_, int kWarpsDown, int kWarpsAcross>
struct tile_product {
  using element = S;
  using sum = arithmetic_t<S>;
  using warp = warp_product<S>;
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kThreads = kWarp * kWarpsDown * kWarpsAcross;
  static constexpr int kWarpsOfRow = kWarpsAcross;  // that share a row
  static constexpr int kChunk = 128 / static_cast<int>(sizeof(S));
  static constexpr int kStride = kChunk + warp::kPadding;
  static constexpr int kTilesDown = kRows / kWarpsDown / warp::kRows;
  static constexpr int kTilesAcross = kColumns / kWarpsAcross / 8;
  static constexpr int kThreadRows = kTilesDown * warp::kRows / 8;
  static constexpr int kThreadColumns = kTilesAcross * 2;
  static_assert(kTilesDown * warp::kRows * kWarpsDown == kRows);
  static_assert(kTilesAcross * 8 * kWarpsAcross == kColumns);

  struct shared_memory {
    struct alignas(16) stage {
      S rows[kRows * kStride];
      S columns[kColumns * kStride];
    };
    stage stages[2];
    // The operands: in registers they would push the accumulators out.
    rows_of<S> x;
    rows_of<S> y;
  };

  struct accumulators {
    sum values[kTilesDown][kTilesAcross][warp::kRows / 4];

    // Element of the thread's row r and column c; with constant arguments, a register.
    SUBQUAD_DEVICE sum& operator()(int r, int c) {
      constexpr int kPerTile = warp::kRows / 8;
      return values[r / kPerTile][c / 2][r % kPerTile * 2 + c % 2];
    }
  };

  static SUBQUAD_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  static SUBQUAD_DEVICE int warp_down() {
    return static_cast<int>(threadIdx.x) / kWarp / kWarpsAcross;
  }
  static SUBQUAD_DEVICE int warp_across() {
    return static_cast<int>(threadIdx.x) / kWarp % kWarpsAcross;
  }
  // Where in the tile the thread's row r and column c are. The four threads of equal lane / 4, in
  // each of kWarpsOfRow warps, share their rows.
  static SUBQUAD_DEVICE int row(int r) {
    return warp_down() * (kRows / kWarpsDown) + 8 * r + lane() / 4;
  }
  static SUBQUAD_DEVICE int column(int c) {
    return warp_across() * (kColumns / kWarpsAcross) + c / 2 * 8 + lane() % 4 * 2 + c % 2;
  }

  // The first thread that holds `row`, of the warp `across` of those that share it, and which of
  // its rows that is.
  static SUBQUAD_DEVICE void holder(int row, int across, int& thread, int& r) {
    constexpr int kOfWarp = kRows / kWarpsDown;
    thread = (row / kOfWarp * kWarpsAcross + across) * kWarp + row % 8 * 4;
    r = row % kOfWarp / 8;
  }

  // 0 and 1 by turns.
  static SUBQUAD_DEVICE int parity(int first_column) { return first_column / kColumns % 2; }

  static SUBQUAD_DEVICE void clear(accumulators& tile) {
    SUBQUAD_UNROLL
    for (int i = 0; i < kTilesDown; ++i) {
      SUBQUAD_UNROLL
      for (int j = 0; j < kTilesAcross; ++j) {
        SUBQUAD_UNROLL
        for (int v = 0; v < warp::kRows / 4; ++v) tile.values[i][j][v] = 0;
      }
    }
  }

  static SUBQUAD_DEVICE void multiply(const typename shared_memory::stage& from,
                                      accumulators& tile) {
    const S* rows = from.rows + warp_down() * (kRows / kWarpsDown) * kStride;
    const S* columns = from.columns + warp_across() * (kColumns / kWarpsAcross) * kStride;
    // The parts of split operands take the registers that further steps under way would need.
    [[maybe_unused]] constexpr int kSteps = warp::kIsSplit ? 1 : kChunk / warp::kDepth;
    SUBQUAD_UNROLL_BY(kSteps)
    for (int k = 0; k < kChunk; k += warp::kDepth) {
      typename warp::left a[kTilesDown];
      SUBQUAD_UNROLL
      for (int i = 0; i < kTilesDown; ++i) {
        warp::load(a[i], rows + i * warp::kRows * kStride + k, kStride, lane());
      }
      SUBQUAD_UNROLL
      for (int j = 0; j < kTilesAcross; ++j) {
        typename warp::right b;
        warp::load(b, columns + j * 8 * kStride + k, kStride, lane());
        SUBQUAD_UNROLL
        for (int i = 0; i < kTilesDown; ++i) warp::multiply(tile.values[i][j], a[i], b);
      }
    }
  }

  // Calls epilogue(first column, accumulators) for the tiles of columns 0, kColumns, 2 kColumns,
  // ... below shared.y.count, of the operands shared.x and shared.y, which every thread sees. Rows
  // from x.count and columns from y.count on count as zeros; the epilogue may change the
  // accumulators. All threads of the block call it, and it ends in a barrier.
  //
  // prepare(first column) is called before, by all threads: what it writes to shared memory every
  // thread sees in the epilogue of the same column, if it spares what it wrote the time before (see
  // `parity`).
  template <class Prepare, class Epilogue>
  static SUBQUAD_DEVICE void run(shared_memory& shared, Prepare&& prepare, Epilogue&& epilogue) {
    const int depth = shared.x.depth;
    const int n_columns = shared.y.count;
    accumulators tile;
    clear(tile);
    // A step copies the next chunk while it multiplies the last one; the first only copies.
    int column = 0;
    int k = -kChunk;
    for (int slot = 1; column < n_columns; slot ^= 1) {
      const bool ends_tile = k + kChunk >= depth && k >= 0;
      const int next_column = ends_tile ? column + kColumns : column;
      const int next_k = ends_tile ? 0 : k + kChunk;
      if (next_column < n_columns) {
        if (next_k == 0) prepare(next_column);
        stage_rows<S, kRows, kChunk, kStride, kThreads>(shared.stages[slot ^ 1].rows, shared.x, 0,
                                                        next_k);
        stage_rows<S, kColumns, kChunk, kStride, kThreads>(shared.stages[slot ^ 1].columns,
                                                           shared.y, next_column, next_k);
      }
      commit_copies();
      if (k >= 0) {
        wait_copies<1>();
        __syncthreads();
        multiply(shared.stages[slot], tile);
        if (ends_tile) {
          epilogue(column, tile);
          clear(tile);
        }
        __syncthreads();
      }
      column = next_column;
      k = next_k;
    }
    wait_copies<0>();
  }
};

// The tile that all operations use but where they say why not: as many accumulators as leave two
// blocks to a multiprocessor without spilling, 64 a thread. The parts of split operands take the
// registers of 16 of them, and those of float64 are twice as wide.
template <class S>
struct default_tile {
  using type = tile_product<S, 128, 128, 4, 2>;
};
template <>
struct default_tile<float> {
  using type = tile_product<float, 128, 96, 4, 2>;
};
template <>
struct default_tile<double> {
  using type = tile_product<double, 128, 64, 4, 2>;
};
template <class S>
using default_tile_t = typename default_tile<S>::type;

// The fragments of warp_product from value(row, k) and value(column, k), in place of loads.
template <class Value>
SUBQUAD_DEVICE void make_left(warp_product<float>::left& to, int lane, Value&& value) {
  const int g = lane / 4;
  const int t = lane % 4;
  warp_product<float>::split(value(g, t), to.high[0], to.low[0]);
  warp_product<float>::split(value(g + 8, t), to.high[1], to.low[1]);
  warp_product<float>::split(value(g, t + 4), to.high[2], to.low[2]);
  warp_product<float>::split(value(g + 8, t + 4), to.high[3], to.low[3]);
}
template <class Value>
SUBQUAD_DEVICE void make_right(warp_product<float>::right& to, int lane, Value&& value) {
  warp_product<float>::split(value(lane / 4, lane % 4), to.high[0], to.low[0]);
  warp_product<float>::split(value(lane / 4, lane % 4 + 4), to.high[1], to.low[1]);
}
// Left and right.
template <class Value>
SUBQUAD_DEVICE void make_left(double& to, int lane, Value&& value) {
  to = value(lane / 4, lane % 4);
}
template <class Value>
SUBQUAD_DEVICE void make_right(double& to, int lane, Value&& value) {
  to = value(lane / 4, lane % 4);
}

// Adds the products of a chunk of the depth to a tile; left(fragment, first row of the warp's, k)
// and right(fragment, first column of the warp's, k) load what a step needs.
template <class Tile, class Left, class Right>
SUBQUAD_DEVICE void multiply_chunk(typename Tile::accumulators& sums, Left&& left, Right&& right) {
  using warp = typename Tile::warp;
  // The parts of split operands take the registers that further steps under way would need.
  [[maybe_unused]] constexpr int kSteps = warp::kIsSplit ? 1 : Tile::kChunk / warp::kDepth;
  SUBQUAD_UNROLL_BY(kSteps)
  for (int k = 0; k < Tile::kChunk; k += warp::kDepth) {
    typename warp::left a[Tile::kTilesDown];
    SUBQUAD_UNROLL
    for (int i = 0; i < Tile::kTilesDown; ++i) left(a[i], i * warp::kRows, k);
    SUBQUAD_UNROLL
    for (int j = 0; j < Tile::kTilesAcross; ++j) {
      typename warp::right b;
      right(b, j * 8, k);
      SUBQUAD_UNROLL
      for (int i = 0; i < Tile::kTilesDown; ++i) warp::multiply(sums.values[i][j], a[i], b);
    }
  }
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_TILE_PRODUCT_CUH
