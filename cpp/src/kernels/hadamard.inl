// Contracts stand in hadamard_kernels.hpp. Distances shorter than a vector are exchanges of lanes,
// longer ones butterflies of up to 8 vectors in registers: three distances at each visit.
#include "hadamard_kernels.hpp"

#include "vector.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// Sums and differences of lanes at this distance.
template <class T, int kDistance>
SUBQUAD_INLINE vec<T> exchange(vec<T> value) {
  ivec<T> partner;
  vec<T> sign;
  for (int c = 0; c < lanes<T>; ++c) {
    partner[c] = c ^ kDistance;
    sign[c] = (c & kDistance) != 0 ? T(-1) : T(1);
  }
  return __builtin_shuffle(value, partner) + sign * value;
}

// All distances up to kLength / 2: the transforms of the rows of kLength that the lanes hold.
template <class T, int kLength>
SUBQUAD_INLINE vec<T> transform_lanes(vec<T> value) {
  if constexpr (kLength > 1 && lanes<T> > 1) value = exchange<T, 1>(value);
  if constexpr (kLength > 2 && lanes<T> > 2) value = exchange<T, 2>(value);
  if constexpr (kLength > 4 && lanes<T> > 4) value = exchange<T, 4>(value);
  if constexpr (kLength > 8 && lanes<T> > 8) value = exchange<T, 8>(value);
  return value;
}

#define SUBQUAD_UNROLL_RADIX _Pragma("GCC unroll 8")

template <class T, int kRadix>
SUBQUAD_INLINE void butterflies(vec<T> (&values)[kRadix]) {
  SUBQUAD_UNROLL_RADIX
  for (int half = 1; half < kRadix; half *= 2) {
    SUBQUAD_UNROLL_RADIX
    for (int i = 0; i < kRadix; ++i) {
      if ((i & half) != 0) continue;
      const vec<T> sum = values[i] + values[i + half];
      values[i + half] = values[i] - values[i + half];
      values[i] = sum;
    }
  }
}

// Rows of kRadix vectors: from x to out, which may be x.
template <class T, int kRadix>
SUBQUAD_INLINE void transform_short(const T* x, T* out, std::int64_t count) {
  for (std::int64_t at = 0; at < count; at += kRadix * lanes<T>) {
    vec<T> values[kRadix];
    SUBQUAD_UNROLL_RADIX
    for (int i = 0; i < kRadix; ++i) {
      values[i] = transform_lanes<T, lanes<T>>(load(x + at + i * lanes<T>));
    }
    butterflies<T, kRadix>(values);
    SUBQUAD_UNROLL_RADIX
    for (int i = 0; i < kRadix; ++i) store(out + at + i * lanes<T>, values[i]);
  }
}

// Across rows at distances step, 2 step, ... below kRadix step; `from` may be `to`.
template <class T, int kRadix>
SUBQUAD_INLINE void cross(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride,
                          std::int64_t rows, std::int64_t step, std::int64_t width) {
  for (std::int64_t group = 0; group < rows; group += kRadix * step) {
    for (std::int64_t row = group; row < group + step; ++row) {
      for (std::int64_t c = 0; c < width; c += lanes<T>) {
        vec<T> values[kRadix];
        SUBQUAD_UNROLL_RADIX
        for (int i = 0; i < kRadix; ++i) {
          values[i] = load(from + (row + i * step) * from_stride + c);
        }
        butterflies<T, kRadix>(values);
        SUBQUAD_UNROLL_RADIX
        for (int i = 0; i < kRadix; ++i) store(to + (row + i * step) * to_stride + c, values[i]);
      }
    }
  }
}

template <class T>
void cross_by(std::int64_t radix, const T* from, std::int64_t from_stride, T* to,
              std::int64_t to_stride, std::int64_t rows, std::int64_t step, std::int64_t width) {
  if (radix == 8) {
    cross<T, 8>(from, from_stride, to, to_stride, rows, step, width);
  } else if (radix == 4) {
    cross<T, 4>(from, from_stride, to, to_stride, rows, step, width);
  } else {
    cross<T, 2>(from, from_stride, to, to_stride, rows, step, width);
  }
}

