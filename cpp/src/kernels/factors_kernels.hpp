// Products of sparse factors and their reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_FACTORS_KERNELS_HPP
#define SUBQUAD_KERNELS_FACTORS_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// Rows of unit column stride.
template <class T>
struct factor_rows {
  T* data;  // null where the rows are optional
  std::int64_t stride;

  SUBQUAD_ALWAYS_INLINE T* operator[](std::int64_t i) const { return data + i * stride; }
  SUBQUAD_ALWAYS_INLINE explicit operator bool() const { return data != nullptr; }
};

// Which rows the terms of a row come from, and the rows [first, last) of a task.
struct factor_pattern {
  const std::int64_t* offsets;  // (k), any integers
  std::int64_t k;
  const std::int64_t* starts;  // (sequences + 1): sequence s is the rows [starts[s], starts[s + 1])
  std::int64_t sequences;
  bool circular;
  std::int64_t first;
  std::int64_t last;
  void* scratch;  // scratch bytes, aligned to 64
};

// One factor, with j the row offsets_k rows after row i in its sequence, or, transposed, before it:
//   to_i = sum_k values_ik from_j + addend_i    or    to_j = sum_k values_ik from_i + addend_j
// for `columns` columns, a whole number of vectors. The sum of an element is taken in the order of
// k from zero in T, the addend last, whatever the rows of the task and the columns beside it: it is
// within (K + 1) eps / 2 of the sum of its terms' magnitudes. `to` aliases nothing; `addend` may be
// `from`. Rows of terms that are left out are not read.
template <class T>
struct factor_product_task {
  factor_pattern pattern;
  bool transpose;
  matrix_view<const T> values;  // (n, K)
  factor_rows<const T> from;
  factor_rows<const T> addend;  // optional
  factor_rows<T> to;
  factor_rows<T> copy;  // optional: the same again, past the caches; every row aligned to 64 bytes
  std::int64_t columns;
};

// grad_values_ik = grad_i . from_j over d columns, 0 where the term is left out; of both rows as
// many columns are readable as whole vectors hold, and those beyond d do not count. A function of
// the two rows alone; within (d + 1) eps / 2 of the sum of the terms' magnitudes.
template <class T>
struct factor_gradient_task {
  factor_pattern pattern;
  factor_rows<const T> grad;
  factor_rows<const T> from;
  std::int64_t d;
  matrix_view<T> grad_values;  // (n, K)
};

// Both for one factor and the same rows: gradient.from is v, gradient.grad = product.from is the
// gradient of what the factor made of it, and `product` is transposed. Where `first` and `last` cut
// a sequence, gradients of values are written for the rows of v there, which belong to rows of
// values elsewhere: tasks that cover the rows together write each once.
template <class T>
struct factor_reverse_task {
  factor_gradient_task<T> gradient;
  factor_product_task<T> product;
};

template <class T>
struct factors_functions {
  std::int64_t lanes;
  std::size_t (*scratch)(std::int64_t k);
  void (*product)(const factor_product_task<T>& task);
  void (*gradient)(const factor_gradient_task<T>& task);
  void (*reverse)(const factor_reverse_task<T>& task);
};

struct factors_kernels {
  factors_functions<float> f32;
  factors_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_FACTORS_KERNELS_HPP
