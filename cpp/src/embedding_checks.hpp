// What a step of an embedding asks of its arrays, on every device. Values of indices and labels are
// another matter: only the CPU looks at them before it computes.
#ifndef SUBQUAD_EMBEDDING_CHECKS_HPP
#define SUBQUAD_EMBEDDING_CHECKS_HPP

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "arguments.hpp"
#include "embedding_core.hpp"

namespace subquad {

struct embedding_sizes {
  std::int64_t n;
  std::int64_t m;
  std::int64_t nnz;
  std::int64_t d;
  std::int64_t k;  // components
  std::int64_t c;  // labels
};

// Whether a group of optional arrays, named by its first one, is present; all of it or nothing.
inline bool has_group(const char* first, std::initializer_list<const array_view*> group) {
  std::size_t present = 0;
  for (const array_view* array : group) present += array != nullptr;
  if (present != 0 && present != group.size()) {
    throw invalid_argument(std::string(first) + ": expected all " + std::to_string(group.size()) +
                           " arrays of its group or none, got " + std::to_string(present));
  }
  return present != 0;
}

inline std::int64_t check_components(const array_view& vectors, const char* vectors_name,
                                     const array_view& matrices, const char* matrices_name,
                                     dtype type, std::int64_t d) {
  require_dtype(vectors, type, vectors_name);
  require_dtype(matrices, type, matrices_name);
  if (vectors.ndim != 2 || vectors.shape[0] < 1) {
    throw invalid_argument(std::string(vectors_name) + ": expected shape (k, d) with k >= 1, got " +
                           shape_text(vectors.shape, vectors.ndim));
  }
  const std::int64_t k = vectors.shape[0];
  require_shape(vectors, vectors_name, "(k, d)", {k, d});
  require_shape(matrices, matrices_name, "(k, d, d)", {k, d, d});
  return k;
}

inline embedding_sizes check_embedding_step(const array_view& x, const array_view& rows,
                                            const embedding_terms& terms, double step,
                                            const array_view* out, const array_view* attraction,
                                            const array_view* log_z) {
  require_real(x, "x");
  if (x.ndim != 2) {
    throw invalid_argument("x: expected shape (n, d), got " + shape_text(x.shape, x.ndim));
  }
  const std::int64_t n = x.shape[0];
  const std::int64_t d = x.shape[1];
  require_dtype(rows, x.type, "rows");
  if (rows.ndim != 2) {
    throw invalid_argument("rows: expected shape (m, d), got " + shape_text(rows.shape, rows.ndim));
  }
  embedding_sizes size{n, rows.shape[0], 0, d, 0, 0};
  require_shape(rows, "rows", "(m, d)", {size.m, d});
  if (has_group("data", {terms.data, terms.indices, terms.indptr})) {
    require_dtype(*terms.data, x.type, "data");
    if (terms.indices->type != dtype::int32) {
      require_dtype(*terms.indices, dtype::int64, "indices");
    }
    require_dtype(*terms.indptr, terms.indices->type, "indptr");
    if (terms.data->ndim != 1) {
      throw invalid_argument("data: expected shape (nnz,), got " +
                             shape_text(terms.data->shape, terms.data->ndim));
    }
    size.nnz = terms.data->shape[0];
    require_shape(*terms.indices, "indices", "(nnz,)", {size.nnz});
    require_shape(*terms.indptr, "indptr", "(n + 1,)", {n + 1});
  } else {
    require_shape(rows, "rows", "(n, d)", {n, d});
  }
  if (has_group("log_counts", {terms.log_counts, terms.means, terms.covariances})) {
    size.k = check_components(*terms.means, "means", *terms.covariances, "covariances", x.type, d);
    require_dtype(*terms.log_counts, x.type, "log_counts");
    require_shape(*terms.log_counts, "log_counts", "(k,)", {size.k});
  }
  if (has_group("labels", {terms.labels, terms.shifts, terms.slopes})) {
    size.c = check_components(*terms.shifts, "shifts", *terms.slopes, "slopes", x.type, d);
    require_dtype(*terms.labels, dtype::int64, "labels");
    require_shape(*terms.labels, "labels", "(n,)", {n});
  }
  if (has_group("null_weights", {terms.null_weights, terms.null})) {
    require_dtype(*terms.null_weights, x.type, "null_weights");
    require_shape(*terms.null_weights, "null_weights", "(n,)", {n});
    require_dtype(*terms.null, x.type, "null");
    require_shape(*terms.null, "null", "(d,)", {d});
  }
  if (!(step >= 0.0 && step <= 1.0)) {
    throw invalid_argument("step: expected a number from 0 to 1, got " + std::to_string(step));
  }
  if (out != nullptr) {
    require_dtype(*out, x.type, "out");
    require_shape(*out, "out", "(n, d)", {n, d});
  } else if (step != 0.0) {
    throw invalid_argument("out: expected an array where step is not 0, got NULL");
  }
  if (attraction != nullptr) {
    require_dtype(*attraction, x.type, "attraction");
    require_shape(*attraction, "attraction", "(n,)", {n});
  }
  if (log_z != nullptr) {
    if (size.k == 0) {
      throw invalid_argument("log_z: expected none where there are no components, got an array");
    }
    require_dtype(*log_z, x.type, "log_z");
    require_shape(*log_z, "log_z", "(n,)", {n});
  }
  return size;
}

}  // namespace subquad

#endif  // SUBQUAD_EMBEDDING_CHECKS_HPP
