// What both directions of the networks of sparse factors share: GELU, the arrays, and where they
// lie for a block.
#ifndef SUBQUAD_CUDA_FACTOR_VALUES_CUH
#define SUBQUAD_CUDA_FACTOR_VALUES_CUH

#include <cmath>
#include <cstdint>

#include "batches.cuh"
#include "device.cuh"
#include "factors_checks.hpp"
#include "tile_product.cuh"

namespace subquad::cuda {

// 1 / x within 1 ulp; of what is below 2^-126, an infinity.
SUBQUAD_DEVICE float reciprocal(float x) {
#if defined(__CUDACC__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1.0f / x;
#endif
}

// The distribution function of a standard normal number and its density. With u = 2^-24: the lower
// tail is within (2 z^2 + 6) u of itself and 2^-126, the upper one is 1 less that, and the density
// within (z^2 + 6) u of itself and 2^-126.
SUBQUAD_DEVICE void normal_parts(float z, float& probability, float& density) {
  // exp(z^2 / 2) times the tail is a polynomial in 1 / (1 + 0.3 |z|), within (z^2 / 2 + 1) 2^-25.
  const float bell = power_of_2(z * z * (-0.5f * kLog2E<float>));
  const float t = reciprocal(fma(0.3f, fabsf(z), 1.0f));
  float scaled = 0x1.26bf98p-5f;
  scaled = fma(scaled, t, -0x1.437ed8p-3f);
  scaled = fma(scaled, t, 0x1.a7236ep-3f);
  scaled = fma(scaled, t, -0x1.b088a6p-5f);
  scaled = fma(scaled, t, 0x1.04ebbep-3f);
  scaled = fma(scaled, t, 0x1.9bac58p-4f);
  scaled = fma(scaled, t, 0x1.ee0a74p-4f);
  scaled = fma(scaled, t, 0x1.ea0d16p-4f);
  const float tail = scaled * t * bell;
  probability = z < 0 ? tail : 1.0f - tail;
  density = 0.398942280401432678f * bell;
}
// With u = 2^-53, as erfc and exp are: the lower tail within (2 z^2 + 12) u of itself.
SUBQUAD_DEVICE void normal_parts(double z, double& probability, double& density) {
#if !defined(__CUDACC__)
  using std::erfc;
  using std::exp;
#endif
  probability = 0.5 * erfc(z * -0.707106781186547524);
  density = 0.398942280401432678 * exp(-0.5 * z * z);
}

// Where P(z) is 0 below and 1 above, and the product of z with its density 0.
template <class T>
inline constexpr T kNormalEnd = T(64);

// gelu(z) = z P(z), P the distribution function of a standard normal number: 0 at -infinity.
template <class T>
SUBQUAD_DEVICE T gelu(T z) {
  T probability;
  T density;
  normal_parts(z, probability, density);
  return z < -kNormalEnd<T> ? T(0) : z * probability;
}

// P(z) + z p(z), p the density: 0 at -infinity, 1 at infinity.
template <class T>
SUBQUAD_DEVICE T gelu_derivative(T z) {
  T probability;
  T density;
  normal_parts(z, probability, density);
  const bool is_flat = z < -kNormalEnd<T> || z > kNormalEnd<T>;
  return is_flat ? probability : fma(z, density, probability);
}

enum network_array {
  kOfX,
  kOfWeightIn,
  kOfBiasIn,
  kOfWeightOut,
  kOfValues,  // out, or its gradient
  kOfBiasOut,
  kOfBiasResult,
  kNetworkArrays,
  kOfResult = kOfBiasOut  // of the reverse, which has no bias_out
};

// The arrays of a call.
template <class T>
struct networks {
  matrix_view<const T> x;
  stack_view<const T> weight_in;
  matrix_view<const T> bias_in;
  stack_view<const T> weight_out;
  network_sizes size;

  networks(const factor_networks& call, const array_view& x_, const array_view& weight_in_,
           const array_view& bias_in_, const array_view& weight_out_)
      : x(matrix_at<const T>(x_, 0)),
        weight_in(stack_at<const T>(weight_in_, 0)),
        bias_in(matrix_at<const T>(bias_in_, 0)),
        weight_out(stack_at<const T>(weight_out_, 0)),
        size(call.size) {}

  // `of_*`: elements from the start of an array to its part for an entry of the batch.
  SUBQUAD_DEVICE rows_of<T> rows(std::int64_t of_x, std::int64_t first, std::int64_t most) const {
    return rows_between(x, of_x, first, end_of(first, most, size.n), size.d);
  }
  SUBQUAD_DEVICE rows_of<T> hidden_rows(std::int64_t of_weight, std::int64_t factor,
                                        std::int64_t first, std::int64_t most) const {
    return rows_between(weight_in[factor], of_weight, first, end_of(first, most, size.h), size.d);
  }
  SUBQUAD_DEVICE vector_view<const T> hidden_bias(std::int64_t of_bias, std::int64_t factor,
                                                  std::int64_t first) const {
    return {&bias_in(factor, first) + of_bias, bias_in.column_stride};
  }

  static SUBQUAD_DEVICE std::int64_t end_of(std::int64_t first, std::int64_t most,
                                            std::int64_t length) {
    return first + most < length ? first + most : length;
  }
};

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_FACTOR_VALUES_CUH
