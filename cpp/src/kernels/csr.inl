// Contracts stand in csr_kernels.hpp. The sums of a row stay in registers while rows of x come in
// from wherever their indices point; addresses of rows to come are known, and asked for ahead.
#include "csr_kernels.hpp"

#include "vector.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// Vectors of sums that a row has at once.
constexpr int kMaxVectors = 8;

// Entries between the row of x that is added and the one that is asked for.
constexpr std::int64_t kAhead = 8;

template <class T, int W>
struct narrow_vector {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
  typedef T unaligned_type
      __attribute__((vector_size(W * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef typename vector_of<T>::scalar_int int_type __attribute__((vector_size(W * sizeof(T))));
};
template <class T>
struct narrow_vector<T, 1> {
  using type = T;
  using unaligned_type = T;
};
template <class T, int W>
using narrow = typename narrow_vector<T, W>::type;

template <class T, int W>
SUBQUAD_INLINE narrow<T, W> load_narrow(const T* p) {
  return *reinterpret_cast<const typename narrow_vector<T, W>::unaligned_type*>(p);
}

template <class T, int W>
SUBQUAD_INLINE void store_narrow(T* p, narrow<T, W> v) {
  *reinterpret_cast<typename narrow_vector<T, W>::unaligned_type*>(p) = v;
}

template <class I>
struct unsigned_of;
template <>
struct unsigned_of<std::int32_t> {
  using type = std::uint32_t;
};
template <>
struct unsigned_of<std::int64_t> {
  using type = std::uint64_t;
};

// Whether all indices of a part are in range: those below 0 are the largest as unsigned numbers.
template <class I>
bool indices_are_valid(const csr_part<I>& part) {
  using U = typename unsigned_of<I>::type;
  U largest = 0;
  const I* indices = part.indices.data + part.begin.entry * part.indices.stride;
  const std::int64_t count = part.end.entry - part.begin.entry;
  if (part.indices.stride == 1) {
    for (std::int64_t e = 0; e < count; ++e) {
      const U index = static_cast<U>(indices[e]);
      largest = index > largest ? index : largest;
    }
  } else {
    for (std::int64_t e = 0; e < count; ++e) {
      const U index = static_cast<U>(indices[e * part.indices.stride]);
      largest = index > largest ? index : largest;
    }
  }
  // A negative index is larger than any other as an unsigned number, but not than all columns.
  constexpr auto kMost = static_cast<std::uint64_t>(U(-1) >> 1);
  return count <= 0 ||
         (static_cast<std::uint64_t>(largest) <= kMost &&
          static_cast<std::uint64_t>(largest) < static_cast<std::uint64_t>(part.columns));
}

// How the arrays of a part are read: kDense, entries and the columns of rows lie one after another.
template <class T, class I, bool kDense>
struct part_reader {
  const I* indices;
  std::int64_t index_stride;
  const T* x;
  std::int64_t row_stride;
  std::int64_t column_stride;
  std::int64_t last;  // entry

  part_reader(const csr_part<I>& part, matrix_view<const T> rows, std::int64_t first_column)
      : indices(part.indices.data),
        index_stride(part.indices.stride),
        x(rows.data + first_column * rows.column_stride),
        row_stride(rows.row_stride),
        column_stride(rows.column_stride),
        last(part.end.entry - 1) {}

  SUBQUAD_ALWAYS_INLINE const T* row(std::int64_t e) const {
    return x + static_cast<std::int64_t>(indices[kDense ? e : e * index_stride]) * row_stride;
  }

  // The row that a later entry points to.
  SUBQUAD_ALWAYS_INLINE const T* row_ahead(std::int64_t e) const {
    return row(e + kAhead < last ? e + kAhead : last);
  }
};

template <class T>
constexpr int kLine = 64 / static_cast<int>(sizeof(T));

// Columns of the rows of a task, counted from the first: NV vectors of W, one after another but for
// the last, which ends where the columns do and may overlap the one before: within a tile both
// compute the same there, and of two tiles the later one's stays.
template <int W, int NV>
struct column_tile {
  std::int64_t last;  // where the last vector begins

  SUBQUAD_ALWAYS_INLINE std::int64_t at(int v) const { return v == NV - 1 ? last : v * W; }
};

// U entries side by side where one alone would have the sums wait for each other.
template <int NV>
constexpr int side_by_side() {
  return NV == 1 ? 4 : (NV <= 4 ? 2 : 1);
}

template <class T, class I, int W, int NV, bool kDense>
SUBQUAD_INLINE void sum_entries(const csr_product_task<T, I>& task,
                                const part_reader<T, I, kDense>& reader, column_tile<W, NV> tile,
                                std::int64_t begin, std::int64_t end, narrow<T, W> (&sum)[NV]) {
  constexpr int U = side_by_side<NV>();
  const vector_view<const T> data = task.data;
  const bool is_far = kDense && task.is_far;
  narrow<T, W> acc[U][NV] = {};
  const auto add = [&](std::int64_t e, narrow<T, W>(&to)[NV]) __attribute__((always_inline)) {
    if (is_far) {
      const T* ahead = reader.row_ahead(e);
      for (int c = 0; c < W * NV; c += kLine<T>) __builtin_prefetch(ahead + c);
    }
    const T* row = reader.row(e);
    const T value = kDense ? data.data[e] : data[e];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      to[v] += value * load_narrow<T, W>(row + tile.at(v) * (kDense ? 1 : reader.column_stride));
    }
  };
  std::int64_t e = begin;
  if constexpr (U > 1) {
    for (; e + U <= end; e += U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) add(e + u, acc[u]);
    }
  }
  for (; e < end; ++e) add(e, acc[0]);
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    sum[v] = acc[0][v];
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u) sum[v] += acc[u][v];
  }
}

