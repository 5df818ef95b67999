// Contracts stand in factor_values_kernels.hpp. Rows of x lie in lanes throughout: a block of
// hidden numbers is both what the first product leaves and what the next ones read, in caches, and
// weights are broadcast. Only the sums over rows have the columns of x and of grad in their lanes,
// with the hidden numbers broadcast from where they lie.
#include "factor_values_kernels.hpp"

#include "tile_product.inl"
#include "vector_math.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// Rows of x that a block of the reverse holds: sums over rows visit partial sums once a block.
constexpr std::int64_t kBlockRows = 128;

template <int N>
struct row_count {
  static constexpr int value = N;
};

// Calls f with the number of rows as a type.
template <class F>
SUBQUAD_INLINE void with_rows(int rows, F&& f) {
  switch (rows) {
    case 2:
      return f(row_count<2>{});
    case 4:
      return f(row_count<4>{});
#if SUBQUAD_VECTOR_BYTES == 64 || defined(__aarch64__)
    case 8:
      return f(row_count<8>{});
    case 10:
      return f(row_count<10>{});
    case 12:
      return f(row_count<12>{});
#endif
    default:
      return f(row_count<6>{});
  }
}

// Rows of the tiles that `count` rows are cut into: those of least work, counting what surrounds
// the products of a tile as half a row.
SUBQUAD_INLINE int rows_of_tiles(std::int64_t count) {
  int best = 2;
  std::int64_t least = divide_up(count, 2) * 5;
  for (int rows = 4; rows <= kTileRows; rows += 2) {
    const std::int64_t work = divide_up(count, rows) * (2 * rows + 1);
    if (work <= least) {
      least = work;
      best = rows;
    }
  }
  return best;
}

// `count` rows in panels of R, and what they take.
struct row_panels {
  std::int64_t count;
  int rows;
  std::int64_t panels;
  std::int64_t padded;

  SUBQUAD_ALWAYS_INLINE explicit row_panels(std::int64_t of)
      : count(of), rows(rows_of_tiles(of)), panels(divide_up(of, rows)), padded(panels * rows) {}
};

template <class T>
void pack_left(const row_panels& panels, matrix_view<const T> from, std::int64_t depth, T* to) {
  with_rows(panels.rows, [&](auto rows) SUBQUAD_ALWAYS_INLINE {
    pack_rows<decltype(rows)::value, T>(from, panels.count, depth, to);
  });
}

// What becomes of the products of a panel: they are added to a number of each row's, multiply what
// the output holds, or are added to it.
enum class ending { plus_rows, times_output, plus_output };

template <class T, int kRows, ending kEnding>
void multiply_panels(std::int64_t panels, std::int64_t depth, const T* left, const T* right,
                     const T* bias, T* out) {
  constexpr int kColumns = kTileColumns<T>;
  for (std::int64_t p = 0; p < panels; ++p) {
    vec<T> acc[kRows][kTileVectors];
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kRows; ++r) {
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kTileVectors; ++v) {
        if constexpr (kEnding == ending::plus_rows) {
          acc[r][v] = broadcast(bias[r]);
        } else if constexpr (kEnding == ending::times_output) {
          acc[r][v] = vec<T>{};
        } else {
          acc[r][v] = load(out + r * kColumns + v * lanes<T>);
        }
      }
    }
    const T* columns = right;
    for (std::int64_t k = 0; k < depth; ++k) {
      const vec<T> right0 = load(columns);
      const vec<T> right1 = load(columns + lanes<T>);
      SUBQUAD_UNROLL_ROWS
      for (int r = 0; r < kRows; ++r) {
        const vec<T> value = broadcast(left[r]);
        acc[r][0] += value * right0;
        acc[r][1] += value * right1;
      }
      left += kRows;
      columns += kColumns;
    }
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kRows; ++r) {
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kTileVectors; ++v) {
        T* to = out + r * kColumns + v * lanes<T>;
        store(to, kEnding == ending::times_output ? load(to) * acc[r][v] : acc[r][v]);
      }
    }
    if constexpr (kEnding == ending::plus_rows) bias += kRows;
    out += kRows * kColumns;
  }
}

