// Contracts stand in factors_kernels.hpp.
//
// Rows of a sequence between two places where some offset wraps around, or leaves the sequence,
// have their terms at the same distances: a range. What differs from range to range is worked out
// once for each.
//
// Bound by loads: one of a line in the first-level cache for every multiply-add of a vector, two
// lines' time where it comes from the second or third, as that of about half the links of a CHORD
// factor does whatever the order of the rows (of 2^a rows in the cache, a links find theirs).
#include "factors_kernels.hpp"

#include "vector.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// Where a term of a row lies, in elements from that row.
struct term {
  std::int64_t row;
  std::int64_t value;
  std::int64_t gradient;  // of the value
};

// Where the number of a term lies, in elements from its row of numbers. `row` is 0 where numbers
// are those of the row itself, not of the rows that its terms come from.
struct term_strides {
  std::int64_t row;
  std::int64_t index;
};

template <int kRows>
struct rows_at_once {
  static constexpr int kCount = kRows;
};

std::size_t scratch_bytes(std::int64_t k) {
  return static_cast<std::size_t>(k) * (sizeof(term) + sizeof(std::int64_t));
}

// Calls body(first row, last row, terms, number of terms) for the ranges of a task's rows, terms in
// the order of their offsets.
template <class Body>
SUBQUAD_INLINE void for_each_range(const factor_pattern& pattern, bool transpose,
                                   std::int64_t row_stride, term_strides values,
                                   term_strides gradients, Body&& body) {
  term* terms = static_cast<term*>(pattern.scratch);
  auto* shifts = reinterpret_cast<std::int64_t*>(terms + pattern.k);
  std::int64_t low = 0;
  std::int64_t high = pattern.sequences;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    if (pattern.starts[middle] <= pattern.first) {
      low = middle;
    } else {
      high = middle;
    }
  }
  std::int64_t row = pattern.first;
  for (std::int64_t s = low; row < pattern.last; ++s) {
    const std::int64_t start = pattern.starts[s];
    const std::int64_t length = pattern.starts[s + 1] - start;
    for (std::int64_t k = 0; k < pattern.k; ++k) {
      std::int64_t shift = pattern.offsets[k];
      if (pattern.circular) {
        if (shift < 0 || shift >= length) {
          shift %= length;
          if (shift < 0) shift += length;
        }
        if (transpose && shift > 0) shift = length - shift;
      } else {
        // No row is so far away, and the negative of what is left is a number.
        if (shift >= length || shift <= -length) shift = length;
        if (transpose) shift = -shift;
      }
      shifts[k] = shift;
    }
    const std::int64_t end = start + length < pattern.last ? start + length : pattern.last;
    while (row < end) {
      const std::int64_t position = row - start;
      std::int64_t next = end - start;
      std::int64_t count = 0;
      for (std::int64_t k = 0; k < pattern.k; ++k) {
        std::int64_t shift = shifts[k];
        const std::int64_t crossing = shift > 0 ? length - shift : -shift;
        if (crossing > position && crossing < next) next = crossing;
        if (pattern.circular) {
          if (position >= crossing && shift > 0) shift -= length;
        } else if (position + shift < 0 || position + shift >= length) {
          continue;
        }
        terms[count++] = {shift * row_stride, shift * values.row + k * values.index,
                          shift * gradients.row + k * gradients.index};
      }
      body(row, start + next, terms, count);
      row = start + next;
    }
  }
}

#define SUBQUAD_UNROLL_FACTOR_ROWS _Pragma("GCC unroll 4")
#define SUBQUAD_UNROLL_FACTOR_VECTORS _Pragma("GCC unroll 8")

// A store past the caches, to an address aligned to the vector.
template <class T>
SUBQUAD_INLINE void stream(T* to, vec<T> values) {
#if SUBQUAD_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)values);
#elif SUBQUAD_VECTOR_BYTES == 32 && defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)values);
#elif SUBQUAD_VECTOR_BYTES == 16 && defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)values);
#else
  store(to, values);
#endif
}

// An address that is worked out here: left to itself the compiler works out those of all rows and
// vectors beforehand, and runs out of registers for them.
template <class T>
SUBQUAD_INLINE T* kept(T* address) {
  __asm__("" : "+r"(address));
  return address;
}