// NV vectors of columns from `first` on, the last of which begins at column `last`.
template <class T, class I, int W, int NV, bool kDense>
void product_tile(const csr_product_task<T, I>& task, std::int64_t first, std::int64_t last) {
  const column_tile<W, NV> tile{last - first};
  const part_reader<T, I, kDense> reader(task.part, task.x, first);
  const std::int64_t out_stride = kDense ? 1 : task.out.column_stride;
  const std::int64_t addend_stride = kDense ? 1 : task.addend.column_stride;
  T* out = task.out.data + first * task.out.column_stride;
  const T* addend = task.addend ? task.addend.data + first * task.addend.column_stride : nullptr;
  const vector_view<const I> indptr = task.part.indptr;
  const csr_position end = task.part.end;
  std::int64_t row = task.part.begin.row;
  std::int64_t e = task.part.begin.entry;
  bool carries = e > static_cast<std::int64_t>(indptr[row]);
  for (; row < end.row || e < end.entry; ++row) {
    const std::int64_t stop =
        row < end.row ? static_cast<std::int64_t>(indptr[row + 1]) : end.entry;
    narrow<T, W> sum[NV];
    sum_entries<T, I, W, NV, kDense>(task, reader, tile, e, stop, sum);
    e = stop;
    if (__builtin_expect(carries, false)) {
      carries = false;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store_narrow<T, W>(task.carry + first + tile.at(v), sum[v]);
      continue;
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[v] = task.scale * sum[v];
    if (addend) {
      const T* added = addend + row * task.addend.row_stride;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        sum[v] += load_narrow<T, W>(added + tile.at(v) * addend_stride);
      }
    }
    T* to = out + row * task.out.row_stride;
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store_narrow<T, W>(to + tile.at(v) * out_stride, sum[v]);
  }
}

template <class T, class I>
void product_vectors(const csr_product_task<T, I>& task, std::int64_t n, std::int64_t first,
                     std::int64_t last) {
  constexpr int L = lanes<T>;
  switch (n) {
    case 1:
      return product_tile<T, I, L, 1, true>(task, first, last);
    case 2:
      return product_tile<T, I, L, 2, true>(task, first, last);
    case 3:
      return product_tile<T, I, L, 3, true>(task, first, last);
    case 4:
      return product_tile<T, I, L, 4, true>(task, first, last);
    case 5:
      return product_tile<T, I, L, 5, true>(task, first, last);
    case 6:
      return product_tile<T, I, L, 6, true>(task, first, last);
    case 7:
      return product_tile<T, I, L, 7, true>(task, first, last);
    default:
      return product_tile<T, I, L, 8, true>(task, first, last);
  }
}

// Fewer columns than lanes: one vector, or two that overlap, of the widest that a row fills.
template <class T, class I, int W>
void product_narrow(const csr_product_task<T, I>& task) {
  if constexpr (W > 1) {
    if (task.d < W) {
      product_narrow<T, I, W / 2>(task);
    } else if (task.d == W) {
      product_tile<T, I, W, 1, true>(task, 0, 0);
    } else {
      product_tile<T, I, W, 2, true>(task, 0, task.d - W);
    }
  } else {
    product_tile<T, I, 1, 1, true>(task, 0, 0);
  }
}

template <class T, class I>
bool product(const csr_product_task<T, I>& task) {
  if (!indices_are_valid(task.part)) return false;
  const std::int64_t d = task.d;
  if (d == 0) return true;
  const auto is_dense = [d](auto matrix) { return d == 1 || matrix.column_stride == 1; };
  if (!(is_dense(task.x) && is_dense(task.out) && (!task.addend || is_dense(task.addend)) &&
        task.data.stride == 1 && task.part.indices.stride == 1)) {
    std::int64_t column = 0;
    for (; column + 4 <= d; column += 4) {
      product_tile<T, I, 1, 4, false>(task, column, column + 3);
    }
    for (; column < d; ++column) product_tile<T, I, 1, 1, false>(task, column, column);
    return true;
  }
  constexpr int L = lanes<T>;
  if (d < L) {
    product_narrow<T, I, L / 2>(task);
    return true;
  }
  const std::int64_t vectors = (d + L - 1) / L;
  const std::int64_t tiles = (vectors + kMaxVectors - 1) / kMaxVectors;
  const std::int64_t width = (vectors + tiles - 1) / tiles;
  for (std::int64_t v = 0; v < vectors; v += width) {
    const std::int64_t n = width < vectors - v ? width : vectors - v;
    const std::int64_t last = v + n == vectors ? d - L : (v + n - 1) * L;
    product_vectors<T, I>(task, n, v * L, last);
  }
  return true;
}

