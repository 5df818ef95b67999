// What random features ask of their arrays, on every device.
#ifndef SUBQUAD_FEATURES_CHECKS_HPP
#define SUBQUAD_FEATURES_CHECKS_HPP

#include <cstdint>
#include <string>

#include "arguments.hpp"

namespace subquad {

struct feature_sizes {
  std::int64_t batch;
  std::int64_t n;
  std::int64_t m;  // rows of the projection
  std::int64_t d;
  std::int64_t r;  // rows of the factor, 0 where there is none
};

// The arrays that every function takes.
struct feature_map {
  const array_view& x;
  const array_view& projection;
  const array_view* bias;
  const array_view* diagonal;
  const array_view* factor;
  const array_view* shift;
  const array_view* linear;
  batch_shape shape{};
  feature_sizes size{};
};

// x may be of a 16-bit type; all else is of the type that it is computed in.
inline feature_map check_feature_map(const array_view& x, const array_view& projection,
                                     const array_view* bias, const array_view* diagonal,
                                     const array_view* factor, const array_view* shift,
                                     const array_view* linear) {
  feature_map found{x, projection, bias, diagonal, factor, shift, linear};
  require_floating(x, "x");
  require_rank(x, 2, "x", "(..., n, d)");
  const dtype type = arithmetic_type(x.type);
  require_dtype(projection, type, "projection");
  require_rank(projection, 2, "projection", "(..., m, d)");
  const std::int64_t d = length_from_end(x, 1);
  const std::int64_t m = length_from_end(projection, 2);
  require_length(projection, 1, d, "projection", "(..., m, d)");
  found.shape.include(x, 2, "x");
  found.shape.include(projection, 2, "projection");
  if (bias) {
    require_dtype(*bias, type, "bias");
    require_rank(*bias, 1, "bias", "(..., m)");
    require_length(*bias, 1, m, "bias", "(..., m)");
    found.shape.include(*bias, 1, "bias");
  }
  const auto include_row = [&](const array_view* array, const char* name) {
    if (!array) return;
    require_dtype(*array, type, name);
    require_rank(*array, 1, name, "(..., d)");
    require_length(*array, 1, d, name, "(..., d)");
    found.shape.include(*array, 1, name);
  };
  include_row(diagonal, "diagonal");
  if (factor) {
    require_dtype(*factor, type, "factor");
    require_rank(*factor, 2, "factor", "(..., r, d)");
    require_length(*factor, 1, d, "factor", "(..., r, d)");
    found.shape.include(*factor, 2, "factor");
  }
  include_row(shift, "shift");
  include_row(linear, "linear");
  found.size = {found.shape.count(), length_from_end(x, 2), m, d,
                factor ? length_from_end(*factor, 2) : 0};
  return found;
}

// `features` is out or its gradient.
inline void require_features(const feature_map& map, bool pairs, const array_view& features,
                             const char* name) {
  const char* expected = pairs ? "(..., n, 2 m)" : "(..., n, m)";
  require_dtype(features, arithmetic_type(map.x.type), name);
  require_rank(features, 2, name, expected);
  require_length(features, 2, map.size.n, name, expected);
  require_length(features, 1, pairs ? 2 * map.size.m : map.size.m, name, expected);
}

inline feature_map check_features(const array_view& x, const array_view& projection,
                                  const array_view* bias, const array_view* diagonal,
                                  const array_view* factor, const array_view* shift,
                                  const array_view* linear, bool pairs, const array_view& out,
                                  const char* name) {
  const feature_map map = check_feature_map(x, projection, bias, diagonal, factor, shift, linear);
  require_features(map, pairs, out, name);
  map.shape.require(out, 2, name);
  return map;
}

// The bias has no part in the gradient of x, but its batches have.
inline feature_map check_log_features_vjp(const array_view& grad, const array_view& x,
                                          const array_view& projection, const array_view* diagonal,
                                          const array_view* factor, const array_view* shift,
                                          const array_view* linear, bool antithetic,
                                          const array_view& grad_x) {
  feature_map map = check_feature_map(x, projection, nullptr, diagonal, factor, shift, linear);
  require_features(map, antithetic, grad, "grad");
  map.shape.include(grad, 2, "grad");
  map.size.batch = map.shape.count();
  require_dtype(grad_x, arithmetic_type(x.type), "grad_x");
  require_rank(grad_x, 2, "grad_x", "(..., n, d)");
  require_length(grad_x, 2, map.size.n, "grad_x", "(..., n, d)");
  require_length(grad_x, 1, map.size.d, "grad_x", "(..., n, d)");
  map.shape.require(grad_x, 2, "grad_x");
  return map;
}

// The batch dimensions of both arrays.
inline batch_shape check_hadamard_transform(const array_view& x, const array_view& out) {
  require_real(x, "x");
  require_rank(x, 1, "x", "(..., d)");
  const std::int64_t d = length_from_end(x, 1);
  if (d < 1 || (d & (d - 1)) != 0) {
    throw invalid_argument("x: expected a power of two on its last axis, got shape " +
                           shape_text(x.shape, x.ndim));
  }
  require_dtype(out, x.type, "out");
  require_rank(out, 1, "out", "(..., d)");
  require_length(out, 1, d, "out", "(..., d)");
  batch_shape shape;
  shape.include(x, 1, "x");
  shape.require(out, 1, "out");
  return shape;
}

}  // namespace subquad

#endif  // SUBQUAD_FEATURES_CHECKS_HPP