// kRows rows of kVectors vectors.
template <class T, int kRows, int kVectors>
SUBQUAD_INLINE void put_rows(const term* terms, std::int64_t count, const T* values,
                             std::int64_t value_stride, const T* from, std::int64_t from_stride,
                             const T* addend, std::int64_t addend_stride, T* to,
                             std::int64_t to_stride, T* copy, std::int64_t copy_stride) {
  vec<T> sums[kRows][kVectors] = {};
  for (const term* t = terms; t < terms + count; ++t) {
    const T* value = values + t->value;
    const T* row = from + t->row;
    SUBQUAD_UNROLL_FACTOR_ROWS
    for (int r = 0; r < kRows; ++r) {
      const vec<T> factor = broadcast(*value);
      SUBQUAD_UNROLL_FACTOR_VECTORS
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * load(row + v * lanes<T>);
      row = kept(row + from_stride);
      value = kept(value + value_stride);
    }
  }
  SUBQUAD_UNROLL_FACTOR_ROWS
  for (int r = 0; r < kRows; ++r) {
    SUBQUAD_UNROLL_FACTOR_VECTORS
    for (int v = 0; v < kVectors; ++v) {
      vec<T> sum = sums[r][v];
      if (addend) sum += load(addend + r * addend_stride + v * lanes<T>);
      store(to + r * to_stride + v * lanes<T>, sum);
      if (copy) stream<T>(copy + r * copy_stride + v * lanes<T>, sum);
    }
  }
}

template <class T, int kRows, int kVectors>
__attribute__((noinline)) void put_columns(const factor_product_task<T>& task, const term* terms,
                                           std::int64_t count, std::int64_t first,
                                           std::int64_t last, std::int64_t column) {
  const auto put = [&](std::int64_t row, auto rows) SUBQUAD_ALWAYS_INLINE {
    put_rows<T, rows.kCount, kVectors>(
        terms, count, &task.values(row, 0), task.values.row_stride, task.from[row] + column,
        task.from.stride, task.addend ? task.addend[row] + column : nullptr, task.addend.stride,
        task.to[row] + column, task.to.stride, task.copy ? task.copy[row] + column : nullptr,
        task.copy.stride);
  };
  std::int64_t row = first;
  for (; row + kRows <= last; row += kRows) put(row, rows_at_once<kRows>{});
  for (; row < last; ++row) put(row, rows_at_once<1>{});
}

template <class T>
void product(const factor_product_task<T>& task) {
  for_each_range(task.pattern, task.transpose, task.from.stride,
                 {task.transpose ? task.values.row_stride : 0, task.values.column_stride}, {0, 0},
                 [&](std::int64_t first, std::int64_t last, const term* terms, std::int64_t count)
                     SUBQUAD_ALWAYS_INLINE {
                       std::int64_t column = 0;
                       for (; column + 8 * lanes<T> <= task.columns; column += 8 * lanes<T>) {
                         put_columns<T, 1, 8>(task, terms, count, first, last, column);
                       }
                       for (; column + 4 * lanes<T> <= task.columns; column += 4 * lanes<T>) {
                         put_columns<T, 2, 4>(task, terms, count, first, last, column);
                       }
                       for (; column + 2 * lanes<T> <= task.columns; column += 2 * lanes<T>) {
                         put_columns<T, 4, 2>(task, terms, count, first, last, column);
                       }
                       for (; column < task.columns; column += lanes<T>) {
                         put_columns<T, 4, 1>(task, terms, count, first, last, column);
                       }
                     });
#if defined(__SSE2__)
  if (task.copy) _mm_sfence();
#endif
}

// The first `count` lanes, and zeros.
template <class T>
SUBQUAD_INLINE vec<T> first_lanes(vec<T> v, std::int64_t count) {
  using integer = typename vector_of<T>::scalar_int;
  ivec<T> index;
  for (int i = 0; i < lanes<T>; ++i) index[i] = i;
  return (vec<T>)((ivec<T>)v & (index < static_cast<integer>(count)));
}

template <int... kLane>
struct lane_list {};

// Elements of 16 bytes.
template <class T>
constexpr int kSide = 16 / static_cast<int>(sizeof(T));

// The lane of two vectors that goes to `lane`, where every 16 bytes take elements `from` of the 16
// of the first and the 16 of the second.
template <class T, int... kFrom>
constexpr int lane_from(int lane) {
  constexpr int from[] = {kFrom...};
  const int index = from[lane % kSide<T>];
  const int start = lane / kSide<T> * kSide<T>;
  return index < kSide<T> ? start + index : lanes<T> + start + index - kSide<T>;
}

template <class T, int... kFrom, int... kLane>
SUBQUAD_INLINE vec<T> shuffled(vec<T> a, vec<T> b, lane_list<kLane...>) {
  return __builtin_shufflevector(a, b, lane_from<T, kFrom...>(kLane)...);
}