template <class T, int W>
SUBQUAD_INLINE T sum_narrow(narrow<T, W> values) {
  if constexpr (W == 1) {
    return values;
  } else {
    T memory[W];
    store_narrow<T, W>(memory, values);
    return sum_narrow<T, W / 2>(load_narrow<T, W / 2>(memory) +
                                load_narrow<T, W / 2>(memory + W / 2));
  }
}

// The lanes from `first` on as they are, 0 before them.
template <class T, int W>
struct lane_mask {
  using int_vector = typename narrow_vector<T, W>::int_type;

  explicit lane_mask(std::int64_t first) {
    typename vector_of<T>::scalar_int bits[W];
    for (std::int64_t i = 0; i < W; ++i) bits[i] = i < first ? 0 : -1;
    __builtin_memcpy(&kept, bits, sizeof kept);
  }

  SUBQUAD_ALWAYS_INLINE narrow<T, W> operator()(narrow<T, W> values) const {
    return (narrow<T, W>)((int_vector)values & kept);
  }

  int_vector kept;
};
template <class T>
struct lane_mask<T, 1> {
  explicit lane_mask(std::int64_t) {}
  SUBQUAD_ALWAYS_INLINE T operator()(T value) const { return value; }
};

// Inner products of kCount entries' rows of x with one row of grad.
template <class T, class I, int W, int kCount, bool kDense>
SUBQUAD_INLINE void inner_products(const csr_reverse_task<T, I>& task,
                                   const part_reader<T, I, kDense>& reader,
                                   const lane_mask<T, W>& unseen, const T* grad, std::int64_t e) {
  const std::int64_t d = task.d;
  const std::int64_t grad_stride = kDense ? 1 : task.grad.column_stride;
  const std::int64_t x_stride = kDense ? 1 : task.x.column_stride;
  const T* rows[kCount];
  narrow<T, W> acc[kCount] = {};
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    rows[i] = reader.row(e + i);
    if (kDense && task.is_far) {
      const T* ahead = reader.row_ahead(e + i);
      for (std::int64_t c = 0; c < d; c += kLine<T>) __builtin_prefetch(ahead + c);
    }
  }
  std::int64_t k = 0;
  for (; k + W <= d; k += W) {
    const narrow<T, W> g = load_narrow<T, W>(grad + k * grad_stride);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) acc[i] += g * load_narrow<T, W>(rows[i] + k * x_stride);
  }
  if (k < d) {
    // Both are masked: 0 times what a NaN or an infinity was seen in already would be NaN.
    const narrow<T, W> g = unseen(load_narrow<T, W>(grad + d - W));
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) acc[i] += g * unseen(load_narrow<T, W>(rows[i] + d - W));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const T sum = sum_narrow<T, W>(acc[i]);
    T& to = task.grad_data[e + i];
    to = task.accumulate ? to + sum : sum;
  }
}

template <class T, class I, int W, bool kDense>
void reverse_rows(const csr_reverse_task<T, I>& task) {
  const part_reader<T, I, kDense> reader(task.part, task.x, 0);
  const lane_mask<T, W> unseen(W - task.d % W);
  const std::int64_t end = task.part.end.entry;
  std::int64_t e = task.part.begin.entry;
  for (std::int64_t row = task.part.begin.row; e < end; ++row) {
    const T* grad = task.grad.data + row * task.grad.row_stride;
    const auto border = static_cast<std::int64_t>(task.part.indptr[row + 1]);
    const std::int64_t stop = border < end ? border : end;
    for (; e + 4 <= stop; e += 4) inner_products<T, I, W, 4, kDense>(task, reader, unseen, grad, e);
    for (; e < stop; ++e) inner_products<T, I, W, 1, kDense>(task, reader, unseen, grad, e);
  }
}

template <class T, class I, int W>
void reverse_dense(const csr_reverse_task<T, I>& task) {
  if constexpr (W > 1) {
    if (task.d < W) return reverse_dense<T, I, W / 2>(task);
  }
  reverse_rows<T, I, W, true>(task);
}

template <class T, class I>
bool reverse(const csr_reverse_task<T, I>& task) {
  if (!indices_are_valid(task.part)) return false;
  const std::int64_t d = task.d;
  if (d == 0) return true;
  if ((d == 1 || (task.x.column_stride == 1 && task.grad.column_stride == 1)) &&
      task.part.indices.stride == 1) {
    reverse_dense<T, I, lanes<T>>(task);
  } else {
    reverse_rows<T, I, 1, false>(task);
  }
  return true;
}

}  // namespace

extern const csr_kernels kernels_csr;
const csr_kernels kernels_csr = {
    {{product<float, std::int32_t>, reverse<float, std::int32_t>},
     {product<float, std::int64_t>, reverse<float, std::int64_t>}},
    {{product<double, std::int32_t>, reverse<double, std::int32_t>},
     {product<double, std::int64_t>, reverse<double, std::int64_t>}},
};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
