// What the log-normaliser of a Gaussian mixture, its reverse and its moments ask of their arrays,
// on every device.
#ifndef SUBQUAD_GAUSSIAN_NORMALIZERS_CHECKS_HPP
#define SUBQUAD_GAUSSIAN_NORMALIZERS_CHECKS_HPP

#include <cstdint>
#include <initializer_list>

#include "arguments.hpp"

namespace subquad {

struct mixture_sizes {
  std::int64_t batch;
  std::int64_t n;
  std::int64_t k;
  std::int64_t d;
  std::int64_t r;
};

struct mixture {
  const array_view& x;
  const array_view* log_counts;
  const array_view& means;
  const array_view& factors;
  const array_view* diagonal;
  batch_shape shape{};
  mixture_sizes size{};
};

// Checks the arrays that every function takes.
inline mixture check_mixture(const array_view& x, const array_view* log_counts,
                             const array_view& means, const array_view& factors,
                             const array_view* diagonal) {
  mixture found{x, log_counts, means, factors, diagonal};
  require_real(x, "x");
  require_rank(x, 2, "x", "(..., n, d)");
  require_dtype(means, x.type, "means");
  require_rank(means, 2, "means", "(..., k, d)");
  require_dtype(factors, x.type, "factors");
  require_rank(factors, 3, "factors", "(..., k, d, r)");
  const std::int64_t d = length_from_end(x, 1);
  const std::int64_t k = length_from_end(means, 2);
  require_length(means, 1, d, "means", "(..., k, d)");
  require_length(factors, 3, k, "factors", "(..., k, d, r)");
  require_length(factors, 2, d, "factors", "(..., k, d, r)");
  found.shape.include(x, 2, "x");
  found.shape.include(means, 2, "means");
  found.shape.include(factors, 3, "factors");
  if (log_counts) {
    require_dtype(*log_counts, x.type, "log_counts");
    require_rank(*log_counts, 1, "log_counts", "(..., k)");
    require_length(*log_counts, 1, k, "log_counts", "(..., k)");
    found.shape.include(*log_counts, 1, "log_counts");
  }
  if (diagonal) {
    require_dtype(*diagonal, x.type, "diagonal");
    require_rank(*diagonal, 2, "diagonal", "(..., k, d)");
    require_length(*diagonal, 2, k, "diagonal", "(..., k, d)");
    require_length(*diagonal, 1, d, "diagonal", "(..., k, d)");
    found.shape.include(*diagonal, 2, "diagonal");
  }
  found.size = {found.shape.count(), length_from_end(x, 2), k, d, length_from_end(factors, 1)};
  return found;
}

// An array with the broadcast batch dimensions; `lengths` are those of its last `core` ones.
inline void check_mixture_array(const mixture& m, const array_view& array, std::int32_t core,
                                const char* name, const char* expected,
                                std::initializer_list<std::int64_t> lengths) {
  require_dtype(array, m.x.type, name);
  require_rank(array, core, name, expected);
  std::int32_t position = core;
  for (const std::int64_t length : lengths)
    require_length(array, position--, length, name, expected);
  m.shape.require(array, core, name);
}

inline mixture check_gaussian_log_normalizer(const array_view& x, const array_view& log_counts,
                                             const array_view& means, const array_view& factors,
                                             const array_view* diagonal,
                                             const array_view* own_component,
                                             const array_view* own_log_weight,
                                             const array_view& out) {
  const mixture m = check_mixture(x, &log_counts, means, factors, diagonal);
  check_mixture_array(m, out, 1, "out", "(..., n)", {m.size.n});
  if ((own_component == nullptr) != (own_log_weight == nullptr)) {
    throw invalid_argument("own_log_weight: expected with own_component and only then");
  }
  if (own_component) {
    require_dtype(*own_component, dtype::int64, "own_component");
    require_rank(*own_component, 1, "own_component", "(n,)");
    require_length(*own_component, 1, m.size.n, "own_component", "(n,)");
    require_dtype(*own_log_weight, x.type, "own_log_weight");
    require_rank(*own_log_weight, 1, "own_log_weight", "(n,)");
    require_length(*own_log_weight, 1, m.size.n, "own_log_weight", "(n,)");
  }
  return m;
}

inline mixture check_gaussian_score_moments(const array_view& x, const array_view& means,
                                            const array_view& factors, const array_view* diagonal,
                                            const array_view& mean, const array_view& variance) {
  const mixture m = check_mixture(x, nullptr, means, factors, diagonal);
  check_mixture_array(m, mean, 2, "mean", "(..., n, k)", {m.size.n, m.size.k});
  check_mixture_array(m, variance, 2, "variance", "(..., n, k)", {m.size.n, m.size.k});
  return m;
}

inline mixture check_gaussian_log_normalizer_vjp(
    const array_view& grad, const array_view& x, const array_view& log_counts,
    const array_view& means, const array_view& factors, const array_view* diagonal,
    const array_view& log_z, const array_view* grad_x, const array_view* grad_log_counts,
    const array_view* grad_means, const array_view* grad_factors, const array_view* grad_diagonal) {
  const mixture m = check_mixture(x, &log_counts, means, factors, diagonal);
  const auto& [batch, n, k, d, r] = m.size;
  check_mixture_array(m, grad, 1, "grad", "(..., n)", {n});
  check_mixture_array(m, log_z, 1, "log_z", "(..., n)", {n});
  if (grad_x) check_mixture_array(m, *grad_x, 2, "grad_x", "(..., n, d)", {n, d});
  if (grad_log_counts) {
    check_mixture_array(m, *grad_log_counts, 1, "grad_log_counts", "(..., k)", {k});
  }
  if (grad_means) check_mixture_array(m, *grad_means, 2, "grad_means", "(..., k, d)", {k, d});
  if (grad_factors) {
    check_mixture_array(m, *grad_factors, 3, "grad_factors", "(..., k, d, r)", {k, d, r});
  }
  if (grad_diagonal) {
    check_mixture_array(m, *grad_diagonal, 2, "grad_diagonal", "(..., k, d)", {k, d});
  }
  return m;
}

}  // namespace subquad

#endif  // SUBQUAD_GAUSSIAN_NORMALIZERS_CHECKS_HPP