template <class V, int... kLane>
SUBQUAD_INLINE auto folded(V v, lane_list<kLane...>) {
  constexpr int kHalf = static_cast<int>(sizeof...(kLane));
  return __builtin_shufflevector(v, v, kLane...) + __builtin_shufflevector(v, v, kHalf + kLane...);
}

// The sum over all 16 bytes of a vector.
template <class T, class V>
SUBQUAD_INLINE auto side_sum(V v) {
  if constexpr (sizeof(V) > 16) {
    return side_sum<T>(folded(v, lane_list<__integer_pack(sizeof(V) / sizeof(T) / 2)...>{}));
  } else {
    return v;
  }
}

// sums[t] = the sum of the lanes of v[t], t < 4: a function of v[t] alone.
template <class T>
SUBQUAD_INLINE void sum_lanes(const vec<T> (&v)[4], T* sums) {
  typedef T side __attribute__((vector_size(16)));
  typedef T unaligned_side __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  constexpr lane_list<__integer_pack(lanes<T>)...> all{};
  const auto put = [sums](int at, side value) SUBQUAD_ALWAYS_INLINE {
    *reinterpret_cast<unaligned_side*>(sums + at) = value;
  };
  if constexpr (sizeof(T) == 4) {
    const vec<T> low =
        shuffled<T, 0, 4, 1, 5>(v[0], v[1], all) + shuffled<T, 2, 6, 3, 7>(v[0], v[1], all);
    const vec<T> high =
        shuffled<T, 0, 4, 1, 5>(v[2], v[3], all) + shuffled<T, 2, 6, 3, 7>(v[2], v[3], all);
    put(0, side_sum<T>(shuffled<T, 0, 1, 4, 5>(low, high, all) +
                       shuffled<T, 2, 3, 6, 7>(low, high, all)));
  } else {
    put(0, side_sum<T>(shuffled<T, 0, 2>(v[0], v[1], all) + shuffled<T, 1, 3>(v[0], v[1], all)));
    put(2, side_sum<T>(shuffled<T, 0, 2>(v[2], v[3], all) + shuffled<T, 1, 3>(v[2], v[3], all)));
  }
}

// Inner products of a row with four others, or with `count` of them.
template <class T>
SUBQUAD_INLINE void put_gradients(const factor_gradient_task<T>& task, const term* terms,
                                  std::int64_t count, std::int64_t row, T* to) {
  const T* grad = task.grad[row];
  const T* from[4];
  for (int t = 0; t < 4; ++t) from[t] = task.from[row] + terms[t < count ? t : 0].row;
  vec<T> sums[4] = {};
  std::int64_t column = 0;
  for (; column + lanes<T> <= task.d; column += lanes<T>) {
    const vec<T> g = load(grad + column);
    SUBQUAD_UNROLL_FACTOR_VECTORS
    for (int t = 0; t < 4; ++t) sums[t] += g * load(from[t] + column);
  }
  if (column < task.d) {
    const vec<T> g = first_lanes<T>(load(grad + column), task.d - column);
    SUBQUAD_UNROLL_FACTOR_VECTORS
    for (int t = 0; t < 4; ++t) {
      sums[t] += g * first_lanes<T>(load(from[t] + column), task.d - column);
    }
  }
  T all[4];
  sum_lanes<T>(sums, all);
  for (std::int64_t t = 0; t < count; ++t) to[terms[t].gradient] = all[t];
}

// The gradients of values of terms that are left out, in the rows of a range.
template <class T>
void put_absent(const factor_gradient_task<T>& task, const term* terms, std::int64_t count,
                std::int64_t first, std::int64_t last) {
  std::int64_t t = 0;
  for (std::int64_t k = 0; k < task.pattern.k; ++k) {
    if (t < count && terms[t].value == k) {
      ++t;
      continue;
    }
    for (std::int64_t row = first; row < last; ++row) task.grad_values(row, k) = T(0);
  }
}

template <class T>
void gradient(const factor_gradient_task<T>& task) {
  for_each_range(task.pattern, false, task.from.stride, {0, 1}, {0, task.grad_values.column_stride},
                 [&](std::int64_t first, std::int64_t last, const term* terms, std::int64_t count)
                     SUBQUAD_ALWAYS_INLINE {
                       if (count < task.pattern.k) put_absent<T>(task, terms, count, first, last);
                       for (std::int64_t row = first; row < last; ++row) {
                         T* to = &task.grad_values(row, 0);
                         std::int64_t t = 0;
                         for (; t + 4 <= count; t += 4)
                           put_gradients<T>(task, terms + t, 4, row, to);
                         if (t < count) put_gradients<T>(task, terms + t, count - t, row, to);
                       }
                     });
}