template <class T, ending kEnding>
SUBQUAD_INLINE void multiply(const row_panels& panels, std::int64_t depth, const T* left,
                             const T* right, const T* bias, T* out) {
  with_rows(panels.rows, [&](auto rows) SUBQUAD_ALWAYS_INLINE {
    multiply_panels<T, decltype(rows)::value, kEnding>(panels.panels, depth, left, right, bias,
                                                       out);
  });
}

// Columns in the lanes of sums over rows: whole panels of a tile's columns, then a panel of one
// vector or two.
template <class T>
SUBQUAD_INLINE std::int64_t lane_width(std::int64_t columns) {
  return divide_up(columns, lanes<T>) * lanes<T>;
}

// Rows as the right operand of sums over rows: [panel][kBlockRows][columns of the panel]. What lies
// past the columns is whatever follows them in memory, and meets padding alone.
template <class T>
SUBQUAD_INLINE void pack_right(matrix_view<const T> from, std::int64_t count, std::int64_t columns,
                               T* to) {
  for (std::int64_t c = 0; c < columns; c += kTileColumns<T>) {
    const std::int64_t width = smaller<std::int64_t>(kTileColumns<T>, lane_width<T>(columns - c));
    const std::int64_t used = smaller<std::int64_t>(kTileColumns<T>, columns - c);
    // Rows whose vectors end within the last row.
    std::int64_t whole = 0;
    if (from.column_stride == 1 && used == width) {
      whole = count;
    } else if (from.column_stride == 1 && from.row_stride >= used) {
      whole = count - divide_up(width - used, from.row_stride);
    }
    std::int64_t i = 0;
    for (; i < whole; ++i) {
      const T* row = &from(i, c);
      T* out = to + i * width;
      store(out, load(row));
      if (width > lanes<T>) store(out + lanes<T>, load(row + lanes<T>));
    }
    for (; i < count; ++i) {
      const T* row = &from(i, c);
      T* out = to + i * width;
      for (std::int64_t j = 0; j < used; ++j) out[j] = row[j * from.column_stride];
      for (std::int64_t j = used; j < width; ++j) out[j] = T(0);
    }
    to += kBlockRows * width;
  }
}

// sums[r][c] += sum over rows i of left_ri right_ic, from zero where these are the first rows, for
// a panel of columns, whose width the rows of sums have; left in panels of kTileColumns rows i,
// left_stride apart.
template <class T, int kRows, int kVectors>
void sum_over_rows(std::int64_t panels, std::int64_t n, const T* left, std::int64_t left_stride,
                   const T* right, bool first, T* sums) {
  constexpr int kColumns = kTileColumns<T>;
  constexpr int kWidth = kVectors * lanes<T>;
  for (std::int64_t p = 0; p < panels; ++p) {
    vec<T> acc[kRows][kVectors];
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kRows; ++r) {
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = first ? vec<T>{} : load(sums + r * kWidth + v * lanes<T>);
      }
    }
    const T* from = right;
    for (std::int64_t i = 0; i < n; i += kColumns) {
      const T* values = left + i / kColumns * left_stride;
      const std::int64_t depth = smaller<std::int64_t>(kColumns, n - i);
      for (std::int64_t k = 0; k < depth; ++k) {
        vec<T> row[kVectors];
        SUBQUAD_UNROLL_VECTORS
        for (int v = 0; v < kVectors; ++v) row[v] = load(from + v * lanes<T>);
        SUBQUAD_UNROLL_ROWS
        for (int r = 0; r < kRows; ++r) {
          const vec<T> value = broadcast(values[r * kColumns + k]);
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kVectors; ++v) acc[r][v] += value * row[v];
        }
        from += kWidth;
      }
    }
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kRows; ++r) {
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kVectors; ++v) store(sums + r * kWidth + v * lanes<T>, acc[r][v]);
    }
    left += kRows * kColumns;
    sums += kRows * kWidth;
  }
}

