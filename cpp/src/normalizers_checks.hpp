// What the exact log-normaliser and its reverse ask of their arrays, on every device.
#ifndef SUBQUAD_NORMALIZERS_CHECKS_HPP
#define SUBQUAD_NORMALIZERS_CHECKS_HPP

#include <cstdint>

#include "arguments.hpp"

namespace subquad {

// Checks what the forward and the reverse have in common and returns the broadcast batch.
// Everything but x and y is of their arithmetic type.
inline batch_shape check_exact(const array_view& x, const array_view& y,
                               const array_view* log_weights, const array_view* excluded) {
  require_floating(x, "x");
  require_dtype(y, x.type, "y");
  require_rank(x, 2, "x", "(..., n, d)");
  require_rank(y, 2, "y", "(..., m, d)");
  require_length(y, 1, length_from_end(x, 1), "y", "(..., m, d)");
  batch_shape shape;
  shape.include(x, 2, "x");
  shape.include(y, 2, "y");
  if (log_weights) {
    require_dtype(*log_weights, arithmetic_type(x.type), "log_weights");
    require_rank(*log_weights, 1, "log_weights", "(..., m)");
    require_length(*log_weights, 1, length_from_end(y, 2), "log_weights", "(..., m)");
    shape.include(*log_weights, 1, "log_weights");
  }
  if (excluded) {
    require_dtype(*excluded, dtype::int64, "excluded");
    require_rank(*excluded, 1, "excluded", "(n,)");
    require_length(*excluded, 1, length_from_end(x, 2), "excluded", "(n,)");
  }
  return shape;
}

inline batch_shape check_log_normalizer(const array_view& x, const array_view& y,
                                        const array_view* log_weights, const array_view* excluded,
                                        const array_view& out) {
  const batch_shape shape = check_exact(x, y, log_weights, excluded);
  require_dtype(out, arithmetic_type(x.type), "out");
  require_rank(out, 1, "out", "(..., n)");
  require_length(out, 1, length_from_end(x, 2), "out", "(..., n)");
  shape.require(out, 1, "out");
  return shape;
}

inline batch_shape check_log_normalizer_vjp(const array_view& grad, const array_view& x,
                                            const array_view& y, const array_view* log_weights,
                                            const array_view* excluded, const array_view& log_z,
                                            const array_view* grad_x, const array_view* grad_y,
                                            const array_view* grad_log_weights) {
  batch_shape shape = check_exact(x, y, log_weights, excluded);
  const dtype type = arithmetic_type(x.type);
  const std::int64_t n = length_from_end(x, 2);
  const std::int64_t m = length_from_end(y, 2);
  const std::int64_t d = length_from_end(x, 1);
  const auto check_vector = [&](const array_view& array, std::int64_t length, const char* name,
                                const char* expected) {
    require_dtype(array, type, name);
    require_rank(array, 1, name, expected);
    require_length(array, 1, length, name, expected);
  };
  const auto check_matrix = [&](const array_view& array, std::int64_t length, const char* name,
                                const char* expected) {
    require_dtype(array, type, name);
    require_rank(array, 2, name, expected);
    require_length(array, 2, length, name, expected);
    require_length(array, 1, d, name, expected);
    shape.require(array, 2, name);
  };
  check_vector(grad, n, "grad", "(..., n)");
  check_vector(log_z, n, "log_z", "(..., n)");
  shape.include(grad, 1, "grad");
  shape.include(log_z, 1, "log_z");
  if (grad_x) check_matrix(*grad_x, n, "grad_x", "(..., n, d)");
  if (grad_y) check_matrix(*grad_y, m, "grad_y", "(..., m, d)");
  if (grad_log_weights) {
    check_vector(*grad_log_weights, m, "grad_log_weights", "(..., m)");
    shape.require(*grad_log_weights, 1, "grad_log_weights");
  }
  return shape;
}

}  // namespace subquad

#endif  // SUBQUAD_NORMALIZERS_CHECKS_HPP