// One row of the transposed product, and the gradients of the values it met: what is read of the
// gradient of a row serves both.
template <class T, int kVectors>
SUBQUAD_INLINE void put_both(const factor_reverse_task<T>& task, const term* terms,
                             std::int64_t count, std::int64_t row) {
  const factor_product_task<T>& product = task.product;
  const T* values = &product.values(row, 0);
  const T* grad = product.from[row];
  T* grad_values = &task.gradient.grad_values(row, 0);
  vec<T> sums[kVectors] = {};
  vec<T> v[kVectors];
  SUBQUAD_UNROLL_FACTOR_VECTORS
  for (int c = 0; c < kVectors; ++c) v[c] = load(task.gradient.from[row] + c * lanes<T>);
  const auto meet = [&](const term& t) SUBQUAD_ALWAYS_INLINE {
    const vec<T> factor = broadcast(values[t.value]);
    const T* g = grad + t.row;
    vec<T> inner{};
    SUBQUAD_UNROLL_FACTOR_VECTORS
    for (int c = 0; c < kVectors; ++c) {
      const vec<T> part = load(g + c * lanes<T>);
      sums[c] += factor * part;
      inner += part * v[c];
    }
    return inner;
  };
  T all[4];
  const term* t = terms;
  for (; t + 4 <= terms + count; t += 4) {
    const vec<T> inner[4] = {meet(t[0]), meet(t[1]), meet(t[2]), meet(t[3])};
    sum_lanes<T>(inner, all);
    for (int i = 0; i < 4; ++i) grad_values[t[i].gradient] = all[i];
  }
  if (const std::int64_t rest = terms + count - t; rest > 0) {
    vec<T> inner[4] = {};
    inner[0] = meet(t[0]);
    if (rest > 1) inner[1] = meet(t[1]);
    if (rest > 2) inner[2] = meet(t[2]);
    sum_lanes<T>(inner, all);
    for (std::int64_t i = 0; i < rest; ++i) grad_values[t[i].gradient] = all[i];
  }
  SUBQUAD_UNROLL_FACTOR_VECTORS
  for (int c = 0; c < kVectors; ++c) {
    vec<T> sum = sums[c];
    if (product.addend) sum += load(product.addend[row] + c * lanes<T>);
    store(product.to[row] + c * lanes<T>, sum);
  }
}

template <class T, int kVectors>
void put_both(const factor_reverse_task<T>& task) {
  const factor_gradient_task<T>& gradients = task.gradient;
  for_each_range(task.product.pattern, true, gradients.grad.stride,
                 {task.product.values.row_stride, task.product.values.column_stride},
                 {gradients.grad_values.row_stride, gradients.grad_values.column_stride},
                 [&](std::int64_t first, std::int64_t last, const term* terms, std::int64_t count)
                     SUBQUAD_ALWAYS_INLINE {
                       for (std::int64_t row = first; row < last; ++row) {
                         put_both<T, kVectors>(task, terms, count, row);
                       }
                     });
  if (task.product.pattern.circular) return;
  for_each_range(gradients.pattern, false, 0, {0, 1}, {0, 0},
                 [&](std::int64_t first, std::int64_t last, const term* terms, std::int64_t count)
                     SUBQUAD_ALWAYS_INLINE {
                       if (count < gradients.pattern.k) {
                         put_absent<T>(gradients, terms, count, first, last);
                       }
                     });
}

template <class T>
void reverse(const factor_reverse_task<T>& task) {
  if (task.gradient.d == lanes<T>) {
    put_both<T, 1>(task);
  } else if (task.gradient.d == 2 * lanes<T>) {
    put_both<T, 2>(task);
  } else if (task.gradient.d == 4 * lanes<T>) {
    put_both<T, 4>(task);
  } else if (task.gradient.d == 8 * lanes<T>) {
    put_both<T, 8>(task);
  } else {
    gradient<T>(task.gradient);
    product<T>(task.product);
  }
}

template <class T>
constexpr factors_functions<T> functions = {lanes<T>, scratch_bytes, product<T>, gradient<T>,
                                            reverse<T>};

}  // namespace

extern const factors_kernels kernels_factors;
const factors_kernels kernels_factors = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