template <class T>
SUBQUAD_INLINE void add_outer_products(const row_panels& panels, std::int64_t n, const T* left,
                                       const T* right, std::int64_t columns, bool first, T* sums) {
  with_rows(panels.rows, [&](auto rows) SUBQUAD_ALWAYS_INLINE {
    constexpr int kRows = decltype(rows)::value;
    const std::int64_t left_stride = panels.padded * kTileColumns<T>;
    const T* from = right;
    T* to = sums;
    for (std::int64_t c = 0; c < columns; c += kTileColumns<T>) {
      if (columns - c > lanes<T>) {
        sum_over_rows<T, kRows, 2>(panels.panels, n, left, left_stride, from, first, to);
      } else {
        sum_over_rows<T, kRows, 1>(panels.panels, n, left, left_stride, from, first, to);
      }
      from += kBlockRows * kTileColumns<T>;
      to += panels.padded * kTileColumns<T>;
    }
  });
}

// sums[j] += sum over rows of values[j], in panels and from zero as above.
template <class T>
void add_rows(std::int64_t count, std::int64_t n, const T* values, std::int64_t stride, bool first,
              T* sums) {
  constexpr int kColumns = kTileColumns<T>;
  constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  typedef T side __attribute__((vector_size(16)));
  for (std::int64_t j = 0; j < count; ++j) {
    vec<T> sum[kTileVectors] = {};
    const T* from = values + j * kColumns;
    std::int64_t i = 0;
    for (; i + kColumns <= n; i += kColumns, from += stride) {
      sum[0] += load(from);
      sum[1] += load(from + lanes<T>);
    }
    T memory[lanes<T>];
    store(memory, sum[0] + sum[1]);
    for (; i < n; ++i) memory[i % lanes<T>] += from[i % kColumns];
    side lane_sums = {};
    for (int c = 0; c < lanes<T>; c += kSide) {
      side next;
      __builtin_memcpy(&next, memory + c, sizeof next);
      lane_sums += next;
    }
    T total = first ? T(0) : sums[j];
    for (int c = 0; c < kSide; ++c) total += lane_sums[c];
    sums[j] = total;
  }
}

// Elements of a buffer [count][kTileColumns] as rows of a matrix: to(r, j) = from[j][r].
template <class T>
void put_transposed(const T* from, std::int64_t rows, std::int64_t count, matrix_view<T> to) {
  constexpr int kColumns = kTileColumns<T>;
  constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  if (to.column_stride != 1 || rows < kColumns || count < kSide) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t j = 0; j < count; ++j) to(r, j) = from[j * kColumns + r];
    }
    return;
  }
  for (std::int64_t r = 0; r < kColumns; r += kSide) {
    for (std::int64_t j = 0; j < count; j += kSide) {
      const std::int64_t first = smaller<std::int64_t>(j, count - kSide);  // squares may overlap
      const T* rows_of[kSide];
      for (int i = 0; i < kSide; ++i) rows_of[i] = from + (first + i) * kColumns + r;
      transpose_square(rows_of, &to(r, first), to.row_stride);
    }
  }
}

template <class T>
void apply_gelu(std::int64_t count, T* values) {
  for (std::int64_t i = 0; i < count * kTileColumns<T>; i += lanes<T>) {
    store(values + i, gelu<T>(load(values + i)));
  }
}

template <class T>
void apply_gelu_and_slope(std::int64_t count, T* values, T* slopes) {
  for (std::int64_t i = 0; i < count * kTileColumns<T>; i += lanes<T>) {
    const vec<T> z = load(values + i);
    const gelu_parts<T> parts = make_gelu_parts<T>(z);
    store(values + i, gelu_value<T>(z, parts));
    store(slopes + i, gelu_slope<T>(z, parts));
  }
}

template <class T>
struct packed_networks {
  row_panels hidden;
  row_panels links;
  std::int64_t in_size;
  std::int64_t out_size;
  T* weight_in;   // [factor][hidden panel][d][rows]
  T* bias_in;     // [factor][h padded]
  T* weight_out;  // [factor][link panel][h][rows]
  T* bias_out;    // [factor][k padded]
  std::size_t bytes;

