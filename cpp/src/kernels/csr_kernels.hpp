// Products with matrices in compressed rows and their reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_CSR_KERNELS_HPP
#define SUBQUAD_KERNELS_CSR_KERNELS_HPP

#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// A place between two entries of a matrix: `entry` lies in row `row`, or is where it begins.
struct csr_position {
  std::int64_t row;
  std::int64_t entry;
};

// The entries from `begin` to `end` of a matrix with `columns` columns; indptr is non-decreasing
// from at least 0 to at most the number of entries. Indices are looked at before they are used.
template <class I>
struct csr_part {
  vector_view<const I> indices;
  vector_view<const I> indptr;
  std::int64_t columns;
  csr_position begin;
  csr_position end;
};

// out_i = scale sum over e of data_e x_(indices_e) + addend_i, for the rows that begin in the part,
// over their entries in it; `carry`, d numbers, is what a row that began before adds up to in the
// part, without scale and addend; not written where the part begins with a row.
// Each output is added up from the left in at most four interleaved sums: its error is below
// gamma_(n + 5) of the sum of its n terms' magnitudes and |addend_i|, whatever the layout, and
// depends on the part alone. x and addend may be the same array; out overlaps nothing.
template <class T, class I>
struct csr_product_task {
  csr_part<I> part;
  vector_view<const T> data;
  matrix_view<const T> x;       // (columns, d)
  matrix_view<const T> addend;  // (rows, d), optional
  matrix_view<T> out;           // (rows, d)
  std::int64_t d;
  T scale;
  T* carry;
  bool is_far;  // whether the rows of x come from beyond the caches
};

// grad_data_e = grad_i . x_(indices_e) for the part's entries, i the row of e; added to what is
// there where `accumulate`. Error below gamma_(d + 5) of the sum of the terms' magnitudes.
template <class T, class I>
struct csr_reverse_task {
  csr_part<I> part;
  matrix_view<const T> grad;  // (rows, d)
  matrix_view<const T> x;     // (columns, d)
  vector_view<T> grad_data;
  std::int64_t d;
  bool accumulate;
  bool is_far;
};

// Both return false, with nothing written, where an index of the part is out of range.
template <class T, class I>
struct csr_directions {
  bool (*product)(const csr_product_task<T, I>& task);
  bool (*reverse)(const csr_reverse_task<T, I>& task);
};

template <class T>
struct csr_functions {
  csr_directions<T, std::int32_t> int32;
  csr_directions<T, std::int64_t> int64;
};

struct csr_kernels {
  csr_functions<float> f32;
  csr_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_CSR_KERNELS_HPP