// Rows that several lie in a vector, one after the other without gaps.
template <class T, int kLength>
SUBQUAD_INLINE void transform_packed(const T* x, T* out, std::int64_t count) {
  std::int64_t at = 0;
  for (; at + lanes<T> <= count; at += lanes<T>) {
    store(out + at, transform_lanes<T, kLength>(load(x + at)));
  }
  if (at == count) return;
  T tail[lanes<T>] = {};
  for (std::int64_t i = at; i < count; ++i) tail[i - at] = x[i];
  store(tail, transform_lanes<T, kLength>(load(tail)));
  for (std::int64_t i = at; i < count; ++i) out[i] = tail[i - at];
}

// n rows of d that follow each other without gaps, or one row.
template <class T>
void transform(const T* x, T* out, std::int64_t n, std::int64_t d) {
  const std::int64_t count = n * d;
  if (d < lanes<T>) {
    if (d == 1) {
      transform_packed<T, 1>(x, out, count);
    } else if (d == 2) {
      transform_packed<T, 2>(x, out, count);
    } else if (d == 4) {
      transform_packed<T, 4>(x, out, count);
    } else {
      transform_packed<T, 8>(x, out, count);
    }
    return;
  }
  const std::int64_t vectors = d / lanes<T>;
  if (vectors == 1) {
    transform_short<T, 1>(x, out, count);
  } else if (vectors == 2) {
    transform_short<T, 2>(x, out, count);
  } else if (vectors == 4) {
    transform_short<T, 4>(x, out, count);
  } else {
    constexpr std::int64_t kFirst = 8 * lanes<T>;
    for (std::int64_t at = 0; at < count; at += d) {  // the rest of a row while it is in the caches
      transform_short<T, 8>(x + at, out + at, d);
      for (std::int64_t size = kFirst; size < d;) {
        const std::int64_t radix = d / size < 8 ? d / size : 8;
        cross_by<T>(radix, out + at, size, out + at, size, d / size, 1, size);
        size *= radix;
      }
    }
  }
}

template <class T>
std::size_t rows_scratch(std::int64_t d) {
  return sizeof(T) * static_cast<std::size_t>(d);
}

template <class T>
void rows(const hadamard_rows_task<T>& task) {
  const std::int64_t d = task.d;
  const bool together = task.x.row_stride == d && task.out.row_stride == d;
  if (task.x.column_stride == 1 && task.out.column_stride == 1 && together) {
    transform<T>(task.x.data, task.out.data, task.n, d);
    return;
  }
  for (std::int64_t r = 0; r < task.n; ++r) {
    T* row = task.out.column_stride == 1 ? &task.out(r, 0) : static_cast<T*>(task.scratch);
    const T* from = &task.x(r, 0);
    if (task.x.column_stride != 1) {
      for (std::int64_t i = 0; i < d; ++i) row[i] = task.x(r, i);
      from = row;
    }
    transform<T>(from, row, 1, d);
    if (task.out.column_stride == 1) continue;
    for (std::int64_t i = 0; i < d; ++i) task.out(r, i) = row[i];
  }
}

// Columns that one visit takes along.
constexpr std::int64_t kStrip = 64;

template <class T>
std::size_t columns_scratch(std::int64_t rows, std::int64_t /*width*/) {
  return sizeof(T) * static_cast<std::size_t>(rows * kStrip);
}

// Strips of columns pass through the scratch, so that memory is read and written once for all
// distances, at places that do not share the sets of a cache.
template <class T>
void columns(const hadamard_columns_task<T>& task) {
  T* strip = static_cast<T*>(task.scratch);
  for (std::int64_t c = 0; c < task.width; c += kStrip) {
    const T* from = task.data + c;
    std::int64_t from_stride = task.stride;
    for (std::int64_t step = 1; step < task.rows;) {
      const std::int64_t left = task.rows / step;
      const std::int64_t radix = left < 8 ? left : 8;
      T* to = radix == left ? task.data + c : strip;
      const std::int64_t to_stride = radix == left ? task.stride : kStrip;
      cross_by<T>(radix, from, from_stride, to, to_stride, task.rows, step, kStrip);
      from = strip;
      from_stride = kStrip;
      step *= radix;
    }
  }
}

template <class T>
constexpr hadamard_functions<T> functions = {rows_scratch<T>, rows<T>, columns_scratch<T>,
                                             columns<T>};

}  // namespace

extern const hadamard_kernels kernels_hadamard;
const hadamard_kernels kernels_hadamard = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