  packed_networks(const factor_network_sizes& size, void* memory)
      : hidden(size.h),
        links(size.k),
        in_size(hidden.padded * size.d),
        out_size(links.padded * size.h) {
    const std::int64_t m = size.n_factors;
    weight_in = static_cast<T*>(memory);
    bias_in = weight_in + m * in_size;
    weight_out = bias_in + m * hidden.padded;
    bias_out = weight_out + m * out_size;
    bytes = sizeof(T) *
            static_cast<std::size_t>(m * (in_size + hidden.padded + out_size + links.padded));
  }
};

template <class T>
void pack_bias(vector_view<const T> from, const row_panels& panels, T* to) {
  for (std::int64_t j = 0; j < panels.padded; ++j) to[j] = j < panels.count ? from[j] : T(0);
}

template <class T>
SUBQUAD_INLINE vector_view<const T> row_of(matrix_view<const T> matrix, std::int64_t i) {
  return {matrix.data + i * matrix.row_stride, matrix.column_stride};
}

template <class T>
SUBQUAD_INLINE matrix_view<const T> transposed(matrix_view<const T> matrix) {
  return {matrix.data, matrix.column_stride, matrix.row_stride};
}

template <class T>
std::size_t packed(const factor_network_sizes& size) {
  return packed_networks<T>(size, nullptr).bytes;
}

template <class T>
void pack(const factor_networks_task<T>& task) {
  const packed_networks<T> to(task.size, task.packed);
  for (std::int64_t m = 0; m < task.size.n_factors; ++m) {
    pack_left<T>(to.hidden, task.weight_in[m], task.size.d, to.weight_in + m * to.in_size);
    pack_bias<T>(row_of(task.bias_in, m), to.hidden, to.bias_in + m * to.hidden.padded);
    pack_left<T>(to.links, task.weight_out[m], task.size.h, to.weight_out + m * to.out_size);
    pack_bias<T>(row_of(task.bias_out, m), to.links, to.bias_out + m * to.links.padded);
  }
}

template <class T>
std::size_t scratch(const factor_network_sizes& size) {
  return sizeof(T) * kTileColumns<T> *
         static_cast<std::size_t>(size.d + row_panels(size.h).padded + row_panels(size.k).padded);
}

template <class T>
void values(const factor_values_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const factor_network_sizes& size = task.networks.size;
  const packed_networks<T> networks(size, task.networks.packed);
  T* x = static_cast<T*>(task.scratch);
  T* hidden = x + size.d * kColumns;
  T* links = hidden + networks.hidden.padded * kColumns;
  for (std::int64_t i = 0; i < task.n; i += kColumns) {
    const std::int64_t rows = smaller<std::int64_t>(kColumns, task.n - i);
    pack_rows<kColumns, T>(task.x.from(i), rows, size.d, x);
    for (std::int64_t m = 0; m < size.n_factors; ++m) {
      multiply<T, ending::plus_rows>(networks.hidden, size.d,
                                     networks.weight_in + m * networks.in_size, x,
                                     networks.bias_in + m * networks.hidden.padded, hidden);
      apply_gelu<T>(size.h, hidden);
      multiply<T, ending::plus_rows>(networks.links, size.h,
                                     networks.weight_out + m * networks.out_size, hidden,
                                     networks.bias_out + m * networks.links.padded, links);
      put_transposed<T>(links, rows, size.k, task.out[m].from(i));
    }
  }
}

template <class T>
struct packed_reverse_networks {
  row_panels hidden;
  row_panels inputs;
  std::int64_t in_size;
  std::int64_t back_size;
  std::int64_t out_size;
  T* weight_in;   // [factor][hidden panel][d][rows]
  T* bias_in;     // [factor][h padded]
  T* weight_out;  // [factor][hidden panel][k][rows]
  T* back;        // weight_in again, [factor][input panel][h][rows]
  std::size_t bytes;

