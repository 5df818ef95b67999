// Running log-sum-exp, one per lane, in units of log 2.
//
// The state (shift, sum) stands for log sum = ln 2 * (shift + log2(sum)); the shift is the largest
// score so far, so that no exponential overflows and the largest contributes 1. An empty state has
// the lowest finite shift, not -inf: scores of -inf then give exp2(-inf) = 0 and not NaN.
#ifndef SUBQUAD_KERNELS_LOG_SUM_EXP_INL
#define SUBQUAD_KERNELS_LOG_SUM_EXP_INL

#include "tile_product.inl"
#include "vector_math.inl"

namespace subquad {
namespace SUBQUAD_ISA {

template <class T>
constexpr T kLog2E = static_cast<T>(1.4426950408889634073599246810018921L);
template <class T>
constexpr T kLn2 = static_cast<T>(0.6931471805599453094172321214581766L);
template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kLowest = sizeof(T) == 4 ? static_cast<T>(-__FLT_MAX__) : static_cast<T>(-__DBL_MAX__);

template <class T>
struct log_sum_exp {
  vec<T> shift;
  vec<T> sum;
};

// Adds the exponentials of a vector of scores (natural units).
template <class T>
SUBQUAD_INLINE void push(log_sum_exp<T>& state, vec<T> score) {
  const vec<T> shift = max<T>(score * kLog2E<T>, state.shift);
  state.sum =
      state.sum * exp2_bounded<T>(state.shift - shift) + exp2_bounded<T>(score * kLog2E<T> - shift);
  state.shift = shift;
}

// Adds the exponentials of a tile of scores. The products with log2(e) are exact inside the fused
// multiply-add, and the tile is summed as a tree before it meets the running sum.
template <class T>
SUBQUAD_INLINE void push(log_sum_exp<T> (&state)[kTileVectors], const tile<T>& scores) {
  SUBQUAD_UNROLL_VECTORS
  for (int v = 0; v < kTileVectors; ++v) {
    vec<T> largest = scores[0][v];
    SUBQUAD_UNROLL_ROWS
    for (int r = 1; r < kTileRows; ++r) largest = max<T>(scores[r][v], largest);
    const vec<T> shift = max<T>(largest * kLog2E<T>, state[v].shift);
    vec<T> sum = state[v].sum * exp2_bounded<T>(state[v].shift - shift);
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kTileRows; r += 3) {
      sum += exp2_bounded<T>(scores[r][v] * kLog2E<T> - shift) +
             exp2_bounded<T>(scores[r + 1][v] * kLog2E<T> - shift) +
             exp2_bounded<T>(scores[r + 2][v] * kLog2E<T> - shift);
    }
    state[v].sum = sum;
    state[v].shift = shift;
  }
}

// The logarithm that a state stands for: -inf where nothing was added.
template <class T>
SUBQUAD_INLINE vec<T> finalize(const log_sum_exp<T>& state) {
  return state.shift * kLn2<T> + log<T>(state.sum);
}

}  // namespace SUBQUAD_ISA
}  // namespace subquad

#endif  // SUBQUAD_KERNELS_LOG_SUM_EXP_INL
