// What sample_residuals asks of its arrays, on every device. Values of offsets are another matter:
// only the CPU looks at them before it computes.
#ifndef SUBQUAD_SAMPLE_RESIDUALS_CHECKS_HPP
#define SUBQUAD_SAMPLE_RESIDUALS_CHECKS_HPP

#include <cstdint>
#include <initializer_list>

#include "arguments.hpp"

namespace subquad {

inline void check_sample_residuals(const array_view& x, const array_view& deviations,
                                   const array_view& weights, const array_view& offsets,
                                   const array_view& variance, const array_view& scale,
                                   const array_view* shift, const array_view* excluded,
                                   const array_view& log_factor, const array_view& log_error,
                                   const array_view& third) {
  require_real(x, "x");
  const auto check = [&](const array_view& array, const char* name, const char* expected,
                         std::initializer_list<std::int64_t> lengths) {
    require_dtype(array, x.type, name);
    require_shape(array, name, expected, lengths);
  };
  if (x.ndim != 2) {
    throw invalid_argument("x: expected shape (n, d), got " + shape_text(x.shape, x.ndim));
  }
  if (deviations.ndim != 2) {
    throw invalid_argument("deviations: expected shape (s, d), got " +
                           shape_text(deviations.shape, deviations.ndim));
  }
  const std::int64_t n = x.shape[0];
  const std::int64_t s = deviations.shape[0];
  check(deviations, "deviations", "(s, d)", {s, x.shape[1]});
  check(weights, "weights", "(s,)", {s});
  require_dtype(offsets, dtype::int64, "offsets");
  if (offsets.ndim != 1 || offsets.shape[0] < 1) {
    throw invalid_argument("offsets: expected shape (k + 1,), got " +
                           shape_text(offsets.shape, offsets.ndim));
  }
  const std::int64_t k = offsets.shape[0] - 1;
  check(variance, "variance", "(n, k)", {n, k});
  check(scale, "scale", "(n, k)", {n, k});
  if (shift) check(*shift, "shift", "(n, k)", {n, k});
  if (excluded) {
    require_dtype(*excluded, dtype::int64, "excluded");
    require_shape(*excluded, "excluded", "(n,)", {n});
  }
  check(log_factor, "log_factor", "(n, k)", {n, k});
  check(log_error, "log_error", "(n, k)", {n, k});
  check(third, "third", "(n, k)", {n, k});
}

}  // namespace subquad

#endif  // SUBQUAD_SAMPLE_RESIDUALS_CHECKS_HPP