  packed_reverse_networks(const factor_network_sizes& size, void* memory)
      : hidden(size.h),
        inputs(size.d),
        in_size(hidden.padded * size.d),
        back_size(inputs.padded * size.h),
        out_size(hidden.padded * size.k) {
    const std::int64_t m = size.n_factors;
    weight_in = static_cast<T*>(memory);
    bias_in = weight_in + m * in_size;
    weight_out = bias_in + m * hidden.padded;
    back = weight_out + m * out_size;
    bytes =
        sizeof(T) * static_cast<std::size_t>(m * (in_size + hidden.padded + out_size + back_size));
  }
};

template <class T>
std::size_t packed_reverse(const factor_network_sizes& size) {
  return packed_reverse_networks<T>(size, nullptr).bytes;
}

template <class T>
void pack_reverse(const factor_networks_task<T>& task) {
  const packed_reverse_networks<T> to(task.size, task.packed);
  for (std::int64_t m = 0; m < task.size.n_factors; ++m) {
    const matrix_view<const T> weight_in = task.weight_in[m];
    pack_left<T>(to.hidden, weight_in, task.size.d, to.weight_in + m * to.in_size);
    pack_bias<T>(row_of(task.bias_in, m), to.hidden, to.bias_in + m * to.hidden.padded);
    pack_left<T>(to.hidden, transposed(task.weight_out[m]), task.size.k,
                 to.weight_out + m * to.out_size);
    pack_left<T>(to.inputs, transposed(weight_in), task.size.h, to.back + m * to.back_size);
  }
}

template <class T>
struct reverse_scratch_layout {
  T* x;          // [row panel][d][columns]
  T* x_rows;     // as pack_right leaves them
  T* grad;       // [row panel][k][columns]
  T* grad_rows;  // as pack_right leaves them
  T* hidden;     // [row panel][h padded][columns]
  T* slopes;     // the same
  T* grad_x;     // [row panel][d padded][columns]
  std::size_t bytes;

  reverse_scratch_layout(const factor_network_sizes& size, void* memory) {
    const std::int64_t h = row_panels(size.h).padded;
    const std::int64_t d = row_panels(size.d).padded;
    x = static_cast<T*>(memory);
    x_rows = x + size.d * kBlockRows;
    grad = x_rows + lane_width<T>(size.d) * kBlockRows;
    grad_rows = grad + size.k * kBlockRows;
    hidden = grad_rows + lane_width<T>(size.k) * kBlockRows;
    slopes = hidden + h * kBlockRows;
    grad_x = slopes + h * kBlockRows;
    bytes = sizeof(T) * kBlockRows *
            static_cast<std::size_t>(size.d + lane_width<T>(size.d) + size.k +
                                     lane_width<T>(size.k) + 2 * h + d);
  }
};

template <class T>
std::size_t reverse_scratch(const factor_network_sizes& size) {
  return reverse_scratch_layout<T>(size, nullptr).bytes;
}

template <class T>
factor_network_sums<T> place_sums(const factor_network_sizes& size, T* memory) {
  factor_network_sums<T> sums{};
  sums.h_padded = row_panels(size.h).padded;
  sums.in_size = sums.h_padded * lane_width<T>(size.d);
  sums.out_size = sums.h_padded * lane_width<T>(size.k);
  sums.panel = kTileColumns<T>;
  sums.lanes = lanes<T>;
  const std::int64_t m = size.n_factors;
  const std::int64_t in = m * sums.in_size;
  const std::int64_t out = m * sums.out_size;
  sums.size = in + out + m * (size.h + size.k);
  if (memory == nullptr) return sums;
  sums.weight_in = memory;
  sums.weight_out = memory + in;
  sums.bias_in = sums.weight_out + out;
  sums.bias_out = sums.bias_in + m * size.h;
  return sums;
}

