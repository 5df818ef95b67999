// The functions of the concept `features`, as the C ABI and the Python module call them.
//
// Formulas and shapes stand in subquad/c_api.h. Optional arrays are pointers, null where absent.
// Outputs are written in full. `workspace` is uint8, 1-D, contiguous and at least as long as the
// matching `*_workspace` function says for the broadcast batch; it needs no alignment.
// Throws invalid_argument for a wrong shape and type_error for a wrong element type, naming the
// argument.
#ifndef SUBQUAD_FEATURES_CORE_HPP
#define SUBQUAD_FEATURES_CORE_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"

namespace subquad::core {

std::size_t log_features_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                   std::int64_t d, std::int64_t r, std::int64_t itemsize);
void log_features(const array_view& x, const array_view& projection, const array_view& bias,
                  const array_view* diagonal, const array_view* factor, const array_view* shift,
                  const array_view* linear, bool antithetic, bool exponentiate,
                  const array_view& out, const array_view& workspace);

std::size_t log_features_vjp_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                       std::int64_t d, std::int64_t r, std::int64_t itemsize);
void log_features_vjp(const array_view& grad, const array_view& x, const array_view& projection,
                      const array_view* diagonal, const array_view* factor, const array_view* shift,
                      const array_view* linear, bool antithetic, const array_view& grad_x,
                      const array_view& workspace);

void trigonometric_features(const array_view& x, const array_view& projection,
                            const array_view& bias, const array_view* diagonal,
                            const array_view* factor, const array_view* shift,
                            const array_view* linear, const array_view& out,
                            const array_view& workspace);

std::size_t hadamard_transform_workspace(std::int64_t batch, std::int64_t d, std::int64_t itemsize);
void hadamard_transform(const array_view& x, const array_view& out, const array_view& workspace);

}  // namespace subquad::core

#endif  // SUBQUAD_FEATURES_CORE_HPP
