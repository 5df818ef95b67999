// The vector mathematics of one instruction-set level as plain functions over arrays, for tests.
#ifndef SUBQUAD_KERNELS_VECTOR_MATH_KERNELS_HPP
#define SUBQUAD_KERNELS_VECTOR_MATH_KERNELS_HPP

#include <cstdint>

namespace subquad {

// out[i] = f(x[i]) for i in [0, n), any n and any alignment; x may be out.
struct vector_math_kernels {
  void (*exp_f32)(const float* x, float* out, std::int64_t n);
  void (*log_f32)(const float* x, float* out, std::int64_t n);
  void (*log1p_f32)(const float* x, float* out, std::int64_t n);
  void (*exp_f64)(const double* x, double* out, std::int64_t n);
  void (*log_f64)(const double* x, double* out, std::int64_t n);
  void (*log1p_f64)(const double* x, double* out, std::int64_t n);
  void (*exp2_bounded_f32)(const float* x, float* out, std::int64_t n);
  void (*exp2_bounded_f64)(const double* x, double* out, std::int64_t n);
  void (*sin_bounded_f32)(const float* x, float* out, std::int64_t n);
  void (*cos_bounded_f32)(const float* x, float* out, std::int64_t n);
  void (*sin_bounded_f64)(const double* x, double* out, std::int64_t n);
  void (*cos_bounded_f64)(const double* x, double* out, std::int64_t n);
  void (*gelu_f32)(const float* x, float* out, std::int64_t n);
  void (*gelu_derivative_f32)(const float* x, float* out, std::int64_t n);
  void (*gelu_f64)(const double* x, double* out, std::int64_t n);
  void (*gelu_derivative_f64)(const double* x, double* out, std::int64_t n);
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_VECTOR_MATH_KERNELS_HPP