template <class T>
void reverse(const factor_values_reverse_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const factor_network_sizes& size = task.networks.size;
  const packed_reverse_networks<T> networks(size, task.networks.packed);
  const reverse_scratch_layout<T> buffers(size, task.scratch);
  const factor_network_sums<T>& sums = task.sums;
  const row_panels& hidden = networks.hidden;
  const bool needs_slopes = task.grad_x || task.needs.weight_in || task.needs.bias_in;
  const bool needs_hidden = needs_slopes || task.needs.weight_out;
  const std::int64_t hidden_panel = hidden.padded * kColumns;
  const std::int64_t grad_x_panel = networks.inputs.padded * kColumns;
  for (std::int64_t i = 0; i < task.n; i += kBlockRows) {
    const std::int64_t n = smaller<std::int64_t>(kBlockRows, task.n - i);
    const std::int64_t panels = divide_up(n, kColumns);
    const bool first = task.first && i == 0;
    const matrix_view<const T> x = task.x.from(i);
    if (needs_hidden) pack_rows<kColumns, T>(x, n, size.d, buffers.x);
    if (task.needs.weight_in) pack_right<T>(x, n, size.d, buffers.x_rows);
    if (task.grad_x) {
      for (std::int64_t j = 0; j < panels * grad_x_panel; ++j) buffers.grad_x[j] = T(0);
    }
    for (std::int64_t m = 0; m < size.n_factors; ++m) {
      const matrix_view<const T> grad = task.grad[m].from(i);
      if (needs_slopes || task.needs.bias_out) {
        pack_rows<kColumns, T>(grad, n, size.k, buffers.grad);
      }
      for (std::int64_t p = 0; needs_hidden && p < panels; ++p) {
        T* values = buffers.hidden + p * hidden_panel;
        T* slopes = buffers.slopes + p * hidden_panel;
        multiply<T, ending::plus_rows>(hidden, size.d, networks.weight_in + m * networks.in_size,
                                       buffers.x + p * size.d * kColumns,
                                       networks.bias_in + m * hidden.padded, values);
        if (!needs_slopes) {
          apply_gelu<T>(size.h, values);
          continue;
        }
        apply_gelu_and_slope<T>(size.h, values, slopes);
        multiply<T, ending::times_output>(hidden, size.k,
                                          networks.weight_out + m * networks.out_size,
                                          buffers.grad + p * size.k * kColumns, nullptr, slopes);
        if (task.grad_x) {
          multiply<T, ending::plus_output>(networks.inputs, size.h,
                                           networks.back + m * networks.back_size, slopes, nullptr,
                                           buffers.grad_x + p * grad_x_panel);
        }
      }
      if (task.needs.weight_in) {
        add_outer_products<T>(hidden, n, buffers.slopes, buffers.x_rows, size.d, first,
                              sums.weight_in + m * sums.in_size);
      }
      if (task.needs.weight_out) {
        pack_right<T>(grad, n, size.k, buffers.grad_rows);
        add_outer_products<T>(hidden, n, buffers.hidden, buffers.grad_rows, size.k, first,
                              sums.weight_out + m * sums.out_size);
      }
      if (task.needs.bias_in) {
        add_rows<T>(size.h, n, buffers.slopes, hidden_panel, first, sums.bias_in + m * size.h);
      }
      if (task.needs.bias_out) {
        add_rows<T>(size.k, n, buffers.grad, size.k * kColumns, first, sums.bias_out + m * size.k);
      }
    }
    for (std::int64_t p = 0; task.grad_x && p < panels; ++p) {
      put_transposed<T>(buffers.grad_x + p * grad_x_panel,
                        smaller<std::int64_t>(kColumns, n - p * kColumns), size.d,
                        task.grad_x.from(i + p * kColumns));
    }
  }
}

template <class T>
constexpr factor_values_functions<T> functions = {
    packed<T>,          pack<T>,       scratch<T>, values<T>, packed_reverse<T>, pack_reverse<T>,
    reverse_scratch<T>, place_sums<T>, reverse<T>};

}  // namespace

extern const factor_values_kernels kernels_factor_values;
const factor_values_kernels kernels_factor_values = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
